"""The transformers configuration of a model: our settings under the names that each architecture gives them.

Keys that belong to the size that an architecture was published at follow from our sizes, so that any architecture can
be trained from scratch at any size.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch

# From modules of its own: for `from transformers import ...` it looks through all its files once more.
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from hpsearch.data import pretrained
from hpsearch.data.tokenizers import END_ID
from hpsearch.errors import UsageError
from hpsearch.models.transformers_internals import has_model
from hpsearch.spec.settings import ModelSettings

DROPOUT_NAMES = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "hidden_dropout",
    "attention_dropout",
    "resid_dropout",
    "embd_dropout",
    "embed_dropout",
    "activation_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "residual_dropout",
    "embedding_dropout",
    "dropout_rate",
    "seq_classif_dropout",
)
_FEED_FORWARD_NAMES = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim")
_HEAD_NAMES = (
    "num_key_value_heads",
    "num_kv_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_encoder_attention_heads",
    "num_decoder_attention_heads",
)
_WIDTH_NAMES = (
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "expert_ffn_hidden_size",
    "q_lora_rank",
    "kv_lora_rank",
)
"""Keys that keep their published proportion to the width, in steps that grouped matrix products can read."""
_HEAD_WIDTH_NAMES = (
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "attention_head_dim",
    "rotary_dim",
    "d_head",
)
"""Keys that keep their published proportion to the width of a head; even, as rotations need."""
_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("num_heads", "head_dim", "expand"),
)
"""Heads of state spaces, whose widths add up to the expanded width: their number, their width, the expansion."""
_STATE_GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")
_VOCABULARY_NAMES = ("src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input")
DEFAULT_LAYERS = 2
_HEAD_TOKENS = ("num_labels", "id2label", "label2id")
"""Keys that the data decides even for a pretrained model."""


def build_config(auto_class: Any, settings: ModelSettings, **tokens: Any) -> PretrainedConfig:
    """The transformers configuration for our settings; `tokens` are its keys that the data decides."""
    folder = pretrained.of(settings)
    if folder is not None:
        return _pretrained_config(auto_class, settings, folder, tokens)
    architecture = settings.architecture
    try:
        default = AutoConfig.for_model(architecture)
    except (ValueError, KeyError):
        raise UsageError(f"model.architecture: transformers knows no architecture '{architecture}'") from None
    except Exception as error:  # some have no sizes of their own
        raise UsageError(f"model.architecture: '{architecture}' has no configuration to begin with: {error}") from error
    if not has_model(auto_class, default):
        raise UsageError(f"model.architecture: '{architecture}' has no {kind(auto_class)} model in transformers")
    values = {
        **_shape(auto_class, settings, default),
        **_derived(settings, default, tokens),
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "pad_token_id": None,
        **_looking_back(auto_class, default),
        **_classifying(auto_class, default, tokens),
        **{name: value for name, value in tokens.items() if value is not None},
        **_further(settings, default, settings.dropout or 0.0),
    }
    return _fitted(auto_class, settings, default, values)


def _fitted(
    auto_class: Any, settings: ModelSettings, default: PretrainedConfig, values: dict[str, Any]
) -> PretrainedConfig:
    """The configuration with these values, and with what its model turns out to need beside them."""
    # Where a model has use for padding, that of a stream of text is its end mark.
    padded = {"pad_token_id": END_ID} if values["pad_token_id"] is None else {}
    first: UsageError | None = None
    for patterns in ({}, _patterns(settings, default)):
        failed = f"transformers refuses this configuration of '{settings.architecture}'"
        try:
            config = AutoConfig.for_model(settings.architecture, **{**values, **padded, **patterns})
            failed = f"a {settings.architecture} of these sizes cannot be built"
            unused = _unused_positions(skeleton(auto_class, config))
            break
        except Exception as error:  # transformers raises many kinds for values that do not fit together
            first = first or UsageError(f"model: {failed}: {error}")
    else:
        assert first is not None
        raise first
    values = {**values, **patterns}
    name = type(default).attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if unused and name not in settings.config:
        longer = {name: values[name] + unused}
        return AutoConfig.for_model(settings.architecture, **{**values, **padded, **longer})
    if padded:
        try:
            return AutoConfig.for_model(settings.architecture, **values)
        except Exception:  # some must have a token for padding
            return config
    return config


def _unused_positions(model: PreTrainedModel) -> int:
    """Positions that no token can have: RoBERTa and its kin number tokens from after that of padding."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and name.endswith("position_embeddings"):
            return int(padding) + 1
    return 0


def _patterns(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    """Lists with an entry for each layer, cut to our number of layers, with as many kinds as there is room for."""
    wanted, there = _num_layers(settings), getattr(default, "num_hidden_layers", None)
    found: dict[str, Any] = {}
    for name, value in {**vars(default), **default.to_dict()}.items():
        if isinstance(value, list) and len(value) == there and all(isinstance(entry, str) for entry in value):
            kinds = list(dict.fromkeys(value))
            entries = [value[layer % there] for layer in range(wanted)]
            lacking = [kind for kind in kinds if kind not in entries][: max(0, wanted - 1)]
            found[name] = entries[: wanted - len(lacking)] + lacking
    if "attention_layers" in found and hasattr(default, "attention_types"):
        found = {"attention_types": [[found["attention_layers"], 1]]}
    elif getattr(default, "layer_types", True) is None:
        found["layer_types"] = ["full_attention"] * wanted
    return found


def _pretrained_config(
    auto_class: Any, settings: ModelSettings, folder: Any, tokens: dict[str, Any]
) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # malformed, of no known type, or with code of its own
        raise UsageError(f"model.pretrained: {folder}/config.json cannot be used: {error}") from error
    # Names code that came with the model: transformers would ask whether to run it where its own class will do.
    vars(config).pop("auto_map", None)
    if not has_model(auto_class, config):
        raise UsageError(
            f"model.pretrained: {settings.pretrained} is a '{config.model_type}', which transformers has no "
            f"{kind(auto_class)} model of"
        )
    if tokens["vocab_size"] > getattr(config, "vocab_size", tokens["vocab_size"]):
        raise UsageError(
            f"model.pretrained: the tokenizer of {settings.pretrained} has {tokens['vocab_size']} entries, its model "
            f"only {config.vocab_size}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        try:
            positions -= _unused_positions(skeleton(auto_class, config))
        except Exception as error:  # each architecture complains in its own way about what does not fit together
            raise UsageError(f"model.pretrained: {folder}/config.json describes no model: {error}") from error
    if positions is not None and settings.context_length > positions:
        raise UsageError(
            f"model.context_length: {settings.context_length} tokens are more than the {positions} that "
            f"{settings.pretrained} has positions for"
        )
    values = {
        **_looking_back(auto_class, config),
        **{name: tokens[name] for name in _HEAD_TOKENS if name in tokens},
        **_further(settings, config, settings.dropout),
    }
    if config.pad_token_id is None and tokens.get("pad_token_id") is not None:
        values["pad_token_id"] = tokens["pad_token_id"]
    if settings.num_layers is not None:
        values |= _first_layers(settings, config)
    for name, value in values.items():
        setattr(config, name, value)
    return config


def _first_layers(settings: ModelSettings, config: PretrainedConfig) -> dict[str, int]:
    wanted = settings.num_layers
    assert wanted is not None
    names = {type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")}
    if config.is_encoder_decoder:
        names = {name for pair in _HALVES.values() for name in pair if hasattr(config, name)}
    for name in names:
        there = getattr(config, name)
        if wanted > there:
            raise UsageError(f"model.num_layers: {wanted} is more than the {there} of {settings.pretrained}")
    return dict.fromkeys(names, wanted)


def _looking_back(auto_class: Any, config: PretrainedConfig) -> dict[str, Any]:
    """A model that can look either way must be told to look back only: else it reads the token that it predicts."""
    if kind(auto_class) != "CausalLM" or config.is_encoder_decoder:
        return {}
    return {name: True for name in ("is_decoder", "causal") if _has(config, name)}


def _classifying(auto_class: Any, config: PretrainedConfig, tokens: dict[str, Any]) -> dict[str, Any]:
    """A classifier reads a text once: it caches nothing, and its decoder, if it has one, begins as a translator's."""
    if kind(auto_class) != "SequenceClassification":
        return {}
    values: dict[str, Any] = {"use_cache": False} if _has(config, "use_cache") else {}
    if config.is_encoder_decoder:
        values["decoder_start_token_id"] = tokens.get("pad_token_id")
    return values


def _has(config: PretrainedConfig, name: str) -> bool:
    """Whether a configuration has a key that can be set."""
    try:
        setattr(copy(config), name, getattr(config, name))
    except (AttributeError, NotImplementedError):
        return False
    except Exception:  # one for each layer; set, it is the same for all
        return True
    return True


def _further(settings: ModelSettings, config: PretrainedConfig, dropout: float | None) -> dict[str, Any]:
    """Dropout (None leaves it as it is), and the keys that the study names itself."""
    values: dict[str, Any] = {}
    if dropout is not None:
        values = {name: dropout for name in DROPOUT_NAMES if hasattr(config, name)}
    for name, value in settings.config.items():
        if not hasattr(config, name):
            raise UsageError(f"model.config.{name}: the configuration of '{config.model_type}' has no such key")
        values[name] = value
    return values


def kind(auto_class: Any) -> str:
    return str(auto_class.__name__.removeprefix("AutoModelFor"))


def default_heads(hidden_size: int) -> int:
    """One head per 32 of width, or the nearest smaller number that divides the width."""
    return next(heads for heads in range(max(1, hidden_size // 32), 0, -1) if hidden_size % heads == 0)


def _shape(auto_class: Any, settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    ours = {
        "num_hidden_layers": ("num_layers", _num_layers(settings)),
        "hidden_size": ("hidden_size", settings.hidden_size),
        "num_attention_heads": ("num_heads", settings.num_heads or default_heads(settings.hidden_size)),
        "max_position_embeddings": ("context_length", settings.context_length),
        "initializer_range": ("init_std", settings.init_std),
    }
    values: dict[str, Any] = {}
    halves = _halves(settings, default)
    for name, (setting, value) in ours.items():
        own_name = type(default).attribute_map.get(name, name)
        if name == "initializer_range" and not _has(default, own_name) and hasattr(default, "init_std"):
            own_name = "init_std"
        if _has(default, own_name):
            if value is not None:
                values[own_name] = value
        elif setting == "num_layers" and halves:
            continue
        elif setting in ("num_layers", "hidden_size") or (setting == "init_std" and value is not None):
            raise UsageError(
                f"model.{setting}: the configuration of '{settings.architecture}' has no {name}"
                f"{_text_part(auto_class, default)}"
            )
    return {**values, **halves}


def _text_part(auto_class: Any, default: PretrainedConfig) -> str:
    """What to say of a model that consists of several."""
    try:
        part = default.get_text_config()
    except ValueError:  # it has several for text
        return ""
    if part is default or not has_model(auto_class, part):
        return ""
    return f"; its text model is an architecture of its own: '{part.model_type}'"


_HALVES = {
    "num_encoder_layers": ("encoder_layers", "num_layers"),
    "num_decoder_layers": ("decoder_layers", "num_decoder_layers"),
}
"""Our names for the layers of an encoder-decoder's halves, and those that configurations use."""


def _num_layers(settings: ModelSettings) -> int:
    return DEFAULT_LAYERS if settings.num_layers is None else settings.num_layers


def _halves(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    """Layers of an encoder and a decoder; `num_layers` sets both, each by its own name overrides it."""
    values: dict[str, Any] = {}
    for setting, own in (
        ("num_encoder_layers", settings.num_encoder_layers),
        ("num_decoder_layers", settings.num_decoder_layers),
    ):
        names = _HALVES[setting]
        name = next((name for name in names if hasattr(default, name)), None)
        if name and default.is_encoder_decoder:
            values[name] = _num_layers(settings) if own is None else own
        elif own is not None:
            raise UsageError(f"model.{setting}: '{settings.architecture}' is no encoder-decoder")
    return values


def _derived(settings: ModelSettings, default: PretrainedConfig, tokens: dict[str, Any]) -> dict[str, Any]:
    """Keys whose defaults belong to the size that the architecture was published at."""
    width, heads = settings.hidden_size, settings.num_heads or default_heads(settings.hidden_size)
    values: dict[str, Any] = {}
    for name in _FEED_FORWARD_NAMES:
        if getattr(default, name, None) is not None:
            values[name] = 4 * width
    for name in _HEAD_NAMES:
        if _has(default, name):
            values[name] = heads
    is_latent = _int(default, "qk_nope_head_dim") > 0
    for name in ("head_dim", "d_kv"):
        # With latent attention it is another name for what is rotated of a head.
        if _has(default, name) and not (is_latent and name == "head_dim"):
            values[name] = width // heads
    for name in ("word_embed_proj_dim", "embedding_size"):
        if getattr(default, name, None) == _int(default, "hidden_size"):
            values[name] = width
    published, published_heads = _int(default, "hidden_size"), _int(default, "num_attention_heads")
    for name in _WIDTH_NAMES:
        if published and (size := _int(default, name)):
            values[name] = _rounded(size * width / published, 8)
    for name in _HEAD_WIDTH_NAMES:
        if name.startswith("qk_") and not is_latent:
            continue  # it follows from the width of a head
        if published and published_heads and (size := _int(default, name)):
            values[name] = _rounded(size * published_heads / published * width / heads, 2)
    for keys in _STATE_HEADS:
        if all(_int(default, name) for name in keys):
            number, of_head, expand = keys
            states = _int(default, expand) * heads
            values |= {number: states, of_head: width // heads}
            values |= {name: math.gcd(states, groups) for name in _STATE_GROUPS if (groups := _int(default, name))}
            if _int(default, "mamba_d_ssm"):
                values["mamba_d_ssm"] = states * (width // heads)
    if _int(default, "num_kv_shared_layers"):
        shared = default.num_kv_shared_layers * _num_layers(settings) // default.num_hidden_layers
        values["num_kv_shared_layers"] = shared
    for name in _VOCABULARY_NAMES:
        if hasattr(default, name):
            values[name] = tokens["vocab_size"]
    if getattr(default, "activation_function", None) == "gelu_new":
        # The same function in one fused kernel instead of eight elementwise ones.
        values["activation_function"] = "gelu_pytorch_tanh"
    return values


def _int(config: PretrainedConfig, name: str) -> int:
    """A key's number, or 0."""
    try:
        value = getattr(config, name, 0)
    except Exception:  # one for each layer
        return 0
    return value if type(value) is int else 0


def _rounded(size: float, step: int) -> int:
    return max(step, step * round(size / step))


def skeleton(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config)
    return model
