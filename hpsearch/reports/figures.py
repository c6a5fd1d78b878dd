"""The figures of a study, by the names that pages know them by.

Every figure says how much it was drawn from and, in a sentence, what it means. Colours are those of Okabe and Ito
(2008), which people who cannot tell red from green can tell apart; states differ by shape as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpsearch.reports.curves import confusion, curves, samples
from hpsearch.reports.outcomes import compute, every_trial, leaderboard_figure, optimism, timeline
from hpsearch.reports.search_figures import comparison, contours, importances, parallel, progress, slices
from hpsearch.reports.study_data import StudyData
from hpsearch.reports.theme import Drawn

FIGURES: dict[str, Callable[[StudyData], Drawn | None]] = {
    "curves": curves,
    "leaderboard": leaderboard_figure,
    "progress": progress,
    "importances": importances,
    "parallel": parallel,
    "slices": slices,
    "contours": contours,
    "timeline": timeline,
    "compute": compute,
    "optimism": optimism,
    "confusion": confusion,
    "samples": samples,
    "trials": every_trial,
}
"""Figures of one study. Those that a task has nothing for are None."""
COMPARISONS: dict[str, Callable[[Sequence[StudyData]], Drawn | None]] = {"comparison": comparison}
"""Figures of several studies; None for one."""
