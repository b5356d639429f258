"""The round loop, the same for every engine.

An engine is an `Exchange`: it carries messages to clients and brings their replies, in any order,
and is told whose updates were merged. What came is sorted here as the cohort was drawn before any
of it is added up: a sum of floats depends on its order.
Everything else of a round is here: the cohort, publishing, decoding, merging, counting, evaluating.
Messages are made as the engine asks for them; what becomes of the updates that come back is in
arrivals.py.

A round has two halves. `merged` ends with the server's new state, which nobody has seen yet;
`evaluated` gives it out for the first time. Where the state holds noise that could not be drawn
again, whoever keeps runs makes it durable in between (`rounds`, hold).
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from fedsieve.algebra.adapter import Adapter, Layout
from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, State
from fedsieve.algebra.payload import Payload, digest, rounded
from fedsieve.algebra.support import Support, everything
from fedsieve.clients.privacy import PrivacyPlan
from fedsieve.clients.sampling import cohort, cohort_of, counting, in_order
from fedsieve.engine import arrivals
from fedsieve.engine.arrivals import Waiting, waiting_room
from fedsieve.engine.client import Reply
from fedsieve.engine.kept import Kept, kept, starves_b
from fedsieve.errors import FedSieveError, NoUsableUpdate, WireError
from fedsieve.settings import Sampling
from fedsieve.tasks.tally import Score
from fedsieve.wire import decode, encode, encode_for

SHARES = tuple(f"{way}_{part}" for way in ("down", "up") for part in Kept._fields)


def as_drawn(chosen: Sequence[Client]) -> Sequence[Client]:
    """One order is as good as another."""
    return chosen


class Exchange(NamedTuple):
    """Who carries the bytes of a round.

    carry:  (messages to clients, the round's key) -> their replies, in any order
    settle: told, once a round is through, the ids of the clients whose updates were merged. Only
            their memories move on: a round that was broken off leaves no trace, and a client that
            was late or refused holds what the server believes it to hold.
    order:  a cohort -> the order in which its messages are best made
    at_work: while this context is open, whoever does the work is there
    usable: told after each reply how many of the round's updates could be merged by now. With
            over-selection a round closes at so many of these: what is refused takes nobody's place
    """

    carry: Callable[[Iterable[tuple[Client, bytes]], Key], Iterator[Reply]]
    settle: Callable[[Collection[str]], None]
    order: Callable[[Sequence[Client]], Sequence[Client]] = as_drawn
    at_work: Callable[[], AbstractContextManager[object]] = nullcontext
    usable: Callable[[int], None] = lambda count: None


class Progress(NamedTuple):
    """Where a federation stands after some rounds: all that the next round depends on.

    total_bytes: payload bytes so far, both ways
    dense_bytes: what dense float32 LoRA at the server's rank would have sent for the same messages;
                 0 where no LoRA fits the model
    """

    round: int
    state: State
    total_bytes: int = 0
    dense_bytes: int = 0


class Receipt(NamedTuple):
    """One client's part in one round, as clients.jsonl keeps it. Times in seconds.

    compute: in forward, backward and optimizer step; wire: in decode and encode, at the client
    memory_bytes: of adapter, gradients, optimizer state, and what the client keeps between rounds
    dropped: why the update was not merged, or None
    transport_bytes: of the messages that carried both payloads, where a network did
    norm: of the decoded update, where server.norm_bound or server.clip bounds it; None in private
        runs
    epsilon: of private runs whose clients are drawn: what this client has spent in the rounds that
        it was drawn in, against those who know which these were
    down_a, down_b, down_head, up_a, up_b, up_head: which share of its entries of A, of B and of all
        other tensors a masked message carries (kept.py); None where a message has no masks, and up
        where the clients' updates are private
    digest: of what the update says (payload.digest), where clients are on other machines
    """

    round: int
    client: str
    budget: str
    rank: int
    down_density: float
    up_density: float
    examples: int
    steps: int
    loss: float | None
    down_bytes: int
    up_bytes: int
    seconds: float
    compute: float
    wire: float
    memory_bytes: int
    dropped: str | None
    transport_bytes: int | None = None
    norm: float | None = None
    epsilon: float | None = None
    down_a: float | None = None
    down_b: float | None = None
    down_head: float | None = None
    up_a: float | None = None
    up_b: float | None = None
    up_head: float | None = None
    digest: str | None = None


class Round(NamedTuple):
    """One round, as metrics.jsonl keeps it. Bytes are payload bytes, times are in seconds.

    wire_seconds: in encode and decode, at both ends
    loss: mean training loss of the clients that were merged, weighted by their steps; withheld in
        private runs whose noise is fresh, as no noise covers it
    accuracy, eval_loss, eval_examples: None in rounds without an evaluation; a loss that is not
        finite is None too. Where tokens are what is counted, eval_examples are tokens.
    metrics: the task's own, by name, the leading one first (tasks/task.py); None as above
    epsilon: spent up to and with this round, where updates are made private; where there is a
        simulated_cohort, it is that of the simulated federation (see privacy.py)
    epsilon_unamplified: the same against those who know who took part when, for the client that was
        drawn most often; None where that changes nothing
    clip: where it is by now, if it follows the updates' norms (privacy.quantile)
    transport_bytes: of the messages that carried the payloads, where a network did
    aside_bytes: of the other messages since the last round: sites met, recipes told, evaluation
    down_a, ..., up_head: means over the receipts that have them
    starved: clients whose download's masks let pass nothing of B, though something of A or of the
        head; None where no B travelled under masks
    """

    round: int
    loss: float | None
    down_bytes: int
    up_bytes: int
    total_bytes: int
    dense_bytes: int
    clients: int
    dropped: int
    seconds: float
    compute_seconds: float
    evaluation_seconds: float
    wire_seconds: float
    accuracy: float | None
    eval_loss: float | None
    eval_examples: int | None
    epsilon: float | None = None
    simulated_cohort: int | None = None
    transport_bytes: int | None = None
    aside_bytes: int | None = None
    epsilon_unamplified: float | None = None
    clip: float | None = None
    down_a: float | None = None
    down_b: float | None = None
    down_head: float | None = None
    up_a: float | None = None
    up_b: float | None = None
    up_head: float | None = None
    starved: int | None = None
    metrics: dict[str, float | None] | None = None


class Unevaluated(NamedTuple):
    """A round that is merged and has not left the server.

    summary: without evaluation; due: whether one is to come
    """

    summary: Round
    receipts: list[Receipt]
    progress: Progress
    due: bool


@dataclass(frozen=True)
class Federation:
    """What stays the same over the rounds.

    seed: of what clients do (the order of their examples, dropout), which they know
    secret: of what the server does (cohorts, sketches, rounding), where clients must not know it;
        None takes `seed`
    evaluate: may give None where nobody could be asked
    there: who can be drawn now, where clients come and go; None where they do not
    aside: bytes of the messages beside the rounds' own since it was last asked, on a network
    before: (client, digest of what its update says, round) -> an earlier round in which it said the
        same, where clients are on other machines and old messages may come again
    norm_bound: an update whose L2 norm is so many times the median of its round's is left out. Not
        in private runs, whose clip bounds every update by itself
    spare: so many rounds in a row may end without an update that can be merged: their clients are
        dropped by name, and the state stays. Not in private runs, nor where there is a quorum
    dense: the layout of dense LoRA at the server's rank, which all bytes are compared with; None
           where the method trains just that. An empty one compares with nothing
    """

    method: Method
    clients: Sequence[Client]
    sampling: Sampling
    seed: int
    exchange: Exchange
    evaluate: Callable[[Adapter], Score | None] | None = None
    evaluate_every: int = 1
    privacy: PrivacyPlan | None = None
    there: Callable[[], Sequence[Client]] | None = None
    aside: Callable[[], int] | None = None
    dense: Layout | None = None
    secret: int | None = None
    norm_bound: float = math.inf
    before: Callable[[str, str, int], int | None] | None = None
    spare: int = 0

    def own_key(self, number: int) -> Key:
        """The server's own key of a round."""
        return Key(self.seed if self.secret is None else self.secret, number)

    def evaluates(self, number: int, last: int | None) -> bool:
        """Whether a round ends with an evaluation: each so many, and the `last`."""
        return number == last or number % self.evaluate_every == 0

    @cached_property
    def ordered(self) -> Sequence[Client]:
        """The clients in order of id."""
        return in_order(self.clients)

    @cached_property
    def drawn(self) -> Callable[[int], Mapping[str, int]]:
        """Rounds -> how often each client was drawn, where nobody comes and goes."""
        return counting(self.clients, self.sampling, self.own_key(0).seed)


def begin(federation: Federation, adapter: Adapter) -> tuple[Round, Progress]:
    """Round 0: the adapter before any training, evaluated; nothing is sent."""
    progress = Progress(0, federation.method.init(adapter))
    score, seconds = _evaluate(federation, progress.state)
    first = Round(0, None, 0, 0, 0, 0, 0, 0, seconds, 0.0, seconds, 0.0, None, None, None)
    return first._replace(**_figures(score)._asdict(), aside_bytes=_aside(federation)), progress


def rounds(
    federation: Federation,
    progress: Progress,
    last: int,
    *,
    unevaluated: Unevaluated | None = None,
    hold: Callable[[Unevaluated], None] = lambda merged: None,
    lost: int = 0,
) -> Iterator[tuple[Round, list[Receipt], Progress]]:
    """The rounds after `progress`, up to round `last`.

    unevaluated: the round of `progress`, where it was stopped between its halves: it is given first
    hold: called between the halves of each round, before anything of it leaves
    lost: how many rounds up to `progress` ended without an update, one after another
    Raises NoUsableUpdate from a round in which no client returned an update, or fewer than the
    quorum did, if none is to spare; the progress before it is the last one that was given.
    """
    if unevaluated is not None:
        yield evaluated(federation, unevaluated), unevaluated.receipts, progress
    while progress.round < last:
        spare = lost < federation.spare
        half = merged(federation, progress, last=last, spare=spare)
        hold(half)
        progress = half.progress
        lost = lost + 1 if 0 < half.summary.clients == half.summary.dropped else 0
        yield evaluated(federation, half), half.receipts, progress


def merged(
    federation: Federation, progress: Progress, *, last: int | None = None, spare: bool = False
) -> Unevaluated:
    """One round up to the server's new state.

    last: the round that is evaluated in any case; spare: whether it may end without an update
    Raises NoUsableUpdate as `rounds` does.
    """
    start = time.perf_counter()
    method, state = federation.method, progress.state
    spare = spare and method.private is None and not federation.sampling.quorum
    number = progress.round + 1
    own = federation.own_key(number)
    if federation.there is None:
        chosen = cohort_of(federation.ordered, federation.sampling, own)
    else:
        chosen = cohort(federation.there(), federation.sampling, own)
    if len(chosen) < federation.sampling.quorum:
        chosen = []  # nobody is asked in vain; the round is no other when it is done again
    with waiting_room(state.layout) as waiting:
        came = _gather(federation, state, chosen, number, waiting)
        left_out = arrivals.outliers(waiting.norms, norm_bound(federation))
        came_in = waiting.norms.keys() - left_out.keys()
        usable = [client.id for client in chosen if client.id in came_in]
        try:
            # A draw may be empty. Only a private server moves then: whether it was is a secret.
            if chosen or method.private is not None:
                _refuse_too_few(len(usable), federation.sampling)
                state, failed = arrivals.merge(method, state, waiting, usable, own)
                left_out |= failed
                _refuse_too_few(len(usable) - len(failed), federation.sampling)
        except NoUsableUpdate as error:
            if not spare:
                receipts = _without(came.receipts, left_out)
                raise NoUsableUpdate(f"{error} ({_why(receipts)})") from error
            state = progress.state
            left_out = dict.fromkeys(usable, f"its round was lost: {error}") | left_out
    receipts = _without(came.receipts, left_out)
    known = _known(federation, number, [r.client for r in receipts])
    if known is not None:
        receipts = [r._replace(epsilon=known.of.get(r.client)) for r in receipts]
    taken = [r for r in receipts if r.dropped is None]
    federation.exchange.settle({r.client for r in taken})
    down = sum(r.down_bytes for r in receipts)
    up = sum(r.up_bytes for r in receipts)
    # Both ways, for the messages that were really sent.
    messages_sent = len(receipts) + sum(r.up_bytes > 0 for r in receipts)
    reference = state.layout if federation.dense is None else federation.dense
    dense = messages_sent * dense_bytes(reference)
    progress = Progress(
        number, state, progress.total_bytes + down + up, progress.dense_bytes + dense
    )
    told = [(r.loss, r.steps) for r in taken if r.loss is not None]
    steps = sum(own for _, own in told)
    loss = sum(own * of for own, of in told) / steps if steps else None
    summary = Round(
        round=number,
        loss=None if method.private == "system" else loss,
        down_bytes=down,
        up_bytes=up,
        total_bytes=progress.total_bytes,
        dense_bytes=progress.dense_bytes,
        clients=len(receipts),
        dropped=len(receipts) - len(taken),
        seconds=time.perf_counter() - start,
        compute_seconds=sum(r.compute for r in receipts),
        evaluation_seconds=0.0,
        wire_seconds=came.wire + sum(r.wire for r in receipts),
        **_figures(None)._asdict(),
        **_spent(federation.privacy, number)._asdict(),
        transport_bytes=_transport(receipts),
        epsilon_unamplified=None if known is None else known.most,
        clip=_moving_clip(federation, state),
        starved=came.starved if any(r.down_b is not None for r in receipts) else None,
        **_mean_shares(receipts),
    )
    return Unevaluated(summary, receipts, progress, federation.evaluates(number, last))


def evaluated(federation: Federation, half: Unevaluated) -> Round:
    """The second half of a round: its evaluation, where one is due."""
    summary = half.summary
    score, seconds = _evaluate(federation, half.progress.state) if half.due else (None, 0.0)
    return summary._replace(
        seconds=summary.seconds + seconds,
        evaluation_seconds=seconds,
        **_figures(score)._asdict(),
        aside_bytes=_aside(federation),
    )


class _Came(NamedTuple):
    """What came back of a round. wire: seconds in encode and decode, at the server; starved: as in
    `Round`
    """

    receipts: list[Receipt]
    wire: float
    starved: int


def _gather(
    federation: Federation, state: State, chosen: Sequence[Client], number: int, waiting: Waiting
) -> _Came:
    """Send the round's messages, and let every update that is what was asked wait for the merge."""
    method, own = federation.method, federation.own_key(number)
    plan = method.plan(state, own)
    bound = norm_bound(federation)
    told = method.private is None and min(method.clip(state), bound) < math.inf
    sent: dict[str, tuple[int, Support]] = {}
    receipts: list[Receipt] = []
    wire, starved = 0.0, 0

    def messages() -> Iterator[tuple[Client, bytes]]:
        nonlocal wire
        for client in federation.exchange.order(chosen):
            payload = method.publish(plan, client, own._replace(client=client.id))
            began = time.perf_counter()
            try:
                message = encode_for(payload)
            except WireError as error:  # a method of the user's own may give anything
                where = f"round {number}: what the method gives for client {client.id}"
                raise FedSieveError(f"{where} cannot be sent: {error}") from error
            wire += time.perf_counter() - began
            sent[client.id] = len(message), payload.support
            yield client, message

    for reply in federation.exchange.carry(messages(), Key(federation.seed, number)):
        down_bytes, support = sent.pop(reply.client.id)
        began = time.perf_counter()
        size, came, said, reason = None, None, None, reply.reason
        if reply.update is not None and reason is None:
            try:
                payload = decode(reply.update, state.layout, support)
                arrivals.check(method, state, payload, support, reply.client, own)
                said = _refuse_again(federation, reply.client, payload, number)
                size = waiting.add(reply.client, reply.update, payload, support)
                if method.private is None:  # a mask is made of the client's own numbers
                    came = kept(payload.support, state.layout)
            except WireError as error:
                reason = f"its update was refused: {error}"
        wire += time.perf_counter() - began
        starved += starves_b(support, state.layout)
        shares = {**_named("down", kept(support, state.layout)), **_named("up", came)}
        receipt = _receipt(number, state.layout.rank, reply, down_bytes, reason)
        size = size if told else None
        receipts.append(receipt._replace(norm=size, digest=said, **shares))
        if federation.sampling.extra:
            left_out = arrivals.outliers(waiting.norms, bound)
            federation.exchange.usable(len(waiting.norms) - len(left_out))
    place = {client.id: number for number, client in enumerate(chosen)}
    return _Came(sorted(receipts, key=lambda r: place[r.client]), wire, starved)


def norm_bound(federation: Federation) -> float:
    """What `arrivals.outliers` is given. A private run has a clip, and how large a client's update
    was is the client's secret.
    """
    return math.inf if federation.method.private is not None else federation.norm_bound


def _without(receipts: Sequence[Receipt], left_out: Mapping[str, str]) -> list[Receipt]:
    """The receipts, with the reasons that were found after all had come."""
    return [r._replace(dropped=left_out.get(r.client, r.dropped)) for r in receipts]


def _refuse_too_few(usable: int, sampling: Sampling) -> None:
    if usable < sampling.quorum:
        raise NoUsableUpdate(f"{usable} updates can be merged, and the quorum is {sampling.quorum}")


def _why(receipts: Sequence[Receipt]) -> str:
    """What the clients of a round ran into: it leaves no line in the logs, so the error says it."""
    dropped = [r for r in receipts if r.dropped is not None]
    shown = [f"client {r.client}: {r.dropped}" for r in dropped[:3]]
    more = [f"{len(dropped) - 3} more"] if len(dropped) > 3 else []
    return "; ".join(shown + more) or f"{len(receipts)} clients were asked"


def _refuse_again(
    federation: Federation, client: Client, payload: Payload, number: int
) -> str | None:
    """The digest of what an update says, where that is noted.

    Raises WireError for one that said the same in another round; one that changes nothing may.
    """
    if federation.before is None:
        return None
    said = digest(payload)
    first = federation.before(client.id, said, number)
    if first is not None and payload.values.data.any():
        raise WireError(f"it says the same as that of round {first}, number for number")
    return said


def dense_bytes(layout: Layout) -> int:
    """The length of one message with a whole adapter in float32, encoded; 0 for an empty one.

    Floats are sent as they are: the length is the same for all numbers, so zeros do.
    """
    if not layout.size:
        return 0
    support = everything(layout)
    values = rounded(torch.zeros(layout.size), "float32", torch.Generator())
    return len(encode(Payload(layout, support, values, "known", "known")))


class _Figures(NamedTuple):
    accuracy: float | None
    eval_loss: float | None
    eval_examples: int | None
    metrics: dict[str, float | None] | None


def _figures(score: Score | None) -> _Figures:
    if score is None:
        return _Figures(None, None, None, None)
    metrics = {name: _finite(value) for name, value in score.metrics.items()}
    return _Figures(metrics.get("accuracy"), _finite(score.loss), score.counted, metrics)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Spent(NamedTuple):
    epsilon: float | None
    simulated_cohort: int | None


def _spent(plan: PrivacyPlan | None, rounds: int) -> _Spent:
    if plan is None:
        return _Spent(None, None)
    return _Spent(plan.spent(rounds) if plan.spent else None, plan.simulated_cohort)


def _moving_clip(federation: Federation, state: State) -> float | None:
    """Noise of its own covers it, and is paid for."""
    plan = federation.privacy
    return None if plan is None or plan.adaptive is None else federation.method.clip(state)


class _Known(NamedTuple):
    """Epsilon against those who know who took part when: of the clients that were asked for, by id,
    and the most that any client has spent.
    """

    of: dict[str, float]
    most: float


def _known(federation: Federation, number: int, ids: Sequence[str]) -> _Known | None:
    """None where that is not asked."""
    plan = federation.privacy
    if plan is None or plan.known is None:
        return None
    counts = federation.drawn(number)
    return _Known(
        {id: plan.known(counts[id]) for id in ids if id in counts},
        max(map(plan.known, set(counts.values())), default=0.0),
    )


def _named(way: Literal["down", "up"], shares: Kept | None) -> dict[str, Any]:
    """Shares under the names that receipts and rounds have for this way."""
    return {f"{way}_{part}": share for part, share in (shares or Kept())._asdict().items()}


def _mean_shares(receipts: Sequence[Receipt]) -> dict[str, Any]:
    means = {}
    for name in SHARES:
        found = [share for r in receipts if (share := getattr(r, name)) is not None]
        means[name] = sum(found) / len(found) if found else None
    return means


def _transport(receipts: Sequence[Receipt]) -> int | None:
    carried = [r.transport_bytes for r in receipts if r.transport_bytes is not None]
    return sum(carried) if carried else None


def _aside(federation: Federation) -> int | None:
    return None if federation.aside is None else federation.aside()


def _evaluate(federation: Federation, state: State) -> tuple[Score | None, float]:
    if federation.evaluate is None:
        return None, 0.0
    start = time.perf_counter()
    score = federation.evaluate(federation.method.export(state))
    return score, time.perf_counter() - start


def _receipt(number: int, rank: int, reply: Reply, down_bytes: int, dropped: str | None) -> Receipt:
    client, budget = reply.client, reply.client.budget
    kept = budget.ranks(rank) if rank else 0
    return Receipt(
        round=number,
        client=client.id,
        budget=f"rank {kept}, down {budget.down:g}, up {budget.up:g}",
        rank=kept,
        down_density=budget.down,
        up_density=budget.up,
        examples=client.examples,
        steps=reply.steps,
        loss=reply.loss if math.isfinite(reply.loss) else None,
        down_bytes=down_bytes,
        up_bytes=0 if reply.update is None else len(reply.update),
        seconds=reply.seconds,
        compute=reply.compute,
        wire=reply.wire,
        memory_bytes=reply.memory,
        dropped=dropped,
        transport_bytes=reply.transport,
    )
