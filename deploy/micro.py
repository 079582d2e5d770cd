"""The check stage: a bundle held against a microcontroller, by the interpreter that runs there. No firmware is built.

Both interpreters and the compiler of Ethos-U run native code on the file: each in a process of its own (``native``),
on a copy whose hash was compared with the manifest's.
"""

from __future__ import annotations

import hashlib
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ..core.artifact import Order, drafting
from ..core.config import McuConfig
from ..core.errors import GateFailed, UserError
from ..core.kinds import Arena, Bundle, Estimate, McuCheck, McuFacts, Port
from ..core.proc import require
from ..core.progress import progress
from ..core.sealed import printable
from ..data.dataset import Dataset, load_images
from ..runtime.bundle import BundleError, read_facts, read_golden
from .native import asked

NEEDS = ("tflite-micro", "ai-edge-litert")
NEEDED_BY_ESTIMATES = ("ethos-u-vela",)
VARIANT = "int8-full"
# By family of accelerators: the machine around it, of those that vela brings, and where its tensors lie. Of each the
# one whose weights come from flash, as on a microcontroller.
AROUND = {
    "ethos-u55": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65": ("Ethos_U65_Embedded", "Shared_Sram"),
    "ethos-u85": ("Ethos_U85_SYS_Flash_High", "Shared_Sram"),
}
ALIGNMENT = 16  # bytes, as the interpreter wants arena and model
A_LINE = 16  # bytes of the array


def check(order: Order[McuConfig], bundle: Bundle, dataset: Dataset | None, out: Path) -> McuCheck:
    """Run a bundle's model in TFLM and by LiteRT's reference kernels, and hold what it takes against the limits.

    What is refused is sealed too, without the array.

    Raises:
        UserError: a bundle of another variant or altered, images of other classes, a missing package.
        GateFailed: an interpreter refuses the file, lacks an operator, crashes, or does not end.
    """
    config = order.config
    check_ready(config, bundle, dataset)
    with drafting(McuCheck, order, out) as draft, tempfile.TemporaryDirectory() as scratch:
        model, inputs = Path(scratch) / "model.tflite", Path(scratch) / "inputs.npy"
        content = bundle.file(bundle.facts.entry).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != bundle.manifest.files[bundle.facts.entry].sha256:
            raise UserError(f"{bundle.path} was changed while it was read: get it again")
        model.write_bytes(content)
        images = _images(config, bundle, dataset)
        np.save(inputs, images)
        with progress("asking both interpreters", 2) as advance:
            by_litert, reference = _run("reference", model, inputs)
            advance(1, "")
            by_tflm, allocated = _run("micro", model, inputs)
            advance(1, "")
        different, largest = compared(by_litert, by_tflm)
        estimates = tuple(_estimates(config, model))
        try:
            facts = McuFacts(
                model=bundle.facts.model,
                images=len(images),
                different=different,
                largest_difference=largest,
                arena=Arena(**allocated),
                ram_bytes=config.ram,
                model_bytes=len(content),
                flash_bytes=config.flash,
                sha256=sha256,
                input=Port(**reference["input"]),
                output=Port(**reference["output"]),
                operators=reference["operators"],
                in_float=reference["in_float"],
                estimates=estimates,
                refused=(),
            )
        except ValidationError as error:
            raise GateFailed(f"{bundle.path}: {printable(str(error.errors()[0]['msg']), 300)}") from None
        draft.facts = facts = facts.model_copy(update={"refused": tuple(_refused(facts))})
        if not facts.refused:
            (draft.path / McuCheck.HEADER).write_text(header(facts), encoding="ascii")
            (draft.path / McuCheck.SOURCE).write_text(source(content), encoding="ascii")
    return draft.artifact


def check_ready(config: McuConfig, bundle: Bundle, dataset: Dataset | None) -> None:
    """Refuse before any work what cannot be checked. Raises UserError."""
    facts = bundle.facts
    if facts.target != "tflite" or not facts.runtime.get("bytes_input"):
        raise UserError(
            f"{bundle.path} is {facts.variant} of {facts.target}: wanted {VARIANT} of tflite, bytes in and out; "
            f"make it of the float32 model by kdpipe quantize MODEL --variant {VARIANT}, then kdpipe package"
        )
    require("kdpipe check --mcu", (*NEEDS, *(NEEDED_BY_ESTIMATES if config.accelerators else ())), "mcu")
    if dataset is not None:
        dataset.check_classes_of(bundle, "the bundle")


def _images(config: McuConfig, bundle: Bundle, dataset: Dataset | None) -> np.ndarray:
    """uint8 [N, H, W, 3]: the golden ones, and of a dataset's test part as many as are wanted."""
    try:
        golden, _ = read_golden(bundle.path, read_facts(bundle.path))
    except BundleError as error:
        raise UserError(f"{bundle.path}: {printable(str(error), 300)}") from None
    if dataset is None:
        return golden
    samples = dataset.balanced("test", config.images, seed=0)
    return np.concatenate([golden, load_images(samples, bundle.facts.input.model_dump())])


def _run(engine: str, model: Path, inputs: Path, *more: object) -> tuple[np.ndarray, dict[str, Any]]:
    """An interpreter's outputs [N, ...] and what else it answers."""
    outputs = model.with_name(f"{engine}.npy")
    outputs.unlink(missing_ok=True)
    found = asked(engine, model, "--inputs", inputs, "--outputs", outputs, *more)
    return np.load(outputs, allow_pickle=False), found


def compared(expected: np.ndarray, actual: np.ndarray) -> tuple[int, int]:
    """Of how many images [N, ...] any output is another one, and the largest difference. Raises GateFailed."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise GateFailed(
            f"TFLM gives {actual.dtype} of shape {actual.shape}, LiteRT {expected.dtype} of {expected.shape}"
        )
    if expected.dtype.kind not in "iu":
        raise GateFailed(f"the outputs are {expected.dtype}: wanted integers")
    difference = np.abs(expected.astype(np.int64) - actual).reshape(len(expected), -1)
    return int((difference.max(1) > 0).sum()), int(difference.max())


def _estimates(config: McuConfig, model: Path) -> Iterator[Estimate]:
    if not config.accelerators:
        return
    with progress("estimating Ethos-U", len(config.accelerators)) as advance:
        for name in config.accelerators:
            system, memory = AROUND[name.rpartition("-")[0]]
            around = {"accelerator": name, "system_config": system, "memory_mode": memory}
            options = ("--accelerator", name, "--system-config", system, "--memory-mode", memory)
            try:
                yield Estimate(**around, **asked("ethos", model, *options))
            except GateFailed as error:
                yield Estimate(**around, fault=str(error))
            advance(1, name)


def _refused(facts: McuFacts) -> Iterator[str]:
    if facts.different:
        yield (
            f"TFLM gives other integers than LiteRT's reference kernels for {facts.different} of {facts.images} "
            f"images, by {facts.largest_difference} at most"
        )
    if facts.arena.total > facts.ram_bytes:
        yield f"the arena takes {facts.arena.total:,} bytes of the {facts.ram_bytes:,} of --ram"
    if facts.model_bytes > facts.flash_bytes:
        yield f"the model takes {facts.model_bytes:,} bytes of the {facts.flash_bytes:,} of --flash"


# ---- in words, and in C++ ----------------------------------------------------------------------------------


def lines(facts: McuFacts) -> Iterator[str]:
    """What a terminal shows."""
    same = "the same integers" if not facts.different else f"{facts.different} with other integers"
    yield f"TFLM and LiteRT's reference kernels on {facts.images} images: {same}"
    yield f"arena: {facts.arena.total:,} bytes of {facts.ram_bytes:,} (activations {facts.arena.head:,})"
    yield f"flash: {facts.model_bytes:,} bytes of {facts.flash_bytes:,}, the interpreter's own code not counted"
    yield f"operators: {', '.join(f'{count} {kind}' for kind, count in facts.operators.items())}"
    if facts.in_float:
        yield f"of them in float: {', '.join(f'{count} {kind}' for kind, count in facts.in_float.items())}"
    for each in facts.estimates:
        where = f"{each.accelerator} ({each.system_config}, {each.memory_mode})"
        if each.fault is not None:
            yield f"{where}: no estimate, {each.fault}"
        else:
            yield (
                f"{where}, an estimate and no measurement: {each.cycles:,} cycles, {each.inference_ms:.3g} ms, "
                f"{each.sram_bytes:,} bytes of SRAM; {each.operators_on_cpu} operators are left to the CPU"
            )
    yield "no firmware was built, and nothing ran on a microcontroller"


def header(facts: McuFacts) -> str:
    """kdpipe_model.h: the model's sizes, hash and what its input and output stand for."""
    guard = "KDPIPE_MODEL_H_"
    operators = "\n".join(f"//   {line}" for line in textwrap.wrap(", ".join(facts.operators), 110))
    values = {
        "BYTES": facts.model_bytes,
        # Of the interpreter that counted, with pointers of 8 bytes.
        "ARENA_BYTES": facts.arena.total,
        "ALIGNMENT": ALIGNMENT,
        "SHA256": f'"{facts.sha256}"',
        "INPUT_BYTES": int(np.prod(facts.input.shape)),
        "INPUT_HEIGHT": facts.input.shape[1],
        "INPUT_WIDTH": facts.input.shape[2],
        "OUTPUT_BYTES": int(np.prod(facts.output.shape)),
        "OUTPUT_SCALE": f"{facts.output.scale!r}f",
        "OUTPUT_ZERO_POINT": facts.output.zero_point,
    }
    defined = "\n".join(f"#define KDPIPE_MODEL_{name} {value}" for name, value in values.items())
    return f"""\
// A model of kdpipe for TensorFlow Lite for Microcontrollers.
//
// Input: the pixels as they are, 1 byte each of R, G, B, row by row; normalisation is in the weights.
// Output: KDPIPE_MODEL_OUTPUT_SCALE * (value - KDPIPE_MODEL_OUTPUT_ZERO_POINT) are the logits, in the order of the
// bundle's labels.json.
// The arena's bytes were counted on a host whose pointers have 8 bytes.
// Operators that the resolver must know:
{operators}

#ifndef {guard}
#define {guard}

{defined}

extern const unsigned char kdpipe_model[KDPIPE_MODEL_BYTES];

#endif  // {guard}
"""


def source(content: bytes) -> str:
    """kdpipe_model.cc: the model's bytes, aligned as its interpreter reads them."""
    rows = (content[at : at + A_LINE] for at in range(0, len(content), A_LINE))
    text = "\n".join("    " + " ".join(f"0x{byte:02x}," for byte in row) for row in rows)
    return f"""\
#include "{McuCheck.HEADER}"

alignas(KDPIPE_MODEL_ALIGNMENT) const unsigned char kdpipe_model[KDPIPE_MODEL_BYTES] = {{
{text}
}};
"""
