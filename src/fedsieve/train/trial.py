"""What every base model must keep to, tried on a few made-up tokens when it is loaded.

Some models let padding leak into the other tokens, some see later tokens, some compute another loss
than the task's. Their configurations do not say so, and a run over them ends with numbers that
depend on which rows shared a batch. So it is tried: a handful of forward passes over two short
rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsieve.errors import FedSieveError, raise_of_memory
from fedsieve.settings import Task
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples, take
from fedsieve.tasks.images import Images
from fedsieve.tasks.task import Task as Asks
from fedsieve.tasks.tokens import Texts, by_token
from fedsieve.train.batch import half_type, inputs
from fedsieve.train.lengths import USUAL, image_size, longest, position_tables, vocabulary
from fedsieve.train.mode import to_training
from fedsieve.train.quantise import row_by_row
from fedsieve.train.seeded import seeded

CPU = torch.device("cpu")
_MASKED = 1e-5  # of the largest output, by which a token that is masked may move any
_GIVEN = {"texts": "token numbers alone", "images": "images alone"}


def settle(model: PreTrainedModel, task: Task, pad: int | None) -> None:
    """Choose the padding token, and try what every model must keep to.

    pad: the tokenizer's, taken unless the model has no embedding for it, counts positions from its
        own (RoBERTa), or keeps rows apart with its own only. Set in the model's configuration.
    Raises FedSieveError if a row's outputs depend on the rows beside it, a causal model's on later
    tokens, the model's loss is not the task's, or the model does not run.
    """
    with row_by_row(model):
        _settle(model, task, pad)


def _settle(model: PreTrainedModel, task: Task, pad: int | None) -> None:
    kind = model.config.model_type
    try:
        if catalogue.load(task).reads == "images":
            if not _apart(model, task):
                raise FedSieveError(
                    f"the outputs of a {kind} model for one image depend on the others beside it: "
                    "choose another model"
                )
        else:
            _choose_padding(model, task, pad)
        if catalogue.load(task).peft == "CAUSAL_LM" and not _causal(model, task):
            raise FedSieveError(
                f"this {kind} model sees the tokens that it is to predict: choose a causal one, "
                "or, if it was trained as a decoder, set is_decoder = true in [model.settings]"
            )
        if not _has_the_tasks_loss(model, task) or _routed(model, task):
            raise FedSieveError(
                f"the loss of a {kind} model is not that of its task "
                f"({catalogue.load(task).title}): {_another(model)}"
            )
    except FedSieveError as error:
        if (said := _not_finite(model, task)) is not None:
            raise FedSieveError(said) from error
        raise
    except Exception as error:  # whatever a model's own code may raise
        raise_of_memory(error)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        half = half_type(model)
        raise FedSieveError(
            f"a {kind} model cannot be trained on {_GIVEN[catalogue.load(task).reads]}: {first}"
            + (f" (in {half}: model.dtype = 'float32' may do)" if half else "")
        ) from error


def _not_finite(model: PreTrainedModel, task: Task) -> str | None:
    """That a model's weights or outputs are no finite numbers, which are like nothing, themselves
    included; None where they are.
    """
    kind = model.config.model_type
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            return (
                f"the weights {name} of this {kind} model hold numbers that are not finite: they "
                "are damaged, or were trained so: take another copy, or another model"
            )
    try:
        finite = bool(_run(model, made_up(model, task)).logits.isfinite().all())
    except Exception as error:  # what was wrong before is told then
        raise_of_memory(error)
        return None
    if finite:
        return None
    return (
        f"the outputs of this {kind} model are not finite: its weights are too large, or its "
        "configuration is not theirs"
    )


def run_with_pairs(model: Any, task: Task, pairs: Mapping[str, Any]) -> None:
    """One forward pass of PEFT's model, on the CPU.

    pairs: PEFT's layers, by name
    Raises FedSieveError, naming the layer if it gives anything but one tensor, where the model does
    not run.
    """
    odd: list[str] = []

    def look(name: str) -> Any:
        return lambda _, __, out: None if isinstance(out, Tensor) else odd.append(name)

    hooks = [
        layer.get_base_layer().register_forward_hook(look(name)) for name, layer in pairs.items()
    ]
    try:
        _run(model, made_up(model, task))
    except Exception as error:  # whatever a model's own code may raise
        raise_of_memory(error)
        if odd:
            raise FedSieveError(
                f"lora.targets takes in {odd[0]}, a layer that gives more than one tensor (a "
                "router of experts does), and takes no pair: name layers of attention"
            ) from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FedSieveError(
            f"the model does not run with LoRA on its layers: {first} (choose other lora.targets, "
            "or train its head or all of it: methods 'head' and 'full')"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _choose_padding(model: PreTrainedModel, task: Task, pad: int | None) -> None:
    trouble: Exception = FedSieveError(
        f"the outputs of a {model.config.model_type} model for one row depend on how far the row "
        "is padded, so its results would depend on which rows share a batch: choose another model"
    )
    for token in _candidates(model, pad):
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = token
        try:
            # Padded with the end of sequence, rows that end so may be told apart, and others not.
            is_end = token == _special(model.config.get_text_config(), "eos")
            if _apart(model, task) and (not is_end or _apart(model, task, ended=False)):
                return
        except Exception as error:  # BART's kin count ends, and padding must not be one
            raise_of_memory(error)
            trouble = error
    raise trouble


def _candidates(model: PreTrainedModel, pad: int | None) -> list[int]:
    """The tokens that could be padding, the best first: those that the model has embeddings for."""
    config = model.config.get_text_config()
    own, end = _special(config, "pad"), _special(config, "eos")
    counted = any(table.padding_idx is not None for table in position_tables(model))
    order = [own, pad] if counted else [pad, own]
    most = vocabulary(model)
    return [
        token
        for token in dict.fromkeys([*order, end, 0])
        if isinstance(token, int) and token >= 0 and (most is None or token < most)
    ]


def _apart(model: PreTrainedModel, task: Task, *, ended: bool = True) -> bool:
    """Whether a row's outputs are the same alone and beside a longer one.

    ended: as in `made_up`
    """
    both = made_up(model, task, ended=ended)
    if isinstance(both, Images):
        first = take(both, torch.tensor([0]))
        return same(model, _run(model, first).logits, _run(model, both).logits[:1])
    short = int(both.attention_mask[0].sum())
    alone = both._replace(
        input_ids=both.input_ids[:1, :short],
        attention_mask=both.attention_mask[:1, :short],
        labels=both.labels[:1, :short] if by_token(both.labels) else both.labels[:1],
    )
    together = _run(model, both).logits[:1]
    if by_token(both.labels):
        together = together[:, :short]
    return same(model, _run(model, alone).logits, together)


def _causal(model: PreTrainedModel, task: Task) -> bool:
    """Whether another last token leaves what was predicted before it as it was.

    Both times all has one shape, and what is masked counts for nothing, so less may differ than
    between batches: a model that was never trained attends to all tokens nearly alike.
    """
    rows = made_up(model, task)
    assert isinstance(rows, Texts)
    ids = rows.input_ids.clone()
    ids[1, -1] = ids[1][ids[1] != ids[1, -1]][0]
    before = _run(model, rows).logits[1, :-1].float()
    after = _run(model, rows._replace(input_ids=ids)).logits[1, :-1].float()
    return bool((before - after).abs().max() <= _MASKED * before.abs().max())


def _has_the_tasks_loss(model: PreTrainedModel, task: Task) -> bool:
    """Whether the loss, while training, is what its own outputs make it."""
    rows = made_up(model, task)
    to_training(model)
    out = _run(model, rows)
    model.eval()
    asked = catalogue.load(task)
    logits, labels = out.logits.float(), rows.labels
    if asked.picked is not None:
        at, labels = asked.picked(labels)
        logits = logits.flatten(0, 1)[at]
    told = asked.losses(logits, labels).sum() / asked.counts(rows.labels)
    return same(model, out.loss, told.to(out.loss.dtype))


def _routed(model: PreTrainedModel, task: Task) -> bool:
    """Whether the loss of a language model has one of its routers in it, too small to be seen."""
    asked = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(asked) and catalogue.load(task).peft == "CAUSAL_LM"


def _another(model: PreTrainedModel) -> str:
    """What to do about a loss that is not the task's."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return (
            "it adds one of its router of experts: set output_router_logits = false in "
            "[model.settings]"
        )
    return "choose another model"


def _run(model: PreTrainedModel, rows: Examples) -> Any:
    # Not inference mode: what a model keeps from its first pass must be fit for training.
    # A base in half precision runs under autocast alone, as in local.py.
    half = half_type(model)
    with (
        seeded(0),
        torch.no_grad(),
        torch.autocast("cpu", half, enabled=half is not None),
    ):
        return model(**inputs(model, rows, CPU))


def made_up(model: PreTrainedModel, task: Task, *, ended: bool = True) -> Examples:
    """Two rows: images of noise, or texts of 9 and of 15 tokens where there are positions for so
    many.

    Odd numbers: some kinds take rows of certain lengths only.

    No special token is among them but, where they are ended, the end of sequence, at which some
    classifiers look.
    """
    asked = catalogue.load(task)
    if asked.reads == "images":
        return _two_images(model, asked)
    config = model.config.get_text_config()
    kinds = ("pad", "bos", "eos", "sep", "cls", "decoder_start")
    special = {_special(config, kind) for kind in kinds}
    words = [token for token in range(min(vocabulary(model) or 200, 200)) if token not in special]
    most = min(longest(model) or 15, 15)
    length = max(1, min(9, most - 1))
    numbers = 3 + 5 * torch.arange(most) + 2 * torch.arange(2)[:, None]
    ids = torch.tensor(words)[numbers % len(words)]
    end = _special(config, "eos")
    if ended and end is not None:
        ids[0, length - 1] = ids[1, -1] = end
    mask = torch.ones_like(ids)
    mask[0, length:] = 0
    return Texts(ids, mask, asked.labels(ids, mask, model.config.num_labels))


def _two_images(model: PreTrainedModel, asked: Asks) -> Images:
    high, wide = image_size(model.config) or USUAL
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, high, wide), generator=noise, dtype=torch.uint8)
    labels = asked.labels(pixels, pixels, model.config.num_labels)
    return Images(pixels, labels, (-1.0,) * 3, (1.0,) * 3)


def same(model: nn.Module, one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding does."""
    # In half precision the rounding itself depends on a batch's shape.
    tolerance = 2e-3 if half_type(model) is None else 0.1
    scale = one.abs().max().float()
    return bool((one.float() - other.float()).abs().max() <= tolerance * scale)


def _special(config: Any, kind: str) -> Any:
    token = getattr(config, f"{kind}_token_id", None)
    return token[0] if isinstance(token, list) and token else token
