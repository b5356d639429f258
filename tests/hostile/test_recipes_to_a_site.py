"""Recipes that would exhaust a site: refused by name, before anything is allocated for them.

Every key of a recipe that holds a number is found in the schema and in the methods' signatures, and
given absurd values. What a site takes is measured where the system counts it, in the process's own
resident memory, and not worked out again.
"""

import inspect
import itertools
import json
import math
import re
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import tomli_w
import torch

from fedsieve import methods
from fedsieve.algebra.keys import Key
from fedsieve.costs import memory
from fedsieve.frame import Frame
from fedsieve.recipe import schema
from fedsieve.settings import Lora, Table, Training
from fedsieve.sites import limits, resident
from fedsieve.train.model import load_base, set_up, shape_of
from fedsieve.train.prepared import BASE
from tests import kinds
from tests.conftest import LABELS, Tiny
from tests.sites.sites import rate, recipe_text, settled, write_site
from tests.sites.test_worker import Worker, told

MEGA = 1 << 20
META = torch.device("meta")
BEYOND: tuple[Any, ...] = (2**63, 10**400, math.inf)
NEVER = {"rounds", "lora.rank", "training.steps", "training.epochs"}  # not even what is large


def holds_numbers(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated or get_args(annotation):
        return any(holds_numbers(inner) for inner in get_args(annotation))
    return annotation in (int, float)


def tables(kind: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all numbers in a table of the schema, and in its tables."""
    for name, annotation in get_type_hints(kind, include_extras=True).items():
        if name == "model_config" or name.startswith("_"):
            continue
        inner = [a for a in [annotation, *get_args(annotation)] if isinstance(a, type)]
        table = next((a for a in inner if get_type_hints(a) and a not in (int, float, str)), None)
        if table is not None and (issubclass(table, Table) or table in (Lora, Training)):
            yield from tables(table, (*place, name))
        elif holds_numbers(annotation):
            yield (*place, name)


PRIVACY = {"clip": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}
MACHINE = {"memory": 100, "downlink": 1, "uplink": 1, "step_seconds": 0.1}
# Tables of which a recipe has one or another, with what makes the rest of them right.
OTHERS: tuple[tuple[type[Any], Mapping[str, Any]], ...] = (
    (schema.ListBudgets, {"kind": "list", "clients": {"north": {"down": 0.5}}}),
    (schema.TierBudgets, {"kind": "tiers", "tiers": 2}),
    (schema.RatioBudgets, {"kind": "ratios"}),
    (schema.RankLaw, {"kind": "normal", "low": 1, "high": 2}),
    (schema.ResourceBudgets, {"kind": "resources", "deadline": 1, "tiers": [MACHINE]}),
)


def cases() -> list[tuple[str, dict[str, Any]]]:
    """(dotted key, changes to the tiny recipe that go with it) for every number of a recipe."""
    found: list[tuple[str, dict[str, Any]]] = []
    for place in tables(schema.Recipe):
        if place[0] != "budgets":
            found.append((".".join(place), {"privacy": PRIVACY} if place[0] == "privacy" else {}))
    found += [(f"server.{name}", {}) for name in ("lr", "beta1", "beta2", "eps")]
    for kind, given in OTHERS:
        found += [(f"budgets.{place[0]}", {"budgets": dict(given)}) for place in tables(kind)]
    found += [(f"budgets.0.{place[0]}", {}) for place in tables(schema.Tier)]
    for name in methods.names():
        hints = get_type_hints(methods.load(name), include_extras=True)
        options = inspect.signature(methods.load(name)).parameters
        given = {"method": {"name": name}, "budgets": None}
        found += [(f"method.{key}", given) for key in options if holds_numbers(hints[key])]
    return found


CASES = cases()


def with_number(tiny: Tiny, key: str, changes: Mapping[str, Any], value: Any) -> bytes:
    text = recipe_text(tiny, **changes)
    table = tomllib.loads(text.decode())
    place: Any = table
    *path, last = key.split(".")
    for step in path:
        place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
    kind = place.get(last)
    if key == "training.epochs":
        del place["steps"]  # beside steps, epochs cost nothing
    place[last] = [value] if isinstance(kind, list) or last == "layers_to_transform" else value
    return tomli_w.dumps(table).encode()


def peak(reset: bool = False) -> int:
    """Bytes of the most resident memory that this process has had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def here(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    worker = Worker(tiny, tmp_path_factory.mktemp("site"))
    assert worker.train(1).header["ok"]
    return worker


def test_the_table_has_the_keys_that_anybody_would_try() -> None:
    keys = {key for key, _ in CASES}
    tried = "seed rounds cohort lora.rank lora.alpha lora.dropout lora.layers_to_transform "
    tried += "data.max_length training.batch training.steps training.epochs training.lr "
    tried += "evaluation.batch evaluation.limit evaluation.every checkpoint.every budgets.tiers "
    tried += "budgets.0.ratio privacy.clip sampling.extra partition.clients method.dense_rounds"
    assert {*tried.split()} <= keys


@pytest.mark.parametrize("large", [10**9, pytest.param(10**15, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("key", "changes"), kinds.some_of(CASES, 6))
def test_no_number_of_a_recipe_exhausts_a_site(
    tiny: Tiny, here: Worker, key: str, changes: dict[str, Any], large: int
) -> None:
    """Taken or refused by name, it costs nothing to speak of, and the site goes on."""
    before = peak(reset=True)
    began = time.monotonic()
    for value in (*BEYOND, large):
        answer = here.ask(Frame({"do": "recipe"}, with_number(tiny, key, changes, value)))
        if value in BEYOND or key in NEVER:
            assert not answer.header["ok"], value
            assert key in answer.header["error"] or "most_" in answer.header["error"]
        if not answer.header["ok"]:
            assert "unexpected" not in answer.header["error"], value
            assert len(answer.header["error"]) <= 500
    assert peak() - before < 30 * MEGA
    assert time.monotonic() - began < 30
    told(here.ask, here.text)
    assert here.train(1).header["ok"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"function": "os:system"}}, "training.function: a site runs no program"),
        ({"lora__start": "/etc"}, "lora.start: sites draw the first adapter from the seed"),
    ],
)
def test_a_site_has_nothing_of_what_a_server_names(
    tiny: Tiny, here: Worker, changes: dict[str, Any], said: str
) -> None:
    answer = here.ask(Frame({"do": "recipe"}, recipe_text(tiny, **changes)))
    assert not answer.header["ok"]
    assert said in answer.header["error"]


SMALL: dict[str, Any] = {"budgets": None, "server": None, "lora__rank": 16}
TIGHT: dict[str, Any] = {"most_memory": 0.045}

WORK = [
    ({"lora__rank": 65_535}, {"most_memory": 10}, "lora.rank 65535"),
    ({"lora__rank": 16, "lora__targets": "all-linear"}, {"most_memory": 0.01}, "most_memory"),
    ({"method": {"name": "full"}, "budgets": None}, {"most_memory": 0.05}, "most_memory"),
    ({"training__batch": 1_000_000}, {"most_memory": 0.3}, "training.batch 1000000"),
    ({"data__max_length": 1_000_000}, {"most_memory": 0.001}, "data.max_length 1000000"),
    ({"training__steps": 100_001}, {}, "most_steps"),
    ({"training__steps": None, "training__epochs": 10**7}, {}, "most_steps"),
    ({"training__steps": 90_000}, {"most_tokens": 10_000}, "most_tokens"),
    ({"checkpoint__every": 10**8, "rounds": 10**9 - 1}, {}, "checkpoint.every 100000000"),
    ({"checkpoint__every": 50, "rounds": 100}, {"most_disk": 0.01}, "most_disk"),
    ({"data__classes": [*LABELS, *map(str, range(60_000))]}, {"most_memory": 10}, "most_memory"),
    ({"lora__whole": ["word_embeddings"]}, {"most_memory": 0.02}, "most_memory"),
    # What scaffold holds beside what fedit would, which the same site takes (test below).
    ({"method": {"name": "scaffold"}, **SMALL}, TIGHT, "what else is trained"),
    ({"method": {"name": "flora"}, "budgets": None, "lora__targets": "all-linear"},
     {"most_memory": 0.07}, "the base weights that flora changes"),
    ({"method": {"name": "fed_plora"}, "budgets": None, "lora__targets": "all-linear"},
     {"most_memory": 0.07}, "the base weights that fed_plora changes"),
    ({"method": {"name": "fedex_lora"}, "budgets": None, "lora__targets": "all-linear"},
     {"most_disk": 0.06}, "most_disk"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "site", "said"), WORK, ids=[str(w[2]) for w in WORK])
def test_what_a_recipe_asks_for_is_worked_out_before_it_is_done(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], site: dict[str, Any], said: str
) -> None:
    """The error names the bound and how much was asked; the recipe from before stays."""
    state = settled(write_site(tiny, tmp_path, **site))
    modest = {"training__batch": 1, "evaluation__batch": 1, "lora__rank": 1, "data__max_length": 8}
    given = {**modest, **changes}
    before = peak(reset=True)
    answer = resident.answer(state, Frame({"do": "recipe"}, recipe_text(tiny, **given)))
    assert not answer.header["ok"]
    assert said in answer.header["error"]
    assert re.search(r"\d", answer.header["error"])
    assert peak() - before < 60 * MEGA
    assert state.assignment is None


def test_control_variates_are_counted_beside_what_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    """A site that is too small for scaffold may be large enough for fedit."""
    state = settled(write_site(tiny, tmp_path, **TIGHT))
    modest = {"training__batch": 1, "evaluation__batch": 1, "data__max_length": 8}
    text = recipe_text(tiny, **modest, **SMALL, method={"name": "fedit"}, training__optimizer="sgd")
    answer = resident.answer(state, Frame({"do": "recipe"}, text))
    assert "what else is trained" not in answer.header.get("error", "")


CHOICES = [
    ({"classes": [str(n) for n in range(2000)], "option_word": "abc"}, {}, {}, "of 2000 options"),
    ({"classes": [str(n) for n in range(90)], "option_word": "abc"}, {}, {"most_tokens": 10**6},
     "of 90 options"),
    ({"classes": [str(n) for n in range(900)], "max_length": 2}, {}, {"most_memory": 30},
     "most_memory"),
    ({"classes": ["1", "2"], "answer": "x" * 150 + "{option}"}, {}, {"most_tokens": 7000},
     "of 2 options"),
    ({"classes": [str(n) for n in range(16)]}, {"batch": 100_000}, {"most_memory": 1},
     "evaluation.batch 100000"),
    ({"classes": ["1", "2"], "new_tokens": 10**6}, {"batch": 1}, {"most_tokens": 10**6},
     "at an evaluation"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The tokenizer has no padding token")
@pytest.mark.parametrize(("data", "evaluation", "bounds", "said"), CHOICES)
def test_options_that_a_server_names_are_counted_as_often_as_they_are_read(
    tiny: Tiny,
    tmp_path: Path,
    data: dict[str, Any],
    evaluation: dict[str, Any],
    bounds: dict[str, Any],
    said: str,
) -> None:
    rows = [{"text": f"is {n} odd?", "label": "12"[n % 2]} for n in range(20)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"train": "train.jsonl", "test": "test.jsonl", "text": "text", "label": "label"}
    given = {"name": "north", "device": "cpu", "model": str(tiny.gpt2), "data": columns, **bounds}
    (tmp_path / "site.toml").write_text(tomli_w.dumps(given), encoding="utf-8")
    table = tomllib.loads(recipe_text(tiny).decode())
    table["model"] = {"source": "the site's own", "task": "multiple-choice"}
    table["lora"] = {"rank": 2}
    table["data"] = {"train": "the site's own", "max_length": 16, "new_tokens": 1} | data
    table["evaluation"] = evaluation
    state = settled(tmp_path / "site.toml")
    before, began = peak(reset=True), time.monotonic()
    answer = resident.answer(state, Frame({"do": "recipe"}, tomli_w.dumps(table).encode()))
    assert not answer.header["ok"]
    assert said in answer.header["error"], answer.header
    assert "most_" in answer.header["error"]
    assert peak() - before < 60 * MEGA
    assert time.monotonic() - began < 10


def test_a_label_for_each_class_of_each_row_is_counted(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"text": f"is {n} odd?", "label": ["0"]} for n in range(1000)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"train": "train.jsonl", "text": "text", "label": "label"}
    given = {"name": "north", "device": "cpu", "model": str(tiny.bert), "data": columns}
    (tmp_path / "site.toml").write_text(tomli_w.dumps({**given, "most_memory": 20}))
    table = tomllib.loads(recipe_text(tiny).decode())
    table["model"] = {"source": "the site's own", "task": "multi-label"}
    classes = [str(n) for n in range(20_000)]
    table["data"] = {"train": "the site's own", "max_length": 8, "classes": classes}
    state = settled(tmp_path / "site.toml")
    before = peak(reset=True)
    answer = resident.answer(state, Frame({"do": "recipe"}, tomli_w.dumps(table).encode()))
    assert not answer.header["ok"]
    assert "most_memory" in answer.header["error"]
    assert peak() - before < 60 * MEGA


def test_many_recipes_leave_no_more_adapters_than_the_site_takes(
    tiny: Tiny, tmp_path: Path
) -> None:
    here = Worker(tiny, tmp_path)
    here.state.site = here.state.site.model_copy(update={"most_adapters": 3})
    whole = resident.whole_message(here.assignment.start)
    answers = []
    for number in range(6):
        text = here.text + b"#" * number
        told(here.ask, text)
        answers.append(here.ask(rate("keep", text, 1, whole)).header)
    kept = list((tmp_path / "north" / "worker" / "adapters").iterdir())
    assert len(kept) == sum(a["ok"] for a in answers) == 3
    refused = {a["error"] for a in answers if not a["ok"]}
    assert len(refused) == 1
    assert "most_adapters" in refused.pop()
    # What is there may be written again.
    told(here.ask, here.text)
    assert here.ask(rate("keep", here.text, 2, whole)).header["ok"]


def test_a_full_quota_is_said_and_loses_nothing(tiny: Tiny, tmp_path: Path) -> None:
    here, calm = Worker(tiny, tmp_path / "a"), Worker(tiny, tmp_path / "b")
    for each in (here, calm):
        assert each.train(1).header["ok"]
    before = here.residual()
    site = here.state.site
    (site.folder / "runs" / "filler").write_bytes(bytes(100_000))
    used = sum(p.stat().st_size for p in site.folder.rglob("*") if p.is_file())
    here.state.site = site.model_copy(update={"most_disk": used / 1e6})
    whole = resident.whole_message(here.assignment.start)
    for answer in (here.train(2), here.ask(rate("keep", here.text, 1, whole))):
        assert not answer.header["ok"]
        assert "most_disk" in answer.header["error"]
    assert all((here.residual()[name] == tensor).all() for name, tensor in before.items())
    there = sorted(path for path in site.folder.rglob("*"))
    other = here.ask(Frame({"do": "recipe"}, recipe_text(tiny, seed=99)))
    assert not other.header["ok"]
    assert "most_disk" in other.header["error"]
    told(here.ask, here.text)
    assert sorted(path for path in site.folder.rglob("*")) == there
    here.state.site = site
    assert here.train(2).body == calm.train(2).body


REMEMBERING: list[dict[str, Any]] = [
    {"name": "fedit"},
    {"name": "flasc", "feedback": True, "head": "whole"},
    {"name": "fedsa_lora"},
]


@pytest.mark.parametrize("method", REMEMBERING, ids=[each["name"] for each in REMEMBERING])
def test_a_recipe_that_is_taken_has_room_for_all_its_rounds(
    tiny: Tiny, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Also with what a client remembers: the site was taken, and shut out for good at round 5."""
    given = {"method": method, "rounds": 9, "checkpoint__every": 1, "budgets": None}
    small = settled(write_site(tiny, tmp_path / "small", most_disk=1e-4))
    refused = resident.answer(small, Frame({"do": "recipe"}, recipe_text(tiny, **given)))
    said = r"keeps (\d+) rounds of up to (\S+) MB, and beside them .* of (\S+) MB: "
    found = re.search(said, refused.header["error"])
    assert found is not None
    enough = (int(found[1]) * float(found[2]) + float(found[3])) * 1.01  # told in three digits
    here = Worker(tiny, tmp_path / "enough", **given)
    site = here.state.site
    before = limits.used_bytes(site.folder) / 1e6  # the recipe, and what marks the folder
    here.state.site = site.model_copy(update={"most_disk": before + enough})
    for number in range(1, 10):
        answer = here.train(number)
        assert answer.header["ok"], answer.header


@pytest.mark.parametrize("name", ["flora", "florist", "fedex_lora"])
def test_a_whole_model_that_comes_out_at_the_end_is_counted(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    """All rounds were trained, and no site could keep what came of them."""
    given = {"method": {"name": name}, "rounds": 2, "budgets": None}
    small = settled(write_site(tiny, tmp_path, most_disk=1e-4))
    refused = resident.answer(small, Frame({"do": "recipe"}, recipe_text(tiny, **given)))
    found = re.search(r"what comes out at the end, of (\S+) MB: ", refused.header["error"])
    assert found is not None
    weights = (tiny.bert / "model.safetensors").stat().st_size
    assert float(found[1]) * 1e6 > 0.9 * weights  # the file has headers


def test_links_that_the_owner_made_do_not_hide_what_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    here = Worker(tiny, tmp_path)
    assert here.train(1).header["ok"]
    folder = here.state.site.folder
    used = limits.used_bytes(folder)
    for number, path in enumerate(sorted(here.rounds.iterdir())):
        (tmp_path / f"backup-{number}").hardlink_to(path)
    assert limits.used_bytes(folder) == used
    base = folder / "adapters" / "x" / BASE
    base.mkdir(parents=True)
    (base / "model.safetensors").hardlink_to(tiny.bert / "model.safetensors")
    assert limits.used_bytes(folder) == used


def test_what_does_not_fit_the_quota_is_not_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a moment either: the disk may be others' too."""
    here = Worker(tiny, tmp_path)
    assert here.train(1).header["ok"]
    whole, site = resident.whole_message(here.assignment.start), here.state.site
    used = sum(p.stat().st_size for p in site.folder.rglob("*") if p.is_file())
    size = here.assignment.resident.bytes_saved(here.assignment.start)
    here.state.site = site.model_copy(update={"most_disk": (used + size - 1) / 1e6})
    made: list[object] = []
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **b: made.append(self))
    answer = here.ask(rate("keep", here.text, 1, whole))
    assert "most_disk" in answer.header["error"]
    assert made == []


def texts() -> dict[str, bytes]:
    deep = 5000
    return {
        "dotted": b"a" + b".a" * 200_000 + b" = 1",
        "tables": b"\n".join(b"[t%d]" % n for n in range(100_000)),
        "nested arrays": b"x = " + b"[" * deep + b"]" * deep,
        "in a table": b"[method]\nname = 'fedit'\nx = " + b"[" * 900 + b"]" * 900,
        "long number": b"rounds = " + b"9" * 100_000,
        "many keys": b"\n".join(b"k%d = 1" % n for n in range(60_000)),
        "long name": b"name = '" + b"x" * 900_000 + b"'",
    }


@pytest.mark.parametrize("kind", texts())
def test_a_text_that_is_hard_to_read_is_refused_soon(here: Worker, kind: str) -> None:
    began = time.monotonic()
    answer = here.ask(Frame({"do": "recipe"}, texts()[kind]))
    assert not answer.header["ok"]
    assert "unexpected" not in answer.header["error"]
    assert len(answer.header["error"]) <= 500
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("rank", "batch"), itertools.product((1, 8), (1, 7)))
def test_what_is_worked_out_is_what_training_takes(tiny: Tiny, rank: int, batch: int) -> None:
    """On the meta device, against what autograd really keeps."""
    lora = Lora(rank=rank, targets=("query", "value"))
    shape = shape_of(str(tiny.bert), "classification", 3)
    with torch.device("meta"):
        meta = set_up(shape, "classification", lora, "lora", key=Key(0), device=META)
    base = load_base(str(tiny.bert), "classification", LABELS, key=Key(0))
    real = set_up(base, "classification", lora, "lora", key=Key(0), device=torch.device("cpu"))
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in [*real.model.parameters(), *real.model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(batch, 12, dtype=torch.int64)
    real.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = real.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids[:, 0]).loss
    found = memory.of_step(meta, Training(precision="fp32"), batch, 12).kept
    assert loss.isfinite()
    assert 0.95 * sum(kept.values()) < found < 1.2 * sum(kept.values())
