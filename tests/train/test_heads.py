"""A base that is a classifier already: what its configuration says of its classes, and what counts.

The oracle is the checkpoint in transformers, its outputs taken by the names of the classes.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from fedsieve.algebra.keys import Key
from fedsieve.settings import Lora
from fedsieve.train.local import evaluate
from fedsieve.train.model import load_base, whole
from tests.train import small
from tests.train.test_trial import CLASSES, CPU, alone, classified

IDS = torch.tensor([[small.BEGIN, 10, 11, 12, small.END]])
KINDS = ("bert", "bart", "deberta-v2", "distilbert", "gpt2", "llama", "roberta", "t5", "xlnet")


def checkpoint(kind: str, folder: Path, names: tuple[str, ...], **facts: Any) -> Path:
    small.make(kind, "classification", folder, num_labels=len(names))
    config = AutoConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    for name, value in facts.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[0]
    return out


def theirs(folder: Path) -> Tensor:
    return logits(AutoModelForSequenceClassification.from_pretrained(folder))


def ours(folder: Path, classes: tuple[str, ...], seed: int = 0) -> Tensor:
    key = Key(seed)
    return logits(
        load_base(str(folder), "classification", classes, key=key, pad_token_id=small.PAD)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_head_are_matched_by_name(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(kind, tmp_path, ("wine", "cars", "space"))
    expected = dict(zip(("wine", "cars", "space"), theirs(folder), strict=True))
    for classes in (("cars", "space", "wine"), ("space", "wine", "cars")):
        got = ours(folder, classes)
        torch.testing.assert_close(got, torch.stack([expected[name] for name in classes]))


@pytest.mark.parametrize(
    ("names", "classes", "order"),
    [
        (("WINE", "Cars ", "space"), ("cars", "space", "wine"), (1, 2, 0)),  # as people write
        (("wine", "cars", "space"), ("0", "1", "2"), (0, 1, 2)),  # numbers are the rows'
        (("wine", "cars", "space"), ("2", "0", "1"), (2, 0, 1)),
        (("2", "0", "1"), ("0", "1", "2"), (1, 2, 0)),  # unless they are names
        (("cafe\u0301", "\u0130s", "bar"), ("\u0130s", "bar", "caf\u00e9"), (1, 2, 0)),
        (("caf\u00e9", "\u01f0", "bar"), ("bar", "J\u030c", "CAFE\u0301"), (2, 1, 0)),
        (("a", "A", "b"), ("A", "a", "b"), (1, 0, 2)),  # as they stand, if that tells them apart
        (("e\u0301", "E\u0301", "b"), ("b", "\u00c9", "\u00e9"), (2, 1, 0)),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("cars", "space", "wine"), (0, 1, 2)),  # no names
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("2", "1", "0"), (2, 1, 0)),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("LABEL_1", "LABEL_0", "LABEL_2"), (1, 0, 2)),
    ],
)
def test_what_counts_as_the_same_name(
    tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...], order: tuple[int, ...]
) -> None:
    folder = checkpoint("bert", tmp_path, names)
    torch.testing.assert_close(ours(folder, classes), theirs(folder)[list(order)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_for_other_classes_is_drawn_anew_and_said(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(kind, tmp_path, ("beer", "trains", "sea"))
    with pytest.warns(UserWarning, match=r"head is for beer, trains, sea, the data has cars, sp"):
        first, again, other = (ours(folder, ("cars", "space", "wine"), seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert all(not torch.allclose(first, theirs(folder)[list(p)]) for p in ((0, 1, 2), (1, 2, 0)))
    with pytest.warns(UserWarning, match="drawn anew"):
        base = load_base(str(folder), "classification", ("cars", "space", "wine"), key=Key(0))
    kept = AutoModelForSequenceClassification.from_pretrained(folder)
    changed = {
        name for name, p in kept.named_parameters() if not torch.equal(p, base.get_parameter(name))
    }
    assert changed
    assert all(p.shape[0] == 3 for p in (kept.get_parameter(name) for name in changed))


def test_a_base_without_a_head_has_no_classes_to_match(tmp_path: Path) -> None:
    folder = checkpoint("bert", tmp_path, ("beer", "trains", "sea"))
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(tmp_path / "bare", ("cars", "space", "wine"))


@pytest.mark.parametrize("kind", ["bert", "bart", "distilbert", "gpt2", "t5", "xlnet"])
@pytest.mark.parametrize(
    ("names", "facts"),
    [
        (CLASSES, {"problem_type": "multi_label_classification"}),
        (CLASSES, {"problem_type": "regression"}),
        (("score",), {"problem_type": "regression"}),
        (("v", "w", "x", "y", "z"), {"problem_type": "multi_label_classification"}),
    ],
)
def test_what_the_base_was_trained_for_does_not_decide_the_loss(
    tmp_path: Path, kind: str, names: tuple[str, ...], facts: dict[str, Any]
) -> None:
    folder = checkpoint(kind, tmp_path, names, **facts)
    examples = classified(small.tokenizer())
    base = load_base(str(folder), "classification", CLASSES, key=Key(0), pad_token_id=small.PAD)
    base.save_pretrained(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "plain", problem_type="single_label_classification"
    )
    assert base.config.problem_type == "single_label_classification"
    assert base.config.num_labels == 3
    rows = [loss for loss, _ in alone(plain, examples)]
    resident = whole(base, "classification", Lora(), "head", device=CPU)
    got = evaluate(resident, resident.adapter(), examples, precision="fp32")
    assert got.loss == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    inputs = {k: v for k, v in examples._asdict().items() if v is not None and k != "labels"}
    with torch.no_grad():
        told = base.eval()(**inputs, labels=examples.labels).loss.item()
    if kind != "xlnet":  # which reads the last column, so that these rows are its inputs no more
        assert told == pytest.approx(got.loss, rel=1e-4)
