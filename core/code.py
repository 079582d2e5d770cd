"""A user's own code, ``package.module:factory``: run only where the user names it, never because a file does."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec
from pathlib import Path

from .artifact import sha256_file
from .errors import UserError

NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)

_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset())


def is_code(model: str) -> bool:
    """Whether the name of a network is that of a user's own code."""
    return NAME.fullmatch(model) is not None


@contextmanager
def allowing(names: Iterable[str]) -> Iterator[None]:
    """Let the code that these name be run inside the block, besides what is allowed already.

    Raises:
        UserError: something else than ``package.module:factory``.
    """
    names = frozenset(names)
    if wrong := [name for name in names if not is_code(name)]:
        raise UserError(f"--allow-code: wanted MODULE:FUNCTION such as mynets:make, found '{wrong[0]}'")
    before = _allowed.set(_allowed.get() | names)
    try:
        yield
    finally:
        _allowed.reset(before)


def check_allowed(name: str, what: str) -> None:
    """Refuse code that the user did not name. Raises UserError."""
    if name not in _allowed.get():
        raise UserError(
            f"{what} is made by code of somebody's own, '{name}', and no file may have that run: "
            f"if you trust it, say so with --allow-code {name}"
        )


@contextmanager
def current_folder_last() -> Iterator[None]:
    """Let modules be found in the current folder too, inside the block; there last, so that they hide no other."""
    here = str(Path.cwd())
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(here)]


def source_file(name: str) -> Path:
    """The file that ``name`` is in, found without running any of it. Raises UserError."""
    module = name.partition(":")[0]
    parts = module.split(".")
    found: ModuleSpec | None = None
    places: Sequence[str] | None = None
    with current_folder_last():
        for count in range(1, len(parts) + 1):
            try:
                found = _find(".".join(parts[:count]), places)
            except KeyError:  # a folder without __init__.py, which asks the module that it is in: that is not imported
                places = [str(Path(each) / parts[count - 1]) for each in places or ()]
                continue
            places = None if found is None else found.submodule_search_locations
            if places is None and count < len(parts):
                found = None
                break
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise UserError(f"no module '{module}' for '{name}': wanted one on the Python path or in {Path.cwd()}")
    return Path(found.origin)


def _find(module: str, places: Sequence[str] | None) -> ModuleSpec | None:
    """As the import system finds it, which would import what it is in."""
    for finder in sys.meta_path:
        found = finder.find_spec(module, places)
        if found is not None:
            return found
    return None


def sha256_of(name: str) -> str:
    """Hash of the file that ``name`` is in: changed code makes another network. Raises UserError."""
    return sha256_file(source_file(name))


def check_same(name: str, sha256: str | None, what: str) -> None:
    """Refuse code whose file is not the one of this hash, if one is known. Raises UserError."""
    if sha256 is not None and sha256_of(name) != sha256:
        raise UserError(
            f"{what} was made by another version of {source_file(name)} (sha256 {sha256[:12]}...): "
            "put that one back, or make it again"
        )
