"""From what columns are to what a recipe could learn of them: the task, its columns, the clients.

Names count for more than values, and what a person says counts for more than both. All of it is a
guess, shown to whoever asked, and written down where it can be changed.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from fedsieve.data import fetch
from fedsieve.data.files import Columns
from fedsieve.data.templates import columns_in, is_plain
from fedsieve.errors import FedSieveError, nearest, quoted
from fedsieve.start.look import Column, Looked
from fedsieve.tasks import catalogue

# Words of columns' names, the likelier first.
TEXT = (
    "text", "sentence", "review", "content", "body", "message", "comment", "document", "utterance",
    "query", "question", "post", "tweet", "description", "abstract", "title",
)  # fmt: skip
LABEL = (
    "label", "labels", "class", "category", "target", "intent", "sentiment", "topic", "emotion",
    "tag", "tags", "rating", "score", "stars", "grade", "similarity", "price", "y", "diagnosis",
)  # fmt: skip
SCORE = frozenset({"score", "rating", "similarity", "price", "grade", "value", "target", "y"})
CLIENT = frozenset(
    {
        "client", "site", "hospital", "clinic", "ward", "branch", "store", "shop", "user",
        "author", "speaker", "device", "bank", "school", "region", "country", "city",
        "department", "center", "centre", "institution", "institute", "office", "location",
        "station", "customer", "patient", "owner", "writer", "annotator", "worker", "tenant",
        "organisation", "organization", "company", "plant", "factory", "sender", "account",
        "userid", "siteid", "clientid",
    }
)  # fmt: skip
PROMPT = ("prompt", "instruction", "question", "input", "query", "source", "ask", "goal")
COMPLETION = ("completion", "response", "output", "answer", "target", "reply", "chosen", "say")
CONTEXT = ("context", "input", "passage")
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("text_a", "text_b"), ("text1", "text2"), ("question", "sentence"), ("question", "passage")),
)
WORDS = ("words", "tokens")
OPTIONS = ("options", "choices", "endings", "answers", "candidates")
ONE_OPTION = re.compile(
    r"(?:(?:option|answer|choice|ending|sol)[ _]?[a-h1-8]|[A-H])", re.IGNORECASE
)

NAMES = ("text", "whole number", "true or false")  # what a class or a client can be called by
ENCODER, LANGUAGE = "minilm-l6", "smollm2"  # that `fedsieve fetch` knows
IMAGES = "WinKawaks/vit-tiny-patch16-224"  # of the hub


class Said(NamedTuple):
    """What a person said of the rows; None leaves it to the guess.

    text: a column or a template; label: a column, or several with commas between them
    clients: a column, or a number of them
    """

    task: str | None = None
    text: str | None = None
    label: str | None = None
    clients: str | None = None
    model: str | None = None


class Guess(NamedTuple):
    """What a recipe could say.

    data:    keys of its [data] that name columns
    clients: the column that names them, or how many parts are drawn
    words:   of a row, as 19 of 20 have at most; 0 where there are none
    """

    task: str
    data: Mapping[str, str | tuple[str, ...]]
    clients: str | int
    model: str
    words: int


Found = tuple[str, dict[str, str | tuple[str, ...]]]  # a task, and its columns


def guess(looked: Looked, said: Said) -> Guess:
    """What the rows are for.

    Raises FedSieveError for a task or a column that there is not, and where nothing can be guessed.
    """
    _check(looked, said)
    columns = [each for each in looked.columns if each.kind != "nothing"]
    owner = None if _number(said.clients) else said.clients or _owner(columns, looked, said)
    free = [each for each in columns if each.name != owner]
    task, data = _found(free, looked, said)
    if said.task is not None:
        data = _for_task(said.task, data, free, looked, said)
        task = said.task
    used = _used(data, [column.name for column in looked.columns])
    if owner in used and said.clients is None:
        owner = None
    return Guess(
        task=task,
        data=data,
        clients=_number(said.clients) or owner or _parts(looked.rows),
        model=said.model or model_for(task),
        words=sum(looked.column(name).words[1] for name in used if name != data.get("label")),
    )


def model_for(task: str) -> str:
    """A small model, of those that are fetched or else of the hub."""
    if task.startswith("image"):
        return IMAGES
    language = task in ("causal-lm", "generation", "multiple-choice")
    fetched = LANGUAGE if language else ENCODER
    return fetched if (fetch.cache_folder() / fetched).is_dir() else fetch.MODELS[fetched]


def _check(looked: Looked, said: Said) -> None:
    """Raises FedSieveError for what cannot be."""
    if said.task is not None:
        catalogue.known(said.task)
    known = [column.name for column in looked.columns]
    asked = {"--text": _columns(said.text, known), "--label": _labels(said.label, known)}
    if not _number(said.clients):
        asked["--clients"] = (said.clients,) if said.clients else ()
    for option, names in asked.items():
        for name in names:
            if name not in known:
                raise FedSieveError(f"{option}: no column {name!r}{nearest(name, known)}")


def columns_said(said: Said) -> Columns | None:
    """Those to read where only what was said counts; None where no texts are among it."""
    if said.text is None:
        return None
    owner = () if said.clients is None or _number(said.clients) else (said.clients,)
    return Columns((said.text,), (*_labels(said.label, ()), *owner))


def _number(clients: str | None) -> int | None:
    """How many, where that is what was said."""
    return int(clients) if clients and clients.isdecimal() and int(clients) > 0 else None


def _columns(text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    if text is None:
        return ()
    return (text,) if text in known else columns_in(text) or (text,)


def _labels(label: str | None, known: Sequence[str]) -> tuple[str, ...]:
    if label is None:
        return ()
    return (label,) if label in known else tuple(each.strip() for each in label.split(","))


def _used(data: Mapping[str, str | tuple[str, ...]], known: Sequence[str]) -> list[str]:
    """The columns that a recipe reads."""
    found: list[str] = []
    for each in data.values():
        for name in (each,) if isinstance(each, str) else each:
            found += _columns(name, known)
    return list(dict.fromkeys(found))


def _found(columns: Sequence[Column], looked: Looked, said: Said) -> Found:
    """The first kind of rows that these are."""
    kinds: list[Callable[[Sequence[Column], Looked, Said], Found | None]] = [
        _conversations, _images, _tagged, _choices, _prompts, _labelled, _texts,
    ]  # fmt: skip
    for kind in kinds:
        if (found := kind(columns, looked, said)) is not None:
            return found
    kinds_of = [f"{quoted(each.name)}: {each.kind}" for each in looked.columns[:8]]
    raise FedSieveError(
        f"{looked.source}: none of its columns looks like texts, images or conversations "
        f"({', '.join(kinds_of)}): give --text and --task"
    )


def _conversations(columns: Sequence[Column], looked: Looked, said: Said) -> Found | None:
    found = [each for each in columns if each.kind == "messages"]
    chosen = _said_of(found, said.text) or (found[0] if found and said.text is None else None)
    if chosen is None or said.label is not None:
        return None
    return "causal-lm", {"text": chosen.name}


def _images(columns: Sequence[Column], looked: Looked, said: Said) -> Found | None:
    found = [each for each in columns if each.kind == "image"]
    if not found or said.text is not None:
        return None
    image, rest = found[0], [each for each in columns if each.kind != "image"]
    if (several := _several(rest, looked, said)) is not None:
        return "image-multi-label", {"image": image.name, "label": several}
    label = _label(rest, looked, said)
    return None if label is None else ("image-classification", _pair("image", image, label))


def _tagged(columns: Sequence[Column], looked: Looked, said: Said) -> Found | None:
    """Two columns of lists, as long as one another in each row, of which one are words."""
    lists = [each for each in columns if each.kind in ("words", "numbers")]
    words = _said_of(lists, said.text) or _named(lists, WORDS)
    if words is None or words.kind != "words":
        return None
    tags = [each for each in lists if each != words and each.lengths == words.lengths]
    chosen = _said_of(tags, said.label) or _named(tags, ("tags", "ner_tags", *LABEL))
    chosen = chosen or (tags[0] if len(tags) == 1 else None)
    return None if chosen is None else ("token-classification", _pair("text", words, chosen))


def _choices(columns: Sequence[Column], looked: Looked, said: Said) -> Found | None:
    lists = [each for each in columns if each.kind in ("words", "options")]
    single = [c for c in columns if c.kind == "text" and ONE_OPTION.fullmatch(c.name)]
    options: str | tuple[str, ...]
    if (listed := _named(lists, OPTIONS)) is not None:
        options, taken = listed.name, [listed]
    elif len(single) > 1:
        options, taken = tuple(each.name for each in single), single
    else:
        return None
    rest = [each for each in columns if each not in taken]
    text = _text([each for each in rest if each.words[0] > 1], said)
    marks = ("label", "answer", "answerkey", "correct", "gold", "target")
    label = _said_of(rest, said.label) or _named([e for e in rest if e.kind in NAMES], marks)
    if text is None or label is None or text == label:
        return None
    return "multiple-choice", {"text": text.name, "options": options, "label": label.name}


def _prompts(columns: Sequence[Column], looked: Looked, said: Said) -> Found | None:
    """A column that asks and one that answers, in free words."""
    if said.text is not None or said.label is not None:
        return None
    texts = [each for each in columns if each.kind == "text" and each.filled > 0.5]
    prompt = _named(texts, PROMPT)
    completion = _named([each for each in texts if each != prompt], COMPLETION)
    if prompt is None or completion is None:
        return None
    if completion.distinct <= max(2, looked.looked // 5) and completion.words[1] < 4:
        return None  # as many answers as classes have
    rest = [e for e in texts if e not in (prompt, completion) and not e.nulls]
    more = _named(rest, CONTEXT)
    asked = f"{{{prompt.name}}}\n" + (f"{{{more.name}}}\n" if more else "")
    if not is_plain(prompt.name) or (more and not is_plain(more.name)):
        asked = prompt.name  # such a column can be named alone, and in no template
    return "causal-lm", {"prompt": asked, "completion": completion.name}


def _labelled(columns: Sequence[Column], looked: Looked, said: Said) -> Found | None:
    first = _paired(columns, said)
    several = _several(columns, looked, said)
    if several is not None:
        taken = {several} if isinstance(several, str) else {*several}
        text = _text([each for each in columns if each.name not in taken], said)
        return (
            None if text is None else ("multi-label", {"text": _as(text, said), "label": several})
        )
    text = _text(columns, said)
    if text is None:
        return None
    texts = first or (text, None)
    label = _label([each for each in columns if each not in texts], looked, said)
    if label is None:
        return None
    task = "regression" if _is_score(label, looked) else "classification"
    data: dict[str, str | tuple[str, ...]] = {"text": _as(texts[0], said)}
    if texts[1] is not None:
        data["text_b"] = texts[1].name
    return task, data | {"label": label.name}


def _texts(columns: Sequence[Column], looked: Looked, said: Said) -> Found | None:
    text = _text(columns, said)
    if text is None or said.label is not None:
        return None
    return "causal-lm", {"text": _as(text, said)}


def _for_task(
    task: str,
    data: dict[str, str | tuple[str, ...]],
    columns: Sequence[Column],
    looked: Looked,
    said: Said,
) -> dict[str, str | tuple[str, ...]]:
    """The columns for the task that was asked for, where the rows look like another.

    Raises FedSieveError where one that it needs is not found.
    """
    found: Found | None = (task, data)
    if task in ("causal-lm", "generation"):
        needs: tuple[str, ...] = ("prompt", "completion") if task == "generation" else ("text",)
        if "prompt" not in data:
            bare = said._replace(label=None)
            found = _conversations(columns, looked, bare) or _prompts(columns, looked, bare)
            if task == "causal-lm":
                found = found or _texts(columns, looked, bare)
        needs = () if found else needs
    else:
        needs = ("image" if task.startswith("image") else "text", "label")
        needs = (*needs, "options") if task == "multiple-choice" else needs
        if not set(needs) <= set(data):
            found = _labelled(columns, looked, said)
    data = found[1] if found else {}
    missing = [need for need in needs if need not in data]
    if task == "regression" and not missing:
        label = _said_of(columns, str(data["label"]))
        missing = [] if label and label.kind in ("number", "whole number") else ["label"]
    if missing:
        names = ", ".join(each.name[:60] for each in looked.columns[:12])
        raise FedSieveError(
            f"{looked.source}: no column looks like the {missing[0]} of a {task} task (columns: "
            f"{names}): give --text and --label, or write the recipe by hand (docs/tasks.md)"
        )
    return data


def _said_of(columns: Iterable[Column], name: str | None) -> Column | None:
    return next((each for each in columns if each.name == name), None)


def _as(text: Column, said: Said) -> str:
    """The column, or the template that was said and has it."""
    return said.text or text.name


def _pair(key: str, first: Column, label: Column) -> dict[str, str | tuple[str, ...]]:
    return {key: first.name, "label": label.name}


def _words_of(name: str) -> list[str]:
    """ "userId", "User_ID" -> user, id."""
    return re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def _named(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """The first by the order of names: called just so, or else with such a word in its name."""
    for name in names:
        if (found := next((c for c in columns if c.name.lower() == name), None)) is not None:
            return found
    for name in names:
        if (found := next((c for c in columns if name in _words_of(c.name)), None)) is not None:
            return found
    return None


def _text(columns: Sequence[Column], said: Said) -> Column | None:
    """What is read: by its name where it has words, or else whatever has the most of them."""
    if said.text is not None:
        known = [each.name for each in columns]
        return _said_of(columns, next(iter(_columns(said.text, known)), None))
    texts = [each for each in columns if each.kind == "text" and each.name != said.label]
    worded = [each for each in texts if each.words[0] > 1] or texts
    named = _named(worded, TEXT)
    longest = max(worded, key=lambda each: each.words[0], default=None)
    if named is not None and longest is not None and longest.words[0] > 10 * named.words[0]:
        return longest
    return named or longest


def _paired(columns: Sequence[Column], said: Said) -> tuple[Column, Column | None] | None:
    by = {each.name.lower(): each for each in columns if each.kind == "text"}
    for one, other in PAIRS:
        if one in by and other in by and said.text in (None, by[one].name):
            return by[one], by[other]
    return None


def _several(columns: Sequence[Column], looked: Looked, said: Said) -> str | tuple[str, ...] | None:
    """A column of lists of classes, or the columns of classes that were said."""
    known = [each.name for each in columns]
    if len(named := _labels(said.label, known)) > 1:
        return named
    lists = [each for each in columns if each.kind == "words"]
    found = _said_of(lists, said.label) or (_named(lists, LABEL) if said.label is None else None)
    return None if found is None else found.name


def _label(columns: Sequence[Column], looked: Looked, said: Said) -> Column | None:
    """What is to be told: by its name, or else the last column of few and short values."""
    if said.label is not None:
        return _said_of(columns, said.label)
    able = [
        each
        for each in columns
        if each.kind in (*NAMES, "number") and each.words[1] <= 8 and each.distinct > 1
    ]
    if (named := _named(able, (*LABEL, "answer"))) is not None:
        return named
    few = [
        each
        for each in able
        if each.kind != "number"
        and each.distinct <= max(2, min(100, looked.looked // 5))
        and not CLIENT.intersection(_words_of(each.name))
    ]
    return few[-1] if few else None


def _is_score(label: Column, looked: Looked) -> bool:
    """Whether a label is a number to be near to, and not one to call a class by."""
    if label.kind == "number":
        return True
    many = label.distinct > 30 or label.distinct > looked.looked // 2
    return label.kind == "whole number" and many and bool(SCORE & {*_words_of(label.name)})


def _owner(columns: Sequence[Column], looked: Looked, said: Said) -> str | None:
    """The column whose values are natural clients: several rows each, and no row without."""
    taken = {*_columns(said.text, [c.name for c in columns]), said.label}
    able = [
        each
        for each in columns
        if each.kind in NAMES
        and each.filled == 1
        and 2 <= each.distinct <= looked.looked // 2
        and each.words[1] <= 6
        and each.name not in taken
    ]
    named = [each for each in able if CLIENT.intersection(_words_of(each.name))]
    # Of several, whatever has the most clients, up to where they get few rows.
    return max(named, key=lambda each: min(each.distinct, 50)).name if named else None


def _parts(rows: int) -> int:
    """How many clients rows without owners are dealt to."""
    return max(2, min(20, rows // 20))
