"""What every smaller variant has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layers import Activations

if TYPE_CHECKING:
    from .work import Work


class Variant(ABC):
    """One way to make a target's float32 model smaller or faster."""

    needs: tuple[str, ...]  # distributions that do it
    precision: str  # of most of its arithmetic or weights: int8, float16, bf16
    calibrated: bool = False  # whether training images set its ranges
    quick: bool = False  # whether writing it again, with other layers in float, takes a second or so

    def __init__(self, work: Work) -> None:
        """What is worked on; nothing is computed yet."""
        self._work = work

    @staticmethod
    def suits(facts: Mapping[str, Any], flags: Mapping[str, bool]) -> bool:
        """Whether it could be the best one of a model with these facts, on a CPU with these flags."""
        return True

    @abstractmethod
    def write(self, keep_float: Collection[str], folder: Path) -> dict[str, Any]:
        """Write the variant into ``folder`` under the float model's entry name.

        Args:
            keep_float: names of layers (of ``activations``) that stay float.

        Returns:
            The settings that were taken; ``runtime`` among them overrides the model's.
        """

    def activations(self, entry: Path) -> Activations | None:
        """What passes between the layers of the float model or of this variant; None where none can stay float."""
        return None
