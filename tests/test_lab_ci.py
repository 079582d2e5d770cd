"""The repository of docs/ci.md, made of its own blocks: every ``run:`` of its workflow and of the action, in order.

A request, a request that is judged, a first tag, a second one, and a machine without torch that pulls what was
published. What is GitHub's own (checkout, caches, uploads) is left out; its API is a server on loopback that keeps what
it is sent.
"""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from actions import Runner, the_environment
from test_ci import blocks
from test_house import clone_to

pytestmark = pytest.mark.lab

WORKFLOW = ".github/workflows/model.yml"
TOKEN = "token-of-the-lab"


@dataclass
class Api:
    """What GitHub's API was sent."""

    url: str = ""
    sent: list[tuple[str, str, Any]] = field(default_factory=list)  # path, authorization, JSON


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    kept = Api()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            kept.sent.append((self.path, self.headers["Authorization"], json.loads(content)))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    kept.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield kept
    server.shutdown()
    thread.join()
    server.server_close()


def closure(names: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """What these distributions need here, themselves among them, by their normalised names."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    queue = [Requirement(name) for name in names]
    while queue:
        wanted = queue.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in found and not wanted.extras:
            continue
        found[name] = importlib.metadata.distribution(wanted.name)
        for needed in map(Requirement, found[name].requires or ()):
            extras = ("", *wanted.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(needed)
    return found


def environment_of(folder: Path, only: Sequence[str] = ()) -> Path:
    """A new environment: with all of this one's packages but kdpipe, or with what ``only`` needs; its Python."""
    venv.create(folder, with_pip=not only, symlinks=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    if not only:
        remove = [folder / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"]
        subprocess.run(remove, check=True)  # which may be older than what builds kdpipe, and would be found first
        here = [path for path in sys.path if Path(path).name == "site-packages"]
        (site / "packages.pth").write_text("\n".join(here) + "\n")
        return folder / "bin" / "python"
    for name, distribution in closure(only).items():
        if name == "kdpipe":
            continue
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if not (site / top).exists() and source.exists():
                (site / top).symlink_to(source)
    return folder / "bin" / "python"


@dataclass
class Forge:
    """A repository of a model, and what a job of it finds on its runner."""

    folder: Path
    python: Path
    action: Path
    api: Api
    key: str

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def releases(self) -> Path:
        return self.folder / "releases"

    def git(self, *arguments: str) -> str:
        line = ["git", "-c", "user.name=lab", "-c", "user.email=lab@example.org", *arguments]
        return subprocess.run(line, cwd=self.repository, capture_output=True, text=True, check=True).stdout.strip()

    def job(self, name: str, **github: Any) -> tuple[Runner, bool | None]:
        """A job of the workflow, on a runner that keeps the folder of artifacts."""
        temporary = self.folder / f"temporary-{len(list(self.folder.iterdir()))}"
        temporary.mkdir()
        contexts = {
            "github": {
                "sha": self.git("rev-parse", "HEAD"),
                "repository": "acme/digits",
                "api_url": self.api.url,
                "token": TOKEN,
                **github,
            },
            "vars": {"RELEASES": str(self.releases)},
            "secrets": {"RELEASE_KEY": self.key},
        }
        environment = the_environment(self.python)
        for what in ("CONFIG", "DATA", "STATE", "CACHE"):
            environment[f"XDG_{what}_HOME"] = str(self.folder / "home")
        # pip finds everything here: nothing is fetched, and the sources are built with what is installed (which pip
        # takes from this variable by its negation).
        environment |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "OMP_WAIT_POLICY": "PASSIVE"}
        runner = Runner(self.repository, temporary, self.action, contexts, environment)
        return runner, runner.job(self.repository / WORKFLOW, name)

    def tag(self, name: str) -> tuple[Runner, bool | None]:
        """The release job of a new tag."""
        self.git("commit", "--quiet", "--allow-empty", "--message", name)
        self.git("tag", name)
        return self.job("release", event_name="push", ref=f"refs/tags/{name}", ref_name=name, event={})


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory, api: Api) -> Forge:
    """The blocks of docs/ci.md written out and committed; a runner on which nothing of kdpipe is installed yet."""
    folder = tmp_path_factory.mktemp("forge")
    repository, action = folder / "repository", folder / "action"
    repository.mkdir()
    clone_to(action)
    written = blocks()
    for name in ("recipe.yaml", WORKFLOW):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(written[name])
    (repository / "keys").mkdir()
    line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", written["keys"]]
    subprocess.run(line, cwd=repository, check=True, capture_output=True)
    key = repository / "release-private.pem"
    forge = Forge(folder, environment_of(folder / "python"), action, api, key.read_text())
    key.unlink()
    (repository / ".gitignore").write_text("/artifacts/\n")
    forge.git("init", "--quiet", "--initial-branch", "main")
    forge.git("add", "--all")
    forge.git("commit", "--quiet", "--message", "A model")
    return forge


@pytest.fixture(scope="module")
def tried(forge: Forge) -> tuple[Runner, bool | None]:
    """A pull request, and with it kdpipe on the runner."""
    return forge.job("smoke", event_name="pull_request", ref="refs/pull/7/merge", event={"pull_request": {"number": 7}})


@pytest.fixture(scope="module")
def first(forge: Forge, tried: object) -> tuple[Runner, bool | None]:
    return forge.tag("v1.0.0")


@pytest.fixture(scope="module")
def second(forge: Forge, first: object) -> tuple[Runner, bool | None]:
    return forge.tag("v1.1.0")


def told(runner: Runner) -> str:
    return "\n".join(f"--- {ran.name}: {ran.returncode}\n{ran.stdout}{ran.stderr}" for ran in runner.ran)


def names(runner: Runner) -> list[str]:
    return [ran.name for ran in runner.ran]


def test_a_request_is_tried(tried: tuple[Runner, bool | None], forge: Forge) -> None:
    runner, passed = tried
    assert passed, told(runner)
    assert names(runner) == ["Begin", "Install", "Smoke"]
    where = "import kdpipe; print(kdpipe.__file__)"
    found = subprocess.run([forge.python, "-c", where], capture_output=True, text=True, check=True)
    assert str(forge.folder) in found.stdout, "it is the action's own"
    assert forge.job("judge", event_name="pull_request", event={"pull_request": {"number": 7}})[1] is None
    assert forge.job("release", event_name="pull_request", ref="refs/pull/7/merge", event={})[1] is None


def test_a_first_tag_is_judged_by_itself_and_published(first: tuple[Runner, bool | None], forge: Forge) -> None:
    runner, passed = first
    assert passed, told(runner)
    assert names(runner) == ["The release before this one", "Begin", "Install", "Run", "Gate", "Release"]
    assert (forge.releases / "digits" / "1.0.0" / "model.sig").is_file()
    files = runner.temporary / "kdpipe"
    assert {"report.html", "comment.md", "junit.xml"} <= {path.name for path in files.iterdir()}
    assert (runner.temporary / "summary.md").read_text() == (files / "comment.md").read_text()


def test_a_second_tag_is_judged_against_the_first(second: tuple[Runner, bool | None], forge: Forge) -> None:
    runner, passed = second
    assert passed, told(runner)
    assert names(runner)[:4] == ["The release before this one", "Begin", "Install", "Pull the baseline"]
    comment = (runner.temporary / "kdpipe" / "comment.md").read_text()
    assert "baseline" in comment
    assert (forge.releases / "digits" / "1.1.0" / "model.sig").is_file()


def test_a_labelled_request_gets_a_comment(second: object, forge: Forge, api: Api) -> None:
    event = {"pull_request": {"number": 7, "labels": [{"name": "judge"}]}}
    runner, passed = forge.job("judge", event_name="pull_request", ref="refs/pull/7/merge", event=event)
    assert passed, told(runner)
    assert names(runner)[-1] == "Comment" and "Release" not in names(runner)
    [(path, authorization, sent)] = api.sent
    assert path == "/repos/acme/digits/issues/7/comments" and authorization == f"Bearer {TOKEN}"
    assert sent == {"body": (runner.temporary / "kdpipe" / "comment.md").read_text()}
    assert not any(TOKEN in ran.stdout + ran.stderr for ran in runner.ran)


def test_no_key_is_left_anywhere(second: object, forge: Forge) -> None:
    secret = forge.key.splitlines()[1].encode()
    left = [path for path in forge.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(left) > 100
    assert not [path for path in left if path.stat().st_size < 2**24 and secret in path.read_bytes()]


@pytest.fixture(scope="module")
def without_torch(forge: Forge, second: object) -> Path:
    """kdpipe and what verifying needs, in an environment of nothing else."""
    python = environment_of(forge.folder / "clean", only=["kdpipe", "onnxruntime", "model-signing", "fsspec"])
    installed = next((forge.folder / "python" / "lib").glob("python*/site-packages/kdpipe"))
    shutil.copytree(installed, python.parent.parent / "lib" / f"python3.{sys.version_info.minor}/site-packages/kdpipe")
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in done.stderr
    return python


def test_what_was_published_is_pulled_and_verified_without_torch(
    without_torch: Path, forge: Forge, tmp_path: Path
) -> None:
    public = forge.repository / "keys" / "release.pem"

    def kdpipe(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [without_torch, "-m", "kdpipe", *map(str, arguments)]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")}
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    pulled = kdpipe("pull", "digits@1.1.0", "--from", forge.releases, "--out", "pulled", "--signature", public)
    assert pulled.returncode == 0, pulled.stderr
    verified = kdpipe("verify", "pulled", "--signature", public)
    assert verified.returncode == 0, verified.stderr
    assert "golden images" in verified.stdout
    other = tmp_path / "other.pem"
    for line in (
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "other-private.pem"],
        ["openssl", "ec", "-in", "other-private.pem", "-pubout", "-out", other],
    ):
        subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)
    refused = kdpipe("verify", "pulled", "--signature", other)
    assert refused.returncode in (1, 2) and len(refused.stderr.splitlines()) == 1, refused.stderr


def test_a_candidate_that_is_worse_is_not_published(forge: Forge, second: object) -> None:
    """The second tag's rules, and a candidate that hardly learned anything."""
    recipe = forge.repository / "recipe.yaml"
    text = recipe.read_text()
    worse = re.sub(r"(distill: .*train: \{epochs: )8", r"\g<1>1", text)
    assert worse != text
    recipe.write_text(worse)
    forge.git("add", "--all")
    try:
        runner, passed = forge.tag("v1.2.0")
    finally:
        recipe.write_text(text)
    assert passed is False and names(runner)[-1] == "Gate", told(runner)
    assert runner.ran[-1].returncode == 1, told(runner)
    assert not (forge.releases / "digits" / "1.2.0").exists()
