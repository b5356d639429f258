"""Partitions: every row once, the same seed the same split, and the skew that alpha promises."""

from collections.abc import Callable

import datasets
import numpy as np
import pytest
from flwr_datasets.partitioner import NaturalIdPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.data import names
from fedsieve.data.partition import Partition, dirichlet, dirichlet_by_client, iid, natural
from fedsieve.errors import FedSieveError


def is_partition(split: Partition, rows: int) -> bool:
    together = np.concatenate(list(split.values()))
    return (
        list(split) == sorted(split)
        and sorted(together.tolist()) == list(range(rows))
        and all(part.dtype == np.int64 for part in split.values())
        and all((np.diff(part) > 0).all() for part in split.values())
    )


def same(one: Partition, other: Partition) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[i], other[i]) for i in one)


@settings(max_examples=40)
@given(st.data())
def test_every_row_goes_to_exactly_one_client(data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=80))
    clients = data.draw(st.integers(1, len(labels)))
    seed = data.draw(st.integers(0, 2**32))
    alpha = data.draw(st.floats(1e-6, 1e9))
    split = dirichlet(labels, clients, alpha, seed)
    assert is_partition(split, len(labels))
    assert len(split) == clients
    assert same(split, dirichlet(labels, clients, alpha, seed))
    own = dirichlet_by_client(labels, clients, alpha, seed)
    assert is_partition(own, len(labels))
    assert len(own) == clients
    assert np.ptp([*own.counts.values()]) <= 1
    assert same(own, dirichlet_by_client(labels, clients, alpha, seed))
    even = iid(len(labels), clients, seed)
    assert is_partition(even, len(labels))
    assert {len(part) for part in even.values()} <= {
        len(labels) // clients,
        -(-len(labels) // clients),
    }
    assert same(even, iid(len(labels), clients, seed))
    assert is_partition(natural(labels), len(labels))


def largest_share(split: Partition, labels: np.ndarray) -> float:
    """The mean over clients of the share that a client's commonest class has."""
    parts = [labels[part] for part in split.values() if len(part)]
    return float(np.mean([np.bincount(part).max() / len(part) for part in parts]))


def test_alpha_sets_the_skew() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 5000)
    skew = [largest_share(dirichlet(labels, 20, alpha, 1), labels) for alpha in (0.01, 0.5, 1e5)]
    assert skew[0] > 0.8
    assert skew[0] > skew[1] + 0.2
    assert skew[1] > skew[2] + 0.1
    # IID parts of 250 rows have some spread; a huge alpha must not have more.
    assert skew[2] <= largest_share(iid(5000, 20, 1), labels) + 0.02


def test_many_clients_and_a_small_alpha_end_with_unequal_clients() -> None:
    labels = np.repeat(np.arange(20), 565)
    split = dirichlet(labels, 350, 0.1, 0)
    sizes = np.array([len(part) for part in split.values()])
    assert is_partition(split, len(labels))
    assert sizes.max() > 3 * sizes.mean()
    # 20 classes thrown, nearly whole, at 10 clients: some client gets twice its share, where a
    # sampler that balances would stop at one class above it.
    sizes = np.array([len(part) for part in dirichlet(labels, 10, 0.02, 0).values()])
    assert sizes.max() > 1.7 * sizes.mean()


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_a_clients_own_mixture_is_as_uneven_as_its_law_says(alpha: float) -> None:
    """Of n draws by p ~ Dirichlet(alpha) over C classes, two are of one class with the chance
    E sum p^2 = (alpha + 1) / (C alpha + 1): of the first clients, before classes run out.
    """
    classes, clients, size = 5, 400, 50
    labels = np.repeat(np.arange(classes), 40_000)  # far more than these clients can take
    split = dirichlet_by_client(labels, classes * 40_000 // size, alpha, 3)
    alike = []
    for part in [*split.values()][::10][:clients]:
        held = np.bincount(labels[part], minlength=classes)
        alike.append((held * (held - 1)).sum() / (size * (size - 1)))
    assert np.mean(alike) == pytest.approx((alpha + 1) / (classes * alpha + 1), abs=0.04)


def test_who_comes_last_gets_what_is_left() -> None:
    """With nearly one class a client, only some clients can have more: those who found theirs
    empty. And no class is lost, though nobody's mixture has any of it.
    """
    labels = np.repeat(np.arange(4), 100)
    split = dirichlet_by_client(labels, 40, 1e-6, 0)
    held = [len(np.unique(labels[part])) for part in split.values()]
    assert np.mean(np.array(held) == 1) > 0.8
    assert is_partition(split, 400)


def test_clients_without_rows_keep_their_id() -> None:
    split = dirichlet([0] * 50 + [1] * 50, 30, 1e-3, 0)
    empty = [part for part in split.values() if len(part) == 0]
    assert len(split) == 30
    assert len(empty) >= 20
    assert all(part.shape == (0,) and part.dtype == np.int64 for part in empty)


def test_seeds_differ_and_label_names_do_not_matter() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 200)
    names = np.array(["a", "b", "c"])[labels]
    split = dirichlet(labels, 7, 0.3, 5)
    assert same(split, dirichlet(names, 7, 0.3, 5))
    assert not same(split, dirichlet(labels, 7, 0.3, 6))
    own = dirichlet_by_client(labels, 7, 0.3, 5)
    assert same(own, dirichlet_by_client(names, 7, 0.3, 5))
    assert not same(own, dirichlet_by_client(labels, 7, 0.3, 6))
    assert not same(iid(200, 7, 5), iid(200, 7, 6))
    assert (np.diff(iid(200, 7, 5)["0000"]) > 1).any()  # really shuffled


def test_generated_ids_sort_as_their_numbers() -> None:
    assert list(iid(12, 12, 0))[:2] == ["0000", "0001"]
    ids = names.numbered(10_001)
    assert ids == sorted(ids)
    assert (ids[0], ids[-1]) == ("00000", "10000")


def test_natural_clients_are_those_of_flwr_datasets() -> None:
    authors = np.random.default_rng(0).choice(["eve", "bob", "ann", "dan"], 60).tolist()
    oracle = NaturalIdPartitioner(partition_by="author")
    oracle.dataset = datasets.Dataset.from_dict({"author": authors, "row": list(range(60))})
    split = natural(authors)
    assert list(split) == ["ann", "bob", "dan", "eve"]
    for number, rows in enumerate(split.values()):
        assert oracle.load_partition(number)["row"][:] == rows.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid(5, 0, 0), "clients is 0"),
        (lambda: iid(5, 6, 0), "only 5 rows"),
        (lambda: dirichlet([0, 1], -1, 0.1, 0), "clients is -1"),
        (lambda: dirichlet([0, 1], 3, 0.1, 0), "only 2 rows"),
        (lambda: dirichlet([0, 1], 2, 0.0, 0), "alpha is 0"),
        (lambda: dirichlet([0, 1], 2, -1.0, 0), "alpha is -1"),
        (lambda: dirichlet([0, 1], 2, float("nan"), 0), "alpha is nan"),
        (lambda: dirichlet([0, 1], 2, float("inf"), 0), "alpha is inf"),
        (lambda: dirichlet_by_client([0, 1], 3, 0.1, 0), "only 2 rows"),
        (lambda: dirichlet_by_client([0, 1], 2, 0.0, 0), "alpha is 0"),
        (lambda: natural([]), "no rows"),
        (lambda: natural(["a", None]), "row 1 has no client"),
        (lambda: natural(["", "a"]), "row 0 has no client"),
    ],
)
def test_bad_input(call: Callable[[], Partition], message: str) -> None:
    with pytest.raises(FedSieveError, match=message):
        call()
