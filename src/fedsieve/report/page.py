"""The page: HTML that needs nothing but itself.

No script, no font and no picture comes from outside, so the file can be mailed, archived and
opened offline. Every text of a run is escaped on its way in. First what a run came to: one run in
large numbers, several as a table that can be sorted, a line each; then what to be warned of, where
the recipes differ, the curves, and at last all numbers, clients, classes, answers and settings. The
summary of runs has its measures as rows: one run reads well on a phone, several line by line.
"""

from collections.abc import Sequence
from typing import Any

from fedsieve.clients.network import Conditions, clock
from fedsieve.engine.shares import Shares, in_words
from fedsieve.errors import count
from fedsieve.report import people, settings, sheet, shown
from fedsieve.report.canvas import COLOURS
from fedsieve.report.html import cut, folded, table, text
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
    shown_measure,
)
from fedsieve.report.words import NONE, data, duration, fewer, megabytes, score
from fedsieve.tasks.words import spoken, titled

SHOWN_REASONS = 5
LONGEST_REASON = 200
SHOWN_ROWS = 12  # of budgets; more are folded away
DARK_COLOURS = ("#4ba3df", "#f07b3a", "#2fc79a", "#e39ac2", "#f0b53a", "#8ecff5", "#a6a6a6")


def page(
    series: Sequence[Series],
    rows: Sequence[Row],
    conditions: Sequence[Conditions],
    plots: Sequence[tuple[Plot, str]],
) -> str:
    """The whole HTML document; `rows` are the series' table, `plots` come with their SVG."""
    runs = every_run(series)
    parts = [
        ("", _lead(series, rows, conditions) + _warnings(series)),
        ("differences", settings.differences(series)),
        ("Curves", _plots(series, rows, conditions, plots)),
        ("Summary", _summary(runs, conditions)),
        ("clients", people.section(runs)),
        ("Classes and answers", _shown(runs)),
        ("Settings", settings.shared(series) + settings.recipes(runs)),
    ]
    return sheet.document(
        title=text("FedSieve: " + ", ".join(one.label for one in series)),
        heading=text(_heading(series)),
        lead=_subjects(runs),
        contents="".join(_link(name) for name, inner in parts if name and inner),
        body="\n".join(_section(name, inner) for name, inner in parts if inner),
        light=_colours(COLOURS),
        dark=_colours(DARK_COLOURS),
    )


def _colours(of: Sequence[str]) -> str:
    return "".join(f"--run-{i}:{colour};" for i, colour in enumerate(of))


def _heading(series: Sequence[Series]) -> str:
    if len(series) == 1:
        return series[0].label
    runs = f"{len(every_run(series))} runs"
    return f"{runs} compared" if not _grouped(series) else f"{runs} in {len(series)} groups"


def _grouped(series: Sequence[Series]) -> bool:
    return any(len(one.runs) > 1 for one in series)


def _swatch(index: int) -> str:
    return f'<i class="swatch" style="background:var(--run-{index % len(COLOURS)})"></i>'


def _lead(series: Sequence[Series], rows: Sequence[Row], conditions: Sequence[Conditions]) -> str:
    """What came of it: of one run in large numbers, of several as a table."""
    if len(every_run(series)) > 1:
        return f'<section aria-label="Results">{_compared(series, rows, conditions)}</section>'
    run = every_run(series)[0]
    last, tiles = run.rounds[-1], []
    if (measure := shown_measure(series)) and (found := evaluations(run, measure)):
        top = best(found, measure)
        note = f"best {score(top.value)}, round {top.round:,}" if top else "never a number"
        tiles.append((titled(measure), score(found[-1].value), note))
    dense = f"dense float32 LoRA: {megabytes(last.dense_bytes)}" if last.dense_bytes else ""
    tiles.append(("Sent, both ways", megabytes(last.total_bytes), dense))
    if last.dense_bytes:
        tiles.append(
            ("Against dense LoRA", fewer(last.total_bytes, last.dense_bytes), "bytes sent")
        )
    seconds = sum(row.seconds for row in run.rounds)
    rounds = count(last.round, "round")
    tiles.append(("Took", duration(seconds) if seconds else NONE, f"{rounds}, as measured"))
    said = "".join(
        f"<div><dt>{name}</dt><dd>{number}<small>{note}</small></dd></div>"
        for name, number, note in tiles
    )
    return f'<section aria-label="Results"><dl class="tiles">{said}</dl></section>'


def _subjects(runs: Sequence[Run]) -> str:
    """What was trained on what, where all runs have that alike; and the method of one."""
    told = dict.fromkeys(map(settings.subject, runs))
    methods = dict.fromkeys(run.method for run in runs)
    if len(told) > 1:
        return ""
    said = next(iter(told))
    said += f", by <b>{cut(runs[0].method, 80)}</b>" if said and len(methods) == 1 else ""
    return f'<p class="subject">{said}</p>' if said else ""


def _id(name: str) -> str:
    return name.split()[0].lower()


def _link(name: str) -> str:
    said = {"differences": "Differences", "clients": "Who took part"}.get(name, name)
    return f'<li><a href="#{_id(name)}">{said}</a></li>'


def _section(name: str, inner: str) -> str:
    """A part of the page; those with a lower name bring their own heading."""
    if not name or name.islower():
        return inner
    return f'<section><h2 id="{_id(name)}">{name}</h2>{inner}</section>'


def _warnings(series: Sequence[Series]) -> str:
    notes = _notes(series)
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
    return f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>'


def _notes(series: Sequence[Series]) -> list[str]:
    """Said once each, with whom it is about, unless that is every run."""
    about: dict[str, list[str]] = {}
    for one in series:
        for note in doubts(one):
            about.setdefault(note, []).append(one.label)
        for note in dict.fromkeys(note for run in one.runs for note in run.notes):
            names = [run.name for run in one.runs if note in run.notes]
            about.setdefault(note, []).extend([one.label] if len(names) == len(one.runs) else names)
    every = [one.label for one in series]
    return [
        text(note) if names == every else f"<b>{_list(names)}</b>: {text(note)}"
        for note, names in about.items()
    ]


def _list(names: Any) -> str:
    return ", ".join(text(name) for name in names)


def _plots(
    series: Sequence[Series],
    rows: Sequence[Row],
    conditions: Sequence[Conditions],
    plots: Sequence[tuple[Plot, str]],
) -> str:
    drawn = "".join(_plot(plot, svg, series, rows, conditions) for plot, svg in plots)
    return f'<div class="plots">{drawn}</div>'


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
    if not rows[0].target or len(rows) > 1 or rows[0].runs > 1:
        return ""  # of several, the table of results tells it
    heads = ["Run", "Traffic", *(f"{world.link.uplink:g} Mbit/s up" for world in conditions)]
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
            f"<td>{data(b.down_bytes)}</td><td>{data(b.up_bytes)}</td>{shares}</tr>"
        )

    who = "Group" if _grouped(series) else "Run"
    heads = ["Budget", *([who] if several else []), "Client-rounds", "Down", "Up"]
    heads += ["Kept down", "Kept up"] if masked else []
    made = table(
        heads, "".join(row(one, b) for one, b in rows), "Traffic by client budget", sortable=True
    )
    if len(rows) <= SHOWN_ROWS:
        return made
    return f"<details><summary>{len(rows):,} budgets in numbers</summary>{made}</details>"


def _shown(runs: Sequence[Run]) -> str:
    """What the last evaluations show: of one run as it is, of several folded away."""
    found = [(run.name, shown.section(run.shown)) for run in runs if run.shown]
    found = [(name, section) for name, section in found if section]
    if len(runs) == 1:
        return "".join(section for _, section in found)
    return folded(found)


def _summary(runs: Sequence[Run], conditions: Sequence[Conditions]) -> str:
    made = _summary_of_runs(runs, conditions)
    if len(runs) == 1:
        return f'<div class="card">{made}</div>'
    return f"<details><summary>Each of {len(runs)} runs</summary>{made}</details>"


_MEMORY = (
    "Adapter memory: the most that a client holds of the adapter, its gradients, the optimizer's "
    "state and what it keeps between rounds; base and activations (fedsieve check) come on top."
)


def _compared(
    series: Sequence[Series], rows: Sequence[Row], conditions: Sequence[Conditions]
) -> str:
    target = rows[0].target
    grouped = _grouped(series)
    heads = ["Group" if grouped else "Run", *(["Runs"] if grouped else [])]
    heads += ["Sent in all", "Against dense LoRA"]
    note = "Mean ± standard deviation of the sample, over runs; point at a number for its range."
    note = note if grouped else ""
    memory = any(row.memory_bytes for row in rows)
    if memory:
        note = f"{note} {_MEMORY}"
    if target:
        word, at = spoken(target.measure), f"to {score(target.value)}"
        heads += [f"Final {word}", f"Best {word}", f"Sent {at}"]
        heads += [f"Time {at}, {world.link.uplink:g} Mbit/s up" for world in conditions]
        note = f"{_reason(target)} {note}"
    if memory:
        heads.append("Largest adapter memory")
    body = ""
    for i, row in enumerate(rows):
        body += f'<tr><th scope="row">{_swatch(i)}{text(row.label)}</th>'
        body += f"<td>{row.runs}</td>" if grouped else ""
        body += f"<td>{_size(row.total_bytes)}</td><td>{_against_dense(series[i])}</td>"
        if target:
            body += f"<td>{_score(row.final)}</td><td>{_score(row.best)}</td>{_cost_cells(row)}"
        body += f"<td>{_size(row.memory_bytes)}</td></tr>" if memory else "</tr>"
    made = table(heads, body, "Results", sortable=True)
    note = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<div class="card groups">{made}{note}</div>'


def _against_dense(series: Series) -> str:
    """By the ratio of means, with which a machine sorts."""
    ends = [run.rounds[-1] for run in series.runs]
    sent, dense = (sum(e.total_bytes for e in ends), sum(e.dense_bytes or 0 for e in ends))
    if not sent or not all(e.dense_bytes for e in ends):
        return NONE
    return f'<data value="{dense / sent:.4f}">{fewer(sent, dense)}</data>'


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


def _summary_of_runs(runs: Sequence[Run], conditions: Sequence[Conditions]) -> str:
    names = [name for run in runs for row in run.rounds for name in row.metrics]
    measures = [*dict.fromkeys(names), LOSS]
    columns = [_facts(run, measures, conditions) for run in runs]
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{column[name]}</td>" for column in columns)
        + "</tr>"
        for name in columns[0]
        if any(column[name] != NONE for column in columns)
    )
    return table(["Measure", *(run.name for run in runs)], body, "Summary of runs")


def _facts(run: Run, measures: Sequence[str], conditions: Sequence[Conditions]) -> dict[str, str]:
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
    facts["Sent down"] = data(sum(row.down_bytes for row in run.rounds))
    facts["Sent up"] = data(sum(row.up_bytes for row in run.rounds))
    facts["Sent in all"] = f"<b>{data(last.total_bytes)}</b>"
    dense = last.dense_bytes or None  # none fits the model
    facts["Dense float32 LoRA, same rounds"] = NONE if dense is None else data(dense)
    facts["Against dense LoRA"] = (
        NONE if dense is None else f"<b>{fewer(last.total_bytes, dense)}</b>"
    )
    facts["Masks kept, down"] = _kept({row.round: row.down_kept for row in run.rounds})
    facts["Masks kept, up"] = _kept({row.round: row.up_kept for row in run.rounds})
    facts["Clients trained"], facts["Updates dropped"] = NONE, NONE
    facts["Largest adapter memory"] = NONE
    if run.clients:
        if run.clients.memory_bytes:
            facts["Largest adapter memory"] = data(run.clients.memory_bytes)
        facts["Clients trained"] = (
            f"{count(run.clients.distinct, 'client')}, {count(run.clients.merged, 'update')} merged"
        )
        facts["Updates dropped"] = _drops(run.clients.dropped)
    seconds = sum(row.seconds for row in run.rounds)
    facts["Training time"] = duration(seconds) if seconds else NONE
    facts["Of it evaluation"] = _time([row.evaluation_seconds for row in run.rounds])
    facts["Clients' training, summed"] = _time([row.compute_seconds for row in run.rounds])
    facts["Encoding and decoding, summed"] = _time([row.wire_seconds for row in run.rounds])
    facts["Simulated time"] = _simulated(run, conditions)
    carried = [row.transport_bytes for row in run.rounds if row.transport_bytes is not None]
    facts["Carried by the network in all"] = data(sum(carried)) if carried else NONE
    facts["Epsilon spent"] = NONE if last.epsilon is None else f"{last.epsilon:.4g}"
    return facts


def _time(told: Sequence[float | None]) -> str:
    known = [seconds for seconds in told if seconds is not None]
    return duration(sum(known)) if known else NONE


def _simulated(run: Run, conditions: Sequence[Conditions]) -> str:
    """To stand beside the time that was measured: the same rounds over links of some speed."""
    if run.clients is None:
        return NONE
    ends = [(world, clock(run.clients.parts, world)[run.rounds[-1].round]) for world in conditions]
    return "<br>".join(f"{duration(end)} at {world.link.uplink:g} Mbit/s up" for world, end in ends)


def _kept(by_round: dict[int, Shares]) -> str:
    """The shares of A, B and head in the first round with masks and in the last."""
    told = {number: said for number, shares in by_round.items() if (said := in_words(shares))}
    ends = dict.fromkeys([*told][:1] + [*told][-1:])
    return "<br>".join(f"{told[number]} (round {number:,})" for number in ends) or NONE


def _drops(dropped: dict[str, int]) -> str:
    if not dropped:
        return "none"
    said = [f"{n:,} × {cut(reason, LONGEST_REASON)}" for reason, n in dropped.items()]  # noqa: RUF001
    if len(said) > SHOWN_REASONS:
        said = [*said[:SHOWN_REASONS], f"and {len(said) - SHOWN_REASONS} other reasons"]
    return "<br>".join(said)
