"""From a study's `data:` to token arrays on disk: read, de-duplicate, split, tokenize once, map by all trials.

Owns `datasets` and `tokenizers`. Label sets, vocabulary and everything else that is learned comes from the training
split alone. Knows nothing of models.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data import pretrained
from hpsearch.data.corpora import READERS, Example, fold
from hpsearch.errors import DataError, RunFolderError
from hpsearch.files import storage
from hpsearch.files.storage import Folder
from hpsearch.metrics import bleu
from hpsearch.spec.sections import AlignedFiles, DataSpec, TokenizerSpec
from hpsearch.spec.study import StudySpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
END_ID, PADDING_ID = 0, 1
TOKENIZER_FOLDER = "tokenizer"
TARGET_FOLDER = "target"
"""Of a translation's target tokenizer, in a checkpoint of a model with two vocabularies."""
LABEL_SEPARATOR = "|"
"""Between the labels of one example, where labels are given as text."""
_CARD = "card.json"
"""Written last: data that has it is whole."""
_FORMAT = 4
"""Of the files on disk; part of the fingerprint."""
_MOST_SHARED = 0.5
"""A given split of which a larger part stands in another one, too, is no split of its own."""
_TARGET_TOKENIZER = "tokenizer-target.json"
_TEXT_FIELDS = {"causal_lm": ("text",), "translation": ("source", "target"), "classification": ("text",)}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples by split, de-duplicated: nothing stands twice, and no first field of a held-out split in training."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    duplicates: int
    """Examples dropped because the same text, white space aside, had been read before."""
    overlaps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of those, the ones that stand in a held-out split of their own, by `SPLIT in HELD-OUT SPLIT`."""
    rare: dict[str, int] = dataclasses.field(default_factory=dict)
    """Labels left out because they are too rare to stand in all splits, with their examples."""

    def field(self, split: str, index: int) -> list[str]:
        return [example[index] for example in getattr(self, split)]

    @property
    def seen_ngrams(self) -> float:
        """Share of the validation split's word 5-grams that stand in training, too: a measure of leakage."""
        seen = {gram for text in self.field("train", 0) for gram in _ngrams(text)}
        grams = [gram for text in self.field("validation", 0) for gram in _ngrams(text)]
        return sum(gram in seen for gram in grams) / len(grams) if grams else 0.0

    @property
    def seen_targets(self) -> float:
        """Share of the held-out last fields (translations) that stand in training word for word."""
        seen = set(self.field("train", -1))
        targets = [*self.field("validation", -1), *self.field("test", -1)]
        return sum(target in seen for target in targets) / len(targets)


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


def read_examples(spec: StudySpec) -> Examples:
    """Read, de-duplicate and split the examples of a study. Raises DataError."""
    data = spec.data
    if data.corpus is not None:
        splits = {"train": READERS[data.corpus]()}
    elif data.files is not None:
        given = {split: files for split in SPLITS if (files := getattr(data.files, split))}
        splits = {split: _read_files(files, _columns(spec)) for split, files in given.items()}
    else:
        splits = _read_hub(data, _columns(spec))
    unique, duplicates, overlaps = _deduplicated({split: _checked(rows, spec) for split, rows in splits.items()})
    parts = _split(unique, spec)
    rare = _drop_rare(parts, spec) if spec.task == "classification" and data.rare_labels == "drop" else {}
    examples = Examples(**parts, duplicates=duplicates, overlaps=overlaps, rare=rare)
    for split in SPLITS:
        if not getattr(examples, split):
            raise DataError(
                f"data: the {split} split is empty ({sum(map(len, unique.values()))} documents were read); "
                "give more text, or a larger fraction"
            )
    if spec.task == "classification":
        _check_labels(examples, spec)
    return examples


def train_tokenizer(texts: Sequence[str], spec: TokenizerSpec, task: str = "causal_lm") -> Tokenizer:
    """A byte-level BPE tokenizer (as GPT-2's) trained on these texts; end-of-text is token 0, padding (if any) 1.

    It marks a text as the task needs it: end-of-text behind a translation's sentences and before a classifier's texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[END_OF_TEXT] if task == "causal_lm" else [END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if task != "causal_lm":
        marked = f"{END_OF_TEXT} $A" if task == "classification" else f"$A {END_OF_TEXT}"
        tokenizer.post_processor = processors.TemplateProcessing(single=marked, special_tokens=[(END_OF_TEXT, END_ID)])
    return tokenizer


def prepare(spec: StudySpec) -> tuple[Folder, DataCard]:
    """Token arrays of a study under `folder/data/FINGERPRINT`, made if they are not there yet.

    Returns the folder of the arrays and its card; a folder in an object store is read by way of `storage.cached`.
    Raises DataError, or RunFolderError when it cannot be written.
    """
    examples = read_examples(spec)
    target = storage.locate(spec.folder) / "data" / _fingerprint(examples, spec)
    if storage.read(target / _CARD) is not None:
        return target, read_card(storage.cached(target))
    prepared = _Prepared(examples, spec)
    if not isinstance(target, Path):
        with storage.filled(target, last=_CARD) as scratch:
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
        (split, field): load_split(folder, split, field).lengths
        for split in SPLITS
        for field in _TEXT_FIELDS[spec.task]
    }
    return _cut(spec, lengths)


def notes(spec: StudySpec, card: DataCard) -> list[str]:
    """What a person should know of prepared data before trials run on it."""
    found = [
        f"{count:,} examples of the {split.replace(' in ', ' split stand in the ')} split, too, and count there alone"
        for split, count in card.overlaps.items()
    ]
    counts = card.label_counts
    rare = [label for label in card.labels if not all(label in counts.get(split, {label: 0}) for split in SPLITS)]
    if rare:
        found.append(
            f"{len(rare)} of {len(card.labels)} labels do not stand in all splits: {_some(rare)}; "
            "`data.rare_labels: drop` leaves them out"
        )
    if card.rare:
        found.append(f"{len(card.rare)} labels that do not stand in all splits were left out: {_some([*card.rare])}")
    chosen = spec.translation.bleu_tokenizer
    if chosen in bleu.BY_SPACES and card.bleu_tokenizer not in (None, *bleu.BY_SPACES):
        found.append(
            f"translation.bleu_tokenizer: {chosen} finds words between spaces, and the references have none: BLEU is "
            f"next to 0 for all outputs; {card.bleu_tokenizer} (or auto) fits them"
        )
    if bleu.is_short(card.longest_reference):
        found.append(
            f"no reference of the test split has {bleu.ORDER} words: BLEU counts the shorter sequences that there are"
        )
    return found


def save_tokenizer(
    folder: Path, checkpoint: str, *, context_length: int | None, sides: tuple[str, str] = ("right", "right")
) -> None:
    """Put the tokenizer of prepared data beside the weights that were trained on it, told to cut and pad as we did.

    `sides` are those where it cuts and where it pads; with no `context_length` it keeps the length that it came with.
    A target language with a vocabulary of its own has its tokenizer in a folder below, named `target`.
    """
    source, target = folder / TOKENIZER_FOLDER, Path(checkpoint)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_TARGET_TOKENIZER))
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {
        "truncation_side": sides[0],
        "padding_side": sides[1],
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": config.get("pad_token") or config.get("eos_token") or config.get("sep_token"),
    }
    if context_length is not None:
        config["model_max_length"] = context_length
    file.write_text(json.dumps(config, indent=2))
    if (source / _TARGET_TOKENIZER).is_file():
        (target / TARGET_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(source / _TARGET_TOKENIZER, target / TARGET_FOLDER / "tokenizer.json")
        shutil.copyfile(file, target / TARGET_FOLDER / file.name)


def decode(folder: Path, rows: Sequence[Sequence[int]]) -> list[str]:
    """Text of token ids of the target language of a prepared translation."""
    from tokenizers import Tokenizer

    own = folder / TOKENIZER_FOLDER / _TARGET_TOKENIZER
    if own.is_file():
        return [text.strip() for text in Tokenizer.from_file(str(own)).decode_batch(rows, skip_special_tokens=True)]
    tokenizer = pretrained.load_tokenizer(folder / TOKENIZER_FOLDER)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def read_card(folder: Path) -> DataCard:
    return DataCard(**json.loads((folder / _CARD).read_text()))


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


def stable_fraction(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same document always falls on the same side."""
    digest = hashlib.blake2b(f"{salt}\0{fold(text)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class _Trained:
    """Tokenizers trained on the training split: one, or one for each language."""

    first_id = start_id = None

    def __init__(self, examples: Examples, spec: StudySpec) -> None:
        self._task = spec.task
        texts = {field: examples.field("train", index) for index, field in enumerate(_TEXT_FIELDS[spec.task])}
        if spec.tokenizer.shared:
            joint = [text for field in texts.values() for text in field]
            self._tokenizers = dict.fromkeys(texts, train_tokenizer(joint, spec.tokenizer, spec.task))
        else:
            self._tokenizers = {field: train_tokenizer(own, spec.tokenizer, spec.task) for field, own in texts.items()}
        first, last = (self._tokenizers[field] for field in (_TEXT_FIELDS[spec.task][0], _TEXT_FIELDS[spec.task][-1]))
        self.end_id, self.padding_id = END_ID, PADDING_ID
        self.vocab_size = first.get_vocab_size()
        self.target_vocab_size = last.get_vocab_size() if last is not first else None
        distinct = dict.fromkeys(tokenizer.to_str() for tokenizer in self._tokenizers.values())
        self.hash = hashlib.sha256("".join(distinct).encode()).hexdigest()[:16]

    def encode(self, field: str, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizers[field].encode_batch_fast(texts)
        ending = [END_ID] if self._task == "causal_lm" else []
        return [encoding.ids + ending for encoding in encodings]

    def save(self, folder: Path) -> None:
        words = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | (
            {} if self._task == "causal_lm" else {"pad_token": PADDING}
        )
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **words}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizers = list(self._tokenizers.values())
        tokenizers[0].save(str(folder / "tokenizer.json"))
        if self.target_vocab_size is not None:
            tokenizers[-1].save(str(folder / _TARGET_TOKENIZER))


class _Brought:
    """The tokenizer that a pretrained model brings along."""

    target_vocab_size = None

    def __init__(self, spec: StudySpec) -> None:
        folder = pretrained.of(spec.model)
        assert folder is not None
        self._spec = spec
        self.first_id: int | None = None
        self.start_id: int | None = None
        if spec.task == "translation":
            data = spec.data
            self._tokenizer, code = pretrained.load_translator(folder, data.source_language, data.target_language)
            # mBART's first models start from the language; later ones are made to say it first.
            if code is not None and pretrained.starts_from_language(folder, self._tokenizer, code):
                self.start_id = code
            else:
                self.first_id = code
        else:
            self._tokenizer = pretrained.load_tokenizer(folder)
        end = pretrained.end_id(self._tokenizer)
        assert end is not None
        self.end_id = end
        self.padding_id = end if self._tokenizer.pad_token_id is None else int(self._tokenizer.pad_token_id)
        self.vocab_size = max(len(self._tokenizer), 1 + max(pretrained.languages(self._tokenizer).values(), default=0))
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        described = fast.to_str() if fast else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        self.hash = hashlib.sha256(described.encode()).hexdigest()[:16]

    def encode(self, field: str, texts: list[str]) -> list[list[int]]:
        if self._spec.task == "causal_lm":
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            return [[*ids, self.end_id] for ids in encoded]
        if field == "target":
            encoded = self._tokenizer(text_target=texts, verbose=False)["input_ids"]
            codes = {self.first_id, self.start_id} - {None}
            first = [] if self.first_id is None else [self.first_id]
            # Some tokenizers put the language behind the text, where no decoder could begin with it.
            encoded = (
                [[*first, *(token for token in ids if token not in codes)] for ids in encoded] if codes else encoded
            )
        else:
            prefix = self._spec.translation.source_prefix if field == "source" else ""
            encoded = self._tokenizer([prefix + text for text in texts], verbose=False)["input_ids"]
        if self._spec.task == "translation":
            return [ids if self.end_id in ids[-2:] else [*ids, self.end_id] for ids in encoded]
        return [ids or [self.end_id] for ids in encoded]

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


class _Prepared:
    """Examples with their tokenizer and token ids, in memory."""

    def __init__(self, examples: Examples, spec: StudySpec) -> None:
        self._examples = examples
        self._fields = _TEXT_FIELDS[spec.task]
        self._tokenizer = _Trained(examples, spec) if spec.model.pretrained is None else _Brought(spec)
        self._ids = {
            (split, field): self._tokenizer.encode(field, examples.field(split, index))
            for split in SPLITS
            for index, field in enumerate(self._fields)
        }
        self._spec = spec
        classifies = spec.task == "classification"
        self._label_counts = (
            {split: dict(_counted(getattr(examples, split), spec).most_common()) for split in SPLITS}
            if classifies
            else {}
        )
        self._labels = sorted(self._label_counts.get("train", ()))
        self.card = self._make_card()

    def lengths(self) -> dict[tuple[str, str], NDArray[np.int64]]:
        return {key: np.array([len(ids) for ids in documents]) for key, documents in self._ids.items()}

    def _make_card(self) -> DataCard:
        examples, counted, tokenizer = self._examples, self._fields[-1], self._tokenizer
        references = examples.field("test", -1)
        translates = self._spec.task == "translation"
        words = bleu.choose(self._spec.data.target_language, references) if translates else None
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
            seen_targets=examples.seen_targets if translates else None,
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
            if self._spec.task == "translation" and split != "train":
                (folder / f"{split}-{field}.json").write_text(json.dumps(texts))
        if self._labels:
            numbers = {label: number for number, label in enumerate(self._labels)}
            for split in SPLITS:
                rows = getattr(self._examples, split)
                labels = np.zeros((len(rows), len(numbers)), dtype=np.int64)
                for index, row in enumerate(rows):
                    labels[index, [numbers[label] for label in _labels_of(row, self._spec)]] = 1
                np.save(folder / f"{split}-labels.npy", labels)
        (folder / TOKENIZER_FOLDER).mkdir()
        self._tokenizer.save(folder / TOKENIZER_FOLDER)
        (folder / _CARD).write_text(json.dumps(asdict(self.card), indent=1))


def _columns(spec: StudySpec) -> tuple[str, ...]:
    data = spec.data
    return {
        "causal_lm": (data.column,),
        "translation": (data.source_column, data.target_column),
        "classification": (data.column, data.label_column),
    }[spec.task]


def _checked(rows: Iterable[Example], spec: StudySpec) -> Iterator[Example]:
    """The rows with text in every field. A language model skips empty text; elsewhere a hole is an error."""
    names = _columns(spec)
    for number, row in enumerate(rows, start=1):
        empty = [name for name, value in zip(names, row, strict=True) if not value.strip()]
        if not empty:
            yield row
        elif spec.task != "causal_lm":
            raise DataError(f"data: row {number}: column '{empty[0]}' is empty")


def _deduplicated(
    splits: dict[str, Iterator[Example]],
) -> tuple[dict[str, list[Example]], int, dict[str, int]]:
    """The examples of the given splits, each once, the number of others, and how many stand in a held-out split."""
    seen: set[Example] = set()
    held_out: dict[str, str] = {}
    duplicates = 0
    overlaps: Counter[str] = Counter()
    unique: dict[str, list[Example]] = {}
    # Held-out splits are read first, so that a text that stands in training as well is dropped there.
    for split in (split for split in reversed(SPLITS) if split in splits):
        unique[split] = []
        shared: Counter[str] = Counter()
        rows = 0
        for example in splits[split]:
            rows += 1
            key = tuple(fold(text) for text in example)
            if key[0] in held_out:
                shared[held_out[key[0]]] += 1
            elif key not in seen:
                seen.add(key)
                unique[split].append(example)
                continue
            duplicates += 1
        for other, count in shared.items():
            if count > _MOST_SHARED * rows:
                raise DataError(
                    f"data: {count:,} of the {rows:,} examples of the {split} split stand in the {other} split, too; "
                    "expected splits that share no text, or none, which are then split off the training split"
                )
            overlaps[f"{split} in {other}"] = count
        held_out |= {fold(example[0]): split for example in unique[split]}
    return unique, duplicates, dict(overlaps)


def _split(unique: dict[str, list[Example]], spec: StudySpec) -> dict[str, list[Example]]:
    """The examples by split: the given ones, and those that are split off training because they are not given."""
    data = spec.data
    parts = {split: _sample(unique.get(split, []), data.max_examples) for split in SPLITS}
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    cut = {split: 0.0 if split in unique else fraction for split, fraction in fractions.items()}
    if spec.task == "classification":
        place = _stratified(parts["train"], spec, cut)
    else:
        place = _by_threshold(parts["train"], spec, cut)
    placed = [(place[fold(example[0])], example) for example in parts.pop("train")]
    return {split: [*parts.get(split, []), *(example for own, example in placed if own == split)] for split in SPLITS}


def _by_threshold(examples: list[Example], spec: StudySpec, cut: dict[str, float]) -> dict[str, str]:
    """The split of each text, by a hash of the text alone; no split at all beyond the fraction to be used."""
    place = {}
    for example in examples:
        key = _normalised(example[0]) if spec.task == "translation" else example[0]
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
        labels.setdefault(fold(row[0]), set()).update(_labels_of(row, spec))
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
    counts = {split: _counted(rows, spec) for split, rows in parts.items()}
    total: Counter[str] = sum(counts.values(), Counter())
    rare = {label: total[label] for label in sorted(total) if not all(label in counts[split] for split in SPLITS)}
    for split, rows in parts.items():
        kept = [(row[0], [label for label in _labels_of(row, spec) if label not in rare]) for row in rows]
        parts[split] = [(text, LABEL_SEPARATOR.join(labels)) for text, labels in kept if labels]
    return rare


def _counted(rows: Iterable[Example], spec: StudySpec) -> Counter[str]:
    return Counter(label for row in rows for label in set(_labels_of(row, spec)))


def _sample(examples: list[Example], most: int | None) -> list[Example]:
    """At most so many of the examples, in their order: those whose hash is lowest."""
    if most is None or len(examples) <= most:
        return list(examples)
    limit = sorted(stable_fraction(example[0], "sample") for example in examples)[most - 1]
    return [example for example in examples if stable_fraction(example[0], "sample") <= limit][:most]


def _normalised(source: str) -> str:
    """Lower case without digits and punctuation: near-equal sources fall into the same split."""
    return fold(re.sub(r"[\W\d_]+", " ", source.lower())) or source


def _labels_of(row: Example, spec: StudySpec) -> list[str]:
    return [label.strip() for label in row[1].split(LABEL_SEPARATOR)] if spec.classification.multi_label else [row[1]]


def _check_labels(examples: Examples, spec: StudySpec) -> None:
    known = _counted(examples.train, spec)
    if len(known) < 2:
        raise DataError(f"data: the training split has one class only ({next(iter(known))!r}); a classifier needs two")
    positive = spec.classification.positive_label
    if positive is not None and positive not in known:
        raise DataError(
            f"classification.positive_label: no example of the training split has the label {positive!r}; there are "
            f"{_some([label for label, _ in known.most_common()])}"
        )
    for split in ("validation", "test"):
        for row in getattr(examples, split):
            for label in _labels_of(row, spec):
                if label not in known:
                    raise DataError(
                        f"data: label {label!r} of the {split} split does not occur in training (text: "
                        f"{row[0][:60]!r}); `data.rare_labels: drop` leaves such labels out"
                    )


def _some(names: Sequence[str], most: int = 10) -> str:
    """The first of many names."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


_LOADERS = {".txt": "text", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def _read_files(files: Iterable[str] | AlignedFiles, columns: tuple[str, ...]) -> Iterator[Example]:
    import datasets

    if isinstance(files, AlignedFiles):
        yield from _aligned(files)
        return
    for name in files:
        kind = _LOADERS[Path(name).suffix]
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        rows: Iterable[dict[str, Any]]
        try:
            if kind in _AS_WRITTEN:
                rows = _AS_WRITTEN[kind](name)
            else:
                # To `datasets` a name is a pattern.
                rows = datasets.load_dataset(
                    kind, data_files=[glob.escape(name)], split="train", streaming=True, **options
                )
            yield from _rows(rows, ("text",) if kind == "text" else columns, name)
        except DataError:
            raise
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error) from error
        except Exception as error:  # pyarrow, pandas and datasets each raise their own; all mean a malformed file
            raise DataError(f"data: {name} cannot be read as {kind}: {_first_line(error)}") from error


def _csv_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of text as it is written: `datasets` lets pandas guess types by the chunk, and drop `NA`."""
    csv.field_size_limit(sys.maxsize)
    with open(name, encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            for row in rows:
                if None in row:
                    raise ValueError(f"line {rows.reader.line_num}: more fields than the first line names columns")
                yield row
        except csv.Error as error:
            raise ValueError(f"line {rows.reader.line_num}: {error}") from None


def _json_rows(name: str) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines: `datasets` has pyarrow guess types, and takes text for dates."""
    with open(name, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected an object, got {line.strip()[:60]}")  # noqa: TRY004
            yield row


_AS_WRITTEN = {"csv": _csv_rows, "json": _json_rows}


def _aligned(files: AlignedFiles) -> Iterator[Example]:
    sources, targets = _lines(files.source), _lines(files.target)
    if len(sources) != len(targets):
        raise DataError(
            f"data: {files.source} has {len(sources)} lines and {files.target} has {len(targets)}; line by line, one "
            "must be the translation of the other"
        )
    yield from zip(sources, targets, strict=True)


def _lines(name: str) -> list[str]:
    try:
        # Only a line feed ends a line, as in the tools that align corpora; other separators may stand in a sentence.
        return Path(name).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error) from error


def _not_utf8(name: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"data: {name} is not UTF-8 text (byte {error.start})")


def _read_hub(spec: DataSpec, columns: tuple[str, ...]) -> dict[str, Iterator[Example]]:
    import datasets

    try:
        loaded = datasets.load_dataset(spec.hub, spec.config, revision=spec.revision)
    except Exception as error:  # hub, network, cache and script errors all mean: not to be had
        raise DataError(f"data: cannot load {spec.hub} from the hub: {_first_line(error)}") from error
    if "train" not in loaded:
        raise DataError(f"data: {spec.hub} has no train split; it has {', '.join(loaded)}")
    return {
        split: _rows(_named(loaded[split]), columns, f"{spec.hub} ({split})") for split in SPLITS if split in loaded
    }


def _named(rows: Any) -> Iterable[dict[str, Any]]:
    """Rows in which numbered classes read as their names, and `translation` mappings as columns."""
    classes = {name: feature for name, feature in rows.features.items() if hasattr(feature, "int2str")}
    for row in rows:
        named = {name: classes[name].int2str(value) if name in classes else value for name, value in row.items()}
        pair = named.get("translation")
        yield {**named, **pair} if isinstance(pair, dict) else named


def _rows(rows: Iterable[dict[str, Any]], columns: tuple[str, ...], source: str) -> Iterator[Example]:
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                raise DataError(f"data: {source} has no column '{column}'; it has {', '.join(map(str, row))}")
        yield tuple(
            _text(row[column], f"{source}, row {number}: column '{column}'", is_label=len(columns) == 2 and index == 1)
            for index, column in enumerate(columns)
        )


def _text(value: Any, place: str, *, is_label: bool) -> str:
    """Text as it is, nothing as empty, a label of another type as text, a list of labels joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if is_label and isinstance(value, int | bool):
        return json.dumps(value)
    if is_label and isinstance(value, list):
        return LABEL_SEPARATOR.join(entry if isinstance(entry, str) else json.dumps(entry) for entry in value)
    raise DataError(f"data: {place} holds {type(value).__name__}, not text")


def _fingerprint(examples: Examples, spec: StudySpec) -> str:
    """Of everything that decides the arrays, so that equal ones are made once."""
    settings: list[Any] = [_FORMAT, spec.task, spec.tokenizer.model_dump(), spec.classification.multi_label]
    settings += [spec.data.source_language, spec.data.target_language]
    folder = pretrained.of(spec.model)
    if folder is not None:
        settings += [_Brought(spec).hash, spec.translation.source_prefix]
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
    if spec.task == "causal_lm":
        return dict.fromkeys(SPLITS, 0)
    return {
        split: int(
            np.any(
                [lengths[split, field] > spec.model.context_length for field in _TEXT_FIELDS[spec.task]], axis=0
            ).sum()
        )
        for split in SPLITS
    }


def _ngrams(text: str, size: int = 5) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(size)), strict=False)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
