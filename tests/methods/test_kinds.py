"""The methods that stand for all in quick tests have whatever a method of FedSieve can have."""

import re

from fedsieve import methods
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory
from fedsieve.engine.loop import begin, rounds
from tests import toy
from tests.kinds import QUICK, each_method
from tests.methods.test_laws import EXACT

BUDGETS = (Budget(0.25, 0.5, 0.25), Budget(0.5, 0.25, 0.5), Budget())


def traits(name: str) -> set[str]:
    """What there is to a method: what it says of itself, and what two rounds on the toy show."""
    method = methods.load(name)(**EXACT)
    budgets = [{k: v for k, v in b._asdict().items() if k in method.knobs} for b in BUDGETS]
    members = toy.clients([Budget(**budget) for budget in budgets])
    memories: dict[str, Memory] = {}
    started = toy.start(trains=method.trains)
    setup = toy.federation(method, members, adapter=started, memories=memories)
    _, progress = begin(setup, started)
    receipts = []
    for _, more, now in rounds(setup, progress, 2):
        receipts += more
        progress = now

    trains = method.trains if isinstance(method.trains, str) else "cores"
    found = {f"trains {trains}"} - {"trains lora"}
    found |= {f"uses {knob}" for knob in method.knobs}
    kept = progress.state.trees.keys() - {"adapter"}
    found |= {f"the server keeps {re.sub('[0-9]+', 'n', group)}" for group in kept}
    found |= {f"clients keep {group}" for memory in memories.values() for group in memory}
    found |= {"keeps what came from rows"} if method.keeps else set()
    found |= {"models of their own"} if method.personal is not None else set()
    based = bool(method.export(progress.state).base)
    found |= {"a base"} if based else set()
    found |= {"no mean of changes, and no base"} if not (method.linear or based) else set()
    for way in ("down", "up"):
        masked = any(getattr(r, f"{way}_head") is not None for r in receipts)
        found |= {f"masks {way}"} if masked else set()
    weak, *_, whole = members
    plan = method.plan(method.init(started), Key(7, 1))
    views = []
    for client, number in ((weak, 1), (whole, 1), (whole, 2)):
        key = Key(7, number, client.id)
        payload = method.publish(plan, client, key)
        views.append(method.view(payload, {}, toy.context(client, key, method.trains))[0])
    found |= {"a base that is the client's"} if views[0].adapter.base and not based else set()
    found |= {"trains a part"} if {*views[1].moves.names} < started.tensors.keys() else set()
    found |= {"by turns"} if views[1].moves.names != views[2].moves.names else set()
    return found or {"nothing beside LoRA and a mean"}


def test_the_quick_ones_have_whatever_a_method_has() -> None:
    of = {name: traits(name) for name in methods.names()}
    assert of.keys() >= QUICK.keys()
    among = set[str]().union(*(of[name] for name in QUICK))
    lacking = {name: of[name] - among for name in of if of[name] - among}
    assert not lacking, f"no method in QUICK of tests/kinds.py has it; add one that has: {lacking}"
    # None is there for nothing: without it something would be missing.
    for name in QUICK:
        others = set[str]().union(*(of[other] for other in QUICK if other != name))
        assert of[name] - others, name


def test_every_method_is_in_the_table_and_the_others_are_slow() -> None:
    marked = {each.values[0]: bool(each.marks) for each in each_method()}
    assert marked == {name: name not in QUICK for name in methods.names()}
    some = each_method("flora", "florist")
    assert [(each.values[0], bool(each.marks)) for each in some] == [
        ("flora", True),
        ("florist", False),
    ]
