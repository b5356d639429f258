"""A run in words: what is about to be done, and each round in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsieve.engine.shares import Shares, in_words
from fedsieve.errors import count
from fedsieve.run.tracking import where
from fedsieve.settings import Training
from fedsieve.tasks import words

if TYPE_CHECKING:
    from fedsieve.engine.loop import Round
    from fedsieve.recipe.schema import Recipe
    from fedsieve.report.read import Round as Logged

MB = 1e6
_RISING = 0.02  # of all that a score has risen: what rises by less is taken to be where it will be


def mb(number: float) -> str:
    """So many bytes."""
    return f"{number / MB:,.1f} MB" if number >= 10 * MB else f"{number / MB:.3g} MB"


def lines_of_plan(recipe: "Recipe", folder: Path | None) -> list[str]:
    """What a recipe asks for, from its own words alone; folder: of the run, if there is one."""
    into = "" if folder is None else f", into {folder}"
    lines = [
        f"{recipe.name}: {recipe.method.name} on {recipe.model.source} ({recipe.model.task})",
        f"{count(recipe.rounds, 'round')}, {_who(recipe)} a round, rank {recipe.lora.rank}, "
        f"seed {recipe.seed}, device {recipe.device}{into}",
    ]
    if recipe.tracking is not None and folder is not None:
        lines.append(f"tracked by {where(recipe.tracking, folder)}")
    return lines


def in_vain(recipe: "Recipe") -> list[str]:
    """What a recipe gives and nothing reads, by its own words alone, a sentence each."""
    data, training, found = recipe.data, recipe.training, []
    if recipe.evaluation.on == "validation":
        found += [
            f"data.{key} is not used: evaluation.on = 'validation' takes the rows held back"
            for key in ("test", "test_split", "more_tests")
            if getattr(data, key) is not None
        ]
    elif data.test is None and data.test_split is None:
        found.append(
            "nothing is evaluated: give data.test or data.test_split, or data.validation and "
            "evaluation.on = 'validation'"
        )
    if recipe.evaluation.on == "test" and data.validation is not None:
        found.append(
            f"data.validation holds {data.validation:.0%} of the rows back, and nothing reads "
            "them: evaluation.on is 'test'"
        )
    if training.steps is not None and training.epochs != Training().epochs:
        found.append("training.epochs is not used: training.steps says how many steps there are")
    if training.optimizer == "adamw" and training.momentum not in (0, Training().momentum):
        found.append("training.momentum is not used: it is SGD's, and training.optimizer is adamw")
    if training.proximal and training.steps == 1:
        found.append("training.proximal does nothing: in its one step a client is where it began")
    if training.micro_batch is not None and training.micro_batch >= training.batch:
        found.append("training.micro_batch is not below training.batch: it saves no memory")
    if recipe.privacy is not None and recipe.privacy.quantile is None:
        usual = type(recipe.privacy).model_fields
        found += [
            f"privacy.{key} is not used: it is for a clip that follows privacy.quantile"
            for key in ("clip_rate", "count_noise")
            if getattr(recipe.privacy, key) != usual[key].default
        ]
    return found


def _who(recipe: "Recipe") -> str:
    """Which clients take part in a round."""
    split, everyone = recipe.partition, recipe.sampling.kind == "all"
    about = "about " if recipe.sampling.kind == "poisson" else ""
    if split.column is not None:
        drawn = "all clients" if everyone else about + count(recipe.cohort, "client")
        return f"{drawn} of column {split.column!r}"
    clients = split.clients or 0
    drawn = "all of" if everyone else f"{about}{min(recipe.cohort, clients)} of"
    return f"{drawn} {count(clients, 'client')}"


def line_of(summary: "Round", rounds: int) -> str:
    """Figures that a round does not have are left out; `rounds` is how many there will be."""
    parts = [f"round {summary.round:>{len(str(rounds))}}/{rounds}"]
    if summary.loss is not None:
        parts.append(f"loss {summary.loss:.3f}")
    if summary.metrics:
        name, value = next(iter(summary.metrics.items()))
        parts.append(f"{words.spoken(name)} {'not finite' if value is None else f'{value:.3f}'}")
        loss = "not finite" if summary.eval_loss is None else f"{summary.eval_loss:.3f}"
        parts.append(f"eval loss {loss}")
    if summary.epsilon is not None:
        cohort = summary.simulated_cohort
        simulated = f" (simulated cohort of {cohort})" if cohort else ""
        spent = f"epsilon {summary.epsilon:.3f}{simulated}"
        if summary.epsilon_unamplified is not None:
            spent += f" ({summary.epsilon_unamplified:.3f} against those who know who took part)"
        parts.append(spent)
    if summary.round:
        down = _kept((summary.down_a, summary.down_b, summary.down_head))
        up = _kept((summary.up_a, summary.up_b, summary.up_head))
        parts.append(f"down {summary.down_bytes / MB:.3f} MB{down}")
        parts.append(f"up {summary.up_bytes / MB:.3f} MB{up}")
        parts.append(f"total {summary.total_bytes / MB:.2f} MB")
    if summary.transport_bytes is not None:
        parts.append(f"in {summary.transport_bytes / MB:.3f} MB of messages")
        parts.append(f"{summary.seconds:.1f} s")
    return "  ".join(parts)


def _kept(shares: Shares) -> str:
    said = in_words(shares)
    if said and not any(shares):
        return " (nothing has changed yet)"
    return f" (kept {said})" if said else ""


def rising(rounds: Sequence["Logged"]) -> bool:
    """Whether the leading score was still rising when it was last told."""
    told = [next(iter(each.metrics.values())) for each in rounds if each.metrics]
    if len(told) < 3 or told[-1] <= max(told[:-1]) or told[-1] == 1.0:  # no score is above 1
        return False
    return told[-1] - told[-2] > _RISING * (told[-1] - told[0])
