"""Inputs that nobody would write: what a real chain made, with bytes or values changed, and who reads them.

Each reader is set up once and then tries one changed input after another, seeded: ``attempt`` returns whether it was
taken. What may be raised is the reader's own refusal and nothing else, and what was changed and not sealed again is
never taken.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from conftest import Made, replace_file
from safetensors.torch import save_file
from torch import nn

from kdpipe.core import sealed
from kdpipe.core.artifact import MANIFEST, Record, check_provenance, read_manifest
from kdpipe.core.config import CachePlan, read_recipe, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import (
    Bundle,
    Cache,
    FreshStart,
    Measurement,
    MeasurementFacts,
    Prediction,
    Probe,
    Report,
    Samples,
    Sights,
    VerdictFacts,
)
from kdpipe.core.remote import fetch_folder
from kdpipe.core.rules import parse_rules
from kdpipe.devices import DEVICES, book
from kdpipe.devices.journal import Journal
from kdpipe.devices.runner import read_answer
from kdpipe.distill.cache import CachedTeacher, config_of, open_cache
from kdpipe.networks.weights import load_weights, read_state_dicts
from kdpipe.runtime import PROTOCOL_VERSION, store
from kdpipe.runtime.bundle import BundleError, read_facts, read_golden
from kdpipe.runtime.weights import ModelFileError, refuse_files_elsewhere

Attempt = Callable[[random.Random], bool]
Place = tuple[str | int, ...]

STRANGE: tuple[Any, ...] = (
    None, -1, 0, 10**9, 10**30, 1e308, "x", "", "../../etc/passwd", "[red]", "\x1b[2J", [], {}, True, [1], [[]],
)  # fmt: skip
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
YAML_WORDS = (
    "&a ", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!binary x", "{", "[", "- ", "? ", ": ", "\t", "'",
    "|", "%YAML 9", "---\n", "\0", "1e999", ".nan", "0o7", "2001-99-99", "~", "null", "\u202e", "9" * 50,
)  # fmt: skip


# ---- changing ----------------------------------------------------------------------------------------------


def mangled(content: bytes, generator: random.Random) -> bytes:
    """One to three changes: bits, bytes, numbers, pieces left out, put in, repeated or cut off; half near the start."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        size = len(changed)
        start = generator.randrange((size if generator.random() < 0.5 else min(size, 256)) + 1)
        length = generator.randint(1, 8)
        match generator.randrange(7):
            case 0 if start < size:
                changed[start] ^= 1 << generator.randrange(8)
            case 1:
                changed[start : start + length] = generator.randbytes(length)
            case 2:
                del changed[start : start + length]
            case 3:
                changed[start:start] = generator.randbytes(length)
            case 4:
                changed[start : start + 8] = generator.choice(NUMBERS).to_bytes(8, "little")[: generator.choice((4, 8))]
            case 5:
                changed[start:start] = changed[generator.randrange(size + 1) :][: generator.randint(1, 64)]
            case _ if generator.random() < 0.2:
                del changed[start:]
    return bytes(changed)


def everywhere(value: Any, path: Place = ()) -> Iterator[Place]:
    """Every place in a JSON value, mappings and lists included."""
    if path:
        yield path
    for name in value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ():
        yield from everywhere(value[name], (*path, name))


def put(value: Any, place: Place, new: Any) -> None:
    for part in place[:-1]:
        value = value[part]
    value[place[-1]] = new


def drop(value: Any, place: Place) -> None:
    for part in place[:-1]:
        value = value[part]
    del value[place[-1]]


def bent(text: bytes, places: list[Place], generator: random.Random) -> Any:
    """The JSON value with something strange in one of the places, or nothing there, or what stands in another one."""
    value, place = json.loads(text), generator.choice(places)
    how = generator.random()
    if how < 0.2:
        drop(value, place)
    elif how < 0.3:
        other: Any = value
        for part in generator.choice(places):
            other = other[part]
        put(value, place, json.loads(json.dumps(other)))
    else:
        put(value, place, generator.choice(STRANGE))
    return value


# ---- reading -----------------------------------------------------------------------------------------------


def taken(read: Callable[[], object], *refusals: type[Exception]) -> bool:
    """Whether it is read; a refusal says why."""
    try:
        read()
    except refusals as error:
        assert str(error), error
        return False
    return True


def seal(folder: Path, value: Any) -> None:
    """Write a manifest as a stranger can: its digest fits."""
    value["digest"] = sealed.digest(value)
    (folder / MANIFEST).write_bytes(sealed.spelled(value))


def manifests(made: Made, folder: Path) -> Attempt:
    """Manifests of several kinds, edited, and edited and sealed again."""
    kinds = [made.student, made.graph, made.bundles["onnxruntime-int8"], made.models["openvino-int8"]]
    texts = [(artifact.path / MANIFEST).read_bytes() for artifact in kinds]
    places = [list(everywhere(json.loads(text))) for text in texts]

    def attempt(generator: random.Random) -> bool:
        which = generator.randrange(len(kinds))
        if generator.random() < 0.5:
            text = mangled(texts[which], generator)
            (folder / MANIFEST).write_bytes(text)
            was_taken = taken(lambda: read_manifest(folder), UserError)
            assert not was_taken or text == texts[which], "an edited manifest was believed"
            return was_taken
        seal(folder, bent(texts[which], places[which], generator))
        return taken(lambda: check_provenance(folder, read_manifest(folder)), UserError)

    return attempt


def bundles(made: Made, folder: Path) -> Attempt:
    """A file of a bundle changed, as it is and with its hash: what the host reads of it, and what a device does."""
    source = made.bundles["onnxruntime-int8"].path
    copy = Path(shutil.copytree(source, folder / "bundle"))
    manifest = (copy / MANIFEST).read_bytes()
    names = [name for name, _ in sealed.list_files(copy)]

    def here() -> None:
        opened = Bundle.open(copy)
        assert opened.facts and opened.labels

    def on_a_device() -> None:
        read_golden(copy, read_facts(copy))

    def attempt(generator: random.Random) -> bool:
        name = generator.choice(names)
        whole = (source / name).read_bytes()
        content = mangled(whole, generator)
        (copy / name).write_bytes(content)
        again = name != MANIFEST and generator.random() < 0.5
        if again:
            replace_file(copy, name, content)
        if generator.random() < 0.5:
            was_taken = taken(here, UserError)
        else:
            was_taken = taken(on_a_device, BundleError, ModelFileError)
        assert again or not was_taken or content == whole, f"a changed {name} was believed"
        (copy / name).write_bytes(whole)
        (copy / MANIFEST).write_bytes(manifest)
        return was_taken

    return attempt


def caches(made: Made, folder: Path) -> Attempt:
    """Shards and image numbers of a cache, as they are and with their hashes; facts that do not fit them."""
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.1, "views": 2, "workers": 0}
    plan = validated(CachePlan, {**values, "augment": {"crop": "pad", "flip": 0}, "top": 3}, "a cache to be fuzzed")
    source = made.chain.cache(config_of(plan), made.dataset, made.teacher).path
    copy = Path(shutil.copytree(source, folder / "cache"))
    manifest = (copy / MANIFEST).read_bytes()
    places = [("facts", name) for name in json.loads(manifest)["facts"]] + [("config", "views"), ("config", "top")]
    names = [name for name, _ in sealed.list_files(copy) if name != MANIFEST]
    numbers = torch.from_numpy(np.load(source / Cache.IMAGES)[:4].astype(np.int64))
    address = torch.tensor([0, 1, 0, 1]), numbers

    def attempt(generator: random.Random) -> bool:
        name, again, whole, content = names[0], True, b"", b""
        if generator.random() < 0.3:
            seal(copy, bent(manifest, places, generator))
        else:
            name = generator.choice(names)
            whole = (source / name).read_bytes()
            content = mangled(whole, generator)
            if len(content) != len(whole) and generator.random() < 0.8:  # of the right size, it is looked into
                content = (content + whole)[: len(whole)]
            (copy / name).write_bytes(content)
            again = generator.random() < 0.8
            if again:
                replace_file(copy, name, content)
        was_taken = taken(lambda: CachedTeacher(Cache.open(copy))(torch.empty(0), address), UserError)
        assert again or not was_taken or content == whole, f"a changed {name} was believed"
        if whole:
            (copy / name).write_bytes(whole)
        (copy / MANIFEST).write_bytes(manifest)
        return was_taken

    return attempt


def fetched_caches(made: Made, folder: Path) -> Attempt:
    """The same through fsspec: from a store whose files somebody changes, into a mirror."""
    caches(made, folder)
    source, url = folder / "cache", "memory://fuzzed-cache"
    files = {name: (source / name).read_bytes() for name, _ in sealed.list_files(source)}
    there = fsspec.filesystem("memory")
    for name, content in files.items():
        there.pipe(f"/fuzzed-cache/{name}", content)

    def read() -> None:
        cache = open_cache(url, folder / "mirrors")
        for name in cache.manifest.files:
            cache.file(name)

    def attempt(generator: random.Random) -> bool:
        name = generator.choice(list(files))
        content = mangled(files[name], generator)
        there.pipe(f"/fuzzed-cache/{name}", content)
        was_taken = taken(read, UserError)
        assert not was_taken or content == files[name], f"a changed {name} was believed"
        there.pipe(f"/fuzzed-cache/{name}", files[name])
        shutil.rmtree(folder / "mirrors", ignore_errors=True)
        return was_taken

    return attempt


def fetched_bundles(made: Made, folder: Path) -> Attempt:
    """A whole folder through fsspec, into one that has its name when all of it is right."""
    source, there = made.bundles["onnxruntime-int8"].path, fsspec.filesystem("memory")
    files = {name: (source / name).read_bytes() for name, _ in sealed.list_files(source)}
    for name, content in files.items():
        there.pipe(f"/fuzzed-bundle/{name}", content)
    names, out, whole = list(files), folder / "fetched", store.digest(source)

    def attempt(generator: random.Random) -> bool:
        name = generator.choice(names) if generator.random() < 0.5 else MANIFEST
        content = mangled(files[name], generator)
        there.pipe(f"/fuzzed-bundle/{name}", content)
        was_taken = taken(lambda: fetch_folder("memory://fuzzed-bundle", out), UserError)
        assert was_taken == out.exists(), "what was refused has no name"
        # What came whole before is not asked for again.
        assert not was_taken or store.digest(out) == whole, f"a changed {name} was believed"
        there.pipe(f"/fuzzed-bundle/{name}", files[name])
        for left in (out, out.with_name("fetched.part")):
            if left == out or generator.random() < 0.8:
                shutil.rmtree(left, ignore_errors=True)
        return was_taken

    return attempt


def verdicts(made: Made, folder: Path) -> Attempt:
    """What a gate found of a candidate, bent."""
    said: dict[str, Any] = {"answer": "pass", "candidate": "digits", "baseline": None, "rules": []}
    said |= {"changed": {}, "since": {}, "apart": ["a"]}
    text = json.dumps(said).encode()
    places = list(everywhere(said))

    def attempt(generator: random.Random) -> bool:
        if generator.random() < 0.3:
            value = bent(text, places, generator)
            return taken(lambda: VerdictFacts.model_validate(value), ValueError)
        rule = mangled(generator.choice(RULES).encode(), generator).decode(errors="surrogateescape")
        return taken(lambda: parse_rules([rule]), UserError)

    return attempt


RULES = (
    "accuracy >= baseline - 0.5pp", "latency p50 <= 1.02 x baseline on pi5", "size <= 4MB for int8",
    "accuracy of dark >= baseline - 2pp", "memory <= 1.1 x baseline + 3MB",
)  # fmt: skip


def measurements(made: Made, folder: Path) -> Attempt:
    """What a session found, bent as its facts and mangled as its files."""
    found = Measurement.open(shutil.copytree(made.measurement.path, folder / "measurement"))
    facts = json.dumps(found.manifest.facts).encode()
    places, bundle = list(everywhere(json.loads(facts))), "onnxruntime-int8"
    readers: dict[str, Callable[[], object]] = {
        Measurement.LABELS: lambda: found.labels,
        Measurement.outputs_name(bundle): lambda: found.outputs(bundle),
        Measurement.samples_name(bundle): lambda: found.rows(Measurement.samples_name(bundle), Samples),
        Measurement.starts_name(bundle): lambda: found.rows(Measurement.starts_name(bundle), FreshStart),
    }
    whole = {name: found.file(name).read_bytes() for name in readers}

    def attempt(generator: random.Random) -> bool:
        if generator.random() < 0.3:
            value = bent(facts, places, generator)
            return taken(lambda: MeasurementFacts.model_validate(value).untrusted, ValueError)
        name = generator.choice(list(readers))
        found.file(name).write_bytes(mangled(whole[name], generator))
        was_taken = taken(readers[name], UserError)
        found.file(name).write_bytes(whole[name])
        return was_taken

    return attempt


def reports(made: Made, folder: Path) -> Attempt:
    """The numbers of a page, and every list of a network's training."""
    report = Report.open(shutil.copytree(made.report.path, folder / "report"))
    student = type(made.student).open(shutil.copytree(made.student.path, folder / "student"))
    readers: list[tuple[Path, Callable[[], object]]] = [
        (report.file(Report.NUMBERS), lambda: report.numbers),
        (student.file(student.HISTORY), lambda: student.history),
        (student.file(student.LABELS), lambda: student.labels),
        (student.file(student.TEST_OUTPUTS), lambda: student.tested),
    ]
    whole = {path: path.read_bytes() for path, _ in readers}

    def attempt(generator: random.Random) -> bool:
        path, read = generator.choice(readers)
        path.write_bytes(mangled(whole[path], generator))
        was_taken = taken(read, UserError)
        path.write_bytes(whole[path])
        return was_taken

    return attempt


def journals(made: Made, folder: Path) -> Attempt:
    """What a session left to go on from: a process is taken as it was written, or measured again."""
    [samples] = made.measurement.rows(Measurement.samples_name("onnxruntime-int8"), Samples)[:1]
    journal, timed = Journal(folder), ["a", "b"]
    journal.begin(timed, 1e9)
    for at, name in ((0, "a"), (0, "b"), (1, "b")):
        journal.add(at, name, samples, None)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    runs = dict(journal.runs)

    def attempt(generator: random.Random) -> bool:
        path = generator.choice(list(whole))
        path.write_bytes(mangled(whole[path], generator))
        again = Journal(folder)
        again.begin(timed, 1e9)
        assert all(again.runs[place] == runs[place] for place in again.runs), "a changed process was believed"
        for path, content in whole.items():
            path.write_bytes(content)
        return bool(again.runs)

    return attempt


RECIPE = """name: a
data: {source: digits, test_split: null}
teacher: {model: resnet18, input: {size: 32}}
student: {model: resnet10t}
distill: {seeds: [0, 1], temperature: 4}
"""
DEVICES_FILE = """pi5: {kind: ssh, address: pi@pi5, threads: 4}
phone:
  kind: adb
"""


def yaml_files(made: Made, folder: Path) -> Attempt:
    """Recipes and descriptions of devices: bytes changed, and words that mean something in YAML put in."""
    recipe, devices = folder / "recipe.yaml", folder / "devices.yaml"
    readers: list[tuple[Path, str, Callable[[], object]]] = [
        (recipe, RECIPE, lambda: read_recipe(recipe)),
        (devices, DEVICES_FILE, lambda: book.read(devices, DEVICES)),
    ]

    def attempt(generator: random.Random) -> bool:
        path, text, read = generator.choice(readers)
        if generator.random() < 0.5:
            content = mangled(text.encode(), generator)
        else:
            for _ in range(generator.randint(1, 3)):
                at = generator.randrange(len(text) + 1)
                text = text[:at] + generator.choice(YAML_WORDS) + text[at + generator.choice((0, 1, 5)) :]
            content = text.encode()
        path.write_bytes(content)
        return taken(read, UserError)

    return attempt


def arrays(made: Made, folder: Path) -> Attempt:
    """Golden inputs, outputs of the test images, and index: their headers first of all."""
    golden, labels = made.bundles["onnxruntime-int8"].file("golden.npz"), made.measurement.file(Measurement.LABELS)
    wanted = {"images": ("u", 4), "logits": ("f", 2)}
    readers: list[tuple[bytes, Callable[[Path], object]]] = [
        (golden.read_bytes(), lambda path: sealed.load_arrays(path, wanted)),
        (labels.read_bytes(), lambda path: sealed.load_array(path, "iu", 1)),
    ]

    def attempt(generator: random.Random) -> bool:
        whole, read = generator.choice(readers)
        path = folder / "array"
        path.write_bytes(mangled(whole, generator))
        return taken(lambda: read(path), sealed.Unsound)

    return attempt


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def checkpoints(made: Made, folder: Path) -> Attempt:
    """safetensors, and what ``torch.save`` writes and wrote: read without unpickling, taken only by its own network."""
    state, texts = network().state_dict(), []
    save_file(state, folder / "whole.safetensors")
    texts.append((folder / "whole.safetensors").read_bytes())
    for as_zip in (True, False):
        stream = io.BytesIO()
        torch.save({"state_dict": state, "epoch": 3}, stream, _use_new_zipfile_serialization=as_zip)
        texts.append(stream.getvalue())
    mine = network()

    def attempt(generator: random.Random) -> bool:
        path = folder / "changed"
        path.write_bytes(mangled(generator.choice(texts), generator))
        read = read_state_dicts if generator.random() < 0.5 else lambda path: load_weights(mine, path)
        return taken(lambda: read(path), UserError)

    return attempt


def model_files(made: Made, folder: Path) -> Attempt:
    """Files of all runtimes, walked before a runtime sees them."""
    entries = [made.models[name].entry for name in ("onnxruntime-int8", "openvino-float32", "tflite-int8")]
    whole = {entry: entry.read_bytes()[:100_000] for entry in entries}

    def attempt(generator: random.Random) -> bool:
        entry = generator.choice(entries)
        path = folder / f"model{entry.suffix}"
        path.write_bytes(mangled(whole[entry], generator))
        return taken(lambda: refuse_files_elsewhere(path), ModelFileError)

    return attempt


def stores(made: Made, folder: Path) -> Attempt:
    """What lies on a device: contents, names, history and the link to what is live, changed by somebody there."""
    root, outside = folder / "device", folder / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    names = []
    for at in range(3):
        (root / "store" / "new.part").mkdir(parents=True)
        (root / "store" / "new.part" / "file").write_text(f"contents {at}")
        names.append(store.digest(root / "store" / "new.part"))
        (root / "store" / "new.part").rename(root / "store" / names[-1])
    versions = [{"digest": name, "deployed_utc": "2026-01-01T00:00:00Z", "passed_over": False} for name in names]
    history = json.dumps({"versions": versions}).encode()
    places = list(everywhere(json.loads(history)))
    links = [f"store/{names[0]}", "store/x", "../outside", "/etc", "store/../../outside", f"store/{'0' * 64}", "\x1b"]
    refusals = store.StoreError, BundleError

    def attempt(generator: random.Random) -> bool:
        entry = root / "store" / generator.choice(names)
        strays = [root / "store" / name for name in (f"{'0' * 64}.part", "stray", "\x1b[2J", f"{names[0]}.gone")]
        bend = generator.random() < 0.5
        text = json.dumps(bent(history, places, generator)).encode() if bend else mangled(history, generator)
        (root / store.HISTORY).write_bytes(text)
        (root / store.LIVE).unlink(missing_ok=True)
        (root / store.LIVE).symlink_to(generator.choice(links))
        how, whole = generator.randrange(4), (entry / "file").read_bytes()
        if how == 0:
            (entry / "file").write_bytes(mangled(whole, generator))
        elif how == 1:
            generator.choice(strays).symlink_to(outside)
        elif how == 2:
            (entry / "more").symlink_to(outside)
        had: list[str] = []
        was_taken = taken(lambda: had.extend(store.have(root, names)["have"]), *refusals)
        fits = (entry / "file").read_bytes() == whole and how != 2
        assert (entry.name in had) == fits or not was_taken, "changed contents were had"
        was_taken = taken(lambda: store.status(root), *refusals) and was_taken
        if generator.random() < 0.1:
            taken(lambda: store.rollback(root), *refusals)
        for stray in (*strays, entry / "more"):
            stray.unlink(missing_ok=True)
        (entry / "file").write_bytes(whole)
        assert (outside / "kept").read_text() == "kept", "somebody reached out of the store"
        return was_taken

    return attempt


def answers(made: Made, folder: Path) -> Attempt:
    """What a device prints: one JSON object in its last line."""
    [samples] = made.measurement.rows(Measurement.samples_name("onnxruntime-int8"), Samples)[:1]
    sight = {"monotonic_ns": 1, "busy_ns": 1, "idle_ns": 1, "steal_ns": "unavailable"}
    told: list[tuple[type[Record], Any]] = [
        (Samples, samples.model_dump(mode="json")),
        (Probe, made.measurement.facts.probe_before.model_dump(mode="json")),
        (Sights, {"sights": [sight], "own_cpu_ns": 1, "cpus": 2}),
        (Prediction, {"images": 1, "open_seconds": 1, "predict_seconds": 1, "session": samples.session.model_dump()}),
    ]
    lines = [(kind, json.dumps({"protocol_version": PROTOCOL_VERSION, **value}).encode()) for kind, value in told]
    places = [list(everywhere(json.loads(line))) for _, line in lines]

    def attempt(generator: random.Random) -> bool:
        which = generator.randrange(len(lines))
        kind, line = lines[which]
        bend = generator.random() < 0.5
        said = json.dumps(bent(line, places[which], generator)).encode() if bend else mangled(line, generator)
        return taken(lambda: read_answer(kind, said), ValueError)

    return attempt


READERS: dict[str, Callable[[Made, Path], Attempt]] = {
    "manifests": manifests,
    "bundles": bundles,
    "caches": caches,
    "fetched caches": fetched_caches,
    "fetched bundles": fetched_bundles,
    "verdicts": verdicts,
    "measurements": measurements,
    "reports": reports,
    "journals": journals,
    "YAML": yaml_files,
    "arrays": arrays,
    "checkpoints": checkpoints,
    "model files": model_files,
    "stores": stores,
    "answers": answers,
}


def exercise(attempt: Attempt, count: int) -> Counter[str]:
    """Try so many inputs, and count what became of them. What is found is an AssertionError with the input's number."""
    generator, told = random.Random(0), Counter[str]()
    for turn in range(count):
        try:
            told["taken" if attempt(generator) else "refused"] += 1
        except Exception as error:
            raise AssertionError(f"input {turn}: {type(error).__name__}: {error}") from error
    return told
