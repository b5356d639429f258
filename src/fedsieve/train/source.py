"""What a model's folder is trusted with: numbers, and no programs.

A pickle is a program that runs when it is read. Torch reads the pickles of weights in a restricted
way, and that restriction has been got around before: only safetensors are read here. A folder may
also bring a model's own code, which transformers runs where it is told to; it is told not to,
unless whoever starts FedSieve says so on the command line.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedsieve.disk import bytes_of, refuse_links_out
from fedsieve.errors import FedSieveError, printable, quoted, reason

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_CLASSES = 1_000_000
_LARGEST = 1 << 23  # bytes of a configuration: the names of 100,000 classes
_LARGEST_INDEX = 1 << 26  # a million tensors
_PROGRAMS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_INDEX = "model.safetensors.index.json"


def refuse_pickled(source: str) -> None:
    """Raises FedSieveError for a folder whose weights would be read from anything but safetensors.

    What lies beside safetensors and is not read may be there. Of the hub, safetensors alone are
    asked for (`load_base`).
    """
    folder = Path(source)
    if folder.is_file():
        raise FedSieveError(f"model {source!r} is a file: give the folder that it is in")
    if not folder.is_dir():
        return
    tables = _tables(source, folder)
    names = {path.name for path in folder.iterdir()}
    index = tables.get(_INDEX, {})
    if index and not isinstance(index.get("metadata"), Mapping):
        raise FedSieveError(
            f'model {source!r}: its {_INDEX} has no table "metadata", without which transformers '
            "does not read it: an empty one does"
        )
    named = tables.get("config.json", {}).get("transformers_weights")
    read = {*_shards(index)} | ({str(named)} - {_INDEX} if named else set())
    if not any(name.endswith(".safetensors") for name in names):
        read |= {name for name in names if name.endswith(_PICKLED)}
    odd = sorted(name for name in read if not name.endswith(".safetensors"))
    if odd:
        raise FedSieveError(
            f"model {source!r}: its weights are in {odd[0][:80]}, and only safetensors are read: "
            "other files can hold programs: load it with transformers where you trust it, and "
            "`save_pretrained` it (which writes model.safetensors)"
        )
    if odd := sorted(name for name in read if Path(name).name != name):
        raise FedSieveError(
            f"model {source!r}: it names {odd[0][:80]!r}, and its files are beside its "
            "config.json: the name alone is needed"
        )


def refuse_odd(source: str) -> None:
    """Raises FedSieveError for a folder with a pipe or an adapter in it, or with what leads out of
    it, or with a configuration that cannot be read here, or one that asks for a program from the
    hub.
    """
    folder = Path(source)
    if folder.is_dir():
        refuse_links_out(folder, f"model {source!r}")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FedSieveError(f"model {source!r}: {path.name[:80]} is no file: a pipe, or such")
    tables = _tables(source, folder)
    for name in WORDS:
        refuse_words_elsewhere(source, name, tables.get(name, {}))
    if (folder / "adapter_config.json").exists():
        # transformers would put it into the model, and first match its patterns with every module.
        raise FedSieveError(
            f"model {source!r}: it holds an adapter (adapter_config.json), and a base model is "
            "needed: merge the two (`fedsieve export --merge`, or PEFT's merge_and_unload), or "
            "take the adapter's files out"
        )
    config = tables.get("config.json", {})
    _refuse_odd_classes(source, config)
    for name in _READ_FIRST:
        _refuse_endless(source, name, tables.get(name, {}))
    for key in _PROGRAMS:
        if "/" in (value := str(config.get(key))):
            raise FedSieveError(
                f"model {source!r}: its config.json asks for {value[:80]!r} ({key}), a program "
                "from the hub, and none is run: take the line out"
            )


def own_memory(model: nn.Module) -> None:
    """Take a model's numbers out of the file that they were read from, into memory of this process.

    safetensors maps the file, and what of it is as the model has it stays there: written over, it
    would be another base in the midst of a run, and cut off, the end of the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if in_a_file(tensor):
            tensor.data = tensor.data.clone()


def in_a_file(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory that torch did not ask for: of a file, here."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


def refuse_words_elsewhere(source: str, file: str, told: Mapping[str, Any]) -> None:
    """Raises FedSieveError for a tokenizer's settings that say where its words are: transformers
    takes a text in the place of a vocabulary for the path of one, wherever it leads.

    file: one of `WORDS`, and what it says. In that of special tokens any file's name is obeyed; in
          the other names of files are passed over, and many models have some.
    """
    for key, value in told.items():
        plain = key.endswith("_file") and file == _TOKENS
        if isinstance(value, str) and (key in ("vocab", "merges", "gguf_file") or plain):
            raise FedSieveError(
                f"model {source!r}: its {file} names a file for {printable(key[:80])}, "
                "and its files are those of its folder: take the line out"
            )
    if told.get("init_inputs"):  # of which the first may be the path of a vocabulary
        raise FedSieveError(
            f"model {source!r}: its {file} has init_inputs, which may name any file: take "
            "the line out"
        )
    others = told.get("fast_tokenizer_files") or []
    plain = isinstance(others, list) and all(isinstance(name, str) for name in others)
    if not plain or any(Path(name).name != name for name in others):
        raise FedSieveError(
            f"model {source!r}: its {file} has fast_tokenizer_files "
            f"{quoted(others)}, and its files are those of its folder: a list of their names is "
            "needed"
        )


def _tables(source: str, folder: Path) -> dict[str, Mapping[str, Any]]:
    """The files of a folder that say what else is read, or how, by name; none where it is none.

    Raises FedSieveError for one that is not read here: taken for one that says nothing, it would be
    looked at by transformers alone.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name in (*_TABLES, *_VOCABULARIES):
        path = folder / name
        if path.is_file() and (mark := _mark(path)):
            raise FedSieveError(
                f"model {source!r}: its {name} begins with a byte order mark ({mark}), and is read "
                "by no library so: save it as UTF-8 without one"
            )
    for name in _TABLES:
        path, most = folder / name, _LARGEST_INDEX if name == _INDEX else _LARGEST
        if not path.is_file():
            continue
        if path.stat().st_size > most:
            raise FedSieveError(
                f"model {source!r}: its {name} has {path.stat().st_size} bytes: at most {most} are "
                "read"
            )
        try:
            value = _json(path, most)
        except (OSError, ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else reason(error)
            raise FedSieveError(
                f"model {source!r}: its {name} cannot be read as JSON in UTF-8 ({why}): fetch or "
                "copy it again"
            ) from error
        if not isinstance(value, Mapping):
            raise FedSieveError(
                f"model {source!r}: its {name} holds no table, but a {type(value).__name__}: fetch "
                "or copy it again"
            )
        found[name] = value
    if "configuration_files" in found.get("config.json", {}):
        raise FedSieveError(
            f"model {source!r}: its config.json names others for other versions of transformers "
            "(configuration_files), and config.json alone is read: take the line out"
        )
    return found


_MARKS = {codecs.BOM_UTF8: "of UTF-8"}
_MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "of UTF-16 or UTF-32")


def _mark(path: Path) -> str | None:
    """The byte order mark with which a file begins, in words."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(codecs.BOM_UTF8))
    except OSError:
        return None  # whoever reads it says it
    return next((words for mark, words in _MARKS.items() if begin.startswith(mark)), None)


# Read before anything can be compared with weights; and what in them counts parts, each of which a
# library makes, or notes, as it reads the number.
_READ_FIRST = (
    *("config.json", "tokenizer_config.json", "preprocessor_config.json"),
    "processor_config.json",
)
_TOKENS = "special_tokens_map.json"
WORDS = ("tokenizer_config.json", _TOKENS)
_TABLES = (*_READ_FIRST, _TOKENS, "added_tokens.json", "generation_config.json", _INDEX)
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_COUNTS = re.compile(
    "layer|block|depth|head|expert|stage|types|extra|branch|group|level|label|special_tokens",
    re.IGNORECASE,
)
_PARTS = 10_000  # at most, of anything but classes


def _refuse_endless(source: str, name: str, table: Mapping[str, Any]) -> None:
    """Raises FedSieveError for a number of parts, at any depth, that no model has."""
    waiting: list[tuple[str, Any]] = list(table.items())
    while waiting:
        key, value = waiting.pop()
        if key.endswith("special_tokens") and isinstance(value, Mapping | list):
            value = len(value)  # each is compared with all that were read before
        elif isinstance(value, Mapping):
            if key not in ("id2label", "label2id"):  # whose keys are names of classes
                waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
            value = sum(each for each in value if type(each) is int)
        most = _CLASSES if "label" in key.lower() else _PARTS
        if type(value) is int and value > most and _COUNTS.search(key):
            raise FedSieveError(
                f"model {source!r}: its {name} has {key[:80]} {quoted(value)}: at most {most:,} "
                "are read"
            )


def _refuse_odd_classes(source: str, config: Mapping[str, Any]) -> None:
    """transformers makes a name for each of `num_labels` as it reads them."""
    number, names = config.get("num_labels"), config.get("id2label")
    if isinstance(number, int) and not 0 <= number <= _CLASSES:
        raise FedSieveError(
            f"model {source!r}: its config.json has num_labels {quoted(number)}: 0 to {_CLASSES} "
            "are read"
        )
    if isinstance(names, Mapping) and not all(isinstance(name, str) for name in names.values()):
        raise FedSieveError(
            f"model {source!r}: its config.json has an id2label with a name that is no text"
        )


def _shards(index: Mapping[str, Any]) -> Iterable[str]:
    shards = index.get("weight_map")
    return map(str, shards.values()) if isinstance(shards, Mapping) else ()


def table_of(path: Path) -> Mapping[str, Any]:
    """What a file of a model's folder says; nothing where it is none, or holds no table. Of a
    stranger's folder `_tables` says that before.
    """
    try:
        value = _json(path, _LARGEST_INDEX)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}


def _json(path: Path, most: int) -> Any:
    return json.loads(bytes_of(path, most).decode("utf-8"))
