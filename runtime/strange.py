"""A model that nobody described: its inputs are random, or images as its user says that it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SEED = 0


def random_values(generator: np.random.Generator, name: str, shape: Sequence[object], dtype: Any) -> np.ndarray:
    """An input of a model at random: 0 to 1 in floats, any byte, 0 or 1 in wider integers, which may be indices.

    An open first dimension is one.

    Raises:
        ValueError: another dimension is open.
    """
    sizes = [1 if at == 0 and not _is_fixed(size) else size for at, size in enumerate(shape)]
    if not all(map(_is_fixed, sizes)):
        told = ", ".join(str(size) if _is_fixed(size) else "?" for size in shape)
        raise ValueError(f"its input '{name}' is [{told}]: wanted fixed dimensions but for the first")
    dtype, whole = np.dtype(dtype), [int(str(size)) for size in sizes]
    if dtype.kind == "f":
        return generator.random(whole, dtype=np.float32).astype(dtype)
    if dtype.kind == "b":
        return generator.random(whole) < 0.5
    if dtype.itemsize == 1:
        limits = np.iinfo(dtype)
        return generator.integers(limits.min, limits.max, whole, dtype=dtype, endpoint=True)
    if dtype.kind in "iu":
        return generator.integers(0, 2, whole, dtype=dtype)
    raise ValueError(f"its input '{name}' holds {dtype}: wanted numbers")


def _is_fixed(size: object) -> bool:
    return isinstance(size, (int, np.integer)) and int(size) >= 0


class RandomInput:
    """A session that is asked about random inputs of its own shapes, whatever images it is given."""

    batched = False

    def __init__(self, session: Any) -> None:
        self._session = session
        self._generator = np.random.default_rng(SEED)
        self.needs, self.modules, self.compile_ns = session.needs, session.modules, session.compile_ns

    def prepare(self, images: np.ndarray) -> Any:
        """Every input of the model, at random."""
        return self._session.random(self._generator)

    def random(self, generator: np.random.Generator) -> Any:
        """As the session itself has it."""
        return self._session.random(generator)

    def infer(self, prepared: Any) -> np.ndarray:
        """What it says of them means nothing: one zero."""
        self._session.infer(prepared)
        return np.zeros((1, 1), np.float32)

    def executed(self, prepared: Any) -> dict[str, int] | None:
        found: dict[str, int] | None = self._session.executed(prepared)
        return found

    def describe(self) -> dict[str, Any]:
        return {**self._session.describe(), "random_input": True}
