"""Built-in text, read at run time from the running Python: nothing is downloaded, no text is kept here.

Another Python has other text, so a study records the fingerprint of what was read. The prose is CPython's own
documentation, under the PSF licence.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

_SKIPPED_PACKAGES = {"test", "tests", "idlelib", "tkinter", "distutils", "lib2to3", "site-packages", "dist-packages"}


def python_docs() -> list[str]:
    """Paragraphs of prose from `pydoc_data.topics`, CPython's language reference; repeats included."""
    from pydoc_data.topics import topics

    return [paragraph for name in sorted(topics) for paragraph in _prose(topics[name])]


def python_docstrings() -> list[str]:
    """Paragraphs of prose from the docstrings of the standard library, in the order of its files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paragraphs: list[str] = []
    for file in sorted(root.rglob("*.py")):
        if _SKIPPED_PACKAGES.intersection(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                paragraphs += _prose(ast.get_docstring(node) or "")
    return paragraphs


CORPORA: dict[str, Callable[[], list[str]]] = {"python_docs": python_docs, "python_docstrings": python_docstrings}


def fold(text: str) -> str:
    """The text with every run of white space made one space."""
    return " ".join(text.split())


def _prose(text: str) -> list[str]:
    """Paragraphs of at least 6 words that are mostly letters: sentences rather than code and tables."""
    folded = (fold(paragraph) for paragraph in re.split(r"\n\s*\n", text))
    return [
        paragraph
        for paragraph in folded
        if len(paragraph.split()) >= 6
        and sum(char.isalpha() or char.isspace() for char in paragraph) > 0.85 * len(paragraph)
    ]
