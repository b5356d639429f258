"""A run goes to the hub whole, names nothing of this machine there, and says before what goes."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from fedsieve.run import rundir, runner
from tests import runs
from tests.conftest import LABELS, Command, Tiny
from tests.pages import fenced

pytestmark = pytest.mark.usefixtures("no_report")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache in a place of its own."""
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def cached(hub: Path, name: str, model: Path, licence: str | None = None) -> str:
    """A model as the hub's client leaves it: blobs, and links to them under the commit."""
    place = hub / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for folder in (place / "refs", place / "blobs", snapshot):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    if licence is not None:
        (snapshot / "README.md").write_text(f"---\nlicense: {licence}\n---\nA model.\n")
    for path in model.iterdir():
        shutil.copy(path, place / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    return name


@pytest.fixture
def from_hub(tiny: Tiny, hub: Path, tmp_path: Path) -> Path:
    """A run over a base of the hub, whose labels are not those of the data."""
    name = cached(hub, "some/bert", tiny.bert, "apache-2.0")
    runs.start(
        tiny, tmp_path / "run", rounds=1, model__source=name, method={"name": "fedit"}, budgets=[{}]
    )
    return tmp_path / "run"


def test_a_base_of_the_hub_is_named_by_its_commit(from_hub: Path, hub: Path) -> None:
    saved = from_hub / rundir.ADAPTER
    facts = json.loads((saved / "provenance.json").read_text())
    assert facts["base"]["name"] == "some/bert"
    assert facts["base"]["revision"] == COMMIT
    assert len(facts["base"]["weights"]) == 32
    front = metadata_load(saved / "README.md")
    assert front is not None
    assert (front["base_model"], front["license"]) == ("some/bert", "apache-2.0")
    # No room is taken twice: the base's file is the very one of the cache.
    ours = saved / "base" / "model.safetensors"
    assert not ours.is_symlink()
    assert ours.samefile(hub / "models--some--bert" / "blobs" / "model.safetensors")


def test_what_fits_its_base_names_it_as_the_hub_does(tiny: Tiny, hub: Path, tmp_path: Path) -> None:
    parts = {"kind": "iid", "clients": 3}
    given: dict[str, Any] = {"rounds": 1, "lora": {"rank": 2}, "partition": parts}
    runs.start_language_model(tiny, tmp_path / "named", **given)
    name = cached(hub, "some/gpt2", tiny.gpt2)
    given |= {"model": {"source": name, "task": "causal-lm"}, "data__label": None}
    with pytest.warns(UserWarning, match="no padding token"):
        runs.start(tiny, tmp_path / "run", **given)
    saved = tmp_path / "run" / rundir.ADAPTER
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (name, COMMIT)
    assert not (saved / "base").exists()
    one, two = (
        (tmp_path / run / rundir.ADAPTER / "adapter_model.safetensors").read_bytes()
        for run in ("named", "run")
    )
    assert one == two


def test_a_dry_run_lists_what_would_go_and_asks_nobody(from_hub: Path, command: Command) -> None:
    """Offline, as all tests are."""
    done = command("export", from_hub, "--push", "me/tuned", "--private", "--dry-run")
    assert done.code == 0, done.err
    listed = [line.split()[-1] for line in done.out.splitlines() if line.startswith("  ")]
    expected = {path.name for path in (from_hub / rundir.ADAPTER).iterdir()} - {"base"}
    assert set(listed) == expected
    assert "would go to private me/tuned; nothing did" in done.out.replace("\n", " ")


@pytest.mark.parametrize("merge", [False, True])
def test_what_goes_names_nothing_of_this_machine(
    from_hub: Path, tmp_path: Path, merge: bool
) -> None:
    there = tmp_path / "there"
    runner.export(from_hub, there, merge=merge, for_hub=True)
    for path in there.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path.name
    if not merge:
        config = json.loads((there / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("some/bert", COMMIT)
    # Loaded elsewhere, the card's code is all that it takes.
    (code,) = fenced(there / "README.md", "python")
    scope: dict[str, Any] = {}
    exec(code.replace('"path/to/this/folder"', repr(str(there))), scope)
    assert scope["model"].config.id2label == dict(enumerate(LABELS))


def test_without_a_network_one_sentence_says_so(from_hub: Path, command: Command) -> None:
    done = command("export", from_hub, "--push", "me/tuned")
    assert done.code == 2
    said = " ".join(done.err.split())
    assert "nothing could be uploaded to me/tuned" in said
    assert "hf auth login" in said


@pytest.mark.slow
def test_a_run_is_uploaded(from_hub: Path, served: "Served") -> None:
    done = served.run("export", str(from_hub), "--push", "me/tuned", "--private")
    assert done.returncode == 0, done.stderr
    assert "me/tuned: the adapter after round 1" in " ".join(done.stdout.split())
    (created,) = served.created
    assert (created["organization"], created["name"]) == ("me", "tuned")
    assert created.get("private") or created.get("visibility") == "private"
    saved = from_hub / rundir.ADAPTER
    assert served.files.keys() == {path.name for path in saved.iterdir()} - {"base"}
    weights = "adapter_model.safetensors"
    assert served.files[weights] == (saved / weights).read_bytes()


def test_a_base_that_the_hub_has_not_goes_whole_or_not(
    whole: Path, command: Command, tmp_path: Path
) -> None:
    refused = command("export", whole, "--push", "me/tuned", "--dry-run")
    assert refused.code == 2
    assert "give --merge to upload the whole model" in refused.err.replace("\n", " ")
    done = command("export", whole, "--push", "me/tuned", "--dry-run", "--merge")
    assert done.code == 0
    assert "model.safetensors" in done.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "give --to, a folder, or --push"),
        (("--to", "x", "--push", "me/x"), "one of both"),
        (("--to", "x", "--dry-run"), "are of --push"),
        (("--push", "a/b/c", "--dry-run"), "no repository of the hub can be called so"),
    ],
)
def test_what_cannot_be_asked_for(
    whole: Path, command: Command, given: tuple[str, ...], said: str
) -> None:
    done = command("export", whole, *given)
    assert done.code == 2
    assert said in done.err.replace("\n", " ")


class Served:
    """As much of the hub as an upload asks for, on this machine."""

    def __init__(self, folder: Path) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        served = self

        class Hub(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if self.headers.get("transfer-encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["authorization"] != "Bearer right":
                    return self._answer({"error": "Invalid token"}, 401)
                if self.path == "/api/repos/create":
                    served.created.append(json.loads(body))
                    return self._answer({"url": f"{served.address}/me/tuned"})
                if self.path.endswith("/preupload/main"):
                    asked = json.loads(body)["files"]
                    how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    kinds = [{"path": each["path"], **how} for each in asked]
                    return self._answer({"files": kinds})
                if self.path.endswith("/commit/main"):
                    for line in body.splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            value = entry["value"]
                            served.files[value["path"]] = base64.b64decode(value["content"])
                    return self._answer(
                        {
                            "commitUrl": f"{served.address}/me/tuned/commit/{COMMIT}",
                            "commitOid": COMMIT,
                        }
                    )
                return self._answer({}, 200)

            def do_GET(self) -> None:
                self._answer({"error": "nothing is here"}, 404)

            def _answer(self, told: dict[str, Any], code: int = 200) -> None:
                data = json.dumps(told).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.folder = folder
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """The command in a process of its own: this one's client of the hub is offline."""
        own = {"HF_ENDPOINT": self.address, "HF_TOKEN": "right", "HF_HUB_OFFLINE": "0"}
        own |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, "-m", "fedsieve", *words],
            env={**os.environ, **own},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()
