"""Models by configuration or from pretrained weights: our settings under the names that each architecture gives them.

Owns peft. What is frozen, and what is adapted, is decided here; the trainer trains whatever requires a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# From modules of its own: for `from transformers import ...` it looks through all its files once more.
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hpsearch import pretrained
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


logging.disable_progress_bar()

DEFAULT_LAYERS = 2
_ROBERTA_OFFSET = 2
"""Positions of RoBERTa and its kin that no token can have."""
_HEAD_TOKENS = ("num_labels", "id2label", "label2id")
"""Keys that the data decides even for a pretrained model."""


def build_model(auto_class: Any, settings: ModelSettings, **tokens: Any) -> PreTrainedModel:
    """A model with fresh or pretrained weights, frozen and adapted as the settings say.

    Raises UsageError when the architecture lacks a setting, or the weights are not those of such a model.
    """
    if settings.pretrained is None:
        fresh: PreTrainedModel = auto_class.from_config(build_config(auto_class, settings, **tokens))
        return fresh
    model, new = _load(auto_class, settings, **tokens)
    blocks = _blocks(model)
    if settings.lora_rank:
        _add_adapters(model, settings, new)
    frozen: list[nn.Module] = [block for half in blocks for block in half[: settings.freeze_layers]]
    if settings.freeze_embeddings:
        inside = {id(module) for half in blocks for block in half for module in block.modules()}
        tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
        frozen += [module for module in tables if id(module) not in inside]
    for module in frozen:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("model: every weight is frozen, so there is nothing to train")
    return model


def check_model(auto_class: Any, settings: ModelSettings, **tokens: Any) -> None:
    """Raise UsageError if such a model cannot be built; allocates no memory for weights."""
    if settings.lora_rank:
        _peft()
    config = build_config(auto_class, settings, **tokens)
    try:
        with torch.device("meta"):
            auto_class.from_config(config)
    except Exception as error:  # each architecture complains in its own way about sizes that do not fit together
        raise UsageError(f"model: a {config.model_type} of these sizes cannot be built: {error}") from error


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether training drops anything."""
    return any(getattr(model.config, name, None) for name in _DROPOUT_NAMES)


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Weights of linear layers within the transformer blocks that are trained: neither embeddings nor heads."""
    layers = (module for half in _blocks(model) for module in half.modules() if isinstance(module, nn.Linear | Conv1D))
    weights = {id(layer.weight): layer.weight for layer in layers}
    return [weight for weight in weights.values() if isinstance(weight, nn.Parameter) and weight.requires_grad]


def merge_adapters(model: PreTrainedModel) -> None:
    """Add what low-rank adapters learned to the weights below them, and take the adapters out, if there are any."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return
    lora = _peft()
    for name, module in list(model.named_modules()):
        if isinstance(module, lora.tuners.lora.LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def _load(auto_class: Any, settings: ModelSettings, **tokens: Any) -> tuple[PreTrainedModel, list[str]]:
    """The pretrained model in float32, and the names of weights that it did not bring: a new head's."""
    config = build_config(auto_class, settings, **tokens)
    # Its table of unused weights is for people who load by hand; what matters is checked below.
    logging.set_verbosity_error()
    try:
        model, report = auto_class.from_pretrained(
            pretrained.of(settings),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for weights that do not fit
        raise UsageError(f"model.pretrained: {settings.pretrained} cannot be loaded: {error}") from error
    new = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    # A pooler is part of a classifier's head: encoders that were trained without one are used all the same.
    body = [
        name
        for name in new
        if "num_labels" not in tokens or (name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name)
    ]
    if body:
        raise UsageError(
            f"model.pretrained: {settings.pretrained} lacks weights of a {config.model_type} for this task: "
            f"{', '.join(body[:3])}{', ...' if len(body) > 3 else ''}"
        )
    return model, new


def _add_adapters(model: PreTrainedModel, settings: ModelSettings, new: list[str]) -> None:
    """Low-rank adapters (Hu et al., ICLR 2022) on all linear layers; of the rest only a new head learns."""
    lora = _peft()
    head = {name: parameter for name, parameter in model.named_parameters() if name in new}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not model.get_output_embeddings()
        and not any(f"{name}.{part}" in head for part in ("weight", "bias"))
    ]
    config = lora.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=linear,
        # GPT-2 keeps its linear layers transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    lora.inject_adapter_in_model(config, model)
    for parameter in head.values():
        parameter.requires_grad_(True)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError(
            "model.lora_rank: adapters need peft, which is not installed: pip install 'hpsearch[lora]'"
        ) from None
    return peft


def _blocks(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The stacks of transformer blocks: one, or an encoder's and a decoder's."""
    stacks: list[nn.ModuleList] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside.update(id(child) for child in module.modules())
            stacks.append(module)
    return stacks


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
    if type(default) not in auto_class._model_mapping:
        raise UsageError(f"model.architecture: '{architecture}' has no {_kind(auto_class)} model in transformers")
    values = {
        **_shape(settings, default),
        **_derived(settings, default),
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "pad_token_id": None,
        **_looking_back(auto_class, default),
        **{name: value for name, value in tokens.items() if value is not None},
        **_further(settings, default, settings.dropout or 0.0),
    }
    try:
        return AutoConfig.for_model(architecture, **values)
    except Exception as error:  # transformers raises many kinds for values that do not fit together
        raise UsageError(f"model: transformers refuses this configuration of '{architecture}': {error}") from error


def _pretrained_config(
    auto_class: Any, settings: ModelSettings, folder: Any, tokens: dict[str, Any]
) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except Exception as error:  # malformed, of no known type, or with code of its own
        raise UsageError(f"model.pretrained: {folder}/config.json cannot be used: {error}") from error
    if type(config) not in auto_class._model_mapping:
        raise UsageError(
            f"model.pretrained: {settings.pretrained} is a '{config.model_type}', which transformers has no "
            f"{_kind(auto_class)} model of"
        )
    if tokens["vocab_size"] > getattr(config, "vocab_size", tokens["vocab_size"]):
        raise UsageError(
            f"model.pretrained: the tokenizer of {settings.pretrained} has {tokens['vocab_size']} entries, its model "
            f"only {config.vocab_size}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and "roberta" in config.model_type:
        positions -= _ROBERTA_OFFSET
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
    """An encoder that models language must be told to look back only: else it reads the token that it predicts."""
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    return {"is_decoder": True} if encoder and _kind(auto_class) == "CausalLM" else {}


def _further(settings: ModelSettings, config: PretrainedConfig, dropout: float | None) -> dict[str, Any]:
    """Dropout (None leaves it as it is), and the keys that the study names itself."""
    values: dict[str, Any] = {}
    if dropout is not None:
        values = {name: dropout for name in _DROPOUT_NAMES if hasattr(config, name)}
    for name, value in settings.config.items():
        if not hasattr(config, name):
            raise UsageError(f"model.config.{name}: the configuration of '{config.model_type}' has no such key")
        values[name] = value
    return values


def _kind(auto_class: Any) -> str:
    return str(auto_class.__name__.removeprefix("AutoModelFor"))


def default_heads(hidden_size: int) -> int:
    """One head per 32 of width, or the nearest smaller number that divides the width."""
    return next(heads for heads in range(max(1, hidden_size // 32), 0, -1) if hidden_size % heads == 0)


def _shape(settings: ModelSettings, default: PretrainedConfig) -> dict[str, Any]:
    ours = {
        "num_hidden_layers": ("num_layers", _num_layers(settings)),
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
