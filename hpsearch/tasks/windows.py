"""What a language model reads at once of a stream: windows that run over the ends of documents, or keep them apart."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hpsearch.tasks.base import Indices


@dataclass(frozen=True)
class Layout:
    """What stands in some windows; arrays of shape (windows, length)."""

    places: NDArray[np.int64]
    """Places in the stream of the tokens that are read, each of which predicts the next; -1 where none is."""
    positions: NDArray[np.int64] | None
    """What the model takes for a token's position: from 0 on in each document. None: as they stand in the window."""


class Windows(Protocol):
    """Windows of one split. In training they are others in each epoch, but equally many."""

    count: int

    def of_epoch(self, order: np.random.Generator) -> Indices:
        """Windows of the next epoch at random, by indices that `layout` knows until the epoch after it."""

    def in_order(self) -> Indices:
        """Windows in which every token of the split is predicted once."""

    def layout(self, indices: Indices) -> Layout: ...

    def predicted(self, indices: Indices) -> int:
        """How many tokens these windows predict."""


class ContinuousWindows:
    """Windows that run over the ends of documents and do not overlap; indices are the places where they begin.

    In training they begin at another random place in every epoch, and the last one runs over the stream's end into its
    beginning; what fills no window is left out. In evaluation the last, partial window is padded.
    """

    def __init__(self, ends: NDArray[np.int64], length: int, *, is_training: bool) -> None:
        """`ends` are those of the documents in the stream, as `TokenSplit.document_ends`."""
        self._length, self._is_training = length, is_training
        self._predicted = int(ends[-1])
        self.count = max(1, self._predicted // length) if is_training else math.ceil(self._predicted / length)

    def of_epoch(self, order: np.random.Generator) -> Indices:
        starts: Indices = order.integers(self._predicted) + self._length * order.permutation(self.count)
        return starts % self._predicted

    def in_order(self) -> Indices:
        return self._length * np.arange(self.count)

    def layout(self, indices: Indices) -> Layout:
        places = indices[:, None] + np.arange(self._length)
        if self._is_training:
            places %= self._predicted
            places[:, self._predicted :] = -1  # the stream is shorter than a window
        else:
            places[places >= self._predicted] = -1
        return Layout(places, None)

    def predicted(self, indices: Indices) -> int:
        left = np.full_like(indices, self._predicted) if self._is_training else self._predicted - indices
        return int(np.minimum(left, self._length).sum())


class _Packed:
    """Windows that hold pieces of a stream, each read by itself. In training, pieces meet others in each epoch."""

    _starts: NDArray[np.int64]
    _lengths: NDArray[np.int64]
    """Of the pieces, window by window."""
    _bounds: NDArray[np.int64]
    """Where each window begins among the pieces, and where the last one ends."""

    def __init__(self, length: int) -> None:
        self._length = length

    @property
    def windows(self) -> int:
        return len(self._bounds) - 1

    def in_order(self) -> Indices:
        return np.arange(self.windows)

    def layout(self, indices: Indices) -> Layout:
        shape = len(indices), self._length
        places, positions = np.full(shape, -1), np.zeros(shape, np.int64)
        for row, index in enumerate(indices):
            own = slice(*self._bounds[index : index + 2])
            lengths = self._lengths[own]
            filled = int(lengths.sum())
            within = np.arange(filled) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            positions[row, :filled] = within
            places[row, :filled] = np.repeat(self._starts[own], lengths) + within
            positions[row, filled:] = np.arange(self._length - filled)
        return Layout(places, positions)

    def predicted(self, indices: Indices) -> int:
        return sum(int(self._lengths[slice(*self._bounds[index : index + 2])].sum()) for index in indices)

    def _pack(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        window = best_fit(lengths, self._length)
        order = np.argsort(window, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self._bounds = np.searchsorted(window[order], np.arange(window.max() + 2))


class PackedExamples(_Packed):
    """Windows that hold whole examples, none of which is longer than a window. See `PackedWindows`."""

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], length: int) -> None:
        """`starts` are places in the stream, `lengths` the numbers of tokens that are read from there."""
        super().__init__(length)
        self._own = starts, lengths
        self._pack(starts, lengths)
        self.count = self.windows  # it hangs on the lengths alone, so that it is that of each epoch

    def of_epoch(self, order: np.random.Generator) -> Indices:
        at_random = order.permutation(len(self._own[0]))
        self._pack(self._own[0][at_random], self._own[1][at_random])
        return order.permutation(self.count)


class PackedWindows(_Packed):
    """Windows that hold whole documents, and pieces of those that are longer than a window, each read by itself.

    Each goes, the longest first, into the fullest window that has room for it: best-fit packing (Ding et al., "Fewer
    Truncations Improve Language Modeling", arXiv 2404.10830). In training, documents of a length meet others in each
    epoch, and those that are longer than a window are cut at other places.
    """

    def __init__(self, ends: NDArray[np.int64], length: int, *, is_training: bool, skipped: int = 0) -> None:
        """`ends` are those of the documents in the stream, as `TokenSplit.document_ends`; of each, the first `skipped`
        tokens are read and never predicted.
        """
        super().__init__(length)
        self._ends, self._skipped = ends, skipped
        if is_training:
            self._pack_at_random(np.random.default_rng(0))
        else:
            self._pack(*pieces(ends, length, skipped=skipped))
        self.count = self.windows

    def of_epoch(self, order: np.random.Generator) -> Indices:
        self._pack_at_random(order)
        found = order.permutation(self.windows)
        # The schedule counts on as many in each epoch; by where documents are cut there are a few more or less.
        filled = np.add.reduceat(self._lengths, self._bounds[:-1])[found]
        dropped = np.argsort(filled, kind="stable")[: max(0, len(found) - self.count)]
        repeated = np.resize(order.permutation(found), max(0, self.count - len(found)))
        return np.concatenate([np.delete(found, dropped), repeated])

    def _pack_at_random(self, order: np.random.Generator) -> None:
        first = order.integers(1, self._length, size=len(self._ends), endpoint=True)
        starts, lengths = pieces(self._ends, self._length, first, skipped=self._skipped)
        at_random = order.permutation(len(starts))
        self._pack(starts[at_random], lengths[at_random])


def pieces(
    ends: NDArray[np.int64], longest: int, first: NDArray[np.int64] | None = None, *, skipped: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the pieces of documents begin, and their lengths: whole documents, of longer ones `longest` tokens each.

    The first piece of document d, if it is cut, has `first[d]` tokens. `skipped` tokens of each document belong to no
    piece, as nothing is to predict them.
    """
    sizes = np.diff(ends, prepend=0) - skipped
    is_cut = sizes > longest
    begins = np.where(is_cut, longest if first is None else first, sizes)
    counts = 1 + -(-(sizes - begins) // longest)
    owner = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    inside = np.where(number == 0, 0, begins[owner] + (number - 1) * longest)
    lengths = np.minimum(np.where(number == 0, begins[owner], longest), sizes[owner] - inside)
    return ((ends - sizes)[owner] + inside)[lengths > 0], lengths[lengths > 0]


def best_fit(lengths: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """The number of the window that each piece goes to: the longest first, each to the fullest that has room for it.

    Pieces of one length are placed together, so that the time is that of sorting them.
    """
    windows = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # ascending; of windows that are not full
    having: dict[int, NDArray[np.int64]] = {}
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        length = int(lengths[group[0]])
        left: dict[int, list[NDArray[np.int64]]] = {}
        while len(group):
            place = bisect.bisect_left(rooms, length)
            space = rooms[place] if place < len(rooms) else room
            each = space // length
            needed = -(-len(group) // each)
            if place < len(rooms):
                there = having[space]
            else:
                there = np.arange(opened, opened + needed)
                opened += needed
            used, unused = there[:needed], there[needed:]
            placed, group = group[: each * len(used)], group[each * len(used) :]
            windows[placed] = np.repeat(used, each)[: len(placed)]
            in_last = len(placed) - each * (len(used) - 1)
            left.setdefault(space - each * length, []).append(used[:-1])
            left.setdefault(space - in_last * length, []).append(used[-1:])
            if place < len(rooms) and len(unused):
                having[space] = unused
            elif place < len(rooms):
                del having[space], rooms[place]
        for space, found in left.items():
            ids = np.concatenate(found)
            if not space or not len(ids):
                continue
            if space in having:
                having[space] = np.concatenate([having[space], ids])
            else:
                bisect.insort(rooms, space)
                having[space] = ids
    return windows
