"""What the targets give back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Written(NamedTuple):
    """What is known of a model once it is written."""

    torch_outputs: np.ndarray  # of the parity images, float32 [N, ...]
    nodes_by_kind: dict[str, int]  # operations of the file, by the target's own names
    # Of torch itself on them, as ``parity.float32_error`` has it; a target that cannot tell allows for none.
    float32_error: Callable[[], float | None] = lambda: None
