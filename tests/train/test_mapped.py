"""A base that several processes map: the same numbers, as far from a whole line as before."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsieve.train import mapped
from fedsieve.train.mapped import LINE
from tests.conftest import Tiny
from tests.tasks.test_federated import KINDS
from tests.train.test_step import prepared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moved", [0, 4, 20])
def test_what_is_mapped_lies_as_it_lay(tiny: Tiny, tmp_path: Path, moved: int, dtype: Any) -> None:
    """moved: bytes by which some parameters lie beside the beginning of a line"""
    theirs, _ = prepared(tiny, KINDS[0], dropout=False, dtype=dtype)
    for number, parameter in enumerate(theirs.model.parameters()):
        if moved and number % 3 and parameter.dtype == getattr(torch, dtype):
            room = torch.empty(moved + parameter.nbytes + LINE, dtype=torch.uint8)
            begin = -room.data_ptr() % LINE + moved
            own = room[begin : begin + parameter.nbytes].view(parameter.dtype)
            parameter.data = own.view(parameter.shape).copy_(parameter.data)
    mapped.store(theirs, tmp_path / "base")
    ours, _ = prepared(tiny, KINDS[0], dropout=False, dtype=dtype)
    kept = {name: p.data_ptr() for name, p in ours.model.named_parameters()}
    mapped.use(ours, tmp_path / "base")
    there = 0
    for (name, one), (_, other) in zip(
        ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other)
        if one.data_ptr() != kept[name]:
            there += 1
            assert one.data_ptr() % LINE == other.data_ptr() % LINE
    assert there > 10
    before = (tmp_path / "base").read_bytes()
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.add_(1)
    assert (tmp_path / "base").read_bytes() == before


def test_the_file_of_another_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    theirs, _ = prepared(tiny, KINDS[0], dropout=False)
    mapped.store(theirs, tmp_path / "base")
    other, _ = prepared(tiny, KINDS[0], dropout=False, dtype="bfloat16")
    with pytest.raises(ValueError, match="another shape or type"):
        mapped.use(other, tmp_path / "base")
