"""Networks of timm computed another way, as a converter can take them.

Parity is always with the original, as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import MethodType
from typing import Any

import numpy as np
import torch
from timm.models.csatv2 import SpatialTransformerBlock
from timm.models.mobilevit import LinearSelfAttention
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv1d, interpolate, linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def for_tflite(network: nn.Module) -> nn.Module:
    """``network`` itself, with modules that litert-torch fails on computed another way."""
    for module in network.modules():
        if isinstance(module, LinearSelfAttention):
            module._forward_self_attn = MethodType(_linear_attention, module)
        if isinstance(module, SpatialTransformerBlock):
            module.forward = MethodType(_attention_over_one_image, module)
    return network


def _attention_over_one_image(module: SpatialTransformerBlock, features: Tensor) -> Tensor:
    """CSATv2's spatial block of [1, 1, H, W]: timm has it attend over the images of the batch, of which there is one.

    The converter fails on matrix products over that axis; of one image the attention is its own value.
    """
    tokens = module.pos_embed(module.norm1(features.flatten(2).mT), features.shape[2:])
    value = module.qkv(tokens)[..., 2:]
    features = features + value.mT.reshape(features.shape)
    mixed = module.mlp(module.norm2(features.flatten(2).mT))
    summed: Tensor = features + mixed.mT.reshape(features.shape)
    return summed


def _linear_attention(module: LinearSelfAttention, features: Tensor) -> Tensor:
    """Separable self-attention (Mehta and Rastegari 2022) of [B, C, P, N], broadcasting where timm expands.

    The converter's change of layout leaves an expanded tensor in the old one.
    """
    width = module.embed_dim
    query, key, value = module.qkv_proj(features).split([1, width, width], dim=1)
    weights = module.attn_drop(query.softmax(dim=-1))
    summary = (weights * key).sum(dim=-1, keepdim=True)
    attended: Tensor = module.out_drop(module.out_proj(summary * value.relu()))
    return attended


class AsTorchComputes(TorchFunctionMode):
    """While it is entered, functions that a converter would make something else of are computed another way."""

    def __init__(self, replaced: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._replaced = replaced

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._replaced.get(func, func)(*args, **(kwargs or {}))


def _pooled(image: Tensor, output_size: int | tuple[int, int]) -> Tensor:
    """``adaptive_avg_pool2d`` by matrices where windows overlap.

    Exporters make hundreds of gatherings of it, which OpenVINO computes wrongly.
    """
    sizes = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
    apart = None in sizes or all(length % size == 0 for length, size in zip(image.shape[2:], sizes, strict=False))
    if image.ndim != 4 or apart:
        return adaptive_avg_pool2d(image, output_size)
    return _resized(image, sizes, mode="area")


def _averaged(
    image: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    *settings: Any,
    **more: Any,
) -> Tensor:
    """``torch.nn.functional.interpolate``; by areas it is ``_pooled``."""
    if mode == "area" and size is not None:
        return _pooled(image, size)
    return interpolate(image, size, scale_factor, mode, *settings, **more)


def _joined(tensors: Sequence[Tensor], dim: int = 0, **more: Any) -> Tensor:
    """``torch.cat`` without what is empty: a decoder is given no channels where its encoder has no such stage."""
    return torch.cat([each for each in tensors if each.shape[dim] != 0] or list(tensors), dim, **more)


def _convolved(signal: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **more: Any) -> Tensor:
    """``conv1d`` of [B, C, L]; one value wide it is a linear layer, of which the converter makes no rank too many."""
    if weight.shape[1:] != (signal.shape[1], 1) or settings not in ((), ((1,), (0,), (1,), 1)) or more:
        return conv1d(signal, weight, bias, *settings, **more)
    return linear(signal.mT, weight.squeeze(2), bias).mT


def _attended(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    """Attention of several heads [B, H, N, D] to one head's keys and values [B, 1, M, D] as one head of H N queries.

    Where M is D, the converter multiplies by keys that are not transposed.
    """
    one_head = query.ndim == 4 and key.shape[1] == value.shape[1] == 1 < query.shape[1]
    if not one_head or attn_mask is not None or settings.get("is_causal"):
        return scaled_dot_product_attention(query, key, value, attn_mask, **settings)
    return scaled_dot_product_attention(query.flatten(1, 2).unsqueeze(1), key, value, **settings).view(
        *query.shape[:3], value.shape[-1]
    )


def _resized(
    image: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    **settings: Any,
) -> Tensor:
    """``torch.nn.functional.interpolate`` of [B, C, H, W], by gathering or by matrices where TFLite takes other pixels.

    TFLite's own operators have pixel centres at halves: nearest agrees with torch only where the ratio is whole,
    bilinear only without aligned corners; bicubic and antialiased resizing it lacks. Every resizing is linear and
    separable, so that torch's answer for unit vectors is the matrix of each axis; one that changes nothing vanishes.
    """
    settings |= {"mode": mode, "align_corners": align_corners}
    sizes, scales = (value if isinstance(value, Sequence) else (value, value) for value in (size, scale_factor))
    if image.ndim != 4:
        return interpolate(image, size, scale_factor, **settings)
    known = tuple(sorted(settings.items()))
    matrices = [_matrix(*each, known) for each in zip(image.shape[2:], sizes, scales, strict=True)]
    if mode == "nearest":
        native = all(_repeats(matrix) for matrix in matrices)
    else:
        native = mode == "bilinear" and not align_corners and not settings.get("antialias")
    if native:
        return interpolate(image, size, scale_factor, **settings)
    for axis, matrix in enumerate(matrices, start=2):
        taken = matrix.argmax(1)
        if not np.array_equal(matrix, np.eye(len(matrix[0]))[taken]):
            # On the right of both axes, or the quantiser meets one constant with channels along two dimensions.
            weights = torch.tensor(matrix.T.tolist())
            image = (image.mT @ weights).mT if axis == 2 else image @ weights
        elif not np.array_equal(taken, np.arange(len(matrix[0]))):
            image = image.index_select(axis, torch.tensor(taken.tolist()))
    return image


def _repeats(matrix: np.ndarray) -> bool:
    """Whether every value is taken equally often, one after the other."""
    length = len(matrix[0])
    return bool(np.array_equal(matrix, np.eye(length).repeat(len(matrix) // length, axis=0)))


@cache
def _matrix(
    length: int, size: int | None, scale_factor: float | None, settings: tuple[tuple[str, Any], ...]
) -> np.ndarray:
    """What ``interpolate`` makes of one axis, [new length, length]."""

    def of_unit_vectors() -> np.ndarray:
        sizes = None if size is None else (size, length)
        scales = None if scale_factor is None else (scale_factor, 1.0)
        vectors = torch.eye(length).view(1, 1, length, length)
        resized: np.ndarray = interpolate(vectors, sizes, scales, **dict(settings))[0, 0].numpy()
        return resized

    # A thread of its own is not traced by the exporter.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(of_unit_vectors).result()


FOR_ONNX: dict[Callable[..., Any], Callable[..., Any]] = {
    adaptive_avg_pool2d: _pooled,
    interpolate: _averaged,
    torch.cat: _joined,
}
FOR_TFLITE: dict[Callable[..., Any], Callable[..., Any]] = {
    **FOR_ONNX,
    conv1d: _convolved,
    interpolate: _resized,
    scaled_dot_product_attention: _attended,
}
