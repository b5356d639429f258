"""What a client may not train stands still, to the bit: a law over all methods, their options and
the trainer's. Weight decay and momentum move what no gradient moves.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsieve import methods
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Memory
from fedsieve.settings import Lora, Training
from fedsieve.train.local import fit
from fedsieve.train.model import load_base, set_up
from tests import kinds
from tests.conftest import LABELS, Tiny
from tests.methods.test_laws import ROWS, Row
from tests.train.test_train import classified

BUDGETS = (Budget(0.5, 0.5, 0.5), Budget(1.0, 0.25, 1.0))
PARTLY = ("fed_select", "sparse_adapter", "adapter_lth", "ffa_lora", "fedsvd", "rolora", "lora_a2")
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "sgd", "momentum": 0.0, "clip": 0.1},
    {"optimizer": "adamw", "proximal": 0.5},
)


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("row", kinds.some_of(((row,) for row in ROWS), 6), ids=str)
def test_what_the_view_lets_stand_stands(tiny: Tiny, row: Row) -> None:
    method = methods.load(row.name)(**row.options)
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=("query", "value"))
    cpu = torch.device("cpu")
    base = load_base(str(tiny.bert), "classification", LABELS, key=Key(0), pad_token_id=0)
    resident = set_up(base, "classification", lora, method.trains, key=Key(0), device=cpu)
    examples = classified(tiny, 8)
    start = resident.adapter()
    state, memories = method.init(start), dict[str, Memory]()
    still = moved = 0
    for number, chosen in enumerate(OPTIMIZERS, start=1):
        training = Training(lr=0.1, weight_decay=0.1, steps=2, batch=4, precision="fp32", **chosen)
        key = Key(7, number)
        plan, updates = method.plan(state, key), []
        for id, budget in enumerate(BUDGETS):
            client = Client(str(id), 8, budget)
            context = ClientContext(client, start, key._replace(client=client.id))
            payload = method.publish(plan, client, context.key)
            view, memory = method.view(payload, memories.get(client.id, {}), context)
            trained = fit(resident, view, examples, training, context.key).tensors
            for name, before in view.adapter.tensors.items():
                none = torch.zeros_like(before, dtype=torch.bool)
                may = view.moves.masks.get(name, ~none) if name in view.moves.names else none
                assert bits(trained[name][~may]) == bits(before[~may]), (name, training)
                still += int((~may).sum())
                moved += int((trained[name] != before)[may].sum())
            report, memories[client.id] = method.report(view, trained, memory, context)
            updates.append((client, report))
        state = method.merge(state, iter(updates), key)
    assert moved > 0
    assert still > 0 or row.name not in PARTLY or row.options.get("kind") == "ranks"
