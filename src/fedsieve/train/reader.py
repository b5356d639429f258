"""What makes a model's inputs of rows: its tokenizer, or its image processor.

Image processors are taken in their form for Pillow: that for torchvision rounds otherwise, and one
recipe must mean the same pixels on every machine.
"""

import hashlib
import json
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import IMAGE_PROCESSOR_NAME

from fedsieve.errors import FedSieveError
from fedsieve.settings import Task
from fedsieve.tasks import catalogue
from fedsieve.tasks.task import Reader
from fedsieve.tasks.tokens import ensure_pad_token
from fedsieve.train.lengths import USUAL, image_size
from fedsieve.train.model import pretrained


def load_reader(
    name: str, task: Task, *, trust_remote_code: bool = False
) -> tuple[Reader, str | None]:
    """The tokenizer, with a padding token, or image processor of a hub model or a local folder; and
    a sentence for the user, where something had to be filled in.

    trust_remote_code: see `load_base`. Raises FedSieveError if there is none.
    """
    if catalogue.load(task).reads == "images":
        return _image_processor(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return tokenizer, ensure_pad_token(tokenizer)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub model or a local folder. trust_remote_code: see `load_base`."""
    try:
        tokenizer = pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
        if not isinstance(tokenizer.model_max_length, int | float):  # of a file that was edited
            tokenizer.model_max_length = VERY_LARGE_INTEGER  # how much is read, a recipe says
        return tokenizer
    except FedSieveError as error:
        if "backend tokenizer" in str(error):
            raise FedSieveError(
                f"model {name!r} comes without a tokenizer: choose one that reads texts, or "
                "another model.task"
            ) from error
        raise


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


_PIXELS = (
    "do_resize", "size", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "resample",
)  # fmt: skip


def reader_digest(reader: Reader) -> str:
    """Of what makes of a row what a model sees: a tokenizer's vocabulary, special tokens and chat
    template, or the steps of an image processor. Two ends that differ in it learn different things.
    """
    if isinstance(reader, PreTrainedTokenizerBase):
        words = sorted(reader.get_vocab().items(), key=lambda each: (each[1], each[0]))
        said: object = [words, reader.special_tokens_map, getattr(reader, "chat_template", None)]
    else:
        told = reader.to_dict()
        said = {name: told.get(name) for name in _PIXELS}
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
