"""Several clients of a round trained at once: what `local.fit` does, for all of them in one forward
and backward pass.

A small batch of one client leaves most of a processor idle, and the frozen layers are the same for
all. So the clients' batches are laid one after another, each filled up to the longest row and the
largest batch among them, and the model runs once, with each client's own adapter where it is
trained (stacked.py). Losses, clipping, masks and the optimizer's state stay each client's own: all
of these act on single entries, or on sums over one client's.

With dropout off the result is that of one client after another, but for rounding. With dropout on
it follows from the recipe's seed, and is another than theirs, since masks are drawn for all rows at
once. A client that has fewer batches leaves when it is through.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fedsieve.algebra.adapter import Adapter, Tree
from fedsieve.algebra.keys import Key, word
from fedsieve.algebra.method import View
from fedsieve.errors import FedSieveError, raise_of_memory
from fedsieve.settings import Training, steps_of
from fedsieve.tasks import catalogue
from fedsieve.tasks.examples import Examples, count, take
from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import IGNORED, Texts, by_token
from fedsieve.train.batch import moved
from fedsieve.train.local import Fit, batches_of, learned, optimizer_of, precision_of
from fedsieve.train.mode import to_training
from fedsieve.train.model import ResidentModel
from fedsieve.train.outputs import outputs
from fedsieve.train.proximal import hold
from fedsieve.train.seeded import seeded
from fedsieve.train.stacked import obstacle, stack_of, stacked, unstacked
from fedsieve.train.step import backward, checkpointed
from fedsieve.train.trial import made_up, same


class Work(NamedTuple):
    """What a client is to train. key: of its round"""

    view: View
    examples: Examples
    key: Key


def fit_together(resident: ResidentModel, works: Sequence[Work], training: Training) -> list[Fit]:
    """Train clients at once, as far as they can be: those whose base weights are the same, and of
    whose adapters the same tensors move. The fits are in the order of the works.

    Of a fit, `compute` is the client's share of what all took, by steps, and `loss` is not finite
    if it was not at some step; nobody else's training breaks off then. The model is one of which
    `check_together` does not complain.
    """
    works = [each._replace(examples=learned(each.examples, training)) for each in works]
    fits: dict[int, Fit] = {}
    while left := [n for n in range(len(works)) if n not in fits]:
        first = works[left[0]].view
        group = [n for n in left if _alike(first, works[n].view)]
        # Who has most steps comes first: those who are through are the last of the stack.
        group.sort(key=lambda n: -steps_of(count(works[n].examples), training))
        fits |= zip(group, _fit(resident, [works[n] for n in group], training), strict=True)
    return [fits[n] for n in range(len(works))]


def _alike(one: View, other: View) -> bool:
    mine, theirs = one.adapter.base, other.adapter.base
    return (
        one.moves.names == other.moves.names
        and mine.keys() == theirs.keys()
        and all(t is theirs[n] or torch.equal(t, theirs[n]) for n, t in mine.items())
    )


class _Stack(NamedTuple):
    """The adapters of the clients that still train, (c, ...) each, and how they are trained.

    moving: the names of those that are
    still:  of tensors in which single entries stay: (where entries move, what all began as)
    began:  what those that move began as, for FedProx; empty where nothing asks for it
    scales: (c), of each client's pairs
    """

    tensors: dict[str, nn.Parameter]
    moving: tuple[str, ...]
    still: dict[str, tuple[Tensor, Tensor]]
    began: tuple[Tensor, ...]
    scales: Tensor
    optimizer: torch.optim.Optimizer

    @property
    def trained(self) -> list[Tensor]:
        return [self.tensors[name] for name in self.moving]


def _fit(resident: ResidentModel, works: list[Work], training: Training) -> list[Fit]:
    """Fits of clients that are alike, of whom none has more steps than the one before."""
    views = [each.view for each in works]
    resident.put(views[0].adapter)  # its change of the base is everybody's
    to_training(resident.model)
    steps = [steps_of(count(each.examples), training) for each in works]
    batches = [batches_of(each.examples, training, each.key) for each in works]
    stack = _side_by_side(resident, views, training)
    head = _head(resident)
    losses: list[Tensor] = []
    trained: dict[int, Tree] = {}
    memory: list[int] = []
    done, began = 0, time.perf_counter()
    with (
        torch.enable_grad(),  # whatever a method or a callback of the user's has left behind
        seeded(word(works[0].key.at("dropout")), resident.device),
        checkpointed(resident.model, training.checkpointing),
    ):
        for last in sorted(set(steps)):
            there = sum(each >= last for each in steps)
            if done:
                stack = _first(stack, there, training)
            with stacked(resident, stack.tensors, stack.scales):
                for _ in range(done, last):
                    now = [next(own) for own in batches[:there]]
                    losses.append(_step(resident, stack, now, views, head, training))
                    memory = memory or _memory(stack, views)
                    stack.optimizer.zero_grad(set_to_none=True)
            for client in range(steps.index(last), there):
                own = unstacked(stack.tensors, client, views[client].adapter)
                trained[client] = {name: t.detach().clone().cpu() for name, t in own.items()}
            done = last
        told = [each.tolist() for each in losses]  # waits for the device
    share = (time.perf_counter() - began) / sum(steps)
    means = [sum(row[client] for row in told[:own]) / own for client, own in enumerate(steps)]
    return [
        Fit(trained[client], means[client], own, share * own, memory[client])
        for client, own in enumerate(steps)
    ]


def _side_by_side(resident: ResidentModel, views: list[View], training: Training) -> _Stack:
    adapters = [view.adapter for view in views]
    values = stack_of(adapters, resident.device)
    still = {}
    for name in sorted({name for view in views for name in view.moves.masks}):
        moves = torch.zeros_like(values[name], dtype=torch.bool)  # what fills up stays, too
        for own, view in zip(moves, views, strict=True):
            mask = view.moves.masks.get(name, torch.tensor(True))
            own[tuple(slice(n) for n in view.adapter.layout.shapes[name])] = mask.to(own.device)
        still[name] = moves, values[name].clone()
    scales = torch.tensor([adapter.layout.scale for adapter in adapters], device=resident.device)
    names = views[0].moves.names
    began = tuple(values[name].clone() for name in names) if training.proximal else ()
    return _stack(values, names, still, began, scales, training)


def _stack(
    values: Mapping[str, Tensor],
    moving: Sequence[str],
    still: dict[str, tuple[Tensor, Tensor]],
    began: tuple[Tensor, ...],
    scales: Tensor,
    training: Training,
) -> _Stack:
    tensors = {name: nn.Parameter(t, requires_grad=name in moving) for name, t in values.items()}
    optimizer = optimizer_of([tensors[name] for name in moving], training)
    return _Stack(tensors, tuple(moving), still, began, scales, optimizer)


def _first(stack: _Stack, there: int, training: Training) -> _Stack:
    """The first clients of a stack, with their optimizer as it stands."""
    values = {name: t.detach()[:there].clone() for name, t in stack.tensors.items()}
    still = {name: (moves[:there], own[:there]) for name, (moves, own) in stack.still.items()}
    began = tuple(own[:there] for own in stack.began)
    fewer = _stack(values, stack.moving, still, began, stack.scales[:there], training)
    for one, other in zip(stack.trained, fewer.trained, strict=True):
        fewer.optimizer.state[other] = {
            key: value[:there].clone() if value.shape == one.shape else value
            for key, value in stack.optimizer.state[one].items()
            if isinstance(value, Tensor)
        }
    return fewer


def _step(
    resident: ResidentModel,
    stack: _Stack,
    batches: list[Examples],
    views: list[View],
    head: nn.Module | None,
    training: Training,
) -> Tensor:
    """A step of each client on its own batch, by a model with the stack in it. Returns their
    losses, (c,), on the device, and leaves the gradients.
    """
    counts = [catalogue.load(resident.task).counts(batch.labels) for batch in batches]
    most = max(count(batch) for batch in batches)
    rows = min(most, training.micro_batch or most)
    total = torch.zeros(len(batches), device=resident.device)
    for first in range(0, most, rows):
        with precision_of(resident, training.precision):
            losses = _losses(resident, batches, counts, range(first, first + rows), head)
        if first == 0:
            losses = losses + _penalties(stack, views[: len(batches)])
        total += losses.detach()
        losses.sum().backward()
    if stack.began:
        total += hold(training.proximal, stack.trained, stack.began, len(batches))
    for name, (moves, _) in stack.still.items():
        gradient = stack.tensors[name].grad
        if gradient is not None:
            gradient.mul_(moves)
    if training.clip is not None:
        _clip([t.grad for t in stack.trained if t.grad is not None], training.clip)
    stack.optimizer.step()
    for name, (moves, own) in stack.still.items():
        stack.tensors[name].data = torch.where(moves, stack.tensors[name].data, own)
    return total


def _losses(
    resident: ResidentModel,
    batches: Sequence[Examples],
    counts: Sequence[int],
    rows: range,
    head: nn.Module | None,
) -> Tensor:
    """The share of these rows of each client's batch in its loss, (c,), on the device.

    counts: over what each batch's mean is. One over nothing is no number, and nobody else's matter
    head:   as in `outputs`
    """
    task = catalogue.load(resident.task)
    given = [len(range(count(batch))[rows.start : rows.stop]) for batch in batches]
    parts = [_rows(batch, rows, max(given)) for batch in batches]
    whole = _beside(parts)
    each = task.losses(*outputs(resident.model, resident.task, whole, resident.device, head=head))
    if task.picked is not None:
        sums = [own.sum() for own in each.split([task.counts(part.labels) for part in parts])]
    else:  # as many of each row; those that only fill up come last
        own = each.view(len(parts), max(given), -1)
        sums = [losses[:n].sum() for losses, n in zip(own, given, strict=True)]
    means = torch.tensor([1 / n if n else math.nan for n in counts])
    return torch.stack(sums) * moved(means, resident.device)


def _rows(batch: Examples, rows: range, most: int) -> Examples:
    """These rows of a batch, and then its first one, without labels for its tokens, until there are
    so many.
    """
    index = torch.arange(count(batch))[rows.start : rows.stop]
    part = take(batch, torch.cat([index, index.new_zeros(most - len(index))]))
    if isinstance(part, Texts) and by_token(part.labels):
        part.labels[len(index) :] = IGNORED
    return part


def _beside(parts: Sequence[Examples]) -> Examples:
    """All of these, one after another; of texts, as wide as the widest."""
    first = parts[0]
    labels = [part.labels for part in parts]
    if isinstance(first, Images):
        pixels = torch.cat([part.pixels for part in parts if isinstance(part, Images)])
        return first._replace(pixels=pixels, labels=torch.cat(labels))
    texts = [part for part in parts if isinstance(part, Texts)]
    width = max(part.input_ids.shape[1] for part in texts)

    def wide(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
        return torch.cat([pad(t, (0, width - t.shape[1]), value=fill) for t in tensors])

    types = [part.token_type_ids for part in texts]
    return Texts(
        wide([part.input_ids for part in texts]),
        wide([part.attention_mask for part in texts]),
        wide(labels, IGNORED) if by_token(first.labels) else torch.cat(labels),
        None if types[0] is None else wide([t for t in types if t is not None]),
    )


def _head(resident: ResidentModel) -> nn.Module | None:
    """A language model's head, unless something in it is trained: it would be given another number
    of places of each client.
    """
    inside = set() if resident.head is None else {id(each) for each in resident.head.modules()}
    trained = {id(module) for module, _ in resident.slots.values()}
    return None if inside & trained else resident.head


def _penalties(stack: _Stack, views: Sequence[View]) -> Tensor:
    """What each client adds to its loss, (c,)."""
    own = [
        torch.zeros((), device=stack.scales.device)
        if view.penalty is None
        else view.penalty(unstacked(stack.tensors, client, view.adapter))
        for client, view in enumerate(views)
    ]
    return torch.stack(own)


def _clip(gradients: Sequence[Tensor], most: float) -> None:
    """Each client's gradient, over all of its tensors, to a norm of at most so much."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    shares = (most / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(shares.view(-1, *[1] * (gradient.ndim - 1)))


def _memory(stack: _Stack, views: Sequence[View]) -> list[int]:
    """Bytes of each client's own adapter, gradients and optimizer state, as `Fit` has them."""
    each = []
    for view in views:
        total = 0
        for name, shape in view.adapter.layout.shapes.items():
            tensor = stack.tensors[name]
            state = stack.optimizer.state.get(tensor, {}).values()
            alike = sum(isinstance(t, Tensor) and t.shape == tensor.shape for t in state)
            others = sum(t.nbytes for t in state if isinstance(t, Tensor) and t.ndim == 0)
            near = bool(stack.began) and name in stack.moving
            copies = 1 + alike + (tensor.grad is not None) + near
            total += math.prod(shape) * tensor.element_size() * copies + others
        each.append(total)
    return each


def check_together(resident: ResidentModel) -> None:
    """Try it on two clients with two made-up rows. Raises FedSieveError where the model cannot
    train several at once: where what is trained is no linear layer, or one that does not see the
    rows in their order.

    resident: with an adapter of its layout in it, which is left as it is
    """
    what = obstacle(resident)
    if what is None:
        try:
            what = None if _agrees(resident) else "its clients' gradients are others then"
        except Exception as error:  # whatever a model's own code may raise
            raise_of_memory(error)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"it does not run so ({first})"
    if what is not None:
        kind = resident.model.config.model_type
        raise FedSieveError(
            f"engine.together: this {kind} model cannot train several clients at once: {what}; "
            "leave it out"
        )


def _agrees(resident: ResidentModel) -> bool:
    """Whether two clients' gradients at once are those of each by itself, dropout off."""
    layout = resident.layout
    draws = torch.Generator().manual_seed(0)
    before = resident.adapter()

    def near() -> Adapter:
        noise = {n: torch.randn(t.shape, generator=draws) for n, t in before.tensors.items()}
        return Adapter(layout, {n: t + 0.02 * noise[n] for n, t in before.tensors.items()})

    adapters = [near(), near()]
    rows = made_up(resident.model, resident.task)
    batches = [rows, take(rows, torch.tensor([1]))]
    counts = [catalogue.load(resident.task).counts(batch.labels) for batch in batches]
    stack = {n: nn.Parameter(t) for n, t in stack_of(adapters, resident.device).items()}
    scales = torch.full((2,), layout.scale, device=resident.device)
    resident.put(before)
    resident.model.eval()
    with stacked(resident, stack, scales), precision_of(resident, "fp32"):
        _losses(resident, batches, counts, range(2), _head(resident)).sum().backward()
    agree = True
    for client, (adapter, batch) in enumerate(zip(adapters, batches, strict=True)):
        resident.put(adapter)
        precise = precision_of(resident, "fp32")
        backward(resident.model, resident.task, batch, resident.device, precise=precise)
        for name, parameter in resident.parameters():
            got, own = stack[name].grad, parameter.grad
            if got is None or own is None:
                agree &= got is own
            else:
                agree &= same(resident.model, own, got[client])
    resident.put(before)
    return agree
