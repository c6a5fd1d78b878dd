"""Packing: documents that share a window do not see each other, and each of their tokens is predicted once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bloom import BloomConfig, BloomForCausalLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from hpsearch.data.prepare import prepare
from hpsearch.data.shards import load_split, read_card
from hpsearch.errors import UsageError
from hpsearch.spec.sections import DataSpec, TokenizerSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import study_class
from hpsearch.tasks.causal_lm.definition import CausalLMDefinition, CausalLMOptions
from hpsearch.tasks.causal_lm.training import CausalLM
from hpsearch.tasks.windows import PackedWindows, best_fit, pieces
from hpsearch.training.random_states import seed_everything
from hpsearch.training.trainer import PreemptedError, Trainer
from tests.runs import curve_of

MODEL = ModelSettings(architecture="llama", hidden_size=32, num_heads=2, num_layers=2, context_length=32, init_std=0.2)
RUN = RunSettings(learning_rate=1e-2, batch_size=8, num_epochs=3, evaluations_per_epoch=2, weight_average=0.1)
PACKED = CausalLMOptions(packing="documents")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that are shorter than a window, and some that are several times longer."""
    folder = tmp_path_factory.mktemp("data")
    corpus = DataSpec(corpus="python_docs", fraction=0.1)
    spec = study_class("causal_lm")(
        name="s", task="causal_lm", data=corpus, tokenizer=TokenizerSpec(vocab_size=400), folder=str(folder)
    )
    return Path(str(prepare(spec)[0]))


def packed(data: Path, model: ModelSettings = MODEL) -> CausalLM:
    seed_everything(0)
    return CausalLM(data, model, PACKED)


def fits_best(lengths: list[int], room: int) -> list[int]:
    """Best-fit decreasing as it is defined: the room that is left in each window."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, space in enumerate(left) if space >= length]
        if fitting:
            left[min(fitting, key=left.__getitem__)] -= length
        else:
            left.append(room - length)
    return sorted(left)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_windows_are_those_of_best_fit_decreasing(draw: st.DataObject) -> None:
    room = draw.draw(st.integers(2, 40))
    lengths = draw.draw(st.lists(st.integers(1, room), min_size=1, max_size=80))
    windows = best_fit(np.array(lengths), room)
    assert sorted(room - np.bincount(windows, lengths)) == fits_best(lengths, room)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(2, 16), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_an_epoch_predicts_each_token_once_and_a_piece_is_cut_from_no_document_that_fits(
    sizes: list[int], length: int, seed: int
) -> None:
    ends = np.cumsum(sizes)
    fixed = PackedWindows(ends, length, is_training=False)
    whole = fixed.layout(fixed.in_order())
    assert sorted(whole.places[whole.places >= 0].tolist()) == list(range(sum(sizes)))
    assert fixed.predicted(fixed.in_order()) == sum(sizes)
    windows = PackedWindows(ends, length, is_training=True)
    order = np.random.default_rng(seed)
    for _ in range(3):
        indices = windows.of_epoch(order)
        assert len(indices) == windows.count
        layout = windows.layout(indices)
        assert windows.predicted(indices) == int((layout.places >= 0).sum())
        read, counts = np.unique(layout.places[layout.places >= 0], return_counts=True)
        # The count of windows is fixed, and cuts at random may need a few more or less.
        needed = len(windows._bounds) - 1
        assert len({*indices.tolist()}) == min(needed, windows.count)
        assert counts.max() <= -(-windows.count // needed)
        assert len(read) >= sum(sizes) - length * max(0, needed - windows.count)
        begins = {int(place) for place, position in zip(layout.places.flat, layout.positions.flat, strict=True)
                  if place >= 0 and position == 0}  # fmt: skip
        starts = (ends - sizes).tolist()
        for start, size in zip(starts, sizes, strict=True):
            inside = [place for place in begins if start < place < start + size]
            assert not inside or size > length


def test_long_documents_are_cut_elsewhere_in_each_epoch() -> None:
    windows = PackedWindows(np.array([1000, 1005, 1010]), 64, is_training=True)
    order = np.random.default_rng(0)
    cuts = []
    for _ in range(2):
        layout = windows.layout(windows.of_epoch(order))
        assert layout.positions is not None
        cuts.append({*layout.places[(layout.positions == 0) & (layout.places >= 0)].tolist()})
    assert cuts[0] != cuts[1]
    assert pieces(np.array([1000, 1005]), 400)[1].tolist() == [400, 400, 200, 5]


def test_hardly_a_place_is_empty_and_hardly_a_window_repeated_whatever_the_lengths() -> None:
    """A fixed cut would leave a fifth of each window empty where all documents are a little longer than half of two."""
    order = np.random.default_rng(0)
    for longer in (0.3, 0.9, 1.2, 1.56, 1.7, 2.56):
        ends = np.cumsum(np.full(3000, round(64 * longer)))
        windows = PackedWindows(ends, 64, is_training=True)
        for _ in range(3):
            indices = windows.of_epoch(order)
            assert len({*indices.tolist()}) > 0.98 * len(indices)
            assert windows.predicted(indices) > (0.9 if longer > 1 else 0.8) * 64 * len(indices)


def test_what_begins_a_text_is_read_at_its_beginning_and_never_predicted() -> None:
    ends = np.cumsum([5, 1, 3, 40])
    windows = PackedWindows(ends, 8, is_training=False, skipped=1)
    layout = windows.layout(windows.in_order())
    predicted = sorted(layout.places[layout.places >= 0].tolist())
    assert predicted == [place for place in range(49) if place not in (0, 5, 6, 9)]
    assert layout.positions is not None
    begins = layout.places[(layout.positions == 0) & (layout.places >= 0)]
    assert {1, 7, 10} <= {*begins.tolist()}


def test_a_loss_is_that_of_each_document_by_itself(data: Path) -> None:
    task = packed(data)
    task.model.eval()
    split, length = load_split(data, "test"), MODEL.context_length
    starts, lengths = pieces(split.document_ends, length)
    assert lengths.max() == length, "some documents are cut"
    wanted = np.zeros(int(split.document_ends[-1]))
    with torch.no_grad():
        for start, size in zip(starts.tolist(), lengths.tolist(), strict=True):
            ids = torch.from_numpy(split.tokens[start : start + size + 1].astype(np.int64))
            logits = task.model(input_ids=ids[None, :-1]).logits[0]
            wanted[start : start + size] = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        found = np.zeros_like(wanted)
        for indices in task.evaluation_batches("test"):
            losses = task.losses(task.batch("test", indices)).numpy()
            places = task._windows["test"].layout(indices).places
            found[places[places >= 0]] = losses[places >= 0]
            assert not losses[places < 0].any()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    trainer = Trainer(task, RUN, seed=0, device=CPU, folder=data / "none")
    scored = task.score(trainer.evaluator.evaluate)
    assert scored.scores[0].value == pytest.approx(math.exp(wanted.mean()), rel=1e-4)
    assert scored.scores[0].contract["packing"] == "documents"
    per_document = np.add.reduceat(wanted, split.document_ends - split.lengths)
    np.testing.assert_allclose(scored.examples["nats"], per_document, rtol=1e-3)


def test_a_packed_run_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    whole = curve_of(packed(data), RUN, tmp_path / "whole")
    assert whole[-1].valid_loss < whole[0].valid_loss
    for stop_at in (3, 40, 77):
        first, second = tmp_path / f"first-{stop_at}", tmp_path / f"second-{stop_at}"
        with pytest.raises(PreemptedError):
            curve_of(packed(data), RUN, first, stop_at=stop_at)
        assert curve_of(packed(data), RUN, second, earlier=(first,)) == whole


def test_architectures_that_cannot_keep_documents_apart_are_refused_before_a_trial(data: Path) -> None:
    definition, card = CausalLMDefinition(), read_card(data)
    for name in ("gpt2", "llama", "qwen2", "gpt_neox", "mistral", "gemma2"):
        definition.check_model(MODEL.model_copy(update={"architecture": name}), PACKED, card)
    for name in ("bloom", "mamba", "rwkv"):
        model = MODEL.model_copy(update={"architecture": name, "num_heads": None, "init_std": None})
        definition.check_model(model, CausalLMOptions(), card)
        with pytest.raises(UsageError, match=r"causal_lm.packing: models of type \w+ cannot be told which tokens"):
            definition.check_model(model, PACKED, card)


def test_pretrained_models_are_checked_too(data: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=6, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    model = ModelSettings(pretrained=str(tmp_path / "model"), context_length=32)
    CausalLMDefinition().check_model(model, PACKED, read_card(data))
    BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=4, n_head=2)).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(UsageError, match="type bloom cannot be told"):
        CausalLMDefinition().check_model(model, PACKED, read_card(data))
