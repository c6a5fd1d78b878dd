"""Whether a model trains at all: what `check` and a launch try out before any trial does.

Configurations that transformers accepts may still fail in their first step, read the tokens that they are to predict,
or want inputs that a task does not have. So one is built and makes a step: the model itself where it is small, else a
twin of few and narrow layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hpsearch.errors import UsageError
from hpsearch.models.architecture import require_peft
from hpsearch.models.configuration import build_config, default_heads, kind, skeleton
from hpsearch.spec.settings import ModelSettings

_TWIN_LAYERS, _TWIN_HEAD, _TWIN_VOCABULARY, _TWIN_LENGTH = 2, 16, 512, 128
"""Sizes of the small model that is tried out in place of a large one."""
_TRIED_AS_IT_IS = 2_000_000
"""Weights of models that need no smaller twin."""
_LEAK = 1e-4
"""Of the deviation of a model's logits: more than rounding, and than what a later token may change."""


Try = Callable[[PreTrainedModel], Any]
"""What else a task does with a model; raises UsageError where that cannot be."""


def check_model(auto_class: Any, settings: ModelSettings, *, tries: Sequence[Try] = (), **tokens: Any) -> None:
    """Raise UsageError if such a model cannot be built, or does not train: one that is small enough makes a step.

    Of a larger model no weights are allocated; its small twin makes the step. `tries` are made with it, too.
    """
    if settings.lora_rank:
        require_peft()
    config = build_config(auto_class, settings, **tokens)
    try:
        model = skeleton(auto_class, config)
    except Exception as error:  # each architecture complains in its own way about sizes that do not fit together
        raise UsageError(f"model: a {config.model_type} of these sizes cannot be built: {error}") from error
    if settings.pretrained is not None:
        if tries:
            model = _shallow(auto_class, settings, config, tokens)
            for attempt in tries:
                attempt(model)
        return
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > _TRIED_AS_IT_IS or settings.context_length > _TWIN_LENGTH:
        settings = _twin(settings)
        small = {name: min(size, _TWIN_VOCABULARY) for name, size in tokens.items() if name.endswith("vocab_size")}
        config = build_config(auto_class, settings, **{**tokens, **small})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            vocabulary = min(tokens["vocab_size"], _TWIN_VOCABULARY)
            model = auto_class.from_config(config)
            _try_out(model, kind(auto_class), vocabulary, settings.context_length)
            for attempt in tries:
                attempt(model)
        except UsageError:
            raise
        except Exception as error:
            said = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"model: a {config.model_type} of these settings can be built, but not trained: "
                f"{said or type(error).__name__} (model.config may set what it lacks)"
            ) from error


def check_apart(model: PreTrainedModel, *, option: str, instead: str) -> None:
    """Raise UsageError if the model does not keep texts apart; the message names the `option` that asks for it, and
    what to set `instead`.
    """
    if not keeps_apart(model):
        raise UsageError(
            f"{option}: models of type {model.config.model_type} cannot be told which tokens of a sequence belong to "
            f"which text; {instead} trains them"
        )


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether texts of one sequence do not see each other, by the positions of their tokens."""
    was_training = model.training
    model.eval()
    ids = torch.arange(2, 9, device=model.device)[None] % max(3, model.config.get_text_config().vocab_size)
    first = 3
    positions = torch.cat([torch.arange(first), torch.arange(ids.shape[1] - first)]).to(model.device)[None]
    try:
        alone = model(input_ids=ids[:, first:], use_cache=False).logits.float()
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()[:, first:]
        return bool((packed - alone).abs().max() <= _LEAK * alone.std())
    except TypeError:  # it takes no positions
        return False
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Generation:
    """How a model can generate text."""

    use_cache: bool
    """With a key-value cache."""
    pads: bool
    """Prompts of several lengths at once, padded on the left: each is answered as by itself."""


@torch.no_grad()
def how_it_generates(model: PreTrainedModel) -> Generation:
    """Raises UsageError if it does not."""
    was_training = model.training
    model.eval()
    most = max(3, min(64, model.config.get_text_config().vocab_size))
    prompts = [torch.arange(2, 2 + length, device=model.device) % most for length in (3, 6)]
    alone = [prompt[None] for prompt in prompts]
    short = torch.nn.functional.pad(prompts[0], (3, 0))
    is_text = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6], device=model.device)
    said = ""
    try:
        for use_cache in (True, False):
            options: dict[str, Any] = {
                "max_new_tokens": 3,
                "min_new_tokens": 3,
                "do_sample": False,
                "use_cache": use_cache,
            }
            options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
            try:
                found = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in alone]
            except Exception as error:  # caches and masks of some architectures are their own
                said = said or str(error).strip().partition("\n")[0]
                continue
            try:
                both = model.generate(torch.stack([short, prompts[1]]), attention_mask=is_text, **options)
            except Exception:
                return Generation(use_cache, pads=False)
            logits = [torch.stack([step.float() for step in one.logits]) for one in (*found, both)]
            wanted = torch.cat(logits[:2], dim=1)
            return Generation(use_cache, pads=bool((wanted - logits[2]).abs().max() <= _LEAK * wanted.std()))
    finally:
        model.train(was_training)
    raise UsageError(f"model: models of type {model.config.model_type} cannot generate text: {said}")


def _shallow(
    auto_class: Any, settings: ModelSettings, config: PretrainedConfig, tokens: dict[str, Any]
) -> PreTrainedModel:
    """A model like a pretrained one, of few layers and tokens, with weights at random."""
    layers = min(_TWIN_LAYERS, config.get_text_config().num_hidden_layers)
    small = build_config(auto_class, settings.model_copy(update={"num_layers": layers}), **tokens)
    small.vocab_size = _TWIN_VOCABULARY
    small.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: PreTrainedModel = auto_class.from_config(small)
        except Exception as error:  # each architecture complains in its own way about sizes that do not fit together
            raise UsageError(f"model: no small {small.model_type} can be built, to be tried out: {error}") from error
    return model


def _twin(settings: ModelSettings) -> ModelSettings:
    """Smaller settings of which the model fails where the one of these settings does, as far as sizes do not matter."""
    layers = {
        name: min(_TWIN_LAYERS, getattr(settings, name))
        for name in ("num_layers", "num_encoder_layers", "num_decoder_layers")
        if getattr(settings, name) is not None
    }
    heads = settings.num_heads or default_heads(settings.hidden_size)
    of_head = settings.hidden_size // heads
    if of_head > _TWIN_HEAD:
        of_head = _TWIN_HEAD + of_head % 2  # what is rotated must be even
    length = min(settings.context_length, _TWIN_LENGTH)
    sizes = {"hidden_size": heads * of_head, "num_heads": heads, "context_length": length}
    return settings.model_copy(update={**sizes, **layers})


def _try_out(model: PreTrainedModel, kind: str, vocabulary: int, length: int) -> None:
    """What a trial does with a model: a loss on a long and a short sequence, its gradients, an evaluation."""
    ids = torch.randint(2, max(3, vocabulary), (2, length))
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind == "CausalLM":
        inputs["use_cache"] = False
    else:
        is_text = torch.ones_like(ids)
        is_text[1, length // 2 :] = 0
        ids[1, length // 2 :] = model.config.pad_token_id
        inputs["attention_mask"] = is_text
    if kind == "Seq2SeqLM":
        inputs |= {"decoder_input_ids": ids, "use_cache": False}
    elif kind == "SequenceClassification":
        ids[0, -1] = ids[1, length // 2 - 1] = model.config.eos_token_id
    model.train()
    logits = model(**inputs).logits.float()
    expected = (2,) if kind == "SequenceClassification" else (2, length)
    if logits.shape[:-1] != expected:
        unit = "text" if len(expected) == 1 else "token"
        raise UsageError(f"model: a {model.config.model_type} gives no logits for each {unit}")
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long)
    loss = functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    if not loss.isfinite():
        raise UsageError(f"model: a {model.config.model_type} of these settings has no finite loss at the start")
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        if kind != "CausalLM":
            shortest = {name: value[:1, -1:] if torch.is_tensor(value) else value for name, value in inputs.items()}
            model(**shortest)
            return
        other = ids.clone()
        cut = length // 2
        other[:, cut:] = 2 + (other[:, cut:] - 1) % max(1, vocabulary - 2)
        change = (model(**{**inputs, "input_ids": other}).logits.float() - logits)[:, :cut].abs().max()
    if change > _LEAK * logits.std():
        raise UsageError(
            f"model.architecture: a {model.config.model_type} reads the tokens that it is to predict: it is no causal "
            "language model"
        )
