"""What makes a model's inputs of rows: its tokenizer, or its image processor.

Image processors are taken in their form for Pillow: that for torchvision rounds otherwise, and one
recipe must mean the same pixels on every machine.
"""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import IMAGE_PROCESSOR_NAME

from fedsieve.disk import of_the_disk
from fedsieve.errors import FedSieveError, quoted, raise_of_memory, with_type
from fedsieve.settings import Task
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Reader
from fedsieve.tasks.tokens import ensure_pad_token
from fedsieve.train.lengths import USUAL, image_size
from fedsieve.train.model import pretrained
from fedsieve.train.origin import file_of
from fedsieve.train.source import WORDS, refuse_words_elsewhere, table_of

_MOST_GROWTH = 1000
_MOST_TOKENS = 10_000_000  # the largest vocabularies have a tenth of it
_PLAIN = re.compile(r"[\w-]{1,64}", re.ASCII)  # the name of a chat template


def load_reader(
    name: str, task: Task, *, trust_remote_code: bool = False
) -> tuple[Reader, str | None]:
    """The tokenizer, with a padding token, or image processor of a hub model or a local folder; and
    a sentence for the user, where something had to be filled in.

    trust_remote_code: see `load_base`. Raises FedSieveError if there is none.
    """
    if catalogue.load(task).reads == "images":
        processor, filled = _image_processor(name, trust_remote_code)
        _rehearse(name, processor)
        return processor, filled
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return tokenizer, ensure_pad_token(tokenizer)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub model or a local folder. trust_remote_code: see `load_base`."""
    try:
        tokenizer = pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
        # Of the hub nothing is known before.
        for file in WORDS:
            if (said := file_of(name, None, file)) is not None:
                refuse_words_elsewhere(name, file, table_of(said))
        if not isinstance(tokenizer.model_max_length, int | float):  # of a file that was edited
            tokenizer.model_max_length = VERY_LARGE_INTEGER  # how much is read, a recipe says
        _refuse_far_tokens(name, tokenizer)
        _refuse_odd_templates(name, tokenizer)
        _refuse_growth(name, tokenizer)
        _rehearse(name, tokenizer)
        return tokenizer
    except FedSieveError as error:
        if "backend tokenizer" in str(error):
            raise FedSieveError(
                f"model {name!r} comes without a tokenizer: choose one that reads texts, or "
                "another model.task"
            ) from error
        raise


def _refuse_far_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises FedSieveError for a number of a token that none has: as it is saved, a note is made of
    each number up to the highest that no word has.
    """
    word, number = max(tokenizer.get_vocab().items(), key=lambda each: each[1], default=("", 0))
    if number > _MOST_TOKENS:
        raise FedSieveError(
            f"model {name!r}: its tokenizer gives {quoted(word)} the number {number}: numbers up "
            f"to {_MOST_TOKENS:,} are read"
        )


def _refuse_odd_templates(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises FedSieveError for chat templates that are no texts, or whose names are no plain ones:
    transformers writes each into a file of its name, the oldest that is taken here also "../x".
    """
    given = getattr(tokenizer, "chat_template", None)
    for called, template in given.items() if isinstance(given, Mapping) else [("default", given)]:
        if not isinstance(called, str) or not _PLAIN.fullmatch(called):
            raise FedSieveError(
                f"model {name!r}: its tokenizer has a chat template of the name {quoted(called)}: "
                "letters, digits, - and _ are needed, for it becomes a file's"
            )
        if template is not None and not isinstance(template, str):
            raise FedSieveError(
                f"model {name!r}: its tokenizer has a chat template that is no text "
                f"({quoted(template)})"
            )


def _refuse_growth(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises FedSieveError where the steps of its tokenizer.json make of one letter more than any
    text has room for: rule after rule multiplies, and memory ends before a token is counted.
    """
    steps = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        step = getattr(steps, part, None)
        if step is not None and _growth(json.loads(step.__getstate__())) > _MOST_GROWTH:
            raise FedSieveError(
                f"model {name!r}: the {part} of its tokenizer.json may make a text more than "
                f"{_MOST_GROWTH:,} times as long"
            )


def _growth(step: Any) -> int:
    """Into how many letters a step of tokenizers may turn one."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, Mapping):
        return 1
    said = (step.get("content"), step.get("prepend"))
    own = max((len(text) for text in said if isinstance(text, str)), default=1)
    inner = (each for each in step.values() if isinstance(each, list))
    return max(1, own) * math.prod(map(_growth, inner))


def _rehearse(name: str, reader: Reader) -> None:
    """Raises FedSieveError for what loads and cannot be saved again: it goes beside the adapter,
    and nobody wants to learn after all rounds that it does not.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            reader.save_pretrained(scratch)
        except Exception as error:  # whatever odd values in its files raise when they are written
            raise_of_memory(error)
            if (found := of_the_disk(error)) is not None:
                found.filename = found.filename or scratch
                raise found from None
            raise FedSieveError(
                f"model {name!r}: its tokenizer or image processor cannot be saved, as it is "
                f"beside an adapter: {with_type(error, 200)}"
            ) from error


def _image_processor(name: str, trust_remote_code: bool) -> tuple[Reader, str | None]:
    folder = Path(name)
    if not folder.is_dir() or (folder / IMAGE_PROCESSOR_NAME).is_file():
        given = {"backend": "pil", "trust_remote_code": trust_remote_code}
        return pretrained(AutoImageProcessor, name, **given), None
    config = pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
    high, wide = image_size(config) or USUAL
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    return kind(size={"height": high, "width": wide}), (
        f"The model comes without an image processor: images are made {high} x {wide} pixels, and "
        "0.5 is taken as their mean and deviation."
    )


# Of an image processor's settings, what no pixel depends on; and what its name may end in.
_NO_PIXELS = (
    "processor_class", "image_processor_type", "feature_extractor_type", "auto_map",
    "transformers_version", "return_tensors", "data_format", "input_data_format", "device",
    "disable_grouping",
)  # fmt: skip
_COMPUTING = ("Fast", "Pil")  # with torchvision, with Pillow
_OF_A_CALL = ("truncation", "padding")  # which the last call of a tokenizer left in it


def reader_parts(reader: Reader) -> dict[str, str]:
    """A digest of each part of a tokenizer, or of all of an image processor."""
    if not isinstance(reader, PreTrainedTokenizerBase):
        return {"pixels": reader_digest(reader)}
    words = sorted(reader.get_vocab().items(), key=lambda each: (each[1], each[0]))
    parts: dict[str, object] = {
        "vocabulary": words,
        "special_tokens": reader.special_tokens_map,
        "chat_template": getattr(reader, "chat_template", None),
    }
    if (backend := getattr(reader, "backend_tokenizer", None)) is not None:
        steps = json.loads(backend.to_str())
        if isinstance(steps.get("model", {}).get("vocab"), dict):  # it is told of already
            del steps["model"]["vocab"]
        parts["steps"] = {key: value for key, value in steps.items() if key not in _OF_A_CALL}
    else:
        parts["steps"] = _of_python(reader)
    return {part: _digest(said) for part, said in parts.items()}


def _of_python(tokenizer: PreTrainedTokenizerBase) -> object:
    """The steps of a tokenizer that is written in Python: its files, flags and numbers."""
    given = tokenizer.init_kwargs.items()
    flags = {key: value for key, value in given if isinstance(value, bool | int | float)}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_vocabulary(scratch, filename_prefix=None)  # some have no default
        files = {path.name: path.read_bytes().hex() for path in Path(scratch).iterdir()}
    return [type(tokenizer).__name__, flags, files]


def reader_digest(reader: Reader) -> str:
    """Of what makes of a row what a model sees: a tokenizer's vocabulary, special tokens and chat
    template, or the steps of an image processor. Two ends that differ in it learn different things.
    """
    if isinstance(reader, PreTrainedTokenizerBase):
        words = sorted(reader.get_vocab().items(), key=lambda each: (each[1], each[0]))
        said: object = [words, reader.special_tokens_map, getattr(reader, "chat_template", None)]
    else:
        told = reader.to_dict().items()
        kind = type(reader).__name__
        for suffix in _COMPUTING:
            kind = kind.removesuffix(suffix)
        said = [kind, {key: v for key, v in told if v is not None and key not in _NO_PIXELS}]
    return _digest(said)


def _digest(said: object) -> str:
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
