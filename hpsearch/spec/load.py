"""From a study file, overrides and the environment to a StudySpec. A user's mistakes end here, all at once.

Imports nothing heavy, so that a wrong study is refused before torch, Ray or a database is touched.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pydantic import BaseModel, ValidationError

from hpsearch.errors import Problem, SpecError, UsageError
from hpsearch.files import storage
from hpsearch.registry import TASKS
from hpsearch.spec.checks import cross_checks, places_of_sources
from hpsearch.spec.files import expanded, format_of, is_saved_dataset
from hpsearch.spec.parsing.environment import environment_store, interpolate
from hpsearch.spec.parsing.space import parse_space, readable
from hpsearch.spec.parsing.wandb import from_wandb
from hpsearch.spec.parsing.yaml_file import KeyPath, StudyDocument, parse_scalar, read_study_file
from hpsearch.spec.redaction import hide_secrets, remember_secrets
from hpsearch.spec.sections import AlignedFiles, FileSplits, SourceSpec
from hpsearch.spec.settings import SEARCHABLE
from hpsearch.spec.study import StudySpec, study_class
from hpsearch.spec.task import TaskDefinition, task_named

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class LaunchOptions(TypedDict, total=False):
    """What the command line may give over a study file; None is the same as not given."""

    overrides: Sequence[str]
    """KEY=VALUE, such as search.num_layers.max=4."""
    name: str | None
    trials: int | None
    store: str | None
    backend: str | None
    address: str | None
    folder: str | None


def load_study(path: str | os.PathLike[str], **options: Unpack[LaunchOptions]) -> StudySpec:
    """Read and validate a study file, with the options on top.

    The store is `store`, then the environment's HPSEARCH_STORE (or what is in the file HPSEARCH_STORE_FILE), then the
    study file's, then sqlite:///hpsearch.db. Likewise `address`, RAY_ADDRESS and local; `folder` and HPSEARCH_FOLDER.
    Raises SpecError with every mistake at once.
    """
    if unknown := options.keys() - LaunchOptions.__annotations__.keys():
        raise TypeError(
            f"unknown options: {', '.join(sorted(unknown))}; known: {', '.join(LaunchOptions.__annotations__)}"
        )
    document = read_study_file(Path(path))
    for override in options.get("overrides") or ():
        dotted, equals, value = override.partition("=")
        if not equals or not dotted:
            raise SpecError([f"--set {override}: expected KEY=VALUE, such as search.num_layers.max=4"])
        document.override(dotted.strip(), parse_scalar(value), f"--set {override}", value.strip())
    for dotted, option, given in (
        ("name", "--name", options.get("name")),
        ("budget.trials", "--trials", options.get("trials")),
        ("backend", "--backend", options.get("backend")),
    ):
        if given is not None:
            document.override(dotted, given, f"{option} {given}")
    for key, option, given, variable, there in (
        ("store", "--store", options.get("store"), "HPSEARCH_STORE", environment_store()),
        ("address", "--address", options.get("address"), "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")),
        ("folder", "--folder", options.get("folder"), "HPSEARCH_FOLDER", os.environ.get("HPSEARCH_FOLDER")),
    ):
        if chosen := given or there:
            remember_secrets(chosen)
            document.override(key, chosen, option if given else variable)
    return validate_study(document, base=Path(path).parent)


def validate_study(document: StudyDocument, *, base: Path) -> StudySpec:
    """The study that a parsed file describes; data paths are relative to `base`."""
    problems: list[Problem] = []
    content = from_wandb(dict(document.content), problems, document)
    _, space_problems = parse_space(content.pop("search", {}))
    problems += space_problems
    interpolate(content, problems)
    raw_search = document.content.get("search") if isinstance(document.content.get("search"), dict) else {}
    tasks = _tasks(content.get("task"), document)
    for name in tasks:
        _take_as_written(task_named(name), content, document)
    study = study_class(*tasks)
    try:
        spec = study.model_validate({**content, "search": raw_search})
    except ValidationError as error:
        # Of a value that fits no branch of a union, one complaint is enough.
        told = (_problem(one, study, content) for one in reversed(error.errors()))
        found = {problem.path: problem for problem in told}
        raise document.error(problems + list(found.values())) from None
    spec = _with_absolute_paths(spec, base, problems)
    spec = _with_pretrained_folder(spec, base, problems)
    spec = _with_texts_of_files(spec, base, problems)
    problems += cross_checks(spec, content)
    if (wrong := storage.problem(spec.folder)) is not None:
        problems.append(Problem(path=("folder",), message=f"{hide_secrets(spec.folder)}: {wrong}"))
    if problems:
        raise document.error(problems)
    return spec


def _tasks(name: Any, document: StudyDocument) -> tuple[str, ...]:
    """The task of the study; all that are built in when it names none that is known."""
    if isinstance(name, str) and TASKS.problem(name) is None:
        try:
            study_class(name)
        except UsageError as error:  # nothing more can be said of a file whose task is not here
            raise document.error([Problem(path=("task",), message=str(error))]) from None
        return (name,)
    return tuple(TASKS.built_in)


def _take_as_written(task: TaskDefinition, content: dict[str, Any], document: StudyDocument) -> None:
    """Have options that are text as they are written, whatever YAML takes them for."""
    options = content.get(task.name)
    if not isinstance(options, dict):
        return
    content[task.name] = options = dict(options)
    for name in task.as_written:
        if isinstance(options.get(name), bool | int | float):
            options[name] = document.texts.get((task.name, name), options[name])


def _problem(error: Any, study: type[StudySpec], content: dict[str, Any]) -> Problem:
    # pydantic names the branch of a union, too; no key of the file is called so.
    path = tuple(part for part in error["loc"] if part not in ("list[str]", "AlignedFiles"))
    if error["type"] == "extra_forbidden" and len(path) == 1 and path[0] in TASKS.names:
        own = content.get("task")
        message = f"{own} has no options" if path[0] == own else f"settings of another task; this study's is {own}"
        return Problem(path=path, message=message, at_key=True)
    if error["type"] == "extra_forbidden":
        return Problem(path=path, message=f"unknown key '{path[-1]}'{_known_keys(path, study)}", at_key=True)
    if error["type"] == "missing":
        return Problem(path=path[:-1], message=f"missing key '{path[-1]}'")
    return Problem(path=path, message=readable(error))


def _known_keys(path: tuple[Any, ...], study: type[StudySpec]) -> str:
    model: type[BaseModel] | None = study
    for part in path[:-1]:
        model = _submodel(model, str(part)) if model else None
    if model is None:
        return ""
    names = list(model.model_fields)
    if len(path) == 1 and path[-1] in SEARCHABLE:
        return "; it belongs under 'search', 'model' or 'training'"
    places = {name: name for name in names}
    if len(path) == 1:
        for section in names:
            inner = _submodel(study, section)
            for name in inner.model_fields if inner else ():
                places.setdefault(name, f"{section}.{name}")
    near = [places[name] for name in difflib.get_close_matches(str(path[-1]), places, n=1, cutoff=0.6)]
    return f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(names)}"


def _submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((entry for entry in candidates if isinstance(entry, type) and issubclass(entry, BaseModel)), None)


def _with_absolute_paths(spec: StudySpec, base: Path, problems: list[Problem]) -> StudySpec:
    placed = [_placed(spec, source, base, place, problems) for place, source in places_of_sources(spec)]
    if spec.data.mix:
        return spec.model_copy(update={"data": spec.data.model_copy(update={"mix": placed})})
    return spec.model_copy(update={"data": placed[0]})


def _placed(spec: StudySpec, source: SourceSpec, base: Path, place: KeyPath, problems: list[Problem]) -> SourceSpec:
    """A source with the absolute names of its files."""
    if source.files is None:
        return source
    splits: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        files = getattr(source.files, split)
        path = (*place, "files", split)
        if isinstance(files, AlignedFiles):
            sides = files.model_dump()
            for name in (name for side in sides.values() for name in side):
                if (base / name).is_dir() or (has_magic(name) and not (base / name).exists()):
                    message = f"expected the name of a file, got {name}: aligned files are named one by one"
                    problems.append(Problem(path=path, message=message))
            splits[split] = AlignedFiles(
                **{side: [_absolute(base, name, path, problems) for name in sides[side]] for side in sides}
            )
            if not spec.definition.is_pair or spec.definition.has_labels:
                message = f"source and target files are for pairs of texts; this study's task is {spec.task}"
                problems.append(Problem(path=path, message=message))
            continue
        splits[split] = [_absolute(base, name, path, problems) for name in files]
        for file in (file for name in splits[split] for file in expanded(name)):
            _check_format(Path(file), spec.definition, path, problems)
    return source.model_copy(update={"files": FileSplits(**splits)})


def _absolute(base: Path, name: str, path: KeyPath, problems: list[Problem]) -> str:
    # A file may be a link to one that is called otherwise.
    place = Path(os.path.abspath(base / name))
    if has_magic(name) and not place.exists():
        place = Path(os.path.join(glob.escape(os.path.abspath(base)), name))
    found = expanded(str(place))
    if not found or not all(Path(file).exists() for file in found):
        missing = f"no such file: {place}"
        if place.is_dir():
            missing = f"no file of text is below the folder {place}"
        elif has_magic(name):
            missing = f"no file fits {place}"
        problems.append(Problem(path=path, message=missing))
    return str(place)


def _check_format(file: Path, task: TaskDefinition, path: KeyPath, problems: list[Problem]) -> None:
    is_plain = len(task.fields) == 1 and not task.has_labels
    expected = f"{'.txt, ' if is_plain else ''}.jsonl, .json, .csv, .tsv or .parquet"
    kind = format_of(file)
    if (kind and (kind != "text" or is_plain)) or is_saved_dataset(file):
        return
    message = f"cannot tell the format of {file.name}; expected {expected}"
    if kind == "text" or task.is_pair:
        lines = ", or two text files as {source: FILE, target: FILE}" if task.is_pair else ""
        message = f"{file.name} has texts and nothing beside them; expected {expected}{lines}"
    problems.append(Problem(path=path, message=message))


def _with_texts_of_files(spec: StudySpec, base: Path, problems: list[Problem]) -> StudySpec:
    """The study with the text of the files that its task's options name, in place of their names."""
    task, options = spec.definition, spec.options
    texts = {}
    for name in task.file_options:
        value = getattr(options, name)
        if value is None or "{" in value or "\n" in value:
            continue
        try:
            texts[name] = (base / Path(value).expanduser()).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            message = f"{value} cannot be read: {getattr(error, 'strerror', None) or error}"
            problems.append(Problem(path=(task.name, name), message=message))
    return spec.model_copy(update={task.name: options.model_copy(update=texts)}) if texts else spec


def _with_pretrained_folder(spec: StudySpec, base: Path, problems: list[Problem]) -> StudySpec:
    name = spec.model.pretrained
    if name is None:
        return spec
    folder = base / Path(name).expanduser()
    if folder.is_dir():
        model = spec.model.model_copy(update={"pretrained": str(folder.resolve())})
        return spec.model_copy(update={"model": model})
    if not _HUB_ID.fullmatch(name):
        message = f"no folder {folder}, and no id of a model on the hub"
        problems.append(Problem(path=("model", "pretrained"), message=message))
    return spec
