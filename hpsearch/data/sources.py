"""Examples as a study names them: local files, built-in corpora, data sets of the hub. Text is read as written."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpsearch.data.corpora import Example
from hpsearch.data.shards import SPLITS
from hpsearch.errors import DataError
from hpsearch.spec.sections import AlignedFiles, DataSpec
from hpsearch.spec.task import LABEL_SEPARATOR

_LOADERS = {".txt": "text", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_files(files: Iterable[str] | AlignedFiles, columns: tuple[str, ...], *, has_labels: bool) -> Iterator[Example]:
    """Examples of local files; with labels, the last column holds them."""
    import datasets

    if isinstance(files, AlignedFiles):
        yield from _aligned(files)
        return
    for name in files:
        kind = _LOADERS[Path(name).suffix]
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        rows: Iterable[dict[str, Any]]
        try:
            if kind in _AS_WRITTEN:
                rows = _AS_WRITTEN[kind](name)
            else:
                # To `datasets` a name is a pattern.
                rows = datasets.load_dataset(
                    kind, data_files=[glob.escape(name)], split="train", streaming=True, **options
                )
            yield from _rows(rows, ("text",) if kind == "text" else columns, name, has_labels=has_labels)
        except DataError:
            raise
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error) from error
        except Exception as error:  # pyarrow, pandas and datasets each raise their own; all mean a malformed file
            raise DataError(f"data: {name} cannot be read as {kind}: {first_line(error)}") from error


def _csv_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of text as it is written: `datasets` lets pandas guess types by the chunk, and drop `NA`."""
    csv.field_size_limit(sys.maxsize)
    with open(name, encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            for row in rows:
                if None in row:
                    raise ValueError(f"line {rows.reader.line_num}: more fields than the first line names columns")
                yield row
        except csv.Error as error:
            raise ValueError(f"line {rows.reader.line_num}: {error}") from None


def _json_rows(name: str) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines: `datasets` has pyarrow guess types, and takes text for dates."""
    with open(name, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected an object, got {line.strip()[:60]}")  # noqa: TRY004
            yield row


_AS_WRITTEN = {"csv": _csv_rows, "json": _json_rows}


def _aligned(files: AlignedFiles) -> Iterator[Example]:
    sources, targets = _lines(files.source), _lines(files.target)
    if len(sources) != len(targets):
        raise DataError(
            f"data: {files.source} has {len(sources)} lines and {files.target} has {len(targets)}; line by line, one "
            "must be the translation of the other"
        )
    yield from zip(sources, targets, strict=True)


def _lines(name: str) -> list[str]:
    try:
        # Only a line feed ends a line, as in the tools that align corpora; other separators may stand in a sentence.
        return Path(name).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error) from error


def _not_utf8(name: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"data: {name} is not UTF-8 text (byte {error.start})")


def read_hub(spec: DataSpec, columns: tuple[str, ...], *, has_labels: bool) -> dict[str, Iterator[Example]]:
    import datasets

    try:
        loaded = datasets.load_dataset(spec.hub, spec.config, revision=spec.revision)
    except Exception as error:  # hub, network, cache and script errors all mean: not to be had
        raise DataError(f"data: cannot load {spec.hub} from the hub: {first_line(error)}") from error
    if "train" not in loaded:
        raise DataError(f"data: {spec.hub} has no train split; it has {', '.join(loaded)}")
    return {
        split: _rows(_named(loaded[split]), columns, f"{spec.hub} ({split})", has_labels=has_labels)
        for split in SPLITS
        if split in loaded
    }


def _named(rows: Any) -> Iterable[dict[str, Any]]:
    """Rows in which numbered classes read as their names, and `translation` mappings as columns."""
    classes = {name: feature for name, feature in rows.features.items() if hasattr(feature, "int2str")}
    for row in rows:
        named = {name: classes[name].int2str(value) if name in classes else value for name, value in row.items()}
        pair = named.get("translation")
        yield {**named, **pair} if isinstance(pair, dict) else named


def _rows(
    rows: Iterable[dict[str, Any]], columns: tuple[str, ...], source: str, *, has_labels: bool
) -> Iterator[Example]:
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise DataError(f"data: {source} has no column '{column}'; it has {', '.join(map(str, row))}")
        yield tuple(
            as_text(
                row[column],
                f"{source}, row {number}: column '{column}'",
                is_label=has_labels and index == len(columns) - 1,
            )
            for index, column in enumerate(columns)
        )


def as_text(value: Any, place: str, *, is_label: bool) -> str:
    """Text as it is, nothing as empty, a label of another type as text, a list of labels joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if is_label and isinstance(value, int | bool):
        return json.dumps(value)
    if is_label and isinstance(value, list):
        return LABEL_SEPARATOR.join(entry if isinstance(entry, str) else json.dumps(entry) for entry in value)
    raise DataError(f"data: {place} holds {type(value).__name__}, not text")


def first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
