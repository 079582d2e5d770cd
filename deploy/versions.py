"""Names and versions of releases: ``NAME@VERSION``, in the order of Semantic Versioning 2.0.0."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import total_ordering
from typing import Self

from ..core.errors import UserError
from ..core.kinds import LONGEST_VERSION, VERSION
from ..core.sealed import NAME, printable

LATEST = "latest"


@total_ordering
@dataclass(frozen=True)
class Version:
    """A version; one is greater than another where semver.org (section 11) gives it precedence."""

    text: str
    numbers: tuple[int, int, int] = field(compare=False)
    before: tuple[str, ...] = field(compare=False)  # the identifiers of a pre-release; none of a release

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UserError for anything else than a version without build metadata."""
        found = VERSION.fullmatch(text) if len(text) <= LONGEST_VERSION else None
        if found is None or text.endswith(".part"):  # which is how a folder is called that is not whole
            raise UserError(
                f"'{printable(text, 80)}' is no version: wanted MAJOR.MINOR.PATCH such as 1.4.0, or 1.4.0-rc.1"
            )
        major, minor, patch, before = found.groups()
        return cls(text, (int(major), int(minor), int(patch)), tuple(before.split(".")) if before else ())

    def __lt__(self, other: Version) -> bool:
        return self._rank < other._rank

    def __str__(self) -> str:
        return self.text

    @property
    def _rank(self) -> tuple[tuple[int, int, int], bool, tuple[tuple[bool, int, str], ...]]:
        """Numbers come before words, and a pre-release before its release."""
        before = tuple((not each.isdigit(), int(each) if each.isdigit() else 0, each) for each in self.before)
        return self.numbers, not self.before, before


def named(text: str) -> tuple[str, Version | None]:
    """Name and version of ``NAME@VERSION``; None for ``NAME@latest``. Raises UserError."""
    name, at, version = text.partition("@")
    if not at or not NAME.fullmatch(name) or name.endswith(".part"):
        raise UserError(
            f"wanted NAME@VERSION such as birds@1.4.0, NAME of letters, digits and . _ -, found '{printable(text, 80)}'"
        )
    return name, None if version == LATEST else Version.parse(version)


def newest(name: str, versions: list[Version], where: str) -> Version:
    """The one that has precedence; a pre-release only where there is nothing else. Raises UserError for none."""
    if not versions:
        raise UserError(f"no release of '{name}' at {where}: wanted one that kdpipe release put there")
    return max([version for version in versions if not version.before] or versions)
