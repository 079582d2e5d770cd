"""The action, the workflows and what docs/ci.md says of them: valid, pinned, and deaf to what an input says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from actions import Runner, filled, the_environment
from conftest import ROOT

HEX = re.compile(r"[0-9a-f]{40}")
OURS = "acme/kdpipe"  # as docs/ci.md calls it
HOSTILE = (
    "$(touch owned)", "`touch owned`", "; touch owned", '"; touch owned; "', "'; touch owned; '", "a && touch owned",
    "| touch owned #", "a\ntouch owned", "--help", "-h", "--", "*", "~", "$HOME", "a b", "${{ secrets.KEY }}", "\\",
    '"', "::error::owned", "a\nanswer=pass", "\x1b]0;owned\x07", "@/etc/passwd", "../..",
)  # fmt: skip
# In place of kdpipe, to see what reaches it: its arguments and environment, a file a call.
RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
folder = Path({folder!r})
argv = sys.argv[1:]
keys = [Path(word.removeprefix("--key=")) for word in argv if word.startswith("--key=")]
kept = [[str(key), key.read_text(), oct(key.stat().st_mode & 0o777)] for key in keys]
record = {{"argv": argv, "environment": dict(os.environ), "keys": kept}}
(folder / f"{{len(list(folder.iterdir()))}}.json").write_text(json.dumps(record))
print("report:", {page!r})
comment = [word.removeprefix("--comment=") for word in argv if word.startswith("--comment=")]
if comment:
    Path(comment[0]).write_text("judged\\n")
"""


def blocks() -> dict[str, str]:
    """The blocks of docs/ci.md by what their first line calls them."""
    found = re.findall(r"```\w+\n# (\S+)\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)
    return dict(found)


@pytest.fixture
def workflows(tmp_path: Path) -> list[Path]:
    """Ours, and that of the documents."""
    path = tmp_path / "model.yml"
    path.write_text(blocks()[".github/workflows/model.yml"])
    return [path, *sorted((ROOT / ".github" / "workflows").glob("*.yml"))]


def action() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return value


def steps_of(workflows: list[Path]) -> Iterator[dict[str, Any]]:
    yield from action()["runs"]["steps"]
    for path in workflows:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            yield from job["steps"]


def test_they_are_what_their_schemas_want(workflows: list[Path]) -> None:
    for schema, paths in (("vendor.github-workflows", workflows), ("vendor.github-actions", [ROOT / "action.yml"])):
        line = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, paths)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_expression_becomes_part_of_a_script(workflows: list[Path]) -> None:
    """What an expression holds could be a command: scripts see it in their environment alone."""
    steps = [step for step in steps_of(workflows) if "run" in step]
    assert len(steps) > 10
    for step in steps:
        assert "${{" not in step["run"], step["run"]
        done = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    for step in action()["runs"]["steps"]:
        assert step["shell"] == "bash"


def test_actions_of_others_are_pinned_and_nobody_may_more_than_needed(workflows: list[Path]) -> None:
    for step in steps_of(workflows):
        name, _, version = step.get("uses", f"{OURS}@").partition("@")
        assert name == OURS or HEX.fullmatch(version), step["uses"]
        if name == "actions/checkout":
            assert step["with"]["persist-credentials"] is False
    for path in workflows:
        value = yaml.safe_load(path.read_text())
        assert value["permissions"] == {"contents": "read"}
        assert "pull_request_target" not in value[True]  # how YAML 1.1 reads "on"


def test_the_documented_inputs_are_those_of_the_action(workflows: list[Path]) -> None:
    inputs = action()["inputs"]
    used = [step["with"] for step in steps_of(workflows[:1]) if step.get("uses", "").startswith(OURS)]
    assert len(used) == 3
    for given in used:
        assert set(given) <= set(inputs)
    read = set(re.findall(r"inputs\.([\w-]+)", (ROOT / "action.yml").read_text()))
    assert read == set(inputs), "each is used, and none is missing"


def act(folder: Path, secret: str = "", **inputs: str) -> tuple[Runner, bool, list[dict[str, Any]]]:
    """The action with these inputs, up to a recorder in place of kdpipe; what reached that."""
    for name in ("bin", "records", "repository", "temporary"):
        (folder / name).mkdir(parents=True)
    page = folder / "report.html"
    page.write_text("a page")
    recorder = folder / "bin" / "kdpipe"
    recorder.write_text(RECORDER.format(python=sys.executable, folder=str(folder / "records"), page=str(page)))
    recorder.chmod(0o755)
    environment = the_environment(Path(sys.executable))
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    contexts = {"github": {}, "vars": {}, "secrets": {"KEY": secret}}
    runner = Runner(folder / "repository", folder / "temporary", ROOT, contexts, environment)
    given = {"install": "false", "recipe": "recipe.yaml", **inputs}
    step = {"uses": f"{OURS}@", "with": {name.replace("_", "-"): value for name, value in given.items()}}
    # What comes from a context is not worked out again.
    step["with"] = {name: f"${{{{ vars.{name.replace('-', '_')} }}}}" for name in step["with"]}
    contexts["vars"] = {name.replace("-", "_"): value for name, value in given.items()}
    passed = runner.steps([step], {**contexts, "steps": {}})
    records = sorted((folder / "records").iterdir(), key=lambda path: int(path.stem))
    return runner, passed, [json.loads(path.read_text()) for path in records]


def test_a_request_is_tried_and_no_more(tmp_path: Path) -> None:
    _, passed, [record] = act(tmp_path)
    assert passed and record["argv"] == ["run", "--smoke", "--artifacts=artifacts", "--", "recipe.yaml"]


def test_until_is_one_of_three_words(tmp_path: Path) -> None:
    for at, text in enumerate((*HOSTILE, "", "smoke ", "Release")):
        runner, passed, records = act(tmp_path / str(at), until=text)
        assert not passed and not records
        assert [ran.returncode for ran in runner.ran] == [2]
        assert "\x1b" not in runner.ran[0].stderr and runner.ran[0].stderr.count("\n") == 1
        assert not list(tmp_path.rglob("owned"))


# How kdpipe is told of each input.
TOLD = {
    "recipe": "{}", "artifacts": "--artifacts={}", "device": "--device={}", "releases": "--to={}", "baseline": "{}",
    "first_rules": "--rule={}", "public_key": "--signature={}", "name": "{}@1.1.0", "version": "a@{}",
    "acknowledge": "--acknowledge={}",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_an_input_says_is_one_word(tmp_path: Path, text: str) -> None:
    # What makes one word together, or excludes each other, is hostile in turn.
    for at, but in enumerate(({"name": "a"}, {"version": "v1.1.0", "baseline": ""})):
        folder, unused = tmp_path / str(at), ("first_rules", "public_key")[at]
        inputs = dict.fromkeys(TOLD, text) | but
        runner, passed, records = act(folder, until="release", **inputs)
        assert passed, [ran.stderr for ran in runner.ran]
        assert [record["argv"][0] for record in records] == ["pull", "run", "gate", "release"][at:]
        words = [word for record in records for word in record["argv"]]
        for name in TOLD.keys() - but.keys() - {unused}:
            for line in text.splitlines() if name in ("first_rules", "acknowledge") else [text]:
                assert TOLD[name].format(line) in words, (name, words)
        for record in records:  # behind its option, or behind "--"
            plain = record["argv"][1:]
            options = plain[: plain.index("--")]
            assert all(word.startswith("--") and "=" in word for word in options), options
            assert len(plain) == len(options) + 2
        assert not list(folder.rglob("owned"))
        assert not list((folder / "repository").iterdir())


def test_the_key_is_seen_by_nobody_but_the_release(tmp_path: Path) -> None:
    text = "-----BEGIN EC PRIVATE KEY-----\n$(touch owned)\n-----END EC PRIVATE KEY-----"
    inputs = {"until": "release", "name": "a", "version": "1.0.0", "releases": "r", "key": text}
    runner, passed, records = act(tmp_path, **inputs)
    assert passed
    [[path, content, mode]] = records[-1]["keys"]
    assert content.strip() == text and mode == "0o600" and not Path(path).exists()
    for record in records:
        assert not any("PRIVATE" in value for value in record["environment"].values())
        assert not any("PRIVATE" in word for word in record["argv"])
    assert not any("PRIVATE" in ran.stdout + ran.stderr for ran in runner.ran)
    assert not [
        path for path in (tmp_path / "temporary").rglob("*") if path.is_file() and "PRIVATE" in path.read_text()
    ]


def test_without_a_baseline_or_a_key_neither_is_asked_for(tmp_path: Path) -> None:
    inputs = {"until": "release", "name": "a", "version": "v1.0.0", "releases": "r"}
    _, passed, records = act(tmp_path / "first", first_rules="size <= 4MB\n\nmemory <= 1GB\n", **inputs)
    assert passed and [record["argv"][0] for record in records] == ["run", "gate", "release"]
    assert [word for word in records[1]["argv"] if "rule" in word] == ["--rule=size <= 4MB", "--rule=memory <= 1GB"]
    words = [word.partition("=")[0] for record in records for word in record["argv"]]
    assert not {"--baseline", "--last", "--key", "--signature", "--device"} & set(words)
    _, _, later = act(tmp_path / "later", first_rules="size <= 4MB", baseline="a@0.9.0", **inputs)
    pulled = f"{tmp_path}/later/temporary/kdpipe-baseline"
    assert f"--baseline={pulled}" in later[2]["argv"] and f"--last={pulled}" in later[3]["argv"]
    assert not any("--rule" in word for word in later[2]["argv"])
    assert records[-1]["argv"][-1] == "a@1.0.0", "a tag's v is no part of the version"


def test_an_expression_is_worked_out_as_github_does() -> None:
    """The lab's runner itself: what it says of an ``if:`` decides what is executed."""
    contexts = {
        "github": {"ref": "refs/tags/v1", "event": {"pull_request": {"labels": [{"name": "judge"}], "number": 7}}},
        "inputs": {"until": "gate", "none": ""},
    }
    for text, wanted in {
        "github.ref": "refs/tags/v1",
        "github.nothing.at.all": "",
        "startsWith(github.ref, 'refs/tags/v')": "True",
        "contains(github.event.pull_request.labels.*.name, 'judge')": "True",
        "contains(github.event.pull_request.labels.*.name, 'other')": "False",
        "inputs.until != 'smoke' && inputs.none == ''": "True",
        "always() && inputs.none != '' && github.event.pull_request.number": "False",
        "inputs.none || 'it''s'": "it's",
        "!(inputs.until == 'gate')": "False",
    }.items():
        assert filled(f"${{{{ {text} }}}}", contexts) == wanted, text
