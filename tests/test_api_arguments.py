"""Each argument of `finetune` and each wrong kind of value: one sentence that names the argument,
before a row is read or a model loaded.
"""

import errno
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from safetensors.torch import load_file, save_file

import fedsieve
from fedsieve import Budget, FedSieveError, Lora, Sampling, Training, disk, settings
from fedsieve.algebra.intact import versions
from fedsieve.algebra.method import compose
from fedsieve.algebra.sieve import dense
from fedsieve.errors import ChangedInPlace
from fedsieve.recipe.arguments import budgets_given
from tests.conftest import LABELS, Tiny
from tests.test_api import GOOD, LORA, TRAINING, finetune, rows

NAN, INF = float("nan"), float("inf")
WHOLE: list[Any] = [
    1.5,
    1.0,
    "3",
    True,
    NAN,
    [1],
    -1,
    {},
    "x" * 10**6,
    -(10**5000),
    2**63,
    10**5000,
]
TEXT: list[Any] = [5, 1.5, b"text", ["text"], True, {}]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


DEEP = nested(5000)


class Unreadable:
    """Says that it can be gone through, and cannot."""

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("gone")

    def __repr__(self) -> str:
        raise RuntimeError("gone")


class Incomparable:
    """Fails over every question."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("gone")

    __hash__ = None  # type: ignore[assignment]


WRONG: dict[str, list[Any]] = {
    "rounds": [*WHOLE, 0, None],
    "cohort": [*WHOLE, 0],
    "evaluate_every": [*WHOLE, 0, None],
    "max_length": [*WHOLE, 0, None],
    "seed": [*WHOLE, None],
    "task": ["seq", "SEQ_CLS", "causal_lm", "", None, 1],
    "text": TEXT,
    "label": [*TEXT, None],
    "metric": [*TEXT, "accurcy", "mse"],
    "prompt": TEXT,
    "completion": TEXT,
    "classes": [
        "cars",
        5,
        [0.5, 1],
        [["a"], "b"],
        [None, "b"],
        {"cars": 0},
        ["a", "a"],
        ["a"],
        [],
        np.array(2),
        torch.tensor(2),
        [object()] * 2,
        ["x" * 10**6],
        ["x" * 10**6] * 2,
        [10**5000, "a"],
        Unreadable(),
    ],
    "lora": [{"rank": 4}, 4, "query", Lora, TRAINING, np.array([1, 2]), 0, {}, [], "", False],
    "start": [5, b"folder", ["folder"], "/no/such/folder"],
    "training": [{"lr": 0.1}, 0.1, "adamw", Training, LORA, len, lambda model, rows: None],
    "partition": ["text", 2, {"kind": "iid", "clients": 2}, object()],  # of one list for each
    "budgets": [
        0,
        1.5,
        NAN,
        True,
        "half",
        Budget,
        [Budget()] * 2,
        (0.5, 1, 1),
        {"0000": 0.5, "0001": -0.25},
        {"0000": 0.5, "0001": True},
        {"0000": Budget(), "0001": None},
        {"0000": Budget(), "0001": (0.5, 1, 1)},
        Budget(ratio="half"),  # type: ignore[arg-type]
        Budget(up=None),  # type: ignore[arg-type]
        Budget(down=NAN),
        Budget(ratio=INF),
        Budget(ratio=-1),
        {"0000": Budget(), "0001": Budget(down=True)},
        10**400,
        10**5000,
        {"0000": 0.5, "0001": 10**400},
        Budget(down=10**400),
        Budget(up=10**5000),
        Budget(ratio=10**400),
        Budget(ratio="x" * 10**6),  # type: ignore[arg-type]
        {"0000": Budget(), "0001": Budget(up=Fraction(10**400))},  # type: ignore[arg-type]
        Budget(ratio=np.array([1, 2])),  # type: ignore[arg-type]
        Budget(down=torch.tensor([1.0, 2.0])),  # type: ignore[arg-type]
        {"0000": Budget(), "0001": Budget(up=torch.tensor([1.0, 2.0]))},  # type: ignore[arg-type]
        Budget(up=Incomparable()),  # type: ignore[arg-type]
    ],
    "device": [0, None, ["cpu"], "nowhere"],
    "on_round": [5, "print", [len, 5], np.array(2), torch.tensor(2), Unreadable(), "x" * 10**6],
    "norm_bound": [0, -1, NAN, "x" * 10**6, True, []],
}
METHODS: list[tuple[Any, str]] = [
    ("x" * 10**6, "method: 'xxx.* is no method"),
    ("fslra", r"method: 'fslra' is no method: .*did you mean 'fslora'"),
    (fedsieve.fslora, r"method: it is a function: call it, as in fedsieve\.fslora\(\)"),
    (fedsieve.methods.flasc, r"method: it is a module: call it, as in fedsieve\.flasc\(\)"),
    (fedsieve.adam(), "method: .* is needed, not Optimizer"),
    (None, "method: .* is needed, not NoneType"),
    ({"name": "flasc"}, "method: .* is needed, not dict"),
]


def one_sentence(error: FedSieveError, name: str | tuple[str, ...]) -> None:
    said = str(error)
    names = (name,) if isinstance(name, str) else name
    assert said.startswith((*names, "client '000"))  # whose budget it is
    assert "\n" not in said
    assert "pydantic" not in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, values in WRONG.items() for n in range(len(values))]
)
def test_a_wrong_value_is_told_by_its_argument(tiny: Tiny, name: str, number: int) -> None:
    value, clients = WRONG[name][number], [rows(6, 1), rows(6, 2)]
    with pytest.raises(FedSieveError) as caught:
        finetune(tiny, clients, **{name: value})
    one_sentence(
        caught.value,
        {"start": ("start", "lora.start"), "partition": ("partition", "clients")}.get(name, name),
    )


@pytest.mark.parametrize(("method", "said"), METHODS)
def test_what_is_no_method(tiny: Tiny, method: Any, said: str) -> None:
    with pytest.raises(FedSieveError, match=said) as caught:
        fedsieve.finetune(str(tiny.bert), [rows(6, 1)], method, rounds=1)
    one_sentence(caught.value, "method")


@pytest.mark.parametrize("model", [None, 5, b"bert", ["bert"]])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(FedSieveError, match="model: a name or a folder is needed, not"):
        fedsieve.finetune(model, [rows(6, 1)], fedsieve.fedit(), rounds=1)


def test_numbers_of_numpy_and_paths_are_taken(tiny: Tiny) -> None:
    run = fedsieve.finetune(
        tiny.bert,
        [rows(6, 1), rows(6, 2)],
        fedsieve.fslora(),
        rounds=np.int64(1),  # type: ignore[arg-type]
        cohort=np.int32(1),  # type: ignore[arg-type]
        budgets=Budget(np.float32(0.5), Fraction(1), 1),  # type: ignore[arg-type]
        norm_bound=10**400,
        lora=LORA,
        training=TRAINING,
        device="cpu",
    ).finish()
    assert [receipt.rank for receipt in run.receipts] == [2]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"size": np.int64(2), "quorum": np.int8(1)}, {"size": 2, "quorum": 1}),
        ({"availability": Fraction(1, 2)}, {"availability": 0.5}),
        ({"availability": np.float32(0.5)}, {"availability": 0.5}),
        ({"availability": {"a": np.float32(0.5)}}, {"availability": {"a": 0.5}}),
        ({"extra": np.uint8(1)}, {"extra": 1}),
    ],
)
def test_a_sampling_holds_what_a_recipe_can(given: dict[str, Any], kept: dict[str, Any]) -> None:
    """A run of it is kept, with a recipe that says it."""
    made = vars(Sampling(**given))
    assert {name: made[name] for name in kept} == kept
    kinds = [type(made[name]) for name in kept if not isinstance(kept[name], dict)]
    assert all(kind in (int, float) for kind in kinds)
    assert tomli_w.dumps({"sampling": made})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Lora(rank=0), r"^Lora: rank: .*greater than 0 \(it is 0\)$"),
        (lambda: Lora(rank=1.5), r"^Lora: rank: .*integer.* \(it is 1\.5\)$"),  # type: ignore[arg-type]
        (lambda: Lora(rank="a", alpha=-1), "^Lora: rank: .*; alpha: .*$"),  # type: ignore[arg-type]
        (lambda: Lora(ranks=4), "^Lora: ranks: unknown key .did you mean 'rank'.*$"),  # type: ignore[call-arg]
        (lambda: Lora(dropout=1), r"^Lora: dropout: .* less than 1 \(it is 1\)$"),
        (lambda: Lora(alpha=NAN), "^Lora: alpha: .* finite number"),
        (lambda: Lora(alpha=INF), "^Lora: alpha: .* finite number"),
        (lambda: Lora(targets=3), "^Lora: targets: a list of names is needed"),  # type: ignore[arg-type]
        (lambda: Training(optimizer="lion"), "^Training: optimizer: .*'sgd' or 'adamw'"),  # type: ignore[arg-type]
        (lambda: Training(lr=-1), "^Training: lr: .*greater than 0"),
        (lambda: Training(lr=INF), "^Training: lr: .*finite"),
        (lambda: Training(learning_rate=1), "^Training: learning_rate: unknown key"),  # type: ignore[call-arg]
        (lambda: Training(steps=0, batch=0), "^Training: steps: .*; batch: .*"),
        (lambda: Sampling(size=1.5), r"sampling\.size is 1\.5; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: Sampling(size=True), "sampling.size is True; it must be a whole number"),
        (lambda: Sampling(size=3, extra=0.5), r"sampling\.extra is 0\.5"),  # type: ignore[arg-type]
        (lambda: Sampling(size=3, quorum="1"), r"sampling\.quorum is '1'"),  # type: ignore[arg-type]
        (lambda: Sampling(kind="some"), r"sampling\.kind is 'some'; it must be 'uniform', 'poi"),  # type: ignore[arg-type]
        (lambda: Sampling(kind=np.array(["a", "b"])), r"sampling\.kind is array"),  # type: ignore[arg-type]
        (lambda: Sampling(size=Dataset.from_list(GOOD)), r"sampling\.size is Dataset"),
        (lambda: Lora(rank=DEEP), "^Lora: rank is nested too deeply"),  # type: ignore[arg-type]
        (lambda: Training(lr=DEEP), "^Training: lr is nested too deeply"),  # type: ignore[arg-type]
        (lambda: Training(lr=1e39), "^Training: lr: .*less than or equal to"),
        (lambda: Training(last_lr=1e39), "^Training: last_lr: .*less than or equal to"),
        (lambda: Training(weight_decay=1e39), "^Training: weight_decay: .*less than or equal to"),
        (lambda: Training(clip=1e39), "^Training: clip: .*less than or equal to"),
        (lambda: Lora(alpha=1e39), "^Lora: alpha: .*less than or equal to"),
        (lambda: Training(batch=10**400), "^Training: batch: .*less than or equal to"),
        (lambda: Training(epochs=2**63), "^Training: epochs: .*less than or equal to"),
        (lambda: Training(steps=10**5000), "^Training: steps: .*"),
        (lambda: Training(micro_batch=2**63), "^Training: micro_batch: .*less than or equal to"),
        (lambda: Lora(clients=10**400), "^Lora: clients: .*less than or equal to"),
        (lambda: Lora(layers_to_transform=(10**5000,)), "^Lora: layers_to_transform"),
        (lambda: Sampling(size=10**5000), r"sampling\.size is .*; it must be at most 9223372036"),
        (lambda: Sampling(kind="poisson", size=10**400), r"sampling\.size is .*at most"),
        (lambda: Sampling(size=3, extra=2**63), r"sampling\.extra is .*at most"),
        (lambda: Sampling(availability="often"), r"sampling\.availability is 'often'; it must"),  # type: ignore[arg-type]
        (lambda: Sampling(availability=NAN), r"sampling\.availability is nan"),
        (lambda: Sampling(availability={"a": None}), r"sampling\.availability\.a is None"),  # type: ignore[dict-item]
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(FedSieveError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_largest_settings_are_numbers_that_torch_takes(tiny: Tiny, optimizer: Any) -> None:
    """Whatever comes of them: it is told of the clients, not of an optimizer's arithmetic."""
    most = Training(optimizer=optimizer, lr=1e32, weight_decay=1e5, clip=1e32, steps=2)
    with pytest.raises(FedSieveError, match="no client returned an update"):
        finetune(tiny, [rows(6, 1)], rounds=2, training=replace(most, last_lr=1e32)).finish()
    lora = replace(LORA, alpha=1e9, clients=2**63 - 1)
    with pytest.raises(FedSieveError, match="no client returned an update"):
        finetune(tiny, [rows(6, 1)], rounds=1, lora=lora, training=most).finish()
    huge = Training(batch=2**63 - 1, micro_batch=2**63 - 1, steps=1)
    finetune(tiny, [rows(6, 1)], rounds=1, training=huge, seed=2**63 - 1).finish()


def test_a_whole_number_is_at_most_what_a_file_may_hold() -> None:
    assert settings.LARGEST == disk.LARGEST


@pytest.mark.parametrize("method", [fedsieve.fedit(), fedsieve.full(), fedsieve.flora()])
def test_saving_where_no_folder_can_be(tiny: Tiny, tmp_path: Path, method: Any) -> None:
    """transformers writes nothing there, and says so in a log."""
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    run = finetune(tiny, [rows(6, 1)], method, rounds=1).finish()
    for folder in (file, file / "below"):
        with pytest.raises(FedSieveError, match=r"notes\.txt.* cannot be written: .*"):
            run.save(folder)
    assert file.read_text() == "mine"
    for what in (run.save, run.report, run.keep, run.go_on):
        name = what.__name__
        for odd, said in ((None, "a folder is needed"), (5, "a folder is needed")):
            with pytest.raises(FedSieveError, match=f"{name}: {said}, not"):
                what(odd)  # type: ignore[arg-type]
        for long in ("a" * 300, ""):
            with pytest.raises(FedSieveError, match=f"{name}: .* can be no path"):
                what(long)
        with pytest.raises(FedSieveError):
            what(tmp_path / "c" / ("b" * 300) / "d")
    run.save(str(tmp_path / "a" / "b"))
    assert any((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("method", [fedsieve.fedit(), fedsieve.full(), fedsieve.flora()])
def test_saving_follows_no_link_and_leaves_what_else_is_there(
    tiny: Tiny, tmp_path: Path, method: Any
) -> None:
    run = finetune(tiny, [rows(6, 1)], method, rounds=1).finish()
    run.save(tmp_path / "first")
    names = [path.name for path in (tmp_path / "first").iterdir() if path.is_file()]
    there, place = tmp_path / "elsewhere", tmp_path / "saved"
    there.mkdir()
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    for name in (*names, f"../.{place.name}.part"):
        target = there / name.removeprefix("../")
        target.write_text("precious")
        (place / name).symlink_to(target)
    run.save(place)
    assert {path.read_text() for path in there.iterdir()} == {"precious"}
    assert (place / "notes.txt").read_text() == "mine"
    assert not any(path.is_symlink() for path in place.iterdir())


@pytest.mark.parametrize("method", [fedsieve.fedit(), fedsieve.full(), fedsieve.head()])
def test_saving_replaces_nothing_but_what_was_saved(
    tiny: Tiny, tmp_path: Path, method: Any
) -> None:
    run = finetune(tiny, [rows(6, 1)], method, rounds=1).finish()
    run.save(tmp_path / "first")
    run.save(tmp_path / "first")  # in the place of the first
    for name in (path.name for path in (tmp_path / "first").iterdir() if path.is_file()):
        place = tmp_path / f"project-{name}"
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        (place / name).write_text('{"task": "mine", "base": {}}')
        with pytest.raises(FedSieveError, match=f"save: .*/{re.escape(name)} is there already"):
            run.save(place)
        found = {path.name: path.read_text() for path in place.iterdir()}
        assert found == {"notes.txt": "mine", name: '{"task": "mine", "base": {}}'}
        (place / name).unlink()
        run.save(place)
        assert (place / "notes.txt").read_text() == "mine"
    assert not [*tmp_path.glob(".*.part")]


def test_saves_of_two_kinds_or_over_two_bases_are_not_mixed(tiny: Tiny, tmp_path: Path) -> None:
    """transformers and PEFT would load the one with the other on top of it."""
    given = rows(6, 1)
    lora = finetune(tiny, [given], fedsieve.fedit(), rounds=1).finish()
    whole = finetune(tiny, [given], fedsieve.full(), rounds=1).finish()
    base = Path(shutil.copytree(tiny.bert, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name] + 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    other = fedsieve.finetune(base, [given], fedsieve.fedit(), rounds=1).finish()
    for first, second in itertools.permutations([lora, whole, other], 2):
        place = tmp_path / f"{id(first)}-{id(second)}"
        first.save(place)
        kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        with pytest.raises(FedSieveError, match="both would lie there mixed"):
            second.save(place)
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == kept
        first.save(place)
    assert not [*tmp_path.glob(".*.part")]


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_folder_that_is_a_disk_of_its_own_is_saved_into(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside it is on another one, from where nothing can be renamed."""
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    place, replace_ = tmp_path / "disk", os.replace
    place.mkdir()

    def within(old: Any, new: Any) -> None:
        if {Path(each).is_relative_to(place) for each in (old, new)} == {True, False}:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(old), None, str(new))
        replace_(old, new)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, within)
    run.save(place)
    first = everything(place)
    run.save(place)
    assert everything(place).keys() == first.keys()
    assert (place / "base" / "config.json") in first
    assert [*tmp_path.iterdir()] == [place]


@pytest.mark.parametrize("at", [1, 2, 3, 8, 13, 16])
def test_a_save_that_breaks_off_leaves_what_was_saved_before(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    place, replace_, number = tmp_path / "saved", os.replace, itertools.count(1)
    run.save(place)
    kept = everything(place)

    def broken(old: Any, new: Any) -> None:
        if next(number) == at:
            raise OSError(errno.EIO, "Input/output error", str(old), None, str(new))
        replace_(old, new)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, broken)
    with pytest.raises(FedSieveError, match=r"save: .* cannot be written: Input/output error"):
        run.save(place)
    assert everything(place) == kept
    run.save(place)
    assert [*tmp_path.iterdir()] == [place]


def test_a_save_that_was_killed_is_put_back_by_the_next(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    place = tmp_path / "saved"
    run.save(place)
    kept, half = everything(place), place / ".fedsieve.part"
    (half / ".old").mkdir(parents=True)
    (place / "base").rename(half / ".old" / "base")
    (half / "README.md").write_text("half")
    (place / "labels.json").unlink()
    (place / "labels.json").mkdir()
    with pytest.raises(FedSieveError, match=r"labels\.json is a folder"):
        run.save(place)
    (place / "labels.json").rmdir()
    assert everything(place) == {k: v for k, v in kept.items() if k.name != "labels.json"}


LIES: dict[str, Callable[[Path], object]] = {  # what lies where, once something was saved
    "labels.json is a folder": lambda p: (p / "labels.json").mkdir(),
    "README.md is a folder": lambda p: (p / "README.md").mkdir(),
    "base/notes.txt is there": lambda p: (p / "base/notes.txt").write_text("mine"),
    "base/data.json is there": lambda p: (p / "base/data.json").write_text("mine"),
    "base is there": lambda p: (p / "base").write_text("mine"),
}


@pytest.mark.parametrize("case", LIES)
def test_what_lies_in_the_way_of_a_save_is_named_and_all_of_it_stays(
    tiny: Tiny, tmp_path: Path, case: str
) -> None:
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    place = tmp_path / "saved"
    run.save(place)
    if (there := place / case.split()[0]).is_file():
        there.unlink()
    elif there.is_dir():
        shutil.rmtree(there)
    LIES[case](place)
    kept = everything(place)
    with pytest.raises(FedSieveError, match=f"save: .*{re.escape(case)}"):
        run.save(place)
    assert everything(place) == kept


def test_a_base_of_the_users_own_is_not_replaced(tiny: Tiny, tmp_path: Path) -> None:
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    place = tmp_path / "saved"
    run.save(place)
    shutil.rmtree(place / "base")
    (place / "base").mkdir()
    (place / "base" / "plan.txt").write_text("mine")
    with pytest.raises(FedSieveError, match=r"base/plan\.txt is there"):
        run.save(place)
    assert (place / "base" / "plan.txt").read_text() == "mine"


def test_a_folder_beside_that_of_a_save_is_its_owners(tiny: Tiny, tmp_path: Path) -> None:
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    (tmp_path / ".saved.part").mkdir()
    (tmp_path / ".saved.part" / "film").write_text("mine")
    run.save(tmp_path / "saved")
    assert (tmp_path / ".saved.part" / "film").read_text() == "mine"


def test_folders_that_can_be_none_of_a_run_are_told(tiny: Tiny, tmp_path: Path) -> None:
    """What is added to their names has room, too, and no link leads in circles."""
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    for n in (249, 255):
        for keep in (run.keep, run.report):
            with pytest.raises(FedSieveError, match=r"its name is too long"):
                keep(tmp_path / ("b" * n))
    run.save(tmp_path / ("b" * 255))
    (tmp_path / "loop").symlink_to("loop")
    for what in (run.save, run.keep, run.report, run.go_on):
        with pytest.raises(FedSieveError, match=r"loop' can be no path: Symlink loop"):
            what(tmp_path / "loop")
    for what in (run.save, run.keep, run.report):
        with pytest.raises(FedSieveError, match="is the root of the disk"):
            what("/")
    run.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "base")
    (tmp_path / "saved" / "base").symlink_to("base")
    with pytest.raises(FedSieveError, match="base is there already"):
        run.save(tmp_path / "saved")


def test_ways_that_no_text_can_hold_are_told_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    odd = tmp_path / os.fsdecode(b"\xffb")
    shutil.copytree(tiny.bert, odd / "model")
    monkeypatch.chdir(odd)
    for what in (run.save, run.keep, run.report, run.go_on):
        for place in (odd / "out", "out"):
            with pytest.raises(FedSieveError, match=f"{what.__name__}: .* can be no path"):
                what(place)
    with pytest.raises(FedSieveError, match="can be no path"):
        fedsieve.finetune("model", [rows(6, 1)], fedsieve.fedit(), rounds=1)
    assert [path.name for path in odd.iterdir()] == ["model"]


@pytest.mark.parametrize("part", ["plan", "publish", "report", "merge", "export"])
def test_a_method_made_in_python_leaves_what_it_is_given_as_it_was(tiny: Tiny, part: str) -> None:
    """Else how often one evaluates changes the model. An honest one is not looked at twice."""
    whole = fedsieve.fedit()

    def tensors_in(value: object) -> Iterator[torch.Tensor]:
        return (tensor for _, tensor, _ in versions(value))

    def honest(*given: Any) -> Any:
        made = getattr(whole, part)(*given)
        for tensor in tensors_in(given):
            tensor.clone().mul_(0.5)
        return made

    def changing(*given: Any) -> Any:
        made = getattr(whole, part)(*given)
        with torch.no_grad():
            next(tensors_in(given)).mul_(0.5)
        return made

    good, bad = ({part: function} for function in (honest, changing))
    given: Any = [rows(6, 1)]
    finetune(tiny, given, whole._replace(**good), rounds=1).finish()  # type: ignore[arg-type]
    run = finetune(tiny, given, whole._replace(**bad), rounds=1)  # type: ignore[arg-type]
    with pytest.raises(
        ChangedInPlace, match=f"method of your own: its {part}.* changed .* in place"
    ):
        _ = run.finish().adapter


@pytest.mark.parametrize("part", ["down", "up", "trained", "rescale", "weighting"])
def test_a_method_made_in_python_that_fails_is_told_with_its_line(tiny: Tiny, part: str) -> None:
    def mine(*given: Any) -> Any:
        raise KeyError("nothing")

    given: dict[str, Any] = {"down": dense, "up": dense, part: mine}
    method = compose(**given)
    told = rf"method of your own: its .*{part}: the .* 'mine' fails: KeyError: 'nothing' \(.*, line"
    with pytest.raises(FedSieveError, match=told):
        finetune(tiny, [rows(6, 1)], method, rounds=1).finish()


@pytest.mark.parametrize("method", [fedsieve.fedit(), fedsieve.full()])
def test_nothing_is_saved_into_the_bases_own_folder(
    tiny: Tiny, tmp_path: Path, method: Any
) -> None:
    """Also where the base has what an earlier save leaves, and where a link leads to it."""
    base = Path(shutil.copytree(tiny.bert, tmp_path / "saved" / "base"))
    given = rows(6, 1)
    run = fedsieve.finetune(base, [given], method, rounds=1).finish()
    run.save(tmp_path / "elsewhere")
    shutil.copy(tmp_path / "elsewhere" / "provenance.json", base)
    kept = {path: path.read_bytes() for path in base.iterdir()}
    (tmp_path / "link").symlink_to(base)
    for place in (base, tmp_path / "link", base.parent):
        with pytest.raises(FedSieveError, match=r"save: the base .* is in .*: choose another"):
            run.save(place)
    assert {path: path.read_bytes() for path in base.iterdir()} == kept
    assert [*base.parent.iterdir()] == [base]


def test_a_link_in_the_place_of_an_adapters_base_is_not_followed(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = finetune(tiny, [rows(6, 1)], fedsieve.fedit(), rounds=1).finish()
    run.save(tmp_path / "first")
    base = tmp_path / "first" / "base"
    kept = {path: path.read_bytes() for path in base.iterdir()}
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "base").symlink_to(base)
    with pytest.raises(FedSieveError, match="is there already"):
        run.save(tmp_path / "saved")
    assert {path: path.read_bytes() for path in base.iterdir()} == kept
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["base"]
    assert not [*tmp_path.glob(".*.part")]


# --- streams in which anything may be


def stream(give: Callable[[], Iterator[Any]]) -> IterableDataset:
    return IterableDataset.from_generator(give)


def labelled(*labels: Any) -> IterableDataset:
    def give() -> Iterator[dict[str, Any]]:
        for number, label in enumerate(labels):
            yield {"text": f"word{number}", "label": label}

    return stream(give)


def failing(error: Exception) -> IterableDataset:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["text"] == "word4":
            raise error
        return row

    return Dataset.from_list(GOOD).to_iterable_dataset().map(change)


NAMED = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
ODD: list[tuple[Any, str]] = [
    (labelled({"cars"}, {"wine"}), "row 0 .*column 'label' holds a list"),
    (labelled(object()), "row 0 .*object"),
    (labelled("cars", object()), "row 1 has a value of type object in column 'label'"),
    (labelled(1j), "row 0 .*complex"),
    (labelled(2**70, 0.5), "row 1 .*column 'label' holds 0.5|column 'label'"),
    (labelled(["cars", 1]), "row 0 .*column 'label'"),
    (labelled({1: "a"}), "row 0 .*column 'label'"),
    (labelled(range(3)), "row 0 .*column 'label'"),
    (labelled(len), "row 0 .*column 'label'"),
    (labelled(-1).cast(NAMED), "column 'label' holds -1|the stream breaks off"),
    (labelled(7).cast(NAMED), "column 'label'|the stream breaks off"),
    (failing(KeyError("place")), "the stream breaks off after 4 rows: KeyError: 'place'"),
    (failing(ValueError("bad")), "the stream breaks off after 4 rows: ValueError: bad"),
    (failing(RuntimeError("gone")), "the stream breaks off after 4 rows: RuntimeError: gone"),
    (failing(IndexError()), "the stream breaks off after 4 rows: IndexError"),
    (failing(OSError("a\nb")), "the stream breaks off after 4 rows: OSError: a b"),
    (failing(AssertionError("no")), "the stream breaks off after 4 rows: AssertionError: no"),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_a_stream_that_cannot_be_read_leaves_out_its_client_alone(tiny: Tiny, number: int) -> None:
    odd, said = ODD[number]
    with pytest.warns(UserWarning, match=f"1 of 2 clients .* left out: client 'south': .*({said})"):
        run = finetune(tiny, {"north": Dataset.from_list(GOOD), "south": odd}, rounds=1)
    assert [client.id for client in run._experiment.federation.clients] == ["north"]
    with pytest.raises(FedSieveError, match=f"^test: .*({said})") as caught:
        finetune(tiny, [Dataset.from_list(GOOD)], test=odd)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "budget", "unused"),
    [
        ("scaffold", fedsieve.Budget(down=0.25, up=0.25), "down and up"),
        ("fedit", fedsieve.Budget(ratio=0.5), "ratio"),
        ("fslora", fedsieve.Budget(ratio=0.5, up=0.25), "up"),
        ("flasc", fedsieve.Budget(ratio=0.5, up=0.25), "ratio"),
        ("flasc", fedsieve.Budget(up=0.25), ""),
    ],
)
def test_a_budget_that_the_method_makes_no_use_of_is_said(
    method: str, budget: fedsieve.Budget, unused: str
) -> None:
    built = getattr(fedsieve, method)()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        budgets_given(budget, ["0"], built)
    assert [f"makes no use of {unused}:" in str(each.message) for each in said] == (
        [True] if unused else []
    )
