"""Which texts name a file of rows: by how they begin and end. Nothing here reads one."""

from pathlib import Path

EXTENSIONS = (".csv", ".tsv", ".tab", ".json", ".jsonl", ".parquet")


def extension_of(path: Path) -> str:
    """`.csv` of `a.CSV.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def is_path(source: str) -> bool:
    """Whether a text can only be a file's name, there or not."""
    return source.startswith((".", "/", "~")) or extension_of(Path(source)) in EXTENSIONS
