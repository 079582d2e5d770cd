"""What a gate is asked, as text in one general form: a figure, a relation, a bound; of a device and of a target.

``accuracy >= baseline - 0.5pp``, ``latency p50 <= 1.02 x baseline on pi5``, ``size <= 4MB for int8``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .errors import UserError, did_you_mean
from .sealed import NAME, printable

LONGEST_RULE = 200  # characters
MOST_RULES = 100
Relation = Literal["<=", ">="]
Unit = Literal["share", "ms", "bytes"]
# By what a figure is known. Of ``images`` both networks see the same ones, each session measures both, each of the
# ``processes`` of a session has one of the other beside it; what is ``exact`` is known without any of them.
Counted = Literal["images", "sessions", "processes", "exact"]


@dataclass(frozen=True)
class Kind:
    """What is known of a figure before it is measured: its unit, its good side, and what it is counted by."""

    unit: Unit
    lower_is_better: bool
    counted: Counted


FIGURES: dict[str, Kind] = {
    "accuracy": Kind("share", False, "images"),
    "worst class": Kind("share", False, "images"),
    "calibration error": Kind("share", True, "images"),
    **{f"latency p{percent}": Kind("ms", True, "sessions") for percent in (50, 90, 95, 99)},
    "end to end": Kind("ms", True, "sessions"),
    "cold start": Kind("ms", True, "sessions"),
    "memory": Kind("bytes", True, "processes"),
    "size": Kind("bytes", True, "exact"),
}
OTHER_NAMES = {
    "latency": "latency p50",
    "top-1": "accuracy",
    "top1": "accuracy",
    "acc": "accuracy",
    "miou": "accuracy",
    "mean iou": "accuracy",
    "ece": "calibration error",
}
UNITS: dict[Unit, dict[str, float]] = {
    "share": {"%": 0.01},
    "ms": {"us": 0.001, "µs": 0.001, "ms": 1.0, "s": 1000.0},
    "bytes": {
        "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
    },
}  # fmt: skip
POINTS = "pp"  # of a share, of which one per cent of it would be something else
USUAL = {"share": "90% or baseline - 0.5pp", "ms": "8ms or 1.05 x baseline", "bytes": "4MB or baseline + 10%"}

_NUMBER = r"[0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30}"
_ABSOLUTE = re.compile(rf"(?P<number>{_NUMBER}) ?(?P<unit>[a-zA-Zµ%]*)")
_RELATIVE = re.compile(
    rf"(?:(?P<factor>{_NUMBER}) ?[xX*×] ?)?baseline"
    rf"(?: ?(?P<sign>[+-]) ?(?P<number>{_NUMBER}) ?(?P<unit>[a-zA-Zµ%]*))?"
)
_RELATION = re.compile("<=|>=|=<|=>|==|=|<|>|≤|≥")
_RELATIONS: dict[str, Relation] = {"<=": "<=", "≤": "<=", ">=": ">=", "≥": ">="}
_LIMITS = re.compile(rf"(?P<bound>.*) (?P<word>on|for) (?P<name>{NAME.pattern}(?:@[0-9a-z]+)?)", re.DOTALL)
_PART = re.compile(r"[a-z0-9][a-z0-9 .-]{0,63}")


@dataclass(frozen=True)
class Rule:
    """One rule: the figure is held to ``factor`` times that of the baseline plus ``offset``.

    ``factor`` is None where the bound is absolute. ``offset`` is in the unit of the figure (a share, ms, bytes).
    ``part`` is what the images of the figure are restricted to, such as a corruption; ``device`` and ``target`` what
    the rule is restricted to, where it says one.
    """

    figure: str
    part: str | None
    relation: Relation
    factor: float | None
    offset: float
    device: str | None
    target: str | None

    @property
    def kind(self) -> Kind:
        return FIGURES[self.figure]

    @property
    def name(self) -> str:
        """Of the figure, with its part."""
        return self.figure if self.part is None else f"{self.figure} of {self.part}"

    @property
    def is_relative(self) -> bool:
        """Whether it asks for a baseline."""
        return self.factor is not None

    def concerns(self, device: str, target: str, row: str) -> bool:
        """Whether it is about this bundle on this device.

        Args:
            target: the bundle's own, such as onnxruntime.
            row: its name, target and variant such as onnxruntime-int8.
        """
        variant = row.removeprefix(f"{target}-")
        return self.device in (None, device) and self.target in (None, target, row, variant)

    def __str__(self) -> str:
        """The rule in its usual spelling, which parses to the same."""
        text = f"{self.name} {self.relation} {self._bound()}"
        text += "" if self.device is None else f" on {self.device}"
        return text if self.target is None else f"{text} for {self.target}"

    def _bound(self) -> str:
        offset = _amount(abs(self.offset), self.kind.unit, relative=self.is_relative)
        if self.factor is None:
            return offset
        text = "baseline" if self.factor == 1 else f"{_number(self.factor)} x baseline"
        return text if self.offset == 0 else f"{text} {'+' if self.offset > 0 else '-'} {offset}"


def _amount(value: float, unit: Unit, *, relative: bool) -> str:
    if unit == "share":
        return f"{_number(100 * value)}{POINTS}" if relative else f"{_number(100 * value)}%"
    if unit == "ms":
        return f"{_number(value)}ms"
    for name in ("GB", "MB", "kB"):
        if value >= UNITS["bytes"][name]:
            return f"{_number(value / UNITS['bytes'][name])}{name}"
    return f"{_number(value)}B"


def _number(value: float) -> str:
    """As few digits as say it, never in powers of ten."""
    text = f"{value:.12f}".rstrip("0").rstrip(".")
    return text or "0"


def parse_rules(texts: Iterable[str]) -> list[Rule]:
    """The rules in their order, each once. Raises UserError for the first that is none, or too many."""
    rules: dict[Rule, None] = {}
    for text in texts:
        rules.setdefault(parse_rule(text))
        if len(rules) > MOST_RULES:
            raise UserError(f"more than {MOST_RULES} rules: wanted fewer")
    return list(rules)


def parse_rule(text: str) -> Rule:
    """Read one rule.

    Raises:
        UserError: another form, an unknown figure or unit, a relation to the wrong side, or a bound that nothing meets.
    """
    if len(text) > LONGEST_RULE:
        raise UserError(f"a rule of {len(text)} characters: wanted at most {LONGEST_RULE}")
    plain = " ".join(text.split())
    found = _RELATION.search(plain)
    if found is None:
        raise _wrong(text, "wanted FIGURE <= BOUND or FIGURE >= BOUND, such as accuracy >= baseline - 0.5pp")
    relation = _RELATIONS.get(found[0])
    if relation is None:
        raise _wrong(text, f"wanted <= or >=, found '{found[0]}'")
    figure, part = _figure(plain[: found.start()], text)
    kind = FIGURES[figure]
    if (relation == "<=") != kind.lower_is_better:
        better, wanted = ("smaller", "<=") if kind.lower_is_better else ("larger", ">=")
        raise _wrong(text, f"{figure} is better when {better}: wanted {figure} {wanted} BOUND")
    rest, limits = plain[found.end() :].strip(), dict[str, str]()
    while (limit := _LIMITS.fullmatch(rest)) is not None:
        if limit["word"] in limits:
            raise _wrong(text, f"'{limit['word']}' stands there twice")
        limits[limit["word"]], rest = limit["name"], limit["bound"].strip()
    factor, offset = _bound(rest, kind, text)
    rule = Rule(figure, part, relation, factor, offset, limits.get("on"), limits.get("for"))
    if kind.counted != "exact" and factor == 1 and offset == 0:
        margin = {"share": "- 0.5pp", "ms": "+ 5%", "bytes": "+ 5%"}[kind.unit]
        margin = margin.replace("-", "+") if kind.unit == "share" and kind.lower_is_better else margin
        raise _wrong(text, f"no number of {kind.counted} shows a loss of nothing, leave a margin: baseline {margin}")
    return rule


def _figure(words: str, text: str) -> tuple[str, str | None]:
    name, of, part = " ".join(words.lower().replace("_", " ").split()).partition(" of ")
    name = OTHER_NAMES.get(name, name)
    if name not in FIGURES:
        known = ", ".join(FIGURES)
        near = did_you_mean(name, [*FIGURES, *OTHER_NAMES])
        raise _wrong(text, f"unknown figure '{printable(name, 60)}'{near} (known: {known}; accuracy of CORRUPTION)")
    if not of:
        return name, None
    if FIGURES[name].counted != "images":
        raise _wrong(text, f"{name} is of no images: leave 'of {printable(part, 60)}' out")
    if _PART.fullmatch(part) is None:
        raise _wrong(text, f"wanted {name} of a corruption's name, such as {name} of dark")
    return name, part


def _bound(words: str, kind: Kind, text: str) -> tuple[float | None, float]:
    """Factor of the baseline, None for an absolute bound, and what is added to it."""
    unit = kind.unit
    found = _ABSOLUTE.fullmatch(words)
    if found is not None:
        value = float(found["number"]) * _scale(found["unit"], unit, text, plain_share=True)
        if unit == "share" and not 0 <= value <= 1:
            raise _wrong(text, f"{found[0]} is no share: wanted 0% to 100%")
        if value <= 0 and unit != "share":
            raise _wrong(text, "nothing is that small: wanted a bound above 0")
        return None, value
    found = _RELATIVE.fullmatch(words)
    if found is None:
        near = "" if "base" not in words else " ('baseline' is what --baseline names)"
        raise _wrong(text, f"wanted a bound such as {USUAL[unit]}, found '{printable(words, 60)}'{near}")
    factor = 1.0 if found["factor"] is None else float(found["factor"])
    if unit == "share" and factor != 1:
        raise _wrong(text, "a share is compared in points: wanted baseline - 0.5pp")
    if not 0.001 <= factor <= 1000:
        raise _wrong(text, f"a factor of {found['factor']}: wanted 0.001 to 1000")
    if found["number"] is None:
        return factor, 0.0
    sign, number = (1 if found["sign"] == "+" else -1), float(found["number"])
    if found["unit"] == "%" and unit != "share":
        factor *= 1 + sign * number / 100
        if not 0.001 <= factor <= 1000:
            raise _wrong(text, f"{found['sign']} {found['number']}% leaves nothing of it: wanted less")
        return round(factor, 12), 0.0
    offset = sign * number * _scale(found["unit"], unit, text, points=True)
    if unit == "share" and abs(offset) > 1:
        raise _wrong(text, f"{found['number']}{found['unit']} are more than 100 points")
    return factor, offset


def _scale(word: str, unit: Unit, text: str, *, plain_share: bool = False, points: bool = False) -> float:
    """What a number in this unit is times in the figure's own."""
    if unit == "share":
        if points:
            if word == POINTS:
                return 0.01
            raise _wrong(text, f"a difference of shares is in points: wanted pp, found '{printable(word, 20)}'")
        if plain_share and not word:
            return 1.0
    known = UNITS[unit]
    if word in known:
        return known[word]
    by_lower = {name.lower(): scale for name, scale in known.items() if name != "KB"}
    if word.lower() in by_lower:
        return by_lower[word.lower()]
    found = f"found '{printable(word, 20)}'" if word else "found none"
    raise _wrong(text, f"wanted a unit, {', '.join(known)}; {found}{did_you_mean(word, known) if word else ''}")


def _wrong(text: str, why: str) -> UserError:
    return UserError(f"rule '{printable(text, 100)}': {why}")
