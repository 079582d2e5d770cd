"""Processes and their output: quiet tools, missing packages, child processes."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .errors import UserError

T = TypeVar("T")
R = TypeVar("R")

# Import name of a distribution where it is not the distribution's name with underscores.
IMPORT_NAMES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "cuda-python": "cuda",
    "mlflow-skinny": "mlflow",
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


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``function`` of every item, by as many threads as there are cores, in the order of the items.

    Few items are under way at any time, so memory does not grow with their number.
    """
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what libraries print (from Python, C++ and their children) to nowhere.

    Converters write hundreds of lines to both streams. A stream of its own (a duplicate of descriptor 2,
    taken before) still reaches the person. Blocks may be nested.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    level = logging.root.manager.disable
    try:
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
        for descriptor in (*saved, nowhere):
            os.close(descriptor)
        logging.disable(level)


@contextlib.contextmanager
def children_signal_kept() -> Iterator[None]:
    """Put SIGCHLD's handler back after the block.

    torch's loader with worker processes installs one for good. Delivered later, when any child ends, while
    the converters' native libraries are loaded, it has crashed the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, or its type."""
    for line in str(error).splitlines():
        if line.strip(" =-*#"):
            return line.strip()[:300]
    return type(error).__name__
