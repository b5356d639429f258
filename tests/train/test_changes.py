"""A method that changes the base is refused at set-up for layers whose weight it cannot change."""

from dataclasses import replace
from typing import Any

import pytest

import fedsieve
from fedsieve import FedSieveError, Lora, methods
from fedsieve.algebra.cores import Cores
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from tests.conftest import Tiny
from tests.test_api import TRAINING, rows

FOLD = ("flora", "florist", "fedex_lora")  # those that fold what they learn into the base
CHANGE = (*FOLD, "fed_plora")  # and one whose clients fold what they do not train
CORED = tuple(n for n in methods.names() if isinstance(methods.load(n)().trains, Cores))
EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def start(tiny: Tiny, method: Any, targets: Any, **more: Any) -> fedsieve.Run:
    lora = Lora(rank=2, targets=targets, dropout=0.0)
    plain = replace(TRAINING, optimizer="sgd")
    training = TRAINING if method.trained_by is None else plain
    given = {"lora": lora, "training": training, "device": "cpu", "rounds": 2, **more}
    return fedsieve.finetune(str(tiny.bert), [rows(9, 1), rows(9, 2)], method, **given)


@pytest.mark.parametrize("layer", EMBEDDINGS)
@pytest.mark.parametrize("name", methods.names())
def test_embeddings_take_every_method_that_leaves_the_base(
    tiny: Tiny, name: str, layer: str
) -> None:
    method = methods.load(name)()
    if name in (*CHANGE, *CORED):
        why = "an embedding, and this method" if name in CORED else "whose weight .* cannot be"
        said = f"lora.targets takes in .*{layer}, {why}"
        with pytest.raises(FedSieveError, match=said):
            start(tiny, method, ("query", layer))
    elif layer == "word_embeddings":
        start(tiny, method, ("query", layer)).finish()


@pytest.mark.parametrize("name", FOLD)
@pytest.mark.parametrize("targets", [["query", "dense"], "all-linear"])
def test_linear_layers_are_changed(tiny: Tiny, name: str, targets: Any) -> None:
    targets = tuple(targets) if isinstance(targets, list) else targets
    run = start(tiny, methods.load(name)(), targets).finish()
    assert run.adapter.base


@pytest.mark.parametrize("name", CHANGE)
def test_a_recipe_is_refused_before_a_round(tiny: Tiny, name: str) -> None:
    table = tiny.table(
        method__name=name, budgets=[{}], server={}, lora__targets=["query", "word_embeddings"]
    )
    with pytest.raises(FedSieveError, match=r"lora\.targets takes in .*word_embeddings"):
        from_recipe(recipe.check(table))
