"""The losses against golden values and against what must hold of them whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kdpipe.distill import losses

# Worked out in float64 from the formulas, independently of torch.
STUDENT = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.5, -1.0, 2.0, 1.0], [0.2, 0.1, -0.3, 0.5]])
TEACHER = torch.tensor([[2.0, 1.0, 4.0, -1.0], [0.0, 0.0, 3.0, 1.0], [1.0, -1.0, 0.0, 2.0]])
LABELS = torch.tensor([2, 2, 3])
GRID = torch.arange(16.0).reshape(2, 2, 2, 2) / 4
STUDENT_MAP, TEACHER_MAP = GRID.sin(), (1.3 * GRID).cos()
STUDENT_POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [2.0, 1.0]])
TEACHER_POINTS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [1.0, 1.0, 1.0]])

# Every loss of logits, as (student, teacher, labels) -> scalar.
LOGIT_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t, y: losses.kd(s, t, 4),
    "kd, T = 1": lambda s, t, y: losses.kd(s, t, 1),
    "logit_mse": lambda s, t, y: losses.logit_mse(s, t),
    "hard": lambda s, t, y: losses.hard(s, t),
    "bkd": lambda s, t, y: losses.bkd(s, t),
    "dkd": lambda s, t, y: losses.dkd(s, t, y, 1, 8, 4),
    "dkd, T = 1": lambda s, t, y: losses.dkd(s, t, y, 1, 2, 1),
    "dist": lambda s, t, y: losses.dist(s, t, 1, 1, 4),
    "dist, T = 1": lambda s, t, y: losses.dist(s, t, 1, 1, 1),
    "standardised kd": lambda s, t, y: losses.kd(losses.standardise(s), losses.standardise(t), 2),
    "standardised dkd": lambda s, t, y: losses.dkd(losses.standardise(s), losses.standardise(t), y, 1, 8, 2),
}
# Every loss of features [B, C, H, W].
FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hint": losses.hint,
    "cwd": lambda s, t: losses.cwd(s, t, 4),
    "attention": lambda s, t: losses.attention([s], [t]),
    "rkd": lambda s, t: losses.rkd(s.flatten(1), t.flatten(1)),
    "cc": lambda s, t: losses.cc(s.flatten(1), t.flatten(1)),
    "review": lambda s, t: losses.review([s], [t]),
}
logit_losses = pytest.mark.parametrize("loss", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES)
feature_losses = pytest.mark.parametrize("loss", FEATURE_LOSSES.values(), ids=FEATURE_LOSSES)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# Any pair of networks' logits: (student, teacher, labels).
Batch = tuple[Tensor, Tensor, Tensor]


@st.composite
def batches(draw: st.DrawFn, least_classes: int = 2, spread: float = 5) -> Batch:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 6)), draw(st.integers(least_classes, 9)))
    student, teacher = (draw(st.floats(0.5, spread)) * torch.randn(shape, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(shape[1], shape[:1], generator=generator)


quickly = settings(deadline=None, max_examples=40)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def close(found: Tensor, expected: Tensor | float, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance, rtol=tolerance)


# Golden values


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1, 0.1803309330), (2, 0.3030484418), (4, 0.3591985807), (100, 0.3876753310)]
)
def test_kd_golden(temperature: float, expected: float) -> None:
    found = losses.kd(STUDENT, TEACHER, temperature).item()
    assert found == pytest.approx(expected, abs=max(1e-6, 1e-7 * temperature**2))


def test_logit_mse_golden() -> None:
    assert losses.logit_mse(STUDENT, TEACHER).item() == pytest.approx(0.388125, abs=1e-6)


def test_hard_golden() -> None:
    assert losses.hard(STUDENT, TEACHER).item() == pytest.approx(0.6621188585, abs=1e-6)


def test_bkd_golden() -> None:
    assert losses.bkd(STUDENT, TEACHER).item() == pytest.approx(0.8509058965, abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature", "expected"),
    [
        (1, 0, 1, 0.1221143944),
        (0, 1, 1, 0.2662150414),
        (1, 0, 4, 0.1652504542),
        (0, 1, 4, 0.3200270816),
        (1, 8, 4, 2.7254671072),
        (1, 2, 1, 0.6545444771),
    ],
)
def test_dkd_golden(alpha: float, beta: float, temperature: float, expected: float) -> None:
    found = losses.dkd(STUDENT, TEACHER, LABELS, alpha, beta, temperature).item()
    assert found == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(
    ("beta", "gamma", "temperature", "expected"),
    [
        (1, 0, 1, 0.0695764233),
        (0, 1, 1, 0.4230014234),
        (1, 1, 1, 0.4925778466),
        (1, 0, 4, 16 * 0.1632445824),
        (0, 1, 4, 16 * 0.4552052853),
        (1, 1, 4, 9.8951978842),
    ],
)
def test_dist_golden(beta: float, gamma: float, temperature: float, expected: float) -> None:
    found = losses.dist(STUDENT, TEACHER, beta, gamma, temperature).item()
    assert found == pytest.approx(expected, abs=1e-6 * temperature**2)


def test_standardised_kd_golden() -> None:
    found = losses.kd(losses.standardise(STUDENT), losses.standardise(TEACHER), 2).item()
    assert found == pytest.approx(0.1133672216, abs=1e-6)


def test_hint_golden() -> None:
    assert losses.hint(STUDENT_MAP, TEACHER_MAP).item() == pytest.approx(1.2078112666, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.0896353105), (4, 0.0911959829)])
def test_channel_wise_golden(temperature: float, expected: float) -> None:
    assert losses.cwd(STUDENT_MAP, TEACHER_MAP, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_attention_golden() -> None:
    assert losses.attention([STUDENT_MAP], [TEACHER_MAP]).item() == pytest.approx(0.0216331703, abs=1e-6)


@pytest.mark.parametrize(("weights", "expected"), [((1, 0), 0.0203166754), ((0, 1), 0.0406143193), ((), 2.5386328515)])
def test_rkd_golden(weights: tuple[float, ...], expected: float) -> None:
    assert losses.rkd(STUDENT_POINTS, TEACHER_POINTS, *weights).item() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("series", "expected"), [((), 0.0286287652), ((1.0, 1), 0.0087073157)])
def test_cc_golden(series: tuple[float, ...], expected: float) -> None:
    assert losses.cc(STUDENT_POINTS, TEACHER_POINTS, *series).item() == pytest.approx(expected, abs=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 2.4789977573), (1.0, 2.3103405529)])
def test_crd_golden(temperature: float, expected: float) -> None:
    """Of the first three anchors the other three are negative, of the last one all but itself and the first."""
    others, is_negative = TEACHER_POINTS[:, :2] + 0.5, ~torch.eye(4, dtype=torch.bool)
    is_negative[3, 0] = False
    found = losses.crd(STUDENT_POINTS, others, others, is_negative, temperature)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_review_golden() -> None:
    """Of six places a side at 6, 4, 2 and 1, of two at 2 and 1."""
    grid = torch.arange(216.0).reshape(2, 3, 6, 6) / 10
    larger, its = grid.sin(), (1.3 * grid).cos()
    assert losses.review([STUDENT_MAP], [TEACHER_MAP]).item() == pytest.approx(1.1470075354, abs=1e-6)
    assert losses.review([larger], [its]).item() == pytest.approx(0.8760877430, abs=1e-5)
    both = losses.review([larger, STUDENT_MAP], [its, TEACHER_MAP])
    assert both.item() == pytest.approx(2.0230952785, abs=1e-5), "a sum over pairs"


# What all have in common


@logit_losses
def test_logit_losses_move_the_student_alone(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    found = loss(student, teacher, LABELS)
    found.backward()
    assert found.shape == () and found.dtype == torch.float32
    assert student.grad is not None and student.grad.abs().max() > 1e-3
    assert teacher.grad is None


@feature_losses
def test_feature_losses_move_the_student_alone(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    # Three samples: two embeddings have one distance, which is always its own mean.
    student, teacher = normal(3, 2, 4, 4).requires_grad_(), normal(3, 2, 4, 4, seed=1).requires_grad_()
    found = loss(student, teacher)
    found.backward()
    assert found.shape == () and found.dtype == torch.float32
    assert student.grad is not None and student.grad.abs().max() > 1e-3
    assert teacher.grad is None


@logit_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logit_losses_compute_in_float32(loss: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    assert torch.equal(loss(student, teacher, LABELS), loss(student.float(), teacher.float(), LABELS))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(STUDENT, TEACHER, LABELS), loss(STUDENT.double(), TEACHER.double(), LABELS))
    assert torch.equal(loss(STUDENT, TEACHER, LABELS), loss(STUDENT.double(), TEACHER.double(), LABELS))


@feature_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_feature_losses_compute_in_float32(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    student, teacher = normal(5, 2, 4, 4).to(dtype), normal(5, 2, 4, 4, seed=1).to(dtype)
    expected = loss(student.float(), teacher.float())
    assert torch.equal(loss(student, teacher), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)


def extremes(rows: int, classes: int) -> Batch:
    """Logits up to 1e4 in size: opposite decisions, equal ones, constant rows, and what lies between."""
    student, teacher = (normal(rows, classes, seed=seed).clamp(-1, 1) * 1e4 for seed in (0, 1))
    labels = torch.arange(rows) % classes
    student[0], teacher[0] = 1e4, -1e4
    student[0, labels[0]], teacher[0, labels[0]] = -1e4, 1e4
    student[1], teacher[1] = -1e4, -1e4
    student[1, labels[1]] = teacher[1, labels[1]] = 1e4
    student[2] = 0
    teacher[3] = 1e4
    return student, teacher, labels


@logit_losses
@halves
@pytest.mark.parametrize("classes", [2, 10])
def test_logit_losses_are_finite_far_out(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, classes: int
) -> None:
    student, teacher, labels = extremes(8, classes)
    student = student.to(dtype).requires_grad_()
    found = loss(student, teacher.to(dtype), labels)
    found.backward()
    assert math.isfinite(found.item()) and found > 0
    assert student.grad is not None and student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@feature_losses
@halves
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_feature_losses_are_finite_far_out(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, scale: float
) -> None:
    student = (scale * normal(4, 2, 4, 4).clamp(-1, 1)).to(dtype).requires_grad_()
    found = loss(student, (1e4 * normal(4, 2, 4, 4, seed=1).clamp(-1, 1)).to(dtype))
    found.backward()
    assert math.isfinite(found.item()) and found > 0
    assert student.grad is not None and student.grad.isfinite().all()


@logit_losses
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (STUDENT, TEACHER[:1]),
        (STUDENT, TEACHER[:, :1]),
        (STUDENT[0], TEACHER[0]),
        (STUDENT[:, :1], TEACHER[:, :1]),
        (STUDENT[:0], TEACHER[:0]),
    ],
    ids=["one teacher row", "one teacher class", "vectors", "one class", "no rows"],
)
def test_logit_losses_refuse_shapes(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> None:
    with pytest.raises(ValueError, match="wanted logits"):
        loss(student, teacher, LABELS)


OF_PLACES = ("kd", "kd, T = 1", "logit_mse", "hard", "bkd")


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_places_are_samples(name: str) -> None:
    """Of logits [B, K, H, W], where a loss takes them; the others refuse them."""
    student, teacher, labels = normal(2, 4, 3, 5), normal(2, 4, 3, 5, seed=1), torch.zeros(2, 3, 5, dtype=torch.long)
    loss, rows = LOGIT_LOSSES[name], [each.movedim(1, -1).reshape(-1, 4) for each in (student, teacher)]
    if name not in OF_PLACES:
        with pytest.raises(ValueError, match="wanted"):
            loss(student, teacher, labels)
        return
    close(loss(student, teacher, labels), loss(*rows, labels.flatten()))
    moved = gradient(lambda each: loss(each, teacher, labels), student).movedim(1, -1).reshape(-1, 4)
    close(moved, gradient(lambda each: loss(each, rows[1], labels.flatten()), rows[0]))


@pytest.mark.parametrize("temperature", [0, -1, math.inf, math.nan])
def test_temperatures_are_positive_and_finite(temperature: float) -> None:
    for call in (
        lambda: losses.kd(STUDENT, TEACHER, temperature),
        lambda: losses.dkd(STUDENT, TEACHER, LABELS, 1, 8, temperature),
        lambda: losses.dist(STUDENT, TEACHER, 1, 1, temperature),
    ):
        with pytest.raises(ValueError, match="wanted a temperature above 0"):
            call()


# kd, logit_mse, hard, bkd


@quickly
@given(batches(), st.sampled_from([1.0, 2.0, 4.0, 20.0]))
def test_gradient_of_kd_is_the_difference_of_softened_outputs(batch: Batch, temperature: float) -> None:
    student, teacher, _ = batch
    found = gradient(lambda z: losses.kd(z, teacher, temperature), student)
    difference = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    close(found, temperature * difference / len(student))
    close(found.sum(1), torch.zeros(len(student)))


@quickly
@given(batches(), st.sampled_from([1.0, 4.0]), st.floats(-20, 20))
def test_kd_ignores_shifts_and_vanishes_at_the_teacher_only(batch: Batch, temperature: float, shift: float) -> None:
    student, teacher, labels = batch
    rows = shift * (1 + labels[:, None])
    expected = losses.kd(student, teacher, temperature)
    tolerance = 1e-5 * temperature**2 * 10
    close(losses.kd(student + rows, teacher, temperature), expected, tolerance)
    close(losses.kd(student, teacher + rows, temperature), expected, tolerance)
    close(losses.kd(teacher + rows, teacher, temperature), 0, tolerance)
    other = teacher.clone()
    other[0, teacher[0].argmax()] = teacher.min() - 2
    assert losses.kd(other, teacher, temperature) > 0.005


def test_kd_nears_logit_mse_as_the_temperature_grows() -> None:
    student, teacher = normal(64, 100), 3 * normal(64, 100, seed=1)
    limit = losses.logit_mse(student, teacher).item()
    misses = [abs(losses.kd(student, teacher, temperature).item() - limit) for temperature in (2, 10, 50)]
    assert misses[0] > 3 * misses[1] > 9 * misses[2]
    assert misses[2] < 0.005 * limit  # O(1/T)


@quickly
@given(batches())
def test_gradients_of_kd_near_that_of_logit_mse(batch: Batch) -> None:
    student, teacher, _ = batch
    limit = gradient(lambda z: losses.logit_mse(z, teacher), student)
    close(gradient(lambda z: losses.kd(z, teacher, 2000), student), limit, 0.02)
    close(limit.sum(1), torch.zeros(len(student)))


@quickly
@given(batches(), st.floats(-20, 20))
def test_logit_mse_ignores_shifts(batch: Batch, shift: float) -> None:
    student, teacher, labels = batch
    rows = shift * (1 + labels[:, None])
    close(losses.logit_mse(student + rows, teacher - rows), losses.logit_mse(student, teacher), 1e-3)
    close(losses.logit_mse(teacher + rows, teacher), 0, 1e-6)


@quickly
@given(batches(), st.sampled_from([1.0, 4.0]))
def test_kd_is_a_mean_over_samples_and_a_sum_over_classes(batch: Batch, temperature: float) -> None:
    student, teacher, _ = batch
    logs = [(logits / temperature).log_softmax(1) for logits in (student, teacher)]
    mean = functional.kl_div(*logs, reduction="mean", log_target=True)
    close(losses.kd(student, teacher, temperature), temperature**2 * student.shape[1] * mean)


def test_gradients_of_kd_keep_their_size_as_the_temperature_grows() -> None:
    student, teacher = normal(32, 100), 3 * normal(32, 100, seed=1)
    sizes = [gradient(lambda z, t=t: losses.kd(z, teacher, t), student).norm() for t in (4, 8, 20, 50, 100)]
    assert max(sizes) / min(sizes) < 1.3  # without the factor T^2 it would be more than 600


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_a_uniform_teacher_is_label_smoothing(smoothing: float) -> None:
    uniform = losses.kd(STUDENT, torch.zeros_like(STUDENT), 1) + math.log(STUDENT.shape[1])
    found = (1 - smoothing) * functional.cross_entropy(STUDENT, LABELS) + smoothing * uniform
    close(found, functional.cross_entropy(STUDENT, LABELS, label_smoothing=smoothing), 1e-6)


@quickly
@given(batches())
def test_hard_is_cross_entropy_where_the_teacher_is_right(batch: Batch) -> None:
    student, teacher, labels = batch
    right = teacher.scatter(1, labels[:, None], teacher.max().item() + 1)
    close(losses.hard(student, right), functional.cross_entropy(student, labels), 1e-6)


@quickly
@given(batches())
def test_gradient_of_bkd_is_that_of_independent_classes(batch: Batch) -> None:
    student, teacher, _ = batch
    found = gradient(lambda z: losses.bkd(z, teacher), student)
    close(found, (student.sigmoid() - teacher.softmax(1)) / student.numel(), 1e-6)


# dkd


@quickly
@given(batches(), st.sampled_from([1.0, 4.0]))
def test_kd_is_decoupled_per_sample(batch: Batch, temperature: float) -> None:
    """KD = TCKD + (1 - p_t(y)) NCKD, and with constant weights it is not."""
    student, teacher, labels = batch
    for at, label in enumerate(labels):
        one = (student[at : at + 1], teacher[at : at + 1])
        tckd, nckd = (losses.dkd(*one, label[None], *weights, temperature) for weights in ((1, 0), (0, 1)))
        other = 1 - (one[1] / temperature).softmax(1)[0, label]
        close(tckd + other * nckd, losses.kd(*one, temperature), 1e-4)


def test_dkd_with_constant_weights_is_not_kd() -> None:
    found = losses.dkd(STUDENT, TEACHER, LABELS, 1, 1, 1).item()
    assert found > losses.kd(STUDENT, TEACHER, 1).item() + 0.1


@quickly
@given(batches(least_classes=3), st.floats(-50, 50))
def test_nckd_does_not_see_the_targets_logit(batch: Batch, value: float) -> None:
    student, teacher, labels = batch
    column = labels[:, None]
    expected = losses.dkd(student, teacher, labels, 0, 1, 2)
    assert torch.equal(losses.dkd(student.scatter(1, column, value), teacher, labels, 0, 1, 2), expected)
    assert torch.equal(losses.dkd(student, teacher.scatter(1, column, value), labels, 0, 1, 2), expected)
    slope = gradient(lambda z: losses.dkd(z, teacher, labels, 0, 1, 2), student)
    assert (slope.gather(1, column) == 0).all()
    assert slope.abs().max() > 0


@quickly
@given(batches(), st.floats(0.1, 100))
def test_with_two_classes_dkd_is_kd(batch: Batch, beta: float) -> None:
    student, teacher, labels = batch[0][:, :2], batch[1][:, :2], batch[2] % 2
    assert losses.dkd(student, teacher, labels, 0, beta, 4) == 0
    close(losses.dkd(student, teacher, labels, 1, beta, 4), losses.kd(student, teacher, 4), 1e-4)


def test_dkd_grows_with_the_margin_where_probabilities_underflow() -> None:
    """At T = 1 and margins of 2e4 every probability is 0 or 1: KL is the margin itself, and its slope is 1."""
    student, teacher = torch.tensor([[-1e4, 1e4, 1e4]]), torch.tensor([[1e4, -1e4, -1e4]])
    label = torch.tensor([0])
    close(losses.dkd(student, teacher, label, 1, 8, 1), 2e4 + math.log(2))
    close(gradient(lambda z: losses.dkd(z, teacher, label, 1, 8, 1), student), torch.tensor([[-1.0, 0.5, 0.5]]), 1e-3)


def test_dkd_takes_the_largest_of_soft_labels() -> None:
    expected = losses.dkd(STUDENT, TEACHER, LABELS, 1, 8, 4)
    soft = 0.7 * functional.one_hot(LABELS, 4) + 0.3 * functional.one_hot(LABELS.flip(0), 4)
    assert torch.equal(losses.dkd(STUDENT, TEACHER, soft, 1, 8, 4), expected)
    assert torch.equal(losses.dkd(STUDENT, TEACHER, LABELS.to(torch.uint8), 1, 8, 4), expected)
    assert not torch.equal(losses.dkd(STUDENT, TEACHER, LABELS - 1, 1, 8, 4), expected)


@pytest.mark.parametrize(
    "target", [LABELS[:2], LABELS[:, None], LABELS.float(), torch.ones(3, 5)], ids=["few", "column", "float", "wide"]
)
def test_dkd_refuses_targets(target: Tensor) -> None:
    with pytest.raises(ValueError, match="wanted classes"):
        losses.dkd(STUDENT, TEACHER, target, 1, 8, 4)


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_dkd_refuses_labels_that_are_no_class(label: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        losses.dkd(STUDENT, TEACHER, torch.tensor([0, 1, label]), 1, 8, 4)


# dist

factors = st.lists(st.floats(0.05, 20), min_size=9, max_size=9)
offsets = st.lists(st.floats(-2, 2), min_size=9, max_size=9)


@quickly
@given(batches(least_classes=3), factors, offsets)
def test_pearson_ignores_scale_and_shift_of_rows(batch: Batch, scale: list[float], shift: list[float]) -> None:
    left, right = batch[0], batch[1]
    a, b = (torch.tensor(numbers[: len(left)])[:, None] for numbers in (scale, shift))
    close(losses.pearson(a * left + b, left), torch.ones(len(left)), 2e-4)
    close(losses.pearson(-a * left + b, left), -torch.ones(len(left)), 2e-4)
    close(losses.pearson(a * left + b, right), losses.pearson(left, right), 2e-4)
    # Columns of a matrix are rows of its transpose: what dist's intra sees.
    a, b = (torch.tensor(numbers[: left.shape[1]]) for numbers in (scale, shift))
    tall = torch.cat([left, left.square(), right])
    close(losses.pearson((a * tall + b).T, tall.T), torch.ones(left.shape[1]), 2e-4)


def test_pearson_is_the_correlation() -> None:
    left, right = normal(5, 30), normal(5, 30, seed=1)
    expected = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(left, right, strict=True)])
    close(losses.pearson(left, right), expected)


@pytest.mark.parametrize("level", [0.0, 0.001, 1 / 3, 1e4])
def test_a_constant_correlates_with_nothing_and_gets_no_gradient(level: float) -> None:
    left, right = torch.full((2, 1000), level), normal(2, 1000)
    close(losses.pearson(left, right), torch.zeros(2), 0)
    assert (gradient(lambda rows: losses.pearson(rows, right).sum(), left) == 0).all()
    assert (gradient(lambda rows: losses.pearson(right, rows).sum(), left) == 0).all()


@pytest.mark.parametrize(("left", "right"), [(STUDENT, TEACHER[:1]), (STUDENT[0], TEACHER[0]), (STUDENT, TEACHER.T)])
def test_pearson_refuses_shapes(left: Tensor, right: Tensor) -> None:
    with pytest.raises(ValueError, match=r"wanted \[N, M\] twice"):
        losses.pearson(left, right)


def test_dist_ignores_affine_changes_of_probabilities() -> None:
    """p_s = a p_t + (1 - a)/K: with a per row inter is 0, with one a for all intra is 0 too."""
    classes = TEACHER.shape[1]
    a = torch.tensor([[0.9], [0.5], [0.2]])
    rows = (a * TEACHER.softmax(1) + (1 - a) / classes).log()
    close(losses.dist(rows, TEACHER, 1, 0, 1), 0, 1e-5)
    assert losses.dist(rows, TEACHER, 0, 1, 1) > 0.01
    both = (0.5 * TEACHER.softmax(1) + 0.5 / classes).log()
    close(losses.dist(both, TEACHER, 1, 1, 1), 0, 3e-4)  # the 1e-8 damps what is rare in all samples


@quickly
@given(batches(), st.floats(-5, 5))
def test_dist_ignores_shifts_of_logits(batch: Batch, shift: float) -> None:
    student, teacher, labels = batch
    rows = shift * (1 + labels[:, None])
    close(losses.dist(student + rows, teacher, 1, 2, 1), losses.dist(student, teacher, 1, 2, 1), 2e-3)


def test_dist_sees_the_scale_of_logits() -> None:
    assert losses.dist(2 * TEACHER, TEACHER, 1, 0, 1) > 0.005


def test_dist_of_one_sample_has_no_intra() -> None:
    assert losses.dist(STUDENT[:1], TEACHER[:1], 0, 1, 1) == 1
    found = gradient(lambda z: losses.dist(z, TEACHER[:1], 0, 1, 1), STUDENT[:1])
    assert (found == 0).all()


# standardise, shuffle_non_maximal


@quickly
@given(batches(least_classes=3), factors, offsets)
def test_standardise_ignores_scale_and_shift(batch: Batch, scale: list[float], shift: list[float]) -> None:
    student, teacher, _ = batch
    a, b = (torch.tensor(numbers[: len(student)])[:, None] for numbers in (scale, shift))
    expected = losses.standardise(student)
    close(losses.standardise(a * student + b), expected, 1e-3)
    close(losses.standardise(-a * student + b), -expected, 1e-3)
    close(losses.kd(losses.standardise(a * teacher + b), losses.standardise(teacher), 2), 0, 1e-4)


@quickly
@given(batches(least_classes=3))
def test_standardise_makes_mean_0_and_unbiased_std_1(batch: Batch) -> None:
    found = losses.standardise(batch[0].double())
    assert found.dtype == torch.float32
    close(found.mean(1), torch.zeros(len(found)))
    close(found.square().sum(1), torch.full((len(found),), found.shape[1] - 1.0))


@pytest.mark.parametrize("level", [0.0, 1 / 3, 1e4])
def test_standardise_makes_constant_rows_zero_without_gradient(level: float) -> None:
    rows = torch.full((2, 1000), level)
    assert (losses.standardise(rows) == 0).all()
    found = gradient(lambda z: losses.kd(losses.standardise(z), normal(2, 1000), 2), rows)
    assert (found == 0).all()


@quickly
@given(batches(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_shuffle_keeps_the_largest_and_the_values(batch: Batch, seed: int, dtype: torch.dtype) -> None:
    logits = batch[1].to(dtype)
    found = losses.shuffle_non_maximal(logits, torch.Generator().manual_seed(seed))
    assert found.dtype == dtype
    top = logits.argmax(1, keepdim=True)  # in half precision there may be a second one as large
    assert torch.equal(found.gather(1, top), logits.max(1, keepdim=True).values)
    assert torch.equal(found.sort(1).values, logits.sort(1).values)


def test_shuffle_depends_on_its_generator_alone() -> None:
    logits = normal(8, 20)
    first, again, other = (losses.shuffle_non_maximal(logits, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    torch.rand(7)  # torch's own is not drawn from
    assert torch.equal(losses.shuffle_non_maximal(logits, generator), first)
    assert not torch.equal(losses.shuffle_non_maximal(logits, generator), first)


def test_shuffle_is_uniform_and_per_sample() -> None:
    """Each of the 3! orders of the values that are not the largest, about equally often."""
    rows = 6000
    logits = torch.tensor([[0.0, 9.0, 1.0, 2.0]]).expand(rows, 4)
    found = losses.shuffle_non_maximal(logits, torch.Generator().manual_seed(0))
    assert (found[:, 1] == 9).all()
    orders, counts = found.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts - rows / 6).abs() < 5 * math.sqrt(rows * 5 / 36)).all()


@pytest.mark.parametrize("logits", [STUDENT[0], STUDENT[:, :1], STUDENT[:0]], ids=["vector", "one class", "no rows"])
def test_changes_of_logits_refuse_shapes(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="wanted logits"):
        losses.standardise(logits)
    with pytest.raises(ValueError, match="wanted logits"):
        losses.shuffle_non_maximal(logits, torch.Generator())


# hint, attention


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 7), (2, 3, 4, 4)])
def test_hint_is_the_mean_over_all_elements(shape: tuple[int, ...]) -> None:
    features = normal(*shape)
    close(losses.hint(features + 3, features), 9)
    assert losses.hint(features, features) == 0


def test_hint_refuses_shapes() -> None:
    for teacher in (STUDENT_MAP[:1], STUDENT_MAP[:, :1], STUDENT_MAP.flatten(1)):
        with pytest.raises(ValueError, match="wanted features"):
            losses.hint(STUDENT_MAP, teacher)
    with pytest.raises(ValueError, match="wanted features"):
        losses.hint(STUDENT_MAP[:0], TEACHER_MAP[:0])


@quickly
@given(st.integers(0, 2**31), st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.permutations(range(5)))
def test_attention_ignores_scale_per_sample_and_order_of_channels(
    seed: int, scale: list[float], order: list[int]
) -> None:
    student, teacher = normal(3, 5, 4, 4, seed=seed), normal(3, 7, 4, 4, seed=seed + 1)
    expected = losses.attention([student], [teacher])
    factors = torch.tensor(scale)[:, None, None, None] * torch.tensor([1, -1, 1])[:, None, None, None]
    close(losses.attention([factors * student], [teacher]), expected)
    close(losses.attention([student], [factors * teacher]), expected)
    close(losses.attention([student[:, order]], [teacher]), expected)
    close(losses.attention([factors * student], [student[:, order]]), 0)


def test_attention_pools_the_larger_map_of_each_dimension() -> None:
    student, teacher = normal(3, 5, 8, 4), normal(3, 7, 4, 6, seed=1)
    small = functional.avg_pool2d(student, (2, 1))
    assert small.shape[2:] == (4, 4)
    square = functional.adaptive_avg_pool2d(teacher, (4, 4))
    expected = losses.attention([small], [square])
    assert torch.equal(losses.attention([student], [teacher]), expected)
    assert torch.equal(losses.attention([teacher], [student]), expected)


def test_attention_is_the_sum_over_pairs() -> None:
    students, teachers = [STUDENT_MAP, normal(2, 3, 4, 4)], [TEACHER_MAP, normal(2, 5, 4, 4, seed=1)]
    each = [losses.attention([s], [t]) for s, t in zip(students, teachers, strict=True)]
    close(losses.attention(students, teachers), sum(each, torch.zeros(())))


def test_cwd_ignores_shifts_of_a_channel_and_vanishes_at_the_teacher_only() -> None:
    student, teacher = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    shifted = student + normal(2, 3, 1, 1, seed=2)
    close(losses.cwd(shifted, teacher, 2), losses.cwd(student, teacher, 2))
    close(losses.cwd(teacher + normal(2, 3, 1, 1, seed=2), teacher, 2), 0.0, 1e-6)
    assert losses.cwd(student, teacher, 2) > 0.01


def test_cwd_is_finite_and_right_where_probabilities_underflow() -> None:
    """The logarithm of a softmax would be minus infinity there."""
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 200.0]]]])
    close(losses.cwd(student, teacher, 1), math.log(2))
    close(losses.cwd(teacher, student, 1), 100 - math.log(2), 1e-4)


def test_cwd_is_a_mean_over_images_and_channels() -> None:
    student, teacher = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    twice = losses.cwd(torch.cat([student, student]), torch.cat([teacher, teacher]), 3)
    close(twice, losses.cwd(student, teacher, 3))
    close(losses.cwd(student.repeat(1, 2, 1, 1), teacher.repeat(1, 2, 1, 1), 3), losses.cwd(student, teacher, 3))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(normal(2, 3, 4, 5), normal(2, 4, 4, 5)), (normal(2, 3), normal(2, 3)), (normal(2, 3, 1, 1), normal(2, 3, 1, 1))],
)
def test_cwd_refuses(student: Tensor, teacher: Tensor) -> None:
    with pytest.raises(ValueError, match="wanted maps"):
        losses.cwd(student, teacher, 1)


def test_attention_of_a_map_of_zeros() -> None:
    """Q = 0 for it, and the other's Q has norm 1: the mean of its square is 1 / (H W)."""
    close(losses.attention([torch.zeros(2, 3, 4, 5)], [normal(2, 3, 4, 5)]), 1 / 20)
    found = gradient(lambda f: losses.attention([f], [normal(2, 3, 4, 5)]), torch.zeros(2, 3, 4, 5))
    assert (found == 0).all()


@pytest.mark.parametrize(
    ("students", "teachers", "message"),
    [
        ([], [], "wanted pairs of maps"),
        ([STUDENT_MAP], [TEACHER_MAP, TEACHER_MAP], "wanted pairs of maps, found 1 and 2"),
        ([STUDENT_MAP], [TEACHER_MAP[:1]], "wanted one batch, found 2 samples and 1"),
        ([STUDENT_MAP.flatten(2)], [TEACHER_MAP.flatten(2)], "wanted maps"),
        ([STUDENT_MAP[:0]], [TEACHER_MAP[:0]], "wanted maps"),
    ],
)
def test_attention_refuses(students: list[Tensor], teachers: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.attention(students, teachers)


# rkd


@quickly
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-3, 3))
@pytest.mark.parametrize("weights", [(1, 0), (0, 1)], ids=["distances", "angles"])
def test_rkd_ignores_rotation_translation_and_scale(
    weights: tuple[float, float], seed: int, scale: float, shift: float
) -> None:
    student, teacher = normal(6, 4, seed=seed), normal(6, 3, seed=seed + 1)
    rotation = torch.linalg.qr(normal(4, 4, seed=seed + 2)).Q
    moved = scale * (student @ rotation + shift * torch.tensor([1.0, -1.0, 2.0, 0.0]))
    expected = losses.rkd(student, teacher, *weights)
    assert expected > 1e-3
    close(losses.rkd(moved, teacher, *weights), expected, 1e-4)
    close(losses.rkd(teacher, moved, *weights), losses.rkd(teacher, student, *weights), 1e-4)
    close(losses.rkd(moved, student, *weights), 0, 1e-4)


@pytest.mark.parametrize("weights", [(1, 0), (0, 1)], ids=["distances", "angles"])
def test_rkd_where_embeddings_coincide(weights: tuple[float, float]) -> None:
    """Two of six in one place pull as the others do: no nan, nor the 1e12 of a norm that is clamped."""
    student, teacher = normal(6, 4), normal(6, 4, seed=1)
    student[1] = student[0]
    found = gradient(lambda e: losses.rkd(e, teacher, *weights), student)
    assert found.isfinite().all()
    assert 0 < found.abs().max() < 10
    # What does not see scale has gradients that shrink as it grows; those of the two would stay.
    close(100 * gradient(lambda e: losses.rkd(e, teacher, *weights), 100 * student), found, 1e-4)
    assert losses.rkd(student, student, *weights) == 0
    everywhere = gradient(lambda e: losses.rkd(e, teacher, *weights), torch.ones(6, 4))
    assert (everywhere == 0).all()


def test_rkd_of_one_sample_is_zero() -> None:
    assert losses.rkd(STUDENT_POINTS[:1], TEACHER_POINTS[:1]) == 0
    assert losses.rkd(STUDENT_POINTS, TEACHER_POINTS) > 0


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (STUDENT_POINTS, TEACHER_POINTS[:3], "wanted one batch, found 4 samples and 3"),
        (STUDENT_POINTS, TEACHER_POINTS[:, :, None], "wanted embeddings"),
        (STUDENT_POINTS[:0], TEACHER_POINTS[:0], "wanted embeddings"),
    ],
)
def test_rkd_refuses(student: Tensor, teacher: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.rkd(student, teacher)


# cc


@quickly
@given(st.integers(0, 2**31), st.lists(st.floats(0.01, 100), min_size=6, max_size=6))
def test_cc_ignores_rotation_and_length(seed: int, lengths: list[float]) -> None:
    student, teacher = normal(6, 4, seed=seed), normal(6, 3, seed=seed + 1)
    turned = torch.tensor(lengths)[:, None] * (student @ torch.linalg.qr(normal(4, 4, seed=seed + 2)).Q)
    expected = losses.cc(student, teacher)
    assert expected > 1e-4
    close(losses.cc(turned, teacher), expected)
    close(losses.cc(teacher, turned), losses.cc(teacher, student))
    close(losses.cc(turned, student), 0, 1e-6)


def test_cc_is_a_gaussian_kernels_series() -> None:
    """Long enough it is exp(-gamma |x - y|^2) of the directions."""
    student, teacher = normal(5, 3).double(), normal(5, 4, seed=1).double()
    kernels = [
        (-0.4 * torch.cdist(unit, unit).square()).exp() for unit in map(functional.normalize, (student, teacher))
    ]
    close(losses.cc(student, teacher, 0.4, 20), (kernels[0] - kernels[1]).square().mean().float())


def test_cc_of_an_embedding_of_zeros() -> None:
    student, teacher = normal(6, 4), normal(6, 4, seed=1)
    student[1] = 0
    found = gradient(lambda e: losses.cc(e, teacher), student)
    assert found.isfinite().all() and found.abs().max() < 10


# crd

EVERY_OTHER = ~torch.eye(6, dtype=torch.bool)


def test_crd_falls_as_pairs_find_each_other() -> None:
    mine, its = normal(6, 16), normal(6, 16, seed=1)
    apart = losses.crd(mine, its, its, EVERY_OTHER, 0.07)
    together = losses.crd(its, its, its, EVERY_OTHER, 0.07)
    swapped = losses.crd(its.roll(1, 0), its, its, EVERY_OTHER, 0.07)
    assert together < apart < swapped
    mine = mine.requires_grad_()
    for _ in range(200):
        (slope,) = torch.autograd.grad(losses.crd(mine, its, its, EVERY_OTHER, 0.5), mine)
        mine = (mine - slope).detach().requires_grad_()
    cosines = functional.normalize(mine) @ functional.normalize(its).T
    assert (cosines.argmax(1) == torch.arange(6)).all()


def test_crd_ignores_lengths_and_what_is_no_negative() -> None:
    mine, its, others = normal(6, 16), normal(6, 16, seed=1), normal(6, 16, seed=2)
    expected = losses.crd(mine, its, others, EVERY_OTHER, 0.07)
    close(losses.crd(3 * mine, 0.2 * its, 7 * others, EVERY_OTHER, 0.07), expected)
    some = EVERY_OTHER.clone()
    some[:, 0] = False
    changed = others.clone()
    changed[0] = 100
    close(losses.crd(mine, its, changed, some, 0.07), losses.crd(mine, its, others, some, 0.07), 0)
    # With nothing to tell it from, a pair is one of two.
    nothing = losses.crd(mine, its, others, torch.zeros(6, 6, dtype=torch.bool), 0.07)
    assert nothing.isfinite() and 0 < nothing < expected


def test_crd_moves_both_networks_but_not_what_is_remembered() -> None:
    mine, its, others = (normal(6, 16, seed=seed).requires_grad_() for seed in range(3))
    losses.crd(mine, its, others, EVERY_OTHER, 0.07).backward()
    assert mine.grad is not None and its.grad is not None and others.grad is None
    assert mine.grad.abs().max() > 1e-3 and its.grad.abs().max() > 1e-3


@halves
def test_crd_computes_in_float32(dtype: torch.dtype) -> None:
    mine, its, others = (normal(6, 16, seed=seed).to(dtype) for seed in range(3))
    expected = losses.crd(mine.float(), its.float(), others.float(), EVERY_OTHER, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.crd(mine, its, others, EVERY_OTHER, 0.07), expected)
    far = losses.crd(1e4 * mine, 0 * its, others, EVERY_OTHER, 0.01)
    assert far.isfinite()


@pytest.mark.parametrize(
    ("others", "is_negative"), [(normal(6, 3), EVERY_OTHER), (normal(5, 16), EVERY_OTHER), (normal(6), EVERY_OTHER)]
)
def test_crd_refuses(others: Tensor, is_negative: Tensor) -> None:
    with pytest.raises(ValueError, match=r"wanted others \[M, 16\]"):
        losses.crd(normal(6, 16), normal(6, 16), others, is_negative, 0.07)


# review


def test_review_sees_what_pooling_leaves() -> None:
    """A pattern without a mean counts at full size alone; a shift at every size: then it is a plain MSE."""
    teacher = normal(2, 3, 8, 8)
    close(losses.review([teacher + 2], [teacher]), 4.0, 1e-5)
    board = torch.ones(8, 8)
    board[::2, ::2] = board[1::2, 1::2] = -1
    close(losses.review([teacher + board], [teacher]), 1 / (1 + 0.5 + 0.25 + 0.125), 1e-5)
    assert losses.review([teacher], [teacher]) == 0


def test_review_refuses() -> None:
    with pytest.raises(ValueError, match="wanted pairs of maps, found 1 and 2"):
        losses.review([STUDENT_MAP], [TEACHER_MAP, TEACHER_MAP])
    with pytest.raises(ValueError, match=r"wanted maps \[B, C, H, W\] twice"):
        losses.review([STUDENT_MAP], [TEACHER_MAP[:, :1]])


# channels of mean 0 and standard deviation 1


@quickly
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_standardised_channels_ignore_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    maps = normal(3, 4, 5, 2, seed=seed)
    found = losses.standardise_channels(maps)
    close(found.mean((0, 2, 3)), torch.zeros(4))
    close(found.square().mean((0, 2, 3)), torch.ones(4))
    factors = torch.tensor([scale, 1.0, 1 / scale, -scale])[:, None, None]
    close(losses.standardise_channels(factors * (maps + shift)), found * factors.sign(), 2e-3)
    close(found, functional.batch_norm(maps, None, None, training=True, eps=1e-12), 1e-4)


def test_a_constant_channel_becomes_zero() -> None:
    maps = normal(3, 2, 4, 4).to(torch.bfloat16)
    maps[:, 1] = 1 / 3
    found = losses.standardise_channels(maps)
    assert found.dtype == torch.float32 and (found[:, 1] == 0).all() and found.isfinite().all()
    with pytest.raises(ValueError, match="wanted maps"):
        losses.standardise_channels(maps[0])
