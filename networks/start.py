"""What a network's weights begin as: those of the same network, trained for another task or for none.

Nothing here imports torch before weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.config import ModelSettings, StudentSettings
from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..core.kinds import Checkpoint, PrunedFacts
from ..core.proc import require
from ..core.progress import note
from ..core.sealed import printable

if TYPE_CHECKING:
    from torch import nn


def check_start(config: ModelSettings) -> None:
    """Refuse a start that is not there, one beside other weights, or pruning of nothing. Raises UserError."""
    if not isinstance(config, StudentSettings):
        return
    if config.start is None:
        if config.prune.keep is not None:
            raise UserError("prune: wanted what is pruned as prune.from: a trained network's checkpoint or weights")
        return
    if config.prune.keep is not None:
        require("pruning", ("torch-pruning",), "train")
    for name in ("pretrained", "encoder_checkpoint"):
        if getattr(config, name):
            raise UserError(f"{said(config)} and {name} both say where the weights are from: wanted one")
    if not config.start.exists():
        raise UserError(
            f"{said(config)}: nothing at {config.start}: wanted a checkpoint's folder, .safetensors or .pth"
        )


def said(config: StudentSettings) -> str:
    """The field by which it was said what the weights begin as."""
    return "start" if config.prune.keep is None else "prune.from"


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
        raise UserError(f"{said(config)}: {config.start} is of '{theirs}', wanted one of '{wanted}': the same network")
    return given


def _names(model: str | None, encoder: str | None) -> str:
    """Without the tags of pretrained weights."""
    return "-".join(name.partition(".")[0] for name in (model, encoder) if name)


def begin(network: nn.Module, config: StudentSettings, spec: InputSpec, classes: Sequence[str]) -> PrunedFacts | None:
    """Give ``network`` the weights that ``config`` starts from, if it names some, and prune it as far as it says.

    The head comes along where a checkpoint knows the same classes in the same order, or a file as many; what method
    masked made has none. Else it stays as it is; but what is pruned has to know these classes. A network that was
    pruned stays as narrow.

    Returns:
        How far it is pruned, now or before; None: not at all.

    Raises:
        UserError: nothing there, unreadable weights, those of another network, input or, to be pruned, of other
            classes; a network that cannot be pruned, or not as far.
    """
    if config.start is None:
        return None
    from .weights import load_body

    given, pruned = given_start(config), None
    weights, knows = config.start, True
    if given is not None:
        weights, pruned = given.file(Checkpoint.WEIGHTS), given.facts.pruned
        if pruned is not None:
            from .narrow import narrow_as

            narrow_as(network, weights, spec, len(classes))
        knows = given.facts.method != "masked" and given.labels == list(classes)
        if (given.facts.input.mean, given.facts.input.std) != (spec.mean, spec.std):
            note(
                f"{config.start} learned from colours normalised by mean {given.facts.input.mean} and deviation "
                f"{given.facts.input.std}: input.mean and input.std say so here too"
            )
    kept = load_body(network, weights, with_head=knows)
    if config.prune.keep is not None:
        if not kept:
            raise UserError(
                printable(
                    f"prune.from: {config.start} has no head for the {len(classes)} classes of the data in their order "
                    f"({', '.join(classes)}): train it on these first, then prune it",
                    600,
                )
            )
        from .models import name_of
        from .pruning import prune

        pruned = prune(network, name_of(config) if pruned is None else pruned.name, spec, config.prune)
        note(printable(f"pruned to {pruned}"))
    note(printable(f"weights begin as {config.start}, " + ("its head included" if kept else "with a fresh head")))
    return pruned
