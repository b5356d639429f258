"""The card beside a saved adapter or model: what it is, from what, and the code that loads it.

PEFT writes a card of its own there, whose every section says that more information is needed.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fedsieve.settings import Task
from fedsieve.tasks import catalogue

CARD = "README.md"
_READERS = {"texts": ("AutoTokenizer", "tokenizer"), "images": ("AutoImageProcessor", "processor")}
_SHOWN = 50  # names of labels


def write(
    folder: Path,
    base: str,
    task: Task,
    *,
    labels: Sequence[str] = (),
    rank: int | None = None,
    method: str | None = None,
) -> None:
    """Write the card of what is in a folder.

    base:   where the base model came from: a hub name, or a folder
    labels: a classifier's names, in the order of its outputs
    rank:   of the adapter; None where the folder holds a whole model
    method: the federated method's name, where it is known
    """
    by = f"the method {_code(method)}" if method else "a federated method"
    title = "A whole model" if rank is None else f"A LoRA adapter of rank {rank}"
    lines = [
        *_front(base, whole=rank is None),
        f"# {title}, fine-tuned by FedSieve",
        "",
        f"- base model: {_code(base)}",
        f"- task: {catalogue.load(task).title}",
        f"- trained: over clients that kept their rows, by {by}",
    ]
    if labels:
        shown = ", ".join(map(_code, labels[:_SHOWN]))
        more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
        lines.append(f"- labels, in the order of the outputs: {shown}{more}")
    lines += [
        "",
        "How good it is stands in the run's `metrics.jsonl` and report, not here. To load it:",
        "",
        "```python",
        *(_whole(task, labels) if rank is None else _adapter(base, task, labels)),
        "```",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _front(base: str, *, whole: bool) -> list[str]:
    """The table at a card's head that the hub reads. A base that is a folder has no name there."""
    named = [] if Path(base).exists() else [f"base_model: {json.dumps(base)}"]
    library = "transformers" if whole else "peft"
    return ["---", *named, f"library_name: {library}", "tags: [lora, federated]", "---", ""]


def _adapter(base: str, task: Task, labels: Sequence[str]) -> list[str]:
    maker = catalogue.load(task).auto
    made = [f"base = {maker}.from_pretrained({_literal(base)})"]
    head, names = [], []
    if one := catalogue.load(task).config(()).get("num_labels"):
        made = [
            f"base = {maker}.from_pretrained(",
            f"    {_literal(base)}, num_labels={one}, ignore_mismatched_sizes=True",
            ")",
        ]
    if labels:
        # The base has no head, or one of its own: the adapter's has to have room.
        made = [
            f"base = {maker}.from_pretrained(",
            f"    {_literal(base)},",
            "    id2label=labels,",
            '    label2id=names["label2id"],',
            "    ignore_mismatched_sizes=True,",
            ")",
        ]
        head = ["import json", "from pathlib import Path", ""]
        names = [
            'names = json.loads((Path(folder) / "labels.json").read_text(encoding="utf-8"))',
            'labels = {int(number): name for number, name in names["id2label"].items()}',
        ]
    return [
        *head,
        "from peft import PeftModel",
        f"from transformers import {maker}, {_READERS[catalogue.load(task).reads][0]}",
        "",
        'folder = "path/to/this/folder"',
        *names,
        *made,
        "model = PeftModel.from_pretrained(base, folder).eval()",
        _reader(task),
    ]


def _whole(task: Task, labels: Sequence[str]) -> list[str]:
    maker = catalogue.load(task).auto
    return [
        f"from transformers import {maker}, {_READERS[catalogue.load(task).reads][0]}",
        "",
        'folder = "path/to/this/folder"',
        f"model = {maker}.from_pretrained(folder).eval()",
        _reader(task),
        *(["labels = model.config.id2label"] if labels else []),
    ]


def _reader(task: Task) -> str:
    kind, name = _READERS[catalogue.load(task).reads]
    return f"{name} = {kind}.from_pretrained(folder)"


def _literal(text: str) -> str:
    """A text as Python reads it."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    """A text in backticks, on one line, whatever is in it."""
    one = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", one)), default=0))
    pad = " " if "`" in one else ""
    return f"{ticks}{pad}{one}{pad}{ticks}"
