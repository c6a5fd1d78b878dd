"""Private parts of other libraries are used behind fences only, and have the shape that we read from their source.

When one of these fails after an upgrade, read the library's new source, change its `*_internals.py`, and note the version.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState, create_trial
from sacrebleu.metrics import BLEU, CHRF, TER
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BertConfig, GenerationConfig, GPT2Config, MarianConfig

from hpsearch.metrics.sacrebleu_internals import sentence_statistics
from hpsearch.models.transformers_internals import forget_origin, has_model
from hpsearch.search import optuna_internals
from hpsearch.training import torch_internals

PACKAGE = Path(__file__).parents[2] / "hpsearch"
ALLOWED = {"_exit", "_catalog"}
"""One of our own; `os._exit`; and gettext's, which has no other way to list its messages."""


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE).with_suffix(""))
)
def test_underscores_of_others_stand_behind_fences(file: Path) -> None:
    if file.name.endswith("_internals.py"):
        return
    tree = ast.parse(file.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_own = isinstance(node.value, ast.Name) and (node.value.id in {"self", "cls"} | own)
            assert is_own or node.attr in ALLOWED, f"line {node.lineno}: .{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("hpsearch"):
            assert not any(part.startswith("_") and part != "__future__" for part in node.module.split(".")), (
                node.module
            )


def test_the_last_trial_of_an_in_memory_storage_can_be_taken_back() -> None:
    storage = optuna_internals.SearchStorage()
    study = optuna.create_study(storage=storage)
    first, second = study.ask(), study.ask()
    storage.withdraw(optuna_internals.ids_of(study.get_trials())[second.number])
    assert [trial.number for trial in study.get_trials()] == [first.number]
    assert study.ask().number == 1
    assert InMemoryStorage in optuna_internals.SearchStorage.__mro__


def test_whoever_asks_for_trials_is_given_the_view_while_it_lasts() -> None:
    storage = optuna_internals.SearchStorage()
    study = optuna.create_study(storage=storage)
    for value in (1.0, 2.0, 3.0):
        study.add_trial(create_trial(value=value))
    with storage.seen_as(lambda trials: trials[:1]):
        assert [trial.value for trial in study.get_trials()] == [1.0]
        assert [trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])] == [1.0]
        assert study.get_trials(states=[TrialState.FAIL]) == []
        # As samplers of Optuna's own do that go past the study.
        assert len(storage.get_all_trials(storage.get_study_id_from_name(study.study_name))) == 1
    assert len(study.get_trials()) == 3


def test_optunas_tables_have_the_columns_that_are_written(tmp_path: Path) -> None:
    storage = RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    study = optuna.create_study(storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0.1, 0.2), n_trials=1)
    study_id = storage.get_study_id_from_name(study.study_name)
    optuna_internals.widen(storage, study_id, {"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
    optuna_internals.reopen(storage, optuna_internals.ids_of(study.get_trials())[0])
    optuna_internals.write_study_attributes(storage, study_id, {"a": 1, "b": "text"})
    again = optuna.load_study(study_name=study.study_name, storage=storage)
    (trial,) = again.get_trials()
    assert trial.distributions["x"] == optuna.distributions.FloatDistribution(0.0, 1.0)
    assert trial.state is TrialState.WAITING
    assert storage.get_study_system_attrs(study_id) == {"a": 1, "b": "text"}
    assert {"trial_id", "param_name", "param_value", "distribution_json"} <= set(
        models.TrialParamModel.__table__.c.keys()
    )


def test_transformers_says_which_configurations_have_a_model() -> None:
    assert has_model(AutoModelForCausalLM, GPT2Config())
    assert has_model(AutoModelForCausalLM, BertConfig())
    assert not has_model(AutoModelForCausalLM, type("Unknown", (GPT2Config,), {})())
    config = GenerationConfig.from_model_config(MarianConfig())
    assert config._from_model_config
    forget_origin(config)
    assert not config._from_model_config


def test_torch_operates_on_lists_of_tensors() -> None:
    values, others = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
    torch_internals.mul_(values, 4.0)
    torch_internals.add_(values, others, alpha=2.0)
    torch_internals.div_(values, 2.0)
    assert [float(value[0]) for value in torch_internals.lerp(values, others, 0.5)] == [1.0, 1.0]
    torch_internals.lerp_(values, others, 1.0)
    assert all(bool((value == 0).all()) for value in values)
    assert torch_internals.is_in_bad_fork() is False
    assert {"logger", "reducer"} <= set(DistributedDataParallel.__init__.__code__.co_names) | set(
        DistributedDataParallel._ddp_init_helper.__code__.co_names
    )


def test_ray_knows_the_node_that_it_has_started() -> None:
    import ray
    from ray._private.node import Node

    from hpsearch.backends.ray import ray_internals

    assert hasattr(ray._private.worker, "_global_node")
    assert callable(Node.dead_processes)
    assert {"check_alive", "allow_graceful"} <= set(Node.kill_all_processes.__code__.co_varnames)
    helpers = {name: getattr(Node, name) for name in ray_internals._HELPERS}
    assert helpers.keys() <= {*Node.start_head_processes.__code__.co_names, *Node.start_ray_processes.__code__.co_names}
    with ray_internals.without_helpers():
        assert all(getattr(Node, name) is not helpers[name] for name in helpers)
    assert {name: getattr(Node, name) for name in helpers} == helpers


@pytest.mark.parametrize("metric", [BLEU(), CHRF(word_order=2), TER()], ids=["bleu", "chrf", "ter"])
def test_sacrebleu_computes_a_corpus_score_from_sums_over_sentences(metric: BLEU | CHRF | TER) -> None:
    outputs, references = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "the dog"]
    counts = sentence_statistics(metric, outputs, references)
    assert counts.shape[0] == 2
    total = metric._compute_score_from_stats(list(np.asarray(counts).sum(axis=0)))
    assert total.score == pytest.approx(metric.corpus_score(outputs, [references]).score)
