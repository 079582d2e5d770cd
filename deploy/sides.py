"""The two sides of a gate: which bundles a candidate and a baseline have, and which of them belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.artifact import MANIFEST, Provenance, read_manifest
from ..core.errors import UserError
from ..core.kinds import Bundle, Measurement, Release, Verdict
from ..core.sealed import printable


@dataclass(frozen=True)
class Side:
    """A candidate or a baseline: bundles by the names that they have there, and what was measured of them before.

    ``by_device`` has those of one device, where each has its own.
    """

    name: str
    bundles: Mapping[str, Bundle]
    by_device: Mapping[str, Mapping[str, Bundle]] = field(default_factory=dict)
    measured: Mapping[str, Provenance] = field(default_factory=dict)  # by device

    def of(self, device: str) -> dict[str, Bundle]:
        """Its bundles on a device by target and variant; several of one kind by their own names."""
        its = self.by_device.get(device, self.bundles)
        kinds = [f"{bundle.facts.target}-{bundle.facts.variant}" for bundle in its.values()]
        return {
            kind if kinds.count(kind) == 1 else name: bundle
            for kind, (name, bundle) in zip(kinds, its.items(), strict=True)
        }


def open_side(path: Path) -> Side:
    """A bundle by itself, or those of a release with what was measured for its own verdict.

    Raises:
        UserError: something else, or an altered one.
    """
    if not path.is_dir():
        raise UserError(f"no folder {path}: wanted a release or a bundle")
    kind = read_manifest(path).kind
    if kind == Bundle.kind:
        return Side(path.name, {path.name: Bundle.open(path)})
    if kind != Release.kind:
        raise UserError(f"{path} is a {kind}: wanted a release or a bundle")
    release = Release.open(path)
    verdict = path / Release.VERDICT
    measured = measured_for(Verdict.open(verdict).manifest) if (verdict / MANIFEST).is_file() else {}
    return Side(release.facts.title, release.bundles, measured=measured)


def measured_for(verdict: Provenance) -> dict[str, Provenance]:
    """The measurements behind a verdict, the last of each device."""
    found = [source for source in verdict.inputs.values() if source.kind == Measurement.kind]
    return {Measurement.facts_of(each).device: each for each in found}


def together(candidate: Mapping[str, Bundle], baseline: Mapping[str, Bundle]) -> tuple[list[str], list[str]]:
    """The names that both sides have, and what only one of them has, in words.

    Raises:
        UserError: a pair of two tasks, or of other classes.
    """
    both = [name for name in candidate if name in baseline]
    for name in both:
        one, other = candidate[name], baseline[name]
        if one.facts.task != other.facts.task:
            raise UserError(
                f"{name}: the baseline is for {other.facts.task}, the candidate for {one.facts.task}: wanted one task"
            )
        if one.labels != other.labels:
            raise UserError(
                f"{name}: {_classes(one.labels, other.labels)}: their accuracies cannot be compared, name another "
                "baseline"
            )
    apart = [f"{name} only in the candidate" for name in candidate if name not in baseline]
    return both, [*apart, *(f"{name} only in the baseline" for name in baseline if name not in candidate)]


def _classes(candidate: Collection[str], baseline: Collection[str]) -> str:
    if sorted(candidate) == sorted(baseline):
        return "the two have the same classes in another order"
    new = [label for label in candidate if label not in set(baseline)]
    gone = [label for label in baseline if label not in set(candidate)]
    return f"the candidate has {len(candidate)} classes, the baseline {len(baseline)}" + "".join(
        f", only {whose} '{printable(its[0], 40)}'"
        for whose, its in (("it has", new), ("the baseline has", gone))
        if its
    )
