"""What is written about the code is tested by the code: packages, imports, documents, the wheel."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, kdpipe

from kdpipe.core.artifact import Artifact
from kdpipe.core.kinds import Labelled
from kdpipe.devices import Device
from kdpipe.export import Target
from kdpipe.quantize import Variant
from kdpipe.runtime import Session
from kdpipe.runtime.task import Task

ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_are_those_of_the_tree() -> None:
    assert PROJECT["tool"]["setuptools"]["packages"] == ["kdpipe", *(f"kdpipe.{room}" for room in ROOMS)]
    nested = [path for room in ROOMS for path in (ROOT / room).glob("*/*.py")]
    assert not nested, "a package inside a room must be named in pyproject.toml"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_inside_the_package_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        assert not [name for name in names if name.split(".")[0] == "kdpipe"], ast.unparse(node)


def test_runner_imports_only_what_a_device_has() -> None:
    allowed = set(sys.stdlib_module_names) | {
        "numpy", "PIL", "onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime", "tensorrt", "cuda",
    }  # fmt: skip
    for path in (ROOT / "runtime").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and (node.module or "").split(".")[0] in allowed), path


def test_root_holds_a_docstring_and_the_version() -> None:
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr, ast.Assign]


def test_documents_are_current() -> None:
    """docs/commands.md and docs/configuration.md are what the code says (make docs)."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_is_in_the_documents() -> None:
    commands = re.findall(r"^  ([a-z]+) ", kdpipe("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert len(commands) >= 12
    text = (ROOT / "docs" / "commands.md").read_text()
    for command in commands:
        assert f"## kdpipe {command}" in text


def test_readmes_commands_exist() -> None:
    commands = set(re.findall(r"^  ([a-z]+) ", kdpipe("--help").stdout.partition("Commands:")[2], re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{page}.md" for page in ("ci", "guide", "python", "scale", "security")),
    ):
        text = (ROOT / name).read_text()
        assert set(re.findall(r"^\s*kdpipe ([a-z]+)", text, re.MULTILINE)) <= commands, name
        assert set(re.findall(r"^\s*make ([a-z]+)", text, re.MULTILINE)) <= targets, name
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name} links to {link}"


@pytest.mark.parametrize("seam", [Target, Variant, Session, Device, Task], ids=lambda seam: seam.__name__)
def test_what_a_new_class_must_have_is_written_down(seam: type) -> None:
    """Every name of a protocol stands in the guide to adding one."""
    wanted = {name for name in [*seam.__annotations__, *vars(seam)] if not name.startswith("_")} - {"write"}
    assert wanted
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a target")[2]
    assert wanted <= set(re.findall(r"`(\w+)`", text))


def test_rooms_and_kinds_are_written_down() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in [*(f"{room}/" for room in ROOMS if room != "recipes"), *(p.name for p in ROOT.glob("[!_]*.py"))]:
        assert f"`{path}`" in text, path
    kinds = [*Artifact.__subclasses__(), *Labelled.__subclasses__()]
    for kind in (kind for kind in kinds if kind.__module__.startswith("kdpipe.")):
        assert kind is Labelled or f"`{kind.__name__}`" in text, kind


def test_lock_names_no_index_and_every_version() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|--index|--find-links|--extra-index", text)
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
    assert len(pinned) > 100
    assert text.count("--hash=sha256:") >= len(pinned)


def test_lock_satisfies_the_project() -> None:
    """Every direct dependency of every extra is pinned, inside its range."""
    from packaging.requirements import Requirement

    text = (ROOT / "requirements.lock").read_text()
    pinned = {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
    }
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != "kdpipe":
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def clone_to(clone: Path) -> None:
    """What git would clone, with what is not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)


@pytest.mark.parametrize("name", ["kdpipe-main", "kdpipe 1.0", "1.2-kd.pipe"])
def test_lint_passes_whatever_the_checkout_is_called(tmp_path: Path, name: str) -> None:
    """An archive of a release unpacks to a folder that could be no module."""
    clone_to(tmp_path / name)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [Path(sys.executable).with_name("ruff"), *command, "--no-cache"],
            cwd=tmp_path / name,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_wheel_is_complete_and_works_without_the_sources(tmp_path: Path) -> None:
    """Built from what git would clone, installed into an empty venv, run from an empty folder."""
    clone = tmp_path / "anything"
    clone_to(clone)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "wheels", clone]
    subprocess.run(build, check=True, capture_output=True)
    shutil.rmtree(clone)
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"kdpipe/{path.relative_to(ROOT).as_posix()}" for path in SOURCES}
    wanted |= {"kdpipe/py.typed", *(f"kdpipe/report/{path.name}" for path in (ROOT / "report").glob("*.html"))}
    wanted |= {f"kdpipe/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    wanted |= {f"kdpipe/networks/{path.name}" for path in (ROOT / "networks").glob("*.csv")}
    assert {name for name in names if name.startswith("kdpipe/")} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)

    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    here = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    # The dependencies come from this environment, kdpipe must not: its editable hook is a .pth, which is not read.
    (site / "dependencies.pth").write_text(f"{here}\n")
    done = subprocess.run([python, "-m", "kdpipe", "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [python, "-c", "import kdpipe; print(kdpipe.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
