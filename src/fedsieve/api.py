"""Federated fine-tuning from a notebook: data sets in, an adapter and its metrics out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from fedsieve.algebra.adapter import Adapter
from fedsieve.algebra.budget import Budget
from fedsieve.algebra.keys import Key
from fedsieve.algebra.method import Method
from fedsieve.data.sources import column
from fedsieve.engine import loop
from fedsieve.engine.loop import Receipt, Round
from fedsieve.errors import FedSieveError
from fedsieve.recipe.experiment import Experiment, assemble, check_length, locate
from fedsieve.settings import Lora, Sampling, Task, Training
from fedsieve.tasks import tokens
from fedsieve.tasks.causal_lm import causal_lm
from fedsieve.tasks.classification import classification
from fedsieve.tasks.tokens import Examples
from fedsieve.train.model import load_base, load_tokenizer, pick_device, set_up


class Run:
    """A federation in this process. Iterate over it to train, a round at a time.

    metrics:  one `Round` for each round so far, round 0 (before training) first
    receipts: one `Receipt` for each client and round so far
    adapter:  the global adapter as it stands now
    """

    def __init__(self, experiment: Experiment, rounds: int) -> None:
        self._experiment = experiment
        self._last = rounds
        first, self._progress = loop.begin(experiment.federation, experiment.start)
        self.metrics: list[Round] = [first]
        self.receipts: list[Receipt] = []

    def __iter__(self) -> Iterator[Round]:
        """Train the rounds that are left, giving each one's metrics as it ends."""
        federation, memories = self._experiment.federation, self._experiment.memories
        while self._progress.round < self._last:
            before = dict(memories)
            try:
                summary, receipts, progress = next(
                    loop.rounds(federation, self._progress, self._last)
                )
            except BaseException:
                # The round did not happen: it can be tried again by iterating again.
                memories.clear()
                memories.update(before)
                raise
            self._progress = progress
            self.metrics.append(summary)
            self.receipts.extend(receipts)
            yield summary

    def finish(self) -> "Run":
        """Train the rounds that are left."""
        for _ in self:
            pass
        return self

    @property
    def adapter(self) -> Adapter:
        return self._experiment.federation.method.export(self._progress.state)

    def save(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format, with the tokenizer and the names of the labels."""
        self._experiment.resident.save(self.adapter, Path(folder))


def finetune(
    model: str,
    clients: Sequence[Dataset] | Mapping[str, Dataset],
    method: Method,
    *,
    rounds: int,
    cohort: int | Sampling | None = None,
    test: Dataset | None = None,
    task: Task = "classification",
    text: str | None = "text",
    label: str = "label",
    prompt: str | None = None,
    completion: str | None = None,
    classes: Sequence[str] | None = None,
    max_length: int = 128,
    lora: Lora | None = None,
    training: Training | None = None,
    budgets: Mapping[str, Budget] | Budget | None = None,
    evaluate_every: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> Run:
    """Set up federated LoRA fine-tuning; nothing is trained until the run is iterated.

    model:   a name on the hub, a folder, or a name that `fedsieve fetch` knows
    clients: one data set for each client, by id or in a list (ids "0000", "0001", ...)
    method:  e.g. `fedsieve.methods.flasc.method(server=fedsieve.adam(1e-3))`
    cohort:  clients a round, or a `Sampling` that says how they are drawn; default all
    text, label, prompt, completion: columns. For causal-lm give `text`, or the other two (then
             text is not used). `classes` defaults to the labels that the clients hold.
    budgets: what each client can afford, by id; or one budget for all
    Raises FedSieveError for bad input.
    """
    given = clients if isinstance(clients, Mapping) else _numbered(clients)
    filled = {id: dataset for id, dataset in given.items() if len(dataset)}
    if not filled:
        raise FedSieveError("clients: at least one data set with a row in it is needed")
    lora, training = lora or Lora(), training or Training()
    key = Key(seed)
    tokenizer = load_tokenizer(locate(model))
    note = tokens.ensure_pad_token(tokenizer)
    if note:
        warnings.warn(note, stacklevel=2)
    if task == "classification":
        assert text is not None
        if classes is None:
            classes = _classes(list(filled.values()), label)
        read: Any = partial(
            classification,
            tokenizer=tokenizer,
            text=text,
            label=label,
            max_length=max_length,
            classes=classes,
        )
    else:
        whole = prompt is None and completion is None
        columns = {"text": text} if whole else {"prompt": prompt, "completion": completion}
        read = partial(causal_lm, tokenizer=tokenizer, **columns, max_length=max_length)
    examples: dict[str, Examples] = {id: read(dataset)[0] for id, dataset in filled.items()}
    base = load_base(
        locate(model), task, classes or (), key=key, pad_token_id=tokenizer.pad_token_id
    )
    resident = set_up(
        base,
        task,
        lora,
        method.trains,
        key=key,
        device=pick_device(device),
        tokenizer=tokenizer,
    )
    for each in examples.values():
        check_length(resident, each)
    if not isinstance(budgets, Mapping):
        budgets = dict.fromkeys(given, budgets or Budget())
    missing = sorted(set(given) - set(budgets))
    if missing:
        raise FedSieveError(f"budgets: none for client {missing[0]!r}")
    sampling = cohort if isinstance(cohort, Sampling) else Sampling(size=cohort or len(filled))
    experiment = assemble(
        resident,
        method,
        {id: partial(examples.__getitem__, id) for id in examples},
        {id: tokens.count(examples[id]) if id in examples else 0 for id in given},
        budgets,
        training=training,
        sampling=sampling,
        seed=seed,
        test=None if test is None else read(test)[0],
        evaluate_every=evaluate_every,
        notes=[note] if note else [],
    )
    return Run(experiment, rounds)


def _numbered(clients: Sequence[Dataset]) -> dict[str, Dataset]:
    return {f"{number:04d}": dataset for number, dataset in enumerate(clients)}


def _classes(datasets: Sequence[Dataset], label: str) -> list[str]:
    """A ClassLabel's own names, else the labels that occur, sorted as what they are."""
    values = {value for dataset in datasets for value in column(dataset, label)}
    feature = datasets[0].features[label]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(value) for value in sorted(values)]
