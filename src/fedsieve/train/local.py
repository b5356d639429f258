"""One client's local training, and the evaluation of an adapter.

The client's adapter is put into the resident model, a fresh optimizer takes its steps, and the
tensors are read out again. The order of examples and the dropout come from the client's key, so a
client trains the same in whatever order clients run.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.keys import Key, generator, word
from fedsieve.algebra.method import View
from fedsieve.errors import FedSieveError
from fedsieve.settings import Precision, Task, Training
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples, count, take
from fedsieve.tasks.images import Images, crops_and_flips
from fedsieve.tasks.packing import packed
from fedsieve.tasks.tally import SHOWN, Answer, Score, Tally, score, total
from fedsieve.tasks.tokens import Texts
from fedsieve.train.batch import half_type
from fedsieve.train.mode import to_training
from fedsieve.train.model import ResidentModel
from fedsieve.train.outputs import outputs
from fedsieve.train.proximal import hold
from fedsieve.train.seeded import seeded
from fedsieve.train.speaker import speaker
from fedsieve.train.step import backward, checkpointed

_TOGETHER = 64  # counts of batches that are held before they are added up
_AMONG = 16  # batches among whose rows those of like length are found
_LOOK = 16  # steps after which losses are looked at: a GPU has to be through with all of them


class Fit(NamedTuple):
    """What local training gives back.

    tensors: the trained adapter, on the CPU
    loss:    mean over the steps; not finite if training broke off since a loss was not
    compute: seconds inside forward, backward and optimizer step
    memory:  bytes of what training allocates beside the base model and its activations: the
             adapter, its gradients, the optimizer's state, and of FedProx what it began as
    told:    whether there is a loss: a function of the user's own (by_function.py) may have none,
             and it is NaN then
    """

    tensors: Tree
    loss: float
    steps: int
    compute: float
    memory: int = 0
    told: bool = True


def check_packing(training: Training, task: Task) -> None:
    """Raises FedSieveError where texts are to be joined and the task learns no texts to go on."""
    if training.packing and catalogue.load(task).peft != "CAUSAL_LM":
        raise FedSieveError(f"training.packing: it is for language models, and the task is {task}")


def fit(
    resident: ResidentModel, view: View, examples: Examples, training: Training, key: Key
) -> Fit:
    """Train a client's adapter on its examples. The adapter's own tensors are left as they are.

    What the view does not let move stays to the bit, whatever the optimizer: such tensors take no
    gradient; such entries take a gradient of zero, which counts for nothing in `training.clip`, and
    are set back after each step, as weight decay moves what has no gradient too.
    """
    resident.put(view.adapter)
    model = resident.model
    to_training(model)
    everything = dict(resident.parameters())
    parameters, held = [], []
    for name, parameter in everything.items():
        parameter.requires_grad_(name in view.moves.names)
        if name in view.moves.names:
            parameters.append(parameter)
        if name in view.moves.masks:
            mask = view.moves.masks[name].to(resident.device)
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
            own = view.adapter.tensors[name].to(resident.device, torch.float32)  # as it was put
            held.append((parameter, mask, own))
    optimizer = optimizer_of(parameters, training)
    began = [p.detach().clone() for p in parameters] if training.proximal else []
    step = partial(
        backward,
        model,
        resident.task,
        device=resident.device,
        head=resident.head,
        rows=training.micro_batch,
        precise=precision_of(resident, training.precision),
        penalty=None if view.penalty is None else partial(view.penalty, everything),
    )
    losses: list[Tensor] = []
    compute, memory = 0.0, 0
    with (
        torch.enable_grad(),  # whatever a method or a callback of the user's has left behind
        seeded(word(key.at("dropout")), resident.device),
        checkpointed(model, training.checkpointing),
    ):
        for some in batches_of(learned(examples, training), training, key):
            start = time.perf_counter()
            losses.append(step(some))
            if began:
                losses[-1] += hold(training.proximal, parameters, began)[0]
            if training.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, training.clip)
            optimizer.step()
            for parameter, mask, own in held:
                parameter.data = torch.where(mask, parameter.data, own)
            memory = memory or allocated([*everything.values(), *began], optimizer)
            optimizer.zero_grad(set_to_none=True)
            diverged = len(losses) % _LOOK == 0 and not losses[-1].isfinite()
            compute += time.perf_counter() - start
            if diverged:
                break
        start = time.perf_counter()
        told = _read(losses)  # waits for the device
        compute += time.perf_counter() - start
    tensors = {name: p.detach().cpu() for name, p in resident.parameters()}
    return Fit(tensors, sum(told) / max(1, len(told)), len(told), compute, memory)


def _read(losses: list[Tensor]) -> list[float]:
    """The losses up to the first that is not finite."""
    told: list[float] = torch.stack(losses).tolist() if losses else []
    odd = next((n for n, loss in enumerate(told) if not math.isfinite(loss)), len(told))
    return told[: odd + 1]


def evaluate(
    resident: ResidentModel,
    adapter: Adapter,
    examples: Examples,
    *,
    batch: int = 64,
    precision: Precision = "auto",
    lead: str | None = None,
) -> Score:
    """How well an adapter does its model's task, dropout off. lead: as in `tally.score`."""
    task = catalogue.load(resident.task)
    counts = tally(resident, adapter, examples, batch=batch, precision=precision)
    return score(task, counts, resident.classes, lead)


def tally(
    resident: ResidentModel,
    adapter: Adapter,
    examples: Examples,
    *,
    batch: int = 64,
    precision: Precision = "auto",
) -> Tally:
    """What `evaluate` counts."""
    task, classes = catalogue.load(resident.task), resident.classes
    resident.put(adapter)
    resident.model.eval()
    counts: list[Tally] = []
    with torch.inference_mode(), precision_of(resident, precision):
        if task.ask is not None:
            assert not isinstance(examples, Images)
            return task.ask(examples.asked or (), speaker(resident, batch))
        for some, logits, labels in _outputs(resident, examples, batch):
            counted = task.judge(logits, labels, classes)
            if task.told is not None and not counts:
                first = task.told(logits[:SHOWN], labels[:SHOWN], classes)
                answers = zip(_said(resident, some), first, strict=False)
                counted = counted._replace(answers=tuple(Answer(a, *b) for a, b in answers))
            counts.append(counted)
            if len(counts) == _TOGETHER:  # each has a number for each class
                counts = [total(counts)]
    return total(counts)


def told(
    resident: ResidentModel,
    adapter: Adapter,
    examples: Examples,
    *,
    batch: int = 64,
    precision: Precision = "auto",
) -> list[str]:
    """What the model tells of each example, in words, dropout off; labels count for nothing.

    Raises FedSieveError for a task that tells nothing row by row.
    """
    task, classes = catalogue.load(resident.task), resident.classes
    resident.put(adapter)
    resident.model.eval()
    found: list[str] = []
    with torch.inference_mode(), precision_of(resident, precision):
        if task.ask is not None:
            assert not isinstance(examples, Images)
            asked, speaks = examples.asked or (), speaker(resident, batch)
            for first in range(0, len(asked), SHOWN):  # of so many the answers are kept
                counted = task.ask(asked[first : first + SHOWN], speaks)
                found += [answer.told for answer in counted.answers]
            return found
        if task.told is None:
            raise FedSieveError(f"a {resident.task} task tells nothing of single rows")
        for _, logits, labels in _outputs(resident, examples, batch):
            found += [said for _, said in task.told(logits, labels, classes)]
    return found


def _outputs(
    resident: ResidentModel, examples: Examples, batch: int
) -> Iterator[tuple[Examples, Tensor, Tensor]]:
    """The examples a batch at a time, in their order, with what the model says and their labels."""
    for index in torch.arange(count(examples)).split(batch):
        some = take(examples, index)
        given = (resident.model, resident.task, some, resident.device)
        yield some, *outputs(*given, head=resident.head)


def _said(resident: ResidentModel, examples: Examples) -> list[str]:
    """The first few rows in words, as the model has them."""
    tokenizer: Any = resident.tokenizer
    if isinstance(examples, Images):
        return [""] * min(SHOWN, count(examples))
    rows = zip(examples.input_ids[:SHOWN], examples.attention_mask[:SHOWN], strict=True)
    if tokenizer is None:
        return [""] * min(SHOWN, len(examples.input_ids))
    return [tokenizer.decode(ids[mask == 1], skip_special_tokens=True) for ids, mask in rows]


def runs_in_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether autocast to bfloat16 is used on this device."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # The CPU counts only where it multiplies bfloat16 itself; elsewhere autocast is slower.
    checks = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return device.type == "cpu" and any(bool(check()) for check in checks)


def precision_of(resident: ResidentModel, precision: Precision) -> Any:
    half = half_type(resident.model)
    if half is not None or runs_in_bf16(resident.device, precision):
        return torch.autocast(resident.device.type, dtype=half or torch.bfloat16)
    return nullcontext()


def optimizer_of(parameters: list[Tensor], training: Training) -> torch.optim.Optimizer:
    # One kernel for all tensors; on the CPU torch's fused one is no faster, and rounds otherwise.
    how: Any = {"fused": True} if parameters[0].is_cuda else {"foreach": True}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=training.lr, weight_decay=training.weight_decay, **how
        )
    return torch.optim.SGD(
        parameters,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        **how,
    )


def allocated(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and optimizer state, after a step."""
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    for state in optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors)


def learned(examples: Examples, training: Training) -> Examples:
    """A client's examples as they are gone through: joined, where `training.packing` says so."""
    return packed(examples) if training.packing and isinstance(examples, Texts) else examples


def batches_of(examples: Examples, training: Training, key: Key) -> Iterator[Examples]:
    """The batches of a client's training, in the order and with the changes that its key draws."""
    moves = generator(key.at("augment"))
    lengths = None
    if training.by_length and isinstance(examples, Texts):
        lengths = examples.attention_mask.sum(1)
    for index in _order(count(examples), training, generator(key.at("order")), lengths):
        some = take(examples, index)
        if isinstance(some, Images) and training.augment != "none":
            crop = training.augment == "crop-flip"
            some = some._replace(pixels=crops_and_flips(some.pixels, moves, crop=crop))
        yield some


def _order(
    rows: int, training: Training, draws: torch.Generator, lengths: Tensor | None = None
) -> Iterator[Tensor]:
    """The rows of each batch: passes over fresh shuffles; one batch of a pass may be small.

    lengths: (rows,), where rows that are as long are to share batches
    """
    once = -(-rows // training.batch)
    passes = training.epochs if training.steps is None else -(-training.steps // once)
    batches = (
        batch
        for _ in range(passes)
        for batch in _pass(torch.randperm(rows, generator=draws), training.batch, draws, lengths)
    )
    return islice(batches, training.steps)


def _pass(
    shuffled: Tensor, batch: int, draws: torch.Generator, lengths: Tensor | None
) -> list[Tensor]:
    """The batches of one pass over the rows."""
    if lengths is None:
        return list(shuffled.split(batch))
    # Sorted among some batches' rows only: who meets whom changes from pass to pass.
    some = shuffled.split(batch * _AMONG)
    batches = [b for part in some for b in part[lengths[part].argsort(stable=True)].split(batch)]
    return [batches[n] for n in torch.randperm(len(batches), generator=draws).tolist()]
