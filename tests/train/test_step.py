"""A step in less memory is the same step: a batch in pieces, and layers that run twice.

The oracle is the batch in one piece with all kept, whose mean is the model's own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoConfig

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.settings import Lora, Training, steps_of
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.task import Fields
from fedsieve.tasks.tokens import IGNORED, Texts
from fedsieve.train import local
from fedsieve.train.local import Fit
from fedsieve.train.model import ResidentModel, load_base, set_up
from fedsieve.train.reader import load_reader
from fedsieve.train.step import check_step
from tests import kinds
from tests.conftest import Tiny
from tests.tasks.test_federated import KINDS, Kind, base, quietly
from tests.toy import whole
from tests.train import families
from tests.train.families import FAMILIES, TASKS, Family

CPU = torch.device("cpu")
KEY = Key(seed=3, round=1, client="7")
ROWS = 11  # with batches of 7: 7 and 4
STILL = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "vit": {},
}


def fit(resident: ResidentModel, examples: Examples, training: Training, **view: Any) -> Fit:
    """One client's training, from the same random start whatever was trained before."""
    draw = torch.Generator().manual_seed(5)
    layout = resident.layout
    start = {n: 0.2 * torch.randn(layout.shapes[n], generator=draw) for n in layout.names}
    asked = whole(Adapter(layout, start))._replace(**view)
    return local.fit(resident, asked, examples, training, KEY)


def close(got: Fit, expected: Fit) -> None:
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert got.steps == expected.steps
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, atol=1e-5, rtol=1e-4)


# --- a batch in pieces


def uneven(kind: Kind) -> list[dict[str, Any]]:
    """Rows of unequal numbers of words, and so of labels where words have labels."""
    rows = [dict(row) for row in kind.rows[:ROWS]]
    for number, row in enumerate(rows):
        few = 1 + number % 5
        if isinstance(row.get("text"), list):
            row.update(text=row["text"][:few], label=row["label"][:few])
        elif "text" in row:
            row["text"] = " ".join(row["text"].split()[:few])
        if "say" in row:
            row["say"] *= few
    return rows


def prepared(
    tiny: Tiny, kind: Kind, *, dropout: bool = False, dtype: Any = "float32"
) -> tuple[ResidentModel, Examples]:
    task, source = catalogue.load(kind.task), base(tiny, kind)
    known = {k: v for k, v in kind.data.items() if k in Fields._fields and v is not None}
    fields = Fields(**known)._replace(max_length=24)
    rows = Dataset.from_list(uneven(kind))
    classes = task.classes([rows], fields)
    reader, _ = load_reader(source, kind.task)
    examples = task.read(rows, reader, fields._replace(classes=classes or None)).examples
    still = {} if dropout else STILL[Path(source).name]
    model = load_base(
        source, kind.task, classes, key=Key(0), dtype=dtype, pad_token_id=0, settings=still
    )
    lora = Lora(rank=4, alpha=8.0, dropout=0.3 if dropout else 0.0, targets="all-linear")
    return set_up(model, kind.task, lora, "lora", key=Key(0), device=CPU), examples


PLAIN = Training(batch=7, lr=0.1, epochs=2, clip=0.5, precision="fp32")
LANGUAGE = [kind for kind in KINDS if catalogue.load(kind.task).peft == "CAUSAL_LM"]
MADE = [
    *((kind, PLAIN) for kind in KINDS),
    *((kind, replace(PLAIN, batch=3, packing=True)) for kind in LANGUAGE),
    (KINDS[0], replace(PLAIN, optimizer="adamw", lr=0.01)),
    (KINDS[-1], replace(PLAIN, augment="crop-flip")),
]


@pytest.mark.parametrize(
    ("kind", "training"),
    kinds.some_of(MADE, 2),
    ids=[f"{kind.task}-{n}" for n, (kind, _) in enumerate(MADE)],
)
@quietly
def test_a_batch_in_pieces_trains_as_the_batch(tiny: Tiny, kind: Kind, training: Training) -> None:
    resident, examples = prepared(tiny, kind)
    at_once = fit(resident, examples, training)
    seen: list[int] = []
    resident.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(next(iter(given.values())))), with_kwargs=True
    )
    for rows in (1, 2, 3, 7, 100):
        seen.clear()
        close(fit(resident, examples, replace(training, micro_batch=rows)), at_once)
        assert max(seen) <= rows


def penalty(tree: Tree) -> Tensor:
    return sum((0.1 * tensor.square().sum() for tensor in tree.values()), torch.zeros(()))


@pytest.mark.parametrize("task", ["token-classification", "causal-lm"])
@quietly
def test_pieces_without_a_label_and_a_penalty(tiny: Tiny, task: str) -> None:
    """A mean over no label is no number; a penalty is the step's, and not each piece's."""
    kind = next(kind for kind in KINDS if kind.task == task)
    resident, examples = prepared(tiny, kind)
    assert isinstance(examples, Texts)
    labels = examples.labels.clone()
    labels[::2] = IGNORED
    examples = examples._replace(labels=labels)
    training = replace(PLAIN, batch=ROWS)
    at_once = fit(resident, examples, training, penalty=penalty)
    close(fit(resident, examples, replace(training, micro_batch=1), penalty=penalty), at_once)
    plain = fit(resident, examples, training)
    assert plain.loss < 0.9 * at_once.loss
    nothing = examples._replace(labels=torch.full_like(labels, IGNORED))
    assert not fit(resident, nothing, replace(training, micro_batch=1)).loss > 0  # NaN is dropped


@quietly
def test_pieces_draw_their_dropout_from_the_clients_key(tiny: Tiny) -> None:
    resident, examples = prepared(tiny, KINDS[0], dropout=True)
    for training in (PLAIN, replace(PLAIN, micro_batch=2)):
        one, other = fit(resident, examples, training), fit(resident, examples, training)
        assert one.loss == other.loss
        assert all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


# --- layers that run twice

CANNOT = {
    "albert", "convnext", "convnextv2", "ctrl", "cvt", "efficientnet", "flaubert", "funnel",
    "levit", "markuplm", "mpnet", "openai-gpt", "poolformer", "regnet", "resnet", "squeezebert",
    "xlm", "xlnet",
}  # fmt: skip
CASES = [(family, TASKS[task]) for family in FAMILIES for task in family.tasks]
FAST = {
    "bert", "roberta", "distilbert", "deberta-v2", "modernbert", "gpt2", "gpt_neox", "llama",
    "qwen2", "gemma3_text", "bloom", "t5", "bart", "mixtral", "mamba", *sorted(CANNOT)[::3],
}  # fmt: skip
# The names by which configurations of the families call their dropout.
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
         "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout_rate")  # fmt: skip


def of_family(folder: Path, family: Family, task: str, rate: float = 0.2) -> ResidentModel:
    source = families.write(family, folder / family.name)
    classes = ("a", "b", "c") if catalogue.load(task).named else ()
    known = AutoConfig.for_model(family.name).to_dict()
    rates: dict[str, Any] = {name: rate for name in RATES if name in known}
    model = load_base(str(source), task, classes, key=Key(0), pad_token_id=0, settings=rates)
    lora = Lora(rank=4, alpha=8.0, dropout=rate, targets=family.targets)
    return set_up(model, task, lora, "lora", key=Key(0), device=CPU)


each_family = pytest.mark.parametrize(
    ("family", "task"),
    kinds.quick_of(CASES, lambda case: case[0].name in FAST),
    ids=[f"{family.name}-{task}" for family, task in CASES],
)


@each_family
def test_layers_that_run_twice_train_as_those_that_run_once(
    family: Family, task: str, tmp_path: Path
) -> None:
    """With dropout: it draws the same masks again, and leaves the rest as it was. But for rounding:
    on some processors the order of a sum depends on where in memory its numbers lie.
    """
    resident = of_family(tmp_path, family, task)
    examples = families.examples(resident.model, task)
    training = Training(batch=2, lr=0.05, epochs=2, precision="fp32")
    twice = replace(training, checkpointing=True)
    if family.name in CANNOT:
        with pytest.raises(FedSieveError, match="transformers cannot do it in them"):
            check_step(resident.model, task, twice)
        return
    check_step(resident.model, task, twice)
    calls: list[None] = []
    for layer in resident.loras:
        layer.register_forward_hook(lambda *_: calls.append(None))
    plain = fit(resident, examples, training)
    once = len(calls)
    calls.clear()
    got = fit(resident, examples, twice)
    assert len(calls) > 1.4 * once
    assert got.loss == pytest.approx(plain.loss, rel=1e-5)
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, atol=1e-6, rtol=1e-5)
    assert fit(resident, examples, twice).loss == pytest.approx(got.loss, rel=1e-5)
    calls.clear()
    fit(resident, examples, training)  # and it is off again
    assert len(calls) == once


@quietly
def test_checkpointing_and_pieces_in_a_bfloat16_base(tiny: Tiny) -> None:
    resident, examples = prepared(tiny, KINDS[0], dropout=True, dtype="bfloat16")
    training = replace(PLAIN, micro_batch=3)
    once = fit(resident, examples, training)
    close(fit(resident, examples, replace(training, checkpointing=True)), once)


class Careless(nn.Module):
    """Dropout that draws from a generator of its own: other masks when it runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.draws) < 0.5)


def test_other_masks_the_second_time_are_refused(tiny: Tiny) -> None:
    resident, _ = prepared(tiny, KINDS[0])
    layer: Any = resident.model.get_submodule("base_model.model.bert.encoder.layer.1.output")
    layer.dropout = Careless()
    with pytest.raises(FedSieveError, match=r"of kind bert cannot .* gradients are others with it"):
        check_step(resident.model, "classification", Training(checkpointing=True))


def test_a_recipe_that_asks_for_what_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FedSieveError, match="micro_batch"):
        Training(micro_batch=0)
    family = next(family for family in FAMILIES if family.name == "xlnet")
    resident = of_family(tmp_path, family, "classification")
    training = Training(batch=2, checkpointing=True)
    with pytest.raises(FedSieveError, match=r"training\.checkpointing: models of kind xlnet"):
        fit(resident, families.examples(resident.model, "classification"), training)


@pytest.mark.parametrize("name", ["mobilevit", "levit"])
def test_pieces_train_alike_where_statistics_run(tmp_path: Path, name: str) -> None:
    """Batch norm would norm a piece by its own rows: it takes the checkpoint's statistics."""
    family = next(family for family in FAMILIES if family.name == name)
    resident = of_family(tmp_path, family, "image-classification", rate=0.0)
    examples = families.examples(resident.model, "image-classification")
    training = Training(batch=3, lr=0.1, steps=2, precision="fp32")
    check_step(resident.model, "image-classification", replace(training, micro_batch=1))
    at_once = fit(resident, examples, training)
    close(fit(resident, examples, replace(training, micro_batch=1)), at_once)


def test_no_list_is_made_of_the_batches_to_come(tiny: Tiny) -> None:
    """Somebody's recipe may ask for 10^18 passes: they are never through, and take no room."""
    endless = [replace(PLAIN, epochs=10**18), replace(PLAIN, steps=10**18)]
    for training in endless:
        order = local._order(11, training, torch.Generator().manual_seed(1))
        batches = [next(order).tolist() for _ in range(4)]
        assert [len(batch) for batch in batches] == [7, 4, 7, 4]
        assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(11))


@quietly
def test_rows_of_like_length_share_a_batch(tiny: Tiny) -> None:
    """Each row once a pass, whoever it meets; and less padding."""
    draws = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 60, (200,), generator=draws)
    mask = (torch.arange(60) < lengths[:, None]).long()
    numbers = torch.arange(200)
    examples = Texts(mask * (numbers[:, None] + 1), mask, numbers)
    training = replace(PLAIN, batch=8, epochs=2)
    padded = []
    for asked in (training, replace(training, by_length=True)):
        batches = list(local.batches_of(examples, asked, KEY))
        assert len(batches) == steps_of(200, asked) == 50
        for half in (batches[:25], batches[25:]):
            assert sorted(torch.cat([b.labels for b in half]).tolist()) == list(range(200))
        again = local.batches_of(examples, asked, KEY)
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(again, batches, strict=True))
        first, second = ({tuple(b.labels.tolist()) for b in half} for half in
                         (batches[:25], batches[25:]))  # fmt: skip
        assert not first & second
        widths = [b.attention_mask.shape[1] for b in batches if isinstance(b, Texts)]
        assert widths != sorted(widths)
        padded.append(sum(b.attention_mask.numel() for b in batches if isinstance(b, Texts)))
    assert padded[1] < 0.75 * padded[0]
    resident, own = prepared(tiny, KINDS[0])
    fit(resident, own, replace(PLAIN, by_length=True))
