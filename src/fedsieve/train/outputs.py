"""What a model says to a batch, and no more of it than the task asks for.

A language model has an output for each of tens of thousands of words at each position, and a prompt
or padding asks for none of them: of SmolLM2-135M the head is a fifth of the work and most of the
memory of a step. So the head is given the positions that have a label alone. What comes after it
(a scale, a cap) sees rows of positions as before.

Whether a model takes that is tried once, in `head_of`. One that does not gives all its outputs, and
those asked for are taken from them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedsieve.errors import FedSieveError, of_memory
from fedsieve.settings import Task
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.tokens import IGNORED, Texts
from fedsieve.train.batch import half_type, inputs, laid_out, moved
from fedsieve.train.seeded import seeded
from fedsieve.train.trial import CPU, made_up, same


def outputs(
    model: Any, task: Task, batch: Examples, device: torch.device, *, head: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """The model's outputs in float32 and their labels, on the device: as `Task.losses` takes them.

    head: what `head_of` found
    """
    picked = catalogue.load(task).picked
    if picked is None or not isinstance(batch, Texts):
        given = inputs(model, batch, device)
        labels = given.pop("labels")
        return logits_of(model, given).float(), labels
    texts = laid_out(model, batch)
    # Found where the examples are: a device would have to be waited for.
    at, labels = picked(texts.pop("labels"))
    given = {name: moved(value, device) for name, value in texts.items()}
    return places(model, given, moved(at, device), head), moved(labels, device)


def places(
    model: Any, given: dict[str, Tensor], at: Tensor, head: nn.Module | None = None
) -> Tensor:
    """The outputs at some places, (n, ...), in float32.

    at: (n,) int64, numbers of tokens, row after row
    """
    if head is None:
        return logits_of(model, given).flatten(0, 1).index_select(0, at).float()
    hook = head.register_forward_pre_hook(
        lambda _, states: (states[0].flatten(0, 1).index_select(0, at)[None], *states[1:])
    )
    try:
        return logits_of(model, given)[0].float()
    finally:
        hook.remove()


def logits_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    """What the model says, in its own type.

    Raises FedSieveError for whatever its own code raises, lack of a device's memory apart, and
    where it answers in another form: its configuration may ask for anything.
    """
    try:
        found: Tensor = model(**given).logits
    except Exception as error:
        if of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise FedSieveError(
            f"the model cannot be run over a batch ({type(error).__name__}: {first}): see its "
            "configuration, and model.settings, which changes it"
        ) from error
    return found


def head_of(model: Any, task: Task) -> nn.Module | None:
    """The module of a language model that may be given the places with labels alone; None where
    there is none, or where the outputs are others then.

    model: on the CPU, or without numbers: then it is not tried
    """
    if catalogue.load(task).picked is None:
        return None
    head: nn.Module | None = model.get_output_embeddings()
    if head is None or next(model.parameters()).device.type == "meta":
        return head
    rows = made_up(model, task)
    rows.labels[0, ::2] = IGNORED
    half = half_type(model)
    try:
        with (
            seeded(0),
            torch.no_grad(),
            torch.autocast("cpu", half, enabled=half is not None),
        ):
            plain, _ = outputs(model, task, rows, CPU)
            fewer, _ = outputs(model, task, rows, CPU, head=head)
    except Exception:  # whatever a model's own code may raise: it is run as it is then
        return None
    return head if fewer.shape == plain.shape and same(model, plain, fewer) else None
