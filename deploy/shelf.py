"""Where releases lie: a folder or URL with ``NAME/VERSION`` in it, or a repository of the Hugging Face Hub.

What is published is whole or not there, and never replaced.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import UserError
from ..core.kinds import Release
from ..core.proc import first_line, quiet, require
from ..core.remote import AlreadyThere, RemoteFolder, fetch_folder, is_url, push_folder, shown
from ..core.sealed import printable
from .versions import Version

HUB = "hf://"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class Shelf(Protocol):
    """A place that releases are put to and taken from."""

    def versions(self, name: str) -> list[Version]:
        """Those of one name. Raises UserError where that cannot be asked."""

    def check_new(self, name: str, version: Version) -> None:
        """Raises UserError if that version is there."""

    def put(self, folder: Path, name: str, version: Version) -> str:
        """Publish a whole release; returns where it lies. Raises UserError, AlreadyThere."""

    def fetch(self, name: str, version: Version, folder: Path) -> Path:
        """Bring one into ``folder``, compared with its hashes. Raises UserError."""


def shelf(where: str) -> Shelf:
    """The one that a person means by a folder or URL. Raises UserError."""
    return Hub.parse(where) if where.startswith(HUB) else Folders(where)


def _parsed(texts: Iterable[str]) -> list[Version]:
    """Those of ``texts`` that are versions."""
    found = []
    for text in texts:
        with contextlib.suppress(UserError):
            found.append(Version.parse(text))
    return found


@dataclass(frozen=True)
class Folders:
    """``WHERE/NAME/VERSION`` in a folder of this machine, or at a URL of fsspec."""

    where: str

    def place(self, name: str, version: Version) -> str:
        """Where one lies."""
        if is_url(self.where):
            return f"{self.where.rstrip('/')}/{name}/{version}"
        return str(Path(self.where) / name / version.text)

    def versions(self, name: str) -> list[Version]:
        """As ``Shelf.versions``."""
        return _parsed((RemoteFolder(self.where) / name).folders())

    def check_new(self, name: str, version: Version) -> None:
        """As ``Shelf.check_new``."""
        place = self.place(name, version)
        if RemoteFolder(place).is_whole or (not is_url(place) and Path(place).exists()):
            raise AlreadyThere(f"{shown(place)} is there already: a version is never overwritten, release another one")

    def put(self, folder: Path, name: str, version: Version) -> str:
        """As ``Shelf.put``."""
        place = self.place(name, version)
        try:
            push_folder(folder, place)
        except AlreadyThere:
            raise AlreadyThere(
                f"{shown(place)} is there already: a version is never overwritten, release another one"
            ) from None
        return shown(place)

    def fetch(self, name: str, version: Version, folder: Path) -> Path:
        """As ``Shelf.fetch``."""
        return fetch_folder(self.place(name, version), folder, kind=Release)


@dataclass(frozen=True)
class Hub:
    """A repository of models on the Hugging Face Hub: its files are one release, its tags the versions.

    What is said to the Hub is said by its own client; none of it is exercised by kdpipe's tests, which have no Hub.
    """

    repository: str

    @classmethod
    def parse(cls, where: str) -> Hub:
        """Raises UserError for anything else than hf://ORGANISATION/REPOSITORY."""
        repository = where.removeprefix(HUB).removeprefix("models/").rstrip("/")
        if not REPOSITORY.fullmatch(repository):
            raise UserError(f"'{printable(where, 200)}': wanted hf://ORGANISATION/REPOSITORY, of models")
        require("the Hub", ("huggingface-hub",), "release")
        return cls(repository)

    def versions(self, name: str) -> list[Version]:
        """As ``Shelf.versions``: the tags, whatever the release is called."""
        with self._told("ask"):
            return _parsed(tag.name for tag in self._client().list_repo_refs(self.repository).tags)

    def check_new(self, name: str, version: Version) -> None:
        """As ``Shelf.check_new``; where there is no repository yet, everything is new."""
        from huggingface_hub.errors import RepositoryNotFoundError

        self._token()
        with self._told("ask"):
            try:
                tags = {tag.name for tag in self._client().list_repo_refs(self.repository).tags}
            except RepositoryNotFoundError:
                return
        if version.text in tags:
            raise AlreadyThere(
                f"{HUB}{self.repository} has a version {version} already: it is never overwritten, release another one"
            )

    def put(self, folder: Path, name: str, version: Version) -> str:
        """As ``Shelf.put``: all files in one commit that replaces what was there, then the tag, which names it."""
        self.check_new(name, version)
        client = self._client()
        with self._told("write"):
            client.create_repo(self.repository, exist_ok=True)
            before = client.repo_info(self.repository).sha
            commit = client.upload_folder(
                repo_id=self.repository,
                folder_path=folder,
                commit_message=f"{name} {version}",
                delete_patterns="*",
                parent_commit=before,  # whoever else pushes meanwhile is not overwritten
            )
            client.create_tag(self.repository, tag=version.text, revision=commit.oid)
        return f"{HUB}{self.repository}@{version}"

    def fetch(self, name: str, version: Version, folder: Path) -> Path:
        """As ``Shelf.fetch``."""
        return fetch_folder(f"{HUB}{self.repository}@{version}", folder, kind=Release)

    def _token(self) -> str:
        from huggingface_hub import get_token

        token = get_token()
        if token is None:
            raise UserError(f"no token to write to {HUB}{self.repository}: set HF_TOKEN, or log in with hf auth login")
        return token

    def _client(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(library_name="kdpipe")

    @contextlib.contextmanager
    def _told(self, what: str) -> Any:
        """What the client raises in one line, without its token."""
        from huggingface_hub import get_token

        try:
            with quiet():
                yield
        except UserError:
            raise
        except Exception as error:
            told = first_line(error)
            if token := get_token():
                told = told.replace(token, "***")
            raise UserError(
                f"cannot {what} {HUB}{self.repository}: {type(error).__name__}: {printable(told, 300)}"
            ) from None
