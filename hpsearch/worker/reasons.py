"""Why a run ended, in words."""

from __future__ import annotations

from collections.abc import Sequence

from hpsearch.pruning.overfitting import Judgement, Verdict
from hpsearch.records import (
    Point,
    TrialConfig,
)


def first_cause(words: Sequence[str]) -> str | None:
    """Of what is known of processes that ended, what explains the others' ends; None when all ended well."""
    return min(filter(None, words), key=lambda said: "Connection" in said, default=None)


def ending(config: TrialConfig, curve: list[Point]) -> str:
    epochs = config.training.num_epochs
    if curve[-1].epoch < epochs and config.finish_in_s is not None:
        return f"brought to its end at epoch {curve[-1].epoch:.2f} of {epochs}, as the study's time ran out"
    if curve[-1].epoch >= epochs or config.max_minutes is None:
        return f"ran its {epochs} epochs"
    return f"stopped after max_minutes ({config.max_minutes:g}) at epoch {curve[-1].epoch:.2f} of {epochs}"


def is_broken(judgement: Judgement) -> bool:
    return judgement.evidence.rule in ("non-finite", "exploding")


def why(judgement: Judgement, curve: list[Point]) -> str:
    evidence, last = judgement.evidence, curve[-1]
    if evidence.rule == "non-finite":
        return f"loss is no finite number at epoch {last.epoch:.2f}"
    if evidence.rule == "exploding":
        return f"training loss exploded to {last.train_loss:.3g} at epoch {last.epoch:.2f}"
    best = curve[(evidence.best_evaluation or 1) - 1]
    turned = {
        "rising trend": f"validation loss rises (Mann-Kendall z {evidence.valid_trend_z or 0:+.2f})",
        "patience": f"no better validation loss for {evidence.since_best} evaluations",
    }.get(evidence.rule, evidence.rule)
    training = {
        Verdict.OVERFITTING: "while training loss falls",
        Verdict.PLATEAU: "and training loss is flat",
        Verdict.DIVERGING: "and training loss rises",
    }.get(judgement.verdict, "")
    return (
        f"{turned} {training}: {last.valid_loss:.3f} at epoch {last.epoch:.2f}, "
        f"best {best.valid_loss:.3f} at epoch {best.epoch:.2f}"
    )
