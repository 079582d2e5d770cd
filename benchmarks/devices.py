"""Eight devices at once against the slowest of them alone: this machine, and seven behind an sshd of this machine's.

    python benchmarks/devices.py BUNDLE [BUNDLE ...] --pairs 5

Needs openssh-server. The devices are real as far as links, stores, uploads, digests, probes, locks and watches go.
What would take a whole CPU is a stand-in, since eight processes on two cores would only show that there are two cores:
``predict``, ``measure`` and ``start`` run once for real, and from then on sleep for as long as they took, times the
device's slowness (1 to 2), and answer the same again. Nothing but the wall time of the whole command is taken from it.
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kdpipe import __version__
from kdpipe.core.kinds import Bundle

COUNT = 8
# Starts in place of Python, with the real one, the folder of answers and the slowness before Python's own arguments.
STAND_IN = """
import hashlib, json, os, shutil, subprocess, sys, time
real, answers, slowness, *arguments = sys.argv[1:]
command = arguments[2] if arguments[:2] == ["-m", "runtime"] else ""
if command not in ("predict", "measure", "start"):
    os.execv(real, [real, *arguments])
options = dict(zip(arguments, arguments[1:]))
outputs = options.get("--logits")
asked = [os.path.basename(word) for word in arguments if word not in (outputs, options["--limit-seconds"])]
kept = os.path.join(answers, hashlib.sha256(repr(asked).encode()).hexdigest())
if not os.path.exists(kept):
    begun = time.monotonic()
    done = subprocess.run([real, *arguments], stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    told = json.loads(done.stdout.splitlines()[-1])
    if outputs:
        shutil.copyfile(outputs, kept + ".outputs")
    with open(kept + ".part", "w") as stream:
        json.dump({"seconds": time.monotonic() - begun, "told": told}, stream)
    os.rename(kept + ".part", kept)
else:
    with open(kept) as stream:
        found = json.load(stream)
    told, now = found["told"], time.monotonic_ns()
    time.sleep(found["seconds"] * float(slowness))
    if outputs:
        shutil.copyfile(kept + ".outputs", outputs)
    if told.get("steady"):  # the watch is to have seen it
        told["steady"]["ended_ns"] += now - told["steady"]["begun_ns"]
        told["steady"]["begun_ns"] = now
print(json.dumps(told))
"""


@contextmanager
def served(folder: Path) -> Iterator[list[str]]:
    """Addresses of an sshd on this machine that takes this user's, one a device, as names of ``folder``/ssh_config."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        raise SystemExit("no sshd on this machine: apt-get install --no-install-recommends openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copy(folder / "key.pub", folder / "authorized")
    names = [f"board{at}" for at in range(1, COUNT)]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "ssh_config").write_text(
        f"Host board*\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {folder}/key\n"
        f" IdentitiesOnly yes\n IdentityAgent none\n UserKnownHostsFile {folder}/known\n"
    )
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
        "Subsystem sftp internal-sftp\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        try:
            for _ in range(100):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield names
        finally:
            process.terminate()
            process.wait()


def describe(folder: Path, names: Sequence[str]) -> None:
    """devices.yaml in ``folder``: each with a folder of its own, and slower than the one before."""
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "answers").mkdir()
    devices = {}
    for at, name in enumerate(names):
        slowness = 1 + at / (COUNT - 1)
        python = [sys.executable, "-I", "-S", folder / "stand_in.py", sys.executable, folder / "answers", slowness]
        devices[name] = {"python": shlex.join(map(str, python)), "folder": str(folder / "devices" / name)}
        link = {"kind": "local"} if at == 0 else {"kind": "ssh", "address": name, "ssh_config": f"{folder}/ssh_config"}
        devices[name] |= link
    (folder / "devices.yaml").write_text(json.dumps(devices))  # which YAML is, too


def main(
    bundles: Annotated[list[Path], typer.Argument()],
    pairs: Annotated[int, typer.Option()] = 5,
    options: Annotated[str, typer.Option(help="of kdpipe bench")] = "--rounds 2 --cold-starts 2",
) -> None:
    with tempfile.TemporaryDirectory(prefix="kdpipe-devices-") as scratch:
        folder = Path(scratch)
        chain = folder / "artifacts"  # a copy: measurements are written beside the bundles
        shutil.copytree(bundles[0].absolute().parent, chain)
        copied = [str(chain / Bundle.open(bundle).path.name) for bundle in bundles]
        environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder)}

        def seconds(devices: Sequence[str]) -> float:
            command = [sys.executable, "-m", "kdpipe", "bench", *copied, "--device", ",".join(devices)]
            begun = time.monotonic()
            done = subprocess.run(
                [*command, *options.split()], cwd=folder, env=environment, capture_output=True, text=True
            )
            spent = time.monotonic() - begun
            if done.returncode not in (0, 75):  # 75: the times are made up, and told as untrusted
                raise SystemExit(done.stderr)
            return spent

        with served(folder) as boards:
            names = ["here", *boards]
            describe(folder, names)
            seconds(names[:1])  # what really takes how long
            seconds(names)  # what is brought to the devices lies there
            ratios, slowest, together = [], [], []
            for at in range(pairs):
                order = (names[-1:], names) if at % 2 == 0 else (names, names[-1:])
                spent = {len(devices): seconds(devices) for devices in order}
                slowest.append(spent[1])
                together.append(spent[COUNT])
                ratios.append(spent[COUNT] / spent[1])
                typer.echo(f"slowest alone {spent[1]:.1f} s, all {spent[COUNT]:.1f} s: {ratios[-1]:.2f}", err=True)
    typer.echo(
        f"{date.today()}, kdpipe {__version__}: {COUNT} devices at once take {np.median(ratios):.2f} times the slowest "
        f"alone ({min(ratios):.2f} to {max(ratios):.2f} in {pairs} pairs); slowest alone {np.median(slowest):.1f} s, "
        f"all {np.median(together):.1f} s"
    )


if __name__ == "__main__":
    typer.run(main)
