"""What goes over the wire: a plain message, or an envelope that holds something beside it, which
only downloads have.

A change of the base:

    magic, version                 4 bytes
    since, rank of the change      6 bytes
    size of the base message       8 bytes
    base message                   a plain message on the base layout of the receiver's layout
    zeros                          mostly none: see `_fill`
    message                        the plain message of the payload itself
    checksum                       4 bytes, over all of the above

Control variates:

    magic, version                 4 bytes
    size of the control message    8 bytes
    control message                a plain message on the receiver's layout
    message                        the plain message of the payload itself
    checksum                       4 bytes, over all of the above

A payload with neither is a plain message (format.py), not a byte more; none has both.

The receiver derives the layout of a change from its own and from the rank that the envelope tells.
That rank is the one size which comes from outside, so it must be paid for: an envelope has at least
half a byte for each number of the change beyond the size of the layout. Else a few bytes that claim
the rank 65535 and an int8 of zeros, which costs next to nothing, could make a reader allocate
gigabytes.
"""

from zlib import crc32

from fedsieve.algebra.adapter import Layout, base_layout
from fedsieve.algebra.payload import Base, Payload
from fedsieve.algebra.support import Support, equal
from fedsieve.errors import WireError
from fedsieve.wire import format as plain

MAGIC = b"FSB"
CONTROL = b"FSC"
VERSION = 1
HEAD = 18  # bytes before the base message
BEFORE = 12  # bytes before the control message
CHECKSUM = 4
OVERHEAD = 1 << 16
_SAYS_KNOWN = 'it says that its {} are "known", and the receiver knows others: {} must be "sent"'


def encode(payload: Payload) -> bytes:
    """The message that says this payload. `decode` gives exactly the payload back.

    Raises WireError, naming the tensor, if a value is not finite, or if the payload or its base
    does not fit the layout.
    """
    if payload.control is not None:
        return _encode_control(payload, payload.control)
    if payload.base is None:
        return plain.encode(payload)
    since, change = payload.base
    _check_change(since, change, payload.layout)
    base = plain.encode(change)
    body = b"".join(
        (
            MAGIC,
            bytes((VERSION,)),
            since.to_bytes(4, "little"),
            change.layout.rank.to_bytes(2, "little"),
            len(base).to_bytes(8, "little"),
            base,
            bytes(_fill(len(base), change.layout, payload.layout)),
            plain.encode(payload._replace(base=None)),
        )
    )
    return body + crc32(body).to_bytes(CHECKSUM, "little")


def encode_for(payload: Payload, known: Support | None = None) -> bytes:
    """`encode`, for a receiver that knows this much; see `decode`.

    Raises WireError, too, where the payload says "known" of ranks or masks that are not: what could
    never be read is not sent, and the sender hears of it.
    """
    message = encode(payload)
    names, ranks, masks = payload.support
    theirs = known or Support(names, None, {})
    if payload.ranks_told == "known" and not equal(ranks, theirs.ranks):
        raise WireError(_SAYS_KNOWN.format("ranks", "ranks_told"))
    if payload.masks_told == "known":
        held = {n: m for n, m in theirs.masks.items() if n in names}
        if masks.keys() != held.keys() or not all(equal(m, held[n]) for n, m in masks.items()):
            raise WireError(_SAYS_KNOWN.format("masks", "masks_told"))
    return message


def decode(data: bytes, layout: Layout, known: Support | None = None) -> Payload:
    """The payload that a message says, for a receiver that holds this layout.

    known: what the receiver knows already: its ranks stand in for ranks, and its masks for masks,
    that the message does not tell. None knows of all ranks and no masks.

    Raises WireError if the bytes are not a message for this layout and this knowledge.
    """
    data = bytes(data)
    if data.startswith(CONTROL):
        return _decode_control(data, layout, known)
    if not data.startswith(MAGIC):
        return plain.decode(data, layout, known)
    view, end = _undamaged(data, HEAD, "a base change")
    since = int.from_bytes(view[4:8], "little")
    theirs = _layout_of_change(since, int.from_bytes(view[8:10], "little"), layout)
    size = int.from_bytes(view[10:HEAD], "little")
    start = HEAD + size
    stop = start + _fill(size, theirs, layout)
    if stop > end:
        raise WireError(
            f"a base change of rank {theirs.rank} for this layout takes {stop - HEAD} bytes; "
            f"{end - HEAD} are there"
        )
    if bytes(view[start:stop]).strip(b"\0"):
        raise WireError("the zeros behind a base change are not zeros: this message is damaged")
    change = _whole(bytes(view[HEAD:start]), theirs)
    payload = plain.decode(bytes(view[stop:end]), layout, known)
    return payload._replace(base=Base(since, change))


def longest(layout: Layout, *, down: bool = False) -> int:
    """Bytes that no message for this layout is longer than; down: with what only downloads have.

    An entry takes at most 8 bytes as a number and less than one in a mask; what is told of names
    and ranks, and the tables of the coder, are in the rest.
    """
    entries = layout.size + len(layout.names) + len(layout.pairs) * layout.rank
    if down:
        entries += max(entries, base_layout(layout, 0).size if layout.pairs else 0)
    return 10 * entries + OVERHEAD


def _fill(size: int, theirs: Layout, layout: Layout) -> int:
    """How many zeros follow a base message, so that its length pays for what it makes.

    A change that says something is longer than that: int8 costs more than half a byte a number.
    """
    return max(0, (theirs.size + 1) // 2 - layout.size - size)


def _layout_of_change(since: int, rank: int, layout: Layout) -> Layout:
    if not layout.pairs:
        raise WireError("a base change for a layout without pairs")
    if rank == 0 and since != 0:
        raise WireError(f"a dense base change counts from the start, not from round {since}")
    return base_layout(layout, rank)


def _check_change(since: int, change: Payload, layout: Layout) -> None:
    if not 0 <= since < 1 << 32:
        raise WireError(f"a base change since round {since}: must fit 32 bits")
    if not 0 <= change.layout.rank <= 0xFFFF:
        raise WireError(f"a base change of rank {change.layout.rank}: at most 65535")
    if change.layout != _layout_of_change(since, change.layout.rank, layout):
        raise WireError("a base change must be on `base_layout` of its payload's layout")
    names, ranks, masks = change.support
    whole = names == change.layout.names and ranks is None and not masks
    if not whole or (change.ranks_told, change.masks_told) != ("known", "known"):
        raise WireError('a base change must be whole, with ranks and masks told as "known"')


def _whole(data: bytes, theirs: Layout, what: str = "a base change") -> Payload:
    """What a message beside another says. Codes other than 0 would tell of ranks, masks, names."""
    if len(data) >= plain.AROUND and (data[4] >> 4 or data[5]):
        raise WireError(f"{what} that is not whole: this message is damaged")
    return plain.decode(data, theirs)


def _undamaged(data: bytes, least: int, what: str) -> tuple[memoryview, int]:
    """An envelope's bytes, and where its checksum begins. Raises WireError if it is none.

    least: bytes before the message beside the other
    """
    if len(data) < least + CHECKSUM:
        raise WireError(f"{len(data)} bytes are too few for a message with {what}")
    if data[3] != VERSION:
        raise WireError(f"{what} of version {data[3]}; this program reads version {VERSION}")
    view = memoryview(data)
    end = len(data) - CHECKSUM
    if crc32(view[:end]) != int.from_bytes(view[end:], "little"):
        raise WireError("the checksum is wrong: the message is damaged")
    return view, end


def _encode_control(payload: Payload, control: Payload) -> bytes:
    if payload.base is not None or control.base is not None or control.control is not None:
        raise WireError("control variates beside a base change: one message carries one at most")
    names, ranks, masks = control.support
    whole = names == payload.layout.names and ranks is None and not masks
    told = (control.ranks_told, control.masks_told) == ("known", "known")
    if control.layout != payload.layout or not whole or not told:
        raise WireError(
            "control variates must be whole, on their payload's layout, with ranks and masks told "
            'as "known"'
        )
    beside = plain.encode(control)
    body = b"".join(
        (
            CONTROL,
            bytes((VERSION,)),
            len(beside).to_bytes(8, "little"),
            beside,
            plain.encode(payload._replace(control=None)),
        )
    )
    return body + crc32(body).to_bytes(CHECKSUM, "little")


def _decode_control(data: bytes, layout: Layout, known: Support | None) -> Payload:
    view, end = _undamaged(data, BEFORE, "control variates")
    stop = BEFORE + int.from_bytes(view[4:BEFORE], "little")
    if stop > end:
        raise WireError(f"control variates of {stop - BEFORE} bytes; {end - BEFORE} are there")
    control = _whole(bytes(view[BEFORE:stop]), layout, "control variates")
    payload = plain.decode(bytes(view[stop:end]), layout, known)
    return payload._replace(control=control)
