"""Each task trained over clients: from a recipe, from a notebook, and what its bad rows are called.

The rows are of the words of conftest.py, whose subjects a tiny model tells apart.
"""

import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import fedsieve
from fedsieve.data.templates import LETTERS
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.examples import fields_of, unused
from fedsieve.run import rundir
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Fields
from fedsieve.train.reader import load_reader
from tests import runs
from tests.conftest import COMMON, LABELS, OWN, Tiny
from tests.train.test_card import loaded_as_the_card_says


class Kind(NamedTuple):
    """Rows of a task and the recipe's keys for them.

    leads: the leading metric, and what it must reach; bad: a row that is none, and what is said
    """

    task: str
    rows: list[dict[str, Any]]
    data: dict[str, Any]
    leads: str
    reaches: float
    bad: list[tuple[dict[str, Any], str]]


def subjects(count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    draw = random.Random(seed)
    for _ in range(count):
        subject = draw.choice(LABELS)
        yield subject, draw.choices(OWN[subject], k=4) + draw.choices(COMMON, k=3)


def numbers() -> list[dict[str, Any]]:
    return [
        {"text": " ".join(words), "label": float(LABELS.index(subject))}
        for subject, words in subjects(120, 1)
    ]


def sets() -> list[dict[str, Any]]:
    both = zip(subjects(160, 2), subjects(160, 3), strict=True)
    return [{"text": " ".join(a[1] + b[1]), "label": sorted({a[0], b[0]})} for a, b in both]


def tagged() -> list[dict[str, Any]]:
    rows = []
    for subject, words in subjects(120, 4):
        tags = [f"B-{subject}" if word in OWN[subject] else "O" for word in words]
        rows.append({"text": words, "label": tags})
    return rows


def asked() -> list[dict[str, Any]]:
    return [{"ask": " ".join(words), "say": f" {subject}0"} for subject, words in subjects(60, 5)]


def png(colours: list[tuple[int, int, int]], seed: int) -> dict[str, Any]:
    """An image as `datasets` has it: its left half of one colour, its right of another, noisy."""
    draw = np.random.default_rng(seed)
    halves = [
        np.full((20, 12, 3), colour) + draw.integers(-40, 40, (20, 12, 3)) for colour in colours
    ]
    made = np.clip(np.concatenate(halves, 1), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(made).save(data, "png")
    return {"bytes": data.getvalue(), "path": f"{seed}.png"}


PARTS = ("text", "label", "prompt", "completion", "options", "image")
COLOURS = {"cars": (220, 40, 40), "space": (40, 40, 220), "wine": (40, 200, 40)}


def pictures() -> list[dict[str, Any]]:
    return [
        {"image": png([COLOURS[subject]] * 2, seed), "label": subject}
        for seed, (subject, _) in enumerate(subjects(120, 8))
    ]


def pairs_of_pictures() -> list[dict[str, Any]]:
    both = zip(subjects(160, 9), subjects(160, 10), strict=True)
    return [
        {"image": png([COLOURS[a[0]], COLOURS[b[0]]], seed), "label": sorted({a[0], b[0]})}
        for seed, (a, b) in enumerate(both)
    ]


def chosen() -> list[dict[str, Any]]:
    options = [f"{label}0" for label in LABELS]
    return [
        {"text": " ".join(words), "of": options, "label": f"{subject}0"}
        for subject, words in subjects(240, 7)
    ]


PLAIN = {"text": "text", "label": "label"}
PICTURED = {"text": None, "image": "image", "label": "label"}
KINDS = [
    Kind(
        "classification",
        [{"text": " ".join(w), "label": s} for s, w in subjects(120, 6)],
        PLAIN,
        "accuracy",
        0.9,
        [({"text": None, "label": "cars"}, "column 'text' holds nothing")],
    ),
    Kind(
        "regression",
        numbers(),
        PLAIN,
        "pearson",
        0.8,
        [
            ({"text": "cars0", "label": None}, "column 'label' holds nothing, where a number"),
            ({"text": "cars0", "label": 1e30}, "column 'label' holds 1e+30, where a number"),
            ({"text": None, "label": 1.0}, "column 'text' holds nothing"),
        ],
    ),
    Kind(
        "multi-label",
        sets(),
        PLAIN,
        "micro_f1",
        0.8,
        [
            ({"text": "cars0", "label": None}, "column 'label' holds no list of names"),
            ({"text": "cars0", "label": ["cars", None]}, "holds an empty name in its list"),
            ({"text": None, "label": ["cars"]}, "column 'text' holds nothing"),
        ],
    ),
    Kind(
        "token-classification",
        tagged(),
        PLAIN,
        "entity_f1",
        0.9,
        [
            ({"text": ["cars0", "cars1"], "label": ["O"]}, "'label' holds 1 tags for 2 words"),
            ({"text": None, "label": ["O"]}, "'text' holds no list of words"),
            ({"text": ["cars0"], "label": None}, "'label' holds no list of tags"),
            ({"text": ["cars0"], "label": [None]}, "'label' has an empty tag"),
        ],
    ),
    Kind(
        "causal-lm",
        asked(),
        {"prompt": "ask", "completion": "say", "text": None, "label": None},
        "token_accuracy",
        0.3,
        [({"ask": "cars0", "say": None}, "column 'say' holds nothing")],
    ),
    Kind(
        "multiple-choice",
        chosen(),
        {**PLAIN, "options": "of", "new_tokens": 4},
        "accuracy",
        0.45,  # a third by chance
        [
            ({"text": "cars0", "of": ["cars0"], "label": "cars0"}, "column 'of' holds 1 options"),
            ({"text": "cars0", "of": ["cars0", " "], "label": "0"}, "'of': option 2 is empty"),
            ({"text": "cars0", "of": ["cars0", "food0"], "label": "2"}, "'label' holds '2', which"),
            ({"text": "cars0", "of": None, "label": "0"}, "column 'of' holds no list of options"),
            ({"text": "cars0", "of": ["a", "b"], "label": None}, "does not say which is right"),
            ({"text": None, "of": ["cars0", "food0"], "label": "0"}, "'text' holds nothing"),
        ],
    ),
    Kind(
        "generation",
        asked(),
        {"prompt": "ask", "completion": "say", "text": None, "label": None, "new_tokens": 4},
        "token_f1",
        0.4,  # none at the start
        [
            ({"ask": "cars0", "say": None}, "column 'say' holds nothing"),
            ({"ask": "cars0", "say": "  "}, "column 'say' holds nothing that could be expected"),
        ],
    ),
    Kind(
        "image-classification",
        pictures(),
        PICTURED,
        "accuracy",
        0.9,
        [
            ({"image": None, "label": "cars"}, "column 'image' holds no image"),
            ({"image": {"bytes": b"GIF89a", "path": None}, "label": "cars"}, "can be read"),
            ({"image": {"bytes": None, "path": "/etc/hosts"}, "label": "cars"}, "column 'image'"),
            ({"image": png([(9, 9, 9)], 0), "label": None}, "column 'label' has no label"),
        ],
    ),
    Kind(
        "image-multi-label",
        pairs_of_pictures(),
        PICTURED,
        "micro_f1",
        0.8,
        [
            ({"image": None, "label": ["cars"]}, "column 'image' holds no image"),
            ({"image": png([(9, 9, 9)], 0), "label": None}, "holds no list of names"),
        ],
    ),
]
each = pytest.mark.parametrize("kind", KINDS, ids=[kind.task for kind in KINDS])
quietly = pytest.mark.filterwarnings("ignore:.*no padding token", "ignore:the model's head is for")


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """A file of these rows; Parquet where they have images, as JSON has no bytes."""
    if "image" in rows[0]:
        path = path.with_suffix(".parquet")
        Dataset.from_list(rows).to_parquet(path)
        return str(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def base(tiny: Tiny, kind: Kind) -> str:
    task = catalogue.load(kind.task)
    if task.reads == "images":
        return str(tiny.vit)
    return str(tiny.gpt2 if task.peft == "CAUSAL_LM" else tiny.bert)


def changes(tiny: Tiny, folder: Path, kind: Kind, rows: list[dict[str, Any]]) -> dict[str, Any]:
    third = len(kind.rows) // 3
    data = {
        "train": written(folder / "train.jsonl", rows),
        "test": written(folder / "test.jsonl", kind.rows[:third]),
        "max_length": 16,
        **{name: column for name, column in kind.data.items() if column is not None},
    }
    return {
        "model": {"source": base(tiny, kind), "task": kind.task},
        "data": data,
        "method": {"name": "fedit"},
        "lora__targets": None,
        "server": {"optimizer": "sgd"},
        "budgets": [{}],
        "rounds": 6,
        "cohort": 4,
        "evaluation__every": 3,
    }


class Watched(Fields):
    """Fields that note which of them are looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in Fields._fields:
            LOOKED_AT.add(name)
        return super().__getattribute__(name)


LOOKED_AT: set[str] = set()


@each
@quietly
def test_what_a_task_has_no_use_for_is_told_by_name(tiny: Tiny, tmp_path: Path, kind: Kind) -> None:
    """And what it says that it uses is what it looks at."""
    given = recipe.check(tiny.table(**changes(tiny, tmp_path, kind, kind.rows)))
    task, rows = catalogue.load(kind.task), Dataset.from_list(kind.rows)
    reader, _ = load_reader(base(tiny, kind), kind.task)
    LOOKED_AT.clear()
    fields = Watched(*fields_of(given.data))
    task.columns(fields)
    fields = fields._replace(classes=task.classes([rows], fields) or None)
    task.bad(rows, reader, fields)
    task.read(rows, reader, fields)
    # A second text is refused by name where joining two by a template is what was meant.
    assert LOOKED_AT - {"text_b", "max_length"} == {*task.uses} - {"text_b"}
    assert unused(given) == []
    every = dict.fromkeys(Fields._fields, "x") | {
        "classes": ("a", "b"), "answer": "{option}", "first_option": 1, "new_tokens": 9,
        "stop": ("x",),
    }  # fmt: skip
    vain = sorted({*every} - {*task.uses, "max_length"})
    data = given.data.model_copy(update={name: every[name] for name in vain})
    told = unused(given.model_copy(update={"data": data}))
    assert sorted(each.split()[0] for each in told) == [f"data.{name}" for name in vain]
    other = {"by_length": True} if task.reads == "images" else {"augment": "flip"}
    training = replace(given.training, **other)
    told = unused(given.model_copy(update={"training": training}))
    assert [each.split()[0] for each in told] == [f"training.{name}" for name in other]
    told = unused(given.model_copy(update={"data": given.data.model_copy(update={"config": "x"})}))
    assert [each.split()[0] for each in told] == ["data.config"]


def test_a_run_notes_what_it_has_no_use_for(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="data.new_tokens is not used: a classification task has"):
        runs.start(tiny, tmp_path, rounds=1, data__new_tokens=9)
    assert "data.new_tokens is not used" in (tmp_path / rundir.RECIPE).read_text()
    with pytest.raises(FedSieveError, match="new_tokens: a classification task has no use for it"):
        fedsieve.finetune(str(tiny.bert), {}, fedsieve.fedit(), rounds=1, new_tokens=9)


@each
@quietly
def test_a_row_of_a_whole_library_is_named_before_it_becomes_tokens(tiny: Tiny, kind: Kind) -> None:
    """A tokenizer takes hundreds of bytes of each letter before anything is cut."""
    task = catalogue.load(kind.task)
    fields = Fields(**{"max_length": 16, **{n: c for n, c in kind.data.items() if n in PARTS}})
    reader, _ = load_reader(base(tiny, kind), kind.task)
    texts = [name for name in task.columns(fields).texts if name not in ("image", "label")]
    assert texts or task.reads == "images"
    long = "x" * (LETTERS + 1)
    for name in texts:
        rows = [dict(row) for row in kind.rows[:3]]
        was = rows[1][name]
        rows[1][name] = [long, *was[1:]] if isinstance(was, list) else long
        (told,) = task.bad(Dataset.from_list(rows), reader, fields).items()
        assert told[0] == 1
        said = rf"row 1 of column '{name}'.* holds 4,000,\d+ letters: at most"
        assert re.search(said, str(told[1]))


def test_every_task_is_here() -> None:
    assert {kind.task for kind in KINDS} == set(catalogue.names())


@each
@quietly
def test_a_recipe_trains_each_task(tiny: Tiny, tmp_path: Path, kind: Kind) -> None:
    third = len(kind.rows) // 3
    given = changes(tiny, tmp_path, kind, kind.rows[third:])
    runs.start(tiny, tmp_path / "run", **given, partition={"kind": "iid", "clients": 4})
    first, *_, last = [r for r in runs.lines(tmp_path / "run") if "metrics" in r]
    assert next(iter(last["metrics"])) == kind.leads
    assert last["metrics"][kind.leads] >= kind.reaches
    assert last["eval_loss"] < first["eval_loss"]
    assert last.get("accuracy") == last["metrics"].get("accuracy")
    scope = loaded_as_the_card_says(tmp_path / "run" / rundir.ADAPTER)
    assert isinstance(scope["model"], PeftModel)


@each
@quietly
def test_a_notebook_trains_each_task_and_leaves_out_who_has_bad_rows(
    tiny: Tiny, kind: Kind
) -> None:
    half = len(kind.rows) // 2
    clients = {"north": kind.rows[:half], "south": kind.rows[half:]}
    bad = {f"bad{n}": [*kind.rows[:3], row] for n, (row, _) in enumerate(kind.bad)}
    given: dict[str, Any] = {**kind.data, "max_length": 16, "task": kind.task}
    given |= {name: "label" for name, column in given.items() if name == "label" and not column}
    with pytest.warns(UserWarning, match="left out") as told:
        run = fedsieve.finetune(
            base(tiny, kind),
            {id: Dataset.from_list(rows) for id, rows in (clients | bad).items()},
            fedsieve.fedit(),
            rounds=1,
            test=Dataset.from_list(kind.rows[:20]),
            **given,
        )
    said = next(str(w.message) for w in told if "left out" in str(w.message))
    for number, (_, why) in enumerate(kind.bad):
        if number < 3:  # as many as are named
            assert f"client 'bad{number}': row 3 of column" in said
            assert why in said
    last = run.finish().metrics[-1]
    assert last.metrics is not None
    assert next(iter(last.metrics)) == kind.leads


@each
@quietly
def test_a_bad_row_is_named_before_training(tiny: Tiny, tmp_path: Path, kind: Kind) -> None:
    for row, why in kind.bad:
        given = changes(tiny, tmp_path, kind, [*kind.rows[:7], row])
        with pytest.raises(FedSieveError) as refused:
            runs.start(tiny, tmp_path / "run", **given, partition={"kind": "iid", "clients": 2})
        assert why in str(refused.value)
        assert "row 7" in str(refused.value)


@pytest.mark.parametrize("task", ["multi-label", "token-classification"])
@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_no_class_has_is_no_class(task: str, number: int) -> None:
    """-1 is the hub's word for "not given", and no name counted from the end."""
    words = Sequence(Value("string")) if task == "token-classification" else Value("string")
    kind = Features({"text": words, "label": Sequence(ClassLabel(names=["a", "b"]))})
    text = ["x"] if task == "token-classification" else "x"
    rows = {"text": [text, text], "label": [[0], [0]]}
    good = Dataset.from_dict(rows, features=kind).to_list()
    good[1]["label"] = [number]
    odd = Dataset.from_list(good).with_format(None)
    odd = Dataset(odd.data, info=Dataset.from_dict(rows, features=kind).info)
    bad = catalogue.load(task).bad(odd, None, Fields(text="text", label="label"))
    assert list(bad) == [1]
    assert f"holds {number}, and its 2 classes have the numbers 0 to 1" in str(bad[1])


@each
def test_no_rows_are_refused_in_a_sentence(tiny: Tiny, kind: Kind) -> None:
    task = catalogue.load(kind.task)
    rows = Dataset.from_list(kind.rows[:2]).select([])
    known = {k: v for k, v in kind.data.items() if k in Fields._fields and v is not None}
    reader, _ = load_reader(base(tiny, kind), kind.task)
    with pytest.raises(FedSieveError, match="no rows"):
        task.read(rows, reader, Fields(**{**known, "classes": ("a", "b")}))


NAMED: dict[str, tuple[list[str], list[float]]] = {
    "regression": (["1", "5"], [1.0, 5.0]),
    "multi-label": (["yes", "no"], [1.0, 0.0]),
}


@pytest.mark.parametrize("task", NAMED)
def test_a_class_label_is_its_name_and_not_its_number(tiny: Tiny, task: str) -> None:
    names, means = NAMED[task]
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    kinds |= {"other": ClassLabel(names=names)}
    values = {"text": ["a", "b", "c"], "label": [0, 1, 0], "other": [1, 1, 0]}
    rows = Dataset.from_dict(values, features=Features(kinds))
    reader, _ = load_reader(str(tiny.bert), task)
    label = "label" if task == "regression" else ("label", "other")
    made = catalogue.load(task).read(rows, reader, Fields(text="text", label=label))
    first = made.examples.labels.reshape(3, -1)[:, 0]
    assert first.tolist() == [float(means[n]) for n in (0, 1, 0)]


def test_lists_of_a_class_label_have_all_of_its_classes(tiny: Tiny) -> None:
    kinds = Features(
        {"text": Value("string"), "label": Sequence(ClassLabel(names=["q", "p", "r"]))}
    )
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [[0], [1, 0]]}, features=kinds)
    reader, _ = load_reader(str(tiny.bert), "multi-label")
    fields = Fields(text="text", label="label")
    assert catalogue.load("multi-label").read(rows, reader, fields).classes == ("q", "p", "r")


@pytest.mark.parametrize(
    ("value", "number"),
    [("1.5", 1.5), (" -2e1 ", -20.0), (Decimal("2.5"), 2.5), ("1_0", None), ("٣", None),
     ("0x10", None), ("1,5", None), ("inf", None), ("nan", None), (True, None), ("", None)],
)  # fmt: skip
def test_what_is_a_number(tiny: Tiny, value: Any, number: float | None) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [value, value]})
    reader, _ = load_reader(str(tiny.bert), "regression")
    task, fields = catalogue.load("regression"), Fields(text="text", label="label")
    if number is None:
        assert list(task.bad(rows, reader, fields)) == [0, 1]
    else:
        assert task.read(rows, reader, fields).examples.labels.tolist() == [number, number]


def test_columns_of_one_class_twice_are_refused() -> None:
    for task in ("multi-label", "image-multi-label"):
        fields = Fields(text="t", image="t", label=("x", "x"))
        with pytest.raises(FedSieveError, match="names the column 'x' twice"):
            catalogue.load(task).columns(fields)


@pytest.mark.filterwarnings("ignore:The tokenizer has no padding token")
def test_an_option_that_leaves_its_question_no_room_is_a_bad_row(tiny: Tiny) -> None:
    rows = Dataset.from_list(
        [
            {"text": "cars0", "of": ["cars1 " * 30, "food0"], "label": "1"},
            {"text": "cars0 " * 30, "of": ["cars1", "food0"], "label": "1"},
        ]
    )
    reader, _ = load_reader(str(tiny.gpt2), "multiple-choice")
    fields = Fields(text="text", options="of", label="label", max_length=16)
    bad = catalogue.load("multiple-choice").bad(rows, reader, fields)
    assert list(bad) == [0]
    assert "row 0 has an option that leaves no room" in str(bad[0])
    assert "data.max_length (16)" in str(bad[0])


@pytest.mark.parametrize("spaced", [False, True])
def test_words_are_read_with_the_space_between_them(spaced: bool) -> None:
    """RoBERTa's tokenizer puts none before words that come one by one."""
    letters = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    reader = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    rows = Dataset.from_list([{"w": ["hello", "a", "world"], "t": ["A", "B", "A"]}])
    fields = Fields(text="w", label="t", max_length=64)
    examples: Any = catalogue.load("token-classification").read(rows, reader, fields).examples
    read = "".join(reader.convert_ids_to_tokens(examples.input_ids[0].tolist()))
    assert read == "ĠhelloĠaĠworld"
    assert (examples.labels[0] != -100).sum() == 3


def test_a_test_row_whose_class_was_left_out_says_so(tiny: Tiny, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "x", "label": name, "who": who} for who, name in ("ay", "by", "cz", "cy")
    ]
    rows += [{"text": None, "label": "q", "who": "d"}, {"text": "x", "label": "q", "who": "d"}]
    test = [{"text": "x", "label": "q", "who": "d"}]
    files = {"train": rows, "test": test}
    data = {name: written(tmp_path / f"{name}.jsonl", own) for name, own in files.items()}
    given: dict[str, Any] = {
        "data": {**data, "text": "text", "label": "label"},
        "partition": {"kind": "column", "column": "who"},
    }
    with pytest.raises(FedSieveError) as refused:
        runs.start(tiny, tmp_path / "run", **given)
    said = str(refused.value)
    assert said.startswith("the test rows: ")
    assert "left out before: client 'd': row 4 of column 'text'" in said
