"""Texts joined into full rows: each token is there once, and what is learned of it is as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedsieve
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame
from fedsieve.sites import resident
from fedsieve.tasks.packing import packed
from fedsieve.tasks.tokens import IGNORED, Texts
from tests import runs
from tests.conftest import Tiny, texts
from tests.sites.sites import recipe_text, settled, write_site

PAD = 0


def examples(lengths: list[int]) -> Texts:
    """Texts whose tokens are all different, each learned but for the first of a text."""
    width, at = max(lengths), 1
    ids = torch.full((len(lengths), width), PAD)
    labels = torch.full((len(lengths), width), IGNORED)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(at, at + length)
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
        mask[row, :length] = 1
        at += length
    return Texts(ids, mask, labels)


def learned(given: Texts) -> set[tuple[int, int]]:
    """(the token before, the token that is learned from it), as a model shifts them."""
    before, targets = given.input_ids[:, :-1], given.labels[:, 1:]
    there = targets != IGNORED
    return set(zip(before[there].tolist(), targets[there].tolist(), strict=True))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_nothing_is_lost_nor_learned_over_a_border(lengths: list[int]) -> None:
    before = examples(lengths)
    after = packed(before)
    assert after.input_ids.shape[1] == before.input_ids.shape[1]
    assert len(after.input_ids) <= len(lengths)
    one, other = (each.input_ids[each.attention_mask == 1].tolist() for each in (before, after))
    assert one == other  # each once, in its order
    assert learned(after) == learned(before)
    # As full as the order allows: no text would have fitted into the row before its own.
    sizes = after.attention_mask.sum(1).tolist()
    starts = {int(ids[0]) for ids in after.input_ids}
    firsts = [n for n, ids in zip(lengths, before.input_ids, strict=True) if int(ids[0]) in starts]
    width = max(lengths)
    assert all(a + b > width for a, b in zip(sizes[:-1], firsts[1:], strict=True))


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"text": " ".join(text.split()[: 2 if n % 10 else 7])}
        for n, (text, _) in enumerate(texts(count, 3))
    ]


@pytest.mark.filterwarnings("ignore:.*no padding token")
def test_a_run_goes_through_its_rows_in_fewer_steps(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    steps: list[list[int]] = []
    scores: list[list[Any]] = []
    for packing in (False, True, True):
        folder = tmp_path / f"{len(steps)}"
        runs.start(
            tiny,
            folder,
            model={"source": str(tiny.gpt2), "task": "causal-lm"},
            data={"train": str(path), "test": str(path), "text": "text", "max_length": 16},
            partition={"kind": "iid", "clients": 3},
            lora__targets=["c_attn"],
            training__batch=2,
            training__packing=packing,
        )
        steps.append([row["steps"] for row in runs.lines(folder, "clients.jsonl")])
        scores.append([row.get("eval_loss") for row in runs.lines(folder)])
    assert steps[1] == steps[2]
    assert scores[1] == scores[2]
    assert sum(steps[1]) < 0.8 * sum(steps[0])
    assert scores[1][0] == scores[0][0]  # what is evaluated on is not joined
    assert scores[1][-1] < scores[1][0]


def test_other_tasks_have_no_use_for_it(tiny: Tiny, tmp_path: Path) -> None:
    said = "training.packing: it is for language models, and the task is classification"
    with pytest.raises(FedSieveError, match=said):
        runs.start(tiny, tmp_path / "run", training__packing=True)
    state = settled(write_site(tiny, tmp_path))
    answer = resident.answer(
        state, Frame({"do": "recipe"}, recipe_text(tiny, training__packing=True))
    )
    assert said in answer.header["error"]


@pytest.mark.filterwarnings("ignore:.*no padding token")
def test_a_notebook_may_ask_for_it(tiny: Tiny) -> None:
    from datasets import Dataset

    clients: Any = {name: Dataset.from_list(rows(20)) for name in ("north", "south")}
    run = fedsieve.finetune(
        str(tiny.gpt2),
        clients,
        fedsieve.fedit(),
        rounds=1,
        task="causal-lm",
        max_length=16,
        training=fedsieve.Training(packing=True, batch=2),
    )
    for _ in run:
        pass
    assert (run.metrics[-1].loss or 0) > 0
