"""Built-in text, read at run time from the running Python: nothing is downloaded, no text is kept here.

Another Python has other text, so a study records the fingerprint of what was read. The prose is CPython's own
documentation, under the PSF licence.
"""

from __future__ import annotations

import ast
import gettext
import html
import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from hpsearch.errors import DataError

Example = tuple[str, ...]
"""The fields of one example: (text,), (source, target), (text, label) or (messages as JSON, answer)."""

_SKIPPED_PACKAGES = {"test", "tests", "idlelib", "tkinter", "distutils", "lib2to3", "site-packages", "dist-packages"}


def python_docs() -> Iterator[Example]:
    """Paragraphs of prose from `pydoc_data.topics`, CPython's language reference; repeats included."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for paragraph in _prose(topics[name]):
            yield (paragraph,)


def python_docstrings() -> Iterator[Example]:
    """Paragraphs of prose from the docstrings of the standard library, in the order of its files."""
    for _, paragraph in _docstrings():
        yield (paragraph,)


def python_areas() -> Iterator[Example]:
    """Paragraphs of the standard library's docstrings with the area of the library that they belong to."""
    area_of = {module: area for area, modules in _AREAS.items() for module in modules.split()}
    for module, paragraph in _docstrings():
        if module in area_of:
            yield paragraph, area_of[module]


def python_functions() -> Iterator[Example]:
    """Signatures of the standard library's functions, as a user's messages, and what their docstrings say they do."""
    for parts, tree in _modules():
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                said = fold(re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0])
                if _FEWEST_WORDS <= len(said.split()) <= _MOST_WORDS:
                    asked = f"{module}: def {node.name}({ast.unparse(node.args)})"
                    yield json.dumps([{"role": "user", "content": asked}]), said


_FEWEST_WORDS, _MOST_WORDS = 3, 30


def ui_messages() -> Iterator[Example]:
    """English-French pairs from the gettext catalogs of three BSD-licensed packages (the `demo-data` extra).

    Mark-up is removed, of plural forms the singular is taken, and what is left untranslated is dropped.
    """
    for package in CATALOG_PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            raise DataError(
                f"data.corpus: ui_messages reads the catalogs of {package}, which is not installed; "
                "pip install 'hpsearch[demo-data]'"
            ) from None
        for file in sorted(files, key=str):
            if re.search(r"/fr(_FR)?/LC_MESSAGES/[^/]+\.mo$", str(file)):
                yield from _pairs(Path(str(file.locate())))


CATALOG_PACKAGES = ("jupyterlab-language-pack-fr-FR", "Django", "Trac")

_AREAS = {
    "mail": "email smtplib smtpd imaplib poplib nntplib mailbox mailcap mimetypes quopri base64 uu",
    "web": "http urllib socketserver wsgiref xmlrpc ftplib cgi cgitb webbrowser telnetlib ssl socket ipaddress",
    "files": "pathlib os shutil tempfile glob fnmatch zipfile tarfile gzip bz2 lzma filecmp fileinput posixpath ntpath "
    "genericpath stat _pyio csv configparser netrc plistlib zipapp",
    "numbers": "statistics decimal _pydecimal fractions random numbers datetime _pydatetime calendar _strptime heapq",
    "typing": "typing abc _py_abc collections _collections_abc types dataclasses enum functools inspect weakref",
    "asyncio": "asyncio",
    "markup": "xml html json tomllib _markupbase",
    "concurrency": "threading multiprocessing concurrent queue sched subprocess signal",
    "import": "importlib pkgutil zipimport modulefinder runpy imp site ensurepip venv sysconfig",
    "testing": "unittest doctest",
    "debugging": "pdb bdb traceback trace tracemalloc dis profile cProfile pstats timeit linecache code codeop",
    "turtle": "turtle turtledemo",
    "logging": "logging warnings",
}
"""Area of the standard library to its top-level modules; those of other Python versions included."""

READERS: dict[str, Callable[[], Iterator[Example]]] = {
    "python_docs": python_docs,
    "python_docstrings": python_docstrings,
    "ui_messages": ui_messages,
    "python_areas": python_areas,
    "python_functions": python_functions,
}
"""Built-in corpora by name; `spec.sections` says which task each is for."""


def fold(text: str) -> str:
    """The text with every run of white space made one space."""
    return " ".join(text.split())


@cache
def _docstrings() -> list[tuple[str, str]]:
    """Top-level module and paragraph. Kept: reading the library takes seconds."""
    return [
        (parts[0], paragraph)
        for parts, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for paragraph in _prose(ast.get_docstring(node) or "")
    ]


def _modules() -> Iterator[tuple[tuple[str, ...], ast.Module]]:
    """The modules of the standard library, by the parts of their names, in the order of their files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIPPED_PACKAGES.intersection(parts):
            continue
        try:
            yield parts, ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue


def _pairs(catalog: Path) -> Iterator[Example]:
    with catalog.open("rb") as stream:
        # The standard library reads .mo files but has no public way to list what it read.
        messages: dict[str | tuple[str, int], str] = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
    for key, translated in messages.items():
        if isinstance(key, tuple) and key[1] != 0:
            continue
        message = key[0] if isinstance(key, tuple) else key
        english, french = _clean(message.split("\x04")[-1]), _clean(translated)
        if english and french and english != french and max(len(english.split()), len(french.split())) <= 60:
            yield english, french


def _clean(text: str) -> str:
    return fold(re.sub(r"<[^>]+>", " ", html.unescape(text)))


def _prose(text: str) -> list[str]:
    """Paragraphs of at least 6 words that are mostly letters: sentences rather than code and tables."""
    folded = (fold(paragraph) for paragraph in re.split(r"\n\s*\n", text))
    return [
        paragraph
        for paragraph in folded
        if len(paragraph.split()) >= 6
        and sum(char.isalpha() or char.isspace() for char in paragraph) > 0.85 * len(paragraph)
    ]
