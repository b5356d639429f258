"""The page: HTML that needs nothing but itself.

No script, no font and no picture comes from outside, so the file can be mailed, archived and
opened offline. Every text of a run is escaped on its way in. The summary of runs has its measures
as rows and the runs as columns: one run reads well on a phone, several compare line by line. Groups
of runs have a line each, as in a paper's table, and the summary of their runs is folded away.
"""

from collections.abc import Sequence
from string import Template
from typing import Any

from fedsieve.clients.network import Conditions
from fedsieve.engine.shares import Shares, in_words
from fedsieve.errors import count
from fedsieve.recipe.overrides import flat
from fedsieve.report import shown
from fedsieve.report.canvas import COLOURS
from fedsieve.report.html import table, text
from fedsieve.report.plots import Plot, reached, to_reach
from fedsieve.report.read import LOSS, Budget, Run, best, evaluations
from fedsieve.report.series import (
    Row,
    Series,
    Spread,
    Target,
    budgets,
    doubts,
    every_run,
    keys_of,
    shown_measure,
    spread,
)
from fedsieve.report.words import duration, fewer, megabytes, score
from fedsieve.tasks.words import spoken

NONE = "–"  # noqa: RUF001
SHOWN_REASONS = 5
SHOWN_ROWS = 12  # of budgets; more are folded away
DARK_COLOURS = ("#4ba3df", "#f07b3a", "#2fc79a", "#e39ac2", "#f0b53a", "#8ecff5", "#a6a6a6")


def page(
    series: Sequence[Series],
    rows: Sequence[Row],
    conditions: Sequence[Conditions],
    plots: Sequence[tuple[Plot, str]],
) -> str:
    """The whole HTML document; `rows` are the series' table, `plots` come with their SVG."""
    title = "FedSieve: " + ", ".join(one.label for one in series)
    return _PAGE.substitute(
        title=text(title),
        light="".join(f"--run-{i}:{c};" for i, c in enumerate(COLOURS)),
        dark="".join(f"--run-{i}:{c};" for i, c in enumerate(DARK_COLOURS)),
        heading=text(_heading(series)),
        leads="".join(_lead(i, one) for i, one in enumerate(series)),
        warnings=_warnings(series),
        plots="".join(_plot(plot, svg, series, rows, conditions) for plot, svg in plots),
        summary=_summary(series, rows, conditions),
        shown=_shown(series),
        differences=_differences(series),
        recipes="".join(_recipes(one) for one in series),
    )


def _heading(series: Sequence[Series]) -> str:
    if len(series) == 1:
        return series[0].label
    runs = f"{len(every_run(series))} runs"
    return f"{runs} compared" if not _grouped(series) else f"{runs} in {len(series)} groups"


def _grouped(series: Sequence[Series]) -> bool:
    return any(len(one.runs) > 1 for one in series)


def _mb(n: float) -> str:
    """Megabytes to read, the exact bytes for machines and for those who point at it."""
    return f'<data value="{n:.0f}" title="{n:,.0f} bytes">{megabytes(n)}</data>'


def _swatch(index: int) -> str:
    return f'<i class="swatch" style="background:var(--run-{index % len(COLOURS)})"></i>'


def _lead(index: int, series: Series) -> str:
    ends = [run.rounds[-1] for run in series.runs]
    parts = []
    if measure := shown_measure([series]):
        found = [evaluations(run, measure) for run in series.runs]
        if final := spread([rows[-1].value for rows in found if rows]):
            parts.append(f"{spoken(measure)} <b>{score(final.mean, final.deviation)}</b>")
    sent = sum(end.total_bytes for end in ends) / len(ends)
    rounds = count(max(end.round for end in ends), "round")
    parts.append(f"after {rounds} and <b>{megabytes(sent)}</b>")
    known = [end.dense_bytes for end in ends if end.dense_bytes]
    if len(known) == len(ends):
        dense = sum(known) / len(known)
        parts.append(f"(dense float32 LoRA: {megabytes(dense)}; <b>{fewer(sent, dense)}</b>)")
    mean = f", mean of {len(ends)} runs" if len(ends) > 1 else ""
    said = " ".join(parts) + mean
    return f"<li>{_swatch(index)}<strong>{text(series.label)}</strong>: {said}</li>"


def _warnings(series: Sequence[Series]) -> str:
    notes = [note for one in series for note in _notes(one)]
    measure = shown_measure(series)
    runs = every_run(series)
    if measure:
        without = [run.name for run in runs if not evaluations(run, measure)]
        if without and len(runs) > 1:
            word = spoken(measure)
            notes.append(f"Not in the plots of the {word}, which they lack: {_list(without)}.")
    sizes = {row.eval_examples for run in runs for row in run.rounds if row.eval_examples}
    if len(sizes) > 1:
        notes.append(
            "The evaluations saw different numbers of examples "
            f"({_list(f'{n:,}' for n in sorted(sizes))}): compare them with care."
        )
    if not notes:
        return ""
    items = "".join(f"<li>{note}</li>" for note in notes)
    return f'<section class="warnings" aria-label="Warnings"><ul>{items}</ul></section>'


def _notes(series: Series) -> list[str]:
    """A note that all runs of a series share is said once."""
    by_note: dict[str, list[str]] = {}
    for run in series.runs:
        for note in run.notes:
            by_note.setdefault(note, []).append(run.name)
    said = [(series.label, note) for note in doubts(series)]
    for note, names in by_note.items():
        shared = len(names) == len(series.runs)
        said += [(name, note) for name in ([series.label] if shared else names)]
    return [f"<b>{text(name)}</b>: {text(note)}" for name, note in said]


def _list(names: Any) -> str:
    return ", ".join(text(name) for name in names)


def _plot(
    plot: Plot,
    svg: str,
    series: Sequence[Series],
    rows: Sequence[Row],
    conditions: Sequence[Conditions],
) -> str:
    label = text(f"{plot.title}. {plot.caption}")
    wide, numbers = "", ""
    if plot.key == "bytes-budget":
        wide, numbers = ' class="wide"', _budgets(series)
    elif plot.key.endswith("-time"):
        wide, numbers = ' class="wide"', _costs(rows, conditions)
    return (
        f'<figure id="{plot.key}"{wide}>'
        f"<h3>{text(plot.title)}</h3>"
        f'<div class="drawing" role="img" aria-label="{label}">{svg}</div>'
        f"<figcaption>{text(plot.caption)}{numbers}</figcaption></figure>"
    )


def _costs(rows: Sequence[Row], conditions: Sequence[Conditions]) -> str:
    """What the target costs: bytes, and time under each of the conditions."""
    if not rows[0].target:
        return ""
    heads = ["", "Traffic", *(f"{world.link.up:g} Mbit/s up" for world in conditions)]
    body = "".join(
        f'<tr><th scope="row">{_swatch(i)}{text(row.label)}</th>{_cost_cells(row)}</tr>'
        for i, row in enumerate(rows)
        if row.final
    )
    return table(heads, body, to_reach(rows[0].target, rows))


def _cost_cells(row: Row) -> str:
    cells = [_exact(row.bytes_to_target, reached(row, row.bytes_to_target, megabytes), "bytes")]
    cells += [
        _exact(cost, reached(row, cost, duration), "seconds") for cost in row.seconds_to_target
    ]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _exact(found: Spread | None, said: str, unit: str) -> str:
    """A number to read; the exact one for machines, and with its range for those who point."""
    if found is None:
        return text(said)
    places = 0 if unit == "bytes" else 3
    title = f"{found.mean:,.{places}f} {unit}"
    if found.deviation is not None:
        title += f" ({found.low:,.{places}f} to {found.high:,.{places}f})"
    # A line may break before the deviation and nowhere else.
    said = text(said).replace(" ", "&nbsp;").replace("&nbsp;±", " ±").replace("&nbsp;(", " (")
    return f'<data class="cost" value="{found.mean:.{places}f}" title="{title}">{said}</data>'


def _budgets(series: Sequence[Series]) -> str:
    rows = [(one, b) for one in series for b in budgets(one)]
    several = len(series) > 1
    masked = any(in_words(b.down_kept) or in_words(b.up_kept) for _, b in rows)

    def row(one: Series, b: Budget) -> str:
        name = f"<td>{text(one.label)}</td>" if several else ""
        told = (in_words(b.down_kept) or NONE, in_words(b.up_kept) or NONE)
        shares = "".join(f"<td>{each}</td>" for each in told) if masked else ""
        return (
            f'<tr><th scope="row">{text(b.label)}</th>{name}<td>{b.client_rounds:,}</td>'
            f"<td>{_mb(b.down_bytes)}</td><td>{_mb(b.up_bytes)}</td>{shares}</tr>"
        )

    who = "Group" if _grouped(series) else "Run"
    heads = ["Budget", *([who] if several else []), "Client-rounds", "Down", "Up"]
    heads += ["Kept down", "Kept up"] if masked else []
    made = table(heads, "".join(row(one, b) for one, b in rows), "Traffic by client budget")
    if len(rows) <= SHOWN_ROWS:
        return made
    return f"<details><summary>{len(rows):,} budgets in numbers</summary>{made}</details>"


def _shown(series: Sequence[Series]) -> str:
    """What the last evaluations show: of one run as it is, of several folded away."""
    found = [(run.name, shown.section(run.shown)) for run in every_run(series) if run.shown]
    found = [(name, section) for name, section in found if section]
    if not found:
        return ""
    if len(every_run(series)) == 1:
        inner = found[0][1]
    else:
        inner = "".join(
            f"<details><summary>{text(name)}</summary>{section}</details>"
            for name, section in found
        )
    return f"<h2>Classes and answers</h2>{inner}"


def _summary(
    series: Sequence[Series], rows: Sequence[Row], conditions: Sequence[Conditions]
) -> str:
    runs = every_run(series)
    if not _grouped(series):
        return f'<div class="card">{_summary_of_runs(runs)}</div>'
    return (
        f'<div class="card">{_summary_of_groups(rows, conditions)}</div>'
        f"<details><summary>Each of the {len(runs)} runs</summary>"
        f"{_summary_of_runs(runs)}</details>"
    )


def _summary_of_groups(rows: Sequence[Row], conditions: Sequence[Conditions]) -> str:
    target = rows[0].target
    heads = ["", "Runs", "Sent in all"]
    note = "Mean ± standard deviation of the sample, over runs; point at a number for its range."
    if target:
        word, at = spoken(target.measure), f"to {score(target.value)}"
        heads += [f"Final {word}", f"Best {word}", f"Sent {at}"]
        heads += [f"Time {at}, {world.link.up:g} Mbit/s up" for world in conditions]
        note = f"{_reason(target)} {note}"
    memory = any(row.memory_bytes for row in rows)
    if memory:
        heads.append("Largest client memory")
    body = ""
    for i, row in enumerate(rows):
        body += f'<tr><th scope="row">{_swatch(i)}{text(row.label)}</th><td>{row.runs}</td>'
        body += f"<td>{_size(row.total_bytes)}</td>"
        if target:
            body += f"<td>{_score(row.final)}</td><td>{_score(row.best)}</td>{_cost_cells(row)}"
        body += f"<td>{_size(row.memory_bytes)}</td></tr>" if memory else "</tr>"
    made = table(heads, body, "Summary")
    return f'<div class="groups">{made}</div><p class="note">{text(note)}</p>'


def _reason(target: Target) -> str:
    """Where the table's target comes from."""
    word = spoken(target.measure)
    if target.given:
        return f"The target, {word} {score(target.value)}, was asked for."
    return f"The target, {word} {score(target.value)}, is the best that all runs reach."


def _score(found: Spread | None) -> str:
    if found is None:
        return NONE
    title = f"{found.low:.4f} to {found.high:.4f}"
    return f'<span class="score" title="{title}">{score(found.mean, found.deviation)}</span>'


def _size(found: Spread | None) -> str:
    return NONE if found is None else _exact(found, megabytes(found.mean, found.deviation), "bytes")


def _summary_of_runs(runs: Sequence[Run]) -> str:
    names = [name for run in runs for row in run.rounds for name in row.metrics]
    measures = [*dict.fromkeys(names), LOSS]
    columns = [_facts(run, measures) for run in runs]
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{column[name]}</td>" for column in columns)
        + "</tr>"
        for name in columns[0]
        if any(column[name] != NONE for column in columns)
    )
    return table(["", *(run.name for run in runs)], body, "Summary of runs")


def _facts(run: Run, measures: Sequence[str]) -> dict[str, str]:
    """The rows of the summary, as HTML."""
    last = run.rounds[-1]
    facts = {"Method": text(run.method), "Rounds": f"{last.round:,}"}
    for measure in measures:
        found, word = evaluations(run, measure), spoken(measure)
        final = f"{score(found[-1].value)} (round {found[-1].round:,})" if found else NONE
        facts[f"Final {word}"] = final
        if measure in (measures[0], LOSS):
            top = best(found, measure)
            facts[f"Best {word}"] = f"{score(top.value)} (round {top.round:,})" if top else NONE
    sizes = sorted({row.eval_examples for row in run.rounds if row.eval_examples})
    told = {name for row in run.rounds for name in row.metrics}
    unit = "examples"
    if "token_accuracy" in told:  # of a language model, or of words that have tags
        unit = "tokens" if "perplexity" in told else "words"
    facts["Evaluated on"] = " or ".join(f"{n:,} {unit}" for n in sizes) or NONE
    facts["Sent down"] = _mb(sum(row.down_bytes for row in run.rounds))
    facts["Sent up"] = _mb(sum(row.up_bytes for row in run.rounds))
    facts["Sent in all"] = f"<b>{_mb(last.total_bytes)}</b>"
    dense = last.dense_bytes or None  # none fits the model
    facts["Dense float32 LoRA, same rounds"] = NONE if dense is None else _mb(dense)
    facts["Against dense LoRA"] = (
        NONE if dense is None else f"<b>{fewer(last.total_bytes, dense)}</b>"
    )
    facts["Masks kept, down"] = _kept({row.round: row.down_kept for row in run.rounds})
    facts["Masks kept, up"] = _kept({row.round: row.up_kept for row in run.rounds})
    facts["Clients trained"], facts["Updates dropped"] = NONE, NONE
    facts["Largest client memory"] = NONE
    if run.clients:
        if run.clients.memory_bytes:
            facts["Largest client memory"] = _mb(run.clients.memory_bytes)
        facts["Clients trained"] = (
            f"{count(run.clients.distinct, 'client')}, {count(run.clients.merged, 'update')} merged"
        )
        facts["Updates dropped"] = _drops(run.clients.dropped)
    seconds = sum(row.seconds for row in run.rounds)
    facts["Training time"] = duration(seconds) if seconds else NONE
    return facts


def _kept(by_round: dict[int, Shares]) -> str:
    """The shares of A, B and head in the first round with masks and in the last."""
    told = {number: said for number, shares in by_round.items() if (said := in_words(shares))}
    ends = dict.fromkeys([*told][:1] + [*told][-1:])
    return "<br>".join(f"{told[number]} (round {number:,})" for number in ends) or NONE


def _drops(dropped: dict[str, int]) -> str:
    if not dropped:
        return "none"
    said = [f"{n:,} × {text(reason)}" for reason, n in dropped.items()]  # noqa: RUF001
    if len(said) > SHOWN_REASONS:
        said = [*said[:SHOWN_REASONS], f"and {len(said) - SHOWN_REASONS} other reasons"]
    return "<br>".join(said)


def _differences(series: Sequence[Series]) -> str:
    """The keys in which the recipes of several series differ; the environment apart."""
    each = [_joined(one) for one in series]
    keys = [key for key in dict.fromkeys(k for e in each for k in e) if len(_values(each, key)) > 1]
    if not keys:
        return ""
    body = "".join(
        f'<tr><th scope="row"><code>{text(key)}</code></th>'
        + "".join(f"<td>{text(e.get(key, NONE))}</td>" for e in each)
        + "</tr>"
        for key in keys
    )
    made = table(["Key", *(one.label for one in series)], body, "Where the recipes differ")
    return f'<h2>Where the recipes differ</h2><div class="card">{made}</div>'


def _joined(series: Series) -> dict[str, str]:
    """The recipe's keys; several values where the runs of a series have them."""
    each = [keys_of(run.recipe) for run in series.runs]
    keys = dict.fromkeys(key for of_run in each for key in of_run)
    return {key: " | ".join(dict.fromkeys(e.get(key, NONE) for e in each)) for key in keys}


def _values(each: Sequence[dict[str, str]], key: str) -> set[str | None]:
    return {e.get(key) for e in each}


def _recipes(series: Series) -> str:
    folded = "".join(_recipe(run) for run in series.runs)
    if len(series.runs) == 1:
        return folded
    heading = f"{text(series.label)}: {len(series.runs)} runs"
    return f"<details><summary>{heading}</summary>{folded}</details>"


def _recipe(run: Run) -> str:
    environment = run.recipe.get("environment")
    versions = ""
    if isinstance(environment, dict) and environment:
        body = "".join(
            f'<tr><th scope="row">{text(key)}</th><td>{text(value)}</td></tr>'
            for key, value in flat(environment)
        )
        versions = f"<h3>Versions</h3>{table(['What', 'Version'], body, 'Versions')}"
    return (
        f"<details><summary>{text(run.name)}</summary>"
        f"<pre><code>{text(run.recipe_text)}</code></pre>{versions}</details>"
    )


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #24292f; --quiet: #57606a; --back: #f6f7f9; --card: #fff; --grid: #d8dde3;
  --warn: #9a6700; --warn-back: #fff8e0; $light
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --quiet: #a2abb5; --back: #131518; --card: #1c1f23; --grid: #3a4047;
    --warn: #e3b341; --warn-back: #2a2415; $dark
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem;
  background: var(--back); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h1 small { display: block; font-size: .8rem; font-weight: 600; color: var(--quiet);
  letter-spacing: .08em; text-transform: uppercase; margin-bottom: .35rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
.leads { list-style: none; margin: 0; padding: 0; }
.leads li { margin: .3rem 0; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 50%;
  margin-right: .5em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.warnings { margin: 1.25rem 0 0; padding: .75rem 1rem; border-radius: 8px;
  background: var(--warn-back); border-left: 4px solid var(--warn); font-size: .92rem; }
.warnings ul { margin: 0; padding-left: 1.1rem; }
.plots { display: grid; gap: 1.25rem; margin-top: 1.75rem; grid-template-columns: 1fr; }
figure, .card { margin: 0; padding: 1.1rem; min-width: 0; background: var(--card);
  border: 1px solid var(--grid); border-radius: 10px; }
.drawing svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto; }
.drawing svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif
  !important; }
figcaption { color: var(--quiet); font-size: .88rem; margin-top: .6rem; }
.note { color: var(--quiet); font-size: .88rem; margin: .6rem 0 0; }
figcaption .scroll { margin-top: .75rem; color: var(--ink); }
@media (min-width: 60rem) {
  .plots { grid-template-columns: 1fr 1fr; }
  .wide { grid-column: 1 / -1; display: grid;
    grid-template-columns: minmax(0, 1fr) minmax(0, 1fr);
    column-gap: 2rem; align-items: start; }
  .wide h3 { grid-column: 1 / -1; }
  .wide figcaption { margin-top: 0; }
}
@media (max-width: 40rem) {
  body { padding: 1.25rem .75rem 3rem; }
  figure, .card { padding: .8rem .7rem; }
  th, td { padding-right: 1rem; }
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem 1.5rem .4rem 0;
  border-bottom: 1px solid var(--grid); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 400; color: var(--quiet); }
thead th { font-weight: 600; }
td b { font-weight: 650; }
.card { width: fit-content; max-width: 100%; }
.card th:last-child, .card td:last-child, figcaption td:last-child { padding-right: 0; }
figcaption table { width: 100%; }
figcaption th:first-child, .groups th:first-child { min-width: 8rem; }
.groups th, .groups td { padding-right: 1rem; }
figcaption th, figcaption td { padding-right: .9rem; }
data, .score { white-space: nowrap; }
data.cost { white-space: normal; }
.matrix td { text-align: right; padding: .25rem .5rem; border: 0; }
.matrix th { padding: .25rem .75rem .25rem 0; border: 0; font-weight: 400; color: var(--quiet); }
.matrix thead th { padding: .25rem .5rem; text-align: right; }
.matrix td { min-width: 2.2rem; height: 1.9rem; }
.answers td { white-space: pre-wrap; max-width: 34rem; min-width: 11rem; overflow-wrap: anywhere; }
.card + .card { margin-top: 1rem; }
details { margin: .6rem 0; padding: .7rem 1.1rem; background: var(--card);
  border: 1px solid var(--grid); border-radius: 10px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; padding: .5rem 0; margin: .5rem 0; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { margin-top: 2.5rem; color: var(--quiet); font-size: .85rem; }
@media print {
  body { padding: 0; max-width: none; font-size: 10.5pt; background: #fff; }
  figure, .card, tr, .warnings { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; gap: .75rem; }
  .wide { grid-column: 1 / -1; }
  .drawing svg { max-width: 26rem; }
  .scroll { overflow: visible; }
  pre { white-space: pre-wrap; }
}
</style>
</head>
<body>
<header>
<h1><small>FedSieve report</small>$heading</h1>
<ul class="leads">$leads</ul>
</header>
$warnings
<main>
<section class="plots" aria-label="Plots">
$plots
</section>
<h2>Summary</h2>
$summary
$shown
$differences
<h2>Recipe and versions</h2>
$recipes
</main>
<footer>1 MB is 10<sup>6</sup> bytes. Bytes are those of the encoded messages, headers included;
point at a number in the tables for the exact count. The plots lie beside this file as PNG, where
they were kept with it.</footer>
</body>
</html>
""")
