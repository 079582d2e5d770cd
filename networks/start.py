"""What a network's weights begin as: those of the same network, trained for another task or for none.

Nothing here imports torch before weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.config import ModelSettings, StudentSettings
from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..core.kinds import Checkpoint
from ..core.progress import note
from ..core.sealed import printable

if TYPE_CHECKING:
    from torch import nn


def check_start(config: ModelSettings) -> None:
    """Refuse a start that is not there, or one beside other weights. Raises UserError."""
    if not isinstance(config, StudentSettings) or config.start is None:
        return
    for name in ("pretrained", "encoder_checkpoint"):
        if getattr(config, name):
            raise UserError(f"start and {name} both say where the weights are from: wanted one")
    if not config.start.exists():
        raise UserError(f"start: nothing at {config.start}: wanted a checkpoint's folder, .safetensors or .pth")


def given_start(config: StudentSettings) -> Checkpoint | None:
    """The checkpoint that the weights begin as; None where they are no checkpoint's.

    Raises:
        UserError: what is no checkpoint, or one of another network.
    """
    check_start(config)
    if config.start is None or config.start.is_file():
        return None
    given = Checkpoint.open(config.start)
    theirs, wanted = (_names(each.get("model"), each.get("encoder")) for each in (given.settings, vars(config)))
    if theirs != wanted:
        raise UserError(f"start: {config.start} is of '{theirs}', wanted one of '{wanted}': the same network")
    return given


def _names(model: str | None, encoder: str | None) -> str:
    """Without the tags of pretrained weights."""
    return "-".join(name.partition(".")[0] for name in (model, encoder) if name)


def begin(network: nn.Module, config: StudentSettings, spec: InputSpec, classes: Sequence[str]) -> None:
    """Give ``network`` the weights that ``config`` starts from, if it names some.

    The head comes along where a checkpoint knows the same classes in the same order, or a file as many; what method
    masked made has none. Else it stays as it is.

    Raises:
        UserError: nothing there, unreadable weights, or those of another network or input.
    """
    if config.start is None:
        return
    from .weights import load_body

    given = given_start(config)
    weights, knows = config.start, True
    if given is not None:
        weights = given.file(Checkpoint.WEIGHTS)
        knows = given.facts.method != "masked" and given.labels == list(classes)
        if (given.facts.input.mean, given.facts.input.std) != (spec.mean, spec.std):
            note(
                f"{config.start} learned from colours normalised by mean {given.facts.input.mean} and deviation "
                f"{given.facts.input.std}: input.mean and input.std say so here too"
            )
    kept = load_body(network, weights, with_head=knows)
    note(printable(f"weights begin as {config.start}, " + ("its head included" if kept else "with a fresh head")))
