"""The stages of preparing data: what they come to, found again, continued after a kill, made by one of several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hpsearch.data import rows, stages
from hpsearch.data.files import marks_of
from hpsearch.data.prepare import measure, notes, prepare
from hpsearch.data.shards import SPLITS, ArrayWriter, load_labels, load_split, load_texts, read_card
from hpsearch.data.tokenizers import train_tokenizer
from hpsearch.driver.compatibility import as_begun
from hpsearch.errors import DataError
from hpsearch.spec.sections import DataSpec, FileSplits, TokenizerSpec
from hpsearch.spec.study import StudySpec, study_class
from hpsearch.store.rows import StudyRow
from hpsearch.tasks.classification.definition import ClassificationOptions
from tests.examples import read_examples
from tests.reference_data import reference_examples, reference_hash
from tests.rows import row

T = TypeVar("T")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "café", "世界"]
COLUMNS = {
    "causal_lm": ("text",),
    "translation": ("source", "target"),
    "classification": ("text", "label"),
}


def write(file: Path, task: str, examples: list[tuple[str, ...]]) -> str:
    file.write_text("".join(json.dumps(dict(zip(COLUMNS[task], row, strict=True))) + "\n" for row in examples))
    return str(file)


def study(folder: Path, task: str, files: FileSplits, vocab_size: int = 300, **data: Any) -> StudySpec:
    more = {"classification": ClassificationOptions(multi_label=True)} if task == "classification" else {}
    return study_class(task)(
        name="s",
        task=task,
        data=DataSpec(files=files, **data),
        tokenizer=TokenizerSpec(vocab_size=vocab_size),
        folder=str(folder / "runs"),
        **more,
    )


text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
spaced = st.tuples(text, st.sampled_from(["", " ", "\n "])).map("".join)
label = st.lists(st.sampled_from("abcd"), min_size=1, max_size=2, unique=True).map("|".join)
EXAMPLE = {
    "causal_lm": st.tuples(spaced),
    "translation": st.tuples(spaced, text),
    "classification": st.tuples(spaced, label),
}


@st.composite
def corpora(draw: st.DrawFn, task: str) -> tuple[dict[str, list[tuple[str, ...]]], dict[str, Any]]:
    example = EXAMPLE[task]
    found = {"train": draw(st.lists(example, min_size=15, max_size=80))}
    for split in draw(st.sets(st.sampled_from(SPLITS[1:]))):
        found[split] = draw(st.lists(example, min_size=1, max_size=10))
    data: dict[str, Any] = {
        "fraction": draw(st.sampled_from([1.0, 0.5])),
        "max_examples": draw(st.sampled_from([None, 10, 30])),
        "validation_fraction": draw(st.sampled_from([0.1, 0.3])),
    }
    if task == "classification":
        data["rare_labels"] = draw(st.sampled_from(["keep", "drop"]))
    return found, data


@pytest.mark.parametrize("task", list(COLUMNS))
@given(drawn=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_data_is_what_a_plain_preparation_in_memory_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory,
    task: str,
    drawn: st.DataObject,
) -> None:
    """Rows, batches and partitions are small, so that each corpus has several of them."""
    content, data = drawn.draw(corpora(task))
    folder = tmp_path_factory.mktemp("data")
    files = {split: [write(folder / f"{split}.jsonl", task, examples)] for split, examples in content.items()}
    spec = study(folder, task, FileSplits(**files), **data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BATCH_BYTES", 200)
        patch.setattr(rows, "_PIECE", 7)
        patch.setattr(rows, "_PARTITION_ROWS", 9)
        expected, problem = outcome(lambda: reference_examples(spec))
        event(f"{task}: {'read' if problem is None else 'refused'}")
        if expected is None:
            assert outcome(lambda: prepare(spec)) == (None, problem)
            return
        found = read_examples(spec)
        made, card = prepare(spec)
    for split in SPLITS:
        assert getattr(found, split) == getattr(expected, split)
    assert (found.duplicates, found.rare) == (expected.duplicates, expected.rare)
    assert found.overlaps == {pair: count for pair, count in expected.overlaps.items() if count}
    assert card.test_fingerprint == reference_hash(expected.test)
    assert card.seen_ngrams == pytest.approx(expected.seen_ngrams)
    if task == "translation":
        assert card.seen_targets == expected.seen_targets
        assert load_texts(made, "test", "target") == expected.field("test", 1)
    fields = spec.definition.fields
    texts = [text for index in range(len(fields)) for text in expected.field("train", index)]
    plain = train_tokenizer(texts, 300, spec.definition.marks)
    assert Tokenizer.from_file(str(made / "tokenizer" / "tokenizer.json")).to_str() == plain.to_str()
    for split in SPLITS:
        for index, field in enumerate(fields):
            ending = [0] if spec.definition.is_stream else []
            ids = [plain.encode(text).ids + ending for text in expected.field(split, index)]
            arrays = load_split(made, split, field)
            assert arrays.tokens.tolist() == [0, *(token for own in ids for token in own)]
            assert arrays.document_ends.tolist() == np.cumsum([len(own) for own in ids]).tolist()
            assert arrays.document_bytes.tolist() == [len(text.encode()) for text in expected.field(split, index)]
        if task == "classification":
            names = [[card.labels[i] for i in np.flatnonzero(row)] for row in load_labels(made, split)]
            assert names == [sorted(written.split("|")) for written in expected.field(split, 1)]


def spelled(number: int) -> str:
    """A number in letters: translations are split by their sources without digits."""
    return "".join(chr(97 + int(digit)) for digit in str(number))


def write_pages(file: Path, task: str, pages: dict[int, list[tuple[str, ...]]]) -> FileSplits:
    rows = [
        json.dumps(dict(zip(COLUMNS[task], example, strict=True)) | {"page": {"id": page}})
        for page, examples in pages.items()
        for example in examples
    ]
    file.write_text("\n".join(rows))
    return FileSplits(train=[str(file)])


def pages_of(task: str, sizes: list[int]) -> dict[int, list[tuple[str, ...]]]:
    """Pages of so many texts each; half of them have a text in common that is translated, or labelled, in two ways."""
    last = {"causal_lm": [()], "translation": [("eine Zeile",), ("noch eine",)], "classification": [("a",), ("b",)]}[
        task
    ]
    pages = {
        page: [(f"page {spelled(page)} text {spelled(number)}", *last[number % len(last)]) for number in range(size)]
        for page, size in enumerate(sizes)
    }
    for page in range(0, len(sizes), 2):
        pages[page].append(("a text of many pages", *last[page // 2 % len(last)]))
    return pages


@pytest.mark.parametrize("task", list(COLUMNS))
@pytest.mark.parametrize(
    "sizes",
    [[10] * 80, [50] * 8, [1, 2, 3, 5, 8, 13, 21, 34, 55, 89] * 3, [400, *[10] * 12]],
    ids=["small pages", "few pages", "unequal pages", "one long page"],
)
def test_what_is_of_one_document_stays_in_one_split(tmp_path: Path, task: str, sizes: list[int]) -> None:
    """No text stands in two splits, whatever documents have it, and splits are as large as asked for."""
    pages = pages_of(task, sizes)
    files = write_pages(tmp_path / "pages.jsonl", task, pages)
    read = read_examples(study(tmp_path, task, files, group_column="page.id"))
    split_of: dict[str, str] = {}
    for split in SPLITS:
        texts = {*read.field(split, 0)}
        assert not texts & split_of.keys()
        split_of |= dict.fromkeys(texts, split)
    for page, examples in pages.items():
        assert len({split_of[text] for text, *_ in examples[: sizes[page]]}) == 1, page
    counts = {split: len(getattr(read, split)) for split in SPLITS}
    total = sum(counts.values())
    largest = max(size for size in sizes if size <= 0.2 * total)
    for split in ("validation", "test"):
        assert 0.05 * total <= counts[split] <= 0.1 * total + largest / 2 + 2
    backwards = write_pages(tmp_path / "backwards.jsonl", task, dict(reversed(pages.items())))
    again = read_examples(study(tmp_path, task, backwards, group_column="page.id"))
    for split in SPLITS:
        texts = {text for text in again.field(split, 0) if text != "a text of many pages"}
        assert all(split_of[text] == split for text in texts), "in whichever order they are read"


def test_pages_of_cpythons_documentation_are_held_out_as_far_as_asked_for(tmp_path: Path) -> None:
    """They are of very different lengths, and much of one stands in others, too."""
    from pydoc_data.topics import topics

    pages = {page: [(text,) for text in topic.split("\n\n") if text.strip()] for page, topic in topics.items()}
    rows = [{"page": page, "text": text} for page, texts in pages.items() for (text,) in texts]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = FileSplits(train=[str(tmp_path / "pages.jsonl")])
    spec = study(tmp_path, "causal_lm", files, group_column="page")
    card = prepare(spec)[1]
    total = sum(card.documents.values())
    assert card.duplicates > 0.1 * total
    for split in ("validation", "test"):
        assert 0.05 * total < card.documents[split] < 0.16 * total
    alone = prepare(study(tmp_path, "causal_lm", files))[1]
    assert card.seen_ngrams < alone.seen_ngrams / 2, "paragraphs are told by their neighbours"


def test_documents_of_a_given_split_are_left_out_of_training(tmp_path: Path) -> None:
    pages = pages_of("causal_lm", [10] * 40)
    write_pages(tmp_path / "train.jsonl", "causal_lm", {page: own[:6] for page, own in pages.items()})
    write_pages(tmp_path / "test.jsonl", "causal_lm", {page: own[6:10] for page, own in pages.items() if page < 12})
    files = FileSplits(train=[str(tmp_path / "train.jsonl")], test=[str(tmp_path / "test.jsonl")])
    spec = study(tmp_path, "causal_lm", files, group_column="page.id")
    read = read_examples(spec)
    assert len(read.test) == 12 * 4
    assert 0.05 < len(read.validation) / (len(read.train) + len(read.validation)) < 0.2, "of what is left"
    learnt = {text.split()[1] for text in [*read.field("train", 0), *read.field("validation", 0)]}
    assert not learnt & {spelled(page) for page in range(12)}
    assert any(note.startswith("72 examples were left out of training: ") for note in notes(spec, prepare(spec)[1]))


def test_a_group_that_says_the_same_all_the_time_counts_it_once(tmp_path: Path) -> None:
    pages = pages_of("causal_lm", [10] * 200)
    pages[-1] = [("[deleted]",)] * 20_000
    files = write_pages(tmp_path / "pages.jsonl", "causal_lm", pages)
    read = read_examples(study(tmp_path, "causal_lm", files, group_column="page.id"))
    assert 190 < len(read.validation) < 220
    assert 190 < len(read.test) < 220


def test_documents_that_mean_another_in_each_split_are_no_documents(tmp_path: Path) -> None:
    write_pages(tmp_path / "train.jsonl", "causal_lm", pages_of("causal_lm", [10] * 40))
    write_pages(tmp_path / "test.jsonl", "causal_lm", {page: [(f"other {spelled(page)}",)] for page in range(40)})
    files = FileSplits(train=[str(tmp_path / "train.jsonl")], test=[str(tmp_path / "test.jsonl")])
    with pytest.raises(DataError, match="of the 401 examples of the train split are of documents of the test split"):
        read_examples(study(tmp_path, "causal_lm", files, group_column="page.id"))


def test_sources_of_a_mix_may_use_the_same_names(tmp_path: Path) -> None:
    mix = []
    for source in ("a", "b"):
        pages = {page: [(f"{source} {spelled(page)} {place}",) for place in range(5)] for page in range(60)}
        write_pages(tmp_path / f"{source}.jsonl", "causal_lm", pages)
        mix.append({"files": str(tmp_path / f"{source}.jsonl"), "group_column": "page.id"})
    spec = study_class("causal_lm")(name="s", task="causal_lm", data=DataSpec(mix=mix), folder=str(tmp_path / "runs"))
    read = read_examples(spec)
    held_out = [{text.split()[1] for text in read.field("test", 0) if text.startswith(name)} for name in "ab"]
    assert held_out[0] != held_out[1]


def test_near_equal_sources_of_several_documents_are_not_in_two_splits(tmp_path: Path) -> None:
    pages = {page: [(f"Page {page} of 99", f"Seite {page}"), (f"text {spelled(page)}", "eine")] for page in range(100)}
    files = write_pages(tmp_path / "pages.jsonl", "translation", pages)
    read = read_examples(study(tmp_path, "translation", files, group_column="page.id"))
    assert sum(any(text.startswith("Page") for text in read.field(split, 0)) for split in SPLITS) == 1


@pytest.mark.parametrize("ids", [[1.0, None, 2.5], ["x", "", "y"], [True, False, 3]])
def test_a_group_has_any_kind_of_name(tmp_path: Path, ids: list[Any]) -> None:
    lines = [json.dumps({"text": f"text {number}", "doc": ids[number % 3]}) for number in range(90)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    files = FileSplits(train=[str(tmp_path / "a.jsonl")])
    read = read_examples(study(tmp_path, "causal_lm", files, group_column="doc", validation_fraction=0.3))
    assert len(read.train) + len(read.validation) + len(read.test) == 90


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"files": "a.txt", "group_column": "doc"}, "a.txt is plain text, which has no column 'doc'"),
        (
            {"files": {"source": "a.txt", "target": "a.txt"}, "group_column": "doc"},
            "group_column belongs to files with",
        ),
        ({"corpus": "python_docs", "group_column": "doc"}, "group_column belongs to files with columns"),
        ({"mix": [{"files": "a.txt"}], "group_column": "doc"}, "group_column belongs to the sources of the mix"),
        ({"files": "a.jsonl", "group_column": "doc"}, "line 1 has no column 'doc'"),
        ({"files": "a.jsonl", "group_column": "text", "whole_files": True}, "give one of them"),
        ({"files": "b.jsonl", "group_column": "doc"}, "column 'doc' holds dict, not a name"),
    ],
)
def test_a_group_column_that_means_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one\n\ntwo")
    Path("a.jsonl").write_text('{"text": "one"}')
    Path("b.jsonl").write_text('{"text": "one", "doc": {"id": 1}}')
    with pytest.raises((DataError, ValueError), match=message):
        read_examples(study_class("causal_lm")(name="s", task="causal_lm", data=DataSpec(**data), folder="runs"))


def test_paragraphs_of_many_files_stay_with_their_file(tmp_path: Path) -> None:
    for number in range(40):
        paragraphs = [f"file {number:02} paragraph {place}" for place in range(10)]
        (tmp_path / f"{number:02}.txt").write_text("\n\n".join(paragraphs))

    def files_in(pattern: str, **data: Any) -> dict[str, set[str]]:
        read = read_examples(study(tmp_path, "causal_lm", FileSplits(train=[str(tmp_path / pattern)]), **data))
        return {split: {text.split()[1] for text in read.field(split, 0)} for split in SPLITS}

    many = files_in("*.txt")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("*.txt"):
        (moved / f"called-{file.name}").write_bytes(file.read_bytes())
    assert files_in("moved/*.txt") == many, "wherever they lie"
    assert not many["train"] & (many["validation"] | many["test"])
    assert len(many["train"]) > 25
    apart = files_in("*.txt", whole_files=False)
    assert apart["train"] & apart["test"]
    licence = tmp_path / "with a licence"
    licence.mkdir()
    for file in tmp_path.glob("*.txt"):
        (licence / file.name).write_text("file all " + "may be used by everybody " * 300 + "\n\n" + file.read_text())
    told = {split: files - {"all"} for split, files in files_in("with a licence/*.txt").items()}
    assert not told["train"] & (told["validation"] | told["test"])
    assert all(told.values()), "files that begin alike are told apart all the same"
    before = marks_of([str(licence / "00.txt"), str(tmp_path / "01.txt")])
    with (licence / "00.txt").open("a") as file:
        file.write("\n\nthe end")
    assert marks_of([*before]) == before, "more text at the end of some pages changes nothing"
    few = files_in("0*.txt")
    assert few["train"] & (few["validation"] | few["test"]), "of ten files, splits would not be as large as asked for"
    assert not (found := files_in("[0-1]*.txt", whole_files=True, test_fraction=0.3))["train"] & found["test"]
    spec = study(tmp_path, "causal_lm", FileSplits(train=[str(tmp_path / "*.txt")]))
    assert "the paragraphs of each file stay in one split: 40 files (data.whole_files)" in notes(spec, prepare(spec)[1])


def outcome(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What comes of it, or why nothing does; which of several texts is named there is left open."""
    try:
        return action(), None
    except DataError as error:
        return None, str(error).partition("(text:")[0]


def corpus(folder: Path, count: int = 400) -> FileSplits:
    return FileSplits(train=[write(folder / "train.jsonl", "causal_lm", numbered(count))])


def numbered(count: int) -> list[tuple[str, ...]]:
    return [(f"{WORDS[i % 12]} {WORDS[i // 12 % 12]} text {i} " * 5,) for i in range(count)]


def forbid(patch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("the source was read again")

    patch.setattr(stages.Preparation, "read", read)


def test_what_was_prepared_from_the_same_files_is_found_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path))
    made = prepare(spec)
    # Written again with the same content: its time says nothing, its hash does.
    corpus(tmp_path)
    with monkeypatch.context() as patch:
        forbid(patch)
        assert prepare(spec) == made
        assert measure(spec)[0] == made[1]
    corpus(tmp_path, 401)
    changed = prepare(spec)
    assert changed[0] != made[0]
    assert changed[1].tokens["train"] >= made[1].tokens["train"]


def test_a_change_in_the_moment_of_reading_is_noticed(tmp_path: Path) -> None:
    """Of a file that has just been written neither size nor time may tell the next change."""
    file = tmp_path / "train.jsonl"
    spec = study(tmp_path, "causal_lm", corpus(tmp_path))
    first = prepare(spec)
    before = file.stat()
    file.write_text(file.read_text().replace("text 7 ", "test 7 "))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(spec)[0] != first[0]


def test_equal_arrays_of_other_rows_are_made_once_and_counted_as_theirs(tmp_path: Path) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path))
    folder, card = prepare(spec)
    before = (folder / "train-text.npy").stat().st_mtime_ns
    write(tmp_path / "train.jsonl", "causal_lm", [*numbered(400), *numbered(3), ("  ",)])
    again, other = prepare(spec)
    assert again == folder
    assert (folder / "train-text.npy").stat().st_mtime_ns == before
    assert (card.duplicates, other.duplicates) == (0, 3)
    assert any("1 rows without text" in note for note in notes(spec, other))
    assert read_card(folder) == card


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path))

    def grow(stage: str, done: int, total: int) -> None:
        if stage.startswith("tokenizing"):
            with (tmp_path / "train.jsonl").open("a") as file:
                file.write('{"text": "one more"}\n')

    with pytest.raises(DataError, match=r"train\.jsonl was written while it was read"):
        prepare(spec, grow)
    assert not list((tmp_path / "runs" / "data").glob(".making*"))
    assert prepare(spec)


KILLED = """
import os, signal, sys
from pathlib import Path
from hpsearch.data import rows, stages
from hpsearch.data.prepare import prepare
from hpsearch.spec.sections import FileSplits
from tests.unit.test_preparation import study

rows.BATCH_BYTES, stages._KEPT_EVERY = 500, 2000
folder, left = Path(sys.argv[1]), int(sys.argv[2])

def report(stage, done, total):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

made, card = prepare(study(folder, "causal_lm", FileSplits(train=[str(folder / "train.jsonl")])), report)
print(made.name, flush=True)
"""


@pytest.mark.slow
def test_a_preparation_killed_at_any_moment_is_continued_to_the_same_end(tmp_path: Path) -> None:
    """Reports come in all stages; each process goes some further than the one before, and is killed there."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = prepare(study(tmp_path / "whole", "causal_lm", corpus(tmp_path / "whole")))[0]
    corpus(tmp_path / "cut")
    rng = np.random.default_rng(0)
    moments = [*sorted(rng.integers(1, 600, 8).tolist()), 0]
    killed = 0
    for moment in moments:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "cut"), str(moment)], capture_output=True, text=True
        )
        killed += done.returncode == -9
        if done.returncode == 0:
            assert done.stdout.strip() == whole.name
    assert killed >= 4
    data = tmp_path / "cut" / "runs" / "data"
    assert sorted(entry.name for entry in data.iterdir()) == sorted([whole.name, "sources"])
    for file in whole.iterdir():
        if file.is_file():
            assert (data / whole.name / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(file.name for file in whole.iterdir()) == sorted(file.name for file in (data / whole.name).iterdir())


@pytest.mark.slow
def test_what_a_killed_preparation_left_is_not_continued_with_other_files(tmp_path: Path) -> None:
    corpus(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run([*command, "300"]).returncode == -9
    (tmp_path / "other").mkdir()
    expected = prepare(study(tmp_path / "other", "causal_lm", corpus(tmp_path / "other", 300)))[0]
    corpus(tmp_path, 300)
    assert subprocess.run([*command, "0"], capture_output=True, text=True).stdout.strip() == expected.name


@pytest.mark.slow
def test_of_two_launches_one_prepares_and_the_other_waits(tmp_path: Path) -> None:
    corpus(tmp_path, 3000)
    command = [sys.executable, "-c", KILLED, str(tmp_path), "0"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = {process.communicate()[0].strip() for process in both}
    assert len(names) == 1
    assert sorted(entry.name for entry in (tmp_path / "runs" / "data").iterdir()) == sorted([*names, "sources"])


def test_a_large_corpus_is_estimated_from_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path, 4000))
    whole = measure(spec)[0]
    monkeypatch.setattr("hpsearch.data.prepare._LARGE", 10_000)
    monkeypatch.setattr("hpsearch.data.prepare._ESTIMATED_FROM", 100_000)
    monkeypatch.setattr(rows, "BATCH_BYTES", 10_000)
    part = measure(spec, whole=False)[0]
    assert 0.05 < part.read < 0.9
    assert part.tokens["train"] == pytest.approx(whole.tokens["train"], rel=0.2)
    assert any("counts are estimated from the first" in note for note in notes(spec, part))
    assert measure(spec, whole=True)[0] == whole
    assert not (tmp_path / "runs").exists()


def test_the_tokenizer_is_trained_on_a_sample_of_a_large_corpus(tmp_path: Path) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path, 2000))
    small = spec.model_copy(update={"tokenizer": TokenizerSpec(vocab_size=300, sample_mb=0.01)})
    whole, part = prepare(spec)[1], prepare(small)[1]
    assert whole.tokenizer != part.tokenizer
    assert prepare(small)[1] == part
    assert whole.bytes == part.bytes


def test_an_array_can_be_continued_after_its_writer_was_lost(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    first = ArrayWriter(file, np.uint16, (2,))
    first.append(np.arange(20).reshape(10, 2))
    first.flush()
    again = ArrayWriter(file, np.uint16, (2,), at=4)
    again.append(np.array([[7, 7]]))
    again.close()
    assert np.load(file).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [7, 7]]


def test_progress_is_told_of_each_stage(tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    began = time.monotonic()
    prepare(
        study(tmp_path, "causal_lm", corpus(tmp_path)), lambda stage, done, total: told.update({stage: (done, total)})
    )
    assert time.monotonic() > began
    assert {"hashing the texts", "training the tokenizer", "tokenizing train", "tokenizing test"} <= {*told}
    done, total = told["tokenizing train"]
    assert 0 < done == total


@pytest.mark.parametrize(
    ("size", "entries"), [(0, 1024), (300_000, 1024), (1_200_000, 2048), (100_000_000, 8192), (10**12, 32_768)]
)
def test_the_vocabulary_grows_with_the_text(size: int, entries: int) -> None:
    assert TokenizerSpec().entries(size) == entries
    assert TokenizerSpec(vocab_size=300).entries(size) == 300


def test_an_estimate_that_a_part_refuses_is_taken_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [(f"{WORDS[i % 12]} text {i}", "a" if i < 2000 else "b") for i in range(4000)]
    files = FileSplits(train=[write(tmp_path / "sorted.jsonl", "classification", examples)])
    spec = study(tmp_path, "classification", files)
    monkeypatch.setattr("hpsearch.data.prepare._LARGE", 10_000)
    monkeypatch.setattr("hpsearch.data.prepare._ESTIMATED_FROM", 20_000)
    monkeypatch.setattr(rows, "BATCH_BYTES", 5_000)
    assert measure(spec, whole=False)[0] == measure(spec)[0]


def test_an_estimate_knows_how_many_examples_are_used_and_which_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path, 4000), max_examples=300)
    whole = measure(spec)[0]
    monkeypatch.setattr("hpsearch.data.prepare._LARGE", 10_000)
    monkeypatch.setattr("hpsearch.data.prepare._ESTIMATED_FROM", 100_000)
    monkeypatch.setattr(rows, "BATCH_BYTES", 10_000)
    part = measure(spec, whole=False)[0]
    assert part.read < 1
    assert sum(part.documents.values()) == pytest.approx(300, abs=3)
    assert part.tokens["train"] == pytest.approx(whole.tokens["train"], rel=0.2)


def test_prepared_data_that_has_lost_its_card_is_made_again(tmp_path: Path) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path))
    folder, card = prepare(spec)
    (folder / "card.json").unlink()
    assert prepare(spec) == (folder, card)
    assert read_card(folder) == card


def test_a_preparation_that_is_interrupted_is_continued_and_an_old_one_removed(tmp_path: Path) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "tokenizing train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(spec, interrupt)
    data = tmp_path / "runs" / "data"
    (left,) = data.glob(".making-*")
    told: list[str] = []
    prepare(spec, lambda stage, done, total: told.append(stage))
    assert "reading train" not in told
    assert "training the tokenizer" not in told
    assert not list(data.glob(".making-*"))
    left.mkdir()
    (left / "text").write_text("of a study that nobody launches any more")
    os.utime(left, (0, 0))
    prepare(study(tmp_path, "causal_lm", corpus(tmp_path), vocab_size=310))
    assert not left.exists()


def test_a_study_that_was_begun_before_there_were_these_defaults_is_as_it_was(tmp_path: Path) -> None:
    spec = study(tmp_path, "causal_lm", corpus(tmp_path))
    auto = spec.model_copy(update={"tokenizer": TokenizerSpec()})
    record = auto.record()
    record["tokenizer"] = {"shared": True, "vocab_size": 1024}
    del record["training"]["evaluation_share"]
    begun = as_begun(auto, row(StudyRow, spec=record))
    assert begun.tokenizer.vocab_size == 1024
    assert begun.training.evaluation_share == 1.0
    assert prepare(begun)[1].fingerprint == prepare(auto)[1].fingerprint, "equal vocabularies are one"
