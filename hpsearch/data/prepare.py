"""From a study's `data:` to token arrays on disk: tokenized once, mapped by all trials.

Text is read once, then it is read from disk, a batch at a time, in every further stage: which examples are used and in
which split, the tokenizer, the tokens. Label sets, vocabulary and everything else that is learned comes from the
training split alone. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpsearch.data import known
from hpsearch.data.shards import CARD, SPLITS, DataCard, load_split
from hpsearch.data.sources import size_of
from hpsearch.data.splits import some
from hpsearch.data.stages import Preparation, Report, unheard, write_whole
from hpsearch.errors import DataError, RunFolderError
from hpsearch.files import storage
from hpsearch.files.making import making_folder
from hpsearch.files.scratch import private_folder
from hpsearch.files.storage import Folder
from hpsearch.spec.study import StudySpec

_LARGE = 100_000_000
"""Bytes of files above which counts are estimated where nothing is made of them."""
_ESTIMATED_FROM = 20_000_000
"""Bytes that an estimate reads of each given split."""


def prepare(spec: StudySpec, report: Report = unheard) -> tuple[Folder, DataCard]:
    """Token arrays of a study under `folder/data/FINGERPRINT`, made if they are not there yet.

    Data that was prepared from the same files is found without reading them. A preparation that was killed is continued
    where it was. Returns the folder of the arrays and its card; a folder in an object store is read by way of
    `storage.cached`. Raises DataError, or RunFolderError when it cannot be written.
    """
    key = known.key_of(spec)
    found = known.find(spec, key) if key is not None else None
    if found is None:
        found = _made(spec, key, report)
    spec.definition.check_data(spec.options, found[1])
    return found


def measure(spec: StudySpec, report: Report = unheard, *, whole: bool = True) -> tuple[DataCard, TooLong]:
    """The card that `prepare` would write, and what the context length would cut; writes nothing that stays.

    With `whole` false, a large corpus is read in part and its counts are estimated.
    """
    key = known.key_of(spec)
    found = known.find(spec, key) if key is not None else None
    if found is not None:
        folder, card = found
        spec.definition.check_data(spec.options, card)
        return card, too_long(spec, storage.cached(folder))
    # Of a mix, a part would be of its first source.
    is_large = not spec.data.mix and sum(size_of(spec.data, split) for split in SPLITS) > _LARGE
    if is_large and not whole:
        # What is wrong with a part need not be wrong with the whole: a file may be sorted by its labels.
        with suppress(DataError):
            return _measured(spec, report, _ESTIMATED_FROM)
    return _measured(spec, report, None)


def _measured(spec: StudySpec, report: Report, most: int | None) -> tuple[DataCard, TooLong]:
    with private_folder("data-") as scratch:
        preparation = Preparation(spec, scratch, report, most=most)
        preparation.read()
        card = preparation.tokenized()
        spec.definition.check_data(spec.options, card)
        return card, too_long(spec, preparation.out)


@dataclass(frozen=True)
class TooLong:
    """Examples that are longer than the model's context, by split."""

    context_length: int
    cut: dict[str, int]
    """Those that lose a part."""
    left_out: dict[str, int]

    def __str__(self) -> str:
        """In words, with the splits that have any; empty if none has."""
        kinds = {"cut": self.cut, "left out": self.left_out}
        counted = {
            kind: ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
            for kind, counts in kinds.items()
        }
        said = "; ".join(f"{kind}: {counts} examples" for kind, counts in counted.items() if counts)
        return f"longer than {self.context_length} tokens and {said}" if said else ""


def too_long(spec: StudySpec, folder: Path) -> TooLong:
    """How many examples do not fit as they are."""
    task, length = spec.definition, spec.model.context_length
    if task.is_stream:
        return TooLong(length, dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0))
    longest = {
        split: np.max([load_split(folder, split, name).lengths for name in task.sequences], axis=0) for split in SPLITS
    }
    left_out = {split: task.left_out(folder, split, length) for split in SPLITS}
    most = length + task.is_chat  # the last token of a chat is only predicted
    cut = {split: int((lengths > most).sum()) - left_out[split] for split, lengths in longest.items()}
    return TooLong(length, cut, left_out)


def notes(spec: StudySpec, card: DataCard) -> list[str]:
    """What a person should know of prepared data before trials run on it."""
    found = []
    if card.read < 1:
        found.append(
            f"counts are estimated from the first {card.read:.1%} of the files; `check --full` reads all of them"
        )
    for pair, count in card.overlaps.items():
        split, _, other = pair.partition(" in ")
        remedy = "left out of training" if split == "train" else "kept in both"
        found.append(f"{count:,} examples of the {split} split are in the {other} split, too: {remedy}")
    if card.whole_files:
        found.append(f"the paragraphs of each file stay in one split: {card.whole_files} files (data.whole_files)")
    for split, count in card.left_out.items():
        found.append(
            f"{count:,} examples were left out of {'training' if split == 'train' else split}: their texts, or others "
            "of their documents, are in a split that is held out"
        )
    for source, part in card.used.items():
        if part < 1:
            found.append(f"{source}: {part:.1%} of its training text is used, by the weights of the mix")
    for file, count in card.empty.items():
        found.append(f"{file}: {count:,} rows without text in every column were left out")
    for reason, count in card.unusable.items():
        found.append(f"{reason}: {count:,} rows were left out")
    for file, split_on in card.split_on.items():
        parted = {"line": "a text a line", "end_of_text": "texts that end with an end-of-text mark"}[split_on]
        found.append(f"{file}: read as {parted} (data.split_on: {split_on})")
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


def _made(spec: StudySpec, key: str | None, report: Report) -> tuple[Folder, DataCard]:
    data = storage.locate(spec.folder) / "data"
    try:
        with making_folder(data, key, lambda: report("waiting for another launch to prepare this", 0, 0)) as folder:
            # Another launch may have made it while this one waited.
            if key is not None and (found := known.find(spec, key)) is not None:
                return found
            files = _described(spec, report)
            _continue_only(folder, files)
            preparation = Preparation(spec, folder, report)
            preparation.read()
            target = data / preparation.fingerprint
            if storage.read(target / CARD) is None:
                card = preparation.tokenized()
                _publish(preparation.out, target)
            else:  # equal arrays were made of other files
                card = preparation.card_of(storage.cached(target))
            _refuse_changed(files)
            if key is not None:
                known.remember(spec, key, files, card)
    except OSError as error:
        raise RunFolderError(f"cannot write the tokenized data under {data}: {error.strerror or error}") from error
    return target, card


def _described(spec: StudySpec, report: Report) -> list[known.SourceFile]:
    places = known.source_files(spec)
    total = sum(known.status_of(place).st_size for place in places)
    files: list[known.SourceFile] = []
    for place in places:
        files.append(known.described(place))
        report("hashing the files", sum(file.size for file in files), total)
    return files


def _continue_only(folder: Path, files: list[known.SourceFile]) -> None:
    """Leave what an earlier process has made in a folder only if it was made from these files."""
    note, content = folder / "files.json", json.dumps([(file.name, file.hash) for file in files])
    if not note.is_file() or note.read_text() != content:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_whole(note, content)


def _publish(made: Path, target: Folder) -> None:
    if not isinstance(target, Path):
        storage.sent(made, target, last=CARD)
        return
    if storage.read(target / CARD) is None:  # it may have lost its card
        with suppress(FileNotFoundError):
            os.rename(target, made.with_name("replaced"))
    try:
        os.rename(made, target)
    except OSError:
        if storage.read(target / CARD) is None:  # else another launch was first, with the same
            raise


def _refuse_changed(files: list[known.SourceFile]) -> None:
    for file in files:
        status = known.status_of(Path(file.name))
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
            raise DataError(f"data: {file.name} was written while it was read; launch again when it is whole")
