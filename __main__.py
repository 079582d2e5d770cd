"""``kdpipe``, ``python -m kdpipe`` and ``torchrun -m kdpipe``: the command line, and what may happen around it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C is one line from the first import on, and a stream that is closed harms no file."""
    try:
        from .core import streams
        from .core.errors import ExitCode

        if not streams.hold():
            sys.stderr.write("kdpipe: standard output is closed: send it to a file, or to /dev/null\n")
            sys.exit(ExitCode.MISTAKE)
        from .cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        from .core.errors import INTERRUPTED, ExitCode

        if sys.stderr is not None:  # not held yet
            sys.stderr.write(f"{INTERRUPTED}\n")
        sys.exit(ExitCode.INTERRUPTED)
    finally:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is Python's own end, which would show a traceback


if __name__ == "__main__":
    main()
