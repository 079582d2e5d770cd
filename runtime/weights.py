"""Whether a model's file has all of it inside, seen without opening it in a runtime.

ONNX may name other files, or addresses in memory, as the place of a weight. A bundle never needs that, and a
runtime that follows a stranger's word there reads what it should not, or ends with a fault. Needs neither the onnx
package nor protobuf: the file is walked by its wire format (protobuf's "Encoding", onnx.proto of version 1.18).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path


class ModelFileError(ValueError):
    """The file is not a model, or not all of it."""


# Which fields of a message hold which messages; a message that is not here is not looked into.
MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a tensor; the location 0 is the default: here
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5


def refuse_files_elsewhere(entry: Path) -> None:
    """See that the model in ``entry`` is of a kind that is opened here, with its weights inside.

    Raises:
        ModelFileError: another kind of file, a broken one, or one that names data elsewhere.
    """
    if entry.suffix not in READERS:
        raise ModelFileError(f"{entry.name}: wanted a model that ends in {', '.join(READERS)}")
    with entry.open("rb") as stream:
        if stream.seek(0, 2) == 0:
            raise ModelFileError(f"{entry.name} is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            READERS[entry.suffix](content, entry.name)


def _check_onnx(content: mmap.mmap, name: str) -> None:
    queue = [("model", 0, len(content))]
    while queue:
        message, start, end = queue.pop()
        for field, kind, begin, stop in _fields(content, start, end, name):
            if message == "tensor" and (field == EXTERNAL_DATA or (field == DATA_LOCATION and begin)):
                raise ModelFileError(f"{name} keeps weights outside itself: a bundle holds them inside the file")
            inner = MESSAGES[message].get(field)
            if inner is not None and kind == BYTES:
                queue.append((inner, begin, stop))


def _fields(content: mmap.mmap, at: int, end: int, name: str) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, first byte or the value of a varint, end) of every field of a message."""
    while at < end:
        tag, at = _varint(content, at, end, name)
        field, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _varint(content, at, end, name)
            yield field, kind, value, at
            continue
        if kind == BYTES:
            length, at = _varint(content, at, end, name)
        elif kind in (FIXED_32, FIXED_64):
            length = 4 if kind == FIXED_32 else 8
        else:
            raise ModelFileError(f"{name} is no ONNX file")
        if not field or at + length > end:
            raise ModelFileError(f"{name} is no ONNX file, or a part of one")
        yield field, kind, at, at + length
        at += length


def _varint(content: mmap.mmap, at: int, end: int, name: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ModelFileError(f"{name} is no ONNX file, or a part of one")


def _check_xml(content: mmap.mmap, name: str) -> None:
    """OpenVINO's IR: weights are in the ``.bin`` of the same name alone. Its reader would take other formats too."""
    if not content[:64].lstrip().startswith((b"<?xml", b"<net")):
        raise ModelFileError(f"{name} is no OpenVINO model")
    for word in (b"<!DOCTYPE", b"<!ENTITY"):
        if content.find(word) >= 0:
            raise ModelFileError(f"{name} defines entities, which no OpenVINO model does")


def _check_tflite(content: mmap.mmap, name: str) -> None:
    """A TFLite file has no way to name another one; its reader takes nothing else."""
    if content[4:8] != b"TFL3":
        raise ModelFileError(f"{name} is no TFLite model")


READERS: dict[str, Callable[[mmap.mmap, str], None]] = {
    ".onnx": _check_onnx,
    ".xml": _check_xml,
    ".tflite": _check_tflite,
}
