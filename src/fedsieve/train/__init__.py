"""Local fine-tuning: a resident base model, a client's adapter in it, and steps on its examples.

PEFT imports bitsandbytes wherever it is installed. That takes three seconds, and where the package
`kernels` is installed too it fetches a program from the hub and runs it. Here it is imported where
a base is quantised (quantise.py), and without that.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """PEFT takes bitsandbytes for not installed inside, unless it has been imported before."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        if (found := sys.modules.get("peft.import_utils")) is not None:
            # It remembers what it saw.
            found.is_bnb_available.cache_clear()
            found.is_bnb_4bit_available.cache_clear()


if importlib.util.find_spec("bitsandbytes") is not None:
    with without_bitsandbytes():
        import peft  # noqa: F401
