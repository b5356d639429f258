"""The page: HTML that needs nothing but itself.

No script, no font and no picture comes from outside, so the file can be mailed, archived and
opened offline. Every text of a run is escaped on its way in. The summary has its measures as rows
and the runs as columns: one run reads well on a phone, several compare line by line.
"""

import html
from collections.abc import Sequence
from string import Template
from typing import Any

from fedsieve.report.plots import COLOURS, Plot, shown_measure
from fedsieve.report.read import Budget, Run, best, evaluations
from fedsieve.report.words import count, duration, fewer, megabytes, score

NONE = "–"  # noqa: RUF001
SHOWN_REASONS = 5
SHOWN_ROWS = 12  # of budgets; more are folded away
DARK_COLOURS = ("#4ba3df", "#f07b3a", "#2fc79a", "#e39ac2", "#f0b53a", "#8ecff5", "#a6a6a6")


def page(runs: Sequence[Run], plots: Sequence[tuple[Plot, str]]) -> str:
    """The whole HTML document; `plots` come with their SVG elements."""
    title = "FedSieve: " + ", ".join(run.name for run in runs)
    return _PAGE.substitute(
        title=_text(title),
        light="".join(f"--run-{i}:{c};" for i, c in enumerate(COLOURS)),
        dark="".join(f"--run-{i}:{c};" for i, c in enumerate(DARK_COLOURS)),
        heading=_text(runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"),
        leads="".join(_lead(i, run) for i, run in enumerate(runs)),
        warnings=_warnings(runs),
        plots="".join(_plot(plot, svg, runs) for plot, svg in plots),
        summary=_summary(runs),
        differences=_differences(runs),
        recipes="".join(_recipe(run) for run in runs),
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _mb(n: float) -> str:
    """Megabytes to read, the exact bytes for machines and for those who point at it."""
    return f'<data value="{n:.0f}" title="{n:,.0f} bytes">{megabytes(n)}</data>'


def _swatch(index: int) -> str:
    return f'<i class="swatch" style="background:var(--run-{index % len(COLOURS)})"></i>'


def _lead(index: int, run: Run) -> str:
    last = run.rounds[-1]
    parts = []
    for measure, word in (("accuracy", "accuracy"), ("eval_loss", "evaluation loss")):
        if found := evaluations(run, measure):
            parts.append(f"{word} <b>{score(found[-1].value)}</b>")
            break
    parts.append(f"after {count(last.round, 'round')} and <b>{megabytes(last.total_bytes)}</b>")
    if last.dense_bytes:
        ratio = fewer(last.total_bytes, last.dense_bytes)
        parts.append(f"(dense float32 LoRA: {megabytes(last.dense_bytes)}; <b>{ratio}</b>)")
    return f"<li>{_swatch(index)}<strong>{_text(run.name)}</strong>: {' '.join(parts)}</li>"


def _warnings(runs: Sequence[Run]) -> str:
    notes = [f"<b>{_text(run.name)}</b>: {_text(note)}" for run in runs for note in run.notes]
    measure = shown_measure(runs)
    if measure:
        without = [run.name for run in runs if not evaluations(run, measure)]
        if without and len(runs) > 1:
            word = measure.replace("eval_", "evaluation ")
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


def _list(names: Any) -> str:
    return ", ".join(_text(name) for name in names)


def _plot(plot: Plot, svg: str, runs: Sequence[Run]) -> str:
    label = _text(f"{plot.title}. {plot.caption}")
    wide, numbers = "", ""
    if plot.key == "bytes-budget":
        wide, numbers = ' class="wide"', _budgets(runs)
    return (
        f'<figure id="{plot.key}"{wide}>'
        f"<h3>{_text(plot.title)}</h3>"
        f'<div class="drawing" role="img" aria-label="{label}">{svg}</div>'
        f"<figcaption>{_text(plot.caption)}{numbers}</figcaption></figure>"
    )


def _budgets(runs: Sequence[Run]) -> str:
    rows = [(run, b) for run in runs if run.clients for b in run.clients.budgets]
    several = len(runs) > 1

    def row(run: Run, b: Budget) -> str:
        name = f"<td>{_text(run.name)}</td>" if several else ""
        return (
            f'<tr><th scope="row">{_text(b.label)}</th>{name}<td>{b.client_rounds:,}</td>'
            f"<td>{_mb(b.down_bytes)}</td><td>{_mb(b.up_bytes)}</td></tr>"
        )

    heads = ["Budget", *(["Run"] if several else []), "Client-rounds", "Down", "Up"]
    table = _table(heads, "".join(row(run, b) for run, b in rows), "Traffic by client budget")
    if len(rows) <= SHOWN_ROWS:
        return table
    return f"<details><summary>{len(rows):,} budgets in numbers</summary>{table}</details>"


def _table(heads: Sequence[str], body: str, label: str) -> str:
    """`heads` are texts, `body` is HTML. A table too wide for the screen scrolls by itself."""
    head = "".join(f'<th scope="col">{_text(h)}</th>' for h in heads)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _summary(runs: Sequence[Run]) -> str:
    columns = [_facts(run) for run in runs]
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{column[name]}</td>" for column in columns)
        + "</tr>"
        for name in columns[0]
        if any(column[name] != NONE for column in columns)
    )
    return _table(["", *(run.name for run in runs)], body, "Summary")


def _facts(run: Run) -> dict[str, str]:
    """The rows of the summary, as HTML."""
    last = run.rounds[-1]
    facts = {"Method": _text(run.method), "Rounds": f"{last.round:,}"}
    for measure, word in (("accuracy", "accuracy"), ("eval_loss", "evaluation loss")):
        found = evaluations(run, measure)
        top = best(found, measure)
        final = f"{score(found[-1].value)} (round {found[-1].round:,})" if found else NONE
        facts[f"Final {word}"] = final
        facts[f"Best {word}"] = f"{score(top.value)} (round {top.round:,})" if top else NONE
    sizes = sorted({row.eval_examples for row in run.rounds if row.eval_examples})
    facts["Evaluated on"] = " or ".join(f"{n:,} examples" for n in sizes) or NONE
    facts["Sent down"] = _mb(sum(row.down_bytes for row in run.rounds))
    facts["Sent up"] = _mb(sum(row.up_bytes for row in run.rounds))
    facts["Sent in all"] = f"<b>{_mb(last.total_bytes)}</b>"
    dense = last.dense_bytes
    facts["Dense float32 LoRA, same rounds"] = NONE if dense is None else _mb(dense)
    facts["Against dense LoRA"] = (
        NONE if dense is None else f"<b>{fewer(last.total_bytes, dense)}</b>"
    )
    facts["Clients trained"], facts["Updates dropped"] = NONE, NONE
    if run.clients:
        facts["Clients trained"] = (
            f"{count(run.clients.distinct, 'client')}, {count(run.clients.merged, 'update')} merged"
        )
        facts["Updates dropped"] = _drops(run.clients.dropped)
    seconds = sum(row.seconds for row in run.rounds)
    facts["Training time"] = duration(seconds) if seconds else NONE
    return facts


def _drops(dropped: dict[str, int]) -> str:
    if not dropped:
        return "none"
    said = [f"{n:,} × {_text(reason)}" for reason, n in dropped.items()]  # noqa: RUF001
    if len(said) > SHOWN_REASONS:
        said = [*said[:SHOWN_REASONS], f"and {len(said) - SHOWN_REASONS} other reasons"]
    return "<br>".join(said)


def _differences(runs: Sequence[Run]) -> str:
    """The keys in which the recipes of several runs differ; the environment apart."""
    flat = [_flatten({k: v for k, v in r.recipe.items() if k != "environment"}) for r in runs]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if len(_values(flat, key)) > 1]
    if not keys:
        return ""
    body = "".join(
        f'<tr><th scope="row"><code>{_text(key)}</code></th>'
        + "".join(f"<td>{_text(f.get(key, NONE))}</td>" for f in flat)
        + "</tr>"
        for key in keys
    )
    table = _table(["Key", *(run.name for run in runs)], body, "Where the recipes differ")
    return f'<h2>Where the recipes differ</h2><div class="card">{table}</div>'


def _values(flat: Sequence[dict[str, str]], key: str) -> set[str | None]:
    return {f.get(key) for f in flat}


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _recipe(run: Run) -> str:
    environment = run.recipe.get("environment")
    versions = ""
    if isinstance(environment, dict) and environment:
        body = "".join(
            f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>'
            for key, value in _flatten(environment).items()
        )
        versions = f"<h3>Versions</h3>{_table(['What', 'Version'], body, 'Versions')}"
    return (
        f"<details><summary>{_text(run.name)}</summary>"
        f"<pre><code>{_text(run.recipe_text)}</code></pre>{versions}</details>"
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
figcaption .scroll { margin-top: .75rem; color: var(--ink); }
@media (min-width: 60rem) {
  .plots { grid-template-columns: 1fr 1fr; }
  .wide { grid-column: 1 / -1; display: grid; grid-template-columns: 1fr 1fr;
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
figcaption th:first-child { min-width: 8rem; }
figcaption th, figcaption td { padding-right: .9rem; }
data { white-space: nowrap; }
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
<div class="card">$summary</div>
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
