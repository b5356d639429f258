"""How long a server's certificates hold, said when a federation begins.

An expired certificate shows at the sites alone, as a node that cannot connect. So whoever starts
the server reads beforehand which file ends when, and what to do.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path

from fedsieve.disk import bytes_of
from fedsieve.errors import FedSieveError

# The files of a folder of certificates: openssl's names in docs/deploy.md.
CA, CERTIFICATE, PRIVATE = "ca.crt", "server.pem", "server.key"
SOON = datetime.timedelta(days=30)
_WHAT = {
    CA: "make a new authority and certificate (docs/deploy.md); every site needs the new ca.crt",
    CERTIFICATE: "sign a new one with the same authority (docs/deploy.md); sites need nothing new",
}


def endings(folder: Path, now: datetime.datetime) -> list[str]:
    """What of a folder of certificates ends within `SOON`, in words: file, date, and what to do.

    now: with its time zone
    Raises FedSieveError for one that has ended, that does not hold yet, or that is none.
    """
    found: list[str] = []
    for name, what in _WHAT.items():
        place = folder / name
        for begins, ends in _spans(place):
            if now < begins:
                raise FedSieveError(
                    f"--certificates: {place} holds from {_date(begins)} on, and here it is "
                    f"{_date(now)}: set the clock, or wait"
                )
            if ends <= now:
                raise FedSieveError(f"--certificates: {place} expired on {_date(ends)}: {what}")
            if ends - now < SOON:
                days = (ends - now).days
                found.append(
                    f"{place} expires on {_date(ends)}, in {days} days: from then on no site can "
                    f"connect. {what[0].upper()}{what[1:]}, and start the SuperLink again"
                )
    return found


_LARGEST = 1 << 24  # bytes of a file of certificates


def _spans(place: Path) -> Iterator[tuple[datetime.datetime, datetime.datetime]]:
    """From when to when each certificate of a file holds."""
    from cryptography import x509  # comes with Flower

    try:
        if not place.is_file():
            raise OSError("it is no file")  # a pipe would be waited for
        listed = x509.load_pem_x509_certificates(bytes_of(place, _LARGEST))
        spans = [(each.not_valid_before_utc, each.not_valid_after_utc) for each in listed]
    except Exception as error:  # of cryptography, over whatever the file holds
        raise FedSieveError(
            f"--certificates: {place} holds no certificate that can be read (PEM): {error}"
        ) from error
    yield from spans


def _date(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
