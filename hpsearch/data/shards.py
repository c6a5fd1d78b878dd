"""Prepared data as it lies on disk: token arrays, labels, texts, and the card that says what they hold."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")
NOWHERE = len(SPLITS)
"""Of an example that is not used; else the number of its split in SPLITS."""
CARD = "card.json"
"""Written last: data that has it is whole."""
FORMAT = 4
"""Of the files on disk; part of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What the token arrays hold; kept beside them and recorded with the study."""

    fingerprint: str
    """Of texts, split and tokenizer: equal fingerprints mean equal arrays."""
    tokenizer: str
    """Hash of the tokenizer: perplexities per token compare only when it is the same."""
    test_fingerprint: str
    """Of the test split's text alone: scores compare when it is the same, whatever the tokenizer and training data."""
    vocab_size: int
    end_id: int
    """The token that ends a text."""
    padding_id: int
    target_vocab_size: int | None
    """Of a translation study whose target has a vocabulary of its own."""
    documents: dict[str, int]
    tokens: dict[str, int]
    """Predicted tokens of one pass (read tokens, in classification), end-of-text included."""
    bytes: dict[str, int]
    duplicates: int
    seen_ngrams: float
    """Share of the validation split's word 5-grams that stand in training, too: a measure of leakage."""
    seen_targets: float | None
    """Of a translation study, the share of the held-out translations that stand in training word for word."""
    labels: list[str]
    """Of a classification study, in the order of their numbers."""
    label_counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """By split, the examples that have each label."""
    overlaps: dict[str, int] = dataclasses.field(default_factory=dict)
    """See `Examples.overlaps`."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """See `Examples.left_out`."""
    whole_files: int = 0
    """Files of training whose texts stay in one split without having been told to."""
    rare: dict[str, int] = dataclasses.field(default_factory=dict)
    """See `Examples.rare`."""
    bleu_tokenizer: str | None = None
    """Of a translation study: what BLEU takes for words if nothing else is set."""
    longest_reference: int | None = None
    """In such words, of the test split."""
    used: dict[str, float] = dataclasses.field(default_factory=dict)
    """See `Examples.used`."""
    empty: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows left out because they have no text in some column, by the file that they are in."""
    unusable: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows left out because they hold no example, by file and reason."""
    chat_template: str | None = None
    """Hash of what conversations are rendered by."""
    split_on: dict[str, str] = dataclasses.field(default_factory=dict)
    """What was guessed to part the texts of a plain text file, by file."""
    ngrams_of: float = 1.0
    """The part of the training text that `seen_ngrams` looked at."""
    read: float = 1.0
    """The part of the source that was read; less than 1 in an estimate, whose counts are of the whole."""
    first_id: int | None = None
    """The token of the target language that each translation begins with, of a multilingual model."""
    begin_id: int | None = None
    """The token that a pretrained language model expects before every text: it is read, and never predicted."""
    start_id: int | None = None
    """The token of the target language that decoding starts from, in place of the model's own start."""


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """One split as a stream of tokens, mapped from disk.

    `tokens` starts with end-of-text, then come the documents as the tokenizer marks them for the task: a language
    model's and a translation's end with end-of-text, so that every token of every document is predicted once.
    `document_ends[d]` counts the tokens up to the end of document d, the very first one left out.
    """

    tokens: NDArray[np.integer[Any]]
    document_ends: NDArray[np.int64]
    document_bytes: NDArray[np.int64]

    def document(self, index: int) -> NDArray[np.integer[Any]]:
        """The tokens of one document, marks included."""
        start = int(self.document_ends[index - 1]) if index else 0
        return self.tokens[1 + start : 1 + int(self.document_ends[index])]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, marks included."""
        return np.diff(self.document_ends, prepend=0)


def read_card(folder: Path) -> DataCard:
    return DataCard(**json.loads((folder / CARD).read_text()))


def load_split(folder: Path, split: str, field: str = "text") -> TokenSplit:
    """One text field of one split of prepared data; the tokens stay on disk until they are touched."""
    return TokenSplit(
        tokens=np.load(folder / f"{split}-{field}.npy", mmap_mode="r"),
        document_ends=np.load(folder / f"{split}-{field}-ends.npy", mmap_mode="r"),
        document_bytes=np.load(folder / f"{split}-{field}-bytes.npy", mmap_mode="r"),
    )


def load_parts(folder: Path, split: str, field: str = "text") -> NDArray[np.uint8]:
    """Of each token of the documents of a split, the part that it is of its example; see `TokenSequence.parts`."""
    parts: NDArray[np.uint8] = np.load(folder / f"{split}-{field}-parts.npy", mmap_mode="r")
    return parts


def load_texts(folder: Path, split: str, field: str) -> list[str]:
    """The text itself of a field of a held-out split of a translation study."""
    texts: list[str] = json.loads((folder / f"{split}-{field}.json").read_text())
    return texts


def load_labels(folder: Path, split: str) -> NDArray[np.uint8]:
    """Labels of shape (examples, labels), 1 where an example has a label; they stay on disk until they are touched."""
    labels: NDArray[np.uint8] = np.load(folder / f"{split}-labels.npy", mmap_mode="r")
    return labels


class ArrayWriter:
    """Writes an array to a .npy file a piece at a time: it is one when it is closed, and can be continued before.

    `at` is how many rows of an earlier writer's are kept.
    """

    def __init__(self, file: Path, dtype: Any, shape: tuple[int, ...] = (), at: int = 0) -> None:
        self._dtype, self._shape = np.dtype(dtype), shape
        self.rows = at
        header = self._header()
        self._file = file.open("r+b" if at else "wb")
        if not at:
            self._file.write(header)
        self._file.truncate(len(header) + at * self._row_bytes)
        self._file.seek(0, os.SEEK_END)

    def append(self, rows: NDArray[Any]) -> None:
        rows.astype(self._dtype, copy=False).tofile(self._file)
        self.rows += len(rows)

    def flush(self) -> None:
        """What is written is safe from the end of this process."""
        self._file.flush()

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()

    @property
    def _row_bytes(self) -> int:
        return int(self._dtype.itemsize) * math.prod(self._shape)

    def _header(self) -> bytes:
        """Of as many rows as there are; it is equally long for any number, as numpy leaves room for it to grow."""
        buffer = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(buffer, {**described, "shape": (self.rows, *self._shape)})
        return buffer.getvalue()
