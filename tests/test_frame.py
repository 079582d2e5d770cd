"""A whole frame: the answer brought back to where it is in the image, and what each step of that takes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Made, Trained
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdpipe.core.config import MeasureSettings
from kdpipe.core.kinds import Bundle, FrameSamples, Result, Samples, Trust
from kdpipe.core.stats import Interval
from kdpipe.devices import find_device, opened
from kdpipe.devices.bench import whole_frame
from kdpipe.devices.trust import assess, control_name
from kdpipe.report import words
from kdpipe.report.pooled import pooled_frame
from kdpipe.runtime import frame as framing
from kdpipe.runtime.frame import FEWEST_FRAMES, MOST_FRAMES, answer_frame, time_frames
from kdpipe.runtime.overlay import overlay
from kdpipe.runtime.preprocess import fit, unfit_classes
from kdpipe.runtime.task import TASKS

MASKS, LABELS = TASKS["segmentation"], TASKS["classification"]
SPEC = {"size": [24, 32], "crop_fraction": 1.0, "interpolation": "nearest"}


# ---- back to the image ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["cover", "stretch", "letterbox"]),
    st.tuples(st.integers(3, 20), st.integers(3, 20)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.floats(0.6, 1.0),
    st.integers(0, 2**32 - 1),
)
def test_the_answer_lies_where_the_network_saw_it(
    resize: str, sides: tuple[int, int], larger: tuple[int, int], crop: float, seed: int
) -> None:
    """An image that shows the map it is answered with: shown to the network again, it is that map."""
    spec = {"size": list(sides), "crop_fraction": crop, "interpolation": "nearest", "resize": resize}
    generator = np.random.default_rng(seed)
    height, width = (int(side / crop * factor) + 3 for side, factor in zip(sides, larger, strict=True))
    classes = generator.integers(0, 200, sides, dtype=np.uint8)
    back = unfit_classes(classes, spec, height, width)
    assert back.shape == (height, width)
    image = Image.fromarray(np.where(back < 0, 255, back).astype(np.uint8)).convert("RGB")
    shown = fit(image, spec)[..., 0]
    seen = fit(Image.new("RGB", (width, height), (7, 7, 7)), spec)[..., 0] == 7  # where the input shows the image
    assert (shown[seen] == classes[seen]).mean() > 0.97, "all but what rounding moves by a pixel at an edge"
    if resize == "stretch" and crop == 1:
        assert (shown == classes).all() and back.dtype == np.uint8


def test_what_a_crop_left_out_has_no_answer() -> None:
    """A wide image covers a square: its middle is answered, both ends are not."""
    spec = {"size": 8, "crop_fraction": 1.0, "interpolation": "nearest"}
    back = unfit_classes(np.full((8, 8), 5, np.uint8), spec, 10, 40)
    assert (back[:, 15:25] == 5).all() and (back[:, :15] == -1).all() and (back[:, 25:] == -1).all()
    image = np.full((10, 40, 3), 90, np.uint8)
    laid = overlay(image, back)
    assert (laid[:, :15] == 90).all() and (laid[:, 15:25] != 90).any()


# ---- the steps ------------------------------------------------------------------------------------------------------


class Bright:
    """A network that calls bright pixels 1, at half the size of what it is shown; it can take its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.calls = seconds, 0

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return images.astype(np.float32)

    def infer(self, prepared: np.ndarray) -> np.ndarray:
        self.calls += 1
        time.sleep(self.seconds)
        light = prepared.mean(3)[:, ::2, ::2]
        return np.stack([128 - light, light - 128], 1)


def frames(count: int = 3) -> list[np.ndarray]:
    """Dark on the left, bright on the right."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, 32:] = 250
    return [picture] * count


def test_a_frame_is_answered_in_colours() -> None:
    shown, steps = answer_frame(Bright(), frames()[0], SPEC, MASKS)
    assert list(steps) == ["resize", "network", "answer", "colours"] and min(steps.values()) > 0
    said = np.zeros((48, 64), np.uint8)
    said[:, 32:] = 1
    wrong = (shown != overlay(frames()[0], said)).any(2)
    assert not wrong[:, :30].any() and not wrong[:, 34:].any(), "the edge alone may be off by the half stride"


def test_a_frame_of_another_task_ends_in_a_probability() -> None:
    class Sure(Bright):
        def infer(self, prepared: np.ndarray) -> np.ndarray:
            return np.array([[0.0, np.log(3.0)]], np.float32)

    shown, steps = answer_frame(Sure(), frames()[0], SPEC, LABELS)
    assert list(steps) == ["resize", "network", "answer"]
    assert shown == pytest.approx([0.75])


def test_frames_take_turns_with_the_network_alone() -> None:
    session = Bright(seconds=0.002)
    facts = {"task": "segmentation", "input": SPEC}
    found = time_frames(session, frames(), facts, seconds=30)
    assert found is not None
    told = FrameSamples.model_validate(found)
    assert len(told.whole_ns) == len(told.alone_ns) == MOST_FRAMES == len(told.steps_ns["answer"])
    assert session.calls == 2 * (MOST_FRAMES + framing.WARM_FRAMES)
    assert told.sizes == [(48, 64)] * 3
    assert np.median(told.alone_ns) >= 2e6 and np.median(told.whole_ns) > np.median(told.alone_ns)
    steps = np.sum([told.steps_ns[step] for step in told.steps_ns], axis=0)
    assert (steps <= told.whole_ns).all() and np.median(steps / told.whole_ns) > 0.6, "the steps are the whole"


def test_slow_frames_are_few() -> None:
    facts = {"task": "segmentation", "input": SPEC}
    found = time_frames(Bright(seconds=0.02), frames(), facts, seconds=0.01)
    assert found is not None and len(found["whole_ns"]) == FEWEST_FRAMES


def test_no_frames_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"task": "segmentation", "input": SPEC}
    assert time_frames(Bright(), [], facts, 1) is None
    assert time_frames(Bright(), frames(), {**facts, "task": "another"}, 1) is None
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)  # as on a device without it
    assert time_frames(Bright(), frames(), facts, 1) is None


# ---- over a session -------------------------------------------------------------------------------------------------


def of_frames(whole_ms: float, alone_ms: float) -> FrameSamples:
    whole, alone = int(whole_ms * 1e6), int(alone_ms * 1e6)
    steps = {"resize": [whole // 4] * 3, "network": [whole // 2] * 3}
    return FrameSamples(sizes=[(4, 6)], whole_ns=[whole] * 3, alone_ns=[alone] * 3, steps_ns=steps)


def samples(found: FrameSamples | None) -> Any:
    class Process:
        frames = found

    return Process()


def test_the_process_is_the_unit() -> None:
    found = whole_frame([samples(of_frames(2 * factor, factor)) for factor in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)])
    assert found is not None
    assert found.latency_ms == Interval(pytest.approx(2.5), 2.0, 3.0, 6)
    assert (found.over_network.value, found.over_network.low) == (pytest.approx(2), pytest.approx(2))
    assert found.steps_ms == {"resize": pytest.approx(0.625), "network": pytest.approx(1.25)}
    assert whole_frame([samples(of_frames(2, 1)), samples(None)]) is None and whole_frame([]) is None


def test_frames_have_a_trust_of_their_own() -> None:
    """By their own width and controls: whatever the latency is worth, and however much of it they share."""
    rounds = [1.0, 1.001, 0.999, 1.0, 1.002, 1.001]
    wild = [1.0, 1.9, 0.6, 1.0, 2.2, 0.5]
    p50 = Interval(1.0, 0.999, 1.002, 6)
    result = Result(status="measured", latency_p50_ms=p50)

    def word(frames_ms: list[float], again: list[float], p50_ms: list[float] = rounds) -> tuple[str, str, str]:
        frame = whole_frame([samples(of_frames(each, 0.5)) for each in frames_ms])
        given = result.model_copy(update={"whole_frame": frame, "latency_p50_ms": _spread(p50_ms)})
        known = {"a": p50_ms, control_name("a"): p50_ms}
        told = {"a": frames_ms, control_name("a"): again}
        judged = assess(known, {"a": given}, {"a": ["a"]}, {}, 0.1, frames=told)["results"]["a"]
        return judged.trust.word, judged.whole_frame.trust.word, judged.whole_frame.trust.reason

    assert word(rounds, rounds) == ("trusted", "trusted", "")
    assert word(wild, wild)[:2] == ("trusted", "noisy")
    assert word(rounds, rounds, wild)[:2] == ("noisy", "trusted")
    _, invalid, reason = word(rounds, [2 * each for each in rounds])
    assert invalid == "invalid" and reason.startswith("the A/A control of a is off by")
    emulated = assess(
        {"a": rounds},
        {"a": result.model_copy(update={"whole_frame": whole_frame([samples(of_frames(1, 0.5))] * 6)})},
        {"a": []},
        {},
        0.1,
        frames={"a": rounds},
        emulated=True,
    )
    assert emulated["results"]["a"].whole_frame.trust.word == "invalid"


def test_frames_over_sessions() -> None:
    """Of the sessions in which they are trusted, whatever the latencies are; known by how far those are apart."""

    def session(whole_ms: float, word: str = "trusted") -> Result:
        frame = whole_frame([samples(of_frames(whole_ms, 1.0))] * 6)
        assert frame is not None
        return Result(
            status="measured",
            whole_frame=frame.model_copy(update={"trust": Trust(word=word, reason="" if word == "trusted" else "why")}),
        )

    four = [session(2.0), session(2.02), session(9.0, "noisy"), session(1.98)]
    found = pooled_frame(four[0], [*four, None], 0.1)
    assert found is not None and found.trust is not None
    assert (found.latency_ms.n, found.trust.word) == (3, "trusted")
    assert found.latency_ms.value == pytest.approx(2.0, rel=1e-3) == found.over_network.value
    assert pooled_frame(four[2], [four[2]], 0.1) == four[2].whole_frame, "none is trusted: the session's own"
    assert pooled_frame(four[2], [four[2], four[0]], 0.1) == four[0].whole_frame
    apart = pooled_frame(four[0], [session(2.0), session(3.0)], 0.1)
    assert apart is not None and apart.trust is not None
    assert apart.trust.word == "noisy" and "over 2 sessions" in apart.trust.reason
    assert pooled_frame(Result(status="measured"), [None], 0.1) is None


def _spread(values: list[float]) -> Interval:
    ordered = sorted(values)
    return Interval(float(np.median(values)), ordered[0], ordered[-1], len(values))


def test_a_device_times_whole_frames(packed: Bundle, trained: Trained, tmp_path: Path) -> None:
    """Pictures of several sizes, in the same process as the latencies; without them there are none, as before."""
    samples_ = trained.dataset.balanced("test", 4, seed=0)
    np.save(tmp_path / "images.npy", np.stack([each.fitted(packed.facts.input.model_dump()) for each in samples_]))
    pictures = [np.asarray(each.image().resize((40 + 8 * at, 30))) for at, each in enumerate(samples_)]
    np.savez(tmp_path / "frames.npz", *pictures)
    brief = MeasureSettings(seconds=0.05, max_seconds=0.05, min_samples=20, images=4, warm_up_seconds=0.05)
    device = find_device("local")
    with opened(device, tmp_path):
        device.push(packed.path, "bundle")
        for name in ("images.npy", "frames.npz"):
            device.push(tmp_path / name, name)
        found: Samples = device.measure("bundle", "images.npy", brief, 120, frames="frames.npz")
        without: Samples = device.measure("bundle", "images.npy", brief, 120)
    assert without.frames is None and without.latency_ns
    assert found.frames is not None
    assert found.frames.sizes == [(30, 40), (30, 48), (30, 56), (30, 64)]
    assert list(found.frames.steps_ns) == ["resize", "network", "answer"]


def test_a_session_tells_of_whole_frames(made: Made) -> None:
    """Of every timed bundle, on the page and in the terminal; a measurement of before, which has none, is read too."""
    results = made.measurement.facts.results
    timed = [name for name, result in results.items() if result.latency_p50_ms is not None]
    assert timed and all(results[name].whole_frame is not None for name in timed)
    for name in timed:
        frame = results[name].whole_frame
        assert frame is not None and frame.trust is not None
        assert frame.sizes == [(8, 8)] * len(frame.sizes)
        assert frame.network_ms.value > 0 and frame.latency_ms.value > 0 and frame.over_network.value > 0
    page = made.report.file(made.report.PAGE).read_text()
    assert "whole frame" in page and "frame over<br>network" in page
    [device] = made.report.numbers["devices"]
    [line] = words.frame_lines(device)
    assert "a whole frame of 8x8 pixels" in line and "of the network alone (resize" in line
    before = json.loads(json.dumps(device))
    for row in before["bundles"]:
        del row["whole_frame"]
    assert words.frame_lines(before) == []
    old = results[timed[0]].model_dump(exclude={"whole_frame"})
    assert Result.model_validate(old).whole_frame is None
