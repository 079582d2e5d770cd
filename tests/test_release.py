"""A release from its making to a device: what it holds, who vouches for it, what becomes of one that was altered."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import (
    SMALL_RECIPE,
    Made,
    assert_one_line,
    command,
    flip_a_byte,
    kdpipe,
    replace_file,
    rewrite_manifest,
)
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from s3 import BUCKET, object_store

from kdpipe.core.artifact import MANIFEST, Order, drafting, read_manifest, write_json
from kdpipe.core.config import GateConfig, read_recipe
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Bundle, Release, Verdict, VerdictFacts
from kdpipe.core.sealed import UNPRINTABLE
from kdpipe.deploy import licences, release, shelf, signature
from kdpipe.deploy.card import markdown
from kdpipe.deploy.versions import Version, named, newest
from kdpipe.devices import find_device
from kdpipe.runtime.store import digest

PEM, PUBLIC = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


class Keys(NamedTuple):
    """A pair of keys, the public one of somebody else, and what is no key to sign with."""

    private: Path
    public: Path
    other: Path
    encrypted: Path  # by "secret"
    edwards: Path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    found = Keys(*(folder / f"{name}.pem" for name in Keys._fields))
    mine, other = (ec.generate_private_key(curve) for curve in (ec.SECP256R1(), ec.SECP384R1()))

    def private(key: Any, encryption: Any = None) -> bytes:
        encryption = encryption or serialization.NoEncryption()
        return bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption))

    found.private.write_bytes(private(mine))
    found.encrypted.write_bytes(private(mine, serialization.BestAvailableEncryption(b"secret")))
    found.edwards.write_bytes(private(ed25519.Ed25519PrivateKey.generate()))
    found.public.write_bytes(mine.public_key().public_bytes(PEM, PUBLIC))
    found.other.write_bytes(other.public_key().public_bytes(PEM, PUBLIC))
    return found


def released(bundles: list[Path], title: str, to: Path | str, *more: object) -> Path:
    """What ``kdpipe release`` made."""
    done = kdpipe("release", title, *bundles, "--to", to, "--json", *more)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["release"])


@pytest.fixture(scope="module")
def whole(made: Made, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles with their report, signed."""
    bundles = [made.bundles[name].path for name in ("onnxruntime-float32", "onnxruntime-int8")]
    to = tmp_path_factory.mktemp("releases")
    return released(bundles, "digits@1.0.0", to, "--report", made.report.path, "--key", keys.private)


@pytest.fixture(scope="module")
def plain(packed: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle, and nothing else."""
    return released([packed.path], "digits@1.0.0", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def signed(packed: Bundle, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released([packed.path], "digits@1.0.0", tmp_path_factory.mktemp("signed"), "--key", keys.private)


@pytest.fixture(scope="module")
def another(packed: Bundle, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed by the same key."""
    return released([packed.path], "digits@2.0.0", tmp_path_factory.mktemp("another"), "--key", keys.private)


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "copy"))


# ---- what it holds -----------------------------------------------------------------------------------------


def test_a_release_holds_its_bundles_and_its_papers(whole: Path, made: Made) -> None:
    found = Release.open(whole)
    assert set(found.bundles) == {"onnxruntime-float32", "onnxruntime-int8"}
    for name, bundle in found.bundles.items():
        assert bundle.key == made.bundles[name].key
        assert found.digest(name) == digest(bundle.path)
    papers = {"README.md", "bom.cdx.json", "provenance.json", "SHA256SUMS", "CHANGELOG.md"}
    assert papers <= set(found.manifest.files)
    assert sorted(path.name for path in whole.iterdir()) == sorted(
        {*papers, MANIFEST, "model.sig", "bundles", "report"}
    )
    assert (whole / "report" / "report.html").is_file()
    assert found.facts.title == "digits@1.0.0" and found.facts.verdict is None


def test_the_sums_are_those_of_sha256sum(whole: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"], cwd=whole, check=False)
    assert done.returncode == 0
    named_ones = {line.split("  ", 1)[1] for line in (whole / "SHA256SUMS").read_text().splitlines()}
    assert named_ones == set(Release.open(whole).manifest.files) - {"SHA256SUMS"}


def test_the_card_is_one_that_the_hub_reads(whole: Path, made: Made) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(whole / "README.md")
    head = card.data.to_dict()
    assert head["pipeline_tag"] == "image-classification" and head["library_name"] == "kdpipe"
    assert head["license"] == "unknown" and head["version"] == "1.0.0"
    metrics = [metric for result in head["model-index"][0]["results"] for metric in result["metrics"]]
    results = made.measurement.facts.results
    assert {metric["name"]: metric["value"] for metric in metrics} == {
        f"top-1 of {name}": round(results[name].accuracy.value, 6)
        for name in ("onnxruntime-float32", "onnxruntime-int8")
    }
    text = card.text
    assert "Nothing gated this release" in text
    assert "By class" in text and all(f"| {digit} |" in text for digit in range(10))
    assert "On local" in text and "p50, ms" in text and "not to be trusted" in text  # of two rounds
    assert "calibration error" in text and "Teacher: test\\_resnet" in text and "method kd" in text
    assert "- Data: digits, 10 classes" in text


def test_a_release_without_a_report_says_so(plain: Path) -> None:
    text = (plain / "README.md").read_text()
    assert "No report was given: nothing is told of latency" in text and "Nothing gated this release" in text


def test_the_bill_is_one_of_cyclonedx(whole: Path, made: Made) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (whole / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"], root["type"]) == ("digits", "1.0.0", "machine-learning-model")
    assert root["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["type"] == "top-1"
    by_ref = {each["bom-ref"]: each for each in bill["components"]}
    [hashed] = by_ref["bundle:onnxruntime-int8"]["hashes"]
    entry = made.bundles["onnxruntime-int8"].manifest.files["model.onnx"]
    assert hashed == {"alg": "SHA-256", "content": entry.sha256}
    behind = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    assert behind[root["bom-ref"]] == ["bundle:onnxruntime-float32", "bundle:onnxruntime-int8"]
    assert {ref.partition(":")[0] for ref in behind["bundle:onnxruntime-int8"]} == {"network", "data"}
    assert "tool:onnxruntime" in by_ref and by_ref["tool:onnxruntime"]["purl"].startswith("pkg:pypi/onnxruntime@")


def test_the_provenance_is_a_statement_of_every_file_of_the_bundles(whole: Path) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement, statement_pb2

    value = json.loads((whole / "provenance.json").read_text())
    parsed = json_format.ParseDict(value, statement_pb2.Statement())
    statement.Statement.copy_from_pb(parsed).validate()
    files = Release.open(whole).manifest.files
    assert {each["name"]: each["digest"]["sha256"] for each in value["subject"]} == {
        name: record.sha256 for name, record in files.items() if name.startswith("bundles/")
    }
    build = value["predicate"]["buildDefinition"]
    assert value["predicateType"] == "https://slsa.dev/provenance/v1"
    assert build["externalParameters"]["version"] == "1.0.0"
    kinds = {each["name"].split()[0] for each in build["resolvedDependencies"]}
    assert {"bundle", "model", "graph", "checkpoint", "dataset"} <= kinds


def test_no_path_of_the_machine_is_in_the_papers(photos: Path) -> None:
    assert licences.called(str(photos)) == "photos"
    assert licences.called("hfds/food101") == "hfds/food101"


def test_what_changed_since_the_last_release_is_told(made: Made, whole: Path, tmp_path: Path) -> None:
    bundles = [made.bundles[name].path for name in ("onnxruntime-int8", "openvino-float32")]
    done = released(bundles, "digits@1.1.0", tmp_path, "--last", whole)
    text = (done / "CHANGELOG.md").read_text()
    assert "Against digits\\@1.0.0" in text
    assert "- onnxruntime-int8: the same" in text and "- openvino-float32: new" in text
    assert "- onnxruntime-float32: no longer there" in text


def test_a_recipe_is_released_with_all_that_it_made(made: Made, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL_RECIPE))
    done = kdpipe(
        *("release", "small@0.1.0", "--recipe", tmp_path / "small.yaml", "--artifacts", made.chain.folder),
        *("--to", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = Release.open(tmp_path / "out" / "small" / "0.1.0")
    assert set(found.bundles) == set(made.bundles)
    assert read_manifest(found.path / "report").kind == "report"
    assert kdpipe("show", found.path).returncode == 0


# ---- unchanged, and signed by whom -------------------------------------------------------------------------


def test_unchanged_and_signed_are_two_sentences(signed: Path, plain: Path, keys: Keys) -> None:
    done = kdpipe("verify", signed, "--signature", keys.public)
    assert done.returncode == 0, done.stderr
    unchanged, by, golden = done.stdout.splitlines()
    assert ": unchanged: " in unchanged and " signed" not in unchanged
    assert f"signed by the holder of {keys.public}" in by and " unchanged" not in by
    assert golden.startswith("onnxruntime-float32: 8 golden images within")
    unasked = kdpipe("verify", signed)
    assert unasked.returncode == 0 and "signed, and nobody checked by whom" in unasked.stdout
    assert "signed by" not in unasked.stdout
    assert "not signed: hashes do not say whom it is from" in kdpipe("verify", plain).stdout
    found = json.loads(kdpipe("verify", signed, "--signature", keys.public, "--json").stdout)
    assert (found["unchanged"], found["signed"], found["signed_by"]) == (True, True, f"the holder of {keys.public}")
    assert json.loads(kdpipe("verify", signed, "--json").stdout)["signed_by"] is None


def test_a_bundle_in_a_release_is_vouched_for_by_the_release(signed: Path, packed: Bundle, keys: Keys) -> None:
    done = kdpipe("verify", signed / "bundles" / "onnxruntime-float32", "--signature", keys.public)
    assert done.returncode == 0 and f"signed by the holder of {keys.public}" in done.stdout
    assert_one_line(kdpipe("verify", packed.path, "--signature", keys.public), 1, "is not signed", "in none")


def test_the_librarys_own_command_agrees(signed: Path, keys: Keys) -> None:
    """Whoever has the OpenSSF's tool and no kdpipe checks the same signature."""
    line = [sys.executable, "-m", "model_signing", "verify", "key", signed, "--signature", signed / "model.sig"]
    more = ["--ignore-paths", signed / "model.sig", "--public_key", keys.public]
    done = subprocess.run([*line, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def test_verifying_needs_neither_torch_nor_a_runtime(signed: Path, keys: Keys) -> None:
    """Where nothing of the kind can be imported, hashes and signature are checked all the same."""
    blocked = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime")
    script = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name.partition('.')[0] in {blocked}:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from kdpipe.cli import main\n"
        "main()\n"
    )
    line = [sys.executable, "-c", script, "verify", signed, "--signature", keys.public]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"signed by the holder of {keys.public}" in done.stdout
    assert "not replayed: onnxruntime is not installed here" in done.stdout


Alter = Callable[[Path, Path], object]


def payload(change: Callable[[dict[str, Any]], object]) -> Alter:
    """The statement in a signature, which was signed as it was."""

    def alter(folder: Path, _: Path) -> None:
        value = json.loads((folder / "model.sig").read_text())
        statement = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
        change(statement)
        value["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
        (folder / "model.sig").write_text(json.dumps(value))

    return alter


def signature_is(content: bytes) -> Alter:
    return lambda folder, _: (folder / "model.sig").write_bytes(content)


def resealed(name: str, content: bytes) -> Alter:
    """A file is replaced, and every hash and digest made to fit again: what a stranger can do."""
    return lambda folder, _: replace_file(folder, name, content)


def in_place_of_signature(make: Callable[[Path], object]) -> Alter:
    def alter(folder: Path, _: Path) -> None:
        (folder / "model.sig").unlink()
        make(folder / "model.sig")

    return alter


def added(name: str, *, told: bool) -> Alter:
    def alter(folder: Path, _: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        if told:
            replace_file(folder, name, b"x")
        else:
            (folder / name).write_bytes(b"x")

    return alter


def removed(name: str) -> Alter:
    def alter(folder: Path, _: Path) -> None:
        (folder / name).unlink()
        rewrite_manifest(folder, lambda value: value["files"].pop(name))

    return alter


def resources(change: Callable[[list[dict[str, str]]], object]) -> Alter:
    return payload(lambda value: change(value["predicate"]["resources"]))


# How a signed release was altered, and how the command ends: 1 where somebody's word does not hold, 2 where what lies
# there is no release.
SIGNATURES: dict[str, tuple[Alter, int, tuple[str, ...]]] = {
    "stripped": (lambda folder, _: (folder / "model.sig").unlink(), 1, ("is not signed", "has no model.sig")),
    "of another release": (
        lambda folder, other: shutil.copyfile(other / "model.sig", folder / "model.sig"),
        1,
        ("of other contents", "another release"),
    ),
    "another release under it": (
        lambda folder, other: [
            signed := (folder / "model.sig").read_bytes(),
            shutil.rmtree(folder),
            shutil.copytree(other, folder),
            (folder / "model.sig").write_bytes(signed),
        ],
        1,
        ("of other contents",),
    ),
    "a file changed, hashes and all": (resealed("README.md", b"# better\n"), 1, ("of other contents",)),
    "a file added, hashes and all": (added("more.txt", told=True), 1, ("of other contents",)),
    "a file that git ignores": (added(".gitattributes", told=True), 1, ("of other contents",)),
    "a folder that git keeps": (added(".git/config", told=True), 1, ("of other contents",)),
    "a file removed, hashes and all": (removed("CHANGELOG.md"), 1, ("of other contents",)),
    "a file changed": (lambda folder, _: flip_a_byte(folder / "README.md"), 2, ("README.md differs",)),
    "a file added": (added("more.txt", told=False), 2, ("holds 'more.txt'",)),
    "a file added that git ignores": (added(".gitattributes", told=False), 2, ("holds '.gitattributes'",)),
    "a file removed": (lambda folder, _: (folder / "CHANGELOG.md").unlink(), 2, ("lacks 'CHANGELOG.md'",)),
    "the title changed": (
        lambda folder, _: rewrite_manifest(folder, lambda value: value["facts"].update(version="9.9.9")),
        1,
        ("of other contents",),
    ),
    "a verdict made up": (
        lambda folder, _: rewrite_manifest(folder, lambda value: value["facts"].update(verdict="pass")),
        1,
        ("of other contents",),
    ),
    "a statement changed": (
        resources(lambda value: value[0].update(digest="0" * 64)), 1, ("is not signed by", "did not make")
    ),
    "a statement of nothing": (resources(lambda value: value.clear()), 1, ("is not signed by",)),
    "a name twice in the signature": (
        lambda folder, _: (folder / "model.sig").write_text(
            (folder / "model.sig").read_text().replace("{", '{"mediaType": "x",', 1)
        ),
        1,
        ("is no signature", "given twice"),
    ),
    "a link": (in_place_of_signature(lambda path: path.symlink_to("/etc/passwd")), 2, ("model.sig", "link")),
    "a pipe": (in_place_of_signature(os.mkfifo), 2, ("model.sig", "special file")),
    "a folder": (in_place_of_signature(Path.mkdir), 1, ("no signature", "folder or a special file")),
    "nothing in it": (signature_is(b""), 1, ("is no signature",)),
    "no JSON": (signature_is(b"\x00\xff" * 50), 1, ("is no signature", "not UTF-8")),
    "a list": (signature_is(b"[]"), 1, ("is no signature", "no statement")),
    "null": (signature_is(b"null"), 1, ("is no signature",)),
    "an empty mapping": (signature_is(b"{}"), 1, ("is no signature", "no statement")),
    "levels without end": (signature_is(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), 1, ("too many levels",)),
    "20 GiB of nothing": (
        in_place_of_signature(lambda path: path.open("wb").truncate(20 * 2**30)), 1, ("bytes: wanted at most",)
    ),
    "a payload that is no base64": (
        signature_is(json.dumps({"dsseEnvelope": {"payload": "***"}}).encode()), 1, ("no statement",)
    ),
    "control characters": (signature_is(b'{"mediaType": "\\u001b]0;owned"}'), 1, ("is no signature", "\\x1b")),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_an_altered_release_is_never_told_to_be_signed(copy: Path, name: str, keys: Keys, another: Path) -> None:
    alter, exit_code, words = SIGNATURES[name]
    alter(copy, another)
    done = kdpipe("verify", copy, "--signature", keys.public)
    assert_one_line(done, exit_code, *words)
    assert "signed by" not in done.stdout and not done.stdout
    assert not UNPRINTABLE.search(done.stderr.rstrip("\n")) and len(done.stderr) < 2100


def test_another_key_and_what_is_no_key(signed: Path, keys: Keys, tmp_path: Path) -> None:
    assert_one_line(kdpipe("verify", signed, "--signature", keys.other), 1, "is not signed by the holder of")
    (tmp_path / "empty.pem").touch()
    (tmp_path / "text.pem").write_text("-----BEGIN PUBLIC KEY-----\nnone\n-----END PUBLIC KEY-----\n")
    os.mkfifo(tmp_path / "pipe.pem")
    for path, words in (
        (keys.private, "is a private key"),
        (tmp_path / "none.pem", "no file at"),
        (tmp_path / "empty.pem", "is no public key"),
        (tmp_path / "text.pem", "is no public key"),
        (tmp_path / "pipe.pem", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        assert_one_line(kdpipe("verify", signed, "--signature", path), 2, "--signature", words)
    assert_one_line(kdpipe("verify", signed, "--identity", "me"), 2, "--identity and --issuer go together")


def test_what_is_no_key_to_sign_with(
    packed: Bundle, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before any work; nothing of a key is told."""
    (tmp_path / "cut.pem").write_bytes(keys.private.read_bytes()[:-60])
    secret = keys.private.read_text().splitlines()[1]
    for path, words in (
        (keys.public, "is a public key"),
        (keys.edwards, "is no private key to sign with"),
        (keys.encrypted, "is encrypted: set KDPIPE_KEY_PASSWORD"),
        (tmp_path / "cut.pem", "is no private key to sign with"),
        (tmp_path / "none.pem", "no file at"),
    ):
        done = kdpipe("release", "digits@1.0.0", packed.path, "--to", tmp_path / "out", "--key", path)
        assert_one_line(done, 2, "--key", words)
        assert secret not in done.stderr and not (tmp_path / "out").exists()
    monkeypatch.setenv(signature.PASSWORD, "wrong")
    done = kdpipe("release", "digits@1.0.0", packed.path, "--to", tmp_path / "out", "--key", keys.encrypted)
    assert_one_line(done, 2, "or its password is another")
    monkeypatch.setenv(signature.PASSWORD, "secret")
    done_path = released([packed.path], "digits@1.0.0", tmp_path / "out", "--key", keys.encrypted)
    monkeypatch.delenv(signature.PASSWORD)
    assert kdpipe("verify", done_path, "--signature", keys.public).returncode == 0
    assert not [path for path in done_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_without_an_identity_sigstore_signs_nothing(packed: Bundle, tmp_path: Path) -> None:
    done = kdpipe("release", "digits@1.0.0", packed.path, "--to", tmp_path, "--sigstore")
    assert_one_line(done, 2, "no identity to sign as", "--key PRIVATE.pem")
    assert not list(tmp_path.iterdir())


# ---- publishing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("digits", "wanted NAME@VERSION"),
        ("../x@1.0.0", "wanted NAME@VERSION"),
        ("a/b@1.0.0", "wanted NAME@VERSION"),
        ("a\x1b]0;b@1.0.0", "\\x1b"),
        (".hidden@1.0.0", "wanted NAME@VERSION"),
        ("x.part@1.0.0", "wanted NAME@VERSION"),
        ("Ziffern-äöü@1.0.0", "wanted NAME@VERSION"),
        ("digits@1.0", "is no version"),
        ("digits@../1.0.0", "is no version"),
        ("digits@1.0.0/..", "is no version"),
        ("digits@01.0.0", "is no version"),
        ("digits@1.0.0+build", "is no version"),
        ("digits@1.0.0-a.part", "is no version"),
        ("digits@1.0.0-" + "a" * 100, "is no version"),
        ("digits@1.0.0\n", "is no version"),
        ("digits@１.0.0", "is no version"),
        ("digits@latest", "names no version"),
    ],
)
def test_a_name_or_version_that_is_none(packed: Bundle, tmp_path: Path, title: str, words: str) -> None:
    done = kdpipe("release", title, packed.path, "--to", tmp_path)
    assert_one_line(done, 2, words)
    assert not list(tmp_path.iterdir()) and not UNPRINTABLE.search(done.stderr.rstrip("\n"))


def test_a_version_is_never_overwritten(plain: Path, packed: Bundle) -> None:
    before = digest(plain)
    for to in (plain.parent.parent, f"file://{plain.parent.parent}"):
        done = kdpipe("release", "digits@1.0.0", packed.path, "--to", to)
        assert_one_line(done, 2, "is there already", "never overwritten")
    assert digest(plain) == before and [path.name for path in plain.parent.iterdir()] == ["1.0.0"]


def test_of_two_who_release_the_same_one_is_told_so(packed: Bundle, tmp_path: Path) -> None:
    line = command("release", "digits@1.0.0", packed.path, "--to", tmp_path)
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [each.communicate(timeout=1800)[1] for each in both]
    assert sorted(each.returncode for each in both) == [0, 2], told
    [lost] = [text for each, text in zip(both, told, strict=True) if each.returncode]
    assert len(lost.splitlines()) == 1 and ("another process" in lost or "already" in lost), lost
    assert release.check(tmp_path / "digits" / "1.0.0").release.facts.title == "digits@1.0.0"
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_a_release_that_fails_leaves_nothing(packed: Bundle, tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        assert (folder / MANIFEST).is_file()
        raise UserError("the signer is not there")

    wish = release.Wish("digits", Version.parse("1.0.0"), {"one": packed})
    with pytest.raises(UserError, match="the signer is not there"):
        release.release(wish, str(tmp_path), refuse)
    assert not list((tmp_path / "digits").iterdir())


def test_a_release_that_was_killed_is_none_and_is_made_again(packed: Bundle, tmp_path: Path) -> None:
    """At the last moment: sealed, and not signed yet."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from kdpipe.core.kinds import Bundle\n"
        "from kdpipe.deploy import release\n"
        "from kdpipe.deploy.versions import Version\n"
        "wish = release.Wish('digits', Version.parse('1.0.0'), {'one': Bundle.open(sys.argv[1])})\n"
        "release.release(wish, sys.argv[2], lambda folder: os.kill(os.getpid(), 9))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, packed.path, tmp_path], capture_output=True, check=False)
    assert killed.returncode == -9
    assert (tmp_path / "digits" / "1.0.0.part" / MANIFEST).is_file()
    done = kdpipe("pull", "digits@latest", "--from", tmp_path, "--out", tmp_path / "got")
    assert_one_line(done, 2, "no release of 'digits'")
    assert released([packed.path], "digits@1.0.0", tmp_path).is_dir()
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_what_cannot_be_released(packed: Bundle, plain: Path, made: Made, tmp_path: Path) -> None:
    def attempt(*arguments: object) -> subprocess.CompletedProcess[str]:
        return kdpipe("release", "digits@1.0.0", *arguments, "--to", tmp_path / "out")

    assert_one_line(attempt(), 2, "wanted the folders of bundles, or --recipe")
    assert_one_line(attempt(plain), 2, "is a release, wanted a bundle")
    assert_one_line(attempt(packed.path, packed.path), 2, "a bundle is named twice")
    other = made.bundles["openvino-float32"].path
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({**SMALL_RECIPE, "name": "other", "package": {"golden_images": 3}})
    )
    done = attempt("--recipe", tmp_path / "tiny.yaml", "--artifacts", tmp_path / "artifacts")
    assert_one_line(done, 2, "no bundle of 'other' is sealed", "kdpipe run the recipe first")
    assert_one_line(attempt(other, "--report", packed.path), 2, "is a bundle, wanted a report")
    assert_one_line(attempt(other, "--license", "a\nb"), 2, "license")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_release(packed: Bundle, tmp_path: Path) -> None:
    """A real file system that has room for a part of it, in a mount namespace of its own."""
    (tmp_path / "disk").mkdir()
    line = " ".join(command("release", "digits@1.0.0", packed.path, "--to", tmp_path / "disk"))
    inside = f"mount -t tmpfs -o size=64k none {tmp_path}/disk && {{ {line}; echo code $?; find {tmp_path}/disk/*; }}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["code 2", f"{tmp_path}/disk/digits"], done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "no disk space left" in done.stderr, done.stderr


# ---- the gate's verdict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "exit_code"), [("pass", 0), ("fail", 1), ("cannot tell", 75)])
def test_a_verdict_decides(packed: Bundle, tmp_path: Path, answer: str, exit_code: int) -> None:
    verdict = judged(packed, answer, tmp_path / "verdict")
    done = kdpipe("release", "digits@1.0.0", packed.path, "--verdict", verdict, "--to", tmp_path / "out")
    if exit_code:
        assert_one_line(done, exit_code, f"is '{answer}'", "was not released")
        assert not (tmp_path / "out").exists()
        return
    assert done.returncode == 0 and "the gate said pass" in done.stdout, done.stderr
    found = Release.open(tmp_path / "out" / "digits" / "1.0.0")
    assert found.facts.verdict == "pass"
    assert "The gate's answer was **pass**" in (found.path / "README.md").read_text()
    assert (found.path / "verdict" / "comment.md").is_file()


def test_a_verdict_on_other_bundles_is_none(packed: Bundle, made: Made, tmp_path: Path) -> None:
    verdict = judged(packed, "pass", tmp_path / "verdict")
    other = made.bundles["openvino-float32"].path
    done = kdpipe("release", "digits@1.0.0", other, "--verdict", verdict, "--to", tmp_path / "out")
    assert_one_line(done, 2, "is no verdict on openvino-float32")


def judged(bundle: Bundle, answer: str, out: Path) -> Path:
    """A verdict as the gate seals it."""
    config = GateConfig(rules=("size <= 1.1 x baseline",), candidate="x", baseline=None)
    with drafting(Verdict, Order("gate", config, {"candidate": bundle}), out) as draft:
        write_json(draft.path / Verdict.NUMBERS, {})
        (draft.path / Verdict.COMMENT).write_text("# a comment\n")
        (draft.path / Verdict.JUNIT).write_text("<testsuites/>\n")
        draft.facts = VerdictFacts.model_validate(
            {"answer": answer, "candidate": "x", "baseline": None, "rules": [], "changed": {}, "since": {}, "apart": []}
        )
    return out


# ---- getting one -------------------------------------------------------------------------------------------


def test_versions_stand_in_semantic_order() -> None:
    """The order of semver.org's own example, and numbers that are not compared as text."""
    texts = (
        *("1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11"),
        *("1.0.0-rc.1", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0-rc.1", "2.0.0", "10.0.0"),
    )
    ordered = [Version.parse(text) for text in texts]
    assert sorted(ordered, key=lambda version: version) == ordered and max(ordered[::-1]) == ordered[-1]
    assert newest("x", ordered[:-2], "here").text == "1.10.0"  # a pre-release only where there is nothing else
    assert newest("x", ordered[:3], "here").text == "1.0.0-alpha.beta"
    assert named("birds@latest") == ("birds", None)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store():
        yield f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.mark.parametrize("place", ["folder", "file://", "s3://"])
def test_pull_brings_the_newest(
    packed: Bundle, keys: Keys, tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    """From a folder, and from file systems of fsspec, an object store among them."""
    to = {"folder": str(tmp_path / "to"), "file://": f"file://{tmp_path}/to"}.get(place)
    to = to or request.getfixturevalue("bucket")
    for version in ("1.9.0", "1.10.0", "2.0.0-rc.1"):
        done = kdpipe("release", f"digits@{version}", packed.path, "--to", to, "--key", keys.private)
        assert done.returncode == 0, done.stderr
    again = kdpipe("release", "digits@1.9.0", packed.path, "--to", to)
    assert_one_line(again, 2, "is there already", "never overwritten")
    done = kdpipe("pull", "digits@latest", "--from", to, "--out", tmp_path / "got", "--signature", keys.public)
    assert done.returncode == 0, done.stderr
    got = tmp_path / "got"
    assert f"{got}: unchanged" in done.stdout and f"{got}: signed by the holder of {keys.public}" in done.stdout
    assert Release.open(got).facts.title == "digits@1.10.0" and not (tmp_path / ".got").exists()
    before = os.lstat(got).st_mtime_ns
    assert kdpipe("pull", "digits@1.10.0", "--from", to, "--out", got).returncode == 0
    assert os.lstat(got).st_mtime_ns == before
    assert_one_line(kdpipe("pull", "digits@1.9.0", "--from", to, "--out", got), 2, "is digits@1.10.0, wanted")
    assert_one_line(kdpipe("pull", "digits@3.0.0", "--from", to, "--out", tmp_path / "none"), 2, "nothing at")
    assert_one_line(
        kdpipe("pull", "other@latest", "--from", to, "--out", tmp_path / "none"), 2, "no release of 'other'"
    )
    done = kdpipe("pull", "digits@latest", "--from", to, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["release"] == "releases/digits/1.10.0"
    assert [path.name for path in (tmp_path / "releases" / "digits").iterdir()] == ["1.10.0"]


def test_nothing_appears_of_a_release_that_is_not_what_was_asked_for(
    signed: Path, plain: Path, keys: Keys, tmp_path: Path
) -> None:
    def offered(source: Path, alter: Callable[[Path], object] = lambda _: None, version: str = "1.0.0") -> str:
        to = tmp_path / "to"
        shutil.rmtree(to, ignore_errors=True)
        place = shutil.copytree(source, to / "digits" / version)
        alter(Path(place))
        return str(to)

    def attempt(to: str, title: str = "digits@1.0.0") -> subprocess.CompletedProcess[str]:
        return kdpipe("pull", title, "--from", to, "--out", tmp_path / "got", "--signature", keys.public)

    assert_one_line(attempt(offered(plain)), 1, "is not signed")
    assert_one_line(
        attempt(offered(signed, version="2.0.0"), "digits@2.0.0"), 2, "is digits@1.0.0, wanted digits@2.0.0"
    )
    for alter, exit_code, words in (
        (lambda folder: replace_file(folder, "README.md", b"x"), 1, "of other contents"),
        (lambda folder: flip_a_byte(folder / "README.md"), 2, "README.md differs"),
        (lambda folder: (folder / "bundles/onnxruntime-float32/model.onnx").unlink(), 2, "model.onnx"),
        (lambda folder: (folder / "model.sig").unlink(), 1, "is not signed"),
    ):
        assert_one_line(attempt(offered(signed, alter)), exit_code, words)
        assert not (tmp_path / "got").exists()
    assert attempt(offered(signed)).returncode == 0
    assert Release.open(tmp_path / "got").facts.title == "digits@1.0.0" and not (tmp_path / ".got").exists()


def test_a_stranger_cannot_put_a_bundle_beside_those_that_are_named(copy: Path) -> None:
    shutil.copytree(copy / "bundles" / "onnxruntime-float32", copy / "bundles" / "more")
    files = {
        f"bundles/more/{path.relative_to(copy / 'bundles' / 'more').as_posix()}": path
        for path in (copy / "bundles" / "more").rglob("*")
        if path.is_file()
    }
    for name, path in files.items():
        replace_file(copy, name, path.read_bytes())
    assert_one_line(kdpipe("verify", copy), 2, "has a bundle 'more' too many or too few")
    rewrite_manifest(copy, lambda value: value["facts"].update(bundles=["../../x"]))
    assert_one_line(kdpipe("verify", copy), 2, "'bundles.0'")


# ---- deploying one -----------------------------------------------------------------------------------------


def test_a_release_is_deployed_with_its_digest_pinned(signed: Path, plain: Path, keys: Keys, whole: Path) -> None:
    name = Release.open(signed).digest("onnxruntime-float32")
    done = kdpipe("deploy", signed, "--signature", keys.public, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["live"]["digest"] == name
    inside = whole / "bundles" / "onnxruntime-int8"
    done = kdpipe("deploy", inside, "--signature", keys.public, "--json")
    live = json.loads(done.stdout)["live"]["digest"]
    assert live == Release.open(whole).digest("onnxruntime-int8")
    for path, exit_code, words in (
        (plain, 1, ("is not signed",)),
        (whole, 2, ("has 2 bundles", "name one, such as")),
        (whole / "bundles" / "other", 2, ("has no bundle 'other'",)),
    ):
        assert_one_line(kdpipe("deploy", path, "--signature", keys.public), exit_code, *words)
    assert_one_line(kdpipe("deploy", whole, "--signature", keys.other), 1, "is not signed by the holder of")
    assert_one_line(kdpipe("deploy", "--rollback", "--signature", keys.public), 2, "was checked then")
    assert (
        json.loads(kdpipe("devices", "status", "local", "--json").stdout)["devices"]["local"]["live"]["digest"] == live
    )


def test_what_is_changed_after_it_was_checked_never_becomes_live(
    copy: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the push somebody puts another bundle there, whole in itself."""
    from kdpipe.deploy import install

    here = copy / "bundles" / "onnxruntime-float32"
    device = find_device("local")
    before = install.status(device).live
    checked = install.chosen

    def chosen(path: Path, by: Any = None) -> tuple[Path, str | None]:
        found = checked(path, by)
        rewrite_manifest(here, lambda value: value.update(created_utc="2001-01-01T00:00:00+00:00"))
        return found

    monkeypatch.setattr(install, "chosen", chosen)
    assert_one_line(kdpipe("deploy", copy, "--signature", keys.public), 1, "was changed after its release was checked")
    after = install.status(device).live
    assert (after and after.digest) == (before and before.digest)


# ---- licences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "meaning"),
    [
        ("Apache-2.0", None),
        ("apache-2.0", None),  # as timm writes it
        ("MIT", None),
        ("CC-BY-4.0", None),
        ("CC0-1.0", None),
        ("unknown", None),
        ("MIT AND BSD-3-Clause", None),
        ("GPL-3.0-only", "copyleft"),
        ("AGPL-3.0-or-later", "copyleft"),
        ("LGPL-2.1-only", "copyleft"),
        ("CC-BY-SA-4.0", "copyleft"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "copyleft"),
        ("CC-BY-NC-4.0", "non-commercial"),
        ("cc-by-nc-sa-4.0", "non-commercial"),
        ("MIT OR GPL-3.0-only", None),
        ("MIT AND GPL-3.0-only", "copyleft"),
        ("(MIT OR GPL-3.0-only) AND CC-BY-NC-4.0", "non-commercial"),
        ("CC-BY-ND-4.0", "not for every use"),
        ("LicenseRef-ImageNet", "not one that SPDX lists"),
        ("for research only", "not one that SPDX lists"),
        ("MIT AND", "no SPDX expression"),
        ("(" * 150, "no SPDX expression"),
        ("MIT\x1b", "no SPDX expression"),
    ],
)
def test_what_a_licence_means_to_somebody_who_ships(licence: str, meaning: str | None) -> None:
    assert licences.restriction(licence) == meaning


def test_a_licence_that_binds_is_named_before_a_release(packed: Bundle, tmp_path: Path) -> None:
    def of_data(licence: str | None) -> Path:
        path = tmp_path / f"bundle-{licence}"
        shutil.copytree(packed.path, path)

        def change(value: dict[str, Any]) -> None:
            for source in value["inputs"].values():
                change(source)
                if source["kind"] == "dataset":
                    source["facts"]["license"] = licence

        rewrite_manifest(path, change)
        return path

    bound = of_data("CC-BY-NC-4.0")
    done = kdpipe("release", "digits@1.0.0", bound, "--to", tmp_path / "out")
    assert_one_line(done, 1, "data digits is under CC-BY-NC-4.0 (non-commercial)", "--acknowledge 'CC-BY-NC-4.0'")
    assert not (tmp_path / "out").exists()
    other = kdpipe("release", "digits@1.0.0", bound, "--to", tmp_path / "out", "--acknowledge", "MIT")
    assert other.returncode == 1
    made_one = released([bound], "digits@1.0.0", tmp_path / "out", "--acknowledge", "CC-BY-NC-4.0", "--license", "MIT")
    assert Release.open(made_one).facts.licences == {"data digits": "CC-BY-NC-4.0"}
    assert Release.open(made_one).settings["acknowledged"] == ["CC-BY-NC-4.0"]
    text = (made_one / "README.md").read_text()
    assert "| data digits | CC-BY-NC-4.0 |" in text and "| this release | MIT |" in text and "license: mit" in text
    free = Release.open(released([of_data("CC-BY-4.0")], "digits@1.1.0", tmp_path / "out"))
    assert free.facts.licences == {"data digits": "CC-BY-4.0"}
    bill = json.loads((free.path / "bom.cdx.json").read_text())
    [data] = [each for each in bill["components"] if each["type"] == "data"]
    assert data["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]


def test_licences_are_said_in_a_recipe_and_change_no_key(tmp_path: Path) -> None:
    from kdpipe.core.config import DataConfig

    values = {**SMALL_RECIPE, "data": {**SMALL_RECIPE["data"], "license": "CC-BY-4.0"}}
    values["teacher"] = {**SMALL_RECIPE["teacher"], "license": "Apache-2.0"}
    (tmp_path / "said.yaml").write_text(yaml.safe_dump(values))
    recipe = read_recipe(tmp_path / "said.yaml")
    assert (recipe.data.license, recipe.teacher.license) == ("CC-BY-4.0", "Apache-2.0")
    assert "license" not in recipe.data.model_dump() and "license" not in recipe.teacher.model_dump()
    config = DataConfig.of(recipe.data, decoding=1, fingerprint="x")
    assert config.license == "CC-BY-4.0" and "license" not in config.model_dump(mode="json")
    values["data"]["license"] = "a\x1bb"
    (tmp_path / "said.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"data\.license"):
        read_recipe(tmp_path / "said.yaml")


def test_a_pretrained_networks_licence_is_what_timm_says() -> None:
    import timm

    from kdpipe.core.config import AdoptConfig
    from kdpipe.networks.models import license_of

    known = timm.models.get_pretrained_cfg("resnet18.a1_in1k").license
    assert known
    assert license_of(AdoptConfig(model="resnet18.a1_in1k", pretrained=True)) == known
    assert license_of(AdoptConfig(model="resnet18.a1_in1k", pretrained=True, license="MIT")) == "MIT"
    assert license_of(AdoptConfig(model="resnet18.a1_in1k")) is None


# ---- the Hub -----------------------------------------------------------------------------------------------


def test_without_a_token_nothing_is_sent_to_the_hub(
    packed: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = kdpipe("release", "digits@1.0.0", packed.path, "--to", "hf://birds/digits")
    assert_one_line(done, 2, "no token to write to hf://birds/digits", "HF_TOKEN")
    for wrong in ("hf://", "hf://one", "hf://a/b/c", "hf://a/../b", "hf://datasets/a/b"):
        assert_one_line(kdpipe("release", "digits@1.0.0", packed.path, "--to", wrong), 2, "wanted hf://")


def test_all_of_a_release_would_go_to_the_hub(signed: Path) -> None:
    """The Hub's client leaves some files out by itself; none of ours. It asks whether the card's head is sound."""
    from huggingface_hub import HfApi

    class Sound(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"errors": [], "warnings": []}')

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Sound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = HfApi(endpoint=f"http://127.0.0.1:{server.server_address[1]}")
        operations = client._prepare_upload_folder_additions(signed, path_in_repo="")
        server.shutdown()
    files = {path.relative_to(signed).as_posix() for path in signed.rglob("*") if path.is_file()}
    assert {each.path_in_repo for each in operations} == files and "model.sig" in files


def test_a_token_is_never_told(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Hub answers on that port."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 30)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as refused:
        shelf.Hub("birds/digits").put(plain, "digits", Version.parse("1.0.0"))
    assert "cannot ask hf://birds/digits" in str(refused.value) and "ssss" not in str(refused.value)


# ---- Markdown ----------------------------------------------------------------------------------------------


def test_names_of_somebody_elses_do_not_become_markdown() -> None:
    evil = "a|b`c`<img src=x onerror=alert(1)>[x](http://y) **z** \x1b[31m # h ![i](j) $m$ @all"
    text = markdown(evil)
    assert "\x1b" not in text
    assert not re.search(r"(?<!\\)[|`<>\[\]()*#!$@]", text)
