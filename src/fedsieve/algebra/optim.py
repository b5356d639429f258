"""Server optimizers: what the mean of the clients' changes does to the global adapter.

Each takes the pseudo-gradient (the mean of what clients moved AWAY from, so that descent subtracts
it) and gives new tensors; none keeps anything hidden. A round hands over the tensors that it moved
alone, and what is kept of a tensor (a moment, a count of steps) changes with that tensor alone.

Three variants that papers call "Adam" on the server differ, so they have different names here:
`adam` corrects the bias of its moments as torch does, `fedadam` does not (Reddi et al. 2021,
arXiv 2003.00295), and neither decays weights.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch

from fedsieve.algebra.adapter import Tree
from fedsieve.algebra.intact import left_intact, ours
from fedsieve.algebra.trees import lacking, tree_unlike, trees_wrong
from fedsieve.errors import (
    THEIRS,
    FedSieveError,
    OptimizerFailed,
    line_of,
    quoted,
    raise_of_memory,
    with_type,
)
from fedsieve.settings import LARGEST, Source, as_float, is_number

Slots = dict[str, Tree]  # the optimizer's own state: a tree for each moment
Table = Mapping[str, str | float]  # what a recipe's [server] says
_SERVERS = "the server optimizer's"
_MOST = 3e38  # that is a float32, and whose tensors have no infinity of it


def unlimited(slots: Slots) -> float:
    """No update is too large."""
    return math.inf


def unchanged(slots: Slots, within: int, merged: int) -> Slots:
    """Nothing is learned from how many updates were within the limit."""
    return slots


class Optimizer(NamedTuple):
    """init(params) -> slots; step(params, gradient, slots) -> (params, slots).

    How the mean that becomes the gradient is taken belongs to it as well:
    clip:     slots -> the L2 norm, over all values of a client's decoded update together, to which
              a larger update is scaled down before it is added
    expected: what the sum of the updates is divided by; None divides by the sum of their weights,
              and refuses a round without any
    settle:   (slots after the step, how many updates were within the clip, how many there were) ->
              slots; where a clip that adapts learns from the round
    table:    what [server] in a recipe says for it; empty for one that no recipe can name
    private:  where the noise comes from that hides single clients (`noise.private`); None where
              nothing does
    """

    init: Callable[[Tree], Slots]
    step: Callable[[Tree, Tree, Slots], tuple[Tree, Slots]]
    clip: Callable[[Slots], float] = unlimited
    expected: float | None = None
    settle: Callable[[Slots, int, int], Slots] = unchanged
    table: Table = MappingProxyType({})
    private: Source | None = None


def optimizer_given(name: str, value: object) -> Optimizer:
    """The value. Raises FedSieveError, naming it, for what is none, and says how it becomes one."""
    if isinstance(value, Optimizer):
        for part in ("init", "step", "clip", "settle"):
            if not callable(function := getattr(value, part)):
                raise FedSieveError(
                    f"{name}: its `{part}` is {quoted(function)}; it must be a function"
                )
        table: Any = value.table
        if not isinstance(table, Mapping):
            raise FedSieveError(
                f"{name}: its `table` is {quoted(table)}; it must be a dictionary, empty where no "
                "recipe can name the optimizer"
            )
        for key, said in table.items():
            if not isinstance(key, str) or not (isinstance(said, str) or is_number(said)):
                raise FedSieveError(
                    f"{name}: its `table` has {quoted(key)} = {quoted(said)}; a recipe's [server] "
                    "has names, and under them texts and numbers"
                )
        expected: Any = value.expected
        if expected is not None and not (is_number(expected) and 0 < as_float(expected) <= _MOST):
            raise FedSieveError(
                f"{name}: its `expected` is {quoted(expected)}, and the sum of updates is divided "
                f"by it: it must be a number above 0, at most {_MOST:.1e}, or None"
            )
        return value
    own = getattr(value, "__name__", "") if getattr(value, "__module__", "") == __name__ else ""
    if own in ("adam", "fedadam", "sgd"):
        raise FedSieveError(
            f"{name} is the function {own}; it must be an optimizer: call it, as in "
            f"fedsieve.{own}()"
        )
    raise FedSieveError(
        f"{name} is {quoted(value)}; it must be an optimizer, such as fedsieve.adam(1e-3)"
    )


def slots_of(optimizer: Optimizer, params: Tree) -> Slots:
    """What an optimizer keeps at the beginning.

    Raises OptimizerFailed, as the three functions below do, for what no round can use, or what no
    checkpoint could give back: an optimizer may be the user's own. FedSieve's own are not looked
    at; those that hold another (`fading`, `noise.private`) ask for what it gives by these.
    """
    made = _asked(optimizer, "init", (params,), lent=params)
    if _trusted(optimizer, "init"):
        return cast(Slots, made)
    said = f"{_SERVERS} `init`"
    if not isinstance(made, dict):
        raise OptimizerFailed(f"{said} must give a dictionary of trees, not {quoted(made)}")
    if "adapter" in made:
        raise OptimizerFailed(
            f'{said} gives a tree "adapter", and that is the model\'s: call it another'
        )
    if (wrong := trees_wrong(made)) is not None:
        raise OptimizerFailed(f"{said} must give a dictionary of trees: it has {wrong}")
    return made


def stepped(optimizer: Optimizer, params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
    """An optimizer's step, of which every parameter must come, and all in the form that it had; it
    leaves parameters and slots as they are. Slots that do not come stay as they were.
    """
    # The gradient is nobody's any more.
    made = _asked(optimizer, "step", (params, gradient, slots), lent=(params, slots))
    if _trusted(optimizer, "step"):
        return cast(tuple[Tree, Slots], made)
    said = f"{_SERVERS} `step` must give (params, slots)"
    if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(m, dict) for m in made):
        raise OptimizerFailed(f"{said}, two dictionaries, not {quoted(made)}")
    moved, after = made
    if (name := lacking(moved, params)) is not None:
        raise OptimizerFailed(f"{said}: {name!r} is not among its params")
    if (wrong := tree_unlike(moved, params)) is not None:
        raise OptimizerFailed(f"{said}: of its params, {wrong}")
    _refuse_unlike(said, after, slots)
    return moved, after


def settled(optimizer: Optimizer, slots: Slots, within: int, merged: int) -> Slots:
    """What an optimizer makes of its slots after a round, all of which must come as they were."""
    made = _asked(optimizer, "settle", (slots, within, merged), lent=slots)
    if _trusted(optimizer, "settle"):
        return cast(Slots, made)
    said = f"{_SERVERS} `settle` must give the slots that it was given"
    if not isinstance(made, dict):
        raise OptimizerFailed(f"{said}, not {quoted(made)}")
    if (group := lacking(made, slots)) is not None:
        raise OptimizerFailed(f"{said}: {group!r} is not among them")
    _refuse_unlike(said, made, slots)
    for group, tree in slots.items():
        if (name := lacking(made[group], tree)) is not None:
            raise OptimizerFailed(f"{said}: {name!r} is not in its {group!r}")
    return made


def _refuse_unlike(said: str, made: dict[Any, Any], slots: Slots) -> None:
    """Raises OptimizerFailed for slots beyond those that `init` gave, or of another form."""
    for group, tree in made.items():
        if group not in slots:
            raise OptimizerFailed(
                f"{said}: its slots have a tree {quoted(group)}, which `init` did not give"
            )
        if (wrong := tree_unlike(tree, slots[group])) is not None:
            raise OptimizerFailed(f"{said}: its slots have a wrong {group!r}: {wrong}")


def _trusted(optimizer: Optimizer, part: str) -> bool:
    """Whether a function of an optimizer need not be looked at: it is FedSieve's own, and so is
    what made the slots that it is given, of the same optimizer where it steps.
    """
    function, first = getattr(optimizer, part), optimizer.init
    alike = part != "step" or _maker(function) == _maker(first)
    return ours(function) and ours(first) and alike


def _maker(function: Callable[..., object]) -> str | None:
    """`adam` of what stands within it."""
    name = getattr(function, "__qualname__", None)
    return None if name is None else str(name).partition(".")[0]


def _asked(optimizer: Optimizer, part: str, given: tuple[Any, ...], lent: object) -> Any:
    """What a function of an optimizer gives. Raises OptimizerFailed, with the line, where one of
    the user's own fails: no client's update is at fault.

    lent: what of the given must be afterwards what it was
    """
    function = getattr(optimizer, part)
    if _trusted(optimizer, part):
        return function(*given)
    called = f"{_SERVERS} `{part}`"
    with left_intact(lent, called, OptimizerFailed):
        try:
            return function(*given)
        except OptimizerFailed:  # of one inside of it
            raise
        except THEIRS as error:
            raise_of_memory(error)
            raise OptimizerFailed(f"{called} fails: {with_type(error)}{line_of(error)}") from error


def clip_of(optimizer: Optimizer, slots: Slots) -> float:
    """An optimizer's limit on the norm of an update, a number from 0 up."""
    most = _asked(optimizer, "clip", (slots,), lent=slots)
    if isinstance(most, bool) or not isinstance(most, int | float) or not most >= 0:
        raise OptimizerFailed(f"{_SERVERS} `clip` must give a number from 0 up, not {quoted(most)}")
    return as_float(most)


def limits(optimizer: Optimizer) -> bool:
    """Whether a client's part in the mean is meant to have a limit, whatever the client sends."""
    return optimizer.clip is not unlimited


def bounded(optimizer: Optimizer, clip: float) -> Optimizer:
    """The same optimizer, on updates that are scaled down to an L2 norm of at most `clip`.

    Without noise this is no privacy: it bounds what one client of n can do to the mean, clip / n.
    Raises FedSieveError where the optimizer clips already: of two clips only one would count.
    """
    optimizer_given("optimizer", optimizer)
    if not (is_number(clip) and clip > 0):
        raise FedSieveError(f"clip is {quoted(clip)}; it must be a number above 0")
    if limits(optimizer):
        raise FedSieveError("bounded: the server optimizer clips updates already: leave one out")
    return optimizer._replace(clip=lambda slots: clip, table=_and(optimizer, clip=clip))


def sgd(lr: float = 1.0, momentum: float = 0.0) -> Optimizer:
    """x <- x - lr * u with u = momentum * u + g. lr = 1 without momentum is FedAvg.

    Raises FedSieveError, as all optimizers here do, for a number that makes no sense.
    """
    (lr,), (momentum,) = _positive(lr=lr), _below_one(momentum=momentum)

    def init(params: Tree) -> Slots:
        return {"velocity": _zeros(params)} if momentum else {}

    def step(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
        if not momentum:
            return {n: p - lr * gradient[n] for n, p in params.items()}, slots
        velocity = {n: momentum * u + gradient[n] for n, u in slots["velocity"].items()}
        return {n: p - lr * velocity[n] for n, p in params.items()}, {"velocity": velocity}

    return Optimizer(init, step, table={"optimizer": "sgd", "lr": lr, "momentum": momentum})


def adam(
    lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> Optimizer:
    """Adam with bias correction (Kingma and Ba 2015), equal to torch.optim.Adam.

    Each tensor counts its own steps, so that one that a round leaves alone has none of it, as torch
    does with a parameter that has no gradient.
    """
    (lr, eps), (beta1, beta2) = _positive(lr=lr, eps=eps), _below_one(beta1=beta1, beta2=beta2)

    def init(params: Tree) -> Slots:
        count = {n: torch.zeros(()) for n in params}
        return {"m": _zeros(params), "v": _zeros(params), "count": count}

    def step(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
        m, v = _moments(gradient, slots, beta1, beta2)
        count = {n: slots["count"][n] + 1 for n in params}
        moved = {}
        for n, p in params.items():
            steps = float(count[n])
            scale = lr / (1 - beta1**steps)
            moved[n] = p - scale * m[n] / ((v[n] / (1 - beta2**steps)).sqrt() + eps)
        return moved, {"m": m, "v": v, "count": count}

    said: Table = {"optimizer": "adam", "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
    return Optimizer(init, step, table=said)


def fedadam(
    lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Optimizer:
    """FedAdam (Reddi et al. 2021, Algorithm 2): no bias correction, v starts at tau**2.

    x <- x - lr m / (sqrt(v) + tau): tau bounds the push on a coordinate that hardly moved.
    """
    (lr,), (tau,) = _positive(lr=lr), _positive(math.sqrt(_MOST), tau=tau)
    beta1, beta2 = _below_one(beta1=beta1, beta2=beta2)

    def init(params: Tree) -> Slots:
        return {
            "m": _zeros(params),
            "v": {n: torch.full_like(p, tau**2) for n, p in params.items()},
        }

    def step(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
        m, v = _moments(gradient, slots, beta1, beta2)
        moved = {n: p - lr * m[n] / (v[n].sqrt() + tau) for n, p in params.items()}
        return moved, {"m": m, "v": v}

    said: Table = {"optimizer": "fedadam", "lr": lr, "beta1": beta1, "beta2": beta2, "tau": tau}
    return Optimizer(init, step, table=said)


def fading(optimizer: Optimizer, decay: float) -> Optimizer:
    """The same optimizer with its learning rate multiplied by `decay` after every round.

    Rounds count for all tensors alike, as they do for torch's ExponentialLR.

    All optimizers here move by lr times something, so it is the move that is scaled. A cohort of
    few clients with few labels pulls the model to and fro; smaller steps at the end settle it.
    """
    optimizer_given("optimizer", optimizer)
    if not (is_number(decay) and 0 < as_float(decay) <= 1):
        raise FedSieveError(f"decay is {quoted(decay)}; it must be a number above 0, at most 1")
    decay = _of_python(decay)

    def init(params: Tree) -> Slots:
        slots = slots_of(optimizer, params)
        if "fading" in slots:
            raise OptimizerFailed(
                'fading: the optimizer in it has slots called "fading" already: fade once, or call '
                "those of your own otherwise"
            )
        return {**slots, "fading": {"rounds": torch.zeros(())}}

    def step(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
        rounds = slots["fading"]["rounds"]
        inner = {name: tree for name, tree in slots.items() if name != "fading"}
        moved, inner = stepped(optimizer, params, gradient, inner)
        share = decay ** float(rounds)
        faded = {n: p + share * (moved[n] - p) for n, p in params.items()}
        return faded, {**inner, "fading": {"rounds": rounds + 1}}

    return optimizer._replace(init=init, step=step, table=_and(optimizer, decay=decay))


def _positive(most: float = _MOST, /, **given: float) -> list[float]:
    for name, value in given.items():
        if not (is_number(value) and 0 < as_float(value) <= most):
            raise FedSieveError(
                f"{name} is {quoted(value)}; it must be a number above 0, at most {most:.1e}"
            )
    return [_of_python(value) for value in given.values()]


def _below_one(**given: float) -> list[float]:
    for name, value in given.items():
        if not (is_number(value) and 0 <= as_float(value) < 1):
            raise FedSieveError(
                f"{name} is {quoted(value)}; it must be a number from 0 up, below 1"
            )
    return [_of_python(value) for value in given.values()]


def _of_python(value: float) -> float:
    """As a recipe can hold it and tensors can be multiplied by it: a fraction is neither, nor is a
    whole number of 30 digits.
    """
    return value if type(value) is int and value <= LARGEST else float(value)


def _and(optimizer: Optimizer, **more: float) -> Table:
    """The optimizer's table with more in it; still none if it has none."""
    return {**optimizer.table, **more} if optimizer.table else optimizer.table


def _moments(gradient: Tree, slots: Slots, beta1: float, beta2: float) -> tuple[Tree, Tree]:
    m = {n: beta1 * slots["m"][n] + (1 - beta1) * g for n, g in gradient.items()}
    v = {n: beta2 * slots["v"][n] + (1 - beta2) * g * g for n, g in gradient.items()}
    return m, v


def _zeros(params: Tree) -> Tree:
    return {n: torch.zeros_like(p) for n, p in params.items()}
