"""The card beside a saved adapter or model: what it is, from what, how good, and how it is loaded;
and the same facts for programs, in `provenance.json`.

Both go where the folder goes, to the hub too: they name no place on this machine, and quote no row.
PEFT writes a card of its own there, whose every section says that more information is needed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from fedsieve.errors import count, few, printable
from fedsieve.settings import Task
from fedsieve.tasks import catalogue
from fedsieve.tasks.words import spoken
from fedsieve.train.digest import BaseDigest
from fedsieve.train.origin import Origin
from fedsieve.train.source import table_of

CARD = "README.md"
FACTS = "provenance.json"
_READERS = {"texts": ("AutoTokenizer", "tokenizer"), "images": ("AutoImageProcessor", "processor")}
# transformers' loaders of models, as PEFT's loaders and pipelines are called.
_PEFT = {"AutoModelForImageClassification": "AutoPeftModel"}
_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForCausalLM": "text-generation",
}
_SHOWN = 50  # names of labels
_WRITERS = ("fedsieve", "torch", "transformers", "peft")


class Told(NamedTuple):
    """What a run tells of itself. None is what is not known.

    method, recipe: their names
    data:     the rows trained on, by the name of their data set, file or folder; on_hub: whether
              the hub has a data set of that name
    rounds:   that were trained; clients: that took part; simulated: in one process, which had the
              rows of all
    tested:   the rows that the scores are of, as `data`
    start:    the adapter that training began from, as `called` has it
    settings: of the base's configuration that the run changed
    metrics:  the task's own after these rounds, the leading one first; loss: of the same evaluation
    down_bytes, up_bytes: payload bytes of all rounds
    privacy:  the guarantee, in a sentence
    personal: whether the scores are of clients' own models, parts of which they keep
    """

    method: str | None = None
    recipe: str | None = None
    data: str | None = None
    on_hub: bool = False
    tested: str | None = None
    start: str | None = None
    settings: Mapping[str, Any] = {}
    rounds: int | None = None
    clients: int | None = None
    simulated: bool | None = None
    metrics: Mapping[str, float | None] = {}
    loss: float | None = None
    down_bytes: int | None = None
    up_bytes: int | None = None
    privacy: str | None = None
    personal: bool = False


class Saved(NamedTuple):
    """What lies in a folder.

    labels: a classifier's names, in the order of its outputs
    rank:   of the adapter; None where it is a whole model
    alone:  whether the folder is all that its loader needs to be told of; else the base as it was
            published has other labels
    dtype:  of the base in training, where the base's own is another
    beside: whether the base is in the folder too
    form:   in which its weights were held in training, where they were quantised for it
    """

    task: Task
    origin: Origin
    digest: BaseDigest | None
    labels: Sequence[str] = ()
    rank: int | None = None
    alone: bool = True
    dtype: str | None = None
    form: str | None = None
    beside: bool = False


def called(adapter: str | Path) -> str:
    """The folder of an adapter without the way there; of a run's, which are all called alike, with
    the run's own name.
    """
    path = Path(adapter)
    return f"{path.parent.name}/{path.name}" if path.name == "adapter" else path.name


def write(folder: Path, saved: Saved, told: Told) -> None:
    """Write the card of what is in a folder, and its facts."""
    origin, labels = saved.origin, saved.labels
    by = f"the method {_code(told.method)}" if told.method else "a federated method"
    title = "A whole model" if saved.rank is None else f"A LoRA adapter of rank {saved.rank}"
    at = f", revision {_code(origin.revision)}" if origin.revision else ""
    weights = f", weights {_code(saved.digest.weights)} (BLAKE2b)" if saved.digest else ""
    lines = [
        "---",
        _front(saved, told),
        "---",
        "",
        f"# {title}, fine-tuned by FedSieve",
        "",
        f"- base model: {_code(origin.name)}{at}{weights}",
        *_held(saved),
        f"- licence of the base: {origin.licence or 'not known; see the base'}",
        f"- task: {catalogue.load(saved.task).title}",
        f"- trained: {_trained(told)}, by {by}",
        *_begun(saved, told),
        *([f"- recipe: {_code(told.recipe)}"] if told.recipe else []),
        *([f"- data: {_code(told.data)}"] if told.data else []),
        *([f"- changed in the base's configuration: {_changed(told)}"] if told.settings else []),
        *_bytes(told),
        f"- privacy: {told.privacy or 'no differential privacy'}",
    ]
    if labels:
        shown = few([_code(label) for label in labels], _SHOWN)
        lines.append(f"- labels, in the order of the outputs: {shown}")
    lines += ["", *_scores(told), *_how(saved, told), ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")
    text = json.dumps(_facts(saved, told), indent=1, ensure_ascii=False) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what was saved before: its facts are there, as `write` has them."""
    path = folder / FACTS
    told = {} if path.is_symlink() else table_of(path)
    base = told.get("base")
    return "task" in told and isinstance(base, Mapping) and {"name", "weights"} <= base.keys()


def kinds_of(folder: Path) -> tuple[bool, object]:
    """What of two saves must be alike, so that one takes all of the other's files away: whether it
    is of an adapter, and over which weights.
    """
    base = table_of(folder / FACTS).get("base")
    weights = base.get("weights") if isinstance(base, Mapping) else None
    return (folder / "adapter_config.json").exists(), weights


def _front(saved: Saved, told: Told) -> str:
    """The table at a card's head that the hub reads. A base that is a folder has no name there."""
    pipeline = _PIPELINES[catalogue.load(saved.task).auto]
    results = [
        EvalResult(pipeline, "other", told.tested or "not told", name, value, metric_name=name)
        for name, value in told.metrics.items()
        if value is not None and not told.personal
    ]
    made = ModelCardData(
        base_model=saved.origin.name if saved.origin.on_hub else None,
        datasets=[told.data] if told.data and told.on_hub else None,
        library_name="transformers" if saved.rank is None else "peft",
        license=saved.origin.licence,
        pipeline_tag=pipeline,
        tags=["lora", "federated", "fedsieve"],
        model_name=told.recipe or "fedsieve",
        eval_results=results or None,
    )
    if not results:
        made.model_name = None
    return made.to_yaml()


def _trained(told: Told) -> str:
    rounds = "" if told.rounds is None else f"{count(told.rounds, 'round')} "
    over = "clients" if told.clients is None else count(told.clients, "client")
    how = {None: "", True: ", simulated in one process", False: " that kept their rows"}
    return f"{rounds}over {over}{how[told.simulated]}"


def _begun(saved: Saved, told: Told) -> list[str]:
    if told.start is None:
        return []
    known = saved.digest.start if saved.digest else None
    weights = f", weights {_code(known)} (BLAKE2b)" if known else ""
    before = "; what it had learnt from, the privacy below says nothing of" if told.privacy else ""
    return [
        f"- begun from: the adapter {_code(told.start)}{weights}; rounds and bytes here are those "
        f"since{before}"
    ]


def _changed(told: Told) -> str:
    return _code(", ".join(f"{key} = {value!r}" for key, value in sorted(told.settings.items())))


def _held(saved: Saved) -> list[str]:
    if saved.form is None:
        return []
    said = f"- in training the base was held in {_code(saved.form)} (bitsandbytes)"
    if saved.rank is None:
        return [f"{said}: the weights here are those that it stood for"]
    return [
        f"{said}, and the scores are of that: over its weights as published, which the lines below "
        "load, outputs differ a little; `quantization_config=` of transformers' `from_pretrained` "
        "holds it so again"
    ]


def _bytes(told: Told) -> list[str]:
    if told.down_bytes is None or told.up_bytes is None:
        return []
    return [f"- sent: {told.down_bytes:,} payload bytes down, {told.up_bytes:,} up"]


def _scores(told: Told) -> list[str]:
    """The last evaluation, as a table."""
    known = [(spoken(name), value) for name, value in told.metrics.items() if value is not None]
    known += [] if told.loss is None else [("evaluation loss", told.loss)]
    if not known:
        return []
    rows = [f"| {name} | {value:.4f} |" for name, value in known]
    when = "" if told.rounds is None else f" after round {told.rounds}"
    whose = ""
    if told.personal:
        whose = " of the clients' own models, parts of which stay with them and are not here"
    of = "" if told.tested is None else f" ({_code(told.tested)})"
    return [
        f"Scores{when}{whose}, on the rows it is evaluated on{of}:",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
    ]


def _facts(saved: Saved, told: Told) -> dict[str, Any]:
    origin, digest = saved.origin, saved.digest
    return {
        "task": saved.task,
        **{key: value for key, value in told._asdict().items() if key != "on_hub"},
        "base": {
            "name": origin.name,
            "on_hub": origin.on_hub,
            "revision": origin.revision,
            "licence": origin.licence,
            "weights": digest.weights if digest else None,
            "config": digest.config if digest else None,
            "held_in": saved.form,
        },
        "start_weights": digest.start if digest else None,
        "rank": saved.rank,
        "written_by": {name: metadata.version(name) for name in _WRITERS},
    }


def _how(saved: Saved, told: Told) -> list[str]:
    if saved.rank is None:
        code = _whole(saved)
    else:
        code = _by_itself(saved) if saved.alone else _over_its_base(saved, told)
    lines = ["To load it:", "", "```python", *code, "```"]
    if saved.rank is None or saved.alone:
        pipeline = _PIPELINES[catalogue.load(saved.task).auto]
        lines += ["", f"Or `pipeline({_literal(pipeline)}, model=folder)` of transformers."]
    if saved.rank is not None and saved.alone and saved.beside:
        lines += [
            "",
            "The base is in `base/`, and `adapter_config.json` names it by its whole path "
            "(`base_model_name_or_path`): write the new one there if the folder moves.",
        ]
    return lines


def _whole(saved: Saved) -> list[str]:
    maker, reader = _makers(saved)
    return [
        f"from transformers import {maker}, {reader}",
        "",
        'folder = "path/to/this/folder"',
        f"model = {maker}.from_pretrained(folder).eval()",
        *_rest(saved),
    ]


def _by_itself(saved: Saved) -> list[str]:
    maker, reader = _makers(saved)
    maker = _PEFT.get(maker, maker.replace("AutoModel", "AutoPeftModel"))
    dtype = f", dtype={_literal(saved.dtype)}" if saved.dtype else ""
    return [
        f"from peft import {maker}",
        f"from transformers import {reader}",
        "",
        'folder = "path/to/this/folder"',
        f"model = {maker}.from_pretrained(folder{dtype}).eval()",
        *_rest(saved),
    ]


def _over_its_base(saved: Saved, told: Told) -> list[str]:
    """Where the base that is named has no head, or one of its own: the adapter's needs room."""
    maker, reader = _makers(saved)
    head, names = [], []
    given = [
        *(f"revision={_literal(each)}" for each in [saved.origin.revision] if each),
        *(f"dtype={_literal(each)}" for each in [saved.dtype] if each),
        *(f"{key}={value!r}" for key, value in sorted(told.settings.items())),
    ]
    if saved.labels:
        head = ["import json", "from pathlib import Path", ""]
        names = [
            'names = json.loads((Path(folder) / "labels.json").read_text(encoding="utf-8"))',
            'labels = {int(number): name for number, name in names["id2label"].items()}',
        ]
        given += ["id2label=labels", 'label2id=names["label2id"]']
    # The labels say how many there are.
    settings = catalogue.load(saved.task).config(())
    given += [
        f"{key}={json.dumps(settings[key])}"
        for key in ("num_labels", "problem_type")
        if settings.get(key) and not (saved.labels and key == "num_labels")
    ]
    return [
        *head,
        "from peft import PeftModel",
        f"from transformers import {maker}, {reader}",
        "",
        'folder = "path/to/this/folder"',
        *names,
        f"base = {maker}.from_pretrained(",
        f"    {_literal(saved.origin.name)},",
        *(f"    {each}," for each in given),
        "    ignore_mismatched_sizes=True,",
        ")",
        "model = PeftModel.from_pretrained(base, folder).eval()",
        *_rest(saved),
    ]


def _makers(saved: Saved) -> tuple[str, str]:
    task = catalogue.load(saved.task)
    return task.auto, _READERS[task.reads][0]


def _rest(saved: Saved) -> list[str]:
    kind, name = _READERS[catalogue.load(saved.task).reads]
    last = ["labels = model.config.id2label"] if saved.labels and saved.alone else []
    return [f"{name} = {kind}.from_pretrained(folder)", *last]


def _literal(text: str) -> str:
    """A text as Python reads it."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    """A text in backticks, on one line, whatever is in it."""
    one = printable(" ".join(text.split()))
    ticks = "`" * (1 + max(map(len, re.findall("`+", one)), default=0))
    pad = " " if "`" in one else ""
    return f"{ticks}{pad}{one}{pad}{ticks}"
