"""The stages of preparing data: rows, splits, tokenizer, tokens. Only the first reads the source, the others the rows.

What a stage has done is on disk, so that a process that was killed is continued by the next.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hpsearch.data import rows, splits
from hpsearch.data.corpora import Example
from hpsearch.data.rows import Column, Labels
from hpsearch.data.shards import CARD, FORMAT, NOWHERE, SPLITS, ArrayWriter, DataCard, read_card
from hpsearch.data.sources import Reading, given_splits, size_of
from hpsearch.data.tokenizers import (
    CHAT_TEMPLATE,
    TOKENIZER_FOLDER,
    AnyTokenizers,
    BroughtTokenizers,
    TrainedTokenizers,
)
from hpsearch.metrics import bleu
from hpsearch.spec.study import StudySpec

if TYPE_CHECKING:
    import pyarrow as pa

_LOOKED_AT = 100_000_000
"""Bytes of training text that `seen_ngrams` is measured on; of more, a sample."""
_KEPT_EVERY = 64_000_000
"""Bytes of text after which a kill loses no more of what was tokenized."""
_PIECE = 1 << 18
"""Rows that are counted at once."""
_GRAM = 5
"""Words of a run that tells text from text."""

Report = Callable[[str, int, int], None]
"""Hears how far a stage is: its name, bytes of text that are done, and of all (0: not known)."""


def unheard(stage: str, done: int, of: int) -> None:
    """Of a preparation that nobody watches."""


class Preparation:
    """The stages of preparing a study's data in a folder; what an earlier process has done there is not done again."""

    def __init__(self, spec: StudySpec, folder: Path, report: Report = unheard, *, most: int | None = None) -> None:
        """With `most`, no more than about so many bytes are read of each given split."""
        self._spec, self._task, self._report, self._most = spec, spec.definition, report, most
        self._fields = self._task.fields
        self._rows, self.out = folder / "rows", folder / "out"
        self._bytes: dict[tuple[str, str], int] = {}
        self._hashes: dict[str, str] = {}

    def read(self) -> None:
        """Read the source, and decide on every example. Raises DataError."""
        self._rows.mkdir(exist_ok=True)
        self._source = self._write_rows()
        self._labels = Labels(self._source["labels"])
        given = self._source["splits"]
        # A part of the files may be of a single document.
        is_grouped = given["train"]["is_grouped"] and self._most is None
        self.examples = splits.decide(self._rows, [*given], self._labels, self._spec, is_grouped=is_grouped)
        self._brought = BroughtTokenizers(self._spec) if self._spec.model.pretrained is not None else None
        self._template = self._chat_template() if self._task.is_chat else None
        self._survey()

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the arrays, so that equal ones are made once."""
        task, spec = self._task, self._spec
        tokenizer = {"shared": spec.tokenizer.shared, "vocab_size": self._entries}
        settings: list[Any] = [FORMAT, spec.task, tokenizer, task.data_options(spec.options)]
        settings += [task.fields, task.marks, task.has_labels, task.compares_text]
        if task.is_chat:
            settings += [self._template, self._brought.special_tokens if self._brought else None]
        settings += [spec.data.source_language, spec.data.target_language]
        if self._brought:
            settings.append(self._brought.hash)
            settings += [] if self._brought.begin_id is None else [self._brought.begin_id]
        elif self._trained_on() < self._training_bytes:
            settings.append(self._trained_on())
        digest = hashlib.sha256(json.dumps(settings).encode())
        for split in SPLITS:
            digest.update(f"{split} {self._hashes[split]}".encode())
        return digest.hexdigest()[:16]

    def tokenized(self) -> DataCard:
        """Tokenize into `out`; its card is written last."""
        self.out.mkdir(exist_ok=True)
        (self.out / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        tokenizer = self._brought or self._trained()
        if self._brought:
            self._brought.save(self.out / TOKENIZER_FOLDER)
        if self._template is not None:
            (self.out / TOKENIZER_FOLDER / CHAT_TEMPLATE).write_text(self._template)
            tokenizer.read_chats(self.out / TOKENIZER_FOLDER, self._spec.model.pretrained or "this study")
        tokens = {key: self._tokenize(*key, tokenizer) for key in itertools.product(SPLITS, self._task.sequences)}
        if self._task.compares_text:
            for split, name in itertools.product(SPLITS[1:], self._fields):
                _write_list(self.out / f"{split}-{name}.json", self.examples.texts(split, name))
        card = self._card(tokenizer, {split: tokens[split, self._task.sequences[-1]] for split in SPLITS})
        if self._task.has_labels:
            splits.write_labels(self.out, card.labels, self.examples, self._labels, self._spec)
        for note in self.out.glob(".*.json"):
            note.unlink()
        (self.out / CARD).write_text(json.dumps(asdict(card), indent=1))
        return card

    def card_of(self, folder: Path) -> DataCard:
        """The card of equal arrays that were made of other rows."""
        return replace(read_card(folder), **self._of_source())

    def _write_rows(self) -> dict[str, Any]:
        """Write the given splits, those that are held out first, and what is known of each."""
        note = self._rows / "read.json"
        done: dict[str, Any] = json.loads(note.read_text()) if note.is_file() else {"labels": [], "splits": {}}
        if done.get("is_whole"):
            return done
        reading, labels = Reading(), Labels(done["labels"])
        sources = given_splits(self._spec, reading)
        for split in (split for split in reversed(SPLITS) if split in sources):
            if split not in done["splits"]:
                part = self._write_split(split, {*sources}, sources[split], labels, reading)
                found = {
                    "part": part,
                    "empty": dict(reading.empty),
                    "unusable": dict(reading.unusable),
                    "split_on": dict(reading.split_on),
                    "is_grouped": reading.is_grouped,
                    "whole_files": reading.whole_files,
                }
                done["splits"][split], done["labels"] = found, labels.written
                write_whole(note, json.dumps(done))
            reading.empty.clear()
            reading.unusable.clear()
            reading.split_on.clear()
            reading.is_grouped, reading.whole_files = False, 0
        done["is_whole"] = True
        write_whole(note, json.dumps(done))
        return done

    def _write_split(
        self, split: str, given: set[str], examples: Iterator[Example], labels: Labels, reading: Reading
    ) -> float:
        """Write a given split; returns which part of its files was read."""
        size = size_of(self._spec.data, split)
        began, written, part = reading.position.bytes, 0, 1.0
        columns = splits.columns_of(self._spec, split, given)
        with closing(rows.write_rows(self._rows, split, self._spec, examples, labels, columns, reading)) as pieces:
            for piece in pieces:
                written += piece
                done = reading.position.bytes - began
                self._report(f"reading {split}", done or written, size)
                if self._most is not None and done >= self._most:
                    part = done / size
                    break
        return part

    def _chat_template(self) -> str | None:
        brought = self._brought
        own = brought.chat_template if brought else None
        begins = brought is not None and brought.begin_id is not None
        return self._task.chat_template(self._spec.options, own, begins=begins)

    def _survey(self) -> None:
        """Hash all that is used, and count its bytes."""
        import pyarrow.compute as pc

        done = 0
        for split in SPLITS:
            digest, sizes = hashlib.sha256(), Counter[str]()
            for table in self.examples.tables(split):
                texts = [column.cast("large_binary").to_pylist() for column in table.columns]
                joined = (b"\0".join(example) for example in zip(*texts, strict=True)) if len(texts) > 1 else texts[0]
                digest.update(b"\0".join([*joined, b""]))
                for name in self._fields:
                    sizes[name] += pc.sum(pc.binary_length(table.column(name))).as_py()
                done += table.nbytes
                self._report("hashing the texts", done, 0)
            self._hashes[split] = digest.hexdigest()[:16]
            self._bytes |= {(split, name): sizes[name] for name in self._fields}

    def _sampled(self, split: str, most: float, names: Iterable[str]) -> tuple[NDArray[np.bool_] | None, float]:
        """Rows of a split's origin that hold about so many bytes of these fields, by their hashes, and their part."""
        size = sum(self._bytes[split, name] for name in names)
        if size <= most:
            return None, 1.0
        origin = self.examples.origin(split)
        name = "example" if origin == "train" else splits.text_column(self._spec)
        column, part = Column(self._rows, origin, name), most / size
        chosen = np.zeros(len(column), bool)
        for start, piece in column.pieces():
            chosen[start : start + len(piece)] = piece[:, 1] < np.uint64(part * 2.0**64)
        return chosen, part

    @property
    def _training_bytes(self) -> int:
        return sum(self._bytes["train", name] for name in self._fields)

    @property
    def _entries(self) -> int:
        """Of the vocabulary, or of each of two."""
        spec, whole = self._spec.tokenizer, self._whole("train", self._training_bytes)
        return spec.entries(whole if spec.shared else whole // len(self._fields))

    def _trained_on(self) -> float:
        """Bytes of training text that a tokenizer sees at most."""
        return (self._spec.tokenizer.sample_mb or math.inf) * 1e6

    def _trained(self) -> TrainedTokenizers:
        """The tokenizer of this study's training split."""
        folder = self.out / TOKENIZER_FOLDER
        is_trained = self._rows / "tokenizer-is-trained"
        if is_trained.is_file():
            return TrainedTokenizers.read(folder, self._spec)
        sample, part = self._sampled("train", self._trained_on(), self._fields)
        size = int(part * self._training_bytes)

        def texts(name: str) -> Iterator[str]:
            done = 0
            for text in self.examples.texts("train", name, sample):
                done += len(text)
                self._report("training the tokenizer", done, size)
                yield self._task.words(name, text)

        tokenizer = TrainedTokenizers.trained(texts, self._entries, self._spec)
        tokenizer.save(folder)
        is_trained.touch()
        return tokenizer

    def _tokenize(self, split: str, name: str, tokenizer: AnyTokenizers) -> int:
        """Write the tokens of a field of a split, or of all; returns how many are predicted.

        The end-of-text before the first document is not among them.
        """
        note = self.out / f".{split}-{name}.json"
        at = json.loads(note.read_text()) if note.is_file() else {"rows": 0, "tokens": 0, "bytes": 0, "predicted": 0}
        is_wide = max(tokenizer.vocab_size, tokenizer.target_vocab_size or 0) > 2**16
        begun = 1 if at["rows"] else 0
        stem = self.out / f"{split}-{name}"
        tokens = ArrayWriter(stem.with_suffix(".npy"), np.uint32 if is_wide else np.uint16, at=begun + at["tokens"])
        ends = ArrayWriter(Path(f"{stem}-ends.npy"), np.int64, at=at["rows"])
        sizes = ArrayWriter(Path(f"{stem}-bytes.npy"), np.int64, at=at["rows"])
        writers = [tokens, ends, sizes]
        if self._task.is_chat:
            writers.append(ArrayWriter(Path(f"{stem}-parts.npy"), np.uint8, at=at["tokens"]))
        if not begun:
            tokens.append(np.array([tokenizer.end_id]))
        chosen = self.examples.chosen(split)
        tables = self.examples.tables(split, _behind(chosen, at["rows"]) if at["rows"] else None)
        names = self._fields if self._task.is_chat else (name,)
        size, kept = sum(self._bytes[split, one] for one in names), at["bytes"]
        encode = self._encoded_chats if self._task.is_chat else partial(_encoded, name)
        for own, ids, parts in _ahead(tables, partial(encode, tokenizer)):
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            ends.append(at["tokens"] + np.cumsum(lengths))
            flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
            tokens.append(flat)
            sizes.append(own)
            predicted = len(flat)
            if parts is not None:
                writers[-1].append(parts)
                predicted = int(np.count_nonzero(parts))
            at = {
                "rows": at["rows"] + len(ids),
                "tokens": at["tokens"] + len(flat),
                "bytes": at["bytes"] + int(own.sum()),
                "predicted": at["predicted"] + predicted,
            }
            self._report(f"tokenizing {split}", at["bytes"], size)
            if at["bytes"] - kept >= _KEPT_EVERY:
                for writer in writers:
                    writer.flush()
                write_whole(note, json.dumps(at))
                kept = at["bytes"]
        for writer in writers:
            writer.close()
        write_whole(note, json.dumps(at))
        return int(at["predicted"])

    def _encoded_chats(self, tokenizer: AnyTokenizers, table: pa.Table) -> _Encoded:
        rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        sequences = self._task.encode(rows, tokenizer.chats)
        parts = np.fromiter(itertools.chain.from_iterable(one.parts for one in sequences), np.uint8)
        own = np.sum([_byte_lengths(column) for column in table.columns], axis=0)
        return own, [one.ids for one in sequences], parts

    def _card(self, tokenizer: AnyTokenizers, tokens: dict[str, int]) -> DataCard:
        last = self._fields[-1]
        compares = self._task.compares_text

        def references() -> Iterator[str]:
            return self.examples.texts("test", last)

        words = bleu.choose(self._spec.data.target_language, references()) if compares else None
        counts = splits.label_counts(self.examples, self._labels, self._spec) if self._task.has_labels else {}
        whole = self._whole
        has_begins = tokenizer.begin_id is not None and not self._task.is_chat
        unpredicted = {split: self.examples.count(split) if has_begins else 0 for split in SPLITS}
        seen, part = self._seen_ngrams()
        return DataCard(
            fingerprint=self.fingerprint,
            tokenizer=tokenizer.hash,
            test_fingerprint=self._hashes["test"],
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.end_id,
            padding_id=tokenizer.padding_id,
            target_vocab_size=tokenizer.target_vocab_size,
            documents={split: whole(split, self.examples.count(split)) for split in SPLITS},
            tokens={split: whole(split, tokens[split] - unpredicted[split]) for split in SPLITS},
            bytes={split: whole(split, self._bytes[split, last]) for split in SPLITS},
            seen_ngrams=seen,
            ngrams_of=part,
            seen_targets=self._seen_targets() if compares else None,
            labels=sorted(counts.get("train", ())),
            label_counts=counts,
            bleu_tokenizer=words,
            longest_reference=bleu.longest(references(), words) if words else None,
            begin_id=tokenizer.begin_id,
            chat_template=None if self._template is None else hashlib.sha256(self._template.encode()).hexdigest()[:16],
            first_id=tokenizer.first_id,
            start_id=tokenizer.start_id,
            **self._of_source(),
        )

    def _of_source(self) -> dict[str, Any]:
        """Fields of the card that other rows with equal arrays may have otherwise."""
        found = self._source["splits"].values()
        return {
            "duplicates": self._whole("train", self.examples.duplicates),
            "overlaps": self.examples.overlaps,
            "left_out": self.examples.left_out,
            "whole_files": self._source["splits"]["train"]["whole_files"],
            "rare": self.examples.rare,
            "used": self.examples.used,
            "empty": {name: count for split in found for name, count in split["empty"].items()},
            "unusable": {name: count for split in found for name, count in split["unusable"].items()},
            "split_on": {name: kind for split in found for name, kind in split["split_on"].items()},
            "read": min(split["part"] for split in found),
        }

    def _whole(self, split: str, count: int) -> int:
        """A count of a split as it is in all of the source, where only a part of that was read."""
        origin = self.examples.origin(split)
        times = 1 / float(self._source["splits"][origin]["part"])
        if times > 1 and self._spec.data.max_examples is not None:
            used = int((self.examples.places[origin] != NOWHERE).sum())
            times = min(times, self._spec.data.max_examples / max(1, used))
        return round(count * times)

    def _seen_ngrams(self) -> tuple[float, float]:
        """The share of the validation split's word n-grams that stand in training, too; of which part of training."""
        first = self._fields[0]
        wanted_of, _ = self._sampled("validation", _LOOKED_AT / 10, [first])
        sample, part = self._sampled("train", _LOOKED_AT, [first])
        grams = [_grams(text) for text in self.examples.texts("validation", first, wanted_of)]
        wanted, place = np.unique(np.concatenate([*grams, np.zeros(0, np.int64)]), return_inverse=True)
        if not len(wanted):
            return 0.0, part
        seen = np.zeros(len(wanted), bool)
        for text in self.examples.texts("train", first, sample):
            own = _grams(text)
            near = np.minimum(np.searchsorted(wanted, own), len(wanted) - 1)
            seen[near[wanted[near] == own]] = True
        return float(seen[place].mean()), part

    def _seen_targets(self) -> float:
        """The share of the held-out last fields (translations) that stand in training word for word."""
        examples = self.examples

        def column(split: str) -> Column:
            return Column(self._rows, examples.origin(split), "target", examples.chosen(split))

        seen = sum(int(rows.among(column(split), [column("train")]).sum()) for split in SPLITS[1:])
        return seen / sum(examples.count(split) for split in SPLITS[1:])


def _behind(chosen: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The chosen rows but the first so many of them."""
    left = chosen.copy()
    for start in range(0, len(chosen), _PIECE):
        piece = left[start : start + _PIECE]
        here = int(piece.sum())
        if here > count:
            piece[np.flatnonzero(piece)[:count]] = False
            break
        piece[:] = False
        count -= here
    return left


_Encoded: TypeAlias = "tuple[NDArray[np.int64], list[list[int]], NDArray[np.uint8] | None]"
"""Of some examples, their bytes, their tokens, and the parts that all tokens are of, one after the other."""


def _encoded(name: str, tokenizer: AnyTokenizers, table: pa.Table) -> _Encoded:
    column = table.column(name)
    return _byte_lengths(column), tokenizer.encode(name, column.to_pylist()), None


def _byte_lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    lengths: NDArray[np.int64] = pc.binary_length(column).to_numpy().astype(np.int64)
    return lengths


def _ahead(items: Iterable[Any], function: Callable[[Any], Any]) -> Iterator[Any]:
    """The function of each item, computed in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as helper:
        coming: Future[Any] | None = None
        for item in items:
            before, coming = coming, helper.submit(function, item)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def _grams(text: str) -> NDArray[np.int64]:
    """A number for each run of words of a text; equal runs have the same one in a process."""
    words = text.split()
    runs = zip(*(words[start:] for start in range(_GRAM)), strict=False)
    return np.fromiter(map(hash, runs), np.int64)


def _write_list(file: Path, texts: Iterable[str]) -> None:
    """A JSON array, an entry at a time."""
    with file.open("w") as content:
        content.write("[")
        for number, text in enumerate(texts):
            content.write((", " if number else "") + json.dumps(text))
        content.write("]")


def write_whole(file: Path, content: str) -> None:
    """A reader finds the old content or the new."""
    aside = file.with_name(f"{file.name}.new")
    aside.write_text(content)
    aside.replace(file)
