"""The report, made from run directories that the tests write: it shows the files' numbers."""

import base64
import hashlib
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedsieve.algebra.budget import Link
from fedsieve.clients.network import Conditions
from fedsieve.errors import FedSieveError
from fedsieve.report import load, load_all, sheet, table, write
from fedsieve.report.words import duration, fewer, megabytes, significant
from tests import kinds

VOID = {"meta", "br", "link", "img", "hr"}
RECIPE = """name = {name}
rounds = {rounds}
seed = {seed}

[model]
name = "tiny"

[method]
name = "{method}"

[environment]
torch = "2.13.0"
commit = "abc1234"
"""
ROUNDS: list[dict[str, Any]] = [
    {"round": 0, "total_bytes": 0, "accuracy": 0.05, "eval_loss": 3.0},
    {
        "round": 1, "loss": 2.5, "down_bytes": 1_000_000, "up_bytes": 200_000, "clients": 2,
        "total_bytes": 1_200_000, "dense_bytes": 20_000_000, "dropped": 0, "seconds": 30.0,
        "accuracy": 0.6125, "eval_loss": 1.5, "eval_examples": 1234,
    },
    {
        "round": 2, "loss": 2.0, "down_bytes": 800_000, "up_bytes": 50_000, "clients": 2,
        "total_bytes": 2_050_000, "dense_bytes": 40_000_000, "dropped": 1, "seconds": 35.5,
        "accuracy": 0.5875, "eval_loss": 1.6, "eval_examples": 1234, "later": "a new key",
    },
]  # fmt: skip
CLIENTS: list[dict[str, Any]] = [
    {"round": 1, "client": "0001", "budget": "rank 8", "down_bytes": 600_000, "up_bytes": 150_000},
    {"round": 1, "client": "0002", "budget": "rank 4", "down_bytes": 400_000, "up_bytes": 50_000},
    {"round": 2, "client": "0001", "budget": "rank 8", "down_bytes": 500_000, "up_bytes": 50_000},
    {"round": 2, "client": "0003", "budget": "rank 4", "down_bytes": 300_000, "up_bytes": 0,
     "dropped": "the loss became NaN"},
]  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make(
    path: Path,
    name: str = "demo",
    rounds: list[dict[str, Any]] = ROUNDS,
    clients: list[dict[str, Any]] = CLIENTS,
    method: str = "flasc",
    seed: int = 0,
) -> Path:
    path.mkdir(parents=True)
    recipe = RECIPE.format(name=json.dumps(name), rounds=2, method=method, seed=seed)
    (path / "recipe.toml").write_text(recipe)
    (path / "metrics.jsonl").write_text(lines(rounds))
    (path / "clients.jsonl").write_text(lines(clients))
    return path


class Reader(HTMLParser):
    """Checks that tags close in order; keeps what the tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.data: list[str] = []
        self.text = ""
        self.drawn: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""
        for key, value in attrs:
            kinds = {"id": self.ids, "aria-label": self.labels, "value": self.data}
            kinds |= dict.fromkeys(("src", "href", "xlink:href", "srcset", "action"), self.links)
            kinds.get(key, []).append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
            return
        data = data.replace("\xa0", " ")
        self.text += data
        if self.open and self.open[-1] == "text":
            self.drawn.append(data.strip())
        if self.rows and self.open and {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, head: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row[0] == head)
        return found


def report(*runs: Path) -> Reader:
    """The page alone: the pictures beside it, which are half of the time, are left empty."""
    out = runs[0].parent / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsieve.report.to_png", lambda plot: b"")
        write(runs, out)
    return Reader(out.read_text(encoding="utf-8"))


def test_the_summary_holds_the_numbers_of_the_files(tmp_path: Path) -> None:
    page = report(make(tmp_path / "a"))
    assert page.row("Method") == ["flasc"]
    assert page.row("Rounds") == ["2"]
    assert page.row("Final accuracy") == ["0.5875 (round 2)"]
    assert page.row("Best accuracy") == ["0.6125 (round 1)"]
    assert page.row("Best evaluation loss") == ["1.5000 (round 1)"]
    assert page.row("Evaluated on") == ["1,234 examples"]
    assert page.row("Sent down") == ["1.80 MB"]
    assert page.row("Sent up") == ["0.250 MB"]
    assert page.row("Sent in all") == ["2.05 MB"]
    assert page.row("Dense float32 LoRA, same rounds") == ["40.0 MB"]
    assert page.row("Against dense LoRA") == ["20x fewer"]
    assert page.row("Clients trained") == ["3 clients, 3 updates merged"]
    assert page.row("Updates dropped") == ["1 × the loss became NaN"]  # noqa: RUF001
    assert page.row("Training time") == ["1 min 06 s"]
    assert {"1800000", "250000", "2050000", "40000000"} <= set(page.data)  # exact, for machines
    assert page.row("torch") == ["2.13.0"]
    assert '[model]\nname = "tiny"' in page.text
    assert "1 client update dropped" in page.text


def test_budgets_are_means_over_client_rounds(tmp_path: Path) -> None:
    page = report(make(tmp_path / "a"))
    assert page.row("rank 8") == ["2", "0.550 MB", "0.100 MB"]
    assert page.row("rank 4") == ["2", "0.350 MB", "0.0250 MB"]


def test_what_masks_kept_of_a_b_and_head_is_told(tmp_path: Path) -> None:
    """In the summary, by budget, and as a warning while some got nothing of a B that has moved."""
    kept = {"down_a": 0.5, "down_b": 0.0, "down_head": 0.125, "up_b": 0.3, "up_head": 0.01}
    later = {**kept, "down_a": 0.4375, "down_b": 0.0625}
    rounds = [ROUNDS[0], {**ROUNDS[1], **kept, "starved": 2}, {**ROUNDS[2], **later, "starved": 1}]
    clients = [{**row, **(kept if row["round"] == 1 else later)} for row in CLIENTS[:2]]
    clients += [{**CLIENTS[2], **later}, CLIENTS[3]]
    page = report(make(tmp_path / "a", rounds=rounds, clients=clients))
    assert page.row("Masks kept, down") == [
        "A 0.5, B 0, head 0.12 (round 1)A 0.44, B 0.062, head 0.12 (round 2)"
    ]
    assert page.row("Masks kept, up") == ["B 0.3, head 0.01 (round 1)B 0.3, head 0.01 (round 2)"]
    assert page.row("Budget")[-2:] == ["Kept down", "Kept up"]
    mean = "A 0.47, B 0.031, head 0.12"
    assert page.row("rank 8")[-2:] == [mean, "B 0.3, head 0.01"]
    assert page.row("rank 4")[-2:] == ["A 0.5, B 0, head 0.12", "B 0.3, head 0.01"]
    assert "In 1 of 2 rounds (first 2, last 2) the masks let nothing of B pass down" in page.text


def test_a_run_of_before_shares_were_told_is_read_as_it_was(tmp_path: Path) -> None:
    page = report(make(tmp_path / "a"))
    assert not [row for row in page.rows if row[0].startswith("Masks kept")]
    assert page.row("Budget")[-1] == "Up"
    assert "nothing of B" not in page.text
    loaded = load(tmp_path / "a")
    assert loaded.rounds[0].down_kept == (None, None, None)
    assert loaded.clients is not None
    assert loaded.clients.budgets[0].up_kept == (None, None, None)


@pytest.mark.parametrize("log", ["metrics.jsonl", "clients.jsonl"])
@pytest.mark.parametrize("share", [1.5, -0.1, "half", True])
def test_a_share_that_is_none_is_refused(tmp_path: Path, log: str, share: Any) -> None:
    run = make(tmp_path / "a")
    rows = (ROUNDS if log == "metrics.jsonl" else CLIENTS)[1:2]
    (run / log).write_text(lines([{**rows[0], "up_head": share}]))
    with pytest.raises(FedSieveError, match=rf"{log}, line 1"):
        load(run)


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = report(make(tmp_path / "a"), make(tmp_path / "b", "other", method="fedit"))
    assert not {"link", "img", "iframe", "object"} & page.tags
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"  # this one, and no other
    assert not {"img-src", "connect-src", "frame-src", "object-src"} & set(rules)
    assert page.links, "the plots' markers are used by reference"
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    text = (tmp_path / "report.html").read_text()
    assert "://" not in text
    assert "@import" not in text
    used = re.findall(r"url\((.*?)\)", text)
    assert used
    assert all(url.startswith("#") and url[1:] in page.ids for url in used)


def test_several_runs_overlay(tmp_path: Path) -> None:
    worse = [dict(row, accuracy=row["accuracy"] - 0.01) for row in ROUNDS]
    page = report(make(tmp_path / "a"), make(tmp_path / "b", "slow", worse, method="fedit"))
    assert page.row("Method") == ["flasc", "fedit"]
    assert page.row("Best accuracy") == ["0.6125 (round 1)", "0.6025 (round 1)"]
    assert page.row("method.name") == ["flasc", "fedit"]  # where the recipes differ
    (label,) = (text for text in page.labels if text.startswith("Accuracy against traffic"))
    assert "demo 1.20 MB, slow 1.20 MB" in label
    for run in ("--run-0", "--run-1"):
        drawn = re.findall(rf"stroke: var\({run}\)", (tmp_path / "report.html").read_text())
        assert len(drawn) >= 4  # one line in every line plot


def test_png_files_lie_beside_the_page(tmp_path: Path) -> None:
    written = write([make(tmp_path / "a")], tmp_path / "new" / "r.html")
    assert written[0] == tmp_path / "new" / "r.html"
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written[1:]] == [
        "r-accuracy-bytes.png", "r-accuracy-rounds.png", "r-accuracy-time.png",
        "r-train-loss.png", "r-bytes-round.png", "r-bytes-budget.png",
    ]  # fmt: skip
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5_000


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = make(tmp_path / "a")
    write([run], tmp_path / "x.html")
    write([run], tmp_path / "y.html")
    assert (tmp_path / "x.html").read_bytes() == (tmp_path / "y.html").read_bytes()


@pytest.mark.parametrize(
    "name",
    kinds.some_of(
        ["<script>alert(1)</script>", "--><script>", "_x", "$5 or $6", '" onload="x', "$title ${x}"]
    ),
)
@pytest.mark.filterwarnings("error")
def test_any_name_is_taken_as_it_stands(tmp_path: Path, name: str) -> None:
    bad = [dict(row, dropped=name, budget=name) for row in CLIENTS]
    page = report(
        make(tmp_path / "a", name, clients=bad, method=name.replace('"', "'")),
        make(tmp_path / "b", "other"),
    )
    assert page.scripts == [sheet.SCRIPT]
    assert page.row("Rounds") == ["2", "2"]
    (head,) = (i for i, row in enumerate(page.rows) if row[0] == "Budget")
    assert page.rows[head + 1][:2] == [name, name]
    assert page.drawn.count(name) == 7  # five legends, a heading and a label of the bars


def test_what_a_recipe_says_of_its_environment_is_cut_and_steers_no_terminal(
    tmp_path: Path,
) -> None:
    run = make(tmp_path / "a")
    with (run / "recipe.toml").open("a") as file:
        file.write(f'device = "\\u001b[31mred"\n{"k" * 200} = "{"v" * 5000}"\n')
    write([run], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert "\N{REPLACEMENT CHARACTER}[31mred" in text
    assert f"<td>{'v' * 160} …</td>" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = make(tmp_path / "x" / "a"), make(tmp_path / "x" / "b")
    assert [run.name for run in load_all([a, b])] == ["a", "b"]
    c = make(tmp_path / "y" / "a")
    assert [run.name for run in load_all([a, c])] == [str(a), str(c)]
    assert [run.name for run in load_all([a, a])] == ["demo"]


def test_a_cut_last_line_and_an_unfinished_round_are_left_out(tmp_path: Path) -> None:
    run = make(tmp_path / "a", rounds=ROUNDS[:2])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "loss": 2.0, "down_by')
    with (run / "clients.jsonl").open("a") as file:
        file.write('{"round": 2, "client": "9')
    with pytest.warns(UserWarning, match=f"{run}: The last line of ") as told:
        loaded = load(run)
    assert [str(each.message).split()[5] for each in told] == ["metrics.jsonl", "clients.jsonl"]
    assert [row.round for row in loaded.rounds] == [1]
    assert loaded.clients is not None
    assert (loaded.clients.distinct, loaded.clients.merged) == (2, 2)  # those of round 1
    page = report(run)
    assert page.row("Sent in all") == ["1.20 MB"]
    assert "The last line of metrics.jsonl was cut" in page.text
    assert "1 of 2 rounds are done" in page.text


def test_without_accuracy_the_evaluation_loss_is_plotted(tmp_path: Path) -> None:
    rounds = [{k: v for k, v in row.items() if k != "accuracy"} for row in ROUNDS]
    written = write([make(tmp_path / "a", rounds=rounds)], tmp_path / "r.html")
    assert {"r-eval-loss-bytes.png", "r-eval-loss-rounds.png"} <= {p.name for p in written}
    page = Reader((tmp_path / "r.html").read_text())
    assert page.row("Final evaluation loss") == ["1.6000 (round 2)"]
    assert "Best evaluation loss: 1.5000, after 1.20 MB." in page.text
    assert "Final accuracy" not in page.text


@pytest.mark.filterwarnings("error")
def test_a_bare_run_still_has_a_report(tmp_path: Path) -> None:
    rounds = [{"round": 1, "loss": None, "total_bytes": 0}]
    run = make(tmp_path / "bare", rounds=rounds)
    (run / "clients.jsonl").unlink()
    (run / "recipe.toml").write_text("")
    with pytest.warns(UserWarning, match=r"bare: (recipe\.toml names no|There is no cl)"):
        page = report(run)
    assert page.row("Method") == ["unnamed"]
    assert page.row("Sent in all") == ["0 MB"]
    assert "No round was evaluated" in page.text
    assert "There is no clients.jsonl" in page.text


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_are_shown_not_hidden(tmp_path: Path) -> None:
    rounds = [dict(row, loss=float("nan"), eval_loss=float("inf")) for row in ROUNDS]
    rounds[2]["accuracy"] = float("nan")
    page = report(make(tmp_path / "a", rounds=rounds), make(tmp_path / "b", "fine"))
    assert page.row("Final accuracy") == ["nan (round 2)", "0.5875 (round 2)"]
    assert page.row("Best accuracy") == ["0.6125 (round 1)", "0.6125 (round 1)"]
    assert page.row("Best evaluation loss") == ["–", "1.5000 (round 1)"]  # noqa: RUF001


def test_a_training_loss_that_is_withheld_is_not_drawn(tmp_path: Path) -> None:
    """Private runs whose noise is fresh tell none: "from nan to nan" reads as one that diverged."""
    private = make(tmp_path / "p", rounds=[dict(row, loss=None) for row in ROUNDS])
    page = report(private)
    assert "Training loss against rounds" not in page.text
    assert not (private / "report-train-loss.png").exists()
    both = report(private, make(tmp_path / "b", "fine"))
    (said,) = re.findall(r"First to last round: [^.]*\.", both.text)
    assert "nan" not in said


def test_sums_that_disagree_are_told(tmp_path: Path) -> None:
    rounds = [ROUNDS[1], dict(ROUNDS[2], total_bytes=2_050_001)]
    assert "add up to 2,050,000 bytes" in report(make(tmp_path / "a", rounds=rounds)).text


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", "", "no finished round yet"),
        ("metrics.jsonl", lines(ROUNDS[:1]), "no finished round yet"),
        ("metrics.jsonl", "{cut\n" + lines(ROUNDS), "line 1 is not JSON"),
        ("metrics.jsonl", "[]\n", "line 1 is not a JSON object"),
        ("metrics.jsonl", lines([ROUNDS[2], ROUNDS[1]]), "round 1 comes after round 2"),
        ("metrics.jsonl", '{"round": 1}\n', "there is no 'total_bytes'"),
        ("metrics.jsonl", '{"round": 1, "total_bytes": -4}\n', "'total_bytes' is -4"),
        ("metrics.jsonl", '{"round": 1, "total_bytes": 4, "loss": "x"}\n', "'loss' is 'x'"),
        ("clients.jsonl", '{"round": 1}\n', "there is no 'down_bytes'"),
        ("clients.jsonl", lines([dict(CLIENTS[0], seconds=-1)]), "'seconds' is -1, not a time"),
        (
            "clients.jsonl",
            lines([dict(CLIENTS[0], round=at) for at in (1, 2, 1, 2)]),
            "line 3: round 1 comes after round 2",
        ),
        ("recipe.toml", "name = ", "is not valid TOML"),
    ],
)
def test_damage_is_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    run = make(tmp_path / "a")
    (run / file).write_text(text)
    with pytest.raises(FedSieveError, match=re.escape(message)):
        write([run], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("name", ["rows.csv", "page.html", "clients.jsonl", "recipe.toml"])
def test_no_other_file_is_replaced_by_a_report(tmp_path: Path, name: str) -> None:
    run = make(tmp_path / "a")
    there = run / name if (run / name).exists() else tmp_path / name
    own = there.read_bytes() if there.exists() else b"<!doctype html><title>mine</title>"
    there.write_bytes(own)
    with pytest.raises(FedSieveError, match=f"{there} is there already and no report"):
        write([run], there)
    assert there.read_bytes() == own
    assert not [*tmp_path.rglob("*.png")]


def test_a_report_is_written_again_and_its_pictures_too(tmp_path: Path) -> None:
    run, other = make(tmp_path / "a"), tmp_path / "mine.html"
    (run / "report.html").write_text("a run's own page may be whatever it was left as")
    for out in (run / "report.html", other, other):
        written = write([run], out)
        assert other not in written or out == other
    # A picture of somebody's is no part of a page that is not there.
    other.unlink()
    with pytest.raises(FedSieveError, match=r"mine-\S+\.png is there already"):
        write([run], other)


def test_rounds_that_not_all_sites_evaluated_are_told(tmp_path: Path) -> None:
    def notes(name: str, rows: list[int]) -> list[str]:
        rounds = [dict(row, eval_examples=n) for row, n in zip(ROUNDS, rows, strict=True)]
        told = load(make(tmp_path / name, rounds=rounds)).notes
        return [note for note in told if "fewer rows" in note]

    (note,) = notes("a", [60, 40, 60])
    assert note.startswith("In 1 of 2 evaluated rounds (first 1, last 1) fewer rows were evaluated")
    assert "40 of 60 in round 1" in note
    assert notes("b", [60, 60, 60]) == []


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedSieveError, match="no such directory"):
        load(tmp_path / "absent")
    with pytest.raises(FedSieveError, match=r"no recipe\.toml and no metrics\.jsonl"):
        load(tmp_path)
    with pytest.raises(FedSieveError, match="name at least one"):
        write([], tmp_path / "r.html")
    with pytest.raises(FedSieveError, match="is a directory"):
        write([make(tmp_path / "a")], tmp_path)


def test_a_long_run_is_read_in_seconds(tmp_path: Path) -> None:
    """10^5 client lines: some two seconds here; the limit leaves room for a busy machine."""
    rounds = [dict(ROUNDS[1], round=i + 1, total_bytes=1_200_000 * (i + 1)) for i in range(10_000)]
    clients = [dict(CLIENTS[0], round=i // 10 + 1, client=str(i % 500)) for i in range(100_000)]
    run = make(tmp_path / "a", rounds=rounds, clients=clients)
    start = time.process_time()
    loaded = load(run)
    assert time.process_time() - start < 12
    assert loaded.clients is not None
    assert (loaded.clients.distinct, loaded.clients.merged) == (500, 100_000)


def test_numbers_read_the_same_everywhere() -> None:
    assert [significant(x) for x in (0, 0.0012345, 4.2146, 160.4, 12345.6)] == [
        "0", "0.00123", "4.21", "160", "12,346",
    ]  # fmt: skip
    assert megabytes(2**20) == "1.05 MB"  # 10^6 bytes, not 2^20
    assert fewer(1e6, 38.2e6) == "38x fewer"
    assert fewer(2e6, 5e6) == "2.5x fewer"
    assert fewer(3e6, 1e6) == "3.0x more"
    assert fewer(100, 101) == "about as many"
    assert fewer(0, 101) == "no ratio"
    assert [duration(s) for s in (3.25, 59.97, 125, 7620)] == [
        "3.2 s", "1 min 00 s", "2 min 05 s", "2 h 07 min",
    ]  # fmt: skip


def test_what_the_run_said_of_its_own_setting_up_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text() + 'notes = ["2 of 9 clients have <no> data"]\n')
    assert load(run).notes[0] == "2 of 9 clients have <no> data"
    (out, *_) = write([run], tmp_path / "report.html")
    assert "2 of 9 clients have &lt;no&gt; data</li>" in out.read_text()


# One client a round sends a megabit each way and works for a second: by hand, at 10 Mbit/s down
# and 10, 2.5 and 0.625 up, a round takes .1 + 1 + .1, .4 or 1.6 seconds.
MEGABIT = 125_000


def timed(accuracies: list[float | None], seconds: float = 1.0) -> tuple[list[Any], list[Any]]:
    """Rounds of one client each; accuracy None where a round is not evaluated."""
    rounds, clients = [], []
    for number, accuracy in enumerate(accuracies, 1):
        row = {
            "round": number, "loss": 1.0, "down_bytes": MEGABIT, "up_bytes": MEGABIT,
            "total_bytes": number * 2 * MEGABIT,
        }  # fmt: skip
        rounds.append(row if accuracy is None else row | {"accuracy": accuracy})
        clients.append(
            {"round": number, "client": "a", "seconds": seconds, "steps": 4,
             "down_bytes": MEGABIT, "up_bytes": MEGABIT}
        )  # fmt: skip
    return rounds, clients


def seeds(folder: Path, name: str, *curves: list[float | None], **more: Any) -> list[Path]:
    """One run for each curve of accuracies, of seeds 0, 1, ..."""
    return [
        make(folder / name / str(seed), name, *timed(found, **more), seed=seed)
        for seed, found in enumerate(curves)
    ]


def means(found: Any) -> list[float | None]:
    return [None if one is None else one.mean for one in found]


def test_the_table_holds_what_can_be_counted_by_hand(tmp_path: Path) -> None:
    groups = {
        "ours": seeds(tmp_path, "ours", [0.5, 0.7], [0.7, 0.6], [0.6, 0.8]),
        "dense": seeds(tmp_path, "dense", [None, 0.9, 0.8]),
    }
    ours, dense = table(groups)
    assert ours.target is not None
    assert ours.target == dense.target
    assert (ours.target.measure, ours.target.value, ours.target.given) == ("accuracy", 0.7, False)
    assert (ours.label, ours.runs, ours.reached) == ("ours", 3, 3)
    assert ours.final is not None
    assert ours.final == pytest.approx((0.7, 0.1, 0.6, 0.8))  # .7, .6, .8
    assert ours.best == pytest.approx((2.2 / 3, 0.1 / 3**0.5, 0.7, 0.8))
    # Reached in rounds 2, 1 and 2: 5/3 rounds of two megabits.
    assert ours.bytes_to_target is not None
    assert ours.bytes_to_target.mean == pytest.approx(5 / 3 * 2 * MEGABIT)
    assert means(ours.seconds_to_target) == pytest.approx([2.0, 2.5, 4.5])
    assert ours.memory_bytes is None
    # One run: no deviation. Its target is passed in round 2, of which round 1 tells nothing.
    assert dense.final == (0.8, None, 0.8, 0.8)
    assert dense.total_bytes.mean == 6 * MEGABIT
    assert means(dense.seconds_to_target) == pytest.approx([2.4, 3.0, 5.4])


def test_a_given_target_says_how_many_runs_reach_it(tmp_path: Path) -> None:
    groups = {
        "ours": seeds(tmp_path, "ours", [0.5, 0.7], [0.7, 0.6], [0.6, 0.8]),
        "never": seeds(tmp_path, "never", [0.1, 0.2]),
    }
    ours, never = table(groups, 0.75)
    assert (ours.reached, never.reached) == (1, 0)
    assert means(ours.seconds_to_target) == pytest.approx([2.4, 3.0, 5.4])
    assert (never.bytes_to_target, never.seconds_to_target) == (None, (None, None, None))
    write([], tmp_path / "r.html", groups=groups, target=0.75)
    page = Reader((tmp_path / "r.html").read_text())
    assert "To reach accuracy 0.7500, the target asked for" in page.text
    assert page.row("ours")[-4:] == [
        "0.500 MB (1 of 3 runs)", "2.4 s (1 of 3 runs)", "3.0 s (1 of 3 runs)",
        "5.4 s (1 of 3 runs)",
    ]  # fmt: skip
    assert page.row("never")[-4:] == ["not reached"] * 4


@pytest.mark.parametrize("target", [0.0, 1.5, float("nan"), -0.5])
def test_a_target_that_cannot_be_is_refused(tmp_path: Path, target: float) -> None:
    with pytest.raises(FedSieveError, match=r"must be in \(0, 1\]"):
        write([make(tmp_path / "a")], tmp_path / "r.html", target=target)
    bare = make(tmp_path / "b", rounds=[{"round": 1, "total_bytes": 0}])
    with pytest.raises(FedSieveError, match="no run was evaluated"):
        write([bare], tmp_path / "r.html", target=0.5)


def test_time_to_the_target_stands_beside_the_bytes(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "fast", *timed([0.5, 0.8]))
    b = make(tmp_path / "b", "slow", *timed([0.5, 0.6], seconds=100.0))
    page = report(a, b)
    fast, slow = (next(row for row in page.rows if row[0] == name) for name in ("fast", "slow"))
    assert fast[-4:] == ["0.500 MB", "2.4 s", "3.0 s", "5.4 s"]
    assert slow[-4:] == ["0.500 MB", "3 min 20 s", "3 min 21 s", "3 min 23 s"]
    (label,) = (text for text in page.labels if "against simulated time" in text)
    assert "downlink of 10 Mbit/s" in label
    assert "To reach accuracy 0.6000, which all do" in label
    panels = [text for text in page.drawn if text.startswith("Uplink")]
    assert panels == [
        "Uplink 10 Mbit/s, as the downlink",
        "Uplink 2.5 Mbit/s, 1/4 of the downlink",
        "Uplink 0.625 Mbit/s, 1/16 of the downlink",
    ]


def test_other_conditions_can_be_asked_for(tmp_path: Path) -> None:
    run = make(tmp_path / "a", "it", *timed([0.5, 0.8], seconds=77.0))
    world = Conditions(Link(1.0, 0.5, 0.25), seconds_per_step=0.125)  # 4 steps: half a second
    (row,) = table({"it": [run]}, conditions=[world])
    assert means(row.seconds_to_target) == pytest.approx([2 * (0.25 + 1 + 0.5 + 0.25 + 2)])
    write([run], tmp_path / "r.html", conditions=[world])
    page = Reader((tmp_path / "r.html").read_text())
    assert page.row("it") == ["0.500 MB", "8.0 s"]
    assert "To reach accuracy 0.8000, its best:" in page.text
    assert "0.25 s of latency, and takes 0.125 s a step" in page.text
    with pytest.raises(FedSieveError, match="at least one link"):
        write([run], tmp_path / "r.html", conditions=[])


def test_a_round_waits_for_no_update_that_was_dropped(tmp_path: Path) -> None:
    rounds, clients = timed([0.5, 0.8])
    late = dict(clients[0], client="b", seconds=1000.0, up_bytes=0, dropped="late")
    rounds = [dict(row, down_bytes=2 * MEGABIT) if row["round"] == 1 else row for row in rounds]
    (row,) = table({"it": [make(tmp_path / "a", "it", rounds, [clients[0], late, clients[1]])]})
    assert means(row.seconds_to_target) == pytest.approx([2.4, 3.0, 5.4])


def test_a_log_that_lacks_clients_or_seconds_says_so(tmp_path: Path) -> None:
    rounds, clients = timed([0.5, 0.8])
    told = load(make(tmp_path / "a", rounds=rounds, clients=clients[:1])).notes
    assert any("different bytes in 1 round, first in round 2" in note for note in told)
    untimed = [{k: v for k, v in row.items() if k != "seconds"} for row in clients]
    told = load(make(tmp_path / "b", rounds=rounds, clients=untimed)).notes
    assert any("lacks the seconds of 2 client-rounds" in note for note in told)
    assert load(make(tmp_path / "c", rounds=rounds, clients=clients)).notes == ()


def test_memory_is_the_largest_of_a_run(tmp_path: Path) -> None:
    paths = []
    for seed, most in enumerate((4_000_000, 6_000_000)):
        rounds, clients = timed([0.5, 0.8])
        clients = [dict(clients[0], memory_bytes=most), dict(clients[1], memory_bytes=1_000_000)]
        paths.append(make(tmp_path / str(seed), "it", rounds, clients, seed=seed))
    (row,) = table({"it": paths})
    assert row.memory_bytes == pytest.approx((5e6, 2**0.5 * 1e6, 4e6, 6e6))
    write([], tmp_path / "r.html", groups={"it": paths})
    page = Reader((tmp_path / "r.html").read_text())
    assert page.row("Largest adapter memory") == ["4.00 MB", "6.00 MB"]
    summary = [row for row in page.rows if row[0] == "it"][-1]
    assert summary[-1] == "5.00 ± 1.41 MB"


def test_groups_are_lines_with_a_band(tmp_path: Path) -> None:
    groups = {
        "ours": seeds(tmp_path, "ours", [0.5, 0.7], [0.7, 0.6], [0.6, 0.8]),
        "dense": seeds(tmp_path, "dense", [0.4, 0.9]),
    }
    alone = make(tmp_path / "alone", "alone", *timed([0.3, 0.7]))
    # A run that is in a group is not drawn a second time.
    write([groups["ours"][1], alone], tmp_path / "r.html", groups=groups)
    text = (tmp_path / "r.html").read_text()
    page = Reader(text)
    lines = [len(re.findall(rf"stroke: var\(--run-{i}\)", text)) for i in range(4)]
    assert lines[0] == lines[1] == lines[2] > 0
    assert lines[3] == 0
    # Two accuracies and three panels; losses and bytes are the same for all seeds: no band there.
    assert len(re.findall(r'style="fill: var\(--run-0\); fill-opacity', text)) == 5
    assert not re.findall(r'style="fill: var\(--run-[12]\); fill-opacity', text)
    (label,) = (text for text in page.labels if text.startswith("Accuracy against rounds"))
    assert "ours 0.7000 in round 2, dense 0.9000 in round 2, alone 0.7000 in round 2" in label
    assert "the mean of 3 runs, and their lowest to highest" in label
    heads = next(row for row in page.rows if "Runs" in row)
    ours = [row for row in page.rows if row[0] == "ours"][-1]
    told = dict(zip(heads, ours, strict=True))
    assert told["Runs"] == "3"
    assert told["Final accuracy"] == "0.7000 ± 0.1000"
    assert told["Sent in all"] == "0.500 ± 0.000 MB"
    assert told["Time to 0.7000, 2.5 Mbit/s up"] == "2.5 s ± 0.9 s"
    assert page.row("Rounds") == ["2"] * 5  # each run, folded away
    assert "ours, seed 2" in page.text
    assert "differ in more than the seed" not in page.text


def test_the_band_reaches_from_the_lowest_to_the_highest(tmp_path: Path) -> None:
    from fedsieve.report import series

    paths = seeds(tmp_path, "it", [0.5, 0.7, 0.9], [0.7, 0.6], [0.6, float("nan"), 0.8])
    (one,) = series.gather([], {"it": paths})
    found = series.curve(
        one, lambda run: {r.round: r.metrics.get("accuracy", 0) for r in run.rounds}
    )
    assert found.x == [1, 2]  # the rounds that all have
    assert (found.mean[0], found.low[0], found.high[0]) == pytest.approx((0.6, 0.5, 0.7))
    assert all(value[1] != value[1] for value in (found.mean, found.low, found.high))


def test_groups_that_are_not_of_seeds_alone_are_told(tmp_path: Path) -> None:
    a = make(tmp_path / "a", "x", *timed([0.5, 0.7]), method="flasc")
    b = make(tmp_path / "b", "y", *timed([0.5]), method="fedit", seed=1)
    write([], tmp_path / "r.html", groups={"both": [a, b]})
    page = Reader((tmp_path / "r.html").read_text())
    assert "differ in more than the seed (method.name)" in page.text
    assert "ended after 1 to 2 rounds" in page.text
    with pytest.raises(FedSieveError, match="'none' has no runs"):
        write([a], tmp_path / "r.html", groups={"none": []})


def test_groups_are_named_as_they_stand(tmp_path: Path) -> None:
    name = "<b>$x$ & co"
    write([], tmp_path / "r.html", groups={name: seeds(tmp_path, "x", [0.5], [0.6])})
    page = Reader((tmp_path / "r.html").read_text())
    assert [row[0] for row in page.rows].count(name) == 1
    assert f"{name}, seed 1" in page.text


def test_deviations_have_the_places_of_their_means() -> None:
    assert megabytes(12.34e6, 0.512e6) == "12.3 ± 0.5 MB"
    assert megabytes(0, 0) == "0 ± 0 MB"
    assert duration(125, 4.25) == "2 min 05 s ± 4.2 s"


def test_classes_and_answers_of_the_last_evaluation_are_shown(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    names = ("<b>cars", "space", "wine")
    counts = ((5, 1, 0), (0, 7, 0), (2, 0, 3))
    classes = [
        {"name": n, "rows": sum(c), "precision": 0.25, "recall": 0.5, "f1": 1 / 3, "taken_for": c}
        for n, c in zip(names, counts, strict=True)
    ]
    answers = [{"asked": "what & <i>?", "expected": "x" * 5000, "told": "b\x00c"}]
    table = {"round": 2, "classes": classes, "answers": answers}
    (path / "details.json").write_text(json.dumps(table), encoding="utf-8")
    page = report(path)
    assert page.row("space") == ["7", "0.250", "0.500", "0.333"]
    assert page.row("2 space") == ["", "7", ""]
    assert page.row("1 <b>cars") == ["5", "1", ""]
    (said,) = [row for row in page.rows if row[0] == "what & <i>?"]
    assert said[1] == "x" * 2000 + " …"
    assert "after round 2" in page.text
    both = report(path, make(tmp_path / "b", "other"))
    assert both.row("3 wine") == ["2", "", "3"]


def test_clients_scores_and_classes_are_shown(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    clients = [{"name": "ward <3>", "rows": 7, "score": 0.25}, {"name": "b", "rows": 9, "score": 1}]
    held = [{"name": f"client {n}", "rows": [n, 0]} for n in range(30)]
    table = {"round": 2, "classes": [CLASS, OTHER], "answers": []}
    table |= {"clients": clients, "held": held}
    (path / "details.json").write_text(json.dumps(table), encoding="utf-8")
    page = report(path)
    assert page.row("ward <3>") == ["7", "0.250"]
    assert page.row("client 7") == ["7", ""]
    assert "By client, the worst first (2)" in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"clients": [{"name": "a", "rows": -1, "score": 1}]},
        {"clients": [{"name": "a", "rows": 1, "score": math.nan}]},
        {"clients": [{"name": "a", "rows": 1, "score": 1}] * 201},
        {"held": [{"name": "a", "rows": [1]}]},
        {"held": [{"name": "a", "rows": [1, -1]}]},
        {"held": [{"name": "a", "rows": [1, 2**62]}]},
        {"held": [{"name": "a", "rows": [1, 1]}] * 201},
    ],
)
def test_clients_that_no_run_writes_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    table = {"round": 2, "classes": [CLASS, OTHER], "answers": [], **change}
    (path / "details.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"details\.json .* Remove it"):
        report(path)


def test_many_classes_are_folded_and_have_no_matrix(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    count = 40
    classes = [
        {
            "name": f"c{n}",
            "rows": count,
            "precision": 1,
            "recall": 1,
            "f1": 1,
            "taken_for": [1] * count,
        }
        for n in range(count)
    ]
    (path / "details.json").write_text(
        json.dumps({"round": 2, "classes": classes, "answers": []}), encoding="utf-8"
    )
    page = report(path)
    assert "By class: 40 classes" in page.text
    assert not [row for row in page.rows if row[:1] == ["c1"] and len(row) > 6]


CLASS = {"name": "a", "rows": 3, "precision": 1, "recall": 0.5, "f1": 0.5, "taken_for": [2, 1]}
OTHER = {"name": "b", "rows": 0, "precision": 0, "recall": 0, "f1": 0, "taken_for": [0, 0]}


@pytest.mark.parametrize(
    "change",
    [
        {"precision": math.nan},
        {"precision": 1e308},
        {"recall": -0.1},
        {"f1": math.inf},
        {"f1": 1.5},
        {"rows": -1},
        {"rows": 0},
        {"rows": 4},
        {"rows": 2**62},
        {"rows": 1, "taken_for": [2, -1]},
        {"round": -1},
        {"round": 2**62},
    ],
)
def test_details_that_no_run_writes_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    first = CLASS | {key: value for key, value in change.items() if key != "round"}
    table = {"round": change.get("round", 2), "classes": [first, OTHER], "answers": []}
    (path / "details.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(FedSieveError, match=r"details\.json tells .* Remove it") as caught:
        report(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ({"round": "two", "classes": []}, "round: "),
        ({"round": 2, "classes": [CLASS | {"rows": 1.5}]}, r"classes\.0\.rows: "),
        (
            {"round": 2, "classes": [CLASS | {"taken_for": [2, None]}]},
            r"classes\.0\.taken_for\.1: ",
        ),
        ({"round": 2, "classes": [], "answers": [], "\x1b[2J": 1}, r"(?!.*\x1b).*2J: "),
    ],
)
def test_details_of_another_kind_are_told_with_their_key(
    table: dict[str, Any], where: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "a")
    (path / "details.json").write_text(json.dumps({"answers": [], **table}), encoding="utf-8")
    with pytest.raises(FedSieveError, match=rf"details\.json cannot be read: {where}.* Remove it"):
        report(path)


def test_details_as_a_run_writes_them_are_not_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    table = {"round": 0, "classes": [CLASS, OTHER], "answers": []}
    (path / "details.json").write_text(json.dumps(table), encoding="utf-8")
    assert report(path).row("a") == ["3", "1.000", "0.500", "0.500"]


MODEL = """
cohort = 2
[model]
source = "/home/me/models/tiny"
task = "classification"
[data]
train = "news"
classes = ["a", "b"]
[partition]
kind = "dirichlet"
clients = 9
alpha = 0.1
[training]
by_length = true
lr = 1e-4
[[budgets]]
share = 1
up = 0.5
[[budgets]]
share = 3
"""


def settle(run: Path, more: str = MODEL, environment: str = "") -> Path:
    """A recipe that says more; `environment` is TOML of the table of that name."""
    head, _ = (run / "recipe.toml").read_text().split("[model]")
    _, method = (run / "recipe.toml").read_text().split("[method]")
    name, _ = method.split("[environment]")
    tail = f"[method]{name}[environment]\n{environment}"
    first, rest = more.split("[model]")
    (run / "recipe.toml").write_text(f"{head}{first}[model]{rest}{tail}")
    return run


def test_it_begins_with_what_came_of_a_run(tmp_path: Path) -> None:
    page = report(settle(make(tmp_path / "a")))
    text = " ".join(page.text.split())
    assert (
        "tiny (classification) on news over 9 clients whose labels are drawn by Dirichlet(0.1), "
        "2 a round, by flasc" in text
    )
    assert "Accuracy0.5875best 0.6125, round 1" in text
    assert "Sent, both ways2.05 MBdense float32 LoRA: 40.0 MB" in text
    assert "Against dense LoRA20x fewer" in text
    assert "Took1 min 06 s2 rounds, as measured" in text


def test_settings_are_told_in_words(tmp_path: Path) -> None:
    page = report(settle(make(tmp_path / "a")))
    assert page.row("training") == ["by length yeslr 0.0001"]
    assert page.row("budgets") == ["share 1, up 0.5; share 3"]
    assert page.row("data") == ["train newsclasses a, b"]
    assert "{'" not in page.text


def test_where_recipes_differ_is_told_first_and_only_that(tmp_path: Path) -> None:
    a = settle(make(tmp_path / "a", "one"))
    b = settle(make(tmp_path / "b", "two"), MODEL.replace("up = 0.5", "up = 0.25"))
    page = report(a, b)
    start = next(n for n, row in enumerate(page.rows) if row[0] == "Key")
    assert page.rows[start : start + 2] == [
        ["Key", "one", "two"],
        ["budgets", "share 1, up 0.5; share 3", "share 1, up 0.25; share 3"],
    ]
    assert page.rows[start + 2][0] != "seed"
    assert page.text.index("Where the recipes differ") < page.text.rindex("Curves")
    assert page.row("training") == ["by length yeslr 0.0001"]  # what they share


def test_clients_are_told_one_by_one(tmp_path: Path) -> None:
    """0001 is asked twice; of 0003 nothing was merged, and its last loss is not known."""
    own = [
        {"examples": 30, "seconds": 1.5, "loss": 2.0}, {"examples": 7, "seconds": 1.0, "loss": 2.5},
        {"examples": 30, "seconds": 2.0, "loss": 1.0}, {"examples": 11, "seconds": 0.5},
    ]  # fmt: skip
    clients = [row | more for row, more in zip(CLIENTS, own, strict=True)]
    page = report(settle(make(tmp_path / "a", clients=clients)))
    heads = ["Client", "Budget", "Rows", "Rounds", "Merged", "Down", "Up", "Work", "Last loss"]
    start = page.rows.index(heads)
    assert page.rows[start + 1 : start + 4] == [
        ["0001", "rank 8", "30", "2", "2", "1.10 MB", "0.200 MB", "3.5 s", "1.0000"],
        ["0002", "rank 4", "7", "1", "1", "0.400 MB", "0.0500 MB", "1.0 s", "2.5000"],
        ["0003", "rank 4", "11", "1", "0", "0.300 MB", "0 MB", "0.5 s", "–"],  # noqa: RUF001
    ]
    said = "3 of 9 clients took part, 1 to 2 (median 1) rounds each, with 7 to 30 (median 11) rows"
    assert said in page.text


def test_many_clients_are_folded_and_those_that_cost_most_are_shown(tmp_path: Path) -> None:
    rounds, _ = timed([0.5])
    clients = [
        {"round": 1, "client": f"c{n}", "down_bytes": n, "up_bytes": 0, "seconds": 1.0}
        for n in range(300)
    ]
    page = report(make(tmp_path / "a", rounds=rounds, clients=clients))
    told = [row[0] for row in page.rows if re.fullmatch(r"c\d+", row[0])]
    assert told == [f"c{n}" for n in range(299, 99, -1)]
    assert "Below are the 200 that cost most" in page.text


def test_sites_are_told_by_name_and_what_was_measured_beside_what_is_simulated(
    tmp_path: Path,
) -> None:
    rounds, clients = timed([0.5, 0.8])
    more = {
        "seconds": 40.0, "compute_seconds": 1.0, "wire_seconds": 0.25, "evaluation_seconds": 3.0,
        "transport_bytes": 1_000_000, "aside_bytes": 500_000,
    }  # fmt: skip
    clients = [row | {"client": "ward-7"} for row in clients]
    run = make(tmp_path / "a", rounds=[row | more for row in rounds], clients=clients)
    column = MODEL.replace('"dirichlet"', '"column"').replace("clients = 9", 'column = "ward"')
    page = report(settle(run, column, 'federation = "12ab"'))
    assert "over 1 site named by column ward" in page.text
    assert page.row("ward-7")[2:4] == ["2", "2"]
    assert page.row("Training time") == ["1 min 20 s"]
    assert page.row("Of it evaluation") == ["6.0 s"]
    assert page.row("Clients' training, summed") == ["2.0 s"]
    # Two rounds of a tenth of a second down, one of work, and .1, .4 and 1.6 up.
    assert page.row("Simulated time") == [
        "2.4 s at 10 Mbit/s up3.0 s at 2.5 Mbit/s up5.4 s at 0.625 Mbit/s up"
    ]
    assert page.row("Carried by the network in all") == ["3.00 MB"]


def test_warnings_are_in_one_place_and_said_once(tmp_path: Path) -> None:
    rounds = [ROUNDS[0], dict(ROUNDS[1], loss=None), ROUNDS[2]]
    page = report(make(tmp_path / "a", "one", rounds), make(tmp_path / "b", "two"))
    warned = page.text[page.text.index("Warnings") : page.text.rindex("Curves")]
    assert "one: The training loss of 1 round (first 1) is no number" in warned
    said = "1 client update dropped: 1 times 'the loss became NaN'."
    assert warned.count(said) == 1
    assert f": {said}" not in warned  # it is about both runs


@pytest.mark.parametrize("key", ["compute_seconds", "wire_seconds", "evaluation_seconds"])
@pytest.mark.parametrize("value", [-1, 1e13, "soon"])
def test_times_that_are_none_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    run = make(tmp_path / "a", rounds=[ROUNDS[1] | {key: value}])
    with pytest.raises(FedSieveError, match=rf"metrics\.jsonl, line 1: '{key}'"):
        load(run)
