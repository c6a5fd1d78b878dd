"""Names to objects that are loaded on use: built in, of an installed package's entry points, or `package.module:name`.

To look a name up imports nothing but the metadata of installed packages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hpsearch.errors import UsageError

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Registry:
    """What may stand where a study file or an option names one of a kind."""

    kind: str
    """In words, for messages."""
    group: str
    """Of entry points."""
    built_in: Mapping[str, str]
    """Name to `module:attribute`."""

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.built_in, *(name for name in self._installed if name not in self.built_in))

    def problem(self, name: str) -> str | None:
        """Why nothing can have this name, if that is so."""
        if name in self.names or _PATH.fullmatch(name):
            return None
        return f"unknown {self.kind} {name!r}; expected {', '.join(self.names)}, or package.module:name of your own"

    def load(self, name: str) -> Any:
        """The object of this name. Raises UsageError when there is none, or its module cannot be imported."""
        if (problem := self.problem(name)) is not None:
            raise UsageError(problem)
        path = self.built_in.get(name) or (self._installed[name].value if name in self._installed else name)
        module, _, attribute = path.partition(":")
        try:
            loaded = import_module(module)
        except Exception as error:  # a module of the user's may fail in any way
            said = f"{error}" if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise UsageError(f"{self.kind} {name}: cannot import {module}: {said}") from error
        if not hasattr(loaded, attribute):
            raise UsageError(f"{self.kind} {name}: {module} has no {attribute}")
        return getattr(loaded, attribute)


TASKS = Registry(
    "task",
    "hpsearch.tasks",
    {
        "causal_lm": "hpsearch.tasks.causal_lm.definition:CausalLMDefinition",
        "translation": "hpsearch.tasks.translation.definition:TranslationDefinition",
        "classification": "hpsearch.tasks.classification.definition:ClassificationDefinition",
        "instruction": "hpsearch.tasks.instruction.definition:InstructionDefinition",
    },
)
SAMPLERS = Registry(
    "sampler",
    "hpsearch.samplers",
    {name: f"hpsearch.search.samplers:{name.upper()}" for name in ("tpe", "gp", "random", "cmaes", "grid", "qmc")},
)
TRACKERS = Registry(
    "tracker",
    "hpsearch.trackers",
    {
        "tensorboard": "hpsearch.integrations.tensorboard:TensorBoard",
        "mlflow": "hpsearch.integrations.mlflow:MLflow",
        "wandb": "hpsearch.integrations.wandb:WandB",
    },
)
