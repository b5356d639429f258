"""LoRA goes where PEFT itself would put it, and every name that a user gives counts."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.settings import Lora, Task
from fedsieve.sites import assignment, foreign
from fedsieve.train import targets
from fedsieve.train.model import ResidentModel, attach, load_base
from tests.conftest import LABELS, Tiny
from tests.train import families

CLASSIFIER = ("bert", "classification")
CAUSAL = ("gpt2", "causal-lm")


def resident_of(source: Path, task: Task, **lora: Any) -> ResidentModel:
    classes = LABELS if task == "classification" else ()
    base = load_base(str(source), task, classes, key=Key(0), pad_token_id=0)
    return attach(base, task, Lora(rank=2, **lora), key=Key(0), device=torch.device("cpu"))


def layers_of(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(
    ("where", "lora", "count"),
    [
        (CLASSIFIER, {}, 4),
        (CLASSIFIER, {"targets": "all-linear"}, 13),  # the pooler too
        (CLASSIFIER, {"targets": r".*\.(query|value)"}, 4),
        (CLASSIFIER, {"targets": r".*layer\.1\..*dense"}, 3),
        (CLASSIFIER, {"targets": r"(.*(query|value))?"}, 4),  # the model's own name is empty
        (CLASSIFIER, {"targets": ("query", "layer.1.output.dense")}, 3),
        (CLASSIFIER, {"targets": ("bert.encoder.layer.0.attention.self.key",)}, 1),
        (CLASSIFIER, {"targets": ("query", "dense")}, 9),  # of dense, none in the head
        (CLASSIFIER, {"targets": ("word_embeddings", "query")}, 3),
        (CLASSIFIER, {"targets": ("query", "key"), "layers_to_transform": (1,)}, 2),
        (CLASSIFIER, {"targets": ("query",), "layers_to_transform": 0}, 1),
        (CLASSIFIER, {"layers_to_transform": (1,), "layers_pattern": "layer"}, 2),
        (CLASSIFIER, {"layers_to_transform": (0, 1), "layers_pattern": ("h", "layer")}, 4),
        (CAUSAL, {}, 2),
        (CAUSAL, {"targets": "all-linear"}, 8),
        (CAUSAL, {"targets": r"transformer\.h\.0\.mlp\.c_\w+"}, 2),
        (CAUSAL, {"targets": ("attn.c_proj",), "layers_to_transform": (1,)}, 1),
    ],
)
def test_the_layers_are_pefts(
    tiny: Tiny, where: tuple[str, Task], lora: dict[str, Any], count: int
) -> None:
    source, task = getattr(tiny, where[0]), where[1]
    auto: Any = AutoModelForCausalLM
    if task == "classification":
        auto = AutoModelForSequenceClassification
    renamed = {"target_modules" if key == "targets" else key: given for key, given in lora.items()}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in renamed.items()}
    kind = "SEQ_CLS" if task == "classification" else "CAUSAL_LM"
    config = LoraConfig(task_type=kind, r=2, fan_in_fan_out=task == "causal-lm", **listed)
    oracle = layers_of(get_peft_model(auto.from_pretrained(source), config))
    resident = resident_of(source, task, **lora)
    assert layers_of(resident.model) == oracle
    assert len(resident.layout.pairs) == len(oracle) == count


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("query", "qurey")}, "'qurey'.*did you mean 'query'"),
        ({"targets": ("query", "layer.7.attention.self.query")}, r"'layer\.7\.att.*no layer is"),
        ({"targets": ("query", "self.dense")}, r"names 'self\.dense', and no layer is called so"),
        ({"targets": ("query", "uery")}, "names 'uery'"),
        ({"targets": ("query", "classifier")}, "'classifier', which is trained whole already"),
        ({"targets": ("query", "pooler.dense"), "whole": ("pooler",)}, "no layer is called so"),
        ({"targets": ("query", "key"), "layers_to_transform": (1, 2)}, "names layer 2"),
        (
            {"targets": ("query", "layer.0.output.dense"), "layers_to_transform": (1,)},
            r"'layer\.0\.output\.dense', and no layer among lora\.layers_to_transform",
        ),
        ({"targets": "query"}, r"regular expression 'query': .* a list of names, here \['query'\]"),
        ({"targets": "all-lnear"}, r"expression 'all-lnear': .*did you mean 'all-linear'"),
        ({"targets": r".*layer\.7.*"}, "no module's whole name matches"),
        ({"targets": ("attention",)}, "'attention', which no module that can take LoRA"),
        ({"targets": r".*attention\.self"}, "LoRA cannot be added to the model: Target module"),
        (
            {"targets": ("query",), "layers_to_transform": (0,), "layers_pattern": "h"},
            "cannot be added",
        ),
    ],
)
def test_what_is_asked_for_and_not_there(tiny: Tiny, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(FedSieveError, match=message) as caught:
        resident_of(tiny.bert, "classification", **lora)
    assert "\n" not in str(caught.value)


# What backtracking never is through with, in several ways of writing it.
ENDLESS = [
    "(.+)+!", "((.+)?)+[A-Z]", "(.|.)*#", "(?:.|..)*[A-Z]", r"(?:\w|\w\w|\.)+[A-Z]", "(a+)+b",
    ".*" * 40 + "#", ".*" * 40 + "[A-Z]", r"(?:(?=(.*))\1.|.)*#", r"(.*)*\1[A-Z]",
    "(?:(?:.?){30}){30}#", "(" + "a*" * 900 + ")x", "(x*)*" * 300 + "y",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_takes_for_ever(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(targets, "PATIENCE", 0.5)
    began = time.monotonic()
    with pytest.raises(FedSieveError, match=r"no module's whole name matches|was not through"):
        resident_of(tiny.bert, "classification", targets=pattern)
    assert time.monotonic() - began < 10


def test_a_pattern_takes_what_it_matches_and_no_more(tiny: Tiny) -> None:
    """To PEFT a name is the end of others too, and this one is the whole name of one and the end of
    another.
    """
    for pattern in ("query", r"layer\.query", "(layer.)?query"):
        base = nn.ModuleDict(
            {"query": nn.Linear(4, 4), "layer": nn.ModuleDict({"query": nn.Linear(4, 4)})}
        )
        expected = [name for name, _ in base.named_modules() if re.fullmatch(pattern, name)]
        config = targets.config_of(base, "causal-lm", Lora(rank=2, targets=pattern), [])
        config.task_type = None
        found = layers_of(get_peft_model(base, config))
        assert sorted(found) == [f"base_model.model.{name}" for name in sorted(expected)]


@pytest.mark.parametrize("pattern", [".*(q_proj|w1|w3)", r".*\.(q_proj|gate_up_proj)"])
def test_a_pattern_of_experts_is_told(tmp_path: Path, pattern: str) -> None:
    """By the names that they had as modules, and by those of the parameters that hold them all."""
    family = next(each for each in families.FAMILIES if each.name == "mixtral")
    source = families.write(family, tmp_path)
    with pytest.raises(FedSieveError, match=r"takes in the experts of .* stacked in one parameter"):
        resident_of(source, "causal-lm", targets=pattern)
    assert len(resident_of(source, "causal-lm", targets=r".*\.q_proj").layout.pairs) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layers", ["(gate|up|down)_proj", "gate_proj"])
def test_layers_that_peft_takes_for_experts_are_told(
    tmp_path: Path, layers: str, dropout: float
) -> None:
    """The dense layers and the shared experts of DeepSeek's are linear, and called as experts."""
    family = next(each for each in families.FAMILIES if each.name == "deepseek_v3")
    source = families.write(family, tmp_path)
    with pytest.raises(FedSieveError, match=r"layers that PEFT takes for experts in this kind"):
        resident_of(source, "causal-lm", targets=rf".*shared_experts\.{layers}", dropout=dropout)


def test_no_targets_are_told(tiny: Tiny) -> None:
    with pytest.raises(FedSieveError, match=r"lora\.targets: the list is empty: leave it out"):
        resident_of(tiny.bert, "classification", targets=[])


@pytest.mark.parametrize("count", [9, 14])
def test_counts_side_by_side_are_no_repetitions_of_repetitions(count: int) -> None:
    pattern = "|".join([r".*layer\.\d{1,3}\.[a-z(]{2,9}\(?q"] * count)
    assert Lora(targets=pattern).targets == pattern


def test_a_kernel_of_three_sides_is_no_expert() -> None:
    """A hybrid model's convolution, beside layers that are called as experts were."""
    base = nn.ModuleDict({"conv1d": nn.Conv1d(4, 4, 2), "gate_proj": nn.Linear(4, 4)})
    lora = Lora(rank=2, targets=r"(.*\.)?gate_proj")
    assert targets.config_of(base, "causal-lm", lora, []).target_modules == {"gate_proj"}


def test_a_family_for_which_peft_has_no_choice(tmp_path: Path) -> None:
    family = next(each for each in families.FAMILIES if each.name == "distilbert")
    source = families.write(family, tmp_path)
    with pytest.raises(FedSieveError, match="no choice for models of type 'distilbert'"):
        resident_of(source, "classification")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": "["}, "not a regular expression"),
        ({"targets": 3}, "a list of names is needed"),
        ({"targets": "((((a{1000}){1000}){1000}){1000})|0"}, "counted repetitions make more than"),
        ({"targets": ".*(x{1000}){4000}|0"}, "counted repetitions make more than 10,000"),
        ({"targets": "(a{2,999}){0,11}"}, "counted repetitions make more than 10,000"),
        ({"targets": r"([)]\){2,999}){0,11}"}, "counted repetitions make more than 10,000"),
        ({"targets": "(" + "a{2,999}|" * 11 + ")"}, "counted repetitions make more than 10,000"),
        ({"targets": [f"a{n}" for n in range(2001)]}, "targets: .*2,001 names, and at most 2,000"),
        ({"targets": ["query", "a." * 99 + "key"]}, "targets: .*a name of 201 letters, .* 200"),
        ({"whole": [f"a{n}" for n in range(2001)]}, "whole: .*2,001 names"),
        ({"whole": ["a" * 201]}, "whole: .*a name of 201 letters"),
        (
            {"layers_pattern": [f"a{n}" for n in range(21)], "layers_to_transform": (1,)},
            "layers_pattern: .*21 names, and at most 20",
        ),
        ({"layers_pattern": "h"}, "give that too"),
        ({"layers_pattern": "h|g", "layers_to_transform": (1,)}, "'h|g' is no name of a list of"),
        ({"layers_pattern": ("h", ""), "layers_to_transform": (1,)}, "'' is no name of a list of"),
        ({"targets": "all-linear", "layers_to_transform": (1,)}, "goes with a list of targets"),
        ({"layers_to_transform": (-1,)}, "greater than or equal to 0"),
        ({"rank_pattern": {"query": 3}}, "rank_pattern: not supported: .* one rank and scale"),
        ({"alpha_pattern": {"query": 3.0}}, "alpha_pattern: not supported"),
        ({"target_parameters": ("experts.down_proj",)}, "target_parameters: not supported"),
    ],
)
def test_settings_that_cannot_be(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(FedSieveError, match=message):
        Lora(**lora)


def test_sites_take_no_regular_expression(tiny: Tiny) -> None:
    from fedsieve.recipe import read as recipes

    with pytest.raises(FedSieveError, match=r"lora\.targets: a site takes no"):
        foreign.refuse_foreign(recipes.check(tiny.table(lora={"targets": ".*query"})))
    foreign.refuse_foreign(recipes.check(tiny.table()))
    for lora in (
        {"targets": "all-linear"},
        {"targets": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"},
    ):
        foreign.refuse_foreign(recipes.check(tiny.table(lora=lora)))


@pytest.mark.parametrize("pattern", [*ENDLESS, "(" + "a*" * 10_000 + ")x"])
def test_a_site_is_through_with_a_pattern_at_once(tiny: Tiny, pattern: str) -> None:
    table = tiny.table(lora={"rank": 2, "targets": pattern}, data__classes=list(LABELS))
    text, began = tomli_w.dumps(table).encode(), time.monotonic()
    with pytest.raises(
        FedSieveError, match=r"lora\.targets: a (site takes no )?regular expression"
    ):
        assignment._recipe(text)
    assert time.monotonic() - began < 3
