"""TensorRT: an engine is built on the device itself and lies beside the bundle.

Never exercised on hardware by this project's tests: no TensorRT can be had where they run. The names that are used here
are those of its Python bindings 10.16 and 11.4.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import sealed
from .beside import beside
from .layout import sides, to_input
from .strange import random_values

MOST_OF_MEMORY = 0.75  # of what is free when building begins, that it may take
LEAST_FREE = 0.05  # of all memory: a GPU that shares it takes what no process is charged with
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


class EngineError(Exception):
    """No engine for this device, or none could be built; the text is one line for a person."""


def this_machine() -> dict[str, Any]:
    """What an engine fits, and nothing else: the GPU, TensorRT's version and the driver's. Raises EngineError."""
    try:
        import tensorrt
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        needs = " ".join(TensorRtSession.needs)
        raise EngineError(f"no engine can be built or opened here ({error}): pip install {needs}") from None
    properties = checked(cuda, cuda.cudaGetDeviceProperties(0))
    return {
        "gpu": properties.name.decode(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "tensorrt": tensorrt.__version__,
        "driver": checked(cuda, cuda.cudaDriverGetVersion()),
    }


def checked(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """What a call of CUDA answered. Raises RuntimeError."""
    if answer[0] != cuda.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA answered {answer[0].name}")
    return answer[1] if len(answer) > 1 else None


def engine_name(machine: dict[str, Any]) -> str:
    """The file name of the engine for a machine: another one for another GPU, TensorRT or driver."""
    return hashlib.sha256(sealed.canonical(machine)).hexdigest()[:16] + ".engine"


def find_engine(folder: Path, machine: dict[str, Any]) -> Path:
    """The engine of the bundle in ``folder`` that this machine built, checked against its hash.

    Raises:
        EngineError: none, one of another machine, or a damaged one; with what to do.
    """
    place, cure = beside(folder), f"build it here: python3 -m runtime build {folder}"
    records = {path: _record(path) for path in sorted(place.glob("*.engine.json"))} if place.is_dir() else {}
    path = place / engine_name(machine)
    record = records.pop(path.with_name(path.name + ".json"), None)
    if record is not None and record["machine"] == machine:
        if path.is_file() and not path.is_symlink() and sealed.sha256_file(path) == record["sha256"]:
            return path
        raise EngineError(f"the engine {path} is damaged: {cure}")
    for foreign in filter(None, records.values()):
        raise EngineError(
            f"the engine beside {folder} is for {_words(foreign['machine'])}, this is {_words(machine)}: {cure}"
        )
    raise EngineError(f"no engine of {folder} for {_words(machine)}: {cure}")


def _record(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(sealed.Unsound, OSError):
        record = sealed.read_json(path, sealed.MIB)
        if isinstance(record, dict) and isinstance(record.get("machine"), dict) and "sha256" in record:
            return record
    return None


def _words(machine: dict[str, Any]) -> str:
    said = f"{machine.get('gpu')} with TensorRT {machine.get('tensorrt')} and driver {machine.get('driver')}"
    return sealed.printable(said, 120)


def build_engine(folder: Path, facts: dict[str, Any]) -> Path:
    """The engine of the bundle in ``folder`` for this machine; built if it is not there, by one process at a time.

    Raises:
        EngineError: no TensorRT here, a graph that it refuses, or more memory wanted than there is.
    """
    machine = this_machine()
    place = beside(folder)
    place.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # who waits finds it built
        with contextlib.suppress(EngineError):
            return find_engine(folder, machine)
        path = place / engine_name(machine)
        part = path.with_name(path.name + ".part")
        free = memory()["MemAvailable"]
        code = f"import sys; from {__package__}.tensorrt import write_engine; write_engine(*sys.argv[1:])"
        model, shape = str(folder / facts["entry"]), map(str, sides(facts["input"]))
        limit_bytes = round(MOST_OF_MEMORY * free)
        run_within(limit_bytes, [sys.executable, "-c", code, model, *shape, str(limit_bytes // 2), str(part)])
        record = {"machine": machine, "sha256": sealed.sha256_file(part)}
        path.with_name(path.name + ".json").unlink(missing_ok=True)
        part.rename(path)
        kept = path.with_name(path.name + ".json.part")
        with kept.open("w") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        kept.rename(path.with_name(path.name + ".json"))  # an engine counts when its record is there
        os.fsync(descriptor)
        return path
    finally:
        os.close(descriptor)


def write_engine(model: str, height: str, width: str, workspace_bytes: str, path: str) -> None:
    """Build the engine of an ONNX file for one image at a time into ``path``: in a process of its own.

    Precision stands in the graph: 11.x knows nothing else, 10.x is told.
    """
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(model):
        raise EngineError(str(parser.get_error(0)))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, int(workspace_bytes))
    profile = builder.create_optimization_profile()
    shape = (1, 3, int(height), int(width))
    profile.set_shape(network.get_input(0).name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError("TensorRT built nothing")
    with Path(path).open("wb") as stream:
        stream.write(engine)
        stream.flush()
        os.fsync(stream.fileno())


def run_within(limit_bytes: int, command: Sequence[str]) -> None:
    """Run a command to its end, and end it where it takes more memory, or leaves the machine too little.

    Raises:
        EngineError: it was ended, or failed.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while process.poll() is None:
                machine = memory()
                if _resident(process.pid) > limit_bytes or machine["MemAvailable"] < LEAST_FREE * machine["MemTotal"]:
                    raise EngineError(
                        f"building the engine wanted more than the {limit_bytes >> 20} MiB that it may take here: "
                        f"end what else takes memory"
                    )
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise EngineError(f"building the engine failed: {sealed.printable(lines[-1], 400)}")


def memory() -> dict[str, int]:
    """Bytes of this machine's memory, as the kernel names them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}


def _resident(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS:", "VmSwap:")))


class TensorRtSession:
    needs: tuple[str, ...] = ("tensorrt", "cuda-python")
    modules: tuple[tuple[str, ...], ...] = (("tensorrt",), ("cuda.bindings.runtime",))
    batched: bool = False
    compile_ns: int | None = None  # the engine was built before

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        engine = find_engine(folder, this_machine())  # says what is missing
        import tensorrt
        from cuda.bindings import runtime as cuda

        self._spec = facts["input"]
        self._cuda = cuda
        self._version = tensorrt.__version__
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise EngineError(f"TensorRT refuses {engine}: remove it, and build it here again")
        self._context = self._engine.create_execution_context()
        self._input, self._output = (self._engine.get_tensor_name(at) for at in range(2))
        self._stream = self._checked(cuda.cudaStreamCreate())
        height, width = sides(self._spec)
        self._context.set_input_shape(self._input, (1, 3, height, width))
        kind = tensorrt.nptype(self._engine.get_tensor_dtype(self._output))  # float32; of classes uint8, never run here
        self._outputs = np.empty(tuple(self._context.get_tensor_shape(self._output)), kind)
        self._device_image = self._checked(cuda.cudaMalloc(4 * 3 * height * width))
        self._device_outputs = self._checked(cuda.cudaMalloc(self._outputs.nbytes))
        self._context.set_tensor_address(self._input, self._device_image)
        self._context.set_tensor_address(self._output, self._device_outputs)

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        return checked(self._cuda, answer)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return to_input(images, self._spec)

    def infer(self, prepared: np.ndarray) -> np.ndarray:
        kinds, copy = self._cuda.cudaMemcpyKind, self._cuda.cudaMemcpyAsync
        to_device = (prepared.ctypes.data, prepared.nbytes, kinds.cudaMemcpyHostToDevice)
        self._checked(copy(self._device_image, *to_device, self._stream))
        self._context.execute_async_v3(self._stream)
        to_host = (self._device_outputs, self._outputs.nbytes, kinds.cudaMemcpyDeviceToHost)
        self._checked(copy(self._outputs.ctypes.data, *to_host, self._stream))
        self._checked(self._cuda.cudaStreamSynchronize(self._stream))
        return self._outputs

    def random(self, generator: np.random.Generator) -> np.ndarray:
        shape = tuple(self._context.get_tensor_shape(self._input))
        return random_values(generator, self._input, shape, np.float32)

    def executed(self, prepared: np.ndarray) -> dict[str, int] | None:
        return None  # an engine tells of its layers only where it was built to

    def describe(self) -> dict[str, Any]:
        inside = ["a copy of the input to the GPU", "a copy of the outputs from it"]
        return {"runtime": "tensorrt", "version": self._version, "threads": 1, "inside": inside}
