"""What makes a model's inputs of rows: its tokenizer, or its image processor.

Image processors are taken in their form for Pillow: that for torchvision rounds otherwise, and one
recipe must mean the same pixels on every machine.
"""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
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
        return pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
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
