"""``kdpipe``, ``python -m kdpipe`` and ``torchrun -m kdpipe``: the command line, and what may happen around it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line.

    Ctrl-C is one line from the first import on, a stream that is closed harms no file, and a crash says where it was.
    """
    try:
        import faulthandler
        import os
        import signal

        from .core import streams
        from .core.errors import INTERRUPTED, ExitCode

        if not streams.hold():
            sys.stderr.write("kdpipe: standard output is closed: send it to a file, or to /dev/null\n")
            sys.exit(ExitCode.MISTAKE)
        # Where native code crashes, that is told: on a descriptor of its own, since 2 is nowhere while converters talk.
        faulthandler.enable(os.dup(2))

        def leave(*_: object) -> None:
            try:
                os.write(2, f"{INTERRUPTED}\n".encode())
            finally:
                os._exit(ExitCode.INTERRUPTED)

        # While libraries load an exception is not enough: extension modules make an error of their own of it. Nothing
        # has begun that would have to end.
        is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so in a job in the background
        if is_heard:
            signal.signal(signal.SIGINT, leave)
        from .cli import main as command_line
        from .core.proc import without_timms_tracker

        without_timms_tracker()
        if is_heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
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
