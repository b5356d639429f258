"""The commonsense sets: what each asks, over rows in the form in which the hub has them."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from fedsieve.data.templates import filled
from fedsieve.recipe import read as recipe
from fedsieve.recipe import sets
from fedsieve.recipe.examples import fields_of
from fedsieve.tasks import multiple_choice
from tests import runs
from tests.conftest import Tiny


class Asked(NamedTuple):
    """A set: where it is and its splits, one row of it, and what comes of that row, after the
    answer's "the correct answer is".
    """

    name: str
    there: tuple[str, str, str, str]
    row: dict[str, Any]
    said: str
    options: tuple[str, ...]
    right: str


SCIENCE = {"text": ["ice", "steam", "rock"], "label": ["A", "B", "C"]}
LISTED = (
    "\n\nAnswer1: ice\nAnswer2: steam\nAnswer3: rock\n\nAnswer format: answer1/answer2/answer3\n"
)
THREE = ("answer1", "answer2", "answer3")
CHOOSE = "Please choose the correct answer to the question: "
ALL = [
    Asked(
        "arc-easy",
        ("allenai/ai2_arc", "ARC-Easy", "train", "test"),
        {"id": "M1", "question": "What melts?", "choices": SCIENCE, "answerKey": "A"},
        f"{CHOOSE}What melts?{LISTED}",
        THREE,
        "answer1",
    ),
    Asked(
        "arc-challenge",
        ("allenai/ai2_arc", "ARC-Challenge", "train", "test"),
        {
            "id": "M2",
            "question": "What melts?",
            "choices": {**SCIENCE, "label": ["1", "2", "3"]},  # some rows count from 1
            "answerKey": "2",
        },
        f"{CHOOSE}What melts?{LISTED}",
        THREE,
        "answer2",
    ),
    Asked(
        "boolq",
        ("google/boolq", "", "train", "validation"),
        {"question": "does ice melt", "answer": True, "passage": "Ice melts at 0 degrees."},
        "Please answer the following question with true or false, question: does ice melt?"
        "\n\nAnswer format: true/false\n",
        ("true", "false"),
        "true",
    ),
    Asked(
        "hellaswag",
        ("Rowan/hellaswag", "", "train", "validation"),
        {
            "ind": 4,
            "activity_label": "Skating",
            "ctx": "A man steps on the ice. he",
            "endings": ["falls.", "flies.", "reads."],
            "label": "0",
        },
        "Please choose the correct ending to complete the given sentence: Skating: A man steps on "
        "the ice. he\n\nEnding1: falls.\nEnding2: flies.\nEnding3: reads.\n\n"
        "Answer format: ending1/ending2/ending3\n",
        ("ending1", "ending2", "ending3"),
        "ending1",
    ),
    Asked(
        "obqa",
        ("allenai/openbookqa", "main", "train", "test"),
        {"id": "7", "question_stem": "What melts is", "choices": SCIENCE, "answerKey": "C"},
        f"{CHOOSE}What melts is{LISTED}",
        THREE,
        "answer3",
    ),
    Asked(
        "piqa",
        ("baber/piqa", "", "train", "validation"),
        {"goal": "Cool a drink", "sol1": "Add ice.", "sol2": "Add steam.", "label": 1},
        "Please choose the correct solution to the question: Cool a drink\n\n"
        "Solution1: Add ice.\nSolution2: Add steam.\n\nAnswer format: solution1/solution2\n",
        ("solution1", "solution2"),
        "solution2",
    ),
    Asked(
        "siqa",
        ("lighteval/siqa", "", "train", "validation"),
        {
            "context": "Ada lost her ice.",
            "question": "How does she feel?",
            "answerA": "sad",
            "answerB": "glad",
            "answerC": "cold",
            "label": "1",
        },
        f"{CHOOSE}Ada lost her ice. How does she feel?\n\nAnswer1: sad\nAnswer2: glad\n"
        "Answer3: cold\n\nAnswer format: answer1/answer2/answer3\n",
        THREE,
        "answer1",
    ),
    Asked(
        "winogrande",
        ("allenai/winogrande", "winogrande_xl", "train", "validation"),
        {
            "sentence": "Ice beats steam as _ is cold.",
            "option1": "ice",
            "option2": "steam",
            "answer": "2",
        },
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ice "
        "beats steam as _ is cold.\n\nOption1: ice\nOption2: steam\n\n"
        "Answer format: option1/option2\n",
        ("option1", "option2"),
        "option2",
    ),
]
each = pytest.mark.parametrize("asked", ALL, ids=[asked.name for asked in ALL])


def test_every_set_of_questions_is_here() -> None:
    here = [name for name, found in sets.known().items() if found.task == "multiple-choice"]
    assert sorted(here) == sorted(f"commonsense/{asked.name}" for asked in ALL)


@each
def test_what_is_asked_is_the_papers(asked: Asked) -> None:
    """FSLoRA's table G.2, word for word."""
    rows = Dataset.from_list([asked.row] * 2)
    forms = [rows]
    if isinstance(asked.row.get("label"), int):
        forms.append(rows.cast_column("label", ClassLabel(names=["0", "1"])))
    for form in forms:
        data = recipe.check(
            {
                **table({}),
                "data": {"set": f"commonsense/{asked.name}"},
            }
        ).data
        assert isinstance(data.text, str)
        question, other = multiple_choice._questions(filled(form, [data.text]), fields_of(data))
        assert question == other
        assert isinstance(question, multiple_choice._Question)
        assert question.said == asked.said
        assert question.options == asked.options
        assert question.answers == tuple(f"the correct answer is {o}" for o in asked.options)
        assert question.options[question.right] == asked.right


def table(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "rounds": 1,
        "cohort": 2,
        "model": {"source": "any", **model},
        "lora": {"rank": 2, "targets": ["c_attn"]},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedit"},
        "budgets": [{}],
    }


@each
@pytest.mark.filterwarnings("ignore:.*no padding token", "ignore:.*reach data.max_length")
def test_a_name_is_a_whole_recipe(
    tiny: Tiny, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    source, config, *splits = asked.there
    told: list[tuple[str, str | None, str | None]] = []

    def load(name: str, config: str | None = None, split: str | None = None) -> Any:
        told.append((name, config, split))
        made = DatasetDict({split: Dataset.from_list([asked.row] * 8) for split in splits})
        return made if split is None else made[split]

    monkeypatch.setattr("datasets.load_dataset", load)
    given = table({"source": str(tiny.gpt2)})
    given["data"] = {"set": f"commonsense/{asked.name}", "max_length": 28, "new_tokens": 2}
    runs.start_from(recipe.check(given), tmp_path / "run")
    assert told == [(source, config or None, split) for split in splits]
    first, last = runs.lines(tmp_path / "run")
    assert next(iter(last["metrics"])) == "accuracy_written"
    assert {"accuracy", "accuracy_by_character", "answered"} <= set(first["metrics"])
