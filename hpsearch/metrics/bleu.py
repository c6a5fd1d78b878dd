"""What BLEU takes for words: the choice of sacrebleu's tokenizers, by the language or the script of the references.

A text without spaces between its words is one word to 13a, sacrebleu's default, and BLEU is then 0 but for outputs that
are right to the letter. Where nothing is set, the choice hangs on the text alone, never on what is installed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch.errors import UsageError

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

ORDER = 4
"""Words of the longest sequences that BLEU counts."""
BY_SPACES = ("13a", "intl", "none")
"""Tokenizers that find words between spaces."""
_CHINESE = {"zh", "zho", "chi", "cmn", "yue", "wuu", "lzh", "hans", "hant"}
_OTHERS = {
    "ja",
    "jpn",
    "jpan",
    "th",
    "tha",
    "thai",
    "lo",
    "lao",
    "laoo",
    "km",
    "khm",
    "khmr",
    "my",
    "mya",
    "mymr",
    "bo",
    "bod",
    "tibt",
    "dz",
    "dzo",
}
"""Further languages and scripts that are written without spaces between words."""
_KANA = {"HIRAGANA", "KATAKANA"}
_SCRIPTS = {"CJK", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI", *_KANA}
"""First words of the Unicode names of letters that are written without spaces between words."""
_SHARE = 0.25
"""Of letters: one of these scripts says as much as several letters of another."""


def choose(language: str | None, references: Iterable[str]) -> str:
    """The tokenizer for references in a language (`zh`, `zho_Hans`, `zh_CN`), or in their script if it is unknown."""
    words = re.findall(r"[a-z]+", (language or "").lower())
    parts = {*words[:1], *(word for word in words[1:] if len(word) == len("hans"))}
    if parts & _CHINESE:
        return "zh"
    return "char" if parts & _OTHERS else _by_script(references)


def metric(tokenizer: str, *, longest_reference: int | None = None) -> BLEU:
    """BLEU with one of sacrebleu's tokenizers. Raises UsageError where it lacks a package or a file; fetches none.

    Where no reference is ORDER words long, only the orders that there are count (sacrebleu's effective order): else a
    perfect translation would score 0.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_spm import SACREBLEU_DIR, SPM_MODELS

    setting = f"translation.bleu_tokenizer: {tokenizer}"
    if tokenizer in SPM_MODELS:
        model = Path(SACREBLEU_DIR) / "models" / Path(SPM_MODELS[tokenizer]["url"]).name
        if not model.is_file():
            raise UsageError(
                f"{setting} needs {model}, which is not there; where there is a network, "
                f"`echo a | sacrebleu --tokenize {tokenizer} <(echo a)` fetches it once"
            )
    try:
        return BLEU(tokenize=tokenizer, effective_order=is_short(longest_reference))
    except Exception as error:  # each tokenizer misses its packages in its own way
        raise UsageError(f"{setting} cannot be used: {' '.join(str(error).split())}") from error


def is_short(longest_reference: int | None) -> bool:
    """Whether no reference has sequences of ORDER words."""
    return longest_reference is not None and longest_reference < ORDER


def longest(references: Iterable[str], tokenizer: str) -> int:
    """Words of the longest of the references."""
    tokenize = metric(tokenizer).tokenizer
    return max(len(tokenize(text).split()) for text in references)


def scripts_of(texts: Iterable[str]) -> Counter[str]:
    """Letters by the script they are of, as the first word of their Unicode names: LATIN, CYRILLIC, CJK."""
    letters = Counter(char for text in texts for char in text)
    scripts: Counter[str] = Counter()
    for char, count in letters.items():
        if unicodedata.category(char)[0] in "LM":
            scripts[unicodedata.name(char, "?").split()[0]] += count
    return scripts


def _by_script(references: Iterable[str]) -> str:
    scripts = scripts_of(references)
    unspaced = sum(scripts[script] for script in _SCRIPTS)
    if not unspaced or unspaced < _SHARE * scripts.total():
        return "13a"
    # Every other letter of Japanese is kana; Chinese has none, but in names.
    is_chinese = scripts["CJK"] > unspaced / 2 and sum(scripts[script] for script in _KANA) < unspaced / 10
    return "zh" if is_chinese else "char"
