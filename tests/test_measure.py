"""What one process measures and when it stops; what is read of the machine beside it."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Clock, Made, rewrite_manifest

from kdpipe.core.artifact import Order
from kdpipe.core.config import BenchPlan, DeviceSettings, MeasureSettings, QuantizeConfig, suited, validated
from kdpipe.core.errors import DeviceLost, UserError
from kdpipe.core.kinds import UNAVAILABLE, Bundle, Phase, Probe, RuntimeSession, Sight
from kdpipe.core.stats import early_stopping, percentile_within
from kdpipe.devices import find_device, opened
from kdpipe.devices.bench import bench
from kdpipe.devices.local import LocalDevice
from kdpipe.devices.session import bench_config, settings_of, swept
from kdpipe.devices.surroundings import Watch, fell_back, surroundings, watch_share
from kdpipe.runtime import probe, watch
from kdpipe.runtime.measure import Plan, drop_from_page_cache, p50_known_within, sustain, time_calls

ROOT = Path(__file__).resolve().parent.parent
CLEAN = {
    name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "OMP_", "KMP_", "GOMP_"))
}


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


# ---- when a measurement stops --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quick", "default", "thorough", "mlperf"])
def test_an_effort_means_every_field_that_is_left_out(name: str) -> None:
    plan = BenchPlan(effort=name)
    assert plan == BenchPlan(effort=name, seconds=plan.seconds), "the same written out"
    assert plan.seconds <= plan.max_seconds and plan.rounds % 2 == 0
    assert BenchPlan(effort=name, rounds=4, seconds=1).rounds == 4, "what is given counts"
    assert settings_of(plan, "any").seconds == plan.seconds


def test_efforts_differ_as_they_are_called() -> None:
    quick, default, thorough, mlperf = (BenchPlan(effort=name) for name in ("quick", "default", "thorough", "mlperf"))
    assert quick.seconds < default.seconds < thorough.seconds < mlperf.seconds == 600
    assert quick.cold_starts < 10 <= default.cold_starts
    assert BenchPlan() == default
    assert BenchPlan(seconds=30).max_seconds == 30, "a longer time is no contradiction of the effort's cap"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"effort": "fast"}, "'effort': input should be 'quick', 'default', 'thorough' or 'mlperf', found 'fast'"),
        ({"effort": ["quick"]}, "'effort'"),
        ({"seconds": 5, "max_seconds": 1}, "'max_seconds': wanted at least 'seconds', 5, found 1"),
        ({"sustained": "10 days"}, "'sustained': wanted a number, or one such as 90s, 10m or 1h, found '10 days'"),
        ({"rate": "5rpm"}, "'rate': wanted a number, or one such as 5fps, found '5rpm'"),
        ({"threads": "1,2,1"}, "'threads': wanted every number of threads once, found '1,2,1'"),
        ({"threads": "1,some"}, "'threads.1'"),
        ({"threads": [-1]}, "'threads.0'"),
    ],
)
def test_wrong_settings_are_one_line(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as refused:
        validated(BenchPlan, wrong, "bench")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_units_are_read() -> None:
    assert BenchPlan(sustained="10m", rate="5fps").sustained == 600
    assert BenchPlan(sustained="1.5 h").sustained == 5400 and BenchPlan(rate="5fps").rate == 5
    assert BenchPlan(threads="1,2,all").threads == (1, 2, 0) and BenchPlan(threads=4).threads == (4,)


def autocorrelated(count: int, rho: float, spread: float, generator: np.random.Generator) -> list[int]:
    """Latencies around a median of 1 ms, each one resembling those before."""
    noise = generator.normal(size=count + 500) * math.sqrt(1 - rho**2)
    for at in range(1, len(noise)):
        noise[at] += rho * noise[at - 1]
    return (1e6 * (1 + spread * noise[500:])).astype(int).tolist()


def test_what_is_known_of_a_median_is_honest_under_autocorrelation() -> None:
    """Where inferences resemble their neighbours, an interval that takes them for independent holds 45 % (rho 0.9)."""
    generator = np.random.default_rng(0)
    for rho, least in ((0.0, 0.95), (0.5, 0.95), (0.9, 0.93)):
        covered = 0
        for _ in range(200):
            latencies = autocorrelated(2000, rho, 0.05, generator)
            covered += abs(np.median(latencies) / 1e6 - 1) <= p50_known_within(latencies)
        assert covered / 200 >= least, f"rho {rho}"
    assert p50_known_within([1] * 19) is None, "too few to tell"


def test_it_stops_when_time_inferences_and_certainty_are_all_reached() -> None:
    found = time_calls(lambda _: time.sleep(0.002), Plan(seconds=0.3, min_samples=20, p50_within=0.5, max_seconds=20))
    spent = (found["steady"]["ended_ns"] - found["steady"]["begun_ns"]) / 1e9
    assert found["stable"] and found["p50_known_within"] <= 0.5 and 0.3 <= spent < 15
    assert found["steady"]["cpu_ns"] < 0.7e9 * spent, "it slept"
    more = time_calls(lambda _: time.sleep(0.002), Plan(seconds=0.01, min_samples=150, p50_within=0.5, max_seconds=20))
    assert len(more["latency_ns"]) >= 150


def test_what_never_becomes_certain_stops_at_its_cap_and_says_so(clock: Clock) -> None:
    """Twice as slow in every second half: the median lies between two worlds however long it is looked for."""

    def run(turn: int) -> None:
        clock.sleep(2e-4 * (1 + int(10 * clock.monotonic()) % 2))

    found = time_calls(run, Plan(seconds=0.7, min_samples=10, p50_within=0.01, max_seconds=1))
    spent = (found["steady"]["ended_ns"] - found["steady"]["begun_ns"]) / 1e9
    assert not found["stable"] and found["p50_known_within"] > 0.01 and 1 <= spent < 1.001


def test_a_slow_model_gets_its_inferences_beyond_the_cap() -> None:
    found = time_calls(lambda _: time.sleep(0.02), Plan(seconds=0.01, min_samples=24, p50_within=1e-9, max_seconds=0.1))
    assert len(found["latency_ns"]) >= 24


def test_a_rate_leaves_the_processor_idle_in_between() -> None:
    called: list[float] = []

    def run(turn: int) -> None:
        called.append(time.monotonic())
        busy(0.002)

    found = time_calls(run, Plan(seconds=1, min_samples=10, p50_within=1, max_seconds=1, rate=20))
    assert 10 <= len(found["latency_ns"]) <= 40  # a second of it, but for the machine's pauses; without a rate 500
    assert np.median(np.diff(called)) > 0.04
    assert found["steady"]["cpu_ns"] < 0.5e9


def test_a_long_run_tells_when_it_became_slower(clock: Clock) -> None:
    found = sustain(
        lambda _: clock.sleep(1e-3 * (1 if clock.monotonic() < 0.85 else 1.5)), Plan(sustained=2.0), steady_ns=1e6
    )
    assert found["window_seconds"] == pytest.approx(0.2) and len(found["window_median_ns"]) == 10
    assert found["slowed_after_seconds"] == pytest.approx(0.8)
    steady = sustain(lambda _: clock.sleep(1e-3), Plan(sustained=0.5), steady_ns=1e6)
    assert steady["slowed_after_seconds"] is None


@pytest.mark.parametrize(("percent", "least"), [(50, 11), (90, 64), (95, 130), (97, 219), (99, 662), (99.9, 6636)])
def test_early_stopping_needs_what_mlperfs_does(percent: float, least: int) -> None:
    """The numbers of queries that LoadGen names (64, 662), and the same rule's for other percentiles."""
    assert early_stopping(np.arange(least - 1), percent) is None
    assert early_stopping(np.arange(least), percent) == least - 1, "the largest, where one may lie above"


def test_early_stopping_is_above_the_percentile_99_times_of_100() -> None:
    generator = np.random.default_rng(0)
    above = [early_stopping(generator.uniform(size=500), 90) > 0.9 for _ in range(1000)]
    assert np.mean(above) >= 0.985
    assert early_stopping([], 90) is None and early_stopping([1.0], 90) is None


@pytest.mark.parametrize(("percent", "least"), [(90, 36), (95, 72), (99, 368)])
def test_a_percentile_of_too_few_is_none(percent: float, least: int) -> None:
    assert percentile_within(np.arange(least - 1), percent) is None
    assert percentile_within(np.arange(least), percent) is not None


# ---- the process ---------------------------------------------------------------------------------------------


def in_python(code: str, *arguments: object, **environment: str) -> str:
    """What a line of Python prints in a process of its own that imports the runner alone."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_age_of_a_process_counts_from_its_start() -> None:
    code = "import time; time.sleep(0.3); from runtime.measure import process_age_ns; print(process_age_ns())"
    begun = time.monotonic_ns()
    age = int(in_python(code))
    assert 0.29e9 < age < time.monotonic_ns() - begun + 20e6, "known to 10 ms"


def test_a_process_keeps_to_its_cores() -> None:
    code = (
        "import os, json; from runtime.measure import keep_to_cores; found = keep_to_cores(1); "
        "print(json.dumps([found, sorted(os.sched_getaffinity(0))]))"
    )
    found, cpus = json.loads(in_python(code, OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0", HOMER="x"))
    assert found["threads"] == 1 and found["cpus"] == cpus and len(cpus) == 1
    told = found["environment"]
    assert (told["KMP_BLOCKTIME"], told["OMP_WAIT_POLICY"]) == ("0", "passive") and "HOMER" not in told


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


CPU = "sys/devices/system/cpu"


def smt(root: Path) -> Path:
    """Two cores of two CPUs each."""
    pairs = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    return tree(root, {f"{CPU}/cpu{cpu}/topology/thread_siblings_list": pair for cpu, pair in pairs.items()})


def big_little(root: Path) -> Path:
    """A phone: four small cores, three big ones, one bigger."""
    capacity = dict.fromkeys(range(4), 300) | dict.fromkeys(range(4, 7), 850) | {7: 1024}
    return tree(root, {f"{CPU}/cpu{cpu}/cpu_capacity": value for cpu, value in capacity.items()})


def test_siblings_are_left_out_until_there_is_no_core_left(tmp_path: Path) -> None:
    root, usable = smt(tmp_path), [0, 1, 2, 3]
    assert probe.place(0, usable, root) == (2, [0, 1], [2, 3], [])
    assert probe.place(1, usable, root) == (1, [1], [3], [])
    assert probe.place(3, usable, root) == (3, [0, 1, 3], [2], [])
    assert probe.place(2, [2, 3], root) == (2, [2, 3], [], []), "within what the user left to it"
    assert probe.place(9, usable, root)[1] == usable, "more threads than CPUs"


def test_big_cores_come_first(tmp_path: Path) -> None:
    root, usable = big_little(tmp_path), list(range(8))
    assert probe.classes(usable, root) == [[7], [4, 5, 6], [0, 1, 2, 3]]
    assert probe.place(0, usable, root) == (1, [7], [], [0, 1, 2, 3, 4, 5, 6])
    assert probe.place(4, usable, root) == (4, [4, 5, 6, 7], [], [0, 1, 2, 3])
    clocks = {cpu: 1_800_000 if cpu < 4 else 2_400_000 + 20_000 * cpu for cpu in range(6)}
    other = tree(tmp_path / "other", {f"{CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq": khz for cpu, khz in clocks.items()})
    assert probe.classes(list(range(6)), other) == [[5, 4], [0, 1, 2, 3]], "favoured cores of one kind are one class"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/app/x", "sys/fs/cgroup/app/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/app", "sys/fs/cgroup/app/cpu.max": "max 100000"}, None),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/docker/a",
                "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
        ({"proc/self/cgroup": "0::/../../up", "sys/fs/cgroup/cpu.max": "50000 0"}, None),
    ],
)
def test_the_quota_of_both_versions_of_control_groups(
    tmp_path: Path, files: dict[str, object], cores: float | None
) -> None:
    assert probe.quota_cores(tree(tmp_path, files)) == cores


def test_threads_stay_within_the_quota(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"})
    assert probe.place(0, list(range(8)), root)[0] == 2
    assert probe.place(4, list(range(8)), root)[0] == 4, "what is asked for counts"


# ---- what a machine is, from folders that stand for machines -------------------------------------------------


def raspberry_pi(root: Path) -> Path:
    files: dict[str, object] = {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n",
        "proc/meminfo": "MemTotal:        8245752 kB\nMemFree: 1 kB",
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"',
        f"{CPU}/present": "0-3",
        "sys/class/thermal/thermal_zone0/temp": 61234,
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/devices/platform/soc@0/soc@0:firmware/get_throttled": "50005",
    }
    for cpu in range(4):
        files[f"{CPU}/cpu{cpu}/cpufreq/scaling_cur_freq"] = 1_500_000 + cpu
        files[f"{CPU}/cpu{cpu}/cpufreq/scaling_governor"] = "ondemand"
    return tree(root, files)


def test_a_raspberry_pi_is_read(tmp_path: Path) -> None:
    found = Probe.model_validate(probe.probe(raspberry_pi(tmp_path)))
    assert found.cpu == found.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.distribution == "Debian GNU/Linux 12 (bookworm)"
    assert (found.cores, found.usable_cores, found.governor, found.memory_bytes) == (4, 4, "ondemand", 8245752 * 1024)
    assert found.clocks_khz == {f"cpu{cpu}": 1_500_000 + cpu for cpu in range(4)}
    assert found.temperatures_millicelsius == {"thermal_zone0 cpu-thermal": 61234}
    assert found.throttle_bits == 0x50005 and found.throttle_events == UNAVAILABLE
    assert found.battery == found.energy_meters == found.quota_cores == UNAVAILABLE


def test_a_jetson_is_read(tmp_path: Path) -> None:
    meter = "sys/class/hwmon/hwmon3"
    root = tree(
        tmp_path,
        {
            f"{meter}/name": "ina3221",
            f"{meter}/in1_label": "VDD_IN",
            f"{meter}/in1_input": 5000,
            f"{meter}/curr1_input": 1200,
            f"{meter}/in2_label": "VDD_CPU_GPU_CV",
            f"{meter}/in2_input": 5000,
            f"{meter}/curr2_input": 400,
            "sys/class/hwmon/hwmon0/name": "other",
            "sys/class/hwmon/hwmon0/temp1_input": 40000,
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        },
    )
    assert probe.power_mw(root) == {"hwmon3 VDD_IN": 6000, "hwmon3 VDD_CPU_GPU_CV": 2000}
    assert probe.temperatures(root) == {"hwmon0 other temp1_input": 40000}
    assert probe.power_mode_in("NV Power Mode: 15W\n0") == "15W (0)"
    assert probe.power_mode_in("nothing known") == UNAVAILABLE


def test_a_laptop_is_read(tmp_path: Path) -> None:
    rapl = "sys/class/powercap"
    root = tree(
        tmp_path,
        {
            f"{rapl}/intel-rapl:0/name": "package-0",
            f"{rapl}/intel-rapl:0/energy_uj": 123456789,
            f"{rapl}/intel-rapl:0:0/name": "core",
            f"{rapl}/intel-rapl:0:0/energy_uj": 1,
            "sys/class/power_supply/AC/type": "Mains",
            "sys/class/power_supply/BAT0/type": "Battery",
            "sys/class/power_supply/BAT0/capacity": 80,
            "sys/class/power_supply/BAT0/status": "Discharging",
            f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 3,
            f"{CPU}/cpu1/thermal_throttle/core_throttle_count": 4,
        },
    )
    assert probe.energy_uj(root) == {"intel-rapl:0 package-0": 123456789}, "a part is in the whole"
    assert probe.battery(root) == {"percent": 80, "status": "Discharging", "celsius": UNAVAILABLE}
    assert probe.throttle_events(root) == 7


@pytest.mark.parametrize(
    ("told", "bits"),
    [("throttled=0x50000\n", 0x50000), ("throttled=0x0", 0), ("VCHI failed", UNAVAILABLE)],
)
def test_what_vcgencmd_prints_is_read(told: str, bits: object) -> None:
    assert probe.throttle_bits_in(told) == bits


def test_an_empty_machine_is_unavailable_and_never_zero(tmp_path: Path) -> None:
    (tmp_path / CPU).mkdir(parents=True)
    tree(tmp_path, {f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "<unknown>", f"{CPU}/present": ""})
    found = probe.probe(tmp_path)
    kept = {"usable_cores", "load_average", "system", "python", "machine", "runtimes", "targets", "core_classes"}
    kept |= {"siblings", "gpus", "power_mode", "emulated"}
    assert {name: value for name, value in found.items() if name not in kept} == dict.fromkeys(
        found.keys() - kept, UNAVAILABLE
    )
    assert watch.look(True, tmp_path)["busy_ns"] == watch.look(True, tmp_path)["khz"] == UNAVAILABLE


def test_a_tool_that_hangs_or_fails_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, script in (("hangs", "sleep 60"), ("fails", "echo no; exit 3"), ("answers", "echo 7")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(probe, "TOOL_SECONDS", 60)
    assert probe.answer("fails") == probe.answer("is_not_there") == UNAVAILABLE
    assert probe.answer("answers") == "7"
    monkeypatch.setattr(probe, "TOOL_SECONDS", 0.2)
    assert probe.answer("hangs") == UNAVAILABLE


def test_a_probe_decides_how_int8_is_made(tmp_path: Path) -> None:
    here = find_device("local").probe()
    pi = here.model_copy(update={"machine": "aarch64", "flags": {"asimddp": True}})
    for told in (pi, Probe.model_validate(pi.model_dump())):
        chosen = suited(QuantizeConfig(), told.machine, told.known_flags)
        assert (chosen.activations, chosen.reduce_range) == ("int8", False)
    unknown = here.model_copy(update={"flags": UNAVAILABLE})
    assert suited(QuantizeConfig(), "x86_64", unknown.known_flags).reduce_range is False


# ---- beside the timed process --------------------------------------------------------------------------------


SPIN = """
import sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    pass
print(time.process_time_ns())
"""


def stretch(watching: Watch, seconds: float, *, spinning: bool) -> tuple[float, float]:
    """The share of others in so many seconds, and that of a process that spins in them (0 without one), of all CPUs."""
    before = watching.look()
    begun, cpu = time.monotonic_ns(), time.process_time_ns()
    taken = 0
    if spinning:
        done = subprocess.run([sys.executable, "-c", SPIN, str(seconds)], env=CLEAN, capture_output=True, check=True)
        taken = int(done.stdout)
    else:
        time.sleep(seconds)
    phase = Phase(begun_ns=begun, ended_ns=time.monotonic_ns(), cpu_ns=time.process_time_ns() - cpu)
    after = watching.look()
    sights = [before.sights[-1], *after.sights]
    found = surroundings(sights, phase, after.cpus, watch_share(before, after))
    assert isinstance(found.others_share, float)
    return found.others_share, taken / (phase.ended_ns - phase.begun_ns) / after.cpus


def test_a_busy_process_is_seen_with_its_share_and_a_quiet_machine_without(tmp_path: Path) -> None:
    """Pairs of a quiet stretch and a busy one, until other work on the machine leaves room for both."""
    with Watch(LocalDevice(DeviceSettings()), str(tmp_path / "lock"), "a test") as watching:
        missed = 0
        for _ in range(20):
            quiet, _ = stretch(watching, 0.4, spinning=False)
            others, share = stretch(watching, 0.4, spinning=True)
            # It is among the others, with its whole share, whatever else there is; but for what its host took of it.
            missed += others < share - 0.1
            assert missed <= 5
            if abs(others - quiet - share) < 0.1:
                assert quiet < others
                return
    assert quiet > 0.4, "there was room, and it was not seen alone"


def test_what_was_not_seen_whole_is_no_number() -> None:
    sights = [Sight(monotonic_ns=at, busy_ns=at, idle_ns=0, steal_ns=0) for at in (100, 200)]
    for begun, ended in ((50, 150), (150, 250)):
        with pytest.raises(ValueError, match="did not see the whole"):
            surroundings(sights, Phase(begun_ns=begun, ended_ns=ended, cpu_ns=0), 1)
    found = surroundings(sights, Phase(begun_ns=120, ended_ns=180, cpu_ns=30), 1)
    assert found.others_share == pytest.approx(0.5) and found.steal_share == 0
    assert {found.highest_khz, found.highest_celsius, found.throttled, found.watts} == {UNAVAILABLE}


def test_throttling_heat_and_power_of_a_stretch() -> None:
    def sight(at: int, khz: int, bits: int, energy: int, events: int = 0) -> Sight:
        return Sight(
            monotonic_ns=at * 10**9, busy_ns=0, idle_ns=0, steal_ns=at * 10**8, khz={"cpu0": khz},
            millicelsius={"zone": 50_000 + at}, throttle_bits=bits, throttle_events=events, energy_uj={"p": energy},
        )  # fmt: skip

    seen = [
        sight(0, 1, 0xF, 0),
        sight(1, 2000, 0, 5_000_000),
        sight(2, 1500, 0x50000, 9_000_000),
        sight(3, 2000, 0, 10**7),
    ]
    phase = Phase(begun_ns=1_100_000_000, ended_ns=2_900_000_000, cpu_ns=0)
    found = surroundings(seen, phase, 2)
    assert (found.lowest_khz, found.highest_khz, found.highest_celsius) == (1500, 2000, 50.003)
    assert found.throttled is False, "what was before does not count"
    assert found.watts == pytest.approx(2.5) and found.steal_share == pytest.approx(0.05)
    assert surroundings([*seen[:2], sight(2, 1500, 4, 0), seen[3]], phase, 2).throttled is True
    assert surroundings([*seen[:3], sight(3, 2000, 0, 0, events=1)], phase, 2).throttled is True
    assert surroundings([*seen[:3], sight(3, 2000, 0, 0)], phase, 2).watts == UNAVAILABLE, "the meter started again"


def test_a_machine_is_measured_by_one_at_a_time(tmp_path: Path) -> None:
    device, lock = LocalDevice(DeviceSettings()), str(tmp_path / "lock")
    first = Watch(device, lock, "alice on pine")
    with first:
        with pytest.raises(UserError, match=r"measured by alice on pine \(process \d+\) since 20.*: wait") as refused:
            Watch(device, lock, "bob").__enter__()
        assert "\n" not in str(refused.value)
        first.look()
        os.killpg(first._process.pid, signal.SIGKILL)  # as a power cut: nothing says goodbye
        first._process.wait()
        with pytest.raises(DeviceLost, match="cannot be watched"):
            first.look()
        with Watch(device, lock, "bob") as second:
            assert second.look().sights


def test_a_watch_ends_with_whoever_asked(tmp_path: Path) -> None:
    watching = Watch(LocalDevice(DeviceSettings()), str(tmp_path / "lock"), "a test")
    with watching:
        pass
    assert watching._process.returncode == 0


# ---- what starting takes -------------------------------------------------------------------------------------


def resident_pages(path: Path) -> int:
    """How many pages of a file lie in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]]
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
        libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))
    return sum(page & 1 for page in pages)


def test_a_start_from_the_disk_and_one_from_memory(made: Made, tmp_path: Path) -> None:
    # A copy, which nobody else reads meanwhile.
    place = shutil.copytree(made.bundles["onnxruntime-float32"].path, tmp_path / "copy")
    device, bundle = LocalDevice(DeviceSettings()), Bundle.open(place)
    np.save(tmp_path / "images.npy", np.zeros((2, 32, 32, 3), np.uint8))
    with opened(device, tmp_path):
        device.push(bundle.path, "bundle")
        device.push(tmp_path / "images.npy", "images.npy")
        for page_cache in ("warm", "dropped"):
            settings = MeasureSettings(threads=1, page_cache=page_cache)
            found = device.start_fresh("bundle", "images.npy", settings, 60)
            assert found.page_cache == page_cache and found.executed is None
            assert found.process_ns > found.import_ns + found.load_ns + found.first_ns
            assert found.memory_growth_bytes > 0
    file = bundle.file(bundle.facts.entry)
    held = file.read_bytes()
    assert resident_pages(file) == -(-len(held) // mmap.PAGESIZE)
    os.sync()  # what is not on the disk yet cannot be dropped
    drop_from_page_cache(bundle.path)
    assert resident_pages(file) == 0


def test_starting_checks_the_manifest_but_reads_no_hashes(made: Made, tmp_path: Path) -> None:
    """A small model's start would be mostly that; names, sizes and the manifest's own digest are still checked."""
    device = LocalDevice(DeviceSettings())
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundles["tflite-float32"].path, folder)
    np.save(tmp_path / "images.npy", np.zeros((2, 32, 32, 3), np.uint8))
    (folder / "labels.json").write_bytes((folder / "labels.json").read_bytes()[::-1])
    with opened(device, tmp_path):
        device.push(folder, "bundle")
        device.push(tmp_path / "images.npy", "images.npy")
        assert device.start_fresh("bundle", "images.npy", MeasureSettings(threads=1), 60).load_ns > 0
        with pytest.raises(UserError, match=r"labels\.json differs"):
            device.measure("bundle", "images.npy", MeasureSettings(effort="quick"), 60)
        (folder / "labels.json").write_bytes(b"longer than it was")
        with pytest.raises(UserError, match=r"labels\.json differs"):
            device.start_fresh("bundle", "images.npy", MeasureSettings(threads=1), 60)


def test_the_runner_costs_little_between_inferences(made: Made, tmp_path: Path) -> None:
    """Outside the timed call; the best of three processes, since other work on the machine counts too."""
    device, costs = LocalDevice(DeviceSettings()), []
    np.save(tmp_path / "images.npy", np.zeros((8, 32, 32, 3), np.uint8))
    settings = MeasureSettings(threads=1, seconds=0.3, max_seconds=0.3, min_samples=20, warm_up_seconds=0.05, images=8)
    with opened(device, tmp_path):
        device.push(made.bundles["onnxruntime-int8"].path, "bundle")
        device.push(tmp_path / "images.npy", "images.npy")
        for _ in range(3):
            found = device.measure("bundle", "images.npy", settings, 60)
            assert found.steady.cpu_ns > 0 and found.placement.threads == 1
            costs.append(found.overhead_ns)
    assert 0 < min(costs) < 50_000


# ---- what really ran -----------------------------------------------------------------------------------------


def ran(**told: object) -> RuntimeSession:
    return RuntimeSession(runtime="x", version="1", threads=1, **told)


@pytest.mark.parametrize(
    ("precision", "session", "executed", "said"),
    [
        ("int8", ran(), {"int8": 3, "float32": 1}, ""),
        ("int8", ran(), {"float32": 16}, "none of its layers ran in int8: 16 in float32"),
        ("bf16", ran(wanted_precision="bf16", inference_precision="f32"), None, "it ran in f32, wanted bf16"),
        (
            "float32",
            ran(wanted_providers=["CUDAExecutionProvider", "CPUExecutionProvider"], providers=["CPUExecutionProvider"]),
            None,
            "it ran on CPUExecutionProvider, wanted CUDAExecutionProvider, CPUExecutionProvider",
        ),
        ("float16", ran(), {"float32": 16}, ""),
        ("int8", ran(), None, ""),
    ],
)
def test_a_silent_fall_back_is_told(precision: str, session: RuntimeSession, executed: object, said: str) -> None:
    assert fell_back(precision, session, executed) == said


def pretending(made: Made, target: str, folder: Path) -> Bundle:
    """A bundle in float32 that calls itself INT8."""
    shutil.copytree(made.bundles[f"{target}-float32"].path, folder)
    rewrite_manifest(folder, lambda value: value["facts"].update(precision="int8"))
    return Bundle.open(folder)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tflite"])
def test_every_runtime_tells_in_which_precision_it_ran(made: Made, tmp_path: Path, target: str) -> None:
    device = LocalDevice(DeviceSettings())
    np.save(tmp_path / "images.npy", np.zeros((1, 32, 32, 3), np.uint8))
    with opened(device, tmp_path):
        device.push(tmp_path / "images.npy", "images.npy")
        device.push(pretending(made, target, tmp_path / "bundle").path, "pretending")
        device.push(made.bundles[f"{target}-int8"].path, "true")
        for name, said in (("pretending", "none of its layers ran in int8: 16 in float32"), ("true", "")):
            found = device.start_fresh(name, "images.npy", MeasureSettings(threads=1), 60, examine=True)
            assert fell_back("int8", found.session, found.executed) == said


def test_a_bundle_that_runs_in_float_in_silence_is_invalid(made: Made, tmp_path: Path) -> None:
    bundles = {"a": pretending(made, "onnxruntime", tmp_path / "a"), "b": made.bundles["onnxruntime-int8"]}
    plan = BenchPlan(rounds=2, seconds=0.02, max_seconds=0.05, min_samples=10, warm_up_seconds=0.02, cold_starts=1)
    order = Order("bench", bench_config(plan, "local"), {**bundles, "data": made.dataset})
    found = bench(order, bundles, made.dataset, tmp_path / "out").facts.results
    assert found["a"].trust.word == "invalid" and "none of its layers ran in int8" in found["a"].trust.reason
    assert found["b"].executed["int8"] >= 8 and not found["b"].fell_back


# ---- several numbers of threads ------------------------------------------------------------------------------


def test_a_sweep_has_a_row_for_every_number_of_threads(made: Made, tmp_path: Path) -> None:
    given = {name: made.bundles[name] for name in ("onnxruntime-float32", "onnxruntime-int8")}
    plan = BenchPlan(effort="quick", rounds=2, seconds=0.01, max_seconds=0.02, min_samples=10, threads="1,2,all")
    bundles = swept(given, plan.threads)
    assert list(bundles)[:3] == ["onnxruntime-float32@1", "onnxruntime-float32@2", "onnxruntime-float32@all"]
    assert [settings_of(bench_config(plan, "null"), row).threads for row in bundles] == [1, 2, 0, 1, 2, 0]
    order = Order("bench", bench_config(plan, "null"), {**bundles, "data": made.dataset})
    facts = bench(order, bundles, made.dataset, tmp_path / "out").facts
    assert set(facts.results) == set(bundles)
    assert facts.results["onnxruntime-int8@2"].over_float32 is not None
    assert swept(given, (4,)) == given, "one number of threads changes no names"


def test_a_long_run_is_one_more_process_after_the_rounds(made: Made, tmp_path: Path) -> None:
    bundles = {"a": made.bundles["onnxruntime-float32"]}
    plan = BenchPlan(rounds=2, seconds=0.01, max_seconds=0.02, min_samples=10, cold_starts=0, sustained="0.5s")
    order = Order("bench", bench_config(plan, "null"), {**bundles, "data": made.dataset})
    measured = bench(order, bundles, made.dataset, tmp_path / "out")
    found = measured.facts.results["a"]
    assert len(found.latency_p50_by_process_ms) == 2 and len(found.sustained.window_median_ns) == 10
    assert found.start_ms is None and found.memory_growth_bytes is None and len(found.load_ms) == 2
    runs = json.loads(measured.file("latency_ns/a.json").read_text())
    assert [run["sustained"] for run in runs] == [None, None]
