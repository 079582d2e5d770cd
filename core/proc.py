"""Processes and their output: quiet tools, missing packages, child processes."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import GateFailed, UserError
from .sealed import printable

T = TypeVar("T")
R = TypeVar("R")

# Import name of a distribution where it is not the distribution's name with underscores.
IMPORT_NAMES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "cuda-python": "cuda.bindings",
    "cyclonedx-python-lib": "cyclonedx",
    "ethos-u-vela": "ethosu.vela",
    "mlflow-skinny": "mlflow",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
}


class _NoTracker(importlib.abc.MetaPathFinder):
    """timm's summaries, which nobody here calls, take wandb along where it is installed: two seconds of every command.

    It is refused to them alone: trackers and a person's own network find it, before and after.
    """

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        asks = sys.modules.get("timm.utils.summary") if name == "wandb" else None
        if asks is not None and not hasattr(asks, "update_summary"):  # it is not read to its end
            raise ModuleNotFoundError(name)


def without_timms_tracker() -> None:
    """For a process that is ours: what is imported from now on, timm imports without wandb."""
    sys.meta_path.insert(0, _NoTracker())


def is_installed(distribution: str) -> bool:
    """Whether ``distribution`` can be imported here; imports nothing heavy."""
    name = IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))
    found = importlib.util.find_spec(name.partition(".")[0])
    # Any folder of its name that lies in the working directory could be a package of parts: the part must be there.
    if found is not None and found.origin is None and "." in name:
        found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def process_count() -> int:
    """How many processes torchrun started (or another launcher that sets the same variables)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def spread() -> int:
    """Make each process of torchrun one that works by itself, on a device of its own; its number among them.

    To be called before anything asks what devices there are.
    """
    number = int(os.environ.get("RANK", 0))
    if process_count() > 1:
        local = int(os.environ.get("LOCAL_RANK", number))
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[local % len(seen)] if seen else str(local)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return number


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

    torch's loader with worker processes installs one for good. Delivered later, when any child ends, it has crashed
    the process where a native library had taken the stack for signals with it (see ``runtime/openvino.py``).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


_groups: set[int] = set()  # process groups that are waited for now, by any thread


def end_groups() -> None:
    """End all that ``run_group`` waits for in other threads: an interrupt reaches the main one alone."""
    for group in list(_groups):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def run_group(
    command: Sequence[str], seconds: float | None, stdin: bytes = b"", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with all that it starts, to its end; past the limit, or when this is interrupted, all is ended.

    Args:
        seconds: the limit; None for what ends by itself.

    Raises:
        subprocess.TimeoutExpired: it did not end in time.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as process:
        _groups.add(process.pid)
        try:
            stdout, stderr = process.communicate(stdin, timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            _groups.discard(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


RUNNER_SECONDS = 600.0


def ask_runner(arguments: Sequence[str], seconds: float = RUNNER_SECONDS) -> dict[str, Any]:
    """What ``python -m kdpipe.runtime *arguments`` answers: in a process of its own, limited in time and memory.

    A stranger's model may crash the runtime that opens it, run for ever or want all memory; then that process ends,
    not this one. It may take as much memory as the machine has, in place of all that other processes have too.

    Raises:
        GateFailed: it failed, crashed, or did not end in time.
    """
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    module = f"{__name__.partition('.')[0]}.runtime"
    # -P: no module is imported from the folder where the command was given.
    command = [sys.executable, "-P", "-m", module, *arguments, "--memory-bytes", str(memory_bytes * 3 // 4)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise GateFailed(f"the runtime that opened it did not end in {seconds:.0f} s") from None
    if done.returncode < 0:
        raise GateFailed(f"the runtime that opened it crashed ({signal.Signals(-done.returncode).name})")
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise GateFailed(printable(lines[-1].removeprefix("runtime: "), 500))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, or its type."""
    for line in str(error).splitlines():
        if line.strip(" =-*#"):
            return printable(line.strip(), 300)
    return type(error).__name__
