"""From a study's `data:` to token arrays on disk: read, de-duplicate, split, tokenize once, map by all trials.

Owns `datasets` and `tokenizers`. Label sets, vocabulary and everything else that is learned comes from the training
split alone. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.corpora import CORPORA, fold
from hpsearch.errors import DataError, RunFolderError
from hpsearch.spec import DataSpec, TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
_FORMAT = 1
"""Of the files on disk; part of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents by split, de-duplicated: no document stands in two splits, or twice in one."""

    train: list[str]
    validation: list[str]
    test: list[str]
    duplicates: int
    """Documents dropped because the same text, white space aside, had been read before."""

    @property
    def seen_ngrams(self) -> float:
        """Share of the validation split's word 5-grams that stand in training, too: a measure of leakage."""
        seen = {gram for text in self.train for gram in _ngrams(text)}
        grams = [gram for text in self.validation for gram in _ngrams(text)]
        return sum(gram in seen for gram in grams) / len(grams) if grams else 0.0


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What the token arrays hold; kept beside them and recorded with the study."""

    fingerprint: str
    """Of texts, split and tokenizer: equal fingerprints mean equal arrays."""
    tokenizer: str
    """Hash of the tokenizer: perplexities per token compare only when it is the same."""
    vocab_size: int
    documents: dict[str, int]
    tokens: dict[str, int]
    """Predicted tokens of one pass, end-of-text included."""
    bytes: dict[str, int]
    duplicates: int
    seen_ngrams: float


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """One split as a stream of tokens, mapped from disk.

    `tokens` starts with end-of-text, then each document followed by end-of-text, so that every token of every document
    is predicted once. `document_ends[d]` counts the predicted tokens up to the end of document d.
    """

    tokens: NDArray[np.integer[Any]]
    document_ends: NDArray[np.int64]
    document_bytes: NDArray[np.int64]


def read_texts(spec: DataSpec) -> Texts:
    """Read, de-duplicate and split the documents of a study. Raises DataError."""
    if spec.corpus is not None:
        splits = {"train": CORPORA[spec.corpus]()}
    elif spec.files is not None:
        splits = {split: list(_read_files(getattr(spec.files, split), spec.column)) for split in SPLITS}
    else:
        splits = _read_hub(spec)
    seen: set[str] = set()
    duplicates = 0
    unique: dict[str, list[str]] = {}
    # Held-out splits are read first, so that a text that stands in training as well is dropped there.
    for split in reversed(SPLITS):
        unique[split] = []
        for text in splits.get(split, []):
            key = fold(text)
            if not key:
                continue
            if key in seen:
                duplicates += 1
                continue
            seen.add(key)
            unique[split].append(text)
    texts = _split(unique, spec)
    for split in SPLITS:
        if not getattr(texts, split):
            raise DataError(
                f"data: the {split} split is empty ({sum(map(len, unique.values()))} documents were read); "
                "give more text, or a larger fraction"
            )
    return Texts(**texts.__dict__ | {"duplicates": duplicates})


def train_tokenizer(texts: list[str], spec: TokenizerSpec) -> Tokenizer:
    """A byte-level BPE tokenizer (as GPT-2's) with `<|endoftext|>` as token 0, trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def prepare(data: DataSpec, tokenizer: TokenizerSpec, folder: Path) -> tuple[Path, DataCard]:
    """Token arrays of a study under `folder/data/FINGERPRINT`, made if they are not there yet.

    Returns the folder of the arrays and its card. Raises DataError, or RunFolderError when it cannot be written.
    """
    texts = read_texts(data)
    fingerprint = _fingerprint(texts, tokenizer)
    target = folder / "data" / fingerprint
    if (target / "card.json").is_file():
        return target, read_card(target)
    trained = train_tokenizer(texts.train, tokenizer)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
        try:
            _write_arrays(texts, trained, fingerprint, scratch)
            if not target.exists():
                os.rename(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise RunFolderError(f"cannot write the tokenized data under {target.parent}: {error.strerror}") from error
    return target, read_card(target)


def measure(data: DataSpec, tokenizer: TokenizerSpec) -> DataCard:
    """The card that `prepare` would write, without writing anything."""
    texts = read_texts(data)
    trained = train_tokenizer(texts.train, tokenizer)
    return _card(
        texts, trained, _fingerprint(texts, tokenizer), {split: _encode(texts, split, trained) for split in SPLITS}
    )


def read_card(folder: Path) -> DataCard:
    return DataCard(**json.loads((folder / "card.json").read_text()))


def load_split(folder: Path, split: str) -> TokenSplit:
    """One split of prepared data; the tokens stay on disk until they are touched."""
    return TokenSplit(
        tokens=np.load(folder / f"{split}.npy", mmap_mode="r"),
        document_ends=np.load(folder / f"{split}-ends.npy"),
        document_bytes=np.load(folder / f"{split}-bytes.npy"),
    )


def stable_fraction(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same document always falls on the same side."""
    digest = hashlib.blake2b(f"{salt}\0{fold(text)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _split(unique: dict[str, list[str]], spec: DataSpec) -> Texts:
    parts: dict[str, list[str]] = {split: list(unique[split]) for split in SPLITS}
    cut_validation = 0.0 if parts["validation"] else spec.validation_fraction
    cut_test = 0.0 if parts["test"] else spec.test_fraction
    train = []
    for text in unique["train"]:
        place = stable_fraction(text, "split")
        if place < cut_validation:
            parts["validation"].append(text)
        elif place < cut_validation + cut_test:
            parts["test"].append(text)
        elif stable_fraction(text, "fraction") < spec.fraction:
            train.append(text)
    return Texts(train=train, validation=parts["validation"], test=parts["test"], duplicates=0)


_LOADERS = {".txt": "text", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def _read_files(files: Iterable[str], column: str) -> Iterator[str]:
    import datasets

    for name in files:
        kind = _LOADERS[Path(name).suffix]
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        try:
            rows = datasets.load_dataset(kind, data_files=[name], split="train", streaming=True, **options)
            yield from _column(rows, "text" if kind == "text" else column, name)
        except DataError:
            raise
        except UnicodeDecodeError as error:
            raise DataError(f"data: {name} is not UTF-8 text (byte {error.start})") from error
        except Exception as error:  # pyarrow, pandas and datasets each raise their own; all mean a malformed file
            raise DataError(f"data: {name} cannot be read as {kind}: {_first_line(error)}") from error


def _read_hub(spec: DataSpec) -> dict[str, list[str]]:
    import datasets

    try:
        loaded = datasets.load_dataset(spec.hub, spec.config, revision=spec.revision)
    except Exception as error:  # hub, network, cache and script errors all mean: not to be had
        raise DataError(f"data: cannot load {spec.hub} from the hub: {_first_line(error)}") from error
    if "train" not in loaded:
        raise DataError(f"data: {spec.hub} has no train split; it has {', '.join(loaded)}")
    return {
        split: list(_column(loaded[split], spec.column, f"{spec.hub} ({split})")) for split in SPLITS if split in loaded
    }


def _column(rows: Iterable[dict[str, Any]], column: str, source: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if column not in row:
            raise DataError(f"data: {source} has no column '{column}'; it has {', '.join(map(str, row))}")
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(f"data: {source}, row {number}: column '{column}' holds {type(text).__name__}, not text")
        yield text


def _fingerprint(texts: Texts, tokenizer: TokenizerSpec) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, tokenizer.model_dump()]).encode())
    for split in SPLITS:
        for text in getattr(texts, split):
            digest.update(f"{split}\0{text}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _encode(texts: Texts, split: str, tokenizer: Tokenizer) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(getattr(texts, split), add_special_tokens=False)]


def _card(texts: Texts, tokenizer: Tokenizer, fingerprint: str, encoded: dict[str, list[list[int]]]) -> DataCard:
    return DataCard(
        fingerprint=fingerprint,
        tokenizer=hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16],
        vocab_size=tokenizer.get_vocab_size(),
        documents={split: len(encoded[split]) for split in SPLITS},
        tokens={split: sum(len(ids) + 1 for ids in encoded[split]) for split in SPLITS},
        bytes={split: sum(len(text.encode()) for text in getattr(texts, split)) for split in SPLITS},
        duplicates=texts.duplicates,
        seen_ngrams=texts.seen_ngrams,
    )


def _write_arrays(texts: Texts, tokenizer: Tokenizer, fingerprint: str, folder: Path) -> None:
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = int(tokenizer.token_to_id(END_OF_TEXT) or 0)
    encoded = {split: _encode(texts, split, tokenizer) for split in SPLITS}
    for split, documents in encoded.items():
        stream = np.empty(1 + sum(len(ids) + 1 for ids in documents), dtype)
        stream[0] = end
        position = 1
        for ids in documents:
            stream[position : position + len(ids)] = ids
            position += len(ids) + 1
            stream[position - 1] = end
        np.save(folder / f"{split}.npy", stream)
        np.save(folder / f"{split}-ends.npy", np.cumsum([len(ids) + 1 for ids in documents], dtype=np.int64))
        sizes = [len(text.encode()) for text in getattr(texts, split)]
        np.save(folder / f"{split}-bytes.npy", np.array(sizes, dtype=np.int64))
    tokenizer.save(str(folder / "tokenizer.json"))
    card = _card(texts, tokenizer, fingerprint, encoded)
    (folder / "card.json").write_text(json.dumps(asdict(card), indent=1))


def _ngrams(text: str, size: int = 5) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(size)), strict=False)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
