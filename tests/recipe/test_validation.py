"""Validation rows: held back from every client, the same for every seed, the test rows unread."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedsieve.errors import FedSieveError
from fedsieve.recipe import examples, experiment
from fedsieve.recipe import read as recipe
from fedsieve.tasks.tokens import Texts
from tests.conftest import Tiny


def rows(examples: Sequence[Texts]) -> Counter[tuple[int, ...]]:
    """Texts as their tokens, padding left out: a multiset, whatever the order."""
    return Counter(
        tuple(ids[mask.bool()].tolist())
        for each in examples
        for ids, mask in zip(each.input_ids, each.attention_mask, strict=True)
    )


def split(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]]:
    """What the clients of a recipe hold, and what it evaluates on."""
    caught: dict[str, Any] = {}
    assemble = experiment.assemble

    def look(resident: Any, method: Any, examples: Any, *rest: Any, **given: Any) -> Any:
        caught["clients"] = rows([examples(id) for id in rest[0]])
        caught["test"] = rows([given["test"]])
        return assemble(resident, method, examples, *rest, **given)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "assemble", look)
        experiment.from_recipe(recipe.check(tiny.table(**changes)))
    return caught["clients"], caught["test"]


@pytest.mark.filterwarnings("ignore:The tokenizer has no padding token")
@pytest.mark.parametrize("lm", [False, True])
def test_training_rows_are_with_a_client_or_held_back(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, lm: bool
) -> None:
    changes: dict[str, Any] = {}
    if lm:
        changes = {
            "model": {"source": str(tiny.gpt2), "task": "causal-lm"},
            "lora__targets": ["c_attn"],
            "data__label": None,
            "partition": {"kind": "iid", "clients": 6},
        }
    everything, on_test = split(tiny, monkeypatch, **changes)
    held = {"data__validation": 0.25, "evaluation__on": "validation"}
    clients, first = split(tiny, monkeypatch, **changes, **held, data__test="/no/such.csv")
    assert first.total() == 60  # a quarter of 240
    assert clients + first == everything
    # Another seed deals the others out anew and holds the same rows back.
    clients, second = split(tiny, monkeypatch, **changes, **held, seed=7)
    assert second == first
    assert clients + second == everything
    # They stay away from the clients when the test rows are what is evaluated.
    clients, test = split(tiny, monkeypatch, **changes, data__validation=0.25)
    assert clients + first == everything
    assert test == on_test


def test_the_limit_takes_some_of_the_validation_rows(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"data__validation": 0.25, "evaluation__on": "validation"}
    _, everything = split(tiny, monkeypatch, **held)
    _, some = split(tiny, monkeypatch, **held, evaluation__limit=10)
    assert some.total() == 10
    assert some <= everything


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (100, 0.1, 10), (3, 0.5, 2)]
)
def test_some_rows_are_held_back_and_never_all(count: int, share: float, expected: int) -> None:
    held = examples.held_back(count, share)
    assert held.shape == (count,)
    assert int(held.sum()) == expected
    assert torch.equal(held, examples.held_back(count, share))


def test_a_held_back_class_is_still_a_class(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes come from all rows: which are held back does not change the model's outputs."""
    made = experiment.from_recipe(
        recipe.check(tiny.table(data__validation=0.99, partition={"kind": "iid", "clients": 2}))
    )
    assert made.recipe is not None
    assert made.recipe.data.classes == ("cars", "space", "wine")


def test_validation_needs_its_share(tiny: Tiny) -> None:
    with pytest.raises(FedSieveError, match=r"evaluation\.on: 'validation' needs data\.validation"):
        recipe.check(tiny.table(evaluation__on="validation"))
    for share in (0, 1, -0.1):
        with pytest.raises(FedSieveError, match=r"data\.validation: Input should be"):
            recipe.check(tiny.table(data__validation=share))
