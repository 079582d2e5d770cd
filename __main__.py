"""``kdpipe``, ``python -m kdpipe`` and ``torchrun -m kdpipe``: the command line, and what may happen around it."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def main() -> None:
    """Run the command line. Ctrl-C is one line from the first import on, and a stream that is closed harms no file."""
    printed = _hold_streams()
    try:
        from .core.errors import ExitCode

        if not printed:
            sys.stderr.write("kdpipe: standard output is closed: send it to a file, or to /dev/null\n")
            sys.exit(ExitCode.MISTAKE)
        from .cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        from .core.errors import INTERRUPTED, ExitCode

        sys.stderr.write(f"{INTERRUPTED}\n")
        sys.exit(ExitCode.INTERRUPTED)
    finally:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is Python's own end, which would show a traceback


def _hold_streams() -> bool:
    """Open what the caller closed of the three streams; says whether what is printed goes anywhere.

    Else the first files that are opened would get their numbers, and whatever a library prints would go into them.
    """
    printed = sys.stdout is not None
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # it takes the lowest number that is free
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    encoding = sys.stdout.encoding if printed else "utf-8"
    output = io.BufferedWriter(_Output(1, "w", closefd=False))
    # What an encoding has no sign for is spelled out.
    sys.stdout = io.TextIOWrapper(output, encoding, "backslashreplace", line_buffering=os.isatty(1))
    return printed


class _Output(io.FileIO):
    """Standard output: when it is full, that is told of it, and not of any file that the work may write."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            from .core.errors import UserError

            raise UserError(f"cannot write to standard output ({error.strerror}): what was sealed stays") from None


if __name__ == "__main__":
    main()
