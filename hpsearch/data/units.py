"""Where training rows go that are not split one by one: classes that are to stand in every split, documents that stay
whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpsearch.data import rows
from hpsearch.data.rows import Column, Labels
from hpsearch.data.shards import NOWHERE, SPLITS
from hpsearch.spec.study import StudySpec


class LabelSets:
    """The labels that stand behind labels as they are written."""

    def __init__(self, labels: Labels, spec: StudySpec) -> None:
        sets = [sorted({*spec.definition.labels(written, spec.options)}) for written in labels.written]
        self.names = sorted({name for names in sets for name in names})
        numbers = {name: number for number, name in enumerate(self.names)}
        self._sizes = np.array([len(names) for names in sets], np.int64)
        self._members = np.array([numbers[name] for names in sets for name in names], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def of(self, written: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows and the labels that they have, as pairs."""
        sizes = self._sizes[written]
        owners = np.repeat(np.arange(len(written)), sizes)
        within = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return owners, self._members[self._starts[written][owners] + within]

    def pairs(
        self, text_of: NDArray[np.int64], written: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The texts and the labels that some row of them has, as distinct pairs ordered by text."""
        owners, members = self.of(written)
        found = np.unique(text_of[owners] * len(self.names) + members)
        return found // len(self.names), found % len(self.names)

    def by_rarity(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rank of each label: the fewer of these there are, the lower; of equally many, by name."""
        counts = np.bincount(labels, minlength=len(self.names))
        ranks = np.empty(len(self.names), np.int64)
        ranks[np.argsort(counts, kind="stable")] = np.arange(len(self.names))
        return ranks


def stratified(
    folder: Path, of: NDArray[np.bool_], cut: dict[str, float], labels: Labels, spec: StudySpec
) -> NDArray[np.uint8]:
    """Where each row goes, such that every class stands in all splits if it has enough texts, else in training.

    Within a class, texts are ordered by their hash; validation takes the first and test the last, so that a further
    text moves one over each border at most. A text with several labels belongs to the rarest of them.
    """
    train, validation, test = map(SPLITS.index, ("train", "validation", "test"))
    text_of = rows.groups(Column(folder, "train", "text", of).all())
    _, first_row = np.unique(text_of, return_index=True)
    positions = Column(folder, "train", "position", of).all().astype(np.uint64)[first_row]
    sets = LabelSets(labels, spec)
    texts, own = sets.pairs(text_of, Column(folder, "train", "label", of).all())
    rarest = np.full(len(first_row), len(sets.names))
    np.minimum.at(rarest, texts, sets.by_rarity(own)[own])
    place = np.full(len(first_row), NOWHERE, np.uint8)
    fraction = None
    if spec.data.fraction < 1:
        fraction = Column(folder, "train", "fraction", of).all().astype(np.uint64)[first_row]
    order = np.lexsort((positions, rarest))
    for members in np.split(order, np.flatnonzero(np.diff(rarest[order])) + 1):
        first, last = _shares(len(members), cut["validation"], cut["test"])
        rest = members[first : len(members) - last]
        if fraction is not None:
            rest = rest[np.argsort(fraction[rest], kind="stable")][: max(1, round(len(rest) * spec.data.fraction))]
        place[members[:first]] = validation
        place[members[len(members) - last :]] = test
        place[rest] = train
    _train_every_label(place, texts, own, positions, train)
    places = np.full(len(of), NOWHERE, np.uint8)
    places[of] = place[text_of]
    return places


def _shares(count: int, *cuts: float) -> list[int]:
    """How many of a class each cut takes: one at least, leaving one; nothing where there are too few for that."""
    wanted = [max(1, round(count * cut)) if cut else 0 for cut in cuts]
    if count <= sum(map(bool, cuts)):
        return [0] * len(cuts)
    while sum(wanted) >= count:
        wanted[wanted.index(max(wanted))] -= 1
    return wanted


def _train_every_label(
    place: NDArray[np.uint8],
    texts: NDArray[np.int64],
    labels: NDArray[np.int64],
    positions: NDArray[np.uint64],
    train: int,
) -> None:
    """Put one text of each label that only stands beside rarer ones into training, if none is there.

    `texts` and `labels` are pairs, ordered by text: this text has this label.
    """
    trained = {*labels[place[texts] == train].tolist()}
    lacking = ~np.isin(labels, list(trained))
    for text in sorted({*texts[lacking].tolist()}, key=lambda text: positions[text]):
        begin, end = np.searchsorted(texts, [text, text + 1])
        if not trained.issuperset(labels[begin:end].tolist()):
            place[text] = train
            trained.update(labels[begin:end].tolist())


def without_copies(folder: Path, of: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """These training rows without those that say the same as another one: the one stays whose group comes first in the
    order of hashes, so that it does not depend on the order in which groups are read."""
    examples = rows.groups(Column(folder, "train", "example", of).all())
    order = np.lexsort((Column(folder, "train", "position", of).all(), examples))
    is_first = np.diff(examples[order], prepend=-1) != 0
    kept = np.zeros(len(of), bool)
    kept[np.flatnonzero(of)[order[is_first]]] = True
    return kept


class Groups:
    """Training rows that stay together."""

    def __init__(self, folder: Path, of: NDArray[np.bool_]) -> None:
        """`of` are the rows that are left; a group is as large as what is left of it."""
        self._folder, self._of = folder, of
        self._of_row = rows.groups(Column(folder, "train", "group").all())
        _, first = np.unique(self._of_row, return_index=True)
        self.positions = Column(folder, "train", "position").all().astype(np.uint64)[first]
        self.sizes = np.bincount(self._of_row[of], minlength=len(first))
        left = np.flatnonzero(self.sizes)
        self._members = left[np.argsort(self.positions[left], kind="stable")]

    def hold_out(self, places: NDArray[np.uint8], cut: dict[str, float]) -> None:
        """Put groups into validation and test, in the order of their hashes, until these have the parts to be cut off.

        A group that is larger than two such parts is learnt from, as far as others are left.
        """
        wanted = {split: part * self.sizes[self._members].sum() for split, part in cut.items() if part}
        if not wanted or len(self._members) <= len(wanted):
            return
        small = self._members[self.sizes[self._members] <= 2 * min(wanted.values())]
        if len(small) <= 2 * len(wanted):
            small = np.delete(self._members, self.sizes[self._members].argmax())
        # Half of them at least are learnt from.
        share = min(1.0, max(1, self.sizes[small].sum() // 2) / sum(wanted.values()))
        others = len(wanted)
        for split, size in wanted.items():
            others -= 1
            count = self._count(small, share * size, most=len(small) - others)
            places[self._of & np.isin(self._of_row, small[:count])] = SPLITS.index(split)
            small = small[count:][::-1]

    def _count(self, members: NDArray[np.int64], wanted: float, *, most: int) -> int:
        """How many of the first members come closest to so many examples: one at least, and not less than half."""
        total = np.cumsum(self.sizes[members])
        nearest = int(np.abs(total - wanted).argmin()) + 1
        enough = int(np.searchsorted(total, wanted / 2)) + 1
        return max(1, min(max(nearest, enough), most))

    def train_every_label(self, places: NDArray[np.uint8], labels: Labels, spec: StudySpec) -> None:
        """Put one group of each label that is held out only into training."""
        sets = LabelSets(labels, spec)
        groups, own = sets.pairs(self._of_row[self._of], Column(self._folder, "train", "label", self._of).all())
        place = np.full(len(self.positions), NOWHERE, np.uint8)
        np.minimum.at(place, self._of_row[self._of], places[self._of])  # in training, if a row is
        before = place.copy()
        _train_every_label(place, groups, own, self.positions, SPLITS.index("train"))
        places[self._of & (place != before)[self._of_row]] = SPLITS.index("train")
