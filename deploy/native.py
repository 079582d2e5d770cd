"""Native code on a flatbuffer that may be anybody's: in a process of its own, limited in time and memory.

``python -m kdpipe.deploy.native ENGINE ...`` is what the process runs; ``asked`` starts it. An interpreter that
crashes, runs for ever or wants all memory ends that process, and is one line here.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import GateFailed
from ..core.proc import first_line, run_group
from ..core.sealed import printable

SECONDS = 600.0
# Of memory, at most: an interpreter of microcontrollers takes its arena, the compiler of Ethos-U some hundred MiB.
MEMORY_BYTES = 8 * 2**30
MOST_FILE_BYTES = 2**30
LARGEST_ARENA = 64 * 2**20
ALIGNED = 16  # bytes
LACKS_CURE = "choose a network without, or a firmware that brings them"
LACKING = re.compile(r"Didn't find op for builtin opcode '(\w+)'")
BUILT_IN = re.compile(r"[A-Z][A-Z0-9_]{1,63}")
ARENA = re.compile(r"Arena allocation (total|head|tail) (\d+) bytes")


def asked(engine: str, *arguments: object, seconds: float = SECONDS) -> dict[str, Any]:
    """What an engine answers.

    Raises:
        GateFailed: it failed, crashed, or did not end in time.
    """
    module = f"{__name__.partition('.')[0]}.deploy.native"
    # -P: no module is imported from the folder where the command was given.
    command = [sys.executable, "-P", "-m", module, engine, *map(str, arguments), "--limit-seconds", str(seconds)]
    try:
        done = run_group(command, seconds)
    except subprocess.TimeoutExpired:
        raise GateFailed(f"{ENGINES[engine].name} did not end in {seconds:.0f} s") from None
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    said: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if "answer" in said:
        answer: dict[str, Any] = said["answer"]
        return answer
    if "lacks" in said:  # perhaps it crashed since
        raise GateFailed(f"{ENGINES[engine].name} lacks {printable(', '.join(said['lacks']), 500)}: {LACKS_CURE}")
    if "refused" in said:
        raise GateFailed(f"{ENGINES[engine].name} refuses the file: {printable(str(said['refused']), 500)}")
    if done.returncode < 0:
        how = f"crashed ({signal.Signals(-done.returncode).name})"
    else:
        told = done.stderr.decode(errors="replace").strip().splitlines()
        how = f"failed: {printable(told[-1], 300)}" if told else f"failed with exit code {done.returncode}"
    raise GateFailed(f"{ENGINES[engine].name} {how}")


# ---- in that process ---------------------------------------------------------------------------------------


class _Heard:
    """What native code prints to both streams, by their descriptors, goes into a file instead."""

    def __enter__(self) -> _Heard:
        self._file = tempfile.TemporaryFile()
        self._answers = os.fdopen(os.dup(1), "w")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            os.dup2(self._file.fileno(), descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()

    @property
    def text(self) -> str:
        """All so far, at most a megabyte."""
        self._file.flush()
        return os.pread(self._file.fileno(), 2**20, 0).decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        """Those that say something."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    def answer(self, **values: Any) -> None:
        """One line to whoever asked."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def _micro(args: argparse.Namespace, heard: _Heard) -> dict[str, Any]:
    """TFLM's interpreter on all inputs in an arena of so many bytes: outputs, and what it took of the arena.

    ``total``: the smallest arena that it runs in, to ``ALIGNED`` bytes. What its allocator counts, ``head`` and
    ``tail``, may be less: while it plans where tensors go it takes more.
    """
    from tflite_micro.python.tflite_micro.runtime import Interpreter

    data, inputs = args.model.read_bytes(), np.load(args.inputs, allow_pickle=False)
    outputs = []
    try:
        interpreter = Interpreter.from_bytes(data, arena_size=args.arena_bytes)
        for values in inputs:
            interpreter.set_input(values[None], 0)
            interpreter.invoke()
            outputs.append(np.array(interpreter.get_output(0)[0]))
    except RuntimeError as error:
        if LACKING.search(heard.text):
            _lacking(args.model, args.arena_bytes, heard)
        raise RuntimeError("; ".join(heard.lines[-2:]) or str(error)) from error  # what and where, most of the time
    np.save(args.outputs, np.stack(outputs))
    interpreter.print_allocations()
    counted = {name: int(count) for name, count in ARENA.findall(heard.text)}

    def runs_in(arena_bytes: int) -> bool:
        with contextlib.suppress(RuntimeError):
            interpreter = Interpreter.from_bytes(data, arena_size=arena_bytes)
            interpreter.set_input(inputs[:1], 0)
            interpreter.invoke()
            return np.array_equal(interpreter.get_output(0)[0], outputs[0])
        return False

    # Never below what is counted: in far too small an arena it crashes.
    low = enough = -(-counted["total"] // ALIGNED) * ALIGNED
    while not runs_in(enough):
        low, enough = enough, enough + max(enough - low, ALIGNED) * 2
        if enough > args.arena_bytes:
            raise RuntimeError(f"it runs in {args.arena_bytes} bytes of arena, and not in {low}")
    while enough - low > ALIGNED:
        middle = (low + enough) // 2 // ALIGNED * ALIGNED
        low, enough = (low, middle) if runs_in(middle) else (middle, enough)
    return {**counted, "total": enough}


def _lacking(path: Path, arena_bytes: int, heard: _Heard) -> None:
    """Answer which operators are not known, all of them: each that is found is left out, and the rest is asked about.

    What is left computes nothing any more and may crash, which is why every one is told at once.
    """
    from tflite_micro.python.tflite_micro.runtime import Interpreter

    from ..quantize.flatbuffer import Flatbuffer

    while True:
        known = list(dict.fromkeys(LACKING.findall(heard.text)))
        heard.answer(lacks=known)
        file = Flatbuffer(path)
        file.graph.operators = [each for each in file.graph.operators if file.kind(each) not in known]
        with tempfile.TemporaryDirectory() as scratch:
            rest = Path(scratch) / "rest.tflite"
            file.write(rest)
            with contextlib.suppress(RuntimeError):
                Interpreter.from_bytes(rest.read_bytes(), arena_size=arena_bytes)
        if len(set(LACKING.findall(heard.text))) == len(known):
            os._exit(0)  # the answer stands; nothing is cleaned up after a graph that makes no sense


def _reference(args: argparse.Namespace, _: _Heard) -> dict[str, Any]:
    """LiteRT's reference kernels on all inputs: outputs, and what goes in and out and is computed."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(str(args.model), num_threads=1, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    sides = {"input": interpreter.get_input_details(), "output": interpreter.get_output_details()}
    for name, found in sides.items():
        if len(found) != 1:
            raise ValueError(f"it has {len(found)} {name}s: wanted one")
    outputs = []
    for values in np.load(args.inputs, allow_pickle=False):
        interpreter.set_tensor(sides["input"][0]["index"], values[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(sides["output"][0]["index"])[0])
    np.save(args.outputs, np.stack(outputs))
    floats = {each["index"] for each in interpreter.get_tensor_details() if each["dtype"] == np.float32}
    kinds, in_float = [], []
    for operation in interpreter._get_ops_details():
        # That of a custom operator is anybody's text.
        kind = operation["op_name"] if BUILT_IN.fullmatch(operation["op_name"]) else "CUSTOM"
        kinds.append(kind)
        if kind not in ("QUANTIZE", "DEQUANTIZE") and floats & {*operation["inputs"], *operation["outputs"]}:
            in_float.append(kind)
    return {
        "operators": dict(Counter(kinds).most_common()),
        "in_float": dict(Counter(in_float)),
        **{
            name: {
                "shape": [int(side) for side in each["shape"]],
                "type": np.dtype(each["dtype"]).name,
                "scale": float(each["quantization"][0]),
                "zero_point": int(each["quantization"][1]),
            }
            for name, [each] in sides.items()
        },
    }


def _ethos(args: argparse.Namespace, heard: _Heard) -> dict[str, Any]:
    """Vela's estimate for an accelerator: a row of its summary."""
    import ethosu
    from ethosu.vela import vela

    # Its own file, by its whole path: one of that name may lie where the command was given.
    described = Path(ethosu.__path__[0]) / "config_files" / "Arm" / "vela.ini"
    with tempfile.TemporaryDirectory() as scratch:
        asked_for = ("--accelerator-config", args.accelerator, "--system-config", args.system_config)
        more = ("--memory-mode", args.memory_mode, "--config", str(described), "--output-dir", scratch)
        failed = vela.main([str(args.model), *asked_for, *more])
        rows = [row for path in Path(scratch).glob("*summary*.csv") for row in csv.DictReader(path.open())]
    if failed or not rows:
        raise RuntimeError("; ".join(heard.lines[-1:]))
    row = rows[-1]
    share = dict(re.findall(r"^(CPU|NPU) operators = (\d+)", heard.text, re.MULTILINE))
    return {
        "clock_hz": float(row["core_clock"]),
        "cycles": int(float(row["cycles_total"])),
        "inference_ms": 1e3 * float(row["inference_time"]),
        "sram_bytes": int(float(row["sram_memory_used"]) * 1024),
        "flash_bytes": int(float(row["off_chip_flash_memory_used"]) * 1024),
        "operators_on_npu": int(share["NPU"]),
        "operators_on_cpu": int(share["CPU"]),
    }


class _Engine(NamedTuple):
    name: str
    answer: Callable[[argparse.Namespace, _Heard], dict[str, Any]]


ENGINES = {
    "micro": _Engine("TFLM", _micro),
    "reference": _Engine("LiteRT", _reference),
    "ethos": _Engine("vela", _ethos),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kdpipe.deploy.native", description=__doc__)
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("model", type=Path)
    parser.add_argument("--inputs", type=Path, help=".npy of what the model takes, one a row")
    parser.add_argument("--outputs", type=Path, help=".npy to write")
    parser.add_argument("--arena-bytes", type=int, default=LARGEST_ARENA)
    for name in ("accelerator", "system-config", "memory-mode"):
        parser.add_argument(f"--{name}", help="as vela calls it")
    parser.add_argument("--limit-seconds", type=float, default=SECONDS)
    args = parser.parse_args()
    signal.setitimer(signal.ITIMER_REAL, args.limit_seconds)  # whoever asked may be gone, and cannot end this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, MOST_FILE_BYTES))
    with _Heard() as heard:
        try:
            heard.answer(answer=ENGINES[args.engine].answer(args, heard))
        except (Exception, SystemExit) as error:  # every one raises its own
            heard.answer(refused=first_line(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
