"""The page's frame: its style, its one script and the policy that lets no other run.

The script sorts tables; without it the page is whole and they stay as they are. The policy allows
the script by its hash and forbids all else that a browser could load or send, so that a text of
somebody's that was not escaped could still do nothing.
"""

import base64
import hashlib
from string import Template

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  const value = (row, column) => {
    const cell = row.cells[column], data = cell.querySelector("data");
    const said = cell.textContent.trim(), start = said.split(/\\s/)[0].replaceAll(",", "");
    if (data) return Number(data.value);
    return cell.tagName === "TD" && start !== "" && !isNaN(start) ? Number(start) : said;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", {numeric: true});
  heads.forEach((head, column) => {
    if (head.tagName !== "TH") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const pairs = [...body.rows].map(row => [value(row, column), row]);
      const numbers = pairs.some(([found]) => typeof found === "number");
      const missing = found => numbers && typeof found !== "number";
      const was = head.getAttribute("aria-sort");
      const up = was ? was === "descending" : !numbers;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      pairs.sort(([a], [b]) => missing(a) - missing(b) || (up ? compare(a, b) : compare(b, a)));
      body.append(...pairs.map(([, row]) => row));
    });
  });
}
"""

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'sha256-{_HASH}'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)

_STYLE = Template("""
:root {
  color-scheme: light dark;
  --ink: #24292f; --quiet: #57606a; --back: #f6f7f9; --card: #fff; --grid: #d8dde3;
  --warn: #9a6700; --link: #0757a0; --warn-back: #fff8e0; --shade: #0003; $light
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --quiet: #a2abb5; --back: #131518; --card: #1c1f23; --grid: #3a4047;
    --warn: #e3b341; --link: #7cc0ff; --warn-back: #2a2415; --shade: #fff3; $dark
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
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 3px; }
.subject { margin: 0 0 .5rem; font-size: 1.05rem; }
nav ul, .settings ul { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; list-style: none;
  margin: 0; padding: 0; }
nav ul { font-size: .92rem; }
nav a { display: inline-block; padding: .2rem 0; }
.tiles { display: grid; gap: .75rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tiles > div { padding: .8rem 1rem; background: var(--card); border: 1px solid var(--grid);
  border-radius: 10px; }
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 650; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .85rem; font-weight: 400; color: var(--quiet); }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 50%;
  margin-right: .5em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.warnings { margin: 1.25rem 0 0; padding: .75rem 1rem; border-radius: 8px;
  background: var(--warn-back); border-left: 4px solid var(--warn); font-size: .92rem; }
.warnings h2 { font-size: 1rem; margin: 0 0 .3rem; }
.warnings ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1.25rem; grid-template-columns: minmax(0, 1fr); }
figure, .card { margin: 0; padding: 1.1rem; min-width: 0; background: var(--card);
  border: 1px solid var(--grid); border-radius: 10px; }
.drawing svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto;
  overflow: visible; }
.drawing svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif
  !important; }
figcaption { color: var(--quiet); font-size: .88rem; margin-top: .6rem; }
.note { color: var(--quiet); font-size: .88rem; margin: .6rem 0 0; }
figcaption .scroll { margin-top: .75rem; color: var(--ink); }
@media (min-width: 60rem) {
  .plots { grid-template-columns: 1fr 1fr; }
  .groups th:first-child { min-width: 10rem; }
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
/* A shade on the side to which there is more: its cover scrolls with the table, off that end. */
.scroll { overflow-x: auto; overflow-wrap: break-word; background:
  linear-gradient(to right, var(--card) 1rem, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--card) 1rem, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .75rem 100% no-repeat,
  linear-gradient(to left, var(--shade), transparent) right / .75rem 100% no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem 1.5rem .4rem 0;
  border-bottom: 1px solid var(--grid); }
tbody tr:last-child > * { border-bottom: 0; }
tbody td { min-width: 4.5rem; }
.differ td { min-width: 9rem; }
tbody th { font-weight: 400; color: var(--quiet); }
thead th { font-weight: 600; }
td b { font-weight: 650; }
.card { width: fit-content; max-width: 100%; }
.card th:last-child, .card td:last-child, figcaption td:last-child { padding-right: 0; }
figcaption table { width: 100%; }
figcaption th:first-child, .groups th:first-child { min-width: 8rem; }
.corner { padding: 0; }
.people td:nth-child(2) { min-width: 9rem; }
main > section { margin-top: 1.5rem; }
.groups th, .groups td { padding-right: 1rem; }
.groups th:first-child, .corner { position: sticky; left: 0; background: var(--card); }
figcaption th, figcaption td { padding-right: .9rem; }
data, .score { white-space: nowrap; }
data.cost { white-space: normal; }
.matrix td { text-align: right; padding: .25rem .5rem; border: 0; }
.matrix th { padding: .25rem .75rem .25rem 0; border: 0; font-weight: 400; color: var(--quiet); }
.matrix thead th { padding: .25rem .5rem; text-align: right; }
.matrix td { min-width: 2.2rem; height: 1.9rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 3px; }
th button::after { content: " \\2195"; color: var(--quiet); }
th[aria-sort="ascending"] button::after { content: " \\2191"; color: inherit; }
th[aria-sort="descending"] button::after { content: " \\2193"; color: inherit; }
.settings ul { min-width: 12rem; }
.settings li { overflow-wrap: anywhere; }
.settings span { color: var(--quiet); }
.answers td { white-space: pre-wrap; max-width: 34rem; min-width: 11rem; overflow-wrap: anywhere; }
.card + .card { margin-top: 1rem; }
details { margin: .6rem 0; padding: .7rem 1.1rem; background: var(--card);
  border: 1px solid var(--grid); border-radius: 10px; }
summary { cursor: pointer; font-weight: 600; }
h1, h3, summary, figcaption, .note, .subject, .tiles { overflow-wrap: anywhere; }
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
  .scroll { overflow: visible; background: none; }
  nav, th button::after { display: none; }
  table { font-size: 8pt; }
  table th, table td { min-width: 0 !important; padding-right: .5rem; overflow-wrap: anywhere; }
  thead th { overflow-wrap: normal; }
  .matrix td, .matrix thead th { padding: .1rem .2rem; }
  data, .score { white-space: normal; }
  pre { white-space: pre-wrap; }
}
""")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1><small>FedSieve report</small>$heading</h1>
$lead
<nav aria-label="On this page"><ul>$contents</ul></nav>
</header>
<main>
$body
</main>
<footer>1 MB is 10<sup>6</sup> bytes. Bytes are those of the encoded messages, headers included;
point at a number in the tables for the exact count. The plots lie beside this file as PNG, where
they were kept with it.</footer>
<script>$script</script>
</body>
</html>
""")


def document(
    *, title: str, heading: str, lead: str, contents: str, body: str, light: str, dark: str
) -> str:
    """The whole page. light, dark: the colours of runs, as CSS; all else is HTML."""
    return _PAGE.substitute(
        policy=POLICY,
        title=title,
        style=_STYLE.substitute(light=light, dark=dark),
        heading=heading,
        lead=lead,
        contents=contents,
        body=body,
        script=SCRIPT,
    )
