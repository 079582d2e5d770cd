"""A teacher's stored answers: for the very views that the student sees, whole, and refused for any others."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    SMALL_TRAIN,
    Trained,
    assert_one_line,
    build_cache,
    flip_a_byte,
    kdpipe,
    kdpipe_process,
    replace_file,
    rewrite_manifest,
    train,
    train_together,
)
from safetensors.numpy import load_file

from kdpipe.chain import Chain
from kdpipe.core.config import CachePlan, DataPlan, TeacherPlan, TrainConfig, validated
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Cache, Checkpoint
from kdpipe.data.dataset import Dataset
from kdpipe.distill.cache import (
    CachedTeacher,
    config_of,
    decode,
    encode,
    forecast,
    open_cache,
    record_type,
    verify,
)
from kdpipe.distill.methods import METHODS, FeatureMethod
from kdpipe.distill.teacher import Teacher
from kdpipe.distill.train import cache_config

AUGMENT = {"crop": "pad", "flip": 0, "auto_augment": "rand-m5-mstd0.5"}
FROM_LOGITS = [name for name in METHODS if METHODS[name].needs_teacher and not issubclass(METHODS[name], FeatureMethod)]


@pytest.fixture(scope="module")
def taught(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Dataset, Checkpoint]:
    return Chain(tmp_path_factory.mktemp("cache") / "artifacts"), trained.dataset, trained.teacher


def configuration(**change: Any) -> TrainConfig:
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.1, "cache_views": 2, **change}
    values["train"] = {**SMALL_TRAIN, "epochs": 3, "augment": AUGMENT, **change.get("train", {})}
    return validated(TrainConfig, values, "test")


def plan(**change: Any) -> CachePlan:
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.1, "views": 2, "augment": AUGMENT}
    return validated(CachePlan, {**values, "workers": 0, **change}, "test")


@pytest.fixture(scope="module")
def cache(taught: tuple[Chain, Dataset, Checkpoint]) -> Cache:
    chain, dataset, teacher = taught
    return chain.cache(config_of(plan()), dataset, teacher)


def test_a_run_builds_its_cache_and_finds_it_again(taught: tuple[Chain, Dataset, Checkpoint], cache: Cache) -> None:
    chain, dataset, teacher = taught
    wanted = cache_config(configuration())
    assert wanted is not None and chain.cache(wanted, dataset, teacher).key == cache.key
    done = chain.train("student", configuration(), dataset, teacher)
    assert done.facts.cache == cache.key
    assert [step.name for step in chain.steps if not step.sealed_before][-1:] == ["student"]


ONE_EPOCH = {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.01, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def start(taught: tuple[Chain, Dataset, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The weights before a run of one epoch: nothing was to be learned."""
    config = configuration(method="labels", label_weight=0, train=ONE_EPOCH)
    return train(config, taught[1], None, tmp_path_factory.mktemp("start") / "start")


@pytest.mark.parametrize("method", FROM_LOGITS)
def test_from_the_cache_as_from_a_live_teacher(
    taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, start: Checkpoint, tmp_path: Path, method: str
) -> None:
    """The same views and order: after an epoch the weights differ by what float16 rounds off the logits.

    Up to about one percent of the way the weights moved, by the machine's arithmetic: most by dist, whose correlations
    weigh rare classes like others, and by the heads of deep supervision.
    """
    _, dataset, teacher = taught
    config = configuration(method=method, kd_weight=1.0, train=ONE_EPOCH)
    live = train(config, dataset, teacher, tmp_path / "live")
    cached = train(config, dataset, teacher, tmp_path / "cached", cache)
    moved = difference = 0.0
    weights = [load_file(each.file("model.safetensors")) for each in (start, live, cached)]
    for name in weights[0]:
        if "running" not in name and "num_batches" not in name:
            moved += float(((weights[1][name] - weights[0][name]) ** 2).sum())
            difference += float(((weights[2][name] - weights[1][name]) ** 2).sum())
    assert moved > 0 and difference**0.5 < 2e-2 * moved**0.5


def test_epochs_take_the_views_in_turn(
    taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dataset, teacher = taught
    seen: list[set[int]] = []
    look_up = CachedTeacher.forward
    monkeypatch.setattr(
        CachedTeacher,
        "forward",
        lambda self, view, address: seen.append(set(address[0].tolist())) or look_up(self, view, address),
    )
    monkeypatch.setattr(Teacher, "forward", lambda *_: pytest.fail("the teacher was asked"))
    configs = {tmp_path / name: configuration(method=name) for name in ("labels", "kd", "dkd", "dist")}
    train_together(configs, dataset, teacher, cache)
    assert seen[:: len(seen) // 3] == [{0}, {1}, {0}]


def test_repeated_views_come_from_several_shards(
    taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, tmp_path: Path
) -> None:
    _, dataset, teacher = taught
    train(configuration(train={"repeats": 2}), dataset, teacher, tmp_path / "student", cache)


def test_mixed_views_are_cached_too(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    _, dataset, teacher = taught
    mixed = build_cache(config_of(plan(mixup=0.2, cutmix=1.0)), dataset, teacher, tmp_path / "mixed")
    found = verify(mixed, dataset, teacher, 1.0)
    assert found["checked"] == found["of"] and found["agreement"] == 1
    train(configuration(train={"mixup": 0.2, "cutmix": 1.0}), dataset, teacher, tmp_path / "student", mixed)
    fewer = configuration(label_fraction=0.05, train={"mixup": 0.2, "cutmix": 1.0})
    with pytest.raises(UserError, match="partners"):
        train(fewer, dataset, teacher, tmp_path / "fewer", mixed)


def test_a_cache_of_more_images_serves_fewer(
    taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, tmp_path: Path
) -> None:
    _, dataset, teacher = taught
    train(configuration(label_fraction=0.05), dataset, teacher, tmp_path / "fewer", cache)
    with pytest.raises(UserError, match="another share of the images"):
        train(configuration(label_fraction=0.2), dataset, teacher, tmp_path / "more", cache)


# ---- the store -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, 10])
def test_records_hold_what_was_said(top: int | None) -> None:
    logits = 5 * torch.randn(32, 300, generator=torch.Generator().manual_seed(0))
    kind = record_type(300, top)
    records = encode(logits, kind)
    assert records.dtype.itemsize == (600 if top is None else 10 * 6 + 8)
    found = decode(records, 300)
    expected = logits.log_softmax(1)
    if top is None:
        torch.testing.assert_close(found.log_softmax(1), expected, atol=2e-2, rtol=1e-3)
        return
    values, classes = expected.topk(top, 1)
    torch.testing.assert_close(found.gather(1, classes), values, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(32), atol=5e-3, rtol=0)  # the recovered ones sum to 1
    assert torch.equal(found.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_records_of_any_scale(scale: float) -> None:
    logits = scale * torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    for top in (None, 5):
        found = decode(encode(logits, record_type(20, top)), 20)
        assert torch.isfinite(found).all() and torch.equal(found.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("count", [1_000, 5_000_000])
def test_memory_does_not_grow_with_the_records(cache: Cache, tmp_path: Path, count: int) -> None:
    kind = record_type(10, None)
    np.save(tmp_path / "images.npy", np.arange(count))
    with (tmp_path / Cache.shard_name(0)).open("wb") as stream:
        stream.truncate(count * kind.itemsize)
    facts = {**cache.manifest.facts, "images": count}
    large = Cache(tmp_path, cache.manifest.model_copy(update={"facts": facts}))
    before = own_memory_kib()
    teacher, generator = CachedTeacher(large), torch.Generator().manual_seed(0)
    for _ in range(50):
        images = torch.randint(0, count, (256,), generator=generator)
        assert teacher(images, (torch.zeros(256, dtype=torch.long), images)).logits.shape == (256, 10)
    assert own_memory_kib() - before < 16_384  # where all records are 95 MiB


def own_memory_kib() -> int:
    """What this process holds itself: pages of a mapped file are the system's, which may take them back."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def test_verify_sees_a_wrong_answer(taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, tmp_path: Path) -> None:
    _, dataset, teacher = taught
    assert verify(cache, dataset, teacher, 0.2)["largest_relative_difference"] < 4e-3
    wrong = shutil.copytree(cache.path, tmp_path / "wrong")
    shard = np.memmap(wrong / Cache.shard_name(1), record_type(10, None), "r+")
    shard["logits"] = shard["logits"][:, ::-1]
    shard.flush()
    with pytest.raises(GateFailed, match="is not what its teacher says"):
        verify(Cache(wrong, cache.manifest), dataset, teacher, 0.5)


def test_what_does_not_fit_is_named(
    taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, photos: Path, tmp_path: Path
) -> None:
    chain, dataset, teacher = taught
    values = {"model": "test_resnet", "input": {"size": 32}, "seed": 1, "train": {**SMALL_TRAIN, "epochs": 1}}
    other = chain.teacher(validated(TeacherPlan, values, "test"), dataset)
    for config, guide, message in [
        (configuration(), other, "made for another teacher: build"),
        (configuration(view_seed=3), teacher, r"another view_seed \(0, not 3\)"),
        (configuration(cache_views=3), teacher, r"another views \(2, not 3\)"),
        (configuration(input={"size": 40}), teacher, "another input"),
        (configuration(train={"augment": {"crop": "none"}}), teacher, "another augment"),
        (configuration(train={"mixup": 0.1}), teacher, "another mixup"),
        (configuration(method="hint"), teacher, "method 'hint' looks at the teacher's feature maps"),
    ]:
        with pytest.raises(UserError, match=message):
            train(config, dataset, guide, tmp_path / "student", cache)
    settings = {**cache.manifest.config, "versions": {**cache.manifest.config["versions"], "timm": "0.9.0"}}
    old = Cache(cache.path, cache.manifest.model_copy(update={"config": settings}))
    with pytest.raises(UserError, match=r"another timm \(0.9.0, not "):
        train(configuration(), dataset, teacher, tmp_path / "student", old)
    assert not list(tmp_path.glob("student*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "extra"])
def test_a_damaged_cache_is_refused(cache: Cache, tmp_path: Path, damage: str) -> None:
    broken = shutil.copytree(cache.path, tmp_path / "broken")
    shard = broken / Cache.shard_name(1)
    if damage == "flip":
        flip_a_byte(shard)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif damage == "missing":
        shard.unlink()
    else:
        (broken / Cache.shard_name(7)).write_bytes(b"x")
    with pytest.raises(UserError, match=r"view-0000[17]\.bin"):
        Cache.open(broken)


def numbers(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    def alter(folder: Path) -> None:
        stream = io.BytesIO()
        np.save(stream, change(np.load(folder / Cache.IMAGES)))
        replace_file(folder, Cache.IMAGES, stream.getvalue())

    return alter


def said(**change: Any) -> Callable[[Path], object]:
    return lambda folder: rewrite_manifest(folder, lambda value: value["facts"].update(change))


@pytest.mark.parametrize(
    "alter",
    [
        said(views=3),
        said(views=0),
        said(views=10**9),
        said(classes=11),
        said(classes=10**12),
        said(images=7),
        said(top=3),
        said(record_bytes=1),
        said(views="two"),
        numbers(lambda images: images[::-1]),
        numbers(lambda images: images[1:]),
        numbers(lambda images: images - images[0] - 1),
        numbers(lambda images: images + 10**6),
        numbers(lambda images: images.astype(np.float32)),
        numbers(lambda images: images.astype(str)),
        numbers(lambda images: images[:, None]),
        numbers(lambda images: images[:0]),
        numbers(lambda images: images[0]),
        lambda folder: replace_file(folder, Cache.IMAGES, b"\x93NUMPY"),
        lambda folder: replace_file(folder, Cache.shard_name(1), b"x"),
        lambda folder: rewrite_manifest(folder, lambda value: value["config"].update(views="two")),
        lambda folder: rewrite_manifest(folder, lambda value: value["config"].pop("versions")),
        lambda folder: rewrite_manifest(folder, lambda value: value["inputs"].pop("teacher")),
        lambda folder: rewrite_manifest(folder, lambda value: value.update(stage="magic")),
    ],
)
def test_caches_of_strangers(
    taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, tmp_path: Path, alter: Callable[[Path], object]
) -> None:
    """They can recompute every hash: it is one line whatever they write, for training and for verifying."""
    _, dataset, teacher = taught
    copy = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    alter(copy)
    with pytest.raises(UserError) as caught:
        train(configuration(), dataset, teacher, tmp_path / "student", Cache.open(copy))  # its epochs see every view
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        verify(Cache.open(copy), dataset, teacher, 0.5)


def test_changed_images_are_another_data_set(photos: Path, tmp_path: Path) -> None:
    chain = Chain(tmp_path / "artifacts")
    values = {"model": "test_resnet", "input": {"size": 32}, "train": {**SMALL_TRAIN, "epochs": 1}}
    before = chain.data(DataPlan(source=str(photos)))
    teacher = chain.teacher(validated(TeacherPlan, values, "test"), before)
    made = chain.cache(config_of(plan(label_fraction=1.0)), before, teacher)
    (photos / "train" / "dark" / "00.jpg").write_bytes((photos / "train" / "light" / "00.jpg").read_bytes())
    after = chain.data(DataPlan(source=str(photos)))
    with pytest.raises(UserError, match="made for another data"):
        train(configuration(label_fraction=1.0), after, teacher, tmp_path / "student", made)


# ---- building --------------------------------------------------------------------------------------------

BUILD = """
import sys
from pathlib import Path
from kdpipe.chain import cache_order
from kdpipe.core.kinds import Checkpoint
from kdpipe.core.config import CacheConfig
from kdpipe.data.dataset import Dataset
from kdpipe.distill import cache
ask = cache._Job.ask
def told(self, image):
    print("asked", flush=True)
    return ask(self, image)
cache._Job.ask = told
config = CacheConfig.model_validate_json(sys.argv[1]).model_copy(update={"workers": 0})
dataset, teacher = Dataset.open(sys.argv[2]), Checkpoint.open(sys.argv[3])
cache.build(cache_order(config, dataset, teacher), dataset, teacher, Path(sys.argv[4]))
"""


def builder_command(taught: tuple[Chain, Dataset, Checkpoint], out: Path, views: int) -> list[str]:
    _, dataset, teacher = taught
    config = config_of(plan(views=views)).model_dump_json()
    return [sys.executable, "-c", BUILD, config, str(dataset.path), str(teacher.path), str(out)]


def builder(taught: tuple[Chain, Dataset, Checkpoint], out: Path, views: int) -> subprocess.Popen[str]:
    command = builder_command(taught, out, views)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_goes_on(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    """What is whole is kept, what is not is asked again; the files are those of an undisturbed build."""
    _, dataset, teacher = taught
    views = 12
    whole = build_cache(config_of(plan(views=views)), dataset, teacher, tmp_path / "whole")
    out, batches = tmp_path / "killed", -(-whole.facts.images // 64)
    killed = builder(taught, out, views)
    assert killed.stdout is not None
    for _ in range(2 * batches + 1):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = sorted(path.name for path in (tmp_path / "killed.part" / "resume").glob("view-*.bin"))
    assert left[:2] == [Cache.shard_name(0), Cache.shard_name(1)] and len(left) < views
    again = builder(taught, out, views)
    told, error = again.communicate(timeout=1800)
    assert again.returncode == 0, error
    assert told.count("asked") == (views - len(left)) * batches
    made = Cache.open(out)
    assert made.manifest.files == whole.manifest.files


def test_two_builders_at_once(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    _, dataset, teacher = taught
    first = builder(taught, tmp_path / "cache", 200)
    assert first.stdout is not None
    first.stdout.readline()
    with pytest.raises(UserError, match="another process is writing"):
        build_cache(config_of(plan(views=200)), dataset, teacher, tmp_path / "cache")
    first.kill()
    first.wait()


@pytest.mark.lab  # for its seconds
def test_across_processes(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    """Two processes of torchrun make the cache that one makes."""
    _, dataset, teacher = taught
    alone = build_cache(config_of(plan(views=5)), dataset, teacher, tmp_path / "alone")
    options = ["--model", "test_resnet", "--input.size", 32, "--label-fraction", 0.1, "--views", 5, "--workers", 0]
    options += ["--augment.crop", "pad", "--augment.flip", 0, "--augment.auto-augment", AUGMENT["auto_augment"]]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "kdpipe"]
    command += ["cache", teacher.path, "--data", dataset.path, "--out", tmp_path / "two", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    made = Cache.open(tmp_path / "two")
    assert made.key == alone.key and made.manifest.files == alone.manifest.files


def on_a_disk_of(size: str, script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with a real file system of this size at ./disk, which nobody else sees."""
    (cwd / "disk").mkdir(exist_ok=True)
    inside = f"mount -t tmpfs -o size={size} none disk && {script}"
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", inside],
        cwd=cwd, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip


def test_a_disk_that_will_not_hold_it(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    """Said before the teacher is asked."""
    done = on_a_disk_of("64k", f"{shlex.join(builder_command(taught, Path('disk/cache'), 100))}; ls disk", tmp_path)
    assert "the cache needs" in done.stderr and "left: lower cache_views" in done.stderr
    assert not done.stdout


def test_a_disk_that_fills_while_building(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    """The room is there when it is looked for, and gone when it is wanted."""
    build_there = shlex.join(builder_command(taught, Path("disk/cache"), 40))
    fill = "while ! grep -q asked log; do sleep 0.05; done; dd if=/dev/zero of=disk/else bs=1k 2>/dev/null"
    done = on_a_disk_of("512k", f"{build_there} >log & {fill}; wait %1; echo $?; test ! -e disk/cache", tmp_path)
    assert done.returncode == 0 and done.stdout.strip() != "0"
    assert "no disk space left" in done.stderr.strip().splitlines()[-1]


# ---- at a URL --------------------------------------------------------------------------------------------


def test_at_a_url(taught: tuple[Chain, Dataset, Checkpoint], cache: Cache, tmp_path: Path) -> None:
    """Files come when they are wanted, once, and are checked."""
    import fsspec

    _, dataset, teacher = taught
    memory = fsspec.filesystem("memory")
    memory.put(str(cache.path), "/bucket/cache", recursive=True)
    remote = open_cache("memory://bucket/cache", tmp_path / "mirrors")
    assert not list(remote.path.glob("view-*"))
    config = configuration(train={"epochs": 1})
    near = train(config, dataset, teacher, tmp_path / "near", cache)
    far = train(config, dataset, teacher, tmp_path / "far", remote)
    assert near.file("model.safetensors").read_bytes() == far.file("model.safetensors").read_bytes()
    assert [path.name for path in remote.path.glob("view-*")] == [Cache.shard_name(0)], "the second view was not wanted"
    memory.pipe(f"/bucket/cache/{Cache.shard_name(1)}", b"nonsense")
    with pytest.raises(UserError, match="differs from its manifest"):
        remote.shard(1)
    with pytest.raises(UserError, match=r"nothing at memory://bucket/nothing/manifest\.json"):
        open_cache("memory://bucket/nothing", tmp_path / "mirrors")


# ---- the command -----------------------------------------------------------------------------------------


def test_command(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    _, dataset, teacher = taught
    options = ["--data", dataset.path, "--model", "test_resnet", "--input.size", 32, "--label-fraction", 0.1]
    options += ["--views", 2, "--workers", 0, "--augment.crop", "pad", "--out", tmp_path / "cache"]
    dry = kdpipe("cache", teacher.path, *options, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    told = json.loads(dry.stdout)["forecast"]
    assert not (tmp_path / "cache").exists()
    assert told["bytes"] == told["images"] * 2 * 20 and told["break_even_epochs"] >= 2
    begun = time.monotonic()
    done = kdpipe("cache", teacher.path, *options, "--verify", "10%")
    again = kdpipe("cache", teacher.path, *options, "--dry-run", "--json")
    assert json.loads(again.stdout)["forecast"]["bytes"] == told["bytes"], "of one that is there too"
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun > told["build_seconds"] / 50
    assert "records asked again" in done.stderr
    assert "2 views of" in done.stderr and "pays from" in done.stderr
    common = ["--data", dataset.path, "--model", "test_resnet", "--input.size", 32, "--label-fraction", 0.05]
    train_options = ["--train.epochs", 2, "--train.workers", 0, "--train.augment.crop", "pad"]
    student = kdpipe(
        "distill", teacher.path, *common, *train_options, "--cache", tmp_path / "cache", "--out", tmp_path / "student"
    )
    assert student.returncode == 0, student.stderr
    assert Checkpoint.open(tmp_path / "student").facts.cache == Cache.open(tmp_path / "cache").key
    assert_one_line(kdpipe("cache", teacher.path, *options, "--verify", "a bit"), 2, "wanted a share such as 0.1%")
    elsewhere = kdpipe("distill", teacher.path, *common, *train_options, "--cache", tmp_path / "nowhere")
    assert_one_line(elsewhere, 2, "no artifact at")
    three = kdpipe("distill", teacher.path, *common, *train_options, "--cache", tmp_path / "cache", "--cache-views", 3)
    assert_one_line(three, 2, "another views (2, not 3)")
    there = ["--cache", tmp_path / "nowhere", "--cache-views", 2, "--out", tmp_path / "other"]
    assert kdpipe("distill", teacher.path, *common, *train_options, *there).returncode == 0
    assert Cache.open(tmp_path / "nowhere").facts.views == 2


def test_forecast_says_when_it_pays(taught: tuple[Chain, Dataset, Checkpoint], tmp_path: Path) -> None:
    _, dataset, teacher = taught
    told = forecast(config_of(plan(views=4)), dataset, teacher, tmp_path / "cache")
    assert told.break_even_epochs == pytest.approx(4 * (1 + told.view_seconds / told.teacher_seconds))
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch() -> None:
    done = kdpipe_process("cache", "--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout
