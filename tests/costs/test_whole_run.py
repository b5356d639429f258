"""What a whole run will send, told before it begins: against runs, and against arithmetic."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, MistralConfig
from typer.testing import CliRunner

from fedsieve.algebra.keys import Key
from fedsieve.cli import app
from fedsieve.costs.whole_run import of_recipe
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipe
from fedsieve.settings import Lora
from fedsieve.train.model import load_base, set_up, shape_of
from tests import runs
from tests.conftest import Tiny

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"method": {"name": "fedit"}, "budgets": [{}]},
    "ranks": {"method": {"name": "fslora"}, "budgets": [{"ratio": 0.25}, {"ratio": 0.5}, {}]},
    "masks": {"method": {"name": "flasc"}, "budgets": [{"down": 0.5, "up": 0.25}]},
    "all of them": {
        "method": {"name": "fedit"}, "budgets": [{}], "sampling": {"kind": "all"},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_bill_is_what_a_run_sends(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    given = {"rounds": 12, "cohort": 4, "partition": {"kind": "iid", "clients": 12}, **KINDS[kind]}
    bill = of_recipe(recipe.check(tiny.table(**given)), classes=3)
    runs.start(tiny, tmp_path / "run", **given)
    last = runs.lines(tmp_path / "run")[-1]
    sent = last["total_bytes"]
    assert bill.dense * bill.rounds == pytest.approx(last["dense_bytes"])
    # Who is drawn differs from the mean over all; masks are entropy-coded.
    within = {"ranks": 0.25, "masks": 0.1}.get(kind, 1e-9)
    assert bill.total == pytest.approx(sent, rel=within)
    assert sum(count for _, count, _ in bill.costs) == 12


def test_what_a_recipe_leaves_open_is_asked_for(tiny: Tiny) -> None:
    by_owner = {"partition": {"kind": "column", "column": "author"}}
    with pytest.raises(FedSieveError, match=r"how many clients partition\.kind 'column' makes"):
        of_recipe(recipe.check(tiny.table(**by_owner)), classes=3)
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


def test_the_contest_fits_its_budget(tmp_path: Path) -> None:
    """Of Mistral-7B the configuration is enough; transformers' defaults are its sizes."""
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
