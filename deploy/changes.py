"""What changed in the provenance of two artifacts, in plain words: what to look at first when a number moved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from ..core.artifact import Manifest, Provenance, find_ancestors
from ..core.kinds import Moved
from ..core.sealed import printable
from ..data.dataset import PARTS, Dataset

MOST_WORDS = 60  # of a value
# Of a data set's configuration: what names its contents is told by its images.
CONTENTS = frozenset({"fingerprint", "unlabeled_fingerprint", "classes_fingerprint", "source", "root", "versions"})


def changed(before: Manifest, after: Manifest) -> list[Moved]:
    """What is not the same in two artifacts of a kind and in all that they came from.

    Tools first, then data, then settings: a version moves numbers without anybody's wish.
    """
    tools = _differing("tools", before.tools, after.tools)
    host = _differing("tools", _host(before), _host(after))
    return [*tools, *host, *_data(before, after), *_settings(before, after)]


def measured_changed(before: Provenance, after: Provenance) -> list[Moved]:
    """What is not the same in two measurements: the device, such as its governor or a runtime's version, and the data.

    Args:
        before: a stranger's, perhaps.
    """
    fingerprints = [_flat(each.config.get("device_fingerprint", {})) for each in (before, after)]
    return [*_differing("device", *fingerprints), *_data(before, after)]


def _host(manifest: Manifest) -> dict[str, Any]:
    return {f"the host's {name}": value for name, value in manifest.host.items()}


def _data(before: Provenance, after: Provenance) -> Iterator[Moved]:
    """Images by part and classes; settings of how they are read; or that other ones stand in their places."""
    sets = [find_ancestors(each, Dataset) for each in (before, after)]
    if not sets[0] or not sets[1] or sets[0][0].key == sets[1][0].key:
        return
    one, other = (found[0] for found in sets)
    first, second = (Dataset.facts_of(each) for each in (one, other))
    told = [Moved(about="data", what="task", before=first.task, after=second.task)] if first.task != second.task else []
    if first.classes != second.classes:
        told.append(Moved(about="data", what="classes", before=f"{first.classes:,}", after=f"{second.classes:,}"))
    for part in PARTS:
        counts = [facts.images.get(part, 0) for facts in (first, second)]
        if counts[0] != counts[1]:
            more = counts[1] - counts[0]
            what = f"{abs(more):,} image{'s' * (abs(more) > 1)} {'added to' if more > 0 else 'removed from'} {part}:"
            told.append(Moved(about="data", what=what, before=f"{counts[0]:,}", after=f"{counts[1]:,}"))
    ways = [{name: value for name, value in each.config.items() if name not in CONTENTS} for each in (one, other)]
    told += _differing("data", _flat(ways[0], "data"), _flat(ways[1], "data"))
    if not told:
        fingerprints = [str(each.config.get("fingerprint", "?"))[:12] for each in (one, other)]
        told.append(Moved(about="data", what="contents of the images:", before=fingerprints[0], after=fingerprints[1]))
    yield from told


def _settings(before: Provenance, after: Provenance, seen: set[tuple[str, str]] | None = None) -> Iterator[Moved]:
    """Settings of the two and of all they came from, but for their data, each pair of artifacts once."""
    seen = set() if seen is None else seen
    if before.key == after.key or (before.key, after.key) in seen:
        return
    seen.add((before.key, after.key))
    if Dataset.kind in (before.kind, after.kind):
        return
    if before.stage != after.stage:
        yield Moved(about="settings", what=f"the {after.kind} is made by", before=before.stage, after=after.stage)
    yield from _differing("settings", _flat(before.config, after.stage), _flat(after.config, after.stage))
    for role in dict.fromkeys([*before.inputs, *after.inputs]):
        its, others = before.inputs.get(role), after.inputs.get(role)
        if its is not None and others is not None:
            yield from _settings(its, others, seen)
        else:
            keys = [None if each is None else each.key[:12] for each in (its, others)]
            yield Moved(
                about="settings", what=f"{after.stage} {printable(role, MOST_WORDS)}", before=keys[0], after=keys[1]
            )


def _differing(
    about: Literal["tools", "device", "data", "settings"], first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[Moved]:
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) != second.get(name):
            before, after = (_text(each.get(name)) for each in (first, second))
            yield Moved(about=about, what=printable(name, 2 * MOST_WORDS), before=before, after=after)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A value's leaves by their names, with spaces between those of its levels; lists stay whole."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    leaves: Iterable[tuple[str, Any]] = (
        leaf for key, item in value.items() for leaf in _flat(item, f"{prefix} {key}".strip()).items()
    )
    return dict(leaves)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), MOST_WORDS)
