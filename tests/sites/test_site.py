"""A site's file: every mistake in it is named, and its paths are its own."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsieve.algebra.budget import Budget, Link
from fedsieve.errors import FedSieveError
from fedsieve.sites import resident
from fedsieve.sites import site as sites
from tests.conftest import Command, Tiny
from tests.sites.sites import quiet, settled, write_site

LEAST: dict[str, Any] = {"name": "north", "data": {"train": "train.csv", "text": "text"}}


def write(folder: Path, table: dict[str, Any]) -> Path:
    (folder / "train.csv").touch()
    path = folder / "site.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def test_a_short_file_has_defaults(tmp_path: Path) -> None:
    site = sites.load(write(tmp_path, LEAST))
    assert sites.budget_of(site) == Budget(1.0, 1.0, 1.0)
    assert sites.link_of(site) is None
    assert site.folder == tmp_path / "worker"
    assert (site.device, site.model, site.cache, site.memory) == ("auto", None, None, None)


def test_a_full_file_says_it_all(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "rows.csv").touch()
    table = {
        **LEAST,
        "folder": "state",
        "device": "cuda:1",
        "model": "models/base",
        "cache": "cache",
        "memory": 8000,
        "step_seconds": 0.25,
        "most_steps": 50,
        "link": {"downlink": 100, "uplink": 10, "latency": 0.02},
        "budget": {"ratio": 0.5, "down": 0.25, "up": 0.125},
        "data": {"train": "rows.csv", "test": "org/rows", "text": "text", "label": "label"},
    }
    site = sites.load(write(tmp_path, table))
    assert sites.budget_of(site) == Budget(0.5, 0.25, 0.125)
    assert sites.link_of(site) == Link(100, 10, 0.02)
    # Relative to the file, wherever the worker is started; names that are no file stay names.
    assert site.folder == tmp_path / "state"
    assert site.cache == tmp_path / "cache"
    assert site.model == str(tmp_path / "models" / "base")
    assert site.data.train == str(tmp_path / "rows.csv")
    assert site.data.test == "org/rows"


CSV, TEXT = {"train": "train.csv"}, {"text": "text"}
ELSEWHERE: dict[str, dict[str, Any]] = {  # what the site has not -> the site, which names it
    "rows.csv": {**LEAST, "data": {"train": "rows.csv", **TEXT}},
    "rows": {**LEAST, "data": {"train": "rows", **TEXT}},
    "tests/rows.jsonl.gz": {**LEAST, "data": {**CSV, "test": "tests/rows.jsonl.gz", **TEXT}},
    "models/base": {**LEAST, "model": "models/base"},
}


@pytest.mark.parametrize("there", [True, False], ids=["another there", "none there"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_lies_where_the_command_is_given_is_not_the_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: bool
) -> None:
    """A file that is gone, or a link that leads nowhere, is told; another is not taken for it."""
    home, current = tmp_path / "home", tmp_path / "current"
    home.mkdir()
    current.mkdir()
    if there:
        (current / name).mkdir(parents=True)
    elif not name.endswith((".csv", ".gz")):
        pytest.skip("a name of the hub")
    monkeypatch.chdir(current)
    with pytest.raises(FedSieveError, match=f"there is no {home / name}"):
        sites.load(write(home, ELSEWHERE[name]))
    (home / name).parent.mkdir(exist_ok=True, parents=True)
    (home / name).symlink_to("nowhere")
    with pytest.raises(FedSieveError, match=f"there is no {home / name}"):
        sites.load(home / "site.toml")


def test_fetched_names_come_before_folders(tmp_path: Path) -> None:
    (tmp_path / "20newsgroups").mkdir()
    data = {"train": "20newsgroups", "text": "text"}
    assert sites.load(write(tmp_path, {**LEAST, "data": data})).data.train == "20newsgroups"
    data = {"train": "./20newsgroups", "text": "text"}
    assert Path(sites.load(write(tmp_path, {**LEAST, "data": data})).data.train).is_absolute()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nmae": "x"}, "nmae: unknown key (did you mean 'name'?)"),
        (
            {"link": {"downlink": 1, "uplink": 1, "latencu": 1}},
            "link.latencu: unknown key (did you mean",
        ),
        ({"budget": {"rank": 4}}, "budget.rank: unknown key"),
        ({"name": "a/b"}, "name: "),
        ({"name": ""}, "name: "),
        ({"name": ".hidden"}, "name: "),
        ({"name": "x" * 65}, "name: "),
        ({"name": "two\nlines"}, "name: "),
        ({"data": {"text": "text"}}, "data.train: this key is needed"),
        ({"data": {"train": "x.csv"}}, "data: say which columns"),
        ({"data": {"train": "x.csv", "prompt": "a"}}, "data: say which columns"),
        ({"data": {"train": "x.csv", "txet": "a"}}, "data.txet: unknown key (did you mean"),
        ({"budget": {"up": 0}}, "budget.up: "),
        ({"budget": {"down": 1.5}}, "budget.down: "),
        ({"link": {"downlink": 10}}, "link.uplink: this key is needed"),
        ({"link": {"downlink": 0, "uplink": 1}}, "link.downlink: "),
        ({"memory": -1}, "memory: "),
        ({"most_steps": 0}, "most_steps: "),
        ({"model": "../nowhere"}, "model: there is no /"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path, {**LEAST, **changes})
    with pytest.raises(FedSieveError) as caught:
        sites.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FedSieveError, match="cannot be read"):
        sites.load(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("name = ")
    with pytest.raises(FedSieveError, match="not valid TOML"):
        sites.load(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("a" + ".a" * 200_000 + " = 1")
    with pytest.raises(FedSieveError, match="a key of more than 32 parts"):
        sites.load(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_bytes(b"\xff")
    with pytest.raises(FedSieveError, match="cannot be read"):
        sites.load(tmp_path / "site.toml")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": "nowhere.csv", "text": "text"}, "nowhere.csv"),
        ({"train": "train.csv", "text": "txet"}, "no column 'txet' (did you mean 'text'"),
        ({"train": "train.csv", "text": "text", "label": "labl"}, "no column 'labl'"),
        ({"train": "train.csv", "text": "text", "train_split": "x"}, "has no split 'x'"),
    ],
)
def test_rows_that_are_not_there_stop_a_worker_at_its_start(
    tiny: Tiny, tmp_path: Path, command: Command, data: dict[str, str], said: str
) -> None:
    path = write_site(tiny, tmp_path, data=data)
    ran = command("worker", path)
    assert ran.code == 2
    assert said in ran.err
    assert "ready" not in ran.out


def test_a_device_that_is_not_there_stops_a_worker_too(tiny: Tiny, tmp_path: Path) -> None:
    path = write_site(tiny, tmp_path, device="cuda:99")
    with pytest.raises(FedSieveError, match="cuda:99"):
        settled(path)
    with pytest.raises(FedSieveError, match="cuda:99"):
        resident.run(path, quiet)
