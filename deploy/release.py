"""Releases: made of bundles and published under a version, fetched, and checked by whoever gets one.

``unchanged`` and ``signed`` are two answers: hashes are anybody's, a signature is somebody's.
"""

from __future__ import annotations

import datetime
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import runtime
from ..core.artifact import MANIFEST, AnyArtifact, Draft, Order, drafting, read_manifest, write_json
from ..core.config import ReleaseConfig
from ..core.errors import GateFailed, Untrusted, UserError
from ..core.kinds import Bundle, Release, ReleaseFacts, Report, Verdict
from ..core.proc import require
from ..core.remote import is_url
from ..core.sealed import printable
from . import papers, signature
from .bundle import check_known, check_task
from .bundle import verify as verify_bundle
from .card import card
from .licences import carried, check_acknowledged
from .shelf import Folders, shelf
from .signature import Signer
from .told import Told
from .versions import Version, newest

PULLED = Path("releases")
NEEDS = ("cyclonedx-python-lib", "huggingface-hub")


@dataclass(frozen=True)
class Wish:
    """What is to be released: which bundles, under which name, with what beside them.

    ``said`` holds licences of "data" and "teacher" that a recipe says now; ``acknowledged`` those that may be shipped
    although they bind whoever gets the release. ``last`` is the release before it.
    """

    name: str
    version: Version
    bundles: Mapping[str, Bundle]
    license: str | None = None
    said: Mapping[str, str | None] = field(default_factory=dict)
    acknowledged: tuple[str, ...] = ()
    report: Report | None = None
    verdict: Verdict | None = None
    last: Release | None = None

    @property
    def title(self) -> str:
        """Name and version in one word."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Published:
    """A release that is out: where it lies, and what it says of itself."""

    place: str
    facts: ReleaseFacts
    key: str


# ---- making one --------------------------------------------------------------------------------------------


def release(wish: Wish, where: str, sign: Callable[[Path], None] | None = None) -> Published:
    """Make a release and publish it at ``where``: whole under its version, or not at all.

    Args:
        where: a folder or URL that gets ``NAME/VERSION``, or hf://ORGANISATION/REPOSITORY.
        sign: signs the sealed folder before anybody can see it, as ``signature.by_key`` does.

    Raises:
        UserError: this version is there already, a report or verdict of other bundles, or it cannot be written.
        GateFailed: its verdict is "fail", or a licence was not acknowledged.
        Untrusted: its verdict is "cannot tell".
    """
    require("a release", NEEDS, "release")
    _check_bundles(wish)
    _check_verdict(wish)
    licences = carried(wish.bundles.values(), wish.said)
    check_acknowledged({**licences, **({"the release": wish.license} if wish.license else {})}, wish.acknowledged)
    to = shelf(where)
    to.check_new(wish.name, wish.version)
    facts = ReleaseFacts(
        name=wish.name,
        version=wish.version.text,
        bundles=tuple(wish.bundles),
        verdict=None if wish.verdict is None else wish.verdict.facts.answer,
        licences=licences,
    )
    order = _order(wish)
    if isinstance(to, Folders) and not is_url(where):  # made where it will lie: one rename publishes it
        out = Path(to.place(wish.name, wish.version))
        _write(order, wish, facts, out, sign)
        return Published(str(out), facts, order.key)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / wish.version.text
        _write(order, wish, facts, out, sign)
        return Published(to.put(out, wish.name, wish.version), facts, order.key)


def _order(wish: Wish) -> Order[ReleaseConfig]:
    beside: dict[str, AnyArtifact | None] = {"report": wish.report, "verdict": wish.verdict, "last": wish.last}
    config = ReleaseConfig(
        name=wish.name,
        version=wish.version.text,
        license=wish.license,
        acknowledged=wish.acknowledged,
        **{role: None if each is None else each.key for role, each in beside.items()},
    )
    return Order("release", config, dict(wish.bundles))


def _check_bundles(wish: Wish) -> None:
    """Raises UserError for none, for several tasks, and for names that some file systems take for one."""
    if not wish.bundles:
        raise UserError(f"{wish.title} would hold no bundle: name some, or --recipe")
    for bundle in wish.bundles.values():
        check_task(bundle.path, bundle.facts.task)
    if len(tasks := {bundle.facts.task for bundle in wish.bundles.values()}) > 1:
        raise UserError(f"{wish.title} would hold bundles of {' and '.join(sorted(tasks))}: release each by itself")
    if len({name.casefold() for name in wish.bundles}) < len(wish.bundles):
        raise UserError(f"two bundles of {wish.title} have names that differ in capitals alone: rename a variant")


def _check_verdict(wish: Wish) -> None:
    """Refuse bundles that the gate did not let through, or did not see."""
    verdict = wish.verdict
    if verdict is None:
        return
    unseen = [name for name, bundle in wish.bundles.items() if bundle.key not in verdict.manifest.lineage_keys]
    if unseen:
        raise UserError(f"{verdict.path} is no verdict on {unseen[0]}: gate these bundles, or leave it out")
    answer = verdict.facts.answer
    if answer == "fail":
        raise GateFailed(f"the verdict in {verdict.path} is 'fail': {wish.title} was not released")
    if answer != "pass":
        raise Untrusted(f"the verdict in {verdict.path} is '{answer}': {wish.title} was not released, see its comment")


def _write(
    order: Order[ReleaseConfig], wish: Wish, facts: ReleaseFacts, out: Path, sign: Callable[[Path], None] | None
) -> None:
    """Seal the release as ``out``, signed before it has its name."""
    told = Told(facts, wish.license, wish.bundles, wish.report, wish.last)
    try:
        with drafting(Release, order, out) as draft:
            draft.facts, draft.vouch = facts, sign
            _fill(draft, told, wish, order.key)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"{out} was released by somebody else meanwhile: release another version") from None


def _fill(draft: Draft[Release], told: Told, wish: Wish, key: str) -> None:
    folder, made = draft.path, datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    bundles = folder / Release.BUNDLES
    for name, bundle in wish.bundles.items():
        _copy(bundle, bundles / name)
    for artifact, name in ((wish.report, Release.REPORT), (wish.verdict, Release.VERDICT)):
        if artifact is not None:
            _copy(artifact, folder / name)
    (folder / Release.CARD).write_text(card(told), encoding="utf-8")
    (folder / Release.CHANGES).write_text(papers.changes(told), encoding="utf-8")
    (folder / Release.BILL).write_text(papers.bill(told, bundles, key, made), encoding="utf-8")
    write_json(folder / Release.PROVENANCE, papers.provenance(told, bundles, key, made))
    (folder / Release.SUMS).write_text(papers.sums(folder), encoding="utf-8")


def _copy(artifact: AnyArtifact, out: Path) -> None:
    """Copy what the manifest names; what was opened is what goes out. Raises UserError if it changed meanwhile."""
    for name in (MANIFEST, *artifact.manifest.files):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / name, out / name)
    if type(artifact).open(out).manifest.digest != artifact.manifest.digest:
        raise UserError(f"{artifact.path} was changed while it was copied: do the same again")


# ---- checking one ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A release whose files are those of its manifest; ``signed_by`` says by whom, where that was checked."""

    release: Release
    signed_by: str | None

    def lines(self) -> Iterable[str]:
        """What that means, in two sentences that say two things."""
        its, where = self.release, printable(str(self.release.path))
        yield f"{where}: unchanged: its {len(its.manifest.files)} files are as {its.facts.title} was sealed"
        if self.signed_by is not None:
            yield f"{where}: signed by {self.signed_by}"
        elif its.is_signed:
            yield f"{where}: signed, and nobody checked by whom: give --signature PUBLIC.pem"
        else:
            yield f"{where}: not signed: hashes do not say whom it is from"


def check(path: Path, by: Signer | None = None) -> Checked:
    """Compare a release with its hashes and, if a signer is named, see that it is theirs.

    Raises:
        UserError: no release, or one that lost, gained or changed a file.
        GateFailed: not signed by ``by``.
    """
    found = Release.open(path)
    named = set(found.facts.bundles)
    prefix = f"{Release.BUNDLES}/"
    lying = {name.split("/")[1] for name in found.manifest.files if name.startswith(prefix)}
    if lying != named:
        odd = min(lying ^ named)
        raise UserError(f"{path} has a bundle '{printable(odd, 80)}' too many or too few: get the release again")
    for name, bundle in found.bundles.items():
        if name not in found.manifest.inputs or found.manifest.inputs[name].key != bundle.key:
            raise UserError(f"{bundle.path} is another bundle than {path / MANIFEST} says: get the release again")
    if by is not None:
        signature.check(found, by)
    return Checked(found, None if by is None else by.words)


def replay(checked: Checked, only: str | None = None) -> dict[str, dict[str, Any] | str]:
    """What replaying the golden inputs of each bundle found here; why not, of one whose runtime is not here.

    Args:
        only: this bundle.

    Raises:
        UserError: a bundle of a target that this version does not know.
        GateFailed: one that does not compute what it promises.
    """
    found: dict[str, dict[str, Any] | str] = {}
    for name, bundle in checked.release.bundles.items():
        if only not in (None, name):
            continue
        check_known(bundle)
        ways = [way for way in (bundle.facts.target, bundle.facts.stand_in) if way is not None]
        if not any(map(runtime.is_available, ways)):
            found[name] = f"not replayed: {bundle.facts.target} is not installed here"
        else:
            found[name] = verify_bundle(bundle.path)[1]
    return found


def holding(path: Path) -> tuple[Path, str] | None:
    """The folder of the release that ``path`` is a bundle of, and what it is called there; None for any other."""
    absolute = path.absolute()
    outer = absolute.parent.parent
    if absolute.parent.name != Release.BUNDLES or not (outer / MANIFEST).is_file():
        return None
    return outer, absolute.name


def chosen(path: Path, by: Signer | None = None) -> tuple[Path, str | None]:
    """The bundle that is meant by a bundle, a release of one bundle, or a bundle in a release; and its digest.

    The digest is that of the release's manifest, which ``by`` signed: what a device switches to must have it. None for
    a bundle by itself.

    Raises:
        UserError: as ``check`` does; a release of several bundles.
        GateFailed: not signed by ``by``; a bundle by itself, which has no signature.
    """
    inside = holding(path)
    if inside is None and read_manifest(path).kind != Release.kind:
        if by is not None:
            raise GateFailed(
                f"{path} is not signed: a release is, and this bundle is in none; deploy RELEASE/{Release.BUNDLES}/NAME"
            )
        return path, None
    outer, name = inside if inside is not None else (path, None)
    found = check(outer, by).release
    names = found.facts.bundles
    if name is None:
        if len(names) > 1:
            listed = ", ".join(names)
            raise UserError(f"{path} has {len(names)} bundles ({listed}): name one, such as {path}/bundles/{names[0]}")
        name = names[0]
    if name not in names:
        raise UserError(f"{outer} has no bundle '{printable(name, 80)}': wanted one of {', '.join(names)}")
    return found.path / Release.BUNDLES / name, found.digest(name)


# ---- getting one -------------------------------------------------------------------------------------------


def pull(name: str, version: Version | None, where: str, out: Path | None, by: Signer | None = None) -> Checked:
    """Fetch a release as the folder ``out``, which appears once all of it was checked; checks one that is there.

    Args:
        version: None for the newest by semantic order.
        out: None for releases/NAME/VERSION.

    Raises:
        UserError: none there, another one than its place says, or not what its manifest says.
        GateFailed: not signed by ``by``.
    """
    source = shelf(where)
    version = newest(name, source.versions(name), where) if version is None else version
    final = out or PULLED / name / version.text
    if final.exists():
        return _wanted(final, name, version, by)
    arriving = final.absolute().with_name(f".{final.absolute().name}")  # a pull that was cut goes on with it
    source.fetch(name, version, arriving)
    try:
        found = _wanted(arriving, name, version, by)
    except BaseException:
        shutil.rmtree(arriving, ignore_errors=True)
        raise
    try:
        arriving.rename(final)
    except OSError:
        if not final.exists():
            raise
        return _wanted(final, name, version, by)  # somebody else's pull was first
    return replace(found, release=replace(found.release, path=final))


def _wanted(path: Path, name: str, version: Version, by: Signer | None) -> Checked:
    """As ``check``, of that release and no other: who fetched an old one under a new name is told so."""
    found = check(path, by)
    if (found.release.facts.name, found.release.facts.version) != (name, version.text):
        raise UserError(f"{path} is {found.release.facts.title}, wanted {name}@{version}: the place has another one")
    return found


def open_last(path: Path | None) -> Release | None:
    """The release before, if one is named. Raises UserError."""
    return None if path is None else check(path).release
