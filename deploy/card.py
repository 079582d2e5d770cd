"""The model card of a release, in Hugging Face's format: a head in YAML for machines, the rest for people.

Names of classes, networks and devices are somebody's: none becomes Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ..core.kinds import UNKNOWN_LICENCE, CheckpointFacts, Release
from ..core.sealed import printable
from ..report.words import NOTHING, interval, percent, shares
from ..runtime.task import Task
from .licences import called
from .told import Estimate, Numbers, Row, Told, accuracies

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$:@])")
MOST_CLASSES = 1000  # rows of the table


def markdown(text: str) -> str:
    """``text`` as Markdown shows it letter by letter."""
    return SPECIAL.sub(r"\\\1", printable(text, 300))


def card(told: Told) -> str:
    """README.md of a release."""
    numbers = told.numbers()
    parts = [f"---\n{head(told, numbers)}\n---\n", *sections(told, numbers)]
    return "\n".join(parts)


def head(told: Told, numbers: Numbers | None) -> str:
    """What the Hub reads: licence, tags, and every accuracy as a result of an evaluation."""
    from huggingface_hub import EvalResult, ModelCardData

    task = told.task
    data = next(iter(told.data.values()), None)
    source = "data" if data is None else called(data.source)
    results = [
        EvalResult(
            task_type=f"image-{task.name}",
            dataset_type=_identifier(source),
            dataset_name=source,
            dataset_split="test",
            metric_type=task.hub_metric,
            metric_name=f"{task.metric} of {row.bundle}",
            metric_value=round(row.accuracy.value, 6),
        )
        for row in (accuracies(numbers) if numbers is not None else ())
        if row.accuracy is not None
    ]
    targets = {bundle.facts.target for bundle in told.bundles.values()}
    precisions = {bundle.facts.precision for bundle in told.bundles.values()}
    known = ModelCardData(
        model_name=told.facts.name,
        library_name="kdpipe",
        license=(told.license or UNKNOWN_LICENCE).lower(),
        pipeline_tag=f"image-{task.name}",
        tags=sorted({"knowledge-distillation", "edge", *targets, *precisions}),
        version=told.facts.version,
        eval_results=results or None,
    )
    return str(known.to_yaml())


def _identifier(text: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", text.lower(), flags=re.ASCII).strip("-")[:96] or "unknown"


def sections(told: Told, numbers: Numbers | None) -> Iterator[str]:
    """The card for people, section by section."""
    facts = told.facts
    yield f"# {markdown(facts.name)} {markdown(facts.version)}\n"
    if facts.verdict is None:
        yield "**Nothing gated this release**: no verdict was given when it was made.\n"
    else:
        yield f"The gate's answer was **{facts.verdict}**: [verdict/comment.md](verdict/comment.md).\n"
    yield "## Bundles\n"
    yield table(
        ("bundle", "target", "variant", "input, pixels", "size, MiB"),
        (
            (
                f"[{markdown(name)}]({Release.BUNDLES}/{name}/)",
                markdown(bundle.facts.target),
                markdown(bundle.facts.variant),
                "x".join(map(str, bundle.facts.input.sides)),
                f"{bundle.facts.size_bytes / 2**20:.2f}",
            )
            for name, bundle in told.bundles.items()
        ),
    )
    classes, each = len(next(iter(told.bundles.values())).labels), told.task.counted.removesuffix("s")
    yield f"A bundle takes RGB of 0 to 255 and says one of {classes} classes of each {each}.\n"
    yield from made_of(told)
    yield from accuracy(told, numbers)
    yield from latency(numbers)
    yield from limits(told, numbers)
    yield "## Licences\n"
    yield table(
        ("of", "licence"),
        [
            ("this release", markdown(told.license) if told.license else f"{UNKNOWN_LICENCE}: its maker did not say"),
            *((markdown(of), markdown(licence)) for of, licence in facts.licences.items()),
        ],
    )
    yield "## Is it whole, and whom is it from?\n"
    yield (
        f"    kdpipe verify {facts.name}/{facts.version}                          # unchanged since it was made\n"
        f"    kdpipe verify {facts.name}/{facts.version} --signature PUBLIC.pem   # and signed by that key's holder\n"
    )
    yield (
        f"`{Release.SUMS}` is for `sha256sum -c`, `{Release.BILL}` lists the parts (CycloneDX), `{Release.PROVENANCE}` "
        "says how it was made (in-toto, SLSA). None of these says whom it is from: a signature does.\n"
    )


def made_of(told: Told) -> Iterator[str]:
    """Data, teacher and method."""
    yield "## How it was made\n"
    for data in told.data.values():
        images = ", ".join(f"{count} {part}" for part, count in data.images.items() if count)
        yield f"- Data: {markdown(called(data.source))}, {data.classes} classes, images: {images}."
    teachers = told.teachers
    for _, teacher in teachers:
        yield f"- Teacher: {markdown(teacher.model)}, {network(teacher, told.task)}."
    for source, student in told.students:
        method = markdown(student.method)
        learned = f"method {method}, {student.epochs} epochs, {student.training_images} labelled images"
        more = f" and {student.unlabeled_images} without labels" if student.unlabeled_images else ""
        seed = f", seed {source.config['seed']}" if isinstance(source.config.get("seed"), int) else ""
        yield f"- Network: {markdown(student.model)}, {network(student, told.task)}; {learned}{more}{seed}."
    if not told.students:
        yield "- Network: somebody's file, adopted as it was."
    elif not teachers:
        yield "- Teacher: none."
    yield ""


def network(facts: CheckpointFacts, task: Task) -> str:
    """A network's size and how right it is, in words."""
    found = facts.test_interval
    right = f"{percent(facts.test_accuracy)} %" if found is None else f"{shares(found.as_dict())} %"
    return f"{facts.parameters / 1e6:.3g} M parameters, {task.metric} {right} on {facts.test_images} test images"


def accuracy(told: Told, numbers: Numbers | None) -> Iterator[str]:
    """How right the bundles are, each with its interval, and class by class."""
    yield "## Accuracy\n"
    if numbers is None:
        yield "No report was given: how right the bundles themselves are is not told here.\n"
        return
    task = told.task
    yield table(
        ("bundle", f"{task.metric}, % [95 % interval]", "test images", "calibration error, %"),
        ((markdown(row.bundle), _share(row.accuracy), _count(row.accuracy), _sure(row)) for row in accuracies(numbers)),
    )
    yield (
        "The calibration error says how far the model's own probability is from how often it is right; beside it what "
        "chance alone would show on so many images.\n"
    )
    answers = numbers.answers
    if answers is None:
        return
    yield f"### By class, {markdown(answers.bundle)}\n"
    yield table(
        ("class", f"{task.class_metric}, % [95 % interval]", "test images"),
        (
            (markdown(each.name), _share(each.accuracy), str(each.test_images))
            for each in answers.classes[:MOST_CLASSES]
        ),
    )
    if len(answers.classes) > MOST_CLASSES:
        yield f"The other {len(answers.classes) - MOST_CLASSES} classes are in the report.\n"


def latency(numbers: Numbers | None) -> Iterator[str]:
    """How long one image takes on each device, with its interval and its trust."""
    yield "## Latency\n"
    if numbers is None:
        yield "No report was given: nothing is told of latency.\n"
        return
    for device in numbers.devices:
        emulated = " (emulated: times mean nothing)" if device.trust.emulated else ""
        yield f"### On {markdown(device.device)}{emulated}\n"
        yield f"{markdown(device.probe_before.cpu)}, {markdown(device.probe_before.machine)}.\n"
        yield table(
            ("bundle", "threads", "p50, ms [95 % interval]", "p90, ms", "sessions", "trust"),
            (
                (
                    markdown(row.bundle),
                    NOTHING if row.threads is None else str(row.threads),
                    _time(row.latency_p50_ms),
                    _time(row.latency_p90_ms),
                    str(row.sessions),
                    _trust(row),
                )
                for row in device.bundles
            ),
        )
    yield "One image at a time, from the runtime's input to its outputs. What is not trusted is no claim.\n"


def limits(told: Told, numbers: Numbers | None) -> Iterator[str]:
    """What the release was not shown to do."""
    yield "## Limits\n"
    yield "- What it says of images that differ from its test images, nobody has measured here."
    guesses = [facts.model for _, facts in told.students if facts.may_guess]
    if guesses:
        yield f"- {markdown(', '.join(guesses))} is not shown to be better than guessing."
    guarded = [(name, bundle.facts.guard) for name, bundle in told.bundles.items()]
    for name, guard in guarded:
        if guard is not None and not guard.shown:
            yield f"- {markdown(name)} is not shown to lose at most {guard.max_drop_points:g} points to float32."
    for name, bundle in told.bundles.items():
        if bundle.facts.not_built_here:
            yield f"- {markdown(name)} was not built or run where it was made: its device does that."
    for device in numbers.devices if numbers is not None else ():
        doubts = [row.bundle for row in device.bundles if row.trust is not None and row.trust.word != "trusted"]
        if doubts:
            told_ones = markdown(", ".join(dict.fromkeys(doubts)))
            yield f"- On {markdown(device.device)} the latencies of {told_ones} are not to be trusted."
    unknown = [of for of, licence in told.facts.licences.items() if licence == UNKNOWN_LICENCE]
    if unknown:
        yield f"- Under which licence the {markdown(', '.join(unknown))} may be used, its maker did not say."
    yield ""


# ---- pieces ------------------------------------------------------------------------------------------------


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown already."""
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _share(found: Estimate | None) -> str:
    return NOTHING if found is None else shares(found.model_dump())


def _count(found: Estimate | None) -> str:
    return NOTHING if found is None else str(found.n)


def _time(found: Estimate | None) -> str:
    return NOTHING if found is None else interval(found.model_dump())


def _sure(row: Row) -> str:
    if row.calibration is None:
        return NOTHING
    return f"{percent(row.calibration.error)} (by chance up to {percent(row.calibration.by_chance)})"


def _trust(row: Row) -> str:
    if row.trust is None:
        return "not timed"
    return row.trust.word if not row.trust.reason else f"{row.trust.word}: {markdown(row.trust.reason)}"
