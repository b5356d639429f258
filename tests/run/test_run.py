"""`fedsieve run`: what it leaves in its directory, what it says, and what it refuses."""

import json
import re
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fedsieve.engine.loop import Receipt, Round
from fedsieve.errors import FedSieveError
from fedsieve.run import rundir
from tests import runs
from tests.conftest import Command, Tiny


def test_what_a_run_says_and_leaves(
    tiny: Tiny, whole: Path, tmp_path: Path, command: Command
) -> None:
    path, folder = tiny.write(tmp_path / "tiny.toml"), tmp_path / "run"
    ran = command("run", path, "--out", folder)
    assert (ran.code, ran.err) == (0, "")
    said = ran.out.splitlines()
    plan, *said = [said[0] + said[1], *said[4:]]
    for words in ("tiny: fslora_flasc on ", "4 rounds, 3 of 12 clients", f"into {folder}"):
        assert words in plan
    said.insert(0, plan)
    for number in range(5):
        assert said[number + 1].startswith(f"round {number}/4  ")
    assert re.search(r"loss \d\.\d{3}  accuracy 0\.\d{3}  eval loss", said[3])
    kept = r"\(kept A 0\.\d+, B 0\.\d+, head 0\.\d+\)"
    down, up = rf"down 0\.\d{{3}} MB {kept}", rf"up 0\.\d{{3}} MB {kept}"
    assert re.search(rf"{down}  {up}  total 0\.\d\d MB  left 0:0\d$", said[4])
    last = runs.lines(folder)[-1]
    summary = "\n".join(said[6:])
    assert f"payload bytes  {last['total_bytes']:,} (" in summary
    assert f"dense LoRA     {last['dense_bytes']:,} (" in summary
    assert f"{last['dense_bytes'] / last['total_bytes']:.1f}x fewer" in summary
    assert f"accuracy       {last['accuracy']:.4f} (best" in summary
    assert f"adapter        {folder / 'adapter'}" in summary
    runs.assert_same(folder, whole)
    assert sorted(each.name for each in folder.iterdir() if each.suffix != ".png") == [
        ".lock",
        "adapter",
        "checkpoints",
        "clients.jsonl",
        "details.json",
        "metrics.jsonl",
        "recipe.toml",
        "report.html",
    ]
    assert list(folder.glob("report-*.png"))
    assert sorted(each.name for each in (folder / "checkpoints").iterdir()) == [
        "round-000003.safetensors",
        "round-000004.safetensors",
    ]


def test_the_logs_hold_what_they_should(whole: Path) -> None:
    metrics, clients = runs.lines(whole), runs.lines(whole, rundir.CLIENTS)
    assert [each["round"] for each in metrics] == [0, 1, 2, 3, 4]
    needed = {"round", "loss", "down_bytes", "up_bytes", "total_bytes", "seconds"}
    total = 0
    for each in metrics[1:]:
        assert needed <= each.keys() <= set(Round._fields)
        evaluated = {"accuracy", "eval_loss"} <= each.keys()
        assert evaluated == (each["round"] % 2 == 0)
        cohort = [line for line in clients if line["round"] == each["round"]]
        assert each["clients"] == len(cohort) == 3
        for way in ("down_bytes", "up_bytes"):
            assert each[way] == sum(line[way] for line in cohort) > 0
        total += each["down_bytes"] + each["up_bytes"]
        assert each["total_bytes"] == total
        assert each["seconds"] > each["compute_seconds"] > 0
    assert all(one["dense_bytes"] < two["dense_bytes"] for one, two in pairwise(metrics))
    needed = {"round", "client", "rank", "down_density", "examples", "down_bytes", "up_bytes"}
    for line in clients:
        assert needed | {"seconds"} <= line.keys() <= set(Receipt._fields)
        assert line["rank"] in (1, 2, 4)
    assert [(c["round"], c["client"]) for c in clients] == sorted(
        (c["round"], c["client"]) for c in clients
    )


@pytest.mark.usefixtures("no_report")
def test_the_recipe_of_a_run_runs_it_again(
    whole: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tomllib.loads((whole / rundir.RECIPE).read_text())
    environment = table["environment"]
    assert {"fedsieve", "torch", "transformers", "peft", "git_commit", "python"} <= set(environment)
    assert table["data"]["classes"] == ["cars", "space", "wine"]
    assert table["training"]["momentum"] == 0.9
    monkeypatch.chdir(tmp_path)
    assert command("run", whole / rundir.RECIPE).code == 0
    again = Path("runs/tiny")  # the default place
    runs.assert_same(again, whole)
    repeated = tomllib.loads((again / rundir.RECIPE).read_text())
    # The commit is that of the working directory, which is another one here.
    assert repeated.pop("environment").keys() == table.pop("environment").keys()
    assert repeated == table
    other = command("run", whole / rundir.RECIPE, "seed=1", "rounds=2", "--out", "other")
    assert other.code == 0
    assert runs.lines(Path("other"))[-1]["round"] == 2


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_the_recipe_that_is_run_is_not_replaced_by_the_runs_own(
    tiny: Tiny, tmp_path: Path, command: Command, more: tuple[str, ...]
) -> None:
    """Nor any other recipe in a folder without a run: `init` writes one of this name."""
    path = tiny.write(tmp_path / "recipe.toml")
    path.write_text(f"# mine\n{path.read_text()}")
    before = path.read_text()
    ran = command("run", path, "--out", tmp_path, *more)
    assert ran.code == 2
    assert "holds no run, and has recipe.toml, in whose place a run writes its own" in " ".join(
        ran.err.split()
    )
    assert path.read_text() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["recipe.toml"]


@pytest.mark.usefixtures("no_report")
def test_a_directory_with_a_run_is_refused_or_replaced(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    path, folder = tiny.write(tmp_path / "tiny.toml"), tmp_path / "run"
    assert command("run", path, "rounds=3", "--out", folder).code == 0
    before = contents(folder)
    ran = command("run", path, "--out", folder)
    assert ran.code == 2
    assert f"{folder} holds a run already: go on with `fedsieve resume {folder}`" in ran.err
    assert "--overwrite" in ran.err
    assert contents(folder) == before
    # A recipe that does not work does not cost the run that is there.
    assert command("run", path, "lora.rank=99", "--out", folder, "--overwrite").code == 2
    assert contents(folder) == before
    (folder / "mine.txt").write_text("notes")
    (folder / "also").mkdir()
    (folder / "also" / "adapter.txt").write_text("kept")
    assert command("run", path, "rounds=1", "--out", folder, "--overwrite").code == 0
    assert (folder / "mine.txt").read_text() == "notes"
    assert (folder / "also" / "adapter.txt").read_text() == "kept"
    assert [each["round"] for each in runs.lines(folder)] == [0, 1]
    assert {each["round"] for each in runs.lines(folder, rundir.CLIENTS)} == {1}
    names = {each.name for each in (folder / "checkpoints").iterdir()}
    assert names == {"round-000000.safetensors", "round-000001.safetensors"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_of_a_finished_run_changes_nothing(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    path, folder = tiny.write(tmp_path / "tiny.toml", rounds=2), tmp_path / "run"
    assert command("run", path, "--out", folder).code == 0
    before = contents(folder)
    ran = command("resume", folder)
    assert (ran.code, ran.err) == (0, "")
    assert "payload bytes" in ran.out
    assert contents(folder) == before


# --- refused


def unseen(tiny: Tiny, folder: Path) -> str:
    path = folder / "unseen.csv"
    path.write_text(tiny.test.read_text() + "word1 word2,boats,author1\n")
    return f"data.test={path}"


def empty(tiny: Tiny, folder: Path) -> str:
    (folder / "empty.csv").touch()
    return f"data.train={folder / 'empty.csv'}"


def only_a_header(tiny: Tiny, folder: Path) -> str:
    (folder / "header.csv").write_text("text,label,author\n")
    return f"data.train={folder / 'header.csv'}"


def one_class(tiny: Tiny, folder: Path) -> str:
    (folder / "one.csv").write_text("text,label,author\na,x,y\nb,x,y\n")
    return f"data.train={folder / 'one.csv'}"


def missing(tiny: Tiny, folder: Path) -> str:
    return f"data.train={tiny.train.with_name('trian.csv')}"


def no_author(tiny: Tiny, folder: Path) -> str:
    path = folder / "rows.csv"
    path.write_text("text,label,author\nword1,cars,me\nword2,wine,\nword3,space,you\n")
    return f"data.train={path}"


Made = Callable[[Tiny, Path], str]
BAD: list[tuple[list[str | Made], str]] = [
    (["rouds=3"], "rouds: unknown key (did you mean 'rounds'"),
    (["lora.rnk=3"], "lora.rnk: unknown key (did you mean 'rank'"),
    (["method.shard=true"], "method.shard: unknown key (did you mean 'shared'"),
    (["server.betta1=0.5"], "server.betta1: unknown key (did you mean 'beta1'"),
    (["training.momentun=0.5"], "training.momentun: unknown key (did you mean 'momentum'"),
    (["budgets.0.ratio=0"], "budgets.0.ratio: Input should be greater than 0"),
    (["budgets.1.down=1.5"], "budgets.1.down: Input should be less than or equal to 1"),
    (["budgets.2.up=-1"], "budgets.2.up: Input should be greater than 0"),
    (["rounds"], "'rounds' is not of the form key=value"),
    (["method.name=flask"], "unknown method 'flask' (did you mean 'flasc'"),
    (["method.name=fedit"], "budgets.ratio: the method 'fedit' makes no use of it"),
    (["lora.rank=17"], "lora.rank 17 is larger than a side of"),
    (['lora.targets=["qurey"]'], "lora.targets names 'qurey'"),
    (['lora.targets=["qurey"]'], "did you mean 'query'"),
    (["model.source=no/such-model"], "model 'no/such-model' was not found"),
    (["model.source=minilm-l7"], "model 'minilm-l7' was not found"),
    (["model.settings.hidden_size=32"], "have another shape than its configuration says"),
    (["device=nowhere"], "device 'nowhere' cannot be used here"),
    ([unseen], "label 'boats' in row 60 of column 'label' is none of the 3 classes"),
    ([empty], "empty.csv is empty"),
    ([only_a_header], "header.csv holds no rows"),
    ([one_class], "at least two different classes are needed"),
    ([missing], "there is no file"),
    ([missing], "did you mean 'train.csv'"),
    (["data.text=txt"], "no column 'txt' (did you mean 'text'"),
    (["data.label=labl"], "no column 'labl' (did you mean 'label'"),
    (["data.max_length=2"], "max_length is 2: no room"),
    (['data.classes=["cars", "space"]'], "label 'wine' in row"),
    (["partition.clients=1000"], "clients is 1000, but there are only 240 rows"),
    (['partition={kind="column", column="autor"}'], "no column 'autor' (did you mean 'author'"),
    ([no_author, 'partition={kind="column", column="author"}'], "row 1 has no client"),
    (["model.task=causal-lm"], "partition.kind: 'dirichlet' splits by label"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_input_has_one_clear_message_and_exit_code_2(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    given: list[str | Made],
    message: str,
) -> None:
    path, folder = tiny.write(tmp_path / "tiny.toml"), tmp_path / "run"
    words = [each if isinstance(each, str) else each(tiny, tmp_path) for each in given]
    ran = command("run", path, *words, "--out", folder)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.startswith("error: ") or ran.err.splitlines()[0].startswith("warning: ")
    assert ran.err.count("error: ") == 1
    assert "Traceback" not in ran.err
    assert not folder.exists()  # nothing is left of it


def test_data_keys_that_a_task_needs(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    path = tiny.write(tmp_path / "tiny.toml", data__label=None)
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 2
    assert "data.label: this task needs it" in ran.err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("demmo", "no recipe is called 'demmo' (did you mean 'demo'"),
        ("no.toml", "there is no recipe no.toml"),
    ],
)
def test_recipes_that_are_not_there(command: Command, recipe: str, message: str) -> None:
    ran = command("run", recipe)
    assert ran.code == 2
    assert message in ran.err


def test_a_place_that_cannot_be_written(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").touch()
    path = tiny.write(tmp_path / "tiny.toml")
    ran = command("run", path, "--out", tmp_path / "file" / "run")
    assert ran.code == 2
    assert "cannot be written" in ran.err


@pytest.mark.usefixtures("no_report")
def test_names_with_brackets_are_said_as_they_are(
    tiny: Tiny, tmp_path: Path, command: Command
) -> None:
    path = tiny.write(tmp_path / "tiny.toml", rounds=1, name="[/red] one")
    folder = tmp_path / "[run]"
    ran = command("run", path, "--out", folder)
    assert ran.code == 0
    assert "[/red] one: fslora_flasc on " in ran.out
    assert f"1 round, 3 of 12 clients a round, rank 4, seed 0, device cpu, into {folder}" in ran.out
    assert f"adapter        {folder / 'adapter'}" in ran.out


def test_json_lines_are_json(whole: Path) -> None:
    for log in (rundir.METRICS, rundir.CLIENTS):
        for line in (whole / log).read_text().splitlines():
            assert json.loads(line, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "clients.jsonl", "report.html"])
def test_what_is_called_like_a_part_of_a_run_is_not_removed_unasked(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    """A folder of checkpoints, say, of other work."""
    mine = tmp_path / "out" / name
    if "." in name:
        mine.parent.mkdir()
        mine.write_text("years of work")
    else:
        mine.mkdir(parents=True)
        (mine / "model.bin").write_text("years of work")
    with pytest.raises(FedSieveError, match=rf"holds no run, and has {re.escape(name)}, which one"):
        runs.start(tiny, tmp_path / "out", rounds=1)
    assert mine.exists()
    assert not (tmp_path / "out" / "recipe.toml").exists()
