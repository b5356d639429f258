"""A run's folder that somebody else has made: which command, which file, which attack.

Whatever is in the folder, a command neither writes, cuts, removes nor runs anything but what it
says that it does. Either it does its work, or it ends with exit code 2 and one sentence that
names the file; what the attack aimed at is as it was, and no client has trained in vain.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import tomli_w
import torch
from transformers import BertForSequenceClassification

from fedsieve.data import pictures
from fedsieve.disk import everything_in, remove
from fedsieve.errors import FedSieveError
from fedsieve.run import checkpoint, rundir
from fedsieve.sites import here, limits
from fedsieve.study.parts import ASKED, DIVERGED
from fedsieve.train.digest import tensors_digest
from tests import kinds, runs
from tests.conftest import Command, Ran, Tiny
from tests.runs import FLASC

NEWEST = "checkpoints/round-000002.safetensors"


@pytest.fixture(scope="module")
def stopped(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with memories, stopped after round 2 of 3. Not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(BaseException, match="stopped after round 2"):
        runs.start(tiny, folder, runs.stop_at(2), **{**FLASC, "rounds": 3, "cohort": 3})
    return folder


@pytest.fixture
def theirs(stopped: Path, tmp_path: Path) -> Path:
    """A copy, which a test may change."""
    folder = tmp_path / "theirs" / "run"
    shutil.copytree(stopped, folder)
    return folder


class Target(NamedTuple):
    """What an attack aims at: a file and a folder outside of the run."""

    file: Path
    folder: Path

    def contents(self) -> dict[str, bytes]:
        files = (path for path in self.file.parent.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def target(tmp_path: Path, stopped: Path) -> Target:
    home = tmp_path / "home"
    shutil.copytree(stopped / "checkpoints", home / "folder")
    (home / "folder" / "letter").write_text("dear")
    (home / "file").write_text('{"round": 0, "total_bytes": 0}\n' * 100)
    return Target(home / "file", home / "folder")


def one_sentence(ran: Ran, *words: str) -> None:
    assert ran.code == 2, ran
    assert "Traceback" not in ran.err
    said = [line for line in ran.err.splitlines() if not line.startswith("warning:")]
    assert len(said) == 1, ran.err
    for word in words:
        assert word in said[0]


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != rundir.LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> Any:
        raise AssertionError("a client trains")

    runs.before_fit(monkeypatch, train)


# --- links in the place of the run's files

FOLDERS = {rundir.CHECKPOINTS, rundir.ADAPTER, ".adapter.part", "../run.secret"}
LINKED = (
    *(rundir.RECIPE, rundir.METRICS, rundir.CLIENTS, rundir.REPORT, rundir.LOCK, NEWEST),
    rundir.EVALUATION,
    *(rundir.CHECKPOINTS, rundir.ADAPTER, "../run.secret", "report-bytes-round.png"),
    *(".recipe.toml.part", ".adapter.part", ".report.html.part", ".metrics.jsonl.part"),
    ".details.json.part",
    *("checkpoints/.round-000003.safetensors.part", ".report-bytes-round.png.part"),
)


Act = Callable[[Command, Path, Tiny], Ran]


def resume(command: Command, folder: Path, tiny: Tiny) -> Ran:
    return command("resume", folder)


def resume_at(command: Command, folder: Path, tiny: Tiny) -> Ran:
    return command("resume", folder, "--at-round", "1")


def resume_to(command: Command, folder: Path, tiny: Tiny) -> Ran:
    return command("resume", folder, "--rounds", "4")


def export(command: Command, folder: Path, tiny: Tiny) -> Ran:
    return command("export", folder, "--to", folder.parent / "exported")


def report(command: Command, folder: Path, tiny: Tiny) -> Ran:
    return command("report", folder)


def replaced(command: Command, folder: Path, tiny: Tiny) -> Ran:
    recipe = tiny.write(folder.parent / "mine.toml", rounds=1)
    return command("run", recipe, "--out", folder, "--overwrite")


def begun(command: Command, folder: Path, tiny: Tiny) -> Ran:
    """In a folder that holds no run, but links in the places of one's files."""
    for name in rundir._OURS:
        if not (folder / name).is_symlink() and (folder / name).exists():
            remove(folder / name)
    return command("run", tiny.write(folder.parent / "mine.toml", rounds=1), "--out", folder)


# Which links a command says no to. To others it does what can be done: it replaces what it writes
# anew, and leaves alone what it does not need.
REFUSED: dict[Act, set[str]] = {
    resume: {*LINKED[:11]},
    resume_at: {*LINKED[:11]},
    export: {*LINKED[:11]},
    report: {*LINKED[:11]} - {NEWEST},
    replaced: {rundir.LOCK},
    begun: {rundir.LOCK, rundir.RECIPE, "../run.secret"},
}


@pytest.mark.parametrize(
    ("act", "name"),
    kinds.some_of(
        [
            *((act, name) for act in (resume, export, replaced, begun) for name in LINKED),
            *((report, name) for name in LINKED if name in REFUSED[report] or "report" in name),
            *((resume_at, name) for name in (rundir.CHECKPOINTS, rundir.METRICS, "../run.secret")),
        ]
    ),
)
def test_nothing_is_written_cut_or_removed_through_a_link(
    act: Act,
    name: str,
    theirs: Path,
    target: Target,
    tiny: Tiny,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if act is not report:  # to draw takes longer than to train
        monkeypatch.setattr("fedsieve.report.write", lambda *_: [])
    place, to = theirs / name, target.folder if name in FOLDERS else target.file
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(to)
    before = target.contents()
    ran = act(command, theirs, tiny)
    assert target.contents() == before
    if name in REFUSED[act]:
        one_sentence(ran, Path(name).name)
    else:
        assert ran.code == 0, ran


@pytest.mark.parametrize("name", [rundir.METRICS, rundir.CLIENTS])
def test_a_log_that_is_another_file_too_is_not_written(
    name: str, theirs: Path, tmp_path: Path, command: Command, no_report: None
) -> None:
    other = tmp_path / "other"
    os.link(theirs / name, other)
    before = other.read_bytes()
    one_sentence(command("resume", theirs), name, "hard link")
    assert other.read_bytes() == before


@pytest.mark.parametrize("name", [rundir.RECIPE, rundir.METRICS, rundir.CLIENTS, NEWEST])
@pytest.mark.parametrize("act", [resume, export, report], ids=lambda act: act.__name__)
def test_what_is_no_file_is_not_waited_for(
    act: Act, name: str, theirs: Path, tiny: Tiny, command: Command
) -> None:
    """A pipe that nobody writes to."""
    (theirs / name).unlink()
    os.mkfifo(theirs / name)
    ran = act(command, theirs, tiny)
    if act is report and name == NEWEST:
        assert ran.code == 0  # it reads no checkpoint
    else:
        one_sentence(ran, Path(name).name)


def test_other_files_in_the_folder_are_left_alone(
    theirs: Path, target: Target, command: Command, no_report: None
) -> None:
    kept = theirs / "checkpoints"
    for name in ("round-best.safetensors", "round-1.safetensors", "round-x999999.safetensors"):
        shutil.copy(theirs / NEWEST, kept / name)
    (theirs / "notes").symlink_to(target.file)
    assert command("resume", theirs).code == 0
    assert {"round-best.safetensors", "round-1.safetensors", "round-x999999.safetensors"} < {
        path.name for path in kept.iterdir()
    }


# --- checkpoints that say what no run says


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """A checkpoint that says something else, under a digest that is right."""
    facts, tensors = checkpoint._read(path)
    text = change(facts, tensors)
    text = text if isinstance(text, str) else json.dumps(facts)
    half = any(each.dtype == torch.bfloat16 for each in tensors.values())  # NumPy has none
    data = {"facts": text, "digest": "" if half else tensors_digest(tensors, text)}
    path.write_bytes(safetensors.torch.save(tensors, data))


def setting(*path: str, to: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(facts: dict[str, Any], _: Any) -> None:
        place = facts
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


def tensor(name: str, shape: tuple[int, ...] = (2,)) -> Callable[[Any, dict[str, Any]], None]:
    return lambda _, tensors: tensors.update({name: torch.zeros(shape)})


def of_type(kind: torch.dtype) -> Callable[[Any, dict[str, torch.Tensor]], None]:
    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.startswith("state/adapter/"):
                tensors[name] = tensors[name].to(kind)

    return change


HALF = {"summary": {}, "receipts": [], "due": True}
CRAFTED: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "a mark outside": setting("marks", to={"../../home/file": 0}),
    "an absolute mark": setting("marks", "/etc/passwd", to=0),
    "a mark of another file": setting("marks", "recipe.toml", to=0),
    "a mark of a checkpoint": setting("marks", NEWEST, to=0),
    "a mark below 0": setting("marks", rundir.METRICS, to=-1),
    "a mark that is a truth": setting("marks", rundir.METRICS, to=True),
    "a mark that is a text": setting("marks", rundir.METRICS, to="0"),
    "a mark beyond": setting("marks", rundir.METRICS, to=2**70),
    "marks in a list": setting("marks", to=[rundir.METRICS]),
    "another round": setting("round", to=1),
    "a round that is a text": setting("round", to="2"),
    "a huge round": setting("round", to=10**30),
    "a change of the state in a later round": setting("moved", to=10**6),
    "a change of the state in a round that is a text": setting("moved", to="2"),
    "bytes below 0": setting("total_bytes", to=-5),
    "bytes that are no number": setting("total_bytes", to=float("nan")),
    "another format": setting("format", to=7),
    "clients twice": setting("clients", to=["0000"] * 12),
    "clients that are numbers": setting("clients", to=list(range(12))),
    "few clients": setting("clients", to=["0000"]),
    "the same as nothing": setting("same", to={"state/x/y": "state/nothing/here"}),
    "the same as itself": setting("same", to={"state/x/y": "state/x/y"}),
    "a base of numbers": setting("base", to={"weights": 1, "config": 2}),
    "a base of more": setting("base", to={"weights": "", "config": "", "path": "/"}),
    "half of nothing": setting("half", to=HALF),
    "a half of a text": setting("half", to="half"),
    "a recipe of numbers": setting("recipe", to=5),
    "a recipe that is none": setting("recipe", to="rounds = = 1"),
    "a recipe that is deep": setting("recipe", to="x = " + "[" * 5000 + "]" * 5000),
    "a tensor of nobody": tensor("elsewhere/adapter/x"),
    "a tensor without a name": tensor("state"),
    "a memory of no client": tensor("memory/99/residual/x"),
    "a memory of a text": tensor("memory/-1/residual/x"),
    "a moment of another shape": lambda _, tensors: tensors.update(
        {name: torch.zeros(7) for name in tensors if name.startswith("state/m/")}
        or {"state/adapter/extra": torch.zeros(7)}
    ),
    "an adapter of integers": of_type(torch.int64),
    "an adapter of truths": of_type(torch.bool),
    "deep facts": lambda facts, _: '{"x": ' + "[" * 100_000,
    "facts in a list": lambda facts, _: "[]",
    "no facts": lambda facts, _: "{}",
}


@pytest.mark.usefixtures("no_training", "no_report")
@pytest.mark.parametrize(
    ("act", "attack"),
    [
        *((resume, attack) for attack in CRAFTED),
        *((act, attack) for act in (resume_at, export) for attack in [*CRAFTED][:3]),
    ],
)
def test_a_crafted_checkpoint_is_refused_before_anything_is_done(
    act: Act,
    attack: str,
    theirs: Path,
    target: Target,
    tiny: Tiny,
    command: Command,
) -> None:
    rewritten(theirs / NEWEST, CRAFTED[attack])
    before, outside = contents(theirs), target.contents()
    ran = act(command, theirs, tiny)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert str(theirs) in ran.err
    assert target.contents() == outside
    assert contents(theirs) == before


def test_numbers_of_a_type_that_no_run_keeps_are_damage(theirs: Path) -> None:
    rewritten(theirs / NEWEST, of_type(torch.bfloat16))
    with pytest.raises(ValueError, match=r"numbers of type torch\.bfloat16"):
        checkpoint._read(theirs / NEWEST)


# --- logs and recipes that were damaged, or made to harm


def line(number: int, text: bytes) -> Callable[[bytes], bytes]:
    def damage(whole: bytes) -> bytes:
        lines = whole.splitlines(keepends=True)
        lines[number - 1] = text
        return b"".join(lines)

    return damage


def field(number: int, key: str, value: str) -> Callable[[bytes], bytes]:
    """The value of a line's key, as text: what JSON's writer would not write."""

    def damage(whole: bytes) -> bytes:
        lines = whole.splitlines(keepends=True)
        row = {**json.loads(lines[number - 1]), key: "@"}
        lines[number - 1] = json.dumps(row).replace('"@"', value).encode() + b"\n"
        return b"".join(lines)

    return damage


def renamed(number: int, key: str) -> Callable[[bytes], bytes]:
    """A line's key by another name."""

    def damage(whole: bytes) -> bytes:
        lines = whole.splitlines(keepends=True)
        lines[number - 1] = lines[number - 1].replace(f'"{key}"'.encode(), b'"another"')
        return b"".join(lines)

    return damage


LINES: dict[str, Callable[[bytes], bytes]] = {
    "a round without its number": renamed(2, "round"),
    "a round that is a list": field(2, "round", "[]"),
    "cut": line(2, b'{"round": 1, "tot\n'),
    "not a text": line(2, b"\xff\xfe\n"),
    "deep": line(2, b'{"round": ' + b"[" * 100_000 + b"\n"),
    "deep and whole": line(2, b'{"round": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"),
    "long": line(2, b'{"round": 1, "x": "' + b"a" * (2 << 20) + b'"}\n'),
    "a list": line(2, b"[]\n"),
    "a number": line(2, b"7\n"),
    "a huge number": field(2, "down_bytes", "1" + "0" * 400),
    "a number of many digits": field(2, "down_bytes", "1" * 5000),
    "a huge float": field(2, "seconds", "1e400"),
    "below 0": field(2, "down_bytes", "-1"),
    "a text for a number": field(2, "down_bytes", '"many"'),
    "a share of 3": field(2, "down_a", "3"),
    "time without end": field(2, "seconds", "Infinity"),
    "no time": field(2, "seconds", "NaN"),
    "more time than there is": field(2, "seconds", "1e90"),
    "half of a character": field(2, "budget", '"\\ud800"'),
    "half of a character in bytes": lambda whole: field(2, "budget", '"HALF"')(whole).replace(
        b"HALF", b"\xed\xa0\x80"
    ),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("attack", kinds.some_of(LINES))
@pytest.mark.parametrize("log", rundir.LOGS)
@pytest.mark.parametrize("act", [resume, resume_to, export, report], ids=lambda act: act.__name__)
def test_a_damaged_log_is_named_with_its_line(
    act: Act,
    log: str,
    attack: str,
    theirs: Path,
    tiny: Tiny,
    command: Command,
) -> None:
    """In the part of it that the checkpoint knows of, as long as it was."""
    path = theirs / log
    before = path.read_bytes()
    path.write_bytes(LINES[attack](before))
    grown = len(path.read_bytes()) - len(before)
    rewritten(
        theirs / NEWEST,
        lambda facts, _: facts["marks"].update({log: facts["marks"][log] + grown}),
    )
    kept = contents(theirs)
    one_sentence(act(command, theirs, tiny), f"{path}, line 2")
    assert contents(theirs) == kept


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("key", ["down_bytes", "up_bytes"])
@pytest.mark.parametrize("act", [resume, resume_to, export], ids=lambda act: act.__name__)
def test_a_round_without_its_bytes_is_told_with_its_line(
    act: Act, key: str, theirs: Path, tiny: Tiny, command: Command
) -> None:
    """The card adds them up; in the line of round 0 a run of old had none."""
    path = theirs / rundir.METRICS
    path.write_bytes(renamed(1, key)(path.read_bytes()))
    before = path.read_bytes()
    path.write_bytes(renamed(2, key)(before))
    marks = {path.name: path.stat().st_size}
    rewritten(theirs / NEWEST, lambda facts, _: facts["marks"].update(marks))
    one_sentence(act(command, theirs, tiny), f"{path}, line 2: there is no '{key}'")
    path.write_bytes(before)
    marks[path.name] = len(before)
    rewritten(theirs / NEWEST, lambda facts, _: facts["marks"].update(marks))
    assert export(command, theirs, tiny).code == 0


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("client", ["null", "{}", "[]", "7"])
@pytest.mark.parametrize("act", [resume_to, export, report], ids=lambda act: act.__name__)
def test_a_client_without_a_name_is_told_with_its_line(
    act: Act, client: str, theirs: Path, tiny: Tiny, command: Command
) -> None:
    path = theirs / rundir.CLIENTS
    before = path.read_bytes()
    path.write_bytes(field(2, "client", client)(before))
    grown = len(path.read_bytes()) - len(before)
    rewritten(
        theirs / NEWEST,
        lambda facts, _: facts["marks"].update({path.name: facts["marks"][path.name] + grown}),
    )
    one_sentence(act(command, theirs, tiny), f"{path}, line 2", "'client' is")


# Lines that a run may have left behind its checkpoint, or anybody: of rounds that are done again.
BEYOND: dict[str, list[str]] = {
    rundir.METRICS: ['{"round": 2, "down_bytes": 700000, "up_bytes": 0, "metrics": {"x": 9}}', "{"],
    rundir.CLIENTS: ['{"round": "x"}', '{"round": []}', '{"round": 3, "client": {}}', "[]", "{"],
}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("log", "line"), kinds.some_of((log, each) for log in BEYOND for each in BEYOND[log])
)
def test_lines_behind_the_checkpoint_count_for_nothing(
    log: str, line: str, theirs: Path, stopped: Path, command: Command, tmp_path: Path
) -> None:
    def card(run: Path, to: Path) -> str:
        assert command("export", run, "--to", to).code == 0
        return (to / "README.md").read_text()

    with (theirs / log).open("a") as file:
        file.write(f"{line}\n")
    assert card(theirs, tmp_path / "one") == card(stopped, tmp_path / "two")
    assert command("resume", theirs).code == 0
    assert "3 rounds" in (theirs / rundir.ADAPTER / "README.md").read_text()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("log", rundir.LOGS)
@pytest.mark.parametrize("act", [resume, export], ids=lambda act: act.__name__)
def test_a_log_that_is_gone_is_missed_before_anything_is_done(
    act: Act, log: str, theirs: Path, tiny: Tiny, command: Command
) -> None:
    (theirs / log).unlink()
    kept = contents(theirs)
    one_sentence(act(command, theirs, tiny), f"{theirs / log} is not there")
    assert contents(theirs) == kept


RECIPES: dict[str, Callable[[bytes], bytes]] = {
    "cut in a line": lambda text: text[: text.rindex(b'"')],
    "cut after a few lines": lambda text: b"\n".join(text.splitlines()[:3]),
    "empty": lambda text: b"",
    "not a text": lambda text: text + b"\xff\xfe",
    "deep lists": lambda text: b"x = " + b"[" * 5000 + b"]" * 5000 + b"\n" + text,
    "deep tables": lambda text: text + b"[" + b"a." * 5000 + b"a]\n",
    "a deep key": lambda text: b".".join([b"a"] * 50_000) + b" = 1\n" + text,
    "a huge number": lambda text: text.replace(b"rounds = 3", b"rounds = " + b"9" * 30),
    "a number of many digits": lambda text: text.replace(b"rounds = 3", b"rounds = " + b"9" * 5000),
    "twice": lambda text: text + text,
    "endless": lambda text: text + b"#" * (1 << 24),
}


def test_a_recipe_that_is_huge_is_not_read(theirs: Path, command: Command) -> None:
    """Also to know whether it is a federation's, which every command asks first."""
    with (theirs / rundir.RECIPE).open("r+b") as file:
        file.truncate(1 << 36)
    assert not rundir.federated(theirs)
    one_sentence(command("resume", theirs, "--rounds", "9"), "it has more than")


def test_an_environment_that_is_no_table_is_named(theirs: Path, command: Command) -> None:
    path = theirs / rundir.RECIPE
    text = path.read_text(encoding="utf-8")
    path.write_text("environment = [1, 2]\n" + text.split("\n[environment]")[0], encoding="utf-8")
    one_sentence(command("resume", theirs, "--rounds", "9"), "environment is no table")


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("attack", RECIPES)
@pytest.mark.parametrize("act", [resume, resume_at, export, report], ids=lambda act: act.__name__)
def test_a_damaged_recipe_is_named(
    act: Act,
    attack: str,
    theirs: Path,
    tiny: Tiny,
    command: Command,
) -> None:
    path = theirs / rundir.RECIPE
    path.write_bytes(RECIPES[attack](path.read_bytes()))
    before = contents(theirs)
    ran = act(command, theirs, tiny)
    assert "Traceback" not in ran.err
    if act is report and attack in ("cut after a few lines", "empty"):
        return  # a report needs no recipe to be whole
    assert ran.code == 2, ran
    assert str(path) in ran.err
    assert contents(theirs) == before


# --- programs


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module where Python looks for modules; the file that it leaves when it is run."""
    mark, folder = tmp_path / "was-run", tmp_path / "modules"
    (folder / "planted").mkdir(parents=True)
    (folder / "planted" / "__init__.py").write_text("")
    (folder / "planted" / "method.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from fedsieve.methods.flasc import method as method\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield mark
    for name in [name for name in sys.modules if name.split(".")[0] == "planted"]:
        del sys.modules[name]


def named(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace('name = "flasc"', 'name = "planted.method"'), encoding="utf-8")


def test_a_function_that_trains_is_run_if_that_was_asked_for(
    tiny: Tiny, tmp_path: Path, command: Command, program: Path
) -> None:
    with (tmp_path / "modules" / "planted" / "method.py").open("a", encoding="utf-8") as file:
        file.write("def train(model, rows, seed): return 1.0\n")
    function = {"function": "planted.method:train"}
    recipe = tiny.write(tmp_path / "mine.toml", training=function, rounds=1)
    told = tmp_path / "told.toml"
    entry = {"name": "one", "set": {"training": function}, "grid": []}
    study = {"recipe": str(tiny.write(tmp_path / "other.toml", rounds=1)), "entry": [entry]}
    told.write_text(tomli_w.dumps(study), encoding="utf-8")
    out = ("--out", tmp_path / "new")
    for words in (("run", recipe, *out), ("compare", recipe, *out), ("compare", told, *out)):
        one_sentence(command(*words), "planted.method:train", "--allow-code")
    one_sentence(command("federate", recipe, *out), "training.function")
    assert not program.exists()
    ran = command("run", recipe, *out, "--allow-code")
    assert ran.code == 0
    assert f"fedsieve export {tmp_path / 'new'} --allow-code --to adapter" in ran.out
    assert program.exists()
    one_sentence(command("resume", tmp_path / "new"), "planted.method:train", "--allow-code")


@pytest.mark.parametrize("command_name", ["resume", "export", "run", "search", "compare"])
def test_a_method_of_somebody_s_own_is_run_if_that_was_asked_for(
    command_name: str,
    theirs: Path,
    tmp_path: Path,
    command: Command,
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedsieve.report.write", lambda *_, **__: [])
    named(theirs / rundir.RECIPE)
    rewritten(
        theirs / NEWEST,
        lambda facts, _: facts.update(recipe=(theirs / rundir.RECIPE).read_text("utf-8")),
    )
    recipe = tmp_path / "mine.toml"
    shutil.copy(theirs / rundir.RECIPE, recipe)
    words: list[Any] = {
        "resume": ["resume", theirs],
        "export": ["export", theirs, "--to", tmp_path / "exported"],
        "run": ["run", recipe, "--out", tmp_path / "new"],
        "search": ["search", recipe, "--budget-mb", "0.001", "--out", tmp_path / "new"],
        "compare": ["compare", recipe, "--out", tmp_path / "new"],
    }[command_name]
    ran = command(*words)
    assert not program.exists()
    one_sentence(ran, "planted.method", "--allow-code")
    ran = command(*words, "--allow-code")
    assert program.exists()
    if command_name != "search":  # its budget is too small
        assert ran.code == 0, ran


def test_no_site_is_sent_a_program(
    theirs: Path, tmp_path: Path, command: Command, program: Path
) -> None:
    named(theirs / rundir.RECIPE)
    ran = command("federate", theirs / rundir.RECIPE, "--out", tmp_path / "new")
    one_sentence(ran, "planted.method")
    assert not program.exists()


def test_modules_in_the_current_folder_are_not_imported(theirs: Path) -> None:
    """`cd theirs; python -m fedsieve report .`: Python looks there first, unless told not to.

    Nor is the run's method: a report needs none.
    """
    named(theirs / rundir.RECIPE)
    (theirs / "planted").mkdir()
    (theirs / "planted" / "method.py").write_text("open('was-run', 'w')\n")
    for name in ("torch", "typer", "matplotlib", "tomllib", "pydantic", "sitecustomize"):
        (theirs / f"{name}.py").write_text("import pathlib\npathlib.Path('was-run').touch()\n")
    done = subprocess.run(
        [sys.executable, "-m", "fedsieve", "report", "."],
        cwd=theirs,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not (theirs / "was-run").exists()


# Where a recipe could say that the model's own code is run, or more of how the model is loaded.
CODE: tuple[dict[str, Any], ...] = (
    {"model__settings": {"trust_remote_code": True}},
    {"model__settings": {"text_config": {"trust_remote_code": True}}},
    {"model__settings": {"parts": [{"deep": {"trust_remote_code": True}}]}},
    {"model__settings": {"auto_map": {"AutoModel": "modeling.Model"}}},
    {"model__settings": {"code_revision": "main"}},
    {"model__settings": {"use_kernels": True}},
    {"model__settings": {"attn_implementation": "somebody/kernel"}},
    {"model__settings": {"weights_only": False}},
    {"model__settings": {"use_safetensors": False}},
    {"model__settings": {"adapter_kwargs": {"x": 1}}},
    {"model__settings": {"offload_folder": "/tmp"}},
    {"model__settings": {"gguf_file": "x"}},
    {"model__settings": {"_name_or_path": "/elsewhere"}},
    {"model__settings": {"subfolder": ".."}},
    {"model__trust_remote_code": True},
    {"model__tokenizer": {"trust_remote_code": True}},
    {"lora__trust_remote_code": True},
    {"data__trust_remote_code": True},
    {"training__trust_remote_code": True},
    {"method__trust_remote_code": True},
    {"server__trust_remote_code": True},
    {"trust_remote_code": True},
)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("changes", CODE, ids=str)
def test_a_recipe_cannot_ask_for_code(
    changes: dict[str, Any], tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    bert = coded(tiny, tmp_path / "bert", foreign=False)
    recipe = tiny.write(tmp_path / "r.toml", **{"model__source": str(bert), **changes})
    ran = command("run", recipe, "--out", tmp_path / "out")
    assert ran.code == 2, ran
    assert "Traceback" not in ran.err
    if key := changes.get("model__settings"):
        assert next(iter(key)) in ran.err or "trust_remote_code" in ran.err
    assert not (tmp_path / "was-run").exists()


def coded(tiny: Tiny, folder: Path, *, foreign: bool) -> Path:
    """The tiny model with code of its own beside it. foreign: without that it cannot be loaded."""
    shutil.copytree(tiny.bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "theirs.Config",
        "AutoModelForSequenceClassification": "theirs.Model",
    }
    if foreign:
        config["model_type"] = "theirs"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(
        "import pathlib\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        f"pathlib.Path({str(folder.parent / 'was-run')!r}).touch()\n"
        "class Config(BertConfig):\n    model_type = 'theirs'\n"
        "class Model(BertForSequenceClassification):\n    config_class = Config\n"
    )
    return folder


def test_a_model_s_own_code_is_run_if_that_was_asked_for(
    tiny: Tiny, tmp_path: Path, command: Command, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    recipe = tiny.write(tmp_path / "r.toml", rounds=1, model__source=str(tmp_path / "bert"))
    coded(tiny, tmp_path / "bert", foreign=True)
    ran = command("run", recipe, "--out", tmp_path / "out")
    one_sentence(ran, "--trust-remote-code")
    assert not (tmp_path / "was-run").exists()
    ran = command("run", recipe, "--out", tmp_path / "out", "--trust-remote-code")
    assert ran.code == 0, ran
    assert (tmp_path / "was-run").exists()
    (tmp_path / "was-run").unlink()
    for words in (
        ("resume", tmp_path / "out"),
        ("export", tmp_path / "out", "--to", tmp_path / "x"),
    ):
        one_sentence(command(*words), "--trust-remote-code")
        assert command(*words, "--trust-remote-code").code == 0


# --- pickled weights


def only_a_pickle(folder: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards_that_are_pickles(folder: Path, called: str = "pytorch_model.bin") -> None:
    only_a_pickle(folder)
    names = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").rename(folder / called)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, called)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def named_by_the_configuration(folder: Path) -> None:
    only_a_pickle(folder)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "adapter_model.bin"
    (folder / "config.json").write_text(json.dumps(config))


def shards_that_are_called_an_index(folder: Path) -> None:
    shards_that_are_pickles(folder, "p.model.safetensors.index.json")


def an_index_of_the_configurations(folder: Path) -> None:
    shards_that_are_called_an_index(folder)
    (folder / "model.safetensors.index.json").rename(folder / "q.model.safetensors.index.json")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "q.model.safetensors.index.json"
    (folder / "config.json").write_text(json.dumps(config))


def a_checkpoint_of_torch(folder: Path) -> None:
    only_a_pickle(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.pt")


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "pickled",
    [
        only_a_pickle,
        shards_that_are_pickles,
        shards_that_are_called_an_index,
        an_index_of_the_configurations,
        named_by_the_configuration,
        a_checkpoint_of_torch,
    ],
)
def test_pickled_weights_are_refused(
    pickled: Callable[[Path], None],
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(tiny.bert, folder)
    pickled(folder)

    def load(*_: object, **__: object) -> Any:
        raise AssertionError("something is unpickled")

    monkeypatch.setattr(torch, "load", load)
    recipe = tiny.write(tmp_path / "r.toml", model__source=str(folder))
    one_sentence(command("run", recipe, "--out", tmp_path / "out"), "only safetensors are read")


def test_a_pickle_beside_safetensors_is_not_read(
    tiny: Tiny, tmp_path: Path, command: Command, no_report: None
) -> None:
    """As many models of the hub have it."""
    folder = tmp_path / "bert"
    shutil.copytree(tiny.bert, folder)
    (folder / "pytorch_model.bin").write_bytes(b"nothing")
    recipe = tiny.write(tmp_path / "r.toml", rounds=1, model__source=str(folder))
    assert command("run", recipe, "--out", tmp_path / "out").code == 0


# --- whole comparisons


@pytest.fixture(scope="module")
def compared(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedsieve.study import compare, plan

    folder = tmp_path_factory.mktemp("compared")
    recipe = tiny.write(folder / "r.toml", rounds=2, budgets=[{}], method={"name": "fedit"})
    planned = plan.plan(str(recipe), folder / "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_, **__: [])
        compare.run(planned, 1, lambda *_: None, lambda _: None)
    return folder


IN_A_STUDY = {
    "report.html": "file",
    "table.md": "file",
    "table.json": "file",
    ".table.md.part": "file",
    "fedit": "folder",
    "fedit/seed-0": "folder",
    "fedit/seed-1": "folder",
    f"fedit/seed-0/{ASKED}": "file",
    f"fedit/seed-1/{ASKED}": "file",
    f"fedit/seed-1/.{ASKED}.part": "file",
    f"fedit/seed-1/{DIVERGED}": "file",
    f"fedit/seed-0/{rundir.RECIPE}": "file",
    f"fedit/seed-0/{rundir.METRICS}": "file",
    f"fedit/seed-0/{rundir.ADAPTER}": "folder",
    f"fedit/seed-0/{rundir.CHECKPOINTS}": "folder",
}
FINE = {"table.md", "table.json", ".table.md.part", f"fedit/seed-1/.{ASKED}.part"}


@pytest.mark.parametrize("name", kinds.some_of(IN_A_STUDY))
def test_a_comparison_follows_no_link(
    name: str,
    compared: Path,
    tmp_path: Path,
    target: Target,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name != rundir.REPORT:
        monkeypatch.setattr("fedsieve.report.write", lambda *_, **__: [])
    study = tmp_path / "theirs"
    shutil.copytree(compared / "study", study)
    place = study / name
    if place.is_dir():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target.folder if IN_A_STUDY[name] == "folder" else target.file)
    before = target.contents()
    ran = command("compare", compared / "r.toml", "--seeds", "0,1", "--out", study)
    assert target.contents() == before
    if name in FINE:
        assert ran.code == 0, ran
    else:
        one_sentence(ran, Path(name).name)


@pytest.mark.parametrize("attack", ["cut", "deep", "a huge number"])
def test_a_damaged_log_of_a_comparison_is_named(
    attack: str, compared: Path, tmp_path: Path, command: Command
) -> None:
    study = tmp_path / "theirs"
    shutil.copytree(compared / "study", study)
    log = study / "fedit" / "seed-0" / rundir.METRICS
    log.write_bytes(LINES[attack](log.read_bytes()))
    ran = command("compare", compared / "r.toml", "--out", study)
    one_sentence(ran, f"{log}, line 2")


# --- where a recipe says that it is written, and who may read it


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", "..", ".", "a/../../b", ""])
def test_the_name_of_a_recipe_is_no_path(
    name: str, tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = tmp_path / "r.toml"
    recipe.write_text(tomli_w.dumps(tiny.table(name=name)))
    one_sentence(command("run", recipe), "name")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_run_is_its_owner_s_alone(tiny: Tiny, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "run"
        runs.start(tiny, folder, **{**FLASC, "rounds": 2})
        (tmp_path / "open").mkdir(mode=0o755)
        runs.start(tiny, tmp_path / "open", **{**FLASC, "rounds": 1})
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [folder, folder / rundir.CHECKPOINTS]}
    assert set(modes.values()) == {0o700}
    for kept in (folder, tmp_path / "open"):  # a folder that was there keeps its mode
        files = list((kept / rundir.CHECKPOINTS).iterdir())
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


# --- what the last evaluation shows

SHOWN = {
    "round": 2,
    "classes": [
        {"name": "a", "rows": 3, "precision": 0.5, "recall": 1.0, "f1": 0.7, "taken_for": [3, 0]},
        {"name": "b", "rows": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0, "taken_for": [1, 0]},
    ],
    "answers": [{"asked": "<script>", "expected": "</td>", "told": "\x1b[2J"}],
}
ODD: dict[str, Any] = {
    "no object": [],
    "no classes": {"round": 2, "answers": []},
    "a word for a number": {**SHOWN, "round": "two"},
    "rows beyond all": {**SHOWN, "classes": [{**SHOWN["classes"][0], "rows": 10**400}]},  # type: ignore[index]
    "a class of nothing": {**SHOWN, "classes": [{}]},
    "a table that does not fit": {**SHOWN, "classes": SHOWN["classes"][:1]},  # type: ignore[index]
    "answers of numbers": {**SHOWN, "answers": [{"asked": 1, "expected": [], "told": None}]},
}


@pytest.mark.parametrize("act", [resume, report], ids=lambda act: act.__name__)
@pytest.mark.parametrize("odd", [*ODD, "cut", "deep", "no text"])
def test_a_damaged_evaluation_is_named_before_anything_is_done(
    theirs: Path, command: Command, tiny: Tiny, act: Act, odd: str, no_training: None
) -> None:
    path = theirs / rundir.EVALUATION
    path.write_text(json.dumps(SHOWN), encoding="utf-8")
    others = {"cut": b'{"round": 2', "deep": b"[" * 10**6, "no text": b"\xff\xfe"}
    path.write_bytes(others.get(odd) or json.dumps(ODD[odd]).encode())
    ran = act(command, theirs, tiny)
    assert ran.code == 2
    assert str(path) in ran.err
    assert len(ran.err.splitlines()) <= 2


@pytest.mark.parametrize("bare", [False, True])
def test_a_repository_that_names_programs_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare: bool
) -> None:
    """Whatever git runs where it asks what has changed: filters, and who watches files."""
    folder, ran = tmp_path / "theirs", tmp_path / "ran"
    folder.mkdir()
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    (folder / "a.txt").write_text("hello")
    (folder / ".gitattributes").write_text("* filter=evil diff=evil")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    program = f"sh -c 'touch {ran}; cat'"
    for key in ("filter.evil.clean", "filter.evil.process", "core.fsmonitor", "diff.evil.command",
                "core.hooksPath", "core.pager", "core.sshCommand", "core.editor"):  # fmt: skip
        subprocess.run([*git, "config", key, program], check=True)
    os.utime(folder / "a.txt", (1, 1))
    if bare:  # in a folder that is none of git's own, as in what was cloned from somewhere
        for path in (folder / ".git").iterdir():
            path.rename(folder / path.name)
        (folder / ".git").rmdir()
        subprocess.run(
            ["git", "-C", str(folder), "config", "core.worktree", str(folder)], check=False
        )
    monkeypatch.chdir(folder)
    found = rundir.environment("cpu")["git_commit"]
    assert len(found) == 40 or found == "none"
    assert not ran.exists()


@pytest.mark.parametrize(
    "words",
    [["resume", "/"], ["report", "/"], ["run", "demo", "--out", "/"], ["export", "/", "--to", "x"]],
)
def test_the_root_of_the_disk_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command(*words)
    assert ran.code == 2
    assert "/ is the root of the disk, and no folder of a run" in ran.err


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("number", "todo"), [(28, "make room"), (13, "mend that")])
def test_room_is_asked_for_where_there_is_none(
    tmp_path: Path, number: int, todo: str, begun: bool
) -> None:
    said = f"Nothing is lost: {todo}, then begin again"
    if begun:
        (tmp_path / rundir.RECIPE).touch()
        said = f"are whole: {todo}, then `fedsieve resume"
    with pytest.raises(FedSieveError, match=said), rundir.disk_errors(tmp_path):
        raise OSError(number, "why", "file")


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """Folders in folders, deeper than Python's own ways go, and a file of nine bytes at their end.
    It is removed afterwards, for pytest's way does not go so far either.
    """
    folder = tmp_path / "deep"
    inner = folder
    for _ in range(1200):
        inner.mkdir()
        inner /= "a"
    inner.mkdir()
    (inner / "x.png").write_bytes(b"no image.")
    yield folder
    for path in sorted(everything_in(tmp_path), key=lambda path: -len(path.parts)):
        remove_one(path)


def remove_one(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def test_folders_in_folders_without_end_are_gone_through(deep: Path, tmp_path: Path) -> None:
    (deep / "link").symlink_to(deep)
    found = list(everything_in(deep))
    assert len(found) == 1202
    assert limits.used_bytes(deep) == 9
    rows = pictures.by_class(deep.parent, None)
    assert rows is not None
    assert rows["label"] == ["deep"]
    with pytest.raises(FedSieveError, match="is a symbolic link"):
        here._refuse_links_within(deep)


def test_what_is_too_deep_to_be_removed_is_told(
    deep: Path, tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    recipe, out = tiny.write(tmp_path / "r.toml", rounds=1), tmp_path / "run"
    out.mkdir()
    deep.rename(out / "adapter")
    ran = command("run", recipe, "--out", out, "--overwrite")
    assert ran.code == 2
    assert "too deep to be removed" in " ".join(ran.err.split())
