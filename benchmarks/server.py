"""What the server holds while it merges the updates of many clients, in adapters.

    python benchmarks/server.py [--clients 1000] [--json FILE]

For each method that averages: updates of unequal clients are decoded from their bytes and merged as
they come, and all tensors that are alive are counted when one was decoded, when it was added, and
around the server's step, beside the server's state as it was before the round. The unit is one
adapter of full rank. FlexLoRA is there with its stack cut to the server's rank (`most`); FLoRA,
FLoRIST and FedEx-LoRA add the product of all clients to the base, and raFLoRA and LoRA-FAIR need
all factors to weigh any, so what they hold grows with the ranks that come in: the table has them at
a tenth of the clients.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedsieve import methods
from fedsieve.algebra.adapter import Adapter, Tree, layout_of
from fedsieve.algebra.budget import Budget, Client
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import ClientContext, Method, State
from fedsieve.algebra.optim import Slots, sgd
from fedsieve.algebra.payload import Payload
from fedsieve.wire import decode, encode
from measured import alive

RANK, SIDE, LAYERS = 16, 384, 4
BUDGETS = (Budget(0.25, 0.25, 1 / 16), Budget(0.5, 0.25, 1 / 4), Budget(), Budget(0.75, 1, 1 / 4))
STACKING = ("raflora", "flora", "florist", "fedex_lora", "lora_fair")
OPTIONS: dict[str, dict[str, Any]] = {"flexlora": {"most": RANK}}


def start() -> Adapter:
    draws = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"m.{layer}.lora_A.weight"] = torch.randn(RANK, SIDE, generator=draws)
        tensors[f"m.{layer}.lora_B.weight"] = torch.randn(SIDE, RANK, generator=draws)
    tensors["m.head.weight"] = torch.randn(20, SIDE, generator=draws)
    return Adapter(layout_of(tensors, 1.0), dict(sorted(tensors.items())))


def messages(method: Method, state: State, count: int) -> list[tuple[Client, bytes, Payload]]:
    """One upload a kind of client, really encoded, and the payload that its client had got."""
    made = []
    plan = method.plan(state, Key(0, 1))
    for number in range(min(count, 8)):
        client = Client(f"{number:05d}", 10 + number, BUDGETS[number % len(BUDGETS)])
        context = ClientContext(client, start(), Key(0, 1, client.id))
        sent = method.publish(plan, client, context.key)
        view, memory = method.view(sent, {}, context)
        trained = {n: t + 0.01 * torch.randn_like(t) for n, t in view.adapter.tensors.items()}
        trained |= {n: view.adapter.tensors[n] for n in trained if n not in view.moves.names}
        report, _ = method.report(view, trained, memory, context)
        made.append((client, encode(report), sent))
    return made


def measure(name: str, count: int) -> dict[str, Any]:
    adapter = start()
    peak, before = 0, 0

    def look() -> None:
        nonlocal peak
        peak = max(peak, alive() - before)

    def watched(params: Tree, gradient: Tree, slots: Slots) -> tuple[Tree, Slots]:
        look()
        result = sgd().step(params, gradient, slots)
        look()
        return result

    server = sgd()._replace(step=watched)
    method = methods.load(name)(server=server, **OPTIONS.get(name, {}))
    state = method.init(adapter)
    made = messages(method, state, count)
    gc.collect()
    before = alive()

    def updates() -> Iterator[tuple[Client, Payload]]:
        for number in range(count):
            client, message, sent = made[number % len(made)]
            payload = decode(message, adapter.layout, sent.support)
            some = number % max(1, count // 40) == 0 or number > count - 8
            if some:
                look()
            yield client._replace(id=f"{number:05d}"), payload
            del payload
            if some:
                look()

    began = time.perf_counter()
    method.merge(state, updates(), Key(0, 1))
    seconds = time.perf_counter() - began
    return {
        "method": name,
        "clients": count,
        "adapters": peak / adapter.layout.size,
        "seconds": seconds,
    }


def run(clients: int) -> list[dict[str, Any]]:
    rows = []
    for name in methods.names():
        if name in ("full", "head"):
            continue  # FedIT over another tree
        counts = (clients // 10,) if name in STACKING else (clients // 10, clients)
        rows += [measure(name, count) for count in counts]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = run(given.clients)
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, torch {torch.__version__}, {threads} threads, seed 0")
    print(f"{'method':<16}{'clients':>9}{'adapters held':>16}{'merge':>10}")
    for row in rows:
        print(
            f"{row['method']:<16}{row['clients']:>9}{row['adapters']:>16.2f}"
            f"{row['seconds']:>8.2f} s"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
