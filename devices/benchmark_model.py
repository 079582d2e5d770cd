"""LiteRT's own ``benchmark_model`` on a device: for what the runner has no access to there, GPU and NPU.

The program is the user's; its answer is another tool's, with its own input and boundaries, and is marked so. Written
from what it is documented to print, never exercised with the real one.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Literal

from ..core.artifact import Record
from ..core.errors import GateFailed, UserError
from ..core.kinds import Bundle
from ..core.sealed import printable
from .runner import RunnerDevice, failure

OPTIONS: dict[str, str] = {"cpu": "", "gpu": "--use_gpu=true", "nnapi": "--use_nnapi=true"}
LIMIT_SECONDS = 300.0  # it ends by itself after 150
NUMBER = r"(\d[\d.]*(?:e\+?\d+)?)"
TIMINGS = re.compile(
    rf"Inference timings in us: Init: {NUMBER}, First inference: {NUMBER}, Warmup \(avg\): {NUMBER}, "
    rf"Inference \(avg\): {NUMBER}"
)


class Told(Record):
    """What ``benchmark_model`` said: milliseconds, the mean over ``runs`` inferences of random input."""

    tool: Literal["benchmark_model"] = "benchmark_model"
    accelerator: Literal["cpu", "gpu", "nnapi"]
    executed: Literal["completely", "partially"] | None  # by the accelerator; None: it was not asked for one
    init_ms: float
    first_ms: float
    mean_ms: float
    runs: int | None


def ask(device: RunnerDevice, bundle: Bundle, accelerator: str, threads: int) -> Told:
    """Run the device's ``benchmark_model`` on the model of a tflite bundle.

    Raises:
        UserError: none is named, another target's bundle, it failed or answered something else.
        GateFailed: the accelerator did not take the model: what ran is the CPU.
    """
    named = device.settings.benchmark_model
    if named is None:
        raise UserError(f"'{device.name}' names no benchmark_model: write `benchmark_model: PATH` in devices.yaml")
    program = Path(named).expanduser()
    if not program.is_file():
        raise UserError(f"no benchmark_model at {program}: wanted the program for '{device.name}', on this machine")
    if bundle.facts.target != "tflite":
        raise UserError(f"benchmark_model runs bundles of tflite, {bundle.path} is of {bundle.facts.target}")
    place = shlex.quote(device.store(program))
    model = shlex.quote(f"{device.store(bundle.path)}/{bundle.facts.entry}")
    line = f"chmod +x {place} && {place} --graph={model} --num_threads={threads} {OPTIONS[accelerator]}"
    done = device.attempt(f"{line} 2>&1", LIMIT_SECONDS)
    said = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        last = (said.strip().splitlines() or [failure(done)])[-1]
        raise UserError(f"benchmark_model failed on '{device.name}': {printable(last, 300)}")
    return read(said, accelerator)


def read(said: str, accelerator: str) -> Told:
    """What it printed. Raises as ``ask`` does."""
    timings = TIMINGS.search(said)
    if timings is None:
        raise UserError("benchmark_model printed no 'Inference timings in us': is it LiteRT's own?")
    taken = re.search(r"applied .*delegate.*will be (completely|partially) executed", said)
    if accelerator != "cpu" and taken is None:
        raise GateFailed(f"benchmark_model did not run the model on the {accelerator}: these would be times of the CPU")
    counts = re.findall(r"\bcount=(\d+) ", said)
    init, first, _, mean = (float(value) / 1000 for value in timings.groups())
    return Told.model_validate(
        {
            "accelerator": accelerator,
            "executed": taken[1] if taken and accelerator != "cpu" else None,
            "init_ms": init,
            "first_ms": first,
            "mean_ms": mean,
            "runs": int(counts[-1]) if counts else None,
        }
    )
