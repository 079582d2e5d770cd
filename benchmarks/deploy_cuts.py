"""Deployments that are cut: what a device serves afterwards, and whether the next deployment succeeds.

    python benchmarks/deploy_cuts.py OLD NEW --cuts 50 --switches 1000

OLD and NEW are folders of bundles. NEW is deployed to a folder on this machine where OLD is live, and at a random
moment of that something is killed with SIGKILL, in turns: everything (a power cut, as far as processes go), the
device's side alone (it crashed, or ran out of memory), the host's side alone (the link is gone, and the device goes on
by itself). NEW is made larger by --padding, so that pushing and hashing it take their share of the time.

Then what is live is checked by the runner: every hash, and the golden inputs replayed. Switches are the same around
the switch alone: a process that does nothing else is killed at a random moment.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from kdpipe.core import sealed
from kdpipe.runtime import store

KINDS = ("everything", "the device's side", "the host's side")
SWITCHING = """
import sys
from pathlib import Path
from kdpipe.runtime import store

root, *names = Path(sys.argv[1]), *sys.argv[2:]
entry = {"deployed_utc": "", "passed_over": False}
print("begun", flush=True)
while True:
    for live, other in (names, names[::-1]):
        store._write_history(root, [{"digest": name, **entry} for name in (other, live)])
        store._switch(root, live)
"""


def padded(bundle: Path, copy: Path, size: int) -> Path:
    """A copy of a bundle with a file more, sealed again."""
    shutil.copytree(bundle, copy)
    with (copy / "padding.bin").open("wb") as stream:
        stream.write(os.urandom(size))
    manifest = json.loads((copy / sealed.MANIFEST).read_text())
    manifest["files"]["padding.bin"] = {"sha256": sealed.sha256_file(copy / "padding.bin"), "size_bytes": size}
    manifest["digest"] = sealed.digest(manifest)
    (copy / sealed.MANIFEST).write_bytes(sealed.spelled(manifest))
    return copy


def descendants(process: int) -> list[int]:
    """Every process below one, the nearest first."""
    try:
        children = [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [pid for child in children for pid in descendants(child)]


def kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def start(bundle: Path, folder: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "kdpipe", "deploy", str(bundle), "--device", "board"]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def verified(root: Path) -> str | None:
    """Digest of what is live if the runner finds it whole and right, else None."""
    line = [sys.executable, "-m", "kdpipe.runtime", "verify", str(root / "live")]
    done = subprocess.run(line, capture_output=True, check=False)
    if done.returncode != 0:
        print(done.stderr.decode(errors="replace"), file=sys.stderr)
    name = (root / "live").resolve().name
    return name if done.returncode == 0 and store.digest(root / "store" / name) == name else None


def reached(root: Path, new: str) -> str:
    """How far a deployment came."""
    if store.live(root) == new:
        return "switched"
    if (root / "store" / new).exists():
        return "pushed"
    return "pushing" if (root / "store" / f"{new}.part").exists() else "before the push"


class Device:
    """A folder on this machine with OLD live, made anew for every cut."""

    def __init__(self, folder: Path, old: Path) -> None:
        self.folder, self.root, self.begun = folder, folder / "device", folder / "begun"
        (folder / "devices.yaml").write_text(f"board: {{kind: local, folder: {self.root}}}\n")
        assert start(old, folder).wait() == 0
        self.root.rename(self.begun)

    def renew(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.begun, self.root, symlinks=True)


def cut(device: Device, bundle: Path, kind: str, seconds: float) -> None:
    """Deploy and kill, so many seconds after the start."""
    deploying = start(bundle, device.folder)
    end = time.monotonic() + seconds
    while time.monotonic() < end and deploying.poll() is None:
        time.sleep(0.002)
    below = descendants(deploying.pid)
    kill({KINDS[0]: [deploying.pid, *below], KINDS[1]: below, KINDS[2]: [deploying.pid]}[kind])
    deploying.wait()


def switches(device: Device, old: str, new: str, times: int, moments: random.Random) -> int:
    """How often what is live is one of both, after a process that switches all the time was killed."""
    right = 0
    for _ in range(times):
        switching = subprocess.Popen(
            [sys.executable, "-c", SWITCHING, str(device.root), old, new], stdout=subprocess.PIPE
        )
        assert switching.stdout is not None
        assert switching.stdout.readline() == b"begun\n"
        time.sleep(moments.uniform(0, 0.02))
        switching.kill()
        switching.wait()
        status = store.status(device.root)
        right += status["live"]["digest"] in (old, new) and status["live"]["fault"] is None
    return right


def main(
    old: Annotated[Path, typer.Argument(help="folder of the bundle that is live")],
    new: Annotated[Path, typer.Argument(help="folder of the one that is deployed")],
    cuts: Annotated[int, typer.Option(help="deployments that are cut")] = 50,
    switched: Annotated[int, typer.Option("--switches", help="kills around the switch alone")] = 200,
    padding: Annotated[float, typer.Option(help="MB that are added to NEW")] = 64,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
) -> None:
    """Cut, look, deploy again; exits 1 unless every device served a whole version and took the next deployment."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        larger = padded(new, folder / "new", round(padding * 1e6))
        names = store.digest(old), store.digest(larger)
        device = Device(folder, old.absolute())
        whole, again, phases = 0, 0, collections.Counter[str]()
        longest = 0.0
        for at in range(cuts):
            if at % 10 == 0:  # the machine's load changes: how long does a whole one take now?
                device.renew()
                begun = time.monotonic()
                assert start(larger, folder).wait() == 0
                longest = time.monotonic() - begun
            device.renew()
            cut(device, larger, KINDS[at % 3], moments.uniform(0, longest))
            phases[reached(device.root, names[1])] += 1
            whole += verified(device.root) in names
            done = start(larger, folder).wait()
            again += done == 0 and verified(device.root) == names[1]
        print(
            f"kdpipe {version('kdpipe')}, onnxruntime {version('onnxruntime')}, Linux {os.uname().release}, seed {seed}"
        )
        print(f"{cuts} deployments cut: {dict(phases)}")
        print(f"  {whole} of {cuts} serve a whole version, old or new")
        print(f"  {again} of {cuts} next deployments succeed")
        device.renew()
        assert start(larger, folder).wait() == 0
        right = switches(device, *names, switched, moments)
        print(f"  {right} of {switched} kills around the switch alone leave a whole version live")
    if (whole, again, right) != (cuts, cuts, switched):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
