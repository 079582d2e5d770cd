"""What lies in a folder of artifacts: what each is and came from, how two differ, what nothing needs any more."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import diary
from .chain import FETCHED, REPLACED
from .core.artifact import (
    KINDS,
    MANIFEST,
    RESUME,
    Manifest,
    Provenance,
    check_provenance,
    is_held,
    read_manifest,
    settings_of,
    unsound_is_users,
)
from .core.errors import UserError
from .core.kinds import Cache, Checkpoint, McuCheck, Measurement, Refusal, Release, Report, Study, Tuned, Verdict
from .core.sealed import check_files, printable
from .data.dataset import Dataset, Fitted
from .report.words import interval, percent, shares
from .runtime.task import TASKS, USUAL_TASK, Change
from .smoke import SMOKE

PART = ".part"


class Entry(NamedTuple):
    """A folder with a manifest; ``manifest`` is None where it cannot be read, and ``fault`` says why."""

    path: Path
    manifest: Manifest | None
    fault: str

    @property
    def size_bytes(self) -> int:
        """Of its files, by its manifest."""
        return 0 if self.manifest is None else size_of(self.manifest)


def size_of(manifest: Manifest) -> int:
    """Bytes of the files of an artifact."""
    return sum(file.size_bytes for file in manifest.files.values())


def entries(folder: Path) -> list[Entry]:
    """Everything in ``folder`` that has a manifest, in the order of making. Raises UserError where there is no folder.

    What is being written is not among them.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: wanted one that holds artifacts (--artifacts names another)")
    found = [
        _entry(path)
        for path in sorted(folder.iterdir())
        if (path / MANIFEST).is_file() and path.suffix != PART and not path.is_symlink()
    ]
    return sorted(found, key=lambda entry: entry.manifest.created_utc if entry.manifest else "")


def _entry(path: Path) -> Entry:
    try:
        manifest = read_manifest(path)
        check_provenance(path, manifest)
    except UserError as error:
        return Entry(path, None, printable(str(error), 300))
    return Entry(path, manifest, "")


# ---- one of them -----------------------------------------------------------------------------------------


def findings(source: Provenance) -> str:
    """What an artifact is and what its stage found, in a line. Its facts were checked when it was read."""
    facts, kind = source.facts, source.kind
    model = facts.get("model", "")
    match kind:
        case Dataset.kind:
            images = ", ".join(f"{count} {part}" for part, count in facts["images"].items() if count)
            return f"{facts['classes']} classes, images: {images}"
        case Fitted.kind:
            return f"{sum(facts['images'].values())} held-out images at {facts['size']} pixels"
        case Checkpoint.kind:
            task = TASKS.get(facts["task"])
            metric = f"{task.metric} " if task else ""
            found = f"{percent(facts['test_accuracy'])} % {metric}of {facts['test_images']} images"
            return f"{model}, {facts['method']}, {found}, {facts['parameters'] / 1e6:.3g} M parameters"
        case Tuned.kind:
            bits = "for 8 bits" if source.config.get("quantized") else "in float32, as a control"
            return f"{model}, {facts['steps']} steps {bits}"
        case Cache.kind:
            return f"{facts['views']} views of {facts['images']} images"
        case "graph":
            return f"{model}, {sum(facts['nodes_by_kind'].values())} nodes"
        case "model" | "bundle":
            against = facts.get("against_float32")
            kept = ""
            if against:
                among = TASKS.get(facts["task"], TASKS[USUAL_TASK]).among(against["images"])
                kept = f", agrees with float32 on {percent(against['agreement'], 1)} % of {among}"
            return f"{model} for {facts['target']}, {facts['variant']}{kept}"
        case Refusal.kind:
            return f"{facts['target']} goes without {facts['variant']}: {facts['reason']}"
        case Measurement.kind:
            record = Measurement.facts_of(source)
            emulated = ", emulated" if record.emulated else ""
            return f"on {record.device}{emulated}: {len(record.results)} rows, {record.trust or 'nothing timed'}"
        case Release.kind:
            return f"{facts['name']}@{facts['version']}: {len(facts['bundles'])} bundles"
        case Report.kind:
            devices = [f"{its['device']} ({its['sessions']} sessions)" for its in facts["devices"]]
            return f"{source.config.get('title', '')}: {', '.join(devices)}"
        case Study.kind:
            return f"{facts['student']} by {facts['teacher']}: {facts['runs']} runs, advises {facts['advice']}"
        case McuCheck.kind:
            said = "refused" if facts["refused"] else "fits"
            return (
                f"{facts['model']}: {said}, arena {facts['arena']['total']} bytes, model {facts['model_bytes']} bytes"
            )
        case Verdict.kind:
            against = f" against {facts['baseline']}" if facts["baseline"] else ""
            return f"{facts['answer']}: {facts['candidate']}{against}, {len(facts['rules'])} rules"
    return ""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A value's leaves by their dotted names; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def lineage(source: Provenance, places: Mapping[str, Path]) -> dict[str, Any]:
    """What an artifact came from, by role, each with its own; ``places`` has the folders by key."""
    place = places.get(source.key)
    return {
        "kind": source.kind,
        "key": source.key,
        "path": None if place is None else str(place),
        "found": findings(source),
        "inputs": {role: lineage(each, places) for role, each in source.inputs.items()},
    }


class Shown(NamedTuple):
    """An artifact as ``kdpipe show`` tells of it."""

    path: Path
    manifest: Manifest
    places: Mapping[str, Path]  # of all that lie beside it, by key
    used_by: Sequence[Path]  # of what was made from it directly


def shown(path: Path) -> Shown:
    """Read one, and what lies beside it. Raises UserError for none, or one that lacks a file."""
    manifest = read_manifest(path)
    check_provenance(path, manifest)
    with unsound_is_users():
        kind = KINDS.get(manifest.kind)
        most_bytes, beside = (0, frozenset[str]()) if kind is None else (kind.largest_bytes, kind.beside)
        records = {name: vars(file) for name, file in manifest.files.items()}
        check_files(path, records, most_bytes, hashed=False, beside=beside)
    around = [entry for entry in entries(path.absolute().parent) if entry.manifest is not None]
    places = {entry.manifest.key: entry.path for entry in around if entry.manifest is not None}
    used_by = [
        entry.path
        for entry in around
        if entry.manifest and manifest.key in {source.key for source in entry.manifest.inputs.values()}
    ]
    return Shown(path, manifest, places, used_by)


# ---- two of them -----------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Something that two artifacts do not share; None where one of them has no such thing."""

    name: str
    first: Any
    second: Any


class Compared(NamedTuple):
    """How two artifacts differ: in settings, in what was found; and of two networks on the same images, in pairs."""

    kind: str
    settings: list[Difference]
    results: list[Difference]
    paired: Change | None


def compare(first: Path, second: Path) -> Compared:
    """Settings of the two and of all they came from that differ, and their findings. Raises UserError for two kinds."""
    one, other = read_manifest(first), read_manifest(second)
    for path, manifest in ((first, one), (second, other)):
        check_provenance(path, manifest)
    if one.kind != other.kind:
        raise UserError(f"{first} is a {one.kind} and {second} is a {other.kind}: wanted two of a kind")
    paired = None
    if one.kind == Checkpoint.kind and one.inputs["data"].key == other.inputs["data"].key and one.key != other.key:
        paired = _paired(Checkpoint.open(first), Checkpoint.open(second))
    settings: dict[tuple[str, str], list[Difference]] = {}
    _compare_settings(one, other, "", settings)
    found = differing(flat(results(one)), flat(results(other)))
    return Compared(one.kind, [each for its in settings.values() for each in its], found, paired)


def _compare_settings(
    one: Provenance, other: Provenance, prefix: str, found: dict[tuple[str, str], list[Difference]]
) -> None:
    """Fill ``found`` with what differs here and in the inputs; two that came twice into a lineage are compared once."""
    if one.key == other.key or (one.key, other.key) in found:
        return
    stage = [Difference(f"{prefix}stage", one.stage, other.stage)] if one.stage != other.stage else []
    own = differing(flat(one.config), flat(other.config))
    found[one.key, other.key] = stage + [each._replace(name=prefix + each.name) for each in own]
    for role in dict.fromkeys([*one.inputs, *other.inputs]):
        its, others = one.inputs.get(role), other.inputs.get(role)
        if its is None or others is None:
            keys = [None if each is None else each.key[:12] for each in (its, others)]
            found[one.key, other.key].append(Difference(prefix + role, *keys))
        else:
            _compare_settings(its, others, f"{prefix}{role}.", found)


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """By name what is not the same in two mappings."""
    names = dict.fromkeys([*first, *second])
    return [
        Difference(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)
    ]


def results(source: Provenance) -> dict[str, Any]:
    """What was found; of a measurement, which is long, what a person compares, with its interval."""
    if source.kind != Measurement.kind:
        return source.facts
    facts = Measurement.facts_of(source)
    rows: dict[str, Any] = {}
    for name, result in facts.results.items():
        found = {
            "status": result.status,
            "accuracy_percent": shares(result.accuracy.as_dict()) if result.accuracy else None,
            "latency_p50_ms": interval(result.latency_p50_ms.as_dict()) if result.latency_p50_ms else None,
            "latency_p90_ms": interval(result.latency_p90_ms.as_dict()) if result.latency_p90_ms else None,
            "trust": result.trust.word if result.trust else None,
            "whole_frame_ms": interval(result.whole_frame.latency_ms.as_dict()) if result.whole_frame else None,
        }
        rows |= {f"{name}.{field}": value for field, value in found.items() if value is not None}
    return {"device": facts.device, **rows}


def _paired(first: Checkpoint, second: Checkpoint) -> Change | None:
    """The second network's figure minus the first one's, on the same test images."""
    task = TASKS.get(first.facts.task)
    (before, labels), (after, others) = first.tested, second.tested
    alike = labels.shape == others.shape and (labels == others).all()
    if task is None or not alike or task.class_count(before) != task.class_count(after):
        return None
    return task.change(task.scores(before, labels), task.scores(after, labels))


# ---- what nothing needs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unneeded:
    """Something that can go: an artifact, or what was left behind."""

    path: Path
    why: str
    size_bytes: int
    seconds: float = 0.0  # that it took to make


@dataclass(frozen=True)
class Cleaning:
    """What would go and what stays, with the reason where that could surprise."""

    go: list[Unneeded]
    stay: dict[str, int]  # how many, by why


def unneeded(folder: Path, reports: int | None = None, everything: bool = False, unfinished: bool = False) -> Cleaning:
    """What no report and no study needs, and what was left behind; what something that stays came from is not among it.

    What was made since the last report stays, since its report may be still to come.

    Args:
        reports: how many of the newest reports and studies count; None: all.
        everything: what was made since the last report goes too, and what was fetched from URLs.
        unfinished: what was interrupted and could be gone on with goes too.

    Raises:
        UserError: no such folder, or a run is at work in it.
    """
    found = entries(folder)
    if running := [run for run in diary.status(folder).runs if run.lives]:
        raise UserError(f"process {running[0].process} runs in {folder}: wait until it is done, then clean")
    whole = [(entry.path, entry.manifest) for entry in found if entry.manifest is not None]
    pages = [manifest for _, manifest in whole if manifest.kind in (Report.kind, Study.kind)]
    counted = pages if reports is None else pages[len(pages) - min(reports, len(pages)) :]
    needed: set[str] = set()
    for page in counted:
        needed |= _needed_by(page)
    # A study names its runs by their keys alone: there are many.
    runs = {key for page in counted if page.kind == Study.kind for key in settings_of(page)["cells"].values()}
    for _, manifest in whole:
        if manifest.key in runs:
            needed |= _needed_by(manifest)
    last = max((page.created_utc for page in counted), default=None)
    unreported = [manifest for _, manifest in whole if manifest.key not in needed]
    since = [each for each in unreported if last is None or (each.created_utc > last and not everything)]
    stay: dict[str, int] = {}
    if since:
        stay["there is no report to say what is needed" if last is None else "made since the last report"] = len(since)
    for manifest in since:
        needed |= _needed_by(manifest)
    # Held-out images as a network sees them belong to their data, what was refused to its model, verdicts and checks to
    # what they judged, what was trained for 8 bits to its student: nothing names them as what it came from.
    kinds = (Fitted.kind, McuCheck.kind, Refusal.kind, Tuned.kind, Verdict.kind)
    belonging = [each for _, each in whole if each.kind in kinds]
    needed |= {each.key for each in belonging if all(source.key in needed for source in each.inputs.values())}
    for entry in found:
        if entry.manifest is None:
            stay["cannot be read, or of another version"] = stay.get("cannot be read, or of another version", 0) + 1
    go = [
        Unneeded(path, "no report needs it", size_of(manifest), manifest.seconds)
        for path, manifest in sorted(whole, key=lambda item: -item[1].depth)  # what came from something goes before it
        if manifest.key not in needed
    ]
    for path in sorted((folder / SMOKE).glob("*")):
        if not is_held(path):
            go.append(Unneeded(path, "of a smoke run", _on_disk(path)))
    for path, resumable in _left_behind(folder):
        if resumable and not unfinished:
            stay["unfinished, the same command goes on with it"] = (
                stay.get("unfinished, the same command goes on with it", 0) + 1
            )
        else:
            go.append(Unneeded(path, "unfinished" if path.suffix == PART else "set aside by --again", _on_disk(path)))
    for path in sorted((folder / FETCHED).glob("*")):
        if everything:
            go.append(Unneeded(path, "fetched from a URL", _on_disk(path)))
        else:
            stay["fetched from a URL"] = stay.get("fetched from a URL", 0) + 1
    return Cleaning(go, stay)


def _needed_by(manifest: Provenance) -> set[str]:
    """Keys of an artifact and of all it came from, the caches that networks learned from included."""
    keys, queue = set(), [manifest]
    while queue:
        current = queue.pop()
        keys.add(current.key)
        if current.kind == Checkpoint.kind and current.facts.get("cache"):
            keys.add(str(current.facts["cache"]))
        queue.extend(current.inputs.values())
    return keys


def _left_behind(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of stages that were killed, and whether they can be gone on with; what was set aside.

    Raises:
        UserError: one of them is being written now.
    """
    for path in sorted(folder.glob(f"*{PART}")):
        if path.is_dir() and not path.is_symlink():
            with _unlocked(path):
                yield path, any(each.name != "key" for each in (path / RESUME).glob("*"))
    for path in sorted((folder / REPLACED).glob("*")):
        if path.is_dir() and not path.is_symlink():
            yield path, False


@contextlib.contextmanager
def _unlocked(path: Path) -> Iterator[None]:
    """See that no process writes there. Raises UserError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{path} is being written now: wait until that is done, then clean") from None
    finally:
        os.close(descriptor)


def _on_disk(folder: Path) -> int:
    """Bytes of all files below."""
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(folder) for name in names)


def remove(things: Iterable[Unneeded], removed: Callable[[Unneeded], object] = lambda _: None) -> None:
    """Remove them, one after another; ``removed`` is called after each.

    An artifact is renamed first: whatever stops this, none is left that looks whole and is not.

    Raises:
        UserError: one that cannot be removed.
    """
    for thing in things:
        path = thing.path
        try:
            if (path / MANIFEST).is_file() and path.suffix != PART:
                path = path.rename(path.with_name(path.name + PART))
            shutil.rmtree(path)
            if path.parent.name in (REPLACED, SMOKE):
                with contextlib.suppress(OSError):
                    path.parent.rmdir()  # if it was the last
        except OSError as error:
            raise UserError(f"cannot remove {thing.path} ({error.strerror}): what went before is gone") from None
        removed(thing)


def as_text(value: Any, most: int = 60) -> str:
    """A setting or a finding as a table shows it."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), most)
