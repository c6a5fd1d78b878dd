"""Writes the two reference pages, `study-file.md` from the schema and `commands.md` from `--help`: `make docs`.

With `--check` it writes nothing, and ends in 1 when a page differs from what it would write.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import hpsearch
from hpsearch.cli.main import main

HERE = Path(__file__).parent
STUDY_FILE = """# The study file

<!-- written by docs/reference.py from the schema; edit the descriptions in hpsearch/spec -->

A plain value is fixed, a list is choices, a mapping is a range. Numbers follow YAML 1.2: `1e-4` is a number, `no` is a
word. `hpsearch check` reports all mistakes at once, each with line and column; `hpsearch schema` prints the JSON schema
for editors. Data files are looked for beside the study file.

```yaml
name: my-lm
task: causal_lm
data: {files: corpus.jsonl, column: text}         # or corpus: python_docs, or hub: Salesforce/wikitext
tokenizer: {vocab_size: 8000}                     # byte-pair, trained on the training split alone
model: {architecture: llama, hidden_size: 256, context_length: 256}
training: {weight_decay: 0.1, schedule: cosine}   # fixed for all trials
search:
  learning_rate: {min: 1e-4, max: 1e-2, scale: log, prior: 3e-3}
  batch_size: [16, 32, 64]
  num_layers: {min: 2, max: 8}                    # whole numbers at both ends: an integer range
  num_epochs: {min: 2, max: 16}
  dropout: {min: 0.0, max: 0.3, when: {num_layers: {min: 4}}}
  config.intermediate_size: [512, 1024]           # any key of the architecture's transformers configuration
enqueue: [{learning_rate: 3e-3, batch_size: 32}]  # settings to try first; the sampler fills in the rest
transfer_from: [last-week]                        # then the best three of earlier studies of this store
budget: {trials: 40, minutes: 120}
sampler: tpe
prune: {overfit: true, unpromising: promote}
resources: {gpus_per_trial: auto, parallel: auto}
store: ${HPSEARCH_STORE:-sqlite:///hpsearch.db}
seed: 0
```

## The search space

| form | meaning |
| --- | --- |
| `0.1`, `cosine`, `true` | fixed |
| `[16, 32, 64]` | choices |
| `{min: 1, max: 8}` | a range; of whole numbers when both ends are whole |
| `{min: 1e-4, max: 1e-2, scale: log}` | a range searched by its logarithm |
| `{min: 64, max: 256, step: 64}` | a range in steps |
| `{..., prior: 3e-3}` | where the best value is believed to lie; see below |
| `{..., when: {num_layers: {min: 4}}}` | searched only while other settings have these values |
| `config.KEY` | any key of the architecture's configuration in transformers |

The priors together are tried first, and two of three trials before the sampler knows anything (`startup_trials`) are
drawn around them; the third, and all of them where there is no prior, are spread evenly over the space (a Latin
hypercube).

W&B sweeps can be pasted: `parameters:`, `method:`, `values:` and the distributions `uniform`, `log_uniform_values`,
`int_uniform`, `q_uniform` and `q_log_uniform_values` are understood; other keys are refused with advice.

Everything under `model:` and `training:` can stand under `search:` as well.
"""
COMMANDS = """# Commands

<!-- written by docs/reference.py from --help; edit the docstrings in hpsearch/cli -->

Every command is a Python function with the same name and arguments (`import hpsearch`). Commands that read a store take
`--json`, and load neither torch nor Ray. Data goes to stdout, progress and errors to stderr.
"""


def study_file() -> str:
    schema = hpsearch.schema()
    definitions = schema["$defs"]
    lines = [STUDY_FILE, "## Keys", "", *_table(schema, definitions)]
    for name, field in schema["properties"].items():
        for reference in _references(field):
            section = definitions[reference]
            lines += ["", f"### `{name}:`", "", *_table(section, definitions)]
            for key, inner in section["properties"].items():
                for below in _references(inner):
                    if below not in ("AlignedFiles",):
                        lines += ["", f"### `{name}.{key}:`", "", *_table(definitions[below], definitions)]
    return "\n".join(lines) + "\n"


def _table(section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | |"
    yield "| --- | --- | --- | --- |"
    required = section.get("required", [])
    for key, field in section["properties"].items():
        default = "required" if key in required else _default(field)
        about = field.get("description", "").replace("\n", " ").replace("|", "\\|")
        yield f"| `{key}` | {_kind(field, definitions)} | {default} | {about} |"


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if value is None or isinstance(value, dict) or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field or "allOf" in field:
        return "mapping"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        kinds = [_kind(one, definitions) for one in field["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "mapping"}
    types = field.get("type", [])
    kind = " or ".join(words.get(one, one) for one in ([types] if isinstance(types, str) else types))
    if kind == "array":
        return f"list of {_kind(field.get('items', {}), definitions) or 'values'}"
    return kind + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    # The largest count that databases keep is no bound that anybody meets.
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field and abs(field[key]) < 1e6]
    return f" {', '.join(bounds)}" if bounds else ""


def _references(field: dict[str, Any]) -> Iterator[str]:
    for one in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in one:
            yield one["$ref"].rpartition("/")[2]


def commands() -> str:
    lines = [COMMANDS]
    for name in sorted(main.commands):
        command = main.commands[name]
        context = click.Context(command, info_name=f"hpsearch {name}", max_content_width=100, terminal_width=100)
        lines += [f"## {name}", "", "```text", command.get_help(context), "```", ""]
    context = click.Context(main, info_name="hpsearch", max_content_width=100, terminal_width=100)
    exits = main.get_help(context).partition("Exit codes:")[2]
    lines += ["## Exit codes", "", "| code | meaning |", "| --- | --- |"]
    for line in exits.strip().splitlines():
        code, meaning = re.fullmatch(r"\s*([\d, ]*\d)\s+(.*)", line).groups()  # type: ignore[union-attr]
        lines.append(f"| {code} | {meaning} |")
    return "\n".join(lines) + "\n"


PAGES = {"study-file.md": study_file, "commands.md": commands}


def differing() -> list[str]:
    """Pages that are not as this would write them."""
    return [name for name, page in PAGES.items() if not (HERE / name).exists() or (HERE / name).read_text() != page()]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(found)}: run `make docs`" if (found := differing()) else 0)
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
