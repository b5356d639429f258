"""What is hostile, in long forms: bytes for the decoder, updates for the methods, connections.

    python benchmarks/hostile.py messages [--n 100000] [--seed 0] [--json FILE]
    python benchmarks/hostile.py updates [--n 100] [--seed 0]
    python benchmarks/hostile.py sockets [--n 64]

messages    Each trial takes a true message of one of many kinds, changes it (bits, bytes, ranges,
            sizes, pieces of other messages, or everything behind the head) and mends the checksum,
            so that the bytes reach the inner code. The decoder may refuse with WireError. What it
            accepts must fit the layout, hold only finite numbers, and encode to the same bytes.
updates     n runs of two rounds for each row of the table of laws, in which one of four clients
            sends payloads of any names, ranks, masks, form and size (tests/hostile): the others
            must be merged, and the state be as if that client had sent nothing.
sockets     n connections to a worker's socket that promise a body of 100 MB, send 8 MB of it and
            stop, and n that say nothing: how long others wait, and the worker's peak memory.

Anything else than what must be is a failure: the script says what, and exits with code 1.
"""

import argparse
import contextlib
import json
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from zlib import crc32

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedsieve.algebra.adapter import Layout, Tree, layout_of
from fedsieve.algebra.payload import Form, Payload, Seed, rounded
from fedsieve.algebra.support import Support, cut, draw_ranks, gather, top_k
from fedsieve.errors import WireError
from fedsieve.frame import Frame
from fedsieve.sites import worker
from fedsieve.wire import decode, encode

# The parts, and how many of what each takes if nothing is said.
PARTS = {"messages": 100_000, "updates": 100, "sockets": 64}
FORMS: tuple[Form, ...] = ("float64", "float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile bytes, updates and connections.")
    parser.add_argument("part", nargs="?", default="messages", choices=PARTS)
    parser.add_argument("--n", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the numbers of messages")
    args = parser.parse_args()
    args.n = PARTS[args.part] if args.n is None else args.n
    {"messages": messages, "updates": updates, "sockets": sockets}[args.part](args)


def updates(args: argparse.Namespace) -> None:
    """Random payloads of one client, against every method."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.hostile.test_updates import endure
    from tests.methods.test_laws import ROWS

    torch.set_num_threads(1)
    start = time.perf_counter()
    for row in track(ROWS, description="updates", console=Console(stderr=True)):
        draws = random.Random(f"{args.seed} {row}")
        for _ in range(args.n):
            endure(row, draws)
    seconds = time.perf_counter() - start
    print(
        f"{args.n * len(ROWS)} runs over {len(ROWS)} rows of methods: no failure ({seconds:.0f} s)"
    )


def sockets(args: argparse.Namespace) -> None:
    """Connections that do not go on, and what others and the worker's memory have of them."""
    with tempfile.TemporaryDirectory(prefix="fs") as home:
        serving = subprocess.Popen([sys.executable, "-c", SERVE, home], stdout=subprocess.PIPE)
        try:
            assert serving.stdout is not None
            serving.stdout.readline()
            address = Path(home) / worker.SOCKET
            before = peak_of(serving.pid)
            head = b'{"do": "train", "length": 100000000}'
            begun = len(head).to_bytes(4, "big") + head + bytes(8 << 20)
            with contextlib.ExitStack() as opened:
                for data in [begun] * args.n + [b""] * args.n:
                    each = opened.enter_context(socket.socket(socket.AF_UNIX))
                    each.settimeout(0.2)
                    each.connect(str(address))
                    with contextlib.suppress(OSError):
                        each.sendall(data)
                waits = [waited(address, Frame({"do": do})) for do in ("describe", "train")]
            grown = peak_of(serving.pid) - before
        finally:
            serving.terminate()
            serving.wait(20)
    print(f"{args.n} unfinished bodies of 100 MB and {args.n} silent connections:")
    print(f"  describe after {waits[0]:.2f} s, a request after {waits[1]:.2f} s")
    print(f"  the worker's peak memory grew by {grown / 1024:.0f} MiB")


# A worker whose requests are echoed: what is measured is its socket.
SERVE = """
import sys
from pathlib import Path
from fedsieve.sites import worker
from fedsieve.frame import Frame
worker.serve(
    Path(sys.argv[1]),
    lambda request: Frame({"ok": True}),
    lambda request: Frame({"ok": True}) if request.header["do"] == "describe" else None,
    lambda address: print("ready", flush=True),
)
"""


def waited(address: Path, request: Frame) -> float:
    start = time.perf_counter()
    worker.ask(address, request, 120)
    return time.perf_counter() - start


def peak_of(process: int) -> int:
    """The largest resident size of a process so far, in KiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def messages(args: argparse.Namespace) -> None:
    """Hostile bytes given to the decoder, with the checksum mended after each change."""
    torch.set_num_threads(1)

    tree = small_tree()
    layout = layout_of(tree, 1.0)
    true = true_messages(tree, layout)
    for data in true:
        check(decode(data, layout), data)

    draws = random.Random(args.seed)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    # Python's and numpy's memory is traced on a part of the trials: tracing is slow.
    traced = max(1, args.n // 20)
    peak = traced_peak(true, layout, random.Random(args.seed + 1), traced)
    before = resident()
    start = time.perf_counter()
    for _ in track(range(args.n), description="hostile", console=Console(stderr=True)):
        data = hostile(draws, true)
        try:
            payload = decode(data, layout)
        except WireError as error:
            outcomes["refused"] += 1
            reasons[str(error).split(":")[0][:60]] += 1
            continue
        except Exception as error:  # the finding of this benchmark, if there is one
            raise SystemExit(f"FAILED: {type(error).__name__}: {error}\n{data.hex()}") from error
        check(payload, data)
        outcomes["accepted"] += 1
    numbers = {
        "messages": args.n,
        "accepted": outcomes["accepted"],
        "refused": outcomes["refused"],
        "other exceptions": 0,
        "seconds": round(time.perf_counter() - start, 1),
        "values in the layout": layout.size,
        "largest traced allocation of one decode, bytes": peak,
        "traced decodes": traced,
        "growth of resident memory, KiB": resident() - before,
    }
    show(numbers, reasons)
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def small_tree() -> Tree:
    """Two LoRA pairs of rank 4 and a head: small, so that trials are fast and changes bite."""
    draws = torch.Generator().manual_seed(0)
    shapes = {"head.bias": (5,), "head.weight": (5, 9)}
    for module in ("key", "query"):
        shapes[f"{module}.lora_A.weight"] = (4, 70)
        shapes[f"{module}.lora_B.weight"] = (6, 4)
    return {n: torch.randn(s, generator=draws).pow(3) for n, s in sorted(shapes.items())}


def true_messages(tree: Tree, layout: Layout) -> list[bytes]:
    """Messages of all forms that tell their ranks in all ways, with and without masks."""
    pairs, rank = len(layout.pairs), layout.rank
    lora = tuple(name for name in layout.names if "lora" in name)
    messages: list[bytes] = []
    for form in FORMS:
        for ranks, told in (
            (None, "known"),
            (None, "sent"),
            (torch.tensor([[1, 3]] * pairs), "sent"),
            (torch.tensor([[1, 3], [0, 3]]), "sent"),
            (draw_ranks(9, pairs, rank, 3, shared=True), Seed(9, True)),
            (draw_ranks(9, pairs, rank, 1, shared=False), Seed(9, False)),
        ):
            part = cut(tree, layout, ranks)
            for names, among, density in (
                (layout.names, layout.names, 1.0),
                (layout.names, layout.names, 0.25),
                (layout.names, lora, 0.1),
                (lora, lora, 0.5),
                (layout.names[:2], (), 1.0),
            ):
                support = Support(names, ranks, top_k(part, density, among))
                draws = torch.Generator().manual_seed(len(messages))
                values = rounded(gather(part, support), form, draws)
                payload = Payload(layout, support, values, told, "sent")  # type: ignore[arg-type]
                messages.append(encode(payload))
    return messages


def hostile(draws: random.Random, messages: list[bytes]) -> bytes:
    """A changed message whose checksum is right."""
    data = bytearray(draws.choice(messages)[:-4])
    kind = draws.randrange(8)
    place = draws.randrange(4, len(data))
    if kind == 0:
        for _ in range(draws.randint(1, 4)):
            at = draws.randrange(8 * len(data))
            data[at // 8] ^= 1 << at % 8
    elif kind == 1:
        for _ in range(draws.randint(1, 4)):
            data[draws.randrange(4, len(data))] = draws.choice((0, 1, 127, 128, 255, place & 255))
    elif kind == 2:
        del data[place : place + draws.randint(1, 8)]
    elif kind == 3:
        data[place:place] = draws.randbytes(draws.randint(1, 8))
    elif kind == 4:
        data[place : place + 4] = draws.choice((0, 1, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
    elif kind == 5:
        other = draws.choice(messages)[:-4]
        data[place:] = other[draws.randrange(len(other)) :]
    elif kind == 6:  # random symbols behind a true or nearly true head
        data[10:] = draws.randbytes(draws.randrange(64))
        data[4:6] = bytes((draws.randrange(5) | draws.randrange(6) << 4, draws.randrange(4)))
        if len(data) > 14:
            data[10:14] = draws.randrange(len(data) - 13).to_bytes(4, "little")
    else:  # the last coded bytes are the top of the stack: what is decoded first
        coded = max(14, len(data) - draws.randrange(1, 64))
        data[coded : coded + 4] = draws.randbytes(4)
    return bytes(data) + crc32(data).to_bytes(4, "little")


def check(payload: Payload, data: bytes) -> None:
    """Stop if an accepted payload does not fit its layout or has another message."""
    tree = payload.tree()  # fails if the values do not fit the support
    if any(not tensor.isfinite().all() for tensor in tree.values()):
        raise SystemExit(f"FAILED: a number that is not finite was let in\n{data.hex()}")
    if encode(payload) != data:
        raise SystemExit(f"FAILED: the payload has another message too\n{data.hex()}")


def traced_peak(messages: list[bytes], layout: Layout, draws: random.Random, n: int) -> int:
    """The most bytes that one decode held at a time, over n hostile messages."""
    trials = [hostile(draws, messages) for _ in range(n)]
    for data in trials:  # models are made once and kept: not the message's doing
        refuse_or_drop(data, layout)
    peak = 0
    tracemalloc.start()
    for data in trials:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        refuse_or_drop(data, layout)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return peak


def refuse_or_drop(data: bytes, layout: Layout) -> None:
    try:
        decode(data, layout)
    except WireError:
        return


def resident() -> int:
    """The largest resident size of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def show(numbers: dict[str, float], reasons: Counter[str]) -> None:
    table = Table(title="Hostile messages")
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, number in numbers.items():
        table.add_row(name, str(number))
    table.add_section()
    for reason, count in reasons.most_common(12):
        table.add_row(f"refused: {reason}", str(count))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
