"""What the Optuna dashboard shows of a study beside its numbers, and the keys that it lies under."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

NOTE = re.compile(r"dashboard:(\d+):note_ver")
ARTIFACT = re.compile(r"dashboard:artifacts:(\d+):[0-9a-fA-F-]+")
"""Keys of a study's system attributes that hold what the dashboard shows of a trial, by its id in Optuna's tables."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file about a trial, in the folder of artifacts under its `id`."""

    trial: int
    name: str
    id: str
    kind: str
    """MIME type."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What the Optuna dashboard is to show of a study beside its numbers."""

    notes: Mapping[int, str]
    """Markdown, of trials that have none."""
    study_note: str
    replaces: str
    """How a note of the study begins that `study_note` may replace; no other is touched."""
    figures: Mapping[str, str]
    """plotly JSON by id."""
    artifacts: Sequence[Artifact]
    without: Collection[int]
    """Trials whose artifacts are taken off."""


def study_note(there: Mapping[str, Any], note: str, replaces: str) -> dict[str, Any]:
    """The attributes that make this the study's note, unless a person has written another."""
    keys = [key for place in range(len(there)) if (key := f"dashboard:note_str:{place}") in there]
    written = "".join(there[key] for key in keys)
    if written == note or (written and not written.startswith(replaces)):
        return {}
    version = int(there.get("dashboard:note_ver", 0)) + 1
    return {**dict.fromkeys(keys, ""), "dashboard:note_ver": version, "dashboard:note_str:0": note}


def artifact_not_found(artifact: str) -> Exception:
    """What Optuna's dashboard hears of an artifact that is not there any more."""
    return optuna.artifacts.exceptions.ArtifactNotFound(artifact)


def numbered(pattern: re.Pattern[str], attributes: Mapping[str, Any], numbers: Mapping[int, int]) -> Iterator[Any]:
    """Matches of the keys that name one of these trials, with its number and the attribute."""
    for key, value in attributes.items():
        match = pattern.fullmatch(key)
        if match and int(match[1]) in numbers:
            yield match, numbers[int(match[1])], value
