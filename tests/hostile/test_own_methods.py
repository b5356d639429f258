"""A method of the user's own that fails, wherever it does, is told by its name, with the function,
the round, the client and the line.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, update_wrapper, wraps
from pathlib import Path
from typing import Any, cast

import pytest
import tomli_w
import torch
from torch import Tensor

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.blame import blaming, guarded, trained
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.intact import changed, versions
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State, compose
from fedsieve.algebra.optim import Optimizer, adam, fading, sgd
from fedsieve.algebra.payload import Base
from fedsieve.algebra.sieve import Passed, Sieve, dense, leading, sketch, top_ranks, within
from fedsieve.algebra.support import Support, top_k
from fedsieve.clients.noise import private
from fedsieve.errors import ChangedInPlace, FedSieveError, MethodFailed, OptimizerFailed
from fedsieve.recipe import read as recipes
from fedsieve.run import runner
from tests import kinds, runs, toy
from tests.conftest import Command, Tiny
from tests.methods.test_laws import EXACT

ROUND = {"plan": "(round 1)", "merge": "(round 1)", "init": "", "export": "", "clip": ""}
CLIENT = "(round 1, client '000"
PARTS = ("init", "plan", "publish", "view", "report", "merge", "export", "clip", "misfit")


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*given: Any) -> Any:
        raise error

    return function


REASONS: dict[str, Callable[..., Any]] = {
    "KeyError: 'adaptor'": raising(KeyError("adaptor")),
    "SystemExit: 0": raising(SystemExit(0)),
    "OSError: [Errno 28] No space left on device": raising(OSError(28, "No space left on device")),
    "it gives None": lambda *given: None,
    "it gives one set": lambda *given: {5},
}


def run(method: Method) -> Tree:
    """Two rounds of it on the toy."""
    return toy.after(method, toy.clients([Budget(), Budget()]), 2)[0]


PLAIN: dict[str, Any] = {"down": dense, "up": dense}
PLAIN |= {"down_values": "float64", "up_values": "float64"}


def mine_with(server: Optimizer) -> Method:
    return compose(**PLAIN, server=server)


def mine() -> Method:
    return mine_with(sgd())


def with_part(part: str, function: Any) -> Method:
    changed: dict[str, Any] = {part: function}
    return mine()._replace(**changed)


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("part", PARTS)
def test_a_function_that_fails_is_told_by_its_name(part: str, reason: str) -> None:
    if (part, reason) == ("misfit", "it gives None"):
        pytest.skip("an update that fits is told so")
    if part == "merge" and "OSError" in reason:
        pytest.skip("the disk is ours, too: it is told as one")
    with pytest.raises(FedSieveError) as caught:
        run(blaming("mine.own", with_part(part, REASONS[reason])))
    said = str(caught.value)
    assert f"method 'mine.own': its {part}" in said
    assert reason in said
    assert ROUND.get(part, CLIENT) in said
    if "gives" not in reason:
        assert f"{Path(__file__).name}, line " in said


@pytest.mark.parametrize("part", PARTS)
def test_what_is_no_function_is_told_at_once(part: str) -> None:
    with pytest.raises(MethodFailed, match=f"its {part} must be a function, not one int"):
        blaming("mine.own", with_part(part, 5))


def test_a_penalty_that_fails_is_told() -> None:
    plain = mine()

    def view(*given: Any) -> Any:
        seen, memory = plain.view(*given)
        return seen._replace(penalty=raising(ZeroDivisionError("by rank"))), memory

    where = r"its view's penalty \(round 1, client '0000'\) fails: ZeroDivisionError: by rank"
    with pytest.raises(MethodFailed, match=where):
        run(blaming("mine.own", plain._replace(view=view)))


META = torch.ones((), device="meta")
# What is done to an adapter's tensors -> what is said of it.
INSIDE: dict[str, Callable[[Tensor], Any]] = {
    "'m.head.weight' has the shape (2, 10), and its layout says (3, 10)": lambda t: t[:2],
    "'m.head.weight' is no dense tensor": lambda t: t.to_sparse(),
    "'m.head.weight' is a view of other numbers, negated": torch._neg_view,
    "'m.head.weight' holds torch.int64, and": lambda t: t.long(),
    "'m.head.weight' holds torch.float16, which no checkpoint does": lambda t: t.half(),
    "'m.head.weight' is a tensor that still has a gradient": lambda t: t.clone().requires_grad_(
        True
    ),
    "'m.head.weight' is one list, and no tensor": lambda t: t.tolist(),
}
GIVES_ADAPTERS = ["init", "plan", "merge", "export", "view"]


def changing(part: str, change: Callable[[Adapter], Adapter]) -> Method:
    """`mine`, with what one of its functions gives changed."""
    plain = mine()

    def function(*given: Any) -> Any:
        made = getattr(plain, part)(*given)
        if part == "view":
            return made[0]._replace(adapter=change(made[0].adapter)), made[1]
        if part == "export":
            return change(made)
        after = change(Adapter(made.layout, made.trees["adapter"]))
        return State(after.layout, {**made.trees, "adapter": after.tensors})

    return blaming("mine.own", with_part(part, function))


@pytest.mark.parametrize("said", INSIDE)
@pytest.mark.parametrize("part", GIVES_ADAPTERS)
def test_what_is_wrong_inside_of_what_a_function_gives_is_told(part: str, said: str) -> None:
    def change(made: Adapter) -> Adapter:
        head = INSIDE[said](made.tensors[toy.HEAD])
        return made._replace(tensors={**made.tensors, toy.HEAD: head})

    with pytest.raises(FedSieveError) as caught:
        run(changing(part, change))
    assert f"method 'mine.own': its {part}" in str(caught.value)
    assert said in str(caught.value)


def without_head(made: Adapter) -> Adapter:
    tensors = {n: t for n, t in made.tensors.items() if n != toy.HEAD}
    return Adapter(layout_of(tensors, made.layout.scale), tensors)


def renamed(made: Adapter) -> Adapter:
    tensors = {n.replace("first", "last"): t for n, t in made.tensors.items()}
    return Adapter(layout_of(tensors, made.layout.scale), tensors)


def unscaled(made: Adapter) -> Adapter:
    return Adapter(replace(made.layout, scale=float("nan")), made.tensors)


# Adapters that are as their own layout says, and not as the run's.
@pytest.mark.parametrize("change", [without_head, renamed, unscaled])
@pytest.mark.parametrize("part", ["init", "plan", "merge", "export"])
def test_an_adapter_has_the_layout_that_was_given(
    part: str, change: Callable[[Adapter], Adapter]
) -> None:
    with pytest.raises(FedSieveError, match=f"'mine.own': its {part}.* that it was given"):
        run(changing(part, change))


@pytest.mark.parametrize(
    ("moves", "said"),
    [
        (Support(("zz",), None, {}), "it moves 'zz', which its adapter has not"),
        (Support("ab", None, {}), "no Support of names"),  # type: ignore[arg-type]
        (Support((), None, {toy.HEAD: torch.ones(2, dtype=torch.bool)}), "bools, of shape (3, 10)"),
        (Support((), None, {toy.HEAD: torch.ones(3, 10)}), "bools, of shape (3, 10)"),
        (Support((), None, None), "of masks that are None"),  # type: ignore[arg-type]
        (5, "what it moves is one int"),
    ],
)
def test_what_a_view_moves_is_of_its_adapter(moves: Any, said: str) -> None:
    plain = mine()

    def view(*given: Any) -> Any:
        made, memory = plain.view(*given)
        return made._replace(moves=moves), memory

    with pytest.raises(MethodFailed, match=re.escape(said)):
        run(blaming("mine.own", plain._replace(view=view)))


GRADIENT = torch.ones(2, requires_grad=True)
PAYLOADS: dict[str, Callable[[Any], Any]] = {
    "its layout is None": lambda p: p._replace(layout=None),
    "its support is None": lambda p: p._replace(support=None),
    "no Support of names": lambda p: p._replace(support=p.support._replace(names=None)),
    "of ranks that are one list": lambda p: p._replace(support=p.support._replace(ranks=[0])),
    "of masks that are None": lambda p: p._replace(support=p.support._replace(masks=None)),
    "that is None, and no t": lambda p: p._replace(support=p.support._replace(masks={"a": None})),
    "its values are None": lambda p: p._replace(values=None),
    "the data of its values are None": lambda p: p._replace(values=p.values._replace(data=None)),
    "the data of its values are no dense": lambda p: p._replace(
        values=p.values._replace(data=p.values.data.to_sparse())
    ),
    "scales of its values are a tensor that": lambda p: p._replace(
        values=p.values._replace(scales=GRADIENT)
    ),
    "its masks_told is 'snt', and no": lambda p: p._replace(masks_told="snt"),
    "its ranks_told is None, and no": lambda p: p._replace(ranks_told=None),
    "its base is one int, and no Base": lambda p: p._replace(base=5),
    "of its base, it gives None": lambda p: p._replace(base=Base(1, None)),  # type: ignore[arg-type]
    "its base is one Base, and no Base since": lambda p: p._replace(base=Base(None, p)),  # type: ignore[arg-type]
    "of its control variates, it gives one int": lambda p: p._replace(control=5),
}


@pytest.mark.parametrize("said", PAYLOADS)
@pytest.mark.parametrize("part", ["publish", "report"])
def test_a_payload_is_one_through_and_through(part: str, said: str) -> None:
    plain = mine()

    def function(*given: Any) -> Any:
        made = getattr(plain, part)(*given)
        change = PAYLOADS[said]
        return change(made) if part == "publish" else (change(made[0]), made[1])

    with pytest.raises(MethodFailed, match=f"its {part} .*must give .*{re.escape(said)}"):
        run(blaming("mine.own", with_part(part, function)))


@pytest.mark.parametrize("base", [5, {"zz": torch.zeros(2)}, {"m.first.base": torch.zeros(2)}])
def test_a_change_of_the_base_is_of_its_pairs(base: Any) -> None:
    with pytest.raises(MethodFailed, match=r"its view.* its base "):
        run(changing("view", lambda made: made._replace(base=base)))


@pytest.mark.parametrize(
    "penalty", [torch.ones(1), torch.ones(()) * 1j, META, torch.ones(2), 5, None]
)
def test_a_penalty_is_one_number(penalty: Any) -> None:
    plain = mine()

    def view(*given: Any) -> Any:
        made, memory = plain.view(*given)
        return made._replace(penalty=lambda tree: penalty), memory

    where = r"its view's penalty \(round 1, client '0000'\) must give a tensor of one number"
    with pytest.raises(MethodFailed, match=where):
        run(blaming("mine.own", plain._replace(view=view)))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (frozenset({"dawn"}), r"a budget has no 'dawn' \(did you mean 'down'\?\)"),
        (["down"], "must be a frozenset, not one list"),
        (frozenset({5}), "a budget has no '5'"),
    ],
)
def test_knobs_are_those_of_a_budget(knobs: Any, said: str) -> None:
    with pytest.raises(MethodFailed, match=said):
        blaming("mine.own", mine()._replace(knobs=knobs))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_number_that_no_message_holds_is_told_with_round_and_client(number: float) -> None:
    plain = mine()

    def spoiled(tree: Tree) -> Tree:
        return {name: torch.full_like(tensor, number) for name, tensor in tree.items()}

    def init(adapter: Any) -> Any:
        state = plain.init(adapter)
        return state._replace(trees={"adapter": spoiled(state.trees["adapter"])})

    with pytest.raises(
        FedSieveError, match=r"round 1: .* for client 0000 cannot be sent: .*finite"
    ):
        run(blaming("mine.own", plain._replace(init=init)))

    def report(view: Any, trained: Any, memory: Any, context: Any) -> Any:
        return plain.report(view, spoiled(trained), memory, context)

    with pytest.raises(FedSieveError, match=r"client 0000: what the method reports cannot be sent"):
        run(blaming("mine.own", plain._replace(report=report)))


def half_known(tree: Tree, layout: Any, client: Any, key: Any) -> Passed:
    """A sieve of half of the entries, which says that the other end knows which."""
    names = tuple(sorted(tree))
    return Passed(Support(names, None, top_k(tree, 0.5, names)), "known", "known")


def last_known(tree: Tree, layout: Any, client: Any, key: Any) -> Passed:
    """A sieve of the last rank, which says that the other end knows which."""
    ranks = torch.full((len(layout.pairs), 1), layout.rank - 1)
    return Passed(Support(tuple(sorted(tree)), ranks, {}), "known", "sent")


@pytest.mark.parametrize(("sieve", "part"), [(half_known, "masks"), (last_known, "ranks")])
def test_what_is_said_to_be_known_and_is_not_is_told_before_it_is_sent(
    sieve: Sieve, part: str
) -> None:
    known = f'it says that its {part} are "known", and the receiver knows others: {part}_told'
    down = compose(down=sieve, up=dense, down_values="float64", up_values="float64")
    with pytest.raises(
        FedSieveError, match=f"round 1: .* for client 0000 cannot be sent: {known} must"
    ):
        run(blaming("mine.own", down))
    if part == "ranks":
        return  # `compose` gives an upload the ranks that came down
    up = compose(down=dense, up=sieve, down_values="float64", up_values="float64")
    with pytest.raises(
        FedSieveError, match=f"client 0000: what the method reports cannot be sent: {known} must"
    ):
        run(blaming("mine.own", up))


def no_mask(tree: Tree, layout: Any, client: Any, key: Any) -> Passed:
    names = tuple(sorted(tree))
    return Passed(Support(names, None, {toy.HEAD: torch.ones(3, 10)}), "known", "sent")


def odd_mask(tree: Tree, layout: Any, client: Any, key: Any) -> Passed:
    mask = torch.ones(2, 10, dtype=torch.bool)
    return Passed(Support(tuple(sorted(tree)), None, {toy.HEAD: mask}), "known", "sent")


@pytest.mark.parametrize("way", ["down", "up"])
@pytest.mark.parametrize(
    ("sieve", "said"),
    [
        (lambda *given: None, "a Passed of a Support, not None"),
        (no_mask, "a mask of bools of shape (3, 10) for 'm.head.weight', not (torch.float32"),
        (odd_mask, "a mask of bools of shape (3, 10) for 'm.head.weight', not (torch.bool, (2"),
    ],
)
def test_a_sieve_is_told_by_the_name_that_it_was_given_under(
    sieve: Any, said: str, way: str
) -> None:
    other = {"up": "down", "down": "up"}[way]
    given: dict[str, Any] = {way: sieve, other: dense}
    method = compose(**given, down_values="float64", up_values="float64")
    part = {"down": "publish", "up": "report"}[way]
    with pytest.raises(MethodFailed) as caught:
        run(blaming("mine.own", method))
    told = str(caught.value)
    assert f"method 'mine.own': its {part} (round 1, client '0000'): {way}: the sieve " in told
    assert said in told


EMPTY: dict[str, Tensor] = {}


def supporting(
    names: Callable[[list[str]], Any] = tuple, ranks: Any = None, masks: Any = EMPTY
) -> Callable[..., Passed]:
    def mine(tree: Tree, layout: Any, client: Any, key: Any) -> Passed:
        told: Any = "known" if ranks is None else "sent"
        return Passed(Support(names(sorted(tree)), ranks, masks), told, "sent")

    return mine


PAIRS = "ranks as an int64 tensor of shape (2, k), not "
RISING = "ranks that rise within 0..7 for each pair, not "
SUPPORTS: dict[str, dict[str, Any]] = {
    "the tensors that pass as a tuple of names, not None": {"names": lambda names: None},
    "the tensors that pass as a tuple of names, not {": {"names": set},
    "the tensors that pass as a tuple of names, not 'm.first": {"names": lambda names: names[0]},
    "the tensors that pass as a tuple of names, not (5,)": {"names": lambda names: (5,)},
    "names of the tree that it sees, not 'zz'": {"names": lambda names: (*names, "zz")},
    "a tuple of names that are sorted, each once, not [": {"names": list},
    "a tuple of names that are sorted, each once, not (": {
        "names": lambda names: tuple(reversed(names))
    },
    "a tuple of names that are sorted, each once, not ('m.first": {
        "names": lambda names: (names[0], *names)
    },
    f"{PAIRS}[[0]": {"ranks": [[0], [1]]},
    f"{PAIRS}torch.float32 of shape (2, 1)": {"ranks": torch.zeros(2, 1)},
    f"{PAIRS}torch.bool of shape (2, 8)": {"ranks": torch.ones(2, 8, dtype=torch.bool)},
    f"{PAIRS}torch.int32 of shape (2, 1)": {"ranks": torch.zeros(2, 1, dtype=torch.int32)},
    f"{PAIRS}torch.int64 of shape (2,)": {"ranks": torch.tensor([0, 1])},
    f"{PAIRS}torch.int64 of shape (1, 2)": {"ranks": torch.tensor([[0, 1]])},
    f"{PAIRS}torch.int64 of shape (3, 1)": {"ranks": torch.tensor([[0]] * 3)},
    f"{RISING}tensor([[ 0, 99": {"ranks": torch.tensor([[0, 99]] * 2)},
    f"{RISING}tensor([[-1": {"ranks": torch.tensor([[-1, 0]] * 2)},
    f"{RISING}tensor([[1, 1": {"ranks": torch.tensor([[1, 1]] * 2)},
    f"{RISING}tensor([[1, 0": {"ranks": torch.tensor([[1, 0]] * 2)},
    f"{RISING}tensor([]": {"ranks": torch.zeros(2, 0, dtype=torch.int64)},
    "masks as a dictionary, {} for none, not None": {"masks": None},
    "masks as a dictionary, {} for none, not [": {"masks": [torch.ones(3, 10)]},
    "no mask for 'zz', not (torch.bool, (1,))": {"masks": {"zz": torch.ones(1, dtype=torch.bool)}},
    "no mask for 'm.head.weight', not (torch.bool": {
        "names": lambda names: tuple(names[:1]),
        "masks": {toy.HEAD: torch.ones(3, 10, dtype=torch.bool)},
    },
}


@pytest.mark.parametrize("said", SUPPORTS)
@pytest.mark.parametrize("way", ["down", "up", "change"])
def test_a_support_that_is_none_of_the_tree_is_told_of_its_sieve(way: str, said: str) -> None:
    """ "change": what passes down of the change since the start is sieved once more, for zeros."""
    mine = supporting(**SUPPORTS[said])
    given: dict[str, Any] = {"up" if way == "up" else "down": mine}
    ranked: Any = "change" if way == "change" else "values"
    with pytest.raises(MethodFailed) as caught:
        run(guarded(compose(**{**PLAIN, **given}, ranked=ranked)))
    part, name = ("report", "up") if way == "up" else ("publish", "down")
    told = str(caught.value)
    assert f"its {part} (round 1, client '0000'): {name}: the sieve 'mine' must give {said}" in told


RANKED: dict[str, Callable[[], Any]] = {
    "leading": lambda: leading,
    "top_ranks": lambda: top_ranks,
    "sketch": sketch,
    "in another": lambda: within(leading, dense),
    "mine": lambda: supporting(ranks=torch.tensor([[0, 1]] * 2)),
}


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("down", [dense, leading])
def test_ranks_that_an_upload_would_not_follow_are_refused(down: Any, kind: str) -> None:
    """Its bytes would be measured of an upload that the user believes to be smaller."""
    name = "within" if kind == "in another" else kind
    said = f"up: the sieve '{name}' lets ranks pass, and an upload has those that came down"
    given = {**PLAIN, "down": down, "up": RANKED[kind](), "knobs": frozenset({"ratio"})}
    with pytest.raises(FedSieveError, match=said):
        toy.after(compose(**given), toy.clients([Budget(ratio=0.5)] * 2), 1)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    '`init` gives a tree "adapter"': {"init": lambda params: {"adapter": params}},
    "`init` must give a dictionary of trees, not None": {"init": lambda params: None},
    "`step` must give (params, slots), two dictionaries, not None": {"step": lambda *given: None},
    "is torch.float64 of shape (), and must be torch.float64 of shape (8, 12)": {
        "step": lambda params, g, slots: ({n: p.sum() for n, p in params.items()}, slots)
    },
    "(params, slots): 'm.first.lora_A.weight' is not among its params": {
        "step": lambda params, gradient, slots: ({}, slots)
    },
    "of its params, 'zz' was not given": {
        "step": lambda params, g, slots: ({**params, "zz": torch.ones(2)}, slots)
    },
    "its slots have a tree 'adapter', which `init` did not give": {
        "step": lambda params, g, slots: (params, {"adapter": params})
    },
    "`step` changed 'm.first.lora_A.weight' in place": {
        "step": lambda params, g, slots: ({n: t.sub_(1) for n, t in params.items()}, slots)
    },
    "`clip` must give a number from 0 up, not -1.0": {"clip": lambda slots: -1.0},
    "`clip` must give a number from 0 up, not 'x'": {"clip": lambda slots: "x"},
    "`settle` must give the slots that it was given, not None": {"settle": lambda *given: None},
    "`settle` must give the slots that it was given: 'adapter' is not": {
        "settle": lambda *given: {}
    },
    "`settle` must give the slots that it was given: 'm.first.lora_A.weight' is not in": {
        "settle": lambda slots, inside, merged: {**slots, "adapter": {}}
    },
    "`settle` must give the slots that it was given: its slots have a tree 'zz'": {
        "settle": lambda slots, inside, merged: {**slots, "zz": {}}
    },
    "its slots have a wrong 'adapter': it is None": {
        "settle": lambda slots, inside, merged: {**slots, "adapter": None}
    },
    "`settle` must give the slots that it was given: its slots have a wrong 'adapter'": {
        "settle": lambda slots, inside, merged: {
            **slots,
            "adapter": {n: t.float() for n, t in slots["adapter"].items()},
        }
    },
}


@pytest.mark.parametrize("said", OPTIMIZERS)
def test_an_optimizer_of_ones_own_is_held_to_what_it_must_give(said: str) -> None:
    """Else the model is replaced, or clients are blamed, or nothing is ever learned."""
    given = mine_with(sgd()._replace(**OPTIMIZERS[said]))
    with pytest.raises(OptimizerFailed) as caught:
        run(given)
    assert "the server optimizer's" in str(caught.value)
    assert said in str(caught.value)


# What is made of a tensor of an optimizer -> what is said of it, of type and shape of any.
TURNED: dict[str, Callable[[Tensor], Any]] = {
    "torch.float16 of shape": lambda t: t.half(),
    "torch.float32 of shape": lambda t: t.float(),
    "torch.int64 of shape": lambda t: t.long(),
    "torch.complex64 of shape": lambda t: t.to(torch.complex64),
    "torch.float64 of shape (1,": lambda t: t[None],
    "a tensor that still has a gradient": lambda t: t.clone().requires_grad_(True),
    "no dense tensor": lambda t: t[None].to_sparse(),
    "one list, and no tensor": lambda t: t.tolist(),
    "one ndarray, and no tensor": lambda t: t.numpy(),
}


@pytest.mark.parametrize("said", TURNED)
@pytest.mark.parametrize("what", ["params", "slots", "settled"])
def test_what_an_optimizer_gives_has_the_form_of_what_it_was_given(what: str, said: str) -> None:
    """A checkpoint of another form is taken for another recipe's, and the run is lost."""
    plain = sgd(1.0, momentum=0.5)

    def turned(tree: Tree) -> Tree:
        return {name: TURNED[said](tensor) for name, tensor in tree.items()}

    def step(*given: Any) -> Any:
        moved, slots = plain.step(*given)
        if what == "params":
            return turned(moved), slots
        return moved, {"velocity": turned(slots["velocity"])} if what == "slots" else slots

    def settle(slots: Any, inside: int, merged: int) -> Any:
        return {**slots, "velocity": turned(slots["velocity"])} if what == "settled" else slots

    part = "settle" if what == "settled" else "step"
    where = "of its params" if what == "params" else "its slots have a wrong 'velocity'"
    told = rf"optimizer's `{part}` must give .*: {where}: .*is {re.escape(said)}"
    with pytest.raises(OptimizerFailed, match=told.replace("params:", "params,")):
        run(mine_with(plain._replace(step=step, settle=settle)))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"a/b": {}}, "a tree under 'a/b': the name of a group has no \"/\""),
        ({5: {}}, "a tree under 5"),
        ({"m": 0}, "a wrong 'm': it is one int"),
        ({"m": {"t": 0}}, "a wrong 'm': 't' is one int, and no tensor"),
        ({"m": {5: torch.ones(1)}}, "a wrong 'm': there is one Tensor under 5"),
        ({"m": {"t": {"t": torch.ones(1)}}}, "a wrong 'm': 't' is one dict, and no tensor"),
        ({"m": {"t": torch.ones(1).half()}}, "a wrong 'm': 't' holds torch.float16, which"),
        ({"m": {"t": torch.ones(1) * 1j}}, "a wrong 'm': 't' holds torch.complex64, which"),
        (
            {"m": {"t": torch.ones(1, requires_grad=True)}},
            "a wrong 'm': 't' is a tensor that still has a",
        ),
    ],
)
def test_what_an_optimizer_begins_with_is_what_a_checkpoint_can_hold(made: Any, said: str) -> None:
    with pytest.raises(OptimizerFailed) as caught:
        run(mine_with(sgd()._replace(init=lambda params: made)))
    assert f"`init` must give a dictionary of trees: it has {said}" in str(caught.value)


FUNCTIONS = ("init", "step", "clip", "settle")


def private_of(server: Optimizer) -> Optimizer:
    return private(server, clip=9.0, noise_multiplier=0.0, expected=2, key=Key(0))


# An optimizer as it is, and within FedSieve's own.
AROUND: dict[str, Callable[[Optimizer], Optimizer]] = {
    "alone": lambda server: server,
    "fading": lambda server: fading(server, 0.5),
    "private": private_of,
    "both": lambda server: private_of(fading(server, 0.5)),
}


@pytest.mark.parametrize("place", AROUND)
@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(0), FedSieveError("odd"), None])
@pytest.mark.parametrize("part", FUNCTIONS)
def test_an_optimizer_that_fails_is_told_with_its_line(
    part: str, error: BaseException | None, place: str
) -> None:
    """None calls it with what it does not take."""
    if place in ("private", "both") and part in ("clip", "settle"):
        pytest.skip("those of `private` take their place")
    wrong: Any = (lambda: None) if error is None else raising(error)
    changed: dict[str, Any] = {part: wrong}
    said = "TypeError" if error is None else type(error).__name__
    at = r"" if error is None else rf" .*\(.*{Path(__file__).name}, line \d+\)"
    with pytest.raises(OptimizerFailed, match=rf"optimizer's `{part}` fails: {said}:{at}"):
        run(mine_with(AROUND[place](sgd()._replace(**changed))))


NOT_ALIKE: list[Optimizer] = [
    adam(0.1)._replace(init=lambda params: {}),
    sgd(1.0, momentum=0.5)._replace(init=lambda params: {}),
    sgd(0.5)._replace(step=adam(0.1).step),
    adam(0.1)._replace(step=sgd(1.0, momentum=0.5).step),
]


@pytest.mark.parametrize("place", AROUND)
@pytest.mark.parametrize("mixed", NOT_ALIKE)
def test_a_step_that_meets_slots_of_anothers_is_told(mixed: Optimizer, place: str) -> None:
    """The step is FedSieve's own, and what it is given is not what its `init` makes."""
    with pytest.raises(
        OptimizerFailed, match=r"optimizer's `step` fails: KeyError: '(velocity|m)'"
    ):
        run(mine_with(AROUND[place](mixed)))


def test_a_function_that_is_wrapped_as_one_of_fedsieves_is_ones_own() -> None:
    plain = sgd(1.0, momentum=0.5)

    @wraps(plain.step)
    def step(*given: Any) -> Any:
        return None

    class Wrapped:
        def __init__(self) -> None:
            update_wrapper(cast(Any, self), plain.step)

        def __call__(self, *given: Any) -> Any:
            return None

    assert step.__module__ == Wrapped().__module__ == "fedsieve.algebra.optim"
    with pytest.raises(OptimizerFailed, match=r"`step` must give .*, two dictionaries, not None"):
        run(mine_with(plain._replace(step=cast(Any, Wrapped()))))
    with pytest.raises(OptimizerFailed, match=r"`step` must give .*, two dictionaries, not None"):
        run(mine_with(plain._replace(step=step)))


def test_too_little_memory_is_no_fault_of_an_optimizers() -> None:
    with pytest.raises(MemoryError):
        run(mine_with(sgd()._replace(step=raising(MemoryError()))))


@pytest.mark.parametrize("part", FUNCTIONS)
def test_an_optimizer_that_changes_what_it_was_given_is_told(part: str) -> None:
    plain = sgd(1.0, momentum=0.5)

    def function(*given: Any) -> Any:
        tree = next((g["adapter"] for g in given if isinstance(g, dict) and "adapter" in g), None)
        (given[0] if tree is None else tree)[toy.HEAD].mul_(0.5)
        return getattr(plain, part)(*given)

    changed: dict[str, Any] = {part: function}
    with pytest.raises(OptimizerFailed, match=f"`{part}` changed '{toy.HEAD}' in place"):
        run(mine_with(plain._replace(**changed)))


@pytest.mark.parametrize("place", AROUND)
def test_an_optimizer_that_does_as_it_must_gives_the_same(place: str) -> None:
    plain = adam(0.1)
    own = plain._replace(
        init=lambda params: plain.init(params),
        step=lambda *given: plain.step(*given),
        settle=lambda slots, inside, merged: slots,
    )
    one, other = (run(mine_with(AROUND[place](each))) for each in (own, plain))
    assert toy.distance(one, other) == 0


ODD_OPTIMIZERS: dict[str, Any] = {
    "its `init` is None; it must be a function": sgd()._replace(init=cast(Any, None)),
    "its `step` is None; it must be a function": sgd()._replace(step=cast(Any, None)),
    "its `clip` is 1.0; it must be a function": sgd()._replace(clip=cast(Any, 1.0)),
    "its `settle` is 'x'; it must be a function": sgd()._replace(settle=cast(Any, "x")),
    "its `table` is None; it must be a dictionary": sgd()._replace(table=cast(Any, None)),
    "its `table` has 'lr' = [1]; a recipe's": sgd()._replace(table=cast(Any, {"lr": [1]})),
    "its `table` has 5 = 'x'; a recipe's": sgd()._replace(table=cast(Any, {5: "x"})),
    "its `expected` is inf, and the sum of updates": sgd()._replace(expected=math.inf),
    "its `expected` is nan, and the sum of updates": sgd()._replace(expected=math.nan),
    "its `expected` is 0, and the sum of updates": sgd()._replace(expected=0),
    "is the function sgd; it must be an optimizer: call it": sgd,
    "is 5; it must be an optimizer": 5,
}
TAKING: dict[str, Callable[[Any], object]] = {
    "server": mine_with,
    "method of your own: its server": lambda given: guarded(mine()._replace(server=given)),
    "method 'mine.own': its server": lambda given: blaming(
        "mine.own", mine()._replace(server=given)
    ),
    "optimizer": lambda given: private(
        given, clip=1.0, noise_multiplier=0.0, expected=1, key=Key(0)
    ),
}


@pytest.mark.parametrize("said", ODD_OPTIMIZERS)
@pytest.mark.parametrize("where", TAKING)
def test_what_is_no_optimizer_is_told_where_it_is_taken(where: str, said: str) -> None:
    with pytest.raises(FedSieveError) as caught:
        TAKING[where](ODD_OPTIMIZERS[said])
    assert re.search(rf"{where}:? {re.escape(said)}", str(caught.value))


@pytest.mark.parametrize("value", ["x", 5, None])
@pytest.mark.parametrize("part", [*PARTS, "personal", "trained_by"])
def test_a_part_of_a_method_that_is_no_function_is_told_by_its_name(part: str, value: Any) -> None:
    if value is None and part in ("personal", "trained_by"):
        pytest.skip("most methods have none")
    given = with_part(part, value)
    for taken in (guarded, lambda method: guarded(trained(method, toy.trained))):
        with pytest.raises(MethodFailed, match=f"^method of your own: its {part} must be a func"):
            taken(given)


# What a merge does with its state's trees, of which "kept" was there before -> what is said of it.
MERGED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a wrong 'kept': 't' is torch.float64 of shape (2,), and must be torch.float32 of": (
        lambda trees: {**trees, "kept": {"t": torch.ones(2, dtype=torch.float64)}}
    ),
    "a wrong 'kept': 't' is torch.float32 of shape (3,), and must be torch.float32 of": (
        lambda trees: {**trees, "kept": {"t": torch.ones(3)}}
    ),
    "a wrong 'kept 1': 't' is torch.float32 of shape (3,), and": (
        lambda trees: {**trees, "kept 1": {"t": torch.ones(3)}}
    ),
    "trees have no 'kept', which was given": (
        lambda trees: {group: tree for group, tree in trees.items() if group != "kept"}
    ),
    "a tree under 'a/b': the name of a group has no": lambda trees: {**trees, "a/b": {}},
    "a wrong 'kept': 't' is gone, which was given": (
        lambda trees: {**trees, "kept": {"of a client": torch.ones(7)}}
    ),
    "a wrong 'none': it was given empty: leave it out until": (
        lambda trees: {**trees, "none": {"of a client": torch.ones(7)}}
    ),
    "": lambda trees: {
        **{group: tree for group, tree in trees.items() if group != "kept 1"},
        "kept": {**trees["kept"], "of a client": torch.ones(7)},
        "kept 2": {"t": torch.ones(5)},
    },
}


@pytest.mark.parametrize("said", MERGED)
def test_what_a_merge_keeps_has_the_form_that_it_had(said: str) -> None:
    """ "" is what it may do."""
    plain, two = mine(), {"t": torch.ones(2)}

    def init(adapter: Adapter) -> State:
        state = plain.init(adapter)
        return state._replace(trees={**state.trees, "kept": two, "kept 1": two, "none": {}})

    def merge(*given: Any) -> State:
        state = plain.merge(*given)
        return state._replace(trees=MERGED[said](state.trees))

    own = guarded(plain._replace(init=init, merge=merge))
    if not said:
        run(own)
        return
    with pytest.raises(FedSieveError) as caught:
        run(own)
    assert "its merge (round 1) must give a State: its trees have " in str(caught.value)
    assert said in str(caught.value)


def scaled(tree: Tree) -> None:
    tree[toy.HEAD].detach().mul_(0.5)


def scaled_quietly(tree: Tree) -> None:
    with torch.no_grad():
        tree[toy.HEAD].clamp_(max=0.0)


def scaled_in_inference(tree: Tree) -> None:
    with torch.inference_mode():
        tree[toy.HEAD].add_(1.0)


def exchanged(tree: Tree) -> None:
    tree[toy.HEAD] = tree[toy.HEAD] * 0.5


IN_PLACE = [scaled, scaled_quietly, scaled_in_inference, exchanged]
# Where each function of a method has a tree that others hold too.
TREES: dict[str, Callable[..., Tree]] = {
    "init": lambda adapter: adapter.tensors,
    "plan": lambda state, key: state.trees["adapter"],
    "publish": lambda state, client, key: state.trees["adapter"],
    "view": lambda payload, memory, context: context.start.tensors,
    "report": lambda view, trained, memory, context: context.start.tensors,
    "merge": lambda state, updates, key: state.trees["adapter"],
    "export": lambda state: state.trees["adapter"],
    "clip": lambda state: state.trees["adapter"],
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("part", TREES)
def test_a_function_that_changes_what_it_was_given_is_told(
    part: str, change: Callable[[Tree], None]
) -> None:
    """Else the model depends on how often it is evaluated, or asked for."""
    plain = mine()

    def function(*given: Any) -> Any:
        change(TREES[part](*given))
        return getattr(plain, part)(*given)

    with pytest.raises(ChangedInPlace) as caught:
        run(blaming("mine.own", with_part(part, function)))
    said = str(caught.value)
    assert f"method 'mine.own': its {part}" in said
    assert ROUND.get(part, CLIENT) in said
    assert f"changed '{toy.HEAD}' in place, which it was given: work on a copy" in said


def test_so_are_functions_that_a_round_of_the_toy_does_not_call() -> None:
    adapter, plain = toy.start(), mine()
    memory = {"own": dict(adapter.tensors)}
    first = next(iter(adapter.tensors))

    def personal(given: Adapter, memory: Any) -> Adapter:
        memory["own"][first].neg_()
        return given

    def misfit(update: Any, sent: Any, client: Any, key: Any) -> None:
        update.values.data.neg_()

    method = blaming("mine.own", plain._replace(personal=personal, misfit=misfit))
    assert method.personal is not None
    with pytest.raises(ChangedInPlace, match=f"its personal changed '{re.escape(first)}' in place"):
        method.personal(adapter, memory)
    with pytest.raises(ChangedInPlace, match=r"its misfit .*changed 'data' in place"):
        run(method)


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_penalty_that_changes_what_is_trained_is_told(change: Callable[[Tree], None]) -> None:
    plain = mine()

    def penalty(tree: Tree) -> Tensor:
        change(tree)
        return tree[toy.HEAD].square().sum()

    def view(*given: Any) -> Any:
        seen, memory = plain.view(*given)
        return seen._replace(penalty=penalty), memory

    where = (
        rf"its view's penalty \(round 1, client '0000'\) changed '{re.escape(toy.HEAD)}' in place"
    )
    with pytest.raises(ChangedInPlace, match=where):
        run(blaming("mine.own", plain._replace(view=view)))


def test_what_has_no_count_of_changes_is_let_pass() -> None:
    with torch.inference_mode():
        made = {"a": torch.ones(3)}
        before = list(versions(made))
        made["a"].add_(1)
    assert changed(before, made) is None
    with torch.no_grad():
        plain = {"a": torch.ones(3)}
        before = list(versions(plain))
        assert changed(before, plain) is None
        plain["a"].add_(1)
    assert changed(before, plain) == "a"
    assert changed(list(versions({})), plain) == "a"
    assert changed(list(versions(plain)), {}) == "a"


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("way", ["down", "up"])
def test_a_sieve_that_changes_what_it_was_given_is_told(
    way: str, change: Callable[[Tree], None]
) -> None:
    """Also of a method that has no name, as in a notebook."""

    def mask(tree: Tree, layout: Any, client: Any, key: Any) -> Passed:
        change(tree)
        return dense(tree, layout, client, key)

    other = {"up": "down", "down": "up"}[way]
    given: dict[str, Any] = {way: mask, other: dense}
    given |= {"down_values": "float64", "up_values": "float64"}
    said = f"{way}: the sieve 'mask' changed '{re.escape(toy.HEAD)}' in place"
    with pytest.raises(ChangedInPlace, match=said):
        run(compose(**given))
    with pytest.raises(ChangedInPlace, match=rf"method 'mine.own': its \w+ \(round 1.*{said}"):
        run(blaming("mine.own", compose(**given)))


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_weighting_that_changes_what_it_was_given_is_told(change: Callable[[Tree], None]) -> None:
    """What it was given is what is merged."""

    def weights(tree: Tree, layout: Any) -> float:
        change(tree)
        return 1.0

    said = "weighting: the function 'weights' changed 'm[^']*' in place"
    given: dict[str, Any] = {**PLAIN, "weighting": weights}
    with pytest.raises(ChangedInPlace, match=said):
        run(compose(**given))
    with pytest.raises(ChangedInPlace, match=rf"method 'mine.own': its merge .*{said}"):
        run(blaming("mine.own", compose(**given)))


HERE = rf"{re.escape(__file__)}, line \d+"


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError("by zero"), SystemExit(3)])
@pytest.mark.parametrize("part", ["down", "up", "rescale", "trained", "shared", "weighting"])
def test_a_part_of_compose_that_fails_is_told_with_its_line(
    part: str, error: BaseException
) -> None:
    """Also of a method that has no name; a weighting's is told of every client."""

    def mine(*given: Any) -> Any:
        raise error

    given: dict[str, Any] = {**PLAIN, part: mine}
    kind = "sieve" if part in ("down", "up") else "function"
    said = rf"{part}: the {kind} 'mine' fails: {type(error).__name__}: .* \({HERE}\)"
    with pytest.raises(FedSieveError, match=said):
        run(compose(**given))
    with pytest.raises(FedSieveError, match=rf"method of your own: its \w+ \(round 1.*{said}"):
        run(guarded(compose(**given)))


class Called:
    """A sieve that is no function."""

    def __call__(self, *given: Any) -> Passed:
        return dense(*given)


OWN: dict[str, Callable[[], Method]] = {
    "a sieve": lambda: composed(down=lambda *given: dense(*given)),
    "a sieve in one of ours": lambda: composed(up=within(lambda *given: dense(*given), dense)),
    "an object": lambda: composed(up=Called()),
    "partial": lambda: composed(up=partial(dense_of, 1)),
    "a weighting": lambda: composed(weighting=lambda *given: 1.0),
    "a rescale": lambda: composed(rescale=lambda rank, kept: 1.0),
    "a choice": lambda: composed(trained=lambda layout, number: layout.names),
    "since the start": lambda: composed(
        shared=lambda layout, number: layout.names, ranked="change"
    ),
    "a part": lambda: with_part("plan", lambda state, key: state),
    "what knows how clients train": lambda: mine()._replace(trained_by=lambda training: mine()),
}


def composed(**given: Any) -> Method:
    return compose(**{**PLAIN, **given})


def dense_of(one: int, *given: Any) -> Passed:
    return dense(*given)


@pytest.mark.parametrize("kind", OWN)
def test_a_method_with_a_part_of_ones_own_is_guarded_and_gives_the_same(kind: str) -> None:
    plain = OWN[kind]()
    assert guarded(plain).merge is not plain.merge
    assert toy.distance(run(guarded(plain)), run(plain)) == 0


@pytest.mark.parametrize("name", kinds.each_method())
def test_a_method_of_fedsieves_own_is_not_looked_at(name: str) -> None:
    """Also with an optimizer of the user's, whose faults are told as its own."""
    own = sgd()._replace(step=lambda *given: sgd().step(*given))
    for server in ({}, {"server": own}):
        plain = methods.load(name)(**{**EXACT, **server})
        assert guarded(plain) is plain
        if plain.trained_by is not None:
            assert guarded(trained(plain, toy.trained)).merge.__module__.startswith("fedsieve.")


def test_what_fails_as_it_is_told_how_clients_train_is_told() -> None:
    plain = mine()._replace(trained_by=raising(KeyError("lr")))
    with pytest.raises(MethodFailed, match="of your own: its trained_by fails: KeyError: 'lr'"):
        trained(plain, toy.trained)
    odd = mine()._replace(trained_by=lambda training: 5)  # type: ignore[arg-type,return-value]
    with pytest.raises(MethodFailed, match="its trained_by must give a Method: it gives one int"):
        trained(odd, toy.trained)
    assert trained(mine()._replace(trained_by=None), toy.trained).trained_by is None


NO_WEIGHTS = [-1.0, -1e-9, math.nan, math.inf, None, "1", torch.ones(2), 10**400]
NO_WEIGHTS += [1e40, 3e38, 2e12, 1e-13, 1e-45, 5e-324]  # in float32 their sums, or shares, are none


@pytest.mark.parametrize("weight", NO_WEIGHTS)
def test_a_weight_that_is_no_weight_is_told(weight: Any) -> None:
    """A negative one took an update away; two that add up to nothing, all of their mean."""
    said = "client 0001: weighting: the function '<lambda>' must give 0, or a number from 1e-12 to "
    with pytest.raises(FedSieveError, match=said):
        run(compose(**PLAIN, weighting=lambda *given: weight))


@pytest.mark.parametrize("weight", [0, 0.5, True, torch.tensor(3.0), 1e12, 1e-12])
def test_of_weights_that_are_alike_the_ratio_alone_counts(weight: Any) -> None:
    same, plain = run(compose(**PLAIN, weighting=lambda *given: weight)), run(compose(**PLAIN))
    for name in plain:
        torch.testing.assert_close(same[name], plain[name])


@pytest.mark.parametrize("change", ["grad", "dtype", "device"])
@pytest.mark.parametrize("part", PARTS)
def test_what_torch_keeps_for_a_process_is_what_it_was(part: str, change: str) -> None:
    plain = mine()

    def function(*given: Any) -> Any:
        made = getattr(plain, part)(*given)
        if change == "grad":
            torch.set_grad_enabled(False)
        elif change == "dtype":
            torch.set_default_dtype(torch.float16)
        else:
            torch.set_default_device("meta")
        return made

    wanted = run(plain)
    assert toy.distance(run(blaming("mine.own", with_part(part, function))), wanted) == 0
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize("name", kinds.each_method())
def test_a_method_that_does_not_fail_is_the_same(name: str) -> None:
    """Of every method that ships, as of one's own."""
    plain: Method = methods.load(name)(**EXACT)
    both = [plain, blaming("mine.own", plain)]
    if plain.trained_by is not None:
        both = [each.trained_by(toy.trained) for each in both if each.trained_by is not None]
    first, second = map(run, both)
    assert toy.distance(first, second) == 0


def test_what_is_loaded_by_a_dotted_name_is_held_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lying.py").write_text(
        "from fedsieve.algebra.method import compose\n"
        "from fedsieve.algebra.sieve import dense\n"
        "def method(*, server=None):\n"
        "    return compose(down=dense, up=dense, server=server)._replace(plan=lambda s, k: s[9])\n"
    )
    (tmp_path / "lies").mkdir()
    (tmp_path / "lying.py").rename(tmp_path / "lies" / "lying.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(MethodFailed, match=r"its plan \(round 1\) fails: IndexError.*lying.py, li"):
        run(methods.load("lies.lying")())


@pytest.mark.usefixtures("no_report")
def test_a_run_whose_merge_adds_names_to_what_was_there_is_resumed(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for another recipe's, and could not go on."""
    (tmp_path / "growing").mkdir()
    (tmp_path / "growing" / "one.py").write_text(
        "import torch\n"
        "from fedsieve.algebra.method import compose\n"
        "from fedsieve.algebra.sieve import dense\n"
        "def method(*, server=None):\n"
        "    plain = compose(down=dense, up=dense, server=server)\n"
        "    def with_kept(state, kept):\n"
        "        return state._replace(trees={**state.trees, 'kept': kept})\n"
        "    def init(adapter):\n"
        "        return with_kept(plain.init(adapter), {'first': torch.ones(2)})\n"
        "    def merge(state, updates, key):\n"
        "        kept = {**state.trees['kept'], 'then': torch.ones(3)}\n"
        "        return with_kept(plain.merge(state, updates, key), kept)\n"
        "    return plain._replace(init=init, merge=merge)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    given: dict[str, Any] = {"method": {"name": "growing.one"}, "budgets": [{}], "rounds": 2}
    folder = tmp_path / "run"
    with pytest.raises(runner.Stopped):
        runs.start_from(
            recipes.check(tiny.table(**given), allow_code=True), folder, runs.stop_at(1)
        )
    assert command("resume", folder, "--allow-code").code == 0


@pytest.mark.usefixtures("no_report")
def test_a_run_of_a_method_that_is_still_broken_is_not_told_to_be_anothers(
    tiny: Tiny, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner would throw a good run away."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "later.py").write_text(
        "from fedsieve.algebra.method import compose\n"
        "from fedsieve.algebra.sieve import dense\n"
        "sent = dense\n"
        "def method(*, server=None):\n"
        "    return compose(down=lambda *given: sent(*given), up=dense, server=server)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    given: dict[str, Any] = {"method": {"name": "broken.later"}, "budgets": [{}], "rounds": 2}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(tiny.table(**given)))
    folder = tmp_path / "run"
    with pytest.raises(runner.Stopped):
        runs.start_from(
            recipes.check(tiny.table(**given), allow_code=True), folder, runs.stop_at(1)
        )
    program = sys.modules["broken.later"]
    monkeypatch.setattr(program, "sent", raising(KeyError("cut")))
    ran = command("resume", folder, "--allow-code")
    assert ran.code == 2
    told = " ".join(ran.err.split())
    assert "or the method is at fault: method 'broken.later': its publish" in told
    assert "KeyError: 'cut'" in told
    monkeypatch.setattr(program, "sent", dense)
    assert command("resume", folder, "--allow-code").code == 0
