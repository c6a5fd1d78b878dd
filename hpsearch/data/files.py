"""Local files of text, read a row at a time in bounded memory: formats, compression, delimiters. Text as written."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hpsearch.errors import DataError
from hpsearch.spec.files import format_of
from hpsearch.spec.sections import SplitOn
from hpsearch.spec.task import Row

END_OF_TEXT = "<|endoftext|>"
"""Parts the documents of a plain file, where it stands in one. Our tokenizers call the token so that ends a text."""
_CHUNK = 1 << 20
"""Characters read at once."""
_BEGINNING = 4096
"""Bytes that tell files apart."""
_SEPARATORS = {"blank_line": "\n\n", "line": "\n", "end_of_text": END_OF_TEXT}
_DELIMITERS = (",", ";", "\t", "|")


class Position:
    """How far a run of files has been read, in bytes of the files as they lie on disk."""

    def __init__(self) -> None:
        self._before = 0
        self._open: list[IO[bytes]] = []

    @contextmanager
    def of(self, name: str) -> Iterator[IO[bytes]]:
        """A file, open: it is being read."""
        with Path(name).open("rb") as raw:
            self._open.append(raw)
            try:
                yield raw
                self._before += raw.tell()
            finally:
                self._open.remove(raw)

    @property
    def bytes(self) -> int:
        return self._before + sum(raw.tell() for raw in self._open)


def rows_of(
    name: str, columns: tuple[str, ...], *, encoding: str | None, delimiter: str | None, position: Position
) -> Iterator[tuple[str, Row]]:
    """Rows of a file with columns, and the place of each ("line 3", "row 3"). Raises ValueError where it is malformed.

    `columns` only serve to tell which delimiter a CSV file has.
    """
    kind = format_of(name)
    if kind == "parquet":
        yield from _parquet_rows(name, columns, position)
        return
    begin = beginning(name, encoding)
    with opened(name, encoding, position) as text:
        if kind == "csv":
            yield from _csv_rows(text, delimiter or _delimiter(name, begin, columns))
        elif begin.lstrip().startswith("["):
            yield from _array_rows(text)
        else:
            yield from _json_rows(text)


def value_in(row: Row, column: str) -> Any:
    """What a row has in a column. `a.b` is b of the mapping a; a mapping `translation` is looked into unasked.

    Raises DataError.
    """
    if column in row:
        return row[column]
    found: Any = row
    for part in column.split("."):
        found = found.get(part, _ABSENT) if isinstance(found, dict) else _ABSENT
    if found is _ABSENT and isinstance(pair := row.get("translation"), dict):
        found = pair.get(column, _ABSENT)
    if found is _ABSENT:
        inner = [f"{name}.{key}" for name, value in row.items() if isinstance(value, dict) for key in value]
        raise DataError(f"has no column '{column}'; it has {', '.join(map(str, [*row, *inner]))}")
    return found


_ABSENT = object()


def texts_of(name: str, split_on: SplitOn, *, encoding: str | None, position: Position) -> Iterator[str]:
    """Documents of a plain text file, of which each ends where `split_on` says; empty ones are left out."""
    with opened(name, encoding, position) as file:
        if split_on == "file":
            yield file.read()
            return
        separator = _SEPARATORS[split_on]
        pieces: list[str] = []  # of a text whose end has not been read
        end = ""
        while chunk := file.read(_CHUNK):
            is_inside = separator not in end + chunk
            pieces.append(chunk)
            end = (end + chunk)[-len(separator) :]
            if is_inside:
                continue
            *whole, rest = "".join(pieces).split(separator)
            yield from filter(str.strip, whole)
            pieces = [rest]
        yield from filter(str.strip, ["".join(pieces)])


def guess_split(begin: str) -> SplitOn:
    """What seems to part the texts of a plain file that begins so: an end-of-text mark, blank lines, or lines."""
    if END_OF_TEXT in begin:
        return "end_of_text"
    return "blank_line" if "\n\n" in begin.strip() or "\n" not in begin.strip() else "line"


def lines_of(name: str, *, encoding: str | None, position: Position) -> Iterator[str]:
    """Lines without their ends. As in the tools that align corpora, only a line feed ends one, with a carriage return
    before it or not: other separators may stand in a sentence."""
    with opened(name, encoding, position, newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n").removesuffix("\r")


def marks_of(names: Sequence[str]) -> dict[str, str]:
    """What tells files from each other, wherever they lie and whatever they are called: hashes of how they begin.

    More text at its end changes nothing, if there were some pages already. Of files that begin alike (with a licence)
    all is hashed; those that are equal have the same mark. Compressed files are told by their compressed bytes, and a
    saved data set by its first file. Raises OSError.
    """
    found = {name: _hashed(name, _BEGINNING) for name in names}
    counts = Counter(found.values())
    return {name: mark if counts[mark] == 1 else _hashed(name, None) for name, mark in found.items()}


def _hashed(name: str, size: int | None) -> str:
    place = Path(name)
    if place.is_dir():
        place = min(place.rglob("*.arrow"), default=place / "state.json")
    with place.open("rb") as file:
        begin = file if size is None else io.BytesIO(file.read(size))
        return hashlib.file_digest(begin, "blake2b").hexdigest()[:32]


def beginning(name: str, encoding: str | None) -> str:
    """The first million characters of a file."""
    with opened(name, encoding, Position()) as file:
        return file.read(_CHUNK)


@contextmanager
def opened(name: str, encoding: str | None, position: Position, newline: str | None = None) -> Iterator[IO[str]]:
    """A file as text, uncompressed; UTF-8 unless told otherwise, with a byte order mark or without."""
    if format_of(name) == "csv":
        newline = ""
    with position.of(name) as raw:
        unpack = _UNPACK.get(Path(name).suffix.lower())
        binary: Any = unpack(raw) if unpack else raw
        codec = "utf-8-sig" if encoding in (None, "utf-8") else encoding
        yield io.TextIOWrapper(binary, encoding=codec, newline=newline)


def misplaced_byte(name: str) -> int | None:
    """Where the first byte of a file is that no UTF-8 text has there; None of a compressed one."""
    if Path(name).suffix.lower() in _UNPACK:
        return None
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with Path(name).open("rb") as file:
        while chunk := file.read(_CHUNK):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return before - pending + error.start
            before += len(chunk)
    return None


def _zstd(raw: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.input_stream(raw, compression="zstd")


_UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def _parquet_rows(name: str, columns: tuple[str, ...], position: Position) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as pq

    number = 0
    with position.of(name) as raw, pq.ParquetFile(raw) as file:
        tops = {name if name in file.schema_arrow.names else name.partition(".")[0] for name in columns}
        wanted = sorted(tops) if tops and tops <= {*file.schema_arrow.names} else None
        # Its threads could outlive a reader that stops early.
        for batch in file.iter_batches(batch_size=256, columns=wanted, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _csv_rows(lines: IO[str], delimiter: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(lines, strict=True, delimiter=delimiter)
    try:
        for number, row in enumerate(rows, start=1):
            if None in row:
                raise ValueError(f"line {rows.reader.line_num}: more fields than the first line names columns")
            yield f"row {number}", row
    except csv.Error as error:
        raise ValueError(f"line {rows.reader.line_num}: {error}") from None


def _delimiter(name: str, begin: str, columns: tuple[str, ...]) -> str:
    """The first delimiter under which the first line names the columns that are looked for, if any are."""
    usual = "\t" if ".tsv" in (suffix.lower() for suffix in Path(name).suffixes) else ","
    first = begin.splitlines()[:1]
    if not columns:
        return max((usual, *_DELIMITERS), key=lambda delimiter: sum(line.count(delimiter) for line in first))
    for delimiter in dict.fromkeys((usual, *_DELIMITERS)):
        if set(columns) <= set(next(csv.reader(first, delimiter=delimiter), ())):
            return delimiter
    return usual


def _json_rows(lines: IO[str]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from None
        yield f"line {number}", _object(row, f"line {number}")


def _array_rows(text: IO[str]) -> Iterator[tuple[str, Row]]:
    """Objects of a file that is one JSON array, an object at a time."""
    decoder = json.JSONDecoder()
    rest, place, number = text.read(_CHUNK), 0, 0
    place = rest.index("[") + 1
    while True:
        while rest[place : place + 1] in (*" \t\r\n,", ""):
            if place < len(rest):
                place += 1
            elif more := text.read(_CHUNK):
                rest, place = more, 0
            else:
                raise ValueError(f"the array has no end behind its entry {number}")
        if rest[place] == "]":
            while not rest[place + 1 :].strip():
                if not (rest := text.read(_CHUNK)):
                    return
                place = -1
            raise ValueError(f"something follows behind the end of the array: {rest[place + 1 :].strip()[:60]}")
        try:
            row, place = decoder.raw_decode(rest, place)
        except json.JSONDecodeError as error:
            could_go_on = error.msg.startswith("Unterminated") or error.pos >= len(rest) - len("false") - 1
            if could_go_on and (more := text.read(_CHUNK)):
                rest, place = rest[place:] + more, 0
                continue
            raise ValueError(f"entry {number + 1} of the array: {error.msg}") from None
        number += 1
        yield f"entry {number}", _object(row, f"entry {number} of the array")


def _object(row: Any, place: str) -> Row:
    if isinstance(row, dict):
        return row
    raise ValueError(f"{place}: expected an object, got {json.dumps(row)[:60]}")
