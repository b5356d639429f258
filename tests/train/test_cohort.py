"""Clients at once train as one after another: the oracle is `local.fit`, client by client."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.support import everything
from fedsieve.errors import FedSieveError
from fedsieve.settings import Training
from fedsieve.tasks.examples import Examples, count, take
from fedsieve.train import local
from fedsieve.train.cohort import Work, check_together, fit_together
from fedsieve.train.local import Fit
from fedsieve.train.model import ResidentModel
from tests import kinds
from tests.conftest import Tiny
from tests.tasks.test_federated import KINDS, Kind, quietly
from tests.train import families
from tests.train.families import Family
from tests.train.test_step import LANGUAGE, PLAIN, each_family, of_family, penalty, prepared

SIZES = (11, 3, 7, 1)  # rows of each client: batches of 4 are 3, 1, 2, 1 a pass, and unequal
RANKS = (4, 2, 1, 3)


def works(resident: ResidentModel, examples: Examples, *, masked: bool = False) -> list[Work]:
    """Clients of unequal ranks and rows, each from a random start of its own."""
    made = []
    for number, (size, rank) in enumerate(zip(SIZES, RANKS, strict=True)):
        layout = resident.layout
        if layout.pairs:
            layout = layout.narrow(rank, layout.scale * rank / layout.rank)
        draw = torch.Generator().manual_seed(number)
        tree = {n: 0.2 * torch.randn(layout.shapes[n], generator=draw) for n in layout.names}
        moves = everything(layout)
        if masked:
            names = [pair.b for pair in layout.pairs] + [layout.pairs[0].a]
            masks = {n: torch.rand(layout.shapes[n], generator=draw) < 0.5 for n in names[1:3]}
            moves = moves._replace(names=tuple(sorted(names)), masks=masks)
        view = View(Adapter(layout, tree), resident.layout, everything(resident.layout), moves)
        index = torch.arange(size) % count(examples)
        made.append(Work(view, take(examples, index), Key(3, 1, str(number))))
    return made


def close(got: Fit, expected: Fit) -> None:
    assert got.steps == expected.steps
    assert got.memory == expected.memory
    assert got.loss == pytest.approx(expected.loss, rel=1e-4)
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, atol=2e-5, rtol=1e-3)


def compare(resident: ResidentModel, clients: list[Work], training: Training) -> None:
    check_together(resident)
    plain = [local.fit(resident, each.view, each.examples, training, each.key) for each in clients]
    for fit, expected in zip(fit_together(resident, clients, training), plain, strict=True):
        close(fit, expected)
    again = local.fit(resident, clients[0].view, clients[0].examples, training, clients[0].key)
    assert again.loss == plain[0].loss  # the model is as it was


SGD = replace(PLAIN, batch=4, clip=None)
TRAININGS = [
    replace(SGD, clip=0.05),
    replace(SGD, weight_decay=0.1, steps=4),
    replace(SGD, optimizer="adamw", lr=0.01, weight_decay=0.1),
    replace(SGD, micro_batch=3, clip=0.05),
    replace(SGD, micro_batch=3, epochs=3, proximal=2.0),
]
MADE: list[tuple[Kind, Training]] = [
    *((kind, TRAININGS[0]) for kind in KINDS),
    *((KINDS[0], training) for training in TRAININGS[1:]),
    *((LANGUAGE[0], training) for training in TRAININGS[1:]),
    *((kind, replace(SGD, packing=True)) for kind in LANGUAGE),
    (KINDS[0], replace(SGD, checkpointing=True)),
    (KINDS[-1], replace(SGD, augment="crop-flip")),
    (next(kind for kind in KINDS if kind.task == "token-classification"), TRAININGS[3]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "training"),
    kinds.some_of(MADE, 2),
    ids=[f"{kind.task}-{n}" for n, (kind, _) in enumerate(MADE)],
)
@quietly
def test_clients_at_once_train_as_one_after_another(
    tiny: Tiny, kind: Kind, training: Training
) -> None:
    resident, examples = prepared(tiny, kind)
    compare(resident, works(resident, examples), training)


@pytest.mark.parametrize("training", TRAININGS)
@quietly
def test_what_does_not_move_stays_for_each_client(tiny: Tiny, training: Training) -> None:
    resident, examples = prepared(tiny, KINDS[0])
    clients = works(resident, examples, masked=True)
    compare(resident, clients, training)
    for fit, client in zip(fit_together(resident, clients, training), clients, strict=True):
        view = client.view
        for name, tensor in view.adapter.tensors.items():
            own = torch.zeros_like(tensor, dtype=torch.bool)
            if name in view.moves.names:
                own = view.moves.masks.get(name, torch.ones_like(own))
            assert torch.equal(fit.tensors[name][~own], tensor[~own])
            assert not own.any() or not torch.equal(fit.tensors[name][own], tensor[own])


@quietly
def test_penalties_and_bases_and_what_moves_are_each_clients_own(tiny: Tiny) -> None:
    """Clients that cannot share a pass are trained in as many as it takes."""
    resident, examples = prepared(tiny, KINDS[0])
    clients = works(resident, examples)
    layout = resident.layout
    for number, change in ((0, 0.0), (2, 0.05), (3, 0.05)):
        shapes = {f"{p.module}.base": (layout.shapes[p.b][0], layout.shapes[p.a][1])
                  for p in layout.pairs}  # fmt: skip
        base = {name: torch.full(shape, change) for name, shape in shapes.items()}
        own = clients[number].view
        own = own._replace(adapter=own.adapter._replace(base=base), penalty=penalty)
        clients[number] = clients[number]._replace(view=own)
    names = tuple(name for name in clients[3].view.moves.names if "lora_A" not in name)
    own = clients[3].view
    own = own._replace(moves=own.moves._replace(names=names))
    clients[3] = clients[3]._replace(view=own)
    compare(resident, clients, SGD)


@quietly
def test_a_client_that_diverges_is_alone_with_it(tiny: Tiny) -> None:
    resident, examples = prepared(tiny, KINDS[0])
    clients = works(resident, examples)
    wild = clients[1].view
    tensors = {name: t * 1e30 for name, t in wild.adapter.tensors.items()}
    wild = wild._replace(adapter=wild.adapter._replace(tensors=tensors))
    clients[1] = clients[1]._replace(view=wild)
    training = replace(SGD, steps=18)
    fits = fit_together(resident, clients, training)
    assert not abs(fits[1].loss) < float("inf")
    for number in (0, 2, 3):
        own = clients[number]
        close(fits[number], local.fit(resident, own.view, own.examples, training, own.key))


@quietly
def test_dropout_follows_from_the_keys_and_a_base_may_be_half(tiny: Tiny) -> None:
    resident, examples = prepared(tiny, KINDS[0], dropout=True, dtype="bfloat16")
    clients = works(resident, examples)
    one, other = (fit_together(resident, clients, SGD) for _ in range(2))
    assert [fit.loss for fit in one] == [fit.loss for fit in other]
    moved = [each._replace(key=each.key._replace(round=2)) for each in clients]
    assert [fit.loss for fit in fit_together(resident, moved, SGD)] != [fit.loss for fit in one]


# Layers that are given a part of the tokens (experts), or rows in another order, cannot be split by
# client, and what is trained whole beside linear layers is not stacked.
CANNOT = {
    **dict.fromkeys(("resnet", "regnet", "efficientnet"), "belongs to a layer of kind Conv2d"),
    **dict.fromkeys(("longformer", "mobilevit", "segformer"), "its clients' gradients are others"),
    **dict.fromkeys(("cvt", "data2vec-vision"), "belongs to a layer of kind LayerNorm"),
    "levit": "belongs to a layer of kind BatchNorm1d",
    "modernbert-decoder classification": r"head\.norm\.weight belongs to a layer of kind LayerNorm",
    "modernbert": r"head\.norm\.weight belongs to a layer of kind LayerNorm",
    "poolformer": "belongs to a layer of kind PoolFormerGroupNorm",
    "rwkv": "it does not run so",
    "swiftformer": "belongs to a layer of kind BatchNorm2d",
    "xlnet": "its clients' gradients are others",
}
NOISY = {"phimoe"}  # its router draws while it trains, whatever its dropout


@each_family
def test_every_family_trains_at_once_or_says_why_not(
    family: Family, task: str, tmp_path: Path
) -> None:
    resident = of_family(tmp_path, family, task, rate=0.0)
    cannot = CANNOT.get(f"{family.name} {task}", CANNOT.get(family.name))
    if cannot is not None:
        with pytest.raises(FedSieveError, match=cannot):
            check_together(resident)
        return
    clients = works(resident, families.examples(resident.model, task))
    if family.name in NOISY:
        one, other = (fit_together(resident, clients, SGD) for _ in range(2))
        assert [fit.loss for fit in one] == [fit.loss for fit in other]
        return
    compare(resident, clients, replace(SGD, steps=2))
