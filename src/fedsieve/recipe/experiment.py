"""From a recipe, or from data sets in a notebook, to a federation that is ready to run."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from torch import Tensor

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.budget import check as check_budgets
from fedsieve.algebra.keys import Key, word
from fedsieve.algebra.method import Memory, Method, View
from fedsieve.clients.privacy import (
    Cohorts,
    PrivacyPlan,
    refuse_what_is_not_covered,
    settle,
    uncovered,
)
from fedsieve.clients.resources import Resources
from fedsieve.clients.sampling import check as check_sampling
from fedsieve.data import fetch, partition
from fedsieve.data.partition import Partition, Rows
from fedsieve.disk import place
from fedsieve.engine import personal
from fedsieve.engine.local import in_process, punctual
from fedsieve.engine.loop import Exchange, Federation
from fedsieve.engine.together import together
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema, workers
from fedsieve.recipe.budgets import hand_out, machines_of
from fedsieve.recipe.examples import (
    Prepared,
    bad_rows,
    load_more,
    load_rows,
    more_sources,
    owners_of,
    prepare,
    unused,
)
from fedsieve.recipe.method import build_method, norm_bound
from fedsieve.recipe.schema import Recipe
from fedsieve.settings import Sampling, Training, in_round
from fedsieve.tasks import catalogue
from fedsieve.tasks.digest import RowsDigest, rows_digest
from fedsieve.tasks.examples import Examples, count, take
from fedsieve.tasks.images import Images
from fedsieve.tasks.mixture import held_by
from fedsieve.tasks.tally import Details, Held, Score, Tally, beside, score, scores, total
from fedsieve.tasks.task import Reader
from fedsieve.train import by_function
from fedsieve.train.changes import check_changes, refuse_quantised
from fedsieve.train.cohort import Work, check_together, fit_together
from fedsieve.train.digest import base_digest
from fedsieve.train.lengths import check_rows
from fedsieve.train.local import Fit, check_packing, fit, runs_in_bf16, tally
from fedsieve.train.model import ResidentModel, load_base, pick_device, set_up
from fedsieve.train.reader import load_reader
from fedsieve.train.start import begun
from fedsieve.train.step import check_step


@dataclass(frozen=True)
class Experiment:
    """A federation in this process, with the model that it trains.

    recipe:   what was asked for, with what the data told filled in; None in a notebook
    start:    the adapter before the first round
    memories: what clients keep between rounds, by id
    notes:    what a user should know about how it was set up
    ending:   why there are no more rounds, to be said at the end; or None
    details:  of the last evaluation, one or none; a run whose noise is fresh has none
    rows:     of the examples that the recipe's rows became; None in a notebook, and in a federation
    held:     the classes of some clients' rows, where those are here and may be told
    examples: those of a client that trains here, by its id; test: those that are evaluated on here
    """

    recipe: Recipe | None
    federation: Federation
    resident: ResidentModel
    start: Adapter
    memories: dict[str, Memory]
    notes: tuple[str, ...]
    ending: str | None = None
    details: list[Details] = dataclasses.field(default_factory=list)
    examples: Callable[[str], Examples] | None = None
    test: Examples | None = None
    rows: RowsDigest | None = None
    held: tuple[Held, ...] = ()


def keeping(
    evaluate: Callable[[Adapter], Score | None], details: list[Details]
) -> Callable[[Adapter], Score | None]:
    """An evaluation that puts what it shows beyond its scores in the place of the last one's."""

    def evaluated(adapter: Adapter) -> Score | None:
        score = evaluate(adapter)
        details[:] = [] if score is None else [score.details]
        return score

    return evaluated


def assemble(
    resident: ResidentModel,
    method: Method,
    examples: Callable[[str], Examples],
    counts: Mapping[str, int],
    budgets: Mapping[str, Budget],
    *,
    training: Training,
    rounds: int,
    sampling: Sampling,
    seed: int,
    test: Examples | None,
    own_tests: Mapping[str, Examples] | None = None,
    more_tests: Mapping[str, Examples] | None = None,
    evaluate_every: int = 1,
    evaluate_batch: int = 64,
    lead: str | None = None,
    notes: Sequence[str] = (),
    recipe: Recipe | None = None,
    privacy: PrivacyPlan | None = None,
    resources: Mapping[str, Resources] | None = None,
    left_out: Mapping[str, str] | None = None,
    norm_bound: float = math.inf,
    at_once: int | Literal["auto"] = 1,
    function: by_function.Function | None = None,
    engine: Callable[[dict[str, Memory]], Exchange] | None = None,
) -> Experiment:
    """Clients, trainer and evaluation around a model that has its adapter in it.

    examples: from a client's id to its examples; counts: id -> how many those are.
    A client without examples is left out with a warning.
    own_tests: what of `test` is each client's own, by id, where the scores of each are asked
    rounds: how many there will be, over which `training.last_lr` is reached
    lead: the metric that leads; None is the task's own
    more_tests: other examples that are evaluated on, by name: their metrics come after those of
        `test`, as "name_accuracy"
    resources: what clients have, by id, where it is known
    left_out: clients whose rows cannot be used, and why not; without examples, they are left out
    norm_bound: as in `Federation`
    at_once: how many clients are trained in one pass (`engine.together`)
    function: of the user's own, that trains in the place of `training` (train/by_function.py)
    engine: who trains the clients, given what they keep; None does it here
    Raises FedSieveError, naming the client, for a budget that the adapter's rank cannot serve, and
    for clients drawn in a way that the method's privacy cannot be accounted for.
    """
    refuse_what_is_not_covered(method, sampling)
    check_packing(training, resident.task)
    check_step(resident.model, resident.task, training)
    check_budgets(budgets, resident.layout.rank)
    notes, left_out = list(notes), left_out or {}
    empty = sorted(id for id, count in counts.items() if count == 0 and id not in left_out)
    said = []
    if left_out:
        said.append(
            f"{len(left_out)} of {len(counts)} clients have rows that cannot be used and are left "
            f"out: {reasons(left_out)}"
        )
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        said.append(f"{len(empty)} of {len(counts)} clients have no data and are left out: {shown}")
    full = len(counts) - len(empty) - len(left_out)
    if sampling.kind == "uniform" and full < sampling.size:
        said.append(f"cohort is {sampling.size}, and {full} clients have data: a round has no more")
    used = sorted(method.knobs)
    if used and all(getattr(budgets[id], knob) == 1 for id in counts for knob in used):
        said.append(
            f"the method runs dense: no client has a budget below 1 ({', '.join(used)}), by which "
            "it leaves something out; give [[budgets]], or take 'fedit'"
        )
    for note in said:
        warnings.warn(note, stacklevel=3)
    if method.private != "system":  # what tells of single clients is not handed on with such a run
        notes += said
    clients = [Client(id, count, budgets[id]) for id, count in sorted(counts.items()) if count]
    if not clients:
        raise FedSieveError("no client has any data")
    if resources is not None:
        clients = [
            c._replace(link=resources[c.id].link, step_seconds=resources[c.id].step_seconds)
            for c in clients
        ]
    if isinstance(sampling.availability, Mapping):
        there = {id: p for id, p in sampling.availability.items() if id not in left_out}
        sampling = dataclasses.replace(sampling, availability=there)
    check_sampling(sampling, clients)

    def train(view: View, client: Client, key: Key) -> Fit:
        if function is not None:
            return by_function.fit(resident, view, examples(client.id), function, key)
        now = in_round(training, key.round, rounds)
        return fit(resident, view, examples(client.id), now, key)

    def train_together(asked: Sequence[tuple[View, Client, Key]]) -> list[Fit]:
        now = in_round(training, asked[0][2].round, rounds)
        works = [Work(view, examples(client.id), key) for view, client, key in asked]
        return fit_together(resident, works, now)

    memories: dict[str, Memory] = {}

    def counts_of(
        adapter: Adapter, test: Examples, own_tests: Mapping[str, Examples] | None
    ) -> list[Tally]:
        rate = partial(tally, resident, batch=evaluate_batch, precision=training.precision)
        # Before the first round no client has anything of its own.
        own = method.personal if memories else None
        if own_tests:
            return [
                rate(own(adapter, memories[id]) if own and id in memories else adapter, examples)
                for id, examples in sorted(own_tests.items())
            ]
        if own is None:
            return [rate(adapter, test)]
        return [
            rate(
                own(adapter, memory),
                personal.own_test(test, examples(id), Key(seed, 0, id)),
            )
            for id, memory in personal.some_of(memories, Key(seed))
        ]

    def rated(adapter: Adapter) -> Score:
        assert test is not None
        task, classes = catalogue.load(resident.task), resident.classes
        owners = sorted(own_tests or ())
        main = scores(task, counts_of(adapter, test, own_tests), classes, lead, owners)
        others = {
            name: score(task, total(counts_of(adapter, more, None)), classes, lead)
            for name, more in (more_tests or {}).items()
        }
        return beside(main, others)

    details: list[Details] = []
    # A client's own part of the model is no part of what the noise covers.
    withheld = method.personal is not None and method.private == "system"
    evaluated = rated if method.private == "system" else keeping(rated, details)
    if engine is not None:
        exchange = engine(memories)
    elif at_once != 1 and _trains_together(resident, at_once):
        exchange = together(
            method,
            train,
            train_together,
            resident.adapter(),
            memories,
            at_once,
            lambda said: warnings.warn(said, stacklevel=2),
        )
    else:
        exchange = in_process(method, train, resident.adapter(), memories)
    federation = Federation(
        method=method,
        clients=clients,
        sampling=sampling,
        seed=seed,
        exchange=punctual(exchange, sampling.size) if sampling.extra else exchange,
        evaluate=None if test is None or withheld else evaluated,
        evaluate_every=evaluate_every,
        privacy=privacy,
        dense=resident.dense,
        norm_bound=norm_bound,
    )
    ending = None if privacy is None else privacy.ending
    return Experiment(
        recipe,
        federation,
        resident,
        resident.adapter(),
        memories,
        tuple(notes),
        ending,
        details,
        examples,
        test,
    )


def _trains_together(resident: ResidentModel, at_once: int | Literal["auto"]) -> bool:
    """Whether the model can. Raises FedSieveError where it cannot, and was not asked whether it is
    worth it.
    """
    try:
        check_together(resident)
    except FedSieveError as error:
        if at_once != "auto":
            raise
        warnings.warn(str(error), stacklevel=3)
        return False
    return True


def reasons(left_out: Mapping[str, str]) -> str:
    """Which clients are left out, and why: the first three."""
    shown = [f"client {id!r}: {why}" for id, why in sorted(left_out.items())[:3]]
    return "; ".join([*shown, *([f"{len(left_out) - 3} more"] if len(left_out) > 3 else [])])


def also(left_out: Mapping[str, str]) -> str:
    """What an error adds where clients were left out before, whose labels then made no classes."""
    return f" (left out before: {reasons(left_out)})" if left_out else ""


def stopped(left_out: Mapping[str, str]) -> FedSieveError:
    """The error of a run that is strict, and that has clients whose rows cannot be used."""
    return FedSieveError(
        f"strict: rows of {len(left_out)} clients cannot be used: {reasons(left_out)}"
    )


def with_secret(experiment: Experiment, secret: int) -> Experiment:
    """The experiment with a seed that only its server knows (`Federation.secret`)."""
    federation = dataclasses.replace(experiment.federation, secret=secret)
    return dataclasses.replace(experiment, federation=federation)


def from_recipe(recipe: Recipe, *, trust_remote_code: bool = False) -> Experiment:
    """Load model and data, split the data over clients, and set up the federation.

    trust_remote_code: see `load_base`
    Raises FedSieveError for whatever of the recipe does not fit the model or the data.
    """
    method = build_method(recipe)
    key = Key(recipe.seed)
    device = pick_device(recipe.device)
    workers.check(recipe)
    named = recipe.training.function
    function = None if named is None else by_function.load(named)
    recipe = _settled(recipe, device)
    source = locate(recipe.model.source)
    task = recipe.model.task
    tokenizer, note = load_reader(source, task, trust_remote_code=trust_remote_code)
    notes = [*([note] if note else []), *unused(recipe)]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    rows, left_out, prepared = _read(recipe, tokenizer)
    data, examples = recipe.data, prepared.train
    if recipe.privacy is None and (full := reaching(examples, data.max_length)):
        cut = (
            f"{full:,} of {count(examples):,} training texts reach data.max_length "
            f"({data.max_length} tokens): what is beyond it is cut"
        )
        notes.append(cut)
        warnings.warn(cut, stacklevel=2)
    if recipe.evaluation.on == "validation" and prepared.test is None:
        raise FedSieveError("data.validation: none of the rows held back can be used")
    if prepared.classes:
        data = data.model_copy(update={"classes": prepared.classes})
        recipe = recipe.model_copy(update={"data": data})
    recipes.check_metrics(recipe)  # once more: now its classes are known
    parts = parts_of(recipe, rows, examples, prepared.came)
    if recipe.partition.column is not None and data.validation is None:
        # Each has rows: those without an example have nothing to learn in any.
        nothing = f"none of its rows has anything to learn within data.max_length {data.max_length}"
        left_out |= {id: nothing for id, rows in parts.counts.items() if not rows}
        if recipe.strict and left_out:
            raise stopped(left_out)
    parts = parts.beside(left_out)
    counts = parts.counts
    plan = None
    if recipe.privacy is not None:
        recipe, plan = with_privacy(recipe, sum(rows > 0 for rows in counts.values()))
        method = build_method(recipe, partial(plan.around, key=key))
        own = prepared.test is not None and method.personal is not None
        said = _cautions(recipe, plan, "what each client keeps to itself" if own else None)
        notes += [plan.guarantee, *said]
        for caution in said:
            warnings.warn(caution, stacklevel=2)
    resident = set_up_resident(recipe, tokenizer, device, trust_remote_code=trust_remote_code)
    check_rows(resident, examples, prepared.test, *prepared.more.values())
    machines = machines_of(recipe, counts)
    experiment = assemble(
        resident,
        method,
        lambda id: take(examples, torch.as_tensor(parts[id])),
        counts,
        hand_out(recipe, method, resident.layout, counts, machines),
        training=recipe.training,
        rounds=recipe.rounds,
        sampling=schema.sampling(recipe),
        seed=recipe.seed,
        test=prepared.test,
        own_tests=_by_owner(prepared),
        more_tests=prepared.more,
        evaluate_every=recipe.evaluation.every,
        evaluate_batch=recipe.evaluation.batch,
        lead=recipe.evaluation.metric,
        notes=notes,
        recipe=recipe,
        privacy=plan,
        resources=machines,
        left_out=left_out,
        norm_bound=norm_bound(recipe),
        at_once=recipe.engine.together,
        function=function,
        engine=workers.engine(
            recipe, resident, examples, parts, source, trust_remote_code=trust_remote_code
        ),
    )
    held = held_by(
        examples.labels,
        recipe.data.classes or (),
        parts,
        (client.id for client in experiment.federation.clients),
    )
    return dataclasses.replace(experiment, rows=_digest(recipe, rows, prepared), held=held)


def digest_of_rows(recipe: Recipe, *, trust_remote_code: bool = False) -> RowsDigest:
    """What `from_recipe` says of its rows, without the model. Raises FedSieveError as it does."""
    source, task = locate(recipe.model.source), recipe.model.task
    reader, _ = load_reader(source, task, trust_remote_code=trust_remote_code)
    rows, _, prepared = _read(recipe, reader)
    return _digest(recipe, rows, prepared)


def _read(recipe: Recipe, reader: Reader) -> tuple[Dataset, dict[str, str], Prepared]:
    """The rows, the clients whose cannot be used and why, and the examples that the others make."""
    data, on_validation = recipe.data, recipe.evaluation.on == "validation"
    rows = load_rows(data, data.train, data.train_split, recipe.partition.reads)
    rows, left_out = _without_bad_clients(recipe, rows, reader)
    clients = recipe.partition.column if recipe.evaluation.by_client else None
    if recipe.evaluation.by_client and clients is None:
        raise FedSieveError(
            "evaluation.by_client: it needs partition.kind = 'column', which says whose each row is"
        )
    test_rows = None
    if not on_validation and (data.test is not None or data.test_split is not None):
        test_rows = load_rows(data, data.test or data.train, data.test_split, clients)
    more_rows = load_more(data) if test_rows is not None else {}
    try:
        return rows, left_out, prepare(recipe, rows, test_rows, reader, clients, more_rows)
    except FedSieveError as error:
        raise FedSieveError(f"{error}{also(left_out)}") from error


def _digest(recipe: Recipe, rows: Dataset, prepared: Prepared) -> RowsDigest:
    column = recipe.partition.reads
    owned: Mapping[str, Rows] = {}
    if column is not None:
        owners = owners_of(rows, column)
        owned = partition.natural([owners[row] for row in prepared.came.tolist()])
    tests = [("test", prepared.test), *sorted(prepared.more.items())]
    return rows_digest(prepared.train, owned, tests)


def set_up_resident(
    recipe: Recipe,
    tokenizer: Reader,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> ResidentModel:
    """The recipe's model with a fresh adapter; a classifier's `data.classes` must be filled in.

    trust_remote_code: see `load_base`
    Raises FedSieveError where model, lora and method do not go together.
    """
    source = locate(recipe.model.source)
    method = build_method(recipe)
    refuse_quantised(source, recipe.model.quantization, method, recipe.method.name)
    base = load_base(
        source,
        recipe.model.task,
        recipe.data.classes or (),
        key=Key(recipe.seed),
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        double_quantization=recipe.model.double_quantization,
        whole=recipe.lora.whole,
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        settings=recipe.model.settings,
        trust_remote_code=trust_remote_code,
    )
    digest = base_digest(base, source)
    resident = set_up(
        base,
        recipe.model.task,
        recipe.lora,
        method.trains,
        key=Key(recipe.seed),
        device=device,
        tokenizer=tokenizer,
    )
    check_changes(resident, method)
    resident = dataclasses.replace(resident, digest=digest)
    start = recipe.lora.start
    return resident if start is None else begun(resident, start, method)


def locate(source: str) -> str:
    """Where a model is: a fetched name's folder, another folder's whole path, else a hub name.

    The whole path, because it is written into the adapter, for whoever loads that elsewhere.
    Fetched names come first, as for data: write `./name` for a folder that is called like one.
    """
    if source in fetch.PACKAGES:
        return str(fetch.cached(source))
    return absolute(source)


def _settled(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe without what depends on this machine or on the working directory.

    Resuming elsewhere then trains in the same precision, on the same files.
    """
    in_bf16 = runs_in_bf16(device, recipe.training.precision)
    training = dataclasses.replace(recipe.training, precision="bf16" if in_bf16 else "fp32")
    return with_whole_paths(recipe.model_copy(update={"training": training}))


def with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with all paths whole that lead somewhere from the working directory."""
    model = recipe.model.model_copy(update={"source": absolute(recipe.model.source)})
    lora = recipe.lora
    if lora.start is not None:
        lora = dataclasses.replace(lora, start=str(place(place(lora.start).resolve())))
    data = recipe.data.model_copy(
        update={
            "train": absolute(recipe.data.train),
            "test": None if recipe.data.test is None else absolute(recipe.data.test),
            "more_tests": absolute_more(recipe.data),
        }
    )
    return recipe.model_copy(update={"model": model, "lora": lora, "data": data})


def absolute_more(data: schema.Data) -> dict[str, schema.MoreTest] | None:
    """`data.more_tests` with whole paths."""
    found = {
        name: schema.MoreTest(test=absolute(source), test_split=split)
        for name, (source, split) in more_sources(data).items()
    }
    return found or None


def absolute(source: str) -> str:
    path = place(source)
    here = source not in fetch.PACKAGES and path.exists()
    return str(place(path.resolve())) if here else source


def with_privacy(recipe: Recipe, clients: int) -> tuple[Recipe, PrivacyPlan]:
    """The recipe with its noise and the rounds that it can afford filled in, and their account.

    clients: how many have data, and so can be drawn
    """
    assert recipe.privacy is not None
    cohorts = Cohorts(recipe.sampling.kind, recipe.cohort, clients)
    plan = settle(cohorts, rounds=recipe.rounds, **recipe.privacy.model_dump())
    # Written down, so that a resumed run neither searches again nor finds something else.
    settled = recipe.privacy.model_copy(update={"noise_multiplier": plan.noise_multiplier})
    return recipe.model_copy(update={"privacy": settled, "rounds": plan.rounds}), plan


def all_cautions(plan: PrivacyPlan, evaluated: str | None) -> list[str]:
    """What those who read a private run's results should be warned of.

    evaluated: see `privacy.uncovered`
    """
    if plan.spent is None:
        return list(plan.cautions)
    return [*plan.cautions, uncovered(plan.noise_from, evaluated)]


def _cautions(recipe: Recipe, plan: PrivacyPlan, evaluated: str | None) -> list[str]:
    """`all_cautions`, and what holding rows of the clients back does to them."""
    if recipe.evaluation.on == "validation":
        evaluated = "rows of the clients"
    found = all_cautions(plan, evaluated)
    if recipe.data.validation is not None and plan.spent is not None:
        found.append(
            "Privacy: how many rows there are in all decides which ones data.validation holds "
            "back, so a client more or less changes what others train on, and epsilon does not "
            "cover that: tune with it, and leave it out of the run that you report."
        )
    return found


def _without_bad_clients(
    recipe: Recipe, rows: Dataset, tokenizer: Reader
) -> tuple[Dataset, dict[str, str]]:
    """The rows of the clients all of whose rows can be used; and the others, with what is wrong.

    Only where a column says whose each row is. Clients that are drawn are parts of one data set,
    and a bad row is an error of it. Raises FedSieveError if no client is left, or for the first bad
    one where the recipe is strict.
    """
    if recipe.partition.column is None:
        return rows, {}
    bad = bad_rows(recipe, rows, tokenizer)
    if not bad:
        return rows, {}
    owners = owners_of(rows, recipe.partition.column)
    left_out: dict[str, str] = {}
    for row, wrong in sorted(bad.items()):
        left_out.setdefault(owners[row], str(wrong))
    if recipe.strict:
        raise stopped(left_out)
    kept = [row for row, owner in enumerate(owners) if owner not in left_out]
    if not kept:
        raise FedSieveError(f"no client has rows that can be used: {reasons(left_out)}")
    return rows.select(kept), left_out


def _by_owner(prepared: Prepared) -> dict[str, Examples] | None:
    """What is evaluated on, client by client, where it is known whose it is."""
    if prepared.test is None or not prepared.owners:
        return None
    index = partition.natural(prepared.owners)
    return {id: take(prepared.test, torch.as_tensor(rows)) for id, rows in index.items()}


def reaching(examples: Examples, most: int) -> int:
    """How many texts are as long as they may be, and so were cut; but for those just as long."""
    if isinstance(examples, Images):
        return 0
    return int((examples.attention_mask.sum(1) >= most).sum())


def parts_of(recipe: Recipe, rows: Dataset, examples: Examples, came: Tensor) -> Partition:
    """The numbers of each client's examples."""
    chosen, labels = recipe.partition, examples.labels

    def values(column: str, what: str) -> list[str]:
        own = owners_of(rows, column, what)
        return [own[row] for row in came.tolist()]

    def classes() -> Tensor:
        if labels.ndim > 1 or labels.is_floating_point():
            raise FedSieveError(
                f"partition.kind: {chosen.kind!r} splits by label, and a {recipe.model.task} task "
                "has none that are classes: name a column with partition.by, or use 'column' or "
                "'iid'"
            )
        return labels

    split = divided(chosen, labels.shape[0], values, classes, Key(recipe.seed))
    # Whoever has rows but no example of them keeps an id, and is counted among the empty.
    return split if chosen.column is None else split.beside(owners_of(rows, chosen.column))


def divided(
    chosen: schema.Partition,
    count: int,
    values: Callable[[str, str], Sequence[str]],
    classes: Callable[[], ArrayLike],
    key: Key,
) -> Partition:
    """The numbers of each client's, of so many rows or examples, as a [partition] says.

    values: a column, and what its values are called -> one of each row; classes: likewise
    """
    if chosen.column is not None:
        return partition.natural(values(chosen.column, "client"))
    assert chosen.clients is not None
    seed = word(key.at("partition")) % 2**32
    if chosen.alpha is None:
        return partition.iid(count, chosen.clients, seed)
    law = partition.dirichlet if chosen.kind == "dirichlet" else partition.dirichlet_by_client
    labels = classes() if chosen.by is None else values(chosen.by, chosen.by)
    return law(labels, chosen.clients, chosen.alpha, seed)
