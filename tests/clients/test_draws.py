"""What a seed draws, for ever: cohorts, budgets and partitions of 0.1, as digests.

The digests were taken from the code before it was made for many clients. A run of old is repeated
by its recipe only while they hold.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.clients import laws
from fedsieve.clients.sampling import cohort, counting
from fedsieve.data import partition
from fedsieve.data.names import numbered
from fedsieve.engine.personal import some_of
from fedsieve.settings import Sampling

IDS = numbered(500)
ODD = ["ä", "Zoë", "a", "B", "10", "9", "09", "x y", "client-with-a-long-name" * 3, "ж"]
CLIENTS = [Client(id, 1) for id in IDS]
RARE = {"0001": 0.3, "0400": 0.9, "0002": 1.0}
KEY = Key(11)


def ids(clients: list[Client], **sampling: Any) -> list[list[str]]:
    made = Sampling(**sampling)
    return [[c.id for c in cohort(clients, made, Key(3, number))] for number in range(1, 13)]


def split(given: Any) -> dict[str, list[int]]:
    return {id: rows.tolist() for id, rows in given.items()}


def labels(count: int, classes: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, classes, count)


def tiers() -> list[tuple[float, Budget]]:
    return [(1.0, Budget(0.25)), (2.5, Budget(0.5, 0.5)), (0.3, Budget())]


DRAWS: dict[str, tuple[Callable[[], Any], str]] = {
    "uniform": (lambda: ids(CLIENTS, kind="uniform", size=7), "0a65c2378184726c"),
    "uniform, any order": (lambda: ids(CLIENTS[::-1], kind="uniform", size=7), "0a65c2378184726c"),
    "uniform, extra": (lambda: ids(CLIENTS, kind="uniform", size=7, extra=3), "d8b9a70fd56163bd"),
    "uniform, half": (
        lambda: ids(CLIENTS, kind="uniform", size=7, availability=0.5),
        "05fdf0aeacc4ed27",
    ),
    "uniform, rare": (
        lambda: ids(CLIENTS, kind="uniform", size=450, availability=RARE),
        "b980742fc8896fa8",
    ),
    "uniform, odd": (
        lambda: ids([Client(i, 1) for i in ODD], kind="uniform", size=4),
        "9cebed01446974b4",
    ),
    "poisson": (lambda: ids(CLIENTS, kind="poisson", size=7), "c6d26e4e7d349fa5"),
    "poisson, half": (
        lambda: ids(CLIENTS, kind="poisson", size=70, availability=0.5),
        "e58885940cadc1c2",
    ),
    "poisson, odd": (
        lambda: ids([Client(i, 1) for i in ODD], kind="poisson", size=4),
        "be929162f959f140",
    ),
    "poisson, everyone": (lambda: ids(CLIENTS, kind="poisson", size=900), "135be7d0f22833d9"),
    "all, half": (lambda: ids(CLIENTS, kind="all", availability=0.5), "ba33780a9a8b564d"),
    "all, rare": (lambda: ids(CLIENTS, kind="all", availability=RARE), "e234b17ea0560855"),
    "counting": (
        lambda: dict(sorted(counting(CLIENTS, Sampling("poisson", 9), 5)(40).items())),
        "71ecd60ae2668ba2",
    ),
    "personal": (
        lambda: [id for id, _ in some_of({key: {} for key in IDS}, KEY)],
        "cc13a9b88537e7ca",
    ),
    "tiers": (lambda: laws.assign(IDS, tiers(), KEY), "679b12eed2ace111"),
    "tiers, odd": (lambda: laws.assign(ODD, tiers(), KEY), "a5ebcb40ca149bfd"),
    "ratios": (lambda: laws.ratios(IDS, (0.25, 0.5, 0.75), KEY), "a27f55f443407cb5"),
    "normal": (lambda: laws.normal(IDS, 4, 64, KEY), "fd1cde4b4e1757b7"),
    "heavy tail": (lambda: laws.heavy_tail(IDS, 4, 64, KEY), "b52b1c9c56a57f40"),
    "iid": (lambda: split(partition.iid(1003, 500, 17)), "47d9e20e2512bf0b"),
    "dirichlet": (
        lambda: split(partition.dirichlet(labels(3000, 20), 500, 0.1, 17)),
        "e91bd2616d33fcd9",
    ),
    "dirichlet, even": (
        lambda: split(partition.dirichlet(labels(900, 3), 70, 1e5, 4)),
        "7c0d18d77e7ba294",
    ),
    "column": (
        lambda: split(partition.natural([ODD[n] for n in labels(300, 10)])),
        "7052c3341bbb40a6",
    ),
}


def digest(drawn: Any) -> str:
    text = json.dumps(drawn, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_draws_what_it_always_drew(name: str) -> None:
    draw, known = DRAWS[name]
    assert digest(draw()) == known


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 1e4])
@pytest.mark.parametrize(("rows", "classes", "clients"), [(200, 3, 7), (500, 1, 60), (77, 5, 77)])
def test_dirichlet_is_that_of_flwr_datasets(
    rows: int, classes: int, clients: int, alpha: float
) -> None:
    own = labels(rows, classes)
    oracle = DirichletPartitioner(
        clients, "label", alpha, 0, self_balancing=False, shuffle=False, seed=9
    )
    oracle.dataset = datasets.Dataset.from_dict({"label": own, "row": np.arange(rows)})
    ours = partition.dirichlet(own, clients, alpha, 9)
    for number, rows_of in enumerate(ours.values()):
        assert sorted(oracle.load_partition(number)["row"][:]) == rows_of.tolist()


@pytest.mark.parametrize(("rows", "clients"), [(10, 10), (103, 10), (64, 1), (99, 50)])
def test_iid_is_the_cut_of_flwr_datasets(rows: int, clients: int) -> None:
    oracle = IidPartitioner(clients)
    shuffled = np.random.default_rng(2).permutation(rows)
    oracle.dataset = datasets.Dataset.from_dict({"row": shuffled})
    for number, rows_of in enumerate(partition.iid(rows, clients, 2).values()):
        assert sorted(oracle.load_partition(number)["row"][:]) == rows_of.tolist()
