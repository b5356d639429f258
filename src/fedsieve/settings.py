"""The settings that a recipe names and that everything below it takes: plain records, checked.

Nothing here needs torch, so that a recipe can be read, and a mistake in it told, at once.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pydantic
from pydantic import Field
from pydantic_core import ArgsKwargs

from fedsieve.errors import FedSieveError, explain, quoted

_LONGEST = 2000  # letters of a regular expression
# What matches a{2,30} writes the repetitions out, and those within others as often.
_PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d*),?(\d*)\}|.", re.DOTALL)
_MOST_WRITTEN = 10_000
_NAME = re.compile(r"\w+(\.\w+)*")  # of a module
# Of names of modules; of lists of layers; and the letters of one.
_MOST_NAMES, _MOST_LISTS, _LONGEST_NAME = 2000, 20, 200

LARGEST = 2**63 - 1  # a whole number, here as in files (disk.LARGEST)
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(gt=0, le=1)]  # of a whole, and some of it
# What torch multiplies float32 by must be one itself, and so must a rate times a decay, and ten
# times a rate, which Adam's first step may take.
Rate = Annotated[float, Field(gt=0, le=1e32)]
Decay = Annotated[float, Field(ge=0, le=1e5)]
Task = str  # by its name (tasks/catalogue.py)
Precision = Literal["auto", "bf16", "fp32"]
Dtype = Literal["float32", "bfloat16", "float16"]  # of a base
Quantization = Literal["none", "nf4", "int8"]  # of a base's frozen weights
Kind = Literal["uniform", "poisson", "all"]  # of sampling
Source = Literal["seed", "system"]  # of noise
# The default of server.norm_bound. Honest clients that differ in density, labels and steps came to
# 16 times the median (benchmarks/norms.py); what would spoil a mean of ten is over it.
NORM_BOUND = 100.0
PAPER_RATIOS = (0.125, 0.25, 0.5, 0.75)  # FSLoRA's experiments


class Table(pydantic.BaseModel):
    """A table of a recipe, a study or a site: every key is known, every number finite, and none
    changes.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_flags_for_numbers(cls, given: Any) -> Any:
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        refuse_flags(kinds, given)
        return given


def refuse_flags(kinds: Mapping[str, Any], given: Any) -> None:
    """Raises ValueError, naming the key, for true or false where a number is needed: Python, and so
    pydantic, would take them for 1 and 0.

    kinds: of each key that there is, its type
    given: what is to become values of these types; checked only if it is a mapping
    """
    for name, value in given.items() if isinstance(given, Mapping) else ():
        leaves = _leaves(kinds[name]) if name in kinds else set()
        try:
            flagged = _holds_flag(value)
        except RecursionError:
            raise ValueError(f"{name} is nested too deeply") from None
        if flagged and leaves & {int, float} and not leaves & {bool, Any}:
            raise ValueError(f"{name} is {_as_written(value)}: a number is needed")
        for each in filter(pydantic.dataclasses.is_pydantic_dataclass, leaves):
            try:
                refuse_flags(get_type_hints(each), value)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None


def _holds_flag(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_flag, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_flag, value))
    return isinstance(value, bool)


def _as_written(value: Any) -> str:
    """As TOML has it, and not at any length."""
    return str(value).lower()[:80]


def _leaves(kind: Any) -> set[Any]:
    """The types that a type is made of: int and str of `tuple[int, ...] | str`."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return {type(value) for value in inner}
    if get_origin(kind) is Annotated:
        return _leaves(inner[0])
    return set().union(*map(_leaves, inner)) if inner else {kind}


def told(kind: Any) -> Any:
    """The same pydantic dataclass, whose errors are a FedSieveError where it is made in Python.

    As part of a recipe it is checked without its `__init__`, and its errors are the recipe's.
    """
    check, kinds = kind.__init__, get_type_hints(kind)

    @wraps(check)
    def init(self: Any, *given: Any, **named: Any) -> None:
        try:
            refuse_flags(kinds, dict(zip(kinds, given, strict=False)) | named)
        except ValueError as error:
            raise FedSieveError(f"{kind.__name__}: {error}") from None
        try:
            check(self, *given, **named)
        except pydantic.ValidationError as error:
            known = list(kind.__pydantic_fields__)
            said = [
                explain(each, [*map(str, each["loc"])], lambda _: known) for each in error.errors()
            ]
            raise FedSieveError(f"{kind.__name__}: {'; '.join(said)}") from None

    kind.__init__ = init
    return kind


_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

# Settings of PEFT's LoRA that users may look for, and why there are none here.
_ONE_RANK = "not supported: methods cut and merge adapters that have one rank and scale everywhere"
_NOT_OURS = {
    "rank_pattern": _ONE_RANK,
    "alpha_pattern": _ONE_RANK,
    "target_parameters": "not supported: experts stacked in one parameter take no LoRA here",
}


@told
@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Lora:
    """What to train: PEFT's LoRA settings, by PEFT's names where it has them.

    targets: names of modules (or their last parts), "all-linear", another text for a regular
             expression that a module's whole name must match, or None for PEFT's choice for the
             model's family
    layers_to_transform, layers_pattern: of the targets, only those in layers of these numbers; and
             what the list of layers is called ("layers", "h"), where names alone do not tell it.
             PEFT would take a regular expression for it: here it is a name, or several
    whole:   modules trained whole beside the pairs (PEFT's modules_to_save); a classifier's head,
             and what the base's checkpoint does not hold, are always among them
    rslora:  the scale is alpha / sqrt(r), as in rank-stabilised LoRA
    clients: N, over how many clients a round's means are: the scale is alpha sqrt(N / r), which
             makes up for what a mean of N takes from a step (SFed-LoRA, arXiv 2603.08058); None
             leaves it as it is
    start:   a folder with an adapter of PEFT's to begin from (train/start.py), in the place of a
             random A and a B of zeros
    """

    rank: Annotated[int, Field(gt=0, le=65535)] = 16  # the most that a message can tell
    alpha: Annotated[float, Field(gt=0, le=1e9)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[NotNegative, ...] | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    whole: tuple[str, ...] = ()
    rslora: bool = False
    clients: Positive | None = None
    start: str | None = None

    @property
    def pattern(self) -> str | None:
        """The regular expression that finds the layers, if one does."""
        alone = isinstance(self.targets, str) and self.targets != "all-linear"
        return str(self.targets) if alone else None

    @property
    def scale(self) -> float:
        """s, by which a product B A is multiplied."""
        if self.clients is not None:
            return self.alpha * math.sqrt(self.clients / self.rank)
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _settings_of_peft_that_cannot_be(cls, given: Any) -> Any:
        named = given.kwargs if isinstance(given, ArgsKwargs) else given
        for key, why in _NOT_OURS.items():
            if isinstance(named, Mapping) and key in named:
                raise ValueError(f"{key}: {why}")
        return given

    @pydantic.field_validator("targets", mode="before")
    @classmethod
    def _names_or_pattern(cls, given: Any) -> Any:
        if isinstance(given, str):
            if len(given) > _LONGEST:
                raise ValueError(
                    f"a regular expression of {len(given):,} letters, and at most {_LONGEST:,} "
                    "are read: name the modules"
                )
            if _written_out(given) > _MOST_WRITTEN:
                raise ValueError(
                    f"a regular expression whose counted repetitions make more than "
                    f"{_MOST_WRITTEN:,} letters of it: name the modules"
                )
            try:
                re.compile(given)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"not a regular expression: {error}") from None
        elif given is not None and not (
            isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
        ):
            raise ValueError("a list of names is needed, or a text: a regular expression")
        return given

    @pydantic.field_validator("targets", "whole", "layers_pattern", mode="after")
    @classmethod
    def _names_of_a_model(cls, given: Any, info: pydantic.ValidationInfo) -> Any:
        """PEFT compares each with each and with every module, and makes all ends of each."""
        names = given if isinstance(given, tuple) else ()
        most = _MOST_LISTS if info.field_name == "layers_pattern" else _MOST_NAMES
        if len(names) > most:
            raise ValueError(f"{len(names):,} names, and at most {most:,} are read")
        for name in names:
            if len(name) > _LONGEST_NAME:
                raise ValueError(
                    f"a name of {len(name):,} letters, and at most {_LONGEST_NAME} are read"
                )
        return given

    @pydantic.field_validator("layers_pattern")
    @classmethod
    def _name_of_layers(cls, given: Any) -> Any:
        for name in (given,) if isinstance(given, str) else given or ():
            if _NAME.fullmatch(name) is None:
                raise ValueError(
                    f"{quoted(name)} is no name of a list of layers, such as 'layers' or 'h': "
                    "several go into a list"
                )
        return given

    @pydantic.field_validator("layers_to_transform", mode="before")
    @classmethod
    def _one_layer(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int) else given

    @pydantic.model_validator(mode="after")
    def _one_scale(self) -> "Lora":
        if self.rslora and self.clients is not None:
            raise ValueError(
                "rslora: clients says the scale already, alpha sqrt(clients / rank): leave it out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _layers_of_named_targets(self) -> "Lora":
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says what layers_to_transform counts: give that too")
        if self.layers_to_transform is not None and isinstance(self.targets, str):
            raise ValueError("layers_to_transform goes with a list of targets, not with a pattern")
        return self


def _written_out(pattern: str) -> int:
    """How many letters a regular expression has, its counted repetitions written out."""
    groups, last = [0], 0  # what each open group has so far, and the piece before
    for piece in _PIECES.finditer(pattern):
        text, counts = piece.group(), [int(n) for n in piece.groups() if n]
        if text == "(":
            groups.append(0)
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif counts:
            more = last * max(counts) - last
            groups[-1] += more
            last += more
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)


@told
@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Training:
    """A client's local training.

    epochs: passes over the client's examples; not used when `steps` is given
    steps:  H, a fixed number of optimizer steps (the examples are gone through again as needed)
    last_lr: the learning rate of the last round, to which `lr` falls by half a cosine over the
            rounds; None keeps to `lr`
    clip:   largest norm of the gradient over all trained tensors; None clips nothing
    proximal: FedProx's mu: mu / 2 |x - x_0|^2 is added to the loss, x being what a client trains,
            and x_0 what it begins the round with
    augment: of images: "flip" from left to right, "crop-flip" moves them too; from the client's key
    micro_batch: rows that are run at a time; the gradients of a batch's pieces add up to its own
    checkpointing: whether layers keep their inputs alone, and are run again in the backward pass
    packing: of a language model: texts of a client joined into rows as long as its longest
    by_length: rows that are about as long share a batch, so that little of it is padding; which
            rows, and the order of the batches, are drawn anew in each pass
    precision: "bf16" runs the model under autocast; "auto" does so where the device is fast at it
    function: "module:name" of a function of one's own that trains in the place of all this
            (train/by_function.py); of the other settings only precision, of evaluations, is left
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Rate = 5e-2
    last_lr: Rate | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Decay = 0.0
    epochs: Positive = 1
    steps: Positive | None = None
    batch: Positive = 16
    micro_batch: Positive | None = None
    checkpointing: bool = False
    clip: Annotated[float, Field(gt=0, le=1e32)] | None = None
    proximal: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    precision: Precision = "auto"
    augment: Literal["none", "flip", "crop-flip"] = "none"
    packing: bool = False
    by_length: bool = False
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None

    @pydantic.model_validator(mode="after")
    def _nothing_beside_a_function(self) -> "Training":
        if self.function is None:
            return self
        for each in fields(self):
            if each.name not in ("function", "precision") and (
                getattr(self, each.name) != each.default
            ):
                raise ValueError(
                    f"{each.name}: the function {quoted(self.function)} trains in its own way: "
                    "say it there, and leave it out here"
                )
        return self


def in_round(training: Training, number: int, rounds: int) -> Training:
    """The training of a round, whose learning rate is that of the round and stays as it is.

    number: of the round, from 1 to `rounds`
    """
    if training.last_lr is None:
        return training
    gone = 0.5 * (1 - math.cos(math.pi * number / rounds))
    return replace(training, lr=training.lr + gone * (training.last_lr - training.lr), last_lr=None)


def steps_of(rows: int, training: Training) -> int:
    """How many batches a client of so many examples trains on in a round."""
    return training.steps or training.epochs * -(-rows // training.batch)


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of Python's or NumPy's. Raises FedSieveError, naming it, for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise FedSieveError(
            f"{name} is {quoted(value)}; it must be a whole number, at least {least}"
        )
    if value < least:
        raise FedSieveError(f"{name} is {quoted(value)}; it must be at least {least}")
    if int(value) > LARGEST:
        raise FedSieveError(f"{name} is {quoted(value)}; it must be at most {LARGEST}")
    return int(value)


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python's or NumPy's; a Boolean is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_float(value: Any) -> float:
    """A real number as a float: one that is beyond all floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass(frozen=True)
class Sampling:
    """How a round's clients are drawn.

    kind: "uniform" takes `size` clients without replacement; "poisson" takes each of N clients by
        itself with probability min(1, size / N), so that a round may have more, fewer, or none;
        "all" takes every client, whatever `size` says
    size: clients a round, for "poisson" the expected number
    availability: the probability with which a client can be drawn at all in a round: one number, or
        one by id (clients that are not named are always there). Only those who are there are drawn
    extra:  so many clients more are asked, and only the `size` fastest updates that can be merged
        are; a round may have more where one that came last makes others no outliers
    quorum: the fewest updates that a round needs; 0 leaves it to the method

    Raises FedSieveError for values that make no sense.
    """

    kind: Kind = "uniform"
    size: int = 1
    availability: float | Mapping[str, float] = 1.0
    extra: int = 0
    quorum: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(Kind):
            kinds = ", ".join(map(repr, get_args(Kind)))
            raise FedSieveError(f"sampling.kind is {quoted(self.kind)}; it must be {kinds}")
        for name, least in (("size", 1), ("extra", 0), ("quorum", 0)):
            found = whole(f"sampling.{name}", getattr(self, name), least)
            object.__setattr__(self, name, found)
        if self.extra and self.kind != "uniform":
            raise FedSieveError(
                "sampling.extra asks for more clients than the cohort's size, and sampling of "
                f"kind {self.kind!r} has no fixed size: use 'uniform', or leave extra out"
            )
        if self.kind == "uniform" and self.quorum > self.size:
            raise FedSieveError(
                f"sampling.quorum is {self.quorum}, but a round merges at most {self.size} "
                "updates: lower it or raise the cohort"
            )
        place, given = "sampling.availability", self.availability
        if isinstance(given, Mapping):
            places = {f"{place}.{id}": share for id, share in given.items()}
        else:
            places = {place: given}
        for name, share in places.items():
            if not (is_number(share) and 0 < share <= 1):
                raise FedSieveError(f"{name} is {quoted(share)}; it must be above 0 and at most 1")
        # Numbers of NumPy's and fractions are kept as what a recipe can hold.
        if isinstance(given, Mapping):
            shares: Any = {id: as_float(share) for id, share in given.items()}
        else:
            shares = as_float(given)
        object.__setattr__(self, "availability", shares)

    @property
    def plain(self) -> bool:
        """Whether clients are drawn and kept by kind and size alone.

        An accountant of privacy can only count on it then: availability and over-selection change
        who is merged.
        """
        return self.extra == 0 and all(share == 1 for share in _shares(self.availability))

    def probability(self, clients: int) -> float:
        """The probability with which one of so many clients is in a round, if `plain`."""
        return 1.0 if self.kind == "all" else min(1.0, self.size / clients)


def _shares(availability: float | Mapping[str, float]) -> list[float]:
    return list(availability.values()) if isinstance(availability, Mapping) else [availability]
