"""What lies on a device: by content, whole at every moment, one link to what is live."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, command, flip_a_byte, kdpipe, replace_file, rewrite_manifest

from kdpipe.core.kinds import Bundle
from kdpipe.runtime import store
from kdpipe.runtime.bundle import BundleError
from kdpipe.runtime.store import StoreError, digest

NONE = "0" * 64


def ask(command: str, root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The runner in a process of its own, as a device starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    line = [sys.executable, "-B", "-P", "-m", "kdpipe.runtime", command, str(root), *map(str, arguments)]
    return subprocess.run(line, env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=1800)


def answer(command: str, root: Path, *arguments: object) -> dict[str, Any]:
    done = ask(command, root, *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def upload(root: Path, source: Path) -> str:
    """Put a folder into the store as a finished upload is."""
    name = digest(source)
    (root / "store").mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, root / "store" / f"{name}.part")
    store.receive(root, name)
    return name


@pytest.fixture
def versions(packed: Bundle, tmp_path: Path) -> list[Path]:
    """Five bundles that differ in what their manifests say of when they were made."""
    paths = []
    for at in range(5):
        paths.append(tmp_path / "bundles" / str(at))
        shutil.copytree(packed.path, paths[-1])
        rewrite_manifest(paths[-1], lambda value, at=at: value.update(created_utc=f"2026-01-0{at + 1}T00:00:00+00:00"))
    return paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "device"


def live_is_whole(root: Path) -> str:
    """Digest of what is live, after the runner has checked its hashes and replayed its golden inputs."""
    name = (root / "live").resolve().name
    assert digest(root / "store" / name) == name
    answer("verify", root / "live")
    return name


# ---- by content --------------------------------------------------------------------------------------------


def test_digest_is_of_names_and_contents_only(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, ("a", "b/c")), (second, ("b/c", "a"))):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    os.utime(second / "a", (1, 1))
    (second / "empty").mkdir()
    assert digest(first) == digest(second)
    found = {digest(first), digest(first / "a")}
    (second / "a").rename(second / "d")
    found.add(digest(second))
    (second / "d").write_text("changed")
    found.add(digest(second))
    (second / "b" / "c").write_text("a")
    (second / "d").write_text("b/c")
    found.add(digest(second))
    assert len(found) == 5


def test_nothing_but_plain_files_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "pipe", "nothing"):
        with pytest.raises(StoreError, match=r"is a link|is a special file|cannot be read|special file"):
            digest(tmp_path / name)


def test_an_upload_counts_when_it_is_whole(root: Path, versions: list[Path]) -> None:
    name = digest(versions[0])
    part = root / "store" / f"{name}.part"
    assert store.have(root, [name])["have"] == []
    assert "nothing was uploaded" in ask("receive", root, name).stderr
    shutil.copytree(versions[0], part)
    size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    assert store.have(root, [name])["part_bytes"] == {name: size}
    assert answer("receive", root, name)["digest"] == name
    found = answer("have", root, name, NONE)
    assert (found["have"], found["part_bytes"]) == ([name], {NONE: 0})
    assert found["free_bytes"] > 0
    assert [path.name for path in (root / "store").iterdir()] == [name]
    assert answer("receive", root, name)["digest"] == name  # asked again, after the answer was lost


def test_an_upload_of_other_contents_is_removed(root: Path, versions: list[Path], tmp_path: Path) -> None:
    name = digest(versions[0])
    part = root / "store" / f"{name}.part"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()

    def add_a_link() -> None:
        (part / "link").symlink_to(outside)

    faults: list[tuple[Callable[[], object], str]] = [
        (lambda: flip_a_byte(part / "model.onnx"), "has the digest"),
        (lambda: (part / "labels.json").unlink(), "has the digest"),
        (lambda: (part / "more").touch(), "has the digest"),
        (add_a_link, "link is a link or a special file"),
    ]
    for cause, said in faults:
        shutil.copytree(versions[0], part)
        cause()
        done = ask("receive", root, name)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
        assert list((root / "store").iterdir()) == []
    assert (outside / "kept").exists()


def test_what_was_changed_on_the_device_is_not_had_and_is_replaced(root: Path, versions: list[Path]) -> None:
    name = upload(root, versions[0])
    store.install(root, name)
    flip_a_byte(root / "store" / name / "labels.json")
    assert store.have(root, [name])["have"] == []
    assert "labels.json differs from its manifest" in store.status(root)["live"]["fault"]
    upload(root, versions[0])
    assert store.status(root)["live"]["fault"] is None
    assert live_is_whole(root) == name


# ---- what is live ------------------------------------------------------------------------------------------


def test_one_link_is_switched_and_switched_back(root: Path, versions: list[Path]) -> None:
    names = [upload(root, path) for path in versions[:3]]
    for at, name in enumerate(names):
        found = answer("install", root, name)
        assert (found["live"]["digest"], found["previous"]) == (name, names[at - 1] if at else None)
        assert found["golden_images"] == 8
        assert str((root / "live").readlink()) == f"store/{name}"
        assert live_is_whole(root) == name
    assert answer("rollback", root)["live"]["digest"] == names[1]
    assert answer("rollback", root)["live"]["digest"] == names[0]
    done = ask("rollback", root)
    assert done.returncode == 1 and "no bundle was live before" in done.stderr
    assert live_is_whole(root) == names[0]
    assert answer("install", root, names[2])["previous"] == names[0]


def test_nobody_goes_back_to_what_was_rolled_back(root: Path, versions: list[Path]) -> None:
    good, bad, better, best = (upload(root, path) for path in versions[:4])
    store.install(root, good, keep_versions=9)
    store.install(root, bad, keep_versions=9)
    store.rollback(root)
    assert store.install(root, better, keep_versions=9)["previous"] == good
    assert store.install(root, best, keep_versions=9)["previous"] == better
    assert store.rollback(root)["previous"] == good
    assert store.rollback(root)["previous"] is None
    assert store.install(root, bad, keep_versions=9)["previous"] == good  # wanted again, by name


def test_installing_what_is_live_changes_nothing(root: Path, versions: list[Path]) -> None:
    first, second = (upload(root, path) for path in versions[:2])
    store.install(root, first)
    store.install(root, second)
    before = os.lstat(root / "live").st_mtime_ns
    assert store.install(root, second)["previous"] == first
    assert os.lstat(root / "live").st_mtime_ns == before


def escape(manifest: dict[str, Any]) -> None:
    manifest["files"]["../labels.json"] = manifest["files"]["labels.json"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: flip_a_byte(path / "model.onnx"), "model.onnx differs from its manifest"),
        (lambda path: (path / "labels.json").unlink(), "lacks 'labels.json'"),
        (lambda path: (path / "more").touch(), "holds 'more'"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: rewrite_manifest(path, lambda value: value.update(schema_version=99)), "has schema version 99"),
        (
            lambda path: rewrite_manifest(path, escape),
            "names a file outside itself",
        ),
        (lambda path: rewrite_manifest(path, lambda value: value["facts"].update(entry="../model.onnx")), "entry is"),
        (lambda path: replace_file(path, "golden.npz", b"no arrays"), "holds no arrays"),
    ],
)  # fmt: skip
def test_a_bundle_that_is_not_sound_never_becomes_live(
    root: Path, versions: list[Path], spoil: Callable[[Path], object], said: str
) -> None:
    live = upload(root, versions[0])
    store.install(root, live)
    spoil(versions[1])
    name = upload(root, versions[1])
    done = ask("install", root, name)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert live_is_whole(root) == live
    assert store.status(root)["versions"] == [live]


def test_a_bundle_that_crashes_its_runtime_never_becomes_live(root: Path, versions: list[Path]) -> None:
    live = upload(root, versions[0])
    store.install(root, live)
    replace_file(versions[1], "model.onnx", b"\x08\x07" + b"\xff" * 100)
    done = ask("install", root, upload(root, versions[1]))
    assert done.returncode != 0
    assert live_is_whole(root) == live


def test_old_versions_are_kept_to_a_number_and_a_space(root: Path, versions: list[Path]) -> None:
    names = [upload(root, path) for path in versions]
    for name in names[:3]:
        assert store.install(root, name, keep_versions=3)["removed"] == []
    assert store.install(root, names[3], keep_versions=3)["removed"] == [names[0]]
    size = store.status(root)["entries"][names[3]]["bytes"]
    # Two stay in any case; a third has no room.
    assert store.install(root, names[4], keep_versions=9, keep_bytes=2 * size)["removed"] == [names[2], names[1]]
    assert sorted(path.name for path in (root / "store").iterdir()) == sorted(names[3:])
    upload(root, versions[2])
    assert store.install(root, names[2], keep_versions=1, keep_bytes=1)["removed"] == [names[3]]
    assert store.rollback(root)["live"]["digest"] == names[4]


def test_what_is_no_version_is_no_business_of_a_deployment(root: Path, versions: list[Path]) -> None:
    """Images and bundles that were pushed to be measured stay, and count as nothing."""
    pushed = [upload(root, path) for path in versions[2:]]
    for path in versions[:2]:
        store.install(root, upload(root, path), keep_versions=1, keep_bytes=1)
    assert store.have(root, pushed)["have"] == pushed


def test_nothing_is_removed_while_somebody_measures(root: Path, versions: list[Path]) -> None:
    names = [upload(root, path) for path in versions[:4]]
    for name in names[:3]:
        store.install(root, name, keep_versions=1)
    with (root / "lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert answer("install", root, names[3], "--keep-versions", 1)["removed"] == []
        done = ask("clean", root)
        assert done.returncode == 1 and "in use by a measurement" in done.stderr
    assert store.install(root, names[3], keep_versions=1)["removed"] == [names[1]]


def test_status_says_what_lies_there(root: Path, versions: list[Path]) -> None:
    assert answer("status", root)["live"] is None
    first, second = (upload(root, path) for path in versions[:2])
    store.install(root, first)
    store.install(root, second)
    (root / "store" / f"{NONE}.part").write_bytes(b"12345")
    (root / "work").mkdir()
    (root / "work" / "outputs").write_bytes(b"123")
    found = answer("status", root)
    assert found["live"]["digest"] == second and found["live"]["fault"] is None
    assert found["live"]["target"] == "onnxruntime" and found["live"]["since_utc"].startswith("20")
    assert (found["previous"], found["versions"]) == (first, [first, second])
    assert found["entries"][f"{NONE}.part"] == {"bytes": 5, "kind": "upload"}
    assert found["bytes"]["work"] == 3 and found["bytes"]["store"] == 5 + 2 * found["entries"][first]["bytes"]
    shutil.rmtree(root / "store" / second)
    assert "the folder does not exist" in answer("status", root)["live"]["fault"]


def test_clean_leaves_what_is_live_and_what_was_before(root: Path, versions: list[Path]) -> None:
    names = [upload(root, path) for path in versions[:4]]
    for name in names[:3]:
        store.install(root, name)
    (root / "store" / f"{NONE}.part").touch()
    for folder in ("work/session", "python/bin", f"beside/{names[0]}", f"beside/{names[2]}"):
        (root / folder).mkdir(parents=True)
    found = answer("clean", root)
    assert sorted(found["removed"]) == sorted([names[0], names[3], f"{NONE}.part"])
    assert found["kept"] == sorted(names[1:3]) and found["freed_bytes"] > 0
    assert sorted(path.name for path in root.iterdir()) == ["beside", "history.json", "live", "lock", "python", "store"]
    assert [path.name for path in (root / "beside").iterdir()] == [names[2]]
    assert live_is_whole(root) == names[2]
    assert store.rollback(root)["live"]["digest"] == names[1]
    answer("clean", root, "--everything")
    assert sorted(path.name for path in root.iterdir()) == ["beside", "lock", "store"]
    assert list((root / "store").iterdir()) == []


# ---- links -------------------------------------------------------------------------------------------------


def test_nothing_outside_is_reached_through_a_link(root: Path, versions: list[Path], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(versions[0], outside)
    before = digest(outside)
    name = digest(versions[0])
    (root / "store").mkdir(parents=True)
    (root / "store" / name).symlink_to(outside)
    assert store.have(root, [name])["have"] == []
    with pytest.raises((StoreError, BundleError)):
        store.install(root, name)
    assert not os.path.lexists(root / "live")
    (root / "beside").mkdir()
    (root / "beside" / name).symlink_to(outside)
    (root / "work").symlink_to(outside)
    (root / "store" / f"{NONE}.part").symlink_to(outside)
    with pytest.raises(StoreError, match="is a link"):
        store.receive(root, NONE)
    store.clean(root)
    assert digest(outside) == before
    assert not os.path.lexists(root / "work") and list((root / "store").iterdir()) == []


def test_a_store_or_a_live_bundle_that_is_not_ours_is_left_alone(
    root: Path, versions: list[Path], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (root / "store").symlink_to(outside)
    done = ask("receive", root, NONE)
    assert done.returncode == 1 and "is a link: wanted a folder of its own" in done.stderr
    assert list(outside.iterdir()) == []
    (root / "store").unlink()
    name = upload(root, versions[0])
    for target in (str(outside), f"../outside/{name}", f"store/../{name}", "store/x"):
        (root / "live").symlink_to(target)
        for asked in ("install", "rollback", "status", "clean"):
            done = ask(asked, root, *([name] if asked == "install" else []))
            assert done.returncode == 1 and "none of ours" in done.stderr, asked
        assert str((root / "live").readlink()) == target
        (root / "live").unlink()
    (root / "live").mkdir()
    assert "is no link" in ask("install", root, name).stderr
    for wrong in ("../store", "x", name.upper(), f"{name}/", f"{name}\n"):
        assert "is no digest" in ask("install", root, wrong).stderr
        assert "is no digest" in ask("receive", root, wrong).stderr


# ---- killed at any moment ------------------------------------------------------------------------------------

# Ends the process before the nth change of a file below the root: os._exit would still be asked nicely, this is not.
KILLED = """
import os, signal, sys
from pathlib import Path
from kdpipe.runtime import store

at, command, root, *arguments = sys.argv[1:]
left = int(at)
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "os.chmod"}

def watch(event, values):
    global left
    changes = event in CHANGES or (event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and (root in str(values[0]) or root in str(values[1]) or isinstance(values[1], int)):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
getattr(store, command)(Path(root), *arguments)
"""


def killed(at: int, command: str, root: Path, *arguments: str) -> bool:
    """Whether ``command`` was killed before its change number ``at``; else it ended well."""
    line = [sys.executable, "-B", "-P", "-c", textwrap.dedent(KILLED), str(at), command, str(root), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def test_killed_before_any_change_the_old_version_is_live_or_the_new_one(root: Path, versions: list[Path]) -> None:
    old, gone, new = (upload(root, path) for path in versions[:3])
    begun = root.with_name("begun")
    store.install(root, gone)
    store.install(root, versions_name := upload(root, versions[3]))
    store.install(root, old)
    assert store.status(root)["previous"] == versions_name
    root.rename(begun)
    seen: set[str | None] = set()
    at = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(begun, root, symlinks=True)
        ended = not killed(at, "install", root, new)
        seen.add(store.live(root))
        assert store.status(root)["live"]["fault"] is None
        assert store._previous(root) in (old, versions_name)
        assert store.have(root, [old, new, versions_name])["have"] == [old, new, versions_name]
        if at % 3 == 0:
            assert live_is_whole(root) in (old, new)
            assert store.install(root, new)["live"]["digest"] == new and store.rollback(root)["live"]["digest"] == old
        if ended:
            break
        at += 1 if seen == {old} else 5  # what follows the switch only removes files
    assert at > 5 and seen == {old, new}
    assert gone not in store.status(root)["entries"]


# ---- kdpipe deploy -------------------------------------------------------------------------------------------


@pytest.fixture
def here(root: Path, workdir: Path) -> Path:
    """The project folder, whose devices.yaml knows ``board``: this machine, with a folder of its own."""
    (workdir / "devices.yaml").write_text(f"board: {{kind: local, folder: {root}, keep_versions: 2}}\n")
    return workdir


def lying(root: Path) -> dict[str, str]:
    """Everything on the device: contents of files and targets of links, by name."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = str(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(root))] = store.digest(path)
    return found


def test_deploy_status_rollback_clean(here: Path, root: Path, versions: list[Path]) -> None:
    for path in versions[:3]:
        done = kdpipe("deploy", path, "--device", "board")
        assert done.returncode == 0, done.stderr
        assert "board: onnxruntime float32" in done.stdout and "intact; 8 golden images within" in done.stdout
        assert live_is_whole(root) == digest(path)
    assert "old versions removed: 1" in done.stdout
    found = json.loads(kdpipe("devices", "status", "board", "--json").stdout)["devices"]["board"]
    assert found["live"]["digest"] == digest(versions[2]) and found["previous"] == digest(versions[1])
    assert set(found["entries"]) == {digest(path) for path in versions[1:3]}
    back = json.loads(kdpipe("deploy", "--rollback", "--device", "board", "--json").stdout)
    assert back["live"]["digest"] == digest(versions[1]) and live_is_whole(root) == digest(versions[1])
    assert_one_line(kdpipe("deploy", "--rollback", "--device", "board"), 1, "no bundle was live before", "'board'")
    (root / "work" / "left").touch()
    assert "1 removed" in kdpipe("devices", "clean", "board").stdout
    assert live_is_whole(root) == digest(versions[1]) and not (root / "work").exists()
    assert kdpipe("deploy", versions[2], "--device", "board").returncode == 0
    assert kdpipe("devices", "clean", "board", "--everything").returncode == 0
    assert "board: nothing is live" in kdpipe("devices", "status", "board").stdout


def test_a_damaged_live_bundle_is_told_and_mended(here: Path, root: Path, versions: list[Path]) -> None:
    kdpipe("deploy", versions[0], "--device", "board")
    flip_a_byte(root / "live" / "model.onnx")
    done = kdpipe("devices", "status", "board")
    assert_one_line(done, 1, "'board' is damaged", "model.onnx differs", "deploy it again")
    assert kdpipe("deploy", versions[0], "--device", "board").returncode == 0
    assert kdpipe("devices", "status", "board").returncode == 0
    assert live_is_whole(root) == digest(versions[0])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: flip_a_byte(path / "labels.json"), "labels.json differs from its manifest"),
        (lambda path: (path / "more").symlink_to("/etc/passwd"), "is a link or a special file"),
        (lambda path: rewrite_manifest(path, escape), "names a file outside itself"),
        (lambda path: rewrite_manifest(path, lambda value: value.update(schema_version=99)), "has schema version 99"),
        (lambda path: rewrite_manifest(path, lambda value: value["facts"].update(target="coreml")), "coreml"),
        (lambda path: rewrite_manifest(path, lambda value: value["facts"].update(task="x")), "unknown task"),
        (lambda path: shutil.rmtree(path), "no artifact at"),
    ],
)
def test_what_is_no_bundle_is_refused_before_the_device_is_touched(
    here: Path, root: Path, versions: list[Path], spoil: Callable[[Path], object], said: str
) -> None:
    kdpipe("deploy", versions[0], "--device", "board")
    before = lying(root)
    spoil(versions[1])
    assert_one_line(kdpipe("deploy", versions[1], "--device", "board"), 2, said)
    assert lying(root) == before


def test_wrong_golden_outputs_are_refused_by_the_device(here: Path, root: Path, versions: list[Path]) -> None:
    kdpipe("deploy", versions[0], "--device", "board")
    with np.load(versions[1] / "golden.npz") as golden:
        np.savez(versions[1] / "other.npz", images=golden["images"], logits=golden["logits"][::-1])
    replace_file(versions[1], "golden.npz", (versions[1] / "other.npz").read_bytes())
    (versions[1] / "other.npz").unlink()
    done = kdpipe("deploy", versions[1], "--device", "board")
    assert_one_line(done, 1, "golden outputs are off", "'board' serves what it did before")
    assert live_is_whole(root) == digest(versions[0])


def test_a_device_without_the_runtime_says_the_line_that_installs_it(
    here: Path, root: Path, versions: list[Path], tmp_path: Path
) -> None:
    """Another Python, which has numpy and nothing else."""
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    [site] = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    for package in (Path(np.__file__).parent, *Path(np.__file__).parent.parent.glob("numpy.libs")):
        (site / package.name).symlink_to(package)
    python = tmp_path / "bare" / "bin" / "python"
    (here / "devices.yaml").write_text(f"board: {{kind: local, folder: {root}, python: {python}}}\n")
    done = kdpipe("deploy", versions[0], "--device", "board")
    assert_one_line(done, 2, "cannot open a bundle of onnxruntime", f"`{python} -m pip install onnxruntime`")
    assert lying(root) == {}


def test_wrong_words(here: Path, versions: list[Path]) -> None:
    assert_one_line(kdpipe("deploy", "--device", "board"), 2, "wanted the folder of a bundle or a release")
    assert_one_line(kdpipe("deploy", versions[0], "--rollback"), 2, "not both")
    assert_one_line(kdpipe("deploy", versions[0], "--device", "bord"), 2, "unknown device 'bord'", "'board'")
    assert_one_line(kdpipe("deploy", versions[0], "--device", "null"), 2, "nothing lies on 'null'")
    assert_one_line(kdpipe("devices", "clean", "null"), 2, "nothing lies on 'null'")


def test_an_upload_that_was_cut_is_gone_on_with(here: Path, root: Path, versions: list[Path]) -> None:
    name = digest(versions[0])
    part = root / "store" / f"{name}.part"
    part.mkdir(parents=True)
    shutil.copy(versions[0] / "labels.json", part)
    (part / "model.onnx").write_bytes((versions[0] / "model.onnx").read_bytes()[:1000])
    assert kdpipe("deploy", versions[0], "--device", "board").returncode == 0
    assert live_is_whole(root) == name
    # What an upload left that nobody can go on with costs one more try, not a person's time.
    second = root / "store" / f"{digest(versions[1])}.part"
    second.mkdir()
    (second / ".model.onnx.Xy12").write_bytes(b"of another program")
    assert kdpipe("deploy", versions[1], "--device", "board").returncode == 0
    assert live_is_whole(root) == digest(versions[1])


def test_two_deployments_at_once_both_end(here: Path, root: Path, versions: list[Path]) -> None:
    kdpipe("deploy", versions[0], "--device", "board")
    both = [versions[1], versions[1], versions[2]]
    begun = [subprocess.Popen(command("deploy", path, "--device", "board"), cwd=here) for path in both]
    assert [each.wait(1200) for each in begun] == [0, 0, 0]
    assert live_is_whole(root) in {digest(path) for path in both}


@pytest.mark.lab  # for its seconds
def test_deployments_cut_at_random_moments(versions: list[Path]) -> None:
    """A few of what benchmarks/deploy_cuts.py does fifty times."""
    few = ("--cuts", "5", "--switches", "5", "--padding", "8")
    line = [sys.executable, ROOT / "benchmarks" / "deploy_cuts.py", *versions[:2], *few]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 serve a whole version" in done.stdout and "5 of 5 next deployments succeed" in done.stdout
    assert "5 of 5 kills around the switch alone" in done.stdout


def test_what_is_live_is_read_as_one_bundle_while_it_is_switched(root: Path, versions: list[Path]) -> None:
    replace_file(versions[1], "labels.json", (versions[1] / "labels.json").read_bytes() + b"\n")
    names = [upload(root, path) for path in versions[:2]]
    store.install(root, names[0])
    ended = threading.Event()

    def switch() -> None:
        while not ended.is_set():
            for name in names:
                store._switch(root, name)

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        for _ in range(4):
            answer("verify", root / "live")
    finally:
        ended.set()
        switching.join()
