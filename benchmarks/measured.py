"""What several benchmarks say of the machine, and of its memory."""

import gc
import platform

import torch


def machine(device: torch.device) -> str:
    """In the words of a table: what computed, with how many threads, by which torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def alive() -> int:
    """Numbers of 4 bytes in all tensors that are alive; storages that are shared count once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) // 4
