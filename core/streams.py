"""The two streams of a command: results are never lost unnoticed, talk that nobody can hear is dropped."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class Results(io.FileIO):
    """Standard output: when it is full, that is told of it, and not of any file that the work may write."""

    def write(self, data: Any, /) -> int:
        """As ``io.FileIO`` does. Raises UserError for a full disk, BrokenPipeError where nobody reads any more."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            from .errors import UserError

            raise UserError(f"cannot write to standard output ({error.strerror}): what was sealed stays") from None


class Talk(io.FileIO):
    """Standard error: a disk that is full or a reader that is gone ends no work, whoever talks."""

    def write(self, data: Any, /) -> int:
        """As ``io.FileIO`` does; what cannot be written, now or ever, counts as written."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def talk(descriptor: int, like: TextIO | None = None, *, own: bool = False) -> TextIO:
    """A stream for what a person may hear; characters that its encoding lacks are spelled out.

    Args:
        like: has its encoding.
        own: the descriptor is closed along with it.
    """
    encoding = (like.encoding if like is not None else None) or "utf-8"
    raw = io.BufferedWriter(Talk(descriptor, "w", closefd=own))
    return io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)


def hold() -> bool:
    """Make the three streams of this process ours; says whether what is printed goes anywhere.

    What the caller closed is opened: else the first files would get their numbers, and whatever a library prints would
    go into them.
    """
    printed = sys.stdout is not None
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # it takes the lowest number that is free
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stderr = talk(2, sys.stderr)
    encoding = sys.stdout.encoding if printed else "utf-8"
    output = io.BufferedWriter(Results(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(output, encoding, "backslashreplace", line_buffering=os.isatty(1))
    return printed
