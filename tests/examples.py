"""The examples of a study in memory, as its preparation leaves them on disk."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hpsearch.data.corpora import Example
from hpsearch.data.shards import SPLITS
from hpsearch.data.stages import Preparation
from hpsearch.spec.study import StudySpec


@dataclass(frozen=True, kw_only=True)
class Read:
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    duplicates: int
    overlaps: dict[str, int]
    rare: dict[str, int]

    def field(self, split: str, index: int) -> list[str]:
        return [example[index] for example in getattr(self, split)]


def read_examples(spec: StudySpec) -> Read:
    with tempfile.TemporaryDirectory() as folder:
        preparation = Preparation(spec, Path(folder))
        preparation.read()
        found = preparation.examples
        return Read(
            **{split: list(found.examples(split)) for split in SPLITS},
            duplicates=found.duplicates,
            overlaps=found.overlaps,
            rare=found.rare,
        )
