"""What the verdict of a session is worth: many short ones of pairs whose true ratio is known.

    python benchmarks/sessions.py run same --out runs/sessions --count 100
    python benchmarks/sessions.py run ratio --out runs/sessions --count 100
    python benchmarks/sessions.py run loaded --out runs/sessions --count 100
    python benchmarks/sessions.py tell --out runs/sessions

``same``: two copies of one network. ``ratio``: one with a tenth more layers. ``loaded``: that pair again while another
process takes a core, or a third of one, throughout or from a random moment on. Each session is a measurement of its own
and sealed: what is there is not measured again, and a session that was stopped goes on. The first two want a
machine that does nothing else; what it did besides is in every measurement, and ``tell`` splits by it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from kdpipe.chain import Chain, attempts_beside
from kdpipe.core.config import BenchPlan
from kdpipe.core.kinds import Measurement, MeasurementFacts, Runnable
from kdpipe.deploy.strange import wrap

Series = Literal["same", "ratio", "loaded"]
LAYERS, WIDTH, SIDE = 30, 48, 16
LONGER = 1.1  # as many layers
PLAN = BenchPlan(
    rounds=6, seconds=0.25, max_seconds=0.5, min_samples=32, p50_within=0.03, warm_up_seconds=0.25, cold_starts=0,
    images=4, threads=(1,),
)  # fmt: skip
SPIN = """
import sys, time
delay, share = map(float, sys.argv[1:])
time.sleep(delay)
while True:
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.02 * share:
        pass
    time.sleep(0.02 * (1 - share))
"""

app = typer.Typer(add_completion=False)


def write_network(path: Path, layers: int) -> Path:
    """So many convolutions of one size, one after the other; the same weights every time."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    shape = [1, WIDTH, SIDE, SIDE]
    weights = (generator.normal(size=(WIDTH, WIDTH, 3, 3)) / np.sqrt(9 * WIDTH)).astype(np.float32)
    nodes = []
    for at in range(layers):
        before, after = "image" if at == 0 else f"act-{at - 1}", f"conv-{at}"
        nodes.append(helper.make_node("Conv", [before, "weights"], [after], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [after], ["out" if at == layers - 1 else f"act-{at}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("image", "out")]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], [numpy_helper.from_array(weights, "weights")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def pair(folder: Path, series: Series) -> dict[str, Runnable]:
    """The two models of a series, wrapped once."""
    made: dict[str, Runnable] = {}
    for name, layers in (("a", LAYERS), ("b", LAYERS if series == "same" else round(LONGER * LAYERS))):
        place = folder / f"{name}-{layers}"
        if place.exists():
            from kdpipe.core.kinds import Model

            made[name] = Model.open(place)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            made[name] = wrap(write_network(folder / f"{name}-{layers}.onnx", layers), place)
    return made


@contextlib.contextmanager
def load(series: Series, number: int) -> Iterator[dict[str, float]]:
    """What runs beside session ``number`` of a loaded series: the same whenever it is done."""
    if series != "loaded":
        yield {}
        return
    generator = np.random.default_rng(number)
    found = {
        "share": float(generator.choice([0.3, 1.0])),
        "delay": float(generator.choice([0.0, generator.uniform(5, 20)])),
    }
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(found["delay"]), str(found["share"])])
    try:
        yield found
    finally:
        process.kill()
        process.wait()


@app.command()
def run(
    series: Annotated[Series, typer.Argument()],
    out: Annotated[Path, typer.Option(help="folder of the measurements")],
    count: Annotated[int, typer.Option(help="sessions, with those that are there")] = 100,
) -> None:
    """Measure what is lacking of a series."""
    folder = out / series
    models, chain = pair(folder / "models", series), Chain(folder)
    while (done := len(list(folder.glob("measurement-*-*[0-9]")))) < count:
        with load(series, done + 1) as beside:
            benched = chain.bench(PLAN, models, None)
        [measured] = benched.one_of_each
        with (folder / "loads.jsonl").open("a") as stream:
            stream.write(json.dumps({"measurement": measured.path.name, **beside}) + "\n")
        print(f"{series} {done + 1}: {json.dumps(verdict(measured.facts))}", flush=True)


def verdict(facts: MeasurementFacts) -> dict[str, Any]:
    """What a session says of its pair, and what else ran."""
    compared = next(iter(facts.comparisons), None)
    rows = [facts.results[name] for name in ("a", "b")]
    seen = [row.conditions.others_cores for row in rows if row.conditions is not None]
    known = [float(each) for each in seen if each != "unavailable"]
    return {
        "trusted": all(row.trust is not None and row.trust.word == "trusted" for row in rows),
        "differ": compared is not None and compared.differ,
        "ratio": None if compared is None else 1 / compared.ratio.value,  # of b over a
        "others_cores": max(known, default=None),
        "reasons": [row.trust.reason for row in rows if row.trust is not None and row.trust.reason],
    }


@app.command()
def tell(
    out: Annotated[Path, typer.Option(help="folder of the measurements")],
    quiet_cores: Annotated[float, typer.Option(help="a session is quiet where others took less than so much")] = 0.1,
) -> None:
    """Count over the sessions that there are, and print one JSON object."""
    found = {series: sessions(out / series) for series in ("same", "ratio", "loaded")}
    ratios = [each["ratio"] for each in found["ratio"] if each["trusted"]] or [
        each["ratio"] for each in found["ratio"] if each["ratio"] is not None
    ]
    true = float(np.exp(np.mean(np.log(ratios)))) if ratios else LONGER
    told: dict[str, Any] = {"true_ratio": true, "of": len(ratios), "resolution": PLAN.resolution}
    for series, each in found.items():
        for name, kept in (("all", each), ("quiet", [s for s in each if (s["others_cores"] or 9) < quiet_cores])):
            expected = 1.0 if series == "same" else true
            off = [s for s in kept if s["ratio"] and abs(np.log(s["ratio"] / expected)) > np.log1p(PLAN.resolution)]
            told[f"{series}, {name}"] = {
                "sessions": len(kept),
                "trusted": sum(s["trusted"] for s in kept),
                "called_different": sum(s["differ"] for s in kept),
                "right_way_round": sum(s["differ"] and s["ratio"] > 1 for s in kept),
                "off_by_more_than_the_resolution": len(off),
                "trusted_and_off": sum(s["trusted"] for s in off),
                "spread_percent": 100 * float(np.std([np.log(s["ratio"]) for s in kept])) if kept else None,
            }
    print(json.dumps(told, indent=1))


def sessions(folder: Path) -> list[dict[str, Any]]:
    """The verdict of every session of a series, in their order."""
    first = next(iter(folder.glob("measurement-*-1")), None)
    if first is None:
        return []
    return [verdict(Measurement.open(path).facts) for path in attempts_beside(Measurement.open(first))]


if __name__ == "__main__":
    app()
