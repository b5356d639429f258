"""A model's folder of somebody else's: refused in a sentence, before anything large is made."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from datasets import Dataset

from fedsieve.algebra.keys import Key
from fedsieve.errors import FedSieveError
from fedsieve.recipe.examples import tensors
from fedsieve.recipe.experiment import from_recipe
from fedsieve.recipe.read import check
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Fields
from fedsieve.tasks.tokens import refuse_no_room, tokenise
from fedsieve.train.model import load_base, pick_device
from fedsieve.train.reader import load_reader
from tests import mapped, runs
from tests.conftest import LABELS, Command, Tiny
from tests.hostile.test_recipes_to_a_site import MEGA, peak

# As other architectures call how many parts they have; and names of classes that are none.
LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder layers": ("t5", {"num_decoder_layers": 1_000_000}),
    "groups": ("albert", {"num_hidden_groups": 1_000_000}),
    "inner groups": ("albert", {"inner_group_num": 1_000_000}),
    "layers": ("gpt2", {"n_layer": 1_000_000}),
    "depths": ("swin", {"depths": [2, 1_000_000]}),
    "stages": ("convnext", {"depths": [1_000_000, 1]}),
    "experts": ("mixtral", {"num_local_experts": 1_000_000}),
    "numbers for names": ("bert", {"id2label": {"0": 1, "1": 2, "2": 3}}),
    "nothing for names": ("bert", {"id2label": {"0": None, "1": None, "2": None}}),
    "lists for names": ("bert", {"id2label": {"0": ["a"], "1": ["b"], "2": ["c"]}}),
}
CONFIG: dict[str, Any] = {
    "hidden_size": 1 << 17,
    "vocab_size": 200_000_000,
    "max_position_embeddings": 200_000_000,
    "intermediate_size": 200_000_000,
    "num_hidden_layers": 3_000_000,
    "num_attention_heads": 0,
    "hidden_act": "foo",
    "layer_norm_eps": "x",
    "hidden_dropout_prob": 7,
    "id2label": [1],
    "num_labels": 10**9,
    "dtype": "os",
    "pad_token_id": 10**9,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "somebody/kernel",
}


# What a library makes, or notes, as it reads a number, before anything can be compared: at any
# depth, and of the tokenizer too. The file, and what it says more.
ENDLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "kinds of attention": (
        "config.json",
        {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global"], 10**9]]},
    ),
    "labels of a text model": (
        "config.json", {"model_type": "gemma3", "text_config": {"num_labels": 10**9}},
    ),
    "labels of a vision model": (
        "config.json", {"model_type": "clip", "vision_config": {"num_labels": 10**9}},
    ),
    "layers with a kind each": (
        "config.json", {"model_type": "qwen2", "num_hidden_layers": 2 * 10**8},
    ),
    "blocks": ("config.json", {"model_type": "funnel", "block_sizes": [10**7]}),
    "many blocks": ("config.json", {"model_type": "funnel", "block_sizes": [100] * 1000}),
    "extra tokens": (
        "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**9},
    ),
    "special tokens": (
        "tokenizer_config.json", {"additional_special_tokens": [f"<{n}>" for n in range(10_001)]},
    ),
    "named special tokens": (
        "tokenizer_config.json", {"extra_special_tokens": {str(n): str(n) for n in range(10_001)}},
    ),
}  # fmt: skip


def turned_head(folder: Path) -> None:
    """The head's weights in another shape: it would be drawn anew, without a word."""
    held = safetensors.torch.load_file(folder / "model.safetensors")
    held["classifier.weight"] = held["classifier.weight"].T.contiguous()
    safetensors.torch.save_file(held, folder / "model.safetensors", {"format": "pt"})


FILES: dict[str, Callable[[Path], object]] = {
    "a head of another shape": turned_head,
    "weights cut": lambda p: halved(p / "model.safetensors"),
    "weights empty": lambda p: (p / "model.safetensors").write_bytes(b""),
    "weights of another kind": lambda p: (p / "model.safetensors").write_bytes(b"x" * 200),
    "a header without end": lambda p: (p / "model.safetensors").write_bytes(
        (2**62).to_bytes(8, "little") + b"{}"
    ),
    "an index that is a list": lambda p: index(p, []),
    "classes without end": lambda p: with_config(p, num_labels=10**400),
    "classes below none": lambda p: with_config(p, num_labels=-(10**400)),
    "layers without end": lambda p: with_config(p, num_hidden_layers=10**400),
    "names without end": lambda p: with_config(p, id2label={"0": 10**400}),
    "an index of nothing": lambda p: index(p, {"weight_map": {}}),
    "weights a pipe": lambda p: pipe(p / "model.safetensors"),
    "configuration a pipe": lambda p: pipe(p / "config.json"),
    "tokenizer a pipe": lambda p: pipe(p / "tokenizer.json"),
    "configuration a list": lambda p: (p / "config.json").write_text("[]"),
    "configuration endless": lambda p: longer(p / "config.json"),
    "tokenizer's settings a list": lambda p: (p / "tokenizer_config.json").write_text("[]"),
    "tokenizer of nothing": lambda p: (p / "tokenizer.json").write_text("{}"),
    "adapter a list": lambda p: (p / "adapter_config.json").write_text("[]"),
    "tokens a list": lambda p: (p / "special_tokens_map.json").write_text("[]"),
    "a vocabulary of nothing": lambda p: without_words(p),
    "a table of characters that panics": lambda p: with_table(p, "AAAA"),
    "a rule that is never through": lambda p: with_rule(p, "(o+)+(n+)+(e+)+x$"),
    "an adapter's endless pattern": lambda p: with_adapter(
        p, r=2, target_modules="(.*.*.*.*.*.*)*X"
    ),
    "an adapter of a huge rank": lambda p: with_adapter(p, r=10**9),
    "an adapter of a huge rank of one module": lambda p: with_adapter(
        p, r=2, rank_pattern={"query": 10**8}
    ),
}


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def longer(path: Path) -> None:
    path.write_text(path.read_text() + " " * (1 << 24))


def index(folder: Path, table: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def without_words(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_table(folder: Path, table: str) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_rule(folder: Path, pattern: str) -> None:
    """What it replaces makes the text long, and then looks for what is not there."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    longer = {"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 900}
    rule = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [longer, rule]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_config(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changes))


def with_adapter(folder: Path, **ranks: Any) -> None:
    told = {
        "peft_type": "LORA",
        "target_modules": ["query"],
        "base_model_name_or_path": ".",
        **ranks,
    }
    (folder / "adapter_config.json").write_text(json.dumps(told))
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    safetensors.torch.save_file({name: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def with_tokenizer(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | changes))


def template(name: Any, text: Any = "x") -> dict[str, Any]:
    return {"chat_template": [template_of("default"), {"name": name, "template": text}]}


def template_of(name: str) -> dict[str, str]:
    return {"name": name, "template": "{{ messages[0]['content'] }}"}


# What loads, and is written beside the adapter after all rounds.
UNSAVED: dict[str, tuple[dict[str, Any], str]] = {
    "a path": (template("/tmp/x/evil"), "chat template of the name '/tmp/x/evil'"),
    "a path upwards": (template("../../evil"), "of the name '../../evil'"),
    "a path of another system": (template("..\\evil"), "of the name"),
    "a hidden file": (template(".bashrc"), "of the name '.bashrc'"),
    "nothing": (template(""), "of the name ''"),
    "long": (template("a" * 300), "of the name 'aaa"),
    "of two lines": (template("a\nb"), r"of the name 'a\nb'"),
    "a number": (template("tool_use", 5), "is no text"),
    "half a character": ({"chat_template": "x\ud800"}, "cannot be saved"),
    "half a character in a name": (template("tool_use", "x\ud800"), "cannot be saved"),
    "half a character in what nobody reads": ({"zzz": "x\ud800"}, "cannot be saved"),
    "half a character, deep": ({"zzz": [{"y": "x\ud800"}]}, "cannot be saved"),
}


@pytest.mark.parametrize("case", UNSAVED)
def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(
    tiny: Tiny, tmp_path: Path, case: str
) -> None:
    changes, said = UNSAVED[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny.bert, folder)
    with_tokenizer(folder, **changes)
    with pytest.raises(FedSieveError) as refused:
        load_reader(str(folder), "classification")
    assert said in str(refused.value)
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


def test_an_error_of_the_disk_is_no_cause_of_itself(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(OSError, match="No space") as told:
        load_reader(str(tiny.bert), "classification")
    assert told.value.__cause__ is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["as Python says it", "as tokenizers says it"],
)
def test_a_full_disk_is_no_fault_of_a_tokenizer(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    ran = command("check", tiny.write(tmp_path / "r.toml"))
    assert ran.code == 2
    assert "No space left on device: make room, then do it again" in " ".join(ran.err.split())


def test_templates_of_plain_names_are_taken(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.bert, folder)
    with_tokenizer(folder, **template("tool_use"))
    reader, _ = load_reader(str(folder), "classification")
    assert set(reader.chat_template) == {"default", "tool_use"}


def test_what_cannot_be_written_is_told_as_that(tiny: Tiny, tmp_path: Path) -> None:
    """Whatever a library says: of a tokenizer that somebody gave, or changed since."""
    made = from_recipe(check(tiny.table()))
    assert made.resident.tokenizer is not None
    made.resident.tokenizer.chat_template = {"../evil": "x"}
    for write in (made.resident.save, made.resident.merge):
        with pytest.raises(FedSieveError, match="out could not be written: "):
            write(made.resident.adapter(), tmp_path / "out")
    assert not list(tmp_path.glob("evil*"))


def used(tiny: Tiny, folder: Path) -> None:
    """All that a run makes of a model before it trains."""
    reader, _ = load_reader(str(folder), "classification")
    rows = Dataset.from_dict({"text": ["one", "two"], "label": ["cars", "food"]})
    tensors(check(tiny.table(model={"source": str(folder)})), rows, reader)
    load_base(str(folder), "classification", LABELS, key=Key(0))


@pytest.mark.parametrize("case", ENDLESS)
def test_what_a_library_would_make_as_it_reads_is_refused_before(
    tiny: Tiny, tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.bert, folder)
    name, more = ENDLESS[case]
    told = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**told, **more}))
    before, began = peak(reset=True), time.monotonic()
    with pytest.raises(FedSieveError, match=rf"its {name} has .*: at most .* are read"):
        used(tiny, folder)
    assert time.monotonic() - began < 5
    assert peak() - before < 100 * MEGA


def replacing(what: dict[str, str], by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": what, "content": by}


GROWING: dict[str, dict[str, Any]] = {  # a part of a tokenizer.json -> what stands there
    "normalizer": {
        "type": "Sequence", "normalizers": [replacing({"String": "n"}, "n" * 30)] * 6,
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}] * 2,
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            replacing({"String": "n"}, "n" * 100),
            {"type": "Sequence", "decoders": [replacing({"Regex": "n"}, "n" * 100)]},
        ],
    },
}  # fmt: skip
MANY = replacing({"String": "n"}, "n" * 1000)  # of which Python writes out no product
LONG = {"many rules": {"type": "Sequence", "normalizers": [MANY] * 2000}}
LONG |= {"between letters": replacing({"Regex": "(?=)"}, "n" * 10_001)}
LONG["before"] = {"type": "Prepend", "prepend": "n" * 10_001}


@pytest.mark.parametrize("case", [*GROWING, *LONG])
def test_a_text_is_not_made_long_without_end(tiny: Tiny, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.bert, folder)
    place = folder / "tokenizer.json"
    told = json.loads(place.read_text())
    told["normalizer" if case in LONG else case] = {**GROWING, **LONG}[case]
    place.write_text(json.dumps(told))
    if case == "pre_tokenizer":  # which only divides
        load_reader(str(folder), "classification")
        return
    before, began = peak(reset=True), time.monotonic()
    with pytest.raises(FedSieveError, match=r"may make a text more than 1,000 times as long"):
        used(tiny, folder)
    assert time.monotonic() - began < 5
    assert peak() - before < 100 * MEGA


WORDS = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "good": 4, "far": 100_000_000}
VOCABULARIES: dict[str, dict[str, Any]] = {
    "word piece": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "vocab": WORDS,
    },
    "words": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": WORDS},
    "pairs": {"type": "BPE", "unk_token": "[UNK]", "vocab": WORDS, "merges": []},
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_numbers_of_tokens_that_no_model_has_are_refused_before_they_are_written_out(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    """tokenizers makes a note of each number below the highest that is no word's."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    place = folder / "tokenizer.json"
    told = json.loads(place.read_text())
    told["model"] = {**told["model"], "max_input_chars_per_word": 100, **VOCABULARIES[kind]}
    place.write_text(json.dumps(told))
    before, began = peak(reset=True), time.monotonic()
    with pytest.raises(FedSieveError, match="gives 'far' the number 100000000: numbers up to 10,"):
        load_reader(str(folder), "classification")
    assert time.monotonic() - began < 3
    assert peak() - before < 100 * MEGA


@pytest.mark.parametrize("case", [*CONFIG, *FILES])
def test_a_folder_that_is_not_a_models_is_refused_in_a_sentence(
    tiny: Tiny, tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.bert, folder)
    if case in CONFIG:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, case: CONFIG[case]}))
    else:
        FILES[case](folder)
    before, began = peak(reset=True), time.monotonic()
    with pytest.raises(FedSieveError) as refused:
        used(tiny, folder)
    said = str(refused.value)
    assert "model" in said
    assert len(said) < 1000
    assert peak() - before < 200 * MEGA
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda told: '{"cut": '),
        ("tokenizer.json", lambda told: json.dumps({**told, "model": 7})),
        ("config.json", lambda told: json.dumps({**told, "auto_map": None})),
        ("config.json", lambda told: json.dumps({**told, "id2label": ["a"]})),
        ("config.json", lambda told: json.dumps({**told, "quantization_config": "x"})),
        ("config.json", lambda told: json.dumps({**told, "num_attention_heads": 0})),
        ("config.json", lambda told: json.dumps({**told, "hidden_act": "os.system"})),
        ("config.json", lambda told: json.dumps({**told, "layer_norm_eps": "x"})),
    ],
)
def test_what_a_library_says_of_a_folder_comes_with_the_names_of_files(
    tiny: Tiny, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], str]
) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    (folder / name).write_text(change(json.loads((folder / name).read_text())))
    with pytest.raises(FedSieveError, match=rf"model '{folder}'.*{re.escape(name)}"):
        used(tiny, folder)


TABLES = [
    *("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    "model.safetensors.index.json",
]
UNREAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "too long": (lambda text: text + b" " * (65 << 20), r"has \d+ bytes: at most \d+ are read"),
    "with a mark": (lambda text: b"\xef\xbb\xbf" + text, r"byte order mark \(of UTF-8\)"),
    "UTF-16": (lambda text: text.decode().encode("utf-16"), r"mark \(of UTF-16 or UTF-32\)"),
    "Latin-1": (lambda text: b'{"a": "\xe9"}', "cannot be read as JSON in UTF-8"),
    "cut": (lambda text: text[: len(text) // 2], "cannot be read as JSON in UTF-8"),
    "deep": (lambda text: b'{"a": ' + b"[" * 100_000, r"nested too deep"),
    "a list": (lambda text: b"[]", "holds no table, but a list"),
}


@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_not_read_here_is_read_by_nobody(
    tiny: Tiny, tmp_path: Path, name: str, case: str
) -> None:
    """It says what else is read: taken for one that says nothing, transformers alone would obey."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    change, said = UNREAD[case]
    own = (folder / name).read_bytes() if (folder / name).exists() else b'{"a": {"b": 1}}'
    (folder / name).write_bytes(change(own))
    before = peak(reset=True)
    for load in (
        lambda: load_reader(str(folder), "classification"),
        lambda: load_base(str(folder), "classification", LABELS, key=Key(0)),
    ):
        with pytest.raises(FedSieveError, match=rf"its {re.escape(name)} .*{said}"):
            load()
    assert peak() - before < 200 * MEGA


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_told_of_the_file_that_has_it(
    tiny: Tiny, tmp_path: Path, name: str, mark: str
) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    text = (folder / name).read_text() if (folder / name).exists() else "{}"
    (folder / name).write_text(text, encoding=mark)
    with pytest.raises(FedSieveError, match=rf"its {re.escape(name)} begins with a byte order"):
        load_reader(str(folder), "classification")


def test_an_index_of_any_length_names_no_weights_elsewhere(tiny: Tiny, tmp_path: Path) -> None:
    """With blanks at its end it was passed over here, and read by transformers."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "private.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "own.safetensors")
    names = safetensors.torch.load_file(tmp_path / "private.safetensors")
    table = {"metadata": {}, "weight_map": dict.fromkeys(names, "../private.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table) + " " * (65 << 20))
    with pytest.raises(FedSieveError, match=r"its model\.safetensors\.index\.json has \d+ bytes"):
        load_base(str(folder), "classification", LABELS, key=Key(0))


def test_a_configuration_names_no_other_configuration(tiny: Tiny, tmp_path: Path) -> None:
    """transformers would read that, and nobody would have looked at it."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    (folder / "config.1.0.json").write_text((folder / "config.json").read_text())
    with_config(folder, configuration_files=["config.1.0.json"])
    for load in (
        lambda: load_reader(str(folder), "classification"),
        lambda: load_base(str(folder), "classification", LABELS, key=Key(0)),
    ):
        with pytest.raises(FedSieveError, match="configuration_files"):
            load()


@pytest.mark.parametrize("case", LIKE)
def test_a_configuration_that_asks_for_more_under_any_name_is_refused(
    tiny: Tiny, tmp_path: Path, case: str
) -> None:
    kind, changes = LIKE[case]
    own = json.loads((tiny.bert / "config.json").read_text()) if kind == "bert" else {}
    config = {**own, "model_type": kind, **changes}
    shutil.copytree(tiny.bert, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    before, began = peak(reset=True), time.monotonic()
    with pytest.raises(FedSieveError) as refused:
        load_base(str(tmp_path / "model"), "classification", LABELS, key=Key(0))
    assert next(iter(changes)) in str(refused.value)
    assert peak() - before < 200 * MEGA
    assert time.monotonic() - began < 20


def no_letters(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}


def no_words(tokenizer: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Removed", "invert": False}
    tokenizer["pre_tokenizer"] = split


@pytest.mark.parametrize("removed", [no_letters, no_words])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_that_makes_no_token_of_a_text_is_refused(
    tiny: Tiny, tmp_path: Path, removed: Callable[[dict[str, Any]], None], kind: str, special: bool
) -> None:
    """A run over empty rows would end, and tell a score."""
    folder = tmp_path / "model"
    shutil.copytree(getattr(tiny, kind), folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    removed(told)
    if not special:
        told["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(told))
    task = "classification" if kind == "bert" else "causal-lm"
    reader, _ = load_reader(str(folder), task)
    rows = Dataset.from_dict({"text": ["one", "two"], "label": ["cars", "food"]})
    with pytest.raises(FedSieveError, match=r"makes no token of any|no token to learn"):
        catalogue.load(task).read(rows, reader, Fields(text="text", label="label", max_length=9))


@pytest.mark.parametrize("empty", ["", "  "])
def test_rows_whose_texts_are_all_empty_are_nothing_to_train_on(tiny: Tiny, empty: str) -> None:
    """As with a tokenizer that makes no token, a run would end, and tell a score."""
    reader, _ = load_reader(str(tiny.bert), "classification")
    rows = Dataset.from_dict({"text": [empty, ""], "label": ["cars", "food"]})
    with pytest.raises(FedSieveError, match="all of the 2 texts are empty"):
        catalogue.load("classification").read(
            rows, reader, Fields(text="text", label="label", max_length=9)
        )


@pytest.mark.parametrize("setting", ["num_hidden_layers", "max_position_embeddings", "vocab_size"])
def test_settings_of_a_recipe_are_compared_too(tiny: Tiny, setting: str) -> None:
    before, began = peak(reset=True), time.monotonic()
    with pytest.raises(FedSieveError, match=r"asks for|another shape"):
        load_base(
            str(tiny.bert), "classification", LABELS, key=Key(0), settings={setting: 10_000_000}
        )
    assert peak() - before < 200 * MEGA
    assert time.monotonic() - began < 20


def test_what_a_model_makes_beside_its_weights_is_counted(tmp_path: Path) -> None:
    """A mask over all pairs of positions has no weights: a folder of some KB, and gigabytes."""
    config = transformers.GPTNeoConfig(
        vocab_size=512, hidden_size=8, num_layers=2, num_heads=2, max_position_embeddings=512,
        attention_types=[[["global", "local"], 1]], intermediate_size=8, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path / "model")
    load_base(str(tmp_path / "model"), "causal-lm", key=Key(0), pad_token_id=0)
    told = json.loads((tmp_path / "model/config.json").read_text())
    told["max_position_embeddings"] = 40_000
    (tmp_path / "model/config.json").write_text(json.dumps(told))
    before = peak(reset=True)
    with pytest.raises(FedSieveError, match=r"asks for [0-9]+ numbers"):
        load_base(str(tmp_path / "model"), "causal-lm", key=Key(0), pad_token_id=0)
    assert peak() - before < 200 * MEGA


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"chunk_size_feed_forward": 3}, "cannot be run over a batch .*to be chunked"),
        ({"torchscript": True}, "cannot be run over a batch .*logits"),
        ({"return_dict": False}, "logits|return_dict|answers"),
    ],
)
def test_what_a_configuration_makes_of_a_model_ends_in_a_sentence(
    tiny: Tiny, tmp_path: Path, command: Command, setting: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | setting))
    path = tiny.write(tmp_path / "r.toml", model__source=str(folder), rounds=1)
    ran = command("run", path, "--out", tmp_path / "run")
    assert ran.code == 2
    assert re.search(said, " ".join(ran.err.split()))


def test_nothing_beside_the_logits_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    """With attentions a run was trained, and then could not be saved."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    told = json.loads((folder / "config.json").read_text())
    told |= {"output_attentions": True, "output_hidden_states": True}
    (folder / "config.json").write_text(json.dumps(told))
    ours = runs.start(tiny, tmp_path / "run", model__source=str(folder), rounds=1)
    plain = runs.start(tiny, tmp_path / "plain", rounds=1)
    assert all(torch.equal(ours.tensors[n], t) for n, t in plain.tensors.items())


def test_layers_that_a_configuration_leaves_out_are_told(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 1}
    said = r"16 tensors of layers beyond .*bert\.encoder\.layer\.1\."
    with pytest.warns(UserWarning, match=said):
        load_base(str(tiny.bert), "classification", LABELS, key=Key(0), settings=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_base(str(tiny.bert), "classification", LABELS, key=Key(0))


@pytest.mark.parametrize("spoil", [mapped.written_over, mapped.cut_off])
@pytest.mark.parametrize(
    ("kind", "task", "classes"),
    [("bert", "classification", LABELS), ("gpt2", "causal-lm", ()),
     ("vit", "image-classification", "abcde")],
)  # fmt: skip
def test_what_becomes_of_a_models_file_concerns_no_run_that_read_it(
    tiny: Tiny,
    tmp_path: Path,
    kind: str,
    task: Any,
    classes: Sequence[str],
    spoil: Callable[[Path], None],
) -> None:
    """safetensors maps it into memory: written over, the base was another; cut off, none."""
    shutil.copytree(getattr(tiny, kind), tmp_path / "model")
    model = load_base(str(tmp_path / "model"), task, classes, key=Key(0), pad_token_id=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = tmp_path / "model" / "model.safetensors"
    spoil(file)
    assert not mapped.is_mapped(file)  # else the process may end below
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_stored_as_any_floating_point_numbers(
    tiny: Tiny, tmp_path: Path, kind: torch.dtype
) -> None:
    """Most published models are in bfloat16."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    held = safetensors.torch.load_file(folder / "model.safetensors")
    stored = {name: tensor.to(kind) for name, tensor in held.items()}
    safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    found = load_base(str(folder), "classification", LABELS, key=Key(0)).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor.float())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, r"the weights bert\.\S+ of this bert model hold numbers that are not finite"),
        (math.inf, r"the weights bert\.\S+ of this bert model hold numbers that are not finite"),
        (1e38, "the outputs of this bert model are not finite: its weights are too large"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_told(
    tiny: Tiny, tmp_path: Path, value: float, said: str
) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    held = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(n for n in held if n.endswith("layer.0.attention.self.query.weight"))
    seeded = torch.Generator().manual_seed(0)
    held[name] = torch.where(torch.rand(held[name].shape, generator=seeded) < 0.5, value, -value)
    safetensors.torch.save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FedSieveError, match=said):
        load_base(str(folder), "classification", LABELS, key=Key(0))


def test_weights_stored_as_no_floating_point_numbers_are_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    held = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(n for n in held if n.endswith("layer.0.intermediate.dense.weight"))
    whole, complex_ = (held[name] * 127).to(torch.int8), held[name].to(torch.complex64)
    for stored, value, said in (
        (name, whole, "are stored as I8, which are no floating-point numbers"),
        (name, whole > 0, "are stored as BOOL, which are no floating-point numbers"),
        (name, complex_, "are stored as C64, which are no floating-point numbers"),
        ("some.position_ids", torch.ones(4, 4, dtype=torch.int8), None),
    ):
        other = {**held, stored: value}
        safetensors.torch.save_file(other, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(FedSieveError, match=said) if said else contextlib.nullcontext():
            load_base(str(folder), "classification", LABELS, key=Key(0))


def test_a_folder_that_is_called_like_weights_is_told_as_that(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    (folder / "zz.safetensors").mkdir()
    with pytest.raises(FedSieveError, match=r"model .*: zz\.safetensors is a folder, and"):
        load_base(str(folder), "classification", LABELS, key=Key(0))


def test_a_device_without_numbers_is_none() -> None:
    with pytest.raises(FedSieveError, match="device 'meta' cannot be used here"):
        pick_device("meta")
    with pytest.raises(FedSieveError, match="device 'cpu:9' cannot be used here: all cores"):
        pick_device("cpu:9")


@pytest.mark.parametrize("end", ["x", 10**30, -5, [1, "x"], [[1]], 1.5, True])
def test_an_end_that_is_no_token_is_named(tiny: Tiny, tmp_path: Path, end: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.gpt2, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    rows = [{"prompt": "cars0 cars1", "completion": " cars2"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FedSieveError, match=r"model .*eos_token_id"):
        runs.start(
            tiny,
            tmp_path / "run",
            model={"source": str(folder), "task": "generation"},
            data={
                "train": str(tmp_path / "rows.jsonl"),
                "test": str(tmp_path / "rows.jsonl"),
                "prompt": "prompt",
                "completion": "completion",
                "max_length": 16,
                "new_tokens": 2,
            },
            lora__targets=["c_attn"],
            partition={"kind": "iid", "clients": 2},
        )


def snapshot_of(model: Path, home: Path) -> Path:
    """A model as the hub's cache has it: links to blobs."""
    folder, blobs = (home / "models--some--bert" / each for each in ("snapshots/abc", "blobs"))
    folder.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        shutil.copy(path, blobs / path.name)
        (folder / path.name).symlink_to(Path("../../blobs") / path.name)
    return folder


# What lies in a folder, and whose text or bytes would be taken in with the rest.
LINKED = [
    *("config.json", "generation_config.json", "modeling_own.py", "chat_template.jinja"),
    *("vocab.txt", "merges.txt", "model.safetensors", "model.safetensors.index.json", "README.md"),
    *("deep/in/it.txt", "additional_chat_templates", "notes"),
]


@pytest.mark.parametrize("to", ["a file", "a folder", "nowhere", "blobs that are a link"])
@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_out_of_a_models_folder_is_refused(
    tiny: Tiny, tmp_path: Path, name: str, to: str
) -> None:
    """What it leads to would be saved with the adapter, and uploaded."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "id_rsa").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    blobs = folder / "models--a--b" / "blobs"
    targets = {
        "a file": elsewhere / "id_rsa",
        "a folder": elsewhere,
        "nowhere": tmp_path / "nowhere",
        "blobs that are a link": blobs / "id_rsa",
    }
    (folder / name).symlink_to(targets[to])
    if to == "blobs that are a link":
        blobs.parent.mkdir()
        blobs.symlink_to(elsewhere)
    said = rf"model '.*': ({re.escape(name)}|models--a--b/blobs) is a link that leads out"
    for load in (
        lambda: load_reader(str(folder), "classification"),
        lambda: load_base(str(folder), "classification", LABELS, key=Key(0)),
    ):
        with pytest.raises(FedSieveError, match=said):
            load()


def test_links_into_what_a_repositorys_annex_keeps_are_taken(tiny: Tiny, tmp_path: Path) -> None:
    """Also where the folder is a submodule, whose `.git` git-annex makes a link."""
    store = tmp_path / "super" / ".git" / "modules" / "sub"
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "super" / "sub" / "model"))
    (store / "annex" / "objects" / "K").mkdir(parents=True)
    for git in (folder.parent / ".git", folder / ".git"):  # above the model, or beside its files
        git.symlink_to(store)
        weights, key = folder / "model.safetensors", store / "annex" / "objects" / "K" / "K"
        if not key.exists():
            weights.rename(key)
            weights.symlink_to(key)
        load_base(str(folder), "classification", LABELS, key=Key(0))
        load_reader(str(folder), "classification")
        git.unlink()
    with pytest.raises(FedSieveError, match=r"model\.safetensors is a link that leads out"):
        load_base(str(folder), "classification", LABELS, key=Key(0))


def test_a_tokenizer_that_cannot_say_what_stands_around_a_text_is_told(
    tiny: Tiny,
) -> None:
    """TAPAS reads tables, and raises where it is asked."""
    reader, _ = load_reader(str(tiny.bert), "classification")

    def raises(pair: bool = False) -> int:
        raise ValueError("you must provide both question IDs and table IDs")

    reader.num_special_tokens_to_add = raises
    for ask in (
        lambda: refuse_no_room(reader, 16),
        lambda: tokenise(reader, ["a"], None, 16),
    ):
        with pytest.raises(FedSieveError, match=r"tokenizer cannot read texts: .*table IDs"):
            ask()


@pytest.mark.parametrize("key", ["vocab", "merges", "gguf_file"])
def test_a_tokenizers_words_are_in_its_folder(tiny: Tiny, tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    (tmp_path / "secret").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nof mine\n")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {key: str(tmp_path / "secret")}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    for left_out in ("tokenizer.json", "vocab.txt"):
        (folder / left_out).unlink(missing_ok=True)
    with pytest.raises(FedSieveError, match=f"tokenizer_config.json names a file for {key}"):
        load_reader(str(folder), "classification")


@pytest.mark.parametrize("key", ["vocab", "merges", "gguf_file", "vocab_file", "tokenizer_file"])
def test_no_special_token_is_the_name_of_a_file(tiny: Tiny, tmp_path: Path, key: str) -> None:
    """transformers takes all that stands there for settings, above those that it found."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    (tmp_path / "secret").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nof mine\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    told = {key: str(tmp_path / "secret"), "pad_token": "[PAD]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(told))
    with pytest.raises(FedSieveError, match=f"special_tokens_map.json names a file for {key}"):
        load_reader(str(folder), "classification")


def test_a_tokenizer_for_other_versions_is_in_its_folder(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    elsewhere = "../tokenizer.4.0.0.json"
    for others in ([elsewhere], {elsewhere: 1}, [1], elsewhere):
        with_tokenizer(folder, fast_tokenizer_files=others)
        with pytest.raises(FedSieveError, match=r"has fast_tokenizer_files .* a list of"):
            load_reader(str(folder), "classification")


def test_what_a_tokenizer_is_made_with_names_no_file(tiny: Tiny, tmp_path: Path) -> None:
    """Of these the first is BERT's vocabulary, or its path."""
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "model"))
    (tmp_path / "key.txt").write_text("a secret", encoding="utf-8")
    with_tokenizer(folder, init_inputs=[])
    load_reader(str(folder), "classification")
    with_tokenizer(folder, init_inputs=[str(tmp_path / "key.txt")])
    with pytest.raises(FedSieveError, match="has init_inputs, which may name any file"):
        load_reader(str(folder), "classification")


def test_what_real_models_do_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    """Parts of a head that are drawn, tied tensors, weights in several files, links to them."""
    folder = snapshot_of(tiny.bert, tmp_path)
    used(tiny, folder)
    (tmp_path / "also").symlink_to(folder)
    used(tiny, tmp_path / "also")
    (folder / "README.md").symlink_to("config.json")
    used(tiny, folder)
    tensors_of = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors_of)
    parts = {f"model-{n}-of-2.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, own in parts.items():
        safetensors.torch.save_file(
            {n: tensors_of[n] for n in own}, folder / file, {"format": "pt"}
        )
    where = {name: file for file, own in parts.items() for name in own}
    whole = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    used(tiny, folder)
    load_base(str(tiny.gpt2), "causal-lm", key=Key(0), pad_token_id=0)
    base = load_base(str(folder), "classification", LABELS, key=Key(0))
    assert all(torch.isfinite(p).all() for p in base.parameters())
    odd: list[tuple[dict[str, Any], str]] = [
        ({"weight_map": where}, 'has no table "metadata"'),
        ({"metadata": {}, "weight_map": {n: f"./{f}" for n, f in where.items()}}, "name alone"),
        ({"metadata": {}, "weight_map": {n: f"../{f}" for n, f in where.items()}}, "name alone"),
    ]
    for table, said in odd:
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))
        with pytest.raises(FedSieveError, match=said):
            used(tiny, folder)
