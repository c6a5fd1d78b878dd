"""Coverage of the 95 % intervals of test scores, by simulation: metric x test examples x classes x skill.

    python benchmarks/intervals.py [--quick]

Test splits are drawn again and again, and it is counted how often the interval holds the score of the expected sums:
given the true labels in classification, of the population elsewhere. Seeds are fixed, so the numbers are the same on
each machine. `--quick` draws a fifth as often.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from hpsearch.metrics.intervals import interval
from hpsearch.metrics.metric import Examples
from hpsearch.metrics.statistics import score, summands

Draw = Callable[[np.random.Generator], tuple[Examples, np.ndarray | None]]
"""Examples of one test split and the expected sums, if they differ from split to split."""
DESIGNS = [
    ("balanced", 6, 2), ("zipf", 5, 3), ("balanced", 50, 2), ("zipf", 60, 5), ("balanced", 5000, 10), ("rare", 80, 40),
    ("balanced", 399, 133), ("zipf", 1000, 100), ("zipf", 800, 400), ("balanced", 60, 60),
]  # fmt: skip
"""How often classes occur (`rare`: one to three times each), examples, classes."""
METRICS = [
    ("f1", "macro"), ("f1", "weighted"), ("f1", "micro"), ("f1", "binary"), ("precision", "macro"),
    ("recall", "macro"), ("precision", "binary"), ("accuracy", "accuracy"),
]  # fmt: skip
SKILLS = (0.3, 0.7, 0.9, 0.98)


@dataclass(frozen=True)
class Cell:
    name: str
    coverage: float
    width: float
    """The median."""


def labelled(kind: str, n: int, classes: int, skill: float, rng: np.random.Generator) -> tuple[Examples, np.ndarray]:
    """Classes differ in recall, and errors go to frequent classes."""
    shares = 1 / np.arange(1, classes + 1)
    counts = {
        "balanced": lambda: np.full(classes, n // classes),
        "rare": lambda: rng.integers(1, 4, classes),
        "zipf": lambda: rng.multinomial(n, shares / shares.sum()),
    }[kind]()
    truth = np.repeat(np.arange(classes), counts)
    skill = min(1.0, skill + rng.uniform(-0.04, 0.04) * min(1, 10 * (1 - skill)))  # no lattice of one proportion
    recall = rng.beta(10 * skill, 10 * (1 - skill), classes) if skill < 1 else np.ones(classes)
    to = (counts + 0.5) / (counts + 0.5).sum()
    answer = truth.copy()
    left = np.flatnonzero(rng.random(len(truth)) > recall[truth])
    while len(left):
        answer[left] = rng.choice(classes, len(left), p=to)
        left = left[answer[left] == truth[left]]
    missed = counts * (1 - recall) / (1 - to)
    guesses = counts * recall + to * (missed.sum() - missed)
    eye = np.eye(classes, dtype=np.uint8)
    return {"truth": eye[truth], "predicted": eye[answer]}, np.concatenate([counts * recall, guesses, counts])


def several_labels(n: int, classes: int, skill: float, rng: np.random.Generator) -> tuple[Examples, np.ndarray]:
    """Examples differ in difficulty, so that the errors of one go together."""
    truth = rng.random((n, classes)) < 0.5 / np.arange(1, classes + 1) ** 0.7
    ease = rng.choice([-0.15, 0.15], n)[:, None] * min(1, 5 * (1 - skill))
    right = rng.random((n, classes)) < np.where(truth, skill + ease, 1 - 0.3 * (1 - skill - ease))
    hits, others = truth.sum(0) * skill, (~truth).sum(0) * 0.3 * (1 - skill)
    sums = np.concatenate([hits, hits + others, truth.sum(0)])
    return {"truth": truth.astype(np.uint8), "predicted": (truth == right).astype(np.uint8)}, sums


def documents(n: int, spread: float, rng: np.random.Generator) -> tuple[Examples, None]:
    """Documents whose lengths and losses are log-normal."""
    tokens = np.maximum(1, np.exp(rng.normal(5, 2 * spread, n))).round()
    return {"nats": tokens * 3 * np.exp(rng.normal(0, spread, n)), "tokens": tokens, "bytes": 4 * tokens}, None


def sentences(count: int, error: float, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Outputs and references in which words are exchanged and left out, in some sentences more than in others."""
    words = np.array([f"w{word}x{word * word}" for word in range(300)])
    shares = 1 / np.arange(1, 301)
    outputs, references = [], []
    for _ in range(count):
        length = int(np.clip(np.exp(rng.normal(2.5, 0.6)), 2, 60))
        reference = rng.choice(words, length, p=shares / shares.sum())
        wrong = rng.beta(3 * error, 3 * (1 - error))
        output = np.where(rng.random(length) < wrong, rng.choice(words, length), reference)
        outputs.append(" ".join(output[rng.random(length) > 0.1 * wrong]))
        references.append(" ".join(reference))
    return outputs, references


def cell(name: str, metric: str, average: str, draw: Draw, repeats: int, target: float | None = None) -> Cell:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    held, widths = [], []
    for _ in range(repeats):
        examples, sums = draw(rng)
        labels = [str(label) for label in range(examples["truth"].shape[1])] if "truth" in examples else []
        contract: dict[str, Any] = {"average": average, "labels": labels}
        if average == "binary":
            contract["positive_label"] = "1"
        if sums is None:
            assert target is not None
            wanted = target
        elif metric == "accuracy":
            wanted = sums[: len(labels)].sum() / sums[2 * len(labels) :].sum()
        else:
            wanted = float(score(metric, sums, contract))
        low, high = interval(metric, examples, contract)
        point = float(score(metric, summands(metric, examples).sum(0), contract))
        assert 0 <= low <= point <= high
        held.append(low - 1e-9 <= wanted <= high + 1e-9)
        widths.append(high - low)
    return Cell(name, float(np.mean(held)), float(np.median(widths)))


def cells(effort: float = 1.0, only: tuple[str, ...] = ("",)) -> Iterator[Cell]:
    """The cells whose names begin with one of these; with a smaller `effort` fewer splits are drawn for each."""
    for name, *given, repeats, target in _plan():
        if name.startswith(only):
            yield cell(name, *given, max(40, round(effort * repeats)), target)


def _plan() -> Iterator[tuple[Any, ...]]:
    """Name, metric, average, draw, repeats and target of each cell."""
    for metric, average in METRICS:
        for kind, n, classes in DESIGNS:
            is_one_ratio = average not in ("macro", "weighted")
            if (is_one_ratio and classes > 5) or (n == 5000 and (metric, average) != ("f1", "macro")):
                continue
            for skill in SKILLS:
                cost = n * classes
                repeats = 800 if cost < 2000 else 400 if cost < 40_000 else 200
                name = f"{metric} {average} {kind} n={n} classes={classes} skill={skill}"
                design = (kind, n, classes, skill)
                yield name, metric, average, lambda rng, of=design: labelled(*of, rng), repeats, None
    for average in ("macro", "micro"):
        for n, classes in ((30, 6), (400, 30)):
            for skill in (0.5, 0.9):
                name = f"f1 {average} several labels n={n} classes={classes} skill={skill}"
                given = (n, classes, skill)
                yield name, "f1", average, lambda rng, of=given: several_labels(*of, rng), 300, None
    for metric in ("perplexity", "bits_per_byte"):
        for spread in (0.2, 0.5):
            for n in (5, 20, 100, 1000):
                mean = 3 * np.exp(spread**2 / 2)
                target = float(np.exp(mean)) if metric == "perplexity" else mean / np.log(2) / 4
                name = f"{metric} log-normal {spread} n={n}"
                yield name, metric, "", lambda rng, of=(n, spread): documents(*of, rng), 600, target
    for error in (0.7, 0.4, 0.1):
        outputs, references = sentences(4000, error, np.random.default_rng(1))
        for metric, scorer in (("bleu", BLEU()), ("chrf", CHRF(word_order=2))):
            counts = np.array(scorer._extract_corpus_statistics(outputs, [references]), dtype=float)
            target = float(score(metric, counts.sum(0), {}))
            for n in (5, 20, 100, 1000):
                drawn = (metric, counts, n)
                name = f"{metric} population {target:.1f} n={n}"
                yield name, metric, "", lambda rng, of=drawn: _sample(*of, rng), 400, target


def _sample(metric: str, counts: np.ndarray, n: int, rng: np.random.Generator) -> tuple[Examples, None]:
    return {metric: counts[rng.integers(0, len(counts), n)]}, None


def summary(found: list[Cell]) -> dict[str, Any]:
    covers = np.array([one.coverage for one in found])
    return {
        "cells": len(found),
        "mean": round(float(covers.mean()), 4),
        "least": round(float(covers.min()), 4),
        "within 0.93 and 0.985": round(float(((covers >= 0.93) & (covers <= 0.985)).mean()), 4),
    }


def main() -> None:
    import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer splits; nothing is kept")
    options = parser.parse_args()
    found = []
    print(f"{'':<64}{'coverage':>9}{'width':>10}")
    for one in cells(0.2 if options.quick else 1.0):
        found.append(one)
        print(f"{one.name:<64}{one.coverage:>9.3f}{one.width:>10.4g}", flush=True)
    print(", ".join(f"{name} {value}" for name, value in summary(found).items()))
    if not options.quick:
        record.keep("intervals", "numpy", "scipy", "sacrebleu", **summary(found), rows=[one.__dict__ for one in found])


if __name__ == "__main__":
    main()
