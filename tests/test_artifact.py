"""Artifacts: whole or absent, checked before use; every fault here is caused, not mocked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import flip_a_byte, rewrite_manifest

from kdpipe.core import artifact, sealed
from kdpipe.core.artifact import MANIFEST, Order, drafting, read_manifest
from kdpipe.core.config import PackageConfig
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import DeviceReport, Model, Report, ReportFacts

CONFIG = PackageConfig()
DEVICE = DeviceReport(device="local", trust="trusted", sessions=1, bundles=3, pareto=[["a"]])
FACTS = ReportFacts(devices=[DEVICE], gains=[])


def seal(out: Path, text: str = "weights") -> Report:
    with drafting(Report, Order("test", CONFIG, {}), out) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "weights.bin").write_text(text)
        draft.facts = FACTS
    return draft.artifact


def test_sealed_artifact_reads_back(tmp_path: Path) -> None:
    sealed = seal(tmp_path / "a")
    opened = Report.open(tmp_path / "a")
    assert opened == sealed
    assert opened.file("sub/weights.bin").read_text() == "weights"
    assert opened.facts == FACTS
    assert not list(tmp_path.glob("*.part"))


def test_key_depends_on_stage_config_and_inputs(tmp_path: Path) -> None:
    first, second = seal(tmp_path / "a"), seal(tmp_path / "b", "others")
    assert first.key == second.key  # contents are hashed in the manifest; the key names what was asked for
    keys = {
        Order("x", CONFIG, {}).key,
        Order("y", CONFIG, {}).key,
        Order("x", PackageConfig(golden_images=9), {}).key,
        Order("x", CONFIG, {"model": first}).key,
    }
    assert len(keys) == 4


def test_wrong_kind(tmp_path: Path) -> None:
    seal(tmp_path / "a")
    with pytest.raises(UserError, match="is a report, wanted a model"):
        Model.open(tmp_path / "a")


def test_sealed_artifacts_are_never_overwritten(tmp_path: Path) -> None:
    seal(tmp_path / "a")
    with pytest.raises(UserError, match="never changed"):
        seal(tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip_a_byte(folder / "sub/weights.bin"), "differs from its manifest"),
        (lambda folder: (folder / "sub/weights.bin").write_text("weight"), "differs from its manifest"),
        (lambda folder: (folder / "sub/weights.bin").unlink(), "lacks 'sub/weights.bin'"),
        (lambda folder: (folder / "extra").write_text(""), "does not name"),
        (lambda folder: (folder / "link").symlink_to("/etc/passwd"), "link or a special file"),
        (lambda folder: os.mkfifo(folder / "pipe"), "link or a special file"),
        (lambda folder: (folder / MANIFEST).unlink(), "never finished"),
        (lambda folder: flip_a_byte(folder / MANIFEST), "edited|broken"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "not a manifest"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00"), "not a manifest"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    seal(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        Report.open(tmp_path / "a")


def test_a_manifest_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever way: in place without a change of size, replaced, under another name; its times set back or not."""
    monkeypatch.setattr(artifact, "SETTLED_SECONDS", 0.05)
    first, second = seal(tmp_path / "a"), seal(tmp_path / "b", "others")
    reads: list[Path] = []
    real = sealed.read_manifest

    def counted(folder: Path) -> dict[str, object]:
        reads.append(folder)
        return real(folder)

    monkeypatch.setattr(sealed, "read_manifest", counted)

    def edit_in_place(folder: Path) -> None:
        text = (folder / MANIFEST).read_text()
        before = (folder / MANIFEST).stat()
        with (folder / MANIFEST).open("r+") as stream:
            stream.write(text.replace(first.key[:8], "0" * 8))
        os.utime(folder / MANIFEST, ns=(before.st_atime_ns, before.st_mtime_ns))

    def replace(folder: Path) -> None:
        for name in (MANIFEST, "sub/weights.bin"):
            (tmp_path / "b" / name).rename(folder / name)

    time.sleep(0.1)
    for _ in range(3):
        assert read_manifest(tmp_path / "a") == first.manifest
    (tmp_path / "a").rename(tmp_path / "c")
    assert Report.open(tmp_path / "c").manifest == first.manifest and len(reads) == 1
    changes: list[tuple[Callable[[Path], None], str]] = [
        (replace, second.manifest.digest),
        (edit_in_place, "edited"),
        (lambda folder: (folder / MANIFEST).unlink(), "has no manifest"),
    ]
    for change, found in changes:
        change(tmp_path / "c")
        if found == second.manifest.digest:
            assert read_manifest(tmp_path / "c").digest == found
        else:
            with pytest.raises(UserError, match=found):
                read_manifest(tmp_path / "c")
    assert len(reads) == 4
    monkeypatch.setattr(artifact, "SETTLED_SECONDS", 1000.0)  # made just now, its times may not tell a change
    seal(tmp_path / "d")
    count = len(reads)
    for _ in range(2):
        read_manifest(tmp_path / "d")
    assert len(reads) == count + 2


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside"])
def test_paths_that_escape_are_refused(tmp_path: Path, name: str) -> None:
    seal(tmp_path / "a")
    (tmp_path / "outside").write_text("secret")
    rewrite_manifest(tmp_path / "a", lambda value: value["files"].update({name: {"sha256": "0" * 64, "size_bytes": 6}}))
    with pytest.raises(UserError, match="outside itself"):
        Report.open(tmp_path / "a")


def test_edited_facts_are_seen(tmp_path: Path) -> None:
    seal(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(path.read_text().replace('"bundles": 3', '"bundles": 4'))
    with pytest.raises(UserError, match="edited after sealing"):
        Report.open(tmp_path / "a")


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with (
        pytest.raises(type(error)),
        drafting(Report, Order("test", CONFIG, {}), tmp_path / "a") as draft,
    ):
        (draft.path / "half").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from pathlib import Path
from kdpipe.core.artifact import Order, drafting
from kdpipe.core.kinds import Report
from kdpipe.core.config import PackageConfig
with drafting(Report, Order("test", PackageConfig(), {}), Path(sys.argv[1])) as draft:
    for at in range(100_000):
        (draft.path / "weights").write_bytes(b"x" * at)
        print("writing", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def start_writer(out: Path, pause_seconds: float = 0.01) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(pause_seconds)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def test_kill_leaves_no_artifact_and_the_next_writer_goes_on(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "a")
    process.kill()
    process.wait()
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "a.part").is_dir()
    with pytest.raises(UserError):
        Report.open(tmp_path / "a.part")
    assert seal(tmp_path / "a").file("sub/weights.bin").read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_writers_at_once(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "a")
    try:
        with pytest.raises(UserError, match="another process is writing"):
            seal(tmp_path / "a")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_full_disk(tmp_path: Path) -> None:
    """A real file system of 256 KiB, in a mount namespace of its own."""
    script = tmp_path / "fill.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from pathlib import Path
            from kdpipe.core.artifact import Order, drafting
            from kdpipe.core.kinds import Report
            from kdpipe.core.config import PackageConfig
            from kdpipe.core.errors import UserError
            out = Path(sys.argv[1]) / "a"
            try:
                with drafting(Report, Order("test", PackageConfig(), {}), out) as draft:
                    if sys.argv[2] == "os":
                        (draft.path / "weights").write_bytes(b"x" * 1_000_000)
                    else:
                        import numpy, safetensors.numpy
                        big = {"x": numpy.zeros(1_000_000, numpy.uint8)}
                        safetensors.numpy.save_file(big, draft.path / "weights")
            except UserError as error:
                print(error)
            print([path.name for path in out.parent.iterdir()])
        """)
    )
    (tmp_path / "disk").mkdir()
    for writer in ("os", "safetensors"):  # the second wraps the error in one of its own
        inside = (
            f"mount -t tmpfs -o size=256k none {tmp_path}/disk && {sys.executable} {script} {tmp_path}/disk {writer}"
        )
        done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, check=False)
        assert "no disk space left" in done.stdout, done.stderr
        assert done.stdout.strip().endswith("[]")
