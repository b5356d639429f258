"""Each task over sites: what they count makes the scores that one process has over all rows."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsieve.algebra.budget import Client
from fedsieve.algebra.keys import Key
from fedsieve.frame import Frame
from fedsieve.recipe import read as recipes
from fedsieve.recipe.schema import READ_AS, Data, Recipe
from fedsieve.sites import assignment, resident
from fedsieve.sites import told as told_to
from fedsieve.sites.server import joint_score
from fedsieve.sites.site import Rows as SiteRows
from fedsieve.sites.site import Site
from fedsieve.tasks import catalogue
from fedsieve.tasks.tally import scores
from fedsieve.train.local import tally
from fedsieve.wire import encode
from tests.conftest import LABELS, Tiny
from tests.sites.sites import rate, settled, train
from tests.tasks.test_federated import KINDS, Kind, changes, each, quietly, written

CLASSES = {
    "classification": LABELS,
    "multi-label": LABELS,
    "image-classification": LABELS,
    "image-multi-label": LABELS,
    "token-classification": ("O", *(f"B-{label}" for label in LABELS)),
}


@each
@quietly
def test_the_scores_of_two_sites_are_those_of_all_their_rows(
    tiny: Tiny, tmp_path: Path, kind: Kind
) -> None:
    table = tiny.table(**changes(tiny, tmp_path, kind, kind.rows))
    given: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4, "targets": None},
        "partition": {"kind": "iid", "clients": 2},
    }
    table |= {key: {k: v for k, v in value.items() if v} for key, value in given.items()}
    if kind.task in CLASSES:
        table["data"]["classes"] = list(CLASSES[kind.task])
    Recipe.model_validate(table)
    text = tomli_w.dumps(table).encode()
    counts, answers = [], {}
    columns = {k: v for k, v in table["data"].items() if k in SiteRows.model_fields}
    for number, name in enumerate(("north", "south")):
        home = tmp_path / name
        home.mkdir()
        own = kind.rows[30 * number : 30 * number + 20 + 7 * number]
        files = {s: Path(written(home / f"{s}.jsonl", own)).name for s in ("train", "test")}
        data = {**columns, **files}
        site: dict[str, Any] = {"name": name, "device": "cpu", "data": data}
        site["model"] = table["model"]["source"]
        (home / "site.toml").write_text(tomli_w.dumps(site), encoding="utf-8")
        state = settled(home / "site.toml")
        told = resident.answer(state, Frame({"do": "recipe"}, text))
        assert told.header["ok"], told.header
        assignment = state.assignment
        assert assignment is not None
        method, start, client = assignment.method, assignment.start, Client(name, 20)
        key = Key(0, 1, name)
        payload = method.publish(method.plan(method.init(start), key), client, key)
        trained = resident.answer(state, train(text, 1, encode(payload)))
        assert trained.header["ok"], trained.header
        assert trained.header["loss"] > 0
        answers[name] = resident.answer(
            state, rate("evaluate", text, 1, resident.whole_message(start))
        )
        assert assignment.test is not None
        counts.append(tally(assignment.resident, start, assignment.test, precision="fp32"))
        classes = assignment.resident.classes
    said: list[str] = []
    joint = joint_score(answers, kind.task, classes, said.append)
    expected = scores(catalogue.load(kind.task), counts, classes)
    assert not said
    assert joint is not None
    assert joint.counted == expected.counted
    assert joint.loss == pytest.approx(expected.loss, rel=1e-5)
    assert next(iter(joint.metrics)) == kind.leads
    last = catalogue.load(kind.task).leads(classes, False)[-1]
    led = joint_score(answers, kind.task, classes, said.append, last)
    assert led is not None
    assert next(iter(led.metrics)) == last
    worst = min(scores(catalogue.load(kind.task), [each], classes).metrics[last] for each in counts)
    assert led.metrics["client_worst"] == pytest.approx(worst, rel=1e-5, abs=1e-6)
    known = {name: expected.metrics[name] for name in joint.metrics}
    assert dict(joint.metrics) == pytest.approx(known, rel=1e-5, abs=1e-6)
    assert set(CLASSES) == {k.task for k in KINDS if catalogue.load(k.task).named}


def test_sites_are_told_all_that_says_how_rows_are_read(tiny: Tiny, tmp_path: Path) -> None:
    """Each key of [data] is told, or is the site's own, or the server's."""
    own = set(SiteRows.model_fields)
    assert set(Data.model_fields) == own | set(READ_AS) | {"set", "more_tests"}
    assert not own & set(READ_AS)
    told = {
        "classes": ["x", "y"],
        "max_length": 17,
        "validation": 0.3,
        "option_word": "choice",
        "answer": "It is {option}.",
        "first_option": 1,
        "new_tokens": 7,
        "stop": ["\n", "END"],
    }
    assert told.keys() == set(READ_AS)
    plain = Data(train="rows.jsonl").model_dump()
    assert all(plain[name] != value for name, value in told.items())
    table = tiny.table()
    table["data"] |= told
    recipe = recipes.check(table)
    text = recipes.dump(told_to.for_sites(recipe), {}).encode()
    rows = {"train": "here.jsonl", "text": "text", "label": "label"}
    given = {"name": "north", "model": str(tiny.bert), "data": rows, "folder": tmp_path}
    found = assignment.checked(text, Site.model_validate(given))
    for name in READ_AS:
        assert getattr(found.data, name) == getattr(recipe.data, name), name
