"""A machine behind OpenSSH's client: the user's own configuration, agent, jump hosts and known hosts hold."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from ..core.config import DeviceSettings
from ..core.errors import DeviceLost, UserError
from ..core.proc import run_group
from ..core.progress import note
from ..core.sealed import printable
from .runner import RunnerDevice, failure

Done = subprocess.CompletedProcess[bytes]
ADDRESS = re.compile(
    r"(?P<uri>ssh://)?((?P<user>\S+)@)?(?P<host>\[[\w:.%]+\]|[\w.%][\w.%-]*|[\w.%]*:[\w:.%]*:[\w:.%]*)(:(?P<port>\d+))?/?"
)
LINK_FAILED = 255  # ssh's own exit code; a command's is made another (see ``argv``)
STALLED_SECONDS = 30  # without a byte, after which rsync gives up at both ends
PERSIST_SECONDS = 60  # that a connection outlives its last command, should this process be killed
ATTEMPTS, PAUSE_SECONDS = 3, 1.0  # at a transfer whose link breaks off and is back at once

# What OpenSSH's client is told. Of a setting it takes the first value that it reads, so this is not the user's to
# change: no question is asked, no unknown machine is believed, nothing but commands and files goes over the link.
FIRST = """\
Host *
  BatchMode yes
  StrictHostKeyChecking yes
  UpdateHostKeys no
  LogLevel INFO
  ClearAllForwardings yes
  ForwardAgent no
  ForwardX11 no
  PermitLocalCommand no
  RemoteCommand none
  RequestTTY no
"""
# One connection carries all, and so does one to every jump host. It says nothing of why it failed ...
SHARED = """\
  ControlMaster auto
  ControlPath {folder}/%C
  ControlPersist {persist}
"""
# ... which one of its own does.
ALONE = """\
  ControlMaster no
  ControlPath none
  ControlPersist no
"""
# These hold where the user's own configuration says nothing: a dead link ends after three times five seconds.
LAST = """\
Host *
  ConnectTimeout 10
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
OWN_CONFIGURATION = ("~/.ssh/config", "/etc/ssh/ssh_config")
RSYNC_SAYS = b"rsync "  # first; openrsync, which takes other options, doesn't
BROKEN_OFF = {LINK_FAILED, -signal.SIGPIPE, 10, 12, 30, 35}  # so end ssh, sftp and rsync where the link did
# What the client says of a link that can't be had, and what may help.
LOST = {
    "Could not resolve hostname": "is the name right, is the device on?",
    "Connection refused": "is an sshd running there, is it the right port?",
    "timed out|No route to host|Network is unreachable|not responding": "is the device on, is it in reach?",
}


class SshDevice(RunnerDevice):
    """Reached by this machine's ``ssh``, ``rsync`` and ``sftp``. The device needs no more than an sshd and a shell."""

    def __init__(self, settings: DeviceSettings) -> None:
        super().__init__(settings)
        address = settings.address or ""
        found = ADDRESS.fullmatch(address)
        if found is None or (found["port"] and not found["uri"]):
            raise UserError(
                f"'{self.name}': no address of ssh's is like '{printable(address, 100)}', wanted HOST, USER@HOST, "
                "ssh://USER@HOST:PORT or a name of your ssh_config"
            )
        self._host, self._user, self._port = found["host"].strip("[]"), found["user"], found["port"]
        self._disconnect: Callable[[], object] | None = None

    # ---- the connection --------------------------------------------------------------------------------------

    @cached_property
    def _folder(self) -> Path:
        """Of the connection's sockets and its configuration, gone with this object."""
        for tool in ("ssh", "sftp"):
            if shutil.which(tool) is None:
                raise UserError(f"'{self.name}' needs '{tool}' on this machine: install OpenSSH's client")
        # A socket's path may have 107 characters, whatever the folder for temporary files is called.
        folder = Path(tempfile.mkdtemp(prefix="kdpipe-", dir="/tmp"))
        self._disconnect = weakref.finalize(self, disconnect, folder)
        (folder / "shared").write_text(self._configuration(SHARED.format(folder=folder, persist=PERSIST_SECONDS)))
        (folder / "alone").write_text(self._configuration(ALONE))
        return folder

    def _configuration(self, connection: str) -> str:
        lines = [f"Host {self._host}"]
        lines += [f"  User {self._user}"] if self._user else []
        lines += [f"  Port {self._port}"] if self._port else []
        own: tuple[str, ...] = OWN_CONFIGURATION
        if self.settings.ssh_config:
            given = Path(self.settings.ssh_config).expanduser().absolute()
            if not given.is_file():
                raise UserError(f"'{self.name}': no ssh_config at {given}")
            own = (str(given),)
        return "\n".join([*lines, FIRST + connection, *(f'Include "{path}"' for path in own), LAST])

    def close(self) -> None:
        """Remove the working folder and end the connection. The next command makes another."""
        try:
            super().close()
        finally:
            if self._disconnect is not None:
                self._disconnect()
                self._disconnect = None
                del self._folder

    def argv(self, command: str) -> list[str]:
        # A POSIX shell, whichever the user's is. It stays to the command's end: of a command that a signal killed
        # ssh would say what it says of a lost link.
        kept = f"({command}); code=$?; test $code -eq {LINK_FAILED} && exit 254; exit $code"
        return [*self._client("ssh"), self._host, f"sh -c {shlex.quote(kept)}"]

    def _client(self, tool: str, configuration: str = "shared") -> list[str]:
        return [tool, "-F", str(self._folder / configuration)]

    @property
    def _bracketed(self) -> str:
        """The host as rsync and sftp take it, for which a colon begins a path."""
        return f"[{self._host}]" if ":" in self._host else self._host

    def lost(self, returncode: int, stderr: bytes) -> str | None:
        """Why the link is gone, asked once more. Raises UserError where another attempt won't help: keys."""
        if returncode != LINK_FAILED:
            return None
        again = [*self._client("ssh", "alone"), self._host, "exit 0"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = run_group(again, 60, environment=self.environment())
            if done.returncode == LINK_FAILED:
                stderr = done.stderr
        return explain(stderr.decode(errors="replace"), self.settings)

    # ---- files -----------------------------------------------------------------------------------------------

    def send(self, source: Path, path: str) -> None:
        size = sum(file.stat().st_size for file in [source, *source.rglob("*")] if file.is_file())
        self.check_space(size, path)
        self._transfer(lambda: self._rsync(source, path) if self._has_rsync else self._put(source, path), size, path)

    def receive(self, path: str, target: Path) -> None:
        found = self.shell(f"stat -L -c '%s-%i-%Y' {shlex.quote(path)}").split()[-1]
        part = target.with_name(f"{target.name}.{found}.part")  # of this very file: else nothing to go on from
        self._transfer(lambda: self._get(path, part, int(found.partition("-")[0])))
        part.replace(target)

    @cached_property
    def _has_rsync(self) -> bool:
        """Whether both sides have it, and nothing that a shell there prints by itself disturbs it."""
        ask = ["rsync", "--version"]
        if shutil.which(ask[0]) is None or not run_group(ask, 60).stdout.startswith(RSYNC_SAYS):
            return False
        return self.attempt(shlex.join(ask), 60).stdout.startswith(RSYNC_SAYS)

    def _rsync(self, source: Path | str, target: Path | str) -> Done:
        """Bring ``source`` to ``target``, of which the one there is given as text."""
        ends = [f"{self._bracketed}:{end}" if isinstance(end, str) else str(end.absolute()) for end in (source, target)]
        if isinstance(source, Path) and source.is_dir():
            ends[0] += "/"  # what is in it, not itself
        # In place: however the link ends, what has arrived is there to go on from, and checksums find it.
        options = ["--recursive", "--inplace", "--protect-args", f"--timeout={STALLED_SECONDS}"]
        return self._run(["rsync", *options, f"--rsh={shlex.join(self._client('ssh'))}", *ends])

    def _put(self, source: Path, path: str) -> Done:
        """Bring what is missing of ``source`` to ``path`` by sftp, going on at the sizes that the files have there."""
        files = {path: source}
        if source.is_dir():
            files = {f"{path}/{file.relative_to(source).as_posix()}": file for file in sorted(source.rglob("*"))}
            folders = [path, *(there for there, file in files.items() if file.is_dir())]
            self.shell(f"mkdir -p {shlex.join(folders)}")
        found = self.attempt(f"find {shlex.quote(path)} -type f -exec wc -c {{}} \\;", 60).stdout
        matches = (re.fullmatch(r" *(\d+) (.+)", line) for line in found.decode(errors="replace").splitlines())
        sizes = {match[2]: int(match[1]) for match in matches if match}
        lines = []
        for there, file in files.items():
            if file.is_file() and sizes.get(there) != (size := file.stat().st_size):
                verb = "reput" if 0 < sizes.get(there, 0) < size else "put"
                lines.append(f"{verb} {quoted(str(file.absolute()))} {quoted(there)}")
        return self._sftp(lines)

    def _get(self, path: str, part: Path, size: int) -> Done:
        if self._has_rsync:
            return self._rsync(path, part)
        there = part.stat().st_size if part.exists() else None
        verb = "reget" if there else "get"
        return self._sftp([f"{verb} {quoted(path)} {quoted(str(part.absolute()))}"] if there != size else [])

    def _sftp(self, lines: Sequence[str]) -> Done:
        return self._run([*self._client("sftp"), "-b", "-", self._bracketed], "\n".join([*lines, ""]).encode())

    def _run(self, command: Sequence[str], stdin: bytes = b"") -> Done:
        return run_group(command, None, stdin, self.environment())

    def _transfer(self, copy: Callable[[], Done], size: int = 0, path: str | None = None) -> None:
        """Copy, and go on where the link broke off that is back by now.

        Args:
            size: bytes of what is sent.
            path: where it is sent.

        Raises:
            DeviceLost: the link is gone, or breaks off again and again.
            UserError: no space, no right to write, or the like.
        """
        for _ in range(ATTEMPTS):
            done = copy()
            if done.returncode == 0:
                return
            said = done.stderr.decode(errors="replace")
            if "message too long" in said:
                raise UserError(
                    f"'{self.name}': a shell there prints something at every command, which garbles files: let it be "
                    "silent where nobody is at a terminal (in ~/.bashrc: case $- in *i*) ;; *) return ;; esac)"
                )
            time.sleep(PAUSE_SECONDS)
            if path is None:
                self.shell("exit 0")  # whether the link is there
            else:
                self.check_space(size, path, said)
            if done.returncode not in BROKEN_OFF:
                lines = [line for line in said.splitlines() if line.strip()] or [failure(done)]
                reason = next((line for line in lines if line.startswith("rsync: ")), lines[-1])
                raise UserError(f"'{self.name}' refused a file: {printable(reason, 500)}")
            note(f"'{self.name}': the link broke off and is back, going on")
        raise DeviceLost(f"'{self.name}' breaks off every transfer ({failure(done)})")


def quoted(path: str) -> str:
    """A word of sftp's, which takes * and ? for patterns where they stand outside quotes."""
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def disconnect(folder: Path) -> None:
    """End every connection whose socket lies in ``folder`` (a jump host has one of its own), and remove it."""
    for socket in folder.iterdir():
        if socket.is_socket():
            command = ["ssh", "-F", str(folder / "shared"), "-S", str(socket), "-O", "exit", "any"]
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                run_group(command, 10)
    shutil.rmtree(folder, ignore_errors=True)


def explain(said: str, settings: DeviceSettings) -> str:
    """Why there is no link, by what OpenSSH's client ``said`` of it, and what may help.

    Raises:
        UserError: it is refused, here or there, and stays so until somebody does something.
    """
    device = f"'{settings.name}' ({settings.address})"
    by_hand = shlex.join(["ssh", *(["-F", settings.ssh_config] if settings.ssh_config else []), settings.address or ""])
    if found := re.search(r"Host key for (\S+) has changed", said):
        place = re.search(r"Offending .*key in (.+):(\d+)", said)
        line = f"line {place[2]} of {place[1]}" if place else "its line of known_hosts"
        raise UserError(
            f"{device}: WARNING: the host key of {found[1]} has CHANGED: somebody may stand in between, or it was "
            f"installed anew. Only if you know why: remove {line}, then run '{by_hand}' once and accept the new key"
        )
    if found := re.search(r"No \S+ host key is known for (\S+) and", said):
        raise UserError(
            f"{device}: the host key of {found[1]} is not known here: run '{by_hand}' once, compare the fingerprint "
            "with the device's own and accept it"
        )
    refused = r"(?:(\S+): )?Permission denied \(([a-z,-]+)\)|(Too many authentication failures)"
    if found := re.search(refused, said):
        whose, why = found[1] or settings.address, found[2] or found[3]
        raise UserError(
            f"{device}: {whose} takes none of your keys ({why}): see that '{by_hand}' "
            "works without a password (ssh-copy-id, ssh-add, IdentityFile in your ssh_config)"
        )
    if found := re.search(r".*(?:Bad configuration option|Bad owner or permissions|Unable to negotiate).*", said):
        raise UserError(f"{device}: ssh refuses: {printable(found[0], 300)}")
    if "Host key verification failed" in said:  # for another reason: it was revoked
        raise UserError(f"{device}: its host key is refused: see what '{by_hand}' says of it")
    for words, cure in LOST.items():
        if found := re.search(rf".*(?:{words}).*", said):
            return f"{found[0].strip().removeprefix('ssh: ')}: {cure}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"the link broke off ({lines[-1] if lines else 'no reason given'})"
