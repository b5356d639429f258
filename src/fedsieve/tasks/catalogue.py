"""The tasks that there are: each file of this package that ends in a `TASK`.

Listing them, and telling a misspelt one, takes no torch: their files are looked at, not run.
"""

import importlib
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedsieve.errors import FedSieveError, nearest, quoted

if TYPE_CHECKING:
    from fedsieve.tasks.task import Task


@cache
def names() -> tuple[str, ...]:
    """The tasks by name: that of the file, with hyphens."""
    folders = map(Path, sys.modules[__package__].__path__)
    files = (path for folder in folders for path in folder.glob("*.py"))
    ours = (path for path in files if re.search(r"^TASK\b", path.read_text("utf-8"), re.MULTILINE))
    return tuple(sorted(path.stem.replace("_", "-") for path in ours))


def known(name: str) -> str:
    """The name itself. Raises FedSieveError, with the nearest, where no task is called so."""
    if name not in names():
        raise FedSieveError(f"there is no task {quoted(name)}{nearest(name, names())}")
    return name


def load(name: str) -> "Task":
    """A task by its name. Raises FedSieveError where there is none."""
    task: Task = importlib.import_module(f"{__package__}.{known(name).replace('-', '_')}").TASK
    return task
