"""Our timed call against the runtimes' own tools: pairs of fresh processes, taking turns, on the same file and thread.

    python benchmarks/overhead.py BUNDLE [BUNDLE ...] --pairs 6

BUNDLE is the folder of a float32 bundle. OpenVINO's tool is benchmark_app, with a batch that may change as the file has
it (-data_shape) and with the batch fixed to one (-shape), as kdpipe compiles it; LiteRT's is litert-benchmark. They
tell the median of the runtime's own clock, without Python (LiteRT's in steps of 10 us); ours is the median of what a
caller in Python waits. Of ONNX Runtime, which has no tool in its package, and of all, is told what the runner takes
outside the timed call for each inference, and what a fresh process takes from importing the runtime to the end of the
first inference. All processes are kept to one CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe import runtime
from kdpipe.core.kinds import Bundle, FreshStart, Samples
from kdpipe.core.stats import mean_interval, median_interval, ratio_interval
from kdpipe.devices.runner import R, read_answer

OURS = "kdpipe"
UNITS = {"us": 1.0, "ms": 1e3}
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def ask(kind: type[R], folder: Path, bundle: Bundle, images: Path, *more: str) -> R:
    what = {Samples: "measure", FreshStart: "start"}[kind]
    command = [sys.executable, "-m", "runtime", what, str(bundle.path), "--images", str(images), "--threads", "1"]
    done = subprocess.run([*command, *more], cwd=folder, env=CLEAN, capture_output=True, check=True)
    return read_answer(kind, done.stdout)


def by_runner(folder: Path, bundle: Bundle, images: Path, seconds: float, outside_us: list[float]) -> float:
    """Median in microseconds."""
    times = ("--seconds", str(seconds), "--max-seconds", str(seconds))
    found = ask(Samples, folder, bundle, images, *times)
    assert found.overhead_ns is not None
    outside_us.append(found.overhead_ns / 1e3)
    return float(np.median(found.latency_ns)) / 1e3


def by_benchmark_app(bundle: Bundle, seconds: float, shape: str) -> float:
    """Median in microseconds: in one stream of one thread, as ours, and in the same precision."""
    height, width = bundle.facts.input.sides
    command = [_tool("benchmark_app"), "-m", str(bundle.file(bundle.facts.entry)), "-d", "CPU", "-hint", "none"]
    command += ["-api", "sync", "-nstreams", "1", "-nthreads", "1", "-infer_precision", "f32"]
    command += [shape, f"[1,3,{height},{width}]", "-t", str(max(1, round(seconds)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Median:\s+([\d.]+) (us|ms)", done.stdout)
    assert found, done.stdout
    return float(found[1]) * UNITS[found[2]]


def by_litert_benchmark(bundle: Bundle, seconds: float, about_us: Callable[[], float], folder: Path) -> float:
    """Median in microseconds: of as many inferences as ours had time for, after a second of warm-up."""
    runs = max(64, round(seconds * 1e6 / about_us()))
    command = [_tool("litert-benchmark"), "--model", str(bundle.file(bundle.facts.entry)), "--num_threads", "1"]
    command += ["--warmup_runs", str(max(10, round(1e6 / about_us()))), "--num_runs", str(runs)]
    subprocess.run([*command, "--result_json", str(folder / "told.json")], capture_output=True, check=True)
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return float(told["latency"]["median_ms"]) * 1e3


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def main(
    bundles: Annotated[list[Path], typer.Argument(help="folders of float32 bundles")],
    pairs: Annotated[int, typer.Option(help="rounds, every second one backwards")] = 6,
    seconds: Annotated[float, typer.Option(help="steady time of a process")] = 2.0,
) -> None:
    """Measure and print medians, ratios by pairs, and what is outside the timed call."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "openvino", "ai-edge-litert"))
    print(f"{date.today()}, {versions}, one CPU of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")
    for path in bundles:
        compare(Bundle.open(path.absolute()), pairs, seconds)  # the runner is started elsewhere


def compare(bundle: Bundle, pairs: int, seconds: float) -> None:
    (height, width), target = bundle.facts.input.sides, bundle.facts.target
    found: dict[str, list[float]] = {OURS: []}
    outside_us: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "runtime").symlink_to(Path(runtime.__file__).parent)
        images = folder / "images.npy"
        np.save(images, np.random.default_rng(0).integers(0, 256, (64, height, width, 3), dtype=np.uint8))
        calls: dict[str, Callable[[], float]] = {OURS: partial(by_runner, folder, bundle, images, seconds, outside_us)}
        if target == "openvino":
            calls["benchmark_app"] = partial(by_benchmark_app, bundle, seconds, "-data_shape")
            calls["benchmark_app, batch fixed"] = partial(by_benchmark_app, bundle, seconds, "-shape")
        if target == "tflite":
            about = calls[OURS]()
            calls["litert-benchmark"] = partial(by_litert_benchmark, bundle, seconds, lambda: about, folder)
        found |= {name: [] for name in calls}
        for turn in range(pairs):
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                found[name].append(calls[name]())
        starts = [ask(FreshStart, folder, bundle, images) for _ in range(10)]
    print(f"\n{target}, {bundle.facts.model} at {height}x{width} pixels")
    for name, medians in found.items():
        print(f"  {name}: {' '.join(f'{value:.1f}' for value in medians)} us")
    for name in list(found)[1:]:
        over = mean_interval(np.subtract(found[OURS], found[name]))
        middle = np.median(np.subtract(found[OURS], found[name]))
        ratio = ratio_interval(found[OURS], found[name])
        print(
            f"  over {name}: {over.value:+.1f} [{over.low:+.1f}, {over.high:+.1f}] us (median {middle:+.1f}), "
            f"ratio {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        )
    print(f"  outside the timed call, for each inference: {' '.join(f'{each:.1f}' for each in outside_us)} us")
    took = median_interval([(start.import_ns + start.load_ns + start.first_ns) / 1e6 for start in starts])
    print(f"  import to first inference, 10 processes: {took.value:.0f} [{took.low:.0f}, {took.high:.0f}] ms")


if __name__ == "__main__":
    typer.run(main)
