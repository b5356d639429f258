"""Laws over many kinds of models: a row's numbers are its own, and no model sees what it predicts.

The oracle is transformers itself, one row at a time, without any padding.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import View
from fedsieve.algebra.support import everything
from fedsieve.errors import FedSieveError
from fedsieve.settings import Lora, Task, Training
from fedsieve.tasks.causal_lm import causal_lm
from fedsieve.tasks.classification import classification
from fedsieve.tasks.tokens import Texts, ensure_pad_token
from fedsieve.train import local
from fedsieve.train.local import evaluate
from fedsieve.train.model import ResidentModel, load_base, whole
from tests import kinds
from tests.train import small

CLASSES = ("a", "b", "c")
CPU = torch.device("cpu")
TEXTS = [
    "w1 w5 w9",
    "w2",
    "w3 w4 w5 w6 w7 w8 w9 w10 w11",
    "w20 w21 w22 w23 w24 w25",
    "w7 w7 w7 w50 w51",
]

ENCODERS = (
    "albert", "bert", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "esm", "eurobert", "flaubert", "ibert", "longformer",
    "megatron-bert", "mobilebert", "modernbert", "mpnet", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xlnet", "xmod",
)  # fmt: skip
SEQ2SEQ = ("bart", "mbart", "mvp", "plbart", "t5", "mt5", "umt5")
DECODERS = (
    "biogpt", "bloom", "ctrl", "diffllama", "falcon", "falcon-alibi", "gemma", "gemma2", "glm",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "mixtral", "mpt",
    "olmo", "openai-gpt", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "stablelm", "starcoder2",
)  # fmt: skip
LEAKY = ("convbert", "fnet", "nystromformer", "canine")  # padding reaches the other tokens


def resident_of(folder: Path, task: Task, pad: int | None, **options: Any) -> ResidentModel:
    classes = CLASSES if task == "classification" else ()
    base = load_base(str(folder), task, classes, key=Key(0), pad_token_id=pad, **options)
    if task == "classification":
        # Without LoRA, so that no kind's targets are of concern: the head is trained.
        return whole(base, task, Lora(), "head", device=CPU)
    return whole(base, task, Lora(), "all", device=CPU)


def classified(tokenizer: Any, text_b: str | None = None) -> Texts:
    rows = Dataset.from_dict(
        {"text": TEXTS, "other": TEXTS[::-1], "label": ["a", "b", "c", "b", "a"]}
    )
    return classification(
        rows, tokenizer, text="text", text_b=text_b, label="label", max_length=20, classes=CLASSES
    )[0]


def continued(tokenizer: Any) -> Texts:
    return causal_lm(Dataset.from_dict({"text": TEXTS}), tokenizer, text="text", max_length=16)[0]


def alone(model: Any, examples: Texts) -> list[tuple[float, int]]:
    """transformers' own loss of each row, fed without padding, and how many targets it has."""
    model.eval()
    found = []
    for number, mask in enumerate(examples.attention_mask):
        length = int(mask.sum())
        ids = examples.input_ids[number : number + 1, :length]
        labels = examples.labels[number : number + 1]
        count = 1
        if labels.ndim == 2:
            labels = labels[:, :length]
            count = int((labels[:, 1:] != -100).sum())
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if examples.token_type_ids is not None:
            given["token_type_ids"] = examples.token_type_ids[number : number + 1, :length]
        with torch.no_grad():
            found.append((model(**given).loss.item(), count))
    return found


def trained_loss(resident: ResidentModel, examples: Texts) -> float:
    adapter = resident.adapter()
    layout = adapter.layout
    view = View(adapter, layout, everything(layout), everything(layout))
    once = Training(steps=1, batch=len(TEXTS), precision="fp32")
    return local.fit(resident, view, examples, once, Key(1)).loss


def check(resident: ResidentModel, oracle: Any, examples: Texts) -> None:
    rows = alone(oracle, examples)
    expected = sum(loss * count for loss, count in rows) / sum(count for _, count in rows)
    for batch in (1, 2, len(TEXTS)):
        score = evaluate(resident, resident.adapter(), examples, batch=batch, precision="fp32")
        assert score.loss == pytest.approx(expected, rel=1e-4), f"batches of {batch}"
    assert len({round(loss, 3) for loss, _ in rows}) > 2  # else nothing would be tested


# Which padding tokens the checkpoint and the tokenizer have: the same, others, one without an
# embedding, and the end of sequence.
PADS: dict[str, tuple[int | None, str]] = {
    "same": (small.PAD, "<pad>"),
    "config's is another": (0, "<pad>"),
    "tokenizer's is another": (small.PAD, "<spare>"),
    "config has none": (None, "<pad>"),
    "without an embedding": (None, "<new>"),
    "without an embedding, config has one": (small.PAD, "<new>"),
    "the end": (None, "</s>"),
}


@pytest.mark.parametrize("kind", kinds.some_of([*ENCODERS, *SEQ2SEQ, *DECODERS]))
def test_a_classifiers_loss_is_that_of_each_row_alone(tmp_path: Path, kind: str) -> None:
    tokenizer = small.tokenizer()
    folder = small.make(kind, "classification", tmp_path)
    oracle = AutoModelForSequenceClassification.from_pretrained(folder)
    check(resident_of(folder, "classification", small.PAD), oracle, classified(tokenizer))


OTHERS = ("config's is another", "tokenizer's is another")


@pytest.mark.parametrize(
    ("kind", "pads"),
    [
        *((kind, pads) for kind in ("roberta", "mpnet", "gpt2", "llama") for pads in PADS),
        # What is behind the last token reaches it, or padding is looked for in front of it.
        *((kind, pads) for kind in ("mobilebert", "plbart") for pads in OTHERS),
    ],
)
def test_any_padding_token_will_do(tmp_path: Path, kind: str, pads: str) -> None:
    of_config, of_tokenizer = PADS[pads]
    counts = kind in ("roberta", "mpnet")  # positions, from its own padding token
    if counts and of_config is None:
        of_config = small.PAD
    # A classifier that looks for the last token but padding does not see an end that is padding.
    ends = pads not in ("the end", "without an embedding")
    tokenizer = small.tokenizer(end=ends, pad_token=of_tokenizer)
    folder = small.make(kind, "classification", tmp_path)
    oracle = AutoModelForSequenceClassification.from_pretrained(folder)
    if not counts:
        config = oracle.config
        config.pad_token_id = of_config
        config.save_pretrained(folder)
    if kind in DECODERS:
        oracle.config.pad_token_id = None  # one row, no padding: the last token is the last
    resident = resident_of(folder, "classification", tokenizer.pad_token_id)
    check(resident, oracle, classified(tokenizer))
    assert trained_loss(resident, classified(tokenizer)) == pytest.approx(
        sum(loss for loss, _ in alone(oracle, classified(tokenizer))) / len(TEXTS), rel=1e-3
    )


@pytest.mark.parametrize(
    ("kind", "typed"),
    [
        *((kind, True) for kind in ("bert", "xlnet")),
        *(
            (kind, False)
            for kind in ("roberta", "distilbert", "gpt2", "openai-gpt", "llama", "bart")
        ),
    ],
)
def test_a_pair_has_token_types_where_the_model_has_a_table_for_them(
    tmp_path: Path, kind: str, typed: bool
) -> None:
    folder = small.make(kind, "classification", tmp_path)
    oracle = AutoModelForSequenceClassification.from_pretrained(folder)
    examples = classified(small.tokenizer(), text_b="other")
    assert examples.token_type_ids is not None
    resident = resident_of(folder, "classification", small.PAD)
    check(resident, oracle, examples if typed else examples._replace(token_type_ids=None))
    score, bare = (
        evaluate(resident, resident.adapter(), each, precision="fp32")
        for each in (examples, examples._replace(token_type_ids=None))
    )
    assert (score.loss == pytest.approx(bare.loss, rel=1e-4)) is not typed


@pytest.mark.parametrize("kind", LEAKY)
def test_a_model_in_which_padding_leaks_is_refused(tmp_path: Path, kind: str) -> None:
    folder = small.make(kind, "classification", tmp_path)
    with pytest.raises(FedSieveError, match="depend on how far the row is padded"):
        load_base(str(folder), "classification", CLASSES, key=Key(0), pad_token_id=small.PAD)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_language_models_loss_is_that_of_each_row_alone(tmp_path: Path, kind: str) -> None:
    tokenizer = small.tokenizer(pad_token=None)
    ensure_pad_token(tokenizer)
    folder = small.make(kind, "causal-lm", tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(folder)
    examples = continued(tokenizer)
    assert (examples.labels == small.END).sum() == len(TEXTS)
    resident = resident_of(folder, "causal-lm", tokenizer.pad_token_id)
    check(resident, oracle, examples)
    check_causal(resident)


MASKED = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
    "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta",
    "xlm-roberta-xl", "xmod", "xlnet", "xlm",
)  # fmt: skip


@pytest.mark.parametrize("kind", MASKED)
def test_a_model_that_sees_later_tokens_is_no_causal_one(tmp_path: Path, kind: str) -> None:
    folder = small.make(kind, "causal-lm", tmp_path)
    with pytest.raises(FedSieveError, match=r"sees the tokens that it is|depend on how far"):
        resident_of(folder, "causal-lm", small.PAD)
    if kind not in ("xlnet", "xlm"):
        resident = resident_of(folder, "causal-lm", small.PAD, settings={"is_decoder": True})
        check_causal(resident)


def test_nor_is_one_that_was_never_trained(tmp_path: Path) -> None:
    """It attends to all tokens nearly alike, so that one among many moves the outputs little."""
    folder = small.make("bert", "causal-lm", tmp_path, initializer_range=0.02)
    with pytest.raises(FedSieveError, match="sees the tokens that it is"):
        resident_of(folder, "causal-lm", small.PAD)
    check_causal(resident_of(folder, "causal-lm", small.PAD, settings={"is_decoder": True}))


def check_causal(resident: ResidentModel) -> None:
    """Another token changes what is predicted from it on, and nothing before it."""
    ids = torch.tensor([[small.BEGIN, *range(10, 20)]])
    adapter = resident.adapter()
    resident.put(adapter._replace(tensors={n: t + 0.1 for n, t in adapter.tensors.items()}))
    resident.model.eval()
    with torch.no_grad():
        before = resident.model(input_ids=ids).logits
        for place in (3, 7, 10):
            other = ids.clone()
            other[0, place] = 40
            after = resident.model(input_ids=other).logits
            torch.testing.assert_close(after[0, :place], before[0, :place], atol=1e-4, rtol=1e-4)
            assert not torch.equal(after[0, place:], before[0, place:])


@pytest.mark.parametrize("kind", ["bart", "mbart", "pegasus", "marian", "trocr", "whisper"])
def test_a_model_with_another_loss_is_refused(tmp_path: Path, kind: str) -> None:
    folder = small.make(kind, "causal-lm", tmp_path)
    with pytest.raises(FedSieveError, match="not that of its task"):
        resident_of(folder, "causal-lm", small.PAD)


def test_a_model_that_cannot_be_trained_is_refused_before_it_is(tmp_path: Path) -> None:
    """Reformer takes rows of certain lengths only, and only while training."""
    own: dict[str, Any] = {
        "is_decoder": True,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
    }
    shape: dict[str, Any] = {
        "attn_layers": ["local"],
        "attention_head_size": 8,
        "feed_forward_size": 48,
    }
    folder = small.make("reformer", "causal-lm", tmp_path, **own, **shape, num_hidden_layers=None)
    with pytest.raises(FedSieveError, match="a reformer model cannot be trained on token numbers"):
        resident_of(folder, "causal-lm", small.PAD)
