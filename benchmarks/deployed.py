"""What merging branches before export gives: operators, and latency with merged branches over without.

    python benchmarks/deployed.py --size 128

One ONNX file of each form, random weights, opened by ONNX Runtime and OpenVINO with one thread. In every round both
forms run the same image in turns (A B B A); the figure of a round is the ratio of their processor time,
which leaves out what else the machine did. Printed: the median of the rounds and their 5th and 95th percentile.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe.core.config import ModelSettings, validated
from kdpipe.core.proc import quiet
from kdpipe.export.onnx import simplify, write_onnx
from kdpipe.networks import models

FAMILIES = ("mobileone_s0", "repvgg_a0", "repvit_m0_9", "fastvit_t8", "repghostnet_050")
ROUNDS, TURNS = 40, 4


def by_onnxruntime(path: Path) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def by_openvino(path: Path) -> Callable[[np.ndarray], Any]:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    compiled: Callable[[np.ndarray], Any] = openvino.Core().compile_model(openvino.convert_model(path), "CPU", hints)
    return compiled


def ratio(first: Callable[[np.ndarray], Any], second: Callable[[np.ndarray], Any], image: np.ndarray) -> float:
    """Processor time of ``second`` over that of ``first``, in turns."""
    spent = {first: 0, second: 0}
    for turn in range(TURNS):
        for run in (first, second) if turn % 2 == 0 else (second, first):
            begun = time.process_time_ns()
            run(image)
            spent[run] += time.process_time_ns() - begun
    return spent[second] / spent[first]


app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="only this one (repeatable)")] = None,
    size: Annotated[int, typer.Option(help="pixels")] = 128,
) -> None:
    """Print a table in Markdown."""
    import onnx

    print("| model | operators | merged | onnxruntime | openvino |\n|---|---|---|---|---|")
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, size, size)).astype(np.float32)
    for name in model or FAMILIES:
        settings = validated(ModelSettings, {"model": name, "input": {"size": size}}, "benchmark")
        network, spec = models.create(settings, 10)
        with tempfile.TemporaryDirectory() as scratch:
            paths = []
            for form, each in (("trained", network), ("merged", models.deployed(network))):
                raw, path = Path(scratch) / f"{form}.raw", Path(scratch) / f"{form}.onnx"
                with quiet():
                    write_onnx(models.Normalise(each, spec).eval(), spec, raw)
                    simplify(raw, path)
                paths.append(path)
            counts = [Counter(node.op_type for node in onnx.load(path).graph.node) for path in paths]
            cells = [f"{count.total()} ({count['Conv']} convolutions)" for count in counts]
            for opened_by in (by_onnxruntime, by_openvino):
                trained, merged = map(opened_by, paths)
                ratio(trained, merged, image)  # warm
                found = [ratio(trained, merged, image) for _ in range(ROUNDS)]
                low, middle, high = np.percentile(found, (5, 50, 95))
                cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    app()
