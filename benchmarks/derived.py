"""Rows of tasks for which no published set is at hand, derived from the published rows of others.

Nothing is made up: a label is what the published row says in another form. A newsgroup's name has
parts (`comp.sys.mac.hardware`), and a post has all of them; the words of a news sentence are
written with a capital or not; what a class of CIFAR-10 is and does, every picture of it is and
does; a play's speeches are their role's. Each function takes the folder of all data and one to
write to, and returns the files of the train and the test rows.
"""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedsieve.data import sources

Files = tuple[Path, Path]
# What every picture of a class shows.
TRAITS: Mapping[str, tuple[str, ...]] = {
    "airplane": ("vehicle", "flies"),
    "automobile": ("vehicle", "wheels"),
    "bird": ("animal", "flies"),
    "cat": ("animal", "four legs", "pet"),
    "deer": ("animal", "four legs"),
    "dog": ("animal", "four legs", "pet"),
    "frog": ("animal", "four legs", "swims"),
    "horse": ("animal", "four legs"),
    "ship": ("vehicle", "swims"),
    "truck": ("vehicle", "wheels"),
}
ROLES_FROM = 20  # speeches: roles with fewer are left out


def groups(data: Path, into: Path) -> Files:
    """20 Newsgroups, a post's labels being the parts of its group's name."""

    def of(name: str) -> Path:
        rows = sources.load(data / "20newsgroups" / f"{name}.jsonl.gz")
        # Without the header, which names the group.
        bodies = (text.partition("\n\n")[2] for text in rows["text"])
        parts = (label.split(".") for label in rows["label"])
        made = ({"text": text, "parts": p} for text, p in zip(bodies, parts, strict=True))
        return _jsonl(into / f"{name}.jsonl", (row for row in made if row["text"].strip()))

    return of("train"), of("test")


def capitals(data: Path, into: Path) -> Files:
    """MRPC's first sentences in small letters, the words that had a capital being tagged."""

    def tags(words: list[str]) -> list[str]:
        # The first word has one in every sentence; a run of others is a name, as a rule.
        capital = [bool(i) and word[0].isupper() for i, word in enumerate(words)]
        before = [False, *capital]
        begun = zip(capital, before, strict=False)
        return ["O" if not now else "I-CAPITAL" if went else "B-CAPITAL" for now, went in begun]

    def of(name: str, to: str) -> Path:
        path = data / "glue" / "MRPC" / f"{name}.tsv"
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            texts = dict.fromkeys(row["#1 String"] for row in found)
        split = [text.split() for text in texts]
        rows = ({"words": [w.lower() for w in words], "tags": tags(words)} for words in split)
        return _jsonl(into / f"{to}.jsonl", rows)

    return of("train", "train"), of("dev", "test")


def traits(data: Path, into: Path) -> Files:
    """CIFAR-10, a picture's labels being what its class is and does."""

    def of(name: str) -> Path:
        rows = sources.load(data / "cifar10" / f"{name}.parquet")
        named = [list(TRAITS[label]) for label in rows["label"]]
        made: Dataset = rows.remove_columns("label").add_column("traits", named)
        made.to_parquet(into / f"{name}.parquet")
        return into / f"{name}.parquet"

    return of("train"), of("test")


def speeches(data: Path, into: Path) -> Files:
    """Shakespeare's speeches by role; every fifth of a role's is a test row."""
    said: dict[str, list[str]] = defaultdict(list)
    with zipfile.ZipFile(data / "shakespeare" / "shakespeare.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".xml")):
            text = archive.read(name).decode("utf-8")
            play = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", text))
            for speech in play.iter("SPEECH"):
                lines = ["".join(line.itertext()).strip() for line in speech.iter("LINE")]
                for speaker in speech.iter("SPEAKER"):
                    role = f"{Path(name).stem}, {''.join(speaker.itertext()).strip()}"
                    said[role].append("\n".join(lines))
    parts: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for role, texts in said.items():
        if len(texts) < ROLES_FROM:
            continue
        for i, text in enumerate(texts):
            parts[i % 5 == 4].append({"role": role, "text": text})
    return _jsonl(into / "train.jsonl", parts[False]), _jsonl(into / "test.jsonl", parts[True])


def _jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
