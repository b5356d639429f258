"""Errors about a recipe's file name the line, and only where the file is to blame."""

import re
import tomllib
from pathlib import Path

import pytest

from fedsieve.errors import FedSieveError
from fedsieve.recipe import lines
from fedsieve.recipe import read as recipes

FILE = '''\
# [a] comment = 1
name = "a"  # b = 2
rounds = 2
cohort = 2
model = { source = "x", settings = { "odd.key" = 1.5 } }

[data]
train = "x.csv"
text = """
[training]
lr = 1
"""
classes = [
  "a", # b ]
  'c]',
]

[[budgets]]
ratio = 0.5

[[budgets]]
share = 2
up = 1.0

[partition]
kind = "iid"
clients = 2

[method]
name = "fslora"

[training]
lr = 0.1
optimizer = "sgd"
'''


def test_the_line_of_each_key() -> None:
    found = lines.lines_of(FILE)
    said = FILE.split("\n")
    for path, line in found.items():
        if path[-1].isdigit():
            continue  # an entry of a list has no name
        assert path[-1] in said[line - 1], (path, line)
    keys = {".".join(path) for path in found}
    assert {"model.source", "model.settings.odd.key", "budgets.1.up", "training.lr"} <= keys
    assert found["training", "lr"] == said.index("lr = 0.1") + 1
    assert found["data", "classes", "1"] == said.index("  'c]',") + 1
    assert "a" not in keys
    assert lines.line_at(found, ["partition", "alpha"]) == said.index("[partition]") + 1
    assert lines.line_at(found, ["nowhere"]) is None


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "a = 1", "a.b.c = []", "[a.b]\n[[a.c]]\n[[a.c]]\nd = {e = [[1], {f = 2}]}", "[a]"],
)
def test_any_file_is_gone_through(text: str) -> None:
    lines.lines_of(text)


# (what of the file is replaced by what, the line that is named, what is said)
WRONG = [
    ("rounds = 2", 'rounds = "many"', "rounds: Input should be a valid integer"),
    ("share = 2", "shrae = 2", "budgets.1.shrae: unknown key (did you mean 'share'"),
    ('kind = "iid"', 'kind = "dirichlet"', "partition: a partition of kind 'dirichlet' needs"),
    ("lr = 0.1", "lr = -1", "training.lr: Input should be greater than 0"),
    ("cohort = 2", "cohort = 2\nlr = 1", "lr: unknown key here: [training] has it"),
    ('optimizer = "sgd"', "rounds = 5", "training.rounds: unknown key here: it stands above"),
    ('name = "fslora"', 'name = "fslora"\nhed = 1', "method.hed: unknown key"),
    ('name = "fslora"', 'name = "fslora"\nhead = 1', "method.head: "),
    ("up = 1.0", "up = 0.5", "budgets.up: the method 'fslora' makes no use of it"),
    ('name = "a"', "evaluation.metric = 'mse'", "evaluation.metric: "),
]


@pytest.mark.parametrize(("before", "after", "said"), WRONG, ids=[each[1] for each in WRONG])
def test_a_mistake_is_shown_with_its_line(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.replace(before, after), encoding="utf-8")
    line = FILE[: FILE.index(before)].count("\n") + after.count("\n") + 1
    with pytest.raises(FedSieveError, match=re.escape(str(path))) as raised:
        recipes.load(str(path))
    told = re.findall(r"line (\d+): (.*)", str(raised.value))
    head = f"[{said.split(':')[0].split('.')[0]}]"  # its line, where no one key is to blame
    near = {line, *(FILE[: FILE.index(h)].count("\n") + 1 for h in (head,) if h in FILE)}
    assert any(int(number) in near and words.startswith(said) for number, words in told), told


def test_a_table_whose_name_is_misspelt_is_not_taken_for_a_key(tmp_path: Path) -> None:
    """[data] has a key "train", and [training] was meant."""
    path = tmp_path / "mine.toml"
    path.write_text(FILE.replace("[training]", "[train]"), encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"train: unknown key \(did you mean 'training'"):
        recipes.load(str(path))


def test_what_an_override_has_changed_is_on_no_line(tmp_path: Path) -> None:
    """And the file is not blamed for it."""
    path = tmp_path / "mine.toml"
    path.write_text(FILE, encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"\n  an override: training\.lr: Input"):
        recipes.load(str(path), ["training.lr=fast"])
    with pytest.raises(FedSieveError, match=r"\n  an override: rouns: unknown key"):
        recipes.load(str(path), ["rouns=1"])


@pytest.mark.parametrize("value", ["nan", "inf", "-1", '[nan, "x"]'])
def test_a_number_that_is_none_is_on_its_line(value: str) -> None:
    """Not a number is no equal of itself, and no override changed it."""
    text = f"name = 'north'\nseconds = {value}\n"
    assert lines.placed("seconds: odd", text, tomllib.loads(text)) == "line 2: seconds: odd"


def test_a_file_that_is_no_toml_is_shown_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("rounds = 2\ncohort = = 3\n", encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"mine\.toml is not valid.*line 2.*: cohort = = 3"):
        recipes.load(str(path))
