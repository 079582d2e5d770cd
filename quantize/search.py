"""The fewest layers that must stay float, the most damaging first, for a drop to hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.artifact import write_json
from ..core.errors import GateFailed
from ..core.kinds import Mix
from ..core.progress import progress
from ..core.stats import NoWorse, lost_or_won


class Found(NamedTuple):
    """What a search ends with: every step in the order taken, the mix it takes, and what confirmed it."""

    steps: list[Mix]
    folder: Path
    kept: list[str]  # names of the layers that stay float
    confirmed: NoWorse


def search(
    ranked: Callable[[], Sequence[str]],
    make: Callable[[Sequence[str], Path], Mix],
    confirm: Callable[[Path], NoWorse],
    max_drop: float,
    limit: int,
    resume: Path,
    can_show: bool = True,
) -> Found:
    """The mix with the fewest float layers that is shown to keep the drop, confirmed on other images.

    Doubles the number of float layers until the drop holds, then halves the gap; each mix is kept in ``resume``,
    so that a killed search goes on where it was. Where no mix is shown to hold, the fewest layers that hold by the
    point value are taken, else the mix that loses least; what is said of it in the end is up to ``confirm``, which
    is asked once, so that nothing is chosen by its images.

    Args:
        ranked: names of the layers, the most damaging first; none where none can stay float. Asked for only if the
            small layers alone do not hold.
        make: writes a mix into a new folder and measures it on the images of the search.
        confirm: measures the mix that is taken on other images.
        max_drop: points of accuracy.
        limit: mixes that are tried at most.
        can_show: whether the images are enough for any mix to be shown to hold; else that is not tried for.

    Raises:
        GateFailed: the mix that is taken surely loses more.
    """
    steps: dict[int, Mix] = {}
    names: Sequence[str] | None = None

    def attempt(kept: int) -> Mix:
        if kept in steps:
            return steps[kept]
        folder = resume / mix_name(kept)
        told = folder.with_suffix(".json")
        if told.is_file():
            step = Mix.model_validate_json(told.read_text())
        else:
            step = make((names or ())[:kept], folder)
            draft = told.with_suffix(".tmp")
            write_json(draft, step.model_dump())
            draft.rename(told)
        steps[kept] = step
        advance(1, f"{kept} layers in float: {lost_or_won(step.drop_points)}")
        return step

    def fewest(holds: Callable[[Mix], bool]) -> int | None:
        """Layers in float of the smallest mix that ``holds``, as far as there are steps left; None where none does."""
        nonlocal names
        if holds(attempt(0)):
            return 0
        if names is None and len(steps) < limit:
            names = ranked()
        low, high, kept = 0, None, 1  # low does not hold, high does
        while high is None and low < len(names or ()):
            kept = min(kept, len(names or ()))
            if kept not in steps and len(steps) >= limit:
                return None
            if holds(attempt(kept)):
                high = kept
            else:
                low, kept = kept, 2 * kept
        while high is not None and high - low > 1:
            middle = (low + high) // 2
            if middle not in steps and len(steps) >= limit:
                break
            if holds(attempt(middle)):
                high = middle
            else:
                low = middle
        return high

    with progress(f"guarding a drop of {max_drop:g} points", limit) as advance:
        taken = fewest(lambda step: step.verdict(max_drop).answer == "holds") if can_show else None
        if taken is None:
            taken = fewest(lambda step: step.drop_points <= max_drop)
        if taken is None:
            taken = min(steps, key=lambda kept: (steps[kept].drop_points, kept))
    folder, verdict = resume / mix_name(taken), steps[taken].verdict(max_drop)
    if verdict.answer != "fails":
        verdict = confirm(folder)
    if verdict.answer == "fails":
        layers = f"{taken} of {len(names)} layers in float" if names else "no layer in float"
        raise GateFailed(
            f"no mix of {len(steps)} loses at most {max_drop:g} points: the best, with {layers}, "
            f"{verdict.words()} on {verdict.images} images; allow more, or ship float32"
        )
    return Found(list(steps.values()), folder, list((names or ())[:taken]), verdict)


def mix_name(kept: int) -> str:
    """Folder of the mix with so many float layers."""
    return f"mix-{kept:04d}"
