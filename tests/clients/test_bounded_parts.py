"""One law over all methods and all their options: where updates are clipped, either the method is
refused, or no client, whatever it sends, moves the server's state by more than its clip's share.

The state is looked at before the noise. The optimizer here keeps the mean that it is given and
moves nothing, so whatever else of the state a client changes is seen as well: noise is on the mean
alone.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from datasets import Dataset

import fedsieve
from fedsieve import FedSieveError, methods
from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory, Method, State, compose
from fedsieve.algebra.optim import Optimizer, Slots, adam, bounded, fading, sgd
from fedsieve.algebra.payload import Form, Payload
from fedsieve.algebra.sieve import dense
from fedsieve.clients.noise import private
from fedsieve.settings import Lora, Sampling
from tests import toy
from tests.conftest import Tiny, texts

CLIP, EXPECTED = 0.01, 3.0
BUDGETS = [Budget(0.25, 0.5, 0.25), Budget(0.5, 1.0, 0.5), Budget()]
Gradients = list[Tree]
Options = Mapping[str, Any]


def spy(seen: Gradients) -> Optimizer:
    """An optimizer that moves nothing and keeps what it was to move by."""

    def step(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
        seen.append(gradient)
        return params, slots

    return Optimizer(lambda params: {}, step)


def clipping(seen: Gradients) -> Optimizer:
    return private(spy(seen), clip=CLIP, noise_multiplier=0.0, expected=EXPECTED, key=Key(0))


def values_of(hint: Any) -> list[Any]:
    """Some values of an option, all of them where there are few."""
    if get_origin(hint) is Annotated:
        return values_of(get_args(hint)[0])
    if hint == Form:
        return ["float32", "int8"]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if hint is bool:
        return [False, True]
    if hint is int:
        return [1, 2]
    if hint is float:
        return [0.25, 0.5]
    parts = [part for part in get_args(hint) if part is not type(None)]
    assert parts, f"an option of a type that this test does not know: {hint}"
    return [value for part in parts for value in values_of(part)]


def options_of(build: Any) -> list[Options]:
    """Every value of every option, beside the defaults and beside each value of each other one."""
    hints = get_type_hints(build, include_extras=True)
    names = [n for n in inspect.signature(build).parameters if n != "server"]
    given = {name: values_of(hints[name]) for name in names}
    found: list[Options] = [{}]
    for one, two in itertools.combinations(names, 2):
        found += [{one: a, two: b} for a in given[one] for b in given[two]]
    return found


def sent(method: Method, state: State, memories: dict[str, Memory], number: int) -> Iterator[Any]:
    """What three clients return in a round, after a training that moved them far."""
    unused = dict.fromkeys({*Budget._fields} - method.knobs, 1.0)
    for client in toy.clients([budget._replace(**unused) for budget in BUDGETS]):
        client = client._replace(examples=1000 * client.examples)
        key = Key(7, number, client.id)
        context = toy.context(client, key, method.trains)
        payload = method.publish(method.plan(state, key), client, key)
        view, memory = method.view(payload, memories.get(client.id, {}), context)
        draws = torch.Generator().manual_seed(number + int(client.id))
        trained = {
            n: t
            + 1e4 * torch.randn(t.shape, generator=draws, dtype=t.dtype) * (n in view.moves.names)
            for n, t in view.adapter.tensors.items()
        }
        update, memories[client.id] = method.report(view, trained, memory, context)
        yield client, update


def assert_bounded(method: Method, seen: Gradients) -> None:
    state, memories = method.init(toy.start(trains=method.trains)), dict[str, Memory]()
    for number in (1, 2):
        updates = list(sent(method, state, memories, number))
        there, with_all = merged(method, state, updates, number, seen)
        for left_out in range(len(updates)):
            others = [u for i, u in enumerate(updates) if i != left_out]
            away, without = merged(method, state, others, number, seen)
            assert with_all.keys() == without.keys()
            moved = torch.cat([(with_all[n] - without[n]).double().flatten() for n in with_all])
            assert float(moved.norm()) <= CLIP / EXPECTED * (1 + 1e-6)
            for group in {*there.trees, *away.trees}:
                one, two = there.trees[group], away.trees[group]
                assert one.keys() == two.keys(), group
                assert all(torch.equal(one[n], two[n]) for n in one), group
        state = there


def merged(
    method: Method,
    state: State,
    updates: list[tuple[Client, Payload]],
    number: int,
    seen: Gradients,
) -> tuple[State, Tree]:
    seen.clear()
    after = method.merge(state, iter(updates), Key(7, number))
    (gradient,) = seen
    return after, gradient


@pytest.mark.parametrize("name", methods.names())
def test_refused_or_one_client_moves_the_state_by_its_share(name: str) -> None:
    build = methods.load(name)
    kept = 0
    for options in options_of(build):
        seen: Gradients = []
        try:
            method = build(server=clipping(seen), **options)
        except FedSieveError:
            with pytest.raises(FedSieveError):  # a clip without noise would bound as little
                build(server=bounded(sgd(), CLIP), **options)
            continue
        kept += 1
        assert_bounded(method, seen)
        assert method.private == "seed"
    replaced = {
        "hetlora",
        "flexlora",
        "raflora",
        "flora",
        "florist",
        "fedex_lora",
        "lora_fair",
        "fed_plora",
        "scaffold",
    }
    assert bool(kept) == (name not in replaced)


def uneven(part: Tree, layout: Any) -> float:
    return 200.0


@pytest.mark.parametrize("returns", ["change", "values"])
@pytest.mark.parametrize("weighting", ["uniform", "examples", uneven])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_method_of_ones_own_as_well(returns: Any, weighting: Any, feedback: bool) -> None:
    seen: Gradients = []
    given: Any = {"returns": returns, "weighting": weighting, "feedback": feedback}
    if returns == "change" and weighting == "uniform":
        assert_bounded(compose(down=dense, up=dense, server=clipping(seen), **given), seen)
        return
    with pytest.raises(FedSieveError, match=r"weighting: with|does not move by a mean"):
        compose(down=dense, up=dense, server=clipping(seen), **given)


def test_what_was_wrong_and_what_to_do_is_said() -> None:
    server = private(sgd(), clip=1.0, noise_multiplier=1.0, expected=3, key=Key(0))
    with pytest.raises(FedSieveError, match=r"weighting: with .*private.* it must be 'uniform'"):
        fedsieve.fslora(server=server, weighting="examples")
    with pytest.raises(FedSieveError, match=r"server: .*bounds nothing: choose a method that"):
        fedsieve.flora(server=fading(server, 0.9))


def test_one_clip_and_no_more() -> None:
    """Of two clips the outer one counts: behind a wider one the noise would be too small."""
    noisy = private(adam(), clip=0.1, noise_multiplier=1.0, expected=3, key=Key(0))
    builds: list[Callable[[], Optimizer]] = [
        lambda: bounded(noisy, 100.0),
        lambda: bounded(fading(noisy, 0.5), 100.0),
        lambda: bounded(bounded(sgd(), 1.0), 100.0),
        lambda: private(bounded(sgd(), 1.0), clip=0.1, noise_multiplier=1, expected=3, key=Key(0)),
    ]
    for build in builds:
        with pytest.raises(FedSieveError, match="leave"):
            build()


# How clients are drawn --------------------------------------------------------------------------

DRAWN: list[tuple[Any, dict[str, Any], str | None]] = [
    (Sampling("poisson", 2), {}, None),
    (Sampling("uniform", 2), {}, None),
    (Sampling("all"), {}, None),
    (None, {}, None),
    (None, {"feedback": True}, None),
    (Sampling("all"), {"feedback": True}, None),
    (Sampling("poisson", 2), {"feedback": True}, None),
    (2, {"feedback": True}, "sampling.kind: "),
    (Sampling("uniform", 2), {"feedback": True}, "sampling.kind: "),
    (Sampling("poisson", 2, availability=0.5), {}, "sampling.availability: "),
    (Sampling("all", availability={"0000": 0.5}), {}, "sampling.availability: "),
    (Sampling("uniform", 2, quorum=1), {}, "sampling.quorum: "),
    (Sampling("uniform", 2, extra=1), {}, "sampling.extra: "),
]


@pytest.mark.parametrize(("cohort", "options", "message"), DRAWN)
def test_a_notebook_is_refused_what_a_recipe_is(
    tiny: Tiny, cohort: Any, options: dict[str, Any], message: str | None
) -> None:
    text, label = zip(*texts(12, 1), strict=True)
    rows = Dataset.from_dict({"text": text, "label": label})
    server = private(sgd(), clip=1.0, noise_multiplier=1.0, expected=2, key=Key(0))

    def begin(server: Optimizer) -> None:
        fedsieve.finetune(
            str(tiny.bert),
            [rows] * 3,
            fedsieve.flasc(server=server, **options),
            rounds=1,
            cohort=cohort,
            lora=Lora(rank=4, targets=("query", "value")),
            device="cpu",
        )

    if message is None:
        begin(server)
        return
    with pytest.raises(FedSieveError, match=message):
        begin(server)
    if "extra" not in message:
        begin(sgd())


def test_fedsa_lora_keeps_its_b() -> None:
    assert fedsieve.methods.load("fedsa_lora")().keeps
    assert not fedsieve.methods.load("fedit")().keeps
