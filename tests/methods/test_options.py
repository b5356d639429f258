"""Every option of every method, given in Python: what a recipe refuses by its key is refused here
by the option's name, before anything is trained, and what the signature allows is taken.

The options and their kinds are found in the signatures, so that a new one is tried too.
"""

import inspect
import math
import pickle
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from pydantic.fields import FieldInfo

import fedsieve
from fedsieve import FedSieveError, methods
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.cores import Cores
from fedsieve.algebra.method import Method, compose
from fedsieve.algebra.optim import Optimizer, bounded, fading
from fedsieve.algebra.options import checked
from fedsieve.algebra.sieve import dense
from fedsieve.errors import MethodFailed
from tests import toy

SERVERS: list[Any] = [1e-3, "adam", fedsieve.adam, {"lr": 1}, Optimizer, (1, 2), [], True, object()]
OFF: dict[type, list[Any]] = {
    bool: ["False", "", "true", 0, 1, 0.5, [], object(), math.nan],
    int: [
        *("3", 1.5, 2.0, True, False, [], {}, object(), math.nan, math.inf, b"3"),
        *(2**63, 10**400, 10**5000),
    ],
    float: ["0.5", "x", True, False, [], {}, object(), math.nan, math.inf, -math.inf, 10**400, 1j],
    str: [1, 0.5, True, [], {}, object(), "", b"float32", ("values",)],
}


class Kind:
    """What an option's annotation says: its type, the limits of a number, whether None is one."""

    def __init__(self, hint: Any) -> None:
        self.literals: tuple[Any, ...] = ()
        self.limits: dict[str, float] = {}
        self.none = False
        self.type: type = str
        self._read(hint)

    def _read(self, hint: Any) -> None:
        if get_origin(hint) is Annotated:
            inner, *told = get_args(hint)
            said = [m for t in told for m in (t.metadata if isinstance(t, FieldInfo) else [t])]
            for limit in said:
                self.limits |= {k: v for k, v in vars_of(limit) if k in ("gt", "ge", "lt", "le")}
            self._read(inner)
        elif get_origin(hint) is Literal:
            self.literals = get_args(hint)
        elif hint is type(None):
            self.none = True
        elif hint in (bool, int, float):
            self.type = hint
        else:
            assert get_args(hint), f"an option of a kind that this test does not know: {hint}"
            for each in get_args(hint):
                self._read(each)

    def wrong(self) -> Iterator[Any]:
        yield from OFF[self.type]
        if not self.none:
            yield None
        for text in self.literals:
            yield from (text[:-1], text + "s", text.upper(), f" {text}")
        for how, limit in self.limits.items():
            yield {"gt": limit, "lt": limit, "ge": limit - 1, "le": limit + 1}[how]
            yield limit - 5 if how in ("gt", "ge") else limit + 5

    def right(self) -> Iterator[Any]:
        yield from self.literals
        if self.none:
            yield None
        if self.type is bool:
            yield from (True, False, np.True_)
        if self.type is int:
            least = int(self.limits.get("ge", self.limits.get("gt", 0) + 1))
            yield from (least, least + 1, np.int64(least))
        if self.type is float:
            yield from (0.5, np.float32(0.5), np.float64(0.25))
            yield from (self.limits[how] for how in ("ge", "le") if how in self.limits)
            yield from (int(self.limits["le"]) for _ in range("le" in self.limits))


def vars_of(limit: Any) -> list[tuple[str, Any]]:
    return [(k, getattr(limit, k)) for k in ("gt", "ge", "lt", "le") if hasattr(limit, k)]


def kinds(name: str) -> dict[str, Kind]:
    hints = get_type_hints(methods.load(name), include_extras=True)
    return {option: Kind(hint) for option, hint in hints.items() if option not in GIVEN}


GIVEN = ("server", "return")
EACH = [(name, option) for name in methods.names() for option in kinds(name)]


@pytest.mark.parametrize(("name", "option"), EACH)
def test_what_an_option_cannot_be_is_refused_by_its_name(name: str, option: str) -> None:
    for value in kinds(name)[option].wrong():
        with pytest.raises(FedSieveError, match=f"^method {name}: {option} is ") as caught:
            getattr(fedsieve, name)(**{option: value})
        said = str(caught.value)
        assert "; it must be " in said
        assert "\n" not in said
        assert len(said) < 400, said


@pytest.mark.parametrize(("name", "option"), EACH)
def test_what_an_option_can_be_is_taken(name: str, option: str) -> None:
    build = getattr(fedsieve, name)
    default = inspect.signature(build).parameters[option].default
    for value in [default, *kinds(name)[option].right()]:
        assert isinstance(build(**{option: value}), Method), (option, value)


@pytest.mark.parametrize("name", methods.names())
def test_a_server_is_an_optimizer(name: str) -> None:
    for value in SERVERS:
        with pytest.raises(FedSieveError, match=f"^method {name}: server is .*optimizer") as caught:
            getattr(fedsieve, name)(server=value)
        assert "\n" not in str(caught.value)
    for optimizer in (None, fedsieve.sgd(0.5), fedsieve.fading(fedsieve.fedadam(), 0.5)):
        assert isinstance(getattr(fedsieve, name)(server=optimizer), Method)


@pytest.mark.parametrize("name", methods.names())
def test_an_option_that_there_is_not_is_told_with_the_nearest(name: str) -> None:
    with pytest.raises(FedSieveError, match=rf"^method {name}: up_vals: .*mean .*'up_values'"):
        getattr(fedsieve, name)(up_vals="int8")


def test_the_words_of_an_error() -> None:
    with pytest.raises(FedSieveError) as caught:
        fedsieve.flasc(ranked="chang")  # type: ignore[arg-type]
    said = "method flasc: ranked is 'chang'; it must be 'values' or 'change'"
    assert str(caught.value) == said
    with pytest.raises(FedSieveError, match=r"call it, as in fedsieve\.adam\(\)"):
        fedsieve.flasc(server=fedsieve.adam)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [*SERVERS, None])
def test_what_is_built_around_an_optimizer_needs_one(value: Any) -> None:
    for make in (fading, bounded):
        with pytest.raises(FedSieveError, match=r"^optimizer is .*; it must be "):
            make(value, 0.5)
    if value is not None:
        with pytest.raises(FedSieveError, match=r"^compose: server is .*; it must be "):
            compose(down=dense, up=dense, server=value)


@pytest.mark.parametrize("value", ["x" * 10**6, [0] * 10**6, 10**5000], ids=["str", "list", "int"])
def test_a_value_is_quoted_only_so_far(value: Any) -> None:
    def told() -> Iterator[str]:
        for make in (
            lambda: fading(fedsieve.sgd(), value),
            lambda: bounded(fedsieve.sgd(), -value if isinstance(value, int) else value),
            lambda: fedsieve.sgd(momentum=value),
            lambda: fedsieve.adam(beta1=value),
            lambda: fedsieve.adam(lr=-value if isinstance(value, int) else value),
            lambda: fedsieve.flasc(head=value),
            lambda: fedsieve.flasc(server=value),
            lambda: fedsieve.Sampling(kind=value),
            lambda: fedsieve.Sampling(size=-value if isinstance(value, int) else value),
            lambda: fedsieve.Sampling(availability=value),
            lambda: fedsieve.Sampling(availability={"a": value}),
        ):
            with pytest.raises(FedSieveError) as caught:
                make()
            yield str(caught.value)

    assert max(map(len, told())) < 500


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_still_its_files_function(name: str) -> None:
    """Signature, words and place are what they were: for help, for the docs, and for pickle."""
    build = getattr(fedsieve, name)
    assert build is methods.load(name)
    assert build.__module__ == f"fedsieve.methods.{name}"
    assert build.__doc__
    assert "up_values" in inspect.signature(build).parameters
    assert pickle.loads(pickle.dumps(build)) is build


def test_a_method_of_ones_own_is_checked_where_it_asks_for_it() -> None:
    def method(*, up_values: Literal["float32"] = "float32", loose=0, **more) -> Method:  # type: ignore[no-untyped-def]
        return compose(down=dense, up=dense, up_values=up_values)

    own = checked(method)
    assert isinstance(own(loose="anything", other=1), Method)
    with pytest.raises(FedSieveError, match=r"^method test_options: up_values is 'int9'"):
        own(up_values="int9")  # type: ignore[arg-type]


def three(tree: object, layout: object, client: object) -> None: ...


def one(layout: object) -> tuple[str, ...]:
    return ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"up": three}, r"up: a function \(tree, layout, client, key\) is needed: too many"),
        ({"down": three}, r"down: a function \(tree, layout, client, key\) is needed: too many"),
        ({"rescale": one}, r"rescale: a function \(rank, kept\) is needed: too many"),
        ({"weighting": one}, r"weighting: a function \(change, layout\) is needed: too many"),
        ({"trained": one}, r"trained: a function \(layout, round\) is needed: too many"),
        ({"shared": one}, r"shared: a function \(layout, round\) is needed: too many"),
    ],
)
def test_a_part_that_cannot_be_called_as_one_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        compose(**{"down": dense, "up": dense, **given})


WORD = "'ratio', 'down' or 'up'"
ODD: dict[str, tuple[list[Any], str]] = {
    "down": ([7, None, "dense", ()], "a function"),
    "up": ([7, None, "dense", ()], "a function"),
    "rescale": ([1.0, None, "r_over_k"], "a function"),
    "trained": (["m.head.weight", ("m.head.weight",), None, 5], "a function"),
    "shared": (["m.head.weight", ("m.head.weight",), 5], "a function"),
    "freeze_absent": (["false", 1, None], "a valid boolean"),
    "feedback": (["no", 0, None], "a valid boolean"),
    "returns": (["chnge", 5, None, ["change"]], "'change' or 'values'"),
    "ranked": (["chang", 5, None], "'values' or 'change'"),
    "weighting": (["exmples", 5, None, ["examples"]], "'uniform' or 'examples', or a function"),
    "down_values": (["int9", 8, None], "'float64', 'float32', 'bfloat16' or 'int8'"),
    "up_values": (["int9", 8, None], "'float64', 'float32', 'bfloat16' or 'int8'"),
    "trains": (["lor", 5, None], "'lora', 'head' or 'all', or a Cores"),
    "server": (["sgd", 0.1, fedsieve.sgd], "an optimizer"),
    "knobs": (["up", ["up"], None], "a frozenset, as"),
}


def test_every_option_of_compose_is_in_the_table() -> None:
    assert ODD.keys() == inspect.signature(compose).parameters.keys()


@pytest.mark.parametrize("name", ODD)
def test_what_an_option_of_compose_cannot_be_is_told_by_its_name(name: str) -> None:
    """Each of these ran as another option does, or ended in a round."""
    values, needed = ODD[name]
    for value in values:
        with pytest.raises(FedSieveError) as caught:
            compose(**{"down": dense, "up": dense, name: value})
        assert str(caught.value).startswith(f"compose: {name} is ")
        assert f"; it must be {needed}" in str(caught.value)
    for knob in ("uop", 5):
        with pytest.raises(FedSieveError, match=f"compose: knobs is .*; it must be {WORD}"):
            compose(down=dense, up=dense, knobs=frozenset({knob}))  # type: ignore[arg-type]
    with pytest.raises(FedSieveError, match=r"compose: weight: .* \(did you mean 'weighting'\?\)"):
        compose(down=dense, up=dense, weight="examples")  # type: ignore[call-arg]


def test_what_an_option_of_compose_can_be_is_taken() -> None:
    given: dict[str, Any] = {"trains": Cores(2, gains=True), "knobs": frozenset({"up", "down"})}
    method = compose(**{"down": dense, "up": dense, "feedback": np.True_, **given})
    assert (method.trains, method.knobs) == (given["trains"], given["knobs"])
    assert method.keeps is True


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (("m.haed.weight",), r"not 'm.haed.weight' \(did you mean 'm.head.weight'"),
        (["m.head.weight", 5], "not 5"),
        ("m.head.weight", "in a tuple, not 'm.head.weight'"),
        (None, "in a tuple, not None"),
    ],
)
@pytest.mark.parametrize("part", ["trained", "shared"])
def test_what_is_no_tensor_of_the_model_is_told(part: str, gives: Any, said: str) -> None:
    """It was an index that is out of range, in the local training."""

    def heads(layout: object, round: int) -> Any:
        return gives

    given: dict[str, Any] = {"down_values": "float64", "up_values": "float64", part: heads}
    method = compose(down=dense, up=dense, **given)
    named = f"{part}: the function 'heads' must give names of the model's tensors"
    with pytest.raises(MethodFailed, match=f"{named}.* {said}"):
        toy.after(method, toy.clients([Budget()] * 2), 1)


@pytest.mark.parametrize("gives", [None, "1", math.nan, math.inf, True, 10**400])
def test_a_factor_that_is_no_number_is_told(gives: Any) -> None:
    method = compose(down=dense, up=dense, rescale=lambda rank, kept: gives)
    said = "rescale: the function '<lambda>' must give a finite number, not "
    with pytest.raises(MethodFailed, match=said):
        toy.after(method, toy.clients([Budget()] * 2), 1)


def test_a_method_that_trains_no_tensor_says_so() -> None:
    method = compose(down=dense, up=dense, trained=lambda layout, round: ())
    with pytest.raises(FedSieveError, match="names no tensor of this model in round 1"):
        toy.after(method, toy.clients([Budget()] * 2), 1)
