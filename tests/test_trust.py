"""Which latencies may be believed: the rules by hand, and what they say in simulated sessions.

The simulations are seeded; a session has eight bundles of three targets and six rounds, and is judged by the function
that judges real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from kdpipe.core.config import BenchPlan
from kdpipe.core.errors import ExitCode, GateFailed, KdpipeError, Untrusted, UserError
from kdpipe.core.kinds import BatchOne, Conditions, Result, RuntimeSession, Trust
from kdpipe.core.stats import Interval, bootstrap_ratio, geometric_interval, holm_levels, percentile_interval
from kdpipe.devices.trust import assess, control_name, controlled, judge, limit_cores

BUNDLES, ROUNDS, SESSIONS = 8, 6, 200
NAMES = [f"t{at // 3}-{at % 3}" for at in range(BUNDLES)]
TARGETS = {name: name[:2] for name in NAMES}
FLOAT32 = {name: f"{name[:2]}-0" for name in NAMES}
FASTEST = "t2-1"
CONTROLS = controlled(TARGETS, FLOAT32, {name: 1.0 - (name == FASTEST) / 2 for name in NAMES})
REPEATED = [*FLOAT32.values(), FASTEST]
EVERYONE = [*NAMES, *map(control_name, dict.fromkeys(REPEATED))]
TWO_THREADS = RuntimeSession(runtime="none", version="0", threads=2)
QUIET = Conditions(others_cores=0.02, steal_cores=0.0, frequency_drop="unavailable", throttled=False)
RESOLUTION = BenchPlan().resolution
MIDDLE = percentile_interval(np.arange(ROUNDS), 50)  # which of six values in order are the median and its interval

Noise = Callable[[np.random.Generator], np.ndarray]  # factors [everyone, rounds]


def independent(spread: float) -> Noise:
    return lambda generator: np.exp(generator.normal(0, spread, (len(EVERYONE), ROUNDS)))


def spikes(generator: np.random.Generator) -> np.ndarray:
    """A tenth of the processes take about 40 % longer."""
    shape = (len(EVERYONE), ROUNDS)
    return independent(0.01)(generator) * np.where(generator.random(shape) < 0.1, 1 + 0.8 * generator.random(shape), 1)


def wandering(generator: np.random.Generator) -> np.ndarray:
    """Neighbours resemble each other: AR(1) of 5 % with 0.8 from one process to the next, in a shuffled order."""
    at = np.stack([generator.permutation(len(EVERYONE)) for _ in range(ROUNDS)], 1) + np.arange(ROUNDS) * len(EVERYONE)
    steps, level = generator.normal(0, 0.05 * 0.6, at.size), np.zeros(at.size)
    for now in range(1, at.size):
        level[now] = 0.8 * level[now - 1] + steps[now]
    return np.exp(level[at])


@dataclass
class Found:
    """Counts over the simulated sessions."""

    words: Counter[str] = field(default_factory=Counter)
    wholly_trusted: int = 0  # sessions
    trusted_and_wrong: int = 0  # rows called trusted that are farther off than the resolution
    differences: int = 0  # pairs
    sessions_with_a_difference: int = 0


def session(latencies: np.ndarray, conditions: Conditions = QUIET) -> dict:
    """What is said of ``latencies`` [everyone, rounds], taken while the device did so much else."""
    rounds = {name: list(map(float, row)) for name, row in zip(EVERYONE, latencies, strict=True)}
    results = {}
    for name in NAMES:
        value, low, high = (sorted(rounds[name])[int(at)] for at in (MIDDLE.value, MIDDLE.low, MIDDLE.high))
        p50 = Interval(value, low, high, ROUNDS)
        results[name] = Result(status="measured", latency_p50_ms=p50, conditions=conditions, session=TWO_THREADS)
    return assess(rounds, results, CONTROLS, FLOAT32, RESOLUTION, cores=2)


def simulate(noise: Noise, order_effect: float = 0.0, truth: np.ndarray | None = None) -> Found:
    """Sessions of bundles that take ``truth`` ms.

    Args:
        order_effect: share by which all but the first of a target, controls too, are slower for where they stand.
    """
    generator, found = np.random.default_rng(0), Found()
    truth = np.ones(BUNDLES) if truth is None else truth
    of_everyone = np.array([truth[NAMES.index(name.removeprefix("control-"))] for name in EVERYONE])
    late = np.array([name not in FLOAT32.values() for name in EVERYONE])
    for _ in range(SESSIONS):
        said = session((of_everyone * (1 + order_effect * late))[:, None] * noise(generator))
        words = [said["results"][name].trust.word for name in NAMES]
        found.words.update(words)
        found.wholly_trusted += words == ["trusted"] * BUNDLES
        for name, word, true in zip(NAMES, words, truth, strict=True):
            value = said["results"][name].latency_p50_ms.value
            found.trusted_and_wrong += word == "trusted" and max(value / true, true / value) > 1 + RESOLUTION
        differences = sum(each.differ for each in said["comparisons"])
        found.differences += differences
        found.sessions_with_a_difference += differences > 0
    return found


@pytest.mark.parametrize("spread", [0.002, 0.01])
def test_a_quiet_machine_is_trusted_though_order_matters(spread: float) -> None:
    """A constant 0.5 % of order: the control is never "1" on a quiet machine, and need not be."""
    found = simulate(independent(spread), order_effect=0.005)
    assert found.wholly_trusted >= 0.95 * SESSIONS, found
    assert found.sessions_with_a_difference <= 0.05 * SESSIONS, found


@pytest.mark.parametrize("noise", [independent(0.15), independent(0.3)], ids=["15 %", "30 %"])
def test_noisy_rows_are_not_trusted(noise: Noise) -> None:
    found = simulate(noise)
    assert found.words["trusted"] <= 0.05 * found.words.total(), found
    assert found.sessions_with_a_difference <= 0.05 * SESSIONS, found


@pytest.mark.parametrize(
    "noise", [independent(0.03), independent(0.08), spikes, wandering], ids=["3 %", "8 %", "spikes", "wandering"]
)
def test_what_is_called_trusted_is_known_and_equals_stay_equal(noise: Noise) -> None:
    found = simulate(noise)
    assert found.trusted_and_wrong <= 0.05 * max(1, found.words["trusted"]), found
    assert found.sessions_with_a_difference <= 0.05 * SESSIONS, found


def test_what_differs_is_seen() -> None:
    """The rules are not kept by saying nothing: steps of 5 % at 1 % of noise are told apart in nine pairs of ten."""
    found = simulate(independent(0.01), truth=1.05 ** np.arange(BUNDLES))
    assert found.differences >= 0.9 * SESSIONS * BUNDLES * (BUNDLES - 1) / 2, found
    assert found.wholly_trusted >= 0.95 * SESSIONS, found


def latencies(**rows: list[float]) -> np.ndarray:
    """A quiet session of 1 ms but for ``rows``."""
    generator = np.random.default_rng(1)
    found = np.exp(generator.normal(0, 0.005, (len(EVERYONE), ROUNDS)))
    for name, row in rows.items():
        found[EVERYONE.index(name.replace("_", "-"))] = row
    return found


def test_one_wide_row_is_noisy_where_it_stands() -> None:
    """Its target is told against it, so its ratios are wide too; the other targets are not touched."""
    said = session(latencies(t1_0=[0.309, 12.0, 21.9, 11.0, 13.0, 12.5]))
    words = {name: said["results"][name].trust for name in NAMES}
    assert words["t1-0"].word == "noisy" and "p50 is known within a factor of" in words["t1-0"].reason
    assert words["t1-1"].word == "noisy" and "the ratio to float32" in words["t1-1"].reason
    assert {words[name].word for name in NAMES if not name.startswith("t1")} == {"trusted"}
    assert not any(each.differ for each in said["comparisons"])


def test_a_target_that_differs_from_itself_is_invalid() -> None:
    said = session(latencies(control_t2_0=[1.3, 1.31, 1.29, 1.3, 1.3, 1.31]))
    words = {name: said["results"][name].trust for name in NAMES}
    assert words["t2-1"].word == "invalid" and "off by 2" in words["t2-1"].reason
    assert words["t0-0"].word == "trusted"
    assert 1.2 < said["controls"]["t2-0"].low < said["controls"]["t2-0"].high < 1.4


def test_a_control_that_is_wide_says_noisy_of_its_target() -> None:
    said = session(latencies(control_t0_0=[1.0, 1.3, 0.8, 1.2, 0.9, 1.1]))
    assert said["results"]["t0-2"].trust.word == "noisy"
    assert "A/A control" in said["results"]["t0-2"].trust.reason
    assert said["results"]["t1-2"].trust.word == "trusted"


STEADY, LOOSE = Interval(1.0, 0.99, 1.01, 6), Interval(1.0, None, None, 2)
APART = BatchOne(images=8, max_difference=2.0, tolerance=0.5, agreement=0.5, within_tolerance=False)


@pytest.mark.parametrize(
    ("change", "control", "more", "wanted"),
    [
        ({}, STEADY, {}, ("trusted", "")),
        ({"over_float32": Interval(0.5, 0.49, 0.52, 6)}, STEADY, {}, ("trusted", "")),
        ({}, STEADY, {"emulated": True}, ("invalid", "emulated")),
        ({}, None, {}, ("invalid", "not every process")),
        ({"latency_p50_ms": None}, STEADY, {}, ("invalid", "not every process")),
        ({"batch_one": APART}, STEADY, {}, ("invalid", "off by 2 from those in batches, allowed 0.5")),
        ({"latency_p50_ms": LOOSE}, STEADY, {}, ("noisy", "p50 has no interval: 2 rounds are too few")),
        ({"latency_p50_ms": Interval(1.0, 0.99, 1.12, 6)}, STEADY, {}, ("noisy", "within 12 %, wanted 10 %")),
        ({"latency_p50_ms": Interval(1.0, 0.8, 1.01, 6)}, STEADY, {}, ("noisy", "within 25 %, wanted 10 %")),
        ({"over_float32": Interval(0.5, 0.4, 0.6, 6)}, STEADY, {}, ("noisy", "ratio to float32 is known within 25 %")),
        ({"warm_up_settled": False}, STEADY, {}, ("noisy", "warm-up did not settle")),
        ({}, LOOSE, {}, ("noisy", "control of x has no interval")),
        ({}, Interval(1.0, 0.8, 1.2, 6), {}, ("noisy", "control of x is known within 25 %")),
        ({}, Interval(1.005, 1.003, 1.007, 6), {}, ("trusted", "")),  # not 1, and within the resolution
        ({}, Interval(1.0, 1.0, 1.0, 6), {}, ("trusted", "")),
        ({}, Interval(1.05, 0.99, 1.12, 6), {}, ("noisy", "may be off by 12 %")),
        ({}, Interval(0.7, 0.69, 0.71, 6), {}, ("invalid", "control of x is off by 40.8 % or more")),
        ({}, Interval(0.7, 0.7, 0.7, 6), {}, ("invalid", "control of x is off by 42.9 % or more")),
        ({}, STEADY, {"pauses_seconds": [3.0, 59.0, 7.0]}, ("trusted", "")),
        ({}, STEADY, {"pauses_seconds": [3.0, 61.0]}, ("noisy", "stood still for 61 s")),
        ({"others_cores": 0.11}, STEADY, {"cores": 2}, ("noisy", "others took 0.11 of a core meanwhile, allowed 0.1")),
        ({"others_cores": 0.11}, STEADY, {"cores": 8}, ("trusted", "")),  # six are left free: 0.3 is borne
        ({"others_cores": "unavailable"}, STEADY, {}, ("noisy", "what else ran on the device could not be read")),
        ({"steal_cores": 0.2}, STEADY, {"cores": 2}, ("noisy", "its host took 0.2 of a core away")),
        ({"steal_cores": "unavailable"}, STEADY, {}, ("trusted", "")),
        ({"frequency_drop": 0.12}, STEADY, {}, ("noisy", "its clock fell by 12 % within the session")),
        ({"frequency_drop": 0.08}, STEADY, {}, ("trusted", "")),
        ({"throttled": True}, STEADY, {}, ("noisy", "throttled its clock")),
        ({"throttled": "unavailable"}, STEADY, {}, ("trusted", "")),
    ],
)
def test_the_word_on_a_row(
    change: dict[str, object], control: Interval | None, more: dict[str, object], wanted: tuple[str, str]
) -> None:
    conditions = QUIET.model_copy(
        update={name: change[name] for name in change.keys() & Conditions.model_fields.keys()}
    )
    row = Result(status="measured", latency_p50_ms=STEADY, conditions=conditions, session=TWO_THREADS)
    row = row.model_copy(update={name: change[name] for name in change.keys() & Result.model_fields.keys()})
    found: Trust = judge(row, {"x": control}, 0.1, **more)
    assert found.word == wanted[0] and wanted[1] in found.reason and bool(found.reason) == bool(wanted[1])


def test_what_disturbs_float32_disturbs_the_ratio_to_it() -> None:
    mine = Result(status="measured", latency_p50_ms=STEADY, conditions=QUIET)
    base = mine.model_copy(update={"conditions": QUIET.model_copy(update={"others_cores": 0.9})})
    assert judge(mine, {"x": STEADY}, 0.1).word == "trusted"
    found = judge(mine, {"x": STEADY}, 0.1, base=base)
    assert found.word == "noisy" and found.reason.startswith("its float32 bundle: others took 0.9 of a core")


def test_what_others_may_take_grows_with_the_cores_that_are_left_free() -> None:
    assert limit_cores(0.1, 4, 4) == limit_cores(0.1, 4, 2) == limit_cores(0.1, "unavailable", 1) == 0.1
    assert limit_cores(0.1, 8, 2) == pytest.approx(0.3) and limit_cores(0.02, 64, 4) == pytest.approx(0.6)


def called_different(ratio: float, spread: float, sessions: int = 100) -> int:
    """Of so many sessions of a pair with that true ratio, in how many the two are called different."""
    generator, found = np.random.default_rng(1), 0
    judged_by = {"a": ["a"], "b": ["a"]}
    results = {name: Result(status="measured", latency_p50_ms=STEADY, conditions=QUIET) for name in judged_by}
    for _ in range(sessions):
        noise = np.exp(generator.normal(0, spread, (3, ROUNDS))) * np.exp(generator.normal(0, 0.05))
        taken = dict(zip(("a", "b", control_name("a")), (np.array([[1], [ratio], [1]]) * noise).tolist(), strict=True))
        [pair] = assess(taken, results, judged_by, {"a": "a", "b": "a"}, RESOLUTION)["comparisons"]
        found += pair.differ
        assert not pair.differ or (pair.ratio.value < 1) == (ratio > 1)
    return found


@pytest.mark.parametrize("spread", [0.005, 0.015, 0.05])
def test_two_copies_of_one_bundle_are_rarely_called_different(spread: float) -> None:
    assert called_different(1.0, spread) <= 9, "a correct 95 % procedure stays below that 97 times of 100"


@pytest.mark.parametrize("spread", [0.005, 0.015])
def test_a_ratio_of_a_tenth_is_found(spread: float) -> None:
    assert called_different(1.1, spread) >= 90


@pytest.mark.parametrize("from_round", [0, 3], ids=["throughout", "from the middle on"])
def test_a_standing_load_is_not_trusted(from_round: int) -> None:
    """It slows float32 by 1.4 and INT8 by 1.1, so the controls are one and the ratio is told 0.39 for a true 0.5."""
    generator, slow = np.random.default_rng(0), np.ones((len(EVERYONE), ROUNDS))
    for at, name in enumerate(EVERYONE):
        slow[at, from_round:] = 1.4 if name.removeprefix("control-") in FLOAT32.values() else 1.1
    truth = np.array([1.0 if name.removeprefix("control-") in FLOAT32.values() else 0.5 for name in EVERYONE])
    half = QUIET.model_copy(update={"others_cores": (ROUNDS - from_round) / ROUNDS * 0.5})
    unseen = trusted = 0
    for _ in range(SESSIONS):
        taken = truth[:, None] * slow * np.exp(generator.normal(0, 0.01, slow.shape))
        unseen += session(taken)["results"]["t0-1"].trust.word == "trusted"
        trusted += session(taken, half)["results"]["t0-1"].trust.word == "trusted"
    assert trusted == 0
    assert unseen >= 0.9 * SESSIONS or from_round, "without the gate it would be: the controls do not show it"


def test_rounds_in_which_one_failed_are_left_out_of_its_pairs() -> None:
    rounds: dict[str, list[float | None]] = {name: [1.0, 1.01, 0.99, 1.0, 1.02, 1.0] for name in EVERYONE}
    rounds["t0-1"] = [0.5, None, 0.5, None, 0.51, 0.49]
    rounds["t0-2"] = [None, 1.0, None, None, None, None]  # no two rounds in common with t0-1
    results = {name: Result(status="measured", latency_p50_ms=STEADY) for name in NAMES}
    said = assess(rounds, results, CONTROLS, FLOAT32, RESOLUTION)
    assert said["results"]["t0-1"].over_float32.n == 4
    pairs = {(each.first, each.second): each for each in said["comparisons"]}
    assert pairs["t0-0", "t0-1"].ratio.n == 4 and pairs["t0-0", "t0-1"].differ
    assert ("t0-1", "t0-2") not in pairs and said["results"]["t0-2"].trust.word == "noisy"


def test_what_failed_is_invalid_and_the_others_go_on() -> None:
    rounds = {name: list(map(float, row)) for name, row in zip(EVERYONE, latencies(), strict=True)}
    del rounds["t0-1"], rounds["control-t1-0"]
    results = {name: Result(status="measured", latency_p50_ms=STEADY) for name in NAMES}
    results["t0-1"] = Result(status="failed")
    said = assess(rounds, results, CONTROLS, FLOAT32, RESOLUTION)
    words = {name: said["results"][name].trust.word for name in NAMES}
    assert {name for name, word in words.items() if word == "invalid"} == {"t0-1", "t1-0", "t1-1", "t1-2"}
    assert list(said["controls"]) == ["t0-0", "t2-0", "t2-1"]
    assert not any("t0-1" in (each.first, each.second) for each in said["comparisons"])


def test_a_control_for_every_targets_float32_and_the_fastest() -> None:
    targets = {"a-int8": "a", "a-float32": "a", "b-int8": "b", "b-float16": "b"}
    seconds = dict(zip(targets, (0.3, 1.0, 0.5, 0.6), strict=True))
    found = controlled(targets, {"a-int8": "a-float32", "a-float32": "a-float32"}, seconds)
    assert found == {
        "a-int8": ["a-float32", "a-int8"],
        "a-float32": ["a-float32"],
        "b-int8": ["b-int8"],
        "b-float16": ["b-int8"],
    }
    assert controlled(targets, {}, {**seconds, "b-int8": 0.1})["b-int8"] == ["b-int8"]
    assert controlled({}, {}, {}) == {}
    assert assess({}, {"x": Result(status="not installed")}, {}, {}, 0.1)["results"]["x"].trust is None


def test_holm_by_hand() -> None:
    rejected, levels = holm_levels([0.04, 0.001, 0.03, 0.012])
    assert rejected.tolist() == [False, True, False, True]  # 0.001 <= 0.0125, 0.012 <= 0.0167, but 0.03 > 0.025
    assert levels == pytest.approx([0.025, 0.0125, 0.025, 0.05 / 3])
    assert holm_levels([])[0].tolist() == []
    assert holm_levels([float("nan"), 0.0])[0].tolist() == [False, True]


@pytest.mark.parametrize("blocks", [5, 10])
def test_the_bootstrap_over_blocks_covers(blocks: int) -> None:
    """Of 300 sessions with a true ratio of 1.1 at least 270: a correct 95 % interval does in all but 2 of 10,000."""
    generator = np.random.default_rng(0)
    logs = np.log(1.1) + 0.03 * generator.standard_normal((300, blocks))
    found = [bootstrap_ratio(row, seed) for seed, row in enumerate(logs)]
    assert sum(each.low <= 1.1 <= each.high for each in found) >= 270
    assert np.median([each.high / each.low for each in found]) < (1.12 if blocks == 5 else 1.06), "and says something"


def test_the_bootstrap_by_hand() -> None:
    assert bootstrap_ratio([0.0] * 4, 0) == Interval(1.0, None, None, 4), "too few blocks bound nothing"
    same = bootstrap_ratio(np.log([2.0] * 6), 0)
    assert (same.value, same.low, same.high) == pytest.approx((2, 2, 2))
    assert bootstrap_ratio(np.arange(6.0), 1) == bootstrap_ratio(np.arange(6.0), 1)
    with pytest.raises(ValueError, match="at least one block"):
        bootstrap_ratio([], 0)
    assert geometric_interval([1.0, 4.0]).value == pytest.approx(2) and geometric_interval([3.0]).low is None
    with pytest.raises(ValueError, match="positive"):
        geometric_interval([1.0, 0.0])


def test_exit_codes_are_those_that_are_documented() -> None:
    assert [int(each.exit_code) for each in (KdpipeError, UserError, GateFailed, Untrusted)] == [2, 2, 1, 75]
    assert (int(ExitCode.DONE), int(ExitCode.INTERRUPTED)) == (0, 130)
