"""Reading and checking a bundle with nothing but the standard library and numpy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from . import open_session, predict

GOLDEN = "golden.npz"  # ``images`` uint8 [N, H, W, 3] and the ``logits`` that they gave where the bundle was packed


class BundleError(Exception):
    """The bundle is not what its manifest says, or does not compute what it promised."""


def read_facts(folder: Path) -> dict[str, Any]:
    """The bundle's facts (target, entry, input, golden tolerance) after checking every file's hash.

    Raises:
        BundleError: a file is missing, added, changed or outside the folder.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        pure = PurePosixPath(name)
        path = folder / name
        if pure.is_absolute() or ".." in pure.parts or path.is_symlink() or not path.is_file():
            raise BundleError(f"bundle {folder}: '{name}' is missing or not a plain file inside it")
        if _sha256(path) != record["sha256"]:
            raise BundleError(f"bundle {folder}: '{name}' differs from its manifest")
    facts: dict[str, Any] = manifest["facts"]
    return facts


def _sha256(path: Path) -> str:
    """In chunks: a whole file in memory would raise the peak that ``measure`` reads."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(2**20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def replay_golden(folder: Path, facts: dict[str, Any], threads: int = 1, stand_in: bool = False) -> dict[str, Any]:
    """Run the golden inputs and compare with the logits computed where the bundle was packed.

    Returns:
        images, largest absolute difference, the tolerance, and the runtime's own description.

    Raises:
        BundleError: an output further off than the tolerance, or not finite.
    """
    with np.load(folder / GOLDEN, allow_pickle=False) as golden:
        images, expected = golden["images"], golden["logits"]
    session = open_session(folder, facts, threads, stand_in)
    actual = predict(session, images)
    difference = float(np.abs(actual - expected).max())
    tolerance = float(facts["golden_tolerance"])
    if not np.isfinite(actual).all() or difference > tolerance:
        raise BundleError(f"golden outputs are off by {difference:.3g}, tolerance {tolerance:.3g}")
    return {
        "golden_images": len(images),
        "max_difference": difference,
        "tolerance": tolerance,
        "session": session.describe(),
        "stand_in": stand_in,
    }
