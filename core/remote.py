"""Sealed folders at other places: any URL of fsspec (s3://, gs://, hf://, https://), or another folder of this machine.

A folder is read by its manifest, never by a listing: what it names is limited first, fetched into ``NAME.part``, each
file compared with its hash while it comes, and the folder renamed. It is written the other way round, the manifest
last: a manifest means *whole* there too. Credentials are the user's own, as their file system finds them; what stands
of them in a URL is never shown.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

from . import sealed
from .artifact import (
    KINDS,
    LARGEST_BESIDE_BYTES,
    RESUME,
    AnyArtifact,
    Busy,
    FileRecord,
    Manifest,
    check_provenance,
    read_manifest,
    receiving,
    unsound_is_users,
)
from .errors import UserError
from .kinds import as_name
from .proc import first_line
from .progress import note, track
from .sealed import MANIFEST, MIB, printable

STORE = "KDPIPE_STORE"  # variable with the URL of a store, for every command that takes or makes artifacts
MOST_FILES = 1_000_000
AT_ONCE = 8  # files under way: a small one costs a round trip, whatever the link can carry
BLOCK_BYTES = 8 * MIB  # asked for at a time
CLAIM = f"{MANIFEST}.part"  # of who is pushing there: the manifest that it will have
READ_ONLY = ("http://", "https://")
LOCAL = re.compile(r"(?:file|local)://")
URL = re.compile(r"(?:[A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]*://")
# What a URL may hide: ``user:password@``, where a password may have slashes, and all that follows a question mark.
USER_INFO = re.compile(r"(?<=://)(?:[^/?#@]*:[^?#]*@|[^/?#@]*@)")
QUERY = re.compile(r"(?<=\?)(?:(?!::)\S)*")


class NotThere(UserError):
    """Nothing lies at that URL."""


class AlreadyThere(UserError):
    """Something whole lies at that URL."""


class Unreachable(UserError):
    """What lies at that URL cannot be asked for, or not be written."""


def is_url(text: str) -> bool:
    """Whether this is a URL, such as ``s3://bucket/name``; any other text is a path."""
    return URL.match(text) is not None


def shown(url: str) -> str:
    """``url`` as a person may see it: without user, password and what follows a question mark."""
    return printable(QUERY.sub("***", USER_INFO.sub("***@", url)), 500)


def _without_secrets(text: str, url: str) -> str:
    """``text`` without what ``shown`` hides of ``url``."""
    hidden = [*USER_INFO.findall(url), *QUERY.findall(url)]
    pieces = {piece for part in hidden for piece in (part.rstrip("@"), *re.split(r"[:@&=]", part)) if len(piece) > 2}
    pieces |= {unquote(piece) for piece in pieces}
    for piece in sorted(pieces, key=len, reverse=True):
        text = text.replace(piece, "***")
    return text


def _local(url: str) -> Path | None:
    """The folder of this machine that a URL means, if it means one."""
    if not is_url(url):
        return Path(url)
    named = LOCAL.match(url)
    return Path(url[named.end() :]) if named and "::" not in url else None


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL or path; asked for when something of it is wanted."""

    url: str

    def __str__(self) -> str:
        return shown(self.url.rstrip("/") or "/")

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(_joined(self.url, name))

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system and the path in it. Raises UserError for one that is unknown or not installed."""
        _check_protocols(self.url)
        from fsspec.core import url_to_fs

        with self._told("reach"):
            system, root = url_to_fs(self.url)
        return system, str(root)

    def _path(self, name: str) -> str:
        return _joined(self._place[1], name)

    @contextmanager
    def _told(self, what: str, name: str = "") -> Iterator[None]:
        """Every file system raises its own: told in one line, without what a URL may hide."""
        where = f"{self}/{printable(name, 200)}" if name else str(self)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if what == "read" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise NotThere(f"nothing at {where}: wanted a whole artifact there") from None
            told = Exception(_without_secrets(str(error), self.url) or "no reason is given")
            raise Unreachable(f"cannot {what} {where}: {type(error).__name__}: {first_line(told)}") from None

    def blocks(self, name: str, most_bytes: int) -> Iterator[bytes]:
        """The contents of a file. Raises UserError: not there, unreachable, or more than that."""
        local = _local(self.url)
        with self._told("read", name):
            if local is not None:  # neither through a link, nor waiting for whoever writes into a pipe
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                stream: BinaryIO = os.fdopen(os.open(local / name, flags), "rb")
            else:
                system = self._place[0]
                # http comes as a stream: not every server knows of ranges.
                ahead = 0 if self.url.startswith(READ_ONLY) else BLOCK_BYTES
                stream = cast(BinaryIO, system.open(self._path(name), "rb", block_size=ahead))
        try:
            left = most_bytes
            while True:
                with self._told("read", name):
                    block = stream.read(min(BLOCK_BYTES, left + 1))
                if not block:
                    return
                left -= len(block)
                if left < 0:
                    raise UserError(f"{self}/{name} has more than {most_bytes} bytes: not what its manifest says")
                yield block
        finally:
            with suppress(Exception):
                stream.close()

    def read(self, name: str, most_bytes: int) -> bytes:
        """A small file. Raises UserError as ``blocks`` does."""
        return b"".join(self.blocks(name, most_bytes))

    @property
    def is_whole(self) -> bool:
        """Whether a manifest lies there. Raises UserError where that cannot be told."""
        try:
            return next(self.blocks(MANIFEST, sealed.LARGEST_JSON_BYTES), None) is not None
        except NotThere:
            return False

    def folders(self) -> list[str]:
        """The names of the folders in it; none where nothing is. Raises UserError where that cannot be told."""
        local = _local(self.url)
        if local is not None:
            with self._told("list"):
                entries = list(os.scandir(local)) if local.is_dir() else []
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        system, root = self._place
        with self._told("list"):
            system.invalidate_cache()  # somebody may have published since
            try:
                found = system.ls(root, detail=True)
            except FileNotFoundError:
                return []
        return sorted(each["name"].rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")

    def fetch(self, name: str, record: FileRecord, path: Path) -> None:
        """Copy a file to ``path``, where nothing is left of one that is not what ``record`` says.

        Raises:
            UserError: as ``blocks`` does, or other contents.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        try:
            with path.open("wb") as target:
                for block in self.blocks(name, record.size_bytes):
                    digest.update(block)
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
            if digest.hexdigest() != record.sha256:
                raise UserError(f"{self}/{name} differs from its manifest (corrupted or edited): make it again")
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def manifest(self, folder: Path) -> Manifest:
        """Fetch the manifest into ``folder``, in place of one there; its names lie inside and are not too many.

        Raises:
            UserError: none there, a broken or edited one, or one of another version.
        """
        text = self.read(MANIFEST, sealed.LARGEST_JSON_BYTES)
        path = folder / MANIFEST
        path.unlink(missing_ok=True)  # which is no link then
        path.write_bytes(text)
        try:
            found = read_manifest(folder)
            check_provenance(folder, found)
            _check_names(found.files)
        except UserError as error:
            path.unlink()
            told = str(error).replace(str(path), f"{self}/{MANIFEST}").replace(str(folder), str(self))
            raise type(error)(told) from None
        return found

    def put(self, path: Path, name: str, record: FileRecord | None) -> None:
        """Write a file where none is; one that is there with these contents stays (of a push that was broken off).

        Raises:
            UserError: cannot be written, or something else is there.
        """
        try:
            with self._told("write", name):
                self._place[0].put_file(str(path), self._path(name), mode="create")
        except UserError:
            if record is None or not self._holds(name, record):
                raise

    def remove(self, name: str) -> None:
        """Remove a file of ours, if that is allowed."""
        with suppress(Exception):
            self._place[0].rm_file(self._path(name))

    def _holds(self, name: str, record: FileRecord) -> bool:
        """Whether a file has these contents; False where there is none. Raises UserError for others."""
        digest = hashlib.sha256()
        try:
            for block in self.blocks(name, record.size_bytes):
                digest.update(block)
        except NotThere:
            return False
        except Unreachable:
            return False
        except UserError:  # longer
            digest.update(b"more")
        if digest.hexdigest() == record.sha256:
            return True
        raise UserError(
            f"{self}/{name} is of another push, under way or broken off: wait for it, or remove what lies at {self}"
        )


def fetch_folder(url: str, folder: Path, *, kind: type[AnyArtifact] | None = None, key: str | None = None) -> Path:
    """The artifact at a URL of fsspec or a path, as the folder ``folder``; broken off, the same call goes on.

    The manifest comes first, and what it says is checked as a stranger's; nothing else is fetched if there is no room
    for it. A whole artifact that is there already is taken as it is, and nothing is asked for.

    Args:
        kind: what it must be.
        key: what its key must begin with.

    Raises:
        NotThere: no artifact at ``url``.
        Unreachable: no answer, or a file system that is not known or not installed.
        UserError: another artifact than wanted, one that is not what its manifest says, or no room for it.
    """
    source = RemoteFolder(url)

    def check(manifest: Manifest) -> None:
        if kind is not None and manifest.kind != kind.kind:
            raise UserError(f"{source} is a {manifest.kind}, wanted a {kind.kind}")
        if key is not None and not manifest.key.startswith(key):
            raise UserError(f"{source} has the key {manifest.key[:12]}, wanted {key[:12]}: it is another artifact")

    return _fetched(source, folder, check)


def fetch_into(url: str, parent: Path) -> Path:
    """The artifact at a URL as a folder below ``parent``, named by its contents: ``DIGEST/NAME``.

    What lies at a URL may change, and two URLs may be of the same: it is fetched once for each contents.

    Raises:
        UserError: as ``fetch_folder`` does.
    """
    source = RemoteFolder(url)
    with tempfile.TemporaryDirectory() as asking:
        found = source.manifest(Path(asking))

    def check(manifest: Manifest) -> None:
        if manifest.digest != found.digest:
            raise UserError(f"{source} was replaced while it was looked at: do the same again")

    last = as_name(shown(url).partition("?")[0].rstrip("/").rpartition("/")[2])
    return _fetched(source, parent / found.digest / last, check)


def push_folder(folder: Path, url: str) -> None:
    """Put a whole artifact at a URL of fsspec or a path: its files first, the manifest last.

    A push that was broken off is gone on with by the same call. Where the file system can create without replacing
    (S3, Google's) no file ever replaces another's: of two who push at once, the one whose claim is there first ends
    whole, and the other one has written nothing.

    Raises:
        AlreadyThere: an artifact lies there: nothing is overwritten.
        Unreachable: it cannot be written to, or its file system is not known or not installed.
        UserError: what lies in ``folder`` is not what its manifest says, or a file of another push lies there.
    """
    manifest = read_manifest(folder)
    with unsound_is_users():
        sealed.check_files(folder, _records(manifest), _largest_bytes(manifest), beside=_beside(manifest))
    local = _local(url)
    there = AlreadyThere(f"{shown(url)} is there already: what is published is never overwritten, choose another place")
    if local is not None:
        if local.exists():
            raise there
        _receive(RemoteFolder(str(folder)), local, lambda _: None)
        return
    if url.startswith(READ_ONLY):
        raise UserError(f"cannot write {shown(url)}: http(s) is read only, wanted s3://, gs:// or a folder")
    target = RemoteFolder(url)
    if target.is_whole:
        raise there
    records = dict(manifest.files)
    for name in _beside(manifest):
        if (folder / name).is_file():
            size = (folder / name).stat().st_size
            records[name] = FileRecord(sha256=sealed.sha256_file(folder / name), size_bytes=size)

    own = folder / MANIFEST
    target.put(own, CLAIM, FileRecord(sha256=sealed.sha256_file(own), size_bytes=own.stat().st_size))
    whole = target.is_whole  # by one who ended between the two looks
    if not whole:
        _each(records, lambda name: target.put(folder / name, name, records[name]), f"pushing {target}")
        try:
            target.put(own, MANIFEST, None)
        except Unreachable:
            whole = target.is_whole
            if not whole:
                raise
    target.remove(CLAIM)
    if whole:
        raise there


class Store:
    """A place that several machines share what they make in: a folder of artifacts, called there as they are here.

    Whoever may write to it is believed as much as whoever may write to the folder of artifacts. Losing it costs a line
    and the sharing, never the run.
    """

    def __init__(self, url: str) -> None:
        """Take a URL or a path; nothing is asked of it yet. Raises UserError for a file system that is not here."""
        self.url = url
        self._place = RemoteFolder(url)
        self._lost = False
        if _local(url) is None:
            _check_protocols(url)

    def fetch(self, name: str, path: Path, kind: type[AnyArtifact] | None, key: str) -> bool:
        """Whether the store has a whole artifact of that name and key, which then lies at ``path``.

        Raises:
            Busy: another process makes or fetches it now.
        """
        if self._lost:
            return False
        try:
            fetch_folder((self._place / name).url, path, kind=kind, key=key)
        except Busy:
            raise
        except NotThere:
            return False
        except Unreachable as error:
            self._lose(error)
            return False
        except UserError as error:
            note(f"what the store has of {name} is not taken: {error}")
            return False
        return True

    def push(self, name: str, path: Path) -> None:
        """Put a whole artifact there, unless there is one of that name; a store at http(s) is only read."""
        if self._lost or self._place.url.startswith(READ_ONLY):
            return
        try:
            push_folder(path, (self._place / name).url)
        except AlreadyThere:
            return
        except Unreachable as error:
            self._lose(error)
        except UserError as error:
            note(f"{name} is not shared: {error}")

    def _lose(self, error: UserError) -> None:
        self._lost = True
        note(f"the run goes on without its store: {error}")


# ---- how --------------------------------------------------------------------------------------------------


def _joined(root: str, name: str) -> str:
    """A name below a URL or path; http wants it quoted, and before what follows a question mark."""
    if not root.startswith(READ_ONLY):
        return f"{root.rstrip('/')}/{name}"
    before, mark, query = root.partition("?")
    return f"{before.rstrip('/')}/{quote(name)}{mark}{query}"


def _fetched(source: RemoteFolder, folder: Path, check: Callable[[Manifest], None]) -> Path:
    if (folder / MANIFEST).is_file():
        return folder
    if folder.exists():
        raise UserError(f"{folder} exists and is no artifact: choose another folder")
    _receive(source, folder, check)
    return folder


def _receive(source: RemoteFolder, out: Path, check: Callable[[Manifest], None]) -> None:
    """Fetch what ``check`` takes of a manifest. Raises UserError."""
    with receiving(out) as part:
        before = None
        with suppress(UserError):
            before = read_manifest(part).digest
        manifest = source.manifest(part)
        if manifest.digest != before:  # what came before is of something else
            for member in part.iterdir():
                if member.is_dir() and not member.is_symlink() and member.name != RESUME:
                    shutil.rmtree(member)
                elif member.name not in (RESUME, MANIFEST):
                    member.unlink()
        lacking = [name for name, record in manifest.files.items() if not _is_there(part / name, record)]
        try:
            check(manifest)
            _check_sizes(source, manifest, sum(manifest.files[name].size_bytes for name in lacking), part)
        except UserError:
            (part / MANIFEST).unlink()
            raise

        def fetch(name: str) -> None:
            source.fetch(name, manifest.files[name], part / name)

        _each(lacking, fetch, f"fetching {source}")
        for name in _beside(manifest):
            (part / name).unlink(missing_ok=True)
            with suppress(NotThere):
                (part / name).write_bytes(source.read(name, LARGEST_BESIDE_BYTES))


def _each(names: Collection[str], do: Callable[[str], None], what: str) -> None:
    """Do it for every name, several at once; the first failure ends it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for _ in track(pool.map(do, names), what, len(names)):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _check_sizes(source: RemoteFolder, manifest: Manifest, lacking_bytes: int, part: Path) -> None:
    """Refuse what is larger than its kind can be, or than the disk has room for. Raises UserError."""
    limit, size = _largest_bytes(manifest), sum(record.size_bytes for record in manifest.files.values())
    if size > limit:
        raise UserError(f"{source} would have {size} bytes: wanted at most {limit} of a {manifest.kind}")
    free = shutil.disk_usage(part).free
    if lacking_bytes > free:
        raise UserError(f"{source} takes {lacking_bytes} bytes more, {part.parent} has {free} left: free some")
    local = _local(source.url)
    if local is not None:  # no links, no pipes, nothing besides
        with unsound_is_users():
            sealed.check_files(local, _records(manifest), limit, hashed=False, beside=_beside(manifest))


def _is_there(path: Path, record: FileRecord) -> bool:
    """Whether a file came whole, before this was broken off."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != record.size_bytes:
        return False
    return sealed.sha256_file(path) == record.sha256


def _records(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {name: vars(record) for name, record in manifest.files.items()}


def _largest_bytes(manifest: Manifest) -> int:
    kind = KINDS.get(manifest.kind)
    return sealed.LARGEST_BYTES if kind is None else kind.largest_bytes


def _beside(manifest: Manifest) -> frozenset[str]:
    kind = KINDS.get(manifest.kind)
    return frozenset() if kind is None else kind.beside


def _check_names(files: Mapping[str, FileRecord]) -> None:
    """See that there are not too many, that none is a folder of another, and none is ours. Raises UserError."""
    if len(files) > MOST_FILES:
        raise UserError(f"{MANIFEST} names {len(files)} files: wanted at most {MOST_FILES}")
    for name in files:
        parts = name.split("/")
        folders = ["/".join(parts[:count]) for count in range(1, min(len(parts), sealed.MOST_LEVELS + 2))]
        if parts[0] in (RESUME, CLAIM) or len(parts) > sealed.MOST_LEVELS or any(folder in files for folder in folders):
            raise UserError(f"{MANIFEST} names '{printable(name, 80)}', which cannot be a file of an artifact")


def _check_protocols(url: str) -> None:
    """Refuse, with the cure, a URL whose file system is not known or not installed. Raises Unreachable."""
    if importlib.util.find_spec("fsspec") is None:
        raise Unreachable(f"cannot reach {shown(url)}: URLs need fsspec: pip install fsspec")
    from fsspec.registry import get_filesystem_class, known_implementations

    for part in url.split("::"):
        protocol = part.partition("://")[0] if "://" in part else part
        try:
            get_filesystem_class(protocol)
        except ImportError as error:
            package = known_implementations.get(protocol, {}).get("class", "fsspec").partition(".")[0]
            cure = f"pip install {package}" if package != "fsspec" else first_line(error)
            raise Unreachable(f"cannot reach {shown(url)}: {protocol}:// is not installed: {cure}") from None
        except ValueError:
            raise Unreachable(
                f"cannot reach {shown(url)}: '{printable(protocol, 40)}' is no protocol that fsspec knows: "
                "wanted s3://, gs://, hf://, https:// or a folder"
            ) from None
