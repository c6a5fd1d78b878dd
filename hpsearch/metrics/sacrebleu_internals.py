"""Private parts of sacrebleu, with the version they were read from (2.6). See `tests/unit/test_internals.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def sentence_statistics(metric: Any, outputs: Sequence[str], references: Sequence[str]) -> NDArray[Any]:
    """What each sentence adds to a corpus score, a row each: numbers whose sums the metric computes its score from."""
    return np.array(metric._extract_corpus_statistics(outputs, [references]))
