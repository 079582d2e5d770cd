"""What our timed call costs over OpenVINO's own tool: pairs of fresh processes, taking turns, on the same file.

    python benchmarks/overhead.py BUNDLE [BUNDLE ...] --pairs 6

BUNDLE is the folder of an OpenVINO bundle in float32. The tool is benchmark_app, with a batch that may change as the
file has it (-data_shape) and, for comparison, with the batch fixed to one (-shape). It tells the median of the
runtime's own clock, without Python; ours is the median of what a caller in Python waits.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kdpipe import runtime
from kdpipe.core.kinds import Bundle
from kdpipe.core.stats import mean_interval, ratio_interval

TOOL, FIXED = "benchmark_app", "benchmark_app, batch fixed"
UNITS = {"us": 1.0, "ms": 1e3}


def by_runner(bundle: Bundle, images: Path, seconds: float, folder: Path) -> float:
    """Median in microseconds, by ``python -m runtime measure``."""
    command = [sys.executable, "-m", "runtime", "measure", str(bundle.path), "--images", str(images), "--threads", "1"]
    done = subprocess.run([*command, "--seconds", str(seconds)], cwd=folder, capture_output=True, text=True, check=True)
    return float(np.median(json.loads(done.stdout.splitlines()[-1])["latency_ns"])) / 1e3


def by_tool(bundle: Bundle, seconds: float, shape: str) -> float:
    """Median in microseconds, by benchmark_app: in one stream of one thread, as ours, and in the same precision."""
    size = bundle.facts.input.size
    command = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(bundle.file(bundle.facts.entry))]
    command += [
        "-d",
        "CPU",
        "-hint",
        "none",
        "-api",
        "sync",
        "-nstreams",
        "1",
        "-nthreads",
        "1",
        "-infer_precision",
        "f32",
    ]
    command += [shape, f"[1,3,{size},{size}]", "-t", str(max(1, round(seconds)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Median:\s+([\d.]+) (us|ms)", done.stdout)
    assert found, done.stdout
    return float(found[1]) * UNITS[found[2]]


def main(
    bundles: Annotated[list[Path], typer.Argument(help="folders of OpenVINO bundles")],
    pairs: Annotated[int, typer.Option(help="rounds, every second one backwards")] = 6,
    seconds: Annotated[float, typer.Option(help="steady time of a process")] = 2.0,
) -> None:
    """Measure and print medians, what ours has over the tool, and the ratio by pairs."""
    print(f"openvino {version('openvino')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for path in bundles:
        bundle = Bundle.open(path.absolute())  # the runner is started elsewhere
        size = bundle.facts.input.size
        found: dict[str, list[float]] = {"kdpipe": [], TOOL: [], FIXED: []}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "runtime").symlink_to(Path(runtime.__file__).parent)
            images = folder / "images.npy"
            np.save(images, np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8))
            calls = {
                "kdpipe": partial(by_runner, bundle, images, seconds, folder),
                TOOL: partial(by_tool, bundle, seconds, "-data_shape"),
                FIXED: partial(by_tool, bundle, seconds, "-shape"),
            }
            for turn in range(pairs):
                for name in list(calls)[:: -1 if turn % 2 else 1]:
                    found[name].append(calls[name]())
        print(f"\n{bundle.facts.model} at {size} pixels")
        for name, medians in found.items():
            print(f"  {name}: {' '.join(f'{value:.1f}' for value in medians)} us")
        for name in (TOOL, FIXED):
            over = mean_interval(np.subtract(found["kdpipe"], found[name]))
            middle = np.median(np.subtract(found["kdpipe"], found[name]))
            ratio = ratio_interval(found["kdpipe"], found[name])
            print(
                f"  over {name}: {over.value:+.1f} [{over.low:+.1f}, {over.high:+.1f}] us (median {middle:+.1f}), "
                f"ratio {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            )


if __name__ == "__main__":
    typer.run(main)
