"""The bytes of version 1 do not change: kept messages are read, and written again bit for bit.

When a change of the format is meant, raise VERSION in fedsieve/wire/format.py, write the change
into docs/wire.md and tests/wire/reader.py, and make new files with

    python -m tests.wire.test_golden

The files hold what a receiver of this version must read; files of an older version may go once
nobody sends it any more.
"""

from pathlib import Path

import pytest

from fedsieve.wire import decode, encode
from tests.wire.cases import golden_payloads, knowledge, same

FOLDER = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", golden_payloads())
def test_kept_bytes_are_written_and_read(name: str) -> None:
    payload = golden_payloads()[name]
    kept = (FOLDER / f"{name}.fsv").read_bytes()
    assert encode(payload) == kept
    assert same(decode(kept, payload.layout, knowledge(payload)), payload)


def test_every_kept_file_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.fsv")} == set(golden_payloads())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for _name, _payload in golden_payloads().items():
        (FOLDER / f"{_name}.fsv").write_bytes(encode(_payload))
