"""A base model, prepared for a task, beside the adapter that was trained over it.

PEFT and transformers make an adapter's base from the place that `adapter_config.json` names, and
from that alone: how many labels there are, and what they are called, they read from the base's own
configuration. The base as it was published says nothing of a task's labels. So where the two
differ, a folder beside the adapter holds the base with the configuration that the task needs, and
`AutoPeftModelFor...`, `pipeline` and transformers' own loading find what they need there.

The weights are not copied: hard links to the base's own files take no room, and stay if the base is
removed. Where the file system has none, they are copied.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fedsieve.errors import FedSieveError
from fedsieve.train.origin import Origin, file_of, stamps_of
from fedsieve.train.quantise import form, is_quantised
from fedsieve.train.source import table_of

BASE = "base"  # the folder beside an adapter
_GENERATION = "generation_config.json"
# What a configuration holds of how and by what it was loaded, and not of the model.
_LOADING = {"_name_or_path", "_commit_hash", "architectures", "transformers_version", "dtype"}
_LOADING |= {"use_cache", "_attn_implementation"}
_USUAL = "single_label_classification"


def needed(model: PreTrainedModel, origin: Origin, *, head: bool) -> bool:
    """Whether a base as it was published would be another model than the one that was trained.

    head: whether the task's models have one; a language model is the same with other padding
    """
    own = _published(model.config, origin)
    if own is None:
        return True
    mine = _as_published(model.config, own).to_dict()
    apart = set(_LOADING) if head else {*_LOADING, "pad_token_id"}
    if own.get("problem_type") is None and mine.get("problem_type") == _USUAL:
        apart.add("problem_type")  # what transformers takes it for
    return any(own.get(key) != mine.get(key) for key in (own.keys() | mine.keys()) - apart)


def other_dtype(model: PreTrainedModel, origin: Origin) -> str | None:
    """The type of the base's numbers in training, where its own configuration says another."""
    own, mine = _published(model.config, origin), model.config.to_dict().get("dtype")
    return None if own is None or own.get("dtype") in (None, mine) else mine


def write(
    model: PreTrainedModel, origin: Origin, folder: Path, trained: Mapping[str, Size]
) -> None:
    """Write the base of a model into a folder, with the configuration that it was trained with.

    model:   the base, with PEFT's layers in it
    trained: the parameters that the adapter holds whole, by the base's names, and their shapes
    Raises FedSieveError for a quantised base whose files are not there any more, or others.
    """
    folder.mkdir()
    source, revision = origin.source, origin.revision
    config = _as_published(model.config, _published(model.config, origin) or {})
    config.architectures = [type(model).__name__]
    odd_name = getattr(config, "transformers_weights", None) is not None
    if odd_name:
        config.transformers_weights = None
    config.save_pretrained(folder)
    if (said := file_of(source, revision, _GENERATION)) is not None:
        _link(said, folder / _GENERATION)
    same = stamps_of(source) == origin.stamps
    files = _weights(source, revision) if same and not odd_name else None
    if files is None:
        # They are not where the model was loaded from any more, others, or of another name.
        if is_quantised(model):
            raise FedSieveError(
                f"the base {origin.name!r} was loaded from files that are not there any more, and "
                "is held quantised: put them back, and `fedsieve export` the run"
            )
        model.save_pretrained(folder, state_dict=_without_adapter(model))
        return
    gone: set[str] = set()
    for name, path in files.items():
        odd = set(_of_another_shape(path, trained))
        if odd:
            _write_without(path, folder / name, odd)
        else:
            _link(path, folder / name)
        gone |= odd
    index = file_of(source, revision, SAFE_WEIGHTS_INDEX_NAME)
    if SAFE_WEIGHTS_NAME not in files and index is not None:
        told = json.loads(index.read_text(encoding="utf-8"))
        places = {name: file for name, file in told["weight_map"].items() if name not in gone}
        text = json.dumps({**told, "weight_map": places}, indent=2) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    if getattr(model.config, "auto_map", None) and Path(source).is_dir():
        for program in sorted(Path(source).glob("*.py")):
            _link(program, folder / program.name)  # without it nothing loads, trusted or not


def form_in_training(model: PreTrainedModel, origin: Origin) -> str | None:
    """The form in which the base's weights were held, where its own files hold them as floats."""
    told = getattr(model.config, "quantization_config", None)
    own = _published(model.config, origin) or {}
    if told is None or own.get("quantization_config") is not None:
        return None
    return form(told if isinstance(told, Mapping) else told.to_dict())


def _as_published(config: Any, own: Mapping[str, Any]) -> Any:
    """A configuration without the form that the weights got when they were loaded, and that the
    files do not have. own: the base's own
    """
    config = copy.deepcopy(config)
    if own.get("quantization_config") is None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _published(config: Any, origin: Origin) -> dict[str, Any] | None:
    """The configuration of the base's own files, in the same form; None where it is not there."""
    try:
        told, _ = PreTrainedConfig.get_config_dict(
            origin.source, revision=origin.revision, local_files_only=True
        )
        own: dict[str, Any] = type(config).from_dict(told).to_dict()
    except Exception:  # whatever a configuration of others may raise
        return None
    return own


def _weights(source: str, revision: str | None) -> dict[str, Path] | None:
    """The base's files of weights by name; None where one is missing, or they are no safetensors.

    transformers takes the one file, and an index only where that is not there.
    """
    one = file_of(source, revision, SAFE_WEIGHTS_NAME)
    if one is not None:
        return {SAFE_WEIGHTS_NAME: one}
    index = file_of(source, revision, SAFE_WEIGHTS_INDEX_NAME)
    places = {} if index is None else table_of(index).get("weight_map")
    names = {str(name) for name in places.values()} if isinstance(places, Mapping) else set()
    found = {name: file_of(source, revision, name) for name in sorted(names)}
    here = {name: path for name, path in found.items() if path is not None}
    plain = all(Path(name).name == name for name in names)
    return here if here and plain and len(here) == len(found) else None


def _of_another_shape(path: Path, trained: Mapping[str, Size]) -> Iterable[str]:
    """The tensors of a file that are a head of another size, which transformers would refuse."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if name in trained and Size(file.get_slice(name).get_shape()) != trained[name]:
                yield name


def _write_without(path: Path, to: Path, left_out: set[str]) -> None:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name not in left_out]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in names}, to, {"format": "pt"})


def _without_adapter(model: PreTrainedModel) -> dict[str, Any]:
    """The base's own tensors, by their own names."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path.resolve(), to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, to)
