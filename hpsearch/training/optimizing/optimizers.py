"""The optimizers of a run: AdamW (Loshchilov & Hutter, 2019) and, for hidden matrices, Muon (see `muon`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpsearch.models import architecture
from hpsearch.spec.settings import RunSettings
from hpsearch.training.optimizing.muon import Muon

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

Optimizers = Mapping[str, torch.optim.Optimizer]
"""By the names that their states have in a checkpoint."""


def make_optimizers(
    model: PreTrainedModel, trained: Iterable[nn.Parameter], settings: RunSettings, *, muon_dtype: torch.dtype
) -> Optimizers:
    """Optimizers that share the trained parameters between them. Biases, gains and other vectors are not decayed."""
    hidden = architecture.hidden_matrices(model) if settings.optimizer == "muon" else []
    apart = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in trained if id(parameter) not in apart]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )
    if not hidden:
        return {"optimizer": adamw}
    muon = Muon(hidden, lr=settings.learning_rate, weight_decay=settings.weight_decay, dtype=muon_dtype)
    return {"optimizer": adamw, "muon": muon}
