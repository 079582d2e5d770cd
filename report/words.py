"""Numbers as words: one spelling for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.kinds import CheckpointFacts, GraphFacts, MeasurementFacts, may_guess
from ..core.stats import NoWorse, plain
from ..runtime.task import Task

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SMOKE = "A smoke run: two batches through every stage. It shows that they work; no number of it is a result."


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


def percentile(found: Mapping[str, Any] | None, p50: Mapping[str, Any] | None) -> str:
    """A percentile, or why there is none beside a median."""
    if found is not None:
        return figure(found["value"])
    return NOTHING if p50 is None else "n too small"


def cpus(row: Mapping[str, Any]) -> str:
    """Which CPUs a row's processes kept to."""
    if row["cpus"] is None:
        return NOTHING
    return row["cpus"] if isinstance(row["cpus"], str) else ", ".join(map(str, row["cpus"]))


def executed(row: Mapping[str, Any]) -> str:
    """How many layers ran in which precision."""
    if row["executed"] is None:
        return "unavailable"
    return ", ".join(f"{count} in {precision}" for precision, count in sorted(row["executed"].items()))


def timing_remarks(row: Mapping[str, Any]) -> str:
    """What is to be known of how a row was timed, each remark after a semicolon."""
    remarks = []
    if row["warm_up_settled"] is False:
        remarks.append("warm-up did not settle")
    if row["stable"] is False:
        remarks.append("UNSTABLE")
    if row["slowed_after_seconds"] is not None:
        remarks.append(f"slower by 5 % after {row['slowed_after_seconds']:.0f} s of a long run")
    return "".join(f"; {remark}" for remark in remarks)


def frame_sizes(frame: Mapping[str, Any]) -> str:
    """Height and width of the pictures that were timed, or of the smallest and the largest."""
    sizes = sorted({tuple(size) for size in frame["sizes"]}, key=math.prod)
    told = [f"{height}x{width}" for height, width in (sizes[0], sizes[-1])]
    return told[0] if len(sizes) == 1 else f"{told[0]} to {told[1]}"


def frame_lines(device: Mapping[str, Any]) -> list[str]:
    """What a whole frame takes with the bundle to ship, else with the first that was timed; nothing where none was."""
    timed = {row["name"]: row for row in device["bundles"] if row.get("whole_frame")}  # a report of before has none
    row = timed.get(device["decision"]["bundle"], next(iter(timed.values()), None))
    if row is None:
        return []
    frame = row["whole_frame"]
    steps = ", ".join(f"{step} {figure(spent)}" for step, spent in frame["steps_ms"].items())
    doubt = "" if frame["trust"]["word"] == "trusted" else f"; {frame['trust']['word']}: {frame['trust']['reason']}"
    whole, known = frame["latency_ms"], bounds(frame["latency_ms"])
    known = known if known.startswith("[") else f"({known})"
    return [
        f"{row['name']}, a whole frame of {frame_sizes(frame)} pixels: {figure(whole['value'])} ms {known}, "
        f"{interval(frame['over_network'])} of the network alone ({steps} ms){doubt}"
    ]


def threads_sentence(trust: Mapping[str, Any]) -> str:
    """On how many threads, kept where."""
    if len(trust["threads"]) > 1:
        told = "the threads in each row's name"
    else:
        told = "a thread on every core" if trust["threads"] == [0] else f"{trust['threads'][0]} thread(s)"
    return f"{told}, kept to one CPU a core, the fast ones where cores differ."


def starts(trust: Mapping[str, Any]) -> str:
    """Of how many processes a start is told, and where the file was."""
    if not trust["cold_starts"]:
        return "those processes"
    memory = "in memory" if trust["page_cache"] == "warm" else "on the disk"
    few = "" if trust["cold_starts"] >= 10 else " (few)"
    return f"{trust['cold_starts']}{few} that did nothing else, the bundle's files {memory}"


def listed(items: list[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def some(items: list[str], most: int = 3) -> str:
    """As ``listed``, but of many the first ones and how many more."""
    return listed(items) if len(items) <= most + 1 else listed([*items[:most], f"{len(items) - most} more"])


def chain_sentence(numbers: Mapping[str, Any]) -> str:
    """What was done, in one sentence."""
    chain = numbers["chain"]
    students = [_student(student, chain, numbers["task"]) for student in chain["students"]]
    files = f"exported to {listed(chain['targets'])} in {listed(chain['variants'])}"
    machines = [f"'{device['device']}' ({machine(device)})" for device in numbers["devices"]]
    return f"{'; '.join(students) or 'A network'}; {files}; measured on {listed(machines)}."


def machine(device: Mapping[str, Any]) -> str:
    """What a device is, in a few words."""
    probe = device["probe_before"]
    return f"{probe.get('cpu', 'unavailable')}, {probe.get('usable_cores', 'unavailable')} usable cores"


# By what a network was made, why its answers mean nothing.
NO_ANSWERS = {
    "masked": "it painted what was hidden of images, and is what a student starts from",
    "untrained": "its weights are random, as a control",
    "random_head": "its head is random, as a control",
}


def found_lines(found: CheckpointFacts | GraphFacts, task: Task) -> list[str]:
    """How right a network is, and loudly where that is not shown to be more than guessing; nothing where unknown."""
    trained = isinstance(found, CheckpointFacts) and found.method != "as given"
    accuracy = found.test_interval if isinstance(found, CheckpointFacts) else found.accuracy
    if accuracy is None:
        return []
    value, between = percent(accuracy.value), share_bounds(accuracy.as_dict())
    lines = [f"{task.metric} {value} {task.unit} {between} on {accuracy.n} test images"]
    if isinstance(found, CheckpointFacts) and found.pruned is not None:
        lines.append(f"pruned to {found.pruned}")
    if isinstance(found, CheckpointFacts) and found.method in NO_ANSWERS:
        return [*lines, f"no answers are to be expected of it: {NO_ANSWERS[found.method]}"]
    if may_guess(accuracy, found.guessing):
        causes = (
            "it learned nothing yet: more train.epochs, another train.learning_rate"
            if trained
            else "usual causes: colours normalised in another way (input.mean, input.std), classes in another order "
            "(data.classes), another input.size, or weights that were never trained on these classes"
        )
        guessing = guessing_words(found.guessing, task.metric, task.unit)
        lines.append(f"WARNING: not shown to be better than {guessing}; {causes}")
    return lines


def guessing_words(guessing: float | None, metric: str, unit: str) -> str:
    """What one gets who looks at no image."""
    return f"guessing ({metric} {percent(guessing)} {unit} without looking at the image)"


def random_input_lines(facts: MeasurementFacts) -> list[str]:
    """Of models that were timed on random input, a line each."""
    lines = []
    for name, result in facts.results.items():
        if result.latency_p50_ms is None or result.trust is None:
            lines.append(f"{name} on {facts.device}: {result.status}")
            continue
        p50 = interval(result.latency_p50_ms.as_dict())
        lines.append(f"{name} on {facts.device}: p50 {p50} ms on random input, {result.trust.word}")
    return lines


def device_heading(device: Mapping[str, Any]) -> str:
    """Above what was measured on one of several devices."""
    return f"On {device['device']} ({machine(device)}{', emulated' if device['trust']['emulated'] else ''}):"


# Below what was measured on several devices.
APART = (
    "Each device is told for itself: other cores, runtimes and clocks, so no row is ranked against another device's."
)


def host_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the outputs of a device differ from those of the same bundles on the host, where they were compared."""
    compared = {row["name"]: row["against_host"] for row in rows if row["against_host"] is not None}
    alike = [name for name, found in compared.items() if not found["mismatches"]]
    lines = [f"says the same of every image as on the host: {', '.join(alike)}"] if alike else []
    return lines + [
        f"{name}: {found['mismatches']} images are called something else than on the host "
        f"({found['by']}; lost {found['lost']}, won {found['won']}, p {p_value(found['mcnemar_p'])})"
        for name, found in compared.items()
        if found["mismatches"]
    ]


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
    return f"{(trust['word'] or 'not timed').capitalize()}."


def trust_sentence(trust: Mapping[str, Any]) -> str:
    """How many latencies are to be believed, and how fine the session could see."""
    if trust["word"] is None:
        return "No runtime of these bundles is installed on the device: this report has no latencies."
    timed, doubted, within = trust["timed"], len(trust["untrusted"]), f"{100 * trust['resolution']:g} %"
    text = f"{timed - doubted} of {timed} latencies are trusted (known within {within}, as was asked for)."
    controls = [f"{name} {interval(found)}" for name, found in trust["controls"].items()]
    if controls:
        text += f" A/A controls (a bundle over itself, {trust['rounds']} rounds): {'; '.join(controls)}."
    if trust["sessions"] > 1:
        text += (
            f" Pooled over up to {trust['sessions']} trusted sessions of {trust['attempts']}: a session is one value."
        )
    elif doubted < timed:
        text += " This holds for this session only: of the next one `--again` tells."
    if trust["attempts"] > 1:
        text += f" Shown: attempt {trust['attempt']} of {trust['attempts']}, the last trusted one, else the last."
    return text


def untrusted_lines(untrusted: Sequence[Mapping[str, Any]]) -> list[str]:
    """``a and b are noisy: why``, a line for each reason."""
    reasons = dict.fromkeys((row["word"], row["reason"]) for row in untrusted)
    named = {why: [row for row in untrusted if (row["word"], row["reason"]) == why] for why in reasons}
    return [f"{_by_word(rows)}: {reason}" for (_, reason), rows in named.items()]


def _by_word(untrusted: Sequence[Mapping[str, Any]]) -> str:
    """``a and b are noisy; c is invalid``."""
    named = {word: [row["name"] for row in untrusted if row["word"] == word] for word in ("invalid", "noisy")}
    return "; ".join(
        f"{listed(names)} {'is' if len(names) == 1 else 'are'} {word}" for word, names in named.items() if names
    )


def front(places: Sequence[Sequence[str]]) -> str:
    """The front from the fastest on; what shares a place cannot be told apart."""
    return ", ".join(" = ".join(place) for place in places)


def shaky_advice(numbers: Mapping[str, Any]) -> str | None:
    """Which latencies that the advice rests on are not to be believed, in one line; None if all are."""
    told = []
    for device in numbers["devices"]:
        doubted = {row["name"]: row for advised in device["advice"] for row in advised["untrusted"]}
        if doubted and not device["trust"]["emulated"]:
            told.append(
                (f"on {device['device']} " if len(numbers["devices"]) > 1 else "") + _by_word(list(doubted.values()))
            )
    return f"the advice rests on latencies that are not trusted: {'; '.join(told)}" if told else None


def emulated_sentence(trust: Mapping[str, Any]) -> str:
    """What numbers of an emulated device are worth."""
    return (
        f"'{trust['device']}' stands in for the real device: "
        "its accuracies hold, its latencies say nothing about the hardware."
    )


def gain_sentence(gain: Mapping[str, Any]) -> str:
    """What the method added over the labels alone; a gain is claimed only where its interval excludes zero."""
    where, found = f"{gain['model']}, {training_images(gain)}", gain["gain_points"]
    if gain["control_steps"] not in (None, gain["steps"]):
        where += f"; {gain['steps']:,} steps against {gain['control_steps']:,}"
    if found is None:
        return f"Gain of {gain['method']} not measured: no control was trained on the labels alone ({where})."
    against = f"{gain['method']} against labels alone"
    if found["low"] is None:
        return f"Gain not shown: {against} {points(found['value'])} points; one seed has no interval ({where})."
    amount = f"{points(found['value'])} points {point_bounds(found)} over {found['n']} seeds ({where})"
    if found["low"] <= 0 <= found["high"]:
        return f"Gain not shown: {against} {amount}; the interval includes zero."
    if found["value"] > 0:
        return f"Gain: {against} {amount}."
    amount = f"{plain(-found['value'])} points [{plain(-found['high'])}, {plain(-found['low'])}]"
    return f"Loss: {gain['method']} lost {amount} against labels alone over {found['n']} seeds ({where})."


def caveats(numbers: Mapping[str, Any]) -> list[str]:
    """What comes before every number of a report: that it is none, or that some are missing."""
    lines = []
    if numbers.get("smoke"):
        lines.append(SMOKE)
    if missing := numbers.get("missing"):
        lines.append(f"Missing, since making it failed: {listed(missing)}.")
    return lines


def hop_lines(hop: Mapping[str, Any]) -> list[str]:
    """``openvino of small: torch 97.40 -> float32 97.40 (no flips)`` and below it the variants, in per cent."""
    ran = f" ({hop['ran']})" if hop["ran"] else ""
    images = hop["steps"][0]["accuracy"]["n"]
    up_to_float32 = [_step(step, images) for step in hop["steps"] if not step["variant"]]
    variants = [_step(step, images) for step in hop["steps"] if step["variant"]]
    lines = [f"{of_student(hop)}{ran}: " + " \N{RIGHTWARDS ARROW} ".join(up_to_float32)]
    return lines + ["  against float32: " + "; ".join(variants)] * bool(variants)


def of_student(told: Mapping[str, Any]) -> str:
    """For which target something is told, and of whom where there are several students."""
    return str(told["target"]) + (f" of {told['student']}" if told.get("student") else "")


def advice_sentence(advised: Mapping[str, Any]) -> str:
    """Which variant of a target to ship, and why; and which faster one may do."""
    return _advice(advised) + gains_nothing_clause(advised) + guessing_clause(advised)


def gains_nothing_clause(advised: Mapping[str, Any]) -> str:
    """That a trained variant is not worth its training, after a semicolon; else nothing."""
    found = advised.get("gains_nothing")
    return f"; {listed(found)} is not worth its training: one without it loses no more" if found else ""


def guessing_clause(advised: Mapping[str, Any]) -> str:
    """That what is advised is not shown to be better than guessing, after a semicolon; else nothing."""
    found = advised.get("guessing")
    if found is None:
        return ""
    return f"; BUT it is not shown to be better than {guessing_words(found['share'], found['metric'], found['unit'])}"


def _advice(advised: Mapping[str, Any]) -> str:
    target = of_student(advised)
    if advised["untrusted"]:
        return f"{target}: nothing to ship by these latencies ({_by_word(advised['untrusted'])})"
    limit, may_do = f"{advised['max_drop_points']:g} points", advised["may_do"]
    if advised["variant"] != "float32":
        best = advised["variant"] + (f" (a tie with {listed(advised['ties'])})" if advised["ties"] else "")
        text = (
            f"{target}: ship {best}, {interval(advised['over_float32'])} of float32's latency, "
            f"{points(100 * advised['difference']['value'])} points {point_bounds(advised['difference'], 100)}"
        )
    elif may_do is None:
        return f"{target}: ship float32; no variant is surely faster and loses at most {limit}"
    else:
        text = f"{target}: no variant is shown to be faster and to lose at most {limit}"
    return text if may_do is None else f"{text}; {may_do_clause(may_do)}"


def decision_sentence(decision: Mapping[str, Any]) -> str:
    """What to ship to a device, and what is known of it, in one sentence."""
    answer, bundle, allowed = decision["answer"], decision["bundle"], f"{decision['max_drop_points']:g} points"
    if answer == "not timed":
        return "No decision: none of these bundles was timed on this device."
    if answer == "emulated":
        return "No decision: this device is emulated, its latencies say nothing about the hardware."
    if answer == "untrusted":
        which = some(decision["doubted"])
        return f"No decision yet: the latencies that would decide are not trusted ({which}). Measure again."
    if answer == "guessing":
        found = decision["guessing"]
        told = guessing_words(found["share"], found["metric"], found["unit"])
        return f"Ship none of these: they are not shown to be better than {told}."
    if answer == "float32":
        return f"Ship {bundle}: nothing smaller is shown to be faster and to lose at most {allowed}."
    speed = "" if decision["over_float32"] is None else f"{times_as_fast(decision['over_float32'])}, "
    return f"Ship {bundle}: {speed}{kept_clause(decision['accuracy'])}."


def times_as_fast(over_float32: Mapping[str, Any]) -> str:
    """A ratio of latencies the other way round: how often the one is done while float32 is done once."""
    return f"{figure(1 / over_float32['value'])} times as fast as its float32"


def kept_clause(accuracy: Mapping[str, Any]) -> str:
    """What becomes of the accuracy, by what so many images can show; and how many would prove what they cannot."""
    found = NoWorse(**accuracy)
    images, at_most = f"{found.images:,} images", ""
    if found.possible_points is None or found.detectable_points is None:
        lost = "wins" if found.drop_points < 0 else "loses"
        return f"{lost} {plain(abs(found.drop_points))} points on {images}, which are too few for an interval"
    least = found.possible_points - 2 * found.detectable_points  # the other end of the interval
    if found.answer == "holds" and found.possible_points > 0:
        at_most = f", {plain(found.possible_points)} points at most"
    if least <= 0 <= found.possible_points:
        text = f"loses nothing that {images} could show{at_most}"
    elif found.drop_points < 0:
        text = f"wins {plain(-found.drop_points)} points on {images}"
    else:
        text = f"loses {plain(found.drop_points)} points on {images}{at_most}"
    if found.images_needed is None:
        return text
    return (
        f"{text}; to prove that it loses at most {found.max_drop_points:g} points takes about {found.images_needed:,}"
    )


def decision_reasons(
    decision: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], task: Mapping[str, Any]
) -> list[str]:
    """What the decision rests on, a line each; none where there is nothing to ship."""
    row = next((row for row in rows if row["name"] == decision["bundle"]), None)
    if row is None:
        return []
    speed = f"One image takes {interval(row['latency_p50_ms'])} ms (the median; in brackets 95 % intervals)"
    if decision["over_float32"] is not None:
        speed += f", {interval(decision['over_float32'])} of what its float32 takes"
    lines = [f"{speed}."]
    if row["accuracy"] is not None:
        kept = f"{task['metric']} {shares(row['accuracy'])} {task['unit']} on {row['accuracy']['n']:,} test images"
        if decision["difference"] is not None:
            change = points(100 * decision["difference"]["value"])
            kept += f", against its float32 {change} points {point_bounds(decision['difference'], 100)}"
            kept += f" where a loss of {decision['max_drop_points']:g} is allowed"
        lines.append(f"{kept}.")
    lines.append(f"{listed(sizes(row))}.")
    if decision["ties"]:
        lines.append(f"As fast, as far as this session can tell: {listed(decision['ties'])}.")
    if decision["faster"] is not None:
        lines.append(f"Faster, but not shown to lose so little: {decision['faster']}.")
    if decision["worse"]:
        lines.append(f"Left out, since another student is surely more accurate: {listed(decision['worse'])}.")
    if decision["doubted"]:
        lines.append(f"Left out, since what they take is not trusted: {listed(decision['doubted'])}.")
    return lines


def sizes(row: Mapping[str, Any]) -> list[str]:
    """How large a bundle is: the file, its parameters, what one image takes; as far as it is known."""
    found = [f"{mebibytes(row['size_bytes'])} MiB on disk"]
    if row["parameters"] is not None:
        found.append(f"{count(row['parameters'])} parameters")
    if row["macs"] is not None:
        found.append(f"{count(row['macs'])} multiply-accumulates for one image")
    return found


def count(number: int | None) -> str:
    """A number of things: in full below a million, else in millions or billions."""
    if number is None:
        return NOTHING
    if number < 10**6:
        return f"{number:,}"
    return f"{figure(number / 1e6)} million" if number < 10**9 else f"{figure(number / 1e9)} billion"


def calibration(found: Mapping[str, Any] | None) -> str:
    """A calibration error in per cent, without the sign."""
    return NOTHING if found is None else percent(found["error"])


def answers_lines(numbers: Mapping[str, Any]) -> list[str]:
    """Of the bundle to ship, in short: accuracy by class, what is taken for what, how sure it is."""
    answers, task = numbers["answers"], numbers["task"]
    if answers is None:
        return []
    rows = {row["name"]: row for row in numbers["devices"][0]["bundles"]}
    row, float32 = rows[answers["bundle"]], rows.get(answers["float32"] or "")
    text = f"{answers['bundle']} by class: {task['metric']} {shares(row['balanced'])} {task['unit']} on average"
    least = lowest(answers["classes"])
    if least is not None:
        text += (
            f"; lowest '{least['class']}' with {percent(least['accuracy']['value'], 1)} {task['unit']} "
            f"of {least['test_images']:,} images"
        )
    if answers["confusions"]:
        most, counted = answers["confusions"][0], task.get("counted", "images")
        many = f"{most[counted]:,} {counted}"
        if counted != "images":  # so many that they say nothing
            many = f"{percent(most['share'], 1)} % of its {counted}"
        text += f"; most often '{most['label']}' is called '{most['said']}' ({many})"
    lines = [text]
    if (found := row["calibration"]) is not None:
        before = "" if float32 is None else f" (float32 {calibration(float32['calibration'])} %)"
        chance = f"up to {percent(found['by_chance'])} % may be chance on {found['images']:,} images"
        lines.append(f"{answers['bundle']} calibration error {calibration(found)} %{before}; {chance}")
    return [*lines, f"{answers['bundle']}: {', '.join(sizes(row))}"]


def worst_first(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The classes from the lowest accuracy up; those without test images last."""
    return sorted(classes, key=lambda row: row["accuracy"]["value"] if row["accuracy"] else math.inf)


def lowest(classes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The class with the lowest accuracy; of several the one with the most images. None where no class has images."""
    known = [row for row in classes if row["accuracy"] is not None]
    return min(known, key=lambda row: (row["accuracy"]["value"], -row["test_images"]), default=None)


def lost(drop_points: float | None) -> str:
    """A drop as a column has it: what is won is called so."""
    if drop_points is None:
        return NOTHING
    amount = plain(drop_points)
    return f"{amount.removeprefix('-')} won" if amount.startswith("-") else amount


def lost_bounds(low: float | None, high: float | None) -> str:
    """Bounds of a drop."""
    return "n too small" if low is None or high is None else f"[{lost(low)}, {lost(high)}]"


def may_do_clause(may_do: Mapping[str, Any]) -> str:
    """The fastest variant that keeps the accuracy by the point value, and how little that says."""
    return (
        f"fastest that may do: {may_do['variant']}, {interval(may_do['over_float32'])} of float32's latency, "
        f"{NoWorse(**may_do['accuracy']).words()}"
    )


def guard_sentence(guard: Mapping[str, Any]) -> str:
    """Whether the mix that the guard took is shown to keep the accuracy, on images that did not choose it."""
    confirmed = NoWorse(**guard["confirmed"])
    shown = "Shown" if guard["shown"] else "Not shown"
    can_tell = (
        "" if confirmed.detectable_points is None else f", which can tell a drop of {confirmed.detectable_points:.2f}"
    )
    return f"{shown} on {confirmed.images} images that the search did not use{can_tell}: {confirmed.words()}."


def on_part(step: Mapping[str, Any], images: int) -> str:
    """Of a hop that was tested on fewer images than its line: on how many."""
    n = step["accuracy"]["n"]
    return "" if n == images else f"on {n} of {images} images"


def _step(step: Mapping[str, Any], images: int) -> str:
    part = on_part(step, images)
    text = f"{step['at']} {percent(step['accuracy']['value'])}"
    if part and step["difference"] is not None:  # beside the others' accuracies its own would mislead
        text = f"{step['at']} {points(100 * step['difference']['value'])} points {part}"
    if step["difference"] is None:
        return text
    if not step["lost"] and not step["won"]:
        return f"{text} (no flips)"
    return f"{text} (lost {step['lost']}, won {step['won']}, p {p_value(step['mcnemar_p'])})"
