"""`fedsieve init`: what is guessed of rows, by their columns, and the recipe that comes of it."""

import csv
import io
import json
import random
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import AutoConfig

from fedsieve.data import hub, sources
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.start import guess, look
from fedsieve.start.guess import Said
from fedsieve.train.model import pretrained
from tests import kinds
from tests.conftest import Command, Tiny, texts, write_rows

WORDS = ["the", "card", "was", "late", "and", "nobody", "told", "me", "why", "it", "took", "so"]


def said(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(count)]


def cycle(values: Sequence[Any], count: int) -> list[Any]:
    return [values[number % len(values)] for number in range(count)]


N = 60
NAMES = ["north", "south", "east", "west"]


class Case(NamedTuple):
    """columns: of the rows; task, data: what they are taken for; clients: the column, or None"""

    columns: Mapping[str, list[Any]]
    task: str
    data: Mapping[str, Any]
    clients: str | None = None
    told: Said = Said()


CASES = {
    "banking": Case(
        {"query": said(N), "category": cycle(["fee", "card", "top"], N), "branch": cycle(NAMES, N)},
        "classification",
        {"text": "query", "label": "category"},
        "branch",
    ),
    "no names that say anything": Case(
        {"a": said(N), "b": cycle(["x", "y"], N)}, "classification", {"text": "a", "label": "b"}
    ),
    "whole numbers for classes, an id": Case(
        {"id": list(range(N)), "review": said(N), "stars": cycle([1, 2, 3, 4, 5], N)},
        "classification",
        {"text": "review", "label": "stars"},
    ),
    "a score": Case(
        {"sentence1": said(N), "sentence2": said(N), "score": [0.37 * n for n in range(N)]},
        "regression",
        {"text": "sentence1", "text_b": "sentence2", "label": "score"},
    ),
    "a pair with classes": Case(
        {"premise": said(N), "hypothesis": said(N), "label": cycle([0, 1, 2], N)},
        "classification",
        {"text": "premise", "text_b": "hypothesis", "label": "label"},
    ),
    "several classes a row": Case(
        {"text": said(N), "labels": cycle([["a"], ["a", "b"], ["c"]], N)},
        "multi-label",
        {"text": "text", "label": "labels"},
    ),
    "alpaca": Case(
        {"instruction": said(N), "input": said(N), "output": said(N)[::-1]},
        "causal-lm",
        {"prompt": "{instruction}\n{input}\n", "completion": "output"},
    ),
    "names that no template can say": Case(
        {"prompt.a": said(N), "answer": said(N)[::-1]},
        "causal-lm",
        {"prompt": "prompt.a", "completion": "answer"},
    ),
    "names with a brace alone": Case(
        {"prompt{": said(N), "my {answer}": said(N)[::-1]},
        "causal-lm",
        {"prompt": "prompt{", "completion": "my {answer}"},
    ),
    "questions with answers of two kinds": Case(
        {"question": said(N), "passage": said(N), "answer": cycle(["True", "False"], N)},
        "classification",
        {"text": "question", "text_b": "passage", "label": "answer"},
    ),
    "conversations": Case(
        {
            "messages": [
                [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
                for text in said(N)
            ],
            "user_id": cycle(NAMES, N),
        },
        "causal-lm",
        {"text": "messages"},
        "user_id",
    ),
    "plain texts": Case({"body": said(N)}, "causal-lm", {"text": "body"}),
    "tags": Case(
        {
            "tokens": [text.split() for text in said(N)],
            "ner_tags": [["O"] * len(text.split()) for text in said(N)],
        },
        "token-classification",
        {"text": "tokens", "label": "ner_tags"},
    ),
    "choices": Case(
        {
            "question": said(N),
            "choices": cycle([["a", "b"], ["c", "d"]], N),
            "answer": cycle([0, 1], N),
        },
        "multiple-choice",
        {"text": "question", "options": "choices", "label": "answer"},
    ),
    "choices, one a column": Case(
        {"ask": said(N), "A": said(N), "B": said(N)[::-1], "answer": cycle(["A", "B"], N)},
        "multiple-choice",
        {"text": "ask", "options": ("A", "B"), "label": "answer"},
    ),
    "an owner that some rows lack": Case(
        {"text": said(N), "label": cycle(["x", "y"], N), "site": cycle(["a", None], N)},
        "classification",
        {"text": "text", "label": "label"},
    ),
    "what is said counts": Case(
        {"text": said(N), "label": cycle(["x", "y"], N), "hospital": cycle(NAMES, N)},
        "classification",
        {"text": "{text} of {label}", "label": "hospital"},
        told=Said(text="{text} of {label}", label="hospital"),
    ),
    "another task": Case(
        {"text": said(N), "label": cycle(["x", "y"], N)},
        "causal-lm",
        {"text": "text"},
        told=Said(task="causal-lm"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_rows_are_for(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = tmp_path / "rows.jsonl"
    rows = [
        dict(zip(case.columns, row, strict=True))
        for row in zip(*case.columns.values(), strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = guess.guess(look.look(str(path)), case.told)
    assert (found.task, dict(found.data)) == (case.task, case.data)
    assert found.clients == (case.clients or 3)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (Said(text="texd"), r"--text: no column 'texd' \(did you mean 'text'"),
        (Said(label="lable"), r"--label: no column 'lable' \(did you mean 'label'"),
        (Said(clients="sight"), "--clients: no column 'sight'"),
        (Said(task="clasification"), "no task 'clasification'"),
        (Said(task="image-classification"), "no column looks like the image"),
        (Said(task="regression"), "no column looks like the label of a regression"),
        (Said(task="generation"), "no column looks like the prompt"),
        (Said(task="multiple-choice"), "no column looks like the options"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, told: Said, message: str) -> None:
    path = write_rows(tmp_path / "rows.csv", 30, seed=0)
    with pytest.raises(FedSieveError, match=message):
        guess.guess(look.look(str(path)), told)


def separated(path: Path, mark: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter=mark)
        out.writerow(["text", "label"])
        out.writerows([f"{text}, and; more", label] for text, label in texts(60, seed=1))


def in_folders(path: Path) -> None:
    for split in ("train", "test"):
        for number in range(20):
            kind = path / split / ("a" if number % 2 else "b")
            kind.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(kind / f"{number}.png")


def saved(path: Path) -> None:
    made = [{"text": text, "label": label} for text, label in texts(60, seed=1)]
    whole = Dataset.from_list(made)
    DatasetDict({"train": whole, "validation": whole}).save_to_disk(path)


# name -> (how it is made, what its [data] says beside the columns)
SOURCES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "a.csv": (lambda path: separated(path, ","), {"validation": 0.2}),
    "b.csv": (lambda path: separated(path, ";"), {"separator": ";", "validation": 0.2}),
    "c.csv": (lambda path: separated(path, "|"), {"separator": "|", "validation": 0.2}),
    "d.tsv": (lambda path: separated(path, "\t"), {"validation": 0.2}),
    "e.parquet": (
        lambda path: Dataset.from_list(
            [{"text": text, "label": label} for text, label in texts(60, seed=1)]
        ).to_parquet(path),
        {"validation": 0.2},
    ),
    "f.json": (
        lambda path: path.write_text(
            json.dumps(
                {"n": 60, "rows": [{"text": t, "label": c} for t, c in texts(60, seed=1)]}, indent=1
            )
        ),
        {"field": "rows", "validation": 0.2},
    ),
    "pictures": (in_folders, {"train_split": "train", "test_split": "test"}),
    "saved": (saved, {"train_split": "train", "test_split": "validation"}),
}


@pytest.mark.parametrize("hidden", [-1, "", None])
@pytest.mark.parametrize("beside", ["validation", None])
def test_test_rows_without_labels_are_passed_over(
    tmp_path: Path, command: Command, hidden: Any, beside: str | None
) -> None:
    folder, out = tmp_path / "rows", tmp_path / "mine.toml"
    folder.mkdir()
    for split in ("train", "test", beside):
        if split is not None:
            made = [{"text": t, "label": hidden if split == "test" else c} for t, c in texts(60, 1)]
            lines = "".join(json.dumps(row) + "\n" for row in made)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    ran = command("init", folder, "--out", out, "--yes")
    assert ran.code == 0, ran.err
    assert "no labels" in ran.out + ran.err
    written = tomllib.loads(out.read_text("utf-8"))
    assert written["data"].get("test_split") == beside
    assert written["data"].get("validation") == (None if beside else 0.2)
    assert written["evaluation"].get("on") == (None if beside else "validation")


def test_files_of_no_split_are_told(tmp_path: Path, command: Command) -> None:
    folder, out = tmp_path / "rows", tmp_path / "mine.toml"
    folder.mkdir()
    for name in ("train", "test"):
        rows = [{"text": t, "label": c} for t, c in texts(60, 1)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    assert "not read" not in command("init", folder, "--out", out, "--yes").err
    for number in range(7):
        shutil.copy(folder / "train.jsonl", folder / f"north-{number}.jsonl")
    ran = command("init", folder, "--out", out, "--yes", "--overwrite")
    assert ran.code == 0
    said = " ".join(ran.err.split())
    assert "names (train, test): north-0.jsonl, north-1.jsonl" in said
    assert "and 2 more" in said


def test_rows_without_a_label_are_told(tmp_path: Path, command: Command) -> None:
    made = [{"text": t, "label": "" if n % 40 else c} for n, (t, c) in enumerate(texts(200, 1))]
    made = [
        {**row, "label": row["label"] or "cars"} if n % 9 else row for n, row in enumerate(made)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    ran = command("init", tmp_path / "a.jsonl", "--out", tmp_path / "o.toml", "--label", "label")
    assert "each needs a label" in ran.out + ran.err


@pytest.mark.parametrize("name", SOURCES)
def test_where_rows_come_from(tmp_path: Path, command: Command, name: str) -> None:
    make, expected = SOURCES[name]
    make(tmp_path / name)
    out = tmp_path / "mine.toml"
    ran = command("init", tmp_path / name, "--out", out, "--yes")
    assert ran.code == 0, ran.err
    data = tomllib.loads(out.read_text("utf-8"))["data"]
    columns = {"image": "image"} if name == "pictures" else {"text": "text", "max_length": 32}
    assert data == {"train": str(tmp_path / name), "label": "label", **columns, **expected}
    recipes.load(str(out))
    for line in out.read_text("utf-8").splitlines():
        assert not line or line[0] in "#[" or "  # " in line, line  # each key says why


@pytest.mark.parametrize(
    ("count", "clients", "with_tests", "runs"),
    kinds.some_of(
    [(1, None, False, False), (1, "1", False, False), (2, None, False, False),
     (2, "1", False, True), (3, None, False, True), (1, None, True, False),
     (2, "1", True, True), (2, None, True, True), (9, "8", False, False), (9, "7", False, True),
     (6, "5", False, True), (12, "10", False, True), (22, "18", False, True)]
    ),
)  # fmt: skip
def test_rows_too_few_for_the_clients_make_no_recipe(
    tmp_path: Path,
    tiny: Tiny,
    command: Command,
    count: int,
    clients: str | None,
    with_tests: bool,
    runs: bool,
) -> None:
    """What is written can be checked; where nothing could be trained nothing is written."""
    lines = [f"{text},{('yes', 'no')[n % 2]}" for n, text in enumerate(said(22))]
    for name, of in {"train": count, **({"test": 4} if with_tests else {})}.items():
        text = "\n".join(["text,label", *lines[:of], ""])
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    out = tmp_path / "recipe.toml"
    dealt = () if clients is None else ("--clients", clients)
    given = ("--task", "classification", "--label", "label", "--model", tiny.bert, *dealt)
    ran = command("init", tmp_path / "train.csv", "--out", out, "--yes", *given)
    assert (ran.code == 0) is out.exists() is runs, ran.out + ran.err
    if runs:
        checked = command("check", out)
        assert checked.code == 0, checked.out + checked.err
    else:
        assert f"has {'1 row' if count == 1 else f'{count} rows'}, too few for" in ran.err
        assert ("to evaluate on" in ran.err) is not with_tests


def test_a_file_of_test_rows_beside_is_found(tmp_path: Path) -> None:
    for name in ("news-train.csv", "news-test.csv"):
        write_rows(tmp_path / name, 30, seed=0)
    assert look.look(str(tmp_path / "news-train.csv")).test == str(tmp_path / "news-test.csv")


@pytest.mark.parametrize("text", ["text,label\n", ""])
def test_a_file_of_test_rows_without_any_is_passed_over(
    tmp_path: Path, command: Command, text: str
) -> None:
    write_rows(tmp_path / "news-train.csv", 30, seed=0)
    (tmp_path / "news-test.csv").write_text(text, encoding="utf-8")
    out = tmp_path / "mine.toml"
    ran = command("init", tmp_path / "news-train.csv", "--out", out, "--yes")
    assert ran.code == 0, ran.err
    assert "it is left out" in ran.err
    written = tomllib.loads(out.read_text("utf-8"))
    assert "test" not in written["data"]
    assert written["evaluation"]["on"] == "validation"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Say what you see.", "completion": "I see a cat and a dog."}, True),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
         True),
        ({"text": "a long text about nothing at all"}, False),
    ],
)  # fmt: skip
def test_that_a_loss_shows_no_answers_is_said(
    tmp_path: Path, command: Command, row: dict[str, Any], said: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{k: f"{v} {n}" if isinstance(v, str) else v for k, v in row.items()} for n in range(20)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    ran = command("init", path, "--out", tmp_path / "r.toml", "--yes", "--task", "causal-lm")
    assert ran.code == 0, ran.err
    assert ("--task generation" in ran.err) is said


def test_a_recipe_shows_what_turns_its_letters_and_still_means_it(
    tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "\u202elive.csv"
    path.write_text("te\u2066xt,label\n" + "one,x\ntwo,y\n" * 20, encoding="utf-8")
    recipe = tmp_path / "r.toml"
    ran = command("init", path, "--out", recipe, "--yes", "--text", "te\u2066xt")
    assert ran.code == 0, ran.err
    written = recipe.read_text(encoding="utf-8")
    assert not {"\u202e", "\u2066"} & {*written}
    told = tomllib.loads(written)["data"]
    assert (told["train"], told["text"]) == (str(path), "te\u2066xt")


def test_examples_steer_no_terminal_and_are_short(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"\x1b[31m{n} " + "word " * 500, "label": "xy"[n % 2]} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ran = command("init", path, "--out", tmp_path / "a.toml", "--yes")
    assert ran.code == 0
    assert "\x1b[31m" not in ran.out
    assert max(map(len, ran.out.splitlines())) < 250


def test_a_first_line_that_is_a_row_is_told(tmp_path: Path, command: Command) -> None:
    path = write_rows(tmp_path / "rows.csv", 30, seed=0)
    assert "first line" not in command("init", path, "--out", tmp_path / "a.toml").err
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[1:]), "utf-8")
    assert "the first line of" in command("init", path, "--out", tmp_path / "b.toml").err


def test_nothing_is_overwritten_unasked(tmp_path: Path, command: Command) -> None:
    path, out = write_rows(tmp_path / "rows.csv", 30, seed=0), tmp_path / "mine.toml"
    out.write_text("mine", encoding="utf-8")
    ran = command("init", path, "--out", out)
    assert (ran.code, "--overwrite" in ran.err, out.read_text("utf-8")) == (2, True, "mine")
    assert command("init", path, "--out", out, "--overwrite").code == 0
    assert "rows.csv" in out.read_text("utf-8")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_each_guess_can_be_changed(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_rows(tmp_path / "rows.csv", 60, seed=0), tmp_path / "mine.toml"
    typed = ["", "", "author", "7", "some/model"]  # task, text, label, clients, model
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(typed) + "\n"))
    assert command("init", path, "--out", out).code == 0
    table = tomllib.loads(out.read_text("utf-8"))
    assert (table["data"]["text"], table["data"]["label"]) == ("text", "author")
    assert table["partition"] == {"kind": "iid", "clients": 7}
    assert table["model"] == {"source": "some/model", "task": "classification"}


def test_from_a_file_to_a_report(tmp_path: Path, tiny: Tiny, command: Command) -> None:
    """The three commands of the README, with the recipe as it was written."""
    out, folder = tmp_path / "mine.toml", tmp_path / "run"
    ran = command("init", tiny.train, "--model", tiny.bert, "--out", out)
    assert (ran.code, f"fedsieve check {out}" in ran.out) == (0, True)
    assert "column 'author', 12 of them" in ran.out
    short = ("rounds=2", "device=cpu", "training.steps=2")
    assert command("check", out, *short).code == 0
    ran = command("run", out, *short, "--out", folder)
    assert ran.code == 0, ran.err
    assert (folder / "report.html").is_file()


HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (HUB, "`fedsieve fetch smollm2` has it too, as model.source = 'smollm2'"),
        ("some/vit", "`hf download some/vit --local-dir model`"),
        (guess.IMAGES, f"`hf download {guess.IMAGES} --local-dir model`"),
        ("minilm-l6", None),
        ("./models/none", None),
        ("models/mine", None),  # a folder here
    ],
)
def test_a_model_that_only_the_hub_has_is_said_to_be_with_what_to_do_without(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch,
    model: str, remedy: str | None,
) -> None:  # fmt: skip
    """By `init`, and by an error where the hub cannot be reached."""
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    ran = command("init", tiny.train, "--model", model, "--out", tmp_path / "r.toml", "--yes")
    said = " ".join(ran.err.split())
    assert ("Hugging Face's hub; where that cannot be reached" in said) is (remedy is not None)
    if remedy is not None:
        assert remedy in said
        monkeypatch.setattr(hub, "reachable", lambda: False)
        with pytest.raises(FedSieveError, match="was not found") as caught:
            pretrained(AutoConfig, model)
        assert remedy in str(caught.value)


def test_names_of_data_are_no_names_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(FedSieveError, match="was not found") as caught:
        pretrained(AutoConfig, "no-such-model")
    assert "minilm-l6, smollm2" in str(caught.value)
    assert "reuters" not in str(caught.value)
    with pytest.raises(FedSieveError, match="no file, folder or fetched name") as caught:
        sources.load("no-such-rows", None)
    assert "20newsgroups, reuters" in str(caught.value)
    assert "minilm" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "steps", "rounds", "lr"), [(20, 5, 10, 3e-3), (77, 10, 20, 1e-2)]
)
def test_many_classes_get_more_steps_and_larger_ones(
    tmp_path: Path, command: Command, classes: int, steps: int, rounds: int, lr: float
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"it is about {n % classes}", "topic": f"t{n % classes}"} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("init", path, "--label", "topic", "--out", tmp_path / "r.toml").code == 0
    recipe = recipes.load(str(tmp_path / "r.toml"))
    assert (recipe.training.steps, recipe.rounds, recipe.training.lr) == (steps, rounds, lr)


@pytest.mark.parametrize("more", [300, 5000])
def test_of_a_table_too_wide_to_look_at_the_columns_that_are_named_are_read(
    tmp_path: Path, command: Command, more: int
) -> None:
    rest = [f"f{n}" for n in range(more)]
    for name in ("wide-train.csv", "wide-test.csv"):
        rows = [["text", "label", "who", *rest]]
        rows += [
            [f"some words {n}", "ab"[n % 2], f"site {n % 5}", *("1" * more)] for n in range(40)
        ]
        (tmp_path / name).write_text("\n".join(map(",".join, rows)))
    words: list[str | Path] = [
        "init",
        tmp_path / "wide-train.csv",
        "--out",
        tmp_path / "recipe.toml",
    ]
    refused = command(*words)
    assert refused.code == 2
    assert "--text and --label" in refused.err
    done = command(*words, "--text", "text", "--label", "label", "--clients", "who")
    assert done.code == 0, done.err
    recipe = recipes.load(str(tmp_path / "recipe.toml"))
    assert (recipe.data.text, recipe.data.label) == ("text", "label")
    assert recipe.data.test == str(tmp_path / "wide-test.csv")
    assert recipe.partition.column == "who"
