"""A network that computes as its INT8 files will: weights and activations on 8-bit grids, gradients as if on none.

Nothing of the network is rewritten. Its forward is followed call by call; a *place* is the number of a call that gives
a float tensor, the same in every run. Networks run in eval mode, BatchNorms folded into what they follow.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..core.errors import UserError

# What multiplies by weights, and the axis of the weight that counts its output channels.
WEIGHTED: dict[Callable[..., Any], int] = {
    torch.conv1d: 0,
    torch.conv2d: 0,
    torch.conv_transpose2d: 1,
    functional.linear: 0,
}
LEVELS = 255  # steps of 8 bits
SYMMETRIC_ZERO = 128  # the integer of an unsigned grid that is zero where ranges are symmetric
LARGEST_SYMMETRIC = 127  # steps from zero to the end of a symmetric range
ORDERS = 257  # numbers by rank by which two tensors are known to hold the same
ALIKE = 1e-3  # of their range, that those of the same tensor in two runtimes may differ
FOLDED_ALIKE = 1e-3  # of the outputs' range, that folding may change
SMALLEST_SCALE = 1e-12  # of a channel whose weights are all zero


# ---- following a forward -----------------------------------------------------------------------------------


class Followed(TorchFunctionMode):
    """While it is entered, calls that give float tensors are counted, and a subclass may change what they give.

    Attention is computed as the matrix products and the softmax that files have of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """What the network says of images [N, 3, H, W]; places are counted from the first call on."""
        self._next = 0
        with self:
            outputs: Tensor = network(images)
        return outputs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            with self:
                return _attended(*args, **(kwargs or {}))
        found = self.call(func, args, kwargs or {})
        if type(found) in (tuple, list):
            return type(found)(self._counted(each) for each in found)
        return self._counted(found)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives."""
        return func(*args, **kwargs)

    def given(self, place: int, values: Tensor) -> Tensor:
        """What the others get of it."""
        return values

    def _counted(self, found: Any) -> Any:
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
            return found
        place, self._next = self._next, self._next + 1
        return self.given(place, found)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **more: Any
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017) in its parts; in eval mode nothing is dropped."""
    scale = more.get("scale")
    factor = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = (query * factor) @ (key * factor).transpose(-2, -1)
    if attn_mask is not None:
        weights = weights + attn_mask
    return weights.softmax(-1) @ value


# ---- which tensor of a file is which place -----------------------------------------------------------------

Held = Sequence[np.ndarray]  # what a tensor holds for each of some images, as ``signature`` has it


class Signatures(Followed):
    """Keeps what every place holds, by place, one signature an image."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, list[np.ndarray]] = {}

    def given(self, place: int, values: Tensor) -> Tensor:
        self.held.setdefault(place, []).append(signature(values.detach().numpy()))
        return values


def signatures(network: nn.Module, images: np.ndarray) -> dict[int, Held]:
    """What every place of ``network`` (NCHW, 0..255) holds for images uint8 [N, H, W, 3]."""
    seen = Signatures()
    with torch.no_grad():
        for image in images:
            seen.run(network, torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float())
    return dict(seen.held)


def signature(values: np.ndarray) -> np.ndarray:
    """What a tensor holds, whatever the order of its axes: how many numbers, and some of them by rank."""
    flat = np.sort(values, axis=None)
    at = np.linspace(0, flat.size - 1, ORDERS).astype(np.int64)
    return np.concatenate([[flat.size], flat[at].astype(np.float64)])


def matched(places: Mapping[int, Held], tensors: Mapping[str, Held]) -> dict[str, int]:
    """The first place that holds what a tensor does, by the tensor's name; nothing where none does.

    Names are no guide: each tool has its own. What is reshaped or transposed holds the same and has one grid.
    """
    by_size: dict[tuple[float, ...], list[int]] = {}
    for place, held in places.items():
        by_size.setdefault(tuple(each[0] for each in held), []).append(place)
    found = {}
    for name, held in tensors.items():
        able = {place: _apart(places[place], held) for place in by_size.get(tuple(each[0] for each in held), ())}
        least = min(able.values(), default=math.inf)
        if least <= ALIKE:
            found[name] = next(place for place, apart in able.items() if apart <= least + ALIKE / 100)
    return found


def _apart(one: Held, other: Held) -> float:
    """The largest difference between two tensors' numbers by rank, over their range."""
    worst = 0.0
    for mine, its in zip(one, other, strict=True):
        spread = max(float(mine[-1] - mine[1]), SMALLEST_SCALE)
        worst = max(worst, float(np.abs(mine[1:] - its[1:]).max()) / spread)
    return worst


# ---- BatchNorms --------------------------------------------------------------------------------------------


class _Fold(NamedTuple):
    """A BatchNorm and what it follows."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    axis: int
    norm: nn.Module


class _Follows(Followed):
    """Finds what every BatchNorm follows, and who else takes that."""

    def __init__(self, norms: Mapping[int, tuple[str, nn.Module]], what: str) -> None:
        super().__init__()
        self.folds: list[_Fold] = []
        self._norms, self._what = norms, what
        self._outputs: dict[int, tuple[Tensor, Any, Any, int]] = {}  # kept, so that no identity is used again
        self._taken: dict[int, int] = {}
        self._behind: list[tuple[str, int]] = []

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        if not isinstance(found, (Tensor, tuple, list)):
            return found
        for each in (*args, *kwargs.values()):
            if id(each) in self._outputs:
                self._taken[id(each)] = self._taken.get(id(each), 0) + 1
        if func in WEIGHTED and isinstance(found, Tensor):
            taken = _arguments(args, kwargs)
            if func is torch.conv_transpose2d and kwargs.get("groups", args[6] if len(args) > 6 else 1) != 1:
                return found
            self._outputs[id(found)] = (found, taken[0], taken[1], WEIGHTED[func])
        if func is functional.batch_norm:
            bound = _BATCH_NORM.bind(*args, **kwargs).arguments
            name, norm = self._norms.get(id(bound.get("running_mean")), ("", None))
            if norm is not None:
                self._fold(name, norm, bound["input"])
        return found

    def _fold(self, name: str, norm: nn.Module, before: Tensor) -> None:
        found = self._outputs.get(id(before))
        if found is None:
            raise self.refused(name, "it follows no convolution or linear layer")
        _, weight, bias, axis = found
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, (nn.Parameter, type(None))):
            raise self.refused(name, "the weights before it are computed as the network runs")
        if norm.bias is None or any(each.weight is weight or each.norm is norm for each in self.folds):
            raise self.refused(name, "it has no bias of its own, or is used more than once")
        self._behind.append((name, id(before)))
        self.folds.append(_Fold(weight, bias, axis, norm))

    def check(self) -> None:
        """Refuse a BatchNorm that others go past. Raises UserError."""
        for name, before in self._behind:
            if self._taken[before] > 1:
                raise self.refused(name, "others take what comes before it")

    def refused(self, name: str, why: str) -> UserError:
        return UserError(
            f"BatchNorm '{name}' of {self._what} cannot be folded ({why}), and 8 bits are trained without any: take "
            "variant int8"
        )


_BATCH_NORM = inspect.signature(functional.batch_norm)


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Weight and bias of a call that multiplies by weights."""
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return weight, bias


def fold(network: nn.Module, images: Tensor, what: str) -> None:
    """Fold every BatchNorm of ``network`` into what it follows, in place; what is left of it adds a bias.

    So the network keeps its modules and the names of its weights, and every exporter takes it as it did.

    Args:
        images: [N, 3, H, W], to follow its forward by.

    Raises:
        UserError: a BatchNorm that cannot be folded.
    """
    norms = {
        id(module.running_mean): (name, module)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
    }
    with torch.no_grad():
        before = network(images)
        follows = _Follows(norms, what)
        follows.run(network, images)
        follows.check()
        folded = {id(each.norm) for each in follows.folds}
        for name, norm in norms.values():
            if id(norm) not in folded:
                raise follows.refused(name, "it follows no convolution or linear layer")
        for each in follows.folds:
            _fold_in(each)
        after = network(images)
        spread = float(before.max() - before.min())
        if not float((after - before).abs().max()) <= FOLDED_ALIKE * spread:
            raise UserError(f"{what} says something else with its BatchNorms folded: take variant int8")


def _fold_in(each: _Fold) -> None:
    """Double precision: a product of float32 weights loses what the network's own arithmetic kept."""
    norm: Any = each.norm
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = (1.0 if norm.weight is None else norm.weight.double()) / (variance + norm.eps).sqrt()
    shape = [1] * each.weight.ndim
    shape[each.axis] = -1
    each.weight.copy_(each.weight.double() * gain.reshape(shape))
    held = 0.0 if each.bias is None else each.bias.double()
    norm.bias.copy_(norm.bias.double() + (held - mean) * gain)
    norm.bias.requires_grad_()
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    for one, value in ((norm.weight, 1.0), (each.bias, 0.0)):
        if one is not None:
            one.fill_(value)
            one.requires_grad_(False)


# ---- grids -------------------------------------------------------------------------------------------------


class _OnGrid(torch.autograd.Function):
    """Values on the 8-bit grid of a range; gradients of the values within it, and of its ends.

    Of the ends as LSQ+ has them (Bhalgat et al. 2020): what is clipped moves the end that clips it, what is rounded
    moves both by how far it was rounded.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.grid = _grid(low, high)
        ctx.save_for_backward(values)  # not what is given: activations that work in place change that
        return _rounded(values, *ctx.grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        [gradient], [values], (scale, zero) = gradients, ctx.saved_tensors, ctx.grid
        low, high = -zero * scale, (LEVELS - zero) * scale
        below, above = values < low, values > high
        within = gradient.masked_fill(below | above, 0)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return within, None, None
        rounded = (within * (_rounded(values, scale, zero) - values)).sum() / (high - low)
        return within, (gradient * below).sum() - rounded, (gradient * above).sum() + rounded


def _rounded(values: Tensor, scale: float, zero: float) -> Tensor:
    return values.div(scale).round_().clamp_(-zero, LEVELS - zero).mul_(scale)


def _grid(low: Tensor, high: Tensor) -> tuple[float, float]:
    """Scale and the integer that is zero, as every writer has them of a range."""
    scale = max(float(high - low) / LEVELS, SMALLEST_SCALE)
    return scale, float(round(-float(low) / scale))


class Shared(NamedTuple):
    """A range that files give to some places at once, such as what is pooled and what pooling gives of it."""

    places: tuple[int, ...]
    low: float
    high: float
    known: bool = False  # and not to be learned


class Ranges(nn.Module):
    """The ranges of activations by place: each end is what it began as, times what is learned."""

    ends: Tensor
    learned: Tensor

    def __init__(self, begun: Sequence[Shared], symmetric: bool) -> None:
        """``begun``: each holds zero."""
        super().__init__()
        self.index = {place: at for at, each in enumerate(begun) for place in each.places}
        self.symmetric = symmetric
        ends = [(each.low, each.high) for each in begun]
        self.register_buffer("ends", torch.tensor(ends, dtype=torch.float32).reshape(-1, 2))
        self.register_buffer("learned", torch.tensor([[float(not each.known)] for each in begun]).reshape(-1, 1))
        self.factors = nn.Parameter(torch.zeros(len(begun), 2))  # logarithms

    def of(self, place: int) -> tuple[Tensor, Tensor]:
        """Both ends of a place's range."""
        at = self.index[place]
        low, high = self.ends[at] * (self.factors[at] * self.learned[at]).exp()
        if self.symmetric:
            return -high * (SYMMETRIC_ZERO / LARGEST_SYMMETRIC), high
        return low, high

    def freeze(self) -> None:
        """From here on the ends are where a grid has them, and nothing is learned of them."""
        with torch.no_grad():
            for place, at in self.index.items():
                scale, zero = self.grid(place)
                high = LARGEST_SYMMETRIC if self.symmetric else LEVELS - zero
                self.ends[at] = torch.tensor([-zero * scale, high * scale])
                self.factors[at] = 0.0
        self.factors.requires_grad_(False)

    def grid(self, place: int) -> tuple[float, int]:
        """Scale and the integer that is zero, of a place."""
        scale, zero = _grid(*(end.detach() for end in self.of(place)))
        return scale, min(LEVELS, max(0, int(zero)))


class Quantized(Followed):
    """A network's forward on its grids."""

    def __init__(self, ranges: Ranges, levels: int) -> None:
        """``levels``: the largest integer of a weight."""
        super().__init__()
        self._ranges, self._levels = ranges, levels

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        axis = WEIGHTED.get(func)
        if axis is None:
            return super().call(func, args, kwargs)
        weight, bias = _arguments(args, kwargs)
        scale = weight_scale(weight.detach(), axis, self._levels)
        rounded = torch.fake_quantize_per_channel_affine(
            weight, scale, torch.zeros_like(scale, dtype=torch.int32), axis, -self._levels, self._levels
        )
        rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
        values = args[0] if args else kwargs["input"]
        return super().call(func, (values, rounded, bias, *args[3:]), rest)

    def given(self, place: int, values: Tensor) -> Tensor:
        if place not in self._ranges.index:
            return values
        found: Tensor = _OnGrid.apply(values.float(), *self._ranges.of(place))
        return found


def weight_scale(weight: Tensor, axis: int, levels: int) -> Tensor:
    """Of every output channel: symmetric, so that its largest weight is the largest integer. Never learned."""
    others = [at for at in range(weight.ndim) if at != axis]
    return (weight.abs().amax(others) / levels).clamp_min(SMALLEST_SCALE)


class Weights(Followed):
    """Finds the parameters that are multiplied by as they are, with the axis of their output channels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[nn.Parameter, int]] = {}

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in WEIGHTED and isinstance(weight := _arguments(args, kwargs)[0], nn.Parameter):
            self.found[id(weight)] = (weight, WEIGHTED[func])
        return super().call(func, args, kwargs)


def put_on_grids(network: nn.Module, images: Tensor, levels: int) -> int:
    """Round weights to where their integers stand, in place: every writer finds the same integers again.

    Returns:
        How many tensors.
    """
    weights = Weights()
    with torch.no_grad():
        weights.run(network, images)
        for weight, axis in weights.found.values():
            shape = [1] * weight.ndim
            shape[axis] = -1
            scale = weight_scale(weight.double(), axis, levels).reshape(shape)
            weight.copy_((weight.double() / scale).round() * scale)
    return len(weights.found)
