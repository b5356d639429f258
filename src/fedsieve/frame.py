"""A request or an answer between processes: what it says, and the bytes that it is about.

    4 bytes        length of the header, big-endian
    header         a JSON object; its "length" is the length of the body
    body           bytes: a message of the wire format, a recipe's text, or nothing

A site's worker is asked by frames, and so are an engine's workers: nothing else crosses between
our processes, no pickle and no code. What comes in is read as if it came from an enemy. Needs no
torch: what only carries bytes starts at once.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedsieve.errors import WireError

HEADER = 1 << 16  # the longest header, in bytes
BODY = (1 << 31) - 1  # the longest body; what carries messages between machines takes no more
DEEPEST = 8  # tables and lists in one another, in a header


class Frame(NamedTuple):
    """A request or an answer: what it says, and the bytes that it is about."""

    header: Mapping[str, Any]
    body: bytes = b""


def pack(frame: Frame) -> bytes:
    """A frame as bytes. Raises WireError if it is too long or holds what JSON has no word for."""
    try:
        text = json.dumps({**frame.header, "length": len(frame.body)}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"a frame's header is not JSON: {error}") from error
    _check_sizes(len(text), len(frame.body))
    return b"".join((len(text).to_bytes(4, "big"), text, frame.body))


def unpack(data: bytes) -> Frame:
    """The frame that these bytes are, no more and no less. Raises WireError if they are none."""
    rest = memoryview(data)

    def take(count: int) -> bytes:
        nonlocal rest
        if count > len(rest):
            raise WireError(f"a frame of {len(data)} bytes ends before it should")
        taken, rest = bytes(rest[:count]), rest[count:]
        return taken

    frame = read(take)
    if len(rest):
        raise WireError(f"{len(rest)} bytes follow the end of a frame")
    return frame


def refusal(error: str, **more: Any) -> Frame:
    """The answer that says why nothing was done."""
    return Frame({"ok": False, "error": error, **more})


def read(take: Callable[[int], bytes]) -> Frame:
    """A frame from a function that gives its next bytes."""
    header, length = read_head(take)
    return Frame(header, take(length))


def read_head(take: Callable[[int], bytes]) -> tuple[dict[str, Any], int]:
    """A frame's header, and the length of its body."""
    size = int.from_bytes(take(4), "big")
    _check_sizes(size, 0)
    try:
        header = json.loads(take(size), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame's header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise WireError("a frame's header is not a JSON object")
    length = header.pop("length", None)
    if type(length) is not int:
        raise WireError("a frame's header does not say the length of its body")
    _check_sizes(size, length)
    _refuse_deep(header)
    return header, length


def _refuse_deep(header: Mapping[str, Any]) -> None:
    """Raises WireError for nesting that what reads and hashes the header later may not get through.

    How deep JSON is read depends on how deep the stack is that reads it: a frame that one thread
    could read would break another.
    """
    level: list[Any] = [header]
    for _ in range(DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [one for each in inner for one in each if isinstance(one, dict | list)]
        if not level:
            return
    raise WireError(f"a frame's header is nested more than {DEEPEST} deep")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_sizes(header: int, body: int) -> None:
    if header > HEADER:
        raise WireError(f"a frame's header of {header} bytes: at most {HEADER}")
    if not 0 <= body <= BODY:
        raise WireError(f"a frame's body of {body} bytes: at most {BODY}")
