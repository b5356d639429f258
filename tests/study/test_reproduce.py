"""`fedsieve reproduce`: figures as data, run, resumed, drawn and judged."""

import errno
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedsieve.disk import copied
from fedsieve.errors import FedSieveError
from fedsieve.run import rundir
from fedsieve.study import claims, figures, reproduce
from fedsieve.study.front import Point, front
from fedsieve.study.parts import ASKED
from fedsieve.study.plan import worked_out
from fedsieve.study.tables import Grid, Study
from tests import runs
from tests.conftest import Command, Tiny
from tests.study.test_compare import change, own_copies

EVERY = sorted(figures.shipped())
Write = Callable[..., Path]


def everything_there(folder: Path, part: figures.Part, source: str) -> Path:
    """A folder of --data that holds, empty, what a part names."""
    for name in figures.needs(part, source).files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def trials_of(grid: Grid) -> int:
    """How many trials a grid makes."""
    return len(grid) if isinstance(grid, list) else math.prod(map(len, grid.values()))


def first_of_each(study: Study) -> Study:
    """The study with one trial an entry: the paper's grids would take a minute to be checked."""

    def first(grid: Grid | None) -> Grid | None:
        if isinstance(grid, dict):
            return {key: values[:1] for key, values in grid.items()}
        return grid and grid[:1]

    entries = tuple(e.model_copy(update={"grid": first(e.grid)}) for e in study.entry)
    tune = study.tune and study.tune.model_copy(update={"grid": first(study.tune.grid)})
    return study.model_copy(update={"entry": entries, "tune": tune})


@pytest.mark.parametrize("scale", figures.SCALES)
@pytest.mark.parametrize("name", EVERY)
def test_every_figure_is_in_order_at_both_scales(
    name: str, scale: figures.Scale, tmp_path: Path
) -> None:
    """Every recipe that it would run passes the schema and its method, without data or hub."""
    figure = figures.load(name)
    if scale == "small" and not figure.small:
        return
    for part in figures.parts(figure, scale, tmp_path / "out"):
        base, study = figures.ready(part, name, everything_there(tmp_path, part, name))
        usual = study.tune.grid if study.tune else []
        grids = [usual if entry.grid is None else entry.grid for entry in study.entry]
        trials = {trials_of(grid) for grid in grids}
        assert len(trials) == 1, "each is tuned alike"
        plan = worked_out(first_of_each(study), base, name, part.folder)
        assert [entry.name for entry in plan.entries] == [entry.name for entry in study.entry]
    # What is claimed is of entries that are run at the paper's scale, and is a number there.
    if scale == "paper":
        panels = {panel.name: panel for panel in figure.paper}
        for check in figure.check:
            asked = [p for n, p in panels.items() if check.panel in (None, n)]
            sides = {check.left, check.right or check.left}
            of_small = check.panel is not None and not asked
            there = any(p.entries is None or sides <= {*p.entries} for p in asked)
            assert there or of_small, check.says


def test_all_figures_and_tables_of_both_papers_are_there() -> None:
    flasc = {f"flasc/fig{number}" for number in range(2, 9)}
    tables = {
        "table5.1-glue",
        "table5.1-commonsense",
        "table5.1-rivals",
        "table-c1",
        "table-c2",
        "table-c3",
    }
    tables |= {"table-d1", "tables-a1-a3"}
    fslora = {f"fslora/{name}" for name in tables}
    fslora |= {f"fslora/fig{name}" for name in ("2-3a-5", "3b-6", "3c", "4", "7")}
    ours = {"fedsieve/front", "fedsieve/front-cifar10", "flasc/fig4-text"}
    assert {*EVERY} == flasc | fslora | ours


@pytest.fixture
def write(tiny: Tiny, tmp_path: Path) -> Write:
    """Write a figure beside the recipe of its small panel, which takes a second."""

    def make(**changes: Any) -> Path:
        tiny.write(tmp_path / "tiny.toml", rounds=2, evaluation__every=1)
        panel = {"name": "tiny", "recipe": "tiny.toml"}
        table: dict[str, Any] = {
            "title": "Tiny",
            "claim": "Whatever it is.",
            "seeds": [0, 1],
            "entry": [{"name": "dense", "method": "fedit"}, {"name": "FSLoRA", "method": "fslora"}],
            "small": [panel],
            "paper": [panel],
            **changes,
        }
        path = tmp_path / "figure.toml"
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
        return path

    return make


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts' own reports take longer than the runs: a blank one is there."""
    monkeypatch.setattr("fedsieve.report.write", lambda _, out, **given: out.write_bytes(b""))


def logs(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*.jsonl")}


@pytest.mark.usefixtures("no_plots")
def test_places_that_no_panel_has_take_no_room(
    write: Write, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def png(*given: Any) -> bytes:
        drawn.append(given)
        return b"\x89PNG"

    monkeypatch.setattr("fedsieve.report.figure.png", png)
    places = [{"name": r, "set": {"lora.rank": int(r)}} for r in ("1", "2", "3")]
    panel = {"name": "tiny", "recipe": "tiny.toml", "places": ["2"]}
    path = write(place=places, small=[panel], paper=[panel], seeds=[0], entry=[{"name": "a"}])
    assert command("reproduce", path, "--out", tmp_path / "out").code == 0
    (panels, _, shown, *_), *_ = drawn
    assert shown == ["2"]
    assert list(panels[0].curves["a"].x) == [0]


@pytest.mark.usefixtures("no_plots")
def test_a_figure_from_end_to_end(write: Write, tmp_path: Path, command: Command) -> None:
    checks = [
        # A sketched client uploads a part of a dense one's bytes; and not the other way round.
        {"says": "sends less", "left": "FSLoRA", "right": "dense", "most": 0.9},
        {"says": "sends more", "left": "FSLoRA", "right": "dense", "least": 1.1},
        {"says": "more rank, more bytes", "left": "dense", "left_at": "4", "right_at": "2"}
        | {"above": 0.001},
    ]
    places = [{"name": str(r), "x": r, "set": {"lora.rank": r}} for r in (2, 4)]
    path = write(
        y="megabytes up", place=places, check=checks, numbers={"tiny": {"dense": {"4": 12.5}}}
    )
    out = tmp_path / "papers" / "one"
    ran = command("reproduce", path, "--out", out)
    assert (ran.code, ran.err) == (0, "")
    told = json.loads((out / "figure.json").read_text())
    assert [check["verdict"] for check in told["checks"]] == ["holds", "does not hold", "holds"]
    assert [check["seeds"] for check in told["checks"]] == [[2, 2], [0, 2], [2, 2]]
    assert told["verdict"] == "does not hold"
    sent = told["values"]["tiny"]["megabytes up"]["dense"]["4"]["1"]
    lines = runs.lines(out / "tiny" / "4" / "dense" / "seed-1")
    assert sent == pytest.approx(sum(line["up_bytes"] for line in lines) / 1e6)
    assert told["rows"]["tiny"][0]["4"].endswith("(paper 12.5)")
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "](figure.png)\n" in (out / "figure.md").read_text(encoding="utf-8")
    last = " ".join(ran.out.split())
    assert f"{path} (small, 2 seeds): does not hold. The claim: Whatever it is." in last
    assert "Here 2 of 3 claims hold: does not hold (holds in 0 of 2 seeds): sends more: " in last

    # What is finished never runs again, in this figure or in one beside it.
    before = logs(out)
    assert command("reproduce", path, "--out", out).code == 0
    assert logs(out) == before
    ran = command("reproduce", path, "--out", tmp_path / "papers" / "two")
    assert ran.out.count("4 runs, 4 of them done already") == 2
    # Stopped in the middle: the run that is not there is done, and the others are not.
    gone = out / "tiny" / "4" / "dense" / "seed-1"
    (gone / rundir.ADAPTER / "adapter_config.json").unlink()
    ran = command("reproduce", path, "--out", out)
    assert "4 runs, 3 of them done already" in ran.out
    assert logs(out) == before


BITS = [
    {"name": f"{bits} bits", "set": {"method.down_values": form, "method.up_values": form}}
    for bits, form in ((8, "int8"), (32, "float32"))
]


@pytest.mark.usefixtures("no_plots")
def test_a_front_tunes_at_one_place_and_names_what_nothing_beats(
    write: Write, tmp_path: Path, command: Command
) -> None:
    entries = [
        {"name": "dense", "method": "fedit"},
        {"name": "as it is", "method": "fslora", "grid": []},
        {"name": "never", "method": "fedit", "grid": {"training.lr": [1e30, 1e31]}},
    ]
    path = write(
        x="megabytes in all",
        y="megabytes up",  # a front tells scores by bytes, whatever else is told
        place=BITS,
        entry=entries,
        seeds=[0],
        tune={"grid": {"training.lr": [1e-9, 0.05]}, "set": {"rounds": 1}},
        tune_at="32 bits",
    )
    out = tmp_path / "out"
    ran = command("reproduce", path, "--out", out)
    assert ran.code == 1
    assert "32 bits: never: none of its trials has won" in ran.out + ran.err
    told = json.loads((out / "figure.json").read_text())
    # The place that is tuned goes first, wherever it stands; the other makes no trials of its own.
    assert {p.parent.parent.name for p in out.rglob("tune-*")} == {"32-bits"}
    for entry in ("dense", "as it is"):
        recipes = {
            bits: tomllib.loads((out / f"tiny/{bits}/{entry}/seed-0/recipe.toml").read_text())
            for bits in ("32-bits", "8-bits")
        }
        assert recipes["8-bits"]["method"].pop("up_values") == "int8"
        assert recipes["8-bits"]["method"].pop("down_values") == "int8"
        assert recipes["32-bits"]["method"].pop("up_values") == "float32"
        assert recipes["32-bits"]["method"].pop("down_values") == "float32"
        assert recipes["8-bits"] == recipes["32-bits"]  # rate, rows held back, and all else
        assert recipes["8-bits"]["data"]["validation"] == 0.1
    rates = json.loads((out / "tiny/32-bits/tuning.json").read_text())["entries"]["dense"]
    chosen = rates["trials"][rates["best"]]["settings"]["training.lr"]
    dense = tomllib.loads((out / "tiny/8-bits/dense/seed-0/recipe.toml").read_text())
    assert dense["training"]["lr"] == chosen
    # The cells say how many bytes, and what sends least is always on the front.
    rows = {row[""]: row for row in told["rows"]["tiny"]}
    values = told["values"]["tiny"]
    for entry in ("dense", "as it is"):
        for bits in ("8 bits", "32 bits"):
            sent = values["megabytes"][entry][bits]["0"]
            assert f" at {claims.number(sent)} MB" in rows[entry][bits].replace("**", "")
    assert rows["as it is"]["8 bits"].startswith("**")
    assert rows["never"]["8 bits"] == "-"
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = logs(out)
    command("reproduce", path, "--out", out)
    assert logs(out) == before


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=12))
def test_nothing_beats_what_is_on_the_front(pairs: list[tuple[int, int]]) -> None:
    points = [Point(str(n), "", x, y) for n, (x, y) in enumerate(pairs)]
    found = front(points)

    def beaten(point: Point) -> bool:
        return any(
            other.megabytes <= point.megabytes
            and other.score >= point.score
            and (other.megabytes, other.score) != (point.megabytes, point.score)
            for other in points
        )

    at = {(p.megabytes, p.score) for p in points if not beaten(p)}
    assert {(p.megabytes, p.score) for p in found} == at
    assert len(found) == len(at)
    assert [p.megabytes for p in found] == sorted(p.megabytes for p in found)


@pytest.mark.usefixtures("no_plots")
def test_a_part_that_fails_is_named_and_the_others_go_on(
    write: Write, tmp_path: Path, command: Command
) -> None:
    there = {"name": "there", "recipe": "tiny.toml", "entries": ["dense", "FSLoRA"]}
    panels = [there | {"name": "gone", "set": {"data.train": "{data}/rows.csv"}}, there]
    check = {"says": "as good", "left": "FSLoRA", "right": "dense", "least": 0.0}
    # What this form is without is not asked of it.
    more = {"says": "n", "left": "other", "right": "dense", "least": 0.0}
    entries = [{"name": n, "method": m} for n, m in (("dense", "fedit"), ("FSLoRA", "fslora"))]
    entries.append({"name": "other", "method": "flasc"})
    path = write(small=panels, seeds=[0], check=[check, more], entry=entries)
    out = tmp_path / "out"
    ran = command("reproduce", path, "--out", out)
    assert ran.code == 1
    assert "failed: gone: it needs rows.csv, no part of FedSieve: give --data" in " ".join(
        ran.err.split()
    )
    told = json.loads((out / "figure.json").read_text())
    # A claim of both panels is not measured by one of them.
    assert told["checks"][0]["verdict"] == told["verdict"] == "not measured"
    measured = told["checks"][0]["measured"]
    assert "missing: gone" in measured
    assert "of the others, there, " in measured
    assert set(told["values"]["there"]["score"]["dense"]["all"]) == {"0"}
    ran = command("reproduce", path, "--out", out, "--data", tmp_path)
    assert "there is no rows.csv in the folder" in " ".join(ran.err.split())
    # With the file in its place, the part is run, and the claim is.
    (tmp_path / "rows.csv").write_bytes(Path(train_of(tmp_path)).read_bytes())
    ran = command("reproduce", path, "--out", out, "--data", tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert json.loads((out / "figure.json").read_text())["verdict"] == "holds"
    assert "1 more are of what this form leaves out" in " ".join(ran.out.split())


OWN_ROWS = "{data}/rows.csv"


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("panels", "told"),
    [
        ({"one": {"data.train": "{data}/rows.csv"}}, "one: it needs rows.csv"),
        ({"one": {"model.source": "org/no-model"}}, "one: org/no-model is not here (looked up in"),
        (
            {"one": {"model.source": "org/no"}, "two": {"model.source": "org/no"}},
            "one; two: org/no is not here (looked up in",
        ),
        (
            {"one": {"model.source": "org/no", "data.train": "org/rows"}},
            "one: org/no and org/rows are not here (looked up in",
        ),
        ({"one": {"data.train": "./gone.csv"}}, "one: there is no ./gone.csv"),
        ({"one": {"data.train": "x" * 300}}, f"one: '{'x' * 80}' can be no path: "),
        ({"one": {"model.source": "x" * 300}}, f"one: '{'x' * 80}' can be no path: "),
        (
            {
                "one": {
                    "data.train": "{data}/a.csv",
                    "data.test": "{data}/b.csv",
                    "model.source": "o/m",
                }
            },
            "one: it needs a.csv, b.csv, no part of FedSieve: give --data and the folder in which "
            "they lie so; o/m is not here",
        ),
    ],
    ids=[
        "a file",
        "a model",
        "a model of two panels",
        "a model and a data set",
        "a path",
        "long rows",
        "a long model",
        "files and a model",
    ],
)
def test_what_is_not_here_is_told_once_and_before_anything_runs(
    write: Write,
    tmp_path: Path,
    command: Command,
    panels: dict[str, dict[str, Any]],
    told: str,
) -> None:
    there = {"name": "there", "recipe": "tiny.toml"}
    gone = [there | {"name": name, "set": changes} for name, changes in panels.items()]
    out = tmp_path / "out"
    ran = command("reproduce", write(small=[there, *gone], seeds=[0]), "--out", out)
    said = " ".join(ran.out.split())
    assert ran.code == 1
    assert said.index(f"left out: {told}") < said.index("there: 2 entries, into")
    assert said.count(told) == " ".join(ran.err.split()).count(f"failed: {told}") == 1
    assert (out / "figure.json").is_file()
    assert f"- failed: {told}" in (out / "figure.md").read_text(encoding="utf-8")
    # Where nothing is here, nothing is written.
    out = tmp_path / "none"
    ran = command("reproduce", write(small=gone, seeds=[0]), "--out", out)
    assert ran.code == 2
    assert f"nothing of it can be run here: {told}" in " ".join(ran.err.split())
    assert not out.exists()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("changes", "rows", "told"),
    [
        ({"data.train": OWN_ROWS}, "words,label\na b,x\n", "no column 'text'"),
        ({"data.test": OWN_ROWS}, "words,label\na b,x\n", "no column 'text'"),
        ({"data.train": OWN_ROWS, "partition.by": "s"}, "text,label\na b,x\n", "no column 's'"),
        ({"data.train": OWN_ROWS}, "", "rows.csv"),
        ({"data.test": OWN_ROWS}, "\0\0", "rows.csv"),
    ],
)
def test_files_of_other_rows_are_told_once_and_before_anything_runs(
    write: Write,
    tmp_path: Path,
    command: Command,
    changes: dict[str, Any],
    rows: str,
    told: str,
) -> None:
    (tmp_path / "rows.csv").write_text(rows, encoding="utf-8")
    gone = [{"name": n, "recipe": "tiny.toml", "set": changes} for n in ("one", "two")]
    path = write(small=gone, seeds=[0])
    ran = command("reproduce", path, "--data", tmp_path, "--out", tmp_path / "out")
    said = " ".join(ran.err.split())
    assert ran.code == 2
    assert "nothing of it can be run here: one; two: " in said
    assert said.count(told) == 1
    assert not (tmp_path / "out").exists()


def test_what_a_panel_sets_wrongly_is_told_as_its_own(
    write: Write, tmp_path: Path, command: Command
) -> None:
    wrong = {"name": "one", "recipe": "tiny.toml", "set": {"budgets": []}}
    ran = command("reproduce", write(small=[wrong], seeds=[0]), "--out", tmp_path / "out")
    said = " ".join(ran.err.split())
    assert ran.code == 2
    assert "the recipe of 'one' with what is set: budgets: " in said
    assert "override" not in said


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("y", "legend"),
    [
        ("score", ""),
        ("megabytes", " What it takes to a score of 0.01."),
        (
            "seconds",
            " What it takes to a score of 0.01. Seconds are simulated, for downlinks of 10 Mbit/s.",
        ),
    ],
)
def test_what_parts_say_of_themselves_is_told_once_and_else_with_its_place(
    write: Write, tmp_path: Path, command: Command, y: str, legend: str
) -> None:
    """And how to read a table is said of what this figure tells, and of no other column."""
    places = [{"name": f"rank {r}", "x": r, "set": {"lora.rank": r}} for r in (2, 4)]
    panel = {"name": "tiny", "recipe": "tiny.toml", "target": 0.01}
    out = tmp_path / "out"
    path = write(y=y, place=places, small=[panel], seeds=[0])
    assert command("reproduce", path, "--out", out).code == 0
    notes = json.loads((out / "figure.json").read_text())["notes"]["tiny"]
    assert notes[0] == f"Mean ± standard deviation of the sample, over seeds.{legend}"
    assert not [note for note in notes if note.startswith("rank ")]
    assert sum(note.startswith("dense: ") for note in notes) == 1
    lines = (out / "figure.md").read_text().splitlines()
    assert len({*lines} - {""}) == len([line for line in lines if line])
    assert sum(" a round, " in line and " clients, " in line for line in lines) == 1


def test_rows_that_an_entry_reads_otherwise_are_not_judged_before_it_does(
    write: Write, tmp_path: Path, command: Command, tiny: Tiny
) -> None:
    text = Path(tiny.table()["data"]["train"]).read_text(encoding="utf-8")
    (tmp_path / "rows.csv").write_text(text.replace("text", "words", 1), encoding="utf-8")
    panel = {"name": "p", "recipe": "tiny.toml", "set": {"data.train": OWN_ROWS}}
    own = {"data.text": "words", "data.test": str(tmp_path / "rows.csv")}
    entry = [{"name": "dense", "method": "fedit", "set": own}]
    path = write(small=[panel], seeds=[0], entry=entry)
    ran = command("reproduce", path, "--data", tmp_path, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.usefixtures("no_plots")
def test_the_rows_of_all_places_are_named(
    tiny: Tiny, write: Write, tmp_path: Path, command: Command
) -> None:
    own = Path(tiny.table()["data"]["train"]).read_bytes()
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(own)
    places = [
        {"name": name, "set": {"data.train": str(tmp_path / f"{name}.csv")}} for name in ("a", "b")
    ]
    entry = [{"name": "dense", "method": "fedit"}]
    path, out = write(place=places, seeds=[0], entry=entry), tmp_path / "out"
    assert command("reproduce", path, "--out", out).code == 0
    (settings,) = json.loads((out / "figure.json").read_text())["settings"].values()
    assert settings["data"] == f"{tmp_path.name}/a.csv, {tmp_path.name}/b.csv"


def test_a_note_names_its_place_unless_all_have_it() -> None:
    assert reproduce._noted({}) == []
    assert reproduce._noted({"a": ["2", "4"], "b": ["2"], "c": ["4"]}) == ["a", "2: b", "4: c"]
    assert reproduce._noted({"b": ["2"], "c": ["4"]}) == ["2: b", "4: c"]
    assert reproduce._noted({"b": ["all"], "c": ["all"]}) == ["b", "c"]


@pytest.mark.usefixtures("no_plots")
def test_a_run_on_other_rows_is_not_copied(write: Write, tmp_path: Path, command: Command) -> None:
    panel = {"name": "p", "recipe": "tiny.toml", "set": {"data.train": "{data}/rows.csv"}}
    path = write(small=[panel], seeds=[0], entry=[{"name": "dense", "method": "fedit"}])
    rows = tmp_path / "rows.csv"
    text = Path(train_of(tmp_path)).read_text(encoding="utf-8")
    done = {}
    for name, own in (("one", text), ("two", text), ("three", text.replace("car", "cat", 1))):
        rows.write_text(own, encoding="utf-8")
        ran = command("reproduce", path, "--data", tmp_path, "--out", tmp_path / "papers" / name)
        assert ran.code == 0, ran.err
        done[name] = "1 of them done already" in ran.out
    assert done == {"one": False, "two": True, "three": False}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("noted", [True, False])
def test_a_run_over_another_base_is_not_copied(
    write: Write, tiny: Tiny, tmp_path: Path, command: Command, noted: bool
) -> None:
    own = own_copies(tiny, tmp_path)
    panel = {"name": "p", "recipe": "tiny.toml", "set": {"model.source": own["model__source"]}}
    path = write(small=[panel], seeds=[0], entry=[{"name": "dense", "method": "fedit"}])
    done = {}
    for name in ("one", "two", "three"):
        if name == "three":
            change(tmp_path, "base")
        ran = command("reproduce", path, "--out", tmp_path / "papers" / name)
        assert ran.code == 0, ran.err
        done[name] = "1 of them done already" in ran.out
        recipe = next((tmp_path / "papers" / name).rglob(rundir.RECIPE))
        if not noted:  # as in a run of an older FedSieve
            said = recipe.read_text(encoding="utf-8")
            recipe.write_text(said.replace('\nbase = "', '\nbeneath = "'), encoding="utf-8")
    assert done == {"one": False, "two": noted, "three": False}


@pytest.mark.usefixtures("no_plots")
def test_places_over_two_bases_are_not_compared(
    write: Write, tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    """The parts of a figure are studies of their own, and its claims are of all of them."""
    own = own_copies(tiny, tmp_path)
    path = write(
        set={"model.source": own["model__source"], "rounds": 1},
        place=[{"name": str(rank), "set": {"lora.rank": rank}} for rank in (2, 4)],
        seeds=[0],
        entry=[{"name": "dense", "method": "fedit"}],
    )
    assert command("reproduce", path, "--out", tmp_path / "out").code == 0
    shutil.rmtree(tmp_path / "out" / "tiny" / "4")
    said = change(tmp_path, "base")
    ran = command("reproduce", path, "--out", tmp_path / "out")
    assert ran.code == 1
    assert said in " ".join((ran.out + ran.err).split())


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("where", ["tiny", "tiny/2", "tiny/4"])
@pytest.mark.parametrize("what", ["link", "file"])
def test_nothing_is_written_through_what_stands_where_a_folder_belongs(
    where: str, what: str, write: Write, tmp_path: Path, command: Command
) -> None:
    """Neither a table nor a run; and what does not lie there goes on."""
    places = [{"name": str(r), "x": r, "set": {"lora.rank": r}} for r in (2, 4)]
    path = write(place=places, seeds=[0], entry=[{"name": "a"}])
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    odd = out / where
    odd.parent.mkdir(parents=True)
    if what == "link":
        odd.symlink_to(elsewhere, target_is_directory=True)
    else:
        odd.write_text("mine")
    ran = command("reproduce", path, "--out", out)
    assert ran.code == 1
    assert f"{odd.name} is " in " ".join((ran.out + ran.err).split())
    assert list(elsewhere.iterdir()) == []
    assert what == "link" or odd.read_text() == "mine"
    told = json.loads((out / "figure.json").read_text())["values"]["tiny"]["score"]["a"]
    assert sum(bool(seeds) for seeds in told.values()) == (0 if where == "tiny" else 1)


@pytest.mark.usefixtures("no_plots")
def test_words_with_half_a_formula_are_drawn_as_they_stand(
    write: Write, tmp_path: Path, command: Command
) -> None:
    odd = "$\\frac{$"
    path = write(
        x_label=odd, title=odd, place=[{"name": f"p {odd}"}], seeds=[0], entry=[{"name": "a"}]
    )
    ran = command("reproduce", path, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "out" / "figure.png").is_file()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("panel", [{"metrics": ["nn"]}, {"metrics": ["accuracy", "nn"]}, {}])
def test_a_metric_that_nothing_tells_is_named_and_no_verdict(
    panel: dict[str, Any], write: Write, tmp_path: Path, command: Command
) -> None:
    place = {} if panel else {"metric": "nn"}
    check = {"says": "s", "left": "a", "right": "b", "least": 0.5}
    path = write(
        place=[{"name": "p", **place}],
        small=[{"name": "tiny", "recipe": "tiny.toml", **panel}],
        seeds=[0],
        entry=[{"name": "a"}, {"name": "b"}],
        check=[check],
    )
    ran = command("reproduce", path, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "tiny, p: a: its runs tell no score of" in " ".join((ran.out + ran.err).split())
    told = json.loads((tmp_path / "out" / "figure.json").read_text())
    assert told["verdict"] == "not measured"


SPOILT = [("clients.jsonl", "[1]\n{\n"), ("clients.jsonl", None), ("details.json", "[1")]


@pytest.mark.usefixtures("no_plots")
def test_a_neighbour_that_is_damaged_is_run_anew(
    write: Write, tmp_path: Path, command: Command
) -> None:
    """Copied, it would have failed the figure at every call."""
    path = write(seeds=[0], entry=[{"name": "a"}])
    papers = tmp_path / "papers"
    assert command("reproduce", path, "--out", papers / "one").code == 0
    whole = json.loads((papers / "one" / "figure.json").read_text())["values"]
    (run,) = papers.glob("one/*/*/seed-0")
    for name, text in SPOILT:
        kept = (run / name).read_bytes()
        (run / name).unlink()
        if text is not None:
            (run / name).write_text(text, encoding="utf-8")
        ran = command("reproduce", path, "--out", papers / "two")
        assert ran.code == 0, (name, text, ran.err)
        assert json.loads((papers / "two" / "figure.json").read_text())["values"] == whole
        shutil.rmtree(papers / "two")
        (run / name).write_bytes(kept)
    link = run / "adapter" / "more"
    for target in ("../metrics.jsonl", "/", "nowhere"):
        link.symlink_to(target)
        assert command("reproduce", path, "--out", papers / "two").code == 0
        assert not any(path.is_symlink() for path in (papers / "two").rglob("*")), target
        shutil.rmtree(papers / "two")
        link.unlink()
    ran = command("reproduce", path, "--out", papers / "two")
    assert "1 of them done already" in ran.out


@pytest.mark.usefixtures("no_plots")
def test_a_neighbour_that_is_too_deep_to_be_copied_is_run_anew(
    write: Write, tmp_path: Path, command: Command
) -> None:
    path = write(seeds=[0], entry=[{"name": "a"}])
    one, two = tmp_path / "papers" / "one", tmp_path / "papers" / "two"
    assert command("reproduce", path, "--out", one).code == 0
    (run,) = one.rglob("seed-0")
    deep = run
    for _ in range(12):  # a path has four thousand letters at most
        deep = deep / "/".join("d" * 100)
        deep.mkdir(parents=True)
    ran = command("reproduce", path, "--out", two)
    for deepest in reversed([run / "/".join("d" * n) for n in range(1, 1201)]):
        deepest.rmdir()  # who clears the test's folder up would find it too deep, too
    assert ran.code == 0
    (again,) = (found for found in two.rglob("seed-0") if not found.name.startswith("."))
    assert not (again / "d").exists()
    assert (again / rundir.METRICS).is_file()


@pytest.mark.usefixtures("no_plots")
def test_a_neighbours_run_comes_where_one_was_asked_for_and_never_begun(
    write: Write, tmp_path: Path, command: Command
) -> None:
    """A figure that was stopped has said of all its runs what they are to be."""
    path = write(small=[{"name": "p", "recipe": "tiny.toml"}], seeds=[0], entry=[{"name": "dense"}])
    done = {}
    for name in ("one", "two", "three"):
        if name != "one":
            (asked,) = (tmp_path / "papers/one").rglob(ASKED)
            own = tmp_path / "papers" / name / asked.relative_to(tmp_path / "papers/one")
            own.parent.mkdir(parents=True)
            shutil.copy(asked, own)
            if name == "three":
                (own.parent / "notes.txt").write_text("mine")
        ran = command("reproduce", path, "--out", tmp_path / "papers" / name)
        assert ran.code == 0, ran.err
        done[name] = "1 of them done already" in ran.out
    assert done == {"one": False, "two": True, "three": False}
    assert [*(tmp_path / "papers/three").rglob("notes.txt")]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("how", ["a pipe", "a full disk"])
def test_a_neighbours_run_is_copied_whole_or_not_at_all(
    write: Write, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    panel = {"name": "p", "recipe": "tiny.toml"}
    path = write(small=[panel], seeds=[0], entry=[{"name": "dense", "method": "fedit"}])
    ran = command("reproduce", path, "--out", tmp_path / "papers/one")
    assert ran.code == 0, ran.err
    (adapter,) = (tmp_path / "papers/one").rglob("adapter")
    with monkeypatch.context() as patch:
        if how == "a pipe":
            os.mkfifo(adapter / "zzz")
        else:

            def full(source: str, to: str) -> str:
                Path(to).touch()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr("fedsieve.study.neighbours.copied", full)
        ran = command("reproduce", path, "--out", tmp_path / "papers/two")
    assert ran.code == 0, ran.err  # it was run anew
    assert "1 of them done already" not in ran.out
    assert not [*(tmp_path / "papers/two").rglob(".*.part")]
    assert (tmp_path / "papers/two/figure.json").is_file()


def train_of(folder: Path) -> str:
    train: str = tomllib.loads((folder / "tiny.toml").read_text())["data"]["train"]
    return train


def test_the_list_says_what_each_needs(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIEVE_CACHE", str(tmp_path))
    ran = command("reproduce")
    assert ran.code == 0
    for name in EVERY:
        assert f"{name}  " in ran.out
    told = ran.out[ran.out.index("flasc/fig2") :].splitlines()
    said = re.fullmatch(
        r"small: measured here \(docs/papers\.md\): (.*?) \((\d) seeds?\); .*", told[1].strip()
    )
    assert said is not None
    assert said[1] in claims.WORST_FIRST
    assert int(said[2]) == 3
    assert "; needs `fedsieve fetch minilm-l6 20newsgroups`: ready otherwise" in told[1]
    # Files of all its places, and not of the first alone.
    assert "paper: needs mmlu/ (4 files) in --data" in ran.out
    assert "; glue/ (9 files) in --data" in ran.out
    done = tmp_path / "runs" / "papers" / "flasc-fig2-small"
    done.mkdir(parents=True)
    (done / "figure.json").write_text('{"verdict": "not clear"}')
    ran = command("reproduce")
    assert "small: run here: not clear (runs/papers/flasc-fig2-small)" in ran.out


@pytest.mark.parametrize(
    "text",
    [
        "[]", "null", "[" * 200_000, '{"verdict": 1e999}', '{"no": 1}', "\0",
        json.dumps({"verdict": "x" * 100_000}), json.dumps({"verdict": "\x1b[31mred"}),
        pytest.param(None, id="2 GB of holes"),
    ],
    ids=lambda text: repr(text)[:12],
)  # fmt: skip
def test_what_a_strangers_folder_says_came_out_is_shown_within_bounds(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    done = tmp_path / "runs" / "papers" / "flasc-fig2-small"
    done.mkdir(parents=True)
    if text is None:
        with (done / "figure.json").open("wb") as file:
            file.truncate(2 << 30)
    else:
        (done / "figure.json").write_text(text)
    one = {"flasc/fig2": figures.shipped()["flasc/fig2"]}
    monkeypatch.setattr(figures, "shipped", lambda: one)
    ran = command("reproduce")
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out) < 2000
    assert "\x1b[31m" not in ran.out


PRINTED = {  # what the papers call what they draw -> the figure
    "fslora/fig2-3a-5": "fig2 fig3a fig5",
    "fslora/fig3b-6": "fig3b fig6",
    "fslora/tables-a1-a3": "table-a1 table-a2 table-a3",
} | {
    f"{paper}/{name}": name
    for paper, names in {
        "fslora": "fig3c fig4 fig7 table-c1 table-c2 table-c3 table-d1",
        "flasc": "fig2 fig3 fig4 fig5 fig6 fig7 fig8",
    }.items()
    for name in names.split()
}


@pytest.mark.parametrize("figure", PRINTED)
def test_every_number_of_the_papers_leads_to_its_figure(figure: str) -> None:
    for name in PRINTED[figure].split():
        asked = f"{figure.partition('/')[0]}/{name}"
        assert figures.called(asked) == figures.called(asked.upper()) == figure
    assert figures.called(figure) == figure


def test_a_number_of_several_figures_or_of_none_is_told(command: Command) -> None:
    for name, said in {
        "fslora/table5.1": "fslora/table5.1-glue and fslora/table5.1-rivals: run one after",
        "fslora/fig3d": "did you mean 'fslora/fig3",
        "flasc/Figure": "no figure is called 'flasc/Figure'",
    }.items():
        ran = command("reproduce", name)
        assert ran.code == 2
        assert said in " ".join(ran.err.split())


def test_a_run_is_copied_without_its_holes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 32)
        file.write(data)
        file.seek(1 << 31)
        file.write(data)
    for name, content in (("plain", data), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("holes", "plain", "empty"):
        copied(str(tmp_path / name), str(tmp_path / "to"))
        old, new = (tmp_path / name).stat(), (tmp_path / "to").stat()
        assert (new.st_size, new.st_mtime) == (old.st_size, old.st_mtime)
        assert new.st_blocks <= old.st_blocks + 64
        with (tmp_path / "to").open("rb") as file:
            assert file.read(len(data)) == (tmp_path / name).open("rb").read(len(data))
            if name == "holes":
                file.seek(1 << 31)
                assert file.read(len(data)) == data


# --- claims

FIGURE: dict[str, Any] = {
    "title": "t",
    "claim": "c",
    "entry": [{"name": "a"}, {"name": "b"}],
    "place": [{"name": "x"}, {"name": "y"}],
    "paper": [{"name": "p", "recipe": "demo"}],
}


@pytest.mark.parametrize(
    ("check", "a", "b", "verdict", "seeds"),
    [
        ({"least": 0.99}, {0: 0.50, 1: 0.60}, {0: 0.50, 1: 0.60}, "holds", (2, 2)),
        ({"least": 0.99}, {0: 0.40, 1: 0.60}, {0: 0.50, 1: 0.60}, "does not hold", (1, 2)),
        ({"least": 0.99}, {0: 0.45, 1: 0.70}, {0: 0.50, 1: 0.60}, "not clear", (1, 2)),
        ({"most": 0.5}, {0: 2.0}, {0: 4.0}, "holds", (1, 1)),
        ({"most": 0.5}, {0: 2.1}, {0: 4.0}, "does not hold", (0, 1)),
        ({"least": 0.9, "most": 1.1}, {0: 1.2}, {0: 1.0}, "does not hold", (0, 1)),
        ({"above": 0.03}, {0: 0.54}, {0: 0.50}, "holds", (1, 1)),
        ({"above": 0.03}, {0: 0.52}, {0: 0.50}, "does not hold", (0, 1)),
        ({"above": 0.0}, {0: 0.5}, {0: 0.5}, "does not hold", (0, 1)),
        ({"above": 0.0}, {0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.5}, "not clear", (1, 2)),
        # Of seeds that one side alone has, nothing can be said.
        ({"least": 1.0}, {0: 2.0, 1: 0.1}, {0: 1.0, 2: 9.0}, "holds", (1, 1)),
        ({"least": 1.0}, {0: 2.0}, {1: 1.0}, "not measured", (0, 0)),
        # One that never came to its target costs more than any that did; two such show nothing.
        ({"least": 3.0}, {0: math.inf}, {0: 1.0}, "holds", (1, 1)),
        ({"least": 3.0}, {0: 1.0}, {0: math.inf}, "does not hold", (0, 1)),
        ({"least": 1.0}, {0: math.inf}, {0: math.inf}, "does not hold", (0, 1)),
        ({"most": 1.0}, {0: math.inf}, {0: math.inf}, "does not hold", (0, 1)),
        ({"most": 1.0}, {0: math.nan}, {0: 1.0}, "does not hold", (0, 1)),
    ],
)
def test_claims_are_judged_by_mean_and_seed(
    check: dict[str, float],
    a: dict[int, float],
    b: dict[int, float],
    verdict: str,
    seeds: tuple[int, int],
) -> None:
    given = {"says": "s", "left": "a", "right": "b", "at": "x", **check}
    figure = figures.Figure.model_validate(FIGURE | {"check": [given]})
    numbers: dict[str, claims.Numbers] = {"p": {"score": {"a": {"x": a}, "b": {"x": b}}}}
    found = claims.judged(figure.check[0], figure, numbers)
    assert (found.verdict, found.seeds) == (verdict, seeds)


@pytest.mark.parametrize(
    ("check", "a", "b", "verdict"),
    [
        ({"right": "b", "least": 0.9}, 0.1, 0.0, "holds"),  # one side has learned
        ({"right": "b", "least": 0.9}, 0.0, -0.1, "not clear"),
        ({"right": "b", "least": 0.9, "at": "mean"}, 0.0, 0.0, "not clear"),
        ({"left_at": "x", "right_at": "y", "least": 0.9}, 0.0, 0.5, "not clear"),  # of a alone
        ({"right": "b", "least": 1.1}, 0.0, 0.0, "does not hold"),
        ({"right": "b", "least": 0.9, "measure": "seconds"}, 0.0, 0.0, "holds"),
    ],
)
def test_two_that_learned_nothing_show_nothing(
    check: dict[str, Any], a: float, b: float, verdict: str
) -> None:
    figure = figures.Figure.model_validate(
        FIGURE | {"check": [{"says": "s", "left": "a", **check}]}
    )
    same = {name: {place: {0: 0.2} for place in "xy"} for name in "ab"}
    rises = {"p": {name: {p: {0: r} for p in "xy"} for name, r in (("a", a), ("b", b))}}
    numbers: dict[str, claims.Numbers] = {"p": {"score": same, "seconds": same}}
    found = claims.judged(figure.check[0], figure, numbers, rises)
    assert found.verdict == verdict
    assert found.measured.startswith("neither rose") is (verdict == "not clear")


@pytest.mark.parametrize(
    ("verdict", "holding", "says"),
    [
        ("holds", 3, "holds, in 3 of 3 seeds: it grows"),
        ("not clear", 2, "not clear (holds in 2 of 3 seeds): it grows"),
        ("does not hold", 1, "does not hold (holds in 1 of 3 seeds): it grows"),
        ("does not hold", 0, "does not hold (holds in 0 of 3 seeds): it grows"),
    ],
)
def test_in_how_many_seeds_a_claim_holds_is_said(
    verdict: claims.Verdict, holding: int, says: str
) -> None:
    """ "Does not hold, in 0 of 3 seeds" says of each that it holds."""
    assert reproduce.said(claims.Finding("it grows", "", (holding, 3), verdict)) == says


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        ({"right": "b", "least": 1.0}, "does not hold"),  # at y it is not
        ({"right": "b", "least": 1.0, "at": "x"}, "holds"),
        ({"right": "b", "least": 1.0, "at": "mean"}, "holds"),
        ({"left_at": "x", "right_at": "y", "above": 0.2}, "holds"),
        ({"left_at": "y", "right_at": "x", "above": 0.0}, "does not hold"),
        ({"right": "b", "least": 1.0, "measure": "seconds"}, "not measured"),
    ],
)
def test_where_a_claim_is_asked(check: dict[str, Any], verdict: str) -> None:
    figure = figures.Figure.model_validate(
        FIGURE | {"check": [{"says": "s", "left": "a", **check}]}
    )
    values = {"a": {"x": {0: 0.8}, "y": {0: 0.5}}, "b": {"x": {0: 0.6}, "y": {0: 0.6}}}
    found = claims.judged(figure.check[0], figure, {"p": {"score": values}})
    assert found.verdict == verdict


PANEL = {"name": "p", "recipe": "demo"}
NO_VALUES = {"server.lr": [1], "training.lr": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"check": [{"says": "s", "left": "c", "right": "b", "least": 1}]}, "'c' is not there"),
        ({"check": [{"says": "s", "left": "a", "right": "b"}]}, "give least, most or above"),
        ({"check": [{"says": "s", "left": "a", "least": 1}]}, "not its own rival"),
        ({"check": [{"says": "s", "left": "a", "right": "b", "at": "z", "least": 1}]}, "'z'"),
        ({"paper": [{"name": "p", "recipe": "demo", "places": ["z"]}]}, "'z' is not there"),
        ({"numbers": {"q": {}}}, "'q' is not there"),
        ({"y": "hours"}, "y"),
        ({"place": [{"name": "x", "x": 1e308}]}, "x: Input should be less than or equal to 10000"),
        ({"numbers": {"p": {"a": {"x": -1e308}}}}, "Input should be greater than or equal"),
        ({"seeds": [*range(1001)]}, "seeds: Tuple should have at most 1000 items"),
        ({"place": [{"name": f"x{n}"} for n in range(1001)]}, "place: .* at most 1000 items"),
        ({"entry": [{"name": f"x{n}"} for n in range(1001)]}, "entry: .* at most 1000 items"),
        ({"plcae": []}, "plcae"),
        ({"paper": [{"name": "..", "recipe": "demo"}]}, "'..' has no letter"),
        ({"place": [{"name": "x"}, {"name": "."}]}, "'.' has no letter"),
        (
            {"place": [{"name": n, "set": {"seed": i}} for i, n in enumerate(("A b", "a-B"))]},
            "two parts would have the folder 'p/a-b'",
        ),
        ({"small": [{"name": "p", "recipe": "demo"}] * 2}, "would have the folder 'p'"),
        ({"tune_at": "z"}, "tune_at: 'z' is not there"),
        ({"tune_at": "x"}, "p: tune_at: there is no .tune."),
        ({"paper": []}, "give ..small.. or ..paper..: the panels"),
        ({"place": [{"name": "x"}, {"name": "x", "metric": "f1"}]}, "place: two have one name"),
        ({"place": [{"name": "x", "x": 0}], "log": True}, "place.x: on a logarithmic axis"),
        ({"place": [{"name": "x", "uplink": 5e-324}]}, "uplink: Input should be greater than"),
        (
            {"tune_at": "x", "small": [{"name": "p", "recipe": "demo", "places": ["y"]}]},
            "p: tune_at: it is without 'x'",
        ),
        (
            {"x": "megabytes in all", "paper": [{"name": "p", "recipe": "demo", "target": 0.5}]},
            "p: target: a front is of whole runs",
        ),
        ({"tune_at": "z" * 200_000}, "tune_at: 'zz"),
        *(
            ({"paper": [{"name": name, "recipe": "demo"}]}, "names a folder beside report.html")
            for name in ("figure.png", "Figure.md", "report.html", "table.x")
        ),
        (
            {"place": [{"name": "x"}, {"name": "Report.html", "set": {"rounds": 1}}]},
            "names a folder beside report.html",
        ),
        (
            {"place": [{"name": "x"}, {"name": "A", "set": {"rounds": 1}}]},
            "two parts would have the folder 'p/a'",
        ),
        ({"paper": [{"name": "/" * 101, "recipe": "demo"}]}, "paper.0.name: .* at most 100 char"),
        ({"place": [{"name": "x" * 200_000}]}, "place.0.name: .* at most 100 characters"),
        ({"paper": [{"name": "p", "recipe": "demo", "entries": ["z" * 200_000]}]}, "p: 'zz"),
        *(
            ({"place": [{"name": "x"}, {"name": name}]}, rf"line \d+: place.1.name: '{name}' is")
            for name in ("mean", "Mean", " mean ")
        ),
        *(
            (
                {"entry": [{"name": "a"}, {"name": name}]},
                rf"line \d+: entry.1.name: two .* '{name}'",
            )
            for name in ("a", "A", "a ")
        ),
        *(
            (
                {scale: [{"name": "p", "recipe": "demo", key: []}]},
                rf"line \d+: {scale}.0.{key}: .* at least 1 item",
            )
            for scale in figures.SCALES
            for key in ("entries", "places", "metrics", "seeds")
        ),
        *(
            ({key: []}, rf"line \d+: {key}: .* at least 1 item")
            for key in ("seeds", "place", "entry")
        ),
        ({"entry": [{"name": "a", "seeds": []}]}, r"line \d+: entry.0.seeds: .* at least 1 item"),
        *(
            (table, rf"line \d+: {key}.grid: 'training.lr' has no values to try")
            for key, table in (
                ("tune", {"tune": {"grid": NO_VALUES}}),
                ("entry.0", {"entry": [{"name": "a", "grid": NO_VALUES}]}),
                ("small.0.tune", {"small": [PANEL | {"tune": {"grid": NO_VALUES}}]}),
            )
        ),
    ],
)
def test_a_figure_that_is_not_right(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "figure.toml"
    path.write_text(tomli_w.dumps(FIGURE | changes))
    with pytest.raises(FedSieveError, match=message) as told:
        figures.load(str(path))
    assert len(str(told.value)) < 2000


def test_a_figure_like_another_is_that_over_its_own_panels(tmp_path: Path) -> None:
    path = tmp_path / "figure.toml"
    panel = {"name": "p", "recipe": "demo"}
    path.write_text(tomli_w.dumps({"like": "flasc/fig2", "small": [panel], "title": "t"}))
    found, other = figures.load(str(path)), figures.load("flasc/fig2")
    assert (found.title, found.claim, found.entry) == ("t", other.claim, other.entry)
    assert [each.name for each in found.small] == ["p"]
    assert found.paper == ()
    for odd in ("flasc/fig99", 5, ["flasc/fig2"]):
        path.write_text(tomli_w.dumps({"like": odd, "small": [panel]}))
        with pytest.raises(FedSieveError, match="like: no figure is called"):
            figures.load(str(path))


@pytest.mark.parametrize("name", ["r\0.toml", "r" * 200_000], ids=["a nul", "too long"])
def test_a_recipe_that_can_be_no_path_is_told(tmp_path: Path, command: Command, name: str) -> None:
    path = tmp_path / "figure.toml"
    paper = [{"name": "p", "recipe": name}]
    path.write_text(tomli_w.dumps(FIGURE | {"paper": paper, "small": paper}))
    ran = command("reproduce", path, "--out", tmp_path / "out")
    assert ran.code == 2  # as nothing of it can be run
    assert "can be no path" in ran.err
    assert len(ran.err) < 2000


def test_names_that_are_none(command: Command) -> None:
    assert "no figure is called 'flasc/fig' (did you mean" in command("reproduce", "flasc/fig").err
    assert "--scale 'huge'" in command("reproduce", "flasc/fig2", "--scale", "huge").err
