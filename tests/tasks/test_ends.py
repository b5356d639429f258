"""Where a text begins and ends: one begin, one end, and the end is learned, whoever puts it there.

The oracle knows the words of each text and builds the row by hand.
"""

from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from fedsieve.tasks.causal_lm import causal_lm
from fedsieve.tasks.classification import classification
from fedsieve.tasks.tokens import IGNORED, Texts, ensure_pad_token

WORDS: list[str] = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "<en>", *"abcdefghij"]
NUMBER = {word: number for number, word in enumerate(WORDS)}


class Kind(NamedTuple):
    """What a tokenizer puts around a text, and which of its tokens begin and end one."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    begin: str | None
    end: str | None


KINDS = {
    "adds nothing": Kind((), (), "<s>", "</s>"),
    "adds begin": Kind(("<s>",), (), "<s>", "</s>"),
    "adds end": Kind((), ("</s>",), None, "</s>"),
    "adds both": Kind(("<s>",), ("</s>",), "<s>", "</s>"),
    "begin is end, adds nothing": Kind((), (), "</s>", "</s>"),
    "begin is end, adds begin": Kind(("</s>",), (), "</s>", "</s>"),
    "begin is end, adds both": Kind(("</s>",), ("</s>",), "</s>", "</s>"),
    "no end at all": Kind(("<s>",), (), "<s>", None),
    "BERT's, with an end": Kind(("[CLS]",), ("[SEP]",), None, "</s>"),
    "BERT's, its end the separator": Kind(("[CLS]",), ("[SEP]",), "[CLS]", "[SEP]"),
    "end and language": Kind((), ("</s>", "<en>"), "<s>", "</s>"),
    "language, end": Kind(("<en>",), ("</s>",), "<s>", "</s>"),
}


class Slow(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer in Python, which cannot tell where in a text its tokens lie."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, kind: Kind, **special: Any) -> None:
        self.kind = kind
        super().__init__(special_tokens_pattern="none", **special)

    @property
    def vocab_size(self) -> int:
        return len(WORDS)

    def get_vocab(self) -> dict[str, int]:
        return dict(NUMBER)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [*text.split()]

    def _convert_token_to_id(self, token: str) -> int:
        return NUMBER.get(token, 1)

    def _convert_id_to_token(self, index: int) -> str:
        return WORDS[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        before, after = ([NUMBER[w] for w in part] for part in self.kind[:2])
        return [*before, *token_ids_0, *after]

    def get_special_tokens_mask(self, token_ids_0: list[int], *_: Any, **__: Any) -> list[int]:
        return [0] * len(token_ids_0)


def tokenizer(kind: Kind, fast: bool = True, **options: Any) -> Any:
    special = {"pad_token": "<pad>", "unk_token": "<unk>", **options}
    if kind.begin is not None:
        special["bos_token"] = kind.begin
    if kind.end not in (None, "[SEP]"):  # BERT's tokenizers name no end of sequence
        special["eos_token"] = kind.end
    if not fast:
        return Slow(kind, **special)
    words = Tokenizer(WordLevel(NUMBER, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single=" ".join([*kind.before, "$A", *kind.after]),
        special_tokens=[(word, NUMBER[word]) for word in dict.fromkeys(kind.before + kind.after)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def shown(examples: Texts) -> list[tuple[str, str]]:
    """Each row's words, and those of them that are learned."""
    found = []
    for ids, mask, labels in zip(*examples[:3], strict=True):
        row, targets = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
        assert all(target in (IGNORED, token) for token, target in zip(row, targets, strict=True))
        assert (labels[~mask.bool()] == IGNORED).all()
        learned = [target for target in targets if target != IGNORED]
        both = (" ".join(WORDS[token] for token in part) for part in (row, learned))
        found.append((next(both), next(both)))
    return found


def whole(kind: Kind, text: str) -> str:
    end = () if kind.end is None or kind.end in kind.after else (kind.end,)
    return " ".join([*kind.before, text, *kind.after, *end])


both = pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
kinds = pytest.mark.parametrize("name", KINDS)


@both
@kinds
def test_all_of_a_text_and_one_end_are_learned(name: str, fast: bool) -> None:
    kind = KINDS[name]
    data = Dataset.from_dict({"text": ["a b c", "d", "e f"]})
    made, _ = causal_lm(data, tokenizer(kind, fast), text="text", max_length=12)
    expected = [whole(kind, text) for text in data["text"]]
    assert shown(made) == [(row, row) for row in expected]


@both
@kinds
def test_a_completion_and_its_end_are_learned(name: str, fast: bool) -> None:
    kind = KINDS[name]
    data = Dataset.from_dict({"ask": ["a b ", "c ", "a "], "say": ["c d", "e", "b b"]})
    made, _ = causal_lm(data, tokenizer(kind, fast), prompt="ask", completion="say", max_length=12)
    end = "" if kind.end is None else f" {kind.end}"
    assert shown(made) == [(whole(kind, row["ask"] + row["say"]), row["say"] + end) for row in data]


@both
@kinds
def test_a_text_from_a_template_has_its_own_begin_and_end(name: str, fast: bool) -> None:
    kind = KINDS[name]
    front, back = " ".join(kind.before), kind.end or ""
    text = f"{front} a b {back}".strip()
    made, _ = causal_lm(
        Dataset.from_dict({"text": [text, "c"]}), tokenizer(kind, fast), text="text", max_length=12
    )
    row, learned = shown(made)[0]
    assert row == learned == (text if back else whole(kind, "a b"))
    data = Dataset.from_dict({"ask": [f"{front} a "], "say": [f"b {back}"]})
    made, _ = causal_lm(data, tokenizer(kind, fast), prompt="ask", completion="say", max_length=12)
    row, learned = shown(made)[0]
    assert row == (text if back else whole(kind, "a b"))
    assert learned == f"b {back}".strip()


@both
@kinds
def test_a_text_cut_short_has_no_end(name: str, fast: bool) -> None:
    kind = KINDS[name]
    text = "a b c d e f g h"
    room = 5 - len(kind.before)
    made, _ = causal_lm(
        Dataset.from_dict({"text": [text]}), tokenizer(kind, fast), text="text", max_length=5
    )
    row = " ".join([*kind.before, *text.split()[:room]])
    assert shown(made) == [(row, row)]


@both
@kinds
def test_a_text_cut_on_the_left_has_its_end(name: str, fast: bool) -> None:
    kind = KINDS[name]
    data = Dataset.from_dict({"ask": ["a b c d e "], "say": ["f g"]})
    made, _ = causal_lm(
        data,
        tokenizer(kind, fast, truncation_side="left"),
        prompt="ask",
        completion="say",
        max_length=7,
    )
    tail = whole(kind, "a b c d e f g").split()[len(kind.before) :]
    row = [*kind.before, *tail[len(kind.before) - 7 :]]
    assert shown(made) == [(" ".join(row), "f g" + (f" {kind.end}" if kind.end else ""))]


def test_a_slow_tokenizer_of_bytes() -> None:
    """ByT5: one token a byte, an end of its own, no place of a token in the text."""
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    data = Dataset.from_dict({"ask": ["q: é ", "q: "], "say": ["ab", "ü"], "label": [0, 1]})
    made, _ = causal_lm(data, slow, prompt="ask", completion="say", max_length=20)
    for labels, say in zip(made.labels.tolist(), data["say"], strict=True):
        learned = [token for token in labels if token != IGNORED]
        assert learned == [*(byte + 3 for byte in say.encode()), slow.eos_token_id]
    sorted_out, _ = classification(data, slow, text="ask", label="label", max_length=20)
    assert sorted_out.attention_mask.sum(1).tolist() == [len("q: é ".encode()) + 1, len("q: ") + 1]


def test_padding_that_is_the_end_leaves_the_end_to_be_learned() -> None:
    for kind in KINDS.values():
        if kind.end == "</s>":
            one = tokenizer(kind, pad_token=None)
            ensure_pad_token(one)
            assert one.pad_token == kind.end
            made, _ = causal_lm(
                Dataset.from_dict({"text": ["a", "a b c"]}), one, text="text", max_length=9
            )
            assert [learned for _, learned in shown(made)] == [
                whole(kind, "a"),
                whole(kind, "a b c"),
            ]
