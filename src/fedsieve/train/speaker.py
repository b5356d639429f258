"""A resident model that is asked: how likely texts are to it, and what it writes.

Rows of like length go together, so that little is padded. Writing is transformers' own `generate`,
greedy, with a cache of keys and values and the padding on the left; nothing of the model's own
habits of generation (penalties, sampling, lengths) is taken but the tokens at which it ends.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from fedsieve.errors import FedSieveError
from fedsieve.tasks.asked import Ids, Speaker, until
from fedsieve.tasks.tokens import IGNORED, Texts, rectangle
from fedsieve.train.batch import inputs
from fedsieve.train.model import ResidentModel
from fedsieve.train.outputs import logits_of


def speaker(resident: ResidentModel, batch: int) -> Speaker:
    """The model as it is, adapter and all, in evaluation mode, for so many rows at a time."""

    def likelihoods(rows: Sequence[tuple[Ids, int]]) -> list[float]:
        found = [0.0] * len(rows)
        for some in _alike([len(ids) for ids, _ in rows], batch):
            ids, mask = rectangle([rows[n][0].tolist() for n in some], 0)
            begins = torch.tensor([rows[n][1] for n in some])[:, None]
            learned = (mask == 1) & (torch.arange(ids.shape[1]) >= begins)
            labels = ids.masked_fill(~learned, IGNORED)
            for n, value in zip(some, _likelihood(resident, ids, mask, labels), strict=True):
                found[n] = value
        return found

    def write(
        prompts: Sequence[Ids], most: int, stop: Sequence[str], ends: Sequence[int]
    ) -> list[str]:
        found = [""] * len(prompts)
        for some in _alike([len(prompt) for prompt in prompts], batch):
            told = _written(resident, [prompts[n] for n in some], most, stop, ends)
            for n, text in zip(some, told, strict=True):
                found[n] = text
        return found

    return Speaker(likelihoods, write)


def _alike(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """The numbers of the rows, in batches, the longest first: what does not fit fails at once."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    for first in range(0, len(order), batch):
        yield order[first : first + batch].tolist()


def _likelihood(resident: ResidentModel, ids: Tensor, mask: Tensor, labels: Tensor) -> list[float]:
    given = inputs(resident.model, Texts(ids, mask, labels), resident.device)
    labels = given.pop("labels")[:, 1:]
    logits = logits_of(resident.model, given)[:, :-1]
    there = labels != IGNORED
    # Only where an option stands: a vocabulary's numbers for every token of a prompt are many.
    chances = -torch.nn.functional.cross_entropy(
        logits[there].float(), labels[there], reduction="none"
    )
    rows = there.nonzero()[:, 0]
    summed = torch.zeros(len(ids), device=chances.device, dtype=torch.float64)
    told: list[float] = summed.index_add_(0, rows, chances.double()).tolist()
    return told


def _ends_of(model: Any, own: GenerationConfig) -> set[int]:
    """The tokens at which a model says that it ends. Raises FedSieveError for what is none."""
    told = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    words = model.config.get_text_config().vocab_size
    for end in told:
        if end is not None and (type(end) is not int or not -1 <= end < words):
            raise FedSieveError(
                f"model {model.config.name_or_path!r}: its generation_config.json has eos_token_id "
                f"{str(end)[:40]!r}, which is none of its {words} tokens"
            )
    return {end for end in told if end is not None}


def _written(
    resident: ResidentModel,
    prompts: Sequence[Ids],
    most: int,
    stop: Sequence[str],
    ends: Sequence[int],
) -> list[str]:
    tokenizer: Any = resident.tokenizer
    model: Any = resident.model
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # its layers have the pairs in them
    own = model.generation_config
    if tokenizer is None or own is None:
        raise FedSieveError(f"a {model.config.model_type} model cannot be asked for a text")
    ids, mask = rectangle([prompt[::-1].tolist() for prompt in prompts], tokenizer.pad_token_id)
    ids, mask = ids.flip(1).to(resident.device), mask.flip(1).to(resident.device)
    last = {tokenizer.eos_token_id, *ends}
    # A text that is one such token is not seen in what is read without them.
    special = {str(token): n for n, token in tokenizer.added_tokens_decoder.items()}
    last |= {special[text] for text in stop if text in special}
    last |= _ends_of(model, own)
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end for end in last if end is not None) or None,
    )
    begin = ids.shape[1]

    def read(made: Tensor) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(made[:, begin:], skip_special_tokens=True)
        return texts

    def ended(made: Tensor, scores: Any) -> Tensor:
        over = [any(each in text for each in stop) for text in read(made)]
        return torch.tensor(over, device=made.device)

    model.generation_config = GenerationConfig()  # from which unset values would be taken
    try:
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=greedy,
            # Its own search for texts knows the tokens of some kinds of tokenizers only.
            stopping_criteria=StoppingCriteriaList([ended] if stop else []),
        )
    finally:
        model.generation_config = own
    return [until(text, stop) for text in read(made)]
