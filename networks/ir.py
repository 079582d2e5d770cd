"""OpenVINO's files: the same network is the same file, whatever a process made before."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any


def save(model: Any, path: Path, kept: Collection[str] = (), others: Collection[str] = (), half: bool = False) -> None:
    """Write an ``openvino.Model`` and its weights.

    OpenVINO numbers nodes without a name through the whole process, so that a network would be another file after
    another one; here they are numbered through the network, in the order in which they run.

    Args:
        kept: names that stay, since something refers to them: those of the network whose nodes these are.
        others: names that none is given, since they are those of another network that this one is compared with.
        half: weights in float16.
    """
    import openvino

    nodes = model.get_ordered_ops()
    counted = [node for node in nodes if node.get_friendly_name() not in kept and _is_counted(node)]
    named = {node.get_friendly_name() for node in nodes} - {node.get_friendly_name() for node in counted}
    taken = {*kept, *others, *named}
    numbers: dict[str, int] = {}
    for node in counted:
        kind = node.get_friendly_name().rpartition("_")[0]
        while (name := f"{kind}_{numbers.setdefault(kind, 0)}") in taken:
            numbers[kind] += 1
        numbers[kind] += 1
        node.set_friendly_name(name)
    openvino.save_model(model, path, compress_to_fp16=half)


def names(model: Any) -> set[str]:
    """Of all nodes of an ``openvino.Model``."""
    return {node.get_friendly_name() for node in model.get_ordered_ops()}


def _is_counted(node: Any) -> bool:
    """Whether it has the name of one that nobody named: its type, and how many came before."""
    kind, _, number = node.get_friendly_name().rpartition("_")
    of_its_type = kind == node.get_type_name()
    folded = node.get_type_name() == "Constant" and kind.isalnum() and kind[:1].isupper()
    return (of_its_type or folded) and bool(number.isdecimal())
