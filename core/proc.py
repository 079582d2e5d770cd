"""Processes and their output: quiet tools, missing packages, child processes."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import IO

from .errors import UserError

# Import name of a distribution where it is not the distribution's name with underscores.
IMPORT_NAMES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "cuda-python": "cuda",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
}


def is_installed(distribution: str) -> bool:
    """Whether ``distribution`` can be imported here; imports nothing heavy."""
    name = IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def require(what: str, distributions: Iterable[str], extra: str) -> None:
    """Refuse, with the cure, when one of ``distributions`` is missing. Raises UserError."""
    missing = [name for name in distributions if not is_installed(name)]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'kdpipe[{extra}]'")


def terminal() -> IO[str]:
    """The real standard error, also while ``quiet`` has taken it away from the libraries."""
    return _terminal or sys.stderr


_terminal: IO[str] | None = None


@contextlib.contextmanager
def quiet() -> Iterator[IO[bytes]]:
    """Send what libraries print (from Python, C++ and their children) to a temporary file.

    Converters write hundreds of lines to both streams. Yields the file; ``terminal()`` still reaches
    the person. Where the work fails, the last lines belong to the error: ``last_line`` reads them.
    """
    global _terminal  # file descriptors are global too
    if _terminal is not None:  # already quiet
        with tempfile.TemporaryFile() as nothing:
            yield nothing
        return
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as restore:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        saved = [os.dup(descriptor) for descriptor in (1, 2)]
        _terminal = os.fdopen(os.dup(saved[1]), "w", buffering=1)
        level = logging.root.manager.disable

        def back() -> None:
            global _terminal
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            if _terminal is not None:
                _terminal.close()
            _terminal = None
            logging.disable(level)

        restore.callback(back)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        logging.disable(logging.WARNING)
        restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield log


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, or its type."""
    for line in str(error).splitlines():
        if line.strip(" =-*#"):
            return line.strip()[:300]
    return type(error).__name__
