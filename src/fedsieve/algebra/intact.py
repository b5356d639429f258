"""Whether what a function was given is afterwards what it was.

Methods are pure functions over values that others hold too: a state that one of them changes in
place is another model for all that come after, and by how often it was called. Torch counts the
changes of each tensor, so nothing is copied or compared.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

from torch import Tensor

from fedsieve.errors import ChangedInPlace, FedSieveError

# A tensor's name, the tensor, and how often it was changed so far.
Version = tuple[str, Tensor, int]
_A_COPY = "work on a copy: t * mask, t.clone(), a dictionary of one's own"


def ours(function: Any) -> bool:
    """Whether it is one of FedSieve's own, at which nobody need look.

    What is wrapped (`functools.wraps`) takes over the module's name: a function has globals of its
    own then, and an object none.
    """
    made = function.func if isinstance(function, partial) else function
    written = getattr(made, "__globals__", {}).get("__name__")
    names = (getattr(made, "__module__", None), written)
    return all(str(name).startswith("fedsieve.") for name in names)


def versions(value: Any, name: str = "") -> Iterator[Version]:
    """The tensors in records, lists and dictionaries, however deep."""
    if isinstance(value, Tensor):
        # Of what was made in inference mode torch counts nothing.
        yield name, value, 0 if value.is_inference() else value._version
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from versions(each, str(key))
    elif isinstance(value, tuple | list):
        for field, each in zip(getattr(value, "_fields", repeat(name)), value, strict=False):
            yield from versions(each, field)


@contextmanager
def left_intact(
    given: Any, said: str, error: type[FedSieveError] = ChangedInPlace
) -> Iterator[None]:
    """Raises `error` where what is done meanwhile changes a tensor of what it was given.

    said: who does it, with which the message begins
    """
    before = list(versions(given))
    yield
    if (tensor := changed(before, given)) is not None:
        raise error(f"{said} changed {tensor!r} in place, which it was given: {_A_COPY}")


def changed(before: list[Version], value: Any) -> str | None:
    """The name of a tensor that was changed, exchanged, added or taken out since, or None.

    before: what `versions` told of the value
    """
    after = list(versions(value))
    there, then = (Counter(name for name, _, _ in each) for each in (after, before))
    for name in (there - then) | (then - there):
        return name
    for (name, was, count), (_, now, counted) in zip(before, after, strict=True):
        if was is not now or count != counted:
            return name
    return None
