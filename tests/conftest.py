"""One small chain, made once for the whole session with real runtimes, and tools to run the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from torch import nn

import kdpipe.distill.cache
import kdpipe.distill.train
from kdpipe import distill, pipeline
from kdpipe.chain import Chain, cache_order, train_order
from kdpipe.cli import main
from kdpipe.core import progress, sealed
from kdpipe.core.artifact import MANIFEST, Order
from kdpipe.core.config import CacheConfig, ExportConfig, QuantizeConfig, Recipe, TrainConfig, validated
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Bundle, Cache, Checkpoint, Graph, Measurement, Model, Report
from kdpipe.data.dataset import Dataset, Part
from kdpipe.devices import find_device
from kdpipe.distill.loop import evaluate
from kdpipe.export import TARGETS
from kdpipe.export import stage as export_stage
from kdpipe.quantize import VARIANTS
from kdpipe.quantize import stage as quantize_stage
from kdpipe.runtime import measure

ROOT = Path(__file__).resolve().parent.parent

# A machine that does other work has its pauses; the same examples each time, as any other test has.
hypothesis.settings.register_profile(
    "kdpipe", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("kdpipe")

# OpenVINO in bf16 is refused where the CPU would silently run it in float32.
HAS_BF16 = any(find_device("local").probe().known_flags.get(flag) for flag in ("amx_bf16", "avx512_bf16"))
# What is trained is made in the lab: test_lab_qad.py.
VARIANTS_HERE = {
    target: [name for name, kind in variants.items() if (name != "bf16" or HAS_BF16) and kind.untrained is None]
    for target, variants in VARIANTS.items()
}
EVERY_VARIANT = sorted({name for variants in VARIANTS_HERE.values() for name in variants})
EVERY_MODEL = [(target, variant) for target, variants in VARIANTS_HERE.items() for variant in ("float32", *variants)]

SMALL_TRAIN = {"epochs": 8, "workers": 0, "validate_every": 4, "augment": {"crop": "pad", "flip": 0}}
SHORT_BENCH = {
    "rounds": 2,
    "seconds": 0.1,
    "max_seconds": 0.1,
    "min_samples": 40,
    "warm_up_seconds": 0.1,
    "cold_starts": 1,
}
SMALL_RECIPE = {
    "name": "small",
    "data": {"source": "digits", "test_split": None, "test_fraction": 0.3},
    "teacher": {"model": "test_resnet", "input": {"size": 32}, "train": SMALL_TRAIN},
    "student": {"model": "test_resnet", "input": {"size": 32}},
    "distill": {"label_fraction": 0.3, "seeds": [0, 1], "train": SMALL_TRAIN},
    "quantize": {"variants": EVERY_VARIANT, "calibrate": {"images": 64}, "check_images": 32},
    "bench": SHORT_BENCH,
}


# The same of masks: the demo's, a few of them, and networks that learn nothing to speak of in this time.
SMALL_UNET = {
    "model": "unet",
    "encoder": "test_resnet",
    "model_args": {"decoder_channels": [16, 16, 8, 8, 8]},
    "input": {"size": [32, 48]},
}
SMALL_MASKS = {
    **SMALL_RECIPE,
    "name": "masks",
    "data": {"task": "segmentation", "source": "masks", "most_images": 24},
    "teacher": {**SMALL_UNET, "train": {**SMALL_TRAIN, "batch_size": 8}},
    "student": SMALL_UNET,
    "distill": {"seeds": [0], "train": {**SMALL_TRAIN, "batch_size": 8}},
    "export": {"targets": ["onnxruntime", "openvino"], "parity_images": 8},
    "quantize": {"variants": ["int8"], "calibrate": {"images": 8}, "check_images": 8},
    "package": {"golden_images": 2},
}


@dataclasses.dataclass
class Trained:
    """What the small recipe trained, opened: it takes PyTorch, and none of the converters."""

    dataset: Dataset
    teacher: Checkpoint
    student: Checkpoint


@dataclasses.dataclass
class Made(Trained):
    """What the small recipe made, opened."""

    chain: Chain
    graph: Graph
    models: dict[str, Model]
    bundles: dict[str, Bundle]
    measurement: Measurement
    report: Report


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Locks, devices and what lies on this machine as a device are of these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """The small recipe, and the folder of what is made of it."""
    # Sealed artifacts of an earlier session may be kept, by hand, while tests are being written.
    kept = os.environ.get("KDPIPE_TEST_ARTIFACTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("small") / "artifacts"
    return validated(Recipe, SMALL_RECIPE, "the small recipe"), folder


@pytest.fixture(scope="session")
def trained(small: tuple[Recipe, Path]) -> Trained:
    recipe, folder = small
    chain = Chain(folder)
    dataset = chain.data(recipe.data)
    teacher = chain.teacher(recipe.teacher, dataset)
    runs = pipeline.student_runs(recipe.student, recipe.distill)
    students = chain.train_all(runs, dataset, teacher, recipe.distill.together)
    return Trained(dataset, teacher, students["student-kd-seed0"])


@pytest.fixture(scope="session")
def packed(small: tuple[Recipe, Path], trained: Trained) -> Bundle:
    """The float32 bundle for ONNX Runtime, one of ``made.bundles`` without the rest."""
    recipe, folder = small
    chain = Chain(folder)
    config = ExportConfig.of(recipe.export, target="onnxruntime")
    return chain.package(recipe.package, chain.export(config, trained.student, trained.dataset), trained.dataset)


@pytest.fixture(scope="session")
def bundles(small: tuple[Recipe, Path], trained: Trained) -> dict[str, Bundle]:
    """``made.bundles`` without the measurement."""
    recipe, folder = small
    chain, dataset, device = Chain(folder), trained.dataset, find_device("local").probe()
    made = {}
    for target in recipe.export.targets:
        whole = chain.export(ExportConfig.of(recipe.export, target=target), trained.student, dataset)
        for model in (whole, *chain.variants(recipe.quantize, whole, dataset, device)):
            made[f"{target}-{model.facts.variant}"] = chain.package(recipe.package, model, dataset)
    return made


@pytest.fixture(scope="session")
def made(small: tuple[Recipe, Path], trained: Trained) -> Made:
    recipe, folder = small
    chain = Chain(folder)
    outcome = pipeline.run(recipe, chain)
    paths = {step.name: step.path for step in chain.steps}
    return Made(
        **vars(trained),
        chain=chain,
        graph=Graph.open(paths["graph"]),
        models={name: Model.open(paths[name]) for name in outcome.bundles},
        bundles=outcome.bundles,
        measurement=outcome.measurement,
        report=outcome.report,
    )


def copied_steps(made: Made, folder: Path, *without: str) -> Path:
    """A folder with copies of what the small recipe made, and of nothing that others write there meanwhile.

    Args:
        without: how the names of what is left out begin.
    """
    for step in made.chain.steps:
        if not step.path.name.startswith(without):
            shutil.copytree(step.path, folder / step.path.name, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The whole chain on masks, for two targets."""
    kept = os.environ.get("KDPIPE_TEST_ARTIFACTS")
    chain = Chain(Path(kept).with_name("masks") if kept else tmp_path_factory.mktemp("masks") / "artifacts")
    outcome = pipeline.run(validated(Recipe, SMALL_MASKS, "the small masks"), chain)
    paths = {step.name: step.path for step in chain.steps}
    return Made(
        dataset=Dataset.open(paths["data"]),
        teacher=Checkpoint.open(paths["teacher"]),
        student=Checkpoint.open(paths["student-kd-seed0"]),
        chain=chain,
        graph=Graph.open(paths["graph"]),
        models={name: Model.open(paths[name]) for name in outcome.bundles},
        bundles=outcome.bundles,
        measurement=outcome.measurement,
        report=outcome.report,
    )


# ---- stages, called as the chain calls them -----------------------------------------------------------------


def train(
    config: TrainConfig, dataset: Dataset, teacher: Checkpoint | None, out: Path, cache: Cache | None = None
) -> Checkpoint:
    return distill.train.train(train_order(config, dataset, teacher, cache), dataset, teacher, out, cache)


def train_together(
    configs: Mapping[Path, TrainConfig], dataset: Dataset, teacher: Checkpoint | None, cache: Cache | None = None
) -> dict[Path, Checkpoint]:
    orders = {out: train_order(config, dataset, teacher, cache) for out, config in configs.items()}
    return distill.train.train_together(orders, dataset, teacher, cache)


def build_cache(config: CacheConfig, dataset: Dataset, teacher: Checkpoint, out: Path) -> Cache:
    return distill.cache.build(cache_order(config, dataset, teacher), dataset, teacher, out)


def export(config: ExportConfig, source: Checkpoint | Graph, dataset: Dataset, out: Path) -> Model:
    return export_stage.export(Order("export", config, {source.kind: source, "data": dataset}), source, dataset, out)


def quantize(
    config: QuantizeConfig,
    model: Model,
    dataset: Dataset,
    out: Path,
    graph: Graph | None = None,
    teacher: Checkpoint | None = None,
) -> Model:
    order = Order("quantize", config, {"model": model, "data": dataset})
    check = TARGETS[model.facts.target].check
    return quantize_stage.quantize(order, model, dataset, out, check, graph, teacher)


def evaluated(network: nn.Module, spec: InputSpec, dataset: Dataset, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [N, ...] and labels [N] of a whole part."""
    batches = list(evaluate(network, spec, dataset, part, workers=0))
    return np.concatenate([outputs for outputs, _ in batches]), np.concatenate([labels for _, labels in batches])


# ---- the command line ---------------------------------------------------------------------------------------


# What the lab needs of the system: command, Debian's package. Whatever is missing fails, with the line that helps.
SYSTEM_PACKAGES = {
    "adb": "adb",
    "chromium": "chromium",
    "ethtool": "ethtool",
    "faketime": "faketime",
    "g++": "g++",
    "ip": "iproute2",
    "jq": "jq",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nft": "nftables",
    "nsenter": "util-linux",
    "pkill": "procps",
    "qemu-aarch64-static": "qemu-user-static",
    "rsync": "rsync",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "tc": "iproute2",
    "unshare": "util-linux",
}


def system_command(name: str) -> str:
    """Path of a command of the system that a lab test needs."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"'{name}' is missing: apt-get install --no-install-recommends {SYSTEM_PACKAGES[name]}")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kdpipe", *map(str, arguments)]


class Clock:
    """In place of the module ``time``: it goes on where something says that it takes time, and nothing else does."""

    def __init__(self) -> None:
        self.now_ns = 0

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(1e9 * seconds)

    def perf_counter_ns(self) -> int:
        return self.now_ns

    monotonic_ns = process_time_ns = perf_counter_ns

    def monotonic(self) -> float:
        return self.now_ns / 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of what measures: a busy machine adds nothing to it."""
    found = Clock()
    monkeypatch.setattr(measure, "time", found)
    return found


class Told(progress.Silence):
    """Hears what a person is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextlib.contextmanager
def listening(listener: progress.Listener) -> Iterator[None]:
    """Hear what is told of progress meanwhile, in place of whoever heard it before."""
    before = progress._listener
    progress.listen(listener)
    try:
        yield
    finally:
        progress.listen(before)


def interruptible(arguments: list[str]) -> list[str]:
    """The command, so that it hears Ctrl-C: a shell's background jobs, these tests among them perhaps, ignore it."""
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code, *arguments]


def kdpipe(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process (importing torch anew for every call takes seconds)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["kdpipe", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            contextlib.chdir(cwd or Path.cwd()),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    finally:
        sys.argv = before
    code = ended.value.code
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def kdpipe_process(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in a process of its own."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        command(*arguments), env=variables, cwd=cwd, capture_output=True, text=True, timeout=1800, check=False
    )


def assert_one_line(done: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    """A user's mistake: this exit code, no traceback, and as the last line one that has all ``words``."""
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    last = lines[-1]
    assert last.startswith("kdpipe"), done.stderr
    for word in words:
        assert word in last, f"{word!r} not in {last!r}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A user's folder: two classes of small pictures that differ, of several sizes and formats."""
    from PIL import Image

    generator = np.random.default_rng(0)
    root = tmp_path / "photos"
    for split, count in (("train", 12), ("val", 6)):
        for label, brightness in (("dark", 60), ("light", 190)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for at in range(count):
                shape = (20 + at, 30, 3)
                pixels = np.clip(generator.normal(brightness, 30, shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{at:02d}.{'png' if at % 2 else 'jpg'}")
    return root


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest as a stranger could: the digest fits again."""
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    value["digest"] = sealed.digest(value)
    (folder / MANIFEST).write_bytes(sealed.spelled(value))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a sealed artifact together with its hash."""
    (folder / name).write_bytes(content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    rewrite_manifest(folder, lambda value: value["files"].update({name: record}))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
