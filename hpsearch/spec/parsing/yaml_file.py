"""Reads a study file: YAML 1.2 scalars, the place of every key, `--set` overrides.

Knows nothing of what the keys mean. PyYAML follows YAML 1.1, in which `1e-4` is text, `no` is false,
`010` is 8 and the last of two equal keys wins; here the core schema of YAML 1.2.2 (section 10.3.2) is used
and equal keys are refused. A study file is data: tags, anchors and aliases are refused, and so is a file
larger or deeper than any study needs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from hpsearch.errors import Problem, SpecError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mark:
    """A place in a text: 1-based line and column."""

    line: int
    column: int


@dataclass
class StudyDocument:
    """The raw content of a study file and where each of its keys and values stands."""

    source: str
    content: dict[str, Any]
    key_marks: dict[KeyPath, Mark] = field(default_factory=dict)
    value_marks: dict[KeyPath, Mark] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    """Values without quotes as they were written: 01 is the number 1, but may mean the text."""
    overrides: dict[KeyPath, str] = field(default_factory=dict)
    """Key path to the command-line option that set it, such as `--set budget.trials=4`."""

    def override(self, dotted: str, value: Any, option: str, text: str | None = None) -> None:
        """Set the value at a dotted path, making the mappings on the way; `option` names it in messages."""
        path = tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
        if not all(str(part) for part in path):
            raise SpecError([f"{option}: expected KEY=VALUE with a dotted key, such as search.num_layers.max=4"])
        node: Any = self.content
        for depth, part in enumerate(path[:-1]):
            child = _child(node, part)
            if not isinstance(child, dict | list):
                if isinstance(node, list) or (child is not None and part not in node):
                    raise SpecError([f"{option}: {_dotted(path[: depth + 1])} is not there to be set"])
                child = node[part] = {}
            node = child
        if isinstance(node, list) and (not isinstance(path[-1], int) or path[-1] >= len(node)):
            raise SpecError([f"{option}: {_dotted(path[:-1])} has {len(node)} entries, counted from 0"])
        node[path[-1]] = value
        for known in [known for known in self.value_marks if known[: len(path)] == path]:
            del self.value_marks[known]
            self.texts.pop(known, None)
        if text is not None:
            self.texts[path] = text
        self.overrides[path] = option

    def line_of(self, problem: Problem) -> tuple[tuple[int, int], str]:
        """The sort key and the text of one problem, with the nearest known place above it."""
        label = _dotted(problem.path)
        text = f"{label}: {problem.message}" if label else problem.message
        for cut in range(len(problem.path), -1, -1):
            path = problem.path[:cut]
            option = self.overrides.get(path) or next(
                (option for known, option in self.overrides.items() if path and known[: len(path)] == path), None
            )
            if option and path not in self.value_marks:
                return (1_000_000_000, 0), f"{option}: {text}"
            marks = self.key_marks if problem.at_key and cut == len(problem.path) else self.value_marks
            if path in marks:
                mark = marks[path]
                return (mark.line, mark.column), f"{self.source}:{mark.line}:{mark.column}: {text}"
        return (0, 0), f"{self.source}: {text}"

    def error(self, problems: list[Problem]) -> SpecError:
        return SpecError([text for _, text in sorted(self.line_of(problem) for problem in problems)])


def read_study_file(path: str | FilePath) -> StudyDocument:
    """Read and parse one study file. Raises SpecError when it is missing, malformed or not a mapping."""
    file = FilePath(path)
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError([f"{file}: no such study file"]) from None
    except OSError as error:
        raise SpecError([f"{file}: cannot be read: {error.strerror}"]) from None
    if len(raw) > MAX_BYTES:
        raise SpecError([f"{file}: larger than {MAX_BYTES // 1024} kB; a study file holds settings, not data"])
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SpecError([f"{file}:{line}: not UTF-8 text"]) from None
    return parse_study(text, source=str(file))


def parse_study(text: str, *, source: str) -> StudyDocument:
    """Parse the text of a study file; `source` names it in messages."""
    document = StudyDocument(source=source, content={})
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        detail = " ".join(part for part in (error.context, error.problem) if part)
        raise SpecError([f"{place}: not valid YAML: {detail}"]) from None
    except yaml.YAMLError as error:
        raise SpecError([f"{source}: not valid YAML: {error}"]) from None
    if node is None:
        raise SpecError([f"{source}: empty; a study file needs at least a name, a task and data"])
    if not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "single value"
        raise SpecError([f"{source}:1:1: expected a mapping of settings (key: value), got a {kind}"])
    problems: list[Problem] = []
    document.content = _construct(node, (), document, problems)
    if problems:
        raise document.error(problems)
    return document


def parse_scalar(text: str) -> Any:
    """The value of one YAML fragment, as in `--set KEY=VALUE`."""
    document = parse_study(f"value: {text}" if text.strip() else "value: ''", source="--set")
    return document.content["value"]


_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
_INT = re.compile(r"[-+]?[0-9]+")
_OCT = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


def _scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text) if len(text) <= 40 else float(text)
    if _OCT.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinity := _INF.fullmatch(text):
        return float(f"{infinity[1]}inf")
    if _NAN.fullmatch(text):
        return float("nan")
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes only; nothing is constructed, so no tag can run anything."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors (&) and aliases (*) are not allowed", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags (!) are not allowed", problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _construct(node: yaml.Node, path: KeyPath, document: StudyDocument, problems: list[Problem]) -> Any:
    document.value_marks[path] = Mark(node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.ScalarNode):
        if node.style is not None:
            return node.value
        document.texts[path] = node.value
        return _scalar(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, index), document, problems) for index, child in enumerate(node.value)]
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        child_path = (*path, key)
        mark = Mark(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if key in content:
            first = document.key_marks[child_path]
            document.key_marks[child_path] = mark
            problems.append(Problem(path=child_path, message=f"given twice, first on line {first.line}", at_key=True))
            continue
        document.key_marks[child_path] = mark
        content[key] = _construct(value_node, child_path, document, problems)
    return content


def _child(node: Any, part: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        return node[part]
    return None


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def on_a_line(value: Any) -> str:
    """A value as it is written in a study file, mappings and lists in braces and brackets."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n...\n").strip()
