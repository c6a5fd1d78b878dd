"""Text classification, single-label or multi-label: cross-entropy, F1 and what goes with it. Owns scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification

from hpsearch.data.shards import SPLITS, DataCard, load_labels, load_split, read_card
from hpsearch.data.tokenizers import save_tokenizer
from hpsearch.errors import UsageError
from hpsearch.metrics.statistics import ZERO_DIVISION
from hpsearch.models import architecture, probe
from hpsearch.spec.settings import ModelSettings
from hpsearch.tasks.base import Batch, Evaluate, Indices, Scored, bucketed, make_score, padded, within_budget
from hpsearch.tasks.classification.definition import ClassificationOptions


def check_model(settings: ModelSettings, card: DataCard) -> None:
    probe.check_model(AutoModelForSequenceClassification, settings, **_tokens(card))


class Classification:
    """See `tasks.base.Task`. An example is a text; losses have shape (texts,): means over labels."""

    def __init__(
        self, data: Path, settings: ModelSettings, options: ClassificationOptions, label_smoothing: float
    ) -> None:
        self._folder = data
        self._card = read_card(data)
        self._texts = {split: load_split(data, split) for split in SPLITS}
        self._labels = {split: load_labels(data, split) for split in SPLITS}
        self._length = settings.context_length
        self._options = options
        self._label_smoothing = label_smoothing
        if options.positive_label is not None and options.positive_label not in self._card.labels:
            known = ", ".join(self._card.labels)
            raise UsageError(f"classification.positive_label: no label {options.positive_label!r}; there are {known}")
        self.model = architecture.build_model(AutoModelForSequenceClassification, settings, **_tokens(self._card))
        self.model.config.problem_type = f"{'multi' if options.multi_label else 'single'}_label_classification"
        self._weights = torch.tensor(self._class_weights(), dtype=torch.float32) if options.class_weights else None

    @property
    def num_examples(self) -> dict[str, int]:
        return {split: len(self._labels[split]) for split in SPLITS}

    def epoch_batches(self, order: np.random.Generator, batch_size: int) -> list[Indices]:
        return bucketed(self._lengths("train"), order, batch_size)

    def evaluation_batches(self, split: str) -> list[Indices]:
        return within_budget(self._lengths(split))

    def batch(self, split: str, indices: Indices) -> Batch:
        """Token ids of shape (texts, longest of them) and labels of shape (texts, labels)."""
        ids = padded(
            self._texts[split], indices, longest=self._length, padding=self._card.padding_id, end=self._card.end_id
        )
        return Batch((ids, torch.from_numpy(self._labels[split][indices].astype(np.int64))))

    def predicted(self, split: str, indices: Indices) -> int:
        return len(indices)

    def losses(self, batch: Batch) -> Tensor:
        labels = batch.tensors[1]
        logits = self._logits(batch)
        training = self.model.training
        weights = self._weights.to(logits.device) if self._weights is not None and training else None
        smoothing = self._label_smoothing if training else 0.0
        if self._options.multi_label:
            wanted = labels.float() * (1 - smoothing) + smoothing / 2
            losses = functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="none")
            return losses.mean(dim=1)
        return functional.cross_entropy(
            logits, labels.argmax(dim=1), weight=weights, reduction="none", label_smoothing=smoothing
        )

    def score(self, evaluate: Evaluate) -> Scored:
        """F1 (which ranks, averaged as the study says) and its relatives on the test split, with intervals."""
        truth, predicted = self._labels["test"], self._predict(evaluate, "test")
        contract = {
            "split": "test",
            "data": self._card.test_fingerprint,
            "labels": self._card.labels,
            "positive_label": self._options.positive_label,
            "context_length": self._length,
            "zero_division": ZERO_DIVISION,
        }
        kinds = {
            "f1": self._options.f1,
            "f1_macro": "macro",
            "f1_micro": "micro",
            "f1_weighted": "weighted",
            "precision": self._options.f1,
            "recall": self._options.f1,
            "accuracy": "accuracy",
        }
        examples = {"truth": np.asarray(truth), "predicted": predicted}
        scores = tuple(
            make_score(name, self._value(name, average, truth, predicted), examples, {**contract, "average": average})
            for name, average in kinds.items()
        )
        details: dict[str, Any] = {"predictions": [np.flatnonzero(row).tolist() for row in predicted]}
        if not self._options.multi_label:
            from sklearn.metrics import confusion_matrix

            matrix = confusion_matrix(truth.argmax(1), predicted.argmax(1), labels=range(len(self._card.labels)))
            details["confusion"] = {"labels": self._card.labels, "counts": matrix.tolist()}
        return Scored(scores=scores, details=details, examples=examples)

    def validation_score(self, evaluate: Evaluate) -> float:
        """F1 of the validation split, averaged as the study says."""
        predicted = self._predict(evaluate, "validation")
        return self._value("f1", self._options.f1, self._labels["validation"], predicted)

    def save(self, folder: str) -> None:
        save_tokenizer(self._folder, folder, context_length=self._length)

    def _logits(self, batch: Batch) -> Tensor:
        ids = batch.tensors[0]
        logits: Tensor = self.model(input_ids=ids, attention_mask=(ids != self._card.padding_id).long()).logits
        return logits.float()

    def _choose(self, logits: Tensor) -> Tensor:
        if self._options.multi_label:
            return (logits > 0).long()
        return functional.one_hot(logits.argmax(dim=1), logits.shape[1])

    def _class_weights(self) -> NDArray[np.float64]:
        """Inverse frequency, 1 on average; of several labels each, how many examples lack one for each that has it."""
        counts = self._labels["train"].sum(axis=0, dtype=np.int64)
        if self._options.multi_label:
            return np.asarray((len(self._labels["train"]) - counts) / counts)
        return np.asarray(counts.sum() / (len(counts) * counts))

    def _lengths(self, split: str) -> NDArray[np.int64]:
        return np.minimum(self._texts[split].lengths, self._length)

    def _predict(self, evaluate: Evaluate, split: str) -> NDArray[np.uint8]:
        """Predicted labels of a split, of shape (examples, labels)."""
        predicted = np.zeros(self._labels[split].shape, np.uint8)
        for indices, chosen in evaluate(split, lambda batch: self._choose(self._logits(batch))):
            predicted[indices] = chosen.cpu().numpy()
        return predicted

    def _value(self, name: str, average: str, truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> float:
        positive = self._card.labels.index(self._options.positive_label) if self._options.positive_label else None
        return _sklearn(name, average, truth, predicted, positive)


def _sklearn(
    name: str, average: str, truth: NDArray[np.uint8], predicted: NDArray[np.uint8], positive: int | None
) -> float:
    from sklearn import metrics  # takes a second, and nothing is scored at first

    if average == "accuracy":
        return float(metrics.accuracy_score(truth, predicted))
    function = {"precision": metrics.precision_score, "recall": metrics.recall_score}.get(name, metrics.f1_score)
    if average == "binary":
        return float(function(truth[:, positive], predicted[:, positive], zero_division=ZERO_DIVISION))
    return float(function(truth, predicted, average=average, zero_division=ZERO_DIVISION))


def _tokens(card: DataCard) -> dict[str, Any]:
    return {
        "vocab_size": card.vocab_size,
        "pad_token_id": card.padding_id,
        "num_labels": len(card.labels),
        "id2label": dict(enumerate(card.labels)),
        "label2id": {label: number for number, label in enumerate(card.labels)},
    }
