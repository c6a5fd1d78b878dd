"""The layout of CONTRIBUTING.md, held to: imports point down the list, and heavy packages have one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hpsearch"

LAYERS = [
    {"__main__"},
    {"cli"},
    {"terminal", "dashboard"},
    {"api"},
    {"pages"},
    {"annotations"},
    {"figures"},
    {"wording"},
    {"backends.ray_tune", "backends.ray_jobs", "backends.inline"},
    {"backends.ray_metrics", "backends.ray_cluster"},
    {"backends.fork_server"},
    {"backends"},
    {"study", "invariants", "trackers"},
    {"tables"},
    {"ownership"},
    {"search", "ranking", "housekeeping", "leases"},
    {"ties"},
    {"store", "outbox", "samplers"},
    {"migrations", "engines", "worker"},
    {"trainer"},
    {"checkpoints", "devices", "muon", "ranks"},
    {"tasks.causal_lm", "tasks.translation", "tasks.classification"},
    {"tasks.probe"},
    {"tasks.architecture", "tasks.kernels"},
    {"tasks.configuration"},
    {"tasks.base"},
    {"tasks"},
    {"data"},
    {"bleu", "intervals", "pretrained", "trial_log"},
    {"statistics"},
    {"spec"},
    {"corpora", "space", "study_file", "trial"},
    {"pruning", "rungs"},
    {"settings", "memory", "endgame", "storage"},
    {"scratch", "redaction"},
    {"errors"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

TASK_ROOM = {
    "tasks.base", "tasks.architecture", "tasks.configuration", "tasks.kernels", "tasks.probe", "tasks.causal_lm", "tasks.translation", "tasks.classification",
}  # fmt: skip
OWNERS = {
    "click": {"cli"},
    "rich": {"terminal", "cli"},
    "ray": {"backends.ray_cluster", "backends.ray_tune", "backends.ray_jobs", "backends.ray_metrics"},
    "optuna": {"search", "samplers"},
    "optuna_dashboard": {"dashboard"},
    "jinja2": {"pages"},
    "pandas": {"ranking", "figures", "tables"},
    "plotly": {"figures", "pages"},
    "sqlalchemy": {"store", "engines", "migrations"},
    "torch": {"trainer", "worker", "checkpoints", "devices", "muon", "ranks", *TASK_ROOM},
    "safetensors": {"checkpoints", "pretrained"},
    "transformers": {"worker", "pretrained", *TASK_ROOM},
    "huggingface_hub": {"pretrained"},
    "fsspec": {"storage"},
    "mlflow": {"trackers"},
    "tensorboardX": {"trackers"},
    "wandb": {"trackers"},
    "upath": {"storage"},
    "peft": {"tasks.architecture"},
    "sacrebleu": {"tasks.translation", "bleu"},
    "sklearn": {"tasks.classification"},
    "datasets": {"data"},
    "tokenizers": {"data"},
    "pydantic": {"settings", "pruning", "spec", "space", "pages"},
    "yaml": {"study_file"},
}


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found["" if name == "__init__" else name] = ast.parse(file.read_text())
    return found


def imported(tree: ast.Module) -> set[str]:
    """Absolute names of all imports, those inside functions included, those for types only left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_module_has_a_place_in_the_list() -> None:
    assert set(modules()) - {""} == set(RANK)


@pytest.mark.parametrize("module", sorted(RANK))
def test_imports_point_down_the_list(module: str) -> None:
    for name in imported(modules()[module]):
        target = name.removeprefix("hpsearch.")
        if name.startswith("hpsearch.") and target in RANK and target != module:
            assert RANK[target] > RANK[module], f"{module} may not import {target}"


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_a_heavy_package_has_one_owner(package: str) -> None:
    users = {
        module
        for module, tree in modules().items()
        if any(name == package or name.startswith(f"{package}.") for name in imported(tree))
    }
    assert users <= OWNERS[package]


@pytest.mark.parametrize("module", sorted(set(RANK) - {"__main__"}))
def test_a_module_opens_with_one_sentence(module: str) -> None:
    assert ast.get_docstring(modules()[module])


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param("import hpsearch.cli", {"torch", "ray", "optuna", "sqlalchemy", "pandas", "rich"}, id="help"),
        pytest.param(
            "from hpsearch import api, terminal, ranking",
            {"torch", "ray", "optuna", "transformers"},
            id="rank and show",
        ),
        pytest.param(
            "from hpsearch.spec import load_study", {"torch", "ray", "optuna", "sqlalchemy", "numpy"}, id="study file"
        ),
        pytest.param("import hpsearch.study", {"torch", "ray", "transformers"}, id="driver"),
    ],
)
def test_light_commands_load_nothing_heavy(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)
