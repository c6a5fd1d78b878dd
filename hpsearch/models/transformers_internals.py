"""Private parts of transformers, each with the version it was read from (5.23). See `tests/unit/test_internals.py`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


def has_model(auto_class: Any, config: PretrainedConfig) -> bool:
    """Whether an Auto class has a model for configurations of this type."""
    return type(config) in auto_class._model_mapping


def forget_origin(config: Any) -> None:
    """Let a generation configuration stand for itself: derived from the model's, `save_pretrained` makes it anew."""
    config._from_model_config = False
