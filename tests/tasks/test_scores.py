"""What a task counts and the scores that it makes of that, against other libraries: all tasks."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import conlleval
import numpy as np
import pytest
import torch
import torchmetrics.functional as other
from scipy import stats
from torch import Tensor

from fedsieve.tasks import catalogue
from fedsieve.tasks.tally import Tally, score, scores, total
from fedsieve.tasks.task import Task
from tests.hostile.test_recipes_to_a_site import peak

NAMES = ("a", "b", "c", "d")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


class Case(NamedTuple):
    """A task, its classes, some outputs and labels, and what another library makes of them."""

    task: str
    classes: tuple[str, ...]
    logits: Tensor
    labels: Tensor
    expected: Callable[[Tensor, Tensor], dict[str, float]]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    given: dict[str, Any] = {"task": "multiclass", "num_classes": logits.shape[-1]}
    told = logits.argmax(-1)
    return {
        "accuracy": float(other.accuracy(told, labels, **given, average="micro")),
        "macro_f1": float(other.f1_score(told, labels, **given, average="macro")),
        "matthews": float(other.matthews_corrcoef(told, labels, **given)),
    }


def two_classes(logits: Tensor, labels: Tensor) -> dict[str, float]:
    of_second = float(other.f1_score(logits.argmax(-1), labels, task="binary"))
    return classes_of(logits, labels) | {"f1": of_second}


def numbers(logits: Tensor, labels: Tensor) -> dict[str, float]:
    x, y = logits[:, 0].double(), labels.double()
    return {
        "pearson": float(other.pearson_corrcoef(x, y)),
        "spearman": float(other.spearman_corrcoef(x, y)),
        "mse": float(other.mean_squared_error(x, y)),
    }


def labels_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    given: dict[str, Any] = {"num_labels": labels.shape[1]}
    whole = labels.int()
    return {
        "micro_f1": float(
            other.classification.multilabel_f1_score(logits, whole, **given, average="micro")
        ),
        "macro_f1": float(
            other.classification.multilabel_f1_score(logits, whole, **given, average="macro")
        ),
        "map": float(other.classification.multilabel_average_precision(logits, whole, **given)),
    }


def entities(logits: Tensor, labels: Tensor) -> dict[str, float]:
    found, there = by_conll(labels, logits.argmax(-1))["overall"]["chunks"], labels != -100
    return {
        "entity_f1": found["evals"]["f1"],
        "entity_precision": found["evals"]["prec"],
        "entity_recall": found["evals"]["rec"],
        "token_accuracy": float((logits.argmax(-1) == labels)[there].double().mean()),
    }


def by_conll(true: Tensor, told: Tensor, tags: tuple[str, ...] = TAGS) -> dict[str, Any]:
    """What CoNLL's own script makes of rows of tags."""
    lines: list[str] = []
    for row, said, there in zip(true, told, true != -100, strict=True):
        pairs = zip(row[there].tolist(), said[there].tolist(), strict=True)
        lines += [f"word {tags[a]} {tags[b]}" for a, b in pairs]
        lines.append("")
    summary: dict[str, Any] = conlleval.evaluate(lines)
    return summary


def next_tokens(logits: Tensor, labels: Tensor) -> dict[str, float]:
    logits, labels = logits[:, :-1], labels[:, 1:]
    right = (logits.argmax(-1) == labels)[labels != -100]
    return {
        "token_accuracy": float(right.double().mean()),
        "perplexity": float(other.text.perplexity(logits, labels, ignore_index=-100)),
    }


def some_ignored(labels: Tensor) -> Tensor:
    """As rows of several lengths have them, the first of each row left."""
    away = drawn(3, *labels.shape) > 0.6
    away[:, :2] = False
    return labels.masked_fill(away, -100)


def leaning(logits: Tensor, labels: Tensor, by: float) -> Tensor:
    """Outputs that are right more often than by chance."""
    return logits + by * torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1])


ints = torch.randint
drawer = torch.Generator().manual_seed(5)
CLASS = ints(0, 4, (60,), generator=drawer)
RARE = CLASS.where(CLASS != 3, torch.tensor(0))  # one of the classes never occurs
TAGGED = some_ignored(ints(0, 5, (30, 12), generator=drawer))
TOKENS = some_ignored(ints(0, 11, (8, 9), generator=drawer))
VALUES = drawn(9, 50)
HOLDS = (drawn(4, 40, 4) > 0).float()
PAIR = (CLASS == 0).long()
CASES = [
    Case("classification", NAMES, leaning(drawn(0, 60, 4), CLASS, 1.0), CLASS, classes_of),
    Case("regression", (), VALUES[:, None] + drawn(1, 50, 1), VALUES, numbers),
    Case("multi-label", NAMES, drawn(2, 40, 4) + HOLDS, HOLDS, labels_of),
    Case("token-classification", TAGS, leaning(drawn(6, 30, 12, 5), TAGGED, 2.0), TAGGED, entities),
    Case("image-classification", NAMES, leaning(drawn(8, 60, 4), CLASS, 1.0), CLASS, classes_of),
    Case("image-multi-label", NAMES, drawn(11, 40, 4) + HOLDS, HOLDS, labels_of),
    Case("causal-lm", (), drawn(7, 8, 9, 11), TOKENS, next_tokens),
    Case("classification", NAMES[:2], leaning(drawn(8, 60, 2), PAIR, 1.0), PAIR, two_classes),
]  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=[case.task for case in CASES])


def judged(task: Task, logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Tally:
    """What a task counts of all outputs of a batch: of those that it asks for."""
    if task.picked is not None:
        at, labels = task.picked(labels)
        logits = logits.flatten(0, 1)[at]
    return task.judge(logits, labels, classes)


def counted(case: Case, size: int) -> list[Tally]:
    task = catalogue.load(case.task)
    parts = zip(case.logits.split(size), case.labels.split(size), strict=True)
    return [judged(task, logits, labels, case.classes) for logits, labels in parts]


def test_every_task_has_a_case() -> None:
    asking = {name for name in catalogue.names() if catalogue.load(name).ask}  # test_asked.py
    assert {case.task for case in CASES} == set(catalogue.names()) - asking


@each
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_scores_are_those_of_another_library_however_the_rows_are_parted(
    case: Case, size: int
) -> None:
    task = catalogue.load(case.task)
    tally = total(counted(case, size))
    found = score(task, tally, case.classes)
    expected = case.expected(case.logits, case.labels)
    assert dict(found.metrics) == pytest.approx(expected, rel=1e-5)
    assert list(found.metrics) == list(expected)  # the first leads
    assert task.fits(tally, case.classes)


@each
def test_sums_alone_give_the_same_scores_as_far_as_they_go(case: Case) -> None:
    task = catalogue.load(case.task)
    sent = [part._replace(kept={}) for part in counted(case, 9)]
    assert all(task.fits(part, case.classes) for part in sent)
    found = task.metrics(total(sent), case.classes)
    whole = task.metrics(total(counted(case, 9)), case.classes)
    assert found == pytest.approx({name: whole[name] for name in found}, abs=1e-9)
    assert next(iter(found)) == next(iter(whole))
    assert set(whole) - set(found) <= {"spearman", "map"}


@each
def test_sums_that_cannot_be_do_not_fit(case: Case) -> None:
    task = catalogue.load(case.task)
    tally = total(counted(case, 9))._replace(kept={})
    name = next(iter(tally.sums))
    wrong = [
        tally._replace(sums={}),
        tally._replace(sums={**tally.sums, "more": 1.0}),
        tally._replace(sums={n: v for n, v in tally.sums.items() if n != name}),
        tally._replace(sums={n: 1e3 * v + 1e6 for n, v in tally.sums.items()}),
        tally._replace(counted=0),
    ]
    assert [task.fits(each, case.classes) for each in wrong] == [False] * len(wrong)


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_that_has_diverged_is_scored_all_the_same(case: Case, value: float) -> None:
    broken = case._replace(logits=torch.full_like(case.logits, value))
    found = score(catalogue.load(case.task), total(counted(broken, 9)), case.classes)
    assert found.counted == total(counted(case, 9)).counted
    assert not np.isfinite(found.loss)
    leading = next(iter(found.metrics.values()))
    assert 0 <= leading <= 1


def test_a_class_that_never_occurs_is_left_out_of_macro_f1() -> None:
    """As scikit-learn has it, unless it is told somewhere."""
    logits = drawn(0, 60, 4)
    logits[:, 3] = -9
    case = Case("classification", NAMES, logits, RARE, classes_of)
    found = score(catalogue.load(case.task), total(counted(case, 60)), NAMES).metrics
    assert dict(found) == pytest.approx(classes_of(logits, RARE), abs=1e-6)


@pytest.mark.parametrize(
    ("told", "labels", "f1"),
    [([0, 0], [0, 0], 0.0), ([1, 1], [0, 0], 0.0), ([1, 1], [1, 1], 1.0), ([0, 1], [1, 1], 2 / 3)],
)
def test_f1_of_two_classes_is_that_of_the_second(
    told: list[int], labels: list[int], f1: float
) -> None:
    task = catalogue.load("classification")
    logits = torch.nn.functional.one_hot(torch.tensor(told), 2).float()
    tally = judged(task, logits, torch.tensor(labels), NAMES[:2])
    assert task.metrics(tally, NAMES[:2])["f1"] == pytest.approx(f1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_constant_correlates_with_nothing(count: int) -> None:
    task = catalogue.load("regression")
    tally = judged(task, torch.ones(count, 1), drawn(1, count), ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (tally, tally._replace(kept={})):
            found = task.metrics(given, ())
            assert found["pearson"] == 0
            assert np.isfinite(list(found.values())).all()


def test_spearman_is_scipys() -> None:
    case = CASES[1]
    expected = stats.spearmanr(case.logits[:, 0].numpy(), case.labels.numpy())[0]
    found = score(catalogue.load(case.task), total(counted(case, 7)), ()).metrics
    assert found["spearman"] == pytest.approx(expected)


def test_tags_that_tell_no_entities_are_scored_by_word() -> None:
    classes = ("NOUN", "VERB", "DET", "ADJ", "X")
    case = Case("token-classification", classes, CASES[3].logits, TAGGED, entities)
    found = score(catalogue.load(case.task), total(counted(case, 7)), classes).metrics
    assert list(found) == ["token_accuracy"]


@each
def test_the_spread_over_clients_is_that_of_their_own_leading_metrics(case: Case) -> None:
    task, parts = catalogue.load(case.task), counted(case, 4)
    found = scores(task, [*parts, Tally()], case.classes)  # one has no rows
    joint = score(task, total(parts), case.classes)
    own = [next(iter(score(task, part, case.classes).metrics.values())) for part in parts]
    ordered = sorted(own)
    place = 0.1 * (len(own) - 1)
    below, above = ordered[int(place)], ordered[int(place) + 1]
    assert dict(found.metrics) == pytest.approx(
        {
            **joint.metrics,
            "client_mean": sum(own) / len(own),
            "client_p10": below + (place - int(place)) * (above - below),
            "client_worst": ordered[0],
        }
    )
    assert list(found.metrics)[: len(joint.metrics)] == list(joint.metrics)
    assert scores(task, parts[:1], case.classes) == score(task, parts[0], case.classes)


def task_of_one_class(case: Case) -> bool:
    return case.task in ("classification", "image-classification")


def one_by_one(case: Case) -> dict[str, tuple[float, ...]]:
    """Rows, precision, recall and F1 of each class, of another library."""
    task = "multilabel" if "multi-label" in case.task else "multiclass"
    size = "num_labels" if task == "multilabel" else "num_classes"
    told = case.logits if task == "multilabel" else case.logits.argmax(-1)
    labels = case.labels.int()
    given: dict[str, Any] = {"task": task, size: len(case.classes), "average": "none"}
    rows = case.labels.sum(0) if task == "multilabel" else torch.bincount(case.labels, minlength=4)
    made = [f(told, labels, **given) for f in (other.precision, other.recall, other.f1_score)]
    return {
        name: (float(rows[n]), *(float(each[n]) for each in made))
        for n, name in enumerate(case.classes)
    }


@pytest.mark.parametrize(
    "case",
    [
        case for case in CASES if catalogue.load(case.task).by_class and case.classes is not TAGS
    ] + [Case("classification", NAMES, leaning(drawn(0, 60, 4), RARE, 1.0), RARE, classes_of)],
    ids=lambda case: case.task,
)  # fmt: skip
def test_each_class_is_told_as_another_library_tells_it(case: Case) -> None:
    found = score(catalogue.load(case.task), total(counted(case, 7)), case.classes).details.classes
    wanted = one_by_one(case)
    for each in found:
        assert each[1:5] == pytest.approx(wanted.pop(each.name), rel=1e-5)
    assert all(not any(row) for row in wanted.values())  # neither there nor told
    if task_of_one_class(case):
        table = other.confusion_matrix(
            case.logits.argmax(-1), case.labels, task="multiclass", num_classes=len(case.classes)
        )
        assert [each.taken_for for each in found] == [tuple(row) for row in table.tolist()]


def test_entities_are_told_by_their_kind() -> None:
    (case,) = [case for case in CASES if case.classes is TAGS]
    found = score(catalogue.load(case.task), total(counted(case, 7)), TAGS).details.classes
    table = by_conll(case.labels, case.logits.argmax(-1))["slots"]["chunks"]
    assert [each.name for each in found] == ["LOC", "PER"]
    for each in found:
        row, stats = table[each.name]["evals"], table[each.name]["stats"]
        assert each[1:5] == pytest.approx((stats["gold"], row["prec"], row["rec"], row["f1"]))


@each
def test_answers_are_those_of_the_first_rows(case: Case) -> None:
    task = catalogue.load(case.task)
    if task.told is None:
        assert case.task == "causal-lm"
        return
    told = task.told(case.logits, case.labels, case.classes)
    assert len(told) == len(case.labels)
    right = [so == said for so, said in told]
    if task_of_one_class(case):
        assert right == (case.logits.argmax(-1) == case.labels).tolist()
    if "multi-label" in case.task:
        assert right == ((case.logits > 0) == (case.labels > 0.5)).all(1).tolist()


@each
@pytest.mark.parametrize("told", ["nothing", "all", "one"])
@pytest.mark.parametrize("rows", [1, 8])
def test_rows_all_of_one_kind_are_scored(case: Case, told: str, rows: int) -> None:
    """A class that never occurs, a label that is always the same, a model that says one thing."""
    task, logits = catalogue.load(case.task), case.logits[:rows]
    value = {"nothing": -1.0, "all": 1.0, "one": 0.0}[told]
    labels = torch.zeros_like(case.labels[:rows])
    logits = torch.full_like(logits, value)
    if told == "one":
        logits[..., 0] = 1.0
    found = score(task, judged(task, logits, labels, case.classes), case.classes)
    assert found.counted
    assert all(np.isfinite(v) for v in found.metrics.values())
    assert all(np.isfinite([c.precision, c.recall, c.f1]).all() for c in found.details.classes)
    alone = judged(task, logits, labels, case.classes)._replace(kept={})
    assert task.fits(alone, case.classes)
    assert all(np.isfinite(v) for v in score(task, alone, case.classes).metrics.values())


@pytest.mark.parametrize("scheme", ["BIOES", "BILOU", "BIO and others", "S alone"])
def test_entities_in_any_scheme_of_tags(scheme: str) -> None:
    """Two words of a person, one place; and what is no such tag begins no entity."""
    tags = {
        "BIOES": ("B-PER", "E-PER", "O", "S-LOC", "I-PER"),
        "BILOU": ("B-PER", "L-PER", "O", "U-LOC", "I-PER"),
        "BIO and others": ("B-PER", "I-PER", "X", "B-LOC", "-"),
        "S alone": ("S-PER", "S-ORG", "O", "S-LOC", "NOUN"),
    }[scheme]
    task = catalogue.load("token-classification")
    labels = torch.tensor([[0, 1, 2, 3, 2]])
    right = torch.nn.functional.one_hot(labels, 5).float()
    found = score(task, judged(task, right, labels, tags), tags)
    assert found.metrics["entity_f1"] == found.metrics["token_accuracy"] == 1
    assert task.fits(judged(task, right, labels, tags), tags)
    # One word told otherwise: of a person of two words nothing is right, of the place all.
    said = torch.tensor([[0, 2, 2, 3, 2]])
    other = torch.nn.functional.one_hot(said, 5).float()
    found = score(task, judged(task, other, labels, tags), tags)
    there = 3 if scheme == "S alone" else 2
    right_ones = 2 if scheme == "S alone" else 1
    assert found.metrics["entity_recall"] == pytest.approx(right_ones / there)
    assert {c.name for c in found.details.classes} == {t[2:] for t in tags if t[1:2] == "-"} - {""}


def test_entities_are_conlls_in_whatever_order_the_tags_come() -> None:
    """What a model says keeps to no scheme: every tag after every other one, by CoNLL's script."""
    tags = ("O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "geo-loc")))
    generator = torch.Generator().manual_seed(5)
    true, told = torch.randint(len(tags), (2, 60, 40), generator=generator)
    told = torch.where(torch.rand(60, 40, generator=generator) < 0.7, true, told)
    pairs = {pair for row in true.tolist() for pair in itertools.pairwise(row)}
    assert len(pairs) == len(tags) ** 2
    task = catalogue.load("token-classification")
    tally = judged(task, torch.nn.functional.one_hot(told, len(tags)).float(), true, tags)
    table = by_conll(true, told, tags)["slots"]["chunks"]
    for kind in ("PER", "geo-loc"):
        stats = table[kind]["stats"]
        names = {"right": "correct", "told": "pred", "there": "gold"}
        assert {name: tally.sums[f"{name} {kind}"] for name in names} == {
            name: stats[of] for name, of in names.items()
        }


def test_many_classes_have_no_table_of_one_by_another() -> None:
    classes = tuple(f"c{n}" for n in range(3000))
    task, labels = catalogue.load("classification"), torch.arange(3000)
    found = score(task, judged(task, torch.eye(3000), labels, classes), classes).details
    assert len(found.classes) == 3000
    assert not any(each.taken_for for each in found.classes)


def test_scores_over_many_classes_take_no_table_of_their_pairs() -> None:
    """Of 30,000 it has 7 GB; a column of ids that was taken for the label has as many."""
    count = 30_000
    classes = tuple(map(str, range(count)))
    counts = {f"{n} as {(n * 7 + n % 2) % count}": 1.0 for n in range(count)}
    before = peak(reset=True)
    found = score(catalogue.load("classification"), Tally(1.0, count, counts), classes)
    assert peak() - before < 200 << 20
    true = np.arange(count)
    told = (true * 7 + true % 2) % count
    assert found.metrics["accuracy"] == np.mean(true == told)
    assert abs(found.metrics["matthews"]) < 0.01


def test_one_class_alone_correlates_with_nothing() -> None:
    task = catalogue.load("classification")
    assert score(task, Tally(1.0, 3, {"0 as 0": 3.0}), ("a", "b")).metrics["matthews"] == 0
    assert (
        score(task, Tally(1.0, 3, {"0 as 1": 2.0, "1 as 1": 1.0}), ("a", "b")).metrics["matthews"]
        == 0
    )
