"""Reading and checking a bundle with nothing but the standard library and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import RUNTIMES, open_session, predict, sealed
from .layout import sides
from .preprocess import RESIZES
from .weights import refuse_files_elsewhere

GOLDEN = "golden.npz"  # ``images`` uint8 [N, H, W, 3] and the ``logits`` that they gave where the bundle was packed
LARGEST_SIDE = 8192  # pixels
# Largest difference of a golden output, over the spread of the logits. INT8 kernels differ between
# instruction sets by a few steps of 1/256 of the range.
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
    """The golden images uint8 [N, H, W, 3] and the outputs float32 [N, ...] that they gave. Raises BundleError."""
    try:
        golden = sealed.load_arrays(folder / GOLDEN, {"images": ("u", 4), "logits": ("f", 2)})
    except sealed.Unsound as error:
        raise BundleError(str(error)) from None
    images, outputs = golden["images"], golden["logits"]
    (height, width), count = sides(facts["input"]), facts.get("golden_images")
    whole = images.shape == (count, height, width, 3) and len(outputs) == count
    if not whole or images.dtype != np.uint8 or outputs.dtype != np.float32:
        raise BundleError(
            f"golden images of shape {images.shape} with outputs of shape {outputs.shape} are not the {count} "
            f"of {height}x{width} pixels that the manifest promises"
        )
    return images, outputs


def replay_golden(folder: Path, facts: dict[str, Any], threads: int = 1, stand_in: bool = False) -> dict[str, Any]:
    """Run the golden inputs and compare with the outputs computed where the bundle was packed.

    Returns:
        images, largest absolute difference, the tolerance, and the runtime's own description.

    Raises:
        BundleError: an output of another shape, not finite or further off than the tolerance; a tolerance wider
            than the precision's own.
    """
    images, expected = read_golden(folder, facts)
    spread = float(expected.std(dtype=np.float64))
    tolerance, widest = facts.get("golden_tolerance"), TOLERANCES[facts["precision"]] * spread
    # The narrowest comparison that a stranger cannot widen: "not <=" is also true of what is no number.
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance <= widest * (1 + 1e-5):
        raise BundleError(f"a tolerance of {tolerance} for {facts['precision']}: wanted at most {widest:.3g}")
    session = open_session(folder, facts, threads, stand_in)
    actual = predict(session, images)
    if actual.shape != expected.shape:
        raise BundleError(f"golden outputs are of shape {expected.shape}, the model gives {actual.shape}")
    difference = float(np.abs(actual - expected).max())
    if not difference <= tolerance:
        raise BundleError(f"golden outputs are off by {difference:.3g}, tolerance {tolerance:.3g}")
    return {
        "golden_images": len(images),
        "max_difference": difference,
        "tolerance": tolerance,
        "session": session.describe(),
        "stand_in": stand_in,
    }
