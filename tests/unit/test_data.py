"""Text to token arrays: splits, leakage, exactness, and data that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from hpsearch.corpora import fold, python_docs
from hpsearch.data import load_split, measure, prepare, read_card, read_texts, stable_fraction
from hpsearch.errors import DataError, RunFolderError
from hpsearch.spec import DataSpec, FileSplits, TokenizerSpec

DOCS = DataSpec(corpus="python_docs", fraction=0.4)
BPE = TokenizerSpec(vocab_size=512)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def lines(count: int) -> list[str]:
    return [f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} {WORDS[i // 100 % 10]} number {i}" for i in range(count)]


def files(*train: Path, **others: list[str]) -> FileSplits:
    return FileSplits(train=[str(file) for file in train], **others)


def test_the_splits_share_no_text_and_lose_none() -> None:
    texts = read_texts(DataSpec(corpus="python_docs"))
    parts = [{fold(text) for text in part} for part in (texts.train, texts.validation, texts.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert set.union(*parts) == {fold(text) for text in python_docs()}
    assert sum(map(len, parts)) == len(texts.train) + len(texts.validation) + len(texts.test)
    assert texts.duplicates > 0.1 * len(python_docs())


def test_a_fraction_shrinks_training_alone() -> None:
    whole, part = read_texts(DataSpec(corpus="python_docs")), read_texts(DOCS)
    assert part.validation == whole.validation
    assert part.test == whole.test
    assert set(part.train) < set(whole.train)
    assert len(part.train) == pytest.approx(0.4 * len(whole.train), rel=0.2)


def test_leakage_is_measured() -> None:
    assert 0.02 < read_texts(DOCS).seen_ngrams < 0.15


def test_a_text_falls_on_the_same_side_wherever_it_stands() -> None:
    assert stable_fraction("a  b\nc", "split") == stable_fraction("a b c", "split")
    assert stable_fraction("a b c", "split") == 0.247147156069446
    spread = [stable_fraction(line, "split") for line in lines(1000)]
    assert np.histogram(spread, 10, (0, 1))[0].min() > 60


def test_the_arrays_hold_every_token_once(tmp_path: Path) -> None:
    folder, card = prepare(DOCS, BPE, tmp_path)
    texts = read_texts(DOCS)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    split = load_split(folder, "test")
    assert isinstance(split.tokens, np.memmap)
    assert split.tokens[0] == 0
    starts = np.concatenate([[0], split.document_ends[:-1]]) + 1
    for start, end, text in zip(starts, split.document_ends + 1, texts.test, strict=True):
        assert split.tokens[end - 1] == 0
        assert tokenizer.decode(split.tokens[start : end - 1].tolist()) == text
    assert card.tokens["test"] == len(split.tokens) - 1
    assert card.bytes["test"] == sum(len(text.encode()) for text in texts.test)
    assert card.vocab_size == 512


def test_the_tokenizer_knows_the_training_split_alone(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text("\n\n".join(lines(300)))
    held_out.write_text("\n\n".join(f"zyzzyva {line}" for line in lines(300)))
    data = DataSpec(files=files(train, validation=[str(held_out)]))
    folder, _ = prepare(data, TokenizerSpec(vocab_size=400), tmp_path)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert "alpha" in vocabulary
    assert not any("zyz" in entry for entry in vocabulary)


def test_data_is_prepared_once(tmp_path: Path) -> None:
    folder, card = prepare(DOCS, BPE, tmp_path)
    before = (folder / "train.npy").stat().st_mtime_ns
    assert prepare(DOCS, BPE, tmp_path) == (folder, card)
    assert (folder / "train.npy").stat().st_mtime_ns == before
    assert measure(DOCS, BPE) == card == read_card(folder)
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == [folder.name]
    assert prepare(DOCS, TokenizerSpec(vocab_size=300), tmp_path)[0] != folder


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_local_files_of_every_format(tmp_path: Path, suffix: str) -> None:
    import pandas as pd

    frame = pd.DataFrame({"body": lines(200)})
    file = tmp_path / f"data.{suffix}"
    if suffix == "txt":
        file.write_text("\n\n".join(frame["body"]))
    elif suffix == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    elif suffix == "csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file)
    texts = read_texts(DataSpec(files=files(file), column="body"))
    assert sorted([*texts.train, *texts.validation, *texts.test]) == sorted(lines(200))


def test_own_splits_are_kept_and_training_yields_to_them(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("\n\n".join(lines(100)))
    test.write_text("\n\n".join(lines(10)))
    texts = read_texts(DataSpec(files=files(train, test=[str(test)])))
    assert texts.test == lines(10)
    assert not set(texts.test) & {*texts.train, *texts.validation}
    assert texts.duplicates == 10


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        pytest.param("a.jsonl", '{"body": "x"}\n', "text", "has no column 'text'; it has body", id="no column"),
        pytest.param("a.csv", "text\n", "text", "the train split is empty (0 documents were read)", id="no rows"),
        pytest.param("a.txt", "one paragraph", "text", "split is empty (1 documents were read)", id="one document"),
        pytest.param("a.jsonl", '{"text": 3}\n', "text", "row 1: column 'text' holds int, not text", id="no text"),
        pytest.param("a.jsonl", "{oops\n", "text", "cannot be read as json", id="broken json"),
        pytest.param("a.parquet", "oops", "text", "cannot be read as parquet", id="broken parquet"),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str, column: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        read_texts(DataSpec(files=files(file), column=column))
    assert message in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("café\n\n".encode("latin-1") * 50)
    with pytest.raises(DataError, match=r"latin\.txt"):
        read_texts(DataSpec(files=files(file)))


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunFolderError, match="taken"):
        prepare(DOCS, BPE, tmp_path / "taken")


def test_the_hub_is_asked_as_the_study_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict({"text": [f"{split} {line}" for line in lines(9)]})
                for split in ("train", "validation", "test")
            }
        )

    # The hub itself cannot be had in a test.
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = read_texts(DataSpec(hub="Salesforce/wikitext", config="wikitext-2-raw-v1", revision="abc"))
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"revision": "abc"})]
    assert len(texts.validation) == 9


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot load no-such/dataset from the hub"):
        read_texts(DataSpec(hub="no-such/dataset"))
