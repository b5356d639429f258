"""How a command ends: 0 if what it was asked for is there, and never where a run has stopped short.

Scripts and schedulers see nothing else of a run. Each case stops one at some place, for some
reason; 2 is for what the user can mend, 130 for Ctrl-C and SIGTERM, as shells have it.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fedsieve import cli
from fedsieve.disk import no_room, of_the_disk
from fedsieve.errors import FedSieveError
from fedsieve.run import rundir
from tests import kinds, runs
from tests.conftest import Command, Ran, Tiny

# Where a run can be stopped, by the name that its caller has for it.
PLACES = {
    "while the recipe is checked": "fedsieve.recipe.read.check",
    "while the rows are read": "fedsieve.recipe.experiment.load_rows",
    "while the model is loaded": "fedsieve.recipe.experiment.load_base",
    "while a client trains": "fedsieve.recipe.experiment.fit",
    "while it is evaluated": "fedsieve.recipe.experiment.tally",
    "while a line is logged": "fedsieve.run.rundir.append",
    "while a checkpoint is written": "fedsieve.run.checkpoint.save",
    "while the adapter is saved": "fedsieve.train.model.ResidentModel.save",
    "while the report is drawn": "fedsieve.report.write",
}
FULL = OSError(28, "No space left on device")
REASONS: dict[str, tuple[BaseException, int]] = {
    "Ctrl-C": (KeyboardInterrupt(), 130),
    "a full disk": (FULL, 2),
    "bad input": (FedSieveError("no"), 2),
    "a fault of ours": (RuntimeError("a fault"), 1),
    "somebody's code that ends the program": (SystemExit(0), 2),
    "too little memory": (MemoryError(), 2),
}


def ended(command: Command, *words: str | Path) -> int:
    """The exit code; 1 where Python shows a traceback."""
    try:
        return command(*words).code
    except Exception:  # what Python does with it is exit code 1
        return 1


@pytest.fixture(scope="module")
def stopped(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after round 1 of 2. Not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(BaseException, match="stopped after round 1"):
        runs.start(tiny, folder, runs.stop_at(1), rounds=2)
    return folder


# Every place for every reason in `run`; the other commands have its way, and one reason a place.
CASES = [
    *(("run", place, reason) for place in PLACES for reason in REASONS),
    *(("resume", place, "Ctrl-C") for place in list(PLACES)[1:]),
    *(("compare", place, "Ctrl-C") for place in PLACES),
    *(("compare", "while a client trains", reason) for reason in REASONS if reason != "Ctrl-C"),
]


@pytest.mark.parametrize(("name", "place", "reason"), kinds.some_of(CASES))
def test_a_run_that_stops_short_does_not_end_with_0(
    name: str,
    place: str,
    reason: str,
    tiny: Tiny,
    stopped: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised, code = REASONS[reason]
    recipe, out = tiny.write(tmp_path / "r.toml", rounds=2), tmp_path / "out"
    words: dict[str, tuple[str | Path, ...]] = {
        "run": ("run", recipe, "--out", out),
        "resume": ("resume", out),
        "compare": ("compare", recipe, "--out", out),
    }
    if name == "resume":
        shutil.copytree(stopped, out)

    def stop(*_: object, **__: object) -> Any:
        raise raised

    monkeypatch.setattr(PLACES[place], stop)
    ended_with = ended(command, *words[name])
    assert ended_with != 0
    if reason == "Ctrl-C":
        assert ended_with == 130
    elif name != "compare":  # which goes on with its other runs, and says at its end what failed
        assert ended_with in (code, 1 if reason == "a full disk" else code)


class Odd(BaseException):
    """No Exception, and one that cannot say what it is of."""

    def __str__(self) -> str:
        raise Odd


@pytest.mark.parametrize(
    "raised", [Odd(), GeneratorExit("x"), BaseExceptionGroup("x", [Odd()]), CancelledError()]
)
def test_what_is_no_exception_is_told_like_one(
    raised: BaseException, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ending(*_: object) -> None:
        raise raised

    monkeypatch.setattr("fedsieve.recipe.read.read", ending)
    ran = command("run", tmp_path / "r.toml")
    assert ran.code == 2
    assert f"ended the program before all was done ({type(raised).__name__}" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(("given", "code"), [(0, 2), (None, 2), ("done", 2), (256, 2), (7, 7)])
def test_no_other_code_than_ours_ends_a_command_with_0(
    given: Any, code: int, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ending(*_: object) -> None:
        sys.exit(given)

    monkeypatch.setattr("fedsieve.recipe.read.read", ending)
    ran = command("run", tmp_path / "r.toml")
    assert ran.code == code
    assert "code that is not FedSieve's ended the program before all was done" in ran.err
    assert command("--help").code == 0
    assert command("run", "--help").code == 0
    assert command("--version").code == 0
    assert command("run", "--nothing").code == 2


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("SystemExit(0)", 2, "round 1: the function that trains failed: SystemExit: 0"),
        ("MemoryError()", 2, "round 1: memory does not suffice (MemoryError): a smaller"),
        ("KeyboardInterrupt()", 130, "stopped after round 0 of 2"),
    ],
)
def test_a_function_that_ends_the_program_is_told_of_its_client(
    raised: str, code: int, said: str, tiny: Tiny, tmp_path: Path, command: Command,
    no_report: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "quits.py").write_text(f"def train(model, rows, seed):\n    raise {raised}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "quits", raising=False)
    recipe = tiny.write(tmp_path / "r.toml", rounds=2, training={"function": "quits:train"})
    ran = command("run", recipe, "--out", tmp_path / "out", "--allow-code")
    assert ran.code == code
    assert said in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


REFUSED: dict[str, dict[str, Any]] = {
    "no client's update is of use": {"training__lr": 1e30},
    "no such model": {"model__source": "/nowhere"},
    "no such rows": {"data__train": "/nowhere.csv"},
    "no such method": {"method__name": "fedsieve.methods.nothing"},
    "no such column": {"data__text": "nothing"},
    "a key that is not known": {"training__speed": 1},
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", ["run", "compare"])
def test_a_run_that_is_refused_does_not_end_with_0(
    name: str, what: str, tiny: Tiny, tmp_path: Path, command: Command, no_report: None
) -> None:
    recipe = tiny.write(tmp_path / "r.toml", rounds=2, **REFUSED[what])
    ran = command(name, recipe, "--out", tmp_path / "out")
    assert ran.code in ((2,) if name == "run" else (1, 2)), ran
    assert "Traceback" not in ran.err


def test_what_cannot_be_resumed_does_not_end_with_0(
    stopped: Path, tmp_path: Path, command: Command, no_report: None
) -> None:
    assert command("resume", tmp_path / "nothing").code == 2
    shutil.copytree(stopped, tmp_path / "run")
    with rundir.lock(tmp_path / "run"):
        assert command("resume", tmp_path / "run").code == 2
    for path in (tmp_path / "run" / rundir.CHECKPOINTS).iterdir():
        path.unlink()
    assert command("resume", tmp_path / "run").code == 2


def test_a_run_that_is_done_ends_with_0(
    tiny: Tiny, tmp_path: Path, command: Command, no_report: None
) -> None:
    recipe, out = tiny.write(tmp_path / "r.toml", rounds=1), tmp_path / "out"
    acts: list[Callable[[], Ran]] = [
        lambda: command("run", recipe, "--out", out),
        lambda: command("resume", out),
    ]
    assert [act().code for act in acts] == [0, 0]


def test_a_process_that_is_asked_to_stop_ends_with_130(tiny: Tiny, tmp_path: Path) -> None:
    """By SIGTERM, as machines that are taken away; tests/study has the same of comparisons."""
    recipe = tiny.write(tmp_path / "r.toml", rounds=10**6)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsieve", "run", str(recipe), "--out", str(tmp_path / "out")],
        env={**os.environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not any(p.stat().st_size for p in tmp_path.rglob(rundir.CLIENTS)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err


FULL_DISKS: dict[str, BaseException] = {
    "as Python says it": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "as tokenizers says it": Exception("No space left on device (os error 28)"),
}


def test_no_words_are_too_odd_to_be_looked_through() -> None:
    """They may quote a file of somebody's."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    for error in (Mute(), Exception(f"(os error {'9' * 5000})"), Exception("(os error -1)")):
        assert of_the_disk(error) is None
    found = of_the_disk(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert found is not None
    assert no_room(found)


@pytest.mark.parametrize("how", FULL_DISKS)
@pytest.mark.parametrize("name", ["run", "export", "merge"])
def test_a_full_disk_is_told_and_leaves_nothing_in_the_way(
    name: str, how: str, tiny: Tiny, stopped: Path, tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same command does what it was asked for once there is room."""
    recipe, out = tiny.write(tmp_path / "r.toml", rounds=1), tmp_path / "out"
    words: tuple[str | Path, ...] = ("export", stopped, "--to", out)
    if name == "run":
        words = ("run", recipe, "--out", out)
    elif name == "merge":
        words = (*words, "--merge")

    def full(self: object, adapter: object, folder: Path, *_: object, **__: object) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{")
        raise FULL_DISKS[how]

    with monkeypatch.context() as patch:
        patch.setattr(
            f"fedsieve.train.model.ResidentModel.{'merge' if name == 'merge' else 'save'}", full
        )
        ran = command(*words)
    assert ran.code == 2
    assert "No space left" in ran.err
    assert command(*(("resume", out) if name == "run" else words)).code == 0


@pytest.mark.parametrize("how", FULL_DISKS)
def test_a_recipe_that_finds_no_room_is_told(
    how: str, tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise FULL_DISKS[how]

    monkeypatch.setattr("fedsieve.disk.os.fsync", full)
    ran = command("init", tiny.train, "--out", tmp_path / "r.toml", "--yes")
    assert ran.code == 2
    assert "No space left on device: make room" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    "name", kinds.some_of(["run", "init", "check", "export", "resume", "costs"])
)
def test_where_no_temporary_folder_can_be_written_that_is_told(
    name: str, tiny: Tiny, stopped: Path, tmp_path: Path
) -> None:
    """Libraries look for one as they are imported."""
    recipe = tiny.write(tmp_path / "r.toml", rounds=1)
    words: dict[str, list[str | Path]] = {
        "run": [recipe, "--out", tmp_path / "out"],
        "init": [tiny.train, "--out", tmp_path / "made.toml", "--yes"],
        "check": [recipe],
        "export": [stopped, "--to", tmp_path / "out"],
        "resume": [stopped],
        "costs": [recipe, "--classes", "4"],
    }
    nothing = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (0, 0)); import fedsieve.cli as c"
    done = subprocess.run(
        [sys.executable, "-c", f"{nothing}; c.main()", name, *map(str, words[name])],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    said = " ".join(done.stderr.split())
    assert "error: no temporary folder can be written (tried ['/" in said
    assert said.endswith("make room, or set TMPDIR to another")
    assert "Traceback" not in said
    assert done.returncode == 2


def test_a_run_without_a_temporary_folder_is_told_how_to_go_on(tmp_path: Path) -> None:
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    said = "no temporary folder can be written .*, or set TMPDIR to another, then `fedsieve resume"
    with pytest.raises(FedSieveError, match=said), rundir.disk_errors(tmp_path):
        raise error


@pytest.mark.parametrize(
    ("error", "room"),
    [
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/rows"), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (OSError(errno.EFBIG, "it has more than 9 bytes", "/rows"), False),  # ours, of a reader
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/rows"), False),
    ],
)
def test_room_is_asked_for_where_that_is_what_lacks(
    error: OSError, room: bool, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raising() -> None:
        raise error

    monkeypatch.setattr(cli, "app", raising)
    ran = command("methods")
    assert (ran.code, "make room" in ran.err) == (2, room)
    with pytest.raises(FedSieveError) as caught, rundir.disk_errors(tmp_path):
        raising()
    assert ("make room" in str(caught.value)) == room


def test_a_fault_is_told_whole_but_not_without_end(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising() -> None:
        raise KeyError("x" * 10_000_000)

    monkeypatch.setattr(cli, "app", raising)
    ran = command("methods")
    assert ran.code == 1
    assert ran.err.startswith("Traceback")
    assert "in raising" in ran.err
    assert 10_000 < len(ran.err) < 30_000
    monkeypatch.setattr(cli, "app", lambda: 1 // 0)
    assert "ZeroDivisionError" in command("methods").err


FIGURE = 'title = "t"\n[[entry]]\nname = "a"\n[[small]]\nname = "p"\n'
STUDY = 'recipe = "demo"\n[[entry]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FIGURE, "figure and no recipe: `fedsieve reproduce`"),
        (STUDY, "study and no recipe: `fedsieve compare`"),
    ],
    ids=["a figure", "a study"],
)
def test_what_is_no_recipe_is_told_with_the_command_for_it(
    text: str, said: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "one.toml"
    path.write_text(text, encoding="utf-8")
    for words in (["run"], ["check"], ["costs"]):
        ran = command(*words, path)
        assert ran.code == 2
        assert said in " ".join(ran.err.split())


def test_of_a_copy_the_file_that_was_written_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other disk has room: whoever freed some there would be no further."""

    def raising() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/base/read", None, "/run/written")

    monkeypatch.setattr(cli, "app", raising)
    ran = command("methods")
    with pytest.raises(FedSieveError) as caught, rundir.disk_errors(tmp_path):
        raising()
    for said in (ran.err, str(caught.value)):
        assert "/run/written" in said
        assert "/base/read" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["methods"], ["recipes"], ["recipes", "demo"]])
def test_output_that_finds_no_room_is_told(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fedsieve", *words],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["reproduce"], ["methods"], ["recipes", "demo"]])
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(words: list[str]) -> None:
    """As `| head` does."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "fedsieve", *words],
            stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["report", "RUN"], "fedsieve.report.write"),
        (["export", "RUN", "--to", "OUT"], "fedsieve.train.model.ResidentModel.save"),
        (["check", "RECIPE"], "fedsieve.recipe.experiment.load_rows"),
        (["run", "RECIPE", "--out", "OUT"], "fedsieve.recipe.experiment.load_rows"),
    ],
)
def test_that_a_command_was_stopped_is_said_once(
    words: list[str], place: str, tiny: Tiny, stopped: Path, tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    named = {"RUN": stopped, "OUT": tmp_path / "out", "RECIPE": tiny.write(tmp_path / "r.toml")}
    monkeypatch.setattr(place, stop)
    ran = command(*(named.get(word, word) for word in words))
    assert ran.code == 130
    assert ran.err.count("stopped") == 1
