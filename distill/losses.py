"""The losses: functions of a student's and a teacher's outputs, each a scalar whose gradient reaches the student alone.

Everything is computed in float32, whatever comes in and whatever autocast is on; the teacher's side is detached.
Shapes: B samples, K classes, C channels, H x W positions, D features. Where a loss takes logits [B, K, ...], each place
behind K is a sample of its own. Nothing broadcasts: wrong shapes raise ValueError. Labels outside [0, K) raise what
torch raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distillation of softened outputs: T^2 * mean over B of KL(softmax(z_t/T) || softmax(z_s/T)).

    The gradient by z_s is T * (softmax(z_s/T) - softmax(z_t/T)) / B, of about one size for every T that is not small.
    float32 leaves an error of the order of 1e-8 * T^2 in the value: far above T = 100 use ``logit_mse``, the limit.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2. The mean is over B,
    not over B * K, which would make it K times smaller.

    Args:
        student, teacher: logits [B, K, ...], K >= 2.
        temperature: T > 0.

    Raises:
        ValueError: shapes that differ or are no logits; a temperature that is not positive and finite.
    """
    student, teacher = _softened(student, teacher, temperature, places=True)
    return temperature**2 * _kl(teacher, student).mean()


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Matching of logits: mean over B of ||c(z_s) - c(z_t)||^2 / (2K), where c takes off each row's mean.

    The limit of ``kd`` as T grows, its factor 1 / (2K) included, so that the two share one weight.

    Source: Hinton, Vinyals, Dean (2015), section 2.1, integrated. Ba and Caruana, "Do Deep Nets Really Need to be
    Deep?" (2014), match logits that are not centred.

    Args:
        student, teacher: logits [B, K, ...], K >= 2.

    Raises:
        ValueError: shapes that differ or are no logits.
    """
    student, teacher = _logits(student, teacher, places=True)
    return (_centred(student) - _centred(teacher)).square().mean() / 2


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """The teacher's decision as a label: mean over B of CE(z_s, argmax z_t).

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention" (DeiT, 2021),
    hard-label distillation.

    Args:
        student, teacher: logits [B, K, ...], K >= 2.

    Raises:
        ValueError: shapes that differ or are no logits.
    """
    student, teacher = _logits(student, teacher, places=True)
    return functional.cross_entropy(student, teacher.argmax(1))


def bkd(student: Tensor, teacher: Tensor) -> Tensor:
    """K binary problems: mean over B * K of BCE(sigmoid(z_s), softmax(z_t)).

    Its gradient is about K times smaller than that of a loss that is summed over classes; its minimum is not zero but
    the targets' entropy.

    Source: the code of Hao et al., "Revisit the Power of Vanilla Knowledge Distillation" (VanillaKD, NeurIPS 2023).

    Args:
        student, teacher: logits [B, K, ...], K >= 2.

    Raises:
        ValueError: shapes that differ or are no logits.
    """
    student, teacher = _logits(student, teacher, places=True)
    return functional.binary_cross_entropy_with_logits(student, teacher.softmax(1))


def dkd(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled distillation: T^2 * mean over B of (alpha * TCKD + beta * NCKD), all softened by T.

    TCKD = KL between [p(y), 1 - p(y)] of teacher and student; NCKD = KL between their distributions over the K - 1
    classes that are not y. Per sample KL = TCKD + (1 - p_t(y)) * NCKD, so no constant alpha and beta give ``kd``.
    With two classes NCKD is zero.

    Worked out in logs: with g = z_y - logsumexp of the others, log p(y) = logsigmoid(g) and log(1 - p(y)) =
    logsigmoid(-g), which stay finite where probabilities would underflow.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022).

    Args:
        student, teacher: logits [B, K], K >= 2.
        target: classes [B] (integers), or soft labels [B, K], of which the largest counts.
        alpha: the weight of TCKD.
        beta: the weight of NCKD.
        temperature: T > 0.

    Raises:
        ValueError: shapes that differ or are no logits; a target that is neither; a temperature that is not positive
            and finite.
    """
    student, teacher = _logits(student, teacher)
    _check_temperature(temperature)
    labels = _labels(target, student)
    student_target, student_others = _decoupled(student / temperature, labels)
    teacher_target, teacher_others = _decoupled(teacher / temperature, labels)
    tckd, nckd = _kl(teacher_target, student_target), _kl(teacher_others, student_others)
    return temperature**2 * (alpha * tckd + beta * nckd).mean()


def dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """Matching of relations: T^2 * (beta * inter + gamma * intra) of the probabilities p = softmax(z/T).

    inter = 1 - mean over samples of pearson(p_s[b, :], p_t[b, :]); intra = 1 - mean over classes of pearson(p_s[:, k],
    p_t[:, k]). intra depends on who else is in the batch; for a batch of one it is the constant 1.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (DIST, NeurIPS 2022) and its code.

    Args:
        student, teacher: logits [B, K], K >= 2.
        beta: the weight of inter.
        gamma: the weight of intra.
        temperature: T > 0.

    Raises:
        ValueError: shapes that differ or are no logits; a temperature that is not positive and finite.
    """
    student, teacher = (logs.exp() for logs in _softened(student, teacher, temperature))
    inter = 1 - pearson(student, teacher).mean()
    intra = 1 - pearson(student.T, teacher.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def pearson(left: Tensor, right: Tensor) -> Tensor:
    """Row by row correlation: <c(a), c(b)> / (||c(a)|| * ||c(b)|| + 1e-8), c takes off the mean.

    The 1e-8 is that of DIST's code: it damps rows whose values are all tiny. A row that is constant as far as float32
    can tell correlates with nothing: 0, with no gradient (the formula's own would be 1e8 * c(b)).

    Args:
        left, right: [N, M].

    Returns:
        [N], from -1 to 1.

    Raises:
        ValueError: shapes that differ or are no matrices.
    """
    _check_shapes(left, right, "[N, M]", 2)
    left, right = _varying(left.float()), _varying(right.float())
    norms: Tensor = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)
    return (left * right).sum(1) / (norms + 1e-8)


def standardise(logits: Tensor) -> Tensor:
    """Logit standardisation: (z - mean) / (1e-7 + std) of each row, with the unbiased std (over K - 1).

    Given both networks' logits through it, ``kd`` and ``dkd`` ignore each row's shift and scale. A row that is constant
    as far as float32 can tell becomes 0, with no gradient (the formula's own would be 1e7).

    Source: Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024) and its code.

    Args:
        logits: [B, K], K >= 2.

    Returns:
        float32 [B, K].

    Raises:
        ValueError: no logits.
    """
    _check_logits(logits)
    logits = logits.float()
    return _varying(logits) / (logits.std(1, keepdim=True) + 1e-7)


def standardise_channels(maps: Tensor) -> Tensor:
    """Each channel with mean 0 and standard deviation 1 over the samples and places of a batch.

    What BatchNorm makes of a map before its own scale and shift, but for its epsilon: however small or large a channel
    is, scaling or shifting it changes nothing. One that is constant as far as float32 can tell becomes 0.

    Args:
        maps: [B, C, H, W].

    Returns:
        float32 [B, C, H, W].

    Raises:
        ValueError: no maps.
    """
    if maps.ndim != 4 or not maps.numel():
        raise ValueError(f"wanted maps [B, C, H, W], found {list(maps.shape)}")
    rows = _varying(maps.float().transpose(0, 1).flatten(1))
    size: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True) / rows.shape[1] ** 0.5
    rows = rows / size.where(size > 0, 1)
    return rows.reshape(maps.shape[1], maps.shape[0], *maps.shape[2:]).transpose(0, 1)


def shuffle_non_maximal(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A control: the teacher that knows its decision and its confidences but not which class got which.

    Each row's values, but for the largest, change places at random; the largest stays. Of equal largest ones, the one
    that argmax names stays.

    Source: the control of the code of Hao et al. (VanillaKD, 2023).

    Args:
        logits: [B, K], K >= 2, of any float type.
        generator: where the permutations come from; one on the CPU gives the same ones for logits on any device.

    Returns:
        [B, K] of the logits' type.

    Raises:
        ValueError: no logits.
    """
    _check_logits(logits)
    others = _others(logits.argmax(1), logits.shape[1])
    order = torch.rand(others.shape, generator=generator, device=generator.device).argsort(1).to(logits.device)
    return logits.scatter(1, others, logits.gather(1, others.gather(1, order)))


def flatten_non_maximal(logits: Tensor, temperature: float) -> Tensor:
    """A control: the teacher that knows its decision and how sure it is, and of the other classes nothing.

    Softened by T the largest keeps its probability and each of the others has an even share of the rest: the mean of
    what ``shuffle_non_maximal`` gives over all its permutations, without their noise. In logits the others become
    T * (logsumexp(z/T) - log(K - 1)) over themselves, whose limit for an infinite T is their mean.

    Args:
        logits: [B, K], K >= 2, of any float type.
        temperature: T > 0, at which the result will be softened; may be infinite.

    Returns:
        float32 [B, K].

    Raises:
        ValueError: no logits; a temperature that is not positive.
    """
    _check_logits(logits)
    if math.isfinite(temperature):
        _check_temperature(temperature)
    logits = logits.float()
    others = _others(logits.argmax(1), logits.shape[1])
    theirs = logits.gather(1, others)
    if temperature == math.inf:
        level = theirs.mean(1, keepdim=True)
    else:
        level = temperature * ((theirs / temperature).logsumexp(1, keepdim=True) - math.log(theirs.shape[1]))
    return logits.scatter(1, others, level.expand_as(theirs))


def smoothing_teacher(target: Tensor, classes: int, confidence: float) -> Tensor:
    """A control: the logits of a teacher made by hand that knows the label and gives all other classes the same.

    Its probability of the label is ``confidence``; of a distribution that mixes labels, their mixture. What has no
    label gets equal logits.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization" (CVPR 2020), eq. 9, with
    a confidence of 0.9 at least; here its logarithm is what a temperature softens.

    Args:
        target: classes [B, ...] (integers, negative where unknown), or distributions [B, K, ...] (0 where unknown).
        classes: K >= 2.
        confidence: above 1 / K and below 1.

    Returns:
        float32 [B, K, ...].

    Raises:
        ValueError: a confidence that is none.
    """
    if not 1 / classes < confidence < 1:
        raise ValueError(f"wanted a confidence between 1/{classes} and 1, found {confidence}")
    if target.is_floating_point():
        known, share = target.sum(1, keepdim=True) > 0, target.float()
    else:
        known = (target >= 0).unsqueeze(1)
        share = functional.one_hot(target.long().clamp(min=0), classes).movedim(-1, 1).float()
    rest = (1 - confidence) / (classes - 1)
    return (rest + (confidence - rest) * share).log().where(known, 0)


def cwd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Channel-wise distillation: T^2 * mean over B * C of KL(softmax(f_t/T) || softmax(f_s/T)) over the places H x W.

    Each channel is a distribution over the places of one image: it matters where a channel is large and not by how
    much, so a constant may be added to any channel of either side. Of logits a channel is a class.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV 2021). Its code takes the
    logarithm of a softmax, which is infinite where probabilities underflow; here both are log-softmaxes.

    Args:
        student, teacher: maps [B, C, H, W], H * W >= 2.
        temperature: T > 0.

    Raises:
        ValueError: shapes that differ or are no maps; a temperature that is not positive and finite.
    """
    _check_shapes(student, teacher, "maps [B, C, H, W]", 4)
    if student[0, 0].numel() < 2:
        raise ValueError(f"wanted maps of two places at least, found {list(student.shape)}")
    return kd(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), temperature)


def hint(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Matching of features: the mean over all elements of (f_s - f_t)^2. An adapter, where needed, comes before.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), with a mean where the paper has half a sum.

    Args:
        student_map, teacher_map: any one shape with B first, such as [B, C, H, W] or [B, D].

    Raises:
        ValueError: shapes that differ, or nothing in them.
    """
    _check_shapes(student_map, teacher_map, "features [B, ...]", None)
    return functional.mse_loss(student_map.float(), teacher_map.detach().float())


def attention(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Attention transfer: the sum over pairs of the mean over B * H * W of (Q_s - Q_t)^2.

    Q is the mean over channels of f^2, flattened and divided by its 2-norm; before it, features are average-pooled to
    the smaller height and the smaller width of their pair. A map of zeros has Q = 0.

    Source: the code of Zagoruyko and Komodakis, "Paying More Attention to Attention" (2017), p = 2; the paper's eq. 2
    has a norm of the difference where the code has a mean of its square.

    Args:
        student_maps, teacher_maps: as many of the one as of the other; [B, C, H, W] each, C, H and W may differ.

    Raises:
        ValueError: no pairs, maps without a partner, maps of other dimensions, batches that differ.
    """
    _check_pairs(student_maps, teacher_maps)
    pairs = zip(student_maps, teacher_maps, strict=True)
    return torch.stack([_attention_pair(student, teacher) for student, teacher in pairs]).sum()


def rkd(
    student_embeddings: Tensor, teacher_embeddings: Tensor, distance_weight: float = 25, angle_weight: float = 50
) -> Tensor:
    """Relational distillation: distance_weight * RKD-D + angle_weight * RKD-A, both means of a smooth L1.

    RKD-D, over B^2 pairs: distances, each network's divided by the mean of its positive ones. RKD-A, over B^3 triplets
    (i, j, k): the cosine of the angle at i between j and k. Neither sees rotation, translation or scale. Embeddings
    that coincide are at distance 0 and at cosine 0, without gradient. Angles need memory for B^2 * D and B^3 numbers.

    Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019); normalisation and weights as in RepDistiller.

    Args:
        student_embeddings, teacher_embeddings: [B, D], D may differ.
        distance_weight: of RKD-D.
        angle_weight: of RKD-A; 0 leaves out the B^3 work.

    Raises:
        ValueError: no matrices, or batches that differ.
    """
    _check_embeddings(student_embeddings, teacher_embeddings)
    with torch.autocast(student_embeddings.device.type, enabled=False):  # it would take the angles to half precision
        student_distances, student_directions = _relations(student_embeddings.float())
        teacher_distances, teacher_directions = _relations(teacher_embeddings.detach().float())
        loss = distance_weight * functional.smooth_l1_loss(student_distances, teacher_distances)
        if angle_weight:
            student_cosines = student_directions @ student_directions.mT
            teacher_cosines = teacher_directions @ teacher_directions.mT
            loss = loss + angle_weight * functional.smooth_l1_loss(student_cosines, teacher_cosines)
    return loss


def cc(student_embeddings: Tensor, teacher_embeddings: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence: the mean over B^2 of (k(s_i, s_j) - k(t_i, t_j))^2.

    k is the Gaussian kernel exp(-gamma * |x - y|^2) of embeddings of length 1, in its Taylor series up to ``order``:
    exp(-2 gamma) * sum over p of (2 gamma)^p / p! * <x, y>^p. It sees neither rotation nor the length of an embedding;
    one of zeros is at cosine 0 with all, without gradient.

    Source: Peng et al., "Correlation Congruence for Knowledge Distillation" (ICCV 2019), with its gamma and order;
    there a learned projection of both sides comes first, here the kernels are of the features themselves.

    Args:
        student_embeddings, teacher_embeddings: [B, D], D may differ.
        gamma: of the kernel, above 0.
        order: the highest power, at least 1.

    Raises:
        ValueError: no matrices, or batches that differ.
    """
    _check_embeddings(student_embeddings, teacher_embeddings)
    with torch.autocast(student_embeddings.device.type, enabled=False):
        student, teacher = _directions(student_embeddings.float()), _directions(teacher_embeddings.detach().float())
        factors = [math.exp(-2 * gamma) * (2 * gamma) ** power / math.factorial(power) for power in range(order + 1)]
        mine, its = (
            torch.stack([factor * cosines**power for power, factor in enumerate(factors)]).sum(0)
            for cosines in (student @ student.mT, teacher @ teacher.mT)
        )
        return functional.mse_loss(mine, its)


def crd(anchors: Tensor, positives: Tensor, others: Tensor, is_negative: Tensor, temperature: float) -> Tensor:
    """Contrastive distillation, one side of it: mean over B of -log h(a, p) - sum over negatives of log(1 - h(a, n)).

    h(a, x) = e / (e + N * m), e = exp(cos(a, x) / T), N the number of negatives of this anchor: the chance that x is
    the anchor's own image and not one of N others. m is what e is in the mean: exp(1 / (2 D T^2)) for directions drawn
    at random (the code of the source takes the mean of its first batch). Worked out in logs.

    Source: Tian et al., "Contrastive Representation Distillation" (ICLR 2020), eq. 10 and 19, and its code. The whole
    loss is this with the student's embeddings as anchors and the teacher's as others, and the other way round.

    Args:
        anchors: of one network [B, D].
        positives: of the other network for the same images [B, D].
        others: of the other network for some images [M, D], detached here.
        is_negative: which of them are not of the anchor's image (and class), bool [B, M].
        temperature: T > 0.

    Raises:
        ValueError: shapes that do not fit; a temperature that is not positive and finite.
    """
    _check_embeddings(anchors, positives)
    _check_shapes(anchors, positives, "embeddings [B, D]", 2)
    if others.ndim != 2 or others.shape[1] != anchors.shape[1] or is_negative.shape != (len(anchors), len(others)):
        found = f"{list(others.shape)} and {list(is_negative.shape)}"
        raise ValueError(
            f"wanted others [M, {anchors.shape[1]}] and which are negative [{len(anchors)}, M], found {found}"
        )
    _check_temperature(temperature)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, positives, others = (_directions(each.float()) for each in (anchors, positives, others.detach()))
        count = is_negative.sum(1, keepdim=True).clamp(min=1)
        level = count.log() + 1 / (2 * anchors.shape[1] * temperature**2)
        same = functional.softplus(level - (anchors * positives).sum(1, keepdim=True) / temperature)
        other = functional.softplus(anchors @ others.mT / temperature - level).where(is_negative, 0)
        return (same.sum(1) + other.sum(1)).mean()


def review(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss of a review: the sum over pairs of a weighted mean of MSEs at up to four sizes.

    The maps as they are, and average-pooled to 4x4, 2x2 and 1x1 as far as both sides of a map are larger than that;
    each weighs half of what the one before weighs.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021), section 3.3, and its code.

    Args:
        student_maps, teacher_maps: as many of the one as of the other; [B, C, H, W], both of a pair alike.

    Raises:
        ValueError: no pairs, maps without a partner, shapes that differ or are no maps.
    """
    _check_pairs(student_maps, teacher_maps)
    parts = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        _check_shapes(student, teacher, "maps [B, C, H, W]", 4)
        sizes = [size for size in (4, 2, 1) if size < min(student.shape[2:])]
        shrunk = [
            (
                functional.adaptive_avg_pool2d(student.float(), size),
                functional.adaptive_avg_pool2d(teacher.float(), size),
            )
            for size in sizes
        ]
        errors = [0.5**at * hint(*pair) for at, pair in enumerate([(student, teacher), *shrunk])]
        parts.append(torch.stack(errors).sum() / sum(0.5**at for at in range(len(errors))))
    return torch.stack(parts).sum()


def _check_shapes(student: Tensor, teacher: Tensor, wanted: str, dimensions: int | None) -> None:
    wrong = dimensions is not None and student.ndim != dimensions
    if wrong or student.shape != teacher.shape or not student.numel():
        raise ValueError(f"wanted {wanted} twice, found {list(student.shape)} and {list(teacher.shape)}")


def _check_pairs(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> None:
    if not student_maps or len(student_maps) != len(teacher_maps):
        raise ValueError(f"wanted pairs of maps, found {len(student_maps)} and {len(teacher_maps)} maps")


def _check_embeddings(student: Tensor, teacher: Tensor) -> None:
    for embeddings in (student, teacher):
        if embeddings.ndim != 2 or not embeddings.numel():
            raise ValueError(f"wanted embeddings [B, D], found {list(embeddings.shape)}")
    _check_batches(student, teacher)


def _check_batches(student: Tensor, teacher: Tensor) -> None:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"wanted one batch, found {student.shape[0]} samples and {teacher.shape[0]}")


def _check_logits(logits: Tensor, places: bool = False) -> None:
    if logits.ndim < 2 or (logits.ndim > 2 and not places) or not logits.numel() or logits.shape[1] < 2:
        wanted = "[B, K, ...]" if places else "[B, K]"
        raise ValueError(f"wanted logits {wanted} with B >= 1 and K >= 2, found {list(logits.shape)}")


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"wanted a temperature above 0, found {temperature}")


def _logits(student: Tensor, teacher: Tensor, places: bool = False) -> tuple[Tensor, Tensor]:
    """Both as float32, the teacher's cut off from its graph; [B, K], or with ``places`` [B, K, ...]."""
    _check_logits(student, places)
    _check_shapes(student, teacher, "logits", None)
    return student.float(), teacher.detach().float()


def _softened(student: Tensor, teacher: Tensor, temperature: float, places: bool = False) -> tuple[Tensor, Tensor]:
    """Both as log softmax(z/T)."""
    student, teacher = _logits(student, teacher, places)
    _check_temperature(temperature)
    return (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities [B, K, ...], sample by sample."""
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


def _varying(rows: Tensor) -> Tensor:
    """Centred rows; zero, with no gradient, where what is left of a row is its rounding."""
    centred = _centred(rows)
    sizes = torch.linalg.vector_norm(torch.stack([centred.detach(), rows.detach()]), dim=2, keepdim=True)
    return centred.masked_fill(sizes[0] <= 1e-6 * sizes[1], 0)


def _labels(target: Tensor, logits: Tensor) -> Tensor:
    if target.shape == logits.shape:
        return target.argmax(1)
    if target.shape != logits.shape[:1] or target.is_floating_point():
        wanted = f"classes [{logits.shape[0]}] or soft labels {list(logits.shape)}"
        raise ValueError(f"wanted {wanted}, found {target.dtype} {list(target.shape)}")
    return target.long()


def _others(labels: Tensor, classes: int) -> Tensor:
    """The classes that are not the label, ascending: [B, K - 1]."""
    index = torch.arange(classes - 1, device=labels.device)
    return index + (index >= labels[:, None])


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the label and of not the label [B, 2], and of each other class among them [B, K - 1]."""
    others = logits.gather(1, _others(labels, logits.shape[1]))
    margin = logits.gather(1, labels[:, None]) - others.logsumexp(1, keepdim=True)
    return functional.logsigmoid(torch.cat([margin, -margin], 1)), others.log_softmax(1)


def _attention_pair(student: Tensor, teacher: Tensor) -> Tensor:
    for features in (student, teacher):
        if features.ndim != 4 or not features.numel():
            raise ValueError(f"wanted maps [B, C, H, W], found {list(features.shape)}")
    _check_batches(student, teacher)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return functional.mse_loss(_attention_map(student.float(), size), _attention_map(teacher.detach().float(), size))


def _attention_map(features: Tensor, size: tuple[int, int]) -> Tensor:
    if features.shape[2:] != size:
        features = functional.adaptive_avg_pool2d(features, size)
    return functional.normalize(features.square().mean(1).flatten(1), dim=1)


def _directions(embeddings: Tensor) -> Tensor:
    """Each embedding [B, D] over its length; zeros, with a finite gradient, stay zeros."""
    squares = embeddings.square().sum(1, keepdim=True)
    return embeddings / squares.where(squares > 0, 1).sqrt()


def _relations(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Distances over their mean [B, B], and unit vectors from each to each [B, B, D]; zeros where two coincide."""
    differences = embeddings[None] - embeddings[:, None]
    squares = differences.square().sum(2)
    apart = squares > 0
    # The root has no slope at 0, and what is masked only after it would still send back nan.
    lengths = squares.where(apart, 1).sqrt()
    directions = (differences / lengths[:, :, None]).where(apart[:, :, None], 0)
    distances = lengths.where(apart, 0)
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / mean.where(mean > 0, 1), directions
