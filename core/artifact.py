"""Artifacts: sealed folders that stages hand to each other.

A folder with a ``manifest.json`` is whole. Files are written into ``NAME.part``, the manifest last, then
the folder is renamed, so a kill or a full disk at any moment leaves either the old state or the new one.
What is read back is checked against its hashes first, and a sealed artifact is never changed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from . import sealed
from .errors import KdpipeError, UserError
from .sealed import MANIFEST as MANIFEST  # the rooms know one place
from .sealed import SCHEMA_VERSION
from .sealed import canonical as canonical
from .sealed import sha256_file as sha256_file

if TYPE_CHECKING:
    import numpy as np

RESUME = "resume"
LARGEST_BESIDE_BYTES = 64 * sealed.MIB  # of a signature, which names every file
LOOK_SECONDS = 0.01  # between two looks whether a lock is free
EVIDENCE = "evidence"  # subfolder of what a stage looked at: kept, not shipped
# A file whose times are older than that cannot be changed without their changing too, however coarse the clock of its
# file system is.
SETTLED_SECONDS = 2.0
MOST_REMEMBERED = 1000  # manifests

# Versions written into every manifest, where installed: the tools that can change a number.
TOOLS = (
    "kdpipe", "torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript", "onnxruntime", "openvino",
    "nncf", "litert-torch", "litert-converter", "ai-edge-quantizer", "ai-edge-litert", "tflite-runtime",
    "tensorrt", "numpy", "onnxslim", "pillow", "scikit-learn", "tflite-micro", "ethos-u-vela",
)  # fmt: skip


class Record(BaseModel):
    """A frozen pydantic model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    sha256: str
    size_bytes: int


class Provenance(Record):
    """What an artifact is and what it was made from, back to the first input."""

    kind: str
    stage: str
    key: str
    config: dict[str, Any]
    facts: dict[str, Any]
    inputs: dict[str, Provenance]
    seconds: float

    @property
    def depth(self) -> int:
        """How many stages lie before it at most."""
        return 1 + max((source.depth for source in self.inputs.values()), default=-1)

    @property
    def lineage_keys(self) -> set[str]:
        """Its own key and those of all it came from."""
        return {self.key}.union(*(source.lineage_keys for source in self.inputs.values()))


class Manifest(Provenance):
    schema_version: int
    files: dict[str, FileRecord]
    tools: dict[str, str]
    host: dict[str, Any]
    created_utc: str
    digest: str  # sha256 of every other field: an edited manifest is seen

    def provenance(self) -> Provenance:
        return Provenance.model_validate({name: getattr(self, name) for name in Provenance.model_fields})


def tool_versions() -> dict[str, str]:
    versions = {}
    for name in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def host_record() -> dict[str, Any]:
    """The machine that made an artifact; what can't be read is "unavailable"."""
    model = "unavailable"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


F = TypeVar("F", bound=Record)
T = TypeVar("T")


@dataclass(frozen=True)
class Artifact(Generic[F]):
    """A sealed folder. Subclasses say what kind, so that a wrong chain is a type error.

    A subclass also names its files, and the record of what its stage found: no other room spells either.
    """

    kind: ClassVar[str]
    Facts: ClassVar[type[Record]]
    Configs: ClassVar[Mapping[str, type[BaseModel]]] = {}  # by stage, of what is read again later
    roles: ClassVar[frozenset[str]] = frozenset()  # inputs that every one of the kind has
    largest_bytes: ClassVar[int] = sealed.LARGEST_BYTES  # of all files together
    beside: ClassVar[frozenset[str]] = frozenset()  # files that its manifest cannot name: a signature over it
    path: Path
    manifest: Manifest = field(repr=False)  # pages of it

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read and check the artifact in ``path``.

        Raises:
            UserError: no whole artifact there, another kind, or contents that differ from its manifest.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.kind != cls.kind:
            raise UserError(f"{path} is a {manifest.kind}, wanted a {cls.kind}: give the folder of a {cls.kind}")
        with unsound_is_users():
            records = {name: vars(file) for name, file in manifest.files.items()}
            sealed.check_files(path, records, cls.largest_bytes, beside=cls.beside)
        check_provenance(path, manifest)
        return cls(path, manifest)

    @property
    def key(self) -> str:
        return self.manifest.key

    @cached_property
    def facts(self) -> F:
        """What the stage found out."""
        return self.facts_of(self.manifest)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration, checked; what this version has beyond it stands at its default."""
        return settings_of(self.manifest)

    @classmethod
    def facts_of(cls, provenance: Provenance) -> F:
        """What the stage of an ancestor of this kind found out (``open`` has checked the whole lineage)."""
        return cast("F", cls.Facts.model_validate(provenance.facts))

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names (and ``open`` has checked)."""
        if name not in self.manifest.files:
            raise UserError(f"{self.path} has no file '{name}': make the artifact again")
        return self.path / name

    def json(self, name: str) -> Any:
        """The JSON value in a file of it, as untrusted as the rest. Raises UserError."""
        with unsound_is_users():
            return sealed.read_json(self.file(name))

    def rows(self, name: str, kind: type[T]) -> list[T]:
        """The list in a JSON file of it, every row a ``kind``. Raises UserError."""
        return self._rows(name, kind, self.json(name))

    def lines(self, name: str, kind: type[T]) -> list[T]:
        """The rows of a file of it with one JSON value a line, every row a ``kind``. Raises UserError."""
        with unsound_is_users():
            text = sealed.read_file(self.file(name), sealed.LARGEST_JSON_BYTES)
            return self._rows(name, kind, [sealed.parse_json(line) for line in text.splitlines()])

    def _rows(self, name: str, kind: type[T], values: Any) -> list[T]:
        try:
            return TypeAdapter(list[kind]).validate_python(values)  # type: ignore[valid-type]
        except ValidationError as error:
            fault = error.errors()[0]
            raise UserError(f"{self.path / name} is broken ({fault['msg'].lower()}): make the artifact again") from None

    def array(self, name: str, dtype: str, dimensions: int) -> np.ndarray:
        """The array in an ``.npy`` file of it, mapped; arguments as ``sealed.load_array``. Raises UserError."""
        with unsound_is_users():
            return sealed.load_array(self.file(name), dtype, dimensions)

    def arrays(self, name: str, **wanted: tuple[str, int]) -> dict[str, np.ndarray]:
        """The arrays in an ``.npz`` file of it, each with dtype and dimensions. Raises UserError."""
        with unsound_is_users():
            return sealed.load_arrays(self.file(name), wanted)


KINDS: dict[str, type[Artifact[Any]]] = {}  # filled by the classes themselves: a lineage names its kinds


class OtherVersion(UserError):
    """An artifact that another version of kdpipe wrote."""


class Busy(UserError):
    """Another process is writing the artifact at ``out``, or has sealed it just now."""

    def __init__(self, message: str, out: Path) -> None:
        super().__init__(message)
        self.out = out


class NoSpace(UserError):
    """The disk is full."""

    stops_all = True


@contextlib.contextmanager
def unsound_is_users() -> Iterator[None]:
    """What is not as it was sealed is told in one line, as a user's mistake."""
    try:
        yield
    except sealed.OtherVersion as error:
        raise OtherVersion(str(error)) from None
    except sealed.Unsound as error:
        raise UserError(str(error)) from None


_remembered: dict[tuple[int, ...], Manifest] = {}  # by what the file system says of the file


def read_manifest(path: Path) -> Manifest:
    """Parse ``path/manifest.json`` and check it against its own digest.

    A command meets the same manifests many times: one that did not change since it was read is not read again.

    Raises:
        UserError: none there, or a broken or edited one.
        OtherVersion: one of another version.
    """
    stamp = _stamp(path / MANIFEST)
    if stamp is not None and stamp in _remembered:
        return _remembered[stamp]
    with unsound_is_users():
        value = sealed.read_manifest(path)
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError:
        raise UserError(f"{path / MANIFEST} is not a manifest (broken or edited): make the artifact again") from None
    if stamp is not None:
        if len(_remembered) >= MOST_REMEMBERED:
            _remembered.clear()
        _remembered[stamp] = manifest
    return manifest


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What is not the same of two files, nor of one before and after a change; None of a file that changed just now."""
    try:
        found = path.lstat()
    except (OSError, ValueError):  # no path at all
        return None
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    if not stat.S_ISREG(found.st_mode) or changed > time.time_ns() - SETTLED_SECONDS * 1e9:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_provenance(path: Path, provenance: Provenance) -> None:
    """See that facts, configuration and inputs of an artifact and of all before it are what their kinds have.

    Raises:
        UserError: a field that is missing, of another type or out of bounds.
    """
    kind = KINDS.get(provenance.kind)
    if kind is not None:
        try:
            kind.Facts.model_validate(provenance.facts)
            settings_of(provenance)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise UserError(
                f"{path / MANIFEST}: what it says of '{where}' is not what this version of kdpipe writes "
                f"({fault['msg'].lower()}): make the artifact again"
            ) from None
        if kind.Configs and provenance.stage not in kind.Configs:
            raise UserError(f"{path / MANIFEST}: no {kind.kind} is made by '{provenance.stage}': make it again")
        if missing := kind.roles - provenance.inputs.keys():
            raise UserError(f"{path / MANIFEST} names no '{min(missing)}' of a {kind.kind}: make the artifact again")
    for source in provenance.inputs.values():
        check_provenance(path, source)


def settings_of(provenance: Provenance) -> dict[str, Any]:
    """The configuration of a stage; of one that is read again, the fields that this version knows, all of them.

    Raises:
        ValidationError: a field of another type or out of bounds.
    """
    kind = KINDS.get(provenance.kind)
    config = None if kind is None else kind.Configs.get(provenance.stage)
    if config is None:
        return provenance.config
    known = {name: provenance.config[name] for name in config.model_fields if name in provenance.config}
    return config.model_validate(known).model_dump(mode="json")


AnyArtifact = Artifact[Any]
C = TypeVar("C", bound=BaseModel, covariant=True)


@dataclass(frozen=True)
class Order(Generic[C]):
    """What a stage is told to do, written once: it names the artifact and is handed to the stage."""

    stage: str
    config: C
    inputs: Mapping[str, AnyArtifact]

    @cached_property
    def key(self) -> str:
        """As ``order_key`` makes it."""
        return order_key(self.stage, self.config, {role: artifact.key for role, artifact in self.inputs.items()})


def order_key(stage: str, config: BaseModel, input_keys: Mapping[str, str]) -> str:
    """sha256 (hex) of stage, configuration and the keys of the inputs by role: known before any of them is made."""
    identity = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "config": config.model_dump(mode="json"),
        "inputs": dict(input_keys),
    }
    return hashlib.sha256(canonical(identity)).hexdigest()


A = TypeVar("A", bound=AnyArtifact)


@dataclass
class Draft(Generic[A]):
    """An artifact being written: put files below ``path`` and what was found into ``facts``."""

    path: Path
    facts: Record | None = None  # of the kind's own type; wanted when the draft is sealed
    resume: Path | None = None  # of a resumable draft: outlives a failure
    failed: bool = False  # given up: leaving the block seals nothing
    vouch: Callable[[Path], None] | None = None  # adds what lies ``beside`` to the sealed folder, before its name
    sealed: A | None = None

    @property
    def artifact(self) -> A:
        if self.sealed is None:
            raise RuntimeError("the draft is not sealed yet")
        return self.sealed


@contextlib.contextmanager
def drafting(kind: type[A], order: Order[Any], out: Path, *, resumable: bool = False) -> Iterator[Draft[A]]:
    """Write the artifact of ``order``: the body fills the draft, leaving the block seals it as ``out``.

    An exception or Ctrl-C in the body removes what was written. After ``kill -9`` the ``.part`` folder
    stays behind without a manifest, and the next writer clears it. A resumable draft has a folder
    ``resume`` that outlives both, until the same key is sealed or another one is begun.

    Raises:
        Busy: another process is writing ``out``, or it exists already.
        NoSpace: the disk is full.
        UserError: ``out`` may not be written.
    """
    if out.exists():
        raise Busy(f"{out} exists already: sealed artifacts are never changed, choose another --out", out)
    part = part_of(out)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        with _readable_disk_errors(out):
            stack.enter_context(_exclusive(part, out))
        if out.exists():
            shutil.rmtree(part, ignore_errors=True)
            raise Busy(f"{out} was made by another process meanwhile: the same command finds it", out)
        try:
            with _readable_disk_errors(out):
                draft: Draft[A] = Draft(part, resume=_begin(part, order.key) if resumable else None)
                if not resumable:
                    _clear(part)
                yield draft
                if draft.failed:
                    _abandon(part)
                    return
                if draft.resume is not None:
                    shutil.rmtree(draft.resume)
                manifest = _seal(kind, draft, order, time.monotonic() - begun)
                if draft.vouch is not None:
                    draft.vouch(part)
                part.rename(out)
                _sync_folder(out.parent)
        except BaseException as error:
            # Libraries wrap the error in one of their own, so its text and the disk itself are asked.
            told = os.strerror(errno.ENOSPC) in str(error)
            full = told or (shutil.disk_usage(out.parent).free < 4096 and not isinstance(error, KdpipeError))
            _abandon(part)
            if full and isinstance(error, Exception):
                raise _no_space(out) from error
            raise
    draft.sealed = kind(out, manifest)


@contextlib.contextmanager
def receiving(out: Path) -> Iterator[Path]:
    """Take a sealed folder from elsewhere: the block fills the folder that it gets, manifest too; it becomes ``out``.

    What came before the block failed stays, for the next one that receives ``out``.

    Raises:
        Busy: another process is writing ``out``, or it is there already.
        NoSpace: the disk is full.
    """
    part = part_of(out)
    with _readable_disk_errors(out), _exclusive(part, out):
        try:
            yield part
            shutil.rmtree(part / RESUME, ignore_errors=True)  # of a run that was to make it here
            try:
                part.rename(out)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                shutil.rmtree(part)
                raise Busy(f"{out} exists already: sealed artifacts are never changed", out) from None
            _sync_folder(out.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                part.rmdir()  # where nothing came
            raise


def _begin(part: Path, key: str) -> Path:
    """The folder ``resume`` of a draft: as it was left for this key, or new."""
    resume = part / RESUME
    kept = resume / "key"
    if kept.is_file() and kept.read_text() == key:
        _clear(part, keep=RESUME)
    else:
        _clear(part)
        resume.mkdir()
        kept.write_text(key)
    return resume


def _abandon(part: Path) -> None:
    """Remove what a failed stage wrote, but for a state to resume from."""
    state = [path for path in (part / RESUME).glob("*") if path.name != "key"] if (part / RESUME).is_dir() else []
    if state:
        _clear(part, keep=RESUME)
    else:
        shutil.rmtree(part, ignore_errors=True)


def _seal(kind: type[A], draft: Draft[A], order: Order[Any], seconds: float) -> Manifest:
    if not isinstance(draft.facts, kind.Facts):
        raise TypeError(f"a {kind.kind} is sealed with {kind.Facts.__name__}, found {type(draft.facts).__name__}")
    files = {}
    for name, status in sorted(sealed.list_files(draft.path)):
        with (draft.path / name).open("rb") as stream:
            os.fsync(stream.fileno())
        files[name] = FileRecord(sha256=sha256_file(draft.path / name), size_bytes=status.st_size)
    value: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind.kind,
        "stage": order.stage,
        "key": order.key,
        "config": order.config.model_dump(mode="json"),
        "facts": draft.facts.model_dump(mode="json"),
        "inputs": {role: source.manifest.provenance().model_dump(mode="json") for role, source in order.inputs.items()},
        "files": {name: record.model_dump() for name, record in files.items()},
        "tools": tool_versions(),
        "host": host_record(),
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }
    value["digest"] = sealed.digest(value)
    with (draft.path / MANIFEST).open("wb") as stream:
        stream.write(sealed.spelled(value))
        stream.flush()
        os.fsync(stream.fileno())
    return read_manifest(draft.path)  # what could not be read back, such as a title with control characters, is refused


def _clear(folder: Path, keep: str = "") -> None:
    for member in folder.iterdir():
        if member.name == keep:
            continue
        if member.is_dir() and not member.is_symlink():
            shutil.rmtree(member)
        else:
            member.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def part_of(out: Path) -> Path:
    """Where the artifact ``out`` lies until it is whole."""
    return out.with_name(out.name + ".part")


@contextlib.contextmanager
def _exclusive(part: Path, out: Path) -> Iterator[None]:
    """Make ``part`` and hold a lock on it that the kernel releases however this process ends. Raises Busy.

    Who held it before may have renamed or removed the folder since it was opened here: what is locked must be what
    lies there.
    """
    while True:
        # Not ``exist_ok``: that looks twice, and the other one may rename the folder in between.
        with contextlib.suppress(FileExistsError):
            part.mkdir(parents=True)
        try:
            descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            if not _locked(descriptor, tries=4):  # it may be somebody who only looks: see ``is_held``
                raise Busy(f"another process is writing {part}: wait for it or choose another folder", out)
            if _is_at(descriptor, part):
                yield
                return
        finally:
            os.close(descriptor)


def forget(out: Path) -> None:
    """Remove what a stage that gave ``out`` up left behind, unless another process is at it."""
    with contextlib.suppress(Busy), _exclusive(part_of(out), out):
        shutil.rmtree(part_of(out), ignore_errors=True)


def _locked(descriptor: int, tries: int = 1) -> bool:
    """Take the lock of what is open, if nobody has it."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(LOOK_SECONDS)
        else:
            return True
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_held(path: Path) -> bool:
    """Whether a process that lives holds the lock of a file or folder; not of one that is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def _no_space(out: Path) -> NoSpace:
    return NoSpace(f"no disk space left while writing {out}: free some and run the same again")


@contextlib.contextmanager
def _readable_disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(out) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"cannot write {out} ({error.strerror}): choose a folder that you may write to") from error
        raise


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is no artifact's, whole or not at all: whoever reads it sees the old one or the new one.

    Raises:
        UserError: no such folder, or one that cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _readable_disk_errors(path):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another place") from None
    finally:
        part.unlink(missing_ok=True)


def find_ancestors(provenance: Provenance, kind: type[AnyArtifact]) -> Sequence[Provenance]:
    """Every artifact of ``kind`` in the lineage of ``provenance``, nearest first, each key once."""
    found: dict[str, Provenance] = {}
    queue = [provenance]
    while queue:
        current = queue.pop(0)
        if current.kind == kind.kind:
            found.setdefault(current.key, current)
        queue.extend(current.inputs.values())
    return list(found.values())
