"""hpsearch finds the hyperparameters of a language model.

docs/architecture.md shows the way of a study through the packages. The Python API mirrors the commands:

    import hpsearch

    study = hpsearch.launch("studies/lm.yaml")
    study.best                  # the winner
    study.leaderboard()         # a pandas frame
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsearch.api import (
        archive,
        best,
        check,
        compare,
        doctor,
        export,
        export_data,
        finals,
        gc,
        init,
        jobs,
        launch,
        logs,
        open_study,
        rank,
        report,
        retry,
        schema,
        show,
        status,
        stop,
        studies,
        submit,
        watch,
    )
    from hpsearch.results.study import Study

__version__ = version("hpsearch")
__all__ = [
    "Study",
    "__version__",
    "archive",
    "best",
    "check",
    "compare",
    "doctor",
    "export",
    "export_data",
    "finals",
    "gc",
    "init",
    "jobs",
    "launch",
    "logs",
    "open_study",
    "rank",
    "report",
    "retry",
    "schema",
    "show",
    "status",
    "stop",
    "studies",
    "submit",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from hpsearch import api

        return getattr(api, name)
    raise AttributeError(f"module 'hpsearch' has no attribute {name!r}")
