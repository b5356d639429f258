"""A base in 4 or 8 bits: what is quantised and what is not, that every method that leaves it alone
trains over it, and that what is saved computes what was trained.
"""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import fedsieve
from fedsieve import methods
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Trained
from fedsieve.engine.loop import begin, rounds
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe.experiment import assemble
from fedsieve.recipe.method import build_method
from fedsieve.run import runner
from fedsieve.settings import Lora, Quantization, Sampling, Task, Training
from fedsieve.sites import limits
from fedsieve.tasks.tokens import Texts
from fedsieve.train import quantise, trial
from fedsieve.train.batch import inputs
from fedsieve.train.changes import refuse_quantised
from fedsieve.train.digest import base_digest
from fedsieve.train.local import evaluate
from fedsieve.train.model import ResidentModel, load_base, set_up
from tests import kinds, mapped, runs
from tests.conftest import LABELS, Tiny
from tests.train import small
from tests.train.test_trial import CLASSES, CPU, classified, continued

pytest.importorskip("bitsandbytes")

FORMS: tuple[Quantization, ...] = ("nf4", "int8")
KINDS: dict[str, tuple[Task, tuple[str, ...], tuple[str, ...]]] = {
    "llama": ("causal-lm", ("q_proj", "v_proj"), ()),
    "bert": ("classification", ("query", "value"), CLASSES),
}
CHANGE_THE_BASE = {"flora", "florist", "fedex_lora", "fed_plora", "full"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("quantised")
    found = {kind: small.make(kind, task, place / kind) for kind, (task, *_) in KINDS.items()}
    for folder in found.values():
        small.tokenizer().save_pretrained(folder)
    return found


def base_of(folder: Path, kind: str, form: Quantization, **more: Any) -> Any:
    task, _, classes = KINDS[kind]
    given = {"quantization": form, "pad_token_id": small.PAD, **more}
    return load_base(str(folder), task, classes, key=Key(0), **given)


def resident_of(
    folder: Path, kind: str, form: Quantization, trains: Any = "lora", **more: Any
) -> ResidentModel:
    task, targets, _ = KINDS[kind]
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets=targets, whole=more.get("whole", ()))
    return set_up(base_of(folder, kind, form, **more), task, lora, trains, key=Key(0), device=CPU)


@cache
def examples_of(kind: str) -> Texts:
    return (classified if KINDS[kind][0] == "classification" else continued)(small.tokenizer())


def moved(resident: ResidentModel) -> Any:
    """An adapter whose pairs add something."""
    start, draw = resident.adapter(), torch.Generator().manual_seed(1)
    tensors = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in start.tensors.items()}
    return start._replace(tensors=tensors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", kinds.some_of(KINDS))
def test_every_method_that_leaves_the_base_alone_trains_over_it(
    folders: dict[str, Path], kind: str, form: Quantization
) -> None:
    folder, examples = folders[kind], examples_of(kind)
    made: dict[Trained, ResidentModel] = {}
    for name in methods.names():
        if name == "head" and kind == "llama":
            continue  # a language model has none that is trained alone
        method = methods.load(name)()
        if name in CHANGE_THE_BASE:
            with pytest.raises(FedSieveError, match=rf"{name!r} changes the base's .*{form!r}"):
                refuse_quantised(str(folder), form, method, name)
            continue
        refuse_quantised(str(folder), form, method, name)
        if method.trains not in made:
            made[method.trains] = resident_of(folder, kind, form, method.trains)
        resident = made[method.trains]
        before = base_digest(resident.model, str(folder)).weights
        start = resident.adapter()
        experiment = assemble(
            resident,
            method,
            lambda id: examples,
            {"0": 4, "1": 4},
            {"0": Budget(0.5, 0.5, 0.5), "1": Budget()},
            training=Training(steps=2, batch=4, lr=0.05, precision="fp32"),
            rounds=1,
            sampling=Sampling(size=2),
            seed=0,
            test=examples,
        )
        first, progress = begin(experiment.federation, start)
        *_, (last, receipts, progress) = rounds(experiment.federation, progress, 1)
        assert all(receipt.dropped is None for receipt in receipts), name
        assert first.eval_loss is not None
        assert last.eval_loss is not None
        assert last.eval_loss < first.eval_loss + 0.5, name
        after = method.export(progress.state).tensors
        assert any(not torch.equal(after[n], start.tensors[n]) for n in start.tensors), name
        resident.put(start)
        assert base_digest(resident.model, str(folder)).weights == before, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_of_the_body_are_quantised_and_nothing_else(
    folders: dict[str, Path], kind: str, form: Quantization, dtype: Any
) -> None:
    base = base_of(folders[kind], kind, form, dtype=dtype)
    own = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    plain = own.from_pretrained(folders[kind])
    body = [n for n, m in plain.base_model.named_modules() if isinstance(m, nn.Linear)]
    expected = {f"{plain.base_model_prefix}.{name}" for name in body}
    assert {name for name, _ in quantise.layers(base)} == expected
    floats = {p.dtype for p in base.parameters() if p.is_floating_point()}
    assert floats == {getattr(torch, dtype)}
    numbers = sum(plain.get_submodule(name).weight.numel() for name in expected)
    whole = sum(p.numel() for p in plain.parameters()) - numbers
    each = {"nf4": 0.5 + 4 / 64, "int8": 1.0}[form]
    at_least = numbers * each + whole * getattr(torch, dtype).itemsize
    # Scales of 8 bits are one a row, and these rows are short; 4 bits have tables beside them.
    assert at_least <= quantise.held_bytes(base) < 1.2 * at_least + 14 * 256
    again = base_of(folders[kind], kind, form, dtype=dtype)
    source = str(folders[kind])
    assert base_digest(base, source) == base_digest(again, source)
    float_base = base_of(folders[kind], kind, "none", dtype=dtype)
    assert base_digest(base, source) != base_digest(float_base, source)


def test_the_scales_are_part_of_what_a_base_is(folders: dict[str, Path]) -> None:
    for form in FORMS:
        base = base_of(folders["llama"], "llama", form)
        before = base_digest(base, str(folders["llama"]))
        _, layer = next(quantise.layers(base))
        (layer.state.SCB if form == "int8" else layer.weight.quant_state.absmax).mul_(1.01)
        assert base_digest(base, str(folders["llama"])) != before


@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained_whole_stays_in_float(folders: dict[str, Path], form: Quantization) -> None:
    whole = ("pooler", "LayerNorm", "word_embeddings")
    resident = resident_of(folders["bert"], "bert", form, whole=whole)
    names = set(resident.layout.names)
    assert any("pooler.dense.weight" in name for name in names)
    assert any("word_embeddings.weight" in name for name in names)
    assert {t.dtype for t in resident.adapter().tensors.values()} == {torch.float32}
    quantised = {name for name, _ in quantise.layers(resident.model)}
    assert not any("pooler" in name or "classifier" in name for name in quantised)
    assert len(quantised) == 12


def test_what_the_checkpoint_lacks_is_drawn_and_not_quantised(tmp_path: Path) -> None:
    """A masked language model has no pooler: a classifier's is drawn, and so it is trained."""
    folder = small.make("bert", "classification", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "pooler" not in n and "classifier" not in n}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    base = base_of(folder, "bert", "nf4")
    drawn = {n for n, p in base.named_parameters() if p.requires_grad}
    assert drawn == {
        f"{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")
    }
    assert all(base.get_parameter(name).is_floating_point() for name in drawn)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_a_merged_model_computes_what_was_trained(
    folders: dict[str, Path], tmp_path: Path, kind: str, form: Quantization, monkeypatch: Any
) -> None:
    """GPT-2 has its weights the other way round."""
    if kind == "gpt2":
        monkeypatch.setitem(KINDS, "gpt2", ("causal-lm", ("c_attn",), ()))
        folders = {**folders, "gpt2": small.make("gpt2", "causal-lm", tmp_path / "gpt2")}
    resident = resident_of(folders[kind], kind, form)
    adapter, examples = moved(resident), examples_of("bert" if kind == "bert" else "llama")
    resident.put(adapter)
    resident.model.eval()
    own = logits(resident.model, examples)
    resident.merge(adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    merged, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    # Layers of 8 bits round what they are given, and those that are merged do not.
    tolerance = {"nf4": 1e-4, "int8": 0.05}[form] * float(own.abs().max())
    found = logits(merged.eval(), examples)
    assert torch.allclose(found, own, atol=tolerance)
    plain = logits(auto.from_pretrained(folders[kind]).eval(), examples)
    assert not torch.allclose(plain, own, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_over_the_base_as_it_was_published(
    folders: dict[str, Path], tmp_path: Path, kind: str, form: Quantization
) -> None:
    """Its files hold floats, whatever they became in training: nothing may say that they do not."""
    resident = resident_of(folders[kind], kind, form)
    adapter, examples = moved(resident), examples_of(kind)
    resident.save(adapter, tmp_path / "saved")
    assert (tmp_path / "saved" / "base").exists() == (kind == "bert")
    auto = AutoPeftModelForSequenceClassification if kind == "bert" else AutoPeftModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "saved").eval()
    plain = resident_of(folders[kind], kind, "none")
    plain.put(adapter)
    assert torch.allclose(logits(loaded, examples), logits(plain.model.eval(), examples), atol=1e-5)
    told = (tmp_path / "saved" / "README.md").read_text()
    assert f"in training the base was held in `{form}`" in told
    facts = json.loads((tmp_path / "saved" / "provenance.json").read_text())
    assert facts["base"]["held_in"] == form


def logits(model: Any, examples: Texts) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(model, examples, CPU)).logits
    return found * (examples.attention_mask[..., None] if found.ndim == 3 else 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_alone_is_saved_with_the_quantised_body(
    folders: dict[str, Path], tmp_path: Path, form: Quantization
) -> None:
    resident = resident_of(folders["bert"], "bert", form, "head")
    adapter, examples = moved(resident), examples_of("bert")
    expected = evaluate(resident, adapter, examples, precision="fp32").loss
    resident.save(adapter, tmp_path)
    again = resident_of(tmp_path, "bert", "none", "head")
    assert quantise.form_in(str(tmp_path)) == form
    found = evaluate(again, again.adapter(), examples, precision="fp32").loss
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_base_that_comes_quantised(
    folders: dict[str, Path], tmp_path: Path, kind: str, form: Quantization
) -> None:
    base = base_of(folders[kind], kind, form)
    base.save_pretrained(tmp_path)
    own, targets = base_digest(base, str(folders[kind])).weights, KINDS[kind][1]
    for asked in ("none", form):
        again = base_of(tmp_path, kind, asked)
        assert [n for n, _ in quantise.layers(again)] == [n for n, _ in quantise.layers(base)]
        assert base_digest(again, str(tmp_path)).weights == own
        # In memory of this process, whatever becomes of the file.
        assert not mapped.is_mapped(tmp_path)
    trained = resident_of(tmp_path, kind, "none")
    adapter = moved(trained)
    trained.put(adapter)
    trained.model.eval()
    said = logits(trained.model, examples_of(kind))
    trained.merge(adapter, tmp_path / "merged")
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    merged = logits(auto.from_pretrained(tmp_path / "merged").eval(), examples_of(kind))
    tolerance = {"nf4": 1e-4, "int8": 0.05}[form] * float(said.abs().max())
    assert torch.allclose(merged, said, atol=tolerance)
    other: Quantization = "int8" if form == "nf4" else "nf4"
    with pytest.raises(FedSieveError, match=rf"is quantised already, in {form}"):
        base_of(tmp_path, kind, other)
    with pytest.raises(FedSieveError, match=r"'flora' changes the base"):
        refuse_quantised(str(tmp_path), "none", methods.load("flora")(), "flora")
    if kind == "llama":  # as a classifier it gets a head, which is drawn
        classifier = load_base(
            str(tmp_path), "classification", CLASSES, key=Key(0), pad_token_id=small.PAD
        )
        lora = Lora(rank=2, targets=targets)
        resident = set_up(classifier, "classification", lora, "lora", key=Key(0), device=CPU)
        assert any("score" in name for name in resident.layout.names)
        assert sum(1 for _ in quantise.layers(classifier)) == 14
    else:
        with pytest.raises(FedSieveError, match=r"pooler.*trained whole.*holds it quantised"):
            resident_of(tmp_path, kind, "none", whole=("pooler",))


@pytest.fixture(scope="session")
def packed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of each form as others save it: GPT-2 has its weights the other way round."""
    place = tmp_path_factory.mktemp("packed")
    gpt2 = small.make("gpt2", "causal-lm", place / "floats")
    four: dict[str, Any] = {"load_in_4bit": True}
    forms: dict[str, tuple[Path, dict[str, Any], dict[str, Any]]] = {
        "nf4": (folders["llama"], {**four, "bnb_4bit_quant_type": "nf4"}, {}),
        "fp4": (folders["llama"], {**four, "bnb_4bit_quant_type": "fp4"}, {}),
        "double": (
            folders["llama"],
            {**four, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            {},
        ),
        "stored as bfloat16": (
            folders["llama"],
            {**four, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
            {},
        ),
        "in shards": (
            folders["llama"],
            {**four, "bnb_4bit_quant_type": "nf4"},
            {"max_shard_size": "8KB"},
        ),
        "int8": (folders["llama"], {"load_in_8bit": True}, {}),
        "gpt2 nf4": (gpt2, {**four, "bnb_4bit_quant_type": "nf4"}, {}),
        "gpt2 int8": (gpt2, {"load_in_8bit": True}, {}),
    }
    for name, (folder, how, saving) in forms.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**how), device_map={"": "cpu"}
        )
        model.save_pretrained(place / name, **saving)
    assert len([*(place / "in shards").glob("*.safetensors")]) > 1
    return {name: place / name for name in forms}


PACKED = ("nf4", "fp4", "double", "stored as bfloat16", "in shards", "int8")


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, dtype) for form in PACKED for dtype in ("float32", "bfloat16")),
        *((form, "float32") for form in ("gpt2 nf4", "gpt2 int8")),
    ],
)
def test_bases_that_others_packed_load_as_they_are(
    packed: dict[str, Path], form: str, dtype: Any
) -> None:
    base = base_of(packed[form], "llama", "none", dtype=dtype)
    assert any(True for _ in quantise.layers(base))


AT = "model.layers.0.mlp.down_proj"  # (32, 48): 1536 numbers, of which 64 have one scale: 24


def says(**changes: Any) -> Any:
    """What is said beside a packed weight, with changes."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(name for name in tensors if name.startswith(f"{AT}.weight.quant_state"))
        told = {**json.loads(bytes(tensors[key].tolist())), **changes}
        tensors[key] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)

    return change


def has(last: str, change: Any) -> Any:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{AT}.{last}"] = change(tensors[f"{AT}.{last}"]).contiguous()

    return spoil


# The form, what is done to it, and the tensor that is named with what is wrong.
SPOILT: dict[str, tuple[str, Any, str]] = {
    "no scale": ("nf4", has("weight.absmax", lambda t: t[:0]), r"weight\.absmax.*\(24,\)"),
    "one scale": ("nf4", has("weight.absmax", lambda t: t[:1]), r"weight\.absmax.*\(24,\)"),
    "scales of fp4": ("fp4", has("weight.absmax", lambda t: t[:1]), r"weight\.absmax"),
    "twice the scales": ("nf4", has("weight.absmax", lambda t: t.repeat(2)), r"weight\.absmax"),
    "scales in a square": ("nf4", has("weight.absmax", lambda t: t[:, None]), r"weight\.absmax"),
    "whole scales": ("nf4", has("weight.absmax", lambda t: t.to(torch.uint8)), r"weight\.absmax"),
    "half the block": ("nf4", says(blocksize=32), r"weight\.absmax.*\(48,\)"),
    "twice the block": ("nf4", says(blocksize=128), r"weight\.absmax.*\(12,\)"),
    **{
        f"a block of {size!r}": ("nf4", says(blocksize=size), "down_proj.weight.*blocksize")
        for size in (0, 1, -64, 65, 2**40, "64", 64.0, None, True)
    },
    "turned": ("nf4", says(shape=[48, 32]), r"shape .*its layer has \(32, 48\)"),
    "turned fp4": ("fp4", says(shape=[48, 32]), r"shape .*its layer has \(32, 48\)"),
    **{
        f"a shape of {shape}": ("nf4", says(shape=shape), "down_proj.weight.*shape")
        for shape in ([1536], [32, 4_800_000], [], None)
    },
    "few bits": ("nf4", has("weight", lambda t: t[:16]), "down_proj.weight.*not 16 bytes"),
    "many bits": ("nf4", has("weight", lambda t: t.repeat(2, 1)), "not 1536 bytes"),
    "bits in floats": ("nf4", has("weight", lambda t: t.float()), "stored as F32.*uint8"),
    "bits in other floats": (
        "stored as bfloat16",
        has("weight", lambda t: t.float()),
        "stored as F32.*bfloat16",
    ),
    "few values": ("nf4", has("weight.quant_map", lambda t: t[:2]), r"quant_map.*\(16,\)"),
    "other values": ("nf4", has("weight.quant_map", lambda t: t * 3), "quant_map.*those of nf4"),
    "another type": ("nf4", says(quant_type="fp4"), "'fp4'.*config.json says 'nf4'"),
    "a type that is none": ("nf4", says(quant_type="zz"), "'zz'"),
    "no dtype": ("nf4", says(dtype="__dict__"), "down_proj.weight.*the type"),
    "a dtype of whole numbers": ("nf4", says(dtype="int8"), "torch.int8"),
    "double of none": (
        "nf4",
        lambda tensors: (
            says(nested_blocksize=256, nested_offset=1.0, nested_dtype="float32")(tensors),
            tensors.update({f"{AT}.weight.nested_absmax": torch.ones(1)}),
            tensors.update({f"{AT}.weight.nested_quant_map": torch.ones(256)}),
        ),
        r"weight\.absmax.*uint8",
    ),
    "no scale of scales": ("double", has("weight.nested_absmax", lambda t: t[:0]), "nested_absmax"),
    "few scales of double": ("double", has("weight.absmax", lambda t: t[:3]), r"weight\.absmax"),
    "few values of scales": ("double", has("weight.nested_quant_map", lambda t: t[:4]), "256"),
    "no block of scales": ("double", says(nested_blocksize=0), r"weight\.absmax.*blocksize"),
    "no dtype of scales": ("double", says(nested_dtype="int8"), r"weight\.absmax.*torch\.int8"),
    "in shards": ("in shards", has("weight.absmax", lambda t: t[:0]), r"weight\.absmax"),
    "few rows": ("int8", has("SCB", lambda t: t[:1]), r"down_proj\.SCB.*\(32,\)"),
    "no rows": ("int8", has("SCB", lambda t: t[:0]), r"down_proj\.SCB.*\(32,\)"),
    "many rows": ("int8", has("SCB", lambda t: t.repeat(2)), r"down_proj\.SCB.*\(32,\)"),
    "rows of whole numbers": ("int8", has("SCB", lambda t: t.to(torch.int8)), r"down_proj\.SCB"),
    "no sign": ("int8", has("weight", lambda t: t.view(torch.uint8)), "stored as U8.*int8"),
    "8 bits in floats": ("int8", has("weight", lambda t: t.float() / 300), "stored as F32.*int8"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_packed_weight_that_does_not_go_with_its_layer_is_named(
    packed: dict[str, Path], tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes reads as much memory as it is told: it ended processes, or took other numbers
    in each. So none of it may run before the weight is refused.
    """
    form, spoil, said = SPOILT[case]
    folder = Path(shutil.copytree(packed[form], tmp_path / "base"))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{AT}.weight" in tensors:
            spoil(tensors)
            save_file(tensors, path, {"format": "pt"})
    monkeypatch.setattr("fedsieve.train.model.settle", None)
    with pytest.raises(FedSieveError, match=said) as refused:
        base_of(folder, "llama", "none")
    assert str(folder) in str(refused.value)
    assert AT in str(refused.value)
    assert len(str(refused.value)) < 500 + len(str(folder))


def test_a_base_whose_configuration_says_another_form_is_refused(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed["nf4"], tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedSieveError, match=r"'nf4', and config\.json says 'fp4'"):
        base_of(folder, "llama", "none")


def test_tokens_are_looked_at_one_by_one(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit layers leave as they are the features in which any token of a batch is large: so the
    last token decides how those before it are rounded, and SmolLM2, which is causal, looked as if
    it were not.
    """
    seen: set[float] = set()
    run = trial._run

    def spy(model: Any, rows: Any) -> Any:
        seen.update(layer.state.threshold for _, layer in quantise.layers(model))
        return run(model, rows)

    monkeypatch.setattr(trial, "_run", spy)
    base = base_of(folders["llama"], "llama", "int8")
    assert seen == {0.0}
    assert {layer.state.threshold for _, layer in quantise.layers(base)} == {6.0}  # as it was


# What is asked, and what is said of it.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "double of 8 bits": ({}, {"quantization": "int8", "double_quantization": True}, "of nf4"),
    "double of nothing": ({}, {"double_quantization": True}, "of nf4"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, {}, r"'gptq'.*pip install"),
    "awq": ({"quant_method": "awq", "bits": 4}, {}, r"'awq'.*pip install gptqmodel"),
    "fp8": ({"quant_method": "fp8"}, {}, "'fp8', and no LoRA"),
    "a list": ([1], {}, "unknown"),
    "names that are none": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": 5},
        {},
        "llm_int8_skip_modules",
    ),
    "settings": ({}, {"settings": {"load_in_4bit": True}}, r"say it by model\.quantization"),
    "scales": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quantization": "nf4", "double_quantization": True},
        "its scales are not",
    ),
    "weights that are not quantised": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {},
        "model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused_in_a_sentence(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    told, asked, said = REFUSED[case]
    folder = small.make("llama", "causal-lm", tmp_path)
    if told:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = told
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedSieveError, match=said) as refused:
        base_of(folder, "llama", "none", **asked)
    assert len(str(refused.value)) < 500


def test_without_the_package_it_is_said_how_to_get_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python has it for none
    with pytest.raises(FedSieveError, match=r"pip install 'fedsieve\[quant\]'") as refused:
        base_of(folders["llama"], "llama", "nf4")
    assert str(folders["llama"]) not in str(refused.value)  # a site's may be told to its server


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"quantization": "int4"}, r"model\.quantization"),
        ({"quantization": "int8", "double_quantization": True}, "double_quantization"),
    ],
)
def test_a_recipe_says_how(tiny: Tiny, model: dict[str, Any], said: str) -> None:
    with pytest.raises(FedSieveError, match=said):
        recipes.check(tiny.table(model={"source": str(tiny.bert), **model}))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tiny: Tiny, tmp_path: Path, form: Quantization
) -> None:
    changes: dict[str, Any] = {"model__quantization": form, "rounds": 3}
    whole = runs.start(tiny, tmp_path / "whole", **changes)

    def stop(summary: Any, _: Any) -> None:
        if summary.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(runner.Stopped):
        runs.start(tiny, tmp_path / "stopped", stop, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.write", lambda *_: [])
        again = runner.resume(tmp_path / "stopped", runs.quiet)
    assert set(again.tensors) == set(whole.tensors)
    assert all(torch.equal(again.tensors[n], t) for n, t in whole.tensors.items())
    for log in ("metrics.jsonl", "clients.jsonl"):
        assert runs.untimed(tmp_path / "stopped", log) == runs.untimed(tmp_path / "whole", log)
    runner.export(tmp_path / "whole", tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.label2id.keys() == set(LABELS)
    assert not quantise.is_quantised(merged)


def test_a_method_that_changes_the_base_is_refused_before_it_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsieve.recipe.experiment.load_base", None)
    for name in sorted(CHANGE_THE_BASE):
        with pytest.raises(FedSieveError, match=rf"method '{name}' changes.*= 'nf4'"):
            runs.start(
                tiny,
                tmp_path / name,
                model__quantization="nf4",
                method={"name": name},
                budgets=[{}],
            )


def test_a_notebook_says_it_too(tiny: Tiny) -> None:
    rows = Dataset.from_csv(str(tiny.train)).select(range(8))
    given: dict[str, Any] = {"rounds": 1, "device": "cpu", "lora": Lora(rank=2)}
    run = fedsieve.finetune(
        tiny.bert, [rows], fedsieve.fedit(), quantization="nf4", dtype="bfloat16", **given
    )
    assert [round.round for round in run.finish().metrics] == [0, 1]
    assert quantise.is_quantised(run._experiment.resident.model)
    with pytest.raises(FedSieveError, match="this method changes the base's weights"):
        fedsieve.finetune(tiny.bert, [rows], fedsieve.flora(), quantization="nf4", **given)
    for wrong in ({"quantization": "int4"}, {"dtype": "int8"}, {"double_quantization": True}):
        with pytest.raises(FedSieveError, match=next(iter(wrong))):
            fedsieve.finetune(tiny.bert, [rows], fedsieve.fedit(), **given, **wrong)


def test_a_site_counts_what_quantised_weights_take(tiny: Tiny) -> None:
    """The largest weight as floats, and for 8 bits what the layers are given."""
    recipe = recipes.check(tiny.table(data__classes=list(LABELS)))
    shape = limits._shape(recipe, build_method(recipe)).model
    assert quantise.beside(shape, "none", 8, 16) == 0
    assert quantise.beside(shape, "nf4", 8, 16) == 4 * 32 * 16
    inside = 4 * 16 + 16 + 32  # of a layer: query, key, value, output; up; down
    given = 2 * inside + 16 + 16  # and of the pooler and the head
    assert quantise.beside(shape, "int8", 8, 16) >= 4 * (32 * 16 + 8 * 16 * given)
