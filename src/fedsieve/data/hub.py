"""Hugging Face's hub, asked only where it can be reached, which is found out soon.

Its own client tries five times, with pauses, for each file: half a minute and more for a name that
was mistyped on a machine without a network. So before a name is looked up, one connection is tried;
if that fails, the hub's cache on this machine is all that is looked at.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 3.0  # for a connection
_KEPT = 60.0  # seconds: as long, what was found is taken to hold
_found: dict[str, tuple[float, bool]] = {}


@contextmanager
def asked(name: str) -> Iterator[None]:
    """Around a lookup of a name: of what is no path, at the hub or in its cache alone."""
    import datasets

    if constants.HF_HUB_OFFLINE or Path(name).exists() or reachable():
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


def places() -> str:
    """Where a name was looked up, as the end of a sentence."""
    host, alone = urlsplit(constants.ENDPOINT).hostname, f"cache ({constants.HF_HUB_CACHE}) alone"
    if not reachable():
        return f"in the hub's {alone}, as the hub ({host}) cannot be reached from here"
    if constants.HF_HUB_OFFLINE:
        return f"in the hub's {alone}, as HF_HUB_OFFLINE is set"
    return f"at the hub ({host})"


def reachable() -> bool:
    """Whether a connection to the hub can be made. Behind a proxy nobody knows before."""
    place = urlsplit(constants.ENDPOINT)
    if {place.scheme, "all"} & getproxies().keys():
        return True
    when, known = _found.get(constants.ENDPOINT, (-_KEPT, False))
    if time.monotonic() - when < _KEPT:
        return known
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), SECONDS).close()
        known = True
    except OSError:
        known = False
    _found[constants.ENDPOINT] = time.monotonic(), known
    return known
