"""In the place of TensorFlow, of which FLASC's published script needs the log alone.

Each scalar becomes a line of JSON in `log.jsonl` of the run's folder: name, step, value and the
second at which it was told.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class _Writer:
    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "log.jsonl"

    def as_default(self) -> "_Writer":
        return self

    def __enter__(self) -> None:
        _writers.append(self)

    def __exit__(self, *error: object) -> None:
        _writers.pop()


_writers: list[_Writer] = []


def _scalar(name: str, value: Any, step: int) -> None:
    line = json.dumps({"name": name, "step": step, "value": float(value), "at": time.monotonic()})
    with _writers[-1].path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


config = SimpleNamespace(set_visible_devices=lambda devices, device_type: None)
summary = SimpleNamespace(create_file_writer=_Writer, scalar=_scalar)
