"""Many clients: what the server's side of a federation costs by clients, cohort and adapter.

    python benchmarks/scale.py [--only PART ...] [--json FILE]

Training is replaced by recorded updates: one real upload of each kind of client, really encoded,
is given back by the exchange whenever a client of that kind is asked. All else is the library's
own: cohorts, messages, decoding, checks, waiting, merging. All times are processor time, which
others on a machine disturb less than the clock. The parts:

    server      time a client, and the most that is alive in tensors at some replies and around the
                server's step, in adapters beyond the state before the round; FLASC with int8 both
                ways, down at 1/4, up at 1/4 and 1/16
    long        resident memory over 2,000 rounds of a tiny adapter
    start       from a recipe to a federation: 2 rows a client, a tiny BERT, each kind of partition
    checkpoint  time and size, without and with clients' memories
    flair       41,000 clients, 200 a round, a tiny adapter: a stretch of the 5,000 rounds, its logs
                and its last checkpoint; the whole is extrapolated
"""

import argparse
import csv
import gc
import json
import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method, View
from fedsieve.algebra.optim import Optimizer, Slots, sgd
from fedsieve.costs.dry_run import moved
from fedsieve.data.names import numbered
from fedsieve.engine.client import Reply, take_part
from fedsieve.engine.loop import Exchange, Federation, Progress, Receipt, begin, merged
from fedsieve.run import checkpoint, rundir
from fedsieve.run.checkpoint import Snapshot
from fedsieve.settings import Sampling
from fedsieve.train.local import Fit
from measured import alive

# Rank 16 on pairs of 384 x 384, as in MiniLM: 12 of them, and 268.
ADAPTERS = {"0.15 M": (12, 384), "3.3 M": (268, 384)}
TINY = (2, 16)
CLIENTS, COHORTS = (1_000, 10_000, 100_000), (10, 100, 1_000)
BUDGETS = (Budget(1.0, 0.25, 0.25), Budget(1.0, 0.25, 1 / 16))
FLAIR = {"clients": 41_000, "cohort": 200, "rounds": 5_000}


def adapter(pairs: int, side: int, rank: int = 16) -> Adapter:
    draws = torch.Generator().manual_seed(0)
    tensors = {}
    for number in range(pairs):
        tensors[f"m.{number:03d}.lora_A.weight"] = torch.randn(rank, side, generator=draws)
        tensors[f"m.{number:03d}.lora_B.weight"] = torch.randn(side, rank, generator=draws)
    return Adapter(layout_of(tensors, 1.0), dict(sorted(tensors.items())))


class Watch:
    """The most numbers in tensors that were alive when it looked, and what looking took."""

    def __init__(self) -> None:
        self.most, self.seconds = 0, 0.0

    def look(self) -> None:
        began = time.process_time()
        self.most = max(self.most, alive())
        self.seconds += time.process_time() - began

    def around(self) -> Optimizer:
        def step(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
            self.look()
            result = sgd().step(params, gradient, slots)
            self.look()
            return result

        return sgd()._replace(step=step)


def method(server: Optimizer | None = None) -> Method:
    return methods.load("flasc")(down_values="int8", up_values="int8", server=server or sgd())


def members(count: int) -> list[Client]:
    return [Client(id, 2, BUDGETS[n % len(BUDGETS)]) for n, id in enumerate(numbered(count))]


class Replayed:
    """Updates that were recorded, one of each budget."""

    def __init__(self, start: Adapter, watch: Watch | None = None) -> None:
        self._start, self._method, self._watch = start, method(), watch
        self._updates: dict[Budget, bytes] = {}
        self.bytes = 0

    def exchange(self) -> Exchange:
        return Exchange(self._carry, lambda merged: None)

    def _carry(self, messages: Iterable[tuple[Client, bytes]], key: Key) -> Iterator[Reply]:
        self.bytes = 0
        for number, (client, message) in enumerate(messages):
            if client.budget not in self._updates:
                self._record(client, message, key)
            if self._watch is not None and number in (0, 7, 99, 999):
                self._watch.look()
            update = self._updates[client.budget]
            self.bytes += len(update)
            yield Reply(client, update, None, 1.0, 1, 0.0, 0.0, 0.0, 0)

    def _record(self, client: Client, message: bytes, key: Key) -> None:
        def train(view: View, client: Client, key: Key) -> Fit:
            return Fit(moved(view, key), 1.0, 1, 0.0)

        own = key._replace(client=client.id)
        reply, _ = take_part(self._method, train, self._start, client, {}, own, message)
        assert reply.update is not None, reply.reason
        self._updates[client.budget] = reply.update


def memory_now() -> int:
    """Bytes of resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def set_up(
    start: Adapter, clients: list[Client], cohort: int, watch: Watch | None = None
) -> tuple[Federation, Replayed]:
    replayed = Replayed(start, watch)
    server = None if watch is None else watch.around()
    sampling = Sampling(size=cohort)
    return Federation(method(server), clients, sampling, 0, replayed.exchange()), replayed


def one(federation: Federation, progress: Progress) -> tuple[Progress, list[Receipt]]:
    half = merged(federation, progress)
    assert half.summary.dropped == 0, half.receipts[0].dropped
    return half.progress, half.receipts


def server(
    rounds: int, adapters: Sequence[str], counts: Sequence[int], cohorts: Sequence[int]
) -> list[dict[str, Any]]:
    rows = []
    for name in adapters:
        shape = ADAPTERS[name]
        for count in counts:
            clients = members(count)
            for cohort in cohorts:
                if cohort * shape[0] > 12_000 and count < max(CLIENTS):
                    continue  # minutes each: once
                start = adapter(*shape)
                watch = Watch()
                federation, replayed = set_up(start, clients, cohort, watch)
                _, progress = begin(federation, start)
                # A round of both kinds of clients records, and is not counted.
                two = Federation(method(), clients[:2], Sampling("all"), 0, replayed.exchange())
                progress, _ = one(two, progress)
                times, peaks = [], []
                for _ in range(rounds if cohort * shape[0] <= 12_000 else 1):
                    gc.collect()
                    before = alive()
                    watch.most, watch.seconds = 0, 0.0
                    began = time.process_time()
                    progress, _ = one(federation, progress)
                    times.append((time.process_time() - began - watch.seconds) / cohort)
                    peaks.append((watch.most - before) / start.layout.size)
                rows.append(
                    {
                        "adapter": name,
                        "clients": count,
                        "cohort": cohort,
                        "ms_a_client": [1000 * each for each in times],
                        "peak_adapters": max(peaks),
                        "waiting_mb": replayed.bytes / 1e6,
                    }
                )
                show(rows[-1])
    return rows


def long(rounds: int) -> list[dict[str, Any]]:
    start = adapter(*TINY)
    federation, _ = set_up(start, members(10_000), 10)
    _, progress = begin(federation, start)
    held, began = {}, time.process_time()
    for number in range(1, rounds + 1):
        progress, _ = one(federation, progress)
        if number % (rounds // 10) == 0:
            gc.collect()
            held[number] = memory_now() / 1e6
    rows = [{"rounds": rounds, "seconds": time.process_time() - began, "resident_mb": held}]
    show(rows[0])
    return rows


def start_times() -> list[dict[str, Any]]:
    from fedsieve.recipe import read as recipes
    from fedsieve.recipe.experiment import from_recipe

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_bert(Path(folder) / "bert")
        for count in CLIENTS:
            data = Path(folder) / f"{count}.csv"
            write_rows(data, 2 * count, count)
            kinds: dict[str, dict[str, Any]] = {
                "column": {"column": "author"},
                "iid": {"clients": count},
                "dirichlet": {"clients": count, "alpha": 1.0},
            }
            for kind, partition in kinds.items():
                recipe = recipes.check(table(model, data, {"kind": kind, **partition}))
                began = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # clients that drew no rows
                    made = from_recipe(recipe)
                seconds = time.process_time() - began
                with_rows = len(made.federation.clients)
                found = {"clients": count, "kind": kind, "with_rows": with_rows, "seconds": seconds}
                rows.append(found)
                show(found)
                del made
    return rows


def checkpoints() -> list[dict[str, Any]]:
    rows = []
    start = adapter(*TINY)
    state = method().init(start)
    for what, count in [("none", 0), *(("a residual each", count) for count in CLIENTS)]:
        tree = start.tensors
        memories = {
            id: {"left": {n: t + number for n, t in tree.items()}}
            for number, id in enumerate(numbered(count) if count else [])
        }
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            path = checkpoint.save(Path(folder), Snapshot(Progress(1, state), memories, {}))
            saved = time.process_time()
            checkpoint.load(Path(folder), start.layout)
            row = {
                "memories": what,
                "clients": count,
                "numbers_a_client": start.layout.size,
                "seconds": saved - began,
                "seconds_to_load": time.process_time() - saved,
                "mb": path.stat().st_size / 1e6,
            }
        rows.append(row)
        show(row)
    return rows


def flair(rounds: int) -> list[dict[str, Any]]:
    start = adapter(*TINY)
    federation, _ = set_up(start, members(FLAIR["clients"]), FLAIR["cohort"])
    _, progress = begin(federation, start)
    drawn: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times: list[float] = []
        for _ in range(rounds):
            began = time.process_time()
            progress, receipts = one(federation, progress)
            rundir.append(folder, rundir.CLIENTS, receipts)
            times.append(time.process_time() - began)
            drawn |= {receipt.client for receipt in receipts}
        log = (folder / rundir.CLIENTS).stat().st_size
        path = checkpoint.save(folder / "checkpoints", Snapshot(progress, {}, {}))
        kept = path.stat().st_size
    third = max(1, rounds // 3)
    mean = sum(times) / rounds
    row = {
        **FLAIR,
        "rounds_run": rounds,
        "clients_drawn": len(drawn),
        "seconds_a_round": mean,
        "first_third": sum(times[:third]) / third,
        "last_third": sum(times[-third:]) / third,
        "log_bytes_a_client": log / rounds / FLAIR["cohort"],
        "checkpoint_mb": kept / 1e6,
        "extrapolated_hours": mean * FLAIR["rounds"] / 3600,
        "extrapolated_log_mb": log / rounds * FLAIR["rounds"] / 1e6,
    }
    show(row)
    return [row]


def table(model: Path, data: Path, partition: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "scale",
        "rounds": 1,
        "cohort": 10,
        "device": "cpu",
        "model": {"source": str(model)},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["query", "value"]},
        "data": {"train": str(data), "text": "text", "label": "label", "max_length": 16},
        "partition": partition,
        "budgets": {"kind": "tiers", "tiers": 3},
        "method": {"name": "fslora"},
        "training": {"precision": "fp32"},
    }


def write_rows(path: Path, count: int, clients: int) -> None:
    draws = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "author"])
        for number in range(count):
            text = " ".join(f"w{draws.randrange(50)}" for _ in range(8))
            out.writerow([text, f"l{draws.randrange(5)}", f"a{number % clients}"])


def tiny_bert(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(50))]
    known = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    known.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, unk_token="[UNK]", pad_token="[PAD]"
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def show(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
        "server": lambda given: server(given.repeats, given.adapters, given.clients, given.cohorts),
        "long": lambda given: long(given.long),
        "start": lambda given: start_times(),
        "checkpoint": lambda given: checkpoints(),
        "flair": lambda given: flair(given.flair),
    }
    parser.add_argument("--only", nargs="+", choices=[*parts], default=[*parts])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapters", nargs="+", choices=[*ADAPTERS], default=[*ADAPTERS])
    parser.add_argument("--clients", nargs="+", type=int, default=CLIENTS)
    parser.add_argument("--cohorts", nargs="+", type=int, default=COHORTS)
    parser.add_argument("--long", type=int, default=2_000)
    parser.add_argument("--flair", type=int, default=300)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {torch.get_num_threads()} threads, seed 0")
    found = {part: parts[part](given) for part in given.only}
    if given.json:
        told = {"machine": machine, "threads": torch.get_num_threads(), **found}
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
