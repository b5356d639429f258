"""Laws of budgets: the distributions they come from, and that chosen ones fit, in real bytes."""

import math
import re
import statistics
import tomllib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.budget import Budget, Client, Link, check
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Method
from fedsieve.algebra.payload import Form
from fedsieve.clients import laws
from fedsieve.clients.laws import assign
from fedsieve.clients.network import client_time
from fedsieve.clients.resources import (
    LADDER,
    Resources,
    Work,
    choose,
    memory_bytes,
    message_bytes,
    round_seconds,
)
from fedsieve.errors import FedSieveError
from fedsieve.methods import flasc, fslora, fslora_flasc
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.settings import PAPER_RATIOS
from fedsieve.wire import encode
from tests.conftest import Tiny

MANY = [f"{number:04d}" for number in range(4000)]


# --- laws on given numbers


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=4), st.integers(1, 60))
def test_budgets_follow_the_shares(shares: list[float], clients: int) -> None:
    ids = [f"{i:03d}" for i in range(clients)]
    tiers = [(share, Budget(up=(i + 1) / 8)) for i, share in enumerate(shares)]
    budgets = assign(ids, tiers, Key(1))
    assert sorted(budgets) == ids
    assert budgets == assign(ids[::-1], tiers, Key(1))
    counts = Counter(budgets.values())
    for share, budget in tiers:
        assert abs(counts[budget] - clients * share / sum(shares)) <= 1


@given(st.floats(0.001, 1), st.integers(1, 64))
def test_a_ratio_gives_the_nearest_rank_and_never_none(ratio: float, rank: int) -> None:
    kept = Budget(ratio).ranks(rank)
    assert 1 <= kept <= rank
    assert abs(kept - ratio * rank) <= max(0.5, 1 - ratio * rank)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_flascs_tiers_have_the_papers_ranks_and_densities(count: int) -> None:
    by_rank, by_density = laws.tiers_by_rank(count), laws.tiers_by_density(count)
    ranks = [budget.ranks(4**count) for _, budget in by_rank]
    assert ranks == [4, 16, 64, 256][:count]
    papers = [[1.0], [1 / 4, 1.0], [1 / 16, 1 / 4, 1.0], [1 / 64, 1 / 16, 1 / 4, 1.0]]
    assert [(b.down, b.up) for _, b in by_density] == [(d, d) for d in papers[count - 1]]
    assert by_rank[-1] == by_density[-1] == (1.0, Budget())
    # What a tier sends of 4**count ranks does not depend on what the tiers differ in.
    for (_, narrow), (_, sparse) in zip(by_rank, by_density, strict=True):
        assert narrow.ratio * narrow.up == sparse.ratio * sparse.up


LAWS: list[Callable[[list[str], Key], dict[str, Any]]] = [
    lambda ids, key: laws.ratios(ids, PAPER_RATIOS, key),
    lambda ids, key: laws.normal(ids, 4, 64, key),
]


@pytest.mark.parametrize("law", LAWS, ids=["ratios", "normal"])
def test_a_clients_draw_is_its_own(law: Callable[[list[str], Key], dict[str, Any]]) -> None:
    """It depends on the seed and the id: not on the order of clients, nor on the others."""
    drawn = law(MANY, Key(3))
    assert law(MANY[::-1], Key(3)) == drawn
    assert law(MANY[7:90], Key(3)) == {id: drawn[id] for id in MANY[7:90]}
    assert law(MANY, Key(4)) != drawn


def test_ratios_are_uniform() -> None:
    counts = Counter(laws.ratios(MANY, PAPER_RATIOS, Key(0)).values())
    assert set(counts) == {0.125, 0.25, 0.5, 0.75}
    # 1000 expected each; the standard deviation is sqrt(4000 * 1/4 * 3/4) = 27.4.
    assert all(abs(count - 1000) < 5 * 27.4 for count in counts.values())


def test_the_normal_law_of_ranks() -> None:
    ranks = list(laws.normal(MANY, 4, 64, Key(0)).values())
    assert min(ranks) >= 4
    assert max(ranks) <= 64
    # Mean 34 and deviation 10; the error of a mean of 4000 is 0.16, of a deviation 0.11.
    assert abs(statistics.mean(ranks) - 34) < 0.8
    assert abs(statistics.pstdev(ranks) - 10) < 0.6
    within = sum(24 <= rank <= 44 for rank in ranks) / 4000
    assert abs(within - 0.706) < 0.04  # of a normal, within 1.05 deviations


def test_the_heavy_tailed_law_of_ranks() -> None:
    drawn = laws.heavy_tail(MANY, 1, 10**6, Key(0))
    assert laws.heavy_tail(MANY[::-1], 1, 10**6, Key(0)) == drawn
    ranks = sorted(drawn.values())
    assert (ranks[0], ranks[-1]) == (1, 10**6)
    assert ranks[2000] < 10**6 / 10  # half of the clients have less than a tenth of the strongest
    # 1 / LogNormal(., 1) has e times its median at its 84 % quantile, and 1 / e at 16 %; both are
    # seen from the smallest of 4000 draws, which is near exp(-3.4) medians.
    least = math.exp(-3.4)
    upper = (math.e - least) / (1 - least)
    assert ranks[3365] / ranks[2000] == pytest.approx(upper, rel=0.1)
    lower = (1 / math.e - least) / (1 - least)
    assert ranks[635] / ranks[2000] == pytest.approx(lower, rel=0.1)
    assert laws.heavy_tail(["one"], 4, 64, Key(0)) == {"one": 4}
    assert set(laws.heavy_tail(MANY, 4, 4, Key(0)).values()) == {4}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(ratio=2.0), "client 'b': its rank 32 is above the server's 16"),
        (Budget(ratio=0.0), "client 'b': its budget has ratio 0; it must be above 0"),
        (Budget(down=-1.0), "client 'b': its budget has down -1"),
        (Budget(up=1.5), "client 'b': its budget has up 1.5"),
        (Budget(up=math.nan), "client 'b': its budget has up nan"),
        (Budget(ratio=math.inf), "client 'b': its budget has ratio inf"),
    ],
)
def test_an_impossible_budget_is_refused_with_its_clients_id(budget: Budget, message: str) -> None:
    check({"a": Budget(0.01, 1.0, 1e-9)}, 16)
    with pytest.raises(FedSieveError, match=re.escape(message)):
        check({"a": Budget(), "b": budget}, 16)


# --- budgets from resources: the model against really encoded bytes and really held tensors

RANK, SIDE, PAIRS, OUTPUTS = 16, 256, 4, 10


def adapter(seed: int = 0) -> Adapter:
    """An adapter of normal numbers: 4 pairs of rank 16 and a head."""
    draws = torch.Generator().manual_seed(seed)
    tensors = {"m.head.weight": torch.randn(OUTPUTS, SIDE, generator=draws)}
    for number in range(PAIRS):
        tensors[f"m.{number}.lora_A.weight"] = torch.randn(RANK, SIDE, generator=draws)
        tensors[f"m.{number}.lora_B.weight"] = torch.randn(SIDE, RANK, generator=draws)
    return Adapter(layout_of(tensors, 1.0), dict(sorted(tensors.items())))


def work(form: Form = "float32", **changes: Any) -> Work:
    """The same adapter in the model's numbers."""
    counts = {"rank": RANK, "per_rank": PAIRS * 2 * SIDE, "head": OUTPUTS * SIDE, "steps": 3}
    return Work(**{**counts, "down_values": form, "up_values": form, **changes})


def really(method: Method, budget: Budget) -> tuple[int, int, Tree]:
    """The lengths of a client's two messages, and the tensors that it trains."""
    start = adapter()
    client, key = Client("0", 1, budget), Key(0, 1, "0")
    payload = method.publish(method.plan(method.init(start), key), client, key)
    context = ClientContext(client, start, key)
    view, memory = method.view(payload, {}, context)
    draws = torch.Generator().manual_seed(1)
    tensors = view.adapter.tensors
    trained = {n: t + torch.randn(t.shape, generator=draws) for n, t in tensors.items()}
    report, _ = method.report(view, trained, memory, context)
    return len(encode(payload)), len(encode(report)), tensors


FORMS: list[Form] = ["float64", "float32", "bfloat16", "int8"]
METHODS: list[Any] = [flasc.method, fslora.method, fslora_flasc.method]
LINKS = [Link(20.0, 20.0), Link(4.0, 0.5, 0.05), Link(0.5, 4.0)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", METHODS, ids=["flasc", "fslora", "fslora_flasc"])
def test_a_chosen_budget_makes_the_deadline_in_really_encoded_bytes(build: Any, form: Form) -> None:
    method = build(down_values=form, up_values=form)
    whole = message_bytes(work(form), "down", RANK, 1.0)
    smaller = 0
    for link in LINKS:
        for share in (0.2, 0.4, 0.8, 3.0):
            # `share` of the time that whole messages would take, after training and latency.
            messages = share * 8 * whole / 1e6 * (1 / link.downlink + 1 / link.uplink)
            deadline = 2 * link.latency + 3 * 0.2 + messages
            has = Resources(memory=1.0, link=link, step_seconds=0.2)
            if build is flasc.method:
                has = has._replace(memory=10.0)  # it trains every rank, whatever the budget says
            budget = choose("0", has, work(form), deadline, knobs=method.knobs)
            down, up, _ = really(method, budget)
            kept = budget.ranks(RANK)
            assert down == pytest.approx(message_bytes(work(form), "down", kept, budget.down), 0.04)
            assert up == pytest.approx(message_bytes(work(form), "up", kept, budget.up), 0.04)
            assert client_time(link, down, up, 3 * 0.2) <= 1.03 * deadline
            smaller += budget != Budget()
    assert smaller >= 6


@pytest.mark.parametrize("head", ["sieved", "whole"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("density", [1.0, 2**-0.25, 0.5, 0.125, 1 / 32])
def test_modelled_messages_are_as_long_as_real_ones(form: Form, density: float, head: Any) -> None:
    method = fslora_flasc.method(down_values=form, up_values=form, head=head)
    given = work(form, sieved_head=head == "sieved")
    for kept in (4, 16):
        down, up, _ = really(method, Budget(kept / RANK, density, density))
        assert message_bytes(given, "down", kept, density) == pytest.approx(down, 0.04)
        assert message_bytes(given, "up", kept, density) == pytest.approx(up, 0.04)


@pytest.mark.parametrize(
    ("moments", "make"),
    [
        (0, lambda p: torch.optim.SGD(p, lr=0.1)),
        (1, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (2, lambda p: torch.optim.AdamW(p, lr=0.1)),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_modelled_memory_is_that_of_the_tensors_held(moments: int, make: Any) -> None:
    for kept in (1, 5, 16):
        _, _, start = really(fslora.method(), Budget(kept / RANK))
        trained = [torch.nn.Parameter(t.clone()) for t in start.values()]
        optimizer = make(trained)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = [*start.values(), *trained, *(p.grad for p in trained if p.grad is not None)]
        held += [v for slots in optimizer.state.values() for v in slots.values() if v is not None]
        size = sum(t.numel() * t.element_size() for t in held)
        assert memory_bytes(work(moments=moments), kept) == pytest.approx(size, rel=0.002)


@pytest.mark.parametrize("form", FORMS)
def test_a_denser_message_of_more_ranks_is_longer(form: Form) -> None:
    """What the choice relies on: each step of the ladder, and each rank, costs something."""
    for kept in (1, 7, 64):
        big = work(form, rank=64)
        costs = [message_bytes(big, "up", kept, density) for density in LADDER]
        assert costs == sorted(costs, reverse=True)
        assert len(set(costs)) == len(costs)
        if kept > 1:
            fewer = [message_bytes(big, "up", kept - 1, density) for density in LADDER]
            assert all(a < b for a, b in zip(fewer, costs, strict=True))


resources = st.builds(
    Resources,
    memory=st.floats(0.02, 3),
    link=st.builds(Link, st.floats(0.05, 50), st.floats(0.05, 50), st.floats(0, 0.3)),
    step_seconds=st.floats(0, 0.5),
)
knobs = st.sets(st.sampled_from(["ratio", "down", "up"]))


def chosen(has: Resources, given: Work, deadline: float, knobs: set[str]) -> Budget | None:
    try:
        return choose("7", has, given, deadline, knobs=knobs)
    except FedSieveError as error:
        if "client '7': not even the smallest budget fits" not in str(error):
            raise
        return None


@settings(max_examples=300)
@given(resources, st.floats(0.1, 20), st.sampled_from(FORMS), knobs)
def test_a_chosen_budget_fits_and_refusals_are_right(
    has: Resources, deadline: float, form: Form, knobs: set[str]
) -> None:
    given = work(form)
    budget = chosen(has, given, deadline, knobs)
    lowest = Budget(*(1.0 if k not in knobs else 1 / 16 if k == "ratio" else 1 / 64
                      for k in ("ratio", "down", "up")))  # fmt: skip
    if budget is None:
        short = memory_bytes(given, lowest.ranks(RANK)) > has.memory * 1e6
        assert short or round_seconds(given, has, lowest) > deadline
        return
    assert memory_bytes(given, budget.ranks(RANK)) <= has.memory * 1e6
    assert round_seconds(given, has, budget) <= deadline * (1 + 1e-12)
    for knob, value in budget._asdict().items():
        assert value == 1 or knob in knobs
    # No rank more would fit at any density, nor a step more of both densities at this rank.
    kept = budget.ranks(RANK)
    if "ratio" in knobs and kept < RANK:
        more = lowest._replace(ratio=(kept + 1) / RANK)
        short = memory_bytes(given, kept + 1) > has.memory * 1e6
        assert short or round_seconds(given, has, more) > deadline
    denser = budget._replace(down=min(1.0, budget.down * 2**0.25), up=min(1.0, budget.up * 2**0.25))
    assert denser == budget or round_seconds(given, has, denser) > deadline * (1 - 1e-12)


@settings(max_examples=300)
@given(
    resources,
    st.lists(st.floats(1, 4) | st.just(1.0), min_size=6, max_size=6),
    st.floats(0.1, 20),
    st.sampled_from(FORMS),
    knobs,
)
def test_larger_resources_never_give_a_smaller_budget(
    has: Resources, factors: list[float], deadline: float, form: Form, knobs: set[str]
) -> None:
    memory, down, up, latency, step, time = factors
    link = Link(has.link.downlink * down, has.link.uplink * up, has.link.latency / latency)
    more = Resources(has.memory * memory, link, has.step_seconds / step)
    small = chosen(has, work(form), deadline, knobs)
    large = chosen(more, work(form), deadline * time, knobs)
    if small is None:
        return
    assert large is not None
    assert large.ratio >= small.ratio
    if large.ratio == small.ratio:
        assert large.down >= small.down
        assert large.up >= small.up


def test_a_slow_uplink_gets_a_sparse_upload() -> None:
    """FLASC, Figure 3: with an uplink of 1/16, the upload is about 16 times sparser."""
    whole = 8 * message_bytes(work(), "down", RANK, 1.0) / 1e6
    has = Resources(10.0, Link(16.0, 1.0), 0.0)
    budget = choose("0", has, work(), deadline=2 * whole / 16 / 4)
    assert budget.ratio == 1
    assert budget.up < budget.down / 8


# --- recipes


def tables() -> list[tuple[dict[str, Any], Callable[[dict[str, Budget]], bool]]]:
    machine = {"memory": 100.0, "downlink": 50.0, "uplink": 50.0, "step_seconds": 0.0}
    weak = {**machine, "memory": 0.006, "uplink": 0.05}
    ids = [f"{number:04d}" for number in range(12)]
    listed: dict[str, Any] = {id: {"rank": 1 + number % 4} for number, id in enumerate(ids)}
    ranks = [1 + number % 4 for number in range(12)]

    def are(budgets: dict[str, Budget]) -> list[int]:
        return [budgets[id].ranks(4) for id in ids]

    return [
        ({"kind": "list", "clients": listed}, lambda b: are(b) == ranks),
        ({"kind": "list", "clients": list(listed.values())}, lambda b: are(b) == ranks),
        (
            {"kind": "tiers", "tiers": 2},
            lambda b: Counter(b.values()) == {Budget(0.25): 6, Budget(): 6},
        ),
        (
            {"kind": "tiers", "tiers": 2, "by": "density"},
            lambda b: Counter(b.values()) == {Budget(1, 0.25, 0.25): 6, Budget(): 6},
        ),
        ({"kind": "ratios"}, lambda b: {x.ratio for x in b.values()} <= {0.125, 0.25, 0.5, 0.75}),
        (
            {"kind": "normal", "low": 2, "high": 4, "up": 0.5},
            lambda b: set(are(b)) <= {2, 3, 4} and {x.up for x in b.values()} == {0.5},
        ),
        (
            {"kind": "heavy-tail", "low": 1, "high": 4},
            lambda b: min(are(b)) == 1 and max(are(b)) == 4,
        ),
        (
            {"kind": "resources", "deadline": 5.0, "tiers": [machine, {**weak, "share": 2}]},
            lambda b: Counter(are(b))[4] == 4 and len(set(are(b))) == 2,
        ),
        (
            {
                "kind": "resources",
                "deadline": 5.0,
                "clients": {id: weak if id == "0003" else machine for id in ids},
            },
            lambda b: [id for id in ids if b[id] != Budget()] == ["0003"],
        ),
    ]


@pytest.mark.parametrize(("table", "law"), tables(), ids=lambda each: str(each)[:40])
def test_every_kind_of_budgets_in_a_recipe(
    tiny: Tiny, table: dict[str, Any], law: Callable[[dict[str, Budget]], bool]
) -> None:
    # Equal parts, so that no client is without data and left out.
    partition = {"kind": "iid", "clients": 12}
    recipe = recipes.check(tiny.table(budgets=table, partition=partition))
    federation = from_recipe(recipe).federation
    assert law({client.id: client.budget for client in federation.clients})
    assert all((c.link is not None) == (table["kind"] == "resources") for c in federation.clients)


def test_tiers_differ_in_what_the_method_uses(tiny: Tiny) -> None:
    table = tiny.table(budgets={"kind": "tiers", "tiers": 2}, method={"name": "flasc"})
    clients = from_recipe(recipes.check(table)).federation.clients
    assert {client.budget for client in clients} == {Budget(1, 0.25, 0.25), Budget()}


LISTED = {f"{number:04d}": {"rank": 2} for number in range(12)}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"budgets": {"kind": "list", "clients": {**LISTED, "0003": {"rank": 5}}}},
        "client '0003': its rank 5 is above the server's 4",
    ),
    (
        {"budgets": {"kind": "list", "clients": [{}, {"rank": 5}]}},
        "client '0001': its rank 5 is above the server's 4",
    ),
    (
        {"budgets": {"kind": "list", "clients": {"a": {"rank": 1, "ratio": 0.5}}}},
        "budgets.clients.a: give ratio or rank, not both",
    ),
    (
        {"budgets": {"kind": "list", "clients": {"a": {"rnk": 1}}}},
        "budgets.clients.a.rnk: unknown key (did you mean 'rank'",
    ),
    (
        {"budgets": {"kind": "list", "clients": [{"rnk": 1}]}},
        "budgets.clients.0.rnk: unknown key (did you mean 'rank'",
    ),
    ({"budgets": {"kind": "ratio"}}, "budgets: a list of tiers is needed, or a table whose kind"),
    ({"budgets": {}}, "budgets: a list of tiers is needed, or a table whose kind is 'list'"),
    ({"budgets": {"kind": "tiers"}}, "budgets.tiers: this key is needed"),
    (
        {"budgets": {"kind": "normal", "low": 1, "hihg": 3}},
        "budgets.hihg: unknown key (did you mean 'high'",
    ),
    ({"budgets": {"kind": "normal", "low": 3, "high": 2}}, "budgets: low is 3, above high"),
    (
        {"budgets": {"kind": "heavy-tail", "low": 1, "high": 9}},
        "budgets.high: clients of rank 9 are above the server's 4",
    ),
    ({"budgets": {"kind": "ratios", "ratios": []}}, "budgets.ratios: "),
    ({"budgets": {"kind": "resources", "deadline": 9}}, "one of the two"),
    (
        {"budgets": {"kind": "resources", "deadline": 9, "clients": {"a": {"memry": 1}}}},
        "budgets.clients.a.memry: unknown key (did you mean 'memory'",
    ),
    (
        {"method": {"name": "fedit"}, "budgets": {"kind": "ratios"}},
        "budgets.ratio: the method 'fedit' makes no use of it",
    ),
    (
        {"method": {"name": "flasc"}, "budgets": {"kind": "list", "clients": {"a": {"rank": 4}}}},
        "budgets.ratio: the method 'flasc' makes no use of it",
    ),
    (
        {"method": {"name": "fedit"}, "budgets": {"kind": "tiers", "tiers": 3}},
        "budgets.down: the method 'fedit' makes no use of it",
    ),
    (
        {"method": {"name": "fslora"}, "budgets": {"kind": "ratios", "up": 0.5}},
        "budgets.up: the method 'fslora' makes no use of it",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[each[1][:50] for each in WRONG])
def test_wrong_budgets_are_refused_before_any_data_are_read(
    tiny: Tiny, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedSieveError, match=re.escape(message)):
        recipes.check(tiny.table(**changes))


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"kind": "list", "clients": [{}] * 11}, "budgets.clients: none for client '0011'"),
        (
            {"kind": "list", "clients": {**LISTED, "x": {}}},
            "budgets.clients: there is no client 'x'",
        ),
        (
            {
                "kind": "resources",
                "deadline": 9.0,
                "tiers": [{"memory": 1e-4, "downlink": 1, "uplink": 1, "step_seconds": 0}],
            },
            "client '0000': not even the smallest budget fits: rank 1 with densities",
        ),
    ],
)
def test_budgets_that_do_not_fit_the_clients(
    tiny: Tiny, budgets: dict[str, Any], message: str
) -> None:
    partition = {"kind": "iid", "clients": 12}
    recipe = recipes.check(tiny.table(budgets=budgets, partition=partition))
    with pytest.raises(FedSieveError, match=re.escape(message)):
        from_recipe(recipe)


def test_a_recipe_with_budgets_of_any_kind_is_written_down_whole(tiny: Tiny) -> None:
    for table, _ in tables():
        given = recipes.check(tiny.table(budgets=table))
        again = tomllib.loads(recipes.dump(given, {}))
        del again["environment"]
        assert recipes.check(again) == given
