"""Training from a cached teacher against labels alone and against live teachers, one process, taking turns.

    python benchmarks/cache.py                                     mobilenetv4_conv_small at 224, three teachers
    python benchmarks/cache.py --student resnet8 --teacher resnet56 --size 32 --batch 64 --threads 1
    python benchmarks/cache.py --peers --precision float32             timm's and torchdistill's live teachers too

A step is the whole of one: look up or ask, forward, backward, update; the views are made beforehand, so that nothing
hides what the cache costs. Networks have random weights: a step takes as long with any. A ratio is of two neighbours
of one round.
"""

from __future__ import annotations

import copy
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from distill import timms, torchdistills  # the benchmark beside this one
from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan, Method, ModelSettings, TeacherPlan, TrainConfig, validated
from kdpipe.core.kinds import Cache, Checkpoint
from kdpipe.core.stats import ratio_interval
from kdpipe.data.dataset import Dataset
from kdpipe.data.views import TrainingView, TrainingViews, training_images
from kdpipe.distill.cache import CachedTeacher
from kdpipe.distill.loop import Batch, Run
from kdpipe.distill.methods import METHODS
from kdpipe.distill.ranks import Ranks
from kdpipe.distill.teacher import open_teacher
from kdpipe.distill.trackers import Nothing
from kdpipe.distill.train import cache_config
from kdpipe.networks import models

FRACTION, VIEWS = 0.1, 2
PEERS = {"timm": timms, "torchdistill": torchdistills}


def random_teacher(chain: Chain, name: str, size: int, dataset: Dataset) -> Checkpoint:
    """A network of random weights as a checkpoint."""
    torch.manual_seed(0)
    config = ModelSettings.model_validate({"model": name, "input": {"size": size}})
    network, _ = models.create(config, len(dataset.classes))
    weights = chain.folder / f"{name}.safetensors"
    save_file(network.state_dict(), weights)
    return chain.teacher(TeacherPlan(model=name, input=config.input, checkpoint=weights), dataset)


def main(
    student: Annotated[str, typer.Option()] = "mobilenetv4_conv_small",
    teacher: Annotated[list[str], typer.Option()] = [  # noqa: B006
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "convnext_base",
    ],
    size: Annotated[int, typer.Option(help="pixels")] = 224,
    batch: Annotated[int, typer.Option(help="images")] = 32,
    threads: Annotated[int, typer.Option()] = 2,
    rounds: Annotated[int, typer.Option()] = 12,
    precision: Annotated[str, typer.Option(help="float32 or bf16")] = "bf16",
    peers: Annotated[bool, typer.Option("--peers", help="timm's and torchdistill's loops too")] = False,
) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder))
        dataset = chain.data(DataPlan(source="digits", test_split=None, test_fraction=0.05))
        values = {
            "model": student, "input": {"size": size}, "label_fraction": FRACTION, "cache_views": VIEWS,
            "train": {"precision": precision, "workers": 0, "batch_size": batch},
        }  # fmt: skip
        config = validated(TrainConfig, values, "the benchmark")
        network, spec = models.create(config, len(dataset.classes))
        source = training_images(dataset, FRACTION, 0, with_unlabeled=False)
        views = TrainingViews(source, config.train, spec, len(dataset.classes), 0)
        seen = [views[(0, int(number))] for number in source.numbers[:batch]]
        image, label = torch.stack([view.image for view in seen]), torch.tensor([view.label for view in seen])
        numbers = torch.from_numpy(source.numbers[:batch])
        address = [torch.zeros(batch, dtype=torch.long), numbers]
        view = TrainingView(image, label, label, address)

        def stepper(method: Method, teacher: Checkpoint | None, cache: Cache | None) -> Callable[[], object]:
            run_config = config.model_copy(update={"method": method})
            live = open_teacher(teacher, dataset, spec) if teacher and not cache else None
            asked = CachedTeacher(cache) if cache else live
            made = METHODS[method](run_config, copy.deepcopy(network), spec, asked, task=dataset.facts.task)
            run = Run(run_config, made, dataset, spec, 10**6, 10**6, Ranks(), None, Nothing())
            run.begin()
            run.begin_epoch()
            return lambda: run.learn(Batch(view, len(view.image), Ranks(), asked))

        steps = {"labels alone": stepper("labels", None, None)}
        look_up: CachedTeacher | None = None
        for name in teacher:
            guide = random_teacher(chain, name, size, dataset)
            if look_up is None:
                wanted = cache_config(config)
                assert wanted is not None
                cache = chain.cache(wanted, dataset, guide)
                look_up = CachedTeacher(cache)
                steps["cached teacher"] = stepper("kd", guide, cache)
            steps[f"live {name}"] = stepper("kd", guide, None)
            for title, loop in PEERS.items() if peers else ():
                loaded = models.restore(guide)[0]
                steps[f"{title}, {name}"] = loop(copy.deepcopy(network), loaded, image, label, precision == "bf16")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        order = random.Random(0)
        for _ in range(rounds + 1):
            for name in order.sample(list(steps), len(steps)):
                begun = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - begun)
        print(f"{student}, {batch} images of {size} pixels, {threads} thread(s), {precision}, {rounds} rounds")
        for name in steps:  # the first round warms up
            found = ratio_interval(seconds[name][1:], seconds["cached teacher"][1:])
            print(f"{name:<36} takes {found.value:.2f} of a step from the cache [{found.low:.2f}, {found.high:.2f}]")
        assert look_up is not None
        begun = time.perf_counter()
        for _ in range(100):
            look_up(image, (address[0], numbers))
        share = (time.perf_counter() - begun) / 100 / min(seconds["cached teacher"][1:])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"looking up takes {share:.2%} of a step; peak memory {peak} MiB")


if __name__ == "__main__":
    typer.run(main)
