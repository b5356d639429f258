"""What training takes of a client's memory, worked out over tensors without numbers.

The model is made of shapes alone, in torch's fake tensors: those run the very operations that the
client's CPU would, autograd and autocast included, and hold nothing. While a step runs forward and
backward, every storage is counted from when it is made until it is freed. So what is kept for the
backward pass, the gradients that come as it goes, and what is only there between two operations
are all in the peak, and there is no formula a model.

What an operation allocates for itself while it runs (a library's scratch) is not seen.
"""

import copy
import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from fedsieve import methods
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.costs import dry_run
from fedsieve.costs.dry_run import Part
from fedsieve.costs.table import moments, rehearsals
from fedsieve.errors import FedSieveError, nearest
from fedsieve.recipe.experiment import locate
from fedsieve.recipe.method import build_method
from fedsieve.recipe.schema import Recipe
from fedsieve.settings import Training
from fedsieve.tasks import catalogue
from fedsieve.train.batch import half_type
from fedsieve.train.changes import refuse_quantised
from fedsieve.train.dropout import speed_up
from fedsieve.train.lengths import longest
from fedsieve.train.local import runs_in_bf16
from fedsieve.train.mode import to_training
from fedsieve.train.model import ResidentModel, set_up, shape_of
from fedsieve.train.outputs import places
from fedsieve.train.quantise import form_in
from fedsieve.train.step import checkpointed

_META = torch.device("meta")
Quantised = Literal["none", "int8", "nf4"]
PATCH = 16 * 16  # pixels of an image that make a token
DTYPES = ("float32", "bfloat16", "float16")
MEGA = 10**6
PARTS = ("base", "trained", "gradients", "optimizer", "activations", "own", "peak")
_FLOAT = 4  # bytes
_BLOCK, _BLOCKS = 64, 256  # of bitsandbytes: weights that share a scale, scales that share one


class Base(NamedTuple):
    """How the frozen weights are held.

    dtype:     of those that are not quantised, and in which the others multiply
    quantised: the linear layers of the body, as bitsandbytes holds them; double: their scales too
    """

    dtype: torch.dtype = torch.float32
    quantised: Quantised = "none"
    double: bool = False


class Step(NamedTuple):
    """Bytes that a step's forward and backward passes take beside the weights.

    kept: at the end of the forward pass: what is kept for the backward pass, and the outputs
    peak: at most, gradients of what is trained included
    counted: or else by a formula, for a model that does not run without numbers
    """

    kept: int
    peak: int
    counted: bool = True


class Needs(NamedTuple):
    """What a client needs to train, in bytes.

    base:        frozen weights, as they are held, and buffers
    trained:     of the adapter or the weights that are trained, in float32
    gradients, optimizer: of what of it moves; with the latter what FedProx keeps of its start
    activations: of a step: what is kept for the backward pass, and the outputs
    own:         what the method has a client hold beside: the adapter at the start and as it came,
                 the message, and what is kept between rounds
    peak:        of a step that is not the first. Gradients come as activations go, so it may be
                 less than the sum; what is only there between two operations makes it more
    counted:     whether activations were counted, or follow from a formula
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    own: int
    peak: int
    counted: bool = True


def of_model(
    source: str,
    rank: int,
    targets: tuple[str, ...] | str | None,
    classes: int,
    budget: Budget,
    training: Training,
    length: int,
    held: Base,
    only: Collection[str] | None = None,
) -> list[tuple[str, Needs | str]]:
    """What each method needs of a client, or why that is not known.

    source, targets, classes: as in `costs.table.of_model`
    training: its batches are full, of rows of `length` tokens
    only:     these methods; None is all
    Raises FedSieveError for a model, targets or a rank that do not fit.
    """
    found: list[tuple[str, Needs | str]] = []
    own = form_in(locate(source))
    if own is not None and held.quantised == "none":
        if own not in get_args(Quantised):
            raise FedSieveError(f"model {source!r} is quantised as {own}, whose size is not known")
        held = held._replace(quantised=cast(Quantised, own))
    for name, got in _first(rehearsals(source, rank, targets, classes, budget, 1, only)):
        try:
            if held.quantised != "none":
                refuse_quantised(source, held.quantised, methods.load(name)(), name)
        except FedSieveError as error:
            got = str(error).partition(":")[0]
        found.append(
            (name, got if isinstance(got, str) else of_client(*got, training, length, held))
        )
    return found


def of_recipe(recipe: Recipe, budgets: Iterable[Budget], length: int) -> dict[Budget, Needs]:
    """What clients of each budget need by a recipe, whose `data.classes` must be filled in.

    length: tokens of a row; of an image, its pixels by `PATCH`
    """
    model, method = recipe.model, build_method(recipe)
    classes = len(recipe.data.classes or ())
    base = shape_of(locate(model.source), model.task, classes, model.settings)
    resident = set_up(base, model.task, recipe.lora, method.trains, key=Key(0), device=_META)
    held = Base(getattr(torch, model.dtype), model.quantization, model.double_quantization)
    found = {}
    for budget in budgets:
        *_, last = dry_run.rounds(method, resident.layout, [Client("0", 1, budget)])
        found[budget] = of_client(resident, last.parts[0], recipe.training, length, held)
    return found


def rows_of(
    source: str,
    rank: int,
    targets: tuple[str, ...] | str | None,
    classes: int,
    budget: tuple[float, float, float],
    training: Training,
    *,
    length: int,
    dtype: str,
    quantization: str,
    only: str | None = None,
) -> list[dict[str, str]]:
    """`of_model` in words, a row a method, in MB; only: methods with commas between them.

    Raises FedSieveError, naming the option, for a type or a method that there is not.
    """
    for option, given, known in (
        ("dtype", dtype, DTYPES),
        ("quantization", quantization, get_args(Quantised)),
    ):
        if given not in known:
            raise FedSieveError(f"--{option} {given!r}: it must be one of {', '.join(known)}")
    asked = None if only is None else [name.strip() for name in only.split(",")]
    for name in asked or ():
        if name not in methods.names():
            raise FedSieveError(
                f"--only: there is no method {name!r}{nearest(name, methods.names())}"
            )
    held = Base(getattr(torch, dtype), cast(Quantised, quantization))
    found = of_model(source, rank, targets, classes, Budget(*budget), training, length, held, asked)
    return [
        {"method": name}
        | (
            dict.fromkeys(PARTS, "-") | {"peak": got}
            if isinstance(got, str)
            else {
                part: f"{'' if got.counted else '~'}{getattr(got, part) / MEGA:,.1f}"
                for part in PARTS
            }
        )
        for name, got in found
    ]


def _first(
    found: Iterable[tuple[str, tuple[ResidentModel, list[Part]] | str]],
) -> Iterator[tuple[str, tuple[ResidentModel, Part] | str]]:
    for name, got in found:
        yield name, got if isinstance(got, str) else (got[0], got[1][0])


def of_client(
    resident: ResidentModel, part: Part, training: Training, length: int, held: Base
) -> Needs:
    """What a client needs for its part in a round. resident: of shapes alone."""
    room = longest(resident.model)
    if room is not None and length > room:
        raise FedSieveError(f"--length {length}: the model has {room} positions")
    view = part.view
    adapter, moves = view.adapter.tensors, view.moves.names
    gradients = _FLOAT * sum(adapter[name].numel() for name in moves)
    trained = _FLOAT * sum(tensor.numel() for tensor in adapter.values())
    optimizer = gradients * moments(training)
    # AdamW takes the roots of all second moments at once; SGD's weight decay copies gradients.
    passing = gradients if training.optimizer == "adamw" or training.weight_decay else 0
    base, unpacked = base_bytes(resident, held)
    shapes = {name: tensor.shape for name, tensor in adapter.items()}
    step = of_step(resident, training, training.batch, length, shapes, moves, held.dtype)
    trees = (part.start.tensors, adapter, view.adapter.base, *part.memory.values())
    kept = [part.got.values.data, part.got.values.scales, *part.got.support.masks.values()]
    kept += [*view.moves.masks.values(), *(t for tree in trees for t in tree.values())]
    own = len(part.down) + _in(kept)
    peak = base + trained + optimizer + own + max(step.peak + unpacked, gradients + passing)
    return Needs(base, trained, gradients, optimizer, step.kept, own, peak, step.counted)


def base_bytes(resident: ResidentModel, held: Base) -> tuple[int, int]:
    """Bytes of all that is frozen, and of the largest weight that is unpacked to multiply."""
    model: Any = resident.model
    ours = {id(parameter) for _, parameter in resident.parameters()}
    inside = model.base_model.model if isinstance(model, PeftModel) else model
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    body = {id(p) for p in inside.base_model.parameters()} - embedded  # an output may be tied
    packed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        and held.quantised != "none"
        and id(module.weight) in body
    }
    factors = set[int]()  # which cores are trained between: in float32, as these are
    if resident.pairs is not None:
        factors = {id(parameter) for _, parameter in resident.pairs.parameters()}
    total, largest = 0, 0
    for parameter in model.parameters():
        if id(parameter) in ours:
            continue
        if id(parameter) in factors:
            total += parameter.nbytes
            continue
        if id(parameter) in packed:
            total += packed_bytes(parameter.shape, held)
            largest = max(largest, parameter.numel() * held.dtype.itemsize)
        else:
            own = held.dtype if parameter.is_floating_point() else parameter.dtype
            total += parameter.numel() * own.itemsize
    return total + sum(buffer.nbytes for buffer in model.buffers()), largest


def packed_bytes(shape: torch.Size, held: Base) -> int:
    """Of one weight in bitsandbytes' form: int8 has a float32 scale a row, nf4 one for 64 weights;
    doubly quantised, a byte for each of these, and a float32 for 256 of them and for their mean.
    """
    numbers = math.prod(shape)
    if held.quantised == "int8":
        return numbers + _FLOAT * shape[0]
    scales = -(-numbers // _BLOCK)
    codes = _FLOAT * 16  # the values that the numbers stand for
    if held.double:
        return (
            -(-numbers // 2) + codes + scales + _FLOAT * (-(-scales // _BLOCKS) + 1) + _FLOAT * 256
        )
    return -(-numbers // 2) + codes + _FLOAT * scales


def of_step(
    resident: ResidentModel,
    training: Training,
    rows: int,
    length: int,
    shapes: Mapping[str, torch.Size] | None = None,
    moves: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """What a step over so many rows of so many tokens takes on the CPU, beside the weights.

    resident: of shapes alone; it is left as it is
    shapes: of the adapter that a client trains, and moves: which of it do; None is the whole
    dtype: of the frozen weights
    """
    piece = min(rows, training.micro_batch or rows)
    made = _Counted()
    try:
        with _of_fakes(resident, shapes, moves, dtype) as (model, head):
            half = half_type(model)
            bf16 = half is not None or runs_in_bf16(torch.device("cpu"), training.precision)
            to_training(model)
            kept = 0
            with made, checkpointed(model, training.checkpointing):
                # A second piece finds the gradients of the first.
                for _ in range(1 if piece == rows else 2):
                    with torch.autocast("cpu", half or torch.bfloat16, enabled=bf16):
                        loss = _loss(model, head, resident, piece, length)
                    kept = max(kept, made.now)
                    loss.backward()
                    del loss
    except Exception:  # whatever a model's own code may raise where there are no numbers
        kept = by_formula(resident.model, piece, length)
        if training.checkpointing:
            kept //= 8
        return Step(kept, kept + _FLOAT * resident.layout.size, counted=False)
    return Step(kept, made.peak)


def of_evaluation(resident: ResidentModel, rows: int, length: int) -> int:
    """What one batch of an evaluation takes on the CPU beside the weights. resident: as above."""
    made = _Counted()
    try:
        with _of_fakes(resident, None, (), torch.float32) as (model, head), torch.no_grad():
            model.eval()
            with made:
                _loss(model, head, resident, rows, length)
    except Exception:  # as above
        return by_formula(resident.model, rows, length)
    return made.peak


def by_formula(model: Any, rows: int, length: int) -> int:
    """Korthikanti et al. 2022 (arXiv 2205.05198), equation 2, in float32, and the logits; or, for a
    model that is none of layers of one width, what all its weights give, twice.
    """
    text = model.config.get_text_config()
    try:
        each = 34 * text.hidden_size + 5 * text.num_attention_heads * length
        layers = 2 * text.num_hidden_layers * each + 2 * _FLOAT * text.vocab_size
    except (AttributeError, TypeError):
        layers = 2 * _FLOAT * sum(p.shape[0] for p in model.parameters() if p.ndim > 1)
    return int(rows * length * layers)


class _Counted(TorchDispatchMode):
    """Counts the storages that operations make while it is on, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._there: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _place(tensor) not in self._there | given:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        self._there.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._there.discard(place)
        self.now -= size


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _of_fakes(
    resident: ResidentModel,
    shapes: Mapping[str, torch.Size] | None,
    moves: Collection[str] | None,
    dtype: torch.dtype,
) -> Iterator[tuple[Any, Any]]:
    """A twin of the model as it is while a client trains on the CPU, and its head (outputs.py), in
    fake tensors.
    """
    between = {} if resident.pairs is None else resident.pairs.slots
    model, slots, head, between = copy.deepcopy(
        (resident.model, resident.slots, resident.head, between)
    )
    names = {id(getattr(*place)): name for name, place in slots.items()}
    factors = {id(getattr(*place)) for place in between.values()}
    speed_up(model)
    with FakeTensorMode():
        made: dict[int, nn.Parameter] = {}
        for parameter in model.parameters():
            name, shape, kind = names.get(id(parameter)), parameter.shape, parameter.dtype
            if name is not None:
                shape, kind = (shapes or resident.layout.shapes)[name], torch.float32
            elif parameter.is_floating_point() and id(parameter) not in factors:
                kind = dtype
            moving = name is not None and (moves is None or name in moves)
            made[id(parameter)] = nn.Parameter(torch.empty(*shape, dtype=kind), moving)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield model, head


def _loss(model: Any, head: Any, resident: ResidentModel, rows: int, length: int) -> Tensor:
    """Of made-up examples, every token of which has a label where tokens have one."""
    task, given = catalogue.load(resident.task), _batch(resident, rows, length)
    labels = given.pop("labels")
    if task.picked is None:
        return task.losses(model(**given).logits.float(), labels).sum()
    # What `picked` would find: how much that is cannot be asked of tensors without numbers.
    at = (length * torch.arange(rows)[:, None] + torch.arange(length - 1)).flatten()
    return task.losses(places(model, given, at, head), labels[:, 1:].flatten()).sum()


def _batch(resident: ResidentModel, rows: int, length: int) -> dict[str, Tensor]:
    """Made-up examples, full of tokens."""
    ids = torch.ones(rows, length, dtype=torch.int64)
    task = catalogue.load(resident.task)
    labels = task.labels(ids, ids, resident.model.config.num_labels)
    if task.reads == "images":
        side = math.isqrt(length * PATCH)
        return {"pixel_values": torch.ones(rows, 3, side, side), "labels": labels}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _in(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, each storage once."""
    return sum({_place(t): t.untyped_storage().nbytes() for t in tensors}.values())
