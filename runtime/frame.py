"""A whole frame: from a decoded picture at its own size to the answer that a person sees, and what each step takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .preprocess import fit
from .task import TASKS, Task

if TYPE_CHECKING:
    from . import Session

WARM_FRAMES = 2  # which are not told: the first ones allocate
FEWEST_FRAMES, MOST_FRAMES = 5, 64  # that are


def answer_frame(
    session: Session, frame: np.ndarray, spec: Mapping[str, Any], task: Task
) -> tuple[np.ndarray, dict[str, int]]:
    """Ask a model about a decoded picture uint8 [H, W, 3].

    Returns:
        What a person is shown, as the task's ``finish`` has it at last. And the nanoseconds of each step: ``resize``
        (to the network's input), ``network`` (with the preparing of the runtime's own input), and the steps of
        ``finish``.
    """
    from PIL import Image

    times = [time.perf_counter_ns()]
    pixels = fit(Image.fromarray(frame), spec)
    times.append(time.perf_counter_ns())
    shown = outputs = session.infer(session.prepare(pixels[None]))
    times.append(time.perf_counter_ns())
    steps = ["resize", "network"]
    for step, result in task.finish(outputs, frame, spec):
        times.append(time.perf_counter_ns())
        steps.append(step)
        shown = result
    return shown, {step: after - before for step, before, after in zip(steps, times, times[1:])}


def time_frames(
    session: Session, frames: Sequence[np.ndarray], facts: Mapping[str, Any], seconds: float
) -> dict[str, Any] | None:
    """Whole frames one after another, each followed by the network alone on what it was shown: the two take turns.

    At least 5, then until ``seconds`` are over or 64 are done; a few before them are not told.

    Args:
        frames: uint8 [H, W, 3] each, rotated through.
        facts: of the model.

    Returns:
        The fields of a ``FrameSamples``; None where there are no frames, the model's task is not known here, or Pillow,
        which resizes them, is missing.
    """
    task, spec = TASKS.get(facts.get("task", "")), facts["input"]
    if not frames or task is None:
        return None
    try:
        from PIL import Image
    except ImportError:
        return None
    alone = [session.prepare(fit(Image.fromarray(frame), spec)[None]) for frame in frames]
    whole_ns: list[int] = []
    alone_ns: list[int] = []
    steps_ns: dict[str, list[int]] = {}
    begun = time.monotonic()
    for turn in range(WARM_FRAMES + MOST_FRAMES):
        if turn == WARM_FRAMES:
            begun = time.monotonic()
        if len(whole_ns) >= FEWEST_FRAMES and time.monotonic() - begun >= seconds:
            break
        at = turn % len(frames)
        start = time.perf_counter_ns()
        _, steps = answer_frame(session, frames[at], spec, task)
        middle = time.perf_counter_ns()
        session.infer(alone[at])
        ended = time.perf_counter_ns()
        if turn >= WARM_FRAMES:
            whole_ns.append(middle - start)
            alone_ns.append(ended - middle)
            for step, nanoseconds in steps.items():
                steps_ns.setdefault(step, []).append(nanoseconds)
    sizes = [list(frame.shape[:2]) for frame in frames]
    return {"sizes": sizes, "whole_ns": whole_ns, "alone_ns": alone_ns, "steps_ns": steps_ns}
