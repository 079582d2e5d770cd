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
        if importlib.util.find_spec(_package(module)) is not None:
            return module
    raise ImportError(f"none of {', '.join(map(_package, alternatives))} is installed", name=_package(alternatives[0]))


def _package(module: str) -> str:
    return module.partition(".")[0]
