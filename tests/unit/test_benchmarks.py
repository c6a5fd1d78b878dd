"""What benchmarks compare with: a peer that is given less than we are would make us look better than we are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpsearch.data.shards import SPLITS, load_split

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_hf_trainer_reads_all_of_the_text_that_we_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import trainer

    case: Any = trainer.Case("causal LM", tmp_path, epochs=1, device="cpu")
    _, data, _, _ = case._causal()
    length = case.model_settings.context_length
    for split in SPLITS:
        stream = load_split(Path(case.config.data), split).tokens.astype(np.int64)
        read = torch.cat([row["input_ids"] for row in data[split]]).numpy()
        predicted = torch.cat([row["labels"] for row in data[split]]).numpy()
        assert len(read) == case.task.num_examples[split] * length
        assert abs(int((predicted != -100).sum()) - (len(stream) - 1)) < length, "and nothing else is predicted"
        whole = read[predicted != -100]
        assert np.array_equal(whole, stream[: len(whole)])
