"""docs/wire.md is enough: a reader written from it alone finds in our messages what we put in."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from fedsieve.algebra.adapter import Layout, Pair
from fedsieve.algebra.payload import Payload, Seed, Values
from fedsieve.algebra.support import Support, draw_ranks
from fedsieve.wire import decode, encode
from tests.wire import reader
from tests.wire.cases import (
    golden_payloads,
    knowledge,
    layout_of_pairs,
    random_base,
    random_values,
    same,
)

DOCS = Path(__file__).parents[2] / "docs" / "wire.md"


Known = tuple[list[list[int]] | None, dict[str, list[int]] | None]


def spec_of(layout: Layout) -> reader.Spec:
    pairs = [(pair.module, pair.a, pair.b) for pair in layout.pairs]
    return reader.Spec(dict(layout.shapes), pairs, layout.rank)


def told_before(payload: Payload) -> Known:
    known = knowledge(payload)
    if known is None:
        return None, None
    ranks = None if known.ranks is None else known.ranks.tolist()
    masks = {name: mask.reshape(-1).int().tolist() for name, mask in known.masks.items()}
    return ranks, masks


def read(payload: Payload, data: bytes) -> reader.Message:
    return reader.read(data, spec_of(payload.layout), *told_before(payload))


def assert_read(payload: Payload, message: reader.Message) -> None:
    support, values = payload.support, payload.values
    assert message.names == list(support.names)
    assert message.ranks == (None if support.ranks is None else support.ranks.tolist())
    masks = {name: mask.reshape(-1).int().tolist() for name, mask in support.masks.items()}
    assert message.masks == masks
    told = torch.tensor(message.values, dtype=torch.float64)
    assert torch.equal(told, values.data.double())
    assert torch.equal(torch.signbit(told), torch.signbit(values.data.double()))
    assert message.scales == values.scales.tolist()


@pytest.mark.parametrize("name", golden_payloads())
def test_a_second_reader_reads_our_messages(name: str) -> None:
    payload = golden_payloads()[name]
    data = encode(payload)
    if payload.control is not None:
        control, message = reader.read_control(data, spec_of(payload.layout), *told_before(payload))
        assert_read(payload.control, control)
        assert_read(payload, message)
        return
    if payload.base is None:
        assert_read(payload, read(payload, data))
        return
    envelope = reader.read_envelope(data, spec_of(payload.layout), *told_before(payload))
    assert envelope.since == payload.base.since
    assert envelope.rank == payload.base.change.layout.rank
    assert_read(payload.base.change, envelope.change)
    assert_read(payload, envelope.message)


def test_a_second_reader_reads_a_base_under_convolutions_and_heads() -> None:
    layout = layout_of_pairs(2, 3, 6, 5, (4,))
    pair = layout.pairs[0]
    shapes = {**layout.shapes, pair.a: (3, 2, 3, 3), pair.b: (4, 3, 1, 1)}
    layout = Layout(shapes, layout.pairs, 3, 1.0)
    values = random_values("bfloat16", layout.size, 0)
    payload = Payload(layout, Support(layout.names, None, {}), values, "known", "sent")
    for rank, shape in ((0, (4, 2, 3, 3)), (7, (7, 2, 3, 3))):
        base = random_base(layout, 0, rank, "float32", 1)
        assert shape in base.change.layout.shapes.values()
        envelope = reader.read_envelope(encode(payload._replace(base=base)), spec_of(layout))
        assert_read(base.change, envelope.change)
        assert_read(payload, envelope.message)


def test_a_second_reader_reads_blocks_of_every_shape() -> None:
    layout = layout_of_pairs(0, 0, 0, 0, (60, 128))
    draws = torch.Generator().manual_seed(0)
    low = torch.randint(0, 128, (60, 1), generator=draws)
    height = torch.rand(60, 128, generator=draws) ** (8 * torch.rand(60, 1, generator=draws))
    data = (low + height * (127 - low)).to(torch.int8).reshape(-1)
    support = Support(layout.names, None, {"head.0": torch.ones(60, 128, dtype=torch.bool)})
    values = Values("int8", data, torch.rand(60, generator=draws))
    payload = Payload(layout, support, values, "known", "sent")
    assert_read(payload, read(payload, encode(payload)))


def example() -> Payload:
    names = ("head.bias", "q.lora_A.weight", "q.lora_B.weight")
    shapes = dict(zip(names, ((2,), (2, 8), (6, 2)), strict=True))
    layout = Layout(shapes, (Pair("q", *names[1:]),), 2, 1.0)
    masks = {
        names[1]: torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0]]).bool(),
        names[2]: torch.tensor([[1, 1, 0, 1, 1, 1]]).bool().T,
    }
    numbers = [127, -100, 90, -127, 101, 99, -88, 93, 120]
    values = Values("int8", torch.tensor(numbers, dtype=torch.int8), torch.tensor([1 / 128]))
    ranks = draw_ranks(7, 1, 2, 1, shared=True)
    return Payload(layout, Support(names, ranks, masks), values, Seed(7, True), "sent")


def test_the_example_of_the_page_is_true() -> None:
    page = DOCS.read_text(encoding="utf-8")
    payload = example()
    data = encode(payload)
    dumps = re.findall(r"```\n([0-9a-f \n]+)```", page)
    assert [bytes.fromhex(dump) for dump in dumps] == [data]
    table = page.split("## An example")[1].split("| bytes | what |")[1]
    cells = re.findall(r"^\| (`[0-9a-f` ]+) \|", table, flags=re.MULTILINE)
    assert bytes.fromhex("".join(cells).replace("`", " ")) == data
    assert payload.support.ranks is not None
    assert payload.support.ranks.tolist() == [[1]]
    assert_read(payload, read(payload, data))
    assert same(decode(data, payload.layout), payload)


def test_the_fingerprint_text_of_the_page_is_true() -> None:
    text = next(
        line.strip() for line in DOCS.read_text(encoding="utf-8").splitlines() if "[2, [[" in line
    )
    layout = example().layout
    rows = [[name, list(layout.shapes[name])] for name in layout.names]
    assert text == json.dumps([layout.rank, rows, layout.pairs])
    assert int(hashlib.blake2b(text.encode(), digest_size=4).hexdigest(), 16) == (
        int.from_bytes(layout.fingerprint.to_bytes(4, "little"), "big")
    )


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    from fedsieve.wire import coder, mask, values

    page = re.sub(r"\s+", " ", DOCS.read_text(encoding="utf-8"))
    tables = {
        "SHARES": coder.SHARES.tolist(),
        "WEIGHTS": coder.WEIGHTS.tolist(),
        "DENSITIES": list(mask.DENSITIES),
        "LIMITS": mask.LIMITS.tolist(),
        "SLOPES": list(values.SLOPES),
        "FALLS": values.FALLS.tolist(),
    }
    for name, numbers in tables.items():
        assert re.search(rf"{name} *= {', '.join(map(str, numbers))}(?![,0-9])", page), name
