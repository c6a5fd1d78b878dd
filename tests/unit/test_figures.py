"""Figures from rows: what is drawn is what the store holds."""

from __future__ import annotations

from hpsearch.reports.figures import FIGURES
from hpsearch.reports.study_data import StudyData
from hpsearch.results.leaderboard import Leaderboard
from hpsearch.store.rows import RankedTrial, StudyRow
from tests.rows import row


def board_of(ties: list[str]) -> Leaderboard:
    rows = [
        row(
            RankedTrial, trial=place, tie=tie, score=10.0 + place, score_low=9.0 + place, score_high=11.0 + place,
            score_n=50, state="completed",
        )
        for place, tie in enumerate(ties)
    ]  # fmt: skip
    return Leaderboard(
        studies=["s"], task="causal_lm", metric="perplexity", objective="loss", rows=rows, states={},
        validation_choice=None,
        leading=None, finals=[],
    )  # fmt: skip


def test_the_leaderboard_draws_every_rank_and_fills_the_dots_of_the_tied() -> None:
    ties = ["1", "1=", *map(str, range(3, 21))]
    data = StudyData(row(StudyRow, name="s"), [], {}, board_of(ties), {}, None)
    drawn = FIGURES["leaderboard"](data)
    assert drawn is not None
    assert drawn.figure is not None
    tied, worse = drawn.figure.data
    assert list(tied.y) == ["trial 0", "trial 1"]
    assert list(worse.y) == [f"trial {place}" for place in range(2, 20)], "ranks of two digits, too"
