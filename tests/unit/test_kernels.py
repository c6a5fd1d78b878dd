"""Shortcuts give what transformers gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hpsearch.models import kernels
from hpsearch.models.kernels import IGNORED, CheapDropout, VocabularyLoss, can_decode, decode_greedily

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
              "num_key_value_heads": 1},
    "opt": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32,
            "word_embed_proj_dim": 16},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
             "is_decoder": True},
    "gemma2": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
               "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 3.0},
}  # fmt: skip
PAIRS: dict[str, Any] = {
    "marian": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
               "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_vocab_size": VOCABULARY,
               "forced_eos_token_id": 0},
    "t5": {"d_model": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32},
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "forced_eos_token_id": 0,
             "bos_token_id": 0},
}  # fmt: skip


def causal(name: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, pad_token_id=None, **SMALL[name], **more)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def pair(name: str, scale: float = 1.0) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, pad_token_id=1, eos_token_id=0, decoder_start_token_id=1, **PAIRS[name]
    )
    model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    return model.eval()


def gradients(model: PreTrainedModel, losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    losses.sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def plain(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none",
        label_smoothing=label_smoothing,
    ).view_as(targets)  # fmt: skip


@pytest.mark.parametrize("rows", [3, 512])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", SMALL)
def test_losses_and_gradients_are_those_of_whole_logits(
    name: str, smoothing: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CPU_ROWS", rows)
    model = causal(name)
    ids = torch.randint(2, VOCABULARY, (3, 9))
    targets = torch.randint(0, VOCABULARY, (3, 9))
    targets[1, 4:] = IGNORED
    loss = VocabularyLoss(model, input_ids=torch.arange(2)[None])
    assert loss.is_chunked == (name != "gemma2"), "soft-capped logits are not what the head gives"
    found = loss(targets, input_ids=ids, label_smoothing=smoothing)
    wanted = plain(model(input_ids=ids, use_cache=False).logits, targets, smoothing)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found[1, 4:].eq(0).all()
    ours, theirs = gradients(model, found), gradients(model, wanted)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    logits = model(input_ids=ids, use_cache=False).logits
    assert logits.shape[-1] == VOCABULARY, "the model itself is as it was"


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_an_encoder_decoder_are_those_of_whole_logits(name: str) -> None:
    model = pair(name)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    source, target = torch.randint(2, VOCABULARY, (2, 7)), torch.randint(2, VOCABULARY, (2, 5))
    inputs = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": target}
    two = torch.arange(2)[None]
    loss = VocabularyLoss(model, input_ids=two, attention_mask=torch.ones_like(two), decoder_input_ids=two)
    assert loss.is_chunked
    found, wanted = loss(target, **inputs), plain(model(**inputs).logits, target)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    ours, theirs = gradients(model, found), gradients(model, wanted)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-3, msg=key)


def test_frozen_heads_get_no_gradients() -> None:
    model = causal("llama", tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(False)
    loss = VocabularyLoss(model, input_ids=torch.arange(2)[None])
    ids = torch.randint(2, VOCABULARY, (2, 5))
    found = gradients(model, loss(ids, input_ids=ids))
    assert "lm_head.weight" not in found
    assert found["model.embed_tokens.weight"].abs().sum() > 0


def test_losses_that_are_weighed_one_by_one_are_refused() -> None:
    model = causal("gpt2")
    loss = VocabularyLoss(model, input_ids=torch.arange(2)[None])
    ids = torch.randint(2, VOCABULARY, (2, 5))
    with pytest.raises(RuntimeError, match="sum only"):
        (loss(ids, input_ids=ids) * torch.rand(2, 5)).sum().backward()


def test_dropout_drops_its_part_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    ones = torch.ones(400, 501, requires_grad=True)
    with CheapDropout():
        found = functional.dropout(ones, 0.1, True)
        assert functional.dropout(ones, 0.1, False) is ones
    dropped = (found == 0).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.003)
    assert found.max().item() == pytest.approx(1 / 0.9, rel=1e-4)
    assert found.mean().item() == pytest.approx(1.0, abs=0.005)
    found.sum().backward()
    assert ones.grad is not None
    assert torch.equal(ones.grad == 0, found == 0), "what was dropped learns nothing"
    # Neighbours in rows and columns are dropped independently of each other.
    gone = (found == 0).float()
    for one, other in ((gone[1:], gone[:-1]), (gone[:, 1:], gone[:, :-1]), (gone[:, 4:], gone[:, :-4])):
        assert (one * other).mean().item() == pytest.approx(0.01, abs=0.001)


def test_dropout_is_taken_up_again_with_torchs_random_state() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    values = torch.ones(50, 7)
    with CheapDropout():
        first = functional.dropout(values, 0.5, True)
        torch.set_rng_state(state)
        assert torch.equal(first, functional.dropout(values, 0.5, True))


@pytest.mark.parametrize("kind", ["causal", "mask", "bias", "groups", "plain"])
def test_attention_with_dropout_is_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    options: dict[str, Any] = {}
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "mask":
        options["attn_mask"] = torch.ones(6, 6, dtype=torch.bool).tril()
    elif kind == "bias":
        options["attn_mask"] = torch.randn(6, 6)
    elif kind == "groups":
        key, value, options["enable_gqa"] = key[:, :2], value[:, :2], True
    wanted = functional.scaled_dot_product_attention(query, key, value, **options)
    monkeypatch.setattr(kernels, "_kept", lambda shape, p, dtype: torch.ones(shape, dtype=dtype))
    with CheapDropout():
        found = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.1, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_decoding_says_what_transformers_says(name: str) -> None:
    model = pair(name, scale=6.0)  # so that what is said differs
    lengths = torch.tensor([3, 5, 6, 9, 9, 1])
    torch.manual_seed(1)
    source = torch.randint(2, VOCABULARY, (6, 9))
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    source[mask == 0] = 1
    assert can_decode(model)
    options = {"num_beams": 1, "do_sample": False, "max_length": 14, "use_cache": True}
    said = model.generate(input_ids=source, attention_mask=mask, **options)
    model.generation_config.eos_token_id = int(said[0, 5])
    ended = 0
    for scale in (1.0, 3.0):
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.data.mul_(scale)
        found = decode_greedily(copied, source, mask, 14)
        wanted = copied.generate(input_ids=source, attention_mask=mask, **options)
        assert found.tolist() == wanted.tolist()
        ended += int((found[:, 1:-1] == model.generation_config.eos_token_id).any(dim=1).sum())
    assert ended, "some sentences end before others"


def test_a_model_that_asks_for_more_is_left_to_transformers() -> None:
    model = pair("bart")
    model.generation_config.no_repeat_ngram_size = 3
    assert not can_decode(model)
