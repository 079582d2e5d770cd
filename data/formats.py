"""Which files are images: Pillow's own decoders, and HEIC where pillow-heif is installed."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..core.errors import UserError
from ..core.proc import is_installed
from ..runtime import preprocess

if TYPE_CHECKING:
    from PIL import Image

# By these names a file is taken for an image of a format that ``runtime.preprocess`` reads, whatever their case.
SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .avif .avifs .heic .heif .hif .tif .tiff .bmp .dib .gif .ppm .pgm "
    b".pbm .pnm .pfm .jp2 .j2k .jpc .jpf .jpx .j2c .qoi .dds .psd .sgi .rgb .bw .ico .pcx .tga".split()
)
# Formats whose files begin with a mark of their own: by it one without a suffix is known.
MARKED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIF", "JPEG2000", "QOI", "DDS", "PSD")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")


def has_suffix(name: bytes) -> bool:
    """Whether a file's name says that it is an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 (bytes)


def is_marked(path: bytes) -> bool:
    """Whether a file's first bytes say that it is an image."""
    from PIL import Image

    _set_up()
    # Each decoder raises its own; what cannot be opened is no image by its mark, and is told among the others.
    with contextlib.suppress(Exception), open(path, "rb") as stream:  # noqa: PTH123 (bytes)
        if _is_heic(stream.read(12)):
            return True
        stream.seek(0)
        with Image.open(stream, formats=preprocess.available(MARKED)):
            return True
    return False


@contextlib.contextmanager
def opened(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """As ``runtime.preprocess.opened``, HEIC too.

    Raises:
        OSError: as that one does.
        UserError: an image that wants pillow-heif, which is not installed.
    """
    _set_up()
    try:
        with preprocess.opened(source) as image:
            yield image
    except OSError:
        if isinstance(source, Path) and not is_installed("pillow-heif") and _starts_as_heic(source):
            raise UserError(f"image {source} is HEIC, which needs pillow-heif: pip install 'kdpipe[heic]'") from None
        raise


def decode(source: Path | BinaryIO) -> Image.Image:
    """An image file as 8-bit RGB, as ``runtime.preprocess.decode`` has it; raises as ``opened`` does."""
    with opened(source) as image:
        return preprocess.as_rgb(image)


@functools.cache
def _set_up() -> None:
    """Teach Pillow HEIC; silence its warnings: what is broken is told by name, what is merely odd is read."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if is_installed("pillow-heif"):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def _is_heic(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def _starts_as_heic(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return _is_heic(stream.read(12))
    except OSError:
        return False
