"""Recipes: every key has its place, its limits and a message that names it."""

import contextlib
import datetime
import math
import re
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsieve.algebra.method import Method
from fedsieve.disk import LARGEST
from fedsieve.errors import FedSieveError
from fedsieve.recipe import read as recipes
from fedsieve.recipe.method import build_method
from tests.conftest import Tiny


def test_what_is_dumped_is_the_same_recipe_with_every_default_in_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    given = recipes.check(tiny.table(model__settings={"attention_probs_dropout_prob": 0.0}))
    text = recipes.dump(given, {"python": "3", "notes": ["said [once]"]})
    table = tomllib.loads(text)
    assert table["environment"] == {"python": "3", "notes": ["said [once]"]}
    assert table["training"]["momentum"] == 0.9  # not given: a default
    assert table["seed"] == 0
    path = tmp_path / "again.toml"
    path.write_text(text, encoding="utf-8")
    assert recipes.load(str(path)) == given
    assert recipes.dump(recipes.load(str(path)), {"python": "3", "notes": ["said [once]"]}) == text


def test_every_shipped_recipe_is_sound_and_says_what_it_is() -> None:
    shipped = recipes.shipped()
    assert "demo" in shipped
    for name, text in shipped.items():
        assert recipes.load(name).name == name
        assert text.startswith("# ")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_recipe_as_some_editors_save_it_is_read_or_told(
    tiny: Tiny, tmp_path: Path, encoding: str
) -> None:
    path = tiny.write(tmp_path / "r.toml", name="é")
    given, text = recipes.load(str(path)), path.read_text("utf-8")
    path.write_text(text, encoding=encoding)
    if encoding == "utf-8-sig":
        assert recipes.load(str(path)) == given
        return
    said = "not UTF-8" if encoding == "latin-1" else "UTF-16 or UTF-32"
    with pytest.raises(FedSieveError, match=rf"r\.toml cannot be read: it is {said}: save it as"):
        recipes.load(str(path))


def test_overrides_are_toml_or_plain_text(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "tiny.toml")
    changed = recipes.load(
        str(path),
        [
            "rounds=9",
            "training.lr=1e-4",
            "name=words without quotes",
            "lora.rslora=true",
            "budgets.1.ratio=0.75",
            'lora.targets=["key", "dense"]',
            "model.settings.hidden_dropout_prob=0.25",
            "data.label=a=b",
        ],
    )
    assert (changed.rounds, changed.training.lr, changed.name) == (9, 1e-4, "words without quotes")
    assert changed.lora.rslora is True
    assert isinstance(changed.budgets, tuple)
    assert [tier.ratio for tier in changed.budgets] == [0.25, 0.75, 1.0]
    assert changed.lora.targets == ("key", "dense")
    assert changed.model.settings == {"hidden_dropout_prob": 0.25}
    assert changed.data.label == "a=b"


def test_what_the_error_about_anothers_option_says_to_do_can_be_done() -> None:
    with pytest.raises(
        FedSieveError, match=r"method\.head: the method .flexlora. has no"
    ) as raised:
        recipes.parse(recipes.read("demo", ["method.name=flexlora"]))
    advice = re.search(r"method=.(\{.*\}). on the command line", str(raised.value))
    assert advice is not None
    changed = recipes.parse(recipes.read("demo", [f"method={advice[1]}"]))
    assert changed.method.model_extra == {}


def test_an_override_without_a_value_takes_the_key_out() -> None:
    """So a recipe that ships can be pointed at a file, which has no splits."""
    own = ["data.train=mine.csv", "data.train_split=", "data.test_split= ", "training.steps="]
    changed = recipes.load("demo", own)
    data = changed.data
    assert (data.train, data.train_split, data.test_split) == ("mine.csv", None, None)
    assert changed.training.steps is None
    assert changed.training.lr == recipes.load("demo").training.lr
    with pytest.raises(FedSieveError, match=r"no data\.train_splt to take out .*'train_split'"):
        recipes.load("demo", ["data.train_splt="])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds", "'rounds' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("rounds.x=3", "'rounds.x=3': 'x' is not a key of a table"),
        ("rounds.x.y=3", "'rounds.x.y=3': 'x' is not a table of the recipe"),
        ("budgets.7.ratio=0.5", "'7' is not a table of the recipe"),
        ("budgets.ratio=0.5", "budgets is a list: budgets.0 to 2 are its parts (budgets.0.ratio)"),
        ("rouns=3", "rouns: unknown key (did you mean 'rounds'"),
        ("trainning.lr=3", "trainning: unknown key (did you mean 'training'"),
        (r'data.train="C:\data"', "a backslash is a backslash"),
        ('name="one" "', "Expected newline or end of document"),
        ("seed=" + "9" * 5000, "it cannot be read"),
        ("seed=" + "[" * 3000, "it cannot be read"),
        ("seed=" + "[" * 200 + "]" * 200, "nested more than"),
        ("seed=" + "9" * 400, "seed"),
        ("budgets.\u00b2.up=1", "'\u00b2' is not a table of the recipe"),
        ("budgets." + "9" * 5000 + ".up=1", "is not a table of the recipe"),
        ("budgets.01.up=1", "'01' is not a table of the recipe"),
    ],
)
def test_overrides_that_change_nothing_known(
    tiny: Tiny, tmp_path: Path, override: str, message: str
) -> None:
    path = tiny.write(tmp_path / "tiny.toml")
    with pytest.raises(FedSieveError, match=re.escape(message)):
        recipes.load(str(path), [override])


# (what is changed, what the message says)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rouds": 3}, "rouds: unknown key (did you mean 'rounds'"),
    ({"model__sorce": "x"}, "model.sorce: unknown key (did you mean 'source'"),
    ({"lora__rnk": 3}, "lora.rnk: unknown key (did you mean 'rank'"),
    ({"training__momentun": 0.1}, "training.momentun: unknown key (did you mean 'momentum'"),
    ({"budgets": []}, "budgets: Tuple should have at least 1 item"),
    ({"budgets": [{"ratoi": 0.5}]}, "budgets.0.ratoi: unknown key (did you mean 'ratio'"),
    ({"method__hed": "whole"}, "method.hed: unknown key (did you mean 'head'"),
    ({"server__betta1": 0.5}, "server.betta1: unknown key (did you mean 'beta1'"),
    ({"evaluation__evry": 1}, "evaluation.evry: unknown key (did you mean 'every'"),
    ({"checkpoint__evry": 1}, "checkpoint.evry: unknown key (did you mean 'every'"),
    ({"partition__alhpa": 1}, "partition.alhpa: unknown key (did you mean 'alpha'"),
    ({"data__txt": "a"}, "data.txt: unknown key (did you mean 'text'"),
    ({"rounds": None}, "rounds: this key is needed"),
    ({"model": {}}, "model.source: this key is needed"),
    ({"rounds": 0}, "rounds: Input should be greater than 0 (it is 0)"),
    ({"cohort": -1}, "cohort: Input should be greater than 0 (it is -1)"),
    ({"seed": -1}, "seed: Input should be greater than or equal to 0 (it is -1)"),
    ({"lora__rank": 0}, "lora.rank: Input should be greater than 0 (it is 0)"),
    ({"lora__dropout": 1.0}, "lora.dropout: Input should be less than 1 (it is 1.0)"),
    ({"training__lr": 0}, "training.lr: Input should be greater than 0 (it is 0)"),
    ({"training__lr": "fast"}, "(it is 'fast')"),
    ({"training__optimizer": "adan"}, "training.optimizer: Input should be 'sgd' or 'adamw'"),
    (
        {"model__task": "regresion"},
        "there is no task 'regresion' (did you mean 'regr",
    ),
    (
        {"server__optimizer": "adamm"},
        "server.optimizer: Input should be 'sgd', 'adam' or 'fedadam'",
    ),
    ({"server__lr": "high"}, "server.lr: Input should be a valid number"),
    ({"method__head": "half"}, "method.head: Input should be 'sieved' or 'whole'"),
    ({"method__up_values": "int4"}, "method.up_values: Input should be"),
    (
        {"method": {"name": "fedit", "head": "whole"}},
        "method.head: the method 'fedit' has no such option (known are ",
    ),
    (
        {"method": {"name": "flora", "feedback": True}},
        "or replace the whole table, as in method='{ name = \"flora\" }' on the command line",
    ),
    ({"method__name": "flask"}, "unknown method 'flask' (did you mean 'flasc'"),
    ({"method__name": "no.such.module"}, "method 'no.such.module' cannot be imported"),
    ({"method__name": "fedsieve.algebra.keys"}, "'fedsieve.algebra.keys' has no function `method`"),
    ({"method": {}}, "method.name: this key is needed"),
    ({"partition": {"kind": "dirichlet", "alpha": 1.0}}, "'dirichlet' needs 'clients'"),
    ({"partition": {"kind": "dirichlet", "clients": 5}}, "'dirichlet' needs 'alpha'"),
    ({"partition": {"kind": "column"}}, "'column' needs 'column'"),
    ({"partition": {"kind": "iid", "clients": 3, "alpha": 1}}, "'iid' does not use 'alpha'"),
    ({"partition": {"kind": "iid", "clients": 3, "by": "task"}}, "'iid' does not use 'by'"),
    ({"partition": {"kind": "dirichlet-by-client", "clients": 3}}, "by-client' needs 'alpha'"),
    ({"partition": {"kind": "other"}}, "partition.kind: Input should be 'dirichlet'"),
    ({"method": {"name": "fedit"}}, "budgets.ratio: the method 'fedit' makes no use of it"),
    ({"method": {"name": "flasc"}}, "budgets.ratio: the method 'flasc' makes no use of it"),
    ({"method": {"name": "fslora"}}, "budgets.down: the method 'fslora' makes no use of it"),
]
# Shares of what a client can afford lie in (0, 1].
WRONG += [
    ({"budgets": [{knob: value}]}, f"budgets.0.{knob}: Input should be {said} (it is {value})")
    for knob in ("ratio", "down", "up")
    for value, said in (
        (0, "greater than 0"),
        (1.5, "less than or equal to 1"),
        (-1, "greater than 0"),
    )
]


# Values that a run would never be through with, or break off over.
WRONG += [
    ({"lora__rank": 10**9}, "lora.rank: Input should be less than or equal to 65535"),
    ({"lora__rank": 2**62}, "lora.rank: Input should be less than or equal to 65535"),
    ({"lora__targets": "(" * 950 + "a" + ")" * 950}, "lora.targets: not a regular expression"),
    (
        {"lora__targets": "(" + "a*" * 1000 + ")"},
        "lora.targets: a regular expression of 2,002 letter",
    ),
    ({"lora__targets": "a{4294967295}"}, "lora.targets: a regular expression whose counted"),
    (
        {"lora": {"targets": ["query"], "layers_pattern": "(.+)+!", "layers_to_transform": [0]}},
        "lora.layers_pattern: '(.+)+!' is no name of a list of layers",
    ),
    ({"budgets": {"kind": "tiers", "tiers": 10**9}}, "tiers: Input should be less than or equal"),
    ({"budgets": [{"share": 1e308}, {}]}, "share: Input should be less than or equal to 1000000"),
    (
        {"training": {"proximal": 1e308}},
        "proximal: Input should be less than or equal to 1000000000",
    ),
    (
        {"privacy": {"clip": 1.0, "delta": 0.1, "noise_multiplier": 1e308}},
        "noise_multiplier: Input should be less than or equal to 1000000",
    ),
    ({"data__classes": ["cars", "wine", "cars"]}, "classes: 'cars' is there twice"),
]


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", r"(?!.*head).*(query|value)$", r"(a+)b+"])
def test_patterns_that_come_to_an_end_are_taken(tiny: Tiny, pattern: str) -> None:
    assert recipes.check(tiny.table(lora__targets=pattern)).lora.targets == pattern


# What no configuration holds would be another value, or none, in the recipe that a run keeps.
WRONG += [
    (
        {"model": {"source": "minilm-l6", "settings": settings}},
        f"model: settings.{key}: {value} is nothing that a model's configuration holds",
    )
    for settings, key, value in (
        ({"layer_norm_eps": math.inf}, "layer_norm_eps", "inf"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps", "nan"),
        ({"id2label": {"0": [1, -math.inf]}}, "id2label.0", "-inf"),
        ({"born": datetime.date(2026, 1, 2)}, "born", "2026-01-02"),
    )
]
# A key that may have several types is called by its own name.
WRONG += [
    ({"server": {"norm_bound": 0.5}}, "server.norm_bound: Input should be greater than or equal"),
    ({"server": {"norm_bound": 0.5}}, "server.norm_bound: Input should be 'none'"),
    ({"engine": {"together": 0}}, "engine.together: Input should be greater than or equal to 1"),
    ({"budgets": {"kind": "ratios", "ratios": 5}}, "budgets.ratios: a list is needed here"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(each[0]) for each in WRONG])
def test_a_wrong_recipe_is_refused_by_the_name_of_its_key(
    tiny: Tiny, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedSieveError, match=re.escape(message)):
        recipes.check(tiny.table(**changes), allow_code=True)


def test_all_mistakes_are_told_at_once(tiny: Tiny) -> None:
    with pytest.raises(FedSieveError) as told:
        recipes.check(tiny.table(rouds=3, training__lr=-1.0), "mine.toml")
    lines = str(told.value).splitlines()
    assert lines[0] == "mine.toml:"
    assert len(lines) == 3


def test_options_of_methods_and_servers_reach_them(tiny: Tiny) -> None:
    table = tiny.table(method={"name": "flasc", "feedback": True}, budgets=[{"up": 0.5}])
    assert build_method(recipes.check(table)).knobs == {"down", "up"}
    # A method of one's own, by the dotted name of its module.
    table = tiny.table(method={"name": "fedsieve.methods.fslora"}, budgets=[{"ratio": 0.5}])
    assert build_method(recipes.check(table)).knobs == {"ratio"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.toml", None, r"there is no recipe .*none.toml$"),
        ("nome.toml", None, r"there is no recipe .*nome.toml \(did you mean 'home.toml'\?\)"),
        ("bad.toml", b"rounds = = 3", "bad.toml is not valid TOML"),
        ("bytes.toml", b"\xff\xfe", "bytes.toml cannot be read"),
        ("empty.toml", b"", "rounds: this key is needed"),
        ("value.toml", b'rounds = 1\nmethod = "fslora"', "method: a table is needed here"),
        ("home.tml", None, r"no recipe is called .*home.tml"),
    ],
)
def test_files_that_are_no_recipe(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if name == "nome.toml":
        (tmp_path / "home.toml").touch()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FedSieveError, match=message):
        recipes.load(str(path))


def test_a_number_on_the_command_line_that_is_too_large_is_named() -> None:
    with pytest.raises(FedSieveError, match=rf"^training.steps is a number beyond {LARGEST}$"):
        recipes.load("demo", [f"training.steps={10**22}"])


def write_own(folder: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """A module `mine.own`, which can be imported."""
    (folder / "mine").mkdir()
    (folder / "mine" / "own.py").write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("mine", "mine.own"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError.*PYTHONPATH=."),
        ("raise SystemExit(0)", "cannot be imported: SystemExit: 0"),
        ("1 +", "cannot be imported: SyntaxError"),
        ("x = 1", "has no function `method`"),
        ("method = 5", "has no function `method`"),
        ("def method(server=None):\n    raise SystemExit(0)", "fails: SystemExit: 0"),
        ("def method(server=None):\n    raise KeyError('a' * 10**6)", "fails: KeyError: 'a"),
        ("def method():\n    return 1", "fails: TypeError"),
        ("def method(server=None): pass", "gives a NoneType, and no fedsieve Method"),
        ("class method:\n    def __init__(self, server=None): pass", "gives a method, and no fed"),
        ("method = dict", "gives a dict, and no fedsieve Method"),
    ],
)
def test_what_a_method_of_ones_own_does_is_told_by_its_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    write_own(tmp_path, monkeypatch, content)
    table = tiny.table(method={"name": "mine.own"}, budgets=None)
    with pytest.raises(FedSieveError, match=f"'mine.own' {said}") as caught:
        build_method(recipes.check(table, allow_code=True))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content",
    [
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "from fedsieve.methods import fedit\nif TYPE_CHECKING:\n    from x import Optimizer\n"
        "def method(*, share: float = 1.0, server: Optimizer | None = None):\n"
        "    return fedit.method(server=server)",
        "from functools import partial\nfrom fedsieve.methods import fedit\n"
        "method = partial(fedit.method, weighting='uniform')",
        "from fedsieve.methods import fedit\n"
        "class Make:\n    def __call__(self, **options): return fedit.method(**options)\n"
        "method = Make()",
    ],
    ids=["annotations for type checkers", "partial", "object"],
)
def test_whatever_can_be_called_builds_a_method_of_ones_own(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    write_own(tmp_path, monkeypatch, content)
    table = tiny.table(method={"name": "mine.own"}, budgets=None)
    assert isinstance(build_method(recipes.check(table, allow_code=True)), Method)


LONG = ".".join("a" * 40)  # parts, whose reading costs the cube of their number

# Every way in which TOML begins and ends a string, with something like a long key inside and after.
INSIDE = [
    f'x = "{LONG}"', f"x = '{LONG}'", f'x = """\n{LONG}\n"""', f"x = '''\n it's {LONG}'''",
    f"# {LONG}", f'x = """" {LONG}"""', f'x = "\\"{LONG}"', f'x = """a\\""" {LONG}"""',
    f'x = """a""""" # {LONG}', f'x = """{LONG}\\\n  {LONG}"""', "d = 1979-05-27T07:32:00.5-07:00",
]  # fmt: skip
AFTER = [
    f"{LONG} = 1", f"[{LONG}]", f"[[ {LONG} ]]", f"x = {{ y = 1, {LONG} = 1 }}",
    " . ".join(['"\\""'] * 40) + " = 1", f'b = """"a""""\n{LONG} = 1', f"# it's\n{LONG} = 1",
    f'x = {{ b = """"a"""", {LONG} = 1 }}', f"x = {{ b = ''''a'''', {LONG} = 1 }}",
    f'b = "it\'s"\n{LONG} = 1', f'# """\n{LONG} = 1', f'x = "\\\\"\n{LONG} = 1',
    f"x = '\\'\n{LONG} = 1", f'x = """\\\\"""\n{LONG} = 1', f'x = """a"""""\n{LONG} = 1',
]  # fmt: skip


@pytest.mark.parametrize("text", INSIDE)
def test_what_stands_in_a_string_is_no_key(text: str) -> None:
    assert recipes.toml(text, "mine.toml") == tomllib.loads(text)


@pytest.mark.parametrize("text", AFTER)
def test_a_key_of_many_parts_is_found_wherever_it_stands(text: str) -> None:
    assert tomllib.loads(text)  # is TOML otherwise
    with pytest.raises(FedSieveError, match="more than 32 parts"):
        recipes.toml(text, "mine.toml")


@pytest.mark.parametrize(
    "text",
    [
        "name='" + "x" * 900_000 + "'",
        '"\\' * 400_000,
        "\"'" * 400_000,
        "a" + " " * 900_000,
        "a.'" * 300_000,
    ],
)
def test_looking_for_long_keys_takes_no_square_of_a_text(text: str) -> None:
    began = time.process_time()
    with contextlib.suppress(FedSieveError):
        recipes.toml(text, "mine.toml")
    assert time.process_time() - began < 5


def test_names_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FedSieveError, match=r"no recipe is called 'demmo' \(did you mean 'demo'"):
        recipes.load("demmo")
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # a run's directory, say: it does not hide the recipe
    assert recipes.load("demo").name == "demo"
    Path("mine").write_text(tomli_w.dumps(recipes.load("demo").model_dump(exclude_none=True)))
    assert recipes.load("mine").name == "demo"


def test_what_a_run_s_recipe_has_written_out_is_what_the_page_says(tiny: Tiny) -> None:
    """Defaults of the tables and the method's own server, not the options of the method."""
    table = tiny.table(method={"name": "flasc"}, budgets=[{}], server=None, lora={"rank": 4})
    written = tomllib.loads(recipes.dump(recipes.check(table), {}))
    assert written["training"]["epochs"] == 1
    assert written["server"]["optimizer"] == "adam"
    assert written["method"] == {"name": "flasc"}
    assert "targets" not in written["lora"]
