"""Which methods need no more of their clients than the sum, against what docs/security.md says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Layout, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.cores import Cores, cored
from fedsieve.costs.secure_sum import obstacle

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
SHAPES = {
    "m.0.lora_A.weight": (8, 30),
    "m.0.lora_B.weight": (50, 8),
    "m.1.lora_A.weight": (8, 30),
    "m.1.lora_B.weight": (50, 8),
    "classifier.weight": (4, 30),
}


@pytest.fixture(scope="module")
def layout() -> Layout:
    return layout_of({name: torch.empty(shape) for name, shape in SHAPES.items()}, 1.0)


def clients(method: str, ratio: float, density: float) -> list[Client]:
    limits = {"ratio": ratio, "down": density, "up": density}
    knobs = methods.load(method)().knobs
    budget = Budget(**{knob: limits[knob] for knob in knobs})
    return [Client(f"{number}", 1, budget) for number in range(3)]


# A new method need not be on the page: `obstacle` tells.
ROWS = re.findall(
    r"^\| `(\w+)` \| (?:yes|no(?:: (.*))?) \|$", PAGE.read_text("utf-8"), re.MULTILINE
)


def test_the_page_has_its_table() -> None:
    names = [name for name, _ in ROWS]
    assert len(names) == len(set(names)) >= 16
    assert set(names) <= set(methods.names())


@pytest.mark.parametrize(("method", "reason"), ROWS)
def test_the_page_says_what_a_rehearsal_finds(layout: Layout, method: str, reason: str) -> None:
    made = methods.load(method)()
    if isinstance(made.trains, Cores):
        layout = cored(layout, made.trains)
    assert obstacle(made, layout, clients(method, 0.5, 0.25)) == (reason or None)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fslora", {}),
        ("flasc", {}),
        ("fslora_flasc", {}),
        ("flasc", {"ranked": "change"}),
        ("fslora_flasc", {"ranked": "change"}),
    ],
    ids=str,
)
def test_with_full_budgets_all_clients_send_the_same_coordinates(
    layout: Layout, method: str, options: dict[str, Any]
) -> None:
    assert obstacle(methods.load(method)(**options), layout, clients(method, 1.0, 1.0)) is None


def test_clients_of_different_ranks_cannot_be_summed(layout: Layout) -> None:
    """Federated Select by rank norm: the same ranks for the same budgets, and only then."""
    method = methods.load("fed_select")(kind="ranks")
    alike = [Client("a", 1, Budget(0.5)), Client("b", 1, Budget(0.5))]
    apart = [Client("a", 1, Budget(0.5)), Client("b", 1, Budget(0.25))]
    assert obstacle(method, layout, alike) is None
    assert obstacle(method, layout, apart) == "its clients send different coordinates"
