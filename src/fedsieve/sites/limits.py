"""What a recipe would cost a site, worked out before anything is allocated or written for it.

A server may name any number. So a site asks four things of a recipe that it is told, each with a
bound in site.toml; a recipe beyond one is refused, with the bound, its value, and what was asked:

    most_steps   optimizer steps of a round
    most_tokens  steps x rows of a batch x tokens of a row, in a round
    most_memory  what training takes beside the base model: trained numbers, gradients, the local
                 optimizer's state, and activations, counted over a step with tensors that hold no
                 numbers (costs/memory.py), with what quantised weights take while multiplied
    most_disk    what the worker's folder may hold, with the rounds that `checkpoint.every` keeps
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fedsieve.algebra.adapter import Layout, base_layout, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.costs import dry_run, memory
from fedsieve.costs.dry_run import Part
from fedsieve.costs.memory import PATCH
from fedsieve.costs.table import moments
from fedsieve.disk import everything_in
from fedsieve.errors import FedSieveError
from fedsieve.recipe.experiment import locate
from fedsieve.recipe.schema import Recipe
from fedsieve.settings import steps_of
from fedsieve.sites.site import Site
from fedsieve.tasks import catalogue
from fedsieve.tasks.asked import Asked
from fedsieve.tasks.examples import Examples, count
from fedsieve.tasks.images import Images
from fedsieve.tasks.tokens import Texts
from fedsieve.train.model import ResidentModel, set_up, shape_of
from fedsieve.train.prepared import BASE
from fedsieve.train.quantise import beside

LARGEST = 10**15  # of any number in a recipe but its seed
ROUNDS = 10**9 - 1  # nine digits in the names of a site's files
SEEDS = 1 << 63
MEGA = 10**6
_META = torch.device("meta")
_TENSORS = 3  # of examples: numbers, mask, labels or types
_FLOAT, _INT = 4, 8  # bytes
_HELD = 4  # times: the change, that before it, the weights as they were, and as they become
_TOLD, _NAMED = 2000, 200  # bytes beside a round's numbers, of all and of each tensor
_LISTED = 1000  # bytes of an option's text and arrays, beside their numbers
_BETWEEN = 16  # of the characters with which multiple_choice.py lists an option


def check_numbers(table: Mapping[str, Any]) -> None:
    """Raises FedSieveError, naming the key, for a number that no recipe has a use for."""
    seed = table.get("seed")
    if isinstance(seed, int) and seed >= SEEDS:
        raise FedSieveError(f"seed: at most {SEEDS - 1}")
    rounds = table.get("rounds")
    if isinstance(rounds, int) and rounds > ROUNDS:
        raise FedSieveError(f"rounds: a site takes at most {ROUNDS}")
    _check_numbers({key: value for key, value in table.items() if key != "seed"}, ())


def _check_numbers(value: Any, place: tuple[str, ...]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_numbers(inner, (*place, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            _check_numbers(inner, (*place, str(number)))
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        shown = f"{value:g}" if isinstance(value, float) else f"of {len(str(abs(value)))} digits"
        raise FedSieveError(
            f"{'.'.join(place)[:100]}: a number {shown}; a site takes none beyond {LARGEST}"
        )


Column = Callable[[Dataset, str], Sequence[object]]  # of rows, by its name


def check_rows(recipe: Recipe, site: Site, parts: Sequence[Dataset], column: Column) -> None:
    """Before rows become tensors, which are there at once: those to train and to evaluate on.

    column: reads one, or raises what may be told of why it cannot
    Raises FedSieveError where they would not fit `most_memory`, or are more than `most_tokens`.
    """
    taken = sum(_taken_by(recipe, site, rows, column) for rows in parts)
    count = sum(map(len, parts))
    _refuse(taken, site, f"data.max_length {recipe.data.max_length} with {count} rows")


def _taken_by(recipe: Recipe, site: Site, rows: Dataset, column: Column) -> int:
    """The bytes of the examples of these rows: (rows, tokens of the longest) each, and labels."""
    data, task = recipe.data, catalogue.load(recipe.model.task)
    names = [n for n in (data.text, data.text_b, data.prompt, data.completion) if n is not None]
    options = [data.options] if isinstance(data.options, str) else [*(data.options or ())]
    # A token has at least one byte; a few more begin and end a row.
    most = 8 + sum(
        max(map(_bytes_in, column(rows, name)), default=0) for name in (*names, *options)
    )
    copies, each, told = _TENSORS, 0, data.classes or ()
    if task.ask is not None:
        listed = [max(map(_parts_of, column(rows, name)), default=0) for name in options]
        most += len(data.answer or "") + max(map(_bytes_in, told), default=0)
        each = sum(listed) or len(told) or 1
        if data.option_word is not None:  # then all of them stand in each prompt
            most += sum(map(_bytes_in, told)) + each * (2 * len(data.option_word) + _BETWEEN)
        work = len(rows) * each * most
        if work > site.most_tokens:
            raise FedSieveError(
                f"{len(rows)} rows of {each} options: up to {work} tokens to read, with the "
                f"question before each: this site takes at most {site.most_tokens} (most_tokens)"
            )
        # The prompt is kept, and with each of the options once more, with what is to learn of it.
        copies += 1 + 3 * each
    elif task.config(told).get("problem_type") == "multi_label_classification":
        each = len(told) or (0 if isinstance(data.label, str) else len(data.label or ()))
    own = copies * _INT * min(data.max_length, most) + each * (_LISTED if task.ask else _FLOAT)
    return len(rows) * own


def _parts_of(value: object) -> int:
    """How many options a cell holds."""
    if isinstance(value, dict):
        value = value.get("text")
    return len(value) if isinstance(value, list) else 1


def _bytes_in(value: object) -> int:
    """Of all texts in a cell, and what a template may put around each of several."""
    if isinstance(value, str):
        return len(value.encode())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(8 + _bytes_in(part) for part in parts)


def check(
    recipe: Recipe, method: Method, site: Site, train: Examples, test: Examples | None
) -> None:
    """Raises FedSieveError for a recipe that is beyond one of the site's bounds."""
    training, rows, length = recipe.training, count(train), _tokens(train)
    batch = min(training.batch, rows)
    steps = steps_of(rows, training)
    if steps > site.most_steps:
        raise FedSieveError(
            f"{steps} optimizer steps a round: this site takes at most {site.most_steps} "
            "(most_steps)"
        )
    work = steps * batch * length
    if work > site.most_tokens:
        raise FedSieveError(
            f"{work} tokens a round ({steps} steps of {batch} rows of {length}): this site takes "
            f"at most {site.most_tokens} (most_tokens): lower training.steps or training.batch"
        )
    seen: tuple[int, int] | None = None  # rows and tokens of each, at once in an evaluation
    if test is not None:
        seen = min(recipe.evaluation.batch, count(test)), _tokens(test)
        if isinstance(test, Texts) and test.asked is not None:
            seen = _asked(recipe, site, test.asked)
    shape = _shape(recipe, method)
    trained = shape.layout.size
    parts = _rehearsed(method)
    # Control variates came, are kept, and stand as their difference in the loss.
    beside_values = 3 * any(part.got.control is not None for part in parts)
    state = _FLOAT * trained * (3 + moments(training) + beside_values)
    _refuse(state, site, f"lora.rank {recipe.lora.rank} and what else is trained")
    base, kept = _changed_base(parts, shape.layout)
    state += _HELD * _FLOAT * base
    _refuse(state, site, f"the base weights that {recipe.method.name} changes")
    step = memory.of_step(shape, training, batch, length).peak
    step += beside(shape.model, recipe.model.quantization, batch, length)
    _refuse(state + step, site, f"training.batch {training.batch} over rows of {length} tokens")
    if seen is not None:
        largest = memory.of_evaluation(shape, *seen)
        _refuse(state + largest, site, f"evaluation.batch {recipe.evaluation.batch}")
    saved = _FLOAT * trained
    if kept:  # then the whole model is what comes out
        weights = sum(each.numel() for each in shape.model.parameters())
        saved = getattr(torch, recipe.model.dtype).itemsize * weights
    _check_disk(recipe, site, shape.layout, trained * (1 + _remembered(parts)) + kept, saved)


def _rehearsed(method: Method) -> list[Part]:
    """Some rounds over a layer of 2 x 2 and a client of half the ranks: of what kinds what a method
    sends and keeps is, is the same whatever the sizes.
    """
    pair = {"m.lora_A.weight": torch.zeros(2, 2), "m.lora_B.weight": torch.zeros(2, 2)}
    rehearsed = dry_run.rounds(method, layout_of(pair, 1.0), [Client("anyone", 1, Budget(0.5))])
    return [part for each in rehearsed for part in each.parts]


def _changed_base(parts: Sequence[Part], layout: Layout) -> tuple[int, int]:
    """How many frozen weights a method changes at its clients, those under all pairs or none; and
    of how many a client keeps the change from round to round.
    """
    under = sum(map(math.prod, base_layout(layout, 0).shapes.values()))
    changed = any(part.view.adapter.base for part in parts)
    return under * changed, under * any("base" in part.memory for part in parts)


def _remembered(parts: Sequence[Part]) -> int:
    """How many trees as large as what is trained a client keeps, beside a change of the base."""

    def trees(part: Part) -> int:
        kept = [tree for group, tree in part.memory.items() if group != "base"]
        return sum(any(tensor.numel() > 1 for tensor in tree.values()) for tree in kept)

    return max(map(trees, parts))


def _asked(recipe: Recipe, site: Site, asked: Sequence[Asked]) -> tuple[int, int]:
    """How many rows are run at once where options are weighed and answers written, and how long
    they are at most. Raises FedSieveError where that is more work than the site takes.
    """
    options = [len(ids) for each in asked for ids in each.options]
    written = [len(each.prompt) + each.most for each in asked]
    work = sum(options) + len(asked) * recipe.data.new_tokens
    if work > site.most_tokens:
        raise FedSieveError(
            f"{work} tokens at an evaluation ({len(options)} options to weigh, {len(asked)} "
            "answers of up to data.new_tokens to write): this site takes at most "
            f"{site.most_tokens} (most_tokens)"
        )
    rows = max(len(options), len(written))
    return min(recipe.evaluation.batch, rows), max([*options, *written], default=1)


def _tokens(examples: Examples) -> int:
    """Of a row; of an image as many as a vision transformer usually makes of it."""
    if isinstance(examples, Images):
        high, wide = examples.pixels.shape[2:]
        return max(1, high * wide // PATCH)
    return examples.input_ids.shape[1]


def _check_disk(recipe: Recipe, site: Site, layout: Layout, numbers: int, saved: int) -> None:
    """Raises FedSieveError where the rounds that must be kept do not fit `most_disk`, or not beside
    what comes out.

    numbers: at most, of a round's answer, and of what the client keeps after it
    saved:   bytes of what comes out at the end
    """
    # Two checkpoints back and rounds that came to nothing (journal.py); the next one is written
    # before the oldest goes, and the adapter while all are there.
    rounds = min(recipe.rounds, 3 * recipe.checkpoint.every + 2)
    each = _FLOAT * numbers + _TOLD + sum(_NAMED + len(name) for name in layout.names)
    more = max(each, saved)
    if each * rounds + more > site.most_disk * MEGA:
        raise FedSieveError(
            f"checkpoint.every {recipe.checkpoint.every} keeps {rounds} rounds of up to "
            f"{each / MEGA:.3g} MB, and beside them the next one, or what comes out at the end, of "
            f"{more / MEGA:.3g} MB: this site's folder may hold {site.most_disk:g} MB (most_disk)"
        )


def check_room(site: Site, more: int) -> None:
    """Raises FedSieveError if so many bytes more are too many for the worker's folder."""
    used = used_bytes(site.folder)
    if used + more > site.most_disk * MEGA:
        raise FedSieveError(
            f"this site's disk: its folder holds {used / MEGA:.3g} MB, {more / MEGA:.3g} MB more "
            f"are asked, and it may hold {site.most_disk:g} MB (most_disk). Nothing that was kept "
            "is lost"
        )


def used_bytes(folder: Path) -> int:
    """Of all files in a folder; those that go away meanwhile count nothing.

    A base beside an adapter is made of hard links to the base's own files (train/prepared.py), and
    takes no room of its own. Others are the owner's, as of a backup, and do.
    """
    found = 0
    for path in everything_in(folder):
        try:
            told = path.lstat()
            of_a_base = told.st_nlink > 1 and BASE in path.relative_to(folder).parts
            found += told.st_size if path.is_file() and not of_a_base else 0
        except OSError:
            continue
    return found


def _shape(recipe: Recipe, method: Method) -> ResidentModel:
    """The model with what the method trains, of shapes alone."""
    classes = len(recipe.data.classes or ())
    base = shape_of(locate(recipe.model.source), recipe.model.task, classes, recipe.model.settings)
    with _META:
        return set_up(base, recipe.model.task, recipe.lora, method.trains, key=Key(0), device=_META)


def _refuse(taken: int, site: Site, what: str) -> None:
    if taken > site.most_memory * MEGA:
        raise FedSieveError(
            f"{what}: {math.ceil(taken / MEGA)} MB of memory: this site takes at most "
            f"{site.most_memory:g} (most_memory)"
        )
