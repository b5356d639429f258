"""A server's certificates: how long they hold, whether they fit together, whom they vouch for.

An expired certificate shows at the sites alone, as a node that cannot connect, and one that does
not fit its key as a server that does not start. So whoever starts the server reads beforehand which
file ends when, and what to do.
"""

import datetime
import shlex
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import suppress
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


def open_key(folder: Path) -> list[str]:
    """What to say of a server's key that is not its owner's alone, in a list; else an empty one."""
    place = folder / PRIVATE
    if not (place.is_file() and stat.S_IMODE(place.stat().st_mode) & 0o077):
        return []
    return [
        f"{place} is open to other users than its owner, and whoever reads it can pass for the "
        f"server: `chmod 600 {shlex.quote(str(place))}`"
    ]


def refuse_unfit(folder: Path, host: str) -> None:
    """Raises FedSieveError for a key that is not the certificate's, and for a certificate that the
    authority has not signed or that does not name `host`, by which the server reaches itself: found
    out by the two ends of a connection, in memory. And for an authority's file with a private key.
    """
    if b"PRIVATE KEY" in bytes_of(folder / CA, _LARGEST):
        raise FedSieveError(
            f"--certificates: {folder / CA} holds a private key, and each site is given this file: "
            "leave the certificate alone in it, and make the key anew"
        )
    server, node = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        # A key behind a password would be asked for on the terminal, and Flower takes none.
        server.load_cert_chain(folder / CERTIFICATE, folder / PRIVATE, password=lambda: "")
        node.load_verify_locations(folder / CA)
        to, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            node.wrap_bio(to, back, server_hostname=host),
            server.wrap_bio(back, to, server_side=True),
        ]
        for _ in range(10):  # messages; there are four
            for end in list(ends):
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
                    ends.remove(end)
    except (OSError, ValueError) as error:  # ssl's own are OSErrors
        if getattr(error, "verify_code", None) in _OTHER_NAME:
            raise FedSieveError(
                f"--certificates: {folder / CERTIFICATE} does not name {host}, by which the server "
                f"reaches itself: sign one that does, beside its other names (docs/deploy.md)"
            ) from error
        why = getattr(error, "verify_message", None) or getattr(error, "reason", None) or error
        raise FedSieveError(
            f"--certificates: {CERTIFICATE}, {PRIVATE} and {CA} of {folder} do not belong together "
            f"({why}): docs/deploy.md makes them"
        ) from error


def unreached(host: str, port: int, root: Path | None) -> str | None:
    """Why a server cannot be reached, in words; None where it can.

    root: the certificate of the authority that vouches for it; None without TLS
    """
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=5) as plain:
            if root is not None:
                with ssl.create_default_context(cafile=root).wrap_socket(
                    plain, server_hostname=host
                ):
                    pass
    except ssl.SSLCertVerificationError as error:
        return (
            f"the server at {where} shows a certificate that {root} does not vouch for "
            f"({error.verify_message}): it is another server, or its certificates were made anew"
        )
    except ssl.SSLError as error:
        return f"the server at {where} does not speak TLS ({error.reason})"
    except OSError as error:
        return f"nothing answers at {where} ({error.strerror or error}): is the SuperLink running?"
    return None


_LARGEST = 1 << 24  # bytes of a file of certificates
_OTHER_NAME = (62, 64)  # OpenSSL's codes of a certificate for another name, or another address


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
