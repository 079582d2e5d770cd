"""What a stranger may have written: a sealed folder, read so that nothing in it is believed before it was checked.

Whoever seals a folder can recompute every hash, so kinds of files, sizes, names and numbers are looked at first.
The host and the runner on a device read by the same rules, and neither may import the other: ``runtime/sealed.py`` is a
link to this file, and a file of its own in every bundle. It needs the standard library, and numpy for arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2

MIB = 2**20
LARGEST_JSON_BYTES = 256 * MIB  # a manifest names every file: a million of them take 150 MiB
LARGEST_MODEL_BYTES = 4 * 1024 * MIB  # of a model or bundle, all files together: ONNX ends at half of that
LARGEST_BYTES = 1024 * 1024 * MIB  # of anything else: caches and data sets are as large as they are
MOST_LEVELS = 100  # of folders in a folder, of values in a value
LONGEST_NUMBER = 40  # digits

# What becomes part of a path, a command or a module's name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
KEY = re.compile(r"[0-9a-f]{64}")
NAMED_FACTS = ("target", "variant", "precision", "entry", "model", "task", "stand_in", "device", "reference")
STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
# Control characters, lone surrogates, and what turns the direction of writing: a terminal obeys them.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Unsound(ValueError):
    """What was found is not what a sealed folder is; the text is one line for a person."""


def printable(text: str, most: int = 2000) -> str:
    """``text`` as a terminal may show it: control characters spelled out, no longer than ``most``."""
    shown = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


# ---- files -------------------------------------------------------------------------------------------------


def read_file(path: Path, most_bytes: int) -> bytes:
    """The contents of a plain file that is not larger than that.

    Raises:
        Unsound: a link, a folder, a pipe, a device, too large, or unreadable.
        FileNotFoundError: nothing there.
    """
    try:
        # Without waiting for whoever writes into a pipe, and never through a link.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unsound(f"{path} is a link or cannot be read ({error.strerror}): wanted a plain file") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise Unsound(f"{path} is a folder or a special file: wanted a plain file")
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_size > most_bytes:
            raise Unsound(f"{path} has {status.st_size} bytes: wanted at most {most_bytes}")
        return stream.read(most_bytes)


def list_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below ``folder`` by POSIX name. Raises Unsound on a link, a special file or a deep nest."""
    queue = [""]
    while queue:
        below = queue.pop()
        if below.count("/") > MOST_LEVELS:
            raise Unsound(f"{folder} has more than {MOST_LEVELS} folders inside each other")
        try:
            entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
        except OSError as error:
            raise Unsound(f"{folder / below} cannot be read ({error.strerror})") from None
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                queue.append(f"{below}{entry.name}/")
            elif stat.S_ISREG(status.st_mode):
                yield below + entry.name, status
            else:
                raise Unsound(f"{folder / below / entry.name} is a link or a special file: wanted plain files only")


def sha256_file(path: Path) -> str:
    """sha256 of a file's contents, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def check_files(
    folder: Path, records: dict[str, Any], most_bytes: int, *, hashed: bool = True, beside: frozenset[str] = frozenset()
) -> None:
    """Compare the files below ``folder`` with what the manifest records of them: names, sizes, then hashes.

    Args:
        hashed: compare the hashes too.
        beside: what may lie there though the manifest does not name it: a signature over the manifest.

    Raises:
        Unsound: a file that is missing, added, changed or no plain file; more than ``most_bytes`` in all.
    """
    found = {}
    for name, status in list_files(folder):
        if name == MANIFEST or name in beside:
            continue
        if name not in records:
            raise Unsound(f"{folder} holds '{name}', which its manifest does not name: remove it or make it again")
        found[name] = status.st_size
    for name in records:
        if name not in found:
            raise Unsound(f"{folder} lacks '{name}': make the artifact again")
    if sum(found.values()) > most_bytes:
        largest = max(found, key=lambda name: found[name])
        raise Unsound(
            f"{folder} has {sum(found.values())} bytes, '{largest}' alone {found[largest]}: wanted at most {most_bytes}"
        )
    for name, record in records.items():
        if found[name] != record["size_bytes"] or (hashed and sha256_file(folder / name) != record["sha256"]):
            raise Unsound(f"{folder / name} differs from its manifest (corrupted or edited): make the artifact again")


# ---- JSON --------------------------------------------------------------------------------------------------


def parse_json(text: bytes) -> Any:
    """A JSON value as we write it.

    Raises:
        Unsound: no JSON, or what two readers could take for two things or choke on: a name given twice, a number
            that is not finite or endless, thousands of levels, control characters in a text.
    """
    try:
        decoded = text.decode()
        check_levels(decoded)
        value = json.loads(
            decoded,
            object_pairs_hook=_members,
            parse_int=lambda digits: int(_of_sane_length(digits)),
            parse_float=_finite,
            parse_constant=_finite,
        )
        if not isinstance(value, dict):
            check_text(value)
        return value
    except RecursionError:
        raise Unsound("too many levels inside each other") from None
    except UnicodeDecodeError:
        raise Unsound("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Unsound(f"not JSON ({error.msg}, line {error.lineno})") from None


def check_levels(text: str) -> None:
    """See that no value of a JSON text lies deeper than ``MOST_LEVELS``, before it is parsed. Raises Unsound.

    json's reader stops at the interpreter's limit of recursion, which the converters raise: it would then go down
    until the C stack overflows and the process is gone.
    """
    if text.count("[") + text.count("{") <= MOST_LEVELS:
        return
    level = 0
    for found in STRING_OR_BRACKET.finditer(text):
        if found[0] in ("[", "{"):
            level += 1
            if level > MOST_LEVELS:
                raise Unsound("too many levels inside each other")
        elif found[0] in ("]", "}"):
            level -= 1


def read_json(path: Path, most_bytes: int = LARGEST_JSON_BYTES) -> Any:
    """The JSON value in a file. Raises Unsound and FileNotFoundError as ``read_file`` and ``parse_json`` do."""
    text = read_file(path, most_bytes)
    try:
        return parse_json(text)
    except Unsound as error:
        raise Unsound(f"{path}: {error}") from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        raise Unsound(f"'{printable(max(names, key=names.count), 80)}' is given twice")
    check_text(members, 0)
    return members


def check_text(value: Any, level: int = 0) -> None:
    """See that no text in lists and at this level of mappings can steer a terminal. Raises Unsound."""
    if isinstance(value, str):
        if not value.isprintable() and UNPRINTABLE.search(value):
            raise Unsound(f"a text has control characters: '{printable(value, 80)}'")
    elif level > MOST_LEVELS:
        raise Unsound("too many levels inside each other")
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, (str, list)):
                check_text(item, level + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            check_text(name)
            if isinstance(item, (str, list)):  # mappings inside were looked at when they were read
                check_text(item, level + 1)


def _of_sane_length(digits: str) -> str:
    if len(digits) > LONGEST_NUMBER:
        raise Unsound(f"a number of {len(digits)} digits")
    return digits


def _finite(digits: str) -> float:
    value = float(_of_sane_length(digits))
    if not math.isfinite(value):
        raise Unsound(f"a number that is not finite ({digits})")
    return value


def canonical(value: Any) -> bytes:
    """One spelling of a JSON value, for hashing. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


# ---- manifests ---------------------------------------------------------------------------------------------


class OtherVersion(Unsound):
    """A manifest that another version of kdpipe wrote."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in ``folder``, checked against its own digest; every name and record in it is sane.

    Raises:
        Unsound: none there, or a broken or edited one.
        OtherVersion: one of another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise Unsound(f"no artifact at {folder}: the folder does not exist")
    try:
        text = read_file(path, LARGEST_JSON_BYTES)
    except FileNotFoundError:
        raise Unsound(f"{folder} has no {MANIFEST}: it is not an artifact, or was never finished") from None
    except Unsound as error:
        raise Unsound(f"{error}: not a manifest (broken or edited), make the artifact again") from None
    try:
        value = parse_json(text)
    except Unsound as error:
        raise Unsound(f"{path}: {error}: not a manifest (broken or edited), make the artifact again") from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is int and version != SCHEMA_VERSION:
        raise OtherVersion(f"{folder} has schema version {version}, wanted {SCHEMA_VERSION}: make it again")
    try:
        if type(version) is not int:
            raise Unsound(f"its schema version is {printable(repr(version), 40)}, wanted {SCHEMA_VERSION}")
        # The digest is of values, and other bytes may spell them: 1E-05, a last digit, a line's end for a space.
        fits = digest(value) == value.get("digest") and spelled(value) == text
        check_names(value)
        check_records(value.get("files"))
    except (Unsound, RecursionError) as error:
        reason = "too many levels" if isinstance(error, RecursionError) else error
        raise Unsound(f"{path} is not a manifest ({reason}): make the artifact again") from None
    if not fits:
        raise Unsound(f"{path} was edited after sealing: make the artifact again")
    return dict(value)


def spelled(manifest: dict[str, Any]) -> bytes:
    """The one text of a manifest's file."""
    return json.dumps(manifest, indent=1, allow_nan=False).encode()


def digest(manifest: dict[str, Any]) -> str:
    """sha256 of every field but ``digest``."""
    return hashlib.sha256(canonical({name: item for name, item in manifest.items() if name != "digest"})).hexdigest()


def check_names(provenance: Any) -> None:
    """See that everything that names something, here and in all inputs, is a plain name. Raises Unsound."""
    if not isinstance(provenance, dict):
        raise Unsound("what it was made from is no mapping")
    facts, inputs = provenance.get("facts"), provenance.get("inputs")
    if not isinstance(facts, dict) or not isinstance(inputs, dict):
        raise Unsound("facts and inputs are no mappings")
    for field in ("kind", "stage"):
        _check(NAME, field, provenance.get(field))
    _check(KEY, "key", provenance.get("key"))
    for field in NAMED_FACTS:
        if facts.get(field) is not None and not isinstance(facts[field], dict):  # some are records in other kinds
            _check(NAME, field, facts[field])
    for role, source in inputs.items():
        if not role or "/" in role or role in (".", "..") or len(role) > 255:
            raise Unsound(f"'{printable(role, 80)}' is no name of an input")
        check_names(source)


def _check(pattern: re.Pattern[str], field: str, value: Any) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise Unsound(f"{field} is {printable(repr(value), 80)}, wanted a name of letters, digits and . _ -")


def check_records(records: Any) -> None:
    """See that the files of a manifest lie inside its folder, with a size and a hash each. Raises Unsound."""
    if not isinstance(records, dict):
        raise Unsound("files is no mapping")
    for name, record in records.items():
        parts = name.split("/")
        if name == MANIFEST or "\\" in name or any(part in ("", ".", "..") or len(part) > 255 for part in parts):
            raise Unsound(f"it names a file outside itself ('{printable(name, 80)}')")
        if not isinstance(record, dict) or set(record) != {"sha256", "size_bytes"}:
            raise Unsound(f"'{printable(name, 80)}' has no size and hash")
        if type(record["size_bytes"]) is not int or record["size_bytes"] < 0:
            raise Unsound(f"the size of '{printable(name, 80)}' is no number of bytes")
        _check(KEY, f"the hash of '{printable(name, 80)}'", record["sha256"])


# ---- arrays ------------------------------------------------------------------------------------------------


def load_array(path: Path, dtype: str, dimensions: int) -> np.ndarray:
    """An ``.npy`` file as a read-only map: nothing is allocated, whatever its header says.

    Args:
        dtype: kinds of numbers that are taken, as numpy's letters ("u", "if"); floats must be finite.
        dimensions: how many, at least.

    Raises:
        Unsound: no such array.
    """
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises a dozen kinds for a broken header
        raise Unsound(f"{path} holds no array ({printable(str(error), 120)})") from None
    if not isinstance(array, np.ndarray):
        raise Unsound(f"{path} holds no array")
    return _fitting(array, f"{path}", dtype, dimensions)


def load_arrays(path: Path, wanted: dict[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by name: exactly those wanted, stored as they are (``numpy.savez``).

    Their headers are read before anything is allocated, and nothing is unpacked: an array takes as much memory as
    the file does.

    Args:
        wanted: by name, dtype and dimensions as in ``load_array``.

    Raises:
        Unsound: other contents.
    """
    import numpy as np

    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()) or set(entries) != {f"{name}.npy" for name in wanted}:
                raise Unsound(f"{path} holds other arrays than {', '.join(wanted)}")
            for name, (dtype, dimensions) in wanted.items():
                entry = entries[f"{name}.npy"]
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise Unsound(f"{path}: '{name}' is packed, wanted it stored as it is")
                with archive.open(entry) as stream:
                    version = np.lib.format.read_magic(stream)
                    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, kind = header[version](stream)
                    size_bytes = math.prod(shape) * kind.itemsize
                    if kind.hasobject or min(shape, default=0) < 0 or stream.tell() + size_bytes != entry.file_size:
                        raise Unsound(f"{path}: '{name}' is not what its header says")
                with archive.open(entry) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                arrays[name] = _fitting(array, f"{path}: '{name}'", dtype, dimensions)
    except Unsound:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen kinds for a broken file
        raise Unsound(f"{path} holds no arrays ({printable(str(error), 120)})") from None
    return arrays


def _fitting(array: np.ndarray, what: str, dtype: str, dimensions: int) -> np.ndarray:
    import numpy as np

    if array.dtype.kind not in dtype or array.ndim < dimensions or not array.size:
        raise Unsound(f"{what} is {array.dtype} of shape {array.shape}: not what is wanted there")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Unsound(f"{what} has values that are not finite")
    return array
