"""The forms that people's text comes in: each is read to the same examples, or refused with its file and row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

import hpsearch
from hpsearch.data.prepare import measure, notes, prepare
from hpsearch.data.stages import Preparation
from hpsearch.errors import DataError, SpecError, UsageError
from hpsearch.spec.load import load_study
from hpsearch.spec.study import StudySpec
from tests.examples import Read, read_examples

TEXTS = [f'a text {"abcdefghij"[i % 10]} of {i} words, {i * 7919 % 1000} all told; "quoted"' for i in range(120)]
NAMES = ["".join("abcdefghij"[int(digit)] for digit in str(i)) for i in range(120)]
PAIRS = [{"source": f"the cats of {name}", "target": f"les chats de {name}"} for name in NAMES]
ROWS = [{"text": text} for text in TEXTS]


def written(tmp_path: Path, data: str, task: str = "causal_lm") -> StudySpec:
    file = tmp_path / "study.yaml"
    file.write_text(f"name: s\ntask: {task}\ndata: {data}\ntokenizer: {{vocab_size: 300}}\n")
    return load_study(file)


def all_of(found: Read) -> list[str]:
    return sorted(row[0] for row in (*found.train, *found.validation, *found.test))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def separated(delimiter: str) -> str:
    quoted = ('"' + text.replace('"', '""') + '"' for text in TEXTS)
    return f"id{delimiter}text\r\n" + "".join(f"{i}{delimiter}{text}\r\n" for i, text in enumerate(quoted))


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        pytest.param("a.txt", "\n\n".join(TEXTS), "", id="paragraphs"),
        pytest.param("a.txt", "\n".join(TEXTS), "", id="lines"),
        pytest.param("a.txt", "\r\n".join(TEXTS), "", id="lines of Windows"),
        pytest.param("a.txt", "<|endoftext|>".join(TEXTS), "", id="end of text"),
        pytest.param("a.text", "\n\n".join(TEXTS), "", id="another suffix"),
        pytest.param("a.jsonl", lines(ROWS), "", id="jsonl"),
        pytest.param("a.ndjson", "\ufeff" + lines(ROWS), "", id="ndjson with a byte order mark"),
        pytest.param("a.json", lines(ROWS), "", id="lines called json"),
        pytest.param("a.json", json.dumps(ROWS), "", id="array"),
        pytest.param("a.json", json.dumps(ROWS, indent=2), "", id="array over lines"),
        pytest.param("a.jsonl", lines([{"meta": {"text": t}} for t in TEXTS]), "column: meta.text", id="nested"),
        pytest.param("a.jsonl", lines([{"meta.text": t} for t in TEXTS]), "column: meta.text", id="dotted name"),
        pytest.param("a.parquet", parquet([{"id": 1, **row} for row in ROWS]), "", id="parquet"),
        pytest.param("a.parquet", parquet([{"m": row} for row in ROWS]), "column: m.text", id="nested parquet"),
        pytest.param("a.csv", separated(","), "", id="comma"),
        pytest.param("a.csv", separated(";"), "", id="semicolon"),
        pytest.param("a.tsv", separated("\t"), "", id="tab"),
        pytest.param("a.csv", separated("^"), "delimiter: ^", id="own delimiter"),
        pytest.param("a.csv", separated(",").encode("utf-16"), "encoding: utf-16", id="utf-16"),
        pytest.param("a.jsonl.gz", gzip.compress(lines(ROWS).encode()), "", id="gz"),
        pytest.param("a.jsonl.bz2", bz2.compress(lines(ROWS).encode()), "", id="bz2"),
        pytest.param("a.jsonl.xz", lzma.compress(lines(ROWS).encode()), "", id="xz"),
        pytest.param("a.jsonl.zst", zstd(lines(ROWS).encode()), "", id="zst"),
        pytest.param("a.json.gz", gzip.compress(json.dumps(ROWS).encode()), "", id="packed array"),
        pytest.param("a.txt.zst", zstd("\n".join(TEXTS).encode()), "", id="packed lines"),
    ],
)
def test_each_form_of_a_file_gives_its_texts(tmp_path: Path, name: str, content: str | bytes, options: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert all_of(read_examples(written(tmp_path, f"{{files: {name}, {options}}}"))) == sorted(TEXTS)


def test_patterns_and_folders_name_many_files(tmp_path: Path) -> None:
    (tmp_path / "more" / "inner").mkdir(parents=True)
    for index in range(3):
        content = lines(ROWS[index * 40 : index * 40 + 40])
        (tmp_path / "more" / ("inner" if index else "") / f"part-{index}.jsonl").write_text(content)
    (tmp_path / "more" / "README.md").write_text("no data")
    (tmp_path / "more" / ".hidden.jsonl").write_text("no data")
    for files in ("more", "more/**/*.jsonl", "[more/part-0.jsonl, more/inner]"):
        assert all_of(read_examples(written(tmp_path, f"{{files: {files}}}"))) == sorted(TEXTS)


def test_files_of_a_folder_that_are_called_by_their_splits_are_these(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, part in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("dev", 2), ("test", 3)):
        (tmp_path / "set" / f"{name}.jsonl").write_text(lines(ROWS[part * 30 : part * 30 + 30]))
    found = read_examples(written(tmp_path, "{files: set}"))
    assert found.field("train", 0) == TEXTS[:60]
    assert found.field("validation", 0) == TEXTS[60:90]
    assert found.field("test", 0) == TEXTS[90:]


def test_a_data_set_saved_to_disk_is_read_with_its_splits_and_the_names_of_its_classes(tmp_path: Path) -> None:
    import datasets

    rows = {"text": TEXTS, "label": [i % 2 for i in range(120)]}
    whole = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["dog", "cat"]))
    whole.save_to_disk(tmp_path / "whole")
    parts = {
        "train": whole.select(range(60)),
        "valid": whole.select(range(60, 90)),
        "test": whole.select(range(90, 120)),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    found = read_examples(written(tmp_path, "{files: whole}", "classification"))
    assert all_of(found) == sorted(TEXTS)
    assert {label for _, label in found.train} == {"dog", "cat"}
    found = read_examples(written(tmp_path, "{files: parts}", "classification"))
    assert [len(found.train), len(found.validation), len(found.test)] == [60, 30, 30]


@pytest.mark.parametrize("form", ["columns", "translation", "languages", "array", "tsv", "lines", "many lines"])
def test_each_form_of_a_translation_gives_its_pairs(tmp_path: Path, form: str) -> None:
    languages = [{"translation": {"en": pair["source"], "fr": pair["target"]}} for pair in PAIRS]
    columns = "source_column: translation.en, target_column: translation.fr"
    sources, targets = ("\r\n".join(pair[side] for pair in PAIRS) + "\r\n" for side in ("source", "target"))
    contents: dict[str, tuple[dict[str, str], str]] = {
        "columns": ({"a.jsonl": lines(PAIRS)}, "files: a.jsonl"),
        "translation": ({"a.jsonl": lines(languages)}, "files: a.jsonl, source_column: en, target_column: fr"),
        "languages": ({"a.jsonl": lines(languages)}, f"files: a.jsonl, {columns}"),
        "array": ({"a.json": json.dumps(languages)}, f"files: a.json, {columns}"),
        "tsv": (
            {"a.tsv": "source\ttarget\n" + "".join(f"{p['source']}\t{p['target']}\n" for p in PAIRS)},
            "files: a.tsv",
        ),
        "lines": ({"a.en": sources, "a.fr": targets}, "files: {source: a.en, target: a.fr}"),
        "many lines": (
            {"a.en": lines_of(sources, 0), "b.en": lines_of(sources, 1), "a.fr": lines_of(targets, 0),
             "b.fr": lines_of(targets, 1)},
            "files: {source: [a.en, b.en], target: [a.fr, b.fr]}",
        ),
    }  # fmt: skip
    files, data = contents[form]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    found = read_examples(written(tmp_path, f"{{{data}}}", "translation"))
    pairs = sorted([*found.train, *found.validation, *found.test])
    assert pairs == sorted((pair["source"], pair["target"]) for pair in PAIRS)


def lines_of(text: str, half: int) -> str:
    parts = text.splitlines(keepends=True)
    return "".join(parts[half * 50 : 50 if half == 0 else None])


def test_pairs_of_which_a_side_is_empty_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("".join(f"{pair['source']}\n" for pair in PAIRS) + "\n")
    (tmp_path / "a.fr").write_text("\n" + "".join(f"{pair['target']}\n" for pair in PAIRS))
    spec = written(tmp_path, "{files: {source: a.en, target: a.fr}}", "translation")
    assert len(all_of(read_examples(spec))) == 119
    assert any("2 rows without text in every column were left out" in note for note in notes(spec, measure(spec)[0]))


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([*ROWS, {"text": None}, {"text": "  "}]))
    spec = written(tmp_path, "{files: a.jsonl}")
    assert any("a.jsonl: 2 rows without text" in note for note in notes(spec, measure(spec)[0]))


def test_what_was_guessed_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    spec = written(tmp_path, "{files: a.txt}")
    assert any("a.txt: read as a text a line (data.split_on: line)" in note for note in notes(spec, measure(spec)[0]))
    told = written(tmp_path, "{files: a.txt, split_on: blank_line}")
    with pytest.raises(DataError, match="1 documents were read"):
        read_examples(told)


@pytest.mark.parametrize(
    ("names", "contents", "message"),
    [
        pytest.param(["b.jsonl"], [lines([*ROWS, {"txt": "x"}])], "b.jsonl, line 121 has no column 'text'", id="row"),
        pytest.param(["b.json"], [json.dumps([*ROWS, 3])], "entry 121 of the array: expected an object", id="entry"),
        pytest.param(["b.json"], [json.dumps(ROWS)[:-1]], "the array has no end behind its entry 120", id="open array"),
        pytest.param(["b.json"], [json.dumps(ROWS)[:-20]], "entry 120 of the array", id="open entry"),
        pytest.param(["b.jsonl"], [lines([{"m": {"t": "x"}}])], "it has m, m.t", id="inner columns are named"),
        pytest.param(["b.jsonl"], [lines([{"text": "\ud83d"}])], "half a character", id="half a character"),
        pytest.param(["b.jsonl.gz"], ["no archive"], "b.jsonl.gz cannot be read as json", id="no archive"),
        pytest.param(
            ["a.jsonl", "b.jsonl"], [lines(ROWS), lines([{"text": 3}])], "b.jsonl, line 1: column 'text'", id="second"
        ),
    ],
)
def test_a_mistake_is_named_with_its_file_and_row(
    tmp_path: Path, names: list[str], contents: list[str], message: str
) -> None:
    for name, content in zip(names, contents, strict=True):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_examples(written(tmp_path, f"{{files: [{', '.join(names)}]}}"))
    assert message in str(caught.value)


def test_another_encoding_is_read_when_it_is_named(tmp_path: Path) -> None:
    texts = [f"caf\u00e9 num\u00e9ro {i}" for i in range(100)]
    (tmp_path / "a.txt").write_bytes("\n".join(texts).encode("cp1252"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text \(byte 3\); set data\.encoding"):
        read_examples(written(tmp_path, "{files: a.txt}"))
    assert all_of(read_examples(written(tmp_path, "{files: a.txt, encoding: cp1252}"))) == sorted(texts)
    with pytest.raises(DataError, match="is not ascii text, as"):
        read_examples(written(tmp_path, "{files: a.txt, encoding: ascii}"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{files: a.txt, encoding: no-such}", "no encoding is called 'no-such'"),
        ("{files: '*.jsonl'}", "no file fits"),
        ("{files: empty}", "no file of text is below the folder"),
        ("{files: a.doc}", "cannot tell the format of a.doc"),
        ("{files: {source: [a.txt, a.txt], target: a.txt}}", "as many source files"),
        ("{corpus: python_docs, split_on: line}", "belong to files"),
    ],
)
def test_what_no_file_can_be_is_refused_by_the_study_file(tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "a.doc"):
        (tmp_path / name).write_text("x")
    with pytest.raises(SpecError) as caught:
        written(tmp_path, data)
    assert message in str(caught.value)


def two_sources(tmp_path: Path) -> None:
    """300 texts in one file under `text`, 300 as long in another under `body`."""
    for name, column in (("a", "text"), ("b", "body")):
        texts = [{column: f"{name} {'abcdefghij'[i % 10]} text {i:03d} of the source"} for i in range(300)]
        (tmp_path / f"{name}.jsonl").write_text(lines(texts))


@pytest.mark.parametrize("form", ["[{0}, {1}]", "{{mix: [{0}, {1}], validation_fraction: 0.1}}"])
def test_sources_are_mixed_by_their_weights(tmp_path: Path, form: str) -> None:
    two_sources(tmp_path)
    spec = written(
        tmp_path, form.format("{files: a.jsonl, weight: 0.75}", "{files: b.jsonl, column: body, weight: 0.25}")
    )
    found = read_examples(spec)
    counts = {name: sum(text.startswith(name) for (text,) in found.train) for name in "ab"}
    assert counts["a"] > 200, "all of it that is trained on"
    assert counts["b"] == pytest.approx(counts["a"] / 3, rel=0.25)
    held_out = [text[0] for split in (found.validation, found.test) for (text,) in split]
    assert held_out.count("b") == pytest.approx(held_out.count("a"), abs=25), "what is held out is of all sources"
    card = measure(spec)[0]
    assert card.used[str(tmp_path / "a.jsonl")] == 1
    assert card.used[str(tmp_path / "b.jsonl")] == pytest.approx(1 / 3, rel=0.15)
    assert any("b.jsonl: 3" in note and "% of its training text is used" in note for note in notes(spec, card))
    assert read_examples(spec) == found


def test_sources_without_weights_are_read_one_after_the_other(tmp_path: Path) -> None:
    two_sources(tmp_path)
    (tmp_path / "test.jsonl").write_text(lines([{"text": f"held out {i}"} for i in range(9)]))
    own = "{files: {train: a.jsonl, test: test.jsonl}}"
    found = read_examples(written(tmp_path, f"[{own}, {{files: b.jsonl, column: body}}, {{corpus: python_docs}}]"))
    assert found.field("test", 0) == [f"held out {i}" for i in range(9)], "given by one of them"
    texts = [text for (text,) in (*found.train, *found.validation)]
    assert sum(text.startswith(("a ", "b ")) and "of the source" in text for text in texts) == 600
    assert len(texts) > 1000


def test_a_mix_is_prepared_again_when_one_of_its_files_changes_and_runs(tmp_path: Path) -> None:
    two_sources(tmp_path)
    data = "[{files: a.jsonl, weight: 2}, {files: b.jsonl, column: body, weight: 1}]"
    file = tmp_path / "study.yaml"
    model = "model: {hidden_size: 16, num_layers: 1, num_heads: 2, context_length: 16}\nbackend: inline\n"
    file.write_text(
        f"name: s\ntask: causal_lm\ndata: {data}\ntokenizer: {{vocab_size: 300}}\n{model}budget: {{trials: 1}}\n"
        f"training: {{num_epochs: 1, evaluations_per_epoch: 1}}\nfolder: runs\nstore: sqlite:///{tmp_path}/s.db\n"
    )
    study = hpsearch.launch(file, folder=str(tmp_path / "runs"))
    assert study.best is not None
    assert hpsearch.launch(file, folder=str(tmp_path / "runs")).best == study.best
    (tmp_path / "b.jsonl").write_text(lines([{"body": f"another text {i}"} for i in range(300)]))
    with pytest.raises(UsageError, match="was begun on other text"):
        hpsearch.launch(file, folder=str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[{files: a.jsonl, weight: 1}, {files: b.jsonl}]", "give all of them one, or none"),
        ("[{files: a.jsonl}, {corpus: ui_messages}]", "ui_messages is no causal_lm data"),
        ("[{files: a.jsonl}, {files: no.jsonl}]", "no such file"),
        ("[{files: a.jsonl, fraction: 0.5}]", "unknown key 'fraction'"),
        ("{mix: [{files: a.jsonl}], files: a.jsonl}", "expected exactly one of corpus, files, hub and mix"),
        ("{mix: [{column: text}]}", "expected exactly one of corpus, files and hub, got none"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_by_the_study_file(tmp_path: Path, data: str, message: str) -> None:
    two_sources(tmp_path)
    with pytest.raises(SpecError) as caught:
        written(tmp_path, data)
    assert message in str(caught.value)
    assert "study.yaml:3:" in str(caught.value), "with its place"


def test_words_that_pandas_takes_for_nothing_are_words(tmp_path: Path) -> None:
    pairs = [*((pair["source"], pair["target"]) for pair in PAIRS), ("None", "Aucun"), ("NA", "null")]
    (tmp_path / "ui.csv").write_text("source,target\n" + "".join(f"{one},{other}\n" for one, other in pairs))
    found = read_examples(written(tmp_path, "{files: ui.csv}", "translation"))
    assert {("None", "Aucun"), ("NA", "null")} <= {*found.train, *found.validation, *found.test}


@pytest.mark.parametrize(
    "names",
    [
        {"train_data.csv": "train", "test_data.csv": "test"},
        {"train/0001.csv": "train", "train/0002.csv": "train", "test/0001.csv": "test"},
        {"train.csv": "train", "dev-1.csv": "validation", "dev-2.csv": "validation"},
    ],
)
def test_held_out_files_of_a_folder_are_not_trained_on(tmp_path: Path, names: dict[str, str]) -> None:
    for number, name in enumerate(names):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("text\n" + "".join(f"{name} {i}\n" for i in range(number * 100, number * 100 + 100)))
    found = read_examples(written(tmp_path, "{files: set}"))
    for name, split in names.items():
        own = {text for (text,) in getattr(found, split)}
        assert {f"{name} {i}" for i in range(1000)} & own
        if split != "train":
            assert not any(text.startswith(name) for (text,) in found.train)


def test_a_folder_of_which_one_cannot_tell_the_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train", "test", "more"):
        (tmp_path / "set" / f"{name}.jsonl").write_text(lines(ROWS))
    with pytest.raises(DataError, match=r"more\.jsonl is not: name the files of each split"):
        read_examples(written(tmp_path, "{files: set}"))


def test_splits_of_a_saved_data_set_are_these_and_no_others(tmp_path: Path) -> None:
    import datasets

    rows = {"text": TEXTS, "label": [i % 2 for i in range(120)]}
    whole = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    unknown = datasets.Dataset.from_dict({"text": ["of no class"], "label": [-1]}, features=whole.features)
    parts = {"train": whole.select(range(90)), "test": whole.select(range(90, 120)), "unsupervised": unknown}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "imdb")
    found = read_examples(written(tmp_path, "{files: imdb}", "classification"))
    assert len(found.train) + len(found.validation) == 90
    assert len(found.test) == 30
    assert {label for _, label in found.train} == {"neg", "pos"}
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "alone")
    with pytest.raises(DataError, match="has no train split"):
        read_examples(written(tmp_path, "{files: alone}", "classification"))


def test_lists_of_classes_read_as_their_names(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.List(datasets.ClassLabel(names=["a", "b", "c"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": kinds})
    content = {"text": TEXTS, "label": [[i % 3, (i + 1) % 3] for i in range(120)]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "tags")
    found = read_examples(written(tmp_path, "{files: tags}", "classification\nclassification: {multi_label: true}"))
    assert {label for _, own in found.train for label in own.split("|")} == {"a", "b", "c"}


@pytest.mark.parametrize("more", ['\n[{"text": "b"}]', '\n{"text": "c"}', " x"])
def test_what_follows_an_array_is_no_part_of_it(tmp_path: Path, more: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS) + more)
    with pytest.raises(DataError, match="something follows behind the end of the array"):
        read_examples(written(tmp_path, "{files: a.json}"))
    (tmp_path / "a.json").write_text(json.dumps(ROWS) + "\n \n")
    assert all_of(read_examples(written(tmp_path, "{files: a.json}"))) == sorted(TEXTS)


def test_texts_and_arrays_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.data.files._CHUNK", 7)
    rows = [{"n": 1234567890, "text": f'{text} "\\u00e9\\n'} for text in TEXTS]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert all_of(read_examples(written(tmp_path, "{files: a.json}"))) == sorted(row["text"] for row in rows)
    for split_on, parted in (("blank_line", "\n\n"), ("end_of_text", "<|endoftext|>"), ("line", "\n")):
        (tmp_path / "a.txt").write_text(parted.join(TEXTS) + parted * 2)
        assert all_of(read_examples(written(tmp_path, f"{{files: a.txt, split_on: {split_on}}}"))) == sorted(TEXTS)


def test_files_are_told_by_the_names_that_they_are_given(tmp_path: Path) -> None:
    """A link is called as the person calls it, and a folder above may have brackets in its name."""
    folder = tmp_path / "b [1]"
    folder.mkdir()
    (folder / "blob123").write_text(lines(ROWS))
    (folder / "link.jsonl").symlink_to(folder / "blob123")
    for files in ("link.jsonl", "'*.jsonl'"):
        assert all_of(read_examples(written(folder, f"{{files: {files}}}"))) == sorted(TEXTS)


def test_a_mark_at_the_beginning_is_no_text_whatever_the_encoding_is_called(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftext\n".encode() + "".join(f"row {i}\n" for i in range(99)).encode())
    assert len(all_of(read_examples(written(tmp_path, "{files: a.csv, encoding: UTF-8}")))) == 99


def test_aligned_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.fr").write_text("un\n" * 99)
    (tmp_path / "c.en.gz").write_bytes(gzip.compress(b"one\n" * 99)[:20])
    spec = written(tmp_path, "{files: {source: c.en.gz, target: c.fr}}", "translation")
    with pytest.raises(DataError, match=r"c\.en\.gz cannot be read"):
        measure(spec)
    with pytest.raises(SpecError, match="aligned files are named one by one"):
        written(tmp_path, "{files: {source: '*.gz', target: c.fr}}", "translation")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    spec = written(tmp_path, "{files: a.jsonl}").model_copy(update={"folder": str(tmp_path / "runs")})

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # Root may read everything.
    monkeypatch.setattr("hpsearch.data.known.hashlib.file_digest", denied)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Permission denied"):
        prepare(spec)


def test_the_sample_of_a_mix_is_of_its_sources_alike(tmp_path: Path) -> None:
    """What a source has too much of is left out by another part of the hash than what is sampled."""
    two_sources(tmp_path)
    spec = written(tmp_path, "[{files: a.jsonl, weight: 0.8}, {files: b.jsonl, column: body, weight: 0.2}]")
    preparation = Preparation(spec, tmp_path)
    preparation.read()
    kept = [*preparation.examples.texts("train", "text")]
    sample, part = preparation._sampled("train", 0.4 * sum(map(len, kept)), ["text"])
    assert sample is not None
    some = [*preparation.examples.texts("train", "text", sample)]
    for name in "ab":
        counts = [sum(text.startswith(name) for text in texts) for texts in (kept, some)]
        assert counts[1] / counts[0] == pytest.approx(part, abs=0.15)
