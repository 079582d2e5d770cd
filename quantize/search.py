"""The fewest layers that must stay float, the most damaging first, for a drop to hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..core.artifact import write_json
from ..core.errors import UserError
from ..core.kinds import Mix
from ..core.progress import progress


def search(
    ranked: Callable[[], Sequence[str]],
    make: Callable[[Sequence[str], Path], Mix],
    max_drop: float,
    limit: int,
    resume: Path,
) -> tuple[list[Mix], Path, list[str]]:
    """The mix with the fewest float layers whose drop holds.

    Doubles the number of float layers until the drop holds, then halves the gap; each mix is kept in ``resume``,
    so that a killed search goes on where it was.

    Args:
        ranked: names of the layers, the most damaging first; asked for only if INT8 alone does not hold.
        make: writes a mix into a new folder and measures it.
        max_drop: points of accuracy.
        limit: mixes that are tried at most.

    Returns:
        Every step in the order taken, the folder of the mix, and the names of its float layers.

    Raises:
        UserError: no mix of so many holds; the message tells the best.
    """
    steps: dict[int, Mix] = {}
    names: Sequence[str] = ()

    def attempt(kept: int) -> Mix:
        folder = resume / mix_name(kept)
        told = folder.with_suffix(".json")
        if told.is_file():
            step = Mix.model_validate_json(told.read_text())
        else:
            step = make(names[:kept], folder)
            draft = told.with_suffix(".tmp")
            write_json(draft, step.model_dump())
            draft.rename(told)
        steps[kept] = step
        advance(1, f"{kept} layers in float: {step.drop_points:+.2f} points lost")
        return step

    with progress(f"guarding a drop of {max_drop:g} points", limit) as advance:
        low, high = 0, None  # low does not hold, high does
        if attempt(0).holds(max_drop):
            high = 0
        else:
            names = ranked()
            kept = 1
            while high is None and len(steps) < limit:
                kept = min(kept, len(names))
                if attempt(kept).holds(max_drop):
                    high = kept
                elif kept == len(names):
                    break
                else:
                    low, kept = kept, 2 * kept
            while high is not None and high - low > 1 and len(steps) < limit:
                middle = (low + high) // 2
                if attempt(middle).holds(max_drop):
                    high = middle
                else:
                    low = middle
    if high is None:
        best = min(steps.values(), key=lambda step: step.drop_points)
        raise UserError(
            f"no mix loses at most {max_drop:g} points: the best of {len(steps)} loses {best.drop_points:.2f} on "
            f"{best.images} images with {best.kept} of {len(names)} layers in float; allow more, or ship float32"
        )
    return list(steps.values()), resume / mix_name(high), list(names[:high])


def mix_name(kept: int) -> str:
    """Folder of the mix with so many float layers."""
    return f"mix-{kept:04d}"
