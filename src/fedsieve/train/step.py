"""The gradients of one batch, in less memory where that is asked.

`training.micro_batch` runs a batch in pieces of so many rows and adds their gradients up, each of
a sum over what the whole batch's mean is over (`Task.counts`): rows, or tokens that have a label.
So the gradient is the whole batch's, and the loss that is told.

`training.checkpointing` keeps of each layer what goes into it, and makes the rest again in the
backward pass. torch sets its generators back for that, so dropout draws the same masks twice; ours
(dropout.py) draws from the same generator.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedsieve.errors import FedSieveError, raise_of_memory
from fedsieve.settings import Task, Training
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples, count, take
from fedsieve.train.batch import half_type, inputs
from fedsieve.train.mode import to_training
from fedsieve.train.outputs import outputs
from fedsieve.train.seeded import seeded
from fedsieve.train.trial import made_up, same


def backward(
    model: Any,
    task: Task,
    batch: Examples,
    device: torch.device,
    *,
    head: nn.Module | None = None,
    rows: int | None = None,
    precise: AbstractContextManager[Any],
    penalty: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Add the gradients of a batch's loss to the model's parameters.

    head: as in `outputs`
    rows: of a piece (`training.micro_batch`); None is all at once
    penalty: what is added to the batch's loss, once
    Returns the loss, on the device: who reads it waits for all that was asked of the device before.
    Where it is not finite, what was added is of no use.
    """
    asked = catalogue.load(task)
    parts = pieces(batch, rows)
    counts = [asked.counts(part.labels) for part in parts]
    whole = sum(counts)
    total = torch.zeros((), device=device)
    for part, own in zip(parts, counts, strict=True):
        if own == 0 and whole:
            continue  # it adds nothing
        with precise:
            loss = asked.losses(*outputs(model, task, part, device, head=head)).sum() / whole
        if penalty is not None:
            loss, penalty = loss + penalty(), None
        total += loss.detach()
        loss.backward()
    return total


def pieces(batch: Examples, rows: int | None) -> list[Examples]:
    """A batch in parts of so many rows, the last of what is left, each as narrow as it can be."""
    if rows is None or rows >= count(batch):
        return [batch]
    return [take(batch, index) for index in torch.arange(count(batch)).split(rows)]


@contextmanager
def checkpointed(model: nn.Module, on: bool) -> Iterator[None]:
    """While training: the model's layers keep their inputs alone, if `on`.

    Raises FedSieveError for a model that has no such layers.
    """
    if not on:
        yield
        return
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.supports_gradient_checkpointing:
        raise FedSieveError(_cannot(base, "transformers cannot do it in them"))
    config = base.config.get_text_config()
    cached = getattr(config, "use_cache", None)
    config.use_cache = False  # a layer that runs twice would fill a cache twice
    # Not the reentrant kind: that has no gradients where a layer's inputs have none, and the
    # embeddings below the first pair are frozen.
    how = {"use_reentrant": False}
    # transformers is to drop the older name with 6, and has the newer only of late.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    disable = getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)
    try:
        enable(how)
        yield
    finally:
        disable()
        if cached is None:
            del config.use_cache
        else:
            config.use_cache = cached


def check_step(model: nn.Module, task: Task, training: Training) -> None:
    """Raises FedSieveError where the model's batches cannot be run in pieces, or its layers twice.

    model: with what is trained in it, and nothing on the meta device
    """
    if not training.checkpointing:
        return
    plain = _tried(model, task, on=False)
    try:
        again = _tried(model, task, on=True)
    except FedSieveError:
        raise
    except Exception as error:  # whatever torch and a model's own code may raise
        raise_of_memory(error)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FedSieveError(_cannot(model, f"its layers do not run twice ({first})")) from error
    if not all(same(model, one, other) for one, other in zip(plain, again, strict=True)):
        raise FedSieveError(_cannot(model, "its gradients are others with it"))


def _tried(model: Any, task: Task, *, on: bool) -> list[Tensor]:
    """Gradients of all that is trained, dropout on, over a few made-up rows."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    half = half_type(model)
    was = model.training
    to_training(model)
    try:
        with seeded(0, device), checkpointed(model, on):
            with torch.autocast(device.type, half, enabled=half is not None):
                loss = model(**inputs(model, made_up(model, task), device)).loss
            found = torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        model.train(was)
    return [p.new_zeros(()) if g is None else g for p, g in zip(trained, found, strict=True)]


def _cannot(model: Any, why: str) -> str:
    kind = model.config.model_type
    return (
        f"training.checkpointing: models of kind {kind} cannot be trained with it: {why}; "
        f"leave it out, and lower training.micro_batch"
    )
