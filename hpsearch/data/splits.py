"""Which examples are used, and in which split; the same text always falls on the same side.

Decided by hashes of the texts alone, which `hpsearch.data.rows` keeps on disk.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpsearch.data import rows
from hpsearch.data.corpora import Example
from hpsearch.data.rows import Column, Labels
from hpsearch.data.shards import NOWHERE, SPLITS, ArrayWriter
from hpsearch.data.sources import may_group
from hpsearch.data.units import Groups, LabelSets, stratified, without_copies
from hpsearch.errors import DataError
from hpsearch.spec.sections import AlignedFiles, SourceSpec
from hpsearch.spec.study import StudySpec
from hpsearch.spec.task import LABEL_SEPARATOR

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_SHARED = 0.5
"""A given split of which a larger part stands in another one, too, is no split of its own."""
_PIECE = 1 << 14
"""Examples whose labels are written at once."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples by split, on disk. Training has none twice and no first field of a held-out split; given splits are as
    given."""

    folder: Path
    places: dict[str, NDArray[np.uint8]]
    """Of each given split, where its rows go: numbers in SPLITS, or `NOWHERE`."""
    duplicates: int
    """Training examples dropped because the same text, white space aside, had been read before."""
    overlaps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Examples of a split that are in a held-out split, too, by `SPLIT in HELD-OUT SPLIT`: dropped from training, kept
    in validation."""
    rare: dict[str, int] = dataclasses.field(default_factory=dict)
    """Labels left out because they are too rare to stand in all splits, with their examples."""
    used: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of a mix with weights, the part of each source's training text that is used."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """By split, examples left out because a held-out document has their text, or because others of their documents are
    in a given split that is held out."""
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is left of a label as it is written, where `rare` takes a part of it."""

    def origin(self, split: str) -> str:
        """The given split that the examples of a split are from."""
        return split if split in self.places else "train"

    def chosen(self, split: str) -> NDArray[np.bool_]:
        """Which rows of its origin a split has."""
        chosen: NDArray[np.bool_] = self.places[self.origin(split)] == SPLITS.index(split)
        return chosen

    def count(self, split: str) -> int:
        return int(self.chosen(split).sum())

    def tables(self, split: str, of: NDArray[np.bool_] | None = None) -> Iterator[pa.Table]:
        """The texts of a split, about a megabyte at a time; of these rows of its origin only."""
        import pyarrow as pa

        chosen = self.chosen(split) if of is None else self.chosen(split) & of
        for table in rows.batches(self.folder, self.origin(split), chosen):
            if not self.left:
                yield table
                continue
            field = table.schema.field(-1)
            written = [self.left.get(text, text) for text in table.columns[-1].to_pylist()]
            yield table.set_column(table.num_columns - 1, field, pa.array(written, field.type))

    def texts(self, split: str, field: str, of: NDArray[np.bool_] | None = None) -> Iterator[str]:
        for table in self.tables(split, of):
            yield from table.column(field).to_pylist()

    def examples(self, split: str) -> Iterator[Example]:
        for table in self.tables(split):
            yield from zip(*(column.to_pylist() for column in table.columns), strict=True)


def columns_of(spec: StudySpec, split: str, given: set[str]) -> list[str]:
    """The columns of hashes that deciding on a split needs, where these are given."""
    data, task = spec.data, spec.definition
    found = ["example"] if split == "train" else []
    found += [] if found and text_column(spec) == "example" else [text_column(spec)]
    found += ["target"] if task.compares_text else []
    found += ["sample"] if data.max_examples is not None else []
    found += ["group"] if may_group(data) else []
    found += ["label"] if task.has_labels else []
    if split == "train":
        needs_position = task.has_labels or may_group(data) or not given.issuperset(SPLITS)
        found += ["position"] if needs_position else []
        found += ["key"] if may_group(data) and key_column(spec) == "key" else []
        found += ["fraction"] if data.fraction < 1 else []
        found += ["source", "size"] if is_weighted(spec) else []
    return found


def text_column(spec: StudySpec) -> str:
    """The column of hashes of the first field."""
    return "example" if len(spec.definition.fields) == 1 and not spec.definition.has_labels else "text"


def key_column(spec: StudySpec) -> str:
    """The column of hashes of what examples have in common that are not to be in two splits."""
    return "key" if spec.definition.is_pair and not spec.definition.has_labels else text_column(spec)


def decide(folder: Path, given: Sequence[str], labels: Labels, spec: StudySpec, *, is_grouped: bool) -> Examples:
    """De-duplicate and split the rows that are written in a folder, of these given splits. Raises DataError.

    `is_grouped` says whether some stay in the split of others.
    """
    kept, duplicates, overlaps = _without_overlap(folder, given, spec, is_grouped=is_grouped)
    left_out: Counter[str] = Counter()
    has_names = any(source.group_column is not None for source in spec.data.sources)
    for split in (split for split in given if is_grouped and has_names and split != "train"):
        groups = Column(folder, "train", "group", kept["train"])
        shared = rows.among(groups, [Column(folder, split, "group")])
        if (count := int(shared.sum())) > _MOST_SHARED * kept["train"].sum():
            raise DataError(
                f"data: {count:,} of the {kept['train'].sum():,} examples of the train split are of documents of the "
                f"{split} split, by data.group_column; expected names that mean the same document in both"
            )
        kept["train"] &= ~shared
        left_out["train"] += count
    read = sum(int(rows.sum()) for rows in kept.values())
    if spec.data.max_examples is not None:
        kept = {split: _sample(folder, split, of, spec.data.max_examples) for split, of in kept.items()}
    places = {
        split: np.where(of, SPLITS.index(split), NOWHERE).astype(np.uint8)
        for split, of in kept.items()
        if split != "train"
    }
    places["train"] = _split(folder, kept["train"], {*given}, labels, spec, is_grouped=is_grouped)
    if is_grouped:
        left_out.update(_leave_out_shared(folder, places["train"], spec))
    used = _weigh(folder, places["train"], spec) if is_weighted(spec) else {}
    examples = Examples(
        folder=folder, places=places, duplicates=duplicates, overlaps=overlaps, used=used, left_out=dict(+left_out)
    )
    if spec.definition.has_labels:
        counts = _Counts(examples, labels, spec)
        if spec.data.rare_labels == "drop":
            examples = counts.without_rare()
    for split in SPLITS:
        if not examples.count(split):
            together = "; documents stay whole, by data.group_column or data.whole_files" if is_grouped else ""
            raise DataError(
                f"data: the {split} split is empty ({read} documents were read{together}); give more text, or a larger "
                "fraction"
            )
    if spec.definition.has_labels:
        _check_labels(examples, labels, spec)
    return examples


def _without_overlap(
    folder: Path, given: Sequence[str], spec: StudySpec, *, is_grouped: bool
) -> tuple[dict[str, NDArray[np.bool_]], int, dict[str, int]]:
    """The rows that stay of each given split: of training no duplicates; the number of these; how many rows are in a
    held-out split.

    Held-out splits stay as they are given, so that scores compare with those of others on the same rows.
    """
    texts = {split: Column(folder, split, text_column(spec)) for split in given}
    overlaps: dict[str, int] = {}
    kept = {split: np.ones(len(texts[split]), bool) for split in given}
    held_out: list[str] = []
    for split in (split for split in reversed(SPLITS) if split in given):
        shared = np.zeros(len(texts[split]), bool)
        for other in held_out:
            there = rows.among(texts[split], [texts[other]])
            count = int(there.sum())
            if count > _MOST_SHARED * len(there):
                raise DataError(
                    f"data: {count:,} of the {len(there):,} examples of the {split} split stand in the {other} split, "
                    "too; expected splits that share no text, or none, which are then split off the training split"
                )
            if count:
                overlaps[f"{split} in {other}"] = count
            shared |= there
        if split == "train" and is_grouped:
            kept[split] = without_copies(folder, ~shared)
        elif split == "train":
            kept[split] = ~shared & ~rows.repeated(Column(folder, split, "example", of=~shared))
        held_out.append(split)
    return kept, int((~kept["train"]).sum()), overlaps


def _sample(folder: Path, split: str, of: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """At most `most` of these rows: those with the lowest hashes."""
    if of.sum() <= most:
        return of
    places = Column(folder, split, "sample").all().astype(np.uint64)
    limit = np.partition(places[of], most - 1)[most - 1]
    chosen = of & (places <= limit)
    first: NDArray[np.bool_] = chosen & (np.cumsum(chosen) <= most)
    return first


def _split(
    folder: Path, of: NDArray[np.bool_], given: set[str], labels: Labels, spec: StudySpec, *, is_grouped: bool
) -> NDArray[np.uint8]:
    """Where each row of training goes: splits that are not given are split off it."""
    data = spec.data
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    cut = {split: 0.0 if split in given else fraction for split, fraction in fractions.items()}
    if spec.definition.has_labels and not is_grouped:
        return stratified(folder, of, cut, labels, spec)
    places = np.where(of, SPLITS.index("train"), NOWHERE).astype(np.uint8)
    if data.fraction < 1:
        for start, piece in Column(folder, "train", "fraction").pieces():
            own = places[start : start + len(piece)]
            own[rows.as_fraction(piece) >= data.fraction] = NOWHERE
    if is_grouped:
        groups = Groups(folder, of)
        groups.hold_out(places, cut)
        if spec.definition.has_labels:
            groups.train_every_label(places, labels, spec)
    elif any(cut.values()):
        for start, piece in Column(folder, "train", "position").pieces():
            end = start + len(piece)
            positions = rows.as_fraction(piece)
            is_validation = of[start:end] & (positions < cut["validation"])
            is_test = of[start:end] & (positions < cut["validation"] + cut["test"]) & ~is_validation
            places[start:end][is_validation] = SPLITS.index("validation")
            places[start:end][is_test] = SPLITS.index("test")
    return places


def _leave_out_shared(folder: Path, places: NDArray[np.uint8], spec: StudySpec) -> dict[str, int]:
    """Leave the texts out of training, and of validation, that a later split has from another group; returns how many.

    Texts that are split by themselves cannot be in two splits.
    """
    left_out = {}
    own = {split: places == SPLITS.index(split) for split in SPLITS}
    keys = {split: Column(folder, "train", key_column(spec), of) for split, of in own.items()}
    for split, others in (("train", ("validation", "test")), ("validation", ("test",))):
        shared = rows.among(keys[split], [keys[other] for other in others])
        left_out[split] = int(shared.sum())
        places[shared] = NOWHERE
    return left_out


def is_weighted(spec: StudySpec) -> bool:
    return any(source.weight is not None for source in spec.data.mix)


def _weigh(folder: Path, places: NDArray[np.uint8], spec: StudySpec) -> dict[str, float]:
    """Leave out, by their hashes, training examples of the sources that have more text than their weight asks for.

    Returns which part of each source's text is used. No text is used twice.
    """
    train, weights = SPLITS.index("train"), [source.weight or 0.0 for source in spec.data.mix]
    source, sizes = (Column(folder, "train", name).all() for name in ("source", "size"))
    text = np.bincount(source[places == train], sizes[places == train], len(weights))
    if not text.all():
        raise DataError(f"data: source {int(text.argmin()) + 1} of the mix has no text to train on")
    parts = np.array(weights) / text
    parts /= parts.max()
    limits = np.minimum(parts * 2.0**64, 2.0**64 - 2048).astype(np.uint64)
    for start, piece in Column(folder, "train", "example").pieces():
        end = start + len(piece)
        own = source[start:end]
        # By the half of the hash that samples do not go by: they are to be of all sources alike.
        is_over = (piece[:, 0] >= limits[own]) & (parts[own] < 1)
        places[start:end][is_over & (places[start:end] == train)] = NOWHERE
    return {_name(source): float(part) for source, part in zip(spec.data.mix, parts, strict=True)}


def _name(source: SourceSpec) -> str:
    """What a person calls a source."""
    if source.files is None:
        return str(source.corpus or source.hub)
    train = source.files.train
    return train.source[0] if isinstance(train, AlignedFiles) else train[0]


class _Counts:
    """How many examples of each split have each label."""

    def __init__(self, examples: Examples, labels: Labels, spec: StudySpec) -> None:
        self._examples, self._labels, self._spec = examples, labels, spec
        self._sets = LabelSets(labels, spec)
        self.counts: dict[str, dict[str, int]] = {}
        for split in SPLITS:
            _, members = self._sets.of(_written(examples, split))
            counts = np.bincount(members, minlength=len(self._sets.names)).tolist()
            self.counts[split] = {name: count for name, count in zip(self._sets.names, counts, strict=True) if count}

    def without_rare(self) -> Examples:
        """The examples without the labels that some split lacks; those that then have none are left out."""
        total: Counter[str] = sum(map(Counter, self.counts.values()), Counter())
        rare = {label: total[label] for label in sorted(total) if not all(label in self.counts[s] for s in SPLITS)}
        if not rare:
            return self._examples
        definition, options = self._spec.definition, self._spec.options
        left = {
            written: LABEL_SEPARATOR.join(label for label in definition.labels(written, options) if label not in rare)
            for written in self._labels.written
        }
        has_none = np.array([not left[written] for written in self._labels.written])
        places = {}
        for split, place in self._examples.places.items():
            own = place.copy()
            own[has_none[Column(self._examples.folder, split, "label").all()]] = NOWHERE
            places[split] = own
        changed = {written: kept for written, kept in left.items() if kept and kept != written}
        return dataclasses.replace(self._examples, places=places, rare=rare, left=changed)


def label_counts(examples: Examples, labels: Labels, spec: StudySpec) -> dict[str, dict[str, int]]:
    """By split, the examples that have each label, the most frequent first."""
    counts = _Counts(examples, labels, spec).counts
    return {
        split: {name: count for name, count in Counter(own).most_common() if name not in examples.rare}
        for split, own in counts.items()
    }


def write_labels(folder: Path, names: Sequence[str], examples: Examples, labels: Labels, spec: StudySpec) -> None:
    """Write the labels of each split, of shape (examples, labels)."""
    sets = LabelSets(labels, spec)
    number = np.array([names.index(name) if name in names else -1 for name in sets.names])
    for split in SPLITS:
        written = _written(examples, split)
        writer = ArrayWriter(folder / f"{split}-labels.npy", np.uint8, (len(names),))
        for start in range(0, len(written), _PIECE):
            piece = written[start : start + _PIECE]
            owners, members = sets.of(piece)
            held = number[members] >= 0
            matrix = np.zeros((len(piece), len(names)), np.uint8)
            matrix[owners[held], number[members[held]]] = 1
            writer.append(matrix)
        writer.close()


def _written(examples: Examples, split: str) -> NDArray[np.int32]:
    return Column(examples.folder, examples.origin(split), "label", examples.chosen(split)).all()


def _check_labels(examples: Examples, labels: Labels, spec: StudySpec) -> None:
    counts = label_counts(examples, labels, spec)
    known = counts["train"]
    if len(known) < 2:
        raise DataError(f"data: the training split has one class only ({next(iter(known))!r}); a classifier needs two")
    for split in ("validation", "test"):
        if unknown := {*counts[split]} - {*known}:
            row, label = _first_with(examples, split, unknown, spec)
            raise DataError(
                f"data: label {label!r} of the {split} split does not occur in training (text: {row[0][:60]!r}); "
                "`data.rare_labels: drop` leaves such labels out"
            )


def _first_with(examples: Examples, split: str, wanted: set[str], spec: StudySpec) -> tuple[Example, str]:
    for row in examples.examples(split):
        for label in spec.definition.labels(row[-1], spec.options):
            if label in wanted:
                return row, label
    raise AssertionError(f"no row of {split} has one of {wanted}")


def some(names: Sequence[str], most: int = 10) -> str:
    """The first of many names."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
