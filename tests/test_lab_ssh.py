"""Devices behind a real sshd: an unprivileged user, a jump host, a link that breaks, and faults on the device."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Made, Trained, assert_one_line, kdpipe, system_command
from lab import USER, Computer, Link, Sshd, clean_environment, free_port, make_key, network_of, serve, wait_until

from kdpipe.core.config import DeviceSettings, MeasureSettings
from kdpipe.core.errors import DeviceLost, ExitCode, KdpipeError, UserError
from kdpipe.core.kinds import Bundle, Measurement
from kdpipe.devices import find_device, opened
from kdpipe.devices.ssh import SshDevice
from kdpipe.runtime.store import digest

pytestmark = pytest.mark.lab

SHORT = MeasureSettings(seconds=0.1, max_seconds=0.1, min_samples=20, images=8, warm_up_seconds=0.1)


FILES = ["rsync", "sftp"]


def device_of(sshd: Sshd, **settings: Any) -> SshDevice:
    given = {"address": "device", "ssh_config": str(sshd.config), "python": sshd.computer.python(), **settings}
    return SshDevice(DeviceSettings(name="pi", kind="ssh", **given))


def write_devices(project: Path, sshd: Sshd, **settings: str) -> None:
    given = {"address": "device", "ssh_config": str(sshd.config), "python": sshd.computer.python(), **settings}
    lines = [f"  {name}: {value}" for name, value in {"kind": "ssh", **given}.items()]
    (project / "devices.yaml").write_text("\n".join(["pi:", *lines, ""]))


@pytest.fixture(scope="module")
def computer() -> Iterator[Computer]:
    made = Computer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def without_rsync() -> Iterator[Computer]:
    made = Computer()
    made.hide("rsync")
    yield made
    made.close()


@pytest.fixture
def sshd(computer: Computer) -> Iterator[Sshd]:
    started = serve(computer)
    yield started
    started.stop()
    for left in (".kdpipe", ".bashrc"):  # the next test finds the home as it was
        computer.run(f"rm -rf {computer.home}/{left}")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", generator.integers(0, 256, (40, 32, 32, 3), np.uint8))
    return tmp_path / "images.npy"


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """A folder that no link compresses, with names that a shell would take apart."""
    folder = tmp_path / "upload"
    (folder / "a folder [1]").mkdir(parents=True)
    (folder / "large.bin").write_bytes(np.random.default_rng(0).bytes(UPLOAD_BYTES))
    (folder / "a folder [1]" / 'it\'s "so" *.txt').write_text("small")
    (folder / "empty").touch()
    return folder


UPLOAD_BYTES = 6_000_000


def stored(computer: Computer, device: SshDevice) -> list[str]:
    """What the store there holds besides the runner."""
    store = computer.seen(device.root) / "store"
    return sorted(path.name for path in store.iterdir() if path.name != Path(device.runner).name)


# ---- the whole path ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["direct", "jump host"])
@pytest.mark.parametrize("files", FILES)
def test_a_bundle_runs_behind_an_sshd_as_it_does_here(
    request: pytest.FixtureRequest, made: Made, images: Path, tmp_path: Path, through: str, files: str
) -> None:
    computer: Computer = request.getfixturevalue("computer" if files == "rsync" else "without_rsync")
    jump = serve(computer) if through == "jump host" else None
    sshd = serve(computer, jump=jump)
    device, bundle = device_of(sshd), made.bundles["onnxruntime-int8"]
    probe = device.probe()
    assert probe.machine and "onnxruntime" in probe.runtimes and device.runs("onnxruntime")
    outputs = {}
    for name, each in (("there", device), ("here", find_device("local"))):
        (tmp_path / name).mkdir()
        with opened(each, tmp_path / name):
            each.push(bundle.path, "bundle")
            each.push(images, "images.npy")
            assert each.predict("bundle", "images.npy", tmp_path / name / "outputs.npy", 120).images == 40
            assert each.measure("bundle", "images.npy", SHORT, 120).latency_ns
        outputs[name] = np.load(tmp_path / name / "outputs.npy")
    np.testing.assert_array_equal(outputs["there"], outputs["here"])
    assert [path.name for path in tmp_path.glob("there/*")] == ["outputs.npy"], "a part of a download was left"
    assert not list((computer.home / ".kdpipe" / "work").iterdir()), "a working folder was left"
    assert (computer.home / ".kdpipe" / "store").stat().st_uid == computer.home.stat().st_uid != 0
    kept = {path.name: path.stat().st_mtime_ns for path in (computer.home / ".kdpipe" / "store").iterdir()}
    with opened(device, tmp_path):
        device.push(bundle.path, "bundle")
    again = {path.name: path.stat().st_mtime_ns for path in (computer.home / ".kdpipe" / "store").iterdir()}
    assert kept == again and len(kept) == 3, "what lies there was sent again"
    accepted = [(each.folder / "log").read_text().count("Accepted publickey") for each in (sshd, jump) if each]
    assert accepted == [2] * len(accepted), "each of the two sessions makes one connection"
    sshd.stop()


def test_bench_measures_on_the_device_as_on_this_machine(made: Made, sshd: Sshd, workdir: Path) -> None:
    names = ["onnxruntime-float32", "onnxruntime-int8"]
    folders = [made.bundles[name].path for name in names]
    write_devices(workdir, sshd)
    options = ["--rounds", 2, "--seconds", 0.1, "--min-samples", 20, "--warm-up-seconds", 0.1]
    options += ["--max-seconds", 0.1, "--cold-starts", 1, "--corruptions", "dark", "--json"]
    here = kdpipe("bench", *folders, *options, "--out", workdir / "here", cwd=workdir)
    assert here.returncode in (ExitCode.DONE, ExitCode.UNTRUSTED), here.stderr
    done = kdpipe("bench", *folders, "--device", "pi", *options, "--out", workdir / "measurement", cwd=workdir)
    assert done.returncode in (ExitCode.DONE, ExitCode.UNTRUSTED), done.stderr
    measurement = Measurement.open(workdir / "measurement")
    assert measurement.facts.device == "pi" and not measurement.facts.emulated
    for name in names:
        np.testing.assert_array_equal(measurement.outputs(name), made.measurement.outputs(name))
        dark = measurement.outputs(name, "dark")
        np.testing.assert_array_equal(dark, Measurement.open(workdir / "here").outputs(name, "dark"))
        assert (dark != measurement.outputs(name)).any()


def test_predict_asks_the_device(packed: Bundle, trained: Trained, sshd: Sshd, workdir: Path) -> None:
    images = [sample.path for sample in trained.dataset.balanced("test", 12, seed=0)]
    write_devices(workdir, sshd)
    here, there = (kdpipe("predict", packed.path, *images, "--device", each, cwd=workdir) for each in ("local", "pi"))
    assert there.returncode == 0 and there.stdout == here.stdout, there.stderr
    assert len(there.stdout.splitlines()) == 13
    assert not list((sshd.computer.home / ".kdpipe" / "work").iterdir()), "a working folder was left"
    write_devices(workdir, sshd, python=sshd.computer.python("numpy"))
    done = kdpipe("predict", packed.path, *images, "--device", "pi", cwd=workdir)
    assert_one_line(done, ExitCode.MISTAKE, "'pi' cannot open a bundle of onnxruntime", "-m pip install onnxruntime")
    assert done.stdout == ""


def test_a_bundle_is_deployed_rolled_back_and_looked_at(made: Made, sshd: Sshd, workdir: Path) -> None:
    first, second = (made.bundles[f"onnxruntime-{variant}"].path for variant in ("float32", "int8"))
    write_devices(workdir, sshd)

    def live() -> Path:
        return (sshd.computer.home / ".kdpipe" / "live").resolve()

    for bundle in (first, second):
        done = kdpipe("deploy", bundle, "--device", "pi", cwd=workdir)
        assert done.returncode == 0 and "golden images within" in done.stdout, done.stderr
        assert live().name == digest(bundle) == digest(live())
    assert kdpipe("deploy", "--rollback", "--device", "pi", cwd=workdir).returncode == 0
    assert live().name == digest(first)
    status = kdpipe("devices", "status", "pi", cwd=workdir)
    assert status.returncode == 0 and "onnxruntime" in status.stdout, status.stderr
    write_devices(workdir, sshd, python=sshd.computer.python("numpy"))
    done = kdpipe("deploy", second, "--device", "pi", cwd=workdir)
    assert_one_line(done, ExitCode.MISTAKE, "'pi' cannot open a bundle of onnxruntime", "-m pip install onnxruntime")
    assert live().name == digest(first), "what was live was changed"


def test_an_address_may_be_a_uri_or_a_user_and_a_host(sshd: Sshd) -> None:
    plain = sshd.config.with_name("plain")
    wanted = ("IdentityFile", "IdentitiesOnly", "IdentityAgent", "UserKnownHostsFile", "GlobalKnownHostsFile")
    lines = [line for line in sshd.config.read_text().splitlines() if line.startswith(wanted)]
    plain.write_text("\n".join(lines) + "\n")
    for address, more in ((f"ssh://{USER}@127.0.0.1:{sshd.port}", ""), (f"{USER}@127.0.0.1", f"Port {sshd.port}\n")):
        plain.write_text("\n".join([*lines, more]))
        assert device_of(sshd, address=address, ssh_config=str(plain)).shell("id -un") == USER


def test_an_address_may_be_one_of_ipv6(computer: Computer, without_rsync: Computer, upload: Path) -> None:
    for each in (computer, without_rsync):
        sshd = serve(each, "::1")
        device = device_of(sshd, address="::1")
        sshd.config.write_text(sshd.config.read_text().replace("Host device", "Host ::1"))
        place = each.seen(device.store(upload))
        assert (place / "large.bin").read_bytes() == (upload / "large.bin").read_bytes()
        device.receive(f"{device.root}/store/{place.name}/empty", upload.parent / "received")
        assert (upload.parent / "received").read_bytes() == b""
        sshd.stop()
        each.run(f"rm -rf {device.root}")


def test_the_users_own_configuration_and_agent_hold(sshd: Sshd) -> None:
    """A user with nothing but ~/.ssh/config, a key in an agent, and a host that was never seen."""
    client, host = Computer(), f"Host board\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {USER}\n"
    packages, sources = client.folder / "packages", client.bring(ROOT)
    packages.mkdir()
    (packages / "kdpipe").symlink_to(sources)
    (client.home / ".ssh").mkdir(mode=0o700)
    (client.home / ".ssh" / "config").write_text(host)
    shutil.copy(sshd.folder / "key", client.home / "key")
    (client.home / "devices.yaml").write_text(
        f"board: {{kind: ssh, address: board, python: {sshd.computer.python()}}}\n"
    )
    client.run(f"chown -R {USER}: {client.home}")

    def as_user(line: str) -> subprocess.CompletedProcess[str]:
        environment = {**clean_environment(), "PYTHONPATH": str(packages), "SSH_AUTH_SOCK": f"{client.home}/agent"}
        command = client.command(
            *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "env", f"HOME={client.home}"),
            *("sh", "-c", f"cd && {line}"),
        )
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)

    probe = f"{client.python()} -m kdpipe devices probe board"
    try:
        assert_one_line(as_user(probe), ExitCode.MISTAKE, "host key of [127.0.0.1]:", "run 'ssh board' once")
        by_hand = as_user("ssh -o StrictHostKeyChecking=accept-new -o BatchMode=yes board true")
        assert "Permission denied" in by_hand.stderr  # accepted the host, has no key yet
        assert_one_line(as_user(probe), ExitCode.MISTAKE, "takes none of your keys (publickey)", "'ssh board' works")
        added = as_user("ssh-agent -a $SSH_AUTH_SOCK >/dev/null && ssh-add -q key && rm key")
        assert added.returncode == 0, added.stderr
        done = as_user(probe)
        assert done.returncode == 0 and "onnxruntime" in done.stdout, done.stderr
    finally:
        client.close()


def test_what_a_shell_complains_of_is_not_the_reason(sshd: Sshd, upload: Path) -> None:
    """Of a locale that is not there, say, as many boards do at every command; ``rsync`` and ``sftp`` pass it on."""
    (sshd.computer.home / ".bashrc").write_text("echo 'bash: warning: setlocale: cannot change locale' >&2\n")
    device = device_of(sshd)
    assert device._has_rsync and device.runner
    sshd.computer.run(f"chown root {device.root}/store")
    with pytest.raises(UserError, match=r"'pi' refused a file: rsync: .*Permission denied"):
        device.store(upload)


def test_no_connection_and_no_folder_is_left(sshd: Sshd, tmp_path: Path) -> None:
    """Not by ``close``, and not by a process that ends without it."""

    def folders() -> set[Path]:
        return set(Path("/tmp").glob("kdpipe-*"))

    before, device = folders(), device_of(sshd)
    with opened(device, tmp_path):
        during = folders() - before
        assert during
    wait_until(lambda: not during & folders(), 600, "the end of the connection's folder")  # or of others', as it may be
    before = folders()
    write_devices(tmp_path, sshd)
    command = [sys.executable, "-m", "kdpipe", "devices", "probe", "pi"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and "onnxruntime" in done.stdout, done.stderr
    left = folders() - before
    wait_until(lambda: not left & folders(), 600, "the end of the process's folder")
    wait_until(lambda: not sshd.computer.processes("sshd: pi"), 60, "the end of every session")


# ---- refused, in one line ------------------------------------------------------------------------------------


def unknown_host(sshd: Sshd) -> None:
    sshd.change("/known_hosts", "/nobody_known\nStrictHostKeyChecking no")  # the user's own word does not loosen it


def changed_host(sshd: Sshd) -> None:
    sshd.stop()
    make_key(sshd.folder / "host_key")
    sshd.start()


def wrong_key(sshd: Sshd) -> None:
    make_key(sshd.folder / "key")


def refused_connection(sshd: Sshd) -> None:
    sshd.change(f"Port {sshd.port}", f"Port {free_port()}")


def unknown_name(sshd: Sshd) -> None:
    sshd.change("HostName 127.0.0.1", "HostName nowhere.invalid")


def wrong_configuration(sshd: Sshd) -> None:
    sshd.change("IdentitiesOnly", "IdentityOnly")


REFUSED: dict[Callable[[Sshd], None], list[str]] = {
    unknown_host: ["is not known here", "run 'ssh -F", "once", "fingerprint"],
    changed_host: ["WARNING", "has CHANGED", "remove line 1 of", "known_hosts"],
    wrong_key: ["takes none of your keys (publickey)", "without a password"],
    refused_connection: ["cannot be reached", "Connection refused", "is an sshd running there"],
    unknown_name: ["cannot be reached", "nowhere.invalid", "is the name right"],
    wrong_configuration: ["ssh refuses", "Bad configuration option: identityonly"],
}


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("through", ["direct", "jump host"])
def test_a_link_that_cannot_be_had_is_one_line(
    computer: Computer, workdir: Path, fault: Callable[[Sshd], None], through: str
) -> None:
    faulty = serve(computer)
    reached = faulty
    if through == "jump host":  # which is the one with the fault; its error is told as well
        reached = serve(computer)
    fault(faulty)
    if through == "jump host":
        reached.start() if reached.process is None or reached.process.poll() is not None else None
        lines = faulty.config.read_text().replace("Host device", "Host jump")
        reached.config.write_text(f"{reached.config.read_text()}ProxyJump jump\n{lines}")
    write_devices(workdir, reached)
    begun = time.monotonic()
    done = kdpipe("devices", "probe", "pi", cwd=workdir)
    assert_one_line(done, ExitCode.MISTAKE, "'pi'", *REFUSED[fault])
    assert time.monotonic() - begun < 60
    assert not (computer.home / ".kdpipe").exists(), "something was changed there"
    faulty.stop()


def test_a_device_behind_the_jump_host_that_is_off_is_named(computer: Computer, workdir: Path) -> None:
    jump = serve(computer)
    sshd = serve(computer, jump=jump)
    sshd.change(f"Port {sshd.port}", f"Port {free_port()}")
    write_devices(workdir, sshd)
    assert_one_line(kdpipe("devices", "probe", "pi", cwd=workdir), ExitCode.MISTAKE, "cannot be reached", "refused")
    sshd.stop()


@pytest.mark.parametrize("address", ["-oProxyCommand=touch /tmp/x", "pi@host:2222", "a host", "pi@", ""])
def test_no_address_of_ssh_is_refused_before_anything_runs(address: str) -> None:
    with pytest.raises(UserError, match=r"no address of ssh's is like .* wanted HOST, USER@HOST, ssh://USER@HOST:PORT"):
        SshDevice(DeviceSettings(name="pi", kind="ssh", address=address))


def test_an_ssh_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    device = SshDevice(DeviceSettings(name="pi", kind="ssh", address="pi", ssh_config=str(tmp_path / "none")))
    with pytest.raises(UserError, match=f"no ssh_config at {tmp_path}/none"):
        device.probe()


def old_python(computer: Computer) -> str:
    """A real Python older than 3.9, brought to the computer."""
    for version in ("3.8", "3.7", "3.6", "2.7"):
        for found in Path.home().glob(f".pyenv/versions/{version}*/bin/python{version}"):
            place = computer.bring(found.parent.parent)
            started = f'LD_LIBRARY_PATH={place}/lib exec {place}/bin/{found.name} "$@"'
            return computer.script("old", started)
        if (path := shutil.which(f"python{version}")) is not None:
            return path
    pytest.fail("no Python older than 3.9 is on this machine to be refused: pyenv install 3.8")


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (lambda computer: "python3.99", ["has no 'python3.99'", "wanted Python 3.9 or newer", "`python:`"]),
        (old_python, ["has Python", "wanted 3.9 or newer"]),
        (lambda computer: computer.python("pip"), ["has no numpy", "-m pip install numpy`"]),
    ],
    ids=["none", "old", "without numpy"],
)
def test_a_python_that_will_not_do_is_one_line(
    sshd: Sshd, workdir: Path, python: Callable[[Computer], str], words: list[str]
) -> None:
    write_devices(workdir, sshd, python=python(sshd.computer))
    assert_one_line(kdpipe("devices", "probe", "pi", cwd=workdir), ExitCode.MISTAKE, "'pi'", *words)


def test_a_folder_of_another_user_is_one_line(sshd: Sshd, workdir: Path) -> None:
    (sshd.computer.folder / "of root").mkdir()
    write_devices(workdir, sshd, folder=f"{sshd.computer.folder}/of root/kdpipe")
    done = kdpipe("devices", "probe", "pi", cwd=workdir)
    assert_one_line(done, ExitCode.MISTAKE, "'pi' refused", "of root/kdpipe", "Permission denied")


@pytest.mark.parametrize("files", FILES)
def test_a_file_that_may_not_be_written_is_one_line(request: pytest.FixtureRequest, upload: Path, files: str) -> None:
    computer: Computer = request.getfixturevalue("computer" if files == "rsync" else "without_rsync")
    sshd = serve(computer)
    device = device_of(sshd)
    assert device.runner
    computer.run(f"chown -R root {device.root}/store && chmod -R go-w {device.root}/store")
    try:
        with pytest.raises(UserError, match=r"'pi' refused.*Permission denied"):
            device.store(upload)
    finally:
        sshd.stop()
        computer.run(f"rm -rf {device.root}")


@pytest.mark.parametrize("files", FILES)
def test_a_part_of_other_contents_is_never_taken_for_an_upload(
    request: pytest.FixtureRequest, upload: Path, files: str
) -> None:
    """Whatever somebody, or a disk that lost something, left where an upload arrives."""
    computer: Computer = request.getfixturevalue("computer" if files == "rsync" else "without_rsync")
    sshd = serve(computer)
    device = device_of(sshd)
    try:
        for size in (10, UPLOAD_BYTES, 2 * UPLOAD_BYTES):
            part = f"{device.root}/store/{digest(upload)}.part"
            device.shell(f"mkdir -p {part} && head -c {size} /dev/zero > {part}/large.bin && touch {part}/more")
            place = computer.seen(device.store(upload))
            assert (place / "large.bin").read_bytes() == (upload / "large.bin").read_bytes()
            assert stored(computer, device) == [place.name]
            device.shell(f"rm -r {device.root}/store/{place.name}")
    finally:
        sshd.stop()
        computer.run(f"rm -rf {device.root}")


# ---- what a device prints by itself --------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["internal-sftp", "/usr/lib/openssh/sftp-server"])
def test_a_shell_that_greets_is_understood_or_named(
    computer: Computer, made: Made, images: Path, tmp_path: Path, server: str
) -> None:
    """bash reads ~/.bashrc for every command of ssh's, and many of them print something."""
    sshd = serve(computer, Subsystem=f"sftp {server}")
    (computer.home / ".bashrc").write_text("echo Welcome to the lab; echo 3 9; echo and beware >&2\n")
    device = device_of(sshd)
    try:
        if server == "internal-sftp":  # needs no shell
            with opened(device, tmp_path):
                device.push(made.bundles["onnxruntime-int8"].path, "bundle")
                device.push(images, "images.npy")
                assert device.predict("bundle", "images.npy", tmp_path / "outputs.npy", 120).images == 40
                with device.watching() as watch:
                    assert watch.look().sights
        else:
            with pytest.raises(UserError, match=r"prints something at every command.*bashrc"):
                device.probe()
    finally:
        sshd.stop()
        computer.run(f"rm -rf {computer.home}/.bashrc {computer.home}/.kdpipe")


def test_a_python_that_says_goodbye_is_named(sshd: Sshd) -> None:
    """The answer is the last line: whatever comes after it is taken for one."""
    real = sshd.computer.python()
    before = sshd.computer.script("greets", "echo Loading modules", f'exec {real} "$@"')
    after = sshd.computer.script("parts", f'{real} "$@"', "echo Goodbye")
    assert device_of(sshd, python=before).probe().machine
    with pytest.raises(UserError, match="answered 'probe' with no JSON \\('Goodbye'\\), wanted one JSON object"):
        device_of(sshd, python=after).probe()


# ---- a device that fails -------------------------------------------------------------------------------------


@pytest.fixture
def busy(made: Made, sshd: Sshd, images: Path, tmp_path: Path) -> Iterator[SshDevice]:
    """A device that holds a bundle and images."""
    device = device_of(sshd)
    with opened(device, tmp_path):
        device.push(made.bundles["onnxruntime-int8"].path, "bundle")
        device.push(images, "images.npy")
        yield device


LONG = MeasureSettings(seconds=600, max_seconds=600, min_samples=20, images=8, warm_up_seconds=0.1)


def measuring(computer: Computer) -> list[int]:
    return computer.processes("runtime\0measure")


def test_a_runner_that_is_killed_is_named_and_the_next_one_runs(busy: SshDevice, computer: Computer) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(busy.measure, "bundle", "images.npy", LONG, 120)
        wait_until(lambda: bool(measuring(computer)), 60, "a runner")
        computer.run(f"kill -9 {' '.join(map(str, measuring(computer)))}")
        with pytest.raises(UserError, match="failed on 'pi': killed by signal 9"):
            running.result(30)
    assert busy.measure("bundle", "images.npy", SHORT, 120).latency_ns


def test_a_runner_that_hangs_is_ended_there_too(busy: SshDevice, computer: Computer) -> None:
    begun = time.monotonic()
    with pytest.raises(KdpipeError, match="the runner on 'pi' did not end in 3 s"):
        busy.measure("bundle", "images.npy", LONG, 3)
    assert time.monotonic() - begun < 60
    wait_until(lambda: not measuring(computer), 30, "the runner's end on the device")
    assert busy.measure("bundle", "images.npy", SHORT, 120).latency_ns


def test_a_runner_that_cannot_even_hear_the_alarm_is_left(busy: SshDevice, computer: Computer) -> None:
    """Stopped, as by a debugger or a failing disk: nothing there ends it, but nobody here waits for ever."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(busy.measure, "bundle", "images.npy", LONG, 3)
        wait_until(lambda: bool(measuring(computer)), 60, "a runner")
        stopped = " ".join(map(str, measuring(computer)))
        computer.run(f"kill -STOP {stopped}")
        with pytest.raises(KdpipeError, match="'pi' did not answer in 8 s"):
            running.result(30)
    computer.run(f"kill -CONT {stopped}")
    wait_until(lambda: not measuring(computer), 60, "the end of what goes on after its limit")


def test_a_clock_that_jumps_changes_no_number(made: Made, sshd: Sshd, images: Path, tmp_path: Path) -> None:
    """A board without a battery sets its clock when the network comes: in the middle of a measurement."""
    system_command("faketime")
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    offset = sshd.computer.folder / "offset"
    offset.write_text("+0s\n")
    python = sshd.computer.script(
        "jumping",
        f"export LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={offset} FAKETIME_NO_CACHE=1",
        "export FAKETIME_DONT_FAKE_MONOTONIC=1",
        f'exec {sshd.computer.python()} "$@"',
    )
    device = device_of(sshd, python=python)
    settings = MeasureSettings(seconds=2, max_seconds=2, min_samples=20, images=8, warm_up_seconds=0.2)
    jumps = ["+1000d", "-1000d"]

    def jump(ended: threading.Event) -> None:
        turn = 0
        while not ended.wait(0.05):
            ready = offset.with_name("offset.new")
            ready.write_text(f"{jumps[turn % 2]}\n")
            ready.replace(offset)
            turn += 1

    ended = threading.Event()
    with opened(device, tmp_path), ThreadPoolExecutor(1) as pool:
        device.push(made.bundles["onnxruntime-int8"].path, "bundle")
        device.push(images, "images.npy")
        jumping = pool.submit(jump, ended)
        try:
            clock = "import select, time; at = [(select.select([], [], [], .02), time.time())[1] for _ in range(50)]"
            jumped = float(device.shell(f"{python} -c '{clock}; print(max(at) - min(at))'"))
            assert jumped > 1e8, "the clock did not jump"
            begun = time.monotonic()
            samples = device.measure("bundle", "images.npy", settings, 60)
            spent = time.monotonic() - begun
            outputs = tmp_path / "outputs.npy"
            predicted = device.predict("bundle", "images.npy", outputs, 60)
        finally:
            ended.set()
        jumping.result()
    steady = sum(samples.latency_ns) / 1e9
    assert 0.5 < steady < spent, "a day or three years went into a latency"
    assert 0 < samples.warm_up.seconds < spent
    assert 0 < predicted.open_seconds < 60 and 0 < predicted.predict_seconds < 60


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("full", ["before", "names", "meanwhile"])
def test_a_full_disk_is_one_line_and_breaks_nothing(
    request: pytest.FixtureRequest, upload: Path, files: str, full: str
) -> None:
    """Full before it begins; of names, which no count of bytes tells; filled by somebody else in the middle of it."""
    computer: Computer = request.getfixturevalue("computer" if files == "rsync" else "without_rsync")
    folder = computer.home / ".kdpipe"
    size = {"before": "size=3m", "names": "size=64m,nr_inodes=60", "meanwhile": "size=12m"}[full]
    computer.run(f"mkdir {folder} && mount -t tmpfs -o {size},uid={folder.parent.stat().st_uid} tmpfs {folder}")
    sshd = serve(computer)
    device = device_of(sshd)
    kept = device.runner
    try:
        if full == "names":
            for at in range(60):
                (upload / f"{at}").touch()
        if full == "meanwhile":
            # In one shell that is there before: the upload takes a tenth of a second.
            seen = f"until ls {device.root}/store/*.part/large.bin >/dev/null 2>&1; do sleep 0.002; done"
            fill = f"{seen}; dd if=/dev/zero of={folder}/other bs=256k 2>/dev/null"
            filling = threading.Thread(target=lambda: computer.run(fill, check=False))
            filling.start()
        with pytest.raises(UserError, match=r"no space on 'pi': wanted .* are free.* removes"):
            device.store(upload)
        if full == "meanwhile":
            filling.join()
        assert stored(computer, device) == [], "something was left that nobody can use"
        assert device.probe().machine and device.runner == kept
        computer.run(f"rm -f {folder}/other && mount -o remount,size=64m,nr_inodes=0 {folder}")
        place = computer.seen(device.store(upload))
        assert (place / "large.bin").read_bytes() == (upload / "large.bin").read_bytes()
    finally:
        sshd.stop()
        computer.run(f"umount {folder} && rmdir {folder}")


# ---- a link that breaks --------------------------------------------------------------------------------------


@pytest.fixture(params=FILES)
def far(request: pytest.FixtureRequest) -> Iterator[tuple[Link, Sshd, SshDevice]]:
    """A device at the other end of a cable; this thread, and what it starts, uses its near end's network."""
    near, computer = Computer(own_network=True), Computer(own_network=True)
    link = Link(near, computer)
    if request.param == "sftp":
        computer.hide("rsync")
    sshd = serve(computer, Link.FAR, ClientAliveInterval="1", ClientAliveCountMax="3")
    quick = "ServerAliveInterval 1\nServerAliveCountMax 3\nConnectTimeout 3\n"
    sshd.config.write_text(sshd.config.read_text() + quick)
    with network_of(near):
        yield link, sshd, device_of(sshd)
    for each in (near, computer):
        each.close()


def arrived_bytes(sshd: Sshd) -> int:
    """Of the large file in an upload that is not whole yet."""
    return sum(path.stat().st_size for path in sshd.computer.home.glob(".kdpipe/store/*.part/large.bin"))


def when(true: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as something is true, beside what goes on here."""

    def wait() -> None:
        wait_until(true, 60, "what was waited for")
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("far", "cut"), [("rsync", "unplugged"), ("sftp", "unplugged"), ("rsync", "black hole")], indirect=["far"]
)
def test_an_upload_goes_on_where_it_was_cut(far: tuple[Link, Sshd, SshDevice], upload: Path, cut: str) -> None:
    link, sshd, device = far
    assert device.runner
    link.limit(megabits=16)
    cutting = when(
        lambda: arrived_bytes(sshd) > UPLOAD_BYTES // 3, link.pull if cut == "unplugged" else lambda: link.lose(100)
    )
    begun = time.monotonic()
    with pytest.raises(DeviceLost, match=r"'pi' cannot be reached: .*(timed out|No route)"):
        device.store(upload)
    cutting.join()
    assert time.monotonic() - begun < 200, "a dead link ends"
    kept = arrived_bytes(sshd)
    assert UPLOAD_BYTES / 3 < kept < UPLOAD_BYTES
    if cut == "unplugged":
        link.plug()
    else:
        link.lose(0)
    link.limit(megabits=1000)
    before = link.received()
    place = Path(device.store(upload))
    sent = link.received() - before
    assert sent < 1.3 * (UPLOAD_BYTES - kept) + 100_000, f"{sent} bytes sent, {kept} were there"
    for name in ("large.bin", 'a folder [1]/it\'s "so" *.txt', "empty"):
        assert sshd.computer.seen(place / name).read_bytes() == (upload / name).read_bytes()
    before = link.received()
    assert device.store(upload) == str(place)
    assert link.received() - before < 60_000, "it was sent again"


@pytest.mark.parametrize("far", ["rsync"], indirect=True)
def test_a_deployment_whose_link_is_cut_leaves_the_old_version_live(
    far: tuple[Link, Sshd, SshDevice], made: Made, workdir: Path
) -> None:
    """In the upload, and later in the replay on the device, when all has arrived."""
    link, sshd, _ = far
    first, second = (made.bundles[f"onnxruntime-{variant}"].path for variant in ("float32", "int8"))
    write_devices(workdir, sshd)
    home = sshd.computer.home
    assert kdpipe("deploy", first, "--device", "pi", cwd=workdir).returncode == 0
    link.limit(megabits=2)
    moments = [lambda: any(home.glob(".kdpipe/store/*.part/*")), lambda: bool(sshd.computer.processes("install"))]
    for moment in moments:
        cutting = when(moment, lambda: link.lose(100))
        done = kdpipe("deploy", second, "--device", "pi", cwd=workdir)
        assert_one_line(done, ExitCode.MISTAKE, "'pi' cannot be reached")
        cutting.join()
        wait_until(lambda: not sshd.computer.processes("runtime"), 60, "the end of what runs there")
        link.lose(0)
        live = (home / ".kdpipe" / "live").resolve()
        assert digest(live) == live.name and live.name in (digest(first), digest(second))
    link.limit(megabits=1000)
    assert kdpipe("deploy", second, "--device", "pi", cwd=workdir).returncode == 0
    assert (home / ".kdpipe" / "live").resolve().name == digest(second)


def test_a_download_goes_on_where_it_was_cut(far: tuple[Link, Sshd, SshDevice], tmp_path: Path) -> None:
    link, sshd, device = far
    content = np.random.default_rng(1).bytes(UPLOAD_BYTES)
    (sshd.computer.home / "outputs.npy").write_bytes(content)
    path, target = str(sshd.computer.home / "outputs.npy"), tmp_path / "outputs.npy"
    link.far.run("tc qdisc add dev far root tbf rate 16mbit burst 32kbit latency 50ms")

    def arrived() -> int:
        return sum(part.stat().st_size for part in tmp_path.glob("outputs.npy.*.part"))

    cutting = when(lambda: arrived() > UPLOAD_BYTES // 3, link.pull)
    with pytest.raises(DeviceLost):
        device.receive(path, target)
    cutting.join()
    kept = arrived()
    assert UPLOAD_BYTES / 3 < kept < UPLOAD_BYTES and not target.exists()
    link.plug()
    before = link.sent()
    device.receive(path, target)
    assert target.read_bytes() == content and [each.name for each in tmp_path.iterdir()] == ["outputs.npy"]
    assert link.sent() - before < 1.3 * (UPLOAD_BYTES - kept) + 100_000


def test_an_upload_goes_on_by_itself_where_the_link_is_back(far: tuple[Link, Sshd, SshDevice], upload: Path) -> None:
    link, sshd, device = far
    assert device.runner
    link.limit(megabits=16)

    def restart() -> None:
        sshd.stop()
        sshd.start()

    restarting = when(lambda: arrived_bytes(sshd) > UPLOAD_BYTES // 3, restart)
    before = link.received()
    place = sshd.computer.seen(device.store(upload))
    restarting.join()
    assert (place / "large.bin").read_bytes() == (upload / "large.bin").read_bytes()
    assert link.received() - before < 1.3 * UPLOAD_BYTES, "it began anew"
    assert (sshd.folder / "log").read_text().count("Accepted publickey") >= 2


def test_a_link_that_loses_packets_or_pauses_changes_nothing(
    far: tuple[Link, Sshd, SshDevice], made: Made, images: Path, tmp_path: Path
) -> None:
    link, sshd, device = far
    patient = (
        sshd.config.read_text().replace("CountMax 3", "CountMax 30").replace("ConnectTimeout 3", "ConnectTimeout 60")
    )
    sshd.config.write_text(patient)
    link.lose(5)
    bundle = made.bundles["onnxruntime-int8"].path
    with opened(device, tmp_path):
        device.push(bundle, "bundle")
        device.push(images, "images.npy")
        unplugged = when(lambda: bool(measuring(sshd.computer)), lambda: (link.pull(), time.sleep(1), link.plug()))
        settings = MeasureSettings(seconds=3, max_seconds=3, images=8)
        assert device.measure("bundle", "images.npy", settings, 60).latency_ns
        unplugged.join()
        device.predict("bundle", "images.npy", tmp_path / "there.npy", 120)
    assert link.dropped() > 0
    here = find_device("local")
    (tmp_path / "local").mkdir()
    with opened(here, tmp_path / "local"):
        here.push(bundle, "bundle")
        here.push(images, "images.npy")
        here.predict("bundle", "images.npy", tmp_path / "here.npy", 120)
    np.testing.assert_array_equal(np.load(tmp_path / "there.npy"), np.load(tmp_path / "here.npy"))


@pytest.mark.parametrize("far", ["rsync"], indirect=True)
def test_a_device_that_does_not_answer_is_one_line(far: tuple[Link, Sshd, SshDevice], workdir: Path) -> None:
    link, sshd, _ = far
    link.lose(100)
    write_devices(workdir, sshd)
    begun = time.monotonic()
    done = kdpipe("devices", "probe", "pi", cwd=workdir)
    assert_one_line(done, ExitCode.MISTAKE, "'pi' cannot be reached", "timed out", "is the device on, is it in reach?")
    assert time.monotonic() - begun < 18, "the user's own limit twice, not ours"


def test_the_limits_of_a_link_are_the_users_where_he_names_some(sshd: Sshd) -> None:
    limits = ("connecttimeout", "serveraliveinterval", "serveralivecountmax")
    never = ("stricthostkeychecking", "batchmode", "forwardagent", "requesttty")
    found = []
    for more in ("", "ConnectTimeout 3\nServerAliveInterval 60\nStrictHostKeyChecking no\nForwardAgent yes\n"):
        sshd.config.write_text(f"{sshd.config.read_text()}{more}RequestTTY force\nRemoteCommand reboot\n")
        device = device_of(sshd)
        assert device.shell("echo here") == "here"
        shown = subprocess.run(["ssh", "-G", *device.argv("")[1:-1]], capture_output=True, text=True, check=True)
        effective = dict(line.split(" ", 1) for line in shown.stdout.splitlines())
        found.append([effective[name] for name in limits])
        assert [effective[name] for name in never] == ["true", "yes", "no", "false"]
        assert "remotecommand" not in effective
    assert found == [["10", "5", "3"], ["3", "60", "3"]]


@pytest.mark.parametrize("far", ["rsync"], indirect=True)
def test_a_device_that_restarts_in_a_measurement_is_lost(
    far: tuple[Link, Sshd, SshDevice], made: Made, images: Path, tmp_path: Path
) -> None:
    _, sshd, device = far
    with opened(device, tmp_path):
        device.push(made.bundles["onnxruntime-int8"].path, "bundle")
        device.push(images, "images.npy")
        restarting = when(lambda: bool(measuring(sshd.computer)), sshd.stop)
        with pytest.raises(DeviceLost, match=r"'pi' cannot be reached: .*Connection refused"):
            device.measure("bundle", "images.npy", LONG, 60)
        restarting.join()
        sshd.start()
        assert device.measure("bundle", "images.npy", SHORT, 120).latency_ns


@pytest.mark.parametrize("far", ["rsync"], indirect=True)
def test_a_device_lost_in_a_measurement_is_told_and_ends_by_itself(
    far: tuple[Link, Sshd, SshDevice], made: Made, images: Path, tmp_path: Path
) -> None:
    link, sshd, device = far
    device.open(tmp_path)
    device.push(made.bundles["onnxruntime-int8"].path, "bundle")
    device.push(images, "images.npy")
    losing = when(lambda: bool(measuring(sshd.computer)), lambda: link.lose(100))
    begun = time.monotonic()
    with pytest.raises(DeviceLost, match=r"'pi' cannot be reached: .*timed out"):
        device.measure("bundle", "images.npy", LONG, 30)
    assert time.monotonic() - begun < 30, "the link's own limit comes first"
    losing.join()
    assert measuring(sshd.computer)
    wait_until(lambda: not measuring(sshd.computer), 120, "the runner's end by its own limit")
    link.lose(0)
    assert device.measure("bundle", "images.npy", SHORT, 120).latency_ns
    device.close()
