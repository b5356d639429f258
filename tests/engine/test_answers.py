"""What a worker answers, when it is not what a worker answers: told in a sentence, or its death."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedsieve.algebra.budget import Client
from fedsieve.engine import pool
from fedsieve.engine.pool import Process, check_ready
from fedsieve.engine.request import reply_of
from fedsieve.engine.spread import Gone
from fedsieve.errors import FedSieveError
from fedsieve.frame import Frame, pack

CLIENT = Client("a", 10)
SAID: dict[str, Any] = {
    "ok": True, "client": "a", "round": 3, "update": 4, "groups": None, "reason": None,
    "loss": 0.5, "steps": 2, "seconds": 1.0, "compute": 0.5, "wire": 0.1, "memory": 100,
}  # fmt: skip


def test_a_whole_answer_is_a_reply() -> None:
    reply, memory = reply_of(CLIENT, 3, pack(Frame(SAID, b"1234")))
    assert (reply.update, reply.loss, reply.steps, memory) == (b"1234", 0.5, 2, None)


# A change of what is said -> a word of what is then told.
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "neither done nor not": ({"ok": None}, "neither that it is done"),
    "no reason": ({"ok": False}, "neither that it is done"),
    "another client": ({"client": "b"}, "of 'b' and round 3"),
    "another round": ({"round": 2}, "of 'a' and round 2"),
    "a text for a length": ({"update": "x"}, "update"),
    "a length below zero": ({"update": -5}, "update"),
    "a length beyond its bytes": ({"update": 10**18}, "update is 4 bytes"),
    "a text for a loss": ({"loss": "nan"}, "loss"),
    "a loss beyond all": ({"loss": 1e308}, "loss"),
    "a list for a reason": ({"reason": ["x"], "update": None}, "reason"),
    "true for a number": ({"steps": True}, "steps"),
    "less than no time": ({"seconds": -1e300}, "seconds"),
    "a text for a time": ({"compute": "x"}, "compute"),
    "memory beyond all": ({"memory": 10**400}, "memory"),
    "groups that are not there": ({"groups": ["a"]}, "none does"),
    "nothing": (dict.fromkeys(SAID), "neither that it is done"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_an_answer_that_is_none_is_told(odd: str) -> None:
    change, said = ODD[odd]
    body = b"1234" if odd != "groups that are not there" else b"1234 and no tensors"
    answer = pack(Frame({name: each for name, each in (SAID | change).items() if each is not None
                         or name not in change}, body))  # fmt: skip
    with pytest.raises(FedSieveError, match="client 'a'") as caught:
        reply_of(CLIENT, 3, answer)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_went_wrong_there_is_told_as_it_is() -> None:
    with pytest.raises(FedSieveError, match=r"^no room$"):
        reply_of(CLIENT, 3, pack(Frame({"ok": False, "error": "no room"})))
    with pytest.raises(RuntimeError, match="client a, in a worker:\nTraceback"):
        reply_of(CLIENT, 3, pack(Frame({"ok": False, "error": "Traceback", "ours": True})))


@pytest.mark.parametrize("said", [{}, {"ok": 1}, {"ok": True}, {"ok": True, "mark": ["x"]}])
def test_a_worker_that_does_not_say_that_it_is_ready_is_not(said: dict[str, Any]) -> None:
    with pytest.raises(FedSieveError, match=r"a worker (cannot begin|has another model)"):
        check_ready(said, "the mark")


HEAD = json.dumps({"ok": True, "length": 2**31 - 1}).encode()
SENT: dict[str, bytes] = {
    "a frame cut off": pack(Frame(SAID, b"1234"))[:30],
    "a header of gigabytes": (2**31 - 1).to_bytes(4, "big"),
    "no JSON": b"\0\0\0\5hello",
    "a body that does not come": len(HEAD).to_bytes(4, "big") + HEAD,
}
PROGRAM = """
import socket, sys, time
with socket.socket(fileno=int(sys.argv[1])) as connection:
    connection.recv(1000)
    connection.sendall({sent!r})
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", SENT)
def test_a_worker_that_answers_no_frame_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Though it lives on; it is replaced then, as one that died."""
    (tmp_path / "odd_worker.py").write_text(PROGRAM.format(sent=SENT[kind]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "PATIENCE", 0.5)
    worker = Process("odd_worker", 1, (), b"", "")
    try:
        with pytest.raises(Gone, match=r"stopped answering|no frame"):
            worker.ask(pack(Frame({"do": "train"})))
    finally:
        worker.end()
