"""Our model settings under the names that each architecture of transformers gives them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hpsearch.data import END_ID
from hpsearch.errors import UsageError
from hpsearch.settings import ModelSettings

_DROPOUT_NAMES = (
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout", "attention_dropout", "resid_dropout",
    "embd_dropout", "embed_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "residual_dropout", "embedding_dropout", "dropout_rate", "seq_classif_dropout",
)  # fmt: skip
_FEED_FORWARD_NAMES = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim")
_HEAD_NAMES = ("num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads")


def build_model(auto_class: Any, settings: ModelSettings, **tokens: Any) -> PreTrainedModel:
    """A model with fresh weights. Raises UsageError when the architecture lacks a setting."""
    model: PreTrainedModel = auto_class.from_config(build_config(auto_class, settings, **tokens))
    return model


def check_model(auto_class: Any, settings: ModelSettings, **tokens: Any) -> None:
    """Raise UsageError if such a model cannot be built; allocates no memory for weights."""
    config = build_config(auto_class, settings, **tokens)
    try:
        with torch.device("meta"):
            auto_class.from_config(config)
    except Exception as error:  # each architecture complains in its own way about sizes that do not fit together
        raise UsageError(f"model: a {settings.architecture} of these sizes cannot be built: {error}") from error


def build_config(auto_class: Any, settings: ModelSettings, **tokens: Any) -> PretrainedConfig:
    """The transformers configuration for our settings; `tokens` are its keys that the data decides."""
    architecture = settings.architecture
    try:
        default = AutoConfig.for_model(architecture)
    except (ValueError, KeyError):
        raise UsageError(f"model.architecture: transformers knows no architecture '{architecture}'") from None
    if type(default) not in auto_class._model_mapping:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise UsageError(f"model.architecture: '{architecture}' has no {kind} model in transformers")
    values = {
        **_shape(settings, default),
        **_derived(settings, default),
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "pad_token_id": None,
        **{name: value for name, value in tokens.items() if value is not None},
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


def default_heads(hidden_size: int) -> int:
    """One head per 32 of width, or the nearest smaller number that divides the width."""
    return next(heads for heads in range(max(1, hidden_size // 32), 0, -1) if hidden_size % heads == 0)


def _shape(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    ours = {
        "num_hidden_layers": ("num_layers", settings.num_layers),
        "hidden_size": ("hidden_size", settings.hidden_size),
        "num_attention_heads": ("num_heads", settings.num_heads or default_heads(settings.hidden_size)),
        "max_position_embeddings": ("context_length", settings.context_length),
        "initializer_range": ("init_std", settings.init_std),
    }
    values: dict[str, Any] = {}
    for name, (setting, value) in ours.items():
        own_name = type(default).attribute_map.get(name, name)
        if name == "initializer_range" and not hasattr(default, own_name) and hasattr(default, "init_std"):
            own_name = "init_std"
        if hasattr(default, own_name):
            if value is not None:
                values[own_name] = value
        elif setting in ("num_layers", "hidden_size") or (setting == "init_std" and value is not None):
            raise UsageError(f"model.{setting}: the configuration of '{settings.architecture}' has no {name}")
    return {**values, **_halves(settings, default)}


def _halves(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    """Layers of an encoder and a decoder; `num_layers` sets both, each by its own name overrides it."""
    values: dict[str, Any] = {}
    for setting, own, names in (
        ("num_encoder_layers", settings.num_encoder_layers, ("encoder_layers", "num_layers")),
        ("num_decoder_layers", settings.num_decoder_layers, ("decoder_layers", "num_decoder_layers")),
    ):
        name = next((name for name in names if hasattr(default, name)), None)
        if name and default.is_encoder_decoder:
            values[name] = settings.num_layers if own is None else own
        elif own is not None:
            raise UsageError(f"model.{setting}: '{settings.architecture}' is no encoder-decoder")
    return values


def _derived(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    """Keys whose defaults belong to the size that the architecture was published at."""
    heads = settings.num_heads or default_heads(settings.hidden_size)
    values: dict[str, Any] = {}
    for name in _FEED_FORWARD_NAMES:
        if getattr(default, name, None) is not None:
            values[name] = 4 * settings.hidden_size
    for name in _HEAD_NAMES:
        if hasattr(default, name):
            values[name] = heads
    for name in ("head_dim", "d_kv"):
        if getattr(default, name, None) is not None:
            values[name] = settings.hidden_size // heads
    if getattr(default, "word_embed_proj_dim", None) is not None:
        values["word_embed_proj_dim"] = settings.hidden_size
    if getattr(default, "activation_function", None) == "gelu_new":
        # The same function in one fused kernel instead of eight elementwise ones.
        values["activation_function"] = "gelu_pytorch_tanh"
    return values
