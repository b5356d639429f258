"""Clients spread over workers: who trains which, in what order, and what happens when one dies.

A worker is a process of this machine (pool.py) or an actor of a cluster (on_ray.py). Either takes a
request's bytes and gives an answer's, and may end at any moment. The clients with most to do go
first, each to the first worker that is free; their replies go on as they come, and the round loop
puts them in order. Beside the messages that are being worked on one is made ahead.

A worker that ends is named, and a new one takes its place, so many times a round. Its client runs
again elsewhere, from the same message and memory, so nothing of the result depends on it; one whose
worker ends twice is dropped from the round by name.
"""

import math
import queue
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Memory
from fedsieve.engine.client import Reply
from fedsieve.engine.held import Held
from fedsieve.engine.loop import Exchange
from fedsieve.engine.request import Rows, reply_of, request
from fedsieve.errors import FedSieveError

MOST_DEATHS = 8  # of workers, in one round
TRIES = 2  # of a client whose worker ends


class Gone(Exception):
    """A worker ended before it answered, or there is no place for one; says how."""


class Worker(Protocol):
    """Who trains clients, one at a time.

    begin: returns once it takes requests; raises Gone, and FedSieveError for what no other worker
           of the kind could do either
    ask: a request -> its answer; raises Gone
    end: at once, whatever it does; a `begin` or an `ask` that waits raises Gone

    `begin` and `ask` are called in a thread of their own.
    """

    @property
    def name(self) -> str: ...
    def begin(self) -> None: ...
    def ask(self, request: bytes) -> bytes: ...
    def end(self) -> None: ...


# The number of a worker -> one that is to begin.
Hire = Callable[[int], Worker]


class _Job(NamedTuple):
    client: Client
    request: bytes


class _Event(NamedTuple):
    """A worker that is ready (no job), or an answer, or what went wrong."""

    worker: Worker
    job: _Job | None
    outcome: bytes | Exception


class Spread:
    """An exchange over workers.

    rows:     of each client, by id
    memories: what each client keeps between rounds, by id
    work:     how much a client has to do, in any unit
    """

    def __init__(
        self,
        rows: Mapping[str, Rows],
        memories: dict[str, Memory],
        work: Callable[[Client], tuple[float, ...]],
    ) -> None:
        self._rows, self._memories, self._work = rows, memories, work
        self._fresh: dict[str, Memory] = {}
        self._held = Held(memories.values())
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._idle: list[Worker] = []
        self._busy: dict[int, Worker] = {}
        self._starting: dict[int, Worker] = {}
        self._hired = 0
        self._hire: Hire | None = None  # while the workers are there
        self._count = 0

    def exchange(self, at_work: Callable[[], AbstractContextManager[object]]) -> Exchange:
        """What the round loop needs of the workers. at_work: opens this one's `at_work`"""
        return Exchange(self.carry, self.settle, self.order, at_work)

    def order(self, chosen: Sequence[Client]) -> Sequence[Client]:
        """Longest first; among equals as they were drawn."""
        return sorted(chosen, key=self._work, reverse=True)

    def settle(self, merged: Collection[str]) -> None:
        """See `Exchange`."""
        self._memories.update({id: own for id, own in self._fresh.items() if id in merged})

    @contextmanager
    def at_work(self, hire: Hire, workers: int) -> Iterator[None]:
        """Start so many, which goes on beside whatever is done first, and end them."""
        self._hire, self._count = hire, workers
        try:
            self._start(workers)
            yield
        finally:
            self._hire = None
            for worker in [*self._idle, *self._busy.values(), *self._starting.values()]:
                worker.end()
            self._idle.clear()
            self._busy.clear()
            self._starting.clear()

    def carry(self, messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        """The round's messages to whoever is free, and the replies as they come.

        Raises FedSieveError where too many workers end, and as `reply_of` does.
        """
        if self._hire is None:
            raise RuntimeError("nobody is at work: `with exchange.at_work():` first")
        self._fresh.clear()
        jobs = (
            _Job(client, request(client, key, self._rows[client.id], self._kept(client), message))
            for client, message in messages
        )
        ahead: deque[_Job] = deque()
        ended: Counter[str] = Counter()
        try:
            self._start(self._count - len(self._idle) - len(self._starting))
            while True:
                self._hand_out(ahead, jobs)
                if not ahead and not self._busy:
                    return
                event = self._next()
                if event.job is None:
                    self._take_in(event)
                    continue
                if self._busy.get(id(event.worker)) is not event.worker:
                    continue  # of a round that was broken off
                del self._busy[id(event.worker)]
                if isinstance(event.outcome, Gone):
                    ended[event.job.client.id] += 1
                    lost = self._lost(event.worker, event.job, event.outcome, ended, key.round)
                    if lost is None:
                        ahead.appendleft(event.job)
                    else:
                        yield lost
                    continue
                if isinstance(event.outcome, Exception):
                    raise event.outcome
                self._idle.append(event.worker)
                self._hand_out(ahead, jobs)
                yield self._came(event.job.client, key.round, event.outcome)
        finally:
            # Nobody waits for what they do, if the round was broken off.
            for worker in self._busy.values():
                worker.end()
            self._busy.clear()

    def _kept(self, client: Client) -> Memory:
        return self._memories.get(client.id, {})

    def _hand_out(self, ahead: "deque[_Job]", jobs: Iterator[_Job]) -> None:
        """Give whoever is free something to do, and have one more at hand."""
        while True:
            if not ahead and (job := next(jobs, None)) is not None:
                ahead.append(job)
            if not ahead or not self._idle:
                return
            worker, job = self._idle.pop(), ahead.popleft()
            self._busy[id(worker)] = worker
            self._beside(self._ask, worker, job)

    def _ask(self, worker: Worker, job: _Job) -> None:
        try:
            outcome: bytes | Exception = worker.ask(job.request)
        except Exception as error:
            outcome = error
        self._events.put(_Event(worker, job, outcome))

    def _start(self, count: int) -> None:
        assert self._hire is not None
        for _ in range(count):
            worker = self._hire(self._hired)
            self._hired += 1
            self._starting[id(worker)] = worker
            self._beside(self._begin, worker)

    def _begin(self, worker: Worker) -> None:
        outcome: bytes | Exception = b""
        try:
            worker.begin()
        except Exception as error:
            outcome = error
        self._events.put(_Event(worker, None, outcome))

    def _beside(self, act: Callable[..., None], *given: object) -> None:
        threading.Thread(target=act, args=given, daemon=True).start()

    def _next(self) -> _Event:
        while True:
            try:
                # Not for ever: a signal that arrives just before the wait does not end it.
                return self._events.get(timeout=1.0)
            except queue.Empty:
                continue

    def _take_in(self, event: _Event) -> None:
        """A worker that is ready, or that could not be had: the others then go on without it."""
        if self._starting.get(id(event.worker)) is not event.worker:
            return  # of a run that has ended
        del self._starting[id(event.worker)]
        if not isinstance(event.outcome, Exception):
            self._idle.append(event.worker)
            return
        event.worker.end()
        if not isinstance(event.outcome, Gone):
            raise event.outcome
        said = f"{event.worker.name} {event.outcome} before it began"
        if not (self._idle or self._busy or self._starting):
            raise FedSieveError(
                f"{said}, and there is no other: lower engine.workers, or use engine.kind 'process'"
            ) from event.outcome
        warnings.warn(f"{said}: the others go on", stacklevel=3)

    def _lost(
        self, worker: Worker, job: _Job, how: Gone, ended: Counter[str], number: int
    ) -> Reply | None:
        """Name a worker that ended and put a new one in its place; the reply of a client that does
        not run again.
        """
        client = job.client
        worker.end()
        said = f"round {number}: {worker.name} {how} while client {client.id!r} trained"
        if ended.total() > MOST_DEATHS:
            raise FedSieveError(
                f"{said}, the {ended.total()}th worker that ended in this round: they may need "
                "more memory than there is: lower engine.workers or training.micro_batch"
            )
        again = ended[client.id] < TRIES
        then = "it runs again on another" if again else "it is dropped from the round"
        warnings.warn(f"{said}: {then}", stacklevel=3)
        self._start(1)
        if again:
            return None
        reason = f"its worker ended {TRIES} times: it {how}"
        return Reply(client, None, reason, math.nan, 0, 0.0, 0.0, 0.0, 0)

    def _came(self, client: Client, number: int, answer: bytes) -> Reply:
        reply, memory = reply_of(client, number, answer)
        memory = self._kept(client) if memory is None else memory
        if memory:
            self._fresh[client.id] = self._held.once(memory)
        return reply
