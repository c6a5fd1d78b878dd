"""Causal language modelling: windows of a token stream, next-token loss, perplexity and bits per byte.

Owns the mapping from our settings to any causal architecture of transformers. Training and evaluation read the stream
in windows of `context_length` that do not overlap, so each token is predicted once a pass; the stream's last, partial
window is padded in evaluation and left out in training.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hpsearch.data import SPLITS, DataCard, TokenSplit, load_split, read_card
from hpsearch.errors import UsageError
from hpsearch.settings import ModelSettings
from hpsearch.tasks.base import Batch, bootstrap_ratio, gather_losses
from hpsearch.trial import Score, TrialConfig

IGNORED = -100
"""Label of a position where nothing is predicted."""
_EVALUATION_TOKENS = 4096
_DROPOUT_NAMES = (
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout", "attention_dropout", "resid_dropout",
    "embd_dropout", "embed_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "residual_dropout", "embedding_dropout",
)  # fmt: skip


def build(config: TrialConfig) -> CausalLM:
    return CausalLM(Path(config.data), config.model)


class CausalLM:
    """See `tasks.base.Task`."""

    def __init__(self, data: Path, settings: ModelSettings) -> None:
        self._folder = data
        self._card: DataCard = read_card(data)
        self._splits: dict[str, TokenSplit] = {split: load_split(data, split) for split in SPLITS}
        self._length = settings.context_length
        self.model: PreTrainedModel = build_model(settings, self._card.vocab_size)

    @property
    def num_examples(self) -> dict[str, int]:
        predicted = {split: len(self._splits[split].tokens) - 1 for split in SPLITS}
        counts = {split: math.ceil(predicted[split] / self._length) for split in SPLITS}
        counts["train"] = max(1, predicted["train"] // self._length)
        return counts

    def batch(self, split: str, indices: NDArray[np.int64]) -> Batch:
        """Inputs and labels, each of shape (examples, context_length)."""
        tokens = self._splits[split].tokens
        positions = indices[:, None] * self._length + np.arange(self._length + 1)
        window = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)
        labels = window[:, 1:].copy()
        labels[positions[:, 1:] >= len(tokens)] = IGNORED
        return torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(labels)

    def losses(self, batch: Batch) -> tuple[Tensor, int]:
        inputs, labels = batch
        logits = self.model(input_ids=inputs, use_cache=False).logits
        losses = functional.cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        return losses.view_as(labels), labels.numel()

    def evaluation_batch_size(self) -> int:
        return max(1, _EVALUATION_TOKENS // self._length)

    def score(self, losses: Sequence[Tensor]) -> tuple[Score, ...]:
        """Perplexity per token and bits per byte of UTF-8 text, with intervals over documents."""
        test = self._splits["test"]
        nats = gather_losses(losses)[: test.document_ends[-1]]
        starts = np.concatenate([[0], test.document_ends[:-1]])
        per_document = np.add.reduceat(nats, starts)
        tokens = np.diff(test.document_ends, prepend=0).astype(np.float64)
        sizes = test.document_bytes.astype(np.float64)
        shared = {
            "split": "test",
            "data": self._card.fingerprint,
            "context_length": self._length,
            "stride": self._length,
        }
        low, high = bootstrap_ratio(per_document, tokens)
        perplexity = Score(
            metric="perplexity",
            value=math.exp(per_document.sum() / tokens.sum()),
            low=math.exp(low),
            high=math.exp(high),
            n=len(tokens),
            contract={**shared, "unit": "token", "tokenizer": self._card.tokenizer},
        )
        low, high = bootstrap_ratio(per_document / math.log(2), sizes)
        bits = Score(
            metric="bits_per_byte",
            value=float(per_document.sum() / math.log(2) / sizes.sum()),
            low=low,
            high=high,
            n=len(tokens),
            contract={**shared, "unit": "byte of UTF-8"},
        )
        return perplexity, bits

    def save(self, folder: str) -> None:
        self.model.config.save_pretrained(folder)
        shutil.copy(self._folder / "tokenizer.json", folder)


def build_model(settings: ModelSettings, vocab_size: int) -> PreTrainedModel:
    """A model of the architecture with fresh weights. Raises UsageError when the architecture lacks a setting."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(build_config(settings, vocab_size))
    return model


def check_model(settings: ModelSettings, vocab_size: int) -> None:
    """Raise UsageError if such a model cannot be built; allocates no memory for weights."""
    config = build_config(settings, vocab_size)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each architecture complains in its own way about sizes that do not fit together
        raise UsageError(f"model: a {settings.architecture} of these sizes cannot be built: {error}") from error


def build_config(settings: ModelSettings, vocab_size: int) -> PretrainedConfig:
    """The transformers configuration for our settings, under the names that the architecture gives them."""
    architecture = settings.architecture
    try:
        default = AutoConfig.for_model(architecture)
    except (ValueError, KeyError):
        raise UsageError(f"model.architecture: transformers knows no architecture '{architecture}'") from None
    if type(default) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(f"model.architecture: '{architecture}' has no causal language model in transformers")
    values = {
        **_shape(settings, default),
        **_derived(settings, default),
        "vocab_size": vocab_size,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    for name in _DROPOUT_NAMES:
        if hasattr(default, name):
            values[name] = settings.dropout
    for name, value in settings.config.items():
        if not hasattr(default, name):
            raise UsageError(f"model.config.{name}: the configuration of '{architecture}' has no such key")
        values[name] = value
    try:
        return AutoConfig.for_model(architecture, **values)
    except Exception as error:  # transformers raises many kinds for values that do not fit together
        raise UsageError(f"model: transformers refuses this configuration of '{architecture}': {error}") from error


def _shape(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    heads = settings.num_heads or _default_heads(settings.hidden_size)
    ours = {
        "num_hidden_layers": ("num_layers", settings.num_layers),
        "hidden_size": ("hidden_size", settings.hidden_size),
        "num_attention_heads": ("num_heads", heads),
        "max_position_embeddings": ("context_length", settings.context_length),
        "initializer_range": ("init_std", settings.init_std),
    }
    values: dict[str, Any] = {}
    for name, (setting, value) in ours.items():
        own_name = type(default).attribute_map.get(name, name)
        if hasattr(default, own_name):
            if value is not None:
                values[own_name] = value
        elif setting in ("num_layers", "hidden_size") or (setting == "init_std" and value is not None):
            raise UsageError(f"model.{setting}: the configuration of '{settings.architecture}' has no {name}")
    return values


def _derived(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    """Keys whose defaults belong to the size that the architecture was published at."""
    heads = settings.num_heads or _default_heads(settings.hidden_size)
    values: dict[str, Any] = {}
    if getattr(default, "intermediate_size", None) is not None:
        values["intermediate_size"] = 4 * settings.hidden_size
    if hasattr(default, "num_key_value_heads"):
        values["num_key_value_heads"] = heads
    if getattr(default, "head_dim", None) is not None:
        values["head_dim"] = settings.hidden_size // heads
    if getattr(default, "word_embed_proj_dim", None) is not None:
        values["word_embed_proj_dim"] = settings.hidden_size
    if getattr(default, "ffn_dim", None) is not None:
        values["ffn_dim"] = 4 * settings.hidden_size
    if getattr(default, "activation_function", None) == "gelu_new":
        # The same function in one fused kernel instead of eight elementwise ones.
        values["activation_function"] = "gelu_pytorch_tanh"
    return values


def _default_heads(hidden_size: int) -> int:
    """One head per 32 of width, or the nearest smaller number that divides the width."""
    return next(heads for heads in range(max(1, hidden_size // 32), 0, -1) if hidden_size % heads == 0)
