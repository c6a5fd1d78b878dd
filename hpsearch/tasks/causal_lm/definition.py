"""What causal language modelling is to a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch.spec.task import TaskDefinition

if TYPE_CHECKING:
    from hpsearch.data.shards import DataCard
    from hpsearch.records import TrialConfig
    from hpsearch.spec.settings import ModelSettings
    from hpsearch.tasks.base import Task


class CausalLMDefinition(TaskDefinition):
    name = "causal_lm"
    corpora = ("python_docs", "python_docstrings")
    architecture = "gpt2"
    metric = "perplexity"

    def check_model(self, settings: ModelSettings, card: DataCard) -> None:
        from hpsearch.tasks.causal_lm.training import check_model

        check_model(settings, card)

    def build(self, config: TrialConfig) -> Task:
        from hpsearch.tasks.causal_lm.training import CausalLM

        return CausalLM(Path(config.data), config.model)
