"""What layers draw: dropout, fresh weights.

They draw from torch's own generators, of which a process has one for each device. So they are
seeded for as long as something is drawn that is to be repeated, by one thread at a time (runs of a
notebook may take place in several), and left as they were.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ALONE = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch's generators begin at a seed, on the CPU and on `device`, while this is open."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with _ALONE, torch.random.fork_rng(devices=devices):
        if device is None or device.type == "cpu":
            # torch.manual_seed also writes down where it was called, for each kind of accelerator
            # that has not begun: as long as a small step.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield
