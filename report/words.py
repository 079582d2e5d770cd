"""Numbers as words: one spelling for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def figure(value: float | None, digits: int = 3) -> str:
    """``value`` with that many significant digits, never in powers of ten above one."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", MINUS)


def tiny(value: float | None) -> str:
    """A difference that may be far below one."""
    return NOTHING if value is None else f"{value:.1e}".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """Three decimals, or that it is smaller."""
    if value is None:
        return NOTHING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def bounds(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """``[low, high]``, or that n is too small for one of them."""
    if found is None:
        return ""
    if found["low"] is None or found["high"] is None:
        return "n too small"
    return f"[{figure(found['low'], digits)}, {figure(found['high'], digits)}]"


def interval(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A value and its bounds, or a dash."""
    return NOTHING if found is None else f"{figure(found['value'], digits)} {bounds(found, digits)}"


def percent(share: float | None, decimals: int = 2) -> str:
    """A share in per cent, without the sign."""
    return NOTHING if share is None else f"{100 * share:.{decimals}f}"


def share_bounds(found: Mapping[str, Any] | None, decimals: int = 2) -> str:
    """Bounds of a share, in per cent."""
    return "" if found is None else f"[{percent(found['low'], decimals)}, {percent(found['high'], decimals)}]"


def shares(found: Mapping[str, Any] | None, decimals: int = 2) -> str:
    """A share and its bounds, in per cent."""
    return NOTHING if found is None else f"{percent(found['value'])} {share_bounds(found, decimals)}"


def points(value: float | None, decimals: int = 2) -> str:
    """Percentage points with their sign."""
    if value is None:
        return NOTHING
    return f"{value:+.{decimals}f}".replace("-", MINUS) if round(value, decimals) else f"{0:.{decimals}f}"


def point_bounds(found: Mapping[str, Any] | None, scale: float = 1) -> str:
    """Bounds of a difference in points."""
    if found is None:
        return ""
    if found["low"] is None:
        return "n too small"
    return f"[{points(scale * found['low'])}, {points(scale * found['high'])}]"


def mebibytes(size_bytes: int | None) -> str:
    """A size in MiB, without the unit."""
    return NOTHING if size_bytes is None else figure(size_bytes / 2**20)


def listed(items: list[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def chain_sentence(numbers: Mapping[str, Any]) -> str:
    """What was done, in one sentence."""
    chain, trust, device = numbers["chain"], numbers["trust"], numbers["environment"]["device_before"]
    students = [_student(student, chain, numbers["task"]) for student in chain["students"]]
    files = f"exported to {listed(chain['targets'])} in {listed(chain['variants'])}"
    machine = f"{device.get('cpu', 'unavailable')}, {device.get('usable_cores', 'unavailable')} usable cores"
    return f"{'; '.join(students) or 'A network'}; {files}; measured on '{trust['device']}' ({machine})."


def _student(student: Mapping[str, Any], chain: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    millions, accuracy = figure(student["parameters"] / 1e6), percent(student["accuracy"]["value"])
    text = f"{student['model']} ({millions} million parameters, {task['metric']} {accuracy} {task['unit']})"
    if not student["training_images"]:  # adopted, not trained here
        return text
    teachers = [f"{teacher['model']} ({percent(teacher['accuracy']['value'])} %)" for teacher in chain["teachers"]]
    how = "trained on labels alone"
    if student["method"] != "labels":
        how = f"taught with {student['method']}" + (f" by {listed(teachers)}" if teachers else "")
    data = f" of {chain['data']['source']}" if chain["data"] else ""
    return f"{text}, {how} on {training_images(student)}{data}"


def training_images(found: Mapping[str, Any]) -> str:
    """How many training images, and what share of each class where it is not all."""
    share = 100 * found["label_fraction"]
    return f"{found['training_images']} training images" + ("" if share == 100 else f" ({share:g} % of each class)")


def verdict(trust: Mapping[str, Any]) -> str:
    if trust["control"] is None:
        return "Not timed."
    if not trust["trusted"]:
        return "Not trusted."
    return "Trusted."


def trust_sentence(trust: Mapping[str, Any]) -> str:
    """Whether the latencies may be ranked, and how fine the session could see."""
    if trust["control"] is None:
        return "No runtime of these bundles is installed on the device: this report has no latencies."
    control = (
        f"the A/A control ({trust['reference']} against itself, {trust['rounds']} rounds) "
        f"has a latency ratio of {interval(trust['control'])}"
    )
    if not trust["trusted"]:
        found, limit = trust["control"], figure(trust["control_limit"])
        holds = found["low"] is not None and found["low"] <= 1 <= found["high"]
        why = f"wider than the factor of {limit} that is allowed" if holds else "which does not hold 1"
        return f"Do not rank by these latencies: {control}, {why}."
    resolution = f"Ratios within a factor of {figure(trust['resolution_factor'])} may be this machine's noise."
    return f"{control[0].upper()}{control[1:]}, which includes 1. {resolution}"


def emulated_sentence(trust: Mapping[str, Any]) -> str:
    """What numbers of an emulated device are worth."""
    return (
        f"'{trust['device']}' stands in for the real device: "
        "its accuracies hold, its latencies say nothing about the hardware."
    )


def gain_sentence(gain: Mapping[str, Any]) -> str:
    """What the method added over the labels alone; a gain is claimed only where its interval excludes zero."""
    where, found = f"{gain['model']}, {training_images(gain)}", gain["gain_points"]
    if found is None:
        return f"Gain of {gain['method']} not measured: no control was trained on the labels alone ({where})."
    against = f"{gain['method']} against labels alone"
    if found["low"] is None:
        return f"Gain not shown: {against} {points(found['value'])} points; one seed has no interval ({where})."
    amount = f"{points(found['value'])} points {point_bounds(found)} over {found['n']} seeds ({where})"
    if found["low"] <= 0 <= found["high"]:
        return f"Gain not shown: {against} {amount}; the interval includes zero."
    return f"{'Gain' if found['value'] > 0 else 'Loss'}: {against} {amount}."


def hop_lines(hop: Mapping[str, Any]) -> list[str]:
    """``openvino: torch 97.40 -> float32 97.40 (no flips)`` and below it the variants, in per cent."""
    ran = f" ({hop['ran']})" if hop["ran"] else ""
    up_to_float32 = [step for step in hop["steps"] if not step["variant"]]
    variants = [step for step in hop["steps"] if step["variant"]]
    lines = [f"{hop['target']}{ran}: " + " \N{RIGHTWARDS ARROW} ".join(map(_step, up_to_float32))]
    return lines + ["  against float32: " + "; ".join(map(_step, variants))] * bool(variants)


def advice_sentence(advised: Mapping[str, Any]) -> str:
    """Which variant of a target to ship, and why."""
    if advised["variant"] == "float32":
        return (
            f"{advised['target']}: ship float32; no variant is surely faster and loses at most "
            f"{advised['max_drop_points']:g} points"
        )
    return (
        f"{advised['target']}: ship {advised['variant']}, {interval(advised['over_float32'])} of float32's latency, "
        f"{points(100 * advised['difference']['value'])} points {point_bounds(advised['difference'], 100)}"
    )


def _step(step: Mapping[str, Any]) -> str:
    text = f"{step['at']} {percent(step['accuracy']['value'])}"
    if step["difference"] is None:
        return text
    if not step["lost"] and not step["won"]:
        return f"{text} (no flips)"
    return f"{text} (lost {step['lost']}, won {step['won']}, p {p_value(step['mcnemar_p'])})"
