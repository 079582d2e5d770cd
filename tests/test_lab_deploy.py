"""Deploying to a disk that is full, and to one whose power is cut: real ones, in files and in memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import assert_one_line, kdpipe, rewrite_manifest, system_command

from kdpipe.core.config import DeviceSettings
from kdpipe.core.kinds import Bundle
from kdpipe.devices.local import LocalDevice
from kdpipe.runtime import store
from kdpipe.runtime.store import digest

pytestmark = pytest.mark.lab

SHUT_DOWN = 0x8004587D  # the kernel's EXT4_IOC_SHUTDOWN: nothing more reaches the disk
NO_FLUSH = 2  # not even what the journal holds, as when the power goes
CUTS = 12

# What happens on a device while a bundle is deployed to it: the upload, then the runner.
DEPLOYING = """
import shutil, sys
from pathlib import Path
from kdpipe.runtime import store
bundle, root = Path(sys.argv[1]), Path(sys.argv[2])
print("begun", flush=True)
name = store.digest(bundle)
shutil.copytree(bundle, root / "store" / f"{name}.part", dirs_exist_ok=True)
store.receive(root, name)
store.install(root, name)
"""


@contextlib.contextmanager
def mounted(source: Path | str, at: Path, *options: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.fail("the lab mounts disks: run 'make lab' as root")
    at.mkdir(exist_ok=True)
    subprocess.run([system_command("mount"), *options, str(source), str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def start(bundle: Path, disk: Path) -> subprocess.Popen[bytes]:
    """Deploy, from the moment that this returns."""
    deploying = subprocess.Popen([sys.executable, "-c", DEPLOYING, str(bundle), str(disk)], stdout=subprocess.PIPE)
    assert deploying.stdout is not None and deploying.stdout.readline() == b"begun\n"
    return deploying


@pytest.fixture
def bundles(packed: Bundle, tmp_path: Path) -> tuple[Path, Path]:
    """Two bundles that differ in what their manifests say of when they were made."""
    for name in ("old", "new"):
        shutil.copytree(packed.path, tmp_path / name)
    rewrite_manifest(tmp_path / "new", lambda value: value.update(created_utc="2026-01-01T00:00:00+00:00"))
    return tmp_path / "old", tmp_path / "new"


def test_power_is_cut_at_any_moment(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """A file system that is shut down at once, as a power cut does, comes back with a whole version live."""
    old, new = bundles
    names = digest(old), digest(new)
    image, disk = tmp_path / "begun.img", tmp_path / "disk"
    with image.open("wb") as stream:
        stream.truncate(64 * 2**20)
    subprocess.run([system_command("mkfs.ext4"), "-q", str(image)], check=True)
    with mounted(image, disk, "-o", "loop"):
        for bundle in (new, old):  # NEW's digest is known in the history already, or not: both happen on devices
            subprocess.run(
                [sys.executable, "-c", DEPLOYING, str(bundle), str(disk)], check=True, stdout=subprocess.PIPE
            )
        shutil.rmtree(disk / "store" / names[1])
        with start(new, disk) as deploying:
            begun = time.monotonic()
            assert deploying.wait() == 0
            seconds = time.monotonic() - begun
        store.rollback(disk)
        shutil.rmtree(disk / "store" / names[1])
    moments, seen = random.Random(0), set()
    for at in range(CUTS):
        cut = tmp_path / f"{at}.img"
        shutil.copyfile(image, cut)
        with mounted(cut, disk, "-o", "loop"):
            deploying = start(new, disk)
            # The last two come after the end: what was told to be live is live.
            time.sleep((at + moments.random()) / (CUTS - 2) * seconds if at else 0)
            if at >= CUTS - 2:
                assert deploying.wait(60) == 0
            folder = os.open(disk, os.O_RDONLY)
            fcntl.ioctl(folder, SHUT_DOWN, NO_FLUSH.to_bytes(4, sys.byteorder))
            os.close(folder)
            deploying.kill()
            deploying.wait()
        with mounted(cut, disk, "-o", "loop"):
            status = store.status(disk)
            assert status["live"]["fault"] is None
            assert status["live"]["digest"] in names
            seen.add(status["live"]["digest"])
            if at >= CUTS - 2:
                assert status["live"]["digest"] == names[1]
            subprocess.run([sys.executable, "-c", DEPLOYING, str(new), str(disk)], check=True, stdout=subprocess.PIPE)
            assert store.status(disk)["live"]["fault"] is None and store.live(disk) == names[1]
            assert store.rollback(disk)["live"]["digest"] == names[0]
        cut.unlink()
    assert seen == set(names)


def fill(folder: Path, left: int = 0) -> None:
    """Take all the space that is left on a disk but so much."""
    size = max(0, shutil.disk_usage(folder).free - left)
    with (folder / "filling").open("wb") as stream, contextlib.suppress(OSError):
        os.posix_fallocate(stream.fileno(), 0, size)


def test_a_full_disk_leaves_the_old_version_live(
    bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = bundles
    monkeypatch.chdir(tmp_path)
    size = sum(path.stat().st_size for path in old.rglob("*") if path.is_file())
    with mounted("tmpfs", tmp_path / "disk", "-t", "tmpfs", "-o", f"size={6 * size},nr_inodes=200") as disk:
        root = disk / "kdpipe"
        (tmp_path / "devices.yaml").write_text(f"board: {{kind: local, folder: {root}}}\n")
        assert kdpipe("deploy", old, "--device", "board").returncode == 0

        def still_old(also: set[str]) -> None:
            assert store.status(root)["live"] | {"since_utc": ""} == {**before, "since_utc": ""}
            assert {path.name for path in (root / "store").iterdir()} == {digest(old), *also}

        before = store.status(root)["live"]
        fill(disk, left=size)
        done = kdpipe("deploy", new, "--device", "board")
        assert_one_line(done, 2, "no space on 'board'", "are free", "kdpipe devices clean board")
        still_old(set())
        # Space enough, as far as the disk says, and no room for one more file.
        (disk / "filling").unlink()
        (disk / "many").mkdir()
        with contextlib.suppress(OSError):
            for at in range(200):
                (disk / "many" / str(at)).touch()
        for path in list((disk / "many").iterdir())[:8]:
            path.unlink()
        done = kdpipe("deploy", new, "--device", "board")
        assert_one_line(done, 2, "No space left on device")
        still_old(set())
        # Pushed whole, and then the disk is full to the last byte.
        shutil.rmtree(disk / "many")
        LocalDevice(DeviceSettings(name="board", folder=str(root))).store(new)
        fill(disk)
        done = kdpipe("deploy", new, "--device", "board")
        assert_one_line(done, 1, "no space left on the disk", "'board' serves what it did before")
        still_old({digest(new)})
        assert_one_line(kdpipe("deploy", "--rollback", "--device", "board"), 1, "no bundle was live before")
        assert json.loads(kdpipe("devices", "status", "board", "--json").stdout)["devices"]["board"]["free_bytes"] == 0
        assert kdpipe("devices", "clean", "board").returncode == 0
        still_old(set())
        (disk / "filling").unlink()
        assert kdpipe("deploy", new, "--device", "board").returncode == 0
        assert store.live(root) == digest(new) and store.status(root)["live"]["fault"] is None
