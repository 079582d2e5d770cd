"""What is still to be made will take, by what the same took before; what nobody knows is unknown, never guessed."""

from __future__ import annotations

import datetime
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .core.artifact import Manifest, host_record
from .core.config import SessionSettings

HALF_A_DAY_SECONDS = 43_200


class Work(NamedTuple):
    """A piece of work as far as it decides what it takes: so much (``amount``) of what is ``like`` other work.

    Where ``data`` is the key of a dataset, the amount is for each image of these ``parts`` of it.
    """

    like: tuple[Any, ...]
    amount: float | None = 1.0
    data: str | None = None
    parts: tuple[str, ...] = ()
    at_least_seconds: float | None = None  # by its settings alone
    grows: bool = False  # whether its bytes grow with the amount too


class Cost(NamedTuple):
    """What a leg takes, None where nobody knows, and how that is known."""

    seconds: float | None
    bytes: int | None
    basis: str


SEALED = Cost(0.0, 0, "sealed")
UNKNOWN = Cost(None, None, "unknown")


class _Took(NamedTuple):
    seconds: float
    size_bytes: int
    amount: float


class Forecast:
    """What work took on this machine, from the manifests of what is sealed."""

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        """Take what is sealed; what another machine made tells nothing."""
        self._host = _machine(host_record())
        self._images: dict[str, dict[str, int]] = {}
        self._took: dict[tuple[Any, ...], list[_Took]] = defaultdict(list)
        self._trained: list[Manifest] = []
        self._seen: set[str] = set()
        for manifest in manifests:
            self.learn(manifest)

    def learn(self, manifest: Manifest) -> None:
        """Take one more."""
        if manifest.digest in self._seen:
            return
        self._seen.add(manifest.digest)
        if manifest.kind == "dataset":
            self._images[manifest.key] = dict(manifest.facts["images"])
        if _machine(manifest.host) != self._host:
            return
        if manifest.stage == "train":
            self._trained.append(manifest)
        elif (work := work_of(manifest)) is not None and (amount := self._amount(work)) is not None:
            size_bytes = sum(file.size_bytes for file in manifest.files.values())
            self._took[work.like].append(_Took(manifest.seconds, size_bytes, amount))

    def cost(self, work: Work) -> Cost:
        """What ``work`` takes: the median of what the same took, for each piece of it."""
        amount = self._amount(work)
        took = self._trainings(work.like) if work.like[0] == "train" else self._took.get(work.like, [])
        if not took or amount is None:
            if work.at_least_seconds is not None:
                return Cost(work.at_least_seconds, None, "by its settings, at least")
            return UNKNOWN
        seconds = amount * statistics.median(each.seconds / each.amount for each in took)
        size = statistics.median(each.size_bytes / (each.amount if work.grows else 1) for each in took)
        times = "once" if len(took) == 1 else f"{len(took)} times"
        return Cost(seconds, round(size * (amount if work.grows else 1)), f"as the same took {times}")

    def _amount(self, work: Work) -> float | None:
        """Of pieces; None where the number of images is not known."""
        if work.amount is None or work.data is None:
            return work.amount
        images = self._images.get(work.data)
        return None if images is None else (work.amount * sum(images.get(part, 0) for part in work.parts) or None)

    def _trainings(self, like: tuple[Any, ...]) -> list[_Took]:
        """Of networks that learned side by side each has its share of the time that all of them took."""
        spans = [_span(manifest) for manifest in self._trained]
        found = []
        for manifest, span in zip(self._trained, spans, strict=True):
            work = work_of(manifest)
            if work is None or work.like != like or not work.amount:
                continue
            side_by_side = sum(_overlap(span, other) for other in spans)
            size_bytes = sum(file.size_bytes for file in manifest.files.values())
            found.append(_Took(manifest.seconds / side_by_side, size_bytes, work.amount))
        return found


def _machine(host: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(host.get(name) for name in ("machine", "cpu", "cores"))


def _span(manifest: Manifest) -> tuple[float, float]:
    """When its making began and ended, in seconds since 1970; a manifest tells the end to a second."""
    try:
        ended = datetime.datetime.fromisoformat(manifest.created_utc).timestamp()
    except ValueError:
        ended = 0.0
    return ended - manifest.seconds, ended


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two were made side by side: for more than half of the shorter one's time. Each is beside itself."""
    together = min(one[1], other[1]) - max(one[0], other[0])
    return one == other or together > 0.5 * min(one[1] - one[0], other[1] - other[0])


# ---- what decides what a stage takes ------------------------------------------------------------------------


def work_of(manifest: Manifest) -> Work | None:
    """What a sealed artifact was as work; None of what says nothing about other work."""
    config, facts = manifest.config, manifest.facts
    if manifest.kind == "refusal":  # which is written in no time, whatever was tried
        return None
    try:
        match manifest.stage:
            case "data":
                return reading(config["source"], config.get("copies_side"), sum(facts["images"].values()))
            case "fitted":
                return fitting(config["size"], sum(facts["images"].values()))
            case "adopt" | "restart":
                return adopting(config)
            case "train":
                teacher = manifest.inputs.get("teacher")
                taught_by = None if teacher is None else teacher.facts.get("model")
                return training(config, taught_by, facts["training_images"] * facts["epochs"])
            case "cache":
                teacher = manifest.inputs["teacher"]
                return asking(config, teacher.facts["model"], facts["images"] * facts["views"])
            case "graph":
                return tracing(facts["model"])
            case "export":
                return writing(facts["target"], facts["model"])
            case "quantize":
                return shrinking(config, facts["target"], facts["model"])
            case "package":
                return packing(facts["target"], facts["variant"], facts["model"])
            case "bench":
                return benching(config, config["device"], len(facts["results"]))
            case "report":
                return reporting()
    except (KeyError, TypeError, AttributeError):  # of another version, or of a stranger
        return None
    return None


def reading(source: str, copies_side: int | None, images: int | None) -> Work:
    """Checking a source, and copying its photographs."""
    return Work(("data", "digits" if source == "digits" else "images", copies_side), images, grows=True)


def fitting(size: Any, images: int | None = None, data: str | None = None) -> Work:
    """Decoding the held-out images once."""
    if data is None:
        return Work(("fitted", json.dumps(size)), images, grows=True)
    return Work(("fitted", json.dumps(size)), 1.0, data, ("val", "test"), grows=True)


def adopting(config: Mapping[str, Any]) -> Work:
    """Reading a teacher and testing it once."""
    return Work(("adopt", config["model"], json.dumps(config["input"]["size"])))


def training(
    config: Mapping[str, Any], taught_by: str | None, images_seen: float | None = None, data: str | None = None
) -> Work:
    """Training a network: so many images a pass, so many passes."""
    like = ("train", config["model"], json.dumps(config["input"]["size"]), config["method"], taught_by)
    if data is None:
        return Work(like, images_seen)
    return Work(like, config["label_fraction"] * config["train"]["epochs"], data, ("train",))


def asking(config: Mapping[str, Any], teacher: str, answers: float | None = None, data: str | None = None) -> Work:
    """Asking a teacher about every view beforehand."""
    like = ("cache", teacher, json.dumps(config["input"]["size"]))
    if data is None:
        return Work(like, answers, grows=True)
    return Work(like, config["label_fraction"] * config["views"], data, ("train", "unlabeled"), grows=True)


def tracing(model: str) -> Work:
    """Writing a network as ONNX."""
    return Work(("graph", model))


def writing(target: str, model: str) -> Work:
    """Writing a network for a target."""
    return Work(("export", target, model))


def shrinking(config: Mapping[str, Any], target: str, model: str) -> Work:
    """Making a smaller variant, with or without a search for what stays float."""
    return Work(("quantize", target, config["variant"], config["max_drop"] is not None, model))


def packing(target: str, variant: str, model: str) -> Work:
    """Making a bundle."""
    return Work(("package", target, variant, model))


def benching(config: Mapping[str, Any], device: str, rows: int | None) -> Work:
    """One session on a device: so many rows; each process warms up and times for so long at least."""
    settings = SessionSettings.model_validate(
        {name: config[name] for name in SessionSettings.model_fields if name in config}
    )
    process = settings.warm_up_seconds + settings.seconds
    at_least = None if rows is None else rows * (settings.rounds * process + settings.sustained)
    return Work(
        ("bench", device, settings.model_dump_json(exclude={"threads"})), rows, at_least_seconds=at_least, grows=True
    )


def reporting() -> Work:
    """Writing the page."""
    return Work(("report",))


# ---- in words ------------------------------------------------------------------------------------------------


class Total(NamedTuple):
    """What several legs take together, as far as it is known."""

    seconds: float
    bytes: int
    unknown: int  # legs of which nobody knows
    exact: bool  # whether no part of it is a lower bound

    def left(self) -> str:
        """The time that is left, and until when; nothing where nothing is known.

        Whoever reads it later still has the hour.
        """
        if not self.seconds:
            return ""
        end = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=self.seconds)
        hour = end.strftime("%H:%M" if self.seconds < HALF_A_DAY_SECONDS else "%a %H:%M")
        how, until = ("about", "until") if self.exact else ("at least", "not before")
        return f"{how} {duration(self.seconds)} left, {until} {hour}"


def total(costs: Iterable[Cost]) -> Total:
    """The sum of those that are known."""
    costs = list(costs)
    known = [cost for cost in costs if cost.seconds is not None]
    exact = all(cost.seconds is not None and cost.bytes is not None for cost in costs)
    return Total(
        seconds=sum(cost.seconds or 0.0 for cost in known),
        bytes=sum(cost.bytes or 0 for cost in costs),
        unknown=len(costs) - len(known),
        exact=exact,
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 50 s, 4 min, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
