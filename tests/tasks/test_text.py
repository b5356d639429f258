"""From text to tensors, against a tokenizer small enough to do by hand: one word, one token."""

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedsieve.errors import FedSieveError
from fedsieve.tasks.causal_lm import causal_lm
from fedsieve.tasks.classification import classification
from fedsieve.tasks.examples import count, take
from fedsieve.tasks.tokens import IGNORED, Texts, ensure_pad_token

WORDS = ["[PAD]", "[UNK]", "[EOS]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "g"]
PAD, UNK, EOS, CLS, SEP, A, B, C, D, E, F, G = range(len(WORDS))
ALL: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}


def words(*, bert: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if bert:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or ALL))


def rows(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)


def tokens(examples: Texts) -> list[list[int]]:
    """Each row's token numbers, without the padding."""
    pairs = zip(examples.input_ids, examples.attention_mask, strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def classify(dataset: Dataset, **options: Any) -> tuple[Texts, tuple[str, ...]]:
    defaults: dict[str, Any] = {"text": "text", "label": "label", "max_length": 8}
    return classification(dataset, options.pop("tokenizer", words()), **(defaults | options))


# --- classification


def test_texts_and_labels() -> None:
    made, classes = classify(rows(text=["a b", "c", "a b c d e"], label=["x", "y", "x"]))
    assert made.input_ids.tolist() == [[A, B, PAD, PAD, PAD], [C, *[PAD] * 4], [A, B, C, D, E]]
    assert made.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1] * 5]
    assert made.labels.tolist() == [0, 1, 0]
    assert (made.input_ids.dtype, made.labels.dtype) == (torch.int64, torch.int64)
    assert made.token_type_ids is None
    assert classes == ("x", "y")
    assert count(made) == 3


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([10, 2, 10], ("2", "10"), [1, 0, 1]),
        (["10", "2", "10"], ("2", "10"), [1, 0, 1]),
        (["10", "02", "10"], ("02", "10"), [1, 0, 1]),
        (["10", "2", "a"], ("10", "2", "a"), [0, 1, 2]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_classes_are_sorted_as_numbers_if_all_are(
    labels: list[Any], classes: tuple[str, ...], numbers: list[int]
) -> None:
    made, found = classify(rows(text=["a", "b", "c"], label=labels))
    assert found == classes
    assert made.labels.tolist() == numbers


def test_class_names_come_from_the_data_or_from_the_caller() -> None:
    kind = Features({"text": Value("string"), "label": ClassLabel(names=["zero", "one", "two"])})
    named = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=kind)
    made, classes = classify(named)
    assert (made.labels.tolist(), classes) == ([2, 0], ("zero", "one", "two"))
    made, classes = classify(named, classes=("two", "zero"))
    assert (made.labels.tolist(), classes) == ([0, 1], ("two", "zero"))
    # Space around a name and how a letter is composed make no other class.
    made, classes = classify(
        rows(text=["a", "b"], label=[" e\u0301", "x "]), classes=("x", "\u00e9 ")
    )
    assert (made.labels.tolist(), classes) == ([1, 0], ("x", "\u00e9"))
    # Test rows get the numbers that the training rows had, though a class is absent.
    made, _ = classify(rows(text=["a"], label=["y"]), classes=("x", "y"))
    assert made.labels.tolist() == [1]


def test_pairs_carry_token_types() -> None:
    pairs = rows(text=["a b", "c"], other=["d", "e f g"], label=[0, 1])
    made, _ = classify(pairs, text_b="other", tokenizer=words(bert=True), max_length=7)
    assert tokens(made) == [[CLS, A, B, SEP, D, SEP], [CLS, C, SEP, E, F, G, SEP]]
    assert made.token_type_ids is not None
    assert made.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    batch = take(made, torch.tensor([0]))
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_right_whatever_the_tokenizer_would_do(side: str) -> None:
    made, _ = classify(
        rows(text=["a b", "c"], label=[0, 1]), tokenizer=words(padding_side=side, **ALL)
    )
    assert made.input_ids.tolist() == [[A, B], [C, PAD]]


@pytest.mark.parametrize(("side", "kept"), [("right", [A, B]), ("left", [F, G])])
def test_long_texts_keep_the_side_that_the_tokenizer_keeps(side: str, kept: list[int]) -> None:
    long = "a b " + "c " * 500 + "f g"
    made, _ = classify(
        rows(text=[long, "d"], label=[0, 1]),
        tokenizer=words(truncation_side=side, **ALL),
        max_length=2,
    )
    assert tokens(made) == [kept, [D]]


def test_texts_are_not_cut_short_by_long_tokens() -> None:
    gap = " " * 5000
    texts = [f"a{gap}b{gap}c d", "x" * 9000 + " e f", "g"]
    data = rows(text=texts, other=texts[::-1], label=[0, 1, 1])
    made, _ = classify(data, max_length=3)
    assert tokens(made) == [[A, B, C], [UNK, E, F], [G]]
    pairs, _ = classify(data, text_b="other", tokenizer=words(bert=True), max_length=20)
    assert tokens(pairs)[0] == [CLS, A, B, C, D, SEP, G, SEP]
    assert tokens(pairs)[1] == [CLS, UNK, E, F, SEP, UNK, E, F, SEP]


def test_an_empty_text_has_one_token_to_attend_to() -> None:
    made, _ = classify(rows(text=["", "a"], label=[0, 1]))
    assert made.input_ids.tolist() == [[PAD], [A]]
    assert made.attention_mask.tolist() == [[1], [1]]


NAMED = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (rows(text=[], label=[]), {}, "no rows"),
        (rows(text=["a", "b"], label=[0, 1]), {"text": "txt"}, "did you mean 'text'"),
        (rows(text=["a"], label=[0]), {"label": "labl"}, "did you mean 'label'"),
        (rows(text=["a", "b"], label=["x", "x"]), {}, "at least two different classes"),
        (rows(text=["a"], label=["x"]), {"classes": ("x", "x")}, "at least two different"),
        (rows(text=["a", "b"], label=["x", None]), {}, "row 1 of column 'label' has no label"),
        (rows(text=["a", "b"], label=[0.5, 1.5]), {}, "row 0 of column 'label' holds 0.5"),
        (rows(text=["a", "b"], label=[["x"], ["y"]]), {}, "row 0 of column 'label' holds a list"),
        (rows(text=["a", None], label=[0, 1]), {}, "row 1 of column 'text' holds nothing"),
        (rows(text=[1, 2], label=[0, 1]), {}, "a number"),
        (rows(text=["a", "b"], label=["x", "z"]), {"classes": ("x", "y")}, "label 'z' in row 1"),
        (
            Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=NAMED),
            {},
            "row 1 of column 'label' holds -1, and its 2 classes have the numbers 0 to 1",
        ),
        (rows(text=["a", "b"], label=[0, 1]), {"max_length": 0}, "max_length is 0"),
        (
            rows(text=["a", "b"], label=[0, 1]),
            {"max_length": 2, "tokenizer": words(bert=True)},
            "max_length is 2",
        ),
        (
            rows(text=["a", "b"], label=[0, 1]),
            {"tokenizer": words(unk_token="[UNK]")},
            "call ensure_pad_token",
        ),
    ],
)
def test_bad_classification_input(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FedSieveError, match=message):
        classify(dataset, **options)


# --- take


@settings(max_examples=50)
@given(st.data())
def test_a_batch_holds_its_rows_and_no_more_columns_than_they_need(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    texts = [
        " ".join(["a", "b", "c"][(row + i) % 3] for i in range(n)) for row, n in enumerate(lengths)
    ]
    whole, _ = causal_lm(rows(text=texts), words(), text="text", max_length=10)
    batch = take(whole, torch.tensor(index))
    assert tokens(batch) == [tokens(whole)[row] for row in index]
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape
    assert batch.input_ids.shape[1] == max(lengths[row] + 1 for row in index)  # and one EOS
    assert all(part.is_contiguous() for part in batch[:3] if part is not None)
    for row, labels in zip(index, batch.labels, strict=True):
        expected = whole.labels[row]
        assert labels[labels != IGNORED].tolist() == expected[expected != IGNORED].tolist()


def test_a_batch_without_rows() -> None:
    made, _ = classify(rows(text=["a", "b"], label=[0, 1]))
    batch = take(made, torch.tensor([], dtype=torch.int64))
    assert (count(batch), batch.labels.shape) == (0, (0,))


# --- causal language models


def test_all_tokens_of_a_text_are_learned_and_the_end_where_it_fits() -> None:
    made, kept = causal_lm(rows(text=["a b", "a b c d"]), words(), text="text", max_length=4)
    assert made.input_ids.tolist() == [[A, B, EOS, PAD], [A, B, C, D]]
    assert made.labels.tolist() == [[A, B, EOS, IGNORED], [A, B, C, D]]
    assert kept.tolist() == [0, 1]


def test_only_the_completion_is_learned() -> None:
    data = rows(ask=["a b", "c ", "d"], reply=[" c d", "e", "e f"])
    made, _ = causal_lm(data, words(), prompt="ask", completion="reply", max_length=4)
    assert tokens(made) == [[A, B, C, D], [C, E, EOS], [UNK, F, EOS]]
    no = IGNORED
    # In the last row "de" is one word with letters of both: it is learned.
    assert made.labels.tolist() == [[no, no, C, D], [no, E, EOS, no], [UNK, F, EOS, no]]


def test_the_end_is_learned_where_it_is_the_padding_token_too() -> None:
    tokenizer = words(unk_token="[UNK]", eos_token="[EOS]")
    ensure_pad_token(tokenizer)
    made, _ = causal_lm(rows(text=["a", "a b c"]), tokenizer, text="text", max_length=5)
    assert made.input_ids[0].tolist() == [A, EOS, EOS, EOS]
    assert made.attention_mask[0].tolist() == [1, 1, 0, 0]
    assert made.labels[0].tolist() == [A, EOS, IGNORED, IGNORED]


def test_special_tokens_of_the_prompt_are_not_learned() -> None:
    data = rows(ask=["a "], reply=["b"])
    made, _ = causal_lm(data, words(bert=True), prompt="ask", completion="reply", max_length=8)
    assert made.input_ids.tolist() == [[CLS, A, B, SEP, EOS]]
    assert made.labels.tolist() == [[IGNORED, IGNORED, B, IGNORED, EOS]]


def test_rows_with_nothing_to_learn_are_dropped_and_counted() -> None:
    # An empty text is only an end: there is nothing to predict it from.
    with pytest.warns(UserWarning, match="2 of 4 rows dropped"):
        made, kept = causal_lm(rows(text=["", "a", "", "b"]), words(), text="text", max_length=3)
    assert tokens(made) == [[A, EOS], [B, EOS]]
    assert kept.tolist() == [1, 3]
    long = rows(ask=["a b c d ", "a "], reply=["e", "f"])
    with pytest.warns(UserWarning, match="1 of 2 rows dropped"):
        made, kept = causal_lm(long, words(), prompt="ask", completion="reply", max_length=4)
    assert kept.tolist() == [1]
    with pytest.raises(FedSieveError, match="none of the 1 rows has a token to learn"):
        causal_lm(long.select([0]), words(), prompt="ask", completion="reply", max_length=4)


def test_long_prompts_are_read_to_their_end() -> None:
    data = rows(ask=["a" + " " * 4000 + "b "], reply=["c"])
    made, _ = causal_lm(data, words(), prompt="ask", completion="reply", max_length=8)
    assert made.labels.tolist() == [[IGNORED, IGNORED, C, EOS]]


@pytest.mark.parametrize(
    "columns",
    [{}, {"prompt": "ask"}, {"text": "ask", "completion": "reply"}, {"completion": "reply"}],
)
def test_columns_that_make_no_task(columns: dict[str, str]) -> None:
    with pytest.raises(FedSieveError, match="either text, or prompt and completion"):
        causal_lm(rows(ask=["a"], reply=["b"]), words(), max_length=4, **columns)


def test_an_empty_data_set() -> None:
    with pytest.raises(FedSieveError, match="no rows"):
        causal_lm(rows(text=[]), words(), text="text", max_length=4)


# --- padding tokens


def test_the_padding_token_is_taken_from_what_there_is() -> None:
    assert ensure_pad_token(words()) is None
    options: list[tuple[dict[str, Any], str]] = [
        ({"eos_token": "[EOS]", "unk_token": "[UNK]"}, "[EOS]"),
        ({"unk_token": "[UNK]"}, "[UNK]"),
    ]
    for special, token in options:
        tokenizer = words(**special)
        said = ensure_pad_token(tokenizer)
        assert said is not None
        assert token in said
        assert tokenizer.pad_token == token
        assert ensure_pad_token(tokenizer) is None
    with pytest.raises(FedSieveError, match="no padding token"):
        ensure_pad_token(words(cls_token="[CLS]"))
