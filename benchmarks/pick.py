"""What `kdpipe pick` loses against measuring every network: a pool measured once, then ten limits replayed on it.

    nice -n 10 python benchmarks/pick.py measure DATA OUT --count 64     every network of the pool once, in hours
    python benchmarks/pick.py replay DATA OUT                            ten limits, 8, 12 and 16 measurements
    nice -n 10 python benchmarks/pick.py again DATA OUT                  those chosen with 16, in another session

DATA is the folder of a dataset artifact, whose artifacts get the measurements; OUT a folder of results. Each command
goes on where it ended, and the next one takes the same options. A replay decides as the command does, by what the
sessions said of the networks that it has asked for so far; what measuring all would choose is decided by all of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe.chain import Chain
from kdpipe.core import choosing, progress
from kdpipe.core.choosing import Known
from kdpipe.core.config import PickPlan, validated
from kdpipe.core.progress import note
from kdpipe.data.dataset import Dataset
from kdpipe.picking import WORKSHOP, Search, alone, search_of
from kdpipe.terminal import listener, tell_step

# Small networks of many kinds and of all speeds, as people ask for them.
POOL = (
    "mobilenetv4_conv_small*,mobilenetv4_conv_medium,mobilenetv3_*,mobilenetv2_*,mobilenetv1_*,efficientnet_lite0,"
    "efficientnet_b0,efficientnet_b1,tf_efficientnetv2_b0,lcnet_*,tinynet_*,mnasnet_*,semnasnet_*,spnasnet_*,fbnet*,"
    "hardcorenas_a,ghostnet_100,ghostnetv2_*,repghostnet_*,mobileone_s[012],repvit_m*,fastvit_t8,fasternet_t*,"
    "starnet_s*,shvit_s*,efficientformerv2_s0,efficientvit_b0,efficientvit_m[0-4],edgenext_*small,convnext_atto,"
    "convnext_femto,resnet10t,resnet14t,resnet18,resnet26t,regnetx_00*,regnety_00*,repvgg_a0,hgnetv2_b[0-2],"
    "mobilevit_xxs,mobilevitv2_050,levit_128s,poolformer_s12,pvt_v2_b0,deit_tiny_patch16_224,xcit_nano_12_p16_224,"
    "mixnet_s,rexnet_100,dla46_c,ese_vovnet19b_dw,selecsls42b,skresnet18,resnext26ts,gernet_s"
)
BUDGETS, LIMITS = (8, 12, 16), 10
TOGETHER = 4  # networks of a session, beside the anchors
app = typer.Typer(add_completion=False)
Data = Annotated[Path, typer.Argument(help="folder of a dataset artifact")]
Out = Annotated[Path, typer.Argument(help="folder of results")]
Size = Annotated[int, typer.Option(help="pixels")]
Target = Annotated[str, typer.Option()]
Variant = Annotated[str, typer.Option()]
Threads = Annotated[int, typer.Option()]
Candidates = Annotated[str, typer.Option(help="patterns, as pick takes them")]


def opened(
    data: Path, size: int, target: str, variant: str, threads: int, candidates: str, count: int = 1000
) -> Search:
    """A pick that measures whatever it is told."""
    values = {
        "p90": 1e6, "candidates": candidates, "input": {"size": size}, "target": target, "variant": variant,
        "threads": threads, "budget": count,
    }  # fmt: skip
    progress.listen(listener())
    return search_of(validated(PickPlan, values, "options"), Dataset.open(data), Chain(data.parent, tell=tell_step))


@app.command()
def measure(
    data: Data, out: Out, count: Annotated[int, typer.Option(help="networks, at least")] = 64, size: Size = 224,
    target: Target = "onnxruntime", variant: Variant = "int8", threads: Threads = 1, candidates: Candidates = POOL,
) -> None:  # fmt: skip
    """Measure networks of the pool, spread over all sizes, until so many are known."""
    begun = time.monotonic()
    with alone(data.parent / WORKSHOP):
        search = opened(data, size, target, variant, threads, candidates)
        order = _spread_first(search)
        while True:
            known = search.known()
            measured = set() if known is None else set(known.levels)
            left = [name for name in order if name not in {*measured, *search.state.asked, *search.state.refused}]
            if len(measured) >= count or not left:
                break
            if len(measured) >= TOGETHER and not search.state.anchors:
                assert known is not None
                middle = sorted(known.levels, key=lambda name: known.levels[name].value)
                search.state.anchors = [middle[len(middle) // 4], middle[3 * len(middle) // 4]]
            search.measure(left[:TOGETHER])
            note(f"{len(measured)} networks are measured")
    made = {"measured": len(measured), "refused": search.state.refused, "seconds": time.monotonic() - begun}
    _write(out / "measure.json", made)
    print(json.dumps(made, indent=1))


def _spread_first(search: Search) -> list[str]:
    """The pool so that its beginning is spread over all of it, whatever its length."""
    order = np.argsort(search.pool.proxies[:, 1], kind="stable")
    names = [search.pool.candidates[at].name for at in order]
    step = next(step for step in range(max(2, round(len(names) * 0.382)), 10**6) if math.gcd(step, len(names)) == 1)
    return [names[at * step % len(names)] for at in range(len(names))]


def read_of(search: Search, names: Sequence[str]) -> Known | None:
    """What the sessions said of these networks alone."""
    logs = [{name: math.log(ms) for name, ms in each.p90_ms.items() if name in names} for each in search.sessions()]
    logs = [each for each in logs if each]
    return choosing.read_together(logs) if logs else None


def replayed(search: Search, limit: float, budget: int) -> list[str]:
    """Whom a pick with this log limit would have measured, of those that were."""
    known = search.known()
    assert known is not None
    others = [each.name for each in search.pool.candidates if each.name not in known.levels]
    taken: list[str] = []
    while asked := search.pool.next(read_of(search, taken), limit, budget - len(taken), {*others, *taken}):
        taken += asked
    return taken


@app.command()
def replay(
    data: Data, out: Out, size: Size = 224, target: Target = "onnxruntime", variant: Variant = "int8",
    threads: Threads = 1, candidates: Candidates = POOL,
) -> None:  # fmt: skip
    """Ten limits from the fastest tenth to the slowest: what few measurements choose, and what all do."""
    search = opened(data, size, target, variant, threads, candidates)
    known = search.known()
    assert known is not None, "nothing is measured: run measure first"
    levels = np.array([level.value for level in known.levels.values()])
    points = {name: float(search.pool.points[search.pool.position[name]]) for name in known.levels}
    rows = []
    for share in np.linspace(0.1, 0.9, LIMITS):
        limit = float(np.quantile(levels, share))
        best = search.pool.best(known, limit)
        for budget in BUDGETS:
            taken = replayed(search, limit, budget)
            chosen = search.pool.best(read_of(search, taken), limit)
            rows.append(_row(limit, budget, len(taken), chosen, best, points, known))
    _write(out / "replay.json", {"networks": len(levels), "rows": rows})
    for budget in BUDGETS:
        of_budget = [row for row in rows if row["budget"] == budget]
        able = [row for row in of_budget if row["best"] is not None]
        lost = [row["lost_points"] for row in able if row["lost_points"] is not None]
        ratios = [row["latency_over_best"] for row in of_budget if row["latency_over_best"] is not None]
        print(
            f"{budget} measured at most ({np.mean([row['measured'] for row in of_budget]):.1f} in the mean): lost "
            f"{np.mean(lost):.2f} points in the mean, {np.max(lost):.2f} at worst, of {len(lost)} limits; latency over "
            f"that of the best {np.min(ratios):.2f} to {np.max(ratios):.2f}; nothing found for {len(able) - len(lost)} "
            f"of {len(able)} limits that some network is surely within (of {len(of_budget)})"
        )


def _row(
    limit: float, budget: int, measured: int, chosen: str | None, best: str | None, points: Mapping[str, float],
    known: Known,
) -> dict[str, Any]:  # fmt: skip
    both = chosen is not None and best is not None
    return {
        "limit_ms": math.exp(limit),
        "budget": budget,
        "measured": measured,
        "chosen": chosen,
        "best": best,
        "lost_points": points[best] - points[chosen] if both else None,  # type: ignore[index]
        "latency_over_best": (
            math.exp(known.levels[chosen].value - known.levels[best].value) if both else None  # type: ignore[index]
        ),
    }


@app.command()
def again(
    data: Data, out: Out, size: Size = 224, target: Target = "onnxruntime", variant: Variant = "int8",
    threads: Threads = 1, candidates: Candidates = POOL,
) -> None:  # fmt: skip
    """Measure those that were chosen with the largest budget in another session: are they within their limits?"""
    rows = json.loads((out / "replay.json").read_text())["rows"]
    rows = [row for row in rows if row["budget"] == max(BUDGETS) and row["chosen"] is not None]
    found: dict[str, float] = {}
    if (out / "again.json").is_file():
        found = json.loads((out / "again.json").read_text())["p90_ms"]
    with alone(data.parent / WORKSHOP):
        search = opened(data, size, target, variant, threads, candidates)
        left = [name for name in dict.fromkeys(row["chosen"] for row in rows) if name not in found]
        for at in range(0, len(left), TOGETHER):
            names = left[at : at + TOGETHER]
            before = {each.measurement.path for each in search.sessions()}
            search.measure(names, anchored=False)  # the machine as it is now, and nothing else
            for new in [each for each in search.sessions() if each.measurement.path not in before]:
                found |= {name: new.p90_ms[name] for name in names if name in new.p90_ms}
            _write(out / "again.json", {"p90_ms": found})
    held = [row for row in rows if found.get(row["chosen"], math.inf) <= row["limit_ms"]]
    _write(out / "again.json", {"p90_ms": found, "held": len(held), "limits": len(rows)})
    print(f"{len(held)} of {len(rows)} are within their limit when measured again")


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=1))
    draft.replace(path)


if __name__ == "__main__":
    app()
