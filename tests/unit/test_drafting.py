"""`hpsearch init`: from files of every form to a study file that `check` accepts, and whose study ranks something."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import hpsearch
from hpsearch.errors import DataError, SpecError, UsageError
from hpsearch.spec.load import load_study
from tests.commands import HPSEARCH

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "green",
    "hills",
    "and",
    "nobody",
    "saw",
    "where",
    "old",
    "songs",
    "went",
    "that",
    "night",
]
OTHERS = [
    "le",
    "chat",
    "dort",
    "sur",
    "un",
    "tapis",
    "quand",
    "la",
    "pluie",
    "tombe",
    "et",
    "personne",
    "ne",
    "voit",
    "ces",
    "vieux",
    "chants",
    "de",
    "la",
    "nuit",
    "ici",
]


def sentences(count: int, words: list[str] = WORDS, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(count)]


TEXTS = sentences(300)
FRENCH = sentences(300, OTHERS)
LABELS = ["sport" if "cat" in text else "news" for text in TEXTS]
PAIRS = list(zip(TEXTS, FRENCH, strict=True))


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    return "".join(delimiter.join(map(str, row)) + "\n" for row in ([*rows[0]], *(r.values() for r in rows))).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def saved(folder: Path) -> None:
    import datasets

    rows = {"sentence": TEXTS, "intent": [int(label == "sport") for label in LABELS]}
    whole = datasets.Dataset.from_dict(rows).cast_column("intent", datasets.ClassLabel(names=["news", "sport"]))
    whole.save_to_disk(folder / "saved")


FORMS: dict[str, tuple[dict[str, bytes], list[str], str, dict[str, Any]]] = {
    "paragraphs": ({"a.txt": "\n\n".join(TEXTS).encode()}, ["a.txt"], "causal_lm", {}),
    "lines": ({"a.txt": "\n".join(TEXTS).encode()}, ["a.txt"], "causal_lm", {}),
    "end of text": ({"a.txt": "<|endoftext|>".join(TEXTS).encode()}, ["a.txt"], "causal_lm", {}),
    "packed lines": ({"a.txt.gz": gzip.compress("\n".join(TEXTS).encode())}, ["a.txt.gz"], "causal_lm", {}),
    "jsonl": ({"a.jsonl": lines([{"id": i, "text": t} for i, t in enumerate(TEXTS)])}, ["a.jsonl"], "causal_lm", {}),
    "other column": (
        {"a.jsonl": lines([{"url": f"u{i}", "meta": {"body": t}} for i, t in enumerate(TEXTS)])},
        ["a.jsonl"],
        "causal_lm",
        {"column": "meta.body"},
    ),
    "array": ({"a.json": json.dumps([{"content": t} for t in TEXTS]).encode()}, ["a.json"], "causal_lm",
              {"column": "content"}),
    "parquet": ({"a.parquet": parquet([{"text": t} for t in TEXTS])}, ["a.parquet"], "causal_lm", {}),
    "many files": (
        {f"part-{i}.jsonl": lines([{"text": t} for t in TEXTS[i::3]]) for i in range(3)},
        ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"],
        "causal_lm",
        {},
    ),
    "folder with splits": (
        {f"set/{name}.jsonl": lines([{"text": t} for t in TEXTS[a:b]])
         for name, a, b in (("train", 0, 200), ("validation", 200, 250), ("test", 250, 300))},
        ["set"],
        "causal_lm",
        {},
    ),
    "aligned": ({"c.en": "\n".join(TEXTS).encode(), "c.fr": "\n".join(FRENCH).encode()}, ["c.en", "c.fr"],
                "translation", {}),
    "aligned splits": (
        {f"{s}.{e}": "\n".join(t[a:b]).encode() for s, a, b in (("train", 0, 200), ("dev", 200, 250), ("test", 250, 300))
         for e, t in (("en", TEXTS), ("fr", FRENCH))},
        ["train.en", "train.fr", "dev.en", "dev.fr", "test.en", "test.fr"],
        "translation",
        {},
    ),
    "languages": ({"a.csv": table([{"en": e, "fr": f} for e, f in PAIRS])}, ["a.csv"], "translation",
                  {"source_column": "en", "target_column": "fr"}),
    "opus": ({"a.jsonl": lines([{"translation": {"en": e, "fr": f}} for e, f in PAIRS])}, ["a.jsonl"], "translation",
             {"source_column": "translation.en", "target_column": "translation.fr"}),
    "named pair": ({"a.jsonl": lines([{"src": e, "tgt": f} for e, f in PAIRS])}, ["a.jsonl"], "translation",
                   {"source_column": "src", "target_column": "tgt"}),
    "chats": ({"a.jsonl": lines([{"messages": [{"role": "user", "content": e}, {"role": "assistant", "content": f}]}
                                 for e, f in PAIRS])}, ["a.jsonl"], "instruction", {}),
    "ShareGPT": ({"a.json": json.dumps([{"id": i, "conversations": [{"from": "human", "value": e}, {"from": "gpt", "value": f}]}
                                        for i, (e, f) in enumerate(PAIRS)]).encode()}, ["a.json"], "instruction", {}),
    "prompts": ({"a.csv": table([{"prompt": e, "completion": f} for e, f in PAIRS], ";")}, ["a.csv"], "instruction",
                {"delimiter": None}),
    "alpaca": ({"a.parquet": parquet([{"instruction": e, "input": "", "output": f} for e, f in PAIRS])}, ["a.parquet"],
               "instruction", {}),
    "labels": ({"a.csv": table([{"text": t, "label": x} for t, x in zip(TEXTS, LABELS, strict=True)])}, ["a.csv"],
               "classification", {}),
    "numbers": ({"a.tsv": table([{"review": t, "stars": len(t) % 3} for t in TEXTS], "\t")}, ["a.tsv"],
                "classification", {"column": "review", "label_column": "stars"}),
    "semicolons": ({"a.csv": table([{"sentence": t, "topic": x} for t, x in zip(TEXTS, LABELS, strict=True)], ";")},
                   ["a.csv"], "classification", {"column": "sentence", "label_column": "topic"}),
    "many labels": (
        {"a.jsonl": lines([{"text": t, "tags": sorted({t.split()[0][0], t.split()[1][0]})} for t in TEXTS])},
        ["a.jsonl"],
        "classification",
        {"label_column": "tags"},
    ),
    "unnamed label": (
        {"a.jsonl": lines([{"uid": f"x{i}", "utterance": t, "kind": x}
                           for i, (t, x) in enumerate(zip(TEXTS, LABELS, strict=True))])},
        ["a.jsonl"],
        "classification",
        {"column": "utterance", "label_column": "kind"},
    ),
    "saved to disk": ({}, ["saved"], "classification", {"column": "sentence", "label_column": "intent"}),
    "latin": ({"a.txt": "\n".join(f"caf\u00e9 {t}" for t in TEXTS).encode("cp1252")}, ["a.txt"], "causal_lm",
              {"encoding": "cp1252"}),
}  # fmt: skip
"""By name: files, what is given to `init`, the task that is right, what the file should say of the data."""

Drafted = Callable[[str], Path]


@pytest.fixture
def drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drafted:
    monkeypatch.chdir(tmp_path)

    def draft(form: str) -> Path:
        files, given, _, _ = FORMS[form]
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        if form == "saved to disk":
            saved(tmp_path)
        hpsearch.init(given, output=tmp_path / "study.yaml")
        return tmp_path / "study.yaml"

    return draft


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_data_is_recognised_and_its_study_file_is_accepted(drafted: Drafted, form: str) -> None:
    file = drafted(form)
    content = yaml.safe_load(file.read_text())
    _, _, task, data = FORMS[form]
    assert content["task"] == task
    assert {key: content["data"].get(key) for key in data} == data
    found = hpsearch.check(file)
    assert found["data"]["documents"]["train"] >= 150
    assert found["study"]["budget"]["minutes"] >= 5


def test_conversations_get_a_context_that_holds_their_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Story {number}?", "completion": " ".join([text] * 30)} for number, text in enumerate(TEXTS)]
    (tmp_path / "long.jsonl").write_bytes(lines(rows))
    hpsearch.init(["long.jsonl"], output="study.yaml")
    found = hpsearch.check("study.yaml")
    assert found["fixed"]["context_length"] > 256
    assert sum(found["left_out"].values()) < 0.05 * len(rows)


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMS)
def test_a_drafted_study_ranks_something(drafted: Drafted, form: str) -> None:
    file = drafted(form)
    study = hpsearch.launch(
        file,
        trials=2,
        backend="inline",
        store=f"sqlite:///{file.parent}/s.db",
        folder=str(file.parent / "runs"),
        overrides=["search.num_epochs=2", "search.num_layers=1", "model.hidden_size=32", "model.num_heads=2"],
    )
    assert study.exit_code == 0
    assert study.board().rows


def init(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HPSEARCH, "init", *arguments], capture_output=True, text=True)


def test_what_was_recognised_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_bytes(FORMS["labels"][0]["a.csv"])
    ran = init("reviews.csv")
    assert ran.returncode == 0, ran.stderr
    for said in (
        "rows of csv",
        "task classification: label has few values beside text",
        "2 labels",
        "training tokens",
        "written in Latin",
    ):
        assert said in ran.stdout
    assert "hpsearch launch study.yaml" in ran.stdout
    text = (tmp_path / "study.yaml").read_text()
    assert "# label has few values beside text" in text
    again = init("reviews.csv")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert (tmp_path / "study.yaml").read_text() == text


def test_names_are_relative_to_the_study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "studies"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "a.txt").write_text("\n".join(TEXTS))
    hpsearch.init(["data/a.txt"], output="studies/mine.yaml")
    spec = load_study("studies/mine.yaml")
    assert spec.name == "mine"
    assert spec.data.files is not None
    assert spec.data.files.train == [str(tmp_path / "data" / "a.txt")]


def test_a_task_and_a_pretrained_model_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_bytes(FORMS["labels"][0]["a.csv"])
    hpsearch.init(["a.csv"], output="lm.yaml", task="causal_lm")
    assert yaml.safe_load((tmp_path / "lm.yaml").read_text())["task"] == "causal_lm"
    model = {"model_type": "bert", "vocab_size": 1000}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    hpsearch.init(["a.csv"], output="tuned.yaml", pretrained="some/model")
    content = yaml.safe_load((tmp_path / "tuned.yaml").read_text())
    assert content["model"]["pretrained"] == "some/model"
    assert content["search"]["learning_rate"]["max"] <= 1e-3


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.doc", b"x", {}, "cannot tell the format of a.doc"),
        ("a.jsonl", lines([{"n": 1.5}] * 30), {}, "no column holds text; there are n"),
        ("a.jsonl", b"oops\n", {}, "cannot be read as json"),
        ("a.txt", b"", {}, "no row of the sample has text"),
        ("a.txt", "\n".join(TEXTS).encode(), {"task": "classification"}, "hold nothing for it but texts"),
        ("a.txt", b"x", {"task": "summaries"}, "expected causal_lm, translation, classification or instruction"),
        ("a.jsonl", lines([{"text": t} for t in TEXTS]), {"task": "translation"}, "needs two columns of text"),
        ("a.jsonl", lines([{"text": t} for t in TEXTS]), {"task": "classification"}, "no column looks like labels"),
    ],
)
def test_what_cannot_be_told_is_said_and_nothing_is_written(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UsageError, DataError)) as caught:
        hpsearch.init([tmp_path / name], output=tmp_path / "study.yaml", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "study.yaml").exists()


def test_rows_that_are_sorted_by_their_labels_are_seen_all_over(tmp_path: Path) -> None:
    rows = [{"text": f"{TEXTS[i % 300]} {i}", "topic": "news" if i < 12_000 else "sport"} for i in range(24_000)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    made = hpsearch.init([tmp_path / "a.jsonl"], output=tmp_path / "study.yaml")
    assert made.task == "classification"
    assert any(note.startswith("2 labels") for note in made.notes)
    tokens = next(int(note.split()[1].replace(",", "")) for note in made.notes if "training tokens" in note)
    card = hpsearch.check(tmp_path / "study.yaml")["data"]
    assert tokens == pytest.approx(card["tokens"]["train"], rel=0.2), "a sample says how much text there is"


def test_pieces_of_one_text_are_no_translation(tmp_path: Path) -> None:
    for name in ("part1.txt", "part2.txt"):
        (tmp_path / name).write_text("\n".join(TEXTS))
    made = hpsearch.init([tmp_path / "part1.txt", tmp_path / "part2.txt"], output=tmp_path / "study.yaml")
    assert made.task == "causal_lm"


def test_files_are_aligned_by_their_names_in_whichever_order_they_are_given(tmp_path: Path) -> None:
    names = ["train.en", "dev.en", "dev.fr", "train.fr"]
    for name in names:
        (tmp_path / name).write_text("\n".join(TEXTS if name.endswith("en") else FRENCH))
    hpsearch.init([tmp_path / name for name in names], output=tmp_path / "study.yaml")
    files = yaml.safe_load((tmp_path / "study.yaml").read_text())["data"]["files"]
    assert files == {
        "train": {"source": "train.en", "target": "train.fr"},
        "validation": {"source": "dev.en", "target": "dev.fr"},
    }


def test_a_file_that_is_refused_is_not_left_and_names_become_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    with pytest.raises(SpecError):
        hpsearch.init([tmp_path / "a.txt"], output=tmp_path / "s.yaml", pretrained="/no/such/model")
    assert not (tmp_path / "s.yaml").exists()
    hpsearch.init([tmp_path / "a.txt"], output=tmp_path / "my study.yaml")
    assert load_study(tmp_path / "my study.yaml").name == "my-study"
    (tmp_path / "mdl").mkdir()
    (tmp_path / "sub").mkdir()
    hpsearch.init([tmp_path / "a.txt"], output=tmp_path / "sub" / "s.yaml", pretrained=str(tmp_path / "mdl"))
    assert load_study(tmp_path / "sub" / "s.yaml").model.pretrained == str(tmp_path / "mdl")


def test_rows_that_are_pieces_of_documents_stay_with_them(tmp_path: Path) -> None:
    rows = [
        {"url": f"https://example.org/{number // 9}", "text": f"the text {number} says so " * 5}
        for number in range(900)
    ]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = hpsearch.init([tmp_path / "pages.jsonl"], output=tmp_path / "pages.yaml")
    found = load_study(tmp_path / "pages.yaml")
    assert (found.task, found.data.column, found.data.group_column) == ("causal_lm", "text", "url")
    assert hpsearch.check(tmp_path / "pages.yaml")["data"]["documents"]["test"] > 0
    assert "rows with the same url stay in one split (data.group_column)" in made.notes
    alone = [row | {"url": f"https://example.org/{number}"} for number, row in enumerate(rows)]
    (tmp_path / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    hpsearch.init([tmp_path / "alone.jsonl"], output=tmp_path / "alone.yaml")
    assert load_study(tmp_path / "alone.yaml").data.group_column is None
