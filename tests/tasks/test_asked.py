"""Tasks that ask a model in words: which text is likely, what it writes, and what is made of that.

What a model says is held to a loop of plain forward passes, one row at a time; metrics to another
library's.
"""

import datetime
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
import sacrebleu
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.nn.functional import log_softmax
from torchmetrics.functional import text as other
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

import fedsieve
from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.settings import Lora
from fedsieve.tasks import catalogue, generation, multiple_choice
from fedsieve.tasks.asked import Asked, Ids, Speaker
from fedsieve.tasks.tally import score, total
from fedsieve.tasks.task import Fields
from fedsieve.tasks.tokens import Texts, ensure_pad_token
from fedsieve.train.model import ResidentModel, load_base, set_up
from fedsieve.train.reader import load_tokenizer
from fedsieve.train.speaker import speaker
from tests.conftest import Tiny
from tests.train.small import make

SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "gpt2": None,  # that of conftest.py
    "llama": lambda: LlamaConfig(num_key_value_heads=1, **SIZE),
    "qwen2": lambda: Qwen2Config(num_key_value_heads=1, **SIZE),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZE),
    "opt": lambda: OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **SIZE),
    "bloom": lambda: BloomConfig(**SIZE),
}
PROMPTS = ["cars0", "space1 word2 word3 word4 word5", "wine2 word7", "cars1 cars2 cars3 word9"]


@pytest.fixture(scope="module", params=FAMILIES)
def resident(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: Any) -> ResidentModel:
    source = str(tiny.gpt2)
    if make := FAMILIES[request.param]:
        folder = tmp_path_factory.mktemp(request.param)
        config = make()
        for kind in ("bos", "eos", "pad"):
            setattr(config, f"{kind}_token_id", 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config)
        # What a model's folder says of generation is no part of greedy writing.
        model.generation_config = GenerationConfig(repetition_penalty=9.0, eos_token_id=[4, 5])
        model.save_pretrained(folder)
        source = str(folder)
    # A tokenizer of its family's own kind would know none of these words.
    tokenizer = load_tokenizer(str(tiny.gpt2))
    ensure_pad_token(tokenizer)
    base = load_base(source, "generation", key=Key(0), pad_token_id=tokenizer.pad_token_id)
    resident = set_up(
        base,
        "generation",
        Lora(rank=2, alpha=4.0),
        "lora",
        key=Key(0),
        device=torch.device("cpu"),
        tokenizer=tokenizer,
    )
    start = resident.adapter()
    drawn = torch.Generator().manual_seed(3)
    moved = {n: t + 0.3 * torch.randn(t.shape, generator=drawn) for n, t in start.tensors.items()}
    resident.put(start._replace(tensors=moved))
    resident.model.eval()
    return resident


def ids_of(resident: ResidentModel, texts: Sequence[str]) -> list[Ids]:
    assert resident.tokenizer is not None
    made = resident.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [np.array(ids, np.int32) for ids in made]


def logits_of(resident: ResidentModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = resident.model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits


def written_slowly(resident: ResidentModel, prompt: Ids, most: int, ends: set[int]) -> str:
    """One token after another, each by a pass over all before it."""
    assert resident.tokenizer is not None
    ids = prompt.tolist()
    for _ in range(most):
        ids.append(int(logits_of(resident, ids)[-1].argmax()))
        if ids[-1] in ends:
            break
    text: str = resident.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    return text


def test_likelihoods_are_those_of_plain_passes(resident: ResidentModel) -> None:
    rows = [(ids, begin) for ids in ids_of(resident, PROMPTS) for begin in (1, len(ids) - 1)]
    rows = [(ids, begin) for ids, begin in rows if begin > 0]
    expected = []
    for ids, begin in rows:
        chances = log_softmax(logits_of(resident, ids.tolist()), -1)
        expected.append(sum(float(chances[at - 1, ids[at]]) for at in range(begin, len(ids))))
    with torch.inference_mode():
        for batch in (1, 3, 64):
            found = speaker(resident, batch).likelihoods(rows)
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_what_is_written_together_is_what_is_written_alone(resident: ResidentModel) -> None:
    own = resident.model.generation_config.eos_token_id
    ends = {4, *(own if isinstance(own, list) else [own])} - {None}
    prompts = ids_of(resident, PROMPTS)
    expected = [written_slowly(resident, prompt, 9, ends) for prompt in prompts]
    assert len(set(expected)) > 1
    before = resident.model.generation_config.to_dict()
    with torch.inference_mode():
        for batch in (1, 3, 64):
            assert speaker(resident, batch).write(prompts, 9, (), ()) == expected
        # A text at which to stop ends each where it first occurs.
        for stop in {word for text in expected for word in text.split()[1:3]}:
            cut = [text.split(stop)[0] for text in expected]
            assert speaker(resident, 64).write(prompts, 9, [stop, "never"], ()) == cut
    assert resident.model.generation_config.to_dict() == before


def spaced_alone(text: str) -> str:
    """Small letters and digits of all scripts, with a space in the place of all else."""
    return re.sub(r"[\W_]+", " ", text.lower())


class Said(NamedTuple):
    """What a model that was made up answers."""

    likely: list[float]
    texts: list[str]

    def speaker(self, order: Sequence[Asked], every: Sequence[Asked]) -> Speaker:
        places = [next(n for n, each in enumerate(every) if each is one) for one in order]
        starts = np.cumsum([0, *(len(each.options) for each in every)])
        likely = [self.likely[n] for p in places for n in range(starts[p], starts[p + 1])]
        return Speaker(
            lambda rows: likely, lambda prompts, most, stop, ends: [self.texts[p] for p in places]
        )


def question(texts: Sequence[str], right: int = 0) -> Asked:
    one = np.zeros(1, np.int32)
    return Asked(one, (one,) * len(texts), (0,) * len(texts), tuple(texts), right, "", 8, ())


PAIRS = [
    ("The cat sat on the mat.", "a cat sat on a mat"),
    ("", "nothing"),
    ("Paris", "paris"),
    ("It is 42, they say", "42"),
    ("one two three four five", "five four three two one"),
    ("the", "a"),
    ("Ünïcode wörds", "Ünïcode words here"),
]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_scores_of_written_texts_are_another_librarys(size: int) -> None:
    asked = [question([expected]) for _, expected in PAIRS]
    said = Said([-1.0] * len(PAIRS), [text for text, _ in PAIRS])
    task = catalogue.load("generation")
    assert task.ask is not None
    parts = [asked[at : at + size] for at in range(0, len(asked), size)]
    tally = total(task.ask(part, said.speaker(part, asked)) for part in parts)
    found = score(task, tally, ()).metrics
    told, expected = [a for a, _ in PAIRS], [b for _, b in PAIRS]
    named = list(enumerate(expected))
    answers = [{"answers": {"answer_start": [0], "text": [b]}, "id": str(n)} for n, b in named]
    given = [{"prediction_text": a, "id": str(n)} for n, a in enumerate(told)]
    squad = other.squad(given, answers)
    assert found["exact_match"] == pytest.approx(float(squad["exact_match"]) / 100)
    assert found["token_f1"] == pytest.approx(float(squad["f1"]) / 100)
    # Of texts of fewer than six letters torchmetrics has another opinion than chrF's author.
    chrf = sacrebleu.corpus_chrf(told, [expected]).score / 100
    assert found["chrf"] == pytest.approx(chrf)
    of_words = other.rouge_score(told, expected, rouge_keys="rougeL", normalizer=spaced_alone)
    rouge = of_words["rougeL_fmeasure"]
    assert found["rouge_l"] == pytest.approx(float(rouge), rel=1e-4)
    assert task.fits(tally, ())
    assert found["token_f1"] == next(iter(found.values()))
    for name in tally.sums:
        assert not task.fits(tally._replace(sums={**tally.sums, name: -1.0}), ())
        assert not task.fits(tally._replace(sums={**tally.sums, name: 1e12}), ()) or "chrf" in name


def test_chrf_of_longer_texts_is_torchmetrics_too() -> None:
    pairs = [pair for pair in PAIRS if min(map(len, pair)) > 12]
    assert len(pairs) == 3
    asked = [question([expected]) for _, expected in pairs]
    said = Said([-1.0] * len(pairs), [text for text, _ in pairs])
    task = catalogue.load("generation")
    assert task.ask is not None
    found = score(task, task.ask(asked, said.speaker(asked, asked)), ()).metrics
    told, expected = [a for a, _ in pairs], [[b] for _, b in pairs]
    assert found["chrf"] == pytest.approx(
        float(other.chrf_score(told, expected, n_word_order=0)), rel=1e-4
    )


@pytest.mark.parametrize("size", [1, 2, 5])
def test_choices_are_judged_in_three_ways(size: int) -> None:
    asked = [
        question(["yes", "certainly not"], 0),
        question(["answer1", "answer2", "answer10"], 2),
        question(["true", "false"], 1),
        question(["a", "b", "c", "d"], 3),
        question(["x", "y"], 0),
    ]
    likely = [-3.0, -4.0, -2.0, -1.0, -1.0, -5.0, -4.0, -1, -1, -1, -0.5, float("nan"), -9.0]
    texts = [
        "Yes, certainly not",  # the first that occurs
        "the correct answer is answer10, not answer1",
        "untrue things, falsely",  # neither is a word of its own
        "",
        "Y or x",
    ]
    said = Said(likely, texts)
    task = catalogue.load("multiple-choice")
    assert task.ask is not None
    parts = [asked[at : at + size] for at in range(0, len(asked), size)]
    tally = total(task.ask(part, said.speaker(part, asked)) for part in parts)
    # By hand: plain picks 0 (right), 1, 1 (right), 3 (right), 1; a character 1 (-4 / 13 > -1), 2
    # (-1 / 8 > -1 / 7), 1, 3, 1; written 0, 2, none, none, 1.
    assert dict(score(task, tally, ()).metrics) == {
        "accuracy": 3 / 5,
        "accuracy_by_character": 3 / 5,
        "accuracy_written": 2 / 5,
        "answered": 3 / 5,
    }
    assert task.fits(tally, ())
    for name in tally.sums:
        for value in (-1.0, 0.5, 6.0):
            assert not task.fits(tally._replace(sums={**tally.sums, name: value}), ())


@pytest.mark.parametrize(
    ("options", "text", "found"),
    [
        (["answer1", "answer2"], "the correct answer is answer2", 1),
        (["answer1", "answer2"], "ANSWER1", 0),
        (["TT", "Tt", "tt"], "it is Tt", 1),
        (["US", "us"], "US", 0),
        (["苹果", "香蕉"], "答案是香蕉。", 1),
        (["+", "-"], "it is a-b", 1),
        (["แมว", "หมา"], "คือหมาครับ", 1),
        (["answer1", "answer10"], "answer10", 1),
        (["New York", "York"], "New York it is", 0),
        (["York", "New York"], "York, not New York", 0),
        (["true", "false"], "untrue", None),
        (["C++", "C"], "C++ it is", 0),
        (["5", "15"], "15", 1),
        (["a", "b"], "", None),
        (["é", "e"], "É", 0),
    ],
)
def test_the_first_option_that_is_written_is_taken(
    options: list[str], text: str, found: int | None
) -> None:
    assert multiple_choice.first_of(options, text) == found


def hub(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


def marked(marks: Any, label: Any, feature: Any) -> Dataset:
    """Three options x, y and z with marks of a type."""
    options = {"text": List(Value("string")), "label": List(feature)}
    told = Value("string" if isinstance(label, str) else "float64" if isinstance(label, float)
                 else "int64")  # fmt: skip
    features = Features({"q": Value("string"), "of": options, "label": told})
    rows = {"q": ["a"], "of": [{"text": ["x", "y", "z"], "label": marks}], "label": [label]}
    return Dataset.from_dict(rows, features=features)


ARC = {"text": ["ice", "steam"], "label": ["A", "B"]}
NUMBERED = Features({"q": Value("string"), "a": Value("string"), "b": Value("string"),
                     "label": ClassLabel(names=["0", "1"])})  # fmt: skip
HUB: dict[str, tuple[Dataset, Fields, tuple[str, ...], int]] = {
    "arc": (
        hub(question=["Hot?"], choices=[ARC], answerKey=["B"]),
        Fields(text="question", options="choices", label="answerKey", option_word="answer"),
        (" the correct answer is answer1", " the correct answer is answer2"),
        1,
    ),
    "arc by digits": (
        hub(
            question=["Hot?"], choices=[{"text": ["a", "b"], "label": ["1", "2"]}], answerKey=["1"]
        ),
        Fields(text="question", options="choices", label="answerKey"),
        (" a", " b"),
        0,
    ),
    "boolq": (
        hub(question=["is ice hot"], answer=[False]),
        Fields(text="question", label="answer", classes=("true", "false"), answer="so: {option}!"),
        (" so: true!", " so: false!"),
        1,
    ),
    "hellaswag": (
        hub(ctx=["He ran"], endings=[["off.", "up.", "in."]], label=["2"]),
        Fields(text="ctx", options="endings", label="label"),
        (" off.", " up.", " in."),
        2,
    ),
    "piqa": (
        hub(goal=["Cut bread"], sol1=["saw"], sol2=["knife"], label=[1]),
        Fields(text="goal", options=("sol1", "sol2"), label="label"),
        (" saw", " knife"),
        1,
    ),
    "siqa": (
        hub(question=["Why?"], answerA=["x"], answerB=["y"], answerC=["z"], label=["3"]),
        Fields(
            text="question",
            options=("answerA", "answerB", "answerC"),
            label="label",
            first_option=1,
        ),
        (" x", " y", " z"),
        2,
    ),
    "winogrande": (
        hub(sentence=["_ won.\n"], option1=["Ann"], option2=["Bob"], answer=["1"]),
        Fields(text="sentence", options=("option1", "option2"), label="answer", first_option=1),
        ("Ann", "Bob"),
        0,
    ),
    "piqa with classes": (
        Dataset.from_dict({"q": ["a"], "a": ["x"], "b": ["y"], "label": [1]}, features=NUMBERED),
        Fields(text="q", options=("a", "b"), label="label"),
        (" x", " y"),
        1,
    ),
    "letters": (
        hub(q=["a"], of=[["x", "y", "z"]], label=["c"]),
        Fields(text="q", options="of", label="label"),
        (" x", " y", " z"),
        2,
    ),
    "a text that is no other's number": (
        hub(q=["1 + 1"], of=[["1", "2", "9"]], label=["9"]),
        Fields(text="q", options="of", label="label"),
        (" 1", " 2", " 9"),
        2,
    ),
    "whole numbers are no texts": (
        Dataset.from_dict({"q": ["1 + 1"], "of": [["1", "2", "3"]], "label": [1]}),
        Fields(text="q", options="of", label="label"),
        (" 1", " 2", " 3"),
        1,
    ),
    "a number that is a class": (
        Dataset.from_dict({"q": ["1 + 0"], "label": [1]}),
        Fields(text="q", classes=("1", "2"), label="label"),
        (" 1", " 2"),
        0,
    ),
    "a text that is a class": (
        hub(q=["1 + 0"], label=["1"]),
        Fields(text="q", classes=("1", "2"), label="label"),
        (" 1", " 2"),
        0,
    ),
    **{
        f"marks that are {kind}": (
            marked(marks, label, feature),
            Fields(text="q", options="of", label="label"),
            (" x", " y", " z"),
            right,
        )
        for kind, marks, feature, label, right in (
            ("integers", [2, 1, 0], Value("int64"), 0, 2),
            ("whole floats", [2.0, 1.0, 0.0], Value("float64"), 0, 2),
            ("whole floats, the label too", [2.0, 1.0, 0.0], Value("float32"), 0.0, 2),
            ("digits, the label a float", ["2", "1", "0"], Value("string"), 0.0, 2),
            (
                "dates",
                [datetime.date(2024, 5, n) for n in (1, 2, 3)],
                Value("date32"),
                "2024-05-02",
                1,
            ),
            ("decimals", [Decimal(n) for n in (2, 1, 0)], Value("decimal128(3, 0)"), "0", 2),
            ("numbers of classes", [2, 1, 0], ClassLabel(names=["u", "v", "w"]), "u", 2),
            (
                "numbers of classes that are digits",
                [0, 1, 2],
                ClassLabel(names=["2", "1", "0"]),
                0,
                2,
            ),
            ("in another form", ["e\u0301", " b ", "c"], Value("string"), "\xe9", 0),
            ("none", None, Value("string"), 1, 1),
        )
    },
    "Booleans as marks": (
        hub(q=["a"], of=[{"text": ["x", "y"], "label": [False, True]}], label=[True]),
        Fields(text="q", options="of", label="label"),
        (" x", " y"),
        1,
    ),
    "a whole float is no text": (
        hub(q=["1 + 1"], of=[["1", "2", "3"]], label=[1.0]),
        Fields(text="q", options="of", label="label"),
        (" 1", " 2", " 3"),
        1,
    ),
    "marks of another kind than numbers": (
        hub(q=["Hot?"], of=[ARC], label=[1]),
        Fields(text="q", options="of", label="label"),
        (" ice", " steam"),
        1,
    ),
    "case tells options apart": (
        hub(q=["a"], of=[["TT", "Tt", "tt"]], label=["Tt"]),
        Fields(text="q", options="of", label="label"),
        (" TT", " Tt", " tt"),
        1,
    ),
}
ROW = {"q": "what?", "of": ["x", "y"], "label": "x"}
NO_QUESTIONS: list[tuple[dict[str, Any], str]] = [
    ({"of": ["1", "2", "0"], "label": "2"}, "one option's text and another's number"),
    ({"of": ["TT", "Tt"], "label": "tt"}, "several of its options"),
    ({"of": ["x", "x "], "label": "x"}, "has the option 'x' twice"),
    ({"of": {"text": ["x", "y"], "label": ["A", "A"]}, "label": "A"}, "has the label 'A' twice"),
    ({"of": {"text": ["x", "y"], "label": ["A", None]}, "label": "A"}, "an option without a label"),
    ({"q": "  "}, "column 'q' holds no question"),
    ({"q": ""}, "column 'q' holds no question"),
    *(
        ({"of": {"text": ["x", "y"], "label": marks}, "label": label}, f"column 'of'{said}")
        for marks, label, said in (
            ("10", "0", " holds a text as the labels of its options"),
            (5, "0", " holds a number as the labels of its options"),
            (True, "0", " holds true or false as the labels of its options"),
            ({"a": 1, "b": 0}, "0", " holds an object as the labels of its options"),
            ([["1"], ["0"]], "0", ", label 1, holds a list"),
            ([{"a": "1"}, {"a": "0"}], "0", ", label 1, holds an object"),
            ([1.5, 0.0], "0", ", label 1, holds 1.5"),
            (["a\nb", "c"], "0", ", label 1, holds"),
            ([1.0, math.nan], "1", " has an option without a label"),
            (["A", " "], "A", " has an option without a label"),
            ([], "0", " has 2 options and 0 labels"),
            ([1.0, 1.0], "1", " has the label '1' twice"),
        )
    ),
    # What could be a mark of the row's own, and is none, is no option's number either.
    ({"of": {"text": ["x", "y"], "label": ["1", "2"]}, "label": "0"}, "none of its 2 options"),
    ({"of": {"text": ["x", "y"], "label": ["B", "C"]}, "label": "A"}, "none of its 2 options"),
]


@pytest.mark.parametrize(("change", "said"), NO_QUESTIONS)
def test_a_row_that_could_mean_two_things_is_refused(change: dict[str, Any], said: str) -> None:
    rows = Dataset.from_list([{**ROW, **change}])
    (found,) = multiple_choice._questions(rows, Fields(text="q", options="of", label="label"))
    assert isinstance(found, FedSieveError)
    assert "row 0" in str(found)
    assert said in str(found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (Fields(text="q", options=(), label="label"), "options: "),
        (Fields(text="q", options="of", label="label", text_b="q"), "text_b: "),
    ],
)
def test_columns_that_make_no_question_are_refused(fields: Fields, said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        catalogue.load("multiple-choice").columns(fields)


@pytest.mark.parametrize("name", HUB)
def test_rows_as_the_hub_has_them_are_understood(name: str) -> None:
    rows, fields, answers, right = HUB[name]
    (question,) = multiple_choice._questions(rows, fields)
    assert not isinstance(question, FedSieveError)
    assert tuple(" " + a.lstrip() for a in question.answers) == tuple(
        " " + a.lstrip() for a in answers
    )
    assert question.right == right
    if fields.option_word:
        assert (
            question.said
            == "Hot?\n\nAnswer1: ice\nAnswer2: steam\n\nAnswer format: answer1/answer2\n"
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (Fields(text="q", label="label"), "options: a multiple-choice task needs"),
        (Fields(text="q", label="l", options="o", classes=("a", "b")), "one of the two"),
        (Fields(label="l", options="o"), "text: this task needs it"),
        (Fields(text="q", options="o"), "label: this task needs it"),
        (Fields(text="q", label="l", options="o", answer="none"), "answer: it says where"),
    ],
)
def test_what_a_choice_needs_is_asked_for(fields: Fields, said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        catalogue.load("multiple-choice").columns(fields)


@pytest.mark.filterwarnings("ignore:.*no padding token")
def test_a_long_question_keeps_its_end_and_its_options(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(str(tiny.gpt2))
    ensure_pad_token(tokenizer)
    rows = hub(q=["word1 " * 50 + "cars0", "wine0"], of=[["cars1", "cars2"]] * 2, label=[1, 0])
    fields = Fields(text="q", options="of", label="label", max_length=8)
    read = catalogue.load("multiple-choice").read(rows, tokenizer, fields)
    assert read.came.tolist() == [0, 1]
    assert isinstance(read.examples, Texts)
    assert read.examples.asked is not None
    long, short = read.examples.asked
    assert tokenizer.decode(long.prompt).split()[-1] == "cars0"
    assert len(long.prompt) == 8
    for asked in (long, short):
        for option, begin, text in zip(asked.options, asked.begins, asked.texts, strict=True):
            assert tokenizer.decode(option[begin:]).strip() == text
    learned = read.examples.labels[0][read.examples.labels[0] != -100]
    assert tokenizer.decode(learned).replace("<end>", "").strip() == "cars2"


@pytest.mark.filterwarnings("ignore:.*no padding token")
def test_what_is_written_has_positions(tiny: Tiny) -> None:
    rows = hub(ask=["cars0"] * 4, say=[" cars1"] * 4)
    given: dict[str, Any] = {"task": "generation", "prompt": "ask", "completion": "say"}
    with pytest.raises(FedSieveError, match=r"data.new_tokens: prompts of 1 tokens and 500"):
        fedsieve.finetune(
            tiny.gpt2, [rows], fedsieve.fedit(), rounds=1, test=rows, new_tokens=500, **given
        )
    with pytest.raises(FedSieveError, match=r"new_token: finetune takes no such.*new_tokens"):
        fedsieve.finetune(tiny.gpt2, [rows], fedsieve.fedit(), rounds=1, new_token=5, **given)
    with pytest.raises(FedSieveError, match=r"new_tokens: "):
        fedsieve.finetune(tiny.gpt2, [rows], fedsieve.fedit(), rounds=1, new_tokens=0, **given)


@pytest.mark.parametrize("text", ["Привет, мир", "苹果 和 香蕉", "the cat_sat 3 times", "ünï"])
def test_a_perfect_answer_is_one_in_any_script(text: str) -> None:
    asked = [question([text])]
    task = catalogue.load("generation")
    assert task.ask is not None
    tally = task.ask(asked, Said([-1.0], [text]).speaker(asked, asked))
    found = score(task, tally, ()).metrics
    assert found["rouge_l"] == found["token_f1"] == found["exact_match"] == 1


def test_words_of_latin_letters_are_rouge_scores_own() -> None:
    from rouge_score import tokenizers

    own = tokenizers.DefaultTokenizer(use_stemmer=False)
    for text in ("The cat's 3.5 hats_off, OK? x1", "a-b  c\nd", "", "...", "don't"):
        assert generation._Words().tokenize(text) == own.tokenize(text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "rwkv"])
def test_models_that_write_other_things_than_they_tell_are_refused(
    tmp_path: Any, tiny: Tiny, kind: str
) -> None:
    settings = {} if kind == "rwkv" else {"is_decoder": True}
    make(kind, "causal-lm", tmp_path / "base", **settings)
    AutoTokenizer.from_pretrained(tiny.gpt2).save_pretrained(tmp_path / "base")
    rows = Dataset.from_list([{"ask": "cars0", "say": "cars1"}] * 2)
    with pytest.raises(FedSieveError, match=f"a {kind} model cannot be asked for texts"):
        fedsieve.finetune(
            tmp_path / "base",
            {"a": rows},
            fedsieve.fedit(),
            rounds=1,
            task="generation",
            prompt="ask",
            completion="say",
            lora=fedsieve.Lora(rank=2, targets="all-linear"),
            test=rows,
        )
