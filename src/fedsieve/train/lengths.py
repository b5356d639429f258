"""What rows a model can take: how many tokens they may have, and which.

Told from the model itself: its table of positions, or what its configuration says where there is no
table. Checked before a run, because an index out of a table is a traceback on a CPU, and on a GPU
the end of the process.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedsieve.errors import FedSieveError
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import Texts

if TYPE_CHECKING:
    from fedsieve.train.model import ResidentModel


# What transformers has these write is not what they tell row by row: their positions count from the
# padding's number, and those of a text that is gone on with from 0; RWKV's state takes in padding.
_MUTE = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm"),
    *("camembert", "xmod", "data2vec-text", "rwkv"),
)
USUAL = (224, 224)  # pixels, of models that do not say what they take


def check_rows(resident: "ResidentModel", *sets: Examples | None) -> None:
    """Raises FedSieveError where rows are longer than the model's positions, or hold a token that
    it has no embedding for."""
    for examples in sets:
        if isinstance(examples, Images):
            _check_size(resident, examples)
        elif examples is not None and examples.input_ids.numel():
            check_length(resident, examples)
            _check_vocabulary(resident, examples)
            _check_room(resident, examples)


def check_length(resident: "ResidentModel", examples: Texts) -> None:
    """Raises FedSieveError if the texts are longer than the model has positions for."""
    length, most = examples.input_ids.shape[1], longest(resident.model)
    if most is not None and length > most:
        raise FedSieveError(
            f"data.max_length: texts of {length} tokens do not fit the model's {most} positions"
        )


def longest(model: nn.Module) -> int | None:
    """How many tokens a row may have; None where positions are relative and without a limit."""
    config: Any = model.config
    config = config.get_text_config()
    said = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    # -1 is XLNet's way to say that there is no limit.
    limits = [value for value in said if isinstance(value, int) and value > 0]
    tables = position_tables(model)
    if not tables and getattr(config, "relative_attention", False):
        return None
    for table in tables:
        # RoBERTa and its kin count from behind the padding token's own number, BART's from 2.
        first = getattr(table, "offset", 0)
        if table.padding_idx is not None:
            first = int(table.padding_idx) + 1
        limits.append(table.weight.shape[0] - first)
    return min(limits, default=None)


def image_size(config: Any) -> tuple[int, int] | None:
    """Height and width of the images that a model is made for, where its configuration says so."""
    size = getattr(config, "image_size", None)
    if size is None:  # CLIP's kin say it of their eyes alone
        size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if size is None:
        return None
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    return int(high), int(wide)


def position_tables(model: nn.Module) -> list[Any]:
    """The modules that hold one learned or computed vector for each position."""
    found: list[Any] = []
    for name, module in model.named_modules():
        called = "position" in name or name.endswith("wpe")
        if called and "relative" not in name and hasattr(module, "padding_idx"):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2:
                found.append(module)
    return found


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens have an embedding; None where the model does not say."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _check_vocabulary(resident: "ResidentModel", examples: Texts) -> None:
    rows = vocabulary(resident.model)
    # Padding is not counted: what is filled in there is the model's own (batch.py).
    largest = int((examples.input_ids * examples.attention_mask).max())
    for each in examples.asked or ():
        largest = max(largest, *(int(ids.max()) for ids in (each.prompt, *each.options)))
    if rows is not None and largest >= rows:
        raise FedSieveError(
            f"the texts have token {largest}, and the model has embeddings for {rows} tokens: the "
            "tokenizer is another model's, or tokens were added to it for which the model was "
            "never resized (save it after model.resize_token_embeddings)"
        )


def _check_room(resident: "ResidentModel", examples: Texts) -> None:
    """That the model can write, and has positions for what it writes after the longest prompt."""
    asked, room = examples.asked or (), longest(resident.model)
    kind = resident.model.config.model_type
    if asked and kind in _MUTE:
        raise FedSieveError(
            f"a {kind} model cannot be asked for texts: what transformers has it write is not what "
            "it tells: choose another model"
        )
    most = max((len(each.prompt) for each in asked), default=0)
    written = max((each.most for each in asked), default=0)
    if room is not None and most + written > room:
        raise FedSieveError(
            f"data.new_tokens: prompts of {most} tokens and {written} written after them do not "
            f"fit the model's {room} positions: lower it, or data.max_length"
        )


def _check_size(resident: "ResidentModel", examples: Images) -> None:
    """That images are as large as a model has positions for their patches, where it has any."""
    wanted = image_size(resident.model.config)
    found = tuple(examples.pixels.shape[2:])
    patches = any("position_embedding" in name for name, _ in resident.model.named_parameters())
    if wanted is not None and patches and found != wanted:
        raise FedSieveError(
            f"the model's image processor makes images of {found[0]} x {found[1]} pixels, and the "
            f"model takes {wanted[0]} x {wanted[1]}: mend `size` in its preprocessor_config.json"
        )
