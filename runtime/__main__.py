"""``python -m runtime``: verify, predict and measure a bundle on the machine it lies on, and say what that is.

One JSON object goes to standard output; a failure is one line on standard error and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from . import PROTOCOL_VERSION, build, open_session, predict, store
from .beside import beside
from .bundle import BundleError, read_facts, replay_golden
from .measure import Plan, keep_to_cores, measure, start_fresh
from .probe import place, probe
from .sealed import printable
from .tensorrt import EngineError
from .watch import Locked, watch
from .weights import ModelFileError

BATCH = 64  # images that are run at once, and read at once


def main() -> int:
    args = _parser().parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a fault of a runtime leaves no file behind
    if args.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory_bytes, args.memory_bytes))
    signal.setitimer(signal.ITIMER_REAL, args.limit_seconds)  # whoever asked may be gone, and cannot end this process
    try:
        result = args.answer(args)
    except Exception as error:  # every runtime raises its own for a model that it cannot run
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        ours = (BundleError, EngineError, Locked, ModelFileError, store.StoreError)
        whose = "" if isinstance(error, ours) else f"{type(error).__name__}: "
        print(f"runtime: {whose}{printable(text, 500)}", file=sys.stderr)
        return 1
    print(json.dumps({"protocol_version": PROTOCOL_VERSION, **result}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runtime", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(answer=lambda _: parser.error("wanted a command"))
    of_all = argparse.ArgumentParser(add_help=False)
    of_all.add_argument("--memory-bytes", type=int, default=0, help="end where it wants more memory; 0: no limit")
    of_all.add_argument("--limit-seconds", type=float, default=0, help="end after so long; 0: no limit")

    def command(name: str, answer: Callable[[argparse.Namespace], dict[str, Any]], about: str) -> Any:
        added = commands.add_parser(name, help=about, description=about, parents=[of_all])
        added.set_defaults(answer=answer)
        return added

    def of_bundle(name: str, answer: Callable[[argparse.Namespace], dict[str, Any]], about: str) -> Any:
        added = command(name, answer, about)
        added.add_argument("bundle", type=_folder, help="folder of the bundle, or a link to it")
        added.add_argument("--threads", type=int, default=0, help="0: one a core")
        added.add_argument("--stand-in", action="store_true", help="open with the runtime that reads the same file")
        return added

    of_bundle("verify", _verify, "check the hashes of a bundle and replay its golden inputs")
    building = command("build", _build, "make what its runtime needs on this machine, beside the bundle")
    building.add_argument("bundle", type=_folder, help="folder of the bundle, or a link to it")
    predicting = of_bundle("predict", _predict, "run a bundle on images")
    predicting.add_argument("--images", type=Path, required=True, help=".npy of uint8 [N, H, W, 3]")
    predicting.add_argument("--logits", type=Path, required=True, help=".npy to write float32 [N, K] to")
    predicting.add_argument("--batch", type=int, default=BATCH, help="images of one call, where the model takes them")
    measuring = of_bundle("measure", _measure, "time a bundle")
    measuring.add_argument("--images", type=Path, required=True, help=".npy of uint8 [N, H, W, 3]")
    measuring.add_argument("--frames", type=Path, help=".npz of decoded pictures at their own size, uint8 [H, W, 3]")
    for field in fields(Plan):
        option = "--image-count" if field.name == "images" else "--" + field.name.replace("_", "-")
        measuring.add_argument(option, type=type(field.default), default=field.default, help="see Plan")
    starting = of_bundle("start", _start, "open a bundle, run one image and say what that took of time and memory")
    starting.add_argument("--images", type=Path, required=True, help=".npy of uint8 [N, H, W, 3]")
    starting.add_argument("--page-cache", choices=["warm", "dropped"], default="warm", help="dropped: read from disk")
    starting.add_argument("--examine", action="store_true", help="count the layers by the precision in which they ran")
    watching = command("watch", _watch, "say what the machine does, at every line of standard input until it ends")
    watching.add_argument("--lock", type=Path, help="file that is held meanwhile, so that nobody else measures")
    watching.add_argument("--holder", default="somebody", help="who holds it")
    watching.add_argument("--hertz", type=float, default=10.0, help="looks a second")
    command("probe", lambda _: probe(), "say what this machine is")

    def of_store(name: str, answer: Callable[[argparse.Namespace], dict[str, Any]], about: str) -> Any:
        added = command(name, answer, about)
        added.add_argument("root", type=Path, help="folder of everything that is kdpipe's")
        return added

    having = of_store("have", lambda args: store.have(args.root, args.digest), "say what lies there whole")
    having.add_argument("digest", nargs="*", help="of what is asked for")
    receiving = of_store("receive", lambda args: store.receive(args.root, args.digest), "check an upload, and keep it")
    receiving.add_argument("digest", help="of what was uploaded to store/DIGEST.part")
    installing = of_store("install", _install, "check a bundle that was pushed, replay it, and make it live")
    installing.add_argument("digest", help="of the bundle's folder")
    installing.add_argument("--keep-versions", type=int, default=3, help="bundles that were live, kept")
    installing.add_argument("--keep-bytes", type=int, default=0, help="that they may take; 0: any")
    rolling = of_store("rollback", lambda args: store.rollback(args.root, _threads(args), args.stand_in), "go back")
    for replaying in (installing, rolling):
        replaying.add_argument("--threads", type=int, default=0, help="0: every core")
        replaying.add_argument("--stand-in", action="store_true", help="replay with the runtime that reads the file")
    of_store("status", lambda args: store.status(args.root), "say what is live, and what else lies there")
    cleaning = of_store("clean", lambda args: store.clean(args.root, args.everything), "remove what nothing needs")
    cleaning.add_argument("--everything", action="store_true", help="what is live too")
    return parser


def _folder(text: str) -> Path:
    """The folder that a path leads to now: a link to what is live may be switched while its files are read."""
    path = Path(text)
    return path.resolve() if path.is_symlink() else path


def _threads(args: argparse.Namespace) -> int:
    return place(args.threads, sorted(os.sched_getaffinity(0)))[0]


def _install(args: argparse.Namespace) -> dict[str, Any]:
    kept = args.keep_versions, args.keep_bytes
    return store.install(args.root, args.digest, _threads(args), args.stand_in, *kept)


def _build(args: argparse.Namespace) -> dict[str, Any]:
    build(args.bundle, read_facts(args.bundle))
    return {"beside": str(beside(args.bundle))}


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    return replay_golden(args.bundle, read_facts(args.bundle), _threads(args), args.stand_in)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    placement = keep_to_cores(args.threads)
    facts = read_facts(args.bundle)
    named = {field.name: getattr(args, field.name) for field in fields(Plan) if field.name != "images"}
    plan = Plan(images=args.image_count, **named)
    images = np.load(args.images, mmap_mode="r", allow_pickle=False)[: plan.images]
    return measure(args.bundle, facts, images, placement, plan, lambda: _frames(args.frames))


def _frames(path: Path | None) -> list[np.ndarray]:
    """The pictures of a .npz file, in their order."""
    if path is None:
        return []
    with np.load(path, allow_pickle=False) as stored:
        return [stored[name] for name in stored.files]


def _start(args: argparse.Namespace) -> dict[str, Any]:
    """Hashes are not checked: that would be most of the time, and of the memory, of a small model's start."""
    placement = keep_to_cores(args.threads)
    facts = read_facts(args.bundle, hashed=False)
    images = np.load(args.images, mmap_mode="r", allow_pickle=False)
    threads = placement["threads"]
    return start_fresh(args.bundle, facts, images, threads, page_cache=args.page_cache, examine=args.examine)


def _watch(args: argparse.Namespace) -> dict[str, Any]:
    watch(args.lock, args.holder, args.hertz, PROTOCOL_VERSION)
    return {}


def _predict(args: argparse.Namespace) -> dict[str, Any]:
    facts = read_facts(args.bundle)
    begun = time.monotonic()
    session = open_session(args.bundle, facts, _threads(args), args.stand_in)
    opened = time.monotonic()
    count, done = len(np.load(args.images, mmap_mode="r", allow_pickle=False)), 0
    # On the disk as they come: masks of many images are larger than a memory.
    written: np.memmap[Any, np.dtype[Any]] | None = None
    for images in _batches(args.images):
        outputs = predict(session, images, args.batch)
        if written is None:
            written = np.lib.format.open_memmap(args.logits, "w+", outputs.dtype, (count, *outputs.shape[1:]))
        written[done : done + len(images)] = outputs
        done += len(images)
    if written is None:
        raise BundleError(f"{args.images} has no images: wanted at least one")
    written.flush()
    return {
        "images": done,
        "open_seconds": opened - begun,
        "predict_seconds": time.monotonic() - opened,
        "session": session.describe(),
        "stand_in": args.stand_in,
    }


def _batches(path: Path) -> Iterator[np.ndarray]:
    """The images of a .npy file, a few at a time: mapped anew, so that what was read does not stay in memory."""
    count = len(np.load(path, mmap_mode="r", allow_pickle=False))
    for at in range(0, count, BATCH):
        yield np.array(np.load(path, mmap_mode="r", allow_pickle=False)[at : at + BATCH])


if __name__ == "__main__":
    sys.exit(main())
