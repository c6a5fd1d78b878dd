"""README and docs/ say what is true: references as generated, examples that parse, commands and links that exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest

import hpsearch
from docs import reference
from hpsearch.cli.main import main
from hpsearch.spec.parsing.yaml_file import read_study_file

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = {"name": "a", "task": "causal_lm", "data": {"corpus": "python_docs"}}


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        for number, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)):
            found.append(pytest.param(match[1], id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("page", sorted(reference.PAGES))
def test_a_reference_page_is_as_generated(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == reference.PAGES[page](), "run `make docs`"


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_study_file_in_the_docs_is_one(text: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    # An excerpt counts as part of a study that has the rest.
    content = {**BASE, **read_study_file(file).content}
    jsonschema.validate(content, hpsearch.schema())


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_docs_calls_what_there_is(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hpsearch":
            assert node.attr in hpsearch.__all__


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_in_the_docs_exist(text: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets
        words = words[words.index("--") + 1 :] if "--" in words else words
        if words[:1] == ["hpsearch"]:
            command = main.commands[words[1]]
            command.make_parser(click.Context(command)).parse_args(args=words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 8000
