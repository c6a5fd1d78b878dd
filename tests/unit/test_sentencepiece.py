"""Tokenizers that come as SentencePiece models: opus-mt's two, and Llama's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import LlamaConfig, LlamaForCausalLM, MarianConfig, MarianMTModel

import hpsearch

WORDS = ["red", "blue", "green", "black", "white", "big"]
PAIRS = [
    {"source": f"{a} {b} {c}", "target": f"{c} {b} {a}".upper()} for a in WORDS for b in WORDS for c in WORDS
]  # fmt: skip
STUDY = (
    "name: s\ntask: TASK\ndata: {files: pairs.jsonl}\nmodel: {pretrained: model, context_length: 16}\n"
    "search: {learning_rate: [0.01]}\nbudget: {trials: 1}\ntraining: {num_epochs: 1, evaluations_per_epoch: 1}\n"
    "backend: inline\nstore: sqlite:///FOLDER/store.db\nfolder: FOLDER/runs\n"
)


def pieces(folder: Path, name: str, side: str, **options: object) -> list[str]:
    (folder / "text.txt").write_text("\n".join(pair[side] for pair in PAIRS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spm"),
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (folder / "spm.model").rename(folder / "model" / name)
    return [line.split("\t")[0] for line in (folder / "spm.vocab").read_text().splitlines()]


def marian(folder: Path) -> None:
    """A folder of opus-mt's shape."""
    both = [
        *pieces(folder, "source.spm", "source", vocab_size=40),
        *pieces(folder, "target.spm", "target", vocab_size=40),
    ]
    known = [piece for piece in dict.fromkeys(both) if piece not in ("<s>", "</s>", "<unk>")]
    vocabulary = {piece: number for number, piece in enumerate(["</s>", "<unk>", *known, "<pad>"])}
    (folder / "model/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "model/tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "fr"}')
    padding = vocabulary["<pad>"]
    config = MarianConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        pad_token_id=padding, eos_token_id=0, forced_eos_token_id=0, bos_token_id=0, decoder_start_token_id=padding,
    )  # fmt: skip
    model = MarianMTModel(config)
    model.generation_config.bad_words_ids = [[padding]]
    model.save_pretrained(folder / "model")


def llama(folder: Path) -> None:
    pieces(folder, "tokenizer.model", "source", vocab_size=300, model_type="bpe", byte_fallback=True)
    (folder / "model/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")


@pytest.fixture(params=["translation", "causal_lm"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    task = request.param
    (tmp_path / "model").mkdir()
    marian(tmp_path) if task == "translation" else llama(tmp_path)
    rows = PAIRS if task == "translation" else [{"text": pair["source"]} for pair in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "study.yaml").write_text(STUDY.replace("TASK", task).replace("FOLDER", str(tmp_path)))
    return tmp_path / "study.yaml"


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_a_model_with_a_sentencepiece_tokenizer_is_fine_tuned(study: Path) -> None:
    launched = hpsearch.launch(study)
    (trial,) = launched.trials()
    assert trial.state == "completed", trial.error


def test_a_missing_sentencepiece_is_named(study: Path) -> None:
    program = f"import sys; sys.modules['sentencepiece'] = None\nfrom hpsearch.cli.main import main\nmain(['check', {str(study)!r}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sentencepiece is not installed: pip install sentencepiece" in done.stderr
