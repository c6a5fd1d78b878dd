"""Pretrained models of many languages: both languages are named, marked and decoded into."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import (
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

import hpsearch
from hpsearch.data.prepare import prepare
from hpsearch.data.shards import load_split, load_texts
from hpsearch.errors import UsageError
from hpsearch.models.kernels import can_decode, decode_greedily
from hpsearch.spec.load import load_study
from hpsearch.spec.settings import ModelSettings
from hpsearch.spec.study import StudySpec
from hpsearch.tasks.translation.definition import TranslationOptions
from hpsearch.tasks.translation.training import Translation

ENGLISH, FRENCH = ["red", "blue", "green", "black", "white", "big"], ["rouge", "bleu", "vert", "noir", "blanc", "grand"]
PAIRS = [(f"{ENGLISH[a]} {ENGLISH[b]} {ENGLISH[c]}", f"{FRENCH[c]} {FRENCH[b]} {FRENCH[a]}") for a in range(6) for b in range(6) for c in range(6)]  # fmt: skip
SIZES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32, "decoder_start_token_id": 2,
    "init_std": 0.3,
}  # fmt: skip
LANGUAGES = {"nllb": ("eng_Latn", "fra_Latn"), "m2m100": ("en", "fr"), "mbart50": ("en_XX", "fr_XX"), "mbart": ("en_XX", "fr_XX")}  # fmt: skip


def tokenizer(kind: str, folder: Path) -> Any:
    text = folder / "text.txt"
    text.write_text("\n".join(side for pair in PAIRS for side in pair))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=50, model_type="bpe", bos_id=0, pad_id=1, eos_id=2,
        unk_id=3, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [model.id_to_piece(number) for number in range(len(model))]
    if kind == "m2m100":
        (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
        return M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model"))
    if kind == "nllb":
        return NllbTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    scored = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    return {"mbart": MBartTokenizer, "mbart50": MBart50Tokenizer}[kind](vocab=scored)


@pytest.fixture(params=sorted(LANGUAGES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def study(kind: str, tmp_path: Path) -> Callable[..., StudySpec]:
    """A study that fine-tunes a tiny model of the kind."""
    made = tokenizer(kind, tmp_path)
    made.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    size = len(made) + 110
    model = (
        MBartForConditionalGeneration(MBartConfig(vocab_size=size, **SIZES))
        if "mbart" in kind
        else M2M100ForConditionalGeneration(M2M100Config(vocab_size=size, **SIZES))
    )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in PAIRS))

    def make(*languages: str | None) -> StudySpec:
        names = [
            f", {side}_language: {name}" for side, name in zip(("source", "target"), languages, strict=False) if name
        ]
        (tmp_path / "study.yaml").write_text(
            f"name: s\ntask: translation\ndata: {{files: pairs.jsonl{''.join(names)}}}\n"
            "model: {pretrained: model, context_length: 16}\nsearch: {learning_rate: [0.01]}\nbudget: {trials: 1}\n"
            "training: {num_epochs: 2, evaluations_per_epoch: 1}\nbackend: inline\n"
            f"store: sqlite:///{tmp_path}/store.db\nfolder: {tmp_path}/runs\n"
        )
        return load_study(tmp_path / "study.yaml")

    return make


def test_languages_that_are_not_named_are_refused(kind: str, study: Callable[..., StudySpec], tmp_path: Path) -> None:
    source, target = LANGUAGES[kind]
    for names, message in [
        (
            (),
            "data.source_language: the tokenizer of .* is multilingual: expected the language as it calls it; it has ",
        ),
        ((source,), "data.target_language: the tokenizer of .* is multilingual"),
        ((source, "french"), f"data.target_language: .* has no language 'french'; near it are .*{target}"),
    ]:
        study(*names)
        with pytest.raises(UsageError, match=message):
            hpsearch.check(tmp_path / "study.yaml")
        with pytest.raises(UsageError, match=message):
            hpsearch.launch(tmp_path / "study.yaml")
    assert not (tmp_path / "store.db").exists()


def test_each_side_bears_the_mark_of_its_language(kind: str, study: Callable[..., StudySpec]) -> None:
    folder, card = prepare(study(*LANGUAGES[kind]))
    own = AutoTokenizer.from_pretrained(folder / "tokenizer")
    source, target = (
        own.convert_tokens_to_ids(f"__{name}__" if kind == "m2m100" else name) for name in LANGUAGES[kind]
    )
    read, said = (load_split(folder, "test", field).document(0).tolist() for field in ("source", "target"))
    assert source in read
    assert target not in read
    assert source not in said
    assert said.count(own.eos_token_id) == 1
    assert said[-1] == own.eos_token_id
    assert (card.first_id, card.start_id) == ((None, target) if kind == "mbart" else (target, None))
    assert said[0] == target or kind == "mbart"
    assert (own.src_lang, own.tgt_lang) == LANGUAGES[kind]


def test_decoding_is_into_the_target_language(kind: str, study: Callable[..., StudySpec]) -> None:
    folder, card = prepare(spec := study(*LANGUAGES[kind]))
    settings = ModelSettings(pretrained=spec.model.pretrained, context_length=16)
    task = Translation(folder, settings, TranslationOptions(), label_smoothing=0.0)
    task.model.eval()
    assert can_decode(task.model)
    source = task.batch("test", np.arange(6)).tensors[0]
    mask = (source != card.padding_id).long()
    ours = decode_greedily(task.model, source, mask, 16)
    theirs = task.model.generate(input_ids=source, attention_mask=mask, num_beams=1, do_sample=False, max_length=16)
    assert torch.equal(ours, theirs[:, : ours.shape[1]])
    beams = task.model.generate(input_ids=source, attention_mask=mask, num_beams=2, do_sample=False, max_length=16)
    for ids in (ours, beams):
        assert ids[0, 0 if kind == "mbart" else 1] == (card.start_id if kind == "mbart" else card.first_id)
    # What was tokenized comes back as it was, without the mark.
    targets = load_split(folder, "test", "target")
    rows = [targets.document(number).tolist() for number in range(len(targets.lengths))]
    widest = max(map(len, rows))
    padded = torch.tensor([row + [card.padding_id] * (widest - len(row)) for row in rows])
    assert task.decode(lambda split, function: iter([(np.arange(len(rows)), padded)]), "test") == load_texts(
        folder, "test", "target"
    )


def test_a_multilingual_model_is_fine_tuned_and_exported(
    kind: str, study: Callable[..., StudySpec], tmp_path: Path
) -> None:
    study(*LANGUAGES[kind])
    launched = hpsearch.launch(tmp_path / "study.yaml")
    assert [trial.state for trial in launched.trials()] == ["completed"], launched.trials()[0].error
    assert launched.best is not None
    settings = json.loads((Path(launched.best.checkpoint) / "generation_config.json").read_text())
    card = prepare(study(*LANGUAGES[kind]))[1]
    assert settings.get("forced_bos_token_id") == card.first_id
    assert settings["decoder_start_token_id"] == (card.start_id or 2)
