"""A guess as a recipe: TOML that runs as it is, with why each key is there beside it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedsieve.errors import count, printable
from fedsieve.start.guess import Guess
from fedsieve.start.look import Looked

HELD = 0.2  # of the rows, to evaluate on where there are no test rows
MANY = 20  # classes: for more, steps are larger, and there are more of them
FEWEST = 20  # clients: of fewer, five take part in a round, else ten
_LENGTHS = (32, 64, 128, 256)  # no more, for a first look: steps take as long as their tokens
_FRAME = 80  # tokens that a chat's template may write around what is said
_LANGUAGE = ("causal-lm", "generation", "multiple-choice")
_PROMPT = "Columns stand in braces; the loss is on the completion alone."

# What each key is for, by its table.
WHY: Mapping[str, str] = {
    "name": "the run goes into runs/<name>",
    "seed": "every random choice follows from it",
    "rounds": "how often clients train and the server merges: few, for a first look",
    "cohort": "clients a round",
    "model.source": "a folder, a name of the hub, or one that `fedsieve fetch` knows",
    "model.task": "what is learned: docs/tasks.md",
    "lora.rank": "of the adapter: higher learns more, and sends more",
    "lora.alpha": "scales the adapter by alpha / rank",
    "data.train": "a path is taken from where the command is run",
    "data.config": "of the hub's data set",
    "data.train_split": "the part that is trained on",
    "data.test": "rows to evaluate on, never trained on",
    "data.test_split": "rows to evaluate on, never trained on",
    "data.separator": "of the file's columns",
    "data.field": "of the file's object, under which the rows lie",
    "data.text": "the column that is read",
    "data.text_b": "the column that is read beside it",
    "data.image": "the column of images",
    "data.label": "the column to be told",
    "data.options": "what can be chosen",
    "data.prompt": _PROMPT,
    "data.completion": "what is to be said",
    "data.max_length": "tokens kept of a text; `fedsieve check` counts those that are cut",
    "data.validation": "a share of the rows is held back from all clients, to evaluate on",
    "partition.kind": "who has which rows",
    "partition.column": "one client for each of its values",
    "partition.clients": "the rows are dealt to so many at random",
    "budgets.down": "a client gets a quarter of the adapter's entries, those that changed most",
    "budgets.up": "and returns a quarter of its changes",
    "method.name": "sparse messages; `fedsieve methods` lists the others",
    "method.ranked": "send what has changed most since the start",
    "method.up_values": "a byte a number on the way up",
    "server.optimizer": "the mean of the clients' changes",
    "server.lr": "is taken as it is",
    "training.optimizer": "of each client",
    "training.lr": "the first thing to change if the loss jumps, or hardly falls",
    "training.epochs": "passes over a client's rows in a round",
    "training.steps": "of a client in a round, however many rows it has",
    "training.batch": "rows a step; with less memory fewer, or micro_batch",
    "training.augment": "images are moved and flipped a little",
    "evaluation.on": "the rows that data.validation holds back",
    "evaluation.every": "rounds",
    "evaluation.limit": "of so many rows; without it, of all",
}


def table_of(looked: Looked, guess: Guess, name: str) -> dict[str, Any]:
    """The recipe's tables; nothing in them is None."""
    language, images = guess.task in _LANGUAGE, guess.task.startswith("image")
    tested = looked.test is not None or looked.test_split is not None
    own = isinstance(guess.clients, str)
    clients = looked.column(guess.clients).distinct if isinstance(guess.clients, str) else 0
    number = clients or guess.clients
    assert isinstance(number, int)
    data = {
        "train": looked.source,
        "config": looked.config,
        "train_split": looked.train_split,
        "test": looked.test,
        "test_split": looked.test_split,
        "separator": looked.separator,
        "field": looked.field,
        **guess.data,
        "max_length": None if images else length_for(guess.words, _FRAME if language else 0),
        "validation": None if tested else HELD,
    }
    many = _classes(looked, guess) > MANY
    training: dict[str, Any] = {
        "optimizer": "adamw",
        "lr": 1e-3 if language else 1e-2 if many else 3e-3,
        "steps": 10 if many else 5,
        "batch": 8 if language else 16,
        "augment": "crop-flip" if images else None,
    }
    table = {
        "name": name,
        "seed": 0,
        "rounds": 5 if language else 20 if many else 10,
        "cohort": min(number, 5 if language or number < FEWEST else 10),
        "model": {"source": guess.model, "task": guess.task},
        "lora": {"rank": 16, "alpha": 16},
        "data": data,
        "partition": {
            "kind": "column" if own else "iid",
            "column" if own else "clients": guess.clients,
        },
        "budgets": [{"down": 0.25, "up": 0.25}],
        "method": {"name": "flasc", "ranked": "change", "up_values": "int8"},
        "server": {"optimizer": "sgd", "lr": 1.0},
        "training": training,
        "evaluation": {
            "on": None if tested else "validation",
            "every": 1 if language else 2,
            "limit": 200 if language else 1000,
        },
    }
    return {key: _given(value) for key, value in table.items()}


def _classes(looked: Looked, guess: Guess) -> int:
    """That texts are told apart by; 0 of another task."""
    label = guess.data.get("label")
    if guess.task != "classification" or not isinstance(label, str):
        return 0
    return looked.column(label).distinct


def length_for(words: int, around: int) -> int:
    """Tokens for texts of so many words: three for two words, and as many as stand around them."""
    tokens = 1.5 * words + 8 + around
    return next((length for length in _LENGTHS if length >= tokens), _LENGTHS[-1])


def text_of(table: Mapping[str, Any], first: str) -> str:
    """The table as TOML, with `first` above it and what each key is for beside it."""
    lines = [f"# {printable(first)}"]
    plain = {key: value for key, value in table.items() if not isinstance(value, dict | list)}
    lines += _lines("", plain)
    for name, inner in table.items():
        for each in inner if isinstance(inner, list) else [inner]:
            if isinstance(each, Mapping):
                head = f"[[{name}]]" if isinstance(inner, list) else f"[{name}]"
                lines += ["", head, *_lines(f"{name}.", each)]
    return "\n".join(lines) + "\n"


def first_line(looked: Looked, guess: Guess) -> str:
    """Of the file: what it is."""
    whose = (
        f"one client a {guess.clients!r}"
        if isinstance(guess.clients, str)
        else f"dealt to {count(guess.clients, 'client')}"
    )
    return f"{guess.task} over {looked.source}: {count(looked.rows, 'row')}, {whose}"


def name_for(source: str) -> str:
    """A run's name for a source."""
    stem = Path(source.rstrip("/")).name.split(".")[0]
    return re.sub(r"[^\w-]+", "-", stem).strip("-")[:60] or "run"


def _given(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: each for key, each in value.items() if each is not None}
    return value


def _dumped(key: str, value: Any) -> str:
    """A pair as TOML; what turns or hides letters in an editor is written by its number."""
    text = tomli_w.dumps({key: value}).strip()
    return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}" for c in text)


def _lines(prefix: str, table: Mapping[str, Any]) -> list[str]:
    pairs = {key: _dumped(key, value) for key, value in table.items()}
    return [
        f"{pair}  # {WHY[prefix + key]}" if prefix + key in WHY else pair
        for key, pair in pairs.items()
    ]
