"""What many tests share: models so small that a round takes milliseconds, and a data set that they
can learn. Nothing is fetched: everything is made here, from fixed seeds, once a session.
"""

import os

# Before torch and transformers are imported. Nothing may wait for a network, and one thread makes
# the tiny models both faster and the same in every process.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # some tests fork

import csv
import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import pytest
import tomli_w
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from fedsieve.costs import memory
from fedsieve.train.model import ResidentModel
from tests import kinds

# How long an input takes to draw says something of what else the machine does, and of no test.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

# Older releases of transformers 5 have none that is Pillow's by its name.
ViTImageProcessorPil = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<end>")
LABELS = ("cars", "space", "wine")
OWN = {label: [f"{label}{number}" for number in range(6)] for label in LABELS}
COMMON = [f"word{number}" for number in range(16)]
VOCABULARY = [*SPECIAL, *COMMON, *(word for label in LABELS for word in OWN[label])]

WIDTH: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


class Tiny(NamedTuple):
    """Files for a tiny experiment. `gpt2` has a tokenizer without a padding token; `vit` takes
    images of 16 x 16 pixels."""

    bert: Path
    gpt2: Path
    train: Path
    test: Path
    vit: Path

    def table(self, **changes: Any) -> dict[str, Any]:
        """A recipe that trains in a second: FSLoRA + FLASC, 4 rounds of 3 of 12 unequal clients.

        changes: dotted keys, `training__lr=0.1`; None removes the key.
        """
        table: dict[str, Any] = {
            "name": "tiny",
            "rounds": 4,
            "cohort": 3,
            "device": "cpu",
            "model": {"source": str(self.bert)},
            "lora": {"rank": 4, "alpha": 8.0, "targets": ["query", "value"]},
            "data": {
                "train": str(self.train),
                "test": str(self.test),
                "text": "text",
                "label": "label",
                "max_length": 16,
            },
            "partition": {"kind": "dirichlet", "clients": 12, "alpha": 1.0},
            "budgets": [
                {"ratio": 0.25, "down": 0.8, "up": 0.25},
                {"ratio": 0.5, "down": 1.0, "up": 0.5},
                {"ratio": 1.0},
            ],
            "method": {"name": "fslora_flasc"},
            "server": {"optimizer": "adam", "lr": 0.02},
            "training": {"optimizer": "adamw", "lr": 0.03, "batch": 8, "precision": "fp32"},
            "evaluation": {"every": 2},
        }
        for key, value in changes.items():
            *path, last = key.split("__")
            place = table
            for step in path:
                place = place.setdefault(step, {})
            if value is None:
                del place[last]
            else:
                place[last] = value
        if table.get("method", {}).get("name") in kinds.PLAIN_SGD:
            table["training"]["optimizer"] = "sgd"
        return table

    def write(self, path: Path, **changes: Any) -> Path:
        """The same as a TOML file."""
        path.write_text(tomli_w.dumps(self.table(**changes)), encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    names = ("bert", "gpt2", "train.csv", "test.csv", "vit")
    made = Tiny(*(folder / name for name in names))
    write_rows(made.train, 240, seed=1)
    write_rows(made.test, 60, seed=2)
    size: dict[str, Any] = {"vocab_size": len(VOCABULARY)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Weights larger than a real model's start: features that a head can learn from at once.
        bert = BertForSequenceClassification(
            BertConfig(
                **WIDTH,
                max_position_embeddings=32,
                initializer_range=0.3,
                num_labels=len(LABELS),
                pad_token_id=0,
                **size,
            )
        )
        gpt2 = GPT2LMHeadModel(
            GPT2Config(
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=32,
                initializer_range=0.2,
                bos_token_id=4,
                eos_token_id=4,
                pad_token_id=None,
                **size,
            )
        )
        # What pretraining would have learned: words of one subject lie near each other.
        words = bert.bert.embeddings.word_embeddings.weight.data
        for label in LABELS:
            words[[VOCABULARY.index(word) for word in OWN[label]]] += torch.randn(16)
        vit = ViTForImageClassification(
            ViTConfig(
                **WIDTH,
                image_size=16,
                patch_size=4,
                initializer_range=0.3,
                num_labels=5,
            )
        )
    vit.save_pretrained(made.vit)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(made.vit)
    bert.save_pretrained(made.bert)
    tokenizer(bert=True).save_pretrained(made.bert)
    gpt2.save_pretrained(made.gpt2)
    tokenizer(bert=False).save_pretrained(made.gpt2)
    return made


def tokenizer(*, bert: bool) -> PreTrainedTokenizerFast:
    """One word, one token. The BERT kind puts [CLS] and [SEP] around; the other cannot pad."""
    words = Tokenizer(
        WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = Whitespace()
    if not bert:
        return PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="[UNK]", eos_token="<end>", bos_token="<end>"
        )
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def texts(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Texts and their labels: some of a text's words occur with its label only."""
    draw = random.Random(seed)
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        words = draw.choices(OWN[label], k=draw.randint(2, 4)) + draw.choices(COMMON, k=4)
        draw.shuffle(words)
        yield " ".join(words), label


def write_rows(path: Path, count: int, seed: int, authors: Sequence[str] = ()) -> Path:
    """A CSV file of texts, labels and authors."""
    authors = authors or [f"author{number}" for number in range(12)]
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "author"])
        out.writerows([text, label, draw.choice(authors)] for text, label in texts(count, seed))
    return path


@pytest.fixture(scope="session")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `tiny.table()` that was never stopped. Not to be changed."""
    from tests import runs

    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.start(tiny, folder)
    return folder


@pytest.fixture(scope="session")
def whole_with_memories(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `runs.FLASC` that was never stopped. Not to be changed."""
    from tests import runs

    folder = tmp_path_factory.mktemp("memories") / "run"
    runs.start(tiny, folder, **runs.FLASC)
    return folder


def pytest_collection_finish() -> None:
    """What is there by now stays: torch and transformers have 700,000 objects, which would be gone
    through each time that Python looks for what nobody needs.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nobody_pulls_the_plug() -> Iterator[None]:
    """What is written need not reach the disk itself, which is most of the time of a small file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda place: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def memory_is_worked_out_once() -> Iterator[None]:
    """A site works out what memory a recipe takes before it accepts it, which takes longer than the
    tiny model trains: here once for what has the same shapes.
    """
    kept: dict[str, Any] = {}

    def once(work: Callable[..., Any]) -> Callable[..., Any]:
        def found(resident: ResidentModel, *asked: Any) -> Any:
            model, pairs = resident.model, resident.pairs
            inside = [(n, p.shape, p.dtype) for n, p in model.named_parameters()]
            of = (resident.task, resident.layout, pairs and pairs.layout, model.config, model)
            key = repr((work.__name__, *of, inside, *asked))
            if key not in kept:
                kept[key] = work(resident, *asked)
            return kept[key]

        return found

    ours = SimpleNamespace(of_step=once(memory.of_step), of_evaluation=once(memory.of_evaluation))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.sites.limits.memory", ours)
        yield


@pytest.fixture
def new_objects() -> None:
    """`gc.get_objects` gives those alone that come after this."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most runs of the tests need no report, which takes longer than they do."""
    monkeypatch.setattr("fedsieve.report.write", lambda *_: [])


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Command(Protocol):
    def __call__(self, *arguments: str | Path) -> Ran: ...


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the `fedsieve` command in this process, from its entry point to its exit code."""

    def call(*arguments: str | Path) -> Ran:
        from fedsieve import cli

        monkeypatch.setattr(sys, "argv", ["fedsieve", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        # Warnings are shown as a user sees them, not raised as elsewhere in the tests.
        with warnings.catch_warnings():
            warnings.resetwarnings()
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call
