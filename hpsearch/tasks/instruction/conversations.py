"""Prepared conversations, and which of them fit into a context. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.shards import TokenSplit, load_parts, load_split
from hpsearch.tasks.instruction.chat import ANSWER


class Conversations:
    """The conversations of a split that fit into a context, as places in its stream of tokens."""

    def __init__(self, data: Path, split: str, length: int) -> None:
        found: TokenSplit = load_split(data, split)
        self.tokens, self._parts = found.tokens, load_parts(data, split)
        ends, sizes = np.asarray(found.document_ends), found.lengths
        said = np.flatnonzero(np.asarray(self._parts) == ANSWER)
        answers = said[np.searchsorted(said, ends - sizes)] - (ends - sizes)
        lengths = np.minimum(sizes - 1, length)
        # The first token of the answer is predicted by the one before it.
        fits = (answers > 0) & (sizes - answers <= lengths)
        self.left_out = int((~fits).sum())
        self.kept = np.flatnonzero(fits)
        """Numbers of the conversations that fit among those of the split."""
        self.starts, self.lengths = (ends - lengths)[fits], lengths[fits]
        self.prompt_lengths = lengths[fits] - (sizes - answers)[fits] + 1
        self.answer_lengths = (sizes - answers)[fits]
        self.cut = int((sizes - 1 > length)[fits].sum())

    def places(self) -> Iterator[NDArray[np.int64]]:
        """Where each conversation is read."""
        for start, length in zip(self.starts, self.lengths, strict=True):
            yield np.arange(start, start + length)

    def parts(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """What part of its conversation the token is that is predicted at each place."""
        parts: NDArray[np.uint8] = self._parts[places]
        return parts

    def prompt(self, index: int) -> NDArray[np.int64]:
        start = int(self.starts[index])
        tokens: NDArray[np.int64] = self.tokens[start : start + int(self.prompt_lengths[index])].astype(np.int64)
        return tokens

    def answer(self, index: int) -> NDArray[np.int64]:
        start, end = (int(self.starts[index] + lengths[index]) for lengths in (self.prompt_lengths, self.lengths))
        tokens: NDArray[np.int64] = self.tokens[start : end + 1].astype(np.int64)
        return tokens
