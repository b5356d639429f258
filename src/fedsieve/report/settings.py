"""A recipe in words: what it is about in one line, where recipes differ, and what they share."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fedsieve.errors import count
from fedsieve.recipe.overrides import flat
from fedsieve.report.html import cut, folded, table, text
from fedsieve.report.read import Run
from fedsieve.report.series import Series, every_run, keys_of
from fedsieve.report.words import NONE, plain

LONGEST = 160  # characters of a value
NAME = 80  # of a model or a data set
PARTITIONS = {
    "dirichlet": "whose labels are drawn by Dirichlet({alpha})",
    "dirichlet-by-client": "whose labels are drawn by Dirichlet({alpha}), each for itself",
    "iid": "with rows drawn evenly",
}


def subject(run: Run) -> str:
    """What was trained, on what rows, by whom: as HTML; empty where the recipe does not say."""
    model, data, partition = (_part(run.recipe, key) for key in ("model", "data", "partition"))
    said = []
    if name := model.get("source") or model.get("name"):
        task = f" ({text(model['task'])})" if isinstance(model.get("task"), str) else ""
        said.append(f"<b>{_base(name)}</b>{task}")
    if isinstance(data.get("train"), str):
        said.append(f"on <b>{_base(data['train'])}</b>")
    clients = _clients(run, partition)
    if clients:
        said.append(f"over {clients}")
    cohort = run.recipe.get("cohort")
    if clients and isinstance(cohort, int):
        said[-1] += f", {cohort:,} a round"
    return " ".join(said)


def _part(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = recipe.get(key)
    return found if isinstance(found, Mapping) else {}


def _base(name: object) -> str:
    """The last part of a path; a hub's name whole."""
    path = PurePath(str(name))
    return cut(path.name if path.is_absolute() else path, NAME)


def _clients(run: Run, partition: Mapping[str, Any]) -> str:
    number = partition.get("clients")
    if not isinstance(number, int):
        number = run.clients.distinct if run.clients else 0
    if not number:
        return ""
    noun = "site" if is_federation(run) else "client"
    form = PARTITIONS.get(str(partition.get("kind")), "")
    how = form.format(alpha=cut(plain(partition.get("alpha", "?")), 20)) if form else ""
    if partition.get("kind") == "column":
        how = f"named by column {cut(partition.get('column', '?'), NAME)}"
    return f"{count(number, noun)} {how}".rstrip()


def is_federation(run: Run) -> bool:
    """Whether its clients were sites on other machines."""
    return "federation" in _part(run.recipe, "environment")


def differences(series: Sequence[Series]) -> str:
    """The keys in which the recipes of several series differ; the environment apart."""
    each = [_joined(one) for one in series]
    every = [key for key in _every(each) if key != "name"]
    keys = [key for key in every if len({e.get(key) for e in each}) > 1]
    if not keys:
        return ""
    body = "".join(
        f'<tr><th scope="row"><code>{text(key)}</code></th>'
        + "".join(f"<td>{cut(e.get(key, NONE), LONGEST)}</td>" for e in each)
        + "</tr>"
        for key in keys
    )
    made = table(
        ["Key", *(one.label for one in series)], body, "Where the recipes differ", "differ"
    )
    return (
        '<section><h2 id="differences">Where the recipes differ</h2>'
        f'<div class="card">{made}</div></section>'
    )


def _joined(series: Series) -> dict[str, str]:
    """The recipe's keys; several values where the runs of a series have them."""
    each = [keys_of(run.recipe) for run in series.runs]
    return {key: " | ".join(dict.fromkeys(e.get(key, NONE) for e in each)) for key in _every(each)}


def _every(each: Sequence[Mapping[str, str]]) -> list[str]:
    return [*dict.fromkeys(key for of_one in each for key in of_one)]


def shared(series: Sequence[Series]) -> str:
    """The settings that all runs have alike, a line for each table of the recipe."""
    each = [keys_of(run.recipe) for run in every_run(series)]
    lines: dict[str, list[str]] = {}
    for key, value in each[0].items():
        if key == "name" or not value or any(other.get(key) != value for other in each[1:]):
            continue
        part, dot, name = key.partition(".")
        if not dot and isinstance(every_run(series)[0].recipe.get(key), list):
            name = ""  # a list of tables, as budgets are
        elif not dot:
            part, name = "run", key
        word = f"<span>{cut(name.replace('_', ' '), NAME)}</span> " if name else ""
        lines.setdefault(part, []).append(f"<li>{word}{cut(value, LONGEST)}</li>")
    if not lines:
        return ""
    body = "".join(
        f'<tr><th scope="row">{cut(part, NAME)}</th><td><ul>{"".join(said)}</ul></td></tr>'
        for part, said in lines.items()
    )
    return f'<div class="card">{table(["Of", "Settings"], body, "Settings", "settings")}</div>'


def recipes(runs: Sequence[Run]) -> str:
    """Each recipe as it stands, folded away."""
    if len(runs) == 1:
        return f"<details><summary>Recipe and versions</summary>{_recipe(runs[0])}</details>"
    return folded([(run.name, _recipe(run)) for run in runs])


def _recipe(run: Run) -> str:
    environment = _part(run.recipe, "environment")
    versions = ""
    if environment:
        body = "".join(
            f'<tr><th scope="row">{cut(key, NAME)}</th><td>{cut(plain(value), LONGEST)}</td></tr>'
            for key, value in flat(environment)
        )
        versions = f"<h3>Versions</h3>{table(['What', 'Version'], body, 'Versions')}"
    return f'<pre tabindex="0"><code>{text(run.recipe_text)}</code></pre>{versions}'
