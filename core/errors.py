"""How a command may end, each way with its exit code; anything else is a bug of ours.

Every message is one line: what was wanted, what was found, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a command says to the one that called it."""

    DONE = 0
    REFUSED = 1  # the work was done, its result is not good enough
    MISTAKE = 2  # in what was given, or something is missing
    UNTRUSTED = 75  # a number that can't be trusted: measure again, or with more (EX_TEMPFAIL of sysexits.h)
    INTERRUPTED = 130
    PIPE_CLOSED = 141  # by whoever read what was printed


INTERRUPTED = (
    "kdpipe: interrupted; what was sealed stays, nothing half-written is left, and the same command goes on from there"
)


class KdpipeError(Exception):
    """Base of every failure that is told to the user without a traceback."""

    exit_code = ExitCode.MISTAKE
    stops_all = False  # whether what else there is to do cannot be done either


class UserError(KdpipeError):
    """Something the user gave is wrong or missing (exit 2)."""

    exit_code = ExitCode.MISTAKE


class DeviceLost(KdpipeError):
    """The link to a device is gone, or was never there: what was asked may or may not have happened (exit 2)."""


class GateFailed(KdpipeError):
    """The work was done and its result was refused (exit 1)."""

    exit_code = ExitCode.REFUSED


class Untrusted(KdpipeError):
    """A number was measured under conditions that forbid believing it (exit 75)."""

    exit_code = ExitCode.UNTRUSTED


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest choice, or the empty string when none is near."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    near = near or [choice for choice in known if len(word) > 2 and choice.startswith(word.lower())]
    return f"; did you mean '{known[near[0]]}'?" if near else ""


def choice(kind: str, word: str, choices: Iterable[str]) -> UserError:
    """The error for a word that is not among ``choices``."""
    choices = sorted(choices)
    listed = ", ".join(choices) if len(choices) <= 12 else f"one of {len(choices)}"
    return UserError(f"unknown {kind} '{word}', wanted {listed}{did_you_mean(word, choices)}")
