"""Which of the modules that open a model are installed: asked here and nowhere else."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def installed(alternatives: Sequence[str]) -> str:
    """The first module of ``alternatives`` whose package is installed; imports nothing.

    Raises:
        ImportError: none is; ``name`` is the first one's package.
    """
    for module in alternatives:
        if _is_there(module):
            return module
    raise ImportError(f"none of {', '.join(map(_package, alternatives))} is installed", name=_package(alternatives[0]))


def _is_there(module: str) -> bool:
    """Whether the package of a module is installed; imports nothing.

    Any folder of its name that lies in the working directory could be a package of parts: it is none unless the part of
    it that is wanted is there.
    """
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        found = importlib.util.find_spec(".".join(parts[:depth]))
        if found is None or found.origin is not None:
            return found is not None
    return False


def _package(module: str) -> str:
    return module.partition(".")[0]
