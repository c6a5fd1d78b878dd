"""Prepared data as it lies on disk: token arrays, labels, texts, and the card that says what they hold."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation", "test")
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
    seen_targets: float | None
    """Of a translation study; see `Examples.seen_targets`."""
    labels: list[str]
    """Of a classification study, in the order of their numbers."""
    label_counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """By split, the examples that have each label."""
    overlaps: dict[str, int] = dataclasses.field(default_factory=dict)
    """See `Examples.overlaps`."""
    rare: dict[str, int] = dataclasses.field(default_factory=dict)
    """See `Examples.rare`."""
    bleu_tokenizer: str | None = None
    """Of a translation study: what BLEU takes for words if nothing else is set."""
    longest_reference: int | None = None
    """In such words, of the test split."""
    first_id: int | None = None
    """The token of the target language that each translation begins with, of a multilingual model."""
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
        document_ends=np.load(folder / f"{split}-{field}-ends.npy"),
        document_bytes=np.load(folder / f"{split}-{field}-bytes.npy"),
    )


def load_texts(folder: Path, split: str, field: str) -> list[str]:
    """The text itself of a field of a held-out split of a translation study."""
    texts: list[str] = json.loads((folder / f"{split}-{field}.json").read_text())
    return texts


def load_labels(folder: Path, split: str) -> NDArray[np.int64]:
    """Labels of shape (examples, labels), 1 where an example has a label."""
    labels: NDArray[np.int64] = np.load(folder / f"{split}-labels.npy")
    return labels
