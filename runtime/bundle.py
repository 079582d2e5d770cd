"""Reading and checking a bundle with nothing but the standard library and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import RUNTIMES, open_session, predict, sealed
from .layout import sides
from .preprocess import RESIZES
from .weights import refuse_files_elsewhere

# ``images`` uint8 [N, H, W, 3] and the ``logits`` (or classes) that they gave where the bundle was packed; of outputs
# that have places perhaps every second or third of them, as ``golden_step`` says.
GOLDEN = "golden.npz"
LARGEST_STEP = 64
LARGEST_SIDE = 8192  # pixels
# Largest difference of a golden output, over the spread of the logits; of classes the share of an image's pixels that
# change. INT8 kernels differ between instruction sets by a few steps of 1/256 of the range.
TOLERANCES = {"float32": 1e-3, "float16": 0.01, "bf16": 0.05, "int8": 0.05}
# What opening a model reads of its facts, and of what type.
WANTED: dict[str, Any] = {
    "target": str,
    "precision": str,
    "entry": str,
    "input": {"layout": str, "dtype": str},
    "runtime": {},
}


class BundleError(Exception):
    """The bundle is not what its manifest says, or does not compute what it promised."""


def read_facts(folder: Path, *, hashed: bool = True) -> dict[str, Any]:
    """The facts of a bundle (or of the model it is made from): target, entry, input, golden tolerance.

    Args:
        hashed: check the files' hashes too, not only the manifest's own.

    Raises:
        BundleError: an edited manifest; a file that is missing, added, changed or outside the folder; a name, number
            or setting that no bundle has; a model that keeps weights elsewhere.
    """
    try:
        manifest = sealed.read_manifest(folder)
        sealed.check_files(folder, manifest["files"], sealed.LARGEST_MODEL_BYTES, hashed=hashed)
    except sealed.Unsound as error:
        raise BundleError(str(error)) from None
    if manifest["kind"] not in ("bundle", "model"):
        raise BundleError(f"{folder} is a {manifest['kind']}, wanted a bundle")
    facts: dict[str, Any] = manifest["facts"]
    check_facts(facts, WANTED, "")
    if facts["target"] not in RUNTIMES or facts.get("stand_in") not in (None, *RUNTIMES):
        raise BundleError(f"unknown runtime '{facts['target']}', wanted {', '.join(RUNTIMES)}")
    if facts["precision"] not in TOLERANCES:
        raise BundleError(f"unknown precision '{facts['precision']}', wanted {', '.join(TOLERANCES)}")
    given = facts["input"]
    known = given["layout"] in ("NCHW", "NHWC") and given["dtype"] == "float32"
    if not _is_size(given.get("size")) or not known or given.get("resize", "cover") not in RESIZES:
        raise BundleError(f"no input is like that: {sealed.printable(repr(given), 200)}")
    if facts["entry"] not in manifest["files"]:
        raise BundleError(f"bundle {folder} has no file '{facts['entry']}' to open")
    refuse_files_elsewhere(folder / facts["entry"])
    return facts


def _is_size(size: Any) -> bool:
    """Whether it is the side of a square, or height and width."""
    both = size if isinstance(size, list) else [size, size]
    return len(both) == 2 and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in both)


def check_facts(facts: Any, wanted: dict[str, Any], where: str) -> None:
    """See that a mapping has these members, of these types. Raises BundleError."""
    if not isinstance(facts, dict):
        raise BundleError(f"its manifest says nothing of '{where.rstrip('.')}'")
    for name, kind in wanted.items():
        value = facts.get(name)
        if isinstance(kind, dict):
            check_facts(value, kind, f"{where}{name}.")
        elif type(value) is not kind:
            raise BundleError(f"its manifest says {sealed.printable(repr(value), 80)} of '{where}{name}'")


def read_golden(folder: Path, facts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The golden images uint8 [N, H, W, 3] and what is kept of the outputs [N, ...] that they gave.

    Raises BundleError.
    """
    try:
        golden = sealed.load_arrays(folder / GOLDEN, {"images": ("u", 4), "logits": ("fu", 2)})
    except sealed.Unsound as error:
        raise BundleError(str(error)) from None
    images, outputs = golden["images"], golden["logits"]
    (height, width), count = sides(facts["input"]), facts.get("golden_images")
    whole = images.shape == (count, height, width, 3) and len(outputs) == count
    kinds = (np.float32, np.uint8) if outputs.ndim == 3 else (np.float32,)
    if not whole or images.dtype != np.uint8 or outputs.dtype not in kinds:
        raise BundleError(
            f"golden images of shape {images.shape} with outputs of shape {outputs.shape} are not the {count} "
            f"of {height}x{width} pixels that the manifest promises"
        )
    return images, outputs


def apart(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """How far outputs of the same images are apart [N], float64.

    Of logits [N, ...] the largest difference, beyond all where one is not finite; of classes of places, unsigned
    integers [N, ...], the share of places that are of another.
    """
    if expected.dtype.kind == "u":
        different = expected != actual
        return np.asarray(different.reshape(len(different), -1).mean(1))
    difference = np.where(np.isfinite(actual), np.abs(expected - actual), np.finfo(np.float32).max)
    return np.asarray(difference.reshape(len(difference), -1).max(1), np.float64)


def spread(outputs: np.ndarray) -> float:
    """The scale of what ``apart`` gives of outputs [N, ...]: shares are what they are."""
    return 1.0 if outputs.dtype.kind == "u" else float(outputs.std(dtype=np.float64))


def thinned(outputs: np.ndarray, step: int) -> np.ndarray:
    """Every so manieth place of outputs [N, ..., h, w], in both directions; of outputs without places all."""
    return outputs if outputs.ndim < 3 else outputs[..., ::step, ::step]


def replay_golden(folder: Path, facts: dict[str, Any], threads: int = 1, stand_in: bool = False) -> dict[str, Any]:
    """Run the golden inputs and compare with the outputs computed where the bundle was packed.

    Returns:
        images, largest absolute difference, the tolerance, and the runtime's own description.

    Raises:
        BundleError: an output of another shape, not finite or further off than the tolerance; a tolerance wider
            than the precision's own.
    """
    images, expected = read_golden(folder, facts)
    tolerance, widest = facts.get("golden_tolerance"), TOLERANCES[facts["precision"]] * spread(expected)
    # The narrowest comparison that a stranger cannot widen: "not <=" is also true of what is no number.
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance <= widest * (1 + 1e-5):
        raise BundleError(f"a tolerance of {tolerance} for {facts['precision']}: wanted at most {widest:.3g}")
    step = facts.get("golden_step", 1)
    if type(step) is not int or not 1 <= step <= LARGEST_STEP:
        raise BundleError(f"a golden step of {sealed.printable(repr(step), 80)}: wanted 1 to {LARGEST_STEP}")
    session = open_session(folder, facts, threads, stand_in)
    actual = thinned(predict(session, images), step)
    if actual.shape != expected.shape or actual.dtype.kind != expected.dtype.kind:
        raise BundleError(
            f"golden outputs are {expected.dtype} of shape {expected.shape}, the model gives {actual.dtype} "
            f"{actual.shape}"
        )
    difference = float(apart(expected, actual).max())
    if not difference <= tolerance:
        raise BundleError(f"golden outputs are off by {difference:.3g}, tolerance {tolerance:.3g}")
    return {
        "golden_images": len(images),
        "max_difference": difference,
        "tolerance": tolerance,
        "session": session.describe(),
        "stand_in": stand_in,
    }
