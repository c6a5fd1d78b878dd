"""Translation by encoder-decoders: next-token loss on the target, BLEU, chrF2++ and TER of decoded text.

Batches hold sentences of similar length, so that little of them is padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForSeq2SeqLM

from hpsearch.data.shards import SPLITS, DataCard, load_split, load_texts, read_card
from hpsearch.data.tokenizers import END_ID, PADDING_ID, decode, save_tokenizer
from hpsearch.errors import UsageError
from hpsearch.metrics import bleu
from hpsearch.metrics.sacrebleu_internals import sentence_statistics
from hpsearch.models import architecture, probe
from hpsearch.models.kernels import IGNORED, VocabularyLoss, can_decode, decode_greedily
from hpsearch.records import Score
from hpsearch.spec.settings import ModelSettings
from hpsearch.tasks.base import Batch, Evaluate, Indices, Scored, bucketed, make_score, padded, within_budget
from hpsearch.tasks.translation.definition import TranslationOptions


def check_model(settings: ModelSettings, card: DataCard) -> None:
    probe.check_model(AutoModelForSeq2SeqLM, settings, **_tokens(settings, card))


class Translation:
    """See `tasks.base.Task`. An example is a sentence pair; losses have shape (pairs, target tokens)."""

    def __init__(
        self, data: Path, settings: ModelSettings, options: TranslationOptions, label_smoothing: float
    ) -> None:
        self._folder = data
        self._card = read_card(data)
        self._sources = {split: load_split(data, split, "source") for split in SPLITS}
        self._targets = {split: load_split(data, split, "target") for split in SPLITS}
        self._length = settings.context_length
        self._predicted = {split: np.minimum(self._targets[split].lengths, self._length) for split in SPLITS}
        self._options = options
        chosen = options.bleu_tokenizer
        # Made here, so that what it lacks is found before anything is trained.
        words = self._card.bleu_tokenizer or "13a" if chosen == "auto" else chosen
        self._bleu = bleu.metric(words, longest_reference=self._card.longest_reference)
        self._label_smoothing = label_smoothing
        self.model = architecture.build_model(AutoModelForSeq2SeqLM, settings, **_tokens(settings, self._card))
        self._padding = self._card.padding_id
        self._set_language()
        self._start = self.model.config.decoder_start_token_id
        if self._start is None:
            raise UsageError(f"model.pretrained: {settings.pretrained} names no decoder_start_token_id")
        architecture.set_generation(
            self.model,
            max_length=self._length,
            num_beams=options.num_beams,
            do_sample=False,
            decoder_start_token_id=self._start,
            pad_token_id=self._padding,
        )
        self.model.config.prefix = options.source_prefix or None
        self.model.config.task_specific_params = None
        two = torch.arange(2)[None]
        self._loss = VocabularyLoss(
            self.model, input_ids=two, attention_mask=torch.ones_like(two), decoder_input_ids=two
        )
        self._decodes_greedily = options.num_beams == 1 and can_decode(self.model)

    @property
    def num_examples(self) -> dict[str, int]:
        return {split: len(self._sources[split].lengths) for split in SPLITS}

    def epoch_batches(self, order: np.random.Generator, batch_size: int) -> list[Indices]:
        return bucketed(self._lengths("train"), order, batch_size)

    def evaluation_batches(self, split: str) -> list[Indices]:
        return within_budget(self._lengths(split))

    def batch(self, split: str, indices: Indices) -> Batch:
        """Source and target ids, each of shape (pairs, longest of them)."""
        end = self._card.end_id
        source = padded(self._sources[split], indices, longest=self._length, padding=self._padding, end=end)
        target = padded(self._targets[split], indices, longest=self._length, padding=IGNORED, end=end)
        return Batch((source, target))

    def predicted(self, split: str, indices: Indices) -> int:
        return int(self._predicted[split][indices].sum())

    def losses(self, batch: Batch) -> Tensor:
        source, target = batch.tensors
        shifted = target.new_full(target.shape, self._start)
        shifted[:, 1:] = target[:, :-1].masked_fill(target[:, :-1] == IGNORED, self._padding)
        return self._loss(
            target,
            input_ids=source,
            attention_mask=(source != self._padding).long(),
            decoder_input_ids=shifted,
            label_smoothing=self._label_smoothing if self.model.training else 0.0,
        )

    def score(self, evaluate: Evaluate) -> Scored:
        """BLEU (which ranks), chrF2++ and TER of the test split, as the sacrebleu command line computes them."""
        outputs = self.decode(evaluate, "test")
        references = load_texts(self._folder, "test", "target")
        sources = load_texts(self._folder, "test", "source")
        shared = {
            "split": "test",
            "data": self._card.test_fingerprint,
            "num_beams": self._options.num_beams,
            "context_length": self._length,
        }
        metrics = {"bleu": self._bleu, "chrf": CHRF(word_order=2), "ter": TER()}
        scores = tuple(_score(name, metric, outputs, references, shared) for name, metric in metrics.items())
        examples = {name: sentence_statistics(metric, outputs, references) for name, metric in metrics.items()}
        shown = np.linspace(0, len(outputs) - 1, min(self._options.samples, len(outputs)), dtype=int)
        samples = [
            {"source": sources[index], "reference": references[index], "output": outputs[index]} for index in shown
        ]
        return Scored(scores=scores, details={"samples": samples, "outputs": outputs}, examples=examples)

    def validation_score(self, evaluate: Evaluate) -> float:
        """BLEU of the validation split."""
        references = load_texts(self._folder, "validation", "target")
        return float(self._bleu.corpus_score(self.decode(evaluate, "validation"), [references]).score)

    def decode(self, evaluate: Evaluate, split: str) -> list[str]:
        """Translations of a split, in its order, with a key-value cache."""
        outputs = [""] * self.num_examples[split]
        for indices, ids in evaluate(split, self._generate):
            # Not every tokenizer knows that the language is no part of the text.
            rows = [[token for token in row if token != self._card.first_id] for row in ids.tolist()]
            for index, text in zip(indices, decode(self._folder, rows), strict=True):
                outputs[index] = text
        return outputs

    def save(self, folder: str) -> None:
        save_tokenizer(self._folder, folder, context_length=self._length)

    def _set_language(self) -> None:
        """Have a multilingual model decode into the target language."""
        card, generation = self._card, self.model.generation_config
        if card.start_id is not None:
            self.model.config.decoder_start_token_id = generation.decoder_start_token_id = card.start_id
            generation.forced_bos_token_id = None
        if card.first_id is not None:
            generation.forced_bos_token_id = card.first_id

    def _generate(self, batch: Batch) -> Tensor:
        source = batch.tensors[0]
        is_text = (source != self._padding).long()
        if self._decodes_greedily:
            return decode_greedily(self.model, source, is_text, self._length)
        ids: Tensor = self.model.generate(input_ids=source, attention_mask=is_text, use_cache=True)
        return ids

    def _lengths(self, split: str) -> NDArray[np.int64]:
        """The longer side of each pair, as the model sees it."""
        longest = np.maximum(self._sources[split].lengths, self._targets[split].lengths)
        return np.minimum(longest, self._length)


def _tokens(settings: ModelSettings, card: DataCard) -> dict[str, Any]:
    if settings.pretrained is not None:
        return {"vocab_size": card.vocab_size}
    tokens: dict[str, Any] = {
        "vocab_size": card.vocab_size,
        "pad_token_id": PADDING_ID,
        "eos_token_id": END_ID,
        "bos_token_id": END_ID,
        "decoder_start_token_id": PADDING_ID,
    }
    if settings.architecture in ("marian", "bart", "mbart", "pegasus"):
        tokens["forced_eos_token_id"] = END_ID
    if card.target_vocab_size is not None:
        if settings.architecture != "marian":
            raise UsageError(
                f"tokenizer.shared: '{settings.architecture}' has one vocabulary for both languages; "
                "marian can have two"
            )
        tokens |= {
            "decoder_vocab_size": card.target_vocab_size,
            "share_encoder_decoder_embeddings": False,
            "tie_word_embeddings": True,
        }
    elif settings.architecture == "marian":
        tokens["decoder_vocab_size"] = card.vocab_size
    return tokens


def _score(name: str, metric: Any, outputs: list[str], references: list[str], shared: dict[str, Any]) -> Score:
    value = float(metric.corpus_score(outputs, [references]).score)
    counts = sentence_statistics(metric, outputs, references).astype(np.float64)
    contract = {**shared, "signature": str(metric.get_signature())}
    return make_score(name, value, {name: counts}, contract)
