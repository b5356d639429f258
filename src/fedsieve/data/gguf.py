"""A model in llama.cpp's GGUF format as a folder of safetensors, which is what a run reads.

GGUF's weights are in blocks of four bits or so, each with a scale. transformers unpacks them into
ordinary tensors, and makes configuration, tokenizer and chat template of what the file says of
itself. Half precision holds what so few bits can say.
"""

import contextlib
import io
import shutil
from pathlib import Path

from fedsieve.console import quiet
from fedsieve.errors import FedSieveError, raise_of_memory, words

# What transformers calls a special token, and what the file does.
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def convert(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file, and its tokenizer, into a folder.

    Raises FedSieveError where the reader is not installed, or cannot read the file.
    """
    import torch
    import transformers

    try:
        import gguf  # transformers reads with it
    except ImportError:
        raise FedSieveError(
            "this model comes as GGUF, and what reads it is not installed: "
            "run `pip install 'fedsieve[gguf]'`"
        ) from None
    quiet()
    # Later versions of transformers leave the weights packed unless they are told not to.
    config = getattr(transformers, "GgufConfig", None)
    unpacked = {} if config is None else {"quantization_config": config(dequantize=True)}
    named = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **named, dtype=torch.float16, **unpacked
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**named)
        # By the file's own numbers: transformers 5.17 takes the first token of a text for the last.
        fields = gguf.GGUFReader(path).fields
        for ours, theirs in _SPECIAL.items():
            if number := fields.get(f"tokenizer.ggml.{theirs}_token_id"):
                token = tokenizer.convert_ids_to_tokens(int(number.contents()))
                setattr(tokenizer, f"{ours}_token", token)
        # Beside the folder first: what breaks off leaves no half of a model in it.
        scratch = folder.with_name(folder.name + "-gguf")
        model.save_pretrained(str(scratch))
        tokenizer.save_pretrained(str(scratch))
    except FedSieveError:
        raise
    except Exception as error:  # whatever its parsers raise
        raise_of_memory(error)
        raise FedSieveError(
            f"{path.name} cannot be read as a GGUF model: {words(error)}"
        ) from error
    for made in scratch.iterdir():
        made.rename(folder / made.name)
    shutil.rmtree(scratch)
