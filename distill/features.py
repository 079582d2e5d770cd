"""The stages of two networks, whatever their families: which to compare, and how to make them comparable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import UserError

STAGES = 4  # most that are compared
DECODER = "decoder"


def stage_indices(network: nn.Module, name: str, with_stem: bool = False) -> list[int]:
    """Indices into timm's ``forward_intermediates`` of at most four stages, shallow to deep.

    The last feature of each resolution; where a network has fewer than three resolutions (ViTs), blocks
    evenly spaced up to the last. ``with_stem``: a fifth in front of four, where the network gives one.
    Of a network that draws masks, the stages of its encoder.

    Raises:
        UserError: the network gives no intermediate features.
    """
    info = getattr(network, "feature_info", None)
    if not hasattr(network, "forward_intermediates") or not info:
        raise UserError(f"'{name}' gives no intermediate features through timm: choose a method that compares logits")
    reductions = [entry["reduction"] for entry in info[: len(info) - len(block_indices(network))]]
    if len(set(reductions)) >= 3:
        ends = [at for at, (here, after) in enumerate(pairwise([*reductions, None])) if here != after]
        return ends[-(STAGES + with_stem) :]
    count = min(STAGES, len(reductions))
    return [round((at + 1) * len(reductions) / count) - 1 for at in range(count)]


def block_indices(network: nn.Module) -> list[int]:
    """Indices, likewise, of the blocks of the decoder of a network that draws masks, the last being what its head sees.

    They follow the encoder's stages and lie in a module of this name; other networks have none.
    """
    info: Sequence[dict[str, Any]] = getattr(network, "feature_info", None) or []
    return [at for at, entry in enumerate(info) if str(entry.get("module")).partition(".")[0] == DECODER]


def paired(student: list[int], teacher: list[int]) -> tuple[list[int], list[int]]:
    """As many stages of each as both have, from the deepest up."""
    count = min(len(student), len(teacher))
    return student[len(student) - count :], teacher[len(teacher) - count :]


def maps_and_logits(network: nn.Module, image: Tensor, indices: list[int]) -> tuple[list[Tensor], Tensor]:
    """Feature maps [B, C, H, W] at ``indices`` and logits [B, K], from one forward."""
    final, maps = network.forward_intermediates(image, indices=indices, output_fmt="NCHW")  # type: ignore[operator]
    logits: Tensor = network.forward_head(final)  # type: ignore[operator]
    return list(maps), logits


def maps_alone(network: nn.Module, image: Tensor, indices: list[int]) -> list[Tensor]:
    """Feature maps [B, C, H, W] at ``indices``; what lies above the last is not run."""
    maps: list[Tensor] = network.forward_intermediates(  # type: ignore[operator]
        image, indices=indices, output_fmt="NCHW", stop_early=True, intermediates_only=True
    )
    return maps


def map_shapes(network: nn.Module, sides: tuple[int, int], indices: list[int]) -> list[tuple[int, int, int]]:
    """(channels, height, width) of the maps at ``indices`` for one image whose ``sides`` are height and width."""
    with _probed(network, sides) as image:
        maps, _ = maps_and_logits(network, image, indices)
    return [(features.shape[1], features.shape[2], features.shape[3]) for features in maps]


def output_grid(network: nn.Module, sides: tuple[int, int]) -> tuple[int, ...]:
    """Height and width of what ``network`` says of one image of these ``sides``; nothing where that is one answer."""
    with _probed(network, sides) as image:
        return tuple(network(image).shape[2:])


@contextmanager
def _probed(network: nn.Module, sides: tuple[int, int]) -> Iterator[Tensor]:
    """One black image [1, 3, height, width] for ``network``, which is in eval mode meanwhile."""
    was_training = network.training
    device = next((parameter.device for parameter in network.parameters()), None)  # a teacher is on its own already
    network.eval()
    with torch.no_grad():
        yield torch.zeros(1, 3, *sides, device=device)
    network.train(was_training)


def by_place(outputs: Tensor) -> Tensor:
    """Outputs [B, K, ...] as logits [B * ..., K]: each place of an image is a decision of its own."""
    return outputs.movedim(1, -1).flatten(0, -2)


def in_places(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """``by_place`` undone: logits [B * ..., K] as outputs [B, K, ...], where ``shape`` is [B, ...]."""
    return rows.reshape(*shape, rows.shape[-1]).movedim(-1, 1)


def resized(logits: Tensor, grid: Sequence[int]) -> Tensor:
    """Logits [B, K, h, w] at another height and width, bilinear and in float32; those of whole images [B, K] as is."""
    if logits.shape[2:] == tuple(grid):
        return logits
    return functional.interpolate(logits.float(), tuple(grid), mode="bilinear", align_corners=False)


def thinned(places: Tensor, grid: Sequence[int]) -> Tensor:
    """What stands at every place [..., H, W] at a coarser ``grid``: that of the place in the middle of each new one."""
    if not grid or places.shape[-2:] == tuple(grid):
        return places
    rows, columns = (
        ((torch.arange(count, device=places.device) + 0.5) * (side / count)).long()
        for count, side in zip(grid, places.shape[-2:], strict=True)
    )
    return places[..., rows[:, None], columns]


def same_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps to the smaller, height and width apart."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))

    def pooled(features: Tensor) -> Tensor:
        return features if features.shape[2:] == size else functional.adaptive_avg_pool2d(features, size)

    return pooled(first), pooled(second)


class Adapter(nn.Sequential):
    """1x1 convolution and BatchNorm from the student's channels to the teacher's (a FitNet regressor)."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(nn.Conv2d(student_channels, teacher_channels, 1, bias=False), nn.BatchNorm2d(teacher_channels))


class SideBySide(nn.ModuleList):
    """Modules that each take a map of their own; as many maps as modules, or fewer."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What each makes of its map."""
        return [module(features) for module, features in zip(self, maps, strict=False)]


class Fusion(nn.Module):
    """Attention-based fusion of one stage with what is deeper, and from that the teacher's channels.

    ``inner``: channels in which it is fused; ``fuses``: whether anything is deeper.
    """

    def __init__(self, student_channels: int, inner: int, teacher_channels: int, fuses: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(student_channels, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.attention = nn.Conv2d(2 * inner, 2, 1) if fuses else None
        self.widen = nn.Sequential(
            nn.Conv2d(inner, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )

    def forward(self, features: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """In the teacher's channels, and what shallower stages are fused with, at the size of ``features``."""
        fused: Tensor = self.narrow(features)
        if self.attention is not None and deeper is not None:
            deeper = functional.interpolate(deeper, features.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([fused, deeper], 1)).sigmoid()
            fused = fused * weights[:, :1] + deeper * weights[:, 1:]
        return self.widen(fused), fused


class Review(nn.Module):
    """From the student's maps to the teacher's channels, each stage fused with all that are deeper.

    After Chen et al. (2021). Maps are of ``student_channels`` from shallow to deep, and go to ``teacher_channels``.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        super().__init__()
        inner, last = min(512, student_channels[-1]), len(student_channels) - 1
        pairs = zip(student_channels, teacher_channels, strict=True)
        self.fusions = nn.ModuleList(Fusion(mine, inner, its, at < last) for at, (mine, its) in enumerate(pairs))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps, shallow to deep, for the teacher's."""
        deeper: Tensor | None = None
        made: list[Tensor] = []
        for fusion, features in zip(reversed(self.fusions), reversed(maps), strict=True):
            given, deeper = fusion(features, deeper)
            made.insert(0, given)
        return made


class Contrast(nn.Module):
    """Embeddings of both networks' pooled maps, and a memory of the last ``remembered`` images' embeddings.

    What is remembered is a part of what is saved. Under torchrun it is the first process's, for all.
    """

    students: Tensor
    teachers: Tensor
    labels: Tensor
    numbers: Tensor
    is_filled: Tensor
    begin: Tensor

    def __init__(self, student_channels: int, teacher_channels: int, width: int, remembered: int) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(student_channels, width), nn.Linear(teacher_channels, width)
        for name in ("students", "teachers"):
            self.register_buffer(name, torch.zeros(remembered, width))
        for name in ("labels", "numbers"):
            self.register_buffer(name, torch.full((remembered,), -1))
        self.register_buffer("is_filled", torch.zeros(remembered, dtype=torch.bool))
        self.register_buffer("begin", torch.zeros((), dtype=torch.int64))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The student's embeddings [B, D] of its one map [B, C, H, W]."""
        return [self.student(maps[0].mean((2, 3)))]

    def of_teacher(self, features: Tensor) -> Tensor:
        """The teacher's embeddings [B, D] of its map [B, C, H, W]."""
        embeddings: Tensor = self.teacher(features.mean((2, 3)))
        return embeddings

    @torch.no_grad()
    def remember(self, student: Tensor, teacher: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        """Put a batch in the place of the oldest; which of all that is remembered is negative for it, bool [B, M].

        Of each image that is what is of another number and another label; a number or a label of -1 is unknown, and
        like none.

        Args:
            student, teacher: embeddings [B, D].
            labels, numbers: int [B].
        """
        places = (self.begin + torch.arange(len(labels), device=labels.device)) % len(self.labels)
        for memory, values in (
            (self.students, student.float()),
            (self.teachers, teacher.float()),
            (self.labels, labels),
            (self.numbers, numbers),
            (self.is_filled, torch.ones_like(labels, dtype=torch.bool)),
        ):
            memory[places] = values
        self.begin.add_(len(labels))
        own = places[:, None] == torch.arange(len(self.labels), device=labels.device)
        alike = [
            (each[:, None] == memory) & (each >= 0)[:, None]
            for each, memory in ((labels, self.labels), (numbers, self.numbers))
        ]
        return self.is_filled & ~own & ~alike[0] & ~alike[1]


class AuxiliaryHead(nn.Sequential):
    """Logits from an inner stage: separable convolutions that halve the map, then pool and classify.

    One halving for each stage that is still to come, as far as the map allows. With ``widest`` each doubles the
    channels, up to so many.
    """

    def __init__(self, channels: int, halvings: int, classes: int, widest: int = 0) -> None:
        steps: list[nn.Module] = []
        for _ in range(halvings):
            wider = max(channels, min(2 * channels, widest))
            steps += [
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
                nn.Conv2d(channels, wider, 1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
            ]
            channels = wider
        super().__init__(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Painter(nn.Module):
    """A view [B, 3, H, W] from a map [B, C, h, w]: a norm and a linear layer, by which a place paints its rectangle.

    ``size``: height and width of the map; ``sides``: of the view. Where they are no multiples, what is painted is
    resized to the view, bilinear.
    """

    def __init__(self, channels: int, size: tuple[int, int], sides: tuple[int, int]) -> None:
        super().__init__()
        self._sides = sides
        self._rectangle = tuple(-(-side // places) for side, places in zip(sides, size, strict=True))
        self.norm = nn.GroupNorm(1, channels)
        self.paint = nn.Conv2d(channels, 3 * self._rectangle[0] * self._rectangle[1], 1)

    def forward(self, features: Tensor) -> Tensor:
        count, _, height, width = features.shape
        high, wide = self._rectangle
        painted = self.paint(self.norm(features)).float().reshape(count, 3, high, wide, height, width)
        return resized(painted.permute(0, 1, 4, 2, 5, 3).reshape(count, 3, height * high, width * wide), self._sides)


class PlacesHead(nn.Sequential):
    """Logits of every place from an inner stage [B, C, H, W]: one separable convolution, then classes.

    ``grid``: where the map is finer than that it is pooled first, height and width apart.
    """

    def __init__(self, channels: int, size: tuple[int, int], grid: tuple[int, int], classes: int) -> None:
        coarse = (min(size[0], grid[0]), min(size[1], grid[1]))
        super().__init__(
            nn.Identity() if coarse == size else nn.AdaptiveAvgPool2d(coarse),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, classes, 1),
        )


def stage_parameters(network: nn.Module, sides: tuple[int, int], indices: list[int]) -> list[list[str]]:
    """Names of the parameters of each stage, and of what follows the last (the head), by autograd.

    A parameter belongs to the first stage whose map depends on it: that holds for any network, whatever
    its modules are called.
    """
    names, parameters = zip(*network.named_parameters(), strict=True)
    needed = [parameter.requires_grad for parameter in parameters]
    was_training = network.training
    for parameter in parameters:
        parameter.requires_grad_(True)
    maps, _ = maps_and_logits(network.eval(), torch.randn(2, 3, *sides), indices)
    seen: set[str] = set()
    stages = []
    for features in maps:
        gradients = torch.autograd.grad(features.sum(), parameters, retain_graph=True, allow_unused=True)
        reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        stages.append([name for name in names if name in reached - seen])
        seen |= reached
    stages.append([name for name in names if name not in seen])
    network.train(was_training)
    for parameter, wanted in zip(parameters, needed, strict=True):
        parameter.requires_grad_(wanted)
    return stages
