"""Exported models in plain transformers: what they predict, in batches and from long texts, is what was scored."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import hpsearch
from hpsearch.api import export
from hpsearch.errors import UsageError

pytestmark = pytest.mark.slow

WORDS = ["file", "window", "save", "open", "close", "name", "red", "blue", "green", "house", "tree", "river"]
SCRATCH = "hidden_size: 32, num_layers: 1, num_heads: 2, context_length: 16"


def write(folder: Path, task: str, multi_label: bool = False) -> list[dict[str, Any]]:
    """Three splits beside the study; the last examples of the test split are longer than the context."""
    rng = random.Random(1)
    for split, short, long in (("train", 200, 0), ("validation", 16, 0), ("test", 12, 6)):
        texts = [[rng.choice(WORDS) for _ in range(rng.randint(2, 6))] for _ in range(short)]
        texts += [[rng.choice(WORDS) for _ in range(rng.randint(30, 40))] for _ in range(long)]
        rows: list[dict[str, Any]] = []
        for words in texts:
            text = " ".join(words)
            if task == "translation":
                rows.append({"source": text, "target": text[::-1].upper()})
            elif task == "causal_lm":
                rows.append({"text": text})
            else:
                labels = sorted({"abc"[WORDS.index(word) % 3] for word in words[-2:]})
                rows.append({"text": text, "label": labels if multi_label else labels[0]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def exported(folder: Path, task: str, model: str, more: str = "") -> tuple[str, dict[str, Any]]:
    """The folder of a model that `export` left, and the details of its trial."""
    data = "{files: {train: [train.jsonl], validation: [validation.jsonl], test: [test.jsonl]}}"
    (folder / "study.yaml").write_text(
        f"name: s\ntask: {task}\ndata: {data}\nmodel: {{{model}}}\n{more}"
        "training: {batch_size: 8, learning_rate: 8e-3, num_epochs: 6, evaluations_per_epoch: 1}\n"
        "budget: {trials: 1}\nprune: {unpromising: none, overfit: false}\nresources: {gpus_per_trial: 0}\nbackend: inline\n"
        f"store: sqlite:///{folder}/store.db\nfolder: {folder}/runs\n"
    )
    study = hpsearch.launch(folder / "study.yaml")
    trial = study.trial(0)
    assert trial.error is None, trial.error
    target = export("s", output=folder / "export", store=study.store)
    return str(target), trial.details


def gpt(folder: Path) -> Path:
    """A GPT whose tokenizer has no padding, and whose generation is of a kind that no study asks for."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    size = backend.get_vocab_size()
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    decoding = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "max_new_tokens": 99}
    GenerationConfig(eos_token_id=0).save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **decoding}))
    return folder


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("model", "multi_label"),
    [
        pytest.param("architecture: bert", True),
        pytest.param("architecture: bert", False, marks=NIGHTLY),
        pytest.param("architecture: gpt2", False, marks=NIGHTLY),
        pytest.param("architecture: gpt2", True, marks=NIGHTLY),
        pytest.param("pretrained", False),
        pytest.param("pretrained", True, marks=NIGHTLY),
    ],
)
def test_an_exported_classifier_predicts_what_was_scored(tmp_path: Path, model: str, multi_label: bool) -> None:
    texts = [row["text"] for row in write(tmp_path, "classification", multi_label)]
    start = (
        f"pretrained: {gpt(tmp_path / 'gpt')}, context_length: 16" if model == "pretrained" else f"{model}, {SCRATCH}"
    )
    more = f"classification: {{multi_label: {str(multi_label).lower()}}}\n"
    folder, details = exported(tmp_path, "classification", start, more)
    classify = pipeline("text-classification", model=folder, device="cpu")
    number = classify.model.config.label2id
    assert classify.tokenizer.model_max_length == 16
    if multi_label:
        rows = classify(texts, batch_size=4, truncation=True, top_k=None)
        found = [sorted(number[label["label"]] for label in row if label["score"] > 0.5) for row in rows]
    else:
        found = [[number[row["label"]]] for row in classify(texts, batch_size=4, truncation=True)]
    assert found == details["predictions"]


@pytest.mark.parametrize(
    "model",
    [
        "architecture: gpt2",
        pytest.param("architecture: llama", marks=NIGHTLY),
        pytest.param("pretrained", marks=NIGHTLY),
    ],
)
def test_an_exported_language_model_continues_batches_within_its_context(tmp_path: Path, model: str) -> None:
    long = write(tmp_path, "causal_lm")[-1]["text"]
    start = (
        f"pretrained: {gpt(tmp_path / 'gpt')}, context_length: 16" if model == "pretrained" else f"{model}, {SCRATCH}"
    )
    folder, _ = exported(tmp_path, "causal_lm", start)
    write_on = pipeline("text-generation", model=folder, device="cpu", do_sample=False)
    prompts = ["file", "window save open", "red blue green house", ""]
    alone = [write_on(prompt)[0]["generated_text"] for prompt in prompts]
    for text, row in zip(alone, write_on(prompts[:3], batch_size=3), strict=False):
        assert text.startswith(row[0]["generated_text"]), "padding counts towards the length, and changes nothing else"
    ids = write_on.model.generate(do_sample=False)[0]
    assert ids[0] == write_on.tokenizer.eos_token_id, "a text begins behind the end of another"
    if model != "pretrained":
        assert len(ids) <= write_on.tokenizer.model_max_length == 16
    assert write_on(long, handle_long_generation="hole", max_new_tokens=4)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        pytest.param("marian", "translation: {num_beams: 2}\n", marks=NIGHTLY),
        pytest.param("marian", "tokenizer: {shared: false, vocab_size: 300}\n"),
        pytest.param("bart", "", marks=NIGHTLY),
        pytest.param("t5", "translation: {num_beams: 2}\n", marks=NIGHTLY),
    ],
)
def test_an_exported_translator_says_what_was_scored(tmp_path: Path, architecture: str, more: str) -> None:
    sources = [row["source"] for row in write(tmp_path, "translation")]
    folder, details = exported(tmp_path, "translation", f"architecture: {architecture}, {SCRATCH}", more)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    target = AutoTokenizer.from_pretrained(folder, subfolder="target") if "shared" in more else tokenizer
    outputs: list[str] = []
    for start in range(0, len(sources), 4):
        batch = tokenizer(sources[start : start + 4], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            outputs += target.batch_decode(model.generate(**batch), skip_special_tokens=True)
    assert [output.strip() for output in outputs] == details["outputs"]
    if "shared" in more:
        (tmp_path / "again").mkdir()
        write(tmp_path / "again", "translation")
        with pytest.raises(UsageError, match="has a vocabulary for each language"):
            exported(tmp_path / "again", "translation", f"pretrained: {folder}, context_length: 16")
