"""Where a device keeps what it makes of a bundle: beside it, since a bundle is sealed."""

from __future__ import annotations

from pathlib import Path

from . import sealed

STORE, BESIDE = "store", "beside"


def beside(bundle: Path) -> Path:
    """The folder for what this device makes of a bundle: ROOT/beside/DIGEST in a store, else BUNDLE.beside."""
    bundle = bundle.resolve()
    if bundle.parent.name == STORE and sealed.KEY.fullmatch(bundle.name):
        return bundle.parent.parent / BESIDE / bundle.name
    return bundle.with_name(bundle.name + ".beside")
