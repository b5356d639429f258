"""Where a base model comes from: its name as others know it, its revision, its files, its licence.

A base may be named on the hub, lie in a folder, or be a folder that came from the hub: out of its
cache, or fetched (data/fetch.py). Nothing here asks the network.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import metadata_load, try_to_load_from_cache

from fedsieve.data import fetch

_IN_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,59}")
_LONGEST_CARD = 1 << 20  # bytes


class Origin(NamedTuple):
    """A base model as it was loaded, and as others can find it.

    source:   where it was loaded from: a folder, or a name on the hub
    name:     on the hub; of a folder its own name, without the way there
    on_hub:   whether the hub has one of that name
    revision: the commit there, where it is known
    licence:  as the base's own card has it, or None
    stamps:   size, time and number of each file of weights in a folder, as they were at loading
    """

    source: str
    name: str
    on_hub: bool
    revision: str | None
    licence: str | None
    stamps: Mapping[str, tuple[int, int, int]] = {}


def origin_of(config: Any) -> Origin:
    """Of a base that was loaded just now, by its configuration."""
    source = str(config.name_or_path)
    revision = _commit(source)
    licence = _licence(file_of(source, revision, "README.md"))
    stamps = stamps_of(source)
    if not Path(source).exists():
        return Origin(source, source, True, revision, licence, stamps)
    if found := _IN_CACHE.search(Path(source).as_posix()):
        return Origin(source, f"{found[1]}/{found[2]}", True, found[3], licence, stamps)
    for name, package in fetch.PACKAGES.items():
        if package.model and package.commit and Path(source) == fetch.cache_folder() / name:
            return Origin(source, package.model, True, package.commit, licence, stamps)
    return Origin(source, Path(source).name, False, None, licence, stamps)


def stamps_of(source: str) -> dict[str, tuple[int, int, int]]:
    """Of a folder's files of weights, `Origin.stamps`; none of a name on the hub, whose cache calls
    files by what is in them.
    """
    found = {}
    for path in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else ():
        facts = path.stat()
        found[path.name] = (facts.st_size, facts.st_mtime_ns, facts.st_ino)
    return found


def _commit(source: str) -> str | None:
    """The commit that the hub's cache has of a name: loading it asks the hub for the newest."""
    if Path(source).exists():
        return None
    try:
        found = try_to_load_from_cache(source, "config.json")
    except ValueError:  # no name of the hub
        return None
    place = Path(found).parent.name if isinstance(found, str) else ""
    return place if re.fullmatch("[0-9a-f]{40}", place) else None


def file_of(source: str, revision: str | None, name: str) -> Path | None:
    """A file of a base: in its folder, or in the hub's cache. None where it is not here."""
    if Path(source).exists():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except ValueError:  # no name of the hub
        return None
    return Path(found).resolve() if isinstance(found, str) else None


def _licence(card: Path | None) -> str | None:
    """What a card's head says. It is the base's, and may hold anything."""
    if card is None or card.stat().st_size > _LONGEST_CARD:
        return None
    try:
        said = (metadata_load(card) or {}).get("license")
    except Exception:  # whatever a YAML parser may raise over a file of others
        return None
    return said if isinstance(said, str) and _LICENCE.fullmatch(said) else None
