"""Scores of a text beside its reference, an example at a time: exact match, token F1, ROUGE-L.

Exact match and token F1 are those of SQuAD (Rajpurkar et al., EMNLP 2016): lower case, without punctuation, English
articles and superfluous white space. ROUGE-L (Lin, 2004) is that of the package rouge-score.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.metrics import bleu

Floats = NDArray[np.float64]

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LATIN_SHARE = 0.5


def normalized(text: str) -> str:
    """As SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> Floats:
    pairs = zip(outputs, references, strict=True)
    return np.array([float(normalized(output) == normalized(reference)) for output, reference in pairs])


def token_f1(outputs: Sequence[str], references: Sequence[str]) -> Floats:
    return np.array([_token_f1(output, reference) for output, reference in zip(outputs, references, strict=True)])


def _token_f1(output: str, reference: str) -> float:
    said, wanted = normalized(output).split(), normalized(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_words(references: Sequence[str]) -> str:
    """What ROUGE takes for words: `latin`, as rouge-score does by itself, or `unicode`.

    rouge-score's own words are of a to z and digits; a text in another script has none, and would score 0.
    """
    scripts = bleu.scripts_of(references)
    return "latin" if scripts["LATIN"] >= _LATIN_SHARE * scripts.total() else "unicode"


def rouge_l(outputs: Sequence[str], references: Sequence[str], words: str) -> Floats:
    """F-measures. `words`: see `rouge_words`."""
    scorer = _scorer(words)
    pairs = zip(outputs, references, strict=True)
    return np.array([scorer.score(reference, output)["rougeL"].fmeasure for output, reference in pairs])


class _UnicodeWords:
    """Letters that are written without spaces between words are words each."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+", text.lower())


@cache
def _scorer(words: str) -> Any:
    from rouge_score import rouge_scorer  # brings nltk along

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=None if words == "latin" else _UnicodeWords())
