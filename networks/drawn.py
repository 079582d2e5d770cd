"""Weights of nobody's: random, and yet as trained ones could be, so that what is made of them takes what theirs takes.

timm starts the last BatchNorm of a residual block at zero and LayerScale at a millionth: an export could be wrong
unseen, an INT8 would have nothing to round, and outputs would differ from image to image by hardly more than rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..core.inputs import InputSpec

SMALLEST_SCALE = 0.1  # of a LayerScale that counts


def draw_scales(network: nn.Module, spec: InputSpec, images: np.ndarray) -> None:
    """Draw every scale of a fresh ``network`` from torch's generator; statistics of BatchNorm become those of images.

    Args:
        images: what it is shown, uint8 [N, height, width, 3].
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            nn.init.uniform_(weight, 0.5, 1.5)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)
    for parameter in network.parameters():
        value = float(parameter.detach().flatten()[0])
        if 0 < abs(value) < SMALLEST_SCALE and bool((parameter == value).all()):
            nn.init.uniform_(parameter, 0.5, 1.5)
    for norm in norms:
        norm.momentum = None  # a plain mean
    network.eval()
    for norm in norms:
        norm.train()
    batch = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
    with torch.no_grad():
        network(torch.from_numpy(batch).permute(0, 3, 1, 2).float())
    network.eval()
