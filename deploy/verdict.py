"""A verdict as files: numbers for machines, a comment for a pull request, JUnit's XML for a list of tests.

What strangers wrote, names and values in manifests, stands in code spans and in XML's own escapes.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..core.artifact import Order, drafting, write_json
from ..core.config import GateConfig
from ..core.kinds import Moved, RuleVerdict, Verdict, VerdictFacts
from ..core.rules import Unit
from ..core.sealed import printable
from ..core.stats import Interval
from ..report.words import NOTHING, figure, percent, points

VERSION = 1
MOST_MOVED = 20  # lines of what changed
WORST_FIRST = ("fail", "cannot tell", "pass")
# What XML 1.0 has no way to write, beyond the control characters that ``printable`` spells out.
_NOT_XML = re.compile("[\ufffe\uffff]")


def write(order: Order[GateConfig], facts: VerdictFacts, out: Path) -> Verdict:
    """Seal a verdict with its files."""
    with drafting(Verdict, order, out) as draft:
        write_json(draft.path / Verdict.NUMBERS, numbers(facts))
        (draft.path / Verdict.COMMENT).write_text(comment(facts), encoding="utf-8")
        (draft.path / Verdict.JUNIT).write_text(junit(facts), encoding="utf-8")
        draft.facts = facts
    return draft.artifact


def numbers(facts: VerdictFacts) -> dict[str, object]:
    """All of it, for JSON."""
    return {"schema_version": VERSION, **facts.model_dump(mode="json")}


# ---- in words ----------------------------------------------------------------------------------------------------


def lines(facts: VerdictFacts) -> Iterator[str]:
    """What a terminal shows: what could have been seen, what changed, every rule, and the answer."""
    if told := detectable(facts.rules):
        yield f"smallest change that this data shows nine times of ten: {'; '.join(told)}"
    if has_moved(facts.rules):
        yield from (f"changed: {line}" for line in changes(facts, plain=True))
    yield from (f"only on one side: {line}" for line in facts.apart)
    for rule in sorted(facts.rules, key=lambda rule: WORST_FIRST.index(rule.answer)):
        why = f"; {rule.why}" if rule.why else ""
        yield f"{rule.answer}: {rule.rule} ({rule.target} on {rule.device}): {compared(rule)}{why}"
    yield summary(facts)


def summary(facts: VerdictFacts) -> str:
    """The answer, and of how many rules."""
    counts = {answer: sum(rule.answer == answer for rule in facts.rules) for answer in WORST_FIRST}
    kept = f"{counts['pass']} of {len(facts.rules)} rules are kept"
    more = [
        f"{counts[answer]} {'is' if counts[answer] == 1 else 'are'} {word}"
        for answer, word in (("fail", "broken"), ("cannot tell", "not told"))
        if counts[answer]
    ]
    return f"{facts.answer}: {', '.join([kept, *more])}"


def would_tell(facts: VerdictFacts) -> str:
    """How much measuring would tell what is not told."""
    needed: dict[str, int] = {}
    for rule in facts.rules:
        if rule.answer == "cannot tell" and rule.needed is not None:
            needed[rule.counted] = max(needed.get(rule.counted, 0), rule.needed)
    told = [f"about {count:,} {counted}" for counted, count in needed.items()]
    if "sessions" in needed:
        told.append(f"that is --sessions {needed['sessions']}")
    return f"{', '.join(told)} would tell" if told else "the rules say why"


def has_moved(rules: Sequence[RuleVerdict]) -> bool:
    """Whether some figure is surely not what the baseline's is, or not what a rule wants."""
    return any(rule.answer == "fail" or _moved(rule) for rule in rules)


def _moved(rule: RuleVerdict) -> bool:
    found, same = rule.estimate, 1.0 if rule.compared == "ratio" else 0.0
    if rule.compared == "value" or found is None or found.low is None or found.high is None:
        return False
    return not found.low <= same <= found.high


def detectable(rules: Sequence[RuleVerdict]) -> list[str]:
    """The smallest change of each figure, target and device that would have been seen, each once."""
    told = [
        f"{rule.figure} of {rule.target} on {rule.device} {_change(rule)} ({rule.count:,} {rule.counted})"
        for rule in rules
        if rule.detectable is not None and rule.counted != "exact"
    ]
    return list(dict.fromkeys(told))


def _change(rule: RuleVerdict) -> str:
    if rule.detectable is None:
        return NOTHING
    if rule.unit == "share":
        return f"{figure(100 * rule.detectable, 2)} points"
    if rule.compared == "difference":
        return _value(rule.detectable, rule.unit)
    return f"{figure(100 * rule.detectable, 2)} %"


def compared(rule: RuleVerdict) -> str:
    """What was found, with its interval, and what was allowed."""
    if rule.estimate is None:
        return "nothing is known"
    if rule.compared == "ratio":
        return f"{_interval(rule.estimate, '', 4)} of the baseline, allowed {figure(rule.bound, 4)}"
    if rule.compared == "difference" and rule.unit == "share":
        ends = [points(100 * end) for end in (rule.estimate.low, rule.estimate.high) if end is not None]
        span = f" [{', '.join(ends)}]" if len(ends) == 2 else " (n too small)"
        return f"{points(100 * rule.estimate.value)}{span} points, allowed {points(100 * rule.bound)}"
    if rule.compared == "difference":
        return (
            f"{_interval(rule.estimate, rule.unit, 3)} more than the baseline, allowed {_value(rule.bound, rule.unit)}"
        )
    return f"{_interval(rule.estimate, rule.unit, 4)}, allowed {_value(rule.bound, rule.unit)}"


def _interval(found: Interval, unit: Unit | str, digits: int) -> str:
    scale, word = _scale(unit, found.value)
    ends = [figure(end / scale, digits) for end in (found.low, found.high) if end is not None]
    if found.low == found.high == found.value:
        span = ""
    else:
        span = f" [{', '.join(ends)}]" if len(ends) == 2 else " (n too small)"
    return f"{figure(found.value / scale, digits)}{span}{word}"


def _value(value: float | None, unit: Unit | str) -> str:
    if value is None:
        return NOTHING
    if unit == "share":
        return f"{percent(value)} %"
    scale, word = _scale(unit, value)
    return f"{figure(value / scale, 4)}{word}"


def _scale(unit: Unit | str, value: float) -> tuple[float, str]:
    if unit == "bytes":
        return (1e6, " MB") if abs(value) >= 1e6 else (1e3, " kB")
    return {"share": (0.01, " %"), "ms": (1.0, " ms")}.get(unit, (1.0, ""))


def changes(facts: VerdictFacts, *, plain: bool = False) -> list[str]:
    """What changed since the baseline, a line a group; the same for several targets once."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for whose, found in ((facts.changed, "{}"), (facts.since, "{} since the baseline was measured")):
        for name, moved in whose.items():
            name = printable(name, 200) if plain else _code(name)
            for about, told in _by_kind(moved, plain=plain).items():
                groups.setdefault((about, told), []).append(found.format(name))
    return [f"{about} ({', '.join(names)}): {'; '.join(told)}" for (about, told), names in groups.items()]


def _by_kind(moved: Sequence[Moved], *, plain: bool) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for each in moved:
        found.setdefault(each.about, []).append(printable(each.words(), 300) if plain else _code(each.words()))
    return {
        about: (*told[:MOST_MOVED], *([f"and {len(told) - MOST_MOVED} more"] if len(told) > MOST_MOVED else []))
        for about, told in found.items()
    }


# ---- for a pull request ------------------------------------------------------------------------------------------


def comment(facts: VerdictFacts) -> str:
    """Markdown: the answer, what changed where a number moved, a table of the rules."""
    against = "" if facts.baseline is None else f" against {_code(facts.baseline)}"
    answer, _, counted = summary(facts).partition(": ")
    parts = [f"## kdpipe gate: {answer}", f"{_code(facts.candidate)}{against}: {counted}."]
    told = [f"- {line}" for line in changes(facts)]
    moved = has_moved(facts.rules)
    if told and moved:
        parts.append("### A number moved: what changed\n\n" + "\n".join(told))
    parts.append(_table(facts.rules))
    reasons = dict.fromkeys(
        f"- **{rule.answer}**: {_code(rule.rule)} ({_code(rule.target)} on {_code(rule.device)}): {_code(rule.why)}"
        for rule in facts.rules
        if rule.why and rule.answer != "pass"
    )
    if reasons:
        parts.append("\n".join(reasons))
    if facts.apart:
        parts.append("Only on one side: " + ", ".join(map(_code, facts.apart)) + ".")
    if told and not moved:
        rest = "\n".join(told)
        parts.append(f"<details><summary>What changed since the baseline</summary>\n\n{rest}\n\n</details>")
    parts.append(
        "Intervals are of 95 %, and the whole of one decides. *Detects*: the smallest change that this data shows nine "
        "times of ten. *Cannot tell* is neither good nor bad: measure as much as it says."
    )
    return "\n\n".join(parts) + "\n"


def _table(rules: Sequence[RuleVerdict]) -> str:
    rows = [
        "| answer | rule | target | device | candidate | baseline | found | detects |",
        "|---|---|---|---|--:|--:|---|--:|",
    ]
    for rule in sorted(rules, key=lambda rule: WORST_FIRST.index(rule.answer)):
        answer = rule.answer if rule.answer == "pass" else f"**{rule.answer}**"
        cells = [answer, _code(rule.rule), _code(rule.target), _code(rule.device), _value(rule.candidate, rule.unit)]
        cells += [
            _value(rule.baseline, rule.unit),
            compared(rule),
            NOTHING if rule.counted == "exact" else _change(rule),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _code(text: str) -> str:
    """A code span: nothing in it is a link, a mention, HTML or the end of a table's cell."""
    inside = printable(text, 300).replace("`", "'").replace("|", "\N{BROKEN BAR}").strip()
    return f"`{inside or ' '}`"


# ---- for a list of tests -----------------------------------------------------------------------------------------


def junit(facts: VerdictFacts) -> str:
    """JUnit's XML, a test a rule, target and device: what is broken is a failure, what is not told an error."""
    counts = {answer: sum(rule.answer == answer for rule in facts.rules) for answer in WORST_FIRST}
    suite = ElementTree.Element(
        "testsuite",
        name="kdpipe gate",
        tests=str(len(facts.rules)),
        failures=str(counts["fail"]),
        errors=str(counts["cannot tell"]),
    )
    for rule in facts.rules:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(f"{rule.device}.{rule.target}"), name=_xml(rule.rule)
        )
        why = f"; {rule.why}" if rule.why else ""
        if rule.answer == "fail":
            ElementTree.SubElement(case, "failure", type="broken", message=_xml(f"{compared(rule)}{why}"))
        elif rule.answer == "cannot tell":
            ElementTree.SubElement(case, "error", type="cannot tell", message=_xml(f"{compared(rule)}{why}"))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(compared(rule))
    told = [*(f"changed: {line}" for line in changes(facts, plain=True)), summary(facts)]
    ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(told), most=20_000)
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.indent(whole)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(whole, encoding="unicode") + "\n"


def _xml(text: str, most: int = 2000) -> str:
    """Text that XML can hold; its own characters are escaped when it is written."""
    return "\n".join(_NOT_XML.sub("?", printable(line, most)) for line in text.split("\n"))
