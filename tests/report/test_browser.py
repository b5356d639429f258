"""The report in a real browser: nothing overflows, tables sort, both themes, by keyboard, printed.

Needs Chromium (Debian: `apt-get install chromium`; or $CHROMIUM), and for the rules of
accessibility axe-core (`npm install axe-core` in the repository, or $AXE, the path of axe.min.js).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsieve.report import write
from tests.report import browser
from tests.report.test_report import CLIENTS, ROUNDS, make, timed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.found() is None, reason="no chromium is installed (apt-get install chromium)"
    ),
]
LONG = "a-name-without-end-" * 20
AXE = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))
PAGES = ("one", "two", "study")
# What is wider than the page, though it is in no box that scrolls by itself.
OUTSIDE = """[...document.querySelectorAll("body *")].filter(
  each => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".scroll, pre"))
  .map(each => each.outerHTML.slice(0, 100))"""
COLUMN = """[...document.querySelectorAll("%s tbody tr")].map(
  row => row.cells[%d].textContent.trim())"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    program = browser.found()
    assert program is not None
    with browser.tab(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, with all that a page can show and names that no page was drawn for; two; a study."""
    folder = tmp_path_factory.mktemp("pages")
    clients = [
        row | {"client": row["client"] * 9, "examples": 5 * n, "loss": 1.5, "memory_bytes": 9999}
        for n, row in enumerate(CLIENTS)
    ]
    one = make(folder / "one", LONG, ROUNDS, clients)
    classes = [
        {"name": f"{LONG}{n}", "rows": 20, "precision": n / 20, "recall": 1 - n / 20, "f1": 0.5,
         "taken_for": [1] * 20}
        for n in range(20)
    ]  # fmt: skip
    answers = [{"asked": LONG, "expected": "a", "told": LONG}]
    shown = {"round": 2, "classes": classes, "answers": answers}
    (one / "details.json").write_text(json.dumps(shown), encoding="utf-8")
    two = make(folder / "two", "other", method="fedit")
    curves: list[list[float | None]] = [[0.5, 0.8], [0.6, 0.7]]
    groups = {
        name: [
            make(folder / name / str(seed), name, *timed(curve, seconds), seed=seed)
            for seed, curve in enumerate(curves)
        ]
        for name, seconds in (("slow", 90.0), ("fast", 1.0), ("middle", 9.0))
    }
    made = {name: folder / f"{name}.html" for name in PAGES}
    write([one], made["one"])
    write([one, two], made["two"])
    write([], made["study"], groups=groups)
    return made


def opened(
    tab: browser.Tab, page: Path, width: int = 1440, scheme: str = "light", unfold: bool = True
) -> browser.Tab:
    tab.open(page, width, scheme)
    if unfold:
        tab.js("document.querySelectorAll('details').forEach(each => each.open = true)")
    return tab


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_page(
    tab: browser.Tab, pages: dict[str, Path], name: str, width: int
) -> None:
    opened(tab, pages[name], width)
    assert tab.js("innerWidth") == width
    assert tab.js(OUTSIDE) == []
    assert tab.js("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("name", PAGES)
def test_the_page_asks_for_nothing_and_breaks_no_rule(
    tab: browser.Tab, pages: dict[str, Path], name: str
) -> None:
    """Its policy lets its own script run, and the browser has nothing to complain of."""
    opened(tab, pages[name])
    assert tab.js("document.querySelectorAll('th button').length") > 3
    asked = [e["params"]["request"]["url"] for e in tab.events if "request" in e.get("params", {})]
    assert asked == [pages[name].resolve().as_uri()]
    odd = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in tab.events if event.get("method") in odd] == []


def test_a_script_of_somebody_else_does_not_run(
    tab: browser.Tab, pages: dict[str, Path], tmp_path: Path
) -> None:
    """Though a text were not escaped: the policy knows one script only."""
    spoilt = tmp_path / "spoilt.html"
    evil = "<main><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
    spoilt.write_text(pages["one"].read_text().replace("<main>", evil))
    assert opened(tab, spoilt).js("[window.evil ?? null, document.images.length]") == [None, 1]


def test_a_table_is_sorted_by_click_and_by_key(tab: browser.Tab, pages: dict[str, Path]) -> None:
    opened(tab, pages["study"])
    heads = tab.js("[...document.querySelectorAll('.groups th[scope=col]')].map(e => e.innerText)")
    column = next(n for n, head in enumerate(heads) if head.startswith("Time to"))
    names = COLUMN % (".groups", 0)
    button = f"document.querySelectorAll('.groups th[scope=col]')[{column}].firstChild"
    assert tab.js(names) == ["slow", "fast", "middle"]
    tab.js(f"{button}.click()")
    assert tab.js(names) == ["slow", "middle", "fast"]  # numbers: the largest first
    assert tab.js(f"{button}.parentNode.ariaSort") == "descending"
    tab.js(f"{button}.focus()")
    tab.key("Enter", 13)
    assert tab.js(names) == ["fast", "middle", "slow"]
    assert tab.js("document.querySelectorAll('[aria-sort]').length") == 1
    tab.js("document.querySelector('.groups th button').click()")
    assert tab.js(names) == ["fast", "middle", "slow"]  # names: from A on
    tab.js("document.querySelector('.groups th button').click()")
    assert tab.js(names) == ["slow", "middle", "fast"]


def test_what_is_missing_is_sorted_last(tab: browser.Tab, pages: dict[str, Path]) -> None:
    opened(tab, pages["one"])
    button = "document.querySelectorAll('.people th button')[5]"
    for _ in range(2):
        tab.js(f"{button}.click()")
        sent = tab.js(COLUMN % (".people", 5))
    assert sent == ["0.300 MB", "0.400 MB", "1.10 MB"]  # by bytes, not by letters
    rows = "document.querySelector('.people').tBodies[0].rows"
    tab.js(f"{rows}[0].cells[2].textContent = '–'")  # noqa: RUF001
    for _ in range(2):
        tab.js("document.querySelectorAll('.people th button')[2].click()")
        assert tab.js(COLUMN % (".people", 2))[-1] == "–"  # noqa: RUF001


def test_it_is_dark_where_the_reader_wants_it_dark(
    tab: browser.Tab, pages: dict[str, Path]
) -> None:
    light = """getComputedStyle(document.body)[%r].match(/\\d+/g).slice(0, 3)
      .reduce((sum, part) => sum + Number(part), 0) / 765"""
    for scheme, dark in (("light", False), ("dark", True)):
        opened(tab, pages["one"], scheme=scheme)
        back, ink = tab.js(light % "backgroundColor"), tab.js(light % "color")
        assert (back < 0.2 and ink > 0.8) if dark else (back > 0.9 and ink < 0.3)


def test_without_a_script_the_page_is_whole(tab: browser.Tab, pages: dict[str, Path]) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened(tab, pages["study"], unfold=False)
        assert tab.js("document.querySelectorAll('th button').length") == 0
        assert tab.js(COLUMN % (".groups", 0)) == ["slow", "fast", "middle"]
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


PAPER = 718  # CSS pixels between the margins of A4


@pytest.mark.parametrize("name", PAGES)
def test_it_can_be_printed(tab: browser.Tab, pages: dict[str, Path], name: str) -> None:
    """Where nothing scrolls: tables fit the paper."""
    opened(tab, pages[name], PAPER, scheme="dark", unfold=False)
    assert tab.paper().startswith(b"%PDF")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.call("Emulation.setEmulatedMedia", media="print", features=features)
    assert tab.js("document.documentElement.scrollWidth") == PAPER
    assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.js("getComputedStyle(document.querySelector('nav')).display") == "none"


@pytest.mark.skipif(not AXE.is_file(), reason=f"{AXE} is not there (npm install axe-core)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(
    tab: browser.Tab, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    opened(tab, pages[name], width, scheme)
    tab.js(AXE.read_text(encoding="utf-8"))
    told = "told.violations.map(each => [each.id, each.impact, each.nodes[0].html.slice(0, 200)])"
    found = tab.js(f"axe.run({{resultTypes: ['violations']}}).then(told => {told})")
    assert found == []
