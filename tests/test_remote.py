"""Artifacts at other places: whole and checked here, whole or absent there; every fault is caused, not mocked."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import Told, assert_one_line, kdpipe, listening, rewrite_manifest
from s3 import BUCKET, Link, free_port, object_store
from test_artifact import CONFIG, FACTS, seal

from kdpipe.chain import FETCHED, Chain
from kdpipe.core import remote
from kdpipe.core.artifact import MANIFEST, Order, drafting
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Measurement, Model, Report
from kdpipe.core.remote import AlreadyThere, NotThere, Unreachable, fetch_folder, fetch_into, is_url, push_folder, shown


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    with object_store() as found:
        yield found


@pytest.fixture
def bucket(link: Link) -> str:
    """A place of its own in the store."""
    link.mend()
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def seal_files(out: Path, files: dict[str, bytes], stage: str = "test") -> Report:
    with drafting(Report, Order(stage, CONFIG, {}), out) as draft:
        for name, content in files.items():
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.path / name).write_bytes(content)
        draft.facts = FACTS
    return draft.artifact


def assert_nothing_at(out: Path) -> None:
    """Neither whole nor believed to be."""
    assert not out.exists()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["path", "file", "memory", "s3"])
def test_there_and_back(place: str, bucket: str, tmp_path: Path) -> None:
    url = {
        "path": str(tmp_path / "there" / "a"),
        "file": f"file://{tmp_path}/there/a",
        "memory": f"memory://{uuid.uuid4().hex}/a",
        "s3": f"{bucket}/a/",
    }[place]
    files = {"sub/weights.bin": b"weights", "empty": b"", "two words + #1?.txt": b"x" * 100_000, "a*[b]": b"glob"}
    made = seal_files(tmp_path / "a", files)
    with pytest.raises(NotThere, match="nothing at"):
        fetch_folder(url, tmp_path / "back")
    push_folder(made.path, url)
    assert fetch_folder(url, tmp_path / "back", kind=Report, key=made.key) == tmp_path / "back"
    assert tree(tmp_path / "back") == tree(made.path)
    assert Report.open(tmp_path / "back").manifest == made.manifest
    with pytest.raises(AlreadyThere, match="never overwritten"):
        push_folder(seal_files(tmp_path / "b", {"other": b"other"}).path, url)
    shutil.rmtree(made.path)
    assert fetch_folder("memory://nothing/there", tmp_path / "back") == tmp_path / "back", "whole: nothing is asked"
    assert not list(tmp_path.rglob("*.part"))


def test_http_is_only_read(tmp_path: Path) -> None:
    made = seal_files(tmp_path / "served" / "a", {"sub/two words #1?.bin": bytes(20_000_000), "100%": b""})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        fetch_folder(f"{url}/a?token=s3cr3t", tmp_path / "back")
        assert tree(tmp_path / "back") == tree(made.path)
        with pytest.raises(NotThere):
            fetch_folder(f"{url}/b", tmp_path / "c")
        with pytest.raises(UserError, match=r"http\(s\) is read only"):
            push_folder(made.path, f"{url}/b")
        server.shutdown()


def test_what_is_a_url() -> None:
    for url in (
        "s3://b/x",
        "hf://datasets/a/b",
        "https://h/x",
        "file:///x",
        "simplecache::s3://b/x",
        "zip://a::s3://b",
    ):
        assert is_url(url), url
    for path in ("artifacts/data-1", "/x", "C:/x", "a:b", "~/x", "x::y", "s3:/b/x"):
        assert not is_url(path), path


# ---- what strangers write --------------------------------------------------------------------------------


Change = Callable[[dict[str, Any]], object]
RECORD = {"sha256": "0" * 64, "size_bytes": 1}


def files(**records: Any) -> Change:
    return lambda value: value["files"].update(records)


HOSTILE: dict[str, tuple[Change, str]] = {
    "a path out": (files(**{"../../escaped": RECORD}), "outside itself"),
    "an absolute path": (files(**{"/tmp/escaped": RECORD}), "outside itself"),
    "a backslash": (files(**{"..\\escaped": RECORD}), "outside itself"),
    "a state to resume from": (files(**{"resume/key": RECORD}), "cannot be a file of an artifact"),
    "a file that is a folder": (files(sub=RECORD), "cannot be a file of an artifact"),
    "a deep name": (files(**{"/".join("a" * 1000): RECORD}), "cannot be a file of an artifact"),
    "endless": (files(big={"sha256": "0" * 64, "size_bytes": 10**30}), "wanted at most"),
    "larger than the disk": (
        files(big={"sha256": "0" * 64, "size_bytes": 2**40 - 10**6}),
        "(free some|nothing at)",
    ),
    "a negative size": (files(big={"sha256": "0" * 64, "size_bytes": -1}), "no number of bytes"),
    "no hash": (files(big={"sha256": "x", "size_bytes": 1}), "the hash of"),
    "control characters": (files(**{"a\x1b[2J": RECORD}), "control characters"),
    "another version": (lambda value: value.update(schema_version=99), "schema version 99"),
    "facts of another kind": (lambda value: value.update(facts={}), "devices"),
    "a kind that is none": (lambda value: value.update(kind="../x"), "kind is"),
    "files that are a list": (lambda value: value.update(files=[]), "files is no mapping"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(name: str, tmp_path: Path) -> None:
    change, words = HOSTILE[name]
    made = seal(tmp_path / "there" / "a")
    rewrite_manifest(made.path, change)
    place = f"/{uuid.uuid4().hex}/a"
    fsspec.filesystem("memory").put(str(made.path), place, recursive=True)
    out = tmp_path / "here" / "inside" / "a"
    for url in (f"memory:/{place}", str(made.path)):
        with pytest.raises(UserError, match=words) as told:
            fetch_folder(url, out)
        assert "\x1b" not in str(told.value) and "\n" not in str(told.value)
        assert not list((tmp_path / "here").rglob("*escaped*")) and not Path("/tmp/escaped").exists()
        assert_nothing_at(out)
        assert not list(out.parent.glob("*")), "nothing but the manifest was asked for"


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = seal_files(tmp_path / "a", {str(at): b"" for at in range(20)})
    monkeypatch.setattr(remote, "MOST_FILES", 19)
    with pytest.raises(UserError, match="names 20 files: wanted at most 19"):
        fetch_folder(str(made.path), tmp_path / "b")
    assert_nothing_at(tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 200_000, b"null"])
def test_what_is_no_manifest(content: bytes, tmp_path: Path) -> None:
    place = uuid.uuid4().hex
    fsspec.filesystem("memory").pipe(f"/{place}/a/{MANIFEST}", content)
    with pytest.raises(UserError, match="manifest") as told:
        fetch_folder(f"memory://{place}/a", tmp_path / "a")
    assert f"memory://{place}/a" in str(told.value), "the place is named, not where it was fetched to"
    assert_nothing_at(tmp_path / "a")


CONTENTS = {
    "shorter": (b"weight", "differs from its manifest"),
    "longer": (b"weights and more", "more than 7 bytes"),
    "endless": (b"weights" + bytes(50_000_000), "more than 7 bytes"),
    "changed": (b"weighty", "differs from its manifest"),
    "gone": (None, "nothing at"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("place", ["memory", "s3", "path"])
def test_contents_that_are_not_what_is_told(place: str, name: str, bucket: str, tmp_path: Path) -> None:
    content, words = CONTENTS[name]
    url = {"memory": f"memory://{uuid.uuid4().hex}", "s3": bucket, "path": str(tmp_path / "there")}[place]
    push_folder(seal(tmp_path / "a").path, url)
    system, root = fsspec.core.url_to_fs(url)
    if content is None:
        system.rm_file(f"{root}/sub/weights.bin")
    else:
        system.pipe_file(f"{root}/sub/weights.bin", content)
    wanted = words if place != "path" else f"({words}|lacks|differs from its manifest)"
    with pytest.raises(UserError, match=wanted):
        fetch_folder(url, tmp_path / "b")
    assert_nothing_at(tmp_path / "b")
    if content is not None and place != "path":  # made whole there again, the same call ends well
        system.pipe_file(f"{root}/sub/weights.bin", b"weights")
        assert Report.open(fetch_folder(url, tmp_path / "b")).file("sub/weights.bin").read_text() == "weights"


def test_links_and_pipes_of_a_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("weights")
    for at, make in enumerate((lambda path: path.symlink_to(secret), os.mkfifo)):
        made = seal(tmp_path / f"a{at}")
        weights = made.path / "sub" / "weights.bin"
        weights.unlink()
        make(weights)
        with pytest.raises(UserError, match="a link or a special file"):
            fetch_folder(f"file://{made.path}", tmp_path / "b")
        with pytest.raises(UserError, match="a link or a special file"):
            push_folder(made.path, f"memory://{uuid.uuid4().hex}")
        assert_nothing_at(tmp_path / "b")
    made = seal(tmp_path / "c")
    (made.path / MANIFEST).rename(tmp_path / "elsewhere.json")
    (made.path / MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="cannot read"):
        fetch_folder(str(made.path), tmp_path / "b")


def test_another_artifact_than_wanted(tmp_path: Path) -> None:
    made = seal(tmp_path / "a")
    with pytest.raises(UserError, match="is a report, wanted a model"):
        fetch_folder(str(made.path), tmp_path / "b", kind=Model)
    with pytest.raises(UserError, match="it is another artifact"):
        fetch_folder(str(made.path), tmp_path / "b", key="0" * 64)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="exists and is no artifact"):
        fetch_folder(str(made.path), tmp_path / "b")


# ---- what a URL may hide -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a", "s3://bucket/a"),
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("s3://key:se/cr+et@bucket/a", "s3://***@bucket/a"),
        ("https://token@host/a", "https://***@host/a"),
        ("https://u:p@host/a?sig=1&x=2", "https://***@host/a?***"),
        ("simplecache::https://u:p@host/a?sig=1", "simplecache::https://***@host/a?***"),
        ("zip://in@side::s3://key:secret@bucket/a.zip", "zip://***@side::s3://***@bucket/a.zip"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://h/a?x=b::c", "https://h/a?***::c"),
        ("s3://b/\x1b[2J", "s3://b/\\x1b[2J"),
    ],
)
def test_credentials_are_not_shown(url: str, expected: str) -> None:
    assert shown(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://somebody:t0psecret@127.0.0.1:{free_port()}/x",
        f"http://somebody:t0psecret@127.0.0.1:{free_port()}/x?sig=t0psecret",
        "nosuch://somebody:t0psecret@host/x",
        "gs://somebody:t0psecret@bucket/x",
        "s3://somebody:t0p/secret@bucket/x",
    ],
    ids=["ftp", "http", "unknown", "gs", "s3"],
)
def test_credentials_are_in_no_message(url: str, bucket: str, tmp_path: Path) -> None:
    made = seal(tmp_path / "a")
    for ask in (lambda: fetch_folder(url, tmp_path / "b"), lambda: push_folder(made.path, url)):
        with pytest.raises(UserError) as told:
            ask()
        for secret in ("t0psecret", "t0p/secret", "t0p", "somebody"):
            assert secret not in str(told.value), told.value
    assert not [path for path in tmp_path.rglob("*") if b"t0p" in os.fsencode(path)]


def test_protocols_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unreachable, match="'nosuch' is no protocol that fsspec knows: wanted s3://"):
        fetch_folder("nosuch://x", tmp_path / "a")
    with pytest.raises(Unreachable, match=r"oss:// is not installed: pip install ossfs"):
        fetch_folder("oss://bucket/x", tmp_path / "a")
    with pytest.raises(Unreachable, match=r"pip install ossfs"):
        fetch_folder("simplecache::oss://bucket/x", tmp_path / "a")
    assert_one_line(kdpipe("run", "x.yaml", "--store", "nosuch://x", cwd=tmp_path), 2)


# ---- broken off --------------------------------------------------------------------------------------------


def test_a_fetch_goes_on_where_it_was(bucket: str, link: Link, tmp_path: Path) -> None:
    content = {f"{at:02d}.bin": os.urandom(200_000) for at in range(24)}
    made = seal_files(tmp_path / "a", content)
    push_folder(made.path, bucket)
    link.left_bytes = 2_500_000
    with pytest.raises(Unreachable, match="cannot read"):
        fetch_folder(bucket, tmp_path / "b")
    assert_nothing_at(tmp_path / "b")
    kept = {path.name for path in (tmp_path / "b.part").glob("*.bin")}
    assert kept, "some came whole"
    link.mend()
    assert tree(fetch_folder(bucket, tmp_path / "b")) == tree(made.path)
    asked = {Path(request.split()[1]).name for request in link.requests if request.startswith("GET")}
    assert not asked & kept and content.keys() - kept <= asked, "what came whole is not asked for again"
    assert not any("list-type" in request for request in link.requests), "nothing is listed"
    assert not (tmp_path / "b.part").exists()


def test_what_came_of_another_is_not_taken(tmp_path: Path) -> None:
    """The place was changed in between, and what the killed one left here is as large as what is wanted."""
    part = tmp_path / "b.part"
    seal_files(part, {"x": b"old", "y": b"old"})
    (part / "resume").mkdir()
    (part / "resume" / "key").write_text("of a training that was killed")
    made = seal_files(tmp_path / "a", {"x": b"new"})
    assert tree(fetch_folder(str(made.path), tmp_path / "b")) == tree(made.path)
    assert not part.exists()


def test_a_push_shows_nothing_until_it_is_whole(bucket: str, link: Link, tmp_path: Path) -> None:
    made = seal_files(tmp_path / "a", {f"{at:02d}.bin": os.urandom(200_000) for at in range(24)})
    link.left_bytes = 2_500_000
    with pytest.raises(Unreachable, match="cannot write"):
        push_folder(made.path, bucket)
    link.mend()
    with pytest.raises(NotThere):
        fetch_folder(bucket, tmp_path / "b")
    push_folder(made.path, bucket)
    assert [request for request in link.requests if request.startswith("PUT")][-1].endswith(MANIFEST), "the last"
    assert tree(fetch_folder(bucket, tmp_path / "b")) == tree(made.path)


def test_what_another_push_left_is_not_overwritten(bucket: str, link: Link, tmp_path: Path) -> None:
    push_folder(seal(tmp_path / "a").path, bucket)
    system, root = fsspec.core.url_to_fs(bucket)
    system.rm_file(f"{root}/{MANIFEST}")
    refused = pytest.raises(UserError, match=r"is of another push, under way or broken off: wait for it, or remove")
    with refused:
        push_folder(seal(tmp_path / "b", "others").path, bucket)
    assert system.cat_file(f"{root}/sub/weights.bin") == b"weights"
    system.rm(root, recursive=True)
    system.put_file(str(tmp_path / "a" / MANIFEST), f"{root}/{remote.CLAIM}")
    with refused:
        push_folder(tmp_path / "b", bucket)
    assert not system.exists(f"{root}/sub/weights.bin"), "nothing was written"
    push_folder(tmp_path / "a", bucket)
    system.invalidate_cache()
    assert not system.exists(f"{root}/{remote.CLAIM}")


def test_two_push_at_once(bucket: str, tmp_path: Path) -> None:
    """The same key, made on two machines, with contents that differ or not: one is there in the end, whole."""
    for turn, texts in enumerate([("one", "two"), ("same", "same")] * 3):
        made = [
            seal_files(tmp_path / f"{turn}-{at}", {"a": b"a", "b": text.encode(), "c": text.encode()})
            for at, text in enumerate(texts)
        ]
        url = f"{bucket}/{turn}"
        with ThreadPoolExecutor(2) as pool:
            errors = [pool.submit(push_folder, each.path, url).exception() for each in made]
        [failed] = [error for error in errors if error is not None]
        assert isinstance(failed, UserError), failed
        assert tree(fetch_folder(url, tmp_path / f"{turn}-back")) in [tree(each.path) for each in made]


def test_a_bucket_that_lists_slowly(bucket: str, link: Link, tmp_path: Path) -> None:
    """Whole artifacts are never listed; what is not there costs the one look that tells it from a folder."""
    made = seal_files(tmp_path / "a", {f"{at}": b"x" for at in range(30)})
    link.list_seconds = 0.2
    with pytest.raises(NotThere):
        fetch_folder(bucket, tmp_path / "b")
    push_folder(made.path, bucket)
    link.requests.clear()
    fetch_folder(bucket, tmp_path / "b")
    assert not any("list-type" in request for request in link.requests)


# ---- a command that takes a URL -----------------------------------------------------------------------------


def test_commands_take_urls(bucket: str, workdir: Path) -> None:
    made = seal(workdir / "report-1a2b")
    push_folder(made.path, f"{bucket}/report-1a2b")
    shutil.rmtree(made.path)
    done = kdpipe("show", f"{bucket}/report-1a2b", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["path"] == f"artifacts/{FETCHED}/{made.manifest.digest}/report-1a2b" and told["kind"] == "report"
    assert kdpipe("show", f"{bucket}/report-1a2b").returncode == 0
    assert_one_line(kdpipe("show", f"{bucket}/nothing"), 2, f"nothing at {bucket}/nothing")
    assert_one_line(kdpipe("verify", f"{bucket}/report-1a2b"), 2, "is a report, wanted a bundle")
    assert "fetched from a URL" in kdpipe("clean", "--everything", "--yes").stdout
    assert not list(Path("artifacts", FETCHED).glob("*"))


def test_one_url_of_two_contents(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/latest"
    paths = []
    for text in ("first", "second"):
        push_folder(seal(tmp_path / text, text).path, url)
        paths.append(fetch_into(url, tmp_path / "here"))
        fsspec.filesystem("memory").rm(url, recursive=True)
    assert [(path / "sub" / "weights.bin").read_text() for path in paths] == ["first", "second"]
    assert {path.name for path in paths} == {"latest"}


# ---- a store that machines share ----------------------------------------------------------------------------


def made_by(chain: Chain, text: str = "weights", stage: str = "test") -> Report:
    """A step of a chain that writes something small."""
    order = Order(stage, CONFIG, {})

    def make(path: Path) -> Report:
        return seal_files(path, {"weights.bin": text.encode()}, stage)

    return chain.step("report", Report, order, make)


def test_two_machines_share_what_they_make(bucket: str, tmp_path: Path) -> None:
    machines = [Chain(tmp_path / name, store=bucket) for name in ("one", "two", "one")]
    with listening(told := Told()):
        made = [made_by(machine) for machine in machines]
    assert not told.notes
    assert [(step.sealed_before, step.fetched) for machine in machines for step in machine.steps] == [
        (False, False),
        (True, True),
        (True, False),
    ]
    assert " fetched " in str(machines[1].steps[0])
    assert tree(made[0].path) == tree(made[1].path)


def test_what_was_made_before_is_shared(bucket: str, tmp_path: Path) -> None:
    made_by(Chain(tmp_path / "one"))
    made_by(Chain(tmp_path / "one", store=bucket))
    chain = Chain(tmp_path / "two", store=bucket)
    made_by(chain)
    assert chain.steps[0].fetched


def test_a_folder_can_be_a_store(tmp_path: Path) -> None:
    for name in ("one", "two"):
        chain = Chain(tmp_path / name, store=str(tmp_path / "share" / "store"))
        made_by(chain)
    assert chain.steps[0].fetched


def test_a_store_that_is_lost_costs_one_line(bucket: str, link: Link, tmp_path: Path) -> None:
    link.left_bytes = 0
    chain = Chain(tmp_path / "one", store=bucket)
    with listening(told := Told()):
        made_by(chain)
        made_by(chain, stage="another")
    assert [step.sealed_before for step in chain.steps] == [False, False]
    [line] = told.notes
    assert line.startswith(f"the run goes on without its store: cannot read {bucket}/report-") and "s3cr3t" not in line


def test_a_store_that_is_lost_while_pushing(bucket: str, link: Link, tmp_path: Path) -> None:
    chain = Chain(tmp_path / "one", store=bucket)
    link.left_bytes = 100_000
    with listening(told := Told()):
        made_by(chain, "x" * 200_000)
    assert len(told.notes) == 1 and "cannot write" in told.notes[0]
    link.mend()
    made_by(Chain(tmp_path / "one", store=bucket))
    chain = Chain(tmp_path / "two", store=bucket)
    assert made_by(chain).file("weights.bin").stat().st_size == 200_000 and chain.steps[0].fetched


def test_what_a_store_has_is_checked(bucket: str, tmp_path: Path) -> None:
    """Another artifact under that name, a broken one, one of a strange version: made here, and a line says so."""
    name = made_by(Chain(tmp_path / "any")).path.name
    other = made_by(Chain(tmp_path / "any"), stage="another").path
    system, root = fsspec.core.url_to_fs(bucket)
    for turn, words in enumerate(("it is another artifact", "differs from its manifest", "schema version 99")):
        url = f"{bucket}/{turn}"
        source = tmp_path / f"bad{turn}"
        shutil.copytree(other if turn == 0 else tmp_path / "any" / name, source)
        if turn == 2:
            rewrite_manifest(source, lambda value: value.update(schema_version=99))
            system.put_file(str(source / MANIFEST), f"{root}/{turn}/{name}/{MANIFEST}")
        else:
            push_folder(source, f"{url}/{name}")
        if turn == 1:
            system.pipe_file(f"{root}/{turn}/{name}/weights.bin", b"x")
        chain = Chain(tmp_path / f"machine{turn}", store=url)
        with listening(told := Told()):
            made = made_by(chain)
        assert not chain.steps[0].sealed_before and Report.open(made.path).key == made.key
        assert f"what the store has of {name} is not taken" in told.notes[0] and words in told.notes[0], told.notes
        assert not list(made.path.parent.glob("*.part"))


def test_events_are_not_fetched(bucket: str, tmp_path: Path) -> None:
    """A measurement is its machine's, and a report is made from it: of the same key there is another one elsewhere."""
    measured = seal(tmp_path / "measurement-000000000000-1")
    event = Measurement(measured.path, measured.manifest.model_copy(update={"kind": Measurement.kind}))
    order = Order("report", CONFIG, {"measurement-local-1": event})

    def make(path: Path) -> Report:
        with drafting(Report, order, path) as draft:
            draft.facts = FACTS
        return draft.artifact

    for name in ("one", "two"):
        chain = Chain(tmp_path / name, store=bucket)
        made = chain.step("report", Report, order, make)
        assert not chain.steps[0].sealed_before
    assert remote.RemoteFolder(f"{bucket}/{made.path.name}").is_whole, "it is there for who names it"
    push_folder(measured.path, f"{bucket}/{measured.path.name}")
    here = chain.folder / measured.path.name
    assert not chain._is_there("measurement", Measurement, Order("bench", CONFIG, {}), here)
