"""What a name under `data.files` stands for, and what format a file has."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Literal

Format = Literal["text", "json", "csv", "parquet"]
_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def format_of(name: str | Path) -> Format | None:
    """By the last suffix but one of compression; None when it says nothing. Parquet files compress themselves."""
    file = Path(name)
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        found = _FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if found == "parquet" else found
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has written this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def expanded(name: str) -> list[str]:
    """The files that a name stands for, in order: itself, what a pattern fits, or what is below a folder.

    A folder that `save_to_disk` has written counts as a file.
    """
    place = Path(name)
    if place.is_dir() and not is_saved_dataset(place):
        found = (file for file in place.rglob("*") if format_of(file) and file.is_file())
        return sorted(str(file) for file in found if not any(part[0] == "." for part in file.relative_to(place).parts))
    if place.exists() or not glob.has_magic(name):
        return [name]
    return sorted(found for found in glob.glob(name, recursive=True) if Path(found).is_file())


_SPLIT_NAMES = {"train": "train|training", "validation": "validation|valid|val|dev|eval", "test": "test|testing"}


def split_by_name(files: list[str]) -> dict[str, list[str]]:
    """Files of a folder by the split that their names begin with (train-00000-of-00002.parquet, test.jsonl).

    All are of the training split unless each belongs to one, and some to it.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        split = next((s for s, names in _SPLIT_NAMES.items() if re.match(rf"({names})\b", Path(file).name.lower())), "")
        found.setdefault(split, []).append(file)
    return found if "train" in found and "" not in found else {"train": files}
