"""The workers that a recipe's [engine] asks for, and what they are told of the recipe."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Client
from fedsieve.algebra.method import Memory
from fedsieve.data.partition import Partition
from fedsieve.engine import on_ray, pool
from fedsieve.engine.loop import Exchange
from fedsieve.engine.request import Rows
from fedsieve.engine.spread import Spread, Worker
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
MOST_A_CORE = 4  # processes: more only wait for each other, and each holds a model


def check(recipe: Recipe) -> None:
    """Raises FedSieveError for an engine that is not to be had here, before anything is loaded."""
    for device in recipe.engine.devices or ():
        if recipe.engine.kind == "processes":
            try:
                pick_device(device)
            except FedSieveError as error:
                raise FedSieveError(f"engine.devices: {error}") from None
    workers, most = recipe.engine.workers, MOST_A_CORE * (os.cpu_count() or 1)
    asked = 0 if workers == "auto" else min(workers, recipe.cohort)
    if recipe.engine.kind == "processes" and asked > most:
        raise FedSieveError(
            f"engine.workers: {asked} processes, each with a model, on a machine of "
            f"{os.cpu_count()} cores: at most {most} are started"
        )
    if recipe.engine.kind == "ray":
        on_ray.check(recipe.engine.address)


def counts(engine: schema.Engine, device: str, cohort: int) -> tuple[int, int]:
    """How many workers, and how many threads each has. device: the recipe's, picked"""
    cores = torch.get_num_threads()  # what OMP_NUM_THREADS leaves to this process
    devices = engine.devices or (device,)
    if engine.workers != "auto":
        workers = min(cohort, engine.workers)
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
    parts: Partition,
    source: str,
    *,
    trust_remote_code: bool = False,
) -> Callable[[dict[str, Memory]], Exchange] | None:
    """What makes an exchange of the clients' memories, by the recipe's [engine]; None trains here.

    recipe: settled; examples: of all clients; parts: which of them are whose
    source: where the model is: a folder, or a name of the hub
    """
    if recipe.engine.kind == "process":
        return None
    rows, numbers = _laid_out(parts)
    alike = mark(resident, resident.adapter())
    told = _Told(recipe, resident, examples, numbers, source, trust_remote_code, alike)
    staff = _processes if recipe.engine.kind == "processes" else _actors

    def make(memories: dict[str, Memory]) -> Exchange:
        spread = Spread(rows, memories, work(recipe.training))
        return spread.exchange(partial(staff, told, spread))

    return make


class _Told(NamedTuple):
    """What workers are to have; see `engine`.

    numbers: of the clients' rows, one after another
    mark:    of the model with its first adapter
    """

    recipe: Recipe
    resident: ResidentModel
    examples: Examples
    numbers: Tensor
    source: str
    trust_remote_code: bool
    mark: str

    def request(self, device: str, threads: int, **files: Any) -> bytes:
        """The first request to a worker. files: where `examples`, `weights` and `model` are there,
        for whichever is not None
        """
        head = {"do": "setup", "device": device, "threads": threads, **files}
        head["trust_remote_code"] = self.trust_remote_code
        return pack(Frame(head, recipes.dump(self.recipe, {}).encode()))


@contextmanager
def _processes(told: _Told, spread: Spread) -> Iterator[None]:
    asked, own = told.recipe.engine, str(told.resident.device)
    workers, threads = counts(asked, own, told.recipe.cohort)
    devices = asked.devices or (own,)
    with _files(told.resident, told.examples, told.numbers) as files:
        paths = {n: None if d is None else str(pool.path_of(d)) for n, d in files.items()}

        def setup(number: int) -> bytes:
            device = devices[number % len(devices)]
            on_cpu = torch.device(device).type == "cpu"
            weights = paths["weights"] if on_cpu else None
            return told.request(
                device, threads, examples=paths["examples"], weights=weights, model=None
            )

        given = [each for each in files.values() if each is not None]
        hire = pool.processes(WORKER, threads, setup, given, told.mark)
        with spread.at_work(hire, workers):
            yield


@contextmanager
def _actors(told: _Told, spread: Spread) -> Iterator[None]:
    asked, folder = told.recipe.engine, Path(told.source)
    with on_ray.connected(asked.address) as ray, TemporaryDirectory(prefix="fedsieve-") as own:
        device = (asked.devices or (told.recipe.device,))[0]
        gpu = torch.device(device).type == "cuda" if device != "auto" else on_ray.has_gpu(ray)
        threads = asked.threads or 1
        most = on_ray.room(ray, gpu=gpu, threads=threads)
        workers = min(told.recipe.cohort, most if asked.workers == "auto" else asked.workers)
        if not workers:
            raise FedSieveError(
                f"engine: the Ray cluster has no {'GPU' if gpu else 'CPU'} for a worker"
            )
        store(told.examples, told.numbers, Path(own) / "examples")
        files = {"examples": on_ray.stored(ray, Path(own) / "examples")}
        sizes = _sizes(folder) if folder.is_dir() else None
        for name in sizes or ():
            files[f"model/{name}"] = on_ray.stored(ray, folder / name)
        request = partial(
            told.request, "cuda" if gpu else "cpu", threads, examples="examples", weights=None
        )
        there = request(model=None if sizes is None else str(folder.resolve()))
        setups, own_mark = (there, request(model="model")), told.mark
        model = None if sizes is None else (str(folder.resolve()), sizes)

        def hire(number: int) -> Worker:
            return on_ray.OnRay(
                ray, number, WORKER, setups, own_mark, files, model, gpu=gpu, threads=threads
            )

        with spread.at_work(hire, workers):
            yield


def _sizes(folder: Path) -> dict[str, int]:
    """The files of a model's folder, less those that no model of ours is read from, in bytes."""
    return {
        path.name: path.stat().st_size
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in _UNREAD
    }


_UNREAD = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt"}


def _laid_out(parts: Partition) -> tuple[dict[str, Rows], Tensor]:
    """Where each client's rows begin and end, and all of them, one after another."""
    ends = parts.offsets.tolist()
    rows = {id: (ends[n], ends[n + 1]) for n, id in enumerate(parts.ids)}
    return rows, torch.from_numpy(parts.rows).to(torch.int64)


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


def mark(resident: ResidentModel, start: Adapter) -> str:
    """Of all that two processes must have alike before one trains for the other."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(resident.digest).encode())
    for name, tensor in sorted(start.tensors.items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
