"""The command line: parse, call one stage, print. Results to stdout, talk to stderr."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .core.config import (
    AdoptFilePlan,
    BenchPlan,
    CachePlan,
    DataPlan,
    DeviceSettings,
    McuConfig,
    NetworkExportPlan,
    PackageConfig,
    PickPlan,
    QuantizeConfig,
    ReportConfig,
    StudyPlan,
    TeacherPlan,
    TrainConfig,
)
from .core.errors import INTERRUPTED, ExitCode, KdpipeError
from .core.sealed import printable
from .options import configured

if TYPE_CHECKING:
    from rich.console import Console

    from .chain import Chain
    from .core.artifact import AnyArtifact
    from .core.kinds import Bundle, Cache, Checkpoint, Runnable
    from .data.dataset import Dataset

JSON_VERSION = 1

app = typer.Typer(
    name="kdpipe",
    help="From a trained teacher and a folder of images to a small model that is measured on its device.",
    epilog="Start with `kdpipe demo`, then `kdpipe init YOUR_IMAGES`; `kdpipe COMMAND --help` has examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: twice as fast, and it never cuts an option's name
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --label_fraction as in YAML works too
    },
)

ARTIFACTS = Path("artifacts")


def folder_or_url(text: str) -> Path:
    """A folder of an artifact: what lies at a URL is fetched first, and what is not here from the store if it has it.

    Raises:
        UserError: nothing whole at that URL.
    """
    from .core import progress, remote
    from .core.errors import UserError
    from .core.proc import process_count
    from .terminal import listener

    path, is_url, store = Path(text), remote.is_url(text), os.environ.get(remote.STORE)
    keyed = re.fullmatch(r".+-([0-9a-f]{12})(-[0-9]+)?", path.name)  # as Chain.place calls them
    if "_KDPIPE_COMPLETE" in os.environ:  # nothing is fetched by a TAB
        return path
    if is_url and process_count() > 1:
        raise UserError(f"the processes of torchrun would all fetch {remote.shown(text)}: fetch it first (kdpipe show)")
    progress.listen(listener())
    if is_url:
        from .chain import FETCHED

        return remote.fetch_into(text, ARTIFACTS / FETCHED)
    if keyed and store and not path.exists() and process_count() == 1:
        remote.Store(store).fetch(path.name, path, None, "" if keyed[2] else keyed[1])
    return path


JsonFlag = Annotated[bool, typer.Option("--json", help="print one JSON object for machines")]
OutOption = Annotated[Path | None, typer.Option("--out", help="folder of the new artifact [default: beside its input]")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="folder of the dataset artifact [default: looked up beside the input]", parser=folder_or_url
    ),
]
ArtifactsOption = Annotated[Path, typer.Option("--artifacts", help="folder that holds the artifacts")]
AgainOption = Annotated[
    str | None,
    typer.Option(
        "--again",
        metavar="STAGE",
        help="do a stage again: bench measures more, of another one what is sealed is set aside, and all after it",
    ),
]
AllowCodeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE:FUNCTION",
        help="run this code of yours, which makes a network (repeatable; no recipe or artifact can ask for it)",
    ),
]


def _device_names() -> list[str]:
    """For a shell that completes them."""
    from .devices import DEVICES, book

    with suppress(KdpipeError):  # a wrong devices.yaml is told where it matters
        return list(book.known(DEVICES))
    return []


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kdpipe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print it")] = False,
) -> None:
    """Nothing to do before a command."""


# ---- the whole chain -------------------------------------------------------------------------------------


@app.command()
def init(
    folder: Annotated[
        Path | None,
        typer.Argument(help="of images by class or with masks, or what holds it [default: looked for here]"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="the teacher's weights, .pth or .safetensors [default: the one nearby]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="the teacher's network in timm [default: the weights tell]")
    ] = None,
    student: Annotated[str | None, typer.Option("--student", help="a small network of timm")] = None,
    size: Annotated[int | None, typer.Option("--size", help="side of the input, pixels")] = None,
    device: Annotated[str | None, typer.Option("--device", help="where it is to run, such as local,pi5")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="the recipe [default: ./FOLDER.yaml]")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing, take what is proposed")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Look at images, weights and this machine, and write a recipe.

    Asks at most five questions, none that an option answers. The recipe says why it has what it has; no file is ever
    replaced.

    Example: kdpipe init photos --checkpoint teacher.pth --yes
    """
    from . import proposal
    from .core import progress
    from .core.errors import UserError
    from .terminal import listener

    def ask(question: str, usual: str) -> str:
        if yes:
            return usual
        if not sys.stdin.isatty():
            raise UserError("init asks questions and nobody is there to answer: add --yes")
        return str(typer.prompt(printable(question), default=usual, err=True, show_default=bool(usual)))

    progress.listen(listener())
    devices = None if device is None else tuple(name.strip() for name in device.split(","))
    wish = proposal.Wish(checkpoint, model, student, size, devices)
    found, path = proposal.propose(folder, wish, ask, out)
    written = proposal.write(found, path)
    following = shlex.join(["kdpipe", "run", str(path)])
    if as_json:
        _print_json(recipe=str(path), name=written.name, words=found.words, following=following)
        return
    typer.echo(printable(f"{path}: {found.words}"))
    typer.echo(printable(f"next: {following}    (with --dry-run it only says what it would do)"))


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/digits.yaml")],
    artifacts: ArtifactsOption = ARTIFACTS,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="as if it stood in the recipe, such as distill.temperature=2"),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="refuse to begin unless what comes before is sealed"),
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="stop when this stage is done")] = None,
    again: AgainOption = None,
    allow_code: AllowCodeOption = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="URL",
            help="share with other machines: what lies there is fetched and not made again, what is made is pushed",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what it would make, and what that takes as far as it is known")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="two batches through every stage, to see that they work; no results")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=256, help="exports, variants and bundles that are made side by side")
    ] = 1,
    memory_limit: Annotated[
        str | None,
        typer.Option("--memory-limit", metavar="SIZE", help="that those may take together, such as 8GB [default: any]"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a recipe, from teacher to report.

    Stages: data, teacher, distill, export, quantize, package, bench, report. What is sealed already is not done again.
    What fails leaves the others' results: exits 1 where all that failed was refused, else 2. Exits 75 when the advice
    rests on latencies that are not to be trusted.

    Example: kdpipe run my.yaml --set bench.effort=thorough
    """
    from .core.errors import Untrusted, UserError
    from .jobs import read_bytes

    if smoke and (start or again):
        raise UserError("--smoke begins anew each time: leave --from and --again out")
    limit = None if memory_limit is None else read_bytes(memory_limit, "--memory-limit")
    if dry_run:
        _plan(recipe, artifacts, changes or (), again, start, until, as_json, allow_code, smoke)
        return
    same = shlex.join([str(recipe), *(word for change in changes or () for word in ("--set", change))])
    if smoke:
        _smoke(recipe, artifacts, changes or (), until, allow_code, jobs, limit, as_json)
        return
    doubt, lost, failed = _run(
        recipe, artifacts, again, as_json, changes or (), start, until, allow_code, store, jobs, limit
    )
    if failed:
        raise _failure(failed, lost)
    if lost:
        raise UserError(f"{lost}; the others are reported, run the same again when it is back")
    if doubt is not None:
        raise Untrusted(f"{doubt}; measure again on a quiet machine: kdpipe run {same} --again bench")


def _failure(failed: Mapping[str, KdpipeError], lost: str = "") -> KdpipeError:
    """What a run ends with of which parts failed, each in a line of its own before it, unless it is one alone."""
    from .core.errors import GateFailed, UserError

    kind = GateFailed if all(isinstance(error, GateFailed) for error in failed.values()) and not lost else UserError
    again = "the others are done, and the same command tries again"
    if len(failed) == 1 and not lost:
        [(name, error)] = failed.items()
        return kind(f"{name}: {error}; {again}")
    for line in [*(f"{name}: {error}" for name, error in failed.items()), *([lost] if lost else [])]:
        typer.echo(printable(f"kdpipe: {line}"), err=True)
    return kind(f"{len(failed) + bool(lost)} failed: {', '.join([*failed, *(['devices'] if lost else [])])}; {again}")


@app.command()
def demo(artifacts: ArtifactsOption = ARTIFACTS, again: AgainOption = None, as_json: JsonFlag = False) -> None:
    """Run recipes/digits.yaml: everything for real, in minutes."""
    doubt, _, failed = _run(Path(__file__).parent / "recipes" / "digits.yaml", artifacts, again, as_json)
    if failed:
        raise _failure(failed)
    if doubt is not None:
        typer.echo(f"{doubt}; measure again on a quiet machine: kdpipe demo --again bench", err=True)


def _plan(
    recipe_path: Path,
    artifacts: Path,
    changes: Sequence[str],
    again: str | None,
    start: str | None,
    until: str | None,
    as_json: bool,
    allow_code: Sequence[str] | None,
    small: bool,
) -> None:
    """Say what a run would do; or what a smoke run would."""
    from . import pipeline, showing, smoke
    from .core.config import read_recipe
    from .forecast import total

    recipe, chain = read_recipe(recipe_path, changes), _chain(artifacts, allow_code=allow_code)
    if small:
        recipe, chain = smoke.smoke(recipe), _chain(artifacts / smoke.SMOKE / "next", allow_code=allow_code)
        chain.smoke = True
    legs = pipeline.plan(recipe, chain, again, until)
    pipeline.check_start(legs, start, until)
    costs = pipeline.costs(legs, pipeline.forecast_of(chain))
    if as_json:
        level = pipeline.levels(legs)
        described = [
            {**showing.described(leg, cost), "level": level[leg.id]} for leg, cost in zip(legs, costs, strict=True)
        ]
        whole = total(cost for leg, cost in zip(legs, costs, strict=True) if not leg.perhaps)
        _print_json(recipe=str(recipe_path), legs=described, total=whole._asdict())
        return
    showing.print_plan(_wide_console(), legs, costs)


def _run(
    recipe_path: Path,
    artifacts: Path,
    again: str | None,
    as_json: bool,
    changes: Sequence[str] = (),
    start: str | None = None,
    until: str | None = None,
    allow_code: Sequence[str] | None = None,
    store: str | None = None,
    jobs: int = 1,
    memory_bytes: int | None = None,
) -> tuple[str | None, str, dict[str, KdpipeError]]:
    """Run and print; returns which latencies that the advice rests on are not to be trusted, which devices lost, and
    what else failed.
    """
    from . import pipeline
    from .core.config import read_recipe
    from .diary import Diary
    from .jobs import Ahead
    from .report.words import shaky_advice

    recipe = read_recipe(recipe_path, changes)
    chain = _chain(artifacts, allow_code=allow_code, store=store)
    failed: dict[str, KdpipeError] = {}
    with Diary(artifacts, _command(recipe_path, artifacts, changes)) as diary:
        ahead = Ahead(recipe, chain, jobs, memory_bytes)
        outcome = pipeline.run_part(recipe, chain, again, start, until, ahead, failed, diary)
    done = [step for step in chain.steps if not step.sealed_before]
    told = f"{len(chain.steps)} stages, {len(done)} done now in {sum(step.seconds for step in done):.0f} s"
    if outcome is None:
        if as_json:
            _print_json(artifacts=[str(step.path) for step in chain.steps], seconds=_seconds(chain))
        else:
            typer.echo(f"{told}; the same without --until goes on")
        return None, "", failed
    numbers, page = outcome.report.numbers, outcome.report.page
    if as_json:
        bundles = {name: str(bundle.path) for name, bundle in outcome.bundles.items()}
        reasons = {name: str(error) for name, error in failed.items()}
        _print_json(report=str(page), bundles=bundles, seconds=_seconds(chain), failed=reasons, numbers=numbers)
        return shaky_advice(numbers), outcome.lost, failed
    _print_summary(numbers)
    typer.echo(told)
    typer.echo(f"report: {page}")
    return shaky_advice(numbers), outcome.lost, failed


def _command(recipe: Path, artifacts: Path, changes: Sequence[str], *more: str) -> list[str]:
    """What goes on with a run."""
    folder = [] if artifacts == ARTIFACTS else ["--artifacts", str(artifacts)]
    return ["kdpipe", "run", str(recipe), *folder, *(w for change in changes for w in ("--set", change)), *more]


def _smoke(
    recipe_path: Path,
    artifacts: Path,
    changes: Sequence[str],
    until: str | None,
    allow_code: Sequence[str] | None,
    jobs: int,
    memory_bytes: int | None,
    as_json: bool,
) -> None:
    """Two batches through every stage; raises what did not work."""
    import time

    from . import pipeline, smoke
    from .core.config import read_recipe
    from .core.errors import UserError
    from .diary import Diary
    from .jobs import Ahead

    begun, recipe = time.monotonic(), smoke.smoke(read_recipe(recipe_path, changes))
    failed: dict[str, KdpipeError] = {}
    with smoke.own_folder(artifacts) as folder:
        chain = _chain(folder, allow_code=allow_code)
        chain.smoke, chain.remembered, chain.store = True, artifacts, None
        below = str(folder.relative_to(artifacts))
        with Diary(artifacts, _command(recipe_path, artifacts, changes, "--smoke"), below) as diary:
            ahead = Ahead(recipe, chain, jobs, memory_bytes)
            outcome = pipeline.run_part(recipe, chain, None, None, until, ahead, failed, diary)
    lost, page, bundles = "", None, 0
    if outcome is not None:
        failed |= smoke.faults(outcome.measurements)
        lost, page, bundles = outcome.lost, outcome.report.page, len(outcome.bundles)
    seconds = time.monotonic() - begun
    if as_json:
        reasons = {name: str(error) for name, error in failed.items()}
        told = {"report": None if page is None else str(page), "bundles": bundles, "failed": reasons, "lost": lost}
        _print_json(smoke=True, artifacts=str(folder), seconds=round(seconds, 3), **told)
    else:
        typer.echo(
            f"smoke run: {len(chain.steps)} artifacts, {bundles} bundles in {seconds:.0f} s, in "
            f"{printable(str(folder))}; no number of it is a result"
        )
    if failed:
        raise _failure(failed, lost)
    if lost:
        raise UserError(f"{lost}; the others were measured")


@app.command()
def status(artifacts: ArtifactsOption = ARTIFACTS, as_json: JsonFlag = False) -> None:
    """Say what runs in a folder of artifacts, what waits, what failed when it was tried last, and the time left.

    A run that was killed is told as such, with the command that goes on with it. Nothing is changed.

    Example: kdpipe status
    """
    from . import diary, showing
    from .core.errors import UserError

    if not artifacts.is_dir():
        raise UserError(f"no folder {artifacts}: wanted one that holds artifacts (--artifacts names another)")
    found = diary.status(artifacts)
    if as_json:
        _print_json(**found.model_dump(mode="json"))
        return
    for line in showing.status_lines(found):
        typer.echo(printable(line))


# ---- one stage at a time ---------------------------------------------------------------------------------


@app.command()
@configured(DataPlan, leave_out=("source", "skip_broken"))
def data(
    source: Annotated[
        str,
        typer.Argument(
            help="a folder with train/<class>/* and val/<class>/* (masks: train/images/* and train/masks/*), 'digits', "
            "'masks', hfds/NAME"
        ),
    ],
    artifacts: ArtifactsOption = ARTIFACTS,
    out: OutOption = None,
    skip_broken: Annotated[
        bool,
        typer.Option("--skip-broken", help="leave images out that cannot be read, named, instead of refusing them"),
    ] = False,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., DataPlan],
) -> None:
    """Check the images of a source, split them, and say what they are.

    Example: kdpipe data photos
    """
    chain = _chain(artifacts)
    dataset = chain.data(config(source=source, skip_broken=skip_broken), out)
    survey = dataset.survey
    if as_json:
        _print_json(**_described(dataset), survey=None if survey is None else survey.model_dump(mode="json"))
        return
    if survey is not None:
        from .data.survey import findings, summary

        told = findings(survey, dataset.classes) if chain.steps[-1].sealed_before else []  # else they were told already
        for line in [*summary(survey, dataset.classes), *told, f"contact sheet: {dataset.path / dataset.SHEET}"]:
            typer.echo(printable(line))
    _print_artifact(dataset, as_json)


@app.command()
@configured(TeacherPlan)
def teacher(
    dataset: Annotated[Path, typer.Argument(help="folder of a dataset artifact", parser=folder_or_url)],
    out: OutOption = None,
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., TeacherPlan],
) -> None:
    """Read a teacher from a checkpoint, or train one.

    Example: kdpipe teacher artifacts/data-1a2b --model resnet50 --checkpoint resnet50.safetensors
    """
    opened = _open_dataset(dataset)
    settings = config()
    chain = _chain_of(dataset, joint=settings.is_trained, allow_code=allow_code)
    _print_artifact(chain.teacher(settings, opened, out), as_json)


@app.command()
@configured(CachePlan)
def cache(
    teacher: Annotated[Path, typer.Argument(help="folder of the teacher's checkpoint", parser=folder_or_url)],
    data: DataOption = None,
    out: OutOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what it would take")] = False,
    verify: Annotated[
        str | None, typer.Option("--verify", help="ask the teacher again about this share of the records, such as 0.1%")
    ] = None,
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., CachePlan],
) -> None:
    """Ask the teacher beforehand what students will learn from it.

    Example: kdpipe cache artifacts/teacher-1a2b --model mobilenetv4_conv_small --views 16
    """
    from .chain import cache_order
    from .core.code import allowing
    from .core.kinds import Checkpoint
    from .networks.names import check_network
    from .terminal import tell_forecast

    share, settings = None if verify is None else _share(verify), config()
    check_network(settings)
    opened = Checkpoint.open(teacher)
    from .distill.cache import config_of, forecast
    from .distill.cache import verify as verify_cache

    plan, chain = config_of(settings), _chain_of(teacher, joint=not dry_run, allow_code=allow_code)
    dataset = _dataset_of(opened, data)
    path = out or chain.path("cache", cache_order(plan, dataset, opened))
    if dry_run or not path.exists():
        with allowing(chain.allow_code):
            expected = forecast(plan, dataset, opened, path)
        if dry_run and as_json:
            _print_json(cache=str(path), forecast=expected.as_dict())
        else:
            tell_forecast(expected)
    if dry_run:
        return
    made = chain.cache(plan, dataset, opened, out)
    with allowing(chain.allow_code):
        checked = None if share is None else verify_cache(made, dataset, opened, share)
    if checked is not None and as_json:
        _print_json(artifact=str(made.path), kind=made.kind, key=made.key, facts=made.manifest.facts, verified=checked)
        return
    if checked is not None:
        typer.echo(
            f"{checked['checked']} of {checked['of']} records asked again: largest difference "
            f"{checked['largest_relative_difference']:.2g}, agreement {checked['agreement']:.1%}",
            err=True,
        )
    _print_artifact(made, as_json)


@app.command()
@configured(TrainConfig)
def distill(
    teacher: Annotated[
        Path,
        typer.Argument(
            help="folder of the teacher's checkpoint (or of a dataset, for --method labels)", parser=folder_or_url
        ),
    ],
    data: DataOption = None,
    out: OutOption = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="folder or URL (s3://, hf://) of a cache of the teacher's outputs")
    ] = None,
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., TrainConfig],
) -> None:
    """Train one student.

    Example: kdpipe distill artifacts/teacher-1a2b --model mobilenetv4_conv_small
    """
    from .core.artifact import read_manifest
    from .core.kinds import Checkpoint
    from .data.dataset import Dataset

    settings, chain = config(), _chain_of(teacher, joint=True, allow_code=allow_code)
    if read_manifest(teacher).kind == Dataset.kind:
        guide, dataset = None, _open_dataset(teacher)
    else:
        opened = Checkpoint.open(teacher)
        guide, dataset = opened, _dataset_of(opened, data)
    remembered = None
    if cache is not None:
        remembered = _cache_at(cache, chain, settings, dataset, guide)
        seen = remembered.settings
        as_stored = {"cache_views": seen["views"], "view_seed": seen["view_seed"]}
        left_out = {name: value for name, value in as_stored.items() if getattr(settings, name) is None}
        settings = settings.model_copy(update=left_out)
    _print_artifact(chain.distill(settings, dataset, guide, out, remembered), as_json)


@app.command()
@configured(StudyPlan, leave_out=("student.model", "further", "teachers", "starts", "claims"))
def study(
    data: Annotated[str, typer.Argument(help="folder of a dataset artifact, or a source as kdpipe data takes it")],
    teacher: Annotated[Path, typer.Argument(help="folder of the teacher's checkpoint", parser=folder_or_url)],
    student: Annotated[str, typer.Option("--student", help="a small network by its name")],
    further: Annotated[
        list[str] | None,
        typer.Option(
            "--further",
            metavar="NAME=CHANGE",
            help="a method of your own (repeatable), such as hot='{method: kd, temperature: 9}': its change of distill",
        ),
    ] = None,
    teachers: Annotated[
        list[str] | None,
        typer.Option("--teachers", metavar="NAME=FOLDER", help="a further teacher's checkpoint (repeatable)"),
    ] = None,
    starts: Annotated[
        list[str] | None,
        typer.Option(
            "--starts",
            metavar="NAME=FOLDER",
            help="all methods also from the weights of this checkpoint, of the same network (repeatable)",
        ),
    ] = None,
    claims: Annotated[
        list[str] | None,
        typer.Option(
            "--claim",
            metavar="CLAIM",
            help="what is claimed before anything runs (repeatable, five at most), such as 'kd-T4 > labels at 0.02' or "
            "'hint > kd-T4 at 10% by 1' [default: that methods beat labels on the smallest share]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what it would run, what that takes and what it could tell")
    ] = False,
    artifacts: ArtifactsOption = ARTIFACTS,
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., StudyPlan],
) -> None:
    """Compare methods on shares of your images, at equal cost and with controls, and judge claims named before.

    What is sealed is not run again; killed, the same command goes on. Start it in several processes or on several
    machines that share the folder, or with torchrun (each process on a device of its own), and each takes runs that
    nobody has. Exits 1 or 2 where runs failed; the page is of the others.

    Example: kdpipe study photos artifacts/teacher-1a2b --student resnet8 --fractions 0.1,1 --budget 2h
    """
    from . import study as studying
    from .core import progress
    from .core.kinds import Checkpoint
    from .core.proc import spread
    from .report.study import closing_lines

    speaks = spread() == 0
    named: dict[str, Any] = {
        "further": {name: _yaml_of(name, text) for name, text in _pairs("--further", further)},
        "teachers": {name: folder_or_url(text) for name, text in _pairs("--teachers", teachers)},
        "starts": {name: folder_or_url(text) for name, text in _pairs("--starts", starts)},
        "claims": tuple(claims or ()),
    }
    settings = config(student={"model": student}, **named)
    guide, chain = Checkpoint.open(teacher), _chain(artifacts, allow_code=allow_code)
    if not speaks:
        progress.listen(progress.Silence())
    dataset = _data_of(data, chain, dry_run)
    if dry_run:
        planned = studying.plan(settings, dataset, guide, chain)
        if as_json:
            _print_json(**planned.as_dict())
        else:
            for line in planned.lines():
                typer.echo(printable(line))
        return
    failed: dict[str, KdpipeError] = {}
    made = studying.run(settings, dataset, guide, chain, failed)
    if speaks and as_json:
        reasons = {name: str(error) for name, error in failed.items()}
        _print_json(**_described(made), page=str(made.page), failed=reasons, numbers=made.numbers)
    elif speaks:
        for line in closing_lines(made.numbers):
            typer.echo(printable(line))
        typer.echo(printable(f"page: {made.page}"))
        typer.echo(printable(f"recipe: {made.file(made.RECIPE)}"))
    if failed:
        raise _failure(failed)


def _pairs(option: str, texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """Each ``NAME=VALUE`` of a repeatable option. Raises UserError."""
    from .core.errors import UserError

    found = [text.partition("=") for text in texts or ()]
    for name, equals, value in found:
        if not (name and equals and value):
            raise UserError(f"{option}: wanted NAME=VALUE, found '{name}{equals}{value}'")
    if len({name for name, _, _ in found}) < len(found):
        raise UserError(f"{option}: each name can be given once")
    return [(name, value) for name, _, value in found]


def _yaml_of(name: str, text: str) -> Any:
    from .core.config import parse_yaml

    return parse_yaml(text, f"--further {name}")


def _data_of(text: str, chain: Chain, dry_run: bool) -> Dataset:
    """The dataset in a folder, or of a source, which is read unless that would be more than to look."""
    from .core.artifact import MANIFEST
    from .core.errors import UserError

    if (Path(text) / MANIFEST).is_file():
        return _open_dataset(folder_or_url(text))
    plan = DataPlan(source=text)
    if dry_run and not chain.path("data", chain.data_order(plan)).exists():
        raise UserError(f"{text} is not read yet, and --dry-run makes nothing: kdpipe data {shlex.quote(text)} first")
    return chain.data(plan)


@app.command()
@configured(NetworkExportPlan, leave_out=("model", "pretrained"))
def export(
    student: Annotated[
        Path | None, typer.Argument(help="folder of a checkpoint; or --model", parser=folder_or_url)
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="a network by its name, in place of a checkpoint and without a data set")
    ] = "",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="--model with its pretrained weights")] = False,
    data: DataOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
    out: OutOption = None,
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., NetworkExportPlan],
) -> None:
    """Write a network for one target, checked against torch: on images of the data, or --model's on random ones.

    What is checked on random images says nothing of accuracy, and wants a data set (--data) to be made smaller.

    Example: kdpipe export CHECKPOINT --target tensorrt
    """
    from .core.config import AdoptConfig, ExportConfig
    from .core.errors import UserError
    from .core.kinds import Checkpoint

    plan = config(model=model, pretrained=pretrained)
    target, network = ExportConfig.of(plan), AdoptConfig.of(plan)
    if student is not None:
        if network != AdoptConfig(model="") or plan.classes is not None:
            raise UserError("wanted the folder of a checkpoint, which says all of its network, or --model: not both")
        opened = Checkpoint.open(student)
        chain = _chain_of(student, allow_code=allow_code)
        _print_artifact(chain.export(target, opened, _dataset_of(opened, data), out), as_json)
        return
    if not model:
        raise UserError("wanted the folder of a checkpoint, or --model NAME with --pretrained or --checkpoint FILE")
    if data is not None:
        raise UserError("--model is exported without a data set; with one: kdpipe teacher DATA --model NAME, then this")
    chain = _chain(artifacts, allow_code=allow_code)
    checkpoint, images = chain.bare(network, plan.classes, target.parity_images)
    made = chain.export(target, checkpoint, images, out)
    if not as_json:
        typer.echo(f"compared with torch on {target.parity_images} random images: its accuracy is not known", err=True)
    _print_artifact(made, as_json)


@app.command()
@configured(AdoptFilePlan)
def adopt(
    file: Annotated[Path, typer.Argument(help="somebody's .onnx file, float32, of one image")],
    data: Annotated[Path, typer.Option("--data", help="folder of the dataset artifact", parser=folder_or_url)],
    out: OutOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., AdoptFilePlan],
) -> None:
    """Take a model of somebody else's, to be made smaller, packaged and measured like any other.

    Say with --input.mean and --input.std what it wants of its colours; else it is given 0..255. The normalisation is
    folded into it, and the result compared with the file as it came.

    Example: kdpipe adopt model.onnx --data artifacts/data-1a2b --input.mean "[0.485, 0.456, 0.406]"
    """
    _print_artifact(_chain_of(data).adopt(config(), file, _open_dataset(data), out), as_json)


@app.command()
@configured(QuantizeConfig)
def quantize(
    model: Annotated[Path, typer.Argument(help="folder of a float32 model", parser=folder_or_url)],
    data: DataOption = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="where it will run: decides what is left to the CPU", autocompletion=_device_names
        ),
    ] = "local",
    out: OutOption = None,
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., QuantizeConfig],
) -> None:
    """Make a smaller variant of a model: INT8 calibrated on training images, bf16, float16.

    --variant auto makes every one that could be the best on this machine: bench them to know which is. int8-qad
    trains the student for 8 bits, without labels, and compares it with INT8 without training. With --max-drop it
    exits 1 if more is surely lost (nothing is sealed), and 75 if the held-out images cannot tell.

    Example: kdpipe quantize MODEL --max-drop 0.5
    """
    from .core.config import QuantizePlan
    from .core.errors import Untrusted, UserError
    from .core.kinds import Model, unshown
    from .devices import find_device

    settings, opened, chain = config(), Model.open(model), _chain_of(model, allow_code=allow_code)
    dataset, probe = _dataset_of(opened, data), find_device(device).probe()
    if settings.variant != "auto":
        made = [chain.quantize(settings, opened, dataset, probe, out)]
    elif out is not None:
        raise UserError("--variant auto makes several artifacts: leave --out away, they go beside the model")
    else:
        made = chain.variants(QuantizePlan.of(settings), opened, dataset, probe)
    for each in made:
        _print_artifact(each, as_json)
    if told := unshown(made):
        raise Untrusted(told)


@app.command()
@configured(PackageConfig)
def package(
    model: Annotated[Path, typer.Argument(help="folder of a model, float32 or INT8", parser=folder_or_url)],
    data: DataOption = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., PackageConfig],
) -> None:
    """Pack a model with labels, golden inputs and the runner.

    Example: kdpipe package MODEL
    """
    from .core.kinds import Model

    opened = Model.open(model)
    _print_artifact(_chain_of(model).package(config(), opened, _dataset_of(opened, data), out), as_json)


@app.command()
@configured(BenchPlan, leave_out=("devices",))
def bench(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            help="folders of bundles, float32 ones among them to compare with; or models of others: "
            "model.onnx, model.tflite, model.xml",
            parser=folder_or_url,
        ),
    ],
    data: DataOption = None,
    input: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="{...}",
            help="with --data, how images become a model's input, such as '{size: 224, layout: NHWC}'; "
            "mean and std where it takes normalised ones",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="devices, measured side by side, such as pi5,orin (see devices list)",
            autocompletion=_device_names,
        ),
    ] = "local",
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", help="a bundle that the others are compared with, one sentence each", parser=folder_or_url
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="only what a lost device lacks of the sessions that the others have")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="further sessions of the same (as every call): claims are pooled over all")
    ] = False,
    out: OutOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., BenchPlan],
) -> None:
    """Measure accuracy and latency of bundles, on one device or several.

    All in one session a device, interleaved, each time in a fresh process. Every call is an attempt of its own. A lost
    device leaves the others' results whole: exit 2, then --resume. Models that are no bundles are timed on random
    input, unless --data and --input say what they are to be shown. Exits 75 when a latency cannot be trusted.

    Example: kdpipe bench BUNDLE --against BUNDLE --device pi5
    """
    from .chain import pooled_beside
    from .core.errors import Untrusted, UserError
    from .devices.session import swept
    from .report.against import against as compare
    from .report.words import random_input_lines, untrusted_lines

    if resume and again:
        raise UserError("--resume measures what is lacking, --again measures more: choose one of them")
    plan = config(devices=tuple(name.strip() for name in device.split(",")))
    with _to_bench([*bundles, *([against] if against is not None else [])], data, input) as (named, dataset):
        benched = _chain_of(bundles[0]).bench(plan, named, dataset, out, resume=resume)
    pooled = [pooled_beside(measurement) for measurement in benched.one_of_each]
    sentences = []
    if against is not None:
        *others, base = (list(swept({name: name}, plan.threads)) for name in named)
        pairs = [pair for rows in others for pair in zip(rows, base, strict=True)]
        sentences = [compare(of_device, *pair) for of_device in pooled for pair in pairs]
    made = [measurement for sessions in benched.measured.values() for measurement in sessions]
    if as_json:
        _print_json(
            measurements=[_described(measurement) for measurement in made],
            comparisons=[found.as_dict() for found in sentences],
            lost={name: str(error) for name, error in benched.lost.items()},
        )
    else:
        for measurement in made:
            typer.echo(printable(str(measurement.path)))
        for of_device in pooled if dataset is None else ():
            for line in random_input_lines(of_device.facts):
                typer.echo(printable(line))
        for found in sentences:
            typer.echo(found.sentence())
    if benched.lost:
        raise UserError(f"{benched.told_lost}; what the others found is whole, go on with --resume")
    doubts = []
    for of_device in pooled:
        rows_of = [{"name": name, **trust.model_dump()} for name, trust in of_device.facts.untrusted.items()]
        prefix = f"{of_device.facts.device}: " if len(pooled) > 1 else ""
        doubts += [prefix + line for line in untrusted_lines(rows_of)]
    if doubts:
        raise Untrusted("; ".join(doubts) + "; measure again when the machine is quiet")


@contextmanager
def _to_bench(
    paths: Sequence[Path], data: Path | None, input: str | None
) -> Iterator[tuple[Mapping[str, Runnable], Dataset | None]]:
    """Bundles by name and their dataset; or models of others, wrapped for as long as the block takes."""
    import tempfile

    from .core.config import parse_yaml
    from .core.errors import UserError
    from .core.kinds import Bundle
    from .deploy import strange

    files = [path for path in paths if path.suffix in strange.TARGETS and not path.is_dir()]
    if not files:
        if input is not None:
            raise UserError("--input is of models that are no bundles: a bundle says by itself what it takes")
        opened = [Bundle.open(path) for path in paths]
        yield _bundle_names(opened), _dataset_of(opened[0], data)
        return
    if len(files) < len(paths):
        raise UserError("bundles and models of others are measured apart: name only one kind")
    if (data is None) != (input is None):
        raise UserError("--data and --input go together: images, and how they become the model's input")
    dataset = None if data is None else _open_dataset(data)
    spec = None if input is None else strange.described(parse_yaml(input, "--input"))
    with tempfile.TemporaryDirectory() as folder:
        named: dict[str, Runnable] = {}
        for path in files:
            name = re.sub(r"[^A-Za-z0-9._-]", "-", path.name)
            if name in named:
                raise UserError(f"two models are called {name}: rename one")
            named[name] = strange.wrap(path, Path(folder) / name, spec, dataset)
        yield named, dataset


def _bundle_names(opened: Sequence[Bundle]) -> dict[str, Bundle]:
    """Bundles by target and variant; several of one kind are told apart by their keys."""
    kinds = [f"{bundle.facts.target}-{bundle.facts.variant}" for bundle in opened]
    named = {
        kind if kinds.count(kind) == 1 else f"{kind}-{bundle.key[:8]}": bundle
        for kind, bundle in zip(kinds, opened, strict=True)
    }
    if len(named) < len(opened):
        from .core.errors import UserError

        raise UserError("a bundle is named twice: name each once")
    return named


SignatureOption = Annotated[
    Path | None,
    typer.Option("--signature", metavar="PUBLIC.pem", help="see that the holder of this key signed it, else exit 1"),
]
IdentityOption = Annotated[
    str | None,
    typer.Option("--identity", help="sigstore: who signed it, such as a workflow's URL (not exercised here)"),
]
IssuerOption = Annotated[
    str | None, typer.Option("--issuer", help="sigstore: who vouches for --identity, a URL (not exercised here)")
]


@app.command()
def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE|RELEASE", help="folder of a bundle or a release", parser=folder_or_url),
    ],
    signature: SignatureOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a bundle or a release, and replay golden inputs.

    Compares every file with its hash, opens the model and runs it; executes nothing of the bundle and needs
    no torch. Hashes say that nothing changed, a signature says whom it is from: --signature wants one, which a release
    has, and a bundle in it.

    Example: kdpipe verify releases/birds/1.4.0 --signature birds.pem
    """
    from .core.artifact import read_manifest
    from .core.errors import GateFailed
    from .core.kinds import Release
    from .deploy import release
    from .deploy.bundle import verify as verify_bundle
    from .deploy.signature import signer

    by = signer(signature, identity, issuer)
    inside = release.holding(path)
    if inside is not None or read_manifest(path).kind == Release.kind:
        checked = release.check(path if inside is None else inside[0], by)
        replayed = release.replay(checked, None if inside is None else inside[1])
        facts = checked.release.facts
        if as_json:
            _print_json(
                release=str(checked.release.path),
                title=facts.title,
                key=checked.release.key,
                unchanged=True,
                signed=checked.release.is_signed,
                signed_by=checked.signed_by,
                bundles=replayed,
            )
            return
        for line in checked.lines():
            typer.echo(line)
        for name, found in replayed.items():
            typer.echo(printable(f"{name}: {found if isinstance(found, str) else _golden(found)}"))
        return
    if by is not None:
        raise GateFailed(f"{path} is not signed: a release is, and this bundle is in none")
    opened, found = verify_bundle(path)
    if as_json:
        _print_json(bundle=str(path), key=opened.key, **found)
        return
    typer.echo(f"{printable(str(path))}: whole; {_golden(found)}")


def _golden(found: Mapping[str, Any]) -> str:
    """What replaying the golden inputs found, in words."""
    by = f" (by {found['session']['runtime']} in its place)" if found["stand_in"] else ""
    return (
        f"{found['golden_images']} golden images within {found['max_difference']:.2g} "
        f"(tolerance {found['tolerance']:.2g}){by}"
    )


@app.command()
@configured(McuConfig)
def check(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle, int8-full of tflite", parser=folder_or_url)],
    mcu: Annotated[
        bool, typer.Option("--mcu", help="against a microcontroller: the one kind of check there is")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="folder of a dataset artifact, whose test images are run besides the golden ones",
            parser=folder_or_url,
        ),
    ] = None,
    out: OutOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., McuConfig],
) -> None:
    """Hold a bundle against a microcontroller: the same integers there, memory, cycles, an array in C++.

    The interpreter of TensorFlow Lite for Microcontrollers runs the model here, on real images, and has to give the
    integers of LiteRT's reference kernels; its arena is held against --ram, the model's bytes against --flash. Exits 1
    where that fails, with what failed. Cycles on Ethos-U are vela's estimate. What was found is sealed beside the
    bundle, with the model as kdpipe_model.h and .cc where it fits. No firmware is built.

    Examples: kdpipe check BUNDLE --mcu --ram 256k --flash 1M; kdpipe check BUNDLE --mcu --accelerators ethos-u55-128
    """
    from .core.errors import GateFailed, UserError
    from .core.kinds import Bundle
    from .deploy import micro
    from .deploy.release import holding

    if not mcu:
        raise UserError("nothing says against what to check: wanted --mcu")
    if out is None and holding(bundle) is not None:
        raise UserError(f"{bundle} is in a release, which stays as it is: say by --out where the check goes")
    opened = Bundle.open(bundle)
    made = _chain_of(out or bundle).check_mcu(config(), opened, _open_dataset(data) if data else None, out)
    if as_json:
        _print_json(**_described(made))
    else:
        for line in micro.lines(made.facts):
            typer.echo(printable(line))
        typer.echo(printable(f"{'refused' if made.facts.refused else 'fits'}: {made.path}"))
    if made.facts.refused:
        raise GateFailed(f"{printable(str(bundle))} is refused: {'; '.join(made.facts.refused)}")


@app.command()
def release(
    title: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="such as birds@1.4.0")],
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="BUNDLE...", help="folders of bundles", parser=folder_or_url)
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="folder or URL that gets NAME/VERSION, or hf://ORGANISATION/REPOSITORY")
    ] = "releases",
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="in place of BUNDLE: all that this recipe made, with its report")
    ] = None,
    artifacts: ArtifactsOption = ARTIFACTS,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="folder of the report that measured them", parser=folder_or_url),
    ] = None,
    verdict: Annotated[
        Path | None,
        typer.Option(
            "--verdict",
            help="folder of the gate's verdict: anything but pass releases nothing",
            parser=folder_or_url,
        ),
    ] = None,
    last: Annotated[
        Path | None,
        typer.Option("--last", help="folder of the release before: what changed", parser=folder_or_url),
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="of the release itself, as SPDX writes it")] = None,
    acknowledge: Annotated[
        list[str] | None,
        typer.Option("--acknowledge", metavar="LICENCE", help="ship work under this licence (repeatable)"),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="PRIVATE.pem",
            help="sign with this key, P-256, P-384 or P-521 (KDPIPE_KEY_PASSWORD, if it is encrypted)",
        ),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="sign as whom the CI says this job is (not exercised here)")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Release bundles under a version: card, bill of materials, sums, provenance, changes, signature.

    What is published is whole, and a version is never overwritten. Exits 1 when the verdict is fail or a licence that
    binds its users was not acknowledged, 75 when the verdict cannot tell.

    Example: kdpipe release birds@1.4.0 --recipe birds.yaml --key private.pem --to s3://models
    """
    from .core.config import ReleaseConfig, read_recipe, validated
    from .core.errors import UserError
    from .core.kinds import Bundle, Report, Verdict
    from .deploy import release as releasing
    from .deploy import signature as signing
    from .deploy.versions import named

    name, version = named(title)
    if version is None:
        raise UserError(f"'{title}' names no version: wanted one that is new, such as {name}@1.0.0")
    if bool(bundles) == (recipe is not None):
        raise UserError("wanted the folders of bundles, or --recipe, and not both")
    if key is not None and sigstore:
        raise UserError("wanted --key or --sigstore, and not both: a release has one signature")
    if license is not None:
        validated(ReleaseConfig, {"name": name, "version": version.text, "license": license}, "--license")
    sign = signing.by_key(key) if key is not None else signing.by_identity() if sigstore else None
    chain = _chain(artifacts)
    page = None if report is None else Report.open(report)
    said: dict[str, str | None] = {}
    if recipe is not None:
        from .pipeline import made

        read = read_recipe(recipe)
        opened, found = made(read, chain)
        page, said = page or found, {"data": read.data.license, "teacher": read.teacher.license}
    else:
        opened = [Bundle.open(path) for path in bundles or ()]
    wish = releasing.Wish(
        name=name,
        version=version,
        bundles=_bundle_names(opened),
        license=license,
        said=said,
        acknowledged=tuple(acknowledge or ()),
        report=page,
        verdict=None if verdict is None else Verdict.open(verdict),
        last=releasing.open_last(last),
    )
    published = releasing.release(wish, to, sign)
    facts = published.facts
    if as_json:
        _print_json(release=published.place, key=published.key, signed=sign is not None, **facts.model_dump())
        return
    gated = "nothing gated it" if facts.verdict is None else f"the gate said {facts.verdict}"
    typer.echo(
        printable(
            f"{published.place}: {facts.title}, {len(facts.bundles)} bundles, "
            f"{'signed' if sign is not None else 'not signed'}; {gated}"
        )
    )


@app.command()
def pull(
    title: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="such as birds@1.4.0, or birds@latest")],
    source: Annotated[str, typer.Option("--from", metavar="FOLDER|URL", help="where kdpipe release put it, hf:// too")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the release [default: releases/NAME/VERSION]")
    ] = None,
    signature: SignatureOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Fetch a release, which appears once all of it was checked.

    Example: kdpipe pull birds@latest --from s3://models --signature birds.pem
    """
    from .core import progress
    from .deploy import release as releasing
    from .deploy.signature import signer
    from .deploy.versions import named
    from .terminal import listener

    progress.listen(listener())
    name, version = named(title)
    found = releasing.pull(name, version, source, out, signer(signature, identity, issuer))
    if as_json:
        facts = found.release.facts
        _print_json(release=str(found.release.path), title=facts.title, signed_by=found.signed_by)
        return
    for line in found.lines():
        typer.echo(line)


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle", parser=folder_or_url)],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="image files, and folders of them")],
    device: Annotated[
        str, typer.Option("--device", help="where to ask, as devices.yaml names it", autocompletion=_device_names)
    ] = "local",
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            min=1,
            help="labels of an image, the likeliest first [default: 1]; of masks the largest classes [default: all]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder for the masks, each drawn over its image as PNG at its own size"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what a bundle sees in images, as CSV: label and probability, --top rows an image.

    Of a model that draws masks: the classes with their share of the image's pixels, and with --out the masks,
    drawn over the images. Nothing but such an overlay is ever written over.

    A probability is how sure the model is, not how often it is right. Images that cannot be read are named, the others
    answered, and then it exits 2.

    Examples: kdpipe predict BUNDLE holiday.jpg photos --top 3; kdpipe predict BUNDLE streets --out seen
    """
    import csv
    from contextlib import closing

    from .core import progress
    from .core.errors import UserError
    from .core.kinds import Bundle
    from .deploy import overlays
    from .deploy import predict as asking
    from .devices import find_device
    from .terminal import listener

    progress.listen(listener())
    files, rows, faults = asking.find(images), [], []
    written = None if out is None else overlays.place(files, images, out)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    with closing(asking.predict(Bundle.open(bundle), files, find_device(device), top, written)) as answers:
        for at, said in enumerate(answers):
            name, drawn = printable(str(said.image)), printable(str(said.overlay or ""))
            told = [(printable(label), share) for label, share in zip(said.labels, said.figures, strict=True)]
            if said.fault is not None:
                progress.note(said.fault)
                faults.append({"image": name, "reason": printable(said.fault)})
            elif as_json:
                says = [{"label": label, said.figure: round(share, 6)} for label, share in told]
                rows.append({"image": name, "says": says, **({"overlay": drawn} if drawn else {})})
            else:
                if len(faults) == at:  # the first that is answered
                    writer.writerow(["image", "label", said.figure, *(["overlay"] if drawn else [])])
                more = [drawn] if drawn else []
                writer.writerows([name, label, f"{share:.6f}", *more] for label, share in told)
    if as_json:
        _print_json(bundle=str(bundle), device=device, predictions=rows, unreadable=faults)
    if faults:
        raise UserError(f"{len(faults)} of {len(files)} images cannot be read: {faults[0]['reason']}")


@app.command()
def explain(
    things: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT|BUNDLE... IMAGE|FOLDER...",
            help="folders of checkpoints and bundles, then image files and folders of them",
            parser=folder_or_url,
        ),
    ],
    of_class: Annotated[
        str | None,
        typer.Option("--class", help="of which class every map is to be [default: what each network says]"),
    ] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="images at most, the first by name")] = 64,
    device: Annotated[
        str, typer.Option("--device", help="where bundles are asked", autocompletion=_device_names)
    ] = "local",
    out: Annotated[Path, typer.Option("--out", help="file of the page")] = Path("explained.html"),
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show where in images networks see what they say: teacher, student and bundles side by side, on a page.

    Of a checkpoint by class activation (Grad-CAM). A packaged model, such as INT8, has no gradients: of a bundle by
    occlusion, which hides each place in turn and is slower. A map shows what an answer rests on, not that it is right.
    Those of the images on which variants differ stand on the report's page with kdpipe report --explain true.

    Examples: kdpipe explain artifacts/teacher-1a2b artifacts/student-3c4d holiday.jpg; kdpipe explain CHECKPOINT BUNDLE
    photos --class cat --out cats.html
    """
    from .core import progress
    from .core.artifact import MANIFEST
    from .core.code import allowing
    from .core.errors import UserError
    from .core.proc import require
    from .deploy import explain as explaining
    from .deploy import predict as asking
    from .devices import find_device
    from .report.maps import NEEDS
    from .terminal import listener

    progress.listen(listener())
    require("kdpipe explain", NEEDS, "explain")
    folders = [path for path in things if (path / MANIFEST).is_file()]
    images = [path for path in things if path not in folders]
    networks = explaining.open_networks(folders)
    if not networks or not images:
        missing = "images" if networks else "a checkpoint or bundle"
        raise UserError(f"nothing says {missing}: wanted CHECKPOINT|BUNDLE... IMAGE|FOLDER...")
    explaining.check_place(out)
    files, where = asking.find(images), find_device(device)
    if len(files) > most:
        progress.note(f"the first {most} of {len(files)} images; --most takes more")
    with allowing(allow_code or ()):
        seen = list(explaining.explain(networks, files[:most], where, of_class))
    faults = {printable(str(each.image)): printable(each.fault) for each in seen if each.fault is not None}
    for fault in faults.values():
        progress.note(fault)
    told = [each for each in seen if each.map is not None]
    if told:
        lines = explaining.asked_lines(networks, where)
        explaining.write(out, f"What answers rest on: {', '.join(networks)}", explaining.strips(seen), lines)
    if as_json:
        rows = [explaining.described(each) for each in told]
        unreadable = [{"image": name, "reason": fault} for name, fault in faults.items()]
        _print_json(page=str(out) if told else None, device=device, explained=rows, unreadable=unreadable)
    elif told:
        typer.echo(out)
    if faults:
        first = next(iter(faults.values()))
        raise UserError(f"{len(faults)} of {min(most, len(files))} images cannot be read: {first}")


@app.command()
def deploy(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE|RELEASE",
            help="folder of a bundle, of one in a release, or of a release of one",
            parser=folder_or_url,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="where to, as devices.yaml names it", autocompletion=_device_names)
    ] = "local",
    rollback: Annotated[bool, typer.Option("--rollback", help="go back to the bundle that was live before")] = False,
    signature: SignatureOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a bundle live on a device, or go back to the one before.

    It is pushed by content, every hash is checked there, its golden inputs are replayed there, and then one link is
    switched. Whatever happens, the device serves the old bundle or the new one. Exits 1 when the bundle does not
    compute there what it promises, or, with --signature, when its release is not signed by that key's holder.

    Example: kdpipe deploy releases/birds/1.4.0 --device pi5 --signature birds.pem
    """
    from .core.errors import UserError
    from .deploy import install
    from .deploy.signature import signer
    from .devices import find_device

    if (bundle is None) != rollback:
        raise UserError("wanted the folder of a bundle or a release, or --rollback, and not both")
    by = signer(signature)
    if by is not None and bundle is None:
        raise UserError("--signature is of what is deployed now: what was live before was checked then")
    there = find_device(device)
    found = install.rollback(there) if bundle is None else install.deploy(bundle, there, by)
    if as_json:
        _print_json(device=device, **found.model_dump())
        return
    typer.echo(
        printable(
            f"{device}: {found.live.words}; {found.golden_images} golden images within {found.max_difference:.2g} "
            f"(tolerance {found.tolerance:.2g})"
        )
    )
    if found.removed:
        typer.echo(f"old versions removed: {len(found.removed)}")


@app.command()
def gate(
    candidate: Annotated[Path, typer.Argument(help="a recipe whose run is done, or the folder of a bundle or release")],
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="folder of the release or bundle that it is compared with")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule", help="such as 'accuracy >= baseline - 0.5pp' (repeatable) [default: the recipe's, or the usual]"
        ),
    ] = None,
    sessions: Annotated[
        int | None, typer.Option("--sessions", min=1, help="trusted sessions to judge by [default: the recipe's, or 4]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="where to measure, such as pi5,orin [default: the recipe's, or local]",
            autocompletion=_device_names,
        ),
    ] = None,
    data: DataOption = None,
    artifacts: ArtifactsOption = ARTIFACTS,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="as if it stood in the recipe, such as bench.effort=quick"),
    ] = None,
    comment: Annotated[
        Path | None, typer.Option("--comment", help="also write the comment for a pull request here (Markdown)")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="also write JUnit's XML here")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge a candidate by rules, measured together with what it would replace.

    Both are measured interleaved, in sessions and on images that they share. Exits 0 where every rule is shown to be
    kept, 1 where one is surely broken, 75 where neither can be told, with how many images or sessions would tell.

    Example: kdpipe gate photos.yaml --baseline releases/photos/1.2.0 --comment comment.md
    """
    from . import pipeline
    from .core.artifact import replace_text
    from .core.errors import GateFailed, Untrusted, UserError
    from .deploy import verdict as said

    for path in (comment, junit):
        if path is not None and not path.absolute().parent.is_dir():  # told before minutes of measuring
            raise UserError(f"no folder {path.absolute().parent} to write {path.name} into: make it first")
    devices = [name.strip() for name in device.split(",")] if device else []
    found = pipeline.gate(candidate, baseline, _chain(artifacts), rule or (), devices, sessions, data, changes or ())
    for path, name in ((comment, found.COMMENT), (junit, found.JUNIT)):
        if path is not None:
            replace_text(path, found.file(name).read_text(encoding="utf-8"))
    if as_json:
        _print_json(artifact=str(found.path), verdict=said.numbers(found.facts))
    else:
        for line in said.lines(found.facts):
            typer.echo(printable(line))
        typer.echo(printable(f"verdict: {found.path}"))
    told = said.summary(found.facts)
    if found.facts.answer == "fail":
        raise GateFailed(told)
    if found.facts.answer == "cannot tell":
        raise Untrusted(f"{told}; {said.would_tell(found.facts)}")


@app.command()
@configured(PickPlan)
def pick(
    dataset: Annotated[Path, typer.Argument(help="folder of a dataset artifact", parser=folder_or_url)],
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", help="folder of the teacher's checkpoint, for --train", parser=folder_or_url),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="measure the chosen one in one session more")] = False,
    allow_code: AllowCodeOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., PickPlan],
) -> None:
    """Choose a student by what it takes on a device, before any is trained.

    Networks of random weights are made, made small and measured, a few of many: those that are worth it by what is
    known of the others. How good each may become is a prior, which is said with the answer. The same command goes on
    where it was ended. Exits 1 where nothing is within the limit, and 75 when the chosen one's latency is not to be
    trusted.

    Example: kdpipe pick artifacts/data-1a2b --device pi5 --target tflite --p90 10ms --candidates 'mobilenet*,repvit*'
    """
    from .core.errors import GateFailed, Untrusted
    from .core.kinds import Checkpoint
    from .picking import pick as choose
    from .report.picks import print_pick, sentence

    plan, opened = config(), _open_dataset(dataset)
    guide = None if teacher is None else Checkpoint.open(teacher)
    made = choose(plan, opened, _chain_of(dataset, allow_code=allow_code), guide, again=again)
    facts, rows, left_out = made.facts, list(made.networks.values()), made.left_out
    told = sentence(facts, rows, plan.prior)
    if as_json:
        networks = [row.model_dump(mode="json") for row in rows]
        _print_json(**_described(made), networks=networks, left_out=left_out, sentence=told)
    else:
        print_pick(_wide_console(), facts, rows, left_out)
        if facts.chosen is not None:
            typer.echo(printable(told))
            typer.echo(printable(f"next: {shlex.join(['kdpipe', 'run', str(made.path / made.RECIPE)])}"))
        _print_artifact(made, as_json)
    if facts.chosen is None:
        raise GateFailed(told)
    chosen = made.networks[facts.chosen]
    if chosen.trust is not None and chosen.trust.word != "trusted":
        raise Untrusted(
            f"the latency of {chosen.name} is {chosen.trust.word}: {chosen.trust.reason}; measure again when the "
            "machine is quiet: the same command with --again"
        )


@app.command()
@configured(ReportConfig)
def report(
    artifacts: Annotated[
        list[Path],
        typer.Argument(
            metavar="MEASUREMENT... [CHECKPOINT...]",
            help="folders of a measurement of each device, and of checkpoints "
            "[default: those beside the measurement that share its data]",
            parser=folder_or_url,
        ),
    ],
    out: OutOption = None,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., ReportConfig],
) -> None:
    """Write the page from what was measured, on one device or several.

    A claim is pooled over all trusted attempts at one session. What holds for one session alone is told of the last
    trusted one, else the last, and the page says of how many.

    Example: kdpipe report artifacts/measurement-1a2b
    """
    from .chain import checkpoints_beside, open_checkpoints
    from .core.artifact import read_manifest
    from .core.errors import UserError
    from .core.kinds import Measurement

    measured = [path for path in artifacts if read_manifest(path).kind == Measurement.kind]
    if not measured:
        raise UserError(f"{artifacts[0]} is no measurement: name one of each device, then checkpoints")
    opened = [Measurement.open(path) for path in measured]
    paths = [path for path in artifacts if path not in measured]
    found = open_checkpoints(paths) if paths else checkpoints_beside(opened[0])
    made = _chain_of(measured[0]).report(config(), opened, found, out)
    if not as_json:
        _print_summary(made.numbers)
    _print_artifact(made, as_json)


@app.command()
def doctor(
    target: Annotated[
        list[str] | None, typer.Option("--target", help="exit 1 unless this target can be made here (repeatable)")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="where bundles are to run", autocompletion=_device_names)
    ] = "local",
    as_json: JsonFlag = False,
) -> None:
    """Say what can be made here and run on the device, and what to do about the rest."""
    from .core.errors import GateFailed
    from .devices import find_device
    from .doctor import examine, examine_target

    wanted = [examine_target(name, find_device(device)) for name in target or ()]
    found = examine(device)
    if as_json:
        _print_json(**found)
    else:
        _print_doctor(found)
    for state in wanted:
        if not (state.exports and state.quantizes):
            raise GateFailed(
                f"target '{state.target}' cannot be made here: it lacks {', '.join(state.missing)}; {state.cure}"
            )


# ---- what lies there -------------------------------------------------------------------------------------


@app.command("list")
def list_artifacts(artifacts: ArtifactsOption = ARTIFACTS, as_json: JsonFlag = False) -> None:
    """List the artifacts: what each is, when it was made and what that took.

    Example: kdpipe list
    """
    from . import inventory, showing

    found = inventory.entries(artifacts)
    if as_json:
        _print_json(artifacts=[showing.described_entry(entry) for entry in found])
    else:
        showing.print_entries(_wide_console(), found)


@app.command()
def show(
    artifact: Annotated[Path, typer.Argument(help="folder of any artifact", parser=folder_or_url)],
    as_json: JsonFlag = False,
) -> None:
    """Say what an artifact is, what it was made from and what was made from it.

    Example: kdpipe show artifacts/student-kd-seed0-1a2b
    """
    from . import inventory, showing

    found = inventory.shown(artifact)
    if not as_json:
        showing.print_shown(_wide_console(), found)
        return
    manifest = found.manifest
    _print_json(
        **{**inventory.lineage(manifest, found.places), "path": str(artifact)},
        stage=manifest.stage,
        created_utc=manifest.created_utc,
        seconds=manifest.seconds,
        bytes=inventory.size_of(manifest),
        settings=manifest.config,
        facts=manifest.facts,
        files={name: file.size_bytes for name, file in manifest.files.items()},
        tools=manifest.tools,
        host=manifest.host,
        used_by=[str(path) for path in found.used_by],
    )


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="folder of an artifact", parser=folder_or_url)],
    second: Annotated[Path, typer.Argument(help="folder of another one of the same kind", parser=folder_or_url)],
    as_json: JsonFlag = False,
) -> None:
    """Say in which settings and results two artifacts differ, and all that they came from.

    Two networks that were tested on the same images are compared image by image. Latencies of two measurements are of
    two sessions: bench A --against B compares in one.

    Example: kdpipe compare artifacts/student-kd-seed0-1a2b artifacts/student-kd-seed0-3c4d
    """
    from . import inventory, showing

    found = inventory.compare(first, second)
    if not as_json:
        showing.print_compared(_wide_console(), found, first, second)
        return
    _print_json(
        kind=found.kind,
        first=str(first),
        second=str(second),
        settings=[difference._asdict() for difference in found.settings],
        results=[difference._asdict() for difference in found.results],
        paired=None if found.paired is None else found.paired._asdict(),
    )


@app.command()
def clean(
    artifacts: ArtifactsOption = ARTIFACTS,
    reports: Annotated[
        int | None, typer.Option("--reports", min=1, help="only the newest reports count [default: all of them]")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="what was made since the last report goes too")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="what was interrupted and could be gone on with goes too")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove what no report needs, and what killed stages left behind. Asks first.

    What a report, or anything else that stays, was made from is never touched; nor is anything that is no artifact.
    With --json nothing is removed unless --yes is given.

    Example: kdpipe clean --reports 1
    """
    from . import inventory, showing
    from .core.errors import UserError

    found = inventory.unneeded(artifacts, reports, everything, unfinished)
    if not as_json:
        showing.print_cleaning(_wide_console(), found)
    freed = showing.mebibytes(sum(thing.size_bytes for thing in found.go))
    wanted = yes
    if found.go and not yes and not as_json:
        if not sys.stdin.isatty():
            raise UserError(f"{len(found.go)} would go, and nobody is there to be asked: add --yes")
        wanted = typer.confirm(f"Remove these {len(found.go)}, {freed} MiB?", err=True)
    gone: list[str] = []
    if wanted:
        inventory.remove(found.go, lambda thing: gone.append(str(thing.path)))
    if as_json:
        go = [{"path": str(each.path), "why": each.why, "bytes": each.size_bytes} for each in found.go]
        _print_json(unneeded=go, removed=gone, stay=found.stay)
    elif not found.go:
        typer.echo("nothing to remove")
    else:
        typer.echo(f"{len(gone)} removed, {freed} MiB free again" if gone else "nothing was removed")


# ---- recipes ---------------------------------------------------------------------------------------------

recipe_app = typer.Typer(
    name="recipe", help="Check a recipe, or describe recipes to an editor.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(recipe_app)


@recipe_app.command("check")
def recipe_check(
    file: Annotated[Path, typer.Argument(help="a recipe")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="as if it stood in the recipe")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a recipe in a second: keys, values, names, files, packages.

    What only PyTorch knows, such as whether a network takes a size, is checked by run before any work.

    Example: kdpipe recipe check my.yaml
    """
    from . import pipeline
    from .core.config import read_recipe

    recipe = read_recipe(file, changes or ())
    pipeline.check_names(recipe)
    pipeline.check_packages(recipe)
    runs = pipeline.student_runs(recipe.student, recipe.distill, recipe.data.unlabeled is not None)
    if as_json:
        _print_json(recipe=str(file), valid=True, runs=list(runs))
    else:
        targets, devices = ", ".join(recipe.export.targets), ", ".join(recipe.bench.devices)
        typer.echo(printable(f"{file}: {len(runs)} students to train; {targets} on {devices}; nothing is wrong"))


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors.

    An editor with YAML's language server takes it by a first line: # yaml-language-server: $schema=kdpipe.schema.json

    Example: kdpipe recipe schema > kdpipe.schema.json
    """
    import json

    from .proposal import schema

    typer.echo(json.dumps(schema(), indent=1))


# ---- devices ---------------------------------------------------------------------------------------------

devices_app = typer.Typer(
    name="devices",
    help="The machines that bundles are measured on and deployed to: devices.yaml.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(devices_app)


@devices_app.command("add")
@configured(DeviceSettings, leave_out=("name", "kind", "address"))
def devices_add(
    name: Annotated[str, typer.Argument(help="what it will be called, such as pi5")],
    kind: Annotated[str, typer.Argument(help="ssh, adb or local")],
    address: Annotated[str | None, typer.Argument(help="ssh: pi@pi5 or a name of ssh_config; adb: a serial")] = None,
    bootstrap: Annotated[
        bool, typer.Option("--bootstrap", help="then bring it a Python of its own: kdpipe devices prepare NAME")
    ] = False,
    as_json: JsonFlag = False,
    *,
    config: Callable[..., DeviceSettings],
) -> None:
    """Describe a device, in ./devices.yaml if there is one, else in the user's configuration folder.

    Example: kdpipe devices add pi5 ssh pi@pi5
    """
    from .devices import DEVICES, book

    settings = config(name=name, kind=kind, address=address)
    path = book.add(settings, DEVICES)
    if not as_json:
        typer.echo(f"{name} stands in {path}; look at it: kdpipe devices probe {name}")
    brought = _prepare(name, ("onnxruntime",), as_json) if bootstrap else {}
    if as_json:
        _print_json(device=settings.model_dump(), file=str(path), **brought)


@devices_app.command("list")
def devices_list(as_json: JsonFlag = False) -> None:
    """List the devices that are described.

    Example: kdpipe devices list
    """
    from .devices import DEVICES, book

    found = book.known(DEVICES)
    if as_json:
        _print_json(devices=[settings.model_dump() for settings in found.values()])
        return
    for settings in found.values():
        typer.echo(printable("  ".join(filter(None, (settings.name, settings.kind, settings.address)))))


@devices_app.command("probe")
def devices_probe(
    name: Annotated[str, typer.Argument(help="of the device", autocompletion=_device_names)],
    as_json: JsonFlag = False,
) -> None:
    """Reach a device and say what it is; what cannot be read is "unavailable".

    Example: kdpipe devices probe pi5
    """
    from .devices import find_device

    found = find_device(name).probe()
    if as_json:
        _print_json(device=name, probe=found.model_dump())
        return
    for field, value in found.model_dump().items():
        typer.echo(printable(f"{field}: {value}"))


@devices_app.command("prepare")
def devices_prepare(
    name: Annotated[str, typer.Argument(help="of the device, or 'phone' to only make the folder for one")],
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="target whose bundles it is to run (repeatable) [onnxruntime]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Bring a device what it lacks, from wheels that this host finds for it: no internet and no root needed there.

    A device behind ssh gets numpy and a runtime for its own Python; a phone gets a whole Python, made of Debian's
    packages (so that takes a Debian here). What was fetched is kept on this host, and pushed by content.

    Example: kdpipe devices prepare phone --runtime tflite
    """
    found = _prepare(name, tuple(runtime or ("onnxruntime",)), as_json)
    if as_json:
        _print_json(**found)


@devices_app.command("benchmark")
def devices_benchmark(
    name: Annotated[str, typer.Argument(help="of the device, whose `benchmark_model` is named in devices.yaml")],
    bundle: Annotated[Path, typer.Argument(help="folder of a tflite bundle", parser=folder_or_url)],
    accelerator: Annotated[str, typer.Option("--accelerator", help="cpu, gpu or nnapi")] = "gpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="of what stays on the CPU")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Ask your own benchmark_model for a latency on the GPU or NPU.

    It is another tool's number: random input, its own boundaries, no accuracy. It goes into no measurement.

    Example: kdpipe devices benchmark pixel artifacts/bundle-1a2b --accelerator gpu
    """
    from .core.errors import UserError, choice
    from .core.kinds import Bundle
    from .devices import find_device
    from .devices.benchmark_model import OPTIONS, ask
    from .devices.runner import RunnerDevice

    device = find_device(name)
    if accelerator not in OPTIONS:
        raise choice("accelerator", accelerator, OPTIONS)
    if not isinstance(device, RunnerDevice):
        raise UserError(f"nothing runs on '{name}'")
    told = ask(device, Bundle.open(bundle), accelerator, threads)
    if as_json:
        _print_json(device=name, **told.model_dump())
        return
    typer.echo(
        f"{told.mean_ms:.3g} ms a run on the {accelerator}"
        + (f" ({told.executed} there)" if told.executed else "")
        + f", first {told.first_ms:.3g} ms, init {told.init_ms:.3g} ms; by benchmark_model, another tool: random input"
    )


def _prepare(name: str, targets: tuple[str, ...], as_json: bool) -> dict[str, Any]:
    """Make what a device lacks and bring it; says of what it is made, unless a machine is told."""
    from .core import progress
    from .devices import bring_python
    from .terminal import listener

    progress.listen(listener())
    made, python = bring_python(name, targets)
    facts = made.parts
    if not as_json:
        for part in facts.parts:
            typer.echo(f"{part.sha256}  {part.size_bytes / 1e6:6.2f} MB  {part.name}")
        fetched = sum(part.size_bytes for part in facts.parts)
        typer.echo(f"{facts.python}: {fetched / 1e6:.1f} MB of packages, {made.size_bytes / 1e6:.1f} MB unpacked")
        typer.echo(f"here {made.folder}" + (f", on '{name}' {python}" if python else ""))
    return {
        "made_for": facts.python,
        "packages": [part.model_dump() for part in facts.parts],
        "folder": str(made.folder),
        "size_bytes": made.size_bytes,
        "digest": made.digest,
        "python": python,
    }


@devices_app.command("status")
def devices_status(
    names: Annotated[list[str] | None, typer.Argument(help="of devices [default: all that are described]")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say which bundle is live on a device, since when and whether it is intact, and what else lies there.

    Exits 1 when a bundle that is live is damaged, 2 when a device cannot be reached.

    Example: kdpipe devices status pi5
    """
    from .core.errors import GateFailed
    from .deploy import install
    from .devices import find_device

    found: dict[str, Any] = {}
    faults: list[KdpipeError] = []
    for name in names or install.described():
        try:
            status = install.status(find_device(name))
        except KdpipeError as error:
            found[name] = {"error": str(error)}
            faults.append(error)
            continue
        found[name] = status.model_dump()
        if status.live is not None and status.live.fault is not None:
            faults.insert(0, GateFailed(f"what is live on '{name}' is damaged ({status.live.fault}): deploy it again"))
        for at, line in enumerate([] if as_json else status.lines()):
            typer.echo(printable(line if at else f"{name}: {line}"))
    if as_json:
        _print_json(devices=found)
    if len(faults) > 1:
        raise type(faults[0])("; ".join(map(str, faults)))
    if faults:
        raise faults[0]


@devices_app.command("clean")
def devices_clean(
    name: Annotated[str, typer.Argument(help="of the device", autocompletion=_device_names)],
    everything: Annotated[bool, typer.Option("--everything", help="the deployed bundles too")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove from a device what is neither live nor the bundle before: uploads, images, outputs, the runner.

    Where nothing is live, the Python that was brought goes too.

    Example: kdpipe devices clean pi5
    """
    from .deploy import install
    from .devices import find_device

    found = install.clean(find_device(name), everything)
    if as_json:
        _print_json(device=name, **found.model_dump())
    else:
        kept = f"; {len(found.kept)} deployed bundles stay (--everything removes them too)" if found.kept else ""
        typer.echo(f"{name}: {len(found.removed)} removed, {found.freed_bytes / 1e6:.1f} MB free again{kept}")


@devices_app.command("remove")
def devices_remove(
    name: Annotated[str, typer.Argument(help="of the device", autocompletion=_device_names)],
    as_json: JsonFlag = False,
) -> None:
    """Forget a device; nothing on it is touched.

    Example: kdpipe devices remove pi5
    """
    from .devices import DEVICES, book

    path = book.remove(name, DEVICES)
    if as_json:
        _print_json(removed=name, file=str(path))
    else:
        typer.echo(f"{name} is gone from {path}; what lies on it stays")


# ---- printing --------------------------------------------------------------------------------------------


def _print_json(**values: Any) -> None:
    import json

    typer.echo(json.dumps({"schema_version": JSON_VERSION, **values}, indent=1))


def _print_artifact(artifact: AnyArtifact, as_json: bool) -> None:
    from .terminal import process_number

    if process_number():
        return
    if as_json:
        _print_json(**_described(artifact))
    else:
        typer.echo(printable(str(artifact.path)))


def _described(artifact: AnyArtifact) -> dict[str, Any]:
    return {
        "artifact": str(artifact.path),
        "kind": artifact.kind,
        "key": artifact.key,
        "facts": artifact.manifest.facts,
    }


def _print_summary(numbers: dict[str, Any]) -> None:
    from .report.tables import print_summary
    from .terminal import console

    # A pipe has no width of its own; the tables need this many columns.
    print_summary(console() if sys.stdout.isatty() else console(width=110), numbers)


def _wide_console() -> Console:
    """A pipe has no width of its own: nothing is cut there."""
    from .terminal import console

    return console() if sys.stdout.isatty() else console(width=400)


def _print_doctor(found: dict[str, Any]) -> None:
    from rich.table import Table

    from .terminal import console as plain_console

    console = plain_console()
    runs = "run here" if found["device"] == "local" else f"run on {found['device']}"
    table = Table("target", "export", "INT8", runs, "what to do", box=None, header_style="bold")
    for state in found["targets"]:
        marks = ["yes" if state[name] else "no" for name in ("exports", "quantizes", "runs")]
        table.add_row(state["target"], *marks, state["cure"] or "nothing")
    console.print(table)
    machine = found["machine"]
    console.print(
        f"\nCPU: {machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable, {machine['machine']}"
    )
    flags = machine["flags"]
    if isinstance(flags, dict):
        console.print("has: " + (" ".join(name for name, there in flags.items() if there) or "none of the fast units"))
        console.print("has not: " + (" ".join(name for name, there in flags.items() if not there) or "nothing missing"))
    console.print(f"governor: {machine['governor']}; temperatures: {machine['temperatures_millicelsius']}")
    console.print("training: " + ("yes" if found["training"] else "no; pip install 'kdpipe[train]'"))
    console.print("installed: " + ", ".join(f"{name} {version}" for name, version in found["tools"].items()))
    for line in found["advice"]:
        console.print(f"note: {line}")


# ---- finding things --------------------------------------------------------------------------------------


def _chain_of(artifact: Path, *, joint: bool = False, allow_code: Sequence[str] | None = None) -> Chain:
    """The artifacts among which this one lies."""
    from .chain import home

    return _chain(home(artifact), joint=joint, allow_code=allow_code)


def _chain(
    folder: Path, *, joint: bool = False, allow_code: Sequence[str] | None = None, store: str | None = None
) -> Chain:
    """The artifacts in ``folder``; only a ``joint`` command is one that the processes of torchrun share."""
    from .chain import Chain
    from .core import progress
    from .core.errors import UserError
    from .core.proc import process_count
    from .core.remote import STORE
    from .terminal import listener, tell_step

    if process_count() > 1 and not joint:
        raise UserError("torchrun is for training: start 'kdpipe teacher' or 'kdpipe distill' with it, this without it")
    progress.listen(listener())
    return Chain(folder, tell=tell_step, allow_code=allow_code or (), store=store or os.environ.get(STORE) or None)


def _seconds(chain: Chain) -> dict[str, float]:
    return {step.name: round(step.seconds, 3) for step in chain.steps}


def _cache_at(
    location: str, chain: Chain, settings: TrainConfig, dataset: Dataset, teacher: Checkpoint | None
) -> Cache:
    """The cache in a folder or at a URL; built in a folder that is not there, if the settings say of how many views."""
    from .core.remote import is_url
    from .distill.cache import open_cache
    from .distill.train import cache_config

    wanted = cache_config(settings)
    if is_url(location) or Path(location).exists() or wanted is None or teacher is None:
        return open_cache(location, chain.folder / ".caches")
    return chain.cache(wanted, dataset, teacher, Path(location))


def _share(text: str) -> float:
    """A share such as 0.1% or 0.001. Raises UserError."""
    from .core.errors import UserError

    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UserError(f"--verify: wanted a share such as 0.1% or 0.001, found '{text}'")
    return share


def _open_dataset(path: Path) -> Dataset:
    from .chain import refuse_random, with_fitted
    from .data.dataset import Dataset

    return with_fitted(refuse_random(Dataset.open(path)))


def _dataset_of(artifact: AnyArtifact, given: Path | None) -> Dataset:
    from .chain import dataset_of

    return _open_dataset(given) if given else dataset_of(artifact)


# ---- failing ---------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; every expected failure is one line and its exit code."""
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")  # a phone's camera has that many
    with _interrupts_noted() as interrupts:
        code, line = _outcome(interrupts)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or ExitCode.PIPE_CLOSED
    except KdpipeError as error:  # see ``kdpipe.__main__``
        code, line = error.exit_code, f"kdpipe: {error}"
    if code != ExitCode.DONE:
        _let_go_of_output()
    if line:
        with suppress(OSError):  # nobody is left to be told
            typer.echo(printable(line), err=True)
    sys.exit(code)


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Holds a signal for every Ctrl-C of the block, which is interrupted as ever."""
    noted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so in a job in the background
    if not is_heard or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _let_go_of_output() -> None:
    """What is left to print goes nowhere: Python would try it once more at its end, and fail in its own words."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        output, nowhere = sys.stdout.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)


def _outcome(interrupts: Sequence[int]) -> tuple[int, str]:
    """Exit code of the command, and the line that says why it failed; empty where there is nothing to say."""
    try:
        code, line = _result()
    except Exception:
        if not interrupts:
            raise
        code, line = ExitCode.REFUSED, ""
    # While a library loads, an interrupt may come out as any error.
    return (ExitCode.INTERRUPTED, INTERRUPTED) if interrupts and code != ExitCode.DONE else (code, line)


def _result() -> tuple[int, str]:
    """As ``_outcome``; raises what is a bug of ours."""
    try:
        code = app(prog_name="kdpipe", standalone_mode=False)
    except KdpipeError as error:
        return error.exit_code, f"kdpipe: {error}"
    except BrokenPipeError:
        return ExitCode.PIPE_CLOSED, ""
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # what Typer makes of it
            return ExitCode.PIPE_CLOSED, ""
        return end.code if isinstance(end.code, int) else ExitCode.DONE, ""
    except OSError as error:  # a path that the system refuses, such as one that is too long
        where = "" if error.filename is None else f": {error.filename}"
        return ExitCode.MISTAKE, printable(f"kdpipe: {error.strerror or error}{where}", 500)
    except typer.Abort:  # a question, and nobody there to answer it
        return ExitCode.INTERRUPTED, "kdpipe: no answer: nothing was done"
    except Exception as error:
        if (message := getattr(error, "format_message", None)) is not None:  # Typer's usage errors
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "kdpipe"
            return ExitCode.MISTAKE, f"{command}: {message()} (see {command} --help)"
        raise
    if code == ExitCode.INTERRUPTED:  # what Typer makes of Ctrl-C
        return ExitCode.INTERRUPTED, INTERRUPTED
    return code if isinstance(code, int) else ExitCode.DONE, ""
