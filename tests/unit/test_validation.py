"""How much of the validation split a run looks at: bounded, the same for all, confirmed on all of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpsearch.data.prepare import prepare
from hpsearch.data.shards import DataCard
from hpsearch.driver.plan import fitted
from hpsearch.spec.sections import DataSpec, TokenizerSpec
from hpsearch.spec.study import StudySpec, study_class
from hpsearch.tasks.base import within_budget
from hpsearch.training.evaluation import _spread
from hpsearch.training.trainer import Trainer
from hpsearch.training.validation import COST, LEAST_TEXTS, LEAST_TOKENS, fitting_evaluations, part_of_validation
from tests.rows import row


def card(train: int, validation: int, texts: int = 1000, labels: tuple[str, ...] = ()) -> DataCard:
    return row(
        DataCard,
        tokens={"train": train, "validation": validation, "test": 1},
        documents={"train": 1, "validation": texts, "test": 1},
        labels=list(labels),
    )


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("wanted", [1, 2, 40])
@pytest.mark.parametrize("train", [50_000, 1_000_000, 10**9])
def test_evaluation_takes_no_more_than_its_share(train: int, wanted: int, share: float) -> None:
    data = card(train, train // 10)
    count = fitting_evaluations(data, share=share, wanted=wanted)
    part = part_of_validation(data, share=share, evaluations_per_epoch=count)
    cost = count * part * data.tokens["validation"] * COST
    assert 1 <= count <= wanted
    assert cost / (cost + train) <= share + 1e-9
    assert part * data.tokens["validation"] >= min(LEAST_TOKENS, data.tokens["validation"]) - 1e-6
    assert count == wanted or count * LEAST_TOKENS > 0.4 * share * train, "no fewer than the share asks for"


def test_what_the_verdict_needs_is_looked_at_whatever_it_takes() -> None:
    assert part_of_validation(card(1000, 8192), share=0.1, evaluations_per_epoch=1) == LEAST_TOKENS / 8192
    texts = part_of_validation(card(1000, 90_000, texts=1000, labels=("a", "b")), share=0.1, evaluations_per_epoch=1)
    assert texts == pytest.approx(LEAST_TEXTS / 1000)
    assert part_of_validation(card(1000, 500), share=0.1, evaluations_per_epoch=40) == 1
    assert part_of_validation(card(1000, 10**9), share=1, evaluations_per_epoch=40) == 1
    assert fitting_evaluations(card(1000, 10**9), share=1, wanted=40) == 40


def test_a_part_is_from_everywhere_in_the_split_in_batches_as_large() -> None:
    batches = np.array_split(np.arange(1000), 10)
    some = _spread(batches, 0.3)
    chosen = np.concatenate(some)
    assert len(chosen) == len({*chosen.tolist()}) == 300
    assert np.histogram(chosen, 10, (0, 1000))[0].tolist() == [30] * 10
    assert [len(batch) for batch in some] == [90, 90, 90, 30]
    assert _spread(batches, 1.0) is batches


def study(folder: Path, **training: Any) -> StudySpec:
    spec = study_class("causal_lm")(
        name="s",
        task="causal_lm",
        data=DataSpec(corpus="python_docs"),
        tokenizer=TokenizerSpec(vocab_size=512),
        folder=str(folder),
    )
    model = spec.model.model_copy(
        update={"hidden_size": 16, "num_heads": 2, "num_layers": 1, "context_length": 32, "init_std": 0.08}
    )
    run = spec.training.model_copy(update={"num_epochs": 1, "batch_size": 64, "learning_rate": 0.02, **training})
    return spec.model_copy(update={"model": model, "training": run})


def test_a_short_text_is_evaluated_less_often_unless_the_file_says_how_often(tmp_path: Path) -> None:
    spec = study(tmp_path)
    data = prepare(spec)[1]
    assert spec.evaluations_per_epoch == 40
    assert fitted(spec, data).evaluations_per_epoch == fitting_evaluations(data, share=0.1, wanted=40) < 40
    assert fitted(study(tmp_path, evaluations_per_epoch=40), data).evaluations_per_epoch == 40
    assert fitted(spec, dataclasses.replace(data, tokens={**data.tokens, "train": 10**9})).evaluations_per_epoch == 40


def test_the_best_checkpoint_is_confirmed_on_all_of_the_split(tmp_path: Path) -> None:
    from hpsearch.records import TrialConfig

    spec = study(tmp_path)
    data = prepare(spec)[0]
    model, run = spec.settings_for({})

    def trained(folder: str, part: float) -> Trainer:
        torch.manual_seed(0)
        config = TrialConfig.model_construct(data=str(data), model=model, training=run)
        trainer = Trainer(
            spec.definition.build(config), run, seed=0, device=torch.device("cpu"), folder=tmp_path / folder,
            validation_part=part,
        )  # fmt: skip
        list(trainer.points())
        trainer.score()
        return trainer

    whole, part = trained("whole", 1.0), trained("part", 0.3)
    assert whole.confirmed_loss is None
    assert part.confirmed_loss == pytest.approx(whole.curve[-1].valid_loss, rel=1e-6)
    assert part.curve[-1].valid_loss != part.confirmed_loss
    assert part.curve[-1].valid_loss == pytest.approx(part.confirmed_loss, rel=0.05)


def test_a_part_of_long_and_short_texts_keeps_within_the_budget_of_a_batch() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1.2, 5000).astype(np.int64), 1, 512)
    batches = within_budget(lengths, 4096)
    for part in (0.03, 0.1, 0.5, 0.9):
        some = _spread(batches, part)
        padded = [len(batch) * lengths[batch].max() for batch in some]
        assert max(padded) <= 4096
        assert sum(map(len, some)) == round(part * 5000)
        assert len(some) <= len(batches)
    assert len(_spread(batches, 0.1)) < 0.5 * len(batches), "neighbours are joined"
