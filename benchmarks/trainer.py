"""Our training loop beside the HF Trainer: tokens per second on the same model, data, batch size and precision.

    python benchmarks/trainer.py [--repeats N] [--epochs N] [--device cpu|cuda] [--only WORD ...]

`hpsearch` trains as it comes, with Muon and averaged weights; `hpsearch, AdamW` with the optimizer of the HF Trainer
and its last weights. A run trains with dropout, takes the validation loss as often as a study does, and is scored on
the test split (perplexity; BLEU by greedy decoding; F1): all of that is in its time, building the model is not. Runs
are interleaved; figures are medians. The HF Trainer is used as its documentation has it: dynamic padding, fused AdamW,
batches of 64 in evaluation, nothing saved; `group_by_length` is its row with batches of similar length. Ours writes its
checkpoints.

The last column is the part of this machine's matrix-multiply speed, measured in the same run, that the multiplications
of the model (6 x weights + 12 x layers x context x width a token, a third of it in evaluation) come to.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import record
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    default_data_collator,
)

from hpsearch.data.prepare import prepare
from hpsearch.data.shards import SPLITS, load_texts
from hpsearch.models.configuration import build_config
from hpsearch.models.kernels import IGNORED
from hpsearch.records import TrialConfig
from hpsearch.spec.settings import split_settings
from hpsearch.spec.study import study_class
from hpsearch.spec.task import task_named
from hpsearch.training.devices import pick_device
from hpsearch.training.random_states import seed_everything
from hpsearch.training.trainer import Trainer

CASES: dict[str, dict[str, Any]] = {
    "causal LM": {
        "task": "causal_lm",
        "data": {"corpus": "python_docs", "fraction": 0.4},
        "tokenizer": {"vocab_size": 1024},
        "model": {"architecture": "gpt2", "hidden_size": 128, "num_layers": 4, "context_length": 64, "init_std": 0.08},
        "training": {"batch_size": 16, "learning_rate": 3e-3},
    },
    "causal LM, vocabulary 4096": {
        "task": "causal_lm",
        "data": {"corpus": "python_docs", "fraction": 0.6},
        "tokenizer": {"vocab_size": 4096},
        "model": {"architecture": "gpt2", "hidden_size": 128, "num_layers": 4, "context_length": 128, "init_std": 0.08},
        "training": {"batch_size": 16, "learning_rate": 3e-3},
    },
    "causal LM, GPT-2 small": {
        "task": "causal_lm",
        "data": {"corpus": "python_docs"},
        "tokenizer": {"vocab_size": 8192},
        "model": {"architecture": "gpt2", "hidden_size": 768, "num_layers": 12, "num_heads": 12, "context_length": 256},
        "training": {"batch_size": 32, "learning_rate": 6e-4},
    },
    "translation": {
        "task": "translation",
        "data": {"corpus": "ui_messages", "fraction": 0.5},
        "tokenizer": {"vocab_size": 2000},
        "model": {
            "architecture": "marian", "hidden_size": 96, "num_heads": 4, "num_layers": 2, "context_length": 48,
            "init_std": 0.1, "config": {"scale_embedding": True},
        },
        "training": {"batch_size": 32, "learning_rate": 2e-3},
    },
    "classification": {
        "task": "classification",
        "data": {"corpus": "python_areas"},
        "tokenizer": {"vocab_size": 4000},
        "model": {"architecture": "bert", "hidden_size": 64, "num_layers": 2, "context_length": 64},
        "training": {"batch_size": 32, "learning_rate": 2e-3},
    },
}  # fmt: skip
"""The study files' own sizes, with dropout."""
GPU_ONLY = ("causal LM, GPT-2 small",)
DROPOUT = 0.1
EVALUATIONS = 2
"""An epoch, as in a study of some 20 epochs."""


@dataclass(frozen=True)
class Outcome:
    seconds: float
    valid_loss: float
    score: float
    """Test perplexity, BLEU or macro F1."""


class Case:
    """A task with its data, for both trainers."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        epochs: int,
        device: str,
        data: str | None = None,
        changes: dict[str, Any] | None = None,
        dropout: float = DROPOUT,
        evaluations: int = EVALUATIONS,
    ) -> None:
        """`data` is a folder of tokenized text, made if there is none; `changes` are settings of a run by name."""
        content = CASES[name]
        model, training = split_settings(changes or {})
        self.kind = content["task"]
        self.folder = folder
        self.device = pick_device(device)
        spec = study_class(self.kind).model_validate(
            {
                **content,
                "name": "benchmark",
                "model": {**content["model"], "dropout": dropout, **model},
                "training": {
                    **content["training"],
                    "num_epochs": epochs,
                    "evaluations_per_epoch": evaluations,
                    **training,
                },
                "folder": str(folder),
            }
        )
        self.model_settings, self.run = spec.settings_for({})
        self.config = TrialConfig(
            study="benchmark", number=0, task=self.kind, seed=0, params={}, model=self.model_settings,
            training=self.run, options=spec.options.model_dump(), rule=None,
            data=data or str(prepare(spec)[0]), folder=str(folder / "trial"), threads=torch.get_num_threads(),
        )  # fmt: skip
        self.task: Any = task_named(self.config.task).build(self.config)
        self.tokens = {split: self._count(split) for split in SPLITS}

    def _count(self, split: str) -> int:
        """Real tokens that a model reads of a split."""
        if self.kind == "causal_lm":
            return int(self.task.num_examples[split]) * int(self.model_settings.context_length)
        length = self.model_settings.context_length
        sides = [self.task._sources, self.task._targets] if self.kind == "translation" else [self.task._texts]
        return int(sum(np.minimum(side[split].lengths, length).sum() for side in sides))

    @property
    def flops(self) -> float | None:
        """Multiplications and additions of a causal language model's run, evaluation included."""
        if self.kind != "causal_lm":
            return None
        model = self.model_settings
        layers, width, context = model.num_layers or 0, model.hidden_size, model.context_length
        weights = 12 * layers * width**2 + width * self.task.model.config.vocab_size
        token = 6 * weights + 12 * layers * context * width
        evaluated = (
            self.tokens["validation"] * (self.run.evaluations_per_epoch or 1) * self.run.num_epochs
            + self.tokens["test"]
        )
        return token * (self.tokens["train"] * self.run.num_epochs + evaluated / 3)

    def ours(self, seed: int, *, adamw: bool = False) -> Outcome:
        seed_everything(seed)
        task = task_named(self.config.task).build(self.config)
        shutil.rmtree(self.config.folder, ignore_errors=True)
        run = self.run.model_copy(update={"optimizer": "adamw", "weight_average": 0.0} if adamw else {})
        trainer = Trainer(task, run, seed=seed, device=self.device, folder=Path(self.config.folder))
        began = _now(self.device)
        last = [point.valid_loss for point in trainer.points()][-1]
        score = trainer.score().scores[0].value
        return Outcome(_now(self.device) - began, last, score)

    def theirs(self, seed: int, *, grouped: bool = False, callbacks: Sequence[Any] = ()) -> Outcome:
        transformers.set_seed(seed)
        run, make = self.run, {"causal_lm": self._causal, "translation": self._pairs, "classification": self._texts}
        model, data, collator, metrics = make[self.kind]()
        steps = math.ceil(len(data["train"]) / run.batch_size)
        options: dict[str, Any] = {
            "output_dir": str(self.folder / "hf"),
            "per_device_train_batch_size": run.batch_size,
            "per_device_eval_batch_size": 64,
            "num_train_epochs": run.num_epochs,
            "learning_rate": run.learning_rate,
            "weight_decay": run.weight_decay,
            "adam_beta2": run.adam_beta2,
            "warmup_steps": round(run.warmup_fraction * steps * run.num_epochs),
            "lr_scheduler_type": "cosine",
            "max_grad_norm": run.gradient_clip,
            "optim": "adamw_torch_fused",
            "eval_strategy": "steps",
            "eval_steps": max(1, steps // (run.evaluations_per_epoch or 1)),
            "logging_strategy": "steps",
            "logging_steps": max(1, steps // (run.evaluations_per_epoch or 1)),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu",
            "bf16": self.device.type == "cuda",
            "seed": seed,
        }
        if grouped:
            options["train_sampling_strategy"] = "group_by_length"
        if self.kind == "translation":
            arguments: Any = Seq2SeqTrainingArguments(
                **options, predict_with_generate=True, generation_max_length=self.model_settings.context_length
            )
            kind: Any = Seq2SeqTrainer
        else:
            arguments, kind = TrainingArguments(**options), transformers.Trainer
        trainer = kind(
            model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["validation"],
            data_collator=collator, callbacks=list(callbacks),
        )  # fmt: skip
        if self.kind == "translation":
            # Sentences are decoded for the test split alone, as ours are.
            arguments.predict_with_generate = False
        trainer.remove_callback(transformers.PrinterCallback)
        began = _now(self.device)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if self.kind == "causal_lm":
            score = math.exp(trainer.evaluate(data["test"])["eval_loss"])
        else:
            if self.kind == "translation":
                arguments.predict_with_generate = True
            score = metrics(trainer.predict(data["test"]).predictions)
        return Outcome(_now(self.device) - began, losses[-1], score)

    # The parts of the HF Trainer, as a user would make them

    def _causal(self) -> tuple[PreTrainedModel, dict[str, Any], Any, Any]:
        config = build_config(AutoModelForCausalLM, self.model_settings, vocab_size=self.task.model.config.vocab_size)
        config.activation_function = "gelu_new"  # what its configuration comes with
        data = {}
        length = self.model_settings.context_length
        for split in SPLITS:
            # The stream cut into pieces, one behind the other, as transformers' own examples do it.
            starts = length * np.arange(self.task.num_examples[split])
            inputs, targets = self.task.batch(split, starts).tensors
            labels = inputs.masked_fill(targets == IGNORED, IGNORED)  # what fills up the last one
            data[split] = [{"input_ids": row, "labels": own} for row, own in zip(inputs, labels, strict=True)]
        return AutoModelForCausalLM.from_config(config), data, default_data_collator, None

    def _tokenizer(self) -> Any:
        place = self.folder / "tokenizer"
        self.task.save(str(place))
        return AutoTokenizer.from_pretrained(place)

    def _pairs(self) -> tuple[PreTrainedModel, dict[str, Any], Any, Any]:
        from sacrebleu.metrics.bleu import BLEU

        model = AutoModelForSeq2SeqLM.from_config(self.task.model.config)
        tokenizer = self._tokenizer()
        data = {
            split: [
                {"input_ids": source, "labels": target}
                for source, target in zip(
                    self._documents(self.task._sources[split]), self._documents(self.task._targets[split]), strict=True
                )
            ]
            for split in SPLITS
        }

        def bleu(ids: Any) -> float:
            text = tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            return float(BLEU().corpus_score(text, [load_texts(Path(self.config.data), "test", "target")]).score)

        return model, data, DataCollatorForSeq2Seq(tokenizer, model=model), bleu

    def _texts(self) -> tuple[PreTrainedModel, dict[str, Any], Any, Any]:
        from sklearn.metrics import f1_score

        model = AutoModelForSequenceClassification.from_config(self.task.model.config)
        labels = {split: self.task._labels[split].argmax(1).tolist() for split in SPLITS}
        data = {
            split: [
                {"input_ids": ids, "label": label}
                for ids, label in zip(self._documents(self.task._texts[split]), labels[split], strict=True)
            ]
            for split in SPLITS
        }

        def f1(logits: Any) -> float:
            return float(f1_score(labels["test"], logits.argmax(-1), average="macro"))

        return model, data, DataCollatorWithPadding(self._tokenizer()), f1

    def _documents(self, split: Any) -> list[list[int]]:
        length = self.model_settings.context_length
        return [split.document(index)[:length].tolist() for index in range(len(split.lengths))]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_speed(device: torch.device) -> float:
    """Multiplications and additions a second of a large product, in the precision that is trained in."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(12):
        began = _now(device)
        left @ right
        times.append(_now(device) - began)
    return 2 * size**3 / min(times)


def measure(name: str, repeats: int, epochs: int, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        case = Case(name, Path(folder), epochs=epochs, device=device)
        rows: dict[str, Callable[[int], Outcome]] = {
            "hpsearch": case.ours,
            "hpsearch, AdamW": lambda seed: case.ours(seed, adamw=True),
            "HF Trainer": case.theirs,
        }
        if case.kind != "causal_lm":
            rows["HF Trainer, group_by_length"] = lambda seed: case.theirs(seed, grouped=True)
        outcomes: dict[str, list[Outcome]] = {row: [] for row in rows}
        speeds = []
        if case.device.type == "cuda":
            for run in rows.values():
                run(repeats)  # libraries choose their kernels at their first calls
        for seed in range(repeats):
            speeds.append(matrix_speed(case.device))
            for row, run in rows.items():
                outcomes[row].append(run(seed))
        trained = case.tokens["train"] * epochs
        found: dict[str, Any] = {"matrix_gflops": max(speeds) / 1e9, "rows": {}}
        base = statistics.median(outcome.seconds for outcome in outcomes["HF Trainer"])
        for row, there in outcomes.items():
            seconds = [outcome.seconds for outcome in there]
            median = statistics.median(seconds)
            losses = [outcome.valid_loss for outcome in there]
            scores = [outcome.score for outcome in there]
            share = None if case.flops is None else case.flops / median / max(speeds)
            found["rows"][row] = {
                "tokens_per_second": trained / median,
                "times_hf_trainer": base / median,
                "seconds": seconds,
                "valid_loss": losses,
                "score": scores,
                "share_of_matrix_speed": share,
            }
            spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
            print(
                f"{name:<27}{row:<29}{trained / median:>10,.0f}{base / median:>7.2f}{spread:>12}"
                f"{statistics.mean(losses):>9.3f}{statistics.mean(scores):>9.2f}"
                + ("" if share is None else f"{share:>8.2f}")
            )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose names hold one of these")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = pick_device(options.device)
    cases = [name for name in CASES if any(word in name for word in options.only or [""])]
    cases = [name for name in cases if device.type == "cuda" or name not in GPU_ONLY]
    print(f"{device}, {torch.get_num_threads()} thread, {options.repeats} runs of {options.epochs} epochs each")
    print(f"{'':<27}{'':<29}{'tokens/s':>10}{'times':>7}{'seconds':>12}{'valid':>9}{'score':>9}{'of GEMM':>8}")
    found = {name: measure(name, options.repeats, options.epochs, options.device) for name in cases}
    record.keep(
        f"trainer-{device.type}",
        "torch", "transformers", "accelerate",
        repeats=options.repeats, epochs=options.epochs, cases=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
