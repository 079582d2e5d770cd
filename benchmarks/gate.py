"""What a gate's verdict is worth: simulated through the function that judges real ones, and real trials.

    python benchmarks/gate.py simulate
    python benchmarks/gate.py compare
    python benchmarks/gate.py trials BUNDLE --out runs/gate --count 20
    python benchmarks/gate.py tell --out runs/gate

``simulate`` draws images and sessions of two networks whose true difference is known: none, exactly at the margin,
twice the margin; and prints a line each. ``compare`` holds the intervals of a paired difference against each other
at the margin, also where few images change. ``trials`` judges a bundle against itself, each time in sessions of its
own; what is sealed is not measured again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe.chain import Chain, dataset_for
from kdpipe.core.config import BenchPlan, GatePlan
from kdpipe.core.kinds import Bundle, RuleVerdict, Verdict
from kdpipe.core.margins import paired_interval
from kdpipe.core.rules import parse_rule
from kdpipe.core.stats import Interval, median_interval
from kdpipe.deploy.figures import Figure
from kdpipe.deploy.gate import Question, decide, overall
from kdpipe.deploy.sides import Side
from kdpipe.runtime.task import TASKS

TRIALS = 200
ACCURACY, LATENCY = "accuracy >= baseline - 1pp", "latency p50 <= 1.1 x baseline"
RIGHT = 0.9  # accuracy of the baseline
QUICK = BenchPlan(
    rounds=6, seconds=0.25, max_seconds=0.5, min_samples=32, p50_within=0.03, warm_up_seconds=0.25, cold_starts=0,
    images=8, threads=(1,),
)  # fmt: skip

app = typer.Typer(add_completion=False)


def shares(generator: np.random.Generator, images: int, changed: float, drop: float) -> tuple[Figure, Figure]:
    """Baseline and candidate on the same images: so many change in either way, and ``drop`` more are lost."""
    lost, won = changed / 2 + max(drop, 0), changed / 2 + max(-drop, 0)
    drawn = generator.random(images)
    before = drawn < RIGHT
    after = before.copy()
    after[drawn < lost] = False
    after[drawn > 1 - won] = True
    return figure(before), figure(after)


def figure(scores: np.ndarray) -> Figure:
    """An accuracy."""
    share = Interval(*TASKS["classification"].summary(scores))
    return Figure("share", scores, (share.value,), share, False, True, "")


def latencies(
    generator: np.random.Generator, sessions: int, ratio: float, spread: float
) -> tuple[list[Figure], list[Figure]]:
    """Both in so many sessions, which differ by 5 % for both alike, and in their ratio by ``spread``."""
    before: list[Figure] = []
    after: list[Figure] = []
    for _ in range(sessions):
        machine, own = np.exp(generator.normal(0, 0.05)), np.exp(generator.normal(0, spread))
        for kept, scale in ((before, machine), (after, machine * ratio * own)):
            values = 5 * scale * np.exp(generator.normal(0, 0.005, 10))
            middle = float(np.median(values))  # of several sessions nobody asks for a single one's interval
            within = median_interval(values) if sessions == 1 else Interval(middle, None, None, 10)
            kept.append(Figure("ms", None, tuple(values), within, True, True, ""))
    return before, after


def of_images(
    generator: np.random.Generator, images: int, changed: float, drop: float, rule: str = ACCURACY
) -> Question:
    """One question about accuracy."""
    before, after = shares(generator, images, changed, drop)
    return Question(parse_rule(rule), "simulated", "network", [after], [before])


def of_sessions(
    generator: np.random.Generator, sessions: int, ratio: float, spread: float, rule: str = LATENCY
) -> Question:
    """One question about latency."""
    before, after = latencies(generator, sessions, ratio, spread)
    return Question(parse_rule(rule), "simulated", "network", after, before)


def answers(ask: Callable[[np.random.Generator], Question], trials: int = TRIALS, seed: int = 0) -> list[RuleVerdict]:
    """The verdict of so many trials."""
    return [decide([ask(np.random.default_rng([seed, at]))])[0] for at in range(trials)]


def counted(found: list[RuleVerdict]) -> dict[str, int]:
    """How many of each answer."""
    counts = Counter(each.answer for each in found)
    return {answer: counts[answer] for answer in ("pass", "fail", "cannot tell")}


@app.command()
def simulate(trials: int = TRIALS) -> None:
    """Count over simulated trials; prints one JSON object a line, each when it is known."""
    say("many rules, none broken", _families(trials))
    for spread in (0.005, 0.02, 0.05):
        for sessions in (1, 2, 4, 8):
            ask = partial(of_sessions, sessions=sessions, spread=spread)
            truths = {"none": {"ratio": 1.0}, "at the margin": {"ratio": 1.1}, "twice the margin": {"ratio": 1.1**2}}
            say(f"spread {100 * spread:g} %, {sessions} sessions", of_truths(ask, truths, trials))
        say(
            f"spread {100 * spread:g} %, asked after 3 sessions",
            at_asked(partial(of_sessions, spread=spread), 3, truths),
        )
    for changed in (0.0, 0.005, 0.03, 0.1):
        for images in (500, 2000, 10_000):
            ask = partial(of_images, images=images, changed=changed)
            truths = {"none": {"drop": 0.0}, "at the margin": {"drop": 0.01}, "twice the margin": {"drop": 0.02}}
            say(f"{100 * changed:g} % change, {images} images", of_truths(ask, truths, trials))
        say(
            f"{100 * changed:g} % change, asked after 500 images",
            at_asked(partial(of_images, changed=changed), 500, truths),
        )
    for changed in (0.0, 0.005, 0.03, 0.1):
        for images in (500, 2000):
            say(f"{100 * changed:g} % change, {images} images, detectable", detectable_drop(images, changed, trials))
    for sessions in (4, 8):
        say(f"spread 2 %, {sessions} sessions, detectable", detectable_ratio(sessions, 0.02, trials))


def say(what: str, found: dict[str, Any]) -> None:
    """A line of what was counted."""
    print(json.dumps({"simulated": what, **found}), flush=True)


def of_truths(
    ask: Callable[..., Question], truths: dict[str, dict[str, float]], trials: int
) -> dict[str, dict[str, int]]:
    """The answers of so many trials of each truth."""
    return {name: counted(answers(partial(ask, **truth), trials)) for name, truth in truths.items()}


def at_asked(
    ask: Callable[..., Question], few: int, truths: dict[str, dict[str, float]], trials: int = TRIALS
) -> dict[str, Any]:
    """Those that so ``few`` do not tell are asked again, with as many as each asked for: new ones, of each truth."""
    count = "sessions" if ask.func is of_sessions else "images"  # type: ignore[attr-defined]
    first = answers(partial(ask, **{count: few}, **truths["none"]), trials)
    asked = [each.needed for each in first if each.answer == "cannot tell" and each.needed is not None]
    found: dict[str, Any] = {"told_at_once": sum(each.answer != "cannot tell" for each in first), "asked": len(asked)}
    if asked:
        found["number"] = {"least": min(asked), "median": float(np.median(asked)), "most": max(asked)}
        for name, truth in truths.items():
            again = [
                decide([ask(np.random.default_rng([9, at]), **{count: number}, **truth)])[0]
                for at, number in enumerate(asked)
            ]
            found[name] = counted(again)
    return found


def detectable_drop(images: int, changed: float, trials: int) -> dict[str, float]:
    """The smallest drop that is printed, the middle of the trials, and the one that nine of ten tell from none."""
    told = answers(partial(of_images, images=images, changed=changed, drop=0.0), trials)
    printed = float(np.median([each.detectable or np.nan for each in told]))

    def seen(drop: float) -> float:
        found = [shares(np.random.default_rng([1, at]), images, changed, drop) for at in range(trials * 2)]
        lost = [int((before.scores & ~after.scores).sum()) for before, after in found]  # type: ignore[operator]
        won = [int((~before.scores & after.scores).sum()) for before, after in found]  # type: ignore[operator]
        ends = [paired_interval(*each, images).high or 0.0 for each in zip(lost, won, strict=True)]
        return float(np.mean(np.array(ends) < 0))

    return compared(printed, seen)


def detectable_ratio(sessions: int, spread: float, trials: int) -> dict[str, float]:
    """As ``detectable_drop``, of a slowing as a share."""
    told = answers(partial(of_sessions, sessions=sessions, ratio=1.0, spread=spread), trials)
    printed = float(np.median([each.detectable or np.nan for each in told]))

    def seen(slower: float) -> float:
        found = answers(partial(of_sessions, sessions=sessions, ratio=1 + slower, spread=spread), trials, seed=1)
        return float(np.mean([each.estimate is not None and (each.estimate.low or 0) > 1 for each in found]))

    return compared(printed, seen)


def compared(printed: float, seen: Callable[[float], float]) -> dict[str, float]:
    """What is printed against the smallest change that is seen in nine of ten trials."""
    low, high = 0.0, 2 * printed
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) >= 0.9 else (middle, high)
    return {"printed": printed, "simulated": high, "printed_over_simulated": printed / high}


def _families(trials: int) -> dict[str, Any]:
    """Six rules on two devices and three targets at once, of a candidate that is the baseline."""
    found = Counter[str]()
    for at in range(trials):
        generator = np.random.default_rng([3, at])
        questions = [of_images(generator, 2000, 0.03, 0.0) for _ in range(6)]
        questions += [of_sessions(generator, 4, 1.0, 0.02) for _ in range(6)]
        found[overall(decide(questions))] += 1
    return dict(found)


@app.command()
def compare(trials: int = 20_000) -> None:
    """How often each interval lets a network pass that loses exactly the margin; a correct one does in 2.5 of 100."""
    found = {}
    for images in (100, 200, 500, 1000, 2000, 5000):
        for margin in (0.005, 0.01, 0.02):
            for changed in (0.0, 0.005, 0.02, 0.05):
                draws = np.random.default_rng(0).multinomial(
                    images, [changed / 2 + margin, changed / 2, 1 - changed - margin], trials
                )
                tables, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
                kept = {"Tango": 0, "Agresti and Min": 0}
                for (lost, won), count in zip(tables.tolist(), counts.tolist(), strict=True):
                    kept["Tango"] += count * ((paired_interval(lost, won, images).low or -1) >= -margin)
                    kept["Agresti and Min"] += count * (agresti_min_low(lost, won, images) >= -margin)
                name = f"{images} images, margin {100 * margin:g} points, {100 * changed:g} % change besides"
                found[name] = {method: round(100 * passed / trials, 2) for method, passed in kept.items()}
    worst = {method: max(each[method] for each in found.values()) for method in ("Tango", "Agresti and Min")}
    print(json.dumps({"passed_percent": found, "worst_percent": worst}, indent=1))


def agresti_min_low(lost: int, won: int, images: int) -> float:
    """The lower end of the interval that the report shows."""
    before = np.zeros(images, bool)
    after = np.zeros(images, bool)
    before[:lost] = True
    after[lost : lost + won] = True
    return TASKS["classification"].change(before, after).low


@app.command()
def trials(
    bundle: Annotated[Path, typer.Argument(help="a small bundle, beside its data")],
    out: Annotated[Path, typer.Option(help="folder of the trials")],
    other: Annotated[Path | None, typer.Option(help="a bundle that is worse or slower, to be refused")] = None,
    count: int = 20,
    sessions: int = 4,
) -> None:
    """Judge a bundle against itself (or another one against it), each time in sessions of its own."""
    baseline, candidate = Bundle.open(bundle), Bundle.open(other or bundle)
    dataset = dataset_for(baseline, out)
    plan = GatePlan(rules=(ACCURACY, LATENCY), sessions=sessions)
    for number in range(count):
        chain = Chain(out / f"trial-{number:02d}")
        found = chain.gate(plan, QUICK, Side("candidate", {"a": candidate}), Side("baseline", {"a": baseline}), dataset)
        print(json.dumps({"trial": number, "answer": found.facts.answer, "rules": brief(found)}), flush=True)


def brief(found: Verdict) -> dict[str, Any]:
    """What a verdict says of each rule."""
    return {
        rule.figure: {"answer": rule.answer, "found": None if rule.estimate is None else rule.estimate.as_dict(),
                      "count": rule.count, "needed": rule.needed, "why": rule.why}
        for rule in found.facts.rules
    }  # fmt: skip


@app.command()
def tell(out: Annotated[Path, typer.Option(help="folder of the trials")]) -> None:
    """Count over the trials that there are, and print one JSON object."""
    found = [Verdict.open(path) for path in sorted(out.glob("trial-*/verdict-*")) if path.suffix != ".part"]
    by_rule: dict[str, Counter[str]] = {}
    for verdict in found:
        for rule in verdict.facts.rules:
            by_rule.setdefault(rule.figure, Counter())[rule.answer] += 1
    ratios = [rule.estimate.value for verdict in found for rule in verdict.facts.rules
              if rule.compared == "ratio" and rule.estimate is not None]  # fmt: skip
    told = {
        "trials": len(found),
        "answers": Counter(verdict.facts.answer for verdict in found),
        "by_rule": by_rule,
        "ratios": {"least": min(ratios), "most": max(ratios)} if ratios else None,
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    app()
