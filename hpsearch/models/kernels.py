"""What transformers computes, in less time and memory: losses over a vocabulary, dropout on CPUs, greedy decoding.

Each gives what the plain way gives, to rounding (dropout: in distribution); a model that does more to its logits than a
linear head does, or needs more of decoding than the largest logit, is left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

IGNORED = -100
"""Label of a position where nothing is predicted."""
CPU_ROWS = 512
"""Rows whose logits are held at once on a CPU: few enough to stay in its caches."""
GPU_LOGITS = 2**27
"""Logits that are held at once on a GPU: 512 MB in float32."""
_TOLERANCE = 1e-3


class VocabularyLoss:
    """Cross-entropy of a language model's logits that never holds all of them.

    What goes into the head is taken from the model's own forward pass, and the head is applied to a chunk of rows at a
    time, forward and backward in one go: gradients of a chunk's logits are used while they are in the cache. The
    training passes of Liger Kernel (Hsu et al., arXiv 2410.10989) do so on GPUs.
    """

    def __init__(self, model: PreTrainedModel, **probe: Tensor) -> None:
        """`probe` is a small input of the model, with which the shortcut is compared with the model's own logits."""
        self._model = model
        self._head: nn.Linear | None = None
        self._head = self._find_head(probe)

    @property
    def is_chunked(self) -> bool:
        """Whether this model's logits are what its head makes of what goes into it."""
        return self._head is not None

    def __call__(self, targets: Tensor, *, label_smoothing: float = 0.0, **inputs: Tensor) -> Tensor:
        """Losses in nats, in the shape of `targets`, with 0 where these are IGNORED."""
        if self._head is None:
            logits = self._model(**inputs, use_cache=False).logits
            return functional.cross_entropy(
                logits.float().reshape(-1, logits.shape[-1]),
                targets.reshape(-1),
                ignore_index=IGNORED,
                reduction="none",
                label_smoothing=label_smoothing,
            ).view_as(targets)
        hidden = self._hidden(inputs)
        losses: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.reshape(-1, hidden.shape[-1]),
            self._head.weight,
            self._bias(),
            targets.reshape(-1),
            label_smoothing,
        )
        return losses.view_as(targets)

    def _hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """What goes into the head."""
        assert self._head is not None
        with _passing_through(self._model, self._head):
            hidden: Tensor = self._model(**inputs, use_cache=False).logits
        return hidden

    def _bias(self) -> Tensor | None:
        assert self._head is not None
        extra: Tensor | None = getattr(self._model, "final_logits_bias", None)  # a buffer of BART and its kin
        if extra is None:
            return self._head.bias
        return extra[0] if self._head.bias is None else self._head.bias + extra[0]

    @torch.no_grad()
    def _find_head(self, probe: dict[str, Tensor]) -> nn.Linear | None:
        head = self._model.get_output_embeddings()
        if type(head) is not nn.Linear:
            return None
        assert isinstance(head, nn.Linear)
        was_training = self._model.training
        self._model.eval()
        try:
            wanted = self._model(**probe, use_cache=False).logits
            self._head = head
            hidden = self._hidden(probe)
            found = functional.linear(hidden, head.weight, self._bias())
        except (RuntimeError, AttributeError, TypeError, ValueError):
            return None  # the model does something with its logits that their inputs do not stand
        finally:
            self._head = None
            self._model.train(was_training)
        scale = wanted.abs().max().clamp(min=1e-6)
        is_same = found.shape == wanted.shape and bool(((found - wanted).abs().max() / scale) < _TOLERANCE)
        return head if is_same else None


@contextmanager
def _passing_through(model: PreTrainedModel, head: nn.Linear) -> Iterator[None]:
    """Make the head, and the bias that some models add to its logits, do nothing."""
    bias = getattr(model, "final_logits_bias", None)
    head.forward = nn.Identity().forward  # type: ignore[method-assign]
    if bias is not None:
        model.final_logits_bias = bias.new_zeros(())
    try:
        yield
    finally:
        del head.forward
        if bias is not None:
            model.final_logits_bias = bias


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Unreduced cross-entropy of linear logits; gradients are made with the losses, as if the losses were summed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float
    ) -> Tensor:
        kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        with torch.autocast(hidden.device.type, enabled=False):
            return _ChunkedCrossEntropy._forward(ctx, hidden, weight, bias, targets, label_smoothing, kind)

    @staticmethod
    def _forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        kind: torch.dtype | None,
    ) -> Tensor:
        kind = kind or weight.dtype
        matrix = weight.detach().to(kind)
        rows = CPU_ROWS if hidden.device.type == "cpu" else max(1024, GPU_LOGITS // weight.shape[0])
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight) if wants_weight else None
        bias_gradient = torch.zeros_like(bias) if wants_bias and bias is not None else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            there = hidden[part].detach().to(kind)
            logits = functional.linear(there, matrix, None if bias is None else bias.detach().to(kind)).float()
            wanted = targets[part]
            is_counted = wanted != IGNORED
            labels = wanted.clamp(min=0)[:, None]
            normalizer = torch.logsumexp(logits, dim=1)
            loss = normalizer - logits.gather(1, labels)[:, 0]
            if label_smoothing:
                loss = (1 - label_smoothing) * loss + label_smoothing * (normalizer - logits.mean(dim=1))
            losses[part] = loss * is_counted
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            gradient = logits.sub_(normalizer[:, None]).exp_()
            gradient.scatter_add_(1, labels, torch.full_like(labels, label_smoothing - 1.0, dtype=gradient.dtype))
            if label_smoothing:
                gradient -= label_smoothing / gradient.shape[1]
            gradient *= is_counted[:, None]
            small = gradient.to(kind)
            if hidden_gradient is not None:
                hidden_gradient[part] = small @ matrix
            if weight_gradient is not None and weight_gradient.dtype == kind:
                weight_gradient.addmm_(small.T, there)
            elif weight_gradient is not None:
                weight_gradient += small.T @ there
            if bias_gradient is not None:
                bias_gradient += gradient.sum(dim=0)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (outer,) = gradients
        if outer.stride() != (0,):
            raise RuntimeError("gradients of these losses exist for their sum only")
        scale = outer[0]
        hidden, weight, bias = (None if part is None else part * scale.to(part.dtype) for part in ctx.saved_tensors)
        return hidden, weight, bias, None, None


class CheapDropout(TorchFunctionMode):
    """Dropout on a CPU from 16 random bits an element, where torch takes a number of 32 bits through a slow generator.

    The probability is a multiple of 1/65536. The bits are torch's own, so that a run still resumes to the bit.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.dropout:
            return _dropout(*args, **kwargs)
        if function is functional.scaled_dot_product_attention and kwargs.get("dropout_p"):
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return input
    return input * _kept(input.shape, p, input.dtype)


def _kept(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """1 / (1 - p) where an element is kept, 0 elsewhere."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    dropped = round(p * 65536)
    return (bits >= dropped - 32768).to(dtype).mul_(65536 / (65536 - dropped)).view(shape)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
        scores = scores.masked_fill(~ones.tril(), float("-inf"))
    if attn_mask is not None:
        is_bias = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if is_bias else scores.masked_fill(~attn_mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return (weights * _kept(weights.shape, dropout_p, weights.dtype)) @ value


def can_decode(model: PreTrainedModel) -> bool:
    """Whether greedy decoding of this model is the largest logit at each step and nothing else."""
    config = model.generation_config
    special = (
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "no_repeat_ngram_size",
        "min_length",
        "min_new_tokens",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "sequence_bias",
        "exponential_decay_length_penalty",
        "forced_decoder_ids",
        "encoder_no_repeat_ngram_size",
    )
    if type(model).generate is not GenerationMixin.generate:
        return False
    return isinstance(config.eos_token_id, int) and all(
        not getattr(config, name, None) or (name.endswith("penalty") and getattr(config, name) == 1.0)
        for name in special
    )


@torch.no_grad()
def decode_greedily(model: PreTrainedModel, source: Tensor, attention_mask: Tensor, max_length: int) -> Tensor:
    """Token ids of shape (sources, at most max_length), as `model.generate` gives them with one beam.

    Keys and values are cached, and a sentence that has ended leaves the batch.
    """
    config = model.generation_config
    end, padding = config.eos_token_id, model.config.pad_token_id
    start = model.config.decoder_start_token_id
    count = len(source)
    ids = torch.full((count, max_length), padding, dtype=torch.long, device=source.device)
    ids[:, 0] = start
    encoded = model.get_encoder()(input_ids=source, attention_mask=attention_mask)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    open_rows = torch.arange(count, device=source.device)
    length = 1
    while length < max_length and len(open_rows):
        logits = model(
            encoder_outputs=encoded,
            attention_mask=attention_mask,
            decoder_input_ids=ids[open_rows, length - 1 : length],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        chosen = logits.argmax(dim=-1)
        if length == 1 and config.forced_bos_token_id is not None:
            chosen = torch.full_like(chosen, config.forced_bos_token_id)
        if length == max_length - 1 and config.forced_eos_token_id is not None:
            chosen = torch.full_like(chosen, config.forced_eos_token_id)
        ids[open_rows, length] = chosen
        length += 1
        is_promoted = chosen != end
        if not bool(is_promoted.all()):
            left = is_promoted.nonzero()[:, 0]
            open_rows, attention_mask = open_rows[left], attention_mask[left]
            encoded.last_hidden_state = encoded.last_hidden_state[left]
            cache.batch_select_indices(left)
    return ids[:, :length]
