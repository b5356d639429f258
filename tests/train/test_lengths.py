"""How long a text may be, against what transformers' models themselves take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from fedsieve import Lora, finetune
from fedsieve.errors import FedSieveError
from fedsieve.methods import fedit
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import from_recipe
from fedsieve.settings import Task
from fedsieve.sites import assignment
from fedsieve.sites.site import Rows, Site
from fedsieve.train.lengths import longest
from tests.conftest import Tiny
from tests.train import small

TABLES = (
    "albert", "bart", "bert", "biogpt", "camembert", "ctrl", "data2vec-text", "deberta",
    "distilbert", "electra", "esm-absolute", "gpt2", "gpt_neo", "gptj", "ibert", "longformer",
    "mbart", "mobilebert", "mpnet", "mpt", "openai-gpt", "opt", "roberta", "xlm", "xlm-roberta",
    "xmod",
)  # fmt: skip
COUNT_FROM_PADDING = ("camembert", "data2vec-text", "esm-absolute", "ibert", "mpnet", "roberta")
ROTARY = ("llama", "gpt_neox", "qwen2", "modernbert", "phi")
ENDLESS = ("t5", "umt5", "xlnet", "bloom", "funnel", "deberta-v2-relative")
SETTINGS: dict[str, dict[str, Any]] = {
    "esm-absolute": {"position_embedding_type": "absolute"},
    "t5": {"n_positions": small.POSITIONS},  # in old checkpoints, and never a limit
    "deberta-v2-relative": {"position_biased_input": False, "relative_attention": True},
}


def model_of(kind: str, folder: Path) -> Any:
    task: Task = "causal-lm" if kind in ("biogpt", "gptj", "ctrl") else "classification"
    given = SETTINGS.get(kind, {})
    small.make(kind.removesuffix("-absolute").removesuffix("-relative"), task, folder, **given)
    maker = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    return maker.from_pretrained(folder).eval()


def runs(model: Any, length: int) -> bool:
    ids = torch.tensor([[small.BEGIN, *[20] * (length - 2), small.END]])
    try:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError):
        return False
    return bool(out.logits.isfinite().all())


@pytest.mark.parametrize("kind", TABLES)
def test_the_longest_text_is_the_longest_that_runs(tmp_path: Path, kind: str) -> None:
    model = model_of(kind, tmp_path)
    most = longest(model)
    assert most is not None
    assert runs(model, most)
    assert not runs(model, most + 1)
    if kind in COUNT_FROM_PADDING:
        assert most == small.POSITIONS - small.PAD - 1


@pytest.mark.parametrize("kind", ROTARY)
def test_where_nothing_breaks_the_configuration_counts(tmp_path: Path, kind: str) -> None:
    model = model_of(kind, tmp_path)
    assert longest(model) == small.POSITIONS
    assert runs(model, small.POSITIONS)


@pytest.mark.parametrize("kind", ENDLESS)
def test_relative_positions_have_no_limit(tmp_path: Path, kind: str) -> None:
    model = model_of(kind, tmp_path)
    assert longest(model) is None
    assert runs(model, 5 * small.POSITIONS)


# --- every row is checked, wherever it comes in

LONG = "word1 " * 40  # tiny.bert has 32 positions
REFUSED = "texts of 42 tokens do not fit the model's 32 positions"


def rows(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "label": ["cars", "space"]})


@pytest.mark.parametrize("long", ["train", "test"])
def test_finetune_checks_training_and_test_rows(tiny: Tiny, long: str) -> None:
    sets = {"train": rows("cars1", "space1"), "test": rows("cars2", "space2")}
    sets[long] = rows("cars1", LONG)
    with pytest.raises(FedSieveError, match=REFUSED):
        finetune(
            str(tiny.bert),
            [rows("cars1", "space1"), sets["train"]],
            fedit.method(),
            rounds=1,
            test=sets["test"],
            lora=Lora(rank=2, targets=("query",)),
            max_length=64,
            device="cpu",
        )


@pytest.mark.parametrize("long", ["train", "test"])
def test_a_recipe_checks_training_and_test_rows(tiny: Tiny, tmp_path: Path, long: str) -> None:
    changes = {f"data__{long}": str(_with_a_long_row(tiny, tmp_path)), "data__max_length": 64}
    recipe = recipes.check(tiny.table(**changes))
    with pytest.raises(FedSieveError, match=REFUSED):
        from_recipe(recipe)


@pytest.mark.parametrize("long", ["train", "test"])
def test_a_site_checks_training_and_test_rows(tiny: Tiny, long: str) -> None:
    recipe = recipes.check(tiny.table(data__max_length=64, data__classes=["cars", "space"]))
    sets = {"train": rows("cars1", "space1"), "test": rows("cars2", "space2")}
    sets[long] = rows("cars1", LONG)
    site = Site(name="north", data=Rows(train="rows.csv", text="text", label="label"))
    with pytest.raises(FedSieveError, match=REFUSED):
        assignment.prepare("run", recipe, sets["train"], sets["test"], site, lambda _: None)


def _with_a_long_row(tiny: Tiny, folder: Path) -> Path:
    path = folder / "long.csv"
    path.write_text(tiny.train.read_text() + f"{LONG},cars,author1\n")
    return path


def test_a_token_without_an_embedding_is_named(tiny: Tiny, tmp_path: Path) -> None:
    """A token that the user added; padding of that kind has none to need."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny.bert)
    tokenizer.add_tokens(["brandnew"])
    AutoModelForSequenceClassification.from_pretrained(tiny.bert).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def run(text: str) -> None:
        finetune(
            str(tmp_path),
            [rows("cars1", text)],
            fedit.method(),
            rounds=1,
            lora=Lora(rank=2, targets=("query",)),
            device="cpu",
        )

    run("space1")
    size = len(tokenizer) - 1
    with pytest.raises(FedSieveError, match=f"texts have token {size}, .* for {size} tokens"):
        run("brandnew space1")
