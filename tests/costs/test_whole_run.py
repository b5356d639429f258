"""What a whole run will send, told before it begins: against runs, and against arithmetic."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, MistralConfig
from typer.testing import CliRunner

from fedsieve import methods
from fedsieve.algebra.keys import Key
from fedsieve.cli import app
from fedsieve.costs import whole_run
from fedsieve.costs.whole_run import of_recipe
from fedsieve.engine.local import in_process
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.settings import Lora
from fedsieve.train.model import load_base, set_up, shape_of
from tests import kinds, runs
from tests.conftest import Tiny

# Whose rounds differ from one another, whose clients differ, and who is not always there.
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"method": {"name": name}, "budgets": [{}]} for name in methods.names()},
    "ranks": {"method": {"name": "fslora"}, "budgets": [{"ratio": 0.25}, {"ratio": 0.5}, {}]},
    "masks": {"method": {"name": "flasc"}, "budgets": [{"down": 0.5, "up": 0.25}]},
    "decay": {
        "method": {"name": "flasc", "decay": 0.8}, "budgets": [{"down": 0.5, "up": 0.5}],
    },
    "lottery": {"method": {"name": "adapter_lth", "keep": 0.9}, "budgets": [{}]},
    "all of them": {"method": {"name": "fedit"}, "sampling": {"kind": "all"}, "budgets": [{}]},
    "poisson": {"method": {"name": "fedit"}, "sampling": {"kind": "poisson"}, "budgets": [{}]},
    "away": {"method": {"name": "flora"}, "sampling": {"availability": 0.4}, "budgets": [{}]},
    "machines": {
        "method": {"name": "flasc"},
        "sampling": {"extra": 2},
        "budgets": {
            "kind": "resources", "deadline": 60.0,
            "tiers": [{"memory": 100.0, "downlink": 0.01, "uplink": 0.001, "step_seconds": 6.0}],
        },
    },
    "layers": {
        "method": {"name": "fedit"}, "budgets": [{}], "model__settings": {"num_hidden_layers": 1},
    },
}  # fmt: skip
MASKED = (
    *("sparse_adapter", "adapter_lth", "flasc", "fed_select", "fslora_flasc", "hetlora"),
    *("masks", "decay", "lottery", "machines"),
)


each_kind = kinds.quick_of(KINDS, lambda kind: kind in kinds.QUICK or kind not in methods.names())


@pytest.mark.parametrize("kind", each_kind)
def test_a_bill_is_what_a_run_sends(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """To the byte, but for masks: the cohorts are the run's own."""
    table = {"rounds": 5, "cohort": 4, "partition": {"kind": "iid", "clients": 12}, **KINDS[kind]}
    given = recipe.check(tiny.table(**table))
    bill = of_recipe(given, classes=3, rows=20)
    runs.start_from(given, tmp_path / "run")
    last = runs.lines(tmp_path / "run")[-1]
    assert bill.rehearsed == bill.rounds == 5
    assert bill.dense == pytest.approx(last["dense_bytes"])
    within = 0.05 if kind in MASKED else 1e-9
    if kind == "florist":  # noise needs more ranks than what was learned
        assert last["total_bytes"] <= bill.total
    else:
        assert bill.total == pytest.approx(last["total_bytes"], rel=within)
    assert sum(part.clients for part in bill.parts) == 12


def test_rounds_that_are_not_rehearsed_are_as_the_last(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_run, "_WORK", 1)
    table = {"rounds": 600, "cohort": 4, "partition": {"kind": "iid", "clients": 12}}
    given = {**table, "method": {"name": "fedit"}, "budgets": [{}]}
    bill = of_recipe(recipe.check(tiny.table(**given)), classes=3)
    assert (bill.rehearsed, bill.rounds, bill.steady) == (6, 600, True)
    one = of_recipe(recipe.check(tiny.table(**{**given, "rounds": 1})), classes=3)
    assert bill.total == pytest.approx(600 * one.total)
    assert bill.dense == pytest.approx(600 * one.dense)
    falls = {**table, "method": {"name": "flasc", "decay": 0.8}, "budgets": [{"up": 0.5}]}
    assert not of_recipe(recipe.check(tiny.table(**falls)), classes=3).steady


def test_a_private_round_in_which_nobody_is_drawn_costs_nothing(tiny: Tiny) -> None:
    changes: dict[str, Any] = {
        "method": {"name": "fedit"},
        "budgets": None,
        "server": {"optimizer": "fedadam"},
        "sampling": {"kind": "poisson"},
        "privacy": {"clip": 1.0, "epsilon": 8.0, "delta": 1e-3},
        "cohort": 1,
    }
    found = [of_recipe(recipe.check(tiny.table(**changes, seed=s)), 3) for s in range(4)]
    # With this cohort a third of the rounds are empty; all of them sent what is sent is dense.
    assert any(bill.asked < 1 for bill in found)
    assert all(bill.total == bill.dense for bill in found)


def test_a_hundred_thousand_clients_are_soon_counted(tiny: Tiny) -> None:
    table = {"rounds": 2, "cohort": 4, "partition": {"kind": "iid", "clients": 100_000}}
    began = time.monotonic()
    bill = of_recipe(recipe.check(tiny.table(**table)), classes=3)
    assert sum(part.clients for part in bill.parts) == 100_000
    assert time.monotonic() - began < 20


def test_clients_beyond_counting_are_refused(tiny: Tiny) -> None:
    given = recipe.check(tiny.table(partition={"kind": "iid", "clients": 10**18}, budgets=[{}]))
    with pytest.raises(FedSieveError, match="1,000,000,000,000,000,000 clients: costs"):
        of_recipe(given, classes=3)


def test_what_a_recipe_leaves_open_is_asked_for(tiny: Tiny) -> None:
    by_owner = {"partition": {"kind": "column", "column": "author"}}
    given = recipe.check(tiny.table(**by_owner))
    with pytest.raises(FedSieveError, match=r"clients partition\.kind 'column' makes.*--clients"):
        of_recipe(given, classes=3)
    assert sum(part.clients for part in of_recipe(given, classes=3, clients=7).parts) == 7
    listed = {"budgets": {"kind": "list", "clients": {"ann": {}, "bob": {"down": 0.5}}}}
    named = of_recipe(recipe.check(tiny.table(**by_owner, **listed)), classes=3)
    assert [part.clients for part in named.parts] == [1, 1]
    timed = {"budgets": KINDS["machines"]["budgets"]}
    with pytest.raises(FedSieveError, match="say how many with --rows, or give"):
        of_recipe(recipe.check(tiny.table(**timed)), classes=3)
    with pytest.raises(FedSieveError, match="say how many with --classes"):
        of_recipe(recipe.check(tiny.table()))


CONTEST = [name for name in recipe.shipped() if name.startswith("flowertune-")]


def test_the_contests_recipes_differ_in_their_rows_alone() -> None:
    assert len(CONTEST) == 4
    first, *others = [recipe.load(name) for name in CONTEST]
    asked = {first.data.train}
    for other in others:
        asked.add(other.data.train)
        data = other.data.model_copy(
            update={"train": first.data.train, "prompt": first.data.prompt}
        )
        assert other.model_copy(update={"name": first.name, "data": data}) == first
    assert len(asked) == 4


@pytest.mark.slow
def test_the_contest_fits_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Mistral-7B the configuration is enough; transformers' defaults are its sizes."""
    monkeypatch.setattr(whole_run, "_FEWEST", 1)
    monkeypatch.setattr(whole_run, "_WORK", 1)
    MistralConfig(vocab_size=32_768, architectures=["MistralForCausalLM"]).save_pretrained(tmp_path)
    asked = ["costs", CONTEST[0], f"model.source={tmp_path}", "--most", "200000"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    # Of q 4096 x 4096 and of v 4096 x 1024, in 32 layers; 4 bytes, 2 clients, both ways.
    numbers = 32 * 32 * ((4096 + 4096) + (4096 + 1024))
    assert f"{numbers:,} trained numbers beside 7,248,023,552" in result.output
    whole = numbers * 4 * 2 * 2 * 200 / 1e6
    told = re.search(r"the run: ([0-9,.]+) MB", result.output)
    assert told is not None
    assert float(told[1].replace(",", "")) == pytest.approx(whole, rel=1e-4)  # and the headers
    assert "of 200,000 MB: 21.8%, 156,3" in result.output
    over = CliRunner().invoke(app, [*asked[:-1], "40000"])
    assert over.exit_code == 1
    assert "MB too many" in over.output


@pytest.mark.parametrize("base", ["bert", "gpt2"])
def test_what_a_checkpoint_lacks_is_counted(tiny: Tiny, tmp_path: Path, base: str) -> None:
    """A pooler that would be drawn at load is trained, and sent: the shapes know of it too."""
    folder, task = tmp_path / "body", "classification"
    without = {"add_pooling_layer": False} if base == "bert" else {}
    AutoModel.from_pretrained(getattr(tiny, base), **without).save_pretrained(folder)
    lora = Lora(rank=2, alpha=2.0)
    layouts = [
        set_up(made, task, lora, "lora", key=Key(0), device=made.device).layout
        for made in (
            shape_of(str(folder), task, 3),
            load_base(str(folder), task, ("a", "b", "c"), key=Key(0)),
        )
    ]
    assert layouts[0].shapes == layouts[1].shapes


def test_what_is_rehearsed_is_bounded_by_no_key_of_a_recipe(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cohort without masks one message is as long as another: stand-ins give the very sum."""
    monkeypatch.setattr(whole_run, "_COHORT", 8)
    table: dict[str, Any] = {"partition": {"kind": "iid", "clients": 400}, "cohort": 200}
    table |= {"method": {"name": "fedit"}, "budgets": [{}], "rounds": 3}
    cases: list[dict[str, Any]] = [
        {}, {"sampling": {"kind": "all"}}, {"sampling": {"extra": 40}, "budgets": {
            "kind": "resources", "deadline": 600.0,
            "tiers": [{"memory": 100.0, "downlink": 1.0, "uplink": 1.0, "step_seconds": 1.0}],
        }},
    ]  # fmt: skip
    for changes in cases:
        given = recipe.check(tiny.table(**table | changes))
        whole = of_recipe(given, classes=3, rows=2)
        assert whole.stand_ins is None
        with monkeypatch.context() as patch:
            patch.setattr(whole_run, "_WORK", 1)
            some = of_recipe(given, classes=3, rows=2)
        assert some.stand_ins == 8
        assert some.asked == pytest.approx(whole.asked)
        assert some.total == pytest.approx(whole.total)
        assert some.dense == pytest.approx(whole.dense)
    huge = {
        **table,
        "rounds": 10**9,
        "cohort": 10**5,
        "partition": {"kind": "iid", "clients": 10**5},
    }
    messages = 0
    encode = in_process

    def counted(*given: Any) -> Any:
        exchange = encode(*given)

        def carry(sent: Any, key: Key) -> Any:
            nonlocal messages
            for reply in exchange.carry(sent, key):
                messages += 1
                yield reply

        return exchange._replace(carry=carry)

    monkeypatch.setattr(whole_run, "in_process", counted)
    monkeypatch.setattr(whole_run, "_WORK", 1)
    bill = of_recipe(recipe.check(tiny.table(**huge)), classes=3)
    assert messages == 6 * 8
    assert (bill.asked, bill.rounds) == (10**5, 10**9)
    changing = {**huge, "method": {"name": "flora"}}
    with pytest.raises(FedSieveError, match=r"flora some cannot stand for all.*cohort=8"):
        of_recipe(recipe.check(tiny.table(**changing)), classes=3)
