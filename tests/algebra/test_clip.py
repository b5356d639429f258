"""How far one update can move the adapter: the clip without privacy, and numbers too large to add.

A clip bounds what one client of n can do to clip / n, changes nothing of the updates that are below
it, and the receipt tells the norm that it was compared with. Numbers that the adapter's own type
cannot hold never reach it, clip or not.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.optim import Optimizer, adam, bounded, fading, fedadam, sgd
from fedsieve.algebra.payload import Form, Payload, Values
from fedsieve.algebra.support import everything
from fedsieve.engine.client import Reply
from fedsieve.engine.loop import Exchange, Federation, Receipt, begin, rounds
from fedsieve.errors import FedSieveError, NoUsableUpdate
from fedsieve.methods import fedit, ffa_lora, flasc, fslora, fslora_flasc
from fedsieve.recipe import read as recipes
from fedsieve.wire import decode, encode
from fedsieve.wire.format import DTYPES
from tests import runs, toy
from tests.clients.test_privacy import flat, payloads
from tests.conftest import Tiny

Carry = Callable[[Iterable[tuple[Client, bytes]], Key], Iterator[Reply]]
KEY = Key(7, 1)
KNOWN: Any = ("known", "known")  # how the receiver learns ranks and masks
BUDGETS = [Budget(0.25, 0.5, 0.25), Budget(0.5, 1.0, 0.5), Budget()]
EXACT: Any = {"down_values": "float64", "up_values": "float64"}
METHODS: dict[str, Any] = {
    "fedit": fedit.method,
    "fslora": fslora.method,
    "flasc": flasc.method,
    "fslora_flasc": fslora_flasc.method,
    "ffa_lora": ffa_lora.method,
}
SERVERS: dict[str, Callable[[], Optimizer]] = {
    "sgd": sgd,
    "adam": lambda: adam(0.02),
    "fedadam": lambda: fading(fedadam(), 0.9),
}


def members(build: Any) -> list[Client]:
    knobs = build().knobs
    kept = [b._replace(**{k: 1.0 for k in Budget._fields if k not in knobs}) for b in BUDGETS]
    return toy.clients(kept)


def bare(receipt: Receipt) -> Receipt:
    return receipt._replace(seconds=0, compute=0, wire=0, norm=None)


# The clip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [float("inf"), 1e6], ids=["infinite", "far above"])
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_clip_that_nothing_reaches_changes_no_bit(name: str, server: str, clip: float) -> None:
    build, make = METHODS[name], SERVERS[server]
    clients = members(build)
    plain, receipts, before = toy.after(build(server=make(), **EXACT), clients, 3)
    found, ours, after = toy.after(build(server=bounded(make(), clip), **EXACT), clients, 3)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[n], plain[n]) for n in plain)
    for group, tree in before.state.trees.items():
        assert all(torch.equal(after.state.trees[group][n], t) for n, t in tree.items())
    assert [bare(r) for r in ours] == [bare(r) for r in receipts]
    assert all(r.norm is None for r in receipts)
    assert all((r.norm is None) == (clip == float("inf")) for r in ours)


@settings(max_examples=150)
@given(payloads(), st.floats(1e-6, 1e3), st.integers(1, 5))
def test_one_client_of_n_moves_the_adapter_by_at_most_a_share(
    payload: Payload, clip: float, n: int
) -> None:
    """Against a client in its place that says: no change."""
    method = fedit.method(server=bounded(sgd(), clip), **EXACT)
    state = method.init(toy.start())
    nothing = payload._replace(values=_scaled(payload.values, 0.0))
    ones = torch.full((payload.layout.size,), clip, dtype=torch.float64)
    support = everything(payload.layout)
    other = Payload(payload.layout, support, Values("float64", ones, torch.empty(0)), *KNOWN)

    def after(given: Payload) -> torch.Tensor:
        updates = [(Client(f"{i}", 1), other) for i in range(n - 1)]
        merged = method.merge(state, iter([*updates, (Client("9", 1), given)]), KEY)
        return flat(merged.trees["adapter"])

    moved = float((after(payload) - after(nothing)).norm())
    assert moved <= clip / n + 1e-6 * clip + 1e-13
    told = float(flat(payload.tree()).norm())
    if told > 2 * clip:  # and no more is taken away than must be
        assert moved >= clip / n - 1e-6 * clip - 1e-13


def _scaled(values: Values, factor: float) -> Values:
    if values.form == "int8":
        return values._replace(scales=values.scales * factor)
    return values._replace(data=values.data * factor)


@settings(max_examples=50)
@given(payloads(), st.floats(1.0, 1e3))
def test_an_update_below_the_clip_is_untouched_bit_for_bit(payload: Payload, room: float) -> None:
    size = float(flat(payload.tree()).norm())
    if not 0 < size < 1e30:
        return
    merged = [
        fedit.method(server=server, **EXACT).merge(
            fedit.method(**EXACT).init(toy.start()), iter([(Client("0", 1), payload)]), KEY
        )
        for server in (sgd(), bounded(sgd(), size * room * (1 + 1e-12)))
    ]
    one, two = (each.trees["adapter"] for each in merged)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("form", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("build", [flasc.method, fslora_flasc.method], ids=["flasc", "both"])
def test_the_receipt_tells_the_norm_of_what_came(build: Any, form: str) -> None:
    """By numpy from the encoded update: its decoded numbers, in whatever form they travelled."""
    method = build(server=bounded(sgd(), 0.05), down_values="float64", up_values=form)
    clients = members(build)
    setup = toy.federation(method, clients)
    came: list[float] = []

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        sent: dict[str, bytes] = {}

        def noted() -> Iterator[tuple[Client, bytes]]:
            for client, message in messages:
                sent[client.id] = message
                yield client, message

        for reply in setup.exchange.carry(noted(), key):
            layout = toy.start().layout
            known = decode(sent[reply.client.id], layout).support
            assert reply.update is not None
            values = decode(reply.update, layout, known).values
            numbers = values.data.double().numpy()
            if form == "int8":
                numbers = numbers * np.repeat(values.scales.double().numpy(), 128)[: numbers.size]
            came.append(float(np.sqrt(np.sum(numbers**2))))
            yield reply

    told = [r.norm for r in after(setup, carry, 2)]
    assert told == pytest.approx(came, rel=1e-6)
    assert min(came) < 0.05 * 0.9 or max(came) > 0.05 * 1.1  # not by chance all at the clip
    assert len(told) == 6


def after(
    setup: Federation, carry: Carry, number: int, begun: Adapter | None = None
) -> list[Receipt]:
    """The receipts of some rounds over another exchange."""
    setup = Federation(
        setup.method, setup.clients, setup.sampling, setup.seed, Exchange(carry, lambda ids: None)
    )
    _, progress = begin(setup, begun or toy.start())
    return [r for _, part, _ in rounds(setup, progress, number) for r in part]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_private_runs_tell_no_norms(tiny: Tiny, tmp_path: Path) -> None:
    """They have a clip of their own; how large a client's update was is its secret."""
    privacy = {"clip": 0.1, "delta": 1e-3, "noise_multiplier": 1.0}
    runs.start(tiny, tmp_path, privacy=privacy, rounds=1)
    assert [line.get("norm") for line in runs.lines(tmp_path, "clients.jsonl")] == [None] * 3


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"clip": 0}, "server.clip: Input should be greater than 0"),
    ({"clip": -1.0}, "server.clip: Input should be greater than 0"),
    ({"clip": float("nan")}, "server.clip: "),
    ({"clip": "tight"}, "server.clip: "),
]


@pytest.mark.parametrize(("server", "message"), WRONG, ids=[w[1] + str(w[0]) for w in WRONG])
def test_values_that_are_no_clip(tiny: Tiny, server: dict[str, Any], message: str) -> None:
    with pytest.raises(FedSieveError, match=re.escape(message)):
        recipes.check(tiny.table(server=server))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {"clip": 1.0, "delta": 1e-3, "epsilon": 5.0}}, "[privacy] has its own clip"),
        ({"method": {"name": "flexlora"}, "budgets": [{}]}, "'flexlora' does not move by a mean"),
        ({"method": {"name": "hetlora"}, "budgets": [{}]}, "'hetlora' does not move by a mean"),
        (
            {"method": {"name": "fslora_flasc", "weighting": "examples"}},
            "method.weighting: with server.clip it must be 'uniform'",
        ),
    ],
    ids=["privacy", "flexlora", "hetlora", "examples"],
)
def test_where_a_clip_would_bound_nothing_it_is_refused(
    tiny: Tiny, changes: dict[str, Any], message: str
) -> None:
    clip = {"optimizer": "sgd", "clip": 1.0}
    with pytest.raises(FedSieveError, match=re.escape(message)) as raised:
        recipes.check(tiny.table(server=clip, **changes))
    assert "server.clip" in str(raised.value)
    recipes.check(tiny.table(server={"optimizer": "sgd"}, **changes))


def test_a_recipe_with_a_clip(tiny: Tiny, tmp_path: Path) -> None:
    """Norms are logged, and a clip below them makes another run."""
    folders = {clip: tmp_path / str(clip) for clip in (None, 1e9, 0.01)}
    for clip, folder in folders.items():
        bound = {"norm_bound": "none"} if clip is None else {"clip": clip}
        server = {"optimizer": "sgd", **bound}
        runs.start(tiny, folder, server=server, rounds=2)
    plain, logged, tight = (runs.lines(folder, "clients.jsonl") for folder in folders.values())
    assert not any("norm" in line for line in plain)
    assert all(line["norm"] > 0.01 for line in [*logged, *tight])
    one, two, three = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in folders.values()
    )
    assert one == two
    assert one != three


# Numbers too large ------------------------------------------------------------------------------

single = {name: tensor.float() for name, tensor in toy.start().tensors.items()}
START = Adapter(toy.start().layout, single)


def said(number: float, form: Form = "float64") -> bytes:
    """An update whose numbers are all the same; each is finite as it travels."""
    data = torch.full((START.layout.size,), number, dtype=DTYPES[form])
    values = Values(form, data, torch.empty(0))
    return encode(Payload(START.layout, everything(START.layout), values, *KNOWN))


def saying(updates: dict[str, bytes]) -> Carry:
    """An exchange in which nobody trains."""

    def carry(messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        for client, _ in messages:
            yield Reply(client, updates[client.id], None, 1.0, 1, 0.0, 0.0, 0.0, 0)

    return carry


def federation(server: Optimizer) -> Federation:
    """Any number that a float64 holds can travel."""
    method = fedit.method(server=server, up_values="float64")
    return toy.federation(method, toy.clients([Budget()] * 3), adapter=START)


@pytest.mark.parametrize("server", [sgd(), bounded(sgd(), 1.0)], ids=["no clip", "clip"])
@pytest.mark.parametrize("size", [1e300, -1e39, 3e38, 1e15])
def test_numbers_that_no_merge_can_use_are_refused(size: float, server: Optimizer) -> None:
    updates = {"0000": said(0.1), "0001": said(size), "0002": said(-0.2)}
    receipts = after(federation(server), saying(updates), 2, START)
    bad = [r.dropped for r in receipts if r.client == "0001"]
    why = "it holds numbers beyond 4.3e+09, which no merge can use"
    assert bad == [f"its update was refused: {why}"] * 2
    assert [r.dropped for r in receipts if r.client != "0001"] == [None] * 4


def test_a_state_that_is_not_finite_stops_the_run() -> None:
    """Each update can be held, the server's step cannot."""
    updates = {f"{i:04d}": said(4e9) for i in range(3)}
    with pytest.raises(NoUsableUpdate, match=r"not finite.*server\.lr.*server\.clip"):
        after(federation(sgd(1e35)), saying(updates), 1, START)
    receipts = after(federation(bounded(sgd(1e35), 1.0)), saying(updates), 1, START)
    assert [r.dropped for r in receipts] == [None] * 3
    assert receipts[0].norm == pytest.approx(4e9 * START.layout.size**0.5, rel=1e-6)
