"""``python -m runtime``: verify, predict and measure a bundle on the machine it lies on.

One JSON object goes to standard output; a failure is one line on standard error and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import PROTOCOL_VERSION, open_session, predict, store
from .bundle import BundleError, read_facts, replay_golden
from .measure import measure
from .sealed import printable
from .weights import ModelFileError

# What is asked of a store, and of how many digests (None: any number).
STORE_COMMANDS = {"have": None, "receive": 1, "install": 1, "rollback": 0, "status": 0, "clean": 0}
BATCH = 64  # images that are run at once, and read at once


def main() -> int:
    parser = argparse.ArgumentParser(prog="runtime", description=__doc__)
    parser.add_argument("command", choices=["verify", "predict", "measure", *STORE_COMMANDS])
    parser.add_argument("bundle", type=Path, help="folder of the bundle; of the store, for what is asked of it")
    parser.add_argument("digests", nargs="*", help="of what lies in the store (have, receive, install)")
    parser.add_argument("--images", type=Path, help=".npy of uint8 [N, H, W, 3] (predict, measure)")
    parser.add_argument("--image-count", type=int, default=64, help="images rotated through (measure)")
    parser.add_argument("--logits", type=Path, help=".npy to write float32 [N, K] to (predict)")
    parser.add_argument(
        "--batch", type=int, default=BATCH, help="images of one call, where the model takes them (predict)"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--seconds", type=float, default=1.0, help="steady time (measure)")
    parser.add_argument("--min-samples", type=int, default=64, help="inferences at least (measure)")
    parser.add_argument("--warm-up-seconds", type=float, default=1.0, help="warm-up at least (measure)")
    parser.add_argument("--stand-in", action="store_true", help="open with the runtime that reads the same file")
    parser.add_argument("--memory-bytes", type=int, default=0, help="end where it wants more memory; 0: no limit")
    parser.add_argument("--keep-versions", type=int, default=3, help="bundles kept that were live (install)")
    parser.add_argument("--keep-bytes", type=int, default=0, help="that those may take; 0: any (install)")
    parser.add_argument("--everything", action="store_true", help="what is live too (clean)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a fault of a runtime leaves no file behind
    if args.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory_bytes, args.memory_bytes))
    threads = args.threads or len(os.sched_getaffinity(0))
    try:
        facts = {} if args.command in STORE_COMMANDS else read_facts(args.bundle)
        if args.command in STORE_COMMANDS:
            result = _ask_store(args, threads)
        elif args.command == "verify":
            result = replay_golden(args.bundle, facts, threads, args.stand_in)
        elif args.command == "predict":
            result = _predict(args, facts, threads)
        else:
            images = np.load(args.images, mmap_mode="r", allow_pickle=False)[: args.image_count]
            result = measure(args.bundle, facts, images, threads, args.seconds, args.min_samples, args.warm_up_seconds)
    except Exception as error:  # every runtime raises its own for a model that it cannot run
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        whose = (
            "" if isinstance(error, (BundleError, ModelFileError, store.StoreError)) else f"{type(error).__name__}: "
        )
        print(f"runtime: {whose}{printable(text, 500)}", file=sys.stderr)
        return 1
    print(json.dumps({"protocol_version": PROTOCOL_VERSION, **result}))
    return 0


def _ask_store(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    root, wanted = args.bundle, STORE_COMMANDS[args.command]
    if wanted is not None and len(args.digests) != wanted:
        raise store.StoreError(f"{args.command} was asked of {len(args.digests)} digests: wanted {wanted}")
    if args.command == "have":
        return store.have(root, args.digests)
    if args.command == "receive":
        return store.receive(root, *args.digests)
    if args.command == "install":
        return store.install(root, *args.digests, threads, args.stand_in, args.keep_versions, args.keep_bytes)
    if args.command == "rollback":
        return store.rollback(root, threads, args.stand_in)
    return store.clean(root, args.everything) if args.command == "clean" else store.status(root)


def _predict(args: argparse.Namespace, facts: dict[str, Any], threads: int) -> dict[str, Any]:
    begun = time.monotonic()
    session = open_session(args.bundle, facts, threads, args.stand_in)
    opened = time.monotonic()
    outputs = [predict(session, images, args.batch) for images in _batches(args.images)]
    np.save(args.logits, np.concatenate(outputs), allow_pickle=False)
    return {
        "images": sum(map(len, outputs)),
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
