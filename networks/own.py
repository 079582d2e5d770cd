"""Networks of the user's own code, ``package.module:factory``: imported only where the user allowed it."""

from __future__ import annotations

import copy
import importlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..core import code
from ..core.errors import UserError, did_you_mean
from ..core.proc import first_line

# Of a network of which nobody says what it takes: as most are trained.
INPUT = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def make(name: str, arguments: dict[str, Any], classes: int) -> nn.Module:
    """What the factory gives for ``classes``, told as ``num_classes`` where it takes that, and ``arguments``.

    Raises:
        UserError: code that is not allowed, that cannot be imported, fails, or gives something else than a module.
    """
    code.check_allowed(name, "the network")
    file = code.source_file(name)
    module_name, _, factory_name = name.partition(":")
    try:
        with code.current_folder_last():
            with torch.random.fork_rng(devices=[]):  # whatever it draws, what comes next is the same
                module = _imported_now(module_name, code.sha256_of(name))
            factory = getattr(module, factory_name, None)
            if not callable(factory):
                known = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
                raise UserError(
                    f"{file} has no function '{factory_name}': wanted one that makes a torch.nn.Module"
                    f"{did_you_mean(factory_name, known)}"
                )
            network = factory(**_told(factory, classes), **arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"'{name}' failed: {type(error).__name__}: {first_line(error)}{where(error, file)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"'{name}' gives a {type(network).__name__}: wanted a torch.nn.Module")
    return copy.deepcopy(network).cpu()  # of a module's only one, each run has its own


_hashes: dict[str, str] = {}  # of the files as their modules were imported here


def _imported_now(module_name: str, sha256: str) -> ModuleType:
    """The module as its file is now: in a session that goes on, it may have been edited since it was imported."""
    module = importlib.import_module(module_name)
    if _hashes.setdefault(module_name, sha256) != sha256:
        module = importlib.reload(module)
        _hashes[module_name] = sha256
    return module


def _told(factory: Callable[..., Any], classes: int) -> dict[str, int]:
    """The number of classes, for a factory that takes it by name."""
    parameters = inspect.signature(factory).parameters
    takes = "num_classes" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {"num_classes": classes} if takes else {}


def where(error: BaseException, file: Path) -> str:
    """The line of the user's file that an error came from, in brackets; empty where none of it took part."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" ({file.name}, line {lines[-1]})" if lines else ""
