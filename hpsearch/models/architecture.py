"""Models by configuration or from pretrained weights: built, frozen in part, adapted, and told how to generate.

Owns peft. What is frozen, and what is adapted, is decided here; the trainer trains whatever requires a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# From modules of its own: for `from transformers import ...` it looks through all its files once more.
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hpsearch.data import pretrained
from hpsearch.errors import UsageError
from hpsearch.models.configuration import DROPOUT_NAMES, build_config
from hpsearch.models.transformers_internals import forget_origin
from hpsearch.spec.settings import ModelSettings

_ONLY_OF_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_ONLY_OF_BEAMS = ("early_stopping", "length_penalty")


logging.disable_progress_bar()


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


def set_generation(model: PreTrainedModel, **values: Any) -> None:
    """Make these what `model.generate` does by itself, here and wherever the model is exported to."""
    config = model.generation_config
    unused = [] if values.get("do_sample", config.do_sample) else list(_ONLY_OF_SAMPLING)
    if values.get("num_beams", config.num_beams) in (None, 1):
        unused += _ONLY_OF_BEAMS
    if "max_length" in values:
        unused.append("max_new_tokens")
    # What a pretrained model says of another kind of decoding means nothing, and transformers refuses to save it.
    for name, value in {**dict.fromkeys(unused), **values}.items():
        setattr(config, name, value)
    forget_origin(config)


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether training drops anything."""
    return any(getattr(model.config, name, None) for name in DROPOUT_NAMES)


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Weights of linear layers within the transformer blocks that are trained: neither embeddings nor heads."""
    layers = (module for half in _blocks(model) for module in half.modules() if isinstance(module, nn.Linear | Conv1D))
    weights = {id(layer.weight): layer.weight for layer in layers}
    return [weight for weight in weights.values() if isinstance(weight, nn.Parameter) and weight.requires_grad]


def merge_adapters(model: PreTrainedModel) -> None:
    """Add what low-rank adapters learned to the weights below them, and take the adapters out, if there are any."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return
    lora = require_peft()
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
            trust_remote_code=False,
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
    lora = require_peft()
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


def require_peft() -> Any:
    """The package of low-rank adapters. Raises UsageError when it is not installed."""
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
