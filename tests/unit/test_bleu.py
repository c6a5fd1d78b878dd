"""What BLEU takes for words: by language, by script, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpsearch.data.prepare import measure, notes, prepare
from hpsearch.data.shards import load_texts
from hpsearch.errors import UsageError
from hpsearch.metrics import bleu
from hpsearch.spec.sections import DataSpec, FileSplits
from hpsearch.spec.settings import ModelSettings
from hpsearch.spec.study import StudySpec, study_class
from hpsearch.tasks.translation.definition import TranslationOptions
from hpsearch.tasks.translation.training import Translation

CHINESE = dict(
    zip(["red", "blue", "green", "yellow", "black", "white", "big", "small"], "红蓝绿黄黑白大小", strict=True)
)
SENTENCES = [[word for bit, word in enumerate(CHINESE) if number >> bit & 1] for number in range(31, 256)]


def study(folder: Path, *, is_chinese: bool = True, tokenizer: Any = "auto", **data: Any) -> StudySpec:
    file = folder / "pairs.jsonl"
    pairs = [
        {
            "source": " ".join(words),
            "target": "".join(map(CHINESE.__getitem__, words)) if is_chinese else " ".join(words[::-1]),
        }
        for words in SENTENCES
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    section: dict[str, Any] = {"translation": TranslationOptions(bleu_tokenizer=tokenizer)}
    files = DataSpec(files=FileSplits(train=[str(file)]), **data)
    return study_class("translation")(name="s", task="translation", data=files, folder=str(folder), **section)


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("今天天气很好", "zh"),
        ("我在 GitHub 上提交了 pull request", "zh"),
        ("今日は天気がいいです。", "char"),
        ("サーバーに接続できません", "char"),
        ("สวัสดีครับ", "char"),
        ("ສະບາຍດີ", "char"),
        ("សួស្តី", "char"),
        ("မင်္ဂလာပါ", "char"),
        ("안녕하세요 세계", "13a"),
        ("привет, мир", "13a"),
        ("la ville de 北京 est grande", "13a"),
        ("3 + 4", "13a"),
    ],
)
def test_the_script_says_what_words_are(text: str, tokenizer: str) -> None:
    assert bleu.choose(None, [text]) == bleu.choose("de", [text]) == tokenizer


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("zho_Hans", "zh"), ("zh_CN", "zh"), ("yue_Hant", "zh"), ("__zh__", "zh"), ("ja_XX", "char"), ("jpn_Jpan", "char"), ("th", "char"),
     ("shn_Mymr", "char"), ("en_TH", "13a"), ("eng_Latn", "13a"), ("ko_KR", "13a")],
)  # fmt: skip
def test_the_target_language_says_what_words_are(language: str, tokenizer: str) -> None:
    assert bleu.choose(language, ["a b c"]) == tokenizer


def scores(spec: StudySpec) -> tuple[float, float, str]:
    """BLEU of a perfect model, on the validation and on the test split, and the signature of the latter."""
    folder, _ = prepare(spec)
    settings = ModelSettings(architecture="bart", hidden_size=16, num_layers=1, context_length=16)
    task = Translation(folder, settings, spec.options, label_smoothing=0.0)
    task.decode = lambda evaluate, split: load_texts(folder, split, "target")  # type: ignore[arg-type, method-assign]
    first = task.score(lambda split, function: iter(())).scores[0]
    return task.validation_score(lambda split, function: iter(())), first.value, str(first.contract["signature"])


def test_a_perfect_translation_into_chinese_scores_100(tmp_path: Path) -> None:
    spec = study(tmp_path)
    validation, test, signature = scores(spec)
    assert validation == pytest.approx(100)
    assert test == pytest.approx(100)
    assert "tok:zh" in signature
    assert notes(spec, measure(spec)[0]) == []
    by_hand = study(tmp_path, tokenizer="13a")
    assert scores(by_hand)[:2] == (0, 0)
    assert "tok:13a" in scores(by_hand)[2]
    (said,) = notes(by_hand, measure(by_hand)[0])
    assert said.startswith("translation.bleu_tokenizer: 13a finds words between spaces, and the references have none")
    assert "tok:char" in scores(study(tmp_path, tokenizer="char"))[2]
    assert "tok:char" in scores(study(tmp_path, target_language="jpn_Jpan"))[2]


def test_words_between_spaces_stay_words(tmp_path: Path) -> None:
    spec = study(tmp_path, is_chinese=False)
    assert "tok:13a" in scores(spec)[2]
    assert notes(spec, measure(spec)[0]) == []


def test_references_too_short_for_bleu_are_told(tmp_path: Path) -> None:
    spec = study(tmp_path)
    lines = [
        {"source": f"{a} {b} {c}", "target": CHINESE[a] + CHINESE[b] + CHINESE[c]}
        for a in CHINESE
        for b in CHINESE
        for c in CHINESE
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert notes(spec, measure(spec)[0]) == [
        "no reference of the test split has 4 words: BLEU counts the shorter sequences that there are"
    ]


@pytest.mark.parametrize("tokenizer", ["flores101", "flores200", "spBLEU-1K", "ja-mecab", "ko-mecab"])
def test_a_tokenizer_that_is_not_here_is_named_and_not_fetched(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    for module in ("tokenizer_ja_mecab", "tokenizer_ko_mecab"):
        monkeypatch.setattr(f"sacrebleu.tokenizers.{module}.MeCab", None)
    with pytest.raises(
        UsageError, match=rf"translation\.bleu_tokenizer: {tokenizer} (needs {tmp_path}|cannot be used: .*pip install)"
    ):
        bleu.metric(tokenizer)
