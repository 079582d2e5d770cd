"""Modules of timm that a converter cannot take as they are, computed another way; parity is with the original."""

from __future__ import annotations

from types import MethodType

from timm.models.mobilevit import LinearSelfAttention
from torch import Tensor, nn


def for_tflite(network: nn.Module) -> nn.Module:
    """``network`` itself, with modules that litert-torch fails on computed another way."""
    for module in network.modules():
        if isinstance(module, LinearSelfAttention):
            module._forward_self_attn = MethodType(_linear_attention, module)
    return network


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
