"""Who a release is from: signed and checked by OpenSSF's model-signing, over every file but the signature itself.

A hash says that nothing changed since somebody computed it, and anybody can. Only what is here says from whom. What a
stranger wrote is limited before the library reads it, and what the library accepts must cover the manifest, which in
its turn names every file.
"""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import sealed
from ..core.artifact import LARGEST_BESIDE_BYTES, MANIFEST, sha256_file
from ..core.errors import GateFailed, UserError
from ..core.kinds import Release
from ..core.proc import first_line, quiet, require
from ..core.sealed import MIB, Unsound, printable

LARGEST_KEY_BYTES = MIB
PASSWORD = "KDPIPE_KEY_PASSWORD"  # of an encrypted key; never an option, which others on the machine could read
NEEDS = ("model-signing",)


@dataclass(frozen=True)
class KeyFile:
    """The public key of somebody, PEM: P-256, P-384 or P-521."""

    path: Path

    @property
    def words(self) -> str:
        """Whose signature it checks."""
        return f"the holder of {self.path}"


@dataclass(frozen=True)
class Identity:
    """Somebody whom an issuer of OpenID Connect knows, such as a workflow of GitHub."""

    name: str
    issuer: str

    @property
    def words(self) -> str:
        """Whose signature it checks."""
        return f"{self.name}, as {self.issuer} says (sigstore; not exercised by kdpipe's tests)"


Signer = KeyFile | Identity


def signer(key: Path | None, identity: str | None = None, issuer: str | None = None) -> Signer | None:
    """Whom the options of a command name. Raises UserError for half of it, or both."""
    if (identity is None) != (issuer is None):
        raise UserError("--identity and --issuer go together: who signed, and who vouches for that")
    if key is not None and identity is not None:
        raise UserError("wanted --signature KEY or --identity, and not both: a release has one signature")
    if identity is not None and issuer is not None:
        return Identity(identity, issuer)
    return None if key is None else KeyFile(key)


# ---- signing -----------------------------------------------------------------------------------------------


def by_key(path: Path) -> Callable[[Path], None]:
    """What signs a sealed folder with the private key in ``path``, read now: a wrong one is told before any work.

    Raises:
        UserError: no such file, no private key of a curve that is taken, or a wrong password.
    """
    require("signing", NEEDS, "release")
    _private_key(path)
    password = os.environ.get(PASSWORD)

    def sign(folder: Path) -> None:
        config: Any = _offline_signing()
        config.use_elliptic_key_signer(private_key=path, password=None if password is None else password.encode())
        _write(config, folder)

    return sign


def by_identity() -> Callable[[Path], None]:
    """What signs a sealed folder as whom the CI says that it is, through sigstore. Raises UserError without one."""
    require("signing", NEEDS, "release")
    with quiet():
        from sigstore.oidc import detect_credential

        try:
            token = detect_credential()
        except Exception as error:
            raise UserError(f"the identity of this machine cannot be asked for: {first_line(error)}") from None
    if token is None:
        raise UserError(
            "this machine has no identity to sign as: a CI gives one (GitHub: permissions: id-token: write); "
            "elsewhere sign with --key PRIVATE.pem"
        )

    def sign(folder: Path) -> None:
        from model_signing import signing

        try:
            _write(signing.Config().use_sigstore_signer(identity_token=str(token)), folder)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"sigstore did not sign: {type(error).__name__}: {first_line(error)}") from None

    return sign


def _write(config: Any, folder: Path) -> None:
    folder = folder.absolute()
    path = folder / Release.SIGNATURE
    with quiet():
        config.set_hashing_config(_covering(folder)).sign(folder, path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _covering(folder: Path) -> Any:
    """Everything in a folder but the signature; also what others would leave out, such as .gitattributes."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[folder / Release.SIGNATURE], ignore_git_paths=False)


def _offline_signing() -> Any:
    """A configuration of the library's that asks no server: 1.0 sets sigstore up whatever is signed with."""
    from model_signing import signing

    class Offline(signing.Config):  # type: ignore[misc]
        def use_sigstore_signer(self, **_: Any) -> Offline:
            return self

    return Offline()


# ---- checking ----------------------------------------------------------------------------------------------


def check(release: Release, by: Signer) -> None:
    """See that ``by`` signed the release as it lies there. ``Release.open`` has compared it with its hashes before.

    Raises:
        UserError: no such key, or a file that is none.
        GateFailed: unsigned, signed by somebody else, a signature of something else, or what is no signature.
    """
    require("checking a signature", NEEDS, "release")
    if isinstance(by, KeyFile):
        check_public(by.path)
    path = release.path / Release.SIGNATURE
    try:
        content = sealed.read_file(path, LARGEST_BESIDE_BYTES)
        covered = _covered(content)
    except FileNotFoundError:
        raise GateFailed(
            f"{release.path} is not signed: it has no {Release.SIGNATURE}; whom it is from, nobody can say"
        ) from None
    except Unsound as error:
        raise GateFailed(f"{path} is no signature ({error}): whom it is from, nobody can say") from None
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / Release.SIGNATURE  # what was looked at, whatever becomes of the file
        copy.write_bytes(content)
        _check_by_library(release, copy, by)
    if covered.get(MANIFEST) != sha256_file(release.path / MANIFEST):
        raise GateFailed(f"{path} signs another {MANIFEST}, or none: it is a signature of something else")


def _check_by_library(release: Release, signature: Path, by: Signer) -> None:
    """Raises GateFailed; UserError where sigstore cannot be reached."""
    path = release.path / Release.SIGNATURE
    with quiet():
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying

        config = verifying.Config()
        if isinstance(by, KeyFile):
            config.use_elliptic_key_verifier(public_key=by.path)
        else:
            try:
                config.use_sigstore_verifier(identity=by.name, oidc_issuer=by.issuer)
            except Exception as error:  # whom it trusts, it asks its servers
                raise UserError(f"sigstore cannot be asked: {type(error).__name__}: {first_line(error)}") from None
        folder = release.path.absolute()
        try:
            config.set_hashing_config(_covering(folder)).verify(folder, signature)
        except InvalidSignature:
            raise GateFailed(f"{release.path} is not signed by {by.words}: that key did not make {path}") from None
        except Exception as error:  # of a hostile signature every parser raises its own
            told = first_line(error)
            if isinstance(error, ValueError) and told.startswith("Signature mismatch"):
                raise GateFailed(
                    f"{path} was made by {by.words}, but of other contents: it is the signature of another release, "
                    "or files were added, removed or changed since"
                ) from None
            reason = f"{type(error).__name__}: {told}" if told else type(error).__name__
            raise GateFailed(
                f"{release.path} is not signed by {by.words}: {path} does not hold ({printable(reason, 300)})"
            ) from None


def _covered(content: bytes) -> dict[str, str]:
    """The sha256 of every file that a signature says it is over; nothing of it is believed yet. Raises Unsound."""
    bundle = sealed.parse_json(content)
    try:
        statement = sealed.parse_json(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        return {
            str(each["name"]): str(each["digest"]).lower()
            for each in statement["predicate"]["resources"]
            if each["algorithm"] == "sha256"
        }
    except (KeyError, TypeError, binascii.Error, ValueError) as error:
        if isinstance(error, Unsound):
            raise
        raise Unsound("it has no statement of what it signs") from None


# ---- keys --------------------------------------------------------------------------------------------------


def check_public(path: Path) -> None:
    """See that ``path`` is a public key that signatures are checked with. Raises UserError; tells nothing of it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    text = _read_key(path, "--signature", "a public key")
    if b"PRIVATE KEY-----" in text:
        raise UserError(f"--signature: {path} is a private key: wanted the public one, which may be given to anybody")
    try:
        _check_curve(load_pem_public_key(text))
    except Exception as error:
        raise UserError(
            f"--signature: {path} is no public key that signatures are made with ({_reason(error)}): "
            "wanted PEM, of the curve P-256, P-384 or P-521"
        ) from None


def _private_key(path: Path) -> Any:
    """The private key in ``path``. Raises UserError; tells nothing of it."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    text, password = _read_key(path, "--key", "a private key"), os.environ.get(PASSWORD)
    if b"PUBLIC KEY-----" in text:
        raise UserError(f"--key: {path} is a public key: wanted the private one, which only the signer has")
    try:
        key = load_pem_private_key(text, None if password is None else password.encode())
        _check_curve(key)
    except TypeError:  # one that is encrypted and no password, or the other way round
        needs = f"is encrypted: set {PASSWORD}" if password is None else f"is not encrypted: unset {PASSWORD}"
        raise UserError(f"--key: {path} {needs}") from None
    except Exception as error:
        raise UserError(
            f"--key: {path} is no private key to sign with, or its password is another ({_reason(error)}): "
            "wanted PEM, of the curve P-256, P-384 or P-521 (openssl ecparam -name prime256v1 -genkey -noout)"
        ) from None
    return key


def _check_curve(key: Any) -> None:
    """Raises ValueError for a key of another kind or curve."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in ("secp256r1", "secp384r1", "secp521r1"):
        raise ValueError(f"its curve is {curve}" if curve else f"it is of kind {type(key).__name__.strip('_')}")


def _reason(error: Exception) -> str:
    """Why a key is none, in a few words: libraries write pages."""
    return printable(first_line(error).partition(".")[0], 120)


def _read_key(path: Path, option: str, what: str) -> bytes:
    try:
        return sealed.read_file(path.resolve(), LARGEST_KEY_BYTES)
    except FileNotFoundError:
        raise UserError(f"{option}: no file at {path}: wanted {what} in PEM") from None
    except (Unsound, OSError, RuntimeError) as error:
        raise UserError(f"{option}: {path} cannot be read ({first_line(error)}): wanted {what} in PEM") from None
