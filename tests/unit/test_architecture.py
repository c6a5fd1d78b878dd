"""The table of docs/architecture.md, held to: imports point down it, and heavy libraries are where it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hpsearch"

PAGE = PACKAGE.parent / "docs" / "architecture.md"
ROWS = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", PAGE.read_text(), flags=re.MULTILINE)
RANK = {package: rank for rank, (package, _) in enumerate(ROWS)}
OWNERS = {
    library: {package for package, libraries in ROWS if library in libraries.replace(" ", "").split(",")}
    for library in sorted({name.strip() for _, libraries in ROWS for name in libraries.split(",")} - {""})
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


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_every_package_has_a_row_in_the_page() -> None:
    assert {package_of(module) for module in modules()} - {"", "__main__"} == set(RANK)


@pytest.mark.parametrize("module", sorted(set(modules()) - {"", "__main__"}))
def test_imports_point_down_the_table(module: str) -> None:
    own = package_of(module)
    for name in imported(modules()[module]):
        target = package_of(name.removeprefix("hpsearch."))
        if name.startswith("hpsearch.") and target in RANK and target != own:
            assert RANK[target] > RANK[own], f"{module} may not import {name}"


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_heavy_library_is_imported_where_the_table_says(library: str) -> None:
    users = {
        package_of(module)
        for module, tree in modules().items()
        if any(name == library or name.startswith(f"{library}.") for name in imported(tree))
    }
    assert users == OWNERS[library]


def test_the_heavy_libraries_are_in_the_table() -> None:
    assert {"torch", "transformers", "optuna", "ray", "sqlalchemy", "pandas", "plotly", "datasets", "click"} <= set(
        OWNERS
    )


@pytest.mark.parametrize("module", sorted(set(modules()) - {"__main__"}))
def test_a_module_opens_with_one_sentence(module: str) -> None:
    assert ast.get_docstring(modules()[module])


def test_no_folder_is_a_drawer() -> None:
    """At most some twenty names to read before one knows where to look, and about twelve within."""
    for folder in {PACKAGE, *(file.parent for file in PACKAGE.rglob("*.py"))}:
        names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(("_", "py.typed"))]
        assert len(names) <= (23 if folder == PACKAGE else 12), folder


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param("import hpsearch.cli.main", {"torch", "ray", "optuna", "sqlalchemy", "pandas", "rich"}, id="help"),
        pytest.param(
            "from hpsearch import api; from hpsearch.cli import summaries, tables; from hpsearch.results import leaderboard",
            {"torch", "ray", "optuna", "transformers"},
            id="rank and show",
        ),
        pytest.param(
            "from hpsearch.spec.load import load_study",
            {"torch", "ray", "optuna", "sqlalchemy", "numpy"},
            id="study file",
        ),
        pytest.param("import hpsearch.driver.run.study_run", {"torch", "ray", "transformers"}, id="driver"),
    ],
)
def test_light_commands_load_nothing_heavy(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)
