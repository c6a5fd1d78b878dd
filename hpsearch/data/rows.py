"""Examples on disk while data is prepared: their text, and columns of hashes that tell what becomes of each.

Text lies in Arrow files, which are read a batch at a time; columns are plain arrays, which are read a piece at a time
and compared a partition at a time. So memory does not grow with the text: what stays of an example is one byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.corpora import Example, fold
from hpsearch.errors import DataError
from hpsearch.spec.study import StudySpec

if TYPE_CHECKING:
    import pyarrow as pa

    from hpsearch.data.sources import Reading

BATCH_BYTES = 1 << 20
"""Text of a batch on disk, and of one that is given out: at least, but for the last."""
_PIECE = 1 << 18
"""Rows of a column that are read at once."""
_PARTITION_ROWS = 1 << 20
"""Rows that are compared at once: hashes fall into partitions of about so many."""
_DTYPES = {
    "example": np.dtype("(2,)u8"),
    "text": np.dtype("(2,)u8"),
    "target": np.dtype("(2,)u8"),
    "group": np.dtype("(2,)u8"),
    "key": np.dtype("(2,)u8"),
    "position": np.dtype(">u8"),
    "fraction": np.dtype(">u8"),
    "sample": np.dtype(">u8"),
    "label": np.dtype("i4"),
    "source": np.dtype("u1"),
    "size": np.dtype("<u4"),
}
"""Columns: hashes of 128 bits, places in [0, 1) as 64 bits, numbers of labels as they are written, numbers of sources,
bytes of an example's texts."""


def digest(text: str, size: int = 16) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def place(folded: str, salt: str) -> bytes:
    """Eight bytes that depend on the text alone: the same document always falls on the same side."""
    return digest(f"{salt}\0{folded}", 8)


def as_fraction(places: NDArray[Any]) -> NDArray[np.float64]:
    """Places as numbers in [0, 1)."""
    return places.astype(np.float64) / 2.0**64


class Labels:
    """Labels as they are written, numbered in the order in which they are met."""

    def __init__(self, written: Iterable[str] = ()) -> None:
        self._numbers = {text: number for number, text in enumerate(written)}

    def number(self, written: str) -> int:
        return self._numbers.setdefault(written, len(self._numbers))

    @property
    def written(self) -> list[str]:
        return list(self._numbers)


class RowWriter:
    """Writes the examples of a given split: text and columns. The split has no rows before it is closed."""

    def __init__(
        self,
        folder: Path,
        split: str,
        spec: StudySpec,
        labels: Labels,
        columns: Sequence[str],
        reading: Reading,
    ) -> None:
        """`reading` says where an example that is added comes from."""
        import pyarrow as pa

        self._task, self._labels, self._reading = spec.definition, labels, reading
        names = [*self._task.fields, *(["label"] if self._task.has_labels else [])]
        schema = pa.schema([(name, pa.large_string()) for name in names])
        self._texts = pa.OSFile(str(_text_file(folder, split)), "wb")
        self._writer = pa.ipc.new_file(self._texts, schema)
        self._schema = schema
        self._buffers = {name: bytearray() for name in columns}
        self._files = {name: _column_file(folder, split, name).open("wb") for name in columns}
        self._pending: list[Example] = []
        self._size = 0
        self.bytes = 0

    def add(self, example: Example) -> None:
        folded = [fold(text) for text in example]
        for name, buffer in self._buffers.items():
            buffer += self._entry(name, example, folded)
        self._pending.append(example)
        size = sum(map(len, example))
        self._size += size
        self.bytes += size
        if self._size >= BATCH_BYTES:
            self._flush()

    def _entry(self, name: str, example: Example, folded: list[str]) -> bytes:
        match name:
            case "example":
                return digest("\0".join(folded))
            case "text":
                return digest(folded[0])
            case "target":
                return digest(example[-1])
            case "position":
                return place(self._group(example, folded), "split")
            case "fraction":
                return place(self._key(example, folded), "fraction")
            case "key":
                return digest(self._key(example, folded))
            case "group":
                return digest(self._group(example, folded))
            case "sample":
                return place(folded[0], "sample")
            case "source":
                return bytes([self._reading.source])
            case "size":
                return sum(len(text.encode()) for text in example).to_bytes(4, "little")
            case _:
                return self._labels.number(example[-1]).to_bytes(4, "little")

    def _key(self, example: Example, folded: list[str]) -> str:
        """What examples have in common that are not to be in two splits. Stratified splits tell texts apart as they
        are."""
        return folded[0] if self._task.has_labels else fold(self._task.split_key(example[0]))

    def _group(self, example: Example, folded: list[str]) -> str:
        """What is split as a whole: what an example is a piece of, else what it has in common with others."""
        group = self._reading.group
        # Two sources of a mix may each have a document 1.
        return self._key(example, folded) if group is None else f"group\0{self._reading.source}\0{group}"

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            fields = zip(*self._pending, strict=True)
            arrays = [pa.array(texts, pa.large_string()) for texts in fields]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        for name, buffer in self._buffers.items():
            self._files[name].write(buffer)
            buffer.clear()
        self._pending.clear()
        self._size = 0

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._texts.close()
        for file in self._files.values():
            file.close()


def write_rows(
    folder: Path,
    split: str,
    spec: StudySpec,
    examples: Iterable[Example],
    labels: Labels,
    columns: Sequence[str],
    reading: Reading,
) -> Generator[int]:
    """Write a given split; yields how much text is written, now and then. Raises DataError for what is no text."""
    writer = RowWriter(folder, split, spec, labels, columns, reading)
    before = 0
    try:
        for number, example in enumerate(examples, start=1):
            try:
                writer.add(example)
            except UnicodeEncodeError as error:
                raise DataError(
                    f"data: example {number} of the {split} split holds {error.object[error.start]!r}, half a character"
                ) from None
            if writer.bytes - before >= BATCH_BYTES:
                yield writer.bytes - before
                before = writer.bytes
    finally:
        writer.close()


class Column:
    """A column of a given split, or of some of its rows."""

    def __init__(self, folder: Path, split: str, name: str, of: NDArray[np.bool_] | None = None) -> None:
        self._file, self._dtype, self._of = _column_file(folder, split, name), _DTYPES[name], of

    def __len__(self) -> int:
        """Of the split."""
        return self._file.stat().st_size // self._dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """The number of the first row of each piece, and the piece."""
        with self._file.open("rb") as file:
            start = 0
            while len(piece := np.fromfile(file, self._dtype, _PIECE)):
                yield start, piece
                start += len(piece)

    def all(self) -> NDArray[Any]:
        values = np.fromfile(self._file, self._dtype)
        return values if self._of is None else values[self._of]

    def partition(self, part: int, parts: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Rows whose hash falls into a partition, and their hashes."""
        rows, hashes = [], []
        for start, piece in self.pieces():
            chosen = piece[:, 0] % np.uint64(parts) == part
            if self._of is not None:
                chosen &= self._of[start : start + len(piece)]
            rows.append(start + np.flatnonzero(chosen))
            hashes.append(piece[chosen])
        if not rows:
            return np.zeros(0, np.int64), np.zeros((0, 2), np.uint64)
        return np.concatenate(rows), np.concatenate(hashes)


def repeated(keys: Column) -> NDArray[np.bool_]:
    """Which rows have a hash that an earlier one has."""
    found = np.zeros(len(keys), bool)
    parts = 1 + len(keys) // _PARTITION_ROWS
    for part in range(parts):
        rows, hashes = keys.partition(part, parts)
        order, is_first = _grouped(hashes)
        found[rows[order[~is_first]]] = True
    return found


def among(keys: Column, others: Sequence[Column]) -> NDArray[np.bool_]:
    """Which rows have a hash that is in one of the other columns."""
    found = np.zeros(len(keys), bool)
    parts = 1 + (len(keys) + sum(map(len, others))) // _PARTITION_ROWS
    for part in range(parts):
        rows, hashes = keys.partition(part, parts)
        there = [other.partition(part, parts)[1] for other in others]
        found[rows] = is_among(hashes, np.concatenate([*there, np.zeros((0, 2), np.uint64)]))
    return found


def is_among(hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    order, is_first = _grouped(np.concatenate([others, hashes]))
    if not len(order):
        return np.zeros(0, bool)
    has_other = np.logical_or.reduceat(order < len(others), np.flatnonzero(is_first))
    found = np.zeros(len(order), bool)
    found[order] = has_other[np.cumsum(is_first) - 1]
    return found[len(others) :]


def groups(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A number for each row; equal hashes have the same one."""
    order, is_first = _grouped(hashes)
    found = np.zeros(len(order), np.int64)
    found[order] = np.cumsum(is_first) - 1
    return found


def _grouped(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows sorted by hash, equal ones in their order, and which of them begins a group."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, is_first


def batches(folder: Path, split: str, chosen: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """The chosen rows of a given split in their order, of about BATCH_BYTES each."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    size = start = 0
    with pa.OSFile(str(_text_file(folder, split))) as source, pa.ipc.open_file(source) as file:
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            rows = chosen[start : start + batch.num_rows]
            start += batch.num_rows
            if not rows.any():
                continue
            held.append(batch if rows.all() else batch.filter(pa.array(rows)))
            size += held[-1].nbytes
            if size >= BATCH_BYTES:
                yield pa.Table.from_batches(held)
                held, size = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _text_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.arrow"


def _column_file(folder: Path, split: str, column: str) -> Path:
    return folder / f"{split}-{column}.bin"
