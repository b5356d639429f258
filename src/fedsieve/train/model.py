"""The one resident base model, with one LoRA adapter in it that can be exchanged.

A client's adapter is put INTO the model: PEFT's LoRA layers get parameters of the client's own rank
k, so memory, compute and optimizer state follow k, and no client needs a copy of the base. PEFT's
layers need no patch for that: their forward pass uses the weights' shapes and a scale.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
)

from fedsieve.algebra.adapter import Adapter, Layout, Tree, layout_of
from fedsieve.algebra.cores import Cores
from fedsieve.algebra.keys import Key, word
from fedsieve.algebra.method import Trained
from fedsieve.data import fetch, hub
from fedsieve.disk import of_the_disk, remove
from fedsieve.errors import FedSieveError, nearest, quoted, raise_of_memory, with_type, words
from fedsieve.settings import Dtype, Lora, Quantization, Task
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Reader
from fedsieve.train import card, packed, parts, prepared, quantise, targets
from fedsieve.train.card import Saved, Told
from fedsieve.train.cores import as_pairs, with_cores
from fedsieve.train.declared import names_held, refuse_larger, types_held
from fedsieve.train.digest import BaseDigest
from fedsieve.train.dropout import speed_up
from fedsieve.train.head import match_rows
from fedsieve.train.origin import Origin, origin_of
from fedsieve.train.outputs import head_of
from fedsieve.train.parts import Place
from fedsieve.train.seeded import seeded
from fedsieve.train.source import own_memory, refuse_odd, refuse_pickled, table_of
from fedsieve.train.trial import run_with_pairs, settle

_NAME = "default"  # PEFT's name of the adapter inside the model
_FLOAT = 4  # bytes
LABELS = "labels.json"  # beside an adapter: id2label and label2id, which PEFT has no place for
_NOTHING = Told()


@dataclass(frozen=True)
class ResidentModel:
    """A model with an adapter in it, and where each of the adapter's tensors sits.

    layout: of the full adapter, at the server's rank
    slots:  tensor name -> (module, attribute) that holds the parameter
    loras:  PEFT's LoRA layers, whose rank and scale go with the adapter; none where no pairs are
            trained
    frozen: `<module>.base` -> the base's own weight, kept from when it was first changed
    dense:  of dense LoRA as the settings have it, whatever is trained: what all bytes are compared
            with. It is empty where no such LoRA fits the model
    ties:   tensor name -> the other places of the same parameter, where weights are tied
    tokenizer: or image processor; saved beside the model, if it is known
    head: what is given the places with labels alone (outputs.py), of a language model
    digest: of the base as it was loaded, where a run keeps it
    origin: where the base came from, noted as it was loaded
    pairs: the model as one of LoRA pairs, where cores between frozen factors are trained (cores.py)
    """

    model: PeftModel | PreTrainedModel
    task: Task
    layout: Layout
    slots: dict[str, Place]
    loras: tuple[LoraLayer, ...]
    device: torch.device
    frozen: Tree
    dense: Layout
    ties: Mapping[str, Sequence[Place]]
    tokenizer: Reader | None = None
    head: nn.Module | None = None
    digest: BaseDigest | None = None
    origin: Origin | None = None
    pairs: "ResidentModel | None" = None

    @property
    def body(self) -> str | None:
        """A digest of all that was loaded, in which no seed is: what runs of one study must have in
        common. None where nobody keeps it.
        """
        return None if self.digest is None else self.digest.whole

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the outputs, in their order; empty where they are no classes."""
        names: dict[int, str] = self.model.config.id2label
        return tuple(names[n] for n in sorted(names)) if catalogue.load(self.task).named else ()

    def adapter(self) -> Adapter:
        """A copy, on the CPU, of the adapter that is in the model."""
        tensors = {name: p.detach().clone().cpu() for name, p in self.parameters()}
        return Adapter(self.layout, tensors)

    def parameters(self) -> list[tuple[str, Tensor]]:
        """The trained parameters by adapter name, in sorted order; the model's own, not copies."""
        return [(name, getattr(*self.slots[name])) for name in self.layout.names]

    def put(self, adapter: Adapter) -> None:
        """Put an adapter of any rank into the model; its scale too."""
        for name, tensor in adapter.tensors.items():
            # A copy: training must not write into the caller's tensors.
            value = tensor.detach().to(self.device, torch.float32, copy=True)
            parameter = nn.Parameter(value)
            for module, attribute in (self.slots[name], *self.ties.get(name, ())):
                setattr(module, attribute, parameter)
        for module in self.loras:
            module.scaling[_NAME] = adapter.layout.scale
            module.r[_NAME] = adapter.layout.rank
        self._put_base(adapter.base)

    def _put_base(self, base: Tree) -> None:
        for name in base.keys() | self.frozen.keys():
            layer = self.model.get_submodule(name.removesuffix(".base"))
            weight = layer.get_base_layer().weight
            own = self.frozen.setdefault(name, weight.detach().clone())
            if name not in base:
                weight.data.copy_(own)
                continue
            change = base[name].to(self.device)
            turned = change.T if layer.fan_in_fan_out else change
            if turned.shape != own.shape:
                raise FedSieveError(
                    f"the base weight of {name.removesuffix('.base')} cannot be changed: this "
                    "method needs LoRA on linear layers alone; choose other lora.targets"
                )
            weight.data.copy_((own.float() + turned.float()).to(own.dtype))

    def bytes_saved(self, adapter: Adapter) -> int:
        """Of the weights that `save` writes."""
        if adapter.base or not isinstance(self.model, PeftModel):
            return sum(p.numel() * p.element_size() for p in self.model.parameters())
        if self.pairs is not None:
            return _FLOAT * self.pairs.layout.size
        return sum(t.numel() * t.element_size() for t in adapter.tensors.values())

    def save(
        self,
        adapter: Adapter,
        folder: Path,
        told: Told = _NOTHING,
        *,
        home: Path | None = None,
        for_hub: bool = False,
    ) -> None:
        """Write an adapter in PEFT's format, ready to use: `AutoPeftModelFor...` and `pipeline` of
        transformers read it.

        The tokenizer goes beside it, a card that says how to load it (card.py), a classifier's
        names of labels in `labels.json`, and in `base/` the base with the task's configuration,
        where its own is another (prepared.py). No `config.json` goes there: transformers would
        take the folder for a whole model.

        Where more than an adapter was trained (all weights, the head alone, a changed base), the
        whole model is written, for `from_pretrained` of its own class.

        told:    what the run tells of itself
        home:    where the folder will be, if it is moved when it is whole: its adapter names
                 `base/` by the whole way there
        for_hub: it is to be uploaded: the base is named as the hub knows it, and not beside it
        Raises FedSieveError if there can be no such folder, or no such name.
        """
        if self.pairs is not None:
            with as_pairs(self, adapter) as (plain, own):
                plain.save(own, folder, told, home=home, for_hub=for_hub)
            return
        _make(folder)
        with _saving(folder):
            self._save(adapter, folder, told, home, for_hub)

    def _save(
        self, adapter: Adapter, folder: Path, told: Told, home: Path | None, for_hub: bool
    ) -> None:
        self.put(adapter)
        if not isinstance(self.model, PeftModel):
            self._save_whole(self.model, folder, told)
            return
        if adapter.base:
            self._save_whole(copy.deepcopy(self.model).merge_and_unload(), folder, told)
            return
        base, origin = self.model.get_base_model(), self.origin or origin_of(self.model.config)
        if for_hub and not origin.on_hub:
            raise FedSieveError(
                f"the base {origin.name!r} is a folder here, and no adapter on the hub can name "
                "it: give --merge to upload the whole model"
            )
        fits = not prepared.needed(base, origin, head=catalogue.load(self.task).head)
        alone = fits or not for_hub
        if alone and not fits and home is None:
            make_way(folder)
        self._configure(adapter.layout, (home or folder).resolve(), origin, fits, for_hub)
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        if self.classes:
            own = self.model.config
            labels = {"id2label": own.id2label, "label2id": own.label2id}
            (folder / LABELS).write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
        if alone and not fits:
            place = folder / prepared.BASE
            shapes = {
                name.removeprefix("base_model.model."): each.shape
                for name, each in self.parameters()
            }
            prepared.write(base, origin, place, shapes)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(str(place))
        # In `base/` the configuration says it.
        dtype = None if alone and not fits else prepared.other_dtype(base, origin)
        self._save_beside(
            folder,
            Saved(
                self.task,
                origin,
                self.digest,
                self.classes,
                adapter.layout.rank,
                alone,
                dtype,
                prepared.form_in_training(base, origin),
                alone and not fits,
            ),
            told,
        )

    def _configure(
        self, layout: Layout, home: Path, origin: Origin, fits: bool, for_hub: bool
    ) -> None:
        """What `adapter_config.json` is to say."""
        config = self.model.peft_config[_NAME]
        alpha = layout.scale * (layout.rank**0.5 if config.use_rslora else layout.rank)
        config.r = layout.rank
        # A whole number is what others expect, and what the recipe nearly always said.
        config.lora_alpha = round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
        # A set's order differs from process to process, and so would the file.
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        # PEFT adds a classifier's heads to those that were named to it, though they were.
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save or ())) or None
        config.base_model_name_or_path, config.revision = origin.source, None
        if for_hub or (fits and origin.source == origin.name):
            config.base_model_name_or_path, config.revision = origin.name, origin.revision
        elif not fits:
            config.base_model_name_or_path = str(home / prepared.BASE)

    def merge(self, adapter: Adapter, folder: Path, told: Told = _NOTHING) -> None:
        """Write the whole model with the adapter added into its weights. Uses up the resident.

        Of a quantised base the weights are those floats that it stands for: what was trained.
        Raises FedSieveError if there can be no such folder, or no such weights.
        """
        if self.pairs is not None:
            with as_pairs(self, adapter) as (plain, own):
                plain.merge(own, folder, told)
            return
        _make(folder)
        self.put(adapter)
        model = self.model
        origin = self.origin or origin_of(model.config)
        form = prepared.form_in_training(_plain(model), origin)
        quantise.dequantise(model, _NAME)
        whole = model.merge_and_unload() if isinstance(model, PeftModel) else model
        with _saving(folder):
            self._save_whole(whole, folder, told, form)

    def _save_whole(self, model: Any, folder: Path, told: Told, form: str | None = None) -> None:
        model.save_pretrained(str(folder))
        origin = self.origin or origin_of(self.model.config)
        saved = Saved(self.task, origin, self.digest, self.classes, form=form)
        self._save_beside(folder, saved, told)

    def _save_beside(self, folder: Path, saved: Saved, told: Told) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
        card.write(folder, saved, told)


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """What transformers and PEFT may raise over what they are to write, as FedSieve's own error; a
    disk's own is told elsewhere.
    """
    try:
        yield
    except FedSieveError:
        raise
    except Exception as error:
        raise_of_memory(error)
        if of_the_disk(error) is not None:
            raise
        raise FedSieveError(f"{folder} could not be written: {with_type(error)}") from error


def make_way(folder: Path) -> None:
    """Remove a base that was saved in a folder before. Raises FedSieveError for anything else of
    its name, a link too.
    """
    refuse_other_base(folder)
    if (folder / prepared.BASE).exists():
        remove(folder / prepared.BASE)


def refuse_other_base(folder: Path) -> None:
    """Raises FedSieveError for what has a base's name in a folder, and is none that was saved."""
    place = folder / prepared.BASE
    if not os.path.lexists(place):
        return
    told = table_of(folder / "adapter_config.json").get("base_model_name_or_path")
    saved = told == str(folder.resolve() / prepared.BASE)
    if not saved or place.is_symlink() or not place.is_dir():
        raise FedSieveError(
            f"{place} is there already, and the adapter's base would go there: choose another place"
        )


def _plain(model: Any) -> PreTrainedModel:
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or the best there is: CUDA, Apple's MPS, the CPU."""
    if name != "auto":
        try:
            device = torch.device(name)
            float(torch.zeros(1, device=device))  # "meta" holds no numbers
            if device.type == "cpu" and device.index:
                raise RuntimeError("all cores of a machine are one device, 'cpu'")
        except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
            why = words(error, 200)  # some devices are of packages of their own
            raise FedSieveError(f"device {quoted(name)} cannot be used here: {why}") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# What a model may give beside its logits, and that nobody looks at here.
_NOTHING_BESIDE = {"output_attentions": False, "output_hidden_states": False}


def load_base(
    name: str,
    task: Task,
    classes: Sequence[str] = (),
    *,
    key: Key,
    dtype: Dtype = "float32",
    quantization: Quantization = "none",
    double_quantization: bool = False,
    whole: Sequence[str] = (),
    pad_token_id: int | None = None,
    settings: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A pretrained model, ready for the task: frozen, but for what was drawn (see parts.py).

    classes:  names of the labels; a classifier without a head for them gets a new one, drawn from
              `key`, and one that has them in another order gets its rows into this one (head.py)
    quantization, double_quantization: how the body's linear layers are held (quantise.py)
    whole:    modules that are to be trained whole (lora.whole), and so are not quantised
    pad_token_id: the tokenizer's
    settings: changes to the model's configuration, such as its dropout rates, and to nothing else
              of how it is loaded
    trust_remote_code: that the model's own code, from the hub or its folder, is run was asked for
              by who started this
    Raises FedSieveError if the model cannot be found or read, if its weights are pickled, if it
    cannot be had in the form that is asked, if more than a head would have to be drawn, or if it
    does not keep to what every model must (trial.py).
    """
    refuse_pickled(name)
    form = quantise.form_of(name, settings or {}, quantization, double_quantization)
    _refuse_no_setting(name, settings or {}, trust_remote_code)
    asked = catalogue.load(task)
    kind = getattr(transformers, asked.auto)
    config = pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
    known = config.id2label
    if not trust_remote_code:
        asked_for = config
        if settings:
            asked_for = pretrained(AutoConfig, name, trust_remote_code=False, **settings)
        _made(name, kind, lambda: refuse_larger(name, kind, asked_for))
    told = {**(settings or {}), **asked.config(classes), **_NOTHING_BESIDE}
    given: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    given |= {"ignore_mismatched_sizes": True, "use_safetensors": True}
    given |= {"trust_remote_code": trust_remote_code}
    if form is not None:
        packed.refuse_other_types(name, config, types_held(name))
        told, more = _in_form(form, double_quantization, kind, name, told, given, whole, task)
        given |= more
    with seeded(word(key.at("head"))):
        model, info = pretrained(kind, name, **told, **given)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise FedSieveError(
            f"model {name!r} has an adapter in its folder already, and a second one would mix with "
            "it: merge the first into its base (PEFT's merge_and_unload), and give that"
        )
    own_memory(model)
    quantise.own_memory(model)
    quantise.settle(model, given["dtype"])
    # A head for other labels is drawn anew, nothing else: a base of random weights is no base.
    others = model.config.num_labels != config.num_labels
    odd = sorted(
        each
        for each, *_ in info["mismatched_keys"]
        if each.startswith(model.base_model_prefix) or not others
    )
    if odd:
        raise FedSieveError(
            f"model {name!r}: the weights of {odd[0]} have another shape than its configuration "
            "says; see model.settings"
        )
    if unread := parts.unread_layers(model, info["unexpected_keys"]):
        warnings.warn(
            f"model {name!r}: its weights have {len(unread)} tensors of layers beyond those that "
            f"its configuration asks for, and they are not used: {unread[0]}",
            stacklevel=2,
        )
    drawn = {*info["missing_keys"], *(n for n, *_ in info["mismatched_keys"])}
    parts.freeze_loaded(model, drawn)
    parts.refuse_random_body(model, name, task)
    packed.refuse_unfit(model, name, form)
    if classes and asked.named and model.config.num_labels != len(classes):
        raise FedSieveError(
            f"model {name!r}: a {model.config.model_type} model has {model.config.num_labels} "
            f"outputs however many classes there are (here {len(classes)}): choose another model"
        )
    if asked.named:
        match_rows(model, known, classes, drawn, key.at("head"))
    settle(model, task, pad_token_id)
    return model


def _in_form(
    form: str,
    double: bool,
    kind: Any,
    name: str,
    told: dict[str, Any],
    given: dict[str, Any],
    whole: Sequence[str],
    task: Task,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `from_pretrained` is given for a base in a form of quantise.py: of its configuration, in
    the place of `told`, and beside `given`.

    What is to stay as it is must be known before the first weight is read, so it is found over
    tensors without numbers.
    """
    trust_remote_code = given["trust_remote_code"]
    config = pretrained(AutoConfig, name, trust_remote_code=trust_remote_code, **told)
    own = getattr(config, "quantization_config", None)
    if own is not None:
        del config.quantization_config
    shape, info = pretrained(kind, name, config=config, **given, device_map={"": "meta"})
    drawn = {*info["missing_keys"]}
    if own is None:  # else packed weights have another shape
        drawn |= {name for name, *_ in info["mismatched_keys"]}
    parts.freeze_loaded(shape, drawn)
    trained = parts.trained_whole(shape, whole, head=catalogue.load(task).head)
    kept = quantise.kept_whole(shape, trained)
    if own is None:
        return told, quantise.loading(form, double, given["dtype"], kept)
    config.quantization_config = quantise.leaving(form, own, kept, info["unexpected_keys"])
    return {"config": config}, {"device_map": {"": "cpu"}}


def shape_of(
    name: str, task: Task, classes: int, settings: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A model without numbers, on the meta device, from its configuration and the names of its
    weights, where they are in a folder: what they lack of a head would be drawn at load.
    """
    config = pretrained(AutoConfig, name, trust_remote_code=False, **(settings or {}))
    kind = getattr(transformers, catalogue.load(task).auto)
    _made(name, kind, lambda: refuse_larger(name, kind, config))
    for setting, value in catalogue.load(task).config([str(n) for n in range(classes)]).items():
        setattr(config, setting, value)
    with torch.device("meta"):
        model: PreTrainedModel = _made(name, kind, lambda: kind.from_config(config))
    held, prefix = names_held(name), f"{model.base_model_prefix}."
    drawn = [
        each
        for each, _ in model.named_parameters()
        if held and not {each, each.removeprefix(prefix), f"{prefix}{each}"} & held
    ]
    parts.freeze_loaded(model, [each for each in drawn if not parts.in_layer(each)])
    return model


def set_up(
    base: PreTrainedModel,
    task: Task,
    lora: Lora,
    trains: Trained,
    *,
    key: Key,
    device: torch.device,
    tokenizer: Reader | None = None,
) -> ResidentModel:
    """A base model with what a method trains: a fresh LoRA adapter, cores between the factors of
    one, the head alone, or all.

    tokenizer: to be saved beside what is trained
    """
    if trains == "lora":
        resident = attach(base, task, lora, key=key, device=device)
    elif isinstance(trains, Cores):
        resident = attach(base, task, lora, key=key, device=device)
        resident = with_cores(resident, trains, key)
    else:
        dense = _dense_lora(base, task, lora)
        resident = replace(whole(base, task, lora, trains, device=device), dense=dense)
    return replace(resident, tokenizer=tokenizer, origin=origin_of(base.config))


def _dense_lora(base: PreTrainedModel, task: Task, lora: Lora) -> Layout:
    """The layout that LoRA would have in a model, which is left as it is; or an empty one."""
    # The twin's modules are its own, and its parameters the model's: nothing large is copied.
    known = {id(p): p for p in [*base.parameters(), *base.buffers()]} | quantise.shared(base)
    twin = copy.deepcopy(base, known)
    trained = [(p, p.requires_grad) for p in base.parameters()]
    try:
        return attach(twin, task, lora, key=Key(0), device=base.device).layout
    except FedSieveError:
        return Layout({}, (), 0, 1.0)
    finally:
        for parameter, was in trained:
            parameter.requires_grad_(was)


def whole(
    base: PreTrainedModel, task: Task, lora: Lora, trains: Trained, *, device: torch.device
) -> ResidentModel:
    """A base model of which the head, or all, is trained itself, without LoRA.

    The head is what lies outside the model's body, what was drawn at load, and the modules that
    lora.whole names. Raises FedSieveError if there is none.
    """
    chosen = parts.trained_whole(base, lora.whole, head=True) if trains == "head" else set()
    quantise.refuse_trained(base, sorted(chosen))
    ids = {id(base.get_parameter(name)) for name in chosen}
    for parameter in base.parameters():
        parameter.requires_grad_(trains == "all" or id(parameter) in ids)
    slots = _slots(base)
    tensors = {name: getattr(*slot) for name, slot in slots.items()}
    _in_float32(slots.values())
    at = head_of(base, task)
    quantise.move(base, device)
    if device.type == "cpu":
        speed_up(base)
    layout = layout_of(tensors, 1.0)
    ties = _ties(base, slots)
    return ResidentModel(base, task, layout, slots, (), device, {}, layout, ties, head=at)


def attach(
    base: PreTrainedModel, task: Task, lora: Lora, *, key: Key, device: torch.device
) -> ResidentModel:
    """Put a fresh LoRA adapter into a base model: A random from `key`, B zero.

    Raises FedSieveError if no module can take LoRA, a target does not exist, the rank is larger
    than a side of a target's weight, or the model does not run with the pairs.
    """
    targets.check_names(base, lora)
    chosen = parts.trained_whole(base, lora.whole, head=catalogue.load(task).head)
    quantise.refuse_trained(base, sorted(chosen))
    modules = parts.modules_of(base, chosen)
    tied = parts.tied_places(base)
    parts.refuse_tied(tied, modules, "lora.whole")
    config = targets.config_of(base, task, lora, modules)
    # Random numbers are drawn on the CPU, so that every device starts from the same adapter.
    with seeded(word(key.at("adapter"))), quantise.sparing(base):
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            what = " ".join(str(error).split())  # PEFT prints whole modules
            if what.startswith("No modules were targeted"):
                what = (
                    "lora.targets: no layer outside the head can take LoRA, or is in these layers"
                    + targets.convolutions(base)
                    if lora.targets != ()
                    else "lora.targets: the list is empty: leave it out for PEFT's own choice"
                )
            if what.startswith("No `target_modules` passed"):  # Mixtral's are its experts
                what = (
                    "lora.targets: PEFT has no choice for this mixture of experts: name layers of "
                    "attention, such as ['q_proj', 'v_proj']"
                )
            if what.startswith(("Cannot convert PEFT target", "lora.ParamWrapper")):
                what = f"lora.targets: {targets.FOR_EXPERTS}"
            raise FedSieveError(f"LoRA cannot be added to the model: {what}") from error
    found = model.base_model.targeted_module_names
    targets.check_found(lora, config, found)
    parts.refuse_tied(tied, found, "lora.targets")
    slots = _slots(model)
    published = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # Of a module that is trained whole PEFT saves its running statistics too, which stay (mode.py).
    if odd := sorted((published ^ set(slots)) - {_public(n) for n, _ in model.named_buffers()}):
        raise FedSieveError(f"PEFT would save other tensors than those trained: {odd[:4]}")
    tensors = {name: getattr(*slot) for name, slot in slots.items()}
    _in_float32(slots.values())
    layout = layout_of(tensors, lora.scale)
    for pair in layout.pairs:
        side = min(tensors[pair.a].shape[1], tensors[pair.b].shape[0])
        if lora.rank > side:
            raise FedSieveError(
                f"lora.rank {lora.rank} is larger than a side of {pair.module} ({side}): lower it, "
                "or list lora.targets without that layer"
            )
    loras = {name: each for name, each in model.named_modules() if isinstance(each, LoraLayer)}
    if base.device.type != "meta":
        run_with_pairs(model, task, loras)
    head = head_of(model, task)
    quantise.move(model, device)
    if device.type == "cpu":
        speed_up(model)
    ties = _ties(model, slots)
    return ResidentModel(
        model, task, layout, slots, tuple(loras.values()), device, {}, layout, ties, head=head
    )


def _make(folder: Path) -> None:
    """Make a folder to write to: transformers goes on without one, and writes nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedSieveError(f"{folder} cannot be written: {error.strerror}") from error


def pretrained(kind: Any, name: str, **given: Any) -> Any:
    """`kind.from_pretrained`. Raises FedSieveError in its words where that fails."""
    refuse_odd(name)
    with hub.asked(name):
        return _made(name, kind, lambda: kind.from_pretrained(name, **given))


def _made(name: str, kind: Any, make: Callable[[], Any]) -> Any:
    """What `make` makes of a model's files, by transformers' `kind`. Raises FedSieveError in its
    words where that fails.
    """
    try:
        return make()
    except (FedSieveError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever transformers may raise, or the tokenizers' own panic
        raise_of_memory(error)
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:500]
        if isinstance(error, RecursionError):
            first = "nested too deep"
        elif not isinstance(error, OSError | ValueError):  # a file that is none of a model's
            first = f"what its files hold is refused ({type(error).__name__}: {first})"
        if "Unrecognized configuration class" in first:
            raise FedSieveError(
                f"model {name!r} is of no kind that {kind.__name__} makes a model of: choose one "
                "that fits model.task, or another task"
            ) from error
        if "trust_remote_code" in str(error):
            raise FedSieveError(
                f"model {name!r} needs code of its own, which would run with your rights: give "
                "--trust-remote-code to `fedsieve run`, `resume` or `export` if you trust it"
            ) from error
        if not Path(name).exists() and isinstance(error, OSError):
            there = hub.reachable()
            why = f" ({first})" if there else ""
            remedy = None if there else fetch.instead_of(name)
            raise FedSieveError(
                f"model {name!r} was not found: it is no folder here, no name that `fedsieve "
                f"fetch` knows{nearest(name, fetch.MODELS)}, and was looked up "
                f"{hub.places()}{why}" + (f": {remedy}" if remedy else "")
            ) from error
        files = _READ_BY.get(kind.__name__, "config.json or its weights")
        remedy = f"look at its {files}, or fetch or copy the folder again"
        if not Path(name).exists():
            remedy = "give a folder that exists, or another name on the hub"
        raise FedSieveError(f"model {name!r} cannot be loaded: {first} ({remedy})") from error


# The files that transformers' classes make something of, by class; all others make a model.
_READ_BY = {
    "AutoConfig": "config.json",
    "AutoTokenizer": "tokenizer.json, tokenizer_config.json or config.json",
    "AutoImageProcessor": "preprocessor_config.json or config.json",
}


def _refuse_no_setting(name: str, settings: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raises FedSieveError for a setting that the model's configuration does not have.

    What it does not have would go to the function that loads the model: options that say which code
    is run, which files are read, and where others are written.
    """
    if settings:
        config = pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
        for key in settings:
            known = {"attn_implementation", *config.attribute_map, *config.to_dict()}
            if key not in known or key.startswith("_"):
                raise FedSieveError(
                    f"model.settings.{key[:80]}: the configuration of {name!r} has no such setting"
                    + nearest(key, known)
                )
            if key == "attn_implementation" and "/" in str(settings[key]):
                raise FedSieveError(
                    f"model.settings.{key}: {str(settings[key])[:80]!r} is a program from the hub, "
                    "and none is run: name one that transformers has (sdpa, eager)"
                )


def _slots(model: nn.Module) -> dict[str, Place]:
    """Where each trained parameter sits, by the name under which PEFT saves it."""
    slots: dict[str, Place] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            holder, attribute = name.rsplit(".", 1)
            slots[_public(name)] = (model.get_submodule(holder), attribute)
    return dict(sorted(slots.items()))


def _in_float32(places: Iterable[Place]) -> None:
    """Trained parameters become float32, and with them what their layers normalise by."""
    for module, attribute in places:
        for tensor in (getattr(module, attribute), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()


def _public(name: str) -> str:
    """The name under which PEFT saves what the model holds under a name of its own."""
    return name.replace(f".modules_to_save.{_NAME}", "").replace(f".{_NAME}", "")


def _ties(model: nn.Module, slots: Mapping[str, Place]) -> dict[str, list[Place]]:
    """Where else each trained parameter sits, for those that sit in several places."""
    known = parts.tied_places(model)
    ties = {}
    for name, slot in slots.items():
        others = [place for _, place in known[id(getattr(*slot))] if place != slot]
        if others:
            ties[name] = others
    return ties
