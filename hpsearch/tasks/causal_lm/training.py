"""Causal language modelling: windows of a token stream, next-token loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from functools import partial
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
from hpsearch.tasks.base import EVALUATION_TOKENS, Batch, Evaluate, Indices, Scored, cut, make_score
from hpsearch.tasks.causal_lm.definition import CausalLMOptions
from hpsearch.tasks.windows import ContinuousWindows, PackedWindows, Windows

_check_apart = partial(probe.check_apart, option="causal_lm.packing", instead="packing: continuous")


def check_model(settings: ModelSettings, options: CausalLMOptions, card: DataCard) -> None:
    tries = [_check_apart] if options.packing == "documents" else []
    probe.check_model(AutoModelForCausalLM, settings, tries=tries, vocab_size=card.vocab_size)


class CausalLM:
    """See `tasks.base.Task`. Indices are those of windows of `context_length` tokens; see `tasks.windows`."""

    def __init__(self, data: Path, settings: ModelSettings, options: CausalLMOptions | None = None) -> None:
        options = options or CausalLMOptions()
        self._folder = data
        self._card: DataCard = read_card(data)
        self._splits: dict[str, TokenSplit] = {split: load_split(data, split) for split in SPLITS}
        self._length, self._packing = settings.context_length, options.packing
        self._windows = {split: self._windows_of(split) for split in SPLITS}
        self.model = architecture.build_model(AutoModelForCausalLM, settings, vocab_size=self._card.vocab_size)
        # A text begins behind the end of another. A pretrained model knows its own length.
        self._longest = self._length if settings.pretrained is None else None
        end = {"bos_token_id": self._card.end_id, "pad_token_id": self._card.end_id}
        lengths = {} if self._longest is None else {"max_length": self._longest}
        architecture.set_generation(self.model, **end, **lengths)
        if options.packing == "documents":
            _check_apart(self.model)
        self._loss = VocabularyLoss(self.model, input_ids=torch.arange(2)[None])

    def _windows_of(self, split: str) -> Windows:
        ends = self._splits[split].document_ends
        if self._packing == "documents":
            # What begins a text in a pretrained model's vocabulary takes the place of what ended the one before.
            skipped = 0 if self._card.begin_id is None else 1
            return PackedWindows(ends, self._length, is_training=split == "train", skipped=skipped)
        return ContinuousWindows(ends, self._length, is_training=split == "train")

    @property
    def num_examples(self) -> dict[str, int]:
        return {split: windows.count for split, windows in self._windows.items()}

    def epoch_batches(self, order: np.random.Generator, batch_size: int) -> list[Indices]:
        return cut(self._windows["train"].of_epoch(order), batch_size)

    def evaluation_batches(self, split: str) -> list[Indices]:
        return cut(self._windows[split].in_order(), max(1, EVALUATION_TOKENS // self._length))

    def batch(self, split: str, indices: Indices) -> Batch:
        """Inputs, their positions if documents are kept apart, and labels; each of shape (examples, context_length)."""
        tokens, layout = self._splits[split].tokens, self._windows[split].layout(indices)
        is_read = layout.places >= 0
        places = np.where(is_read, layout.places, 0)
        inputs, labels = tokens[places].astype(np.int64), tokens[places + 1].astype(np.int64)
        labels[~is_read | (labels == self._card.begin_id)] = IGNORED
        arrays = (inputs, labels) if layout.positions is None else (inputs, layout.positions, labels)
        return Batch(tuple(map(torch.from_numpy, arrays)))

    def predicted(self, split: str, indices: Indices) -> int:
        if self._card.begin_id is not None:
            return int((self.batch(split, indices).tensors[-1] != IGNORED).sum())
        return self._windows[split].predicted(indices)

    def losses(self, batch: Batch) -> Tensor:
        inputs, *positions, labels = batch.tensors
        if positions:
            return self._loss(labels, input_ids=inputs, position_ids=positions[0])
        return self._loss(labels, input_ids=inputs)

    def score(self, evaluate: Evaluate) -> Scored:
        """Perplexity per token and bits per byte of UTF-8 text, with intervals over documents."""
        test = self._splits["test"]
        nats = np.zeros(test.document_ends[-1])
        for indices, losses in evaluate("test", self.losses):
            places = self._windows["test"].layout(indices).places
            nats[places[places >= 0]] = losses.double().cpu().numpy()[places >= 0]
        starts = np.concatenate([[0], test.document_ends[:-1]])
        per_document = np.add.reduceat(nats, starts)
        lengths = test.lengths if self._card.begin_id is None else test.lengths - 1
        examples = {"nats": per_document, "tokens": lengths, "bytes": test.document_bytes}
        shared = {
            "split": "test",
            "data": self._card.test_fingerprint,
            "context_length": self._length,
            "stride": self._length,
            **({"packing": self._packing} if self._packing != "continuous" else {}),
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
