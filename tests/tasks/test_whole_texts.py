"""Tokens are those that the tokenizer makes of the whole text, cut at max_length: however long the
text is, and whatever its words, spaces and characters are. The oracle is the tokenizer itself.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedsieve.tasks import tokens
from fedsieve.tasks.tokens import tokenise

MOST = 6  # tokens
PLAIN = "the cars of the earth orbit slowly around a star while wine ages in cellars " * 4
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]


def wordpiece() -> PreTrainedTokenizerBase:
    """BERT's kind: words, in pieces."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator([PLAIN], trainers.WordPieceTrainer(vocab_size=80, **_quietly()))
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(each, made.token_to_id(each)) for each in ("[CLS]", "[SEP]")],
    )
    return _fast(made)


def byte_pairs() -> PreTrainedTokenizerBase:
    """GPT-2's kind: pieces of bytes, spaces among them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([PLAIN], trainers.BpeTrainer(vocab_size=320, **_quietly()))
    return _fast(made)


def unigram() -> PreTrainedTokenizerBase:
    """T5's kind: the likeliest pieces of a whole word."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="[UNK]", **_quietly())
    made.train_from_iterator([PLAIN], trainer)
    return _fast(made)


def _quietly() -> dict[str, Any]:
    return {"special_tokens": SPECIAL, "show_progress": False}


def _fast(made: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "wordpiece": wordpiece,
    "byte pairs": byte_pairs,
    "unigram": unigram,
    "in Python": ByT5Tokenizer,
}


def texts() -> list[str]:
    """Short, long, and with a word, a run of spaces or a letter of two characters at each of many
    places: whatever place a reader might stop at, some text has something there.
    """
    draw = random.Random(0)
    made = ["", "cars", PLAIN, "s" * 400, " " * 400 + "wine"]
    for at in range(MOST, 20 * MOST, 5):
        made += [f"{'the ' * 5}{' ' * at}cellars", f"star{' ' * at}{'wine ' * 20}"]
        made += ["the " * (at // 4) + "cellarscellars" * 3, "e\u0301" * at]
        made.append("".join(draw.choices("aeiost   \n\u0301.", k=6 * at)))
    return made


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_text(kind: str, side: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.truncation_side = side
    made = tokenise(tokenizer, texts(), None, MOST)
    for text, ids in zip(texts(), made.ids, strict=True):
        assert ids == tokenizer(text, truncation=True, max_length=MOST)["input_ids"], text


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_pair_too(kind: str) -> None:
    tokenizer = KINDS[kind]()
    some = texts()[::12]
    one, other = zip(*itertools.product(some, some), strict=True)
    made = tokenise(tokenizer, list(one), list(other), MOST)
    assert len(made.ids) == len(one)
    for first, second, ids in zip(one, other, made.ids, strict=True):
        # In lists of one: alone, transformers takes an empty second text for none.
        whole = tokenizer([first], [second], truncation=True, max_length=MOST)["input_ids"]
        assert ids == whole[0], (first, second)


def test_where_tokens_end_is_counted_in_the_whole_text() -> None:
    tokenizer = byte_pairs()
    made = tokenise(tokenizer, texts(), None, MOST, offsets=True)
    for text, ends in zip(texts(), made.ends, strict=True):
        given = {"truncation": True, "max_length": MOST, "return_offsets_mapping": True}
        assert ends == [end for _, end in tokenizer(text, **given)["offset_mapping"]]


def test_many_texts_stay_in_order() -> None:
    tokenizer = wordpiece()
    many = [f"{'cars ' * (n % 3)}wine {n}" for n in range(2_500)]
    made = tokenise(tokenizer, many, many[::-1], 16)
    for n in (0, 999, 1000, 1001, 1999, 2000, 2499):
        given = {"truncation": True, "max_length": 16, "return_token_type_ids": True}
        alone = tokenizer(many[n], many[-1 - n], **given)
        assert made.ids[n] == alone["input_ids"]
        assert made.types is not None
        assert made.types[n] == alone["token_type_ids"]


@pytest.mark.parametrize("paired", [False, True])
def test_long_texts_are_given_to_the_tokenizer_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, paired: bool
) -> None:
    """So that its room is that of the longest row, and not of all rows together."""
    asked: list[int] = []
    read = tokens.read_by

    def spy(tokenizer: Any, *given: Any, **how: Any) -> Any:
        asked.append(sum(len(text) for part in given for text in part or ()))
        return read(tokenizer, *given, **how)

    monkeypatch.setattr(tokens, "read_by", spy)
    monkeypatch.setattr(tokens, "_AT_ONCE_LETTERS", 300)
    texts = [PLAIN[:n] for n in (280, 1, 250, 0, 40, 8, 200, 301, 3)]
    second = [text[::-1][:50] for text in texts] if paired else None
    of = wordpiece()
    made = tokenise(of, texts, second, 1000)
    assert all(letters <= 360 for letters in asked)
    assert len(asked) > 3
    monkeypatch.setattr(tokens, "_AT_ONCE_LETTERS", 10**9)
    assert tokenise(of, texts, second, 1000) == made
