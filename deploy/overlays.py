"""Answers drawn over their images: one PNG an image, in a folder that keeps whatever else of the user's lies there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..core.errors import UserError
from ..core.proc import first_line
from ..core.sealed import printable
from ..runtime.overlay import overlay

MARK = ("Software", "kdpipe overlay")  # of the PNG files that may be written anew
LONGEST_STEM_BYTES = 220  # of an image's name, so that a file system that takes 255 takes its overlay's


def place(files: Sequence[Path], given: Iterable[Path], out: Path) -> list[Path]:
    """Where the overlay of each of ``files`` goes below ``out``: as below the folder that was given, else by its name.

    Nothing is written yet.

    Raises:
        UserError: something else than an overlay lies where one is to go, or ``out`` is no folder.
    """
    folders = [path for path in given if path.is_dir()]
    taken: set[str] = set()
    found = []
    for file in files:
        below = next((file.relative_to(folder) for folder in folders if file.is_relative_to(folder)), Path(file.name))
        stem = below.stem
        if len(os.fsencode(stem)) > LONGEST_STEM_BYTES:  # cut between two characters
            stem = os.fsencode(stem)[:LONGEST_STEM_BYTES].decode(errors="ignore")
        name, count = below.with_name(f"{stem}-overlay.png"), 1
        while str(name).casefold() in taken:
            count += 1
            name = below.with_name(f"{stem}-overlay-{count}.png")
        taken.add(str(name).casefold())
        found.append(out / name)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: wanted a folder for the overlays, with --out")
    for path in found:
        if (path.exists() or path.is_symlink()) and not _is_ours(path):
            raise UserError(f"{path} is there already, and no overlay of kdpipe's: name another folder with --out")
    return found


def _is_ours(path: Path) -> bool:
    from PIL import Image

    if path.is_symlink() or not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return bool(image.info.get(MARK[0]) == MARK[1])
    except Exception:  # every way of being another file
        return False


def write(image: np.ndarray, classes: np.ndarray, path: Path) -> None:
    """Draw a class map [H, W] over its image uint8 [H, W, 3], whole or not at all. Raises UserError."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text(*MARK)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as stream:
            Image.fromarray(overlay(image, classes)).save(stream, "PNG", pnginfo=mark)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write {printable(str(path))} ({first_line(error)}): is --out a folder?") from None
