"""A rehearsal's costs against real rounds: encoded bytes, and tensors that training allocated."""

from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.adapter import layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.support import Support
from fedsieve.costs.table import rehearse
from fedsieve.engine.loop import begin, rounds
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.recipe.experiment import from_recipe
from fedsieve.settings import Training
from tests import kinds
from tests.conftest import Tiny

METHODS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in methods.names()),
    *((name, {"ranked": "change"}) for name in ("flasc", "fslora_flasc", "fed_select")),
]
TRAININGS = ({"optimizer": "adamw", "lr": 0.01}, {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1})


@pytest.mark.parametrize(
    ("name", "options"), kinds.quick_of(METHODS, lambda row: row[0] in kinds.QUICK)
)
@pytest.mark.parametrize("training", kinds.some_of(TRAININGS))
def test_a_rehearsal_costs_what_a_real_round_does(
    tiny: Tiny, name: str, options: dict[str, Any], training: dict[str, Any]
) -> None:
    if name in kinds.PLAIN_SGD:
        training = {**training, "optimizer": "sgd"}
    method = methods.load(name)(**options)
    knobs = method.knobs
    limits = {"ratio": 0.5, "down": 0.25, "up": 0.125}
    if options:  # What has not moved does not travel: dense uploads move enough to fill a mask.
        limits["up"] = 1.0
    budget = {knob: value for knob, value in limits.items() if knob in knobs}
    table = tiny.table(
        method={"name": name, **options},
        budgets=[budget],
        server={"optimizer": "sgd"},
        cohort=3,
        rounds=3,
    )
    table["partition"] = {"kind": "iid", "clients": 3}
    table["training"] = {**training, "precision": "fp32", "steps": 2, "batch": 8}
    experiment = from_recipe(recipe.check(table))
    _, progress = begin(experiment.federation, experiment.start)
    receipts = [part for _, part, _ in rounds(experiment.federation, progress, 3)][-1]

    clients = [Client(f"{i:04d}", 80, Budget(**budget)) for i in range(3)]
    costs = rehearse(method, experiment.resident.layout, clients, Training(**training))
    for receipt, cost in zip(receipts, costs, strict=True):
        assert receipt.dropped is None
        assert cost.memory == receipt.memory_bytes
        # Masks are entropy-coded: their size depends on which entries are large.
        exact = not knobs & {"down", "up"} and name not in ("sparse_adapter", "adapter_lth")
        for ours, theirs in ((cost.down, receipt.down_bytes), (cost.up, receipt.up_bytes)):
            if name == "florist":  # noise needs more ranks than what was learned
                assert ours >= theirs
            else:
                assert abs(ours - theirs) <= (0 if exact else 20 + 0.03 * theirs)


def test_a_client_of_half_the_ranks_costs_half() -> None:
    """FSLoRA without a head: memory and messages at ratio k / r are k / r of dense, within 2 %."""
    shapes = {"m.0.lora_A.weight": (16, 300), "m.0.lora_B.weight": (500, 16)}
    layout = layout_of({n: torch.empty(s) for n, s in shapes.items()}, 1.0)
    clients = [Client("half", 1, Budget(0.5)), Client("whole", 1)]
    method = methods.load("fslora")()
    half, whole = rehearse(method, layout, clients, Training())
    for part in ("memory", "down", "up"):
        assert getattr(half, part) == pytest.approx(getattr(whole, part) / 2, rel=0.02)


def test_a_view_that_moves_what_there_is_not_is_told(tiny: Tiny) -> None:
    """A method of one's own may name anything; `check` and a site's limits rehearse it."""
    method = methods.load("fedit")()
    odd = method._replace(
        view=lambda *given: (
            method.view(*given)[0]._replace(moves=Support(("head.nowhere",), None, {})),
            {},
        )
    )
    layout = from_recipe(recipe.check(tiny.table())).resident.layout
    with pytest.raises(FedSieveError, match=r"trains 'head\.nowhere', which the adapter"):
        rehearse(odd, layout, [Client("a", 8, Budget())], Training())
