"""What the preparation of data should come to, done in memory as plainly as can be: the reference of its tests."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hpsearch.data.corpora import Example, fold
from hpsearch.data.shards import SPLITS
from hpsearch.data.sources import Reading, given_splits
from hpsearch.errors import DataError
from hpsearch.spec.study import StudySpec
from hpsearch.spec.task import LABEL_SEPARATOR

_MOST_SHARED = 0.5
"""A given split of which a larger part stands in another one, too, is no split of its own."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples by split. Training has none twice and no first field of a held-out split; given splits are as given."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    duplicates: int
    """Training examples dropped because the same text, white space aside, had been read before."""
    overlaps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Examples of a split that are in a held-out split, too, by `SPLIT in HELD-OUT SPLIT`: dropped from training, kept
    in validation."""
    rare: dict[str, int] = dataclasses.field(default_factory=dict)
    """Labels left out because they are too rare to stand in all splits, with their examples."""

    def field(self, split: str, index: int) -> list[str]:
        return [example[index] for example in getattr(self, split)]

    @property
    def seen_ngrams(self) -> float:
        """Share of the validation split's word 5-grams that stand in training, too: a measure of leakage."""
        seen = {gram for text in self.field("train", 0) for gram in ngrams(text)}
        grams = [gram for text in self.field("validation", 0) for gram in ngrams(text)]
        return sum(gram in seen for gram in grams) / len(grams) if grams else 0.0

    @property
    def seen_targets(self) -> float:
        """Share of the held-out last fields (translations) that stand in training word for word."""
        seen = set(self.field("train", -1))
        targets = [*self.field("validation", -1), *self.field("test", -1)]
        return sum(target in seen for target in targets) / len(targets)


def reference_examples(spec: StudySpec) -> Examples:
    """Read, de-duplicate and split the examples of a study. Raises DataError."""
    data, task = spec.data, spec.definition
    splits = given_splits(spec, Reading())
    unique, duplicates, overlaps = _without_overlap(splits)
    parts = _split(unique, spec)
    rare = _drop_rare(parts, spec) if task.has_labels and data.rare_labels == "drop" else {}
    examples = Examples(**parts, duplicates=duplicates, overlaps=overlaps, rare=rare)
    for split in SPLITS:
        if not getattr(examples, split):
            raise DataError(
                f"data: the {split} split is empty ({sum(map(len, unique.values()))} documents were read); "
                "give more text, or a larger fraction"
            )
    if task.has_labels:
        _check_labels(examples, spec)
    return examples


def stable_fraction(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same document always falls on the same side."""
    digest = hashlib.blake2b(f"{salt}\0{fold(text)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _without_overlap(
    splits: dict[str, Iterator[Example]],
) -> tuple[dict[str, list[Example]], int, dict[str, int]]:
    """The given splits, training without duplicates; the number of these; how many examples are in a held-out split.

    Held-out splits stay as they are given, so that scores compare with those of others on the same rows.
    """
    held_out: dict[str, set[str]] = {}
    overlaps: Counter[str] = Counter()
    kept: dict[str, list[Example]] = {}
    duplicates = 0
    # Held-out splits are read first, so that a text that is in training as well is dropped there.
    for split in (split for split in reversed(SPLITS) if split in splits):
        seen: set[Example] = set()
        shared: Counter[str] = Counter()
        rows = 0
        kept[split] = []
        for example in splits[split]:
            rows += 1
            key = tuple(fold(text) for text in example)
            there = [other for other, texts in held_out.items() if key[0] in texts]
            shared.update(there)
            if split != "train":
                kept[split].append(example)
            elif there or key in seen:
                duplicates += 1
            else:
                seen.add(key)
                kept[split].append(example)
        for other, count in shared.items():
            if count > _MOST_SHARED * rows:
                raise DataError(
                    f"data: {count:,} of the {rows:,} examples of the {split} split stand in the {other} split, too; "
                    "expected splits that share no text, or none, which are then split off the training split"
                )
            overlaps[f"{split} in {other}"] = count
        held_out[split] = {fold(example[0]) for example in kept[split]}
    return kept, duplicates, dict(overlaps)


def _split(unique: dict[str, list[Example]], spec: StudySpec) -> dict[str, list[Example]]:
    """The examples by split: the given ones, and those that are split off training because they are not given."""
    data = spec.data
    parts = {split: _sample(unique.get(split, []), data.max_examples) for split in SPLITS}
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    cut = {split: 0.0 if split in unique else fraction for split, fraction in fractions.items()}
    if spec.definition.has_labels:
        place = _stratified(parts["train"], spec, cut)
    else:
        place = _by_threshold(parts["train"], spec, cut)
    placed = [(place[fold(example[0])], example) for example in parts.pop("train")]
    return {split: [*parts.get(split, []), *(example for own, example in placed if own == split)] for split in SPLITS}


def _by_threshold(examples: list[Example], spec: StudySpec, cut: dict[str, float]) -> dict[str, str]:
    """The split of each text, by a hash of the text alone; no split at all beyond the fraction to be used."""
    place = {}
    for example in examples:
        key = spec.definition.split_key(example[0])
        position = stable_fraction(key, "split")
        if position < cut["validation"]:
            split = "validation"
        elif position < cut["validation"] + cut["test"]:
            split = "test"
        else:
            split = "train" if stable_fraction(key, "fraction") < spec.data.fraction else ""
        place[fold(example[0])] = split
    return place


def _stratified(examples: list[Example], spec: StudySpec, cut: dict[str, float]) -> dict[str, str]:
    """The split of each text, such that every class stands in all splits if it has enough texts, else in training.

    Within a class, texts are ordered by their hash; validation takes the first and test the last, so that a further
    text moves one over each border at most. A text with several labels belongs to the rarest of them.
    """
    labels: dict[str, set[str]] = {}
    for row in examples:
        labels.setdefault(fold(row[0]), set()).update(labels_of(row, spec))
    counts = Counter(label for own in labels.values() for label in own)
    classes: dict[str, list[str]] = {}
    for text in sorted(labels, key=lambda text: stable_fraction(text, "split")):
        classes.setdefault(min(labels[text], key=lambda label: (counts[label], label)), []).append(text)
    place = dict.fromkeys(labels, "")
    for texts in classes.values():
        validation, test = _shares(len(texts), cut["validation"], cut["test"])
        rest = sorted(texts[validation : len(texts) - test], key=lambda text: stable_fraction(text, "fraction"))
        place |= dict.fromkeys(texts[:validation], "validation")
        place |= dict.fromkeys(texts[len(texts) - test :], "test")
        place |= dict.fromkeys(rest[: max(1, round(len(rest) * spec.data.fraction))], "train")
    _train_every_label(place, labels)
    return place


def _shares(count: int, *cuts: float) -> list[int]:
    """How many of a class each cut takes: one at least, leaving one; nothing where there are too few for that."""
    wanted = [max(1, round(count * cut)) if cut else 0 for cut in cuts]
    if count <= sum(map(bool, cuts)):
        return [0] * len(cuts)
    while sum(wanted) >= count:
        wanted[wanted.index(max(wanted))] -= 1
    return wanted


def _train_every_label(place: dict[str, str], labels: dict[str, set[str]]) -> None:
    """Put one text of each label that only stands beside rarer ones into training, if none is there."""
    trained = {label for text, split in place.items() if split == "train" for label in labels[text]}
    lacking = [text for text, own in labels.items() if not own <= trained]
    for text in sorted(lacking, key=lambda text: stable_fraction(text, "split")):
        if not labels[text] <= trained:
            place[text] = "train"
            trained |= labels[text]


def _drop_rare(parts: dict[str, list[Example]], spec: StudySpec) -> dict[str, int]:
    """Leave out the labels that some split lacks, and the examples that then have none; returns how many had each."""
    counts = {split: counted(rows, spec) for split, rows in parts.items()}
    total: Counter[str] = sum(counts.values(), Counter())
    rare = {label: total[label] for label in sorted(total) if not all(label in counts[split] for split in SPLITS)}
    for split, rows in parts.items():
        kept = [(row[:-1], [label for label in labels_of(row, spec) if label not in rare]) for row in rows]
        parts[split] = [(*texts, LABEL_SEPARATOR.join(labels)) for texts, labels in kept if labels]
    return rare


def counted(rows: Iterable[Example], spec: StudySpec) -> Counter[str]:
    return Counter(label for row in rows for label in set(labels_of(row, spec)))


def _sample(examples: list[Example], most: int | None) -> list[Example]:
    """At most `most` of the examples, in their order: those with the lowest hashes."""
    if most is None or len(examples) <= most:
        return list(examples)
    limit = sorted(stable_fraction(example[0], "sample") for example in examples)[most - 1]
    return [example for example in examples if stable_fraction(example[0], "sample") <= limit][:most]


def labels_of(row: Example, spec: StudySpec) -> list[str]:
    return spec.definition.labels(row[-1], spec.options)


def _check_labels(examples: Examples, spec: StudySpec) -> None:
    known = counted(examples.train, spec)
    if len(known) < 2:
        raise DataError(f"data: the training split has one class only ({next(iter(known))!r}); a classifier needs two")
    for split in ("validation", "test"):
        for row in getattr(examples, split):
            for label in labels_of(row, spec):
                if label not in known:
                    raise DataError(
                        f"data: label {label!r} of the {split} split does not occur in training (text: "
                        f"{row[0][:60]!r}); `data.rare_labels: drop` leaves such labels out"
                    )


def ngrams(text: str, size: int = 5) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(size)), strict=False)


def reference_hash(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update("\0".join((*example, "")).encode())
    return digest.hexdigest()[:16]
