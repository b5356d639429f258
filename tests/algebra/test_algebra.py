"""Laws of the parts: keys, rounding, server optimizers, the merge's memory."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import server
from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, layout_of
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key, generator, word
from fedsieve.algebra.optim import Optimizer, adam, fading, fedadam, sgd
from fedsieve.algebra.payload import BLOCK, Payload, Values, exact, rounded
from fedsieve.algebra.support import everything
from fedsieve.errors import NoUsableUpdate
from fedsieve.methods import fedit
from tests import kinds, toy

keys = st.builds(
    Key,
    seed=st.integers(0, 3),
    round=st.integers(0, 3),
    client=st.text("ab|1", max_size=3),
    purpose=st.text("ab|1", max_size=3),
)


@given(keys, keys)
def test_different_keys_have_different_streams(left: Key, right: Key) -> None:
    assert (word(left) == word(right)) == (left == right)
    same = torch.equal(
        torch.rand(4, generator=generator(left)), torch.rand(4, generator=generator(right))
    )
    assert same == (left == right)


def test_int8_rounding_is_unbiased_and_within_a_step() -> None:
    numbers = torch.randn(3 * BLOCK + 17, generator=torch.Generator().manual_seed(0))
    draws = generator(Key(0))
    many = torch.stack([exact(rounded(numbers, "int8", draws)) for _ in range(2000)])
    steps = rounded(numbers, "int8", draws).scales.repeat_interleave(BLOCK)[: numbers.numel()]
    assert ((many - numbers).abs() <= 1.0001 * steps).all()
    # A number between two steps has a standard deviation of at most half a step.
    assert ((many.mean(0) - numbers).abs() <= 5 * 0.5 * steps / 2000**0.5).all()


@pytest.mark.parametrize("numbers", [torch.zeros(0), torch.zeros(5), torch.full((200,), 1e-44)])
def test_int8_takes_zeros_and_numbers_too_small_for_a_step(numbers: torch.Tensor) -> None:
    back = exact(rounded(numbers, "int8", generator(Key(0))))
    assert back.shape == numbers.shape
    assert torch.isfinite(back).all()
    assert (back.abs() <= 1.01e-44).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sgd(0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
        (sgd(0.3, 0.9), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
        (adam(0.02), lambda p: torch.optim.Adam(p, lr=0.02)),
        (adam(0.02, 0.8, 0.95, 1e-3), lambda p: torch.optim.Adam(p, 0.02, (0.8, 0.95), 1e-3)),
    ],
)
def test_server_optimizers_equal_torchs(ours: Optimizer, theirs: type) -> None:
    draws = torch.Generator().manual_seed(0)
    params = {"x": torch.randn(5, 4, generator=draws, dtype=torch.float64)}
    mirror = params["x"].clone().requires_grad_(True)
    torchs = theirs([mirror])
    slots = ours.init(params)
    for _ in range(5):
        gradient = torch.randn(5, 4, generator=draws, dtype=torch.float64)
        params, slots = ours.step(params, {"x": gradient}, slots)
        mirror.grad = gradient.clone()
        torchs.step()
    assert (params["x"] - mirror.detach()).abs().max() <= 1e-12


def test_fedadam_equals_reddi_et_al_by_hand() -> None:
    """Two steps of one number, worked out: lr 0.1, betas 0.5 and 0.75, tau 1."""
    server = fedadam(0.1, 0.5, 0.75, 1.0)
    x = {"x": torch.tensor([1.0], dtype=torch.float64)}
    slots = server.init(x)
    x, slots = server.step(x, {"x": torch.tensor([2.0], dtype=torch.float64)}, slots)
    # m = 1, v = 0.75 * 1 + 0.25 * 4 = 1.75
    assert x["x"].item() == pytest.approx(1 - 0.1 * 1 / (1.75**0.5 + 1), abs=1e-15)
    x, slots = server.step(x, {"x": torch.tensor([-4.0], dtype=torch.float64)}, slots)
    # m = 0.5 - 2 = -1.5, v = 0.75 * 1.75 + 0.25 * 16 = 5.3125
    first = 1 - 0.1 / (1.75**0.5 + 1)
    assert x["x"].item() == pytest.approx(first + 0.15 / (5.3125**0.5 + 1), abs=1e-15)


@pytest.mark.parametrize("make", [sgd, lambda lr: sgd(lr, 0.9), adam, fedadam])
def test_fading_is_a_learning_rate_that_torch_would_schedule(
    make: Callable[[float], Optimizer],
) -> None:
    """The same as making the optimizer anew with a smaller rate each round, on the same slots."""
    draws = torch.Generator().manual_seed(2)
    start = {"x": torch.randn(6, generator=draws, dtype=torch.float64)}
    fading_one = fading(make(0.3), 0.5)
    params, slots = start, fading_one.init(start)
    mirror, mirror_slots = start, make(0.3).init(start)
    for number in range(4):
        gradient = {"x": torch.randn(6, generator=draws, dtype=torch.float64)}
        params, slots = fading_one.step(params, gradient, slots)
        mirror, mirror_slots = make(0.3 / 2**number).step(mirror, gradient, mirror_slots)
    assert toy.distance(params, mirror) <= 1e-12


def test_a_merge_of_nothing_is_refused() -> None:
    method = fedit.method()
    with pytest.raises(NoUsableUpdate):
        method.merge(method.init(toy.start()), iter(()), Key(0, 1))


def test_weighting_by_examples() -> None:
    method = fedit.method(weighting="examples", up_values="float64")
    state = method.init(toy.start())

    def update(value: float) -> Payload:
        layout = state.layout
        data = torch.full((layout.size,), value, dtype=torch.float64)
        return Payload(
            layout, everything(layout), Values("float64", data, torch.empty(0)), "known", "known"
        )

    merged = method.merge(
        state, iter([(Client("a", 30), update(1.0)), (Client("b", 10), update(5.0))]), Key(0, 1)
    )
    moved = {n: state.trees["adapter"][n] - t for n, t in merged.trees["adapter"].items()}
    assert all((t - 2.0).abs().max() <= 1e-12 for t in moved.values())


def test_memory_of_a_merge_does_not_grow_with_the_clients(new_objects: None) -> None:
    """The peak of live tensor entries while the updates stream in, whatever their number."""
    tensors = {
        f"m.{i}.lora_{ab}.weight": torch.zeros(shape)
        for i in range(4)
        for ab, shape in (("A", (8, 256)), ("B", (256, 8)))
    }
    adapter = Adapter(layout_of(tensors, 1.0), tensors)
    method = fedit.method()
    state = method.init(adapter)
    size = adapter.layout.size
    peaks = []

    def live() -> int:
        return sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor)

    def updates(count: int) -> Iterator[tuple[Client, Payload]]:
        for i in range(count):
            values = rounded(torch.ones(size), "float32", generator(Key(i)))
            yield (
                Client(str(i), 1),
                Payload(adapter.layout, everything(adapter.layout), values, "known", "known"),
            )
            peaks.append(live())

    before = live()
    method.merge(state, updates(3), Key(0, 1))
    few = max(peaks) - before
    peaks.clear()
    method.merge(state, updates(40), Key(0, 1))
    assert max(peaks) - before <= few + size / 100
    assert few <= 3.1 * size


HELD = sorted(set(methods.names()) - {*server.STACKING, "full", "head"})
SOME = {"fslora_flasc", "hetlora", "fed_plora", "fedsvd", "ravan"}  # each merges in another way


@pytest.mark.parametrize("name", kinds.quick_of(HELD, SOME.__contains__))
def test_a_merge_holds_at_most_three_adapters(name: str, new_objects: None) -> None:
    """The server's own benchmark, small: it grows with nothing (docs/benchmarks.md has 1,000)."""
    assert 0 < round(server.measure(name, 6)["adapters"], 3) <= 3  # SCAFFOLD counts its clients
