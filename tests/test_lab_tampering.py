"""One changed byte at hundreds of random places: refused by the host and by a device, each time."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import Made, assert_one_line, kdpipe
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fuzz import bent, everywhere, seal
from test_deploy import ask, upload
from test_strangers import runner

from kdpipe.core import sealed
from kdpipe.core.artifact import MANIFEST
from kdpipe.core.kinds import Release
from kdpipe.devices.runner import copy_runner
from kdpipe.runtime import store
from kdpipe.runtime.bundle import BundleError

pytestmark = pytest.mark.lab

PLACES = int(os.environ.get("KDPIPE_TAMPERED_PLACES", "300"))  # a thousand take three minutes
PROCESSES = 8  # of those, by a runner in a process of its own, as a device starts it
NAMED = "onnxruntime-int8"


def places(folder: Path, count: int) -> list[tuple[str, int, int]]:
    """File, position and what to change there by exclusive or: half by size, half a file as likely as any other."""
    generator = random.Random(0)
    sizes = {name: status.st_size for name, status in sealed.list_files(folder) if status.st_size}
    by_size = generator.choices(list(sizes), list(sizes.values()), k=count // 2)
    names = by_size + generator.choices(list(sizes), k=count - count // 2)
    return [(name, generator.randrange(sizes[name]), generator.randrange(1, 256)) for name in names]


def change(path: Path, at: int, by: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        [value] = stream.read(1)
        stream.seek(at)
        stream.write(bytes([value ^ by]))


@pytest.fixture
def bundle(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.bundles[NAMED].path, tmp_path / "bundle"))


def test_a_changed_byte_of_a_bundle_is_refused_here_and_there(bundle: Path, tmp_path: Path) -> None:
    """By ``kdpipe verify``, and by the runner of a device, which is not the bundle's own."""
    copy_runner(tmp_path / "runtime")
    refused = Counter[str]()
    for turn, (name, at, by) in enumerate(places(bundle, PLACES)):
        change(bundle / name, at, by)
        assert_one_line(kdpipe("verify", bundle), 2, str(bundle))
        refused["by the host"] += 1
        if turn % (PLACES // PROCESSES):
            done = runner("verify", bundle)
        else:
            line = [sys.executable, "-m", "runtime", "verify", bundle]
            done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1, f"byte {at} of {name} was not seen"
        assert done.stderr.startswith("runtime: ") and len(done.stderr.splitlines()) == 1, done.stderr
        refused["by a device"] += 1
        refused[
            f"in {'the manifest' if name == MANIFEST else 'the model' if name == 'model.onnx' else 'the rest'}"
        ] += 1
        change(bundle / name, at, by)
    assert kdpipe("verify", bundle).returncode == 0, "unchanged, it is taken"
    print(f"one byte changed at {PLACES} places of a bundle, refused: {dict(refused)}")
    assert refused["by the host"] == refused["by a device"] == PLACES


def same_number(first: bytes, second: bytes) -> bool:
    try:
        return bool(json.loads(first) == json.loads(second))
    except ValueError:
        return False


def test_every_sign_of_a_manifest_counts(bundle: Path) -> None:
    """Wherever one other byte spells the same value: exponents, last digits, spaces."""
    path = bundle / MANIFEST
    whole = path.read_bytes()
    others = []  # where, and which byte
    for found in re.finditer(rb"(?<=[ \n])-?\d[\d.e+-]*", whole):
        for at, byte in itertools.product(range(*found.span()), range(256)):
            text = found[0][: at - found.start()] + bytes([byte]) + found[0][at + 1 - found.start() :]
            if text != found[0] and same_number(text, found[0]):
                others.append((at, byte))
    for found in re.finditer(rb"\n ", whole):
        others += [(found.start(), ord(" ")), (found.start() + 1, ord("\n"))]
    refused = 0
    for at, byte in random.Random(0).sample(others, min(300, len(others))):
        text = whole[:at] + bytes([byte]) + whole[at + 1 :]
        assert json.loads(text) == json.loads(whole)
        path.write_bytes(text)
        assert_one_line(kdpipe("verify", bundle), 2, "edited after sealing")
        assert "edited after sealing" in runner("verify", bundle).stderr
        refused += 1
    print(f"{refused} of {len(others)} other spellings of the same manifest, one byte away: refused")


def test_a_changed_byte_on_a_device_is_not_installed(bundle: Path, tmp_path: Path) -> None:
    """After the upload and before the switch; what is live stays. Some by the runner's own process."""
    root = tmp_path / "device"
    name = upload(root, bundle)
    entry = root / "store" / name
    for turn, (file, at, by) in enumerate(places(entry, PLACES)):
        change(entry / file, at, by)
        if turn % (PLACES // PROCESSES):
            with pytest.raises((store.StoreError, BundleError)):
                store.install(root, name)
            assert store.have(root, [name])["have"] == []
        else:
            done = ask("install", root, name)
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert store.live(root) is None
        change(entry / file, at, by)
    assert store.install(root, name)["live"]["digest"] == name, "unchanged, it is taken"
    print(f"one byte changed at {PLACES} places of a pushed bundle: never made live")


@pytest.fixture
def signed(made: Made, tmp_path: Path) -> tuple[Path, Path]:
    """A signed release, and the public key."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    whole = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.write_bytes(whole)
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    bundles = [made.bundles[name].path for name in ("onnxruntime-float32", NAMED)]
    done = kdpipe("release", "tampered@1.0.0", *bundles, "--to", tmp_path / "releases", "--key", private)
    assert done.returncode == 0, done.stderr
    return tmp_path / "releases" / "tampered" / "1.0.0", public


def test_a_changed_byte_of_a_release_is_refused(signed: tuple[Path, Path]) -> None:
    """In a bundle, a paper or the manifest by its hash, in the signature by the key; and the manifest sealed again."""
    release, public = signed
    refused = Counter[str]()
    generator, length = random.Random(0), (release / Release.SIGNATURE).stat().st_size
    signature = [(Release.SIGNATURE, generator.randrange(length), generator.randrange(1, 256)) for _ in range(50)]
    for name, at, by in [*places(release, PLACES), *signature]:
        if name == Release.SIGNATURE and is_only_spelling(release / name, at, by):
            continue
        change(release / name, at, by)
        done = kdpipe("verify", release, "--signature", public)
        assert_one_line(done, done.returncode, str(release))
        assert done.returncode in (1, 2) and not done.stdout, f"byte {at} of {name} was not seen"
        refused[name if name in (MANIFEST, Release.SIGNATURE) else "the rest"] += 1
        change(release / name, at, by)
    whole = (release / MANIFEST).read_bytes()
    spots = list(everywhere(json.loads(whole)))
    for _ in range(PLACES // 10):
        value = bent(whole, spots, generator)
        if value == json.loads(whole):
            continue
        seal(release, value)
        done = kdpipe("verify", release, "--signature", public)
        assert_one_line(done, done.returncode, str(release))
        assert done.returncode in (1, 2) and not done.stdout, "a manifest that nobody signed was believed"
        refused["manifests sealed again"] += 1
    (release / MANIFEST).write_bytes(whole)
    assert kdpipe("verify", release, "--signature", public).returncode == 0, "unchanged, it is taken"
    print(f"one byte of a signed release changed, refused: {dict(refused)}")
    assert refused[Release.SIGNATURE] > 10


def is_only_spelling(path: Path, at: int, by: int) -> bool:
    """Whether a change of a signature's file leaves what it says: no key covers how it is written down."""
    content = bytearray(path.read_bytes())
    before = json.loads(content)
    content[at] ^= by
    try:
        return bool(json.loads(content)["dsseEnvelope"] == before["dsseEnvelope"])
    except (ValueError, KeyError, TypeError):
        return False
