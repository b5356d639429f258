"""Texts joined into rows that are full: short ones leave most of a rectangle to the padding."""

import torch

from fedsieve.tasks.tokens import IGNORED, Texts


def packed(examples: Texts) -> Texts:
    """A language model's examples, one text behind another in rows as long as the longest of them.

    In their order, each text whole. No text's first token is learned from the text before it, but a
    text sees those before it in its row: attention is not cut between them. What is asked at
    evaluation is left out.
    """
    lengths = examples.attention_mask.sum(1).tolist()
    width = max(lengths)
    rows: list[list[int]] = []
    room = 0
    for text, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = width
        rows[-1].append(text)
        room -= length
    ids = torch.zeros(len(rows), width, dtype=examples.input_ids.dtype)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, texts in enumerate(rows):
        at = 0
        for text in texts:
            there = examples.attention_mask[text] == 1
            end = at + lengths[text]
            ids[row, at:end] = examples.input_ids[text][there]
            labels[row, at:end] = examples.labels[text][there]
            labels[row, at] = IGNORED
            at = end
        mask[row, :at] = 1
    return Texts(ids, mask, labels)
