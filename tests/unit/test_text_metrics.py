"""Scores of generated text are, on 500 rows, those of the packages that people compare with."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import accuracy_score, f1_score
from torchmetrics.functional.text import squad

from hpsearch.data.corpora import python_docs
from hpsearch.metrics import statistics, text
from hpsearch.metrics.sacrebleu_internals import sentence_statistics


@pytest.fixture(scope="module")
def rows() -> tuple[list[str], list[str]]:
    """500 outputs and references: real sentences, some of them equal, changed, cut, empty or in other letters."""
    draw = random.Random(0)
    references = [text for (text,) in python_docs()][:500]
    outputs = []
    for reference in references:
        words = reference.split()
        kind = draw.randrange(6)
        if kind == 0:
            outputs.append(reference.upper() + "!")
        elif kind == 1:
            outputs.append(" ".join(words[: max(1, len(words) // 2)]))
        elif kind == 2:
            draw.shuffle(words)
            outputs.append(" ".join(words))
        elif kind == 3:
            outputs.append(draw.choice(["", "the", "été – naïve", "数は三つ"]))
        else:
            outputs.append(" ".join(word for word in words if draw.random() > 0.3))
    return outputs, references


def score(metric: str, **examples: np.ndarray) -> float:
    return float(statistics.score(metric, statistics.summands(metric, examples).sum(axis=0), {}))


def test_exact_match_and_token_f1_are_squads(rows: tuple[list[str], list[str]]) -> None:
    outputs, references = rows
    theirs = squad(
        [{"prediction_text": output, "id": str(number)} for number, output in enumerate(outputs)],
        [
            {"answers": {"answer_start": [0], "text": [reference]}, "id": str(number)}
            for number, reference in enumerate(references)
        ],
    )
    ours = score("exact_match", exact_match=text.exact_match(outputs, references))
    assert 100 * ours == pytest.approx(float(theirs["exact_match"]), rel=1e-6)
    ours = score("token_f1", token_f1=text.token_f1(outputs, references))
    assert 100 * ours == pytest.approx(float(theirs["f1"]), rel=1e-6), "theirs are 32-bit sums"
    assert text.token_f1(["", "", "a cat"], ["", "x", "the cat"]).tolist() == [1.0, 0.0, 1.0]


def test_rouge_l_is_rouge_scores(rows: tuple[list[str], list[str]]) -> None:
    outputs, references = rows
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    theirs = [scorer.score(reference, output)["rougeL"].fmeasure for output, reference in zip(*rows, strict=True)]
    assert text.rouge_words(references) == "latin"
    found = text.rouge_l(outputs, references, "latin")
    assert found.tolist() == theirs
    assert score("rouge_l", rouge_l=found) == pytest.approx(np.mean(theirs), rel=1e-12)


def test_rouge_l_knows_words_of_other_scripts() -> None:
    references = ["数は三つ", "красная машина"]
    assert text.rouge_words(references) == "unicode"
    assert text.rouge_l(references, references, "unicode").tolist() == [1.0, 1.0], "rouge-score's own words give 0"
    assert text.rouge_l(["数は二つ", "синяя машина"], references, "unicode").tolist() == [0.75, 0.5]


@pytest.mark.slow
def test_bleu_and_chrf_are_those_of_the_sacrebleu_command(rows: tuple[list[str], list[str]], tmp_path: Path) -> None:
    outputs, references = rows
    for name, lines in (("outputs", outputs), ("references", references)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "references", "-i", "outputs", "-b", "-w", "12"]
    for name, metric, options in (
        ("bleu", BLEU(), ["-m", "bleu"]),
        ("chrf", CHRF(word_order=2), ["-m", "chrf", "--chrf-word-order", "2"]),
    ):
        said = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        counts = sentence_statistics(metric, outputs, references).astype(np.float64)
        assert score(name, **{name: counts}) == pytest.approx(float(said), abs=1e-9)


def test_f1_and_accuracy_of_answers_that_may_be_no_label_are_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    names = ["yes", "no", "maybe", "none of these"]
    truth, said = draw.choice(names[:3], 500), draw.choice(names, 500)
    identity = np.eye(4, 3, dtype=np.uint8)
    examples = {
        "truth": identity[[names.index(one) for one in truth]],
        "predicted": identity[[names.index(one) for one in said]],
    }
    sums = statistics.summands("f1", examples).sum(axis=0)
    for average in ("macro", "micro", "weighted"):
        found = statistics.score("f1", sums, {"labels": names[:3], "average": average, "positive_label": None})
        theirs = f1_score(truth, said, labels=names[:3], average=average, zero_division=0)
        assert float(found) == pytest.approx(theirs, abs=1e-12)
    found = statistics.score("accuracy", statistics.summands("accuracy", examples).sum(axis=0), {})
    assert float(found) == pytest.approx(accuracy_score(truth, said), abs=1e-12)
