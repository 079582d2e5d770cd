"""Executes a workflow's steps as GitHub's runner does, as far as docs/ci.md and action.yml need: for the lab.

A ``run:`` is written into a file and given to ``bash --noprofile --norc -eo pipefail``, with its ``env:`` and with
files behind GITHUB_OUTPUT and GITHUB_STEP_SUMMARY. Of ``uses:`` only our own action is executed; actions of others
(checkout, caches, uploads) are left out, and told. Expressions have contexts, literals, ``== != && || !`` and a few
functions.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TOKENS = re.compile(r"\s*(?:'((?:[^']|'')*)'|(\d+)|(==|!=|&&|\|\||[!(),])|([A-Za-z_*][\w.*-]*))")
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)


class Expression:
    """What stands between ``${{`` and ``}}``, or in ``if:``."""

    def __init__(self, text: str, contexts: Mapping[str, Any], succeeded: bool = True) -> None:
        self._contexts, self._succeeded, self.asks_status = contexts, succeeded, False
        self._tokens: list[tuple[str, ...]] = []
        at = 0
        while text[at:].strip():
            found = TOKENS.match(text, at)
            assert found is not None, f"an expression that is not known here: {text[at:]}"
            self._tokens.append(found.groups(default=""))
            at = found.end()

    def value(self) -> Any:
        found = self._either()
        assert not self._tokens, self._tokens
        return found

    def _next_is(self, *signs: str) -> str:
        return self._tokens.pop(0)[2] if self._tokens and self._tokens[0][2] in signs else ""

    def _either(self) -> Any:
        found = self._both()
        while self._next_is("||"):
            other = self._both()
            found = found or other
        return found

    def _both(self) -> Any:
        found = self._compared()
        while self._next_is("&&"):
            other = self._compared()
            found = found and other
        return found

    def _compared(self) -> Any:
        found = self._one()
        while sign := self._next_is("==", "!="):
            found = (str(found or "") == str(self._one() or "")) == (sign == "==")
        return found

    def _one(self) -> Any:
        if self._next_is("!"):
            return not self._one()
        if self._next_is("("):
            found = self._either()
            assert self._next_is(")")
            return found
        text, number, sign, name = self._tokens.pop(0)
        assert not sign, sign
        if not name:
            return int(number) if number else text.replace("''", "'")
        if not self._next_is("("):
            return look_up(self._contexts, name)
        given = []
        while not self._next_is(")"):
            given.append(self._either())
            self._next_is(",")
        return self._call(name, given)

    def _call(self, name: str, given: Sequence[Any]) -> Any:
        if name in ("always", "success", "failure"):
            self.asks_status = True
            return {"always": True, "success": self._succeeded, "failure": not self._succeeded}[name]
        if name == "startsWith":
            return str(given[0] or "").startswith(given[1])
        assert name == "contains", name
        return given[1] in (given[0] or "")


def look_up(value: Any, name: str) -> Any:
    """A property of the contexts, empty where there is none; ``*`` takes those of every item."""
    first, _, rest = name.partition(".")
    if first == "*":
        return [look_up(item, rest) for item in value or []]
    found = value.get(first, "") if isinstance(value, Mapping) else ""
    return look_up(found, rest) if rest else found


@dataclass
class Ran:
    """A ``run:`` that was executed."""

    name: str
    returncode: int
    stdout: str
    stderr: str


@dataclass
class Runner:
    """A job of a workflow in a checked-out repository.

    ``contexts`` are github, vars and secrets; ``ran`` what was executed, ``left_out`` which actions of others.
    """

    repository: Path
    temporary: Path
    action: Path
    contexts: dict[str, Any]
    environment: dict[str, str]
    ran: list[Ran] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def job(self, workflow: Path, name: str) -> bool | None:
        """Execute a job; whether it succeeded, None where its ``if:`` leaves it out."""
        job = yaml.safe_load(workflow.read_text())["jobs"][name]
        if not Expression(job.get("if", "success()"), self.contexts).value():
            return None
        return self.steps(job["steps"], {**self.contexts, "steps": {}})

    def steps(self, steps: Sequence[Mapping[str, Any]], contexts: dict[str, Any]) -> bool:
        """Execute steps in order; after one that failed only those whose ``if:`` asks for that."""
        succeeded = True
        for step in steps:
            condition = Expression(str(step.get("if", "success()")), contexts, succeeded)
            wanted = condition.value() and (succeeded or condition.asks_status)
            if not wanted:
                continue
            outputs: dict[str, str] = {}
            if "run" in step:
                passed = self._run(step, contexts, outputs)
            elif step["uses"].startswith("acme/kdpipe@"):
                passed = self._use(step, contexts, outputs)
            else:
                self.left_out.append(step["uses"])
                continue
            if "id" in step:
                contexts["steps"][step["id"]] = {"outputs": outputs}
            succeeded = succeeded and (passed or bool(step.get("continue-on-error")))
        return succeeded

    def _use(self, step: Mapping[str, Any], contexts: dict[str, Any], outputs: dict[str, str]) -> bool:
        action = yaml.safe_load((self.action / "action.yml").read_text())
        given = {name: filled(value, contexts) for name, value in step.get("with", {}).items()}
        assert given.keys() <= action["inputs"].keys(), given
        needed = {name for name, each in action["inputs"].items() if each.get("required")}
        assert needed <= given.keys(), needed
        inputs = {name: given.get(name, str(each.get("default", ""))) for name, each in action["inputs"].items()}
        inside = {**{name: contexts[name] for name in contexts if name != "secrets"}, "inputs": inputs, "steps": {}}
        passed = self.steps(action["runs"]["steps"], inside)
        outputs |= {name: filled(each["value"], inside) for name, each in action["outputs"].items()}
        return passed

    def _run(self, step: Mapping[str, Any], contexts: dict[str, Any], outputs: dict[str, str]) -> bool:
        script, told = self.temporary / "step.sh", self.temporary / "output"
        script.write_text(filled(step["run"], contexts))
        told.write_text("")
        environment = {
            **self.environment,
            **{name: filled(str(value), contexts) for name, value in step.get("env", {}).items()},
            "RUNNER_TEMP": str(self.temporary),
            "GITHUB_ACTION_PATH": str(self.action),
            "GITHUB_OUTPUT": str(told),
            "GITHUB_STEP_SUMMARY": str(self.temporary / "summary.md"),
            "GITHUB_SHA": str(look_up(contexts, "github.sha")),
            "GITHUB_REPOSITORY": str(look_up(contexts, "github.repository")),
            "GITHUB_API_URL": str(look_up(contexts, "github.api_url")),
        }
        line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        done = subprocess.run(
            line, cwd=self.repository, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        said = (done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
        self.ran.append(Ran(step.get("name", ""), done.returncode, *said))
        for text in told.read_text().splitlines():
            name, _, value = text.partition("=")
            outputs[name] = value
        return done.returncode == 0


def filled(text: Any, contexts: Mapping[str, Any]) -> str:
    """A text with its expressions worked out."""
    return EXPRESSION.sub(lambda found: str(Expression(found[1], contexts).value()), str(text))


def the_environment(python: Path) -> dict[str, str]:
    """A runner's environment: its own programs first, nothing of this machine's settings."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin", "CI": "true"}
