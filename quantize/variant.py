"""What every smaller variant has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import KdpipeError, UserError
from ..core.kinds import ModelFacts, Precision
from ..core.proc import first_line, quiet
from .layers import Activations
from .work import Work


class Taken(NamedTuple):
    """What a quantiser did: its own settings, and those that the runtime must take instead of the float32 model's."""

    settings: dict[str, Any]
    runtime: dict[str, Any] = {}  # noqa: RUF012 (never changed)


class Variant(ABC):
    """One way to make a target's float32 model smaller or faster."""

    needs: tuple[str, ...]  # distributions that do it
    precision: Precision  # of most of its arithmetic or weights
    calibrated: bool = False  # whether training images set its ranges
    quick: bool = False  # whether writing it again, with other layers in float, takes a second or so
    untrained: type[Variant] | None = None  # of one that is trained: the same without training, its control
    symmetric: bool = False  # whether its ranges of activations lie around zero, whatever the settings say
    narrow_able: bool = True  # whether it can have 7-bit weights

    def __init__(self, work: Work) -> None:
        """What is worked on; nothing is computed yet."""
        self._work = work

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        """Whether it could be the best one of a model with these facts, on a CPU with these flags.

        None where the facts would tell and there are none yet.
        """
        return True

    def write(self, keep_float: Collection[str], folder: Path) -> Taken:
        """Write the variant into ``folder`` under the float32 model's entry name.

        Args:
            keep_float: names of layers (of ``activations``) that stay float.

        Raises:
            UserError: what the quantiser raised, in one line, or what cannot be run where it is going.
        """
        facts = self._work.model.facts
        with quiet():
            try:
                taken = self.quantize(keep_float, folder)
            except (KdpipeError, OSError):
                raise
            except Exception as error:  # every quantiser raises its own
                raise UserError(
                    f"{facts.model} cannot be made smaller for {facts.target}: {first_line(error)}"
                ) from error
            self._work.check(folder / facts.entry)
        return taken

    @property
    def traced(self) -> Path:
        """The float32 file whose layers this variant's are called after, as ``activations`` takes it."""
        return self._work.entry

    @abstractmethod
    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        """Write it by the target's own tool, which may raise anything."""

    def activations(self, entry: Path) -> Activations | None:
        """What passes between the layers of the float32 model or of this variant; None where none can stay float."""
        return None
