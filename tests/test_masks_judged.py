"""Masks judged: mean IoU with the image as the unit, what a change is worth, and what a stranger's arrays end in."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Made, replace_file, rewrite_manifest
from scipy import stats
from sklearn import metrics

from kdpipe.core.errors import UserError
from kdpipe.core.kinds import BundleFacts, Measurement
from kdpipe.core.rules import parse_rule
from kdpipe.core.stats import CALIBRATION_BINS, calibration_error, calibration_interval
from kdpipe.deploy.figures import figures
from kdpipe.deploy.gate import Question, decide
from kdpipe.devices.accuracy import read_outputs
from kdpipe.devices.bench import _check_seen_alike
from kdpipe.quantize.guard import enough_to_show, kept_accuracy
from kdpipe.report.answers import answers, judged, scores
from kdpipe.report.compression import Sources
from kdpipe.runtime import task as judging
from kdpipe.runtime.task import TASKS, Segmentation

TASK = Segmentation()
CLASSES = 4


def network(seed: int, images: int = 12, wrong: float = 0.8, stride: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels int16 [N, 16, 24], an eighth of them unknown, and logits [N, 4, 8, 12] of a network that sees badly."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, CLASSES, (images, 4, 6))
    labels = coarse.repeat(4, 1).repeat(4, 2).astype(np.int16)
    logits = np.eye(CLASSES, dtype=np.float32)[labels[:, ::stride, ::stride]].transpose(0, 3, 1, 2)
    logits = logits + wrong * np.random.default_rng(99).normal(size=logits.shape).astype(np.float32)
    labels[generator.random(labels.shape) < 0.125] = -1
    return labels, logits


def enlarged_by_torch(logits: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    return torch.nn.functional.interpolate(torch.from_numpy(logits), sides, mode="bilinear").numpy()


def of_each(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The mean IoU of each image's own classes [N]."""
    found = []
    for label, said in zip(labels, enlarged_by_torch(logits, (16, 24)).argmax(1), strict=True):
        known = label >= 0
        shown = np.unique(label[known])
        found.append(metrics.jaccard_score(label[known], said[known], average=None, labels=shown).mean())
    return np.array(found)


# ---- what an answer is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(16, 24), (33, 17), (8, 12), (3, 5), (1, 1), (100, 1)])
def test_logits_are_enlarged_as_torch_does(sides: tuple[int, int]) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 8, 12)).astype(np.float32)
    np.testing.assert_allclose(TASK.enlarged(logits, sides), enlarged_by_torch(logits, sides), atol=2e-6)


def test_scores_are_those_of_a_confusion_matrix() -> None:
    labels, logits = network(0)
    found = TASK.scores(logits, labels)
    said = enlarged_by_torch(logits, (16, 24)).argmax(1)
    for at in range(len(labels)):
        known = labels[at] >= 0
        matrix = metrics.confusion_matrix(labels[at][known], said[at][known], labels=range(CLASSES))
        np.testing.assert_array_equal(found[at], np.stack([np.diag(matrix), matrix.sum(0), matrix.sum(1)], axis=1))
    known = labels >= 0
    overlaps = metrics.jaccard_score(labels[known], said[known], average=None)
    assert TASK.summary(found).value == pytest.approx(overlaps.mean())
    by_class = TASK.of_classes(TASK.by_class(found, labels))
    assert [by_class[at].value for at in range(CLASSES)] == pytest.approx(overlaps.tolist())
    assert all(each.low <= each.value <= each.high for each in by_class.values())
    called = TASK.confused(logits, labels)
    matrix = metrics.confusion_matrix(labels[known], said[known])
    assert all(called.get(pair, 0) == matrix[pair] for pair in itertools.product(range(CLASSES), repeat=2))


def test_class_maps_are_judged_as_the_logits_that_they_come_from() -> None:
    labels, logits = network(1)
    whole = enlarged_by_torch(logits, (16, 24))
    maps = whole.argmax(1).astype(np.uint8)
    np.testing.assert_array_equal(TASK.scores(maps, labels)[:, :CLASSES], TASK.scores(logits, labels))
    assert TASK.summary(TASK.scores(maps, labels)) == TASK.summary(TASK.scores(logits, labels))
    change = TASK.change(TASK.scores(logits, labels), TASK.scores(maps, labels))
    assert (change.difference, change.lost, change.won, change.p_value) == (0, 0, 0, 1)
    assert TASK.agreement(logits, maps) == 1 and len(TASK.differing(logits, maps)) == 0
    half = TASK.decide(logits)
    assert half.dtype == np.uint8 and half.shape == (12, 8, 12)
    double = half.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(TASK.scores(half, labels), TASK.scores(double, labels))


def test_a_class_that_no_label_has_counts_for_nothing_but_its_mistakes() -> None:
    labels = np.zeros((2, 2, 2), np.int16)
    labels[:, 0] = 1
    said = labels.astype(np.uint8)
    said[0, 0, 0] = 3
    found = TASK.scores(said, labels)
    assert TASK.summary(found).value == pytest.approx((1 + 3 / 4) / 2)
    assert set(TASK.of_classes(found)) == {0, 1}
    assert TASK.class_count(said) == 4


def test_unlabelled_images_tell_nothing() -> None:
    labels, logits = network(2)
    found = TASK.scores(logits, labels)
    blank = TASK.scores(logits[:3], np.full_like(labels[:3], -1))
    assert not blank.any()
    with_blank = np.concatenate([found, blank])
    assert TASK.summary(with_blank) == TASK.summary(found)
    other = TASK.scores(logits + 1e-3, labels)
    assert TASK.change(with_blank, np.concatenate([other, blank])) == TASK.change(found, other)
    for nothing in (blank, found[:0]):
        with pytest.raises(ValueError, match="at least one image with a labelled pixel"):
            TASK.summary(nothing)
        with pytest.raises(ValueError, match="at least one image with a labelled pixel"):
            TASK.change(nothing, nothing)
    assert TASK.scores(logits[:0], labels[:0]).shape == (0, CLASSES, 3)


def test_the_likeliest_maps_and_what_they_are_called() -> None:
    _, logits = network(3)
    maps, shares = TASK.likeliest(logits, 2)
    soft = torch.softmax(torch.from_numpy(logits), 1).numpy()
    top, places = np.sort(soft, 1)[:, ::-1], np.argsort(-soft, 1)
    np.testing.assert_array_equal(maps, places[:, :2])
    np.testing.assert_allclose(shares, top[:, :2].mean((2, 3)), atol=1e-6)
    np.testing.assert_array_equal(maps[:, 0], TASK.decide(logits))
    mask = np.array([[0, 0, 0, 2, -1], [0, 1, 2, 2, -1]])
    assert TASK.tell(mask, ["road", "sky", "car"]) == "road 50 %, car 38 %, sky 12 %"
    assert TASK.tell(np.full((2, 2), -1), ["road"]) == "nothing is labelled"
    rare = np.zeros((100, 100), np.uint8)
    rare[0, 0] = 7
    assert TASK.tell(rare, ["road"]) == "road 100 %, class 7 < 1 %"


def test_the_most_different_and_the_worst_come_first() -> None:
    labels, logits = network(4)
    maps = enlarged_by_torch(logits, (16, 24)).argmax(1).astype(np.uint8)
    other = maps.copy()
    other[5, :3] = (other[5, :3] + 1) % CLASSES
    other[7, 0, 0] = (other[7, 0, 0] + 1) % CLASSES
    assert TASK.differing(maps, other).tolist() == [5, 7]
    assert TASK.agreement(maps, other) == pytest.approx(1 - (3 * 24 + 1) / maps.size)
    right = labels.clip(0).astype(np.uint8)
    right[3] = (right[3] + 1) % CLASSES
    right[9, 0] = (right[9, 0] + 1) % CLASSES
    assert TASK.mistaken(right, TASK.scores(right, labels)).tolist() == [3, 9]


# ---- guessing --------------------------------------------------------------------------------------------------------


def overlap(labels: np.ndarray, mask: np.ndarray) -> float:
    said = np.broadcast_to(mask.astype(np.uint8), labels.shape)
    return TASK.summary(TASK.scores(said, labels)).value


@pytest.mark.parametrize("seed", range(3))
def test_guessing_is_a_fixed_mask_that_is_hard_to_better(seed: int) -> None:
    """Of all masks of two by three pixels and three classes it finds one near the best, and none that is not one."""
    generator = np.random.default_rng(seed)
    habit = generator.integers(0, 3, (2, 3))
    labels = np.where(generator.random((15, 2, 3)) < 0.6, habit, generator.integers(-1, 3, (15, 2, 3))).astype(np.int16)
    every = [overlap(labels, np.reshape(mask, (2, 3))) for mask in itertools.product(range(3), repeat=6)]
    assert any(TASK.guessing(labels) == pytest.approx(each) for each in every)
    commonest = np.stack([(labels == at).sum(0) for at in range(3)]).argmax(0)
    assert overlap(labels, commonest) <= TASK.guessing(labels) <= max(every) + 1e-12
    assert TASK.guessing(labels) >= 0.9 * max(every)


def test_of_very_many_pixels_some_are_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, _ = network(20)
    whole = TASK.guessing(labels)
    monkeypatch.setattr(judging, "GUESSED_PIXELS", labels.size // 4)
    assert TASK.guessing(labels) == TASK.guessing(labels[:, ::2, ::2]) == pytest.approx(whole, abs=0.1)


def test_guessing_without_a_label_is_nothing() -> None:
    assert TASK.guessing(np.full((3, 4, 4), -1, np.int16)) == 0
    assert TASK.guessing(np.full((3, 4, 4), 2, np.int16)) == 1


# ---- changes ---------------------------------------------------------------------------------------------------------


def test_a_change_is_the_difference_and_pairs_images() -> None:
    labels, logits = network(5, images=30)
    noise = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    before, after = TASK.scores(logits, labels), TASK.scores(logits + 0.5 * noise, labels)
    found, back = TASK.change(before, after), TASK.change(after, before)
    assert found.difference == pytest.approx(TASK.summary(after).value - TASK.summary(before).value)
    assert found.low < found.difference < found.high and found.n == 30
    assert (back.difference, back.lost, back.won) == (pytest.approx(-found.difference), found.won, found.lost)
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))
    assert back.p_value == pytest.approx(found.p_value)
    own, worse = (of_each(labels, each) for each in (logits, logits + 0.5 * noise))
    assert found.lost == (worse < own - 1e-12).sum() and found.won == (worse > own + 1e-12).sum()
    order = np.random.default_rng(2).permutation(30)
    mixed = TASK.change(before[order], after[order])
    assert mixed[:2] == pytest.approx(found[:2]) and (mixed.lost, mixed.won) == (found.lost, found.won)
    assert TASK.change(before, after) == found, "the same every time"


def test_swaps_are_counted_exactly_where_they_are_few() -> None:
    labels, logits = network(6, images=7)
    other = logits + 0.4 * np.random.default_rng(3).normal(size=logits.shape).astype(np.float32)
    before, after = TASK.scores(logits, labels), TASK.scores(other, labels)
    observed = abs(TASK.summary(after).value - TASK.summary(before).value)
    beyond = []
    for swapped in itertools.product((False, True), repeat=7):
        at = np.array(swapped)[:, None, None]
        one, two = np.where(at, after, before), np.where(at, before, after)
        beyond.append(abs(TASK.summary(two).value - TASK.summary(one).value) >= observed - 1e-12)
    assert TASK.change(before, after).p_value == pytest.approx(np.mean(beyond))


def test_swaps_by_draws_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, logits = network(7, images=12)
    other = logits + 0.3 * np.random.default_rng(3).normal(size=logits.shape).astype(np.float32)
    before, after = TASK.scores(logits, labels), TASK.scores(other, labels)
    exact = TASK.change(before, after).p_value
    monkeypatch.setattr(judging, "EXACT_IMAGES", 0)
    drawn = TASK.change(before, after).p_value
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / judging.SWAPS) + 1e-4)
    monkeypatch.setattr(judging, "SWAPPED_BYTES", 1000)
    assert TASK.change(before, after).p_value == drawn, "in however many pieces"


def test_where_nothing_changed_something_may_have() -> None:
    """A bootstrap would say that nothing is open; the fewer images, the more is."""
    widths = []
    for images in (10, 40, 160):
        labels, logits = network(8, images=images)
        found = TASK.scores(logits, labels)
        same = TASK.change(found, found)
        assert (same.difference, same.lost, same.won, same.p_value) == (0, 0, 0, 1)
        assert same.low == -same.high < 0
        widths.append(same.high)
        few = [kept_accuracy(same, points).answer for points in (0.01, 99)]
        assert few == ["cannot tell", "holds"]
        assert not enough_to_show(TASK, found, 0.01) and enough_to_show(TASK, found, 99)
    assert widths[0] > 3.5 * widths[1] > 12 * widths[2]


def test_one_image_tells_nothing_of_others() -> None:
    labels, logits = network(9, images=1)
    found = TASK.scores(logits, labels)
    alone, change = TASK.summary(found), TASK.change(found, found)
    assert (alone.low, alone.high, change.low, change.high) == (0, 1, -1, 1)


@pytest.mark.parametrize(
    "after",
    [
        np.zeros((3, CLASSES, 3), np.int64),
        np.zeros((12, CLASSES, 2), np.int64),
        np.zeros((12, 3), np.int64),
        np.ones((12, CLASSES, 3), np.int64),
    ],
)  # fmt: skip
def test_scores_of_other_labels_are_no_pair(after: np.ndarray) -> None:
    labels, logits = network(0)
    with pytest.raises(ValueError, match="wanted scores"):
        TASK.change(TASK.scores(logits, labels), after)


@pytest.mark.parametrize("confidence", [0.95, 0.99, 0.998])
def test_students_quantile_is_scipys(confidence: float) -> None:
    for freedom in (1, 2, *range(3, 40), 100, 1000):
        known = stats.t.ppf(0.5 + confidence / 2, freedom)
        close = 1e-6 if freedom < 3 else 0.011 if freedom > 4 or confidence < 0.98 else 0.1
        assert judging._students_quantile(freedom, confidence) == pytest.approx(known, rel=close), freedom


def test_intervals_hold_the_truth_and_the_margin_stands() -> None:
    """A few of what benchmarks/overlap.py does by the thousand."""
    sizes = ("--images", "20", "--images", "50")
    names = (word for name in SIMULATED for word in ("--only", name))
    line = [sys.executable, ROOT / "benchmarks" / "overlap.py", "simulate", "--trials", "300", *sizes, *names]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = [json.loads(each) for each in done.stdout.splitlines()]
    assert len(found) == 2 * 2 * len(SIMULATED)
    for each in found:
        assert each["holds_percent"] >= 90, each  # of a 95 % interval: 3.5 standard errors
        assert each["passes_at_margin_percent"] <= 6, each  # of 2.5 in 100


SIMULATED = ("1 image of 5 loses a class", "very skewed")


# ---- how sure it is -----------------------------------------------------------------------------------------------


def test_surety_is_that_of_the_pixels() -> None:
    labels, logits = network(10)
    surety = TASK.surety(logits, labels, CALIBRATION_BINS)
    assert surety is not None and surety.weight.sum() == (labels >= 0).sum()
    soft = torch.softmax(torch.from_numpy(enlarged_by_torch(logits, (16, 24))), 1).numpy()
    known = labels >= 0
    sure, right = soft.max(1)[known], (soft.argmax(1) == labels)[known]
    pixels = calibration_error(sure, right).error
    found = calibration_error(surety.confidence, surety.right, weight=surety.weight)
    assert found.error == pytest.approx(pixels, abs=1e-6) and found.images == 12
    assert TASK.surety(TASK.decide(logits), labels, CALIBRATION_BINS) is None


def test_a_network_that_is_as_sure_as_right_stays_below_chance() -> None:
    """Pixels of an image are right together: chance is that of images, not of pixels."""
    below, held = 0, 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        sure = np.tile(np.arange(6, 15) / 15 + 1 / 30, (40, 1))
        luck = 0.15 * generator.normal(size=(40, 1))
        right, weight = np.clip(sure + luck, 0, 1), np.full(sure.shape, 100.0)
        found = calibration_error(sure, right, weight=weight)
        below += found.error <= found.by_chance
        interval = calibration_interval(sure, right, weight=weight)
        held += interval.low == 0
    assert below >= 53 and held >= 53  # 95 of 100 each


# ---- strangers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (np.zeros((5, 4, 8, 12), np.float32), None),
        (np.zeros((5, 8, 12), np.uint8), None),
        (np.zeros((4, 4, 8, 12), np.float32), "float32 [5, 4, height, width], or uint8 [5, height, width]"),
        (np.zeros((5, 3, 8, 12), np.float32), "float32 [5, 4, height, width]"),
        (np.zeros((5, 4, 8, 12), np.float64), "float32 [5, 4, height, width]"),
        (np.zeros((5, 4), np.float32), "float32 [5, 4, height, width]"),
        (np.zeros((5, 8, 12), np.int64), "uint8 [5, height, width]"),
        (np.zeros((5, 4, 0, 12), np.float32), "float32 [5, 4, height, width]"),
        (np.full((5, 8, 12), 9, np.uint8), "class numbers of 0 to 3 alone, not 9"),
        (np.float32(1), "float32 [5, 4, height, width]"),
    ],
)  # fmt: skip
def test_outputs_of_a_stranger(outputs: np.ndarray, words: str | None) -> None:
    found = TASK.misfit(np.asarray(outputs), 5, 4)
    assert found is None if words is None else found is not None and words in found


@pytest.mark.parametrize(
    ("labels", "fits"),
    [
        (np.zeros((5, 16, 24), np.int16), True),
        (np.full((5, 16, 24), 4, np.int16), False),
        (np.full((5, 16, 24), -2, np.int16), False),
        (np.zeros((4, 16, 24), np.int16), False),
        (np.zeros((5, 16), np.int16), False),
        (np.zeros(5, np.int64), False),
        (np.zeros((5, 16, 24), np.float32), False),
        (np.full((5, 16, 24), -1, np.int16), False),
    ],
)  # fmt: skip
def test_labels_of_a_stranger(labels: np.ndarray, fits: bool) -> None:
    found = TASK.mislabeled(labels, np.zeros((5, 4, 8, 12), np.float32))
    assert found is None if fits else found == "integers [5, height, width] of -1 to 3"
    assert TASK.mislabeled(labels, np.zeros((5, 4), np.float32)) is not None


# ---- a measurement of masks ---------------------------------------------------------------------------------------

FLOAT32, INT8 = "onnxruntime-float32", "onnxruntime-int8"


@pytest.fixture
def measured(made: Made, tmp_path: Path) -> Callable[..., Measurement]:
    """The session of digits as if its bundles had drawn masks, with other labels and outputs."""

    def make(labels: np.ndarray, outputs: dict[str, np.ndarray]) -> Measurement:
        folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        shutil.copytree(made.measurement.path, folder)
        kept = {Measurement.LABELS: labels, **{Measurement.outputs_name(name): each for name, each in outputs.items()}}
        for file, array in kept.items():
            content = io.BytesIO()
            np.save(content, array)
            replace_file(folder, file, content.getvalue())
        rewrite_manifest(folder, lambda value: value["facts"].update(task="segmentation"))
        return Measurement.open(folder)

    return make


def test_figures_of_masks(measured: Callable[..., Measurement]) -> None:
    labels, logits = network(11, images=40)
    maps = enlarged_by_torch(logits, (16, 24)).argmax(1).astype(np.uint8)
    measurement = measured(labels, {FLOAT32: logits, INT8: maps})
    found = {name: figures(measurement, name, ["a", "b", "c", "d"]) for name in (FLOAT32, INT8)}
    summary = TASK.summary(TASK.scores(logits, labels))
    assert found[FLOAT32]["accuracy"].interval.value == summary.value == found[INT8]["accuracy"].interval.value
    worst = min(TASK.of_classes(TASK.scores(logits, labels)).items(), key=lambda each: each[1].value)
    assert found[FLOAT32]["worst class"].where == "abcd"[worst[0]]
    assert found[FLOAT32]["worst class"].interval.value == worst[1].value
    assert found[FLOAT32]["calibration error"].interval.value > 0
    assert found[INT8]["calibration error"].why == "it says classes, not how sure it is"
    rules = [parse_rule(each) for each in ("mIoU >= baseline - 10pp", "worst class >= baseline - 10pp")]
    asked = [Question(rule, "local", INT8, [found[INT8][rule.name]], [found[FLOAT32][rule.name]]) for rule in rules]
    assert [each.answer for each in decide(asked)] == ["pass", "pass"]
    assert scores(measurement, INT8) is not None and not scores(measurement, INT8).flags.writeable


def test_a_gate_of_masks_asks_the_task_for_the_change() -> None:
    """Not the images that got worse against those that got better: all lose a little, or one loses nearly all."""
    generator = np.random.default_rng(0)
    labels, _ = network(12, images=60)
    sure = labels.clip(0).astype(np.uint8)
    little = np.where(generator.random(labels.shape) < 0.01, (sure + 1) % CLASSES, sure).astype(np.uint8)
    much = np.where(generator.random(labels.shape) < 0.2, (sure + 1) % CLASSES, sure).astype(np.uint8)
    rule = parse_rule("accuracy >= baseline - 5pp")

    def answer(candidate: np.ndarray) -> str:
        both = [_figure(TASK.scores(each, labels)) for each in (candidate, sure)]
        return decide([Question(rule, "local", "network", [both[0]], [both[1]])])[0].answer

    change = TASK.change(TASK.scores(sure, labels), TASK.scores(little, labels))
    assert change.lost > 40 and change.won == 0, "nearly every image is worse"
    assert answer(little) == "pass" and answer(much) == "fail"


def _figure(found: np.ndarray) -> object:
    from kdpipe.core.kinds import Trust
    from kdpipe.deploy.figures import _accuracy

    return _accuracy(TASK, found, Trust(word="trusted"))


@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        (np.zeros((40, 16, 24), np.int16), np.zeros((40, 4), np.float32)),
        (np.zeros((40, 16, 24), np.int16), np.zeros((40, 4, 0, 3), np.float32)),
        (np.zeros((40, 16), np.int16), np.zeros((40, 4, 8, 12), np.float32)),
        (np.zeros(40, np.int64), np.zeros((40, 4, 8, 12), np.float32)),
        (np.full((40, 16, 24), 300, np.int16), np.zeros((40, 16, 24), np.uint8)),
        (np.full((40, 16, 24), -7, np.int16), np.zeros((40, 4, 8, 12), np.float32)),
        (np.zeros((39, 16, 24), np.int16), np.zeros((40, 4, 8, 12), np.float32)),
        (np.zeros((40, 16, 24), np.float64), np.zeros((40, 4, 8, 12), np.float32)),
        (np.zeros((40, 16, 24), np.int16), np.zeros((40, 4, 8, 12), np.complex64)),
    ],
)  # fmt: skip
def test_a_strangers_measurement_is_one_line(
    measured: Callable[..., Measurement], labels: np.ndarray, outputs: np.ndarray
) -> None:
    measurement = measured(labels, {INT8: outputs})
    for ask in (lambda: figures(measurement, INT8), lambda: answers(TASK, measurement, INT8, None, Sources())):
        with pytest.raises(UserError) as error:
            ask()
        assert "\n" not in str(error.value)


def test_answers_about_masks_by_class(measured: Callable[..., Measurement]) -> None:
    labels, logits = network(13, images=40)
    measurement = measured(labels, {FLOAT32: logits, INT8: logits[:, ::-1].copy()})
    found = answers(TASK, measurement, INT8, FLOAT32, Sources())
    assert [each["class"] for each in found["classes"]] == ["0", "1", "2", "3"]
    assert sum(each["answers"] for each in found["classes"]) == (labels >= 0).sum()
    assert all(each["float32"]["value"] > each["accuracy"]["value"] for each in found["classes"])
    most = found["confusions"][0]
    assert most["pixels"] > 0 and set(most["classes"]) in ({0, 3}, {1, 2}), "its classes stand in reverse"
    json.dumps(found, allow_nan=False)
    told = judged(TASK, logits, labels)
    assert told["balanced"]["value"] == TASK.summary(TASK.scores(logits, labels)).value
    assert judged(TASK, TASK.decide(logits), labels)["calibration"] is None


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (np.zeros((3, 10), np.float32), None),
        (np.zeros((3, 9), np.float32), "float32 [3, 10]"),
        (np.zeros((3, 10, 4, 4), np.float32), "float32 [3, 10]"),
        (np.zeros((3, 10), np.uint8), "float32 [3, 10]"),
        (np.full((3, 10), np.nan, np.float32), "not all finite"),
    ],
)  # fmt: skip
def test_outputs_of_a_device_are_what_the_task_wants(
    made: Made, tmp_path: Path, outputs: np.ndarray, words: str | None
) -> None:
    np.save(tmp_path / "outputs.npy", outputs)
    bundle = made.bundles[INT8]
    if words is None:
        assert read_outputs(tmp_path / "outputs.npy", "a", 3, bundle).shape == (3, 10)
        return
    with pytest.raises(UserError) as error:
        read_outputs(tmp_path / "outputs.npy", "a", 3, bundle)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("others", "alike"),
    [
        ({"size": (32, 32)}, False),
        ({"size": (48, 64)}, True),
        ({"size": (32, 32), "resize": "stretch"}, False),
        ({"crop_fraction": 0.5}, False),
    ],
)  # fmt: skip
def test_networks_that_see_other_parts_of_an_image_are_not_compared(
    made: Made, others: dict[str, object], alike: bool
) -> None:
    """Pixel by pixel; where they see the same in another size, their answers are enlarged to one."""

    @dataclasses.dataclass
    class Shown:
        facts: BundleFacts

    facts = made.bundles[INT8].facts

    def shown(task: str, **changes: object) -> Shown:
        spec = facts.input.model_copy(update={"size": (24, 32), "resize": "cover", "crop_fraction": 1.0, **changes})
        return Shown(facts.model_copy(update={"task": task, "input": spec}))

    _check_seen_alike({"a": shown("classification"), "b": shown("classification", **others)})
    both = {"a": shown("segmentation"), "b": shown("segmentation", **others)}
    if alike:
        _check_seen_alike(both)
        return
    with pytest.raises(UserError, match="'a' and 'b' are shown different parts of an image"):
        _check_seen_alike(both)


def test_large_sets_do_not_fill_the_memory(tmp_path: Path) -> None:
    """Logits of 40 images of 480x640 would be 540 MB at full size, and their labels lie on the disk."""
    labels = np.lib.format.open_memmap(tmp_path / "labels.npy", "w+", np.int16, (40, 480, 640))
    logits = np.lib.format.open_memmap(tmp_path / "logits.npy", "w+", np.float32, (40, 11, 30, 40))
    logits[:] = np.random.default_rng(0).normal(size=logits.shape)
    tracemalloc.start()
    found = TASK.scores(logits, labels)
    TASK.agreement(logits, logits)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 * 2**20 and found.shape == (40, 11, 3)


def test_both_tasks_answer_everything_that_is_asked() -> None:
    """In one form, whatever an answer is."""
    labels, logits = network(14)
    for task, outputs, wanted in (
        (TASKS["classification"], np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32), np.arange(12) % 4),
        (TASK, logits, labels),
    ):
        assert task.misfit(outputs, 12, 4) is None and task.mislabeled(wanted, outputs) is None
        assert task.class_count(outputs) == 4 and task.counted in ("images", "pixels")
        found = task.scores(outputs, wanted)
        assert len(found) == 12 and 0 <= task.summary(found).low <= task.summary(found).value
        assert set(task.of_classes(task.by_class(found, wanted))) == {0, 1, 2, 3}
        assert sum(task.confused(outputs, wanted).values()) == (wanted >= 0).sum()
        assert 0 < task.guessing(wanted) < 1
        surety = task.surety(outputs, wanted, CALIBRATION_BINS)
        assert surety is not None and surety.weight.sum() == (wanted >= 0).sum()
