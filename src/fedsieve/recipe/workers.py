"""The workers that a recipe's [engine] asks for, and what they are told of the recipe."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.method import Memory
from fedsieve.engine import pool
from fedsieve.engine.loop import Exchange
from fedsieve.engine.request import Rows
from fedsieve.engine.spread import Hire, Spread, Worker
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, pack
from fedsieve.recipe import read as recipes
from fedsieve.recipe import schema
from fedsieve.recipe.schema import Recipe
from fedsieve.settings import Training
from fedsieve.tasks.examples import Examples
from fedsieve.tasks.stored import store
from fedsieve.train import mapped
from fedsieve.train.model import ResidentModel, pick_device

WORKER = "fedsieve.recipe.worker"


def check(recipe: Recipe) -> None:
    """Raises FedSieveError for an engine that is not to be had here, before anything is loaded."""
    for device in recipe.engine.devices or ():
        if recipe.engine.kind == "processes":
            try:
                pick_device(device)
            except FedSieveError as error:
                raise FedSieveError(f"engine.devices: {error}") from None


def counts(engine: schema.Engine, device: str, cohort: int) -> tuple[int, int]:
    """How many workers, and how many threads each has. device: the recipe's, picked"""
    cores = torch.get_num_threads()  # what OMP_NUM_THREADS leaves to this process
    devices = engine.devices or (device,)
    if engine.workers != "auto":
        workers = engine.workers
    elif all(torch.device(each).type == "cpu" for each in devices if each != "auto"):
        workers = min(cohort, cores // (engine.threads or 1))
    else:
        workers = min(cohort, len(devices))
    workers = max(1, workers)
    return workers, engine.threads or max(1, cores // workers)


def work(training: Training) -> Callable[[Client], tuple[float, ...]]:
    """How much a client has to do: rows that are gone through, times its share of the ranks."""

    def of(client: Client) -> tuple[float, ...]:
        once = client.examples * training.epochs
        rows = once if training.steps is None else training.steps * training.batch
        return rows * client.budget.ratio, rows

    return of


def engine(
    recipe: Recipe,
    resident: ResidentModel,
    examples: Examples,
    parts: Mapping[str, Tensor],
    *,
    trust_remote_code: bool = False,
) -> Callable[[dict[str, Memory]], Exchange] | None:
    """What makes an exchange of the clients' memories, by the recipe's [engine]; None trains here.

    recipe: settled; examples: of all clients; parts: by id, which of them are a client's
    """
    asked = recipe.engine
    if asked.kind == "process":
        return None
    workers, threads = counts(asked, str(resident.device), recipe.cohort)
    rows, numbers = _laid_out(parts)
    chosen = asked.devices or (str(resident.device),)
    alike = mark(resident, resident.adapter())

    def make(memories: dict[str, Memory]) -> Exchange:
        hire: Hire | None = None

        def hired(number: int) -> Worker:
            assert hire is not None
            return hire(number)

        spread = Spread(hired, workers, rows, memories, work(recipe.training))

        @contextmanager
        def at_work() -> Iterator[None]:
            nonlocal hire
            with _files(resident, examples, numbers) as files:
                setup = _setup(recipe, resident, chosen, threads, files, trust_remote_code)
                given = [each for each in files.values() if each is not None]
                hire = pool.processes(WORKER, threads, setup, given, alike)
                with spread.at_work():
                    yield

        return spread.exchange._replace(at_work=at_work)

    return make


def _laid_out(parts: Mapping[str, Tensor]) -> tuple[dict[str, Rows], Tensor]:
    """The clients' rows after one another, and where each client's begin and end."""
    rows: dict[str, Rows] = {}
    end = 0
    for id, index in parts.items():
        rows[id] = end, end + index.numel()
        end += index.numel()
    return rows, torch.cat(list(parts.values())).to(torch.int64)


@contextmanager
def _files(
    resident: ResidentModel, examples: Examples, numbers: Tensor
) -> Iterator[dict[str, int | None]]:
    """Descriptors of what workers share."""
    files: dict[str, int | None] = {"examples": None, "weights": None}
    try:
        files["examples"] = pool.nameless(lambda path: store(examples, numbers, path))
        if resident.device.type == "cpu":
            with suppress(RuntimeError):  # parameters that lie in one another: each has its own
                files["weights"] = pool.nameless(lambda path: mapped.store(resident, path))
        yield files
    finally:
        for descriptor in files.values():
            if descriptor is not None:
                os.close(descriptor)


def _setup(
    recipe: Recipe,
    resident: ResidentModel,
    devices: tuple[str, ...],
    threads: int,
    files: Mapping[str, int | None],
    trust_remote_code: bool,
) -> Callable[[int], bytes]:
    def of(number: int) -> bytes:
        device = devices[number % len(devices)]
        paths = {n: None if d is None else str(pool.path_of(d)) for n, d in files.items()}
        if torch.device(device).type != "cpu":
            paths["weights"] = None
        return pack(_request(recipe, device, threads, paths, trust_remote_code))

    return of


def _request(
    recipe: Recipe, device: str, threads: int, files: Mapping[str, Any], trust_remote_code: bool
) -> Frame:
    """The first request to a worker. files: where `examples` and `weights` (or None) are there."""
    head = {"do": "setup", "device": device, "threads": threads, **files}
    head["trust_remote_code"] = trust_remote_code
    return Frame(head, recipes.dump(recipe, {}).encode())


def mark(resident: ResidentModel, start: Adapter) -> str:
    """Of all that two processes must have alike before one trains for the other."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(resident.digest).encode())
    for name, tensor in sorted(start.tensors.items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
