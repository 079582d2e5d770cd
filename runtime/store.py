"""What lies on a device: folders and files by their contents, and one link to the bundle that is live.

Below ``ROOT``::

    store/DIGEST        a pushed folder or file, whole
    store/DIGEST.part   an upload that is not whole yet; the next one goes on with it
    store/DIGEST.gone   what is being removed
    live                the deployed bundle: a link to store/DIGEST, switched by one rename
    history.json        what was made live, oldest first; written before the link is switched
    beside/DIGEST/      what the device makes for a bundle (engines): the bundle itself is sealed
    work/, python/      outputs of sessions; a Python of our own

Whatever happens at whatever moment (kill -9, a full disk, a power loss), a name without a suffix is whole and ``live``
leads to the old bundle or to the new one: contents reach the disk before their name does, and every name is given
by one rename. Nothing below ROOT is ever reached through another link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import build, sealed
from .beside import BESIDE, STORE
from .bundle import BundleError, read_facts, replay_golden

LIVE, HISTORY, WORK, PYTHON, LOCK = "live", "history.json", "work", "python", "lock"
PART, GONE = ".part", ".gone"
UNKNOWN = "unavailable"
WAIT_SECONDS = 60.0  # for another process that changes the same store


class StoreError(Exception):
    """What was asked of the store cannot be done, and nothing was changed; the text is one line for a person."""


# ---- by content --------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """sha256, in hexadecimal digits, over the names and contents of a folder's files, or over one file's contents.

    Raises:
        StoreError: nothing there, a link, a special file.
    """
    try:
        hashes = {name: sealed.sha256_file(path / name) for name in sizes(path)}
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror})") from None
    return hashlib.sha256(sealed.canonical(hashes)).hexdigest()


def sizes(path: Path) -> dict[str, int]:
    """Bytes of each file of a folder by POSIX name, or of the one file, which is called ``.``. Raises StoreError."""
    try:
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            return {".": status.st_size}
        if stat.S_ISDIR(status.st_mode):
            return {name: file.st_size for name, file in sealed.list_files(path)}
        raise StoreError(f"{path} is a link or a special file: wanted a folder or a plain file")
    except sealed.Unsound as error:
        raise StoreError(str(error)) from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror})") from None


def have(root: Path, digests: Sequence[str]) -> dict[str, Any]:
    """Which of ``digests`` lie there whole (their contents are hashed again), and how much space is free.

    Returns:
        ``have``: those; ``part_bytes``: of each other one, what of it was uploaded before; ``free_bytes``.

    Raises:
        StoreError: an upload with a link in it, through which the next one would go.
    """
    found, begun = [], {}
    for name in digests:
        path = _entry(root, name)
        part = path.with_name(name + PART)
        if _is_whole(path):
            found.append(name)
        else:
            begun[name] = sum(sizes(part).values()) if os.path.lexists(part) else 0
    return {"have": found, "part_bytes": begun, "free_bytes": _free_bytes(root)}


def receive(root: Path, name: str) -> dict[str, Any]:
    """Check a finished upload against its digest, bring it to the disk, and give it its name.

    Raises:
        StoreError: nothing was uploaded; other contents (they are removed: the next upload begins anew).
    """
    with _changing(root):
        path = _entry(root, name)
        part = path.with_name(name + PART)
        if _is_whole(path):
            _remove(part)
            return {"digest": name}
        if not os.path.lexists(part):
            raise StoreError(f"nothing was uploaded to {part}: push it again")
        try:
            found = digest(part)
        except StoreError:
            _remove(part)
            raise
        if found != name:
            _remove(part)
            raise StoreError(f"what was uploaded to {part} has the digest {found}: it was removed, push it again")
        _sync_all(part)
        _remove(path)  # of other contents: a disk that lost something, or somebody who edited there
        part.rename(path)
        _sync(path.parent)
    return {"digest": name}


# ---- what is live ------------------------------------------------------------------------------------------


def install(
    root: Path, name: str, threads: int = 1, stand_in: bool = False, keep_versions: int = 3, keep_bytes: int = 0
) -> dict[str, Any]:
    """Check every hash of a bundle in the store, replay its golden inputs here, then make it live by one rename.

    Args:
        name: digest of the bundle's folder.
        threads: of the runtime that replays.
        stand_in: replay with the runtime that reads the same file.
        keep_versions: how many bundles that were live are kept, the live and the previous one among them.
        keep_bytes: how much space those may take; 0: any. The live and the previous one stay in any case.

    Returns:
        What the replay found, what is live (as in ``status``) and what was before, and what was ``removed``.

    Raises:
        StoreError, BundleError: it is not there, not whole, or does not compute what it promises.
    """
    with _changing(root):
        replayed = _checked(root, name, threads, stand_in)
        current, versions = live(root), _history(root)
        if name != current:
            before, after = _around(versions, current)
            passed_over = [{**version, "passed_over": True} for version in after]
            others = [version for version in (*before[:-1], *passed_over, *before[-1:]) if version["digest"] != name]
            _write_history(root, [*others, {"digest": name, "deployed_utc": _now(), "passed_over": False}])
            _switch(root, name)
        removed = _tidy(root, keep_versions, keep_bytes)
        return _told(root, replayed, removed)


def rollback(root: Path, threads: int = 1, stand_in: bool = False) -> dict[str, Any]:
    """Make the bundle live that was live before, after the same checks; each call goes one further back.

    Raises:
        StoreError, BundleError: there is none, or it is not whole or does not compute what it promises.
    """
    with _changing(root):
        before = _previous(root)
        if before is None:
            raise StoreError(f"no bundle was live before on {root}: deploy one")
        replayed = _checked(root, before, threads, stand_in)
        _switch(root, before)
        return _told(root, replayed, [])


def live(root: Path) -> str | None:
    """Digest of the bundle that is live. Raises StoreError for a link that is not ours."""
    try:
        target = str((root / LIVE).readlink())
    except FileNotFoundError:
        return None
    except OSError:
        raise StoreError(f"{root / LIVE} is no link: move it away, it is where the live bundle is linked") from None
    folder, _, name = target.partition("/")
    if folder != STORE or not sealed.KEY.fullmatch(name):
        raise StoreError(f"{root / LIVE} leads to '{sealed.printable(target, 200)}', which is none of ours: remove it")
    return name


def status(root: Path) -> dict[str, Any]:
    """What is live, since when and whether it is intact; what else lies there, and how much space it takes.

    Returns:
        ``live`` (digest, since_utc, fault: None where every hash is right) or None, ``previous``, ``versions`` oldest
        first, ``entries`` by digest with kind and bytes, and the bytes of every folder and of what is free.
    """
    root = root.absolute()
    return {
        "root": str(root),
        "live": _live_entry(root),
        "previous": _previous(root),
        "versions": [version["digest"] for version in _history(root)],
        "entries": {path.name: _about(path) for path in _entries(root)},
        "bytes": {name: _size(root / name) for name in (STORE, BESIDE, WORK, PYTHON)},
        "free_bytes": _free_bytes(root),
    }


def clean(root: Path, everything: bool = False) -> dict[str, Any]:
    """Remove what the live and the previous bundle do not need; with ``everything`` those too.

    Uploads, pushed images, outputs, the runner itself and, where no bundle is live, the Python that was brought.

    Raises:
        StoreError: the device is being measured.
    """
    with _changing(root), _unmeasured(root) as free:
        if not free:
            raise StoreError(f"{root} is in use by a measurement (it holds {root / LOCK}): clean it afterwards")
        before = sum(_size(root / name) for name in (STORE, BESIDE, WORK, PYTHON))
        kept = set() if everything else {live(root), _previous(root)} - {None}
        if not kept:
            for name in (LIVE, HISTORY):
                _remove(root / name)
            _sync(root)
        removed = [path.name for path in _entries(root) if path.name not in kept]
        for name in removed:
            _discard(root, name)
        _remove(root / WORK)
        if not kept:
            _remove(root / PYTHON)
        after = sum(_size(root / name) for name in (STORE, BESIDE, WORK, PYTHON))
        return {"removed": removed, "kept": sorted(filter(None, kept)), "freed_bytes": before - after}


# ---- inside ------------------------------------------------------------------------------------------------


def _told(root: Path, replayed: dict[str, Any], removed: list[str]) -> dict[str, Any]:
    return {**replayed, "live": _live_entry(root), "previous": _previous(root), "removed": removed}


def _live_entry(root: Path) -> dict[str, Any] | None:
    """What is live, since when, and what is wrong with it, after hashing all of it."""
    name = live(root)
    if name is None:
        return None
    path, fault = root / STORE / name, None
    try:
        read_facts(path)
        if digest(path) != name:
            raise StoreError("its contents are not those of its digest")
    except (BundleError, StoreError) as error:
        fault = sealed.printable(str(error), 300)
    since = os.lstat(root / LIVE).st_mtime  # of the link itself: when it was switched
    return {"digest": name, "since_utc": _utc(since), "fault": fault, **_about(path)}


def _checked(root: Path, name: str, threads: int, stand_in: bool) -> dict[str, Any]:
    path = _entry(root, name)
    if not path.is_dir():
        raise StoreError(f"no bundle {name} on {root}: push it first")
    facts = read_facts(path)
    if digest(path) != name:
        raise StoreError(f"{path} is not what its digest says: push it again")
    if not stand_in:
        build(path, facts)
    return replay_golden(path, facts, threads, stand_in)


def _history(root: Path) -> list[dict[str, Any]]:
    """What was made live and still lies there, oldest first; what somebody else wrote there counts as nothing.

    ``passed_over`` is a version that was rolled back (or never reached) before another one was deployed: nobody
    wants to go back to it.
    """
    try:
        versions = sealed.read_json(root / HISTORY, sealed.MIB)["versions"]
        read = [{name: version[name] for name in ("digest", "deployed_utc", "passed_over")} for version in versions]
        return [version for version in read if _entry(root, version["digest"]).is_dir()]
    except (FileNotFoundError, sealed.Unsound, KeyError, TypeError, StoreError):
        return []


def _around(versions: list[dict[str, Any]], current: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The versions up to the live one, and those after it."""
    names = [version["digest"] for version in versions]
    if current in names:
        at = names.index(current) + 1
        return versions[:at], versions[at:]
    if current is None:
        return [], versions
    return [{"digest": current, "deployed_utc": UNKNOWN, "passed_over": False}], versions


def _previous(root: Path) -> str | None:
    before, _ = _around(_history(root), live(root))
    return next((version["digest"] for version in reversed(before[:-1]) if not version["passed_over"]), None)


def _write_history(root: Path, versions: list[dict[str, Any]]) -> None:
    part = root / (HISTORY + PART)
    try:
        with part.open("w") as stream:
            json.dump({"versions": versions}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(root / HISTORY)
    except OSError:
        _remove(part)
        raise
    _sync(root)


def _switch(root: Path, name: str) -> None:
    """Let ``live`` lead to another bundle: the one rename that all the rest prepares."""
    part = root / (LIVE + PART)
    _remove(part)
    part.symlink_to(f"{STORE}/{name}")
    part.rename(root / LIVE)
    _sync(root)


def _tidy(root: Path, keep_versions: int, keep_bytes: int) -> list[str]:
    """Remove what was left half removed, and old versions beyond what is kept. Never the live or the previous one."""
    with _unmeasured(root) as free:
        if not free:  # what is measured may be one of them; the next deploy sees to it
            return []
        for path in (root / STORE).iterdir():
            if path.name.endswith(GONE):
                _remove(path)
        pinned = {live(root), _previous(root)}
        versions = [version["digest"] for version in reversed(_history(root))]
        ordered = sorted(versions, key=lambda name: name not in pinned)  # newest first, after those that stay
        removed, total = [], 0
        for at, name in enumerate(ordered):
            total += _size(_entry(root, name)) + _size(root / BESIDE / name)
            if name not in pinned and (at >= keep_versions or (keep_bytes and total > keep_bytes)):
                _discard(root, name)
                removed.append(name)
        return removed


def _discard(root: Path, name: str) -> None:
    """Remove an entry: first its name, so that no half of it is ever taken for the whole."""
    path = root / STORE / name
    gone = path.with_name(name.partition(".")[0] + GONE)
    _remove(gone)
    path.rename(gone)
    _remove(gone)
    if sealed.KEY.fullmatch(name):
        _remove(root / BESIDE / name)


def _entry(root: Path, name: str) -> Path:
    """Where an entry of that digest lies. Raises StoreError for what is no digest, and for a store that is a link."""
    if not sealed.KEY.fullmatch(name):
        raise StoreError(f"'{sealed.printable(name, 80)}' is no digest: wanted 64 hexadecimal digits")
    return _folder(root, STORE) / name


def _entries(root: Path) -> list[Path]:
    store = _folder(root, STORE)
    return sorted(path for path in store.iterdir()) if store.is_dir() else []


def _folder(root: Path, name: str) -> Path:
    path = root / name
    if path.is_symlink():
        raise StoreError(f"{path} is a link: wanted a folder of its own, nothing outside {root} is touched")
    return path


def _is_whole(path: Path) -> bool:
    try:
        return digest(path) == path.name
    except StoreError:
        return False


def _about(path: Path) -> dict[str, Any]:
    """What an entry is, as far as its manifest says; read for display, so a fault is no reason to fail."""
    shown: dict[str, Any] = {"bytes": _size(path)}
    if path.name.endswith((PART, GONE)):
        return {**shown, "kind": "upload" if path.name.endswith(PART) else "being removed"}
    with contextlib.suppress(sealed.Unsound, OSError):
        manifest = sealed.read_manifest(path)
        named = {name: manifest["facts"].get(name) for name in ("target", "variant", "model")}
        return {**shown, "kind": manifest["kind"], "key": manifest["key"], **named}
    return {**shown, "kind": "runner" if (path / "runtime").is_dir() else "folder" if path.is_dir() else "file"}


def _size(path: Path) -> int:
    """Bytes of a file, or of everything in a folder; 0 where there is nothing. Links are not followed."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(Path(folder, name)).st_size
    return total


def _free_bytes(root: Path) -> int:
    """What a user may still write on the disk of ``root``, which need not exist yet."""
    path = root.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to) or a folder, if it is there."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass


def _sync_all(path: Path) -> None:
    """Bring a file, or a folder with everything in it, to the disk."""
    if path.is_dir():
        for folder, _, names in os.walk(path, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
    else:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _changing(root: Path) -> Iterator[None]:
    """Be the only process that changes the store; the kernel gives it back however this one ends.

    Raises:
        StoreError: another process does so for long; the disk is full or cannot be written.
    """
    with _in_one_line(root):
        (root / STORE).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_folder(root, STORE), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            end = time.monotonic() + WAIT_SECONDS
            while not _locked(descriptor):
                if time.monotonic() > end:
                    raise StoreError(f"another process is changing {root}: wait for it, then try again")
                time.sleep(0.05)
            yield
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _in_one_line(root: Path) -> Iterator[None]:
    """What the disk refuses is told in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"no space left on the disk of {root}: remove something, or clean it"
        else:
            text = f"cannot change {error.filename or root} ({error.strerror})"
        raise StoreError(text) from None


@contextlib.contextmanager
def _unmeasured(root: Path) -> Iterator[bool]:
    """Whether nobody measures here; nobody begins to inside the block."""
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _now() -> str:
    return _utc(time.time())


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
