"""How results are printed: JSON, the look of tables and states.

Everything printed from a study is text, never markup, and control characters in it are shown as escapes.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from hpsearch.records import TrialState

STATE_COLOURS = {
    TrialState.COMPLETED: "green",
    TrialState.OVERFIT: "yellow",
    TrialState.PLATEAU: "yellow",
    TrialState.FAILED: "red",
    TrialState.INFEASIBLE: "red",
    TrialState.DIVERGED: "magenta",
    TrialState.UNPROMISING: "blue",
}


def new_table(*columns: str, header: bool = True) -> Table:
    table = Table(box=None, show_header=header, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def state_text(state: str) -> Text:
    return Text(state, style=STATE_COLOURS.get(TrialState(state), ""))


def jsonable(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        fields = {key: getattr(value, key) for key in value.__dataclass_fields__}
        return {key: jsonable(field) for key, field in fields.items() if not isinstance(field, bytes)}
    if isinstance(value, dict):
        return {key: jsonable(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(child) for child in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """Any result of a reading command as JSON: times in ISO 8601, NaN and infinite numbers as null."""
    return json.dumps(jsonable(value), indent=2)
