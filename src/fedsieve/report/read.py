"""Reading run directories: files on disk to the few values that a report shows.

A run may still be going on, or may have been killed, so a last line that was cut is left out and
clients of a round that has not finished are not counted. Any other damage is refused: a report
that quietly skips lines would show sums that are wrong.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsieve.clients.network import Part
from fedsieve.disk import is_gone, objects, refuse_link
from fedsieve.engine.shares import Shares
from fedsieve.errors import FedSieveError, count, quoted, reason
from fedsieve.recipe import read as recipes
from fedsieve.report import shown
from fedsieve.report.shown import Shown

# Where a run has no message with masks, or was made before shares were told.
UNTOLD: Shares = (None, None, None)
LARGEST = 1e100  # of a score or a loss
LONGEST_TIME = 1e12  # seconds: thirty thousand years


class Round(NamedTuple):
    """One line of metrics.jsonl. Round 0 is the model before training."""

    round: int
    down_bytes: int
    up_bytes: int
    total_bytes: int  # since the start, both ways
    dense_bytes: int | None  # since the start, what dense float32 LoRA would have sent
    loss: float
    seconds: float
    metrics: Mapping[str, float]  # the task's own, the leading one first; empty without evaluation
    eval_loss: float | None
    eval_examples: int | None
    dropped: int
    down_kept: Shares = UNTOLD
    up_kept: Shares = UNTOLD
    starved: int = 0  # clients that got nothing of B
    clients: int = 0  # that were asked
    epsilon: float | None = None  # spent so far, in private runs
    compute_seconds: float | None = None  # of all clients together; so too in encode and decode:
    wire_seconds: float | None = None
    evaluation_seconds: float | None = None
    transport_bytes: int | None = None  # of all messages of a federation, headers of Flower's too


class Budget(NamedTuple):
    """What the clients of one budget sent: means over their client-rounds."""

    label: str
    client_rounds: int
    down_bytes: float
    up_bytes: float
    down_kept: Shares = UNTOLD
    up_kept: Shares = UNTOLD


class OfClient(NamedTuple):
    """One client over the rounds that asked it; budget, rows and loss as they were told last."""

    name: str
    budget: str
    asked: int
    merged: int
    rows: int | None
    down_bytes: int
    up_bytes: int
    seconds: float  # of its work, as measured
    loss: float | None


class Clients(NamedTuple):
    """clients.jsonl, summed up, and the parts that the network model needs."""

    distinct: int
    merged: int  # updates that reached the server and were used
    dropped: dict[str, int]  # reason -> how often
    budgets: tuple[Budget, ...]  # the dearest first
    parts: dict[int, list[Part]]  # round -> its clients; every round of metrics.jsonl is there
    memory_bytes: int | None  # the most that a client needed, where the log tells
    each: tuple[OfClient, ...] = ()  # who sent and got most first


class Run(NamedTuple):
    path: Path
    name: str
    method: str
    recipe: dict[str, Any]
    recipe_text: str
    start: Round | None  # round 0, where it was evaluated
    rounds: tuple[Round, ...]  # at least one
    clients: Clients | None  # None where there is no clients.jsonl
    notes: tuple[str, ...]  # what the reader should be warned of
    shown: Shown | None = None  # of the last evaluation, where it is kept


LOSS = "eval_loss"  # the one measure that is better when it is lower
MOST = 100  # metrics of a round
SHOWN_REASONS = 3  # why updates were dropped, in the warning; the summary has more
_METRIC = re.compile(r"[a-z0-9_]{1,40}")


class Evaluation(NamedTuple):
    round: int
    total_bytes: int
    value: float


def evaluations(run: Run, measure: str) -> list[Evaluation]:
    """The rounds in which `measure`, "eval_loss" or a metric, was taken; round 0 included."""
    rows = (run.start, *run.rounds) if run.start else run.rounds
    values = ((row, row.eval_loss if measure == LOSS else row.metrics.get(measure)) for row in rows)
    return [Evaluation(row.round, row.total_bytes, v) for row, v in values if v is not None]


def best(found: Sequence[Evaluation], measure: str) -> Evaluation | None:
    """The best evaluation, the earliest of equals; None where all are NaN or infinite."""
    finite = [e for e in found if math.isfinite(e.value)]
    if measure != LOSS:
        return max(finite, key=lambda e: e.value, default=None)
    return min(finite, key=lambda e: e.value, default=None)


def load_all(paths: Sequence[Path]) -> list[Run]:
    """Load runs and name them apart: by recipe, else by directory, else by path as given."""
    distinct = list({path.resolve(): path for path in paths}.values())
    if not distinct:
        raise FedSieveError("No run directory was given: name at least one.")
    runs = [load(path) for path in distinct]
    for names in (
        [run.name for run in runs],
        [run.path.resolve().name for run in runs],
        [str(run.path) for run in runs],
    ):
        if len(set(names)) == len(runs):
            break
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]


def load(path: Path) -> Run:
    """Read one run directory.

    Raises FedSieveError where `path` is not a run directory, where no round has finished, or
    where a file is damaged elsewhere than in its last line. Warns of damage that leaves something
    to show, which is among the notes too.
    """
    if not path.is_dir():
        raise FedSieveError(f"{path} is not a run directory: there is no such directory.")
    for name in ("recipe.toml", "metrics.jsonl", "clients.jsonl"):
        refuse_link(path / name)
    missing = [name for name in ("recipe.toml", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        raise FedSieveError(f"{path} is not a run directory: it has no {' and no '.join(missing)}.")
    try:
        text = recipes.text_of(path / "recipe.toml")
    except (OSError, ValueError) as error:
        raise FedSieveError(f"{path / 'recipe.toml'} cannot be read: {reason(error)}") from error
    recipe = recipes.toml(text, str(path / "recipe.toml"))

    # What the run itself said while it was set up, such as clients without data.
    environment = recipe.get("environment")
    said = environment.pop("notes", []) if isinstance(environment, dict) else []
    notes = [str(note) for note in said] if isinstance(said, list) else []
    damage: list[str] = []
    method = recipe.get("method")
    if not isinstance(method, dict):
        damage.append("recipe.toml names no method: it is not as a run leaves it.")
    rows = _rounds(path / "metrics.jsonl", damage)
    start, rounds = (rows[0], rows[1:]) if rows and rows[0].round == 0 else (None, rows)
    if not rounds:
        raise FedSieveError(
            f"{path} has no finished round yet: metrics.jsonl holds none. Wait for the first "
            "round, or see with `fedsieve resume` why the run stopped."
        )
    clients = None
    if (path / "clients.jsonl").is_file():
        clients = _clients(path / "clients.jsonl", rounds, notes, damage)
    else:
        without = "There is no clients.jsonl: nothing can be said about single clients."
        # The server of one that protects real clients keeps it elsewhere.
        private = recipe.get("privacy")
        kept = isinstance(private, dict) and private.get("noise_from") == "system"
        (notes if kept else damage).append(without)
    damage += _missing(rounds)
    for what in damage:
        warnings.warn(f"{path}: {what}", stacklevel=2)
    notes += [*damage, *_doubts(recipe, rounds, clients.dropped if clients else {})]
    return Run(
        path,
        str(recipe.get("name") or path.resolve().name),
        str(method.get("name", "unnamed")) if isinstance(method, dict) else "unnamed",
        recipe,
        text,
        start,
        tuple(rounds),
        clients,
        tuple(notes),
        shown.load(path),
    )


def _missing(rounds: list[Round]) -> list[str]:
    told, last = sum(_both_ways(row) for row in rounds), rounds[-1]
    if told == last.total_bytes:
        return []
    return [
        f"The rounds add up to {told:,} bytes, but the last total_bytes is "
        f"{last.total_bytes:,}: metrics.jsonl lacks rounds or counts other bytes."
    ]


def _doubts(recipe: dict[str, Any], rounds: list[Round], reasons: Mapping[str, int]) -> list[str]:
    """What a careful reader would want to know before trusting the numbers."""
    doubts = []
    last, planned = rounds[-1], recipe.get("rounds")
    if isinstance(planned, int) and last.round < planned:
        doubts.append(f"{last.round} of {planned} rounds are done: the run goes on or was stopped.")
    if all(not row.metrics and row.eval_loss is None for row in rounds):
        doubts.append("No round was evaluated: there is neither a score nor an evaluation loss.")
    counts = {row.round: row.eval_examples for row in rounds if row.eval_examples is not None}
    most = max(counts.values(), default=0)
    if fewer := [number for number, found in counts.items() if found < most]:
        doubts.append(
            f"In {len(fewer)} of {count(len(counts), 'evaluated round')} (first {fewer[0]}, last "
            f"{fewer[-1]}) fewer rows were evaluated, {counts[fewer[0]]:,} of {most:,} in round "
            f"{fewer[0]}: not all sites answered, and these scores are of the others."
        )
    if starved := [row.round for row in rounds if row.starved and row.round > 1]:
        doubts.append(
            f"In {len(starved)} of {count(len(rounds), 'round')} (first {starved[0]}, last "
            f"{starved[-1]}) the masks let nothing of B pass down to some clients: they began "
            "these rounds with B at zero, whatever was learned of it (docs/methods.md, What a "
            "mask may hide)."
        )
    unknown = [row.round for row in rounds if not math.isfinite(row.loss) and row.epsilon is None]
    if unknown:
        doubts.append(
            f"The training loss of {count(len(unknown), 'round')} (first {unknown[0]}) is no "
            "number: training diverged, or no client's update came."
        )
    if dropped := sum(row.dropped for row in rounds):
        why = [f"{n:,} times {quoted(reason)}" for reason, n in [*reasons.items()][:SHOWN_REASONS]]
        if len(reasons) > SHOWN_REASONS:
            why.append(f"{len(reasons) - SHOWN_REASONS} other reasons")
        said = f": {', '.join(why)}" if why else ""
        doubts.append(f"{count(dropped, 'client update')} dropped{said}.")
    return doubts


def rounds(path: Path) -> list[Round]:
    """The whole lines of a metrics.jsonl, round 0 too. Raises FedSieveError as `load` does."""
    return _rounds(path, [])


def check_logs(metrics: Path, clients: Path, marks: Mapping[str, int], last: int) -> None:
    """Read what a checkpoint knows of a run's logs, as the report will at the end of the run.

    marks: file name -> the bytes of it that are read; last: the round that they end with
    Raises FedSieveError, naming file and line, for damage of any kind.
    """
    for log in (metrics, clients):
        if not log.is_file():
            raise is_gone(log)
    rows = _rounds(metrics, [], marks.get(metrics.name, 0))
    found = rows[-1].round if rows else None
    if found != last:
        raise FedSieveError(
            f"{metrics}: its lines end with round {found} where the checkpoint ends with {last}: "
            "it has lost lines, or is of another run"
        )
    _clients(clients, rows, [], [], marks.get(clients.name, 0))


def _rounds(path: Path, damage: list[str], until: int | None = None) -> list[Round]:
    rounds: list[Round] = []
    for number, row in objects(path, until):
        if row is None:
            damage.append(f"The last line of {path.name} was cut and is left out.")
            continue
        where = f"{path}, line {number}"
        # The card adds up what a checkpoint counts on. Before the first round nothing is sent, and
        # a run of old does not say so.
        counted = until is not None and row.get("round") != 0
        loss = _real(row, "loss", where)
        new = Round(
            round=_integer(row, "round", where),
            down_bytes=_sent(row, "down_bytes", where, counted),
            up_bytes=_sent(row, "up_bytes", where, counted),
            total_bytes=_integer(row, "total_bytes", where),
            dense_bytes=_optional_integer(row, "dense_bytes", where),
            loss=math.nan if loss is None else loss,
            seconds=_time(row, where) or 0.0,
            metrics=_metrics(row, where),
            eval_loss=_real(row, "eval_loss", where),
            eval_examples=_optional_integer(row, "eval_examples", where),
            dropped=_optional_integer(row, "dropped", where) or 0,
            down_kept=_shares(row, "down", where),
            up_kept=_shares(row, "up", where),
            starved=_optional_integer(row, "starved", where) or 0,
            clients=_optional_integer(row, "clients", where) or 0,
            epsilon=_real(row, "epsilon", where),
            compute_seconds=_time(row, where, "compute_seconds"),
            wire_seconds=_time(row, where, "wire_seconds"),
            evaluation_seconds=_time(row, where, "evaluation_seconds"),
            transport_bytes=_transport(row, where),
        )
        if rounds and new.round <= rounds[-1].round:
            raise FedSieveError(
                f"{where}: round {new.round} comes after round {rounds[-1].round}. "
                "Two runs seem to have written into one directory."
            )
        rounds.append(new)
    return rounds


def _clients(
    path: Path,
    rounds: Sequence[Round],
    notes: list[str],
    damage: list[str],
    until: int | None = None,
) -> Clients:
    latest = 0
    last: dict[str, int] = {}  # its round so far
    each: dict[str, OfClient] = {}
    dropped: Counter[str] = Counter()
    sums: dict[str, list[int]] = {}  # label -> client-rounds, down, up
    kept: dict[str, tuple[_Mean, ...]] = {}  # label -> of A, B and head, down and then up
    parts: dict[int, list[Part]] = {row.round: [] for row in rounds}
    memory: int | None = None
    untimed = 0
    for number, row in objects(path, until):
        if row is None:
            damage.append(f"The last line of {path.name} was cut and is left out.")
            continue
        where = f"{path}, line {number}"
        at = _integer(row, "round", where)
        if at > rounds[-1].round:
            continue
        down = _integer(row, "down_bytes", where)
        reason, client = row.get("dropped"), row.get("client")
        if not isinstance(client, str):
            raise FedSieveError(f"{where}: 'client' is {repr(client)[:80]}, not a client's name.")
        before = each.get(client) or OfClient(client, "", 0, 0, None, 0, 0, 0.0, None)
        client = before.name  # one text of each client, and not of each of its rounds
        if at < latest:
            raise FedSieveError(
                f"{where}: round {at} comes after round {latest}. Two runs seem to have written "
                "into one directory."
            )
        latest = at
        if last.get(client) == at:
            raise FedSieveError(f"{where}: client {quoted(client)} is there twice in round {at}")
        last[client] = at
        up = _optional_integer(row, "up_bytes", where) or 0
        seconds = _time(row, where)
        steps = _optional_integer(row, "steps", where) or 0
        needs = _optional_integer(row, "memory_bytes", where)
        untimed += seconds is None
        if needs is not None:
            memory = max(memory or 0, needs)
        if reason:
            dropped[str(reason)] += 1
        label = str(row.get("budget") or "all clients")
        shares = (*_shares(row, "down", where), *_shares(row, "up", where))
        if label not in kept:
            kept[label] = _means()
        for mean, share in zip(kept[label], shares, strict=True):
            mean.add(share)
        total = sums.setdefault(label, [0, 0, 0])
        total[0] += 1
        total[1] += down
        total[2] += up
        rows = _optional_integer(row, "examples", where)
        loss = _real(row, "loss", where)
        each[client] = OfClient(
            client,
            label,
            before.asked + 1,
            before.merged + (not reason),
            before.rows if rows is None else rows,
            before.down_bytes + down,
            before.up_bytes + up,
            before.seconds + (seconds or 0.0),
            before.loss if loss is None else loss,
        )
        parts.setdefault(at, []).append(Part(client, down, up, seconds or 0.0, steps, not reason))
    if untimed:
        notes.append(
            f"clients.jsonl lacks the seconds of {count(untimed, 'client-round')}: simulated time "
            "counts their transfer alone."
        )
    strange = [row.round for row in rounds if _traffic(parts[row.round]) != _both_ways(row)]
    if strange:
        damage.append(
            "clients.jsonl and metrics.jsonl count different bytes in "
            f"{count(len(strange), 'round')}, first in round {strange[0]}: simulated time is that "
            "of the clients in clients.jsonl."
        )
    budgets = [
        Budget(label, n, down / n, up / n, _taken(kept[label][:3]), _taken(kept[label][3:]))
        for label, (n, down, up) in sums.items()
    ]
    budgets.sort(key=dearest_first)
    merged = sum(part.merged for row in parts.values() for part in row)
    told = sorted(each.values(), key=lambda one: (-one.down_bytes - one.up_bytes, one.name))
    return Clients(
        len(each),
        merged,
        dict(dropped.most_common()),
        tuple(budgets),
        parts,
        memory,
        tuple(told),
    )


class _Mean:
    """A mean that holds no list of what it is of."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.sum += value
            self.count += 1


def _means() -> tuple[_Mean, ...]:
    return tuple(_Mean() for _ in range(6))


def _taken(means: Sequence[_Mean]) -> Shares:
    a, b, head = (mean.sum / mean.count if mean.count else None for mean in means)
    return a, b, head


def mean_shares(messages: Iterable[Shares]) -> Shares:
    """The mean of each of the three over the messages that tell it."""
    a, b, head = (
        [share for share in part if share is not None] for part in zip(*messages, strict=True)
    )
    means = [sum(found) / len(found) if found else None for found in (a, b, head)]
    return means[0], means[1], means[2]


def dearest_first(budget: Budget) -> tuple[float, str]:
    """The order in which budgets are shown."""
    return -budget.down_bytes - budget.up_bytes, budget.label


def _traffic(parts: Sequence[Part]) -> int:
    return sum(part.down_bytes + part.up_bytes for part in parts)


def _both_ways(row: Round) -> int:
    return row.down_bytes + row.up_bytes


def _shares(row: dict[str, Any], way: str, where: str) -> Shares:
    """What messages of this way kept of A, B and head. Raises FedSieveError for no shares."""
    found = [_real(row, f"{way}_{part}", where) for part in ("a", "b", "head")]
    for share in found:
        if share is not None and not 0 <= share <= 1:
            raise FedSieveError(f"{where}: {way}_a, {way}_b or {way}_head is {share}, no share.")
    return found[0], found[1], found[2]


def _integer(row: dict[str, Any], key: str, where: str) -> int:
    value = _optional_integer(row, key, where)
    if value is None:
        raise FedSieveError(f"{where}: there is no {key!r}.")
    return value


def _optional_integer(row: dict[str, Any], key: str, where: str) -> int | None:
    value = row.get(key)
    if value is None or (type(value) is int and value >= 0):
        return value
    raise FedSieveError(f"{where}: {key!r} is {repr(value)[:80]}, not a whole number from 0 up.")


def _sent(row: dict[str, Any], key: str, where: str, counted: bool) -> int:
    """Bytes of a round; those that it does not tell are none, where they are not counted on."""
    return _integer(row, key, where) if counted else _optional_integer(row, key, where) or 0


def _metrics(row: dict[str, Any], where: str) -> dict[str, float]:
    """The scores of an evaluation. Those of 0.2 and before were accuracies only."""
    told = row.get("metrics")
    if told is None:
        accuracy = _real(row, "accuracy", where)
        return {} if accuracy is None else {"accuracy": accuracy}
    if not isinstance(told, dict) or len(told) > MOST or not all(map(_METRIC.fullmatch, told)):
        raise FedSieveError(f"{where}: 'metrics' is {repr(told)[:80]}, not a table of numbers.")
    found = {name: _real(told, name, where) for name in told}
    return {name: math.nan if value is None else value for name, value in found.items()}


def _time(row: dict[str, Any], where: str, key: str = "seconds") -> float | None:
    seconds = _real(row, key, where)
    if seconds is not None and not 0 <= seconds <= LONGEST_TIME:
        raise FedSieveError(f"{where}: {key!r} is {seconds}, not a time.")
    return seconds


def _transport(row: dict[str, Any], where: str) -> int | None:
    """Of the round's own messages and of those between rounds."""
    parts = [_optional_integer(row, key, where) for key in ("transport_bytes", "aside_bytes")]
    return None if parts == [None, None] else sum(part or 0 for part in parts)


def _real(row: dict[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    # Far beyond what a model that has diverged gives, and far below what sums of it can hold.
    if value is None or (type(value) in (int, float) and not LARGEST < abs(value) < math.inf):
        return value
    raise FedSieveError(
        f"{where}: {key!r} is {repr(value)[:80]}, not a number from -{LARGEST:g} to {LARGEST:g}."
    )
