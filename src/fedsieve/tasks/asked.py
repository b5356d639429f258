"""Questions that a model answers in words, and what a task may have it do with them.

Some metrics come of no single forward pass: which of several texts a model finds most likely, and
what it writes when it goes on from a prompt. A task that has such metrics gets the model as the two
functions of `Speaker`, and keeps with its examples what to ask.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
# Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese.
UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"


class Asked(NamedTuple):
    """A question as it is put at evaluation.

    prompt:  (L,) the tokens to go on from
    options: of each option the tokens, prompt and all; begins: where in them the option begins
    texts:   the options in words, or the one text that is expected
    right:   which of them it is
    said:    the prompt in words
    most:    tokens that an answer may have; stop: texts at which it ends; ends: tokens too
    """

    prompt: Ids
    options: tuple[Ids, ...]
    begins: tuple[int, ...]
    texts: tuple[str, ...]
    right: int
    said: str
    most: int
    stop: tuple[str, ...]
    ends: tuple[int, ...] = ()


class Speaker(NamedTuple):
    """A model that can be asked.

    likelihoods: of each row's tokens from a place on, given those before it: the natural logarithm
    write: what comes after each prompt, taking the most likely token each time, up to so many
        tokens, the end-of-sequence token, or one of the texts or tokens at which to stop
    """

    likelihoods: Callable[[Sequence[tuple[Ids, int]]], list[float]]
    write: Callable[[Sequence[Ids], int, Sequence[str], Sequence[int]], list[str]]


def written(asked: Sequence[Asked], speaker: Speaker) -> list[str]:
    """What a model writes after each prompt; all of a data set's have one length and one end."""
    if not asked:
        return []
    first = asked[0]
    return speaker.write([each.prompt for each in asked], first.most, first.stop, first.ends)


def until(text: str, stop: Sequence[str]) -> str:
    """The text up to the first place at which one of these stands."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]
