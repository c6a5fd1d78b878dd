"""From a study's `data:` to token arrays on disk: tokenized once, mapped by all trials.

Label sets, vocabulary and everything else that is learned comes from the training
split alone. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data import pretrained
from hpsearch.data.corpora import Example
from hpsearch.data.shards import CARD, FORMAT, SPLITS, DataCard, load_split, read_card
from hpsearch.data.splits import Examples, counted, labels_of, read_examples, some
from hpsearch.data.tokenizers import TOKENIZER_FOLDER, BroughtTokenizers, TrainedTokenizers
from hpsearch.errors import RunFolderError
from hpsearch.files import storage
from hpsearch.files.storage import Folder
from hpsearch.metrics import bleu
from hpsearch.spec.study import StudySpec


def prepare(spec: StudySpec) -> tuple[Folder, DataCard]:
    """Token arrays of a study under `folder/data/FINGERPRINT`, made if they are not there yet.

    Returns the folder of the arrays and its card; a folder in an object store is read by way of `storage.cached`.
    Raises DataError, or RunFolderError when it cannot be written.
    """
    examples = read_examples(spec)
    target = storage.locate(spec.folder) / "data" / _fingerprint(examples, spec)
    if storage.read(target / CARD) is not None:
        # Equal arrays may have been left of other rows.
        card = replace(
            read_card(storage.cached(target)),
            duplicates=examples.duplicates,
            overlaps=examples.overlaps,
            rare=examples.rare,
        )
        spec.definition.check_data(spec.options, card)
        return target, card
    prepared = _Prepared(examples, spec)
    if not isinstance(target, Path):
        with storage.filled(target, last=CARD) as scratch:
            prepared.write(scratch)
        return target, prepared.card
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
        try:
            prepared.write(scratch)
            if not target.exists():
                os.rename(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise RunFolderError(f"cannot write the tokenized data under {target.parent}: {error.strerror}") from error
    return target, prepared.card


def measure(spec: StudySpec) -> tuple[DataCard, dict[str, int]]:
    """The card that `prepare` would write, and what the context length would cut; writes nothing."""
    prepared = _Prepared(read_examples(spec), spec)
    return prepared.card, _cut(spec, prepared.lengths())


def count_cut(spec: StudySpec, folder: Path) -> dict[str, int]:
    """Examples of each split that are longer than the model's context and are cut to it."""
    lengths = {
        (split, field): load_split(folder, split, field).lengths for split in SPLITS for field in spec.definition.fields
    }
    return _cut(spec, lengths)


def notes(spec: StudySpec, card: DataCard) -> list[str]:
    """What a person should know of prepared data before trials run on it."""
    found = []
    for pair, count in card.overlaps.items():
        split, _, other = pair.partition(" in ")
        remedy = "left out of training" if split == "train" else "kept in both"
        found.append(f"{count:,} examples of the {split} split are in the {other} split, too: {remedy}")
    counts = card.label_counts
    rare = [label for label in card.labels if not all(label in counts.get(split, {label: 0}) for split in SPLITS)]
    if rare:
        found.append(
            f"{len(rare)} of {len(card.labels)} labels do not stand in all splits: {some(rare)}; "
            "`data.rare_labels: drop` leaves them out"
        )
    if card.rare:
        found.append(f"{len(card.rare)} labels that do not stand in all splits were left out: {some([*card.rare])}")
    return [*found, *spec.definition.notes(spec.options, card)]


class _Prepared:
    """Examples with their tokenizer and token ids, in memory."""

    def __init__(self, examples: Examples, spec: StudySpec) -> None:
        self._examples = examples
        self._task = spec.definition
        self._fields = self._task.fields
        self._tokenizer = (
            TrainedTokenizers(examples, spec) if spec.model.pretrained is None else BroughtTokenizers(spec)
        )
        self._ids = {
            (split, field): self._tokenizer.encode(field, examples.field(split, index))
            for split in SPLITS
            for index, field in enumerate(self._fields)
        }
        self._spec = spec
        self._label_counts = (
            {split: dict(counted(getattr(examples, split), spec).most_common()) for split in SPLITS}
            if self._task.has_labels
            else {}
        )
        self._labels = sorted(self._label_counts.get("train", ()))
        self.card = self._make_card()
        self._task.check_data(spec.options, self.card)

    def lengths(self) -> dict[tuple[str, str], NDArray[np.int64]]:
        return {key: np.array([len(ids) for ids in documents]) for key, documents in self._ids.items()}

    def _make_card(self) -> DataCard:
        examples, counted, tokenizer = self._examples, self._fields[-1], self._tokenizer
        compares = self._task.compares_text
        references = examples.field("test", len(self._fields) - 1) if compares else []
        words = bleu.choose(self._spec.data.target_language, references) if compares else None
        return DataCard(
            fingerprint=_fingerprint(examples, self._spec),
            tokenizer=tokenizer.hash,
            test_fingerprint=_hash_of(examples.test),
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.end_id,
            padding_id=tokenizer.padding_id,
            target_vocab_size=tokenizer.target_vocab_size,
            documents={split: len(getattr(examples, split)) for split in SPLITS},
            tokens={split: sum(map(len, self._ids[split, counted])) for split in SPLITS},
            bytes={
                split: sum(len(text.encode()) for text in examples.field(split, len(self._fields) - 1))
                for split in SPLITS
            },
            duplicates=examples.duplicates,
            seen_ngrams=examples.seen_ngrams,
            seen_targets=examples.seen_targets if compares else None,
            labels=self._labels,
            label_counts=self._label_counts,
            overlaps=examples.overlaps,
            rare=examples.rare,
            bleu_tokenizer=words,
            longest_reference=bleu.longest(references, words) if words else None,
            first_id=tokenizer.first_id,
            start_id=tokenizer.start_id,
        )

    def write(self, folder: Path) -> None:
        token_type = np.uint16 if max(self.card.vocab_size, self.card.target_vocab_size or 0) <= 2**16 else np.uint32
        for (split, field), documents in self._ids.items():
            texts = self._examples.field(split, self._fields.index(field))
            stream = [np.array([self.card.end_id]), *map(np.array, documents)]
            np.save(folder / f"{split}-{field}.npy", np.concatenate(stream).astype(token_type))
            np.save(folder / f"{split}-{field}-ends.npy", np.cumsum([len(ids) for ids in documents], dtype=np.int64))
            sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
            np.save(folder / f"{split}-{field}-bytes.npy", sizes)
            if self._task.compares_text and split != "train":
                (folder / f"{split}-{field}.json").write_text(json.dumps(texts))
        if self._labels:
            numbers = {label: number for number, label in enumerate(self._labels)}
            for split in SPLITS:
                rows = getattr(self._examples, split)
                labels = np.zeros((len(rows), len(numbers)), dtype=np.int64)
                for index, row in enumerate(rows):
                    labels[index, [numbers[label] for label in labels_of(row, self._spec)]] = 1
                np.save(folder / f"{split}-labels.npy", labels)
        (folder / TOKENIZER_FOLDER).mkdir()
        self._tokenizer.save(folder / TOKENIZER_FOLDER)
        (folder / CARD).write_text(json.dumps(asdict(self.card), indent=1))


def _fingerprint(examples: Examples, spec: StudySpec) -> str:
    """Of everything that decides the arrays, so that equal ones are made once."""
    task = spec.definition
    settings: list[Any] = [FORMAT, spec.task, spec.tokenizer.model_dump(), task.data_options(spec.options)]
    settings += [task.fields, task.marks, task.has_labels, task.compares_text]
    settings += [spec.data.source_language, spec.data.target_language]
    folder = pretrained.of(spec.model)
    if folder is not None:
        settings.append(BroughtTokenizers(spec).hash)
    digest = hashlib.sha256(json.dumps(settings).encode())
    for split in SPLITS:
        digest.update(f"{split} {_hash_of(getattr(examples, split))}".encode())
    return digest.hexdigest()[:16]


def _hash_of(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update("\0".join((*example, "")).encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _cut(spec: StudySpec, lengths: dict[tuple[str, str], NDArray[np.int64]]) -> dict[str, int]:
    if spec.definition.is_stream:
        return dict.fromkeys(SPLITS, 0)
    return {
        split: int(
            np.any(
                [lengths[split, field] > spec.model.context_length for field in spec.definition.fields], axis=0
            ).sum()
        )
        for split in SPLITS
    }
