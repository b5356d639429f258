"""Cores between frozen factors: what is in the tree, and which LoRA pairs it is."""

import pytest
import torch

from fedsieve.algebra.cores import (
    Cores,
    between,
    core_name,
    cored,
    gain_name,
    gain_of,
    head_of,
    no_gains,
    orthonormal,
)
from fedsieve.algebra.keys import Key
from tests import toy

PAIRS = toy.start().layout


@pytest.mark.parametrize(("heads", "gains"), [(1, False), (2, True), (8, False)])
def test_the_tree_has_cores_in_the_place_of_pairs(heads: int, gains: bool) -> None:
    layout = cored(PAIRS, Cores(heads, gains))
    side = toy.RANK // heads
    assert layout.names == tuple(sorted(layout.shapes)) == tuple(layout.shapes)
    assert (layout.pairs, layout.rank, layout.scale) == ((), toy.RANK, PAIRS.scale)
    expected = toy.OUTPUTS * toy.HIDDEN + 2 * heads * (side * side + gains)
    assert layout.size == expected
    for module in ("m.first", "m.second"):
        for head in range(heads):
            core, gain = core_name(module, head), gain_name(module, head)
            assert layout.shapes[core] == (side, side)
            assert (gain in layout.shapes) is gains
            assert head_of(core) == head_of(gain) == head
            assert (gain_of(core), gain_of(gain)) == (gain, None)
    assert (head_of(toy.HEAD), gain_of(toy.HEAD)) == (None, None)
    without = cored(PAIRS, Cores(heads))
    assert no_gains(layout, 1) == without.names


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (3, "3"),
        (16, "16"),
        pytest.param(10**5000, "one int that cannot be written out", id="of 5,001 digits"),
    ],
)
def test_heads_share_the_rank_evenly_or_not_at_all(heads: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said} heads do not share a rank of 8"):
        cored(PAIRS, Cores(heads))


def test_factors_are_orthonormal_and_their_key_s() -> None:
    factor = orthonormal(40, 7, Key(3).at("a"))
    assert (factor.T.double() @ factor.double() - torch.eye(7)).abs().max() < 1e-6
    assert torch.equal(factor, orthonormal(40, 7, Key(3).at("a")))
    assert (factor - orthonormal(40, 7, Key(4).at("a"))).abs().max() > 0.1
    # Gram-Schmidt: the first columns are those of fewer columns of the same matrix, and the first
    # is a vector of normal numbers at length one.
    draws = torch.randn(40, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: draws)
        made = orthonormal(40, 7, Key(0)).double()
    assert (made[:, 0] - draws[:, 0] / draws[:, 0].norm()).abs().max() < 1e-6
    for column in range(7):
        assert float(made[:, column] @ draws[:, column]) > 0


def test_what_stands_between_the_factors_is_the_sum_over_heads() -> None:
    """Against the sum written out: toy.products."""
    for cores in (Cores(), Cores(4, gains=True)):
        tree = toy.start(trains=cores).tensors
        tree = {n: t * 1.5 if "gain" in n else t for n, t in tree.items()}
        for module, (b, a), expected in zip(
            ("m.first", "m.second"), toy.factors(), toy.products(tree), strict=True
        ):
            assert (b @ between(tree, module) @ a - expected).abs().max() < 1e-12
