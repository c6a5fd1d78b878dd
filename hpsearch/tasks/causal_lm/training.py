"""Causal language modelling: windows of a token stream, next-token loss, perplexity and bits per byte.

Training and evaluation read the stream in windows of `context_length` that do not overlap, so each token is predicted
once a pass. In training they begin at another random place in every epoch, and the last one runs over the stream's end
into its beginning; what fills no window is left out. In evaluation the last, partial window is padded.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hpsearch.data.shards import SPLITS, DataCard, TokenSplit, load_split, read_card
from hpsearch.data.tokenizers import save_tokenizer
from hpsearch.models import architecture, probe
from hpsearch.models.kernels import IGNORED, VocabularyLoss
from hpsearch.spec.settings import ModelSettings
from hpsearch.tasks.base import EVALUATION_TOKENS, Batch, Evaluate, Indices, Scored, cut, gather_losses, make_score


def check_model(settings: ModelSettings, card: DataCard) -> None:
    probe.check_model(AutoModelForCausalLM, settings, vocab_size=card.vocab_size)


class CausalLM:
    """See `tasks.base.Task`. Indices are the places in the stream where windows begin."""

    def __init__(self, data: Path, settings: ModelSettings) -> None:
        self._folder = data
        self._card: DataCard = read_card(data)
        self._splits: dict[str, TokenSplit] = {split: load_split(data, split) for split in SPLITS}
        self._length = settings.context_length
        self.model = architecture.build_model(AutoModelForCausalLM, settings, vocab_size=self._card.vocab_size)
        # A text begins behind the end of another. A pretrained model knows its own length.
        self._longest = self._length if settings.pretrained is None else None
        end = {"bos_token_id": self._card.end_id, "pad_token_id": self._card.end_id}
        lengths = {} if self._longest is None else {"max_length": self._longest}
        architecture.set_generation(self.model, **end, **lengths)
        self._loss = VocabularyLoss(self.model, input_ids=torch.arange(2)[None])

    @property
    def num_examples(self) -> dict[str, int]:
        predicted = {split: len(self._splits[split].tokens) - 1 for split in SPLITS}
        counts = {split: math.ceil(predicted[split] / self._length) for split in SPLITS}
        counts["train"] = max(1, predicted["train"] // self._length)
        return counts

    def epoch_batches(self, order: np.random.Generator, batch_size: int) -> list[Indices]:
        count, predicted = self.num_examples["train"], len(self._splits["train"].tokens) - 1
        starts = (order.integers(predicted) + self._length * order.permutation(count)) % predicted
        return cut(starts, batch_size)

    def evaluation_batches(self, split: str) -> list[Indices]:
        starts = self._length * np.arange(self.num_examples[split])
        return cut(starts, max(1, EVALUATION_TOKENS // self._length))

    def batch(self, split: str, indices: Indices) -> Batch:
        """Inputs and labels, each of shape (examples, context_length)."""
        tokens = self._splits[split].tokens
        predicted = len(tokens) - 1
        places = indices[:, None] + np.arange(self._length)
        around = places % predicted
        inputs, labels = tokens[around].astype(np.int64), tokens[around + 1].astype(np.int64)
        if self._card.begin_id is not None:
            labels[labels == self._card.begin_id] = IGNORED
        if split == "train":
            labels[:, predicted:] = IGNORED  # of a stream that is shorter than a window
        else:
            labels[places >= predicted] = IGNORED
        return Batch((torch.from_numpy(inputs), torch.from_numpy(labels)))

    def predicted(self, split: str, indices: Indices) -> int:
        predicted = len(self._splits[split].tokens) - 1
        if self._card.begin_id is not None:
            return int((self.batch(split, indices).tensors[1] != IGNORED).sum())
        left = np.full_like(indices, predicted) if split == "train" else predicted - indices
        return int(np.minimum(left, self._length).sum())

    def losses(self, batch: Batch) -> Tensor:
        inputs, labels = batch.tensors
        return self._loss(labels, input_ids=inputs)

    def score(self, evaluate: Evaluate) -> Scored:
        """Perplexity per token and bits per byte of UTF-8 text, with intervals over documents."""
        test = self._splits["test"]
        losses = [losses for _, losses in evaluate("test", self.losses)]
        nats = gather_losses(losses)[: test.document_ends[-1]]
        starts = np.concatenate([[0], test.document_ends[:-1]])
        per_document = np.add.reduceat(nats, starts)
        lengths = test.lengths if self._card.begin_id is None else test.lengths - 1
        examples = {"nats": per_document, "tokens": lengths, "bytes": test.document_bytes}
        shared = {
            "split": "test",
            "data": self._card.test_fingerprint,
            "context_length": self._length,
            "stride": self._length,
        }
        by_token = {**shared, "unit": "token", "tokenizer": self._card.tokenizer}
        perplexity = math.exp(per_document.sum() / lengths.sum())
        bits = float(per_document.sum() / math.log(2) / test.document_bytes.sum())
        scores = (
            make_score("perplexity", perplexity, examples, by_token),
            make_score("bits_per_byte", bits, examples, {**shared, "unit": "byte of UTF-8"}),
        )
        return Scored(scores=scores, examples=examples)

    def save(self, folder: str) -> None:
        save_tokenizer(self._folder, folder, context_length=self._longest, sides=("left", "left"))
