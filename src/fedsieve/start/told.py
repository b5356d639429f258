"""What `fedsieve check` found, in words and a table."""

from fedsieve.errors import count
from fedsieve.run.progress import MB, mb
from fedsieve.start.check import Checked, Spread


def lines(found: Checked) -> list[str]:
    """Of rows, clients, labels and texts."""
    recipe = found.recipe
    tested = "none to evaluate on" if found.tested is None else f"{found.tested:,} to evaluate on"
    said = [
        f"rows       {found.rows:,} to train on, {tested}",
        f"clients    {found.many:,}, with {_spread(found.clients)} rows (fewest, median, most); "
        f"{found.bill.asked:,.4g} a round",
    ]
    if (labels := found.labels) is not None:
        name, share = labels.commonest
        unseen = f"; {labels.unseen} of them have none" if labels.unseen else ""
        said.append(
            f"labels     {labels.classes} classes of {_spread(labels.rows)} rows{unseen}; the "
            f"commonest, {name[:40]!r}, is {share:.1%}; a client has {_spread(labels.held)} of them"
        )
    if found.values is not None:
        said.append(f"labels     numbers, {_spread(found.values)} (least, median, largest)")
    if (texts := found.texts) is not None:
        cut = (
            f"{texts.cut:,} ({texts.cut / found.rows:.1%}) reach data.max_length "
            f"({recipe.data.max_length}) and are cut"
            if texts.cut
            else f"none reaches data.max_length ({recipe.data.max_length})"
        )
        said.append(
            f"texts      {_spread(texts.tokens)} tokens; {cut}; {texts.empty or 'none'} "
            f"{'is' if texts.empty < 2 else 'are'} empty"
        )
    return said


def table(found: Checked) -> list[dict[str, str]]:
    """What a client of each budget gets, sends and needs."""
    rows = []
    for part in found.bill.parts:
        needs = found.needs.get(part.budget)
        sent = (part.down, part.up)
        down, up = ("-" if each is None else f"{each / MB:,.3f} MB" for each in sent)
        rows.append(
            {
                "ratio": f"{part.budget.ratio:.3g}",
                "down": f"{part.budget.down:.3g}",
                "up": f"{part.budget.up:.3g}",
                "clients": f"{part.clients:,}",
                "a round: down": down,
                "up ": up,
                "memory, base included": "-"
                if needs is None
                else f"{'' if needs.counted else '~'}{needs.peak / MB:,.0f} MB",
            }
        )
    return rows


def totals(found: Checked) -> list[str]:
    """Of the whole run."""
    bill, recipe, speed = found.bill, found.recipe, found.speed
    dense = f"; dense LoRA would send {mb(bill.dense)}" if bill.dense else ""
    rough = "" if bill.steady or bill.rehearsed == bill.rounds else ", roughly"
    judged = ""
    if speed.evaluation is not None:
        judged = f", and {found.evaluations} evaluations of {seconds(speed.evaluation)}"
    engine = "" if recipe.engine.kind == "process" else ", one client after another"
    return [
        f"bytes      {mb(bill.total)} both ways in {count(recipe.rounds, 'round')}{rough}{dense}",
        f"time       {seconds(speed.step)} a step here (loss {speed.loss:.3f}), "
        f"{found.steps:,.3g} steps a client: {seconds(found.round_seconds)} a round{judged}",
        f"           about {seconds(found.seconds)} for the run{engine}",
    ]


def seconds(number: float) -> str:
    """In the unit that fits."""
    if number < 100:
        return f"{number:.2g} s"
    return f"{number / 60:.0f} minutes" if number < 5400 else f"{number / 3600:.1f} hours"


def _spread(found: Spread) -> str:
    return " / ".join(f"{each:,.4g}" for each in found)
