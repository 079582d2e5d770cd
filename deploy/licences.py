"""Licences of what a release was made from: carried along, and named before it goes out where they bind its users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

from ..core.artifact import Provenance, find_ancestors
from ..core.config import LICENCE
from ..core.errors import GateFailed
from ..core.kinds import UNKNOWN_LICENCE, Bundle, Checkpoint
from ..core.sealed import printable
from ..data.dataset import Dataset

FREE = ("Permissive", "Public Domain")  # categories of ScanCode's LicenseDB that ask for a notice at most
# What a category means to somebody who ships, in a word.
MEANINGS = {
    "Copyleft Limited": "copyleft",
    "Copyleft": "copyleft",
    "Source-available": "not for every use",
    "Free Restricted": "not for every use",
    "Proprietary Free": "proprietary",
    "Commercial": "proprietary",
}
# Least restrictive first.
RESTRICTIONS = ("", "copyleft", "non-commercial", "not for every use", "proprietary", "not one that SPDX lists")


def carried(bundles: Iterable[Bundle], said: Mapping[str, str | None]) -> dict[str, str]:
    """The licence of all data and of all weights from elsewhere in the lineage of ``bundles``, by what it is of.

    Args:
        said: of "data" and "teacher", as a recipe says now; it counts before what was said when they were sealed.

    Returns:
        SPDX expressions as they were said, or "unknown".
    """
    found: dict[str, str] = {}
    for bundle in bundles:
        lineage = bundle.manifest.provenance()
        for data in find_ancestors(lineage, Dataset):
            facts = Dataset.facts_of(data)
            found[f"data {called(facts.source)}"] = said.get("data") or facts.license or UNKNOWN_LICENCE
        networks = find_ancestors(lineage, Checkpoint)
        for network in networks:
            its = Checkpoint.facts_of(network)
            teaches = any(is_teacher(network, other) for other in networks)
            licence = (said.get("teacher") if teaches else None) or its.license
            if licence or begins_elsewhere(network):
                found[f"weights of {its.model}"] = licence or UNKNOWN_LICENCE
    return found


def is_teacher(network: Provenance, of: Provenance) -> bool:
    """Whether the second network learned from the first."""
    return "teacher" in of.inputs and of.inputs["teacher"].key == network.key


def begins_elsewhere(network: Provenance) -> bool:
    """Whether a network's weights were brought, or began as somebody's pretrained ones."""
    given = ("pretrained", "encoder_checkpoint_sha256", "start_sha256")
    return network.stage == "adopt" or any(network.config.get(name) for name in given)


def called(source: str) -> str:
    """A source of images without the folders of the machine that it lay on."""
    return PurePath(source).name if source.startswith(("/", ".", "~")) else source


def check_acknowledged(licences: Mapping[str, str], acknowledged: Iterable[str]) -> None:
    """Refuse a licence that binds users of the release and that nobody acknowledged.

    Raises:
        GateFailed: non-commercial, copyleft, proprietary, or one that SPDX does not know.
    """
    known = {each.casefold() for each in acknowledged}
    open_ones = {
        of: (licence, meaning)
        for of, licence in licences.items()
        if (meaning := restriction(licence)) is not None and licence.casefold() not in known
    }
    if open_ones:
        told = ", ".join(f"{of} is under {licence} ({meaning})" for of, (licence, meaning) in open_ones.items())
        option = " ".join(f"--acknowledge '{each}'" for each in dict.fromkeys(lic for lic, _ in open_ones.values()))
        raise GateFailed(f"{printable(told, 1000)}: nothing was released; if you may ship it, say {option}")


def restriction(licence: str) -> str | None:
    """Why somebody has to look at a licence before its work is shipped; None for one that asks for a notice at most.

    Of an expression with OR the freest choice counts, with AND the least free. What is not stated is no restriction
    that could be told. Categories are those of ScanCode's LicenseDB.
    """
    if licence == UNKNOWN_LICENCE:
        return None
    try:
        if not LICENCE.fullmatch(licence):
            raise ValueError
        tree = _licensing().parse(licence)
    except Exception:  # the parser raises a handful of kinds
        return "no SPDX expression"
    return RESTRICTIONS[_rank(tree)] or None


def _rank(tree: Any) -> int:
    """Where in ``RESTRICTIONS`` an expression stands."""
    from license_expression import LicenseWithExceptionSymbol

    if isinstance(tree, LicenseWithExceptionSymbol):  # an exception allows more; of what, is named all the same
        return _rank(tree.license_symbol)
    if tree.args:
        choose = min if isinstance(tree, _licensing().OR) else max
        return choose(map(_rank, tree.args))
    name = str(tree.key).casefold()
    category = _categories().get(name, "")
    if category in FREE:
        return 0
    told = "non-commercial" if category and "-nc" in name else MEANINGS.get(category, "not one that SPDX lists")
    return RESTRICTIONS.index(told)


@cache
def _licensing() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


@cache
def _categories() -> dict[str, str]:
    """The category of every licence that SPDX lists, by its id in lower case."""
    from license_expression import get_license_index

    return {
        name.casefold(): each["category"]
        for each in get_license_index()
        for name in (each.get("spdx_license_key"), *each.get("other_spdx_license_keys", ()))
        if name
    }
