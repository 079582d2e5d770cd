"""Write docs/commands.md and docs/configuration.md from the code (``make docs``); ``--check`` only compares."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from pydantic import BaseModel

from kdpipe.cli import app
from kdpipe.core import config
from kdpipe.options import metavar, walk

HERE = Path(__file__).parent
STAGES: dict[str, type[BaseModel]] = {
    "A recipe": config.Recipe,
    "kdpipe data": config.DataPlan,
    "kdpipe teacher": config.TeacherPlan,
    "kdpipe distill": config.TrainConfig,
    "kdpipe study": config.StudyPlan,
    "kdpipe export": config.NetworkExportPlan,
    "kdpipe adopt": config.AdoptFilePlan,
    "kdpipe quantize": config.QuantizeConfig,
    "kdpipe package": config.PackageConfig,
    "kdpipe bench": config.BenchPlan,
    "kdpipe check": config.McuConfig,
    "kdpipe pick": config.PickPlan,
    "Device": config.DeviceSettings,
}


def help_of(*command: str) -> str:
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as told:
        app([*command, "--help"], prog_name="kdpipe", standalone_mode=False)
    return told.getvalue().strip()


def commands_in(text: str) -> list[str]:
    """The commands that a page of help lists."""
    return re.findall(r"^  ([a-z]+) ", text.partition("Commands:")[2], re.MULTILINE)


def section(*command: str) -> str:
    """A command's help, and that of the commands in it."""
    text = help_of(*command)
    below = "".join("\n" + section(*command, name) for name in commands_in(text))
    return f"{'#' * (1 + len(command))} kdpipe {' '.join(command)}\n\n```\n{text}\n```\n{below}"


def commands() -> str:
    overview = help_of()
    sections = "\n".join(section(name) for name in commands_in(overview))
    return (
        f"# Commands\n\nWritten by `make docs` from the command line's own help.\n\n```\n{overview}\n```\n\n{sections}"
    )


def fields(kind: type[BaseModel]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for path, info in walk(kind):
        default = "required" if info.is_required() else f"`{info.default}`".replace("None", "null")
        value = metavar(info.annotation).replace("|", " \\| ").lower()
        lines.append(f"| `{'.'.join(path)}` | {value} | {default} | {info.description or ''} |")
    return "\n".join(lines)


def configuration() -> str:
    head = (
        "# Configuration\n\nWritten by `make docs` from the code. A key of the tables is the same in YAML (nested), on "
        "the command line (`--train.epochs 60`) and in Python. Defaults stand in the code only: a recipe holds what "
        "differs.\n"
    )
    return head + "".join(f"\n## {title}\n\n{fields(kind)}\n" for title, kind in STAGES.items())


def main() -> int:
    stale = []
    for name, text in (("commands.md", commands()), ("configuration.md", configuration())):
        path = HERE / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
