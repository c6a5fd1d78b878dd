"""What of a study comes from environment variables: its store, and `${NAME}` in the two places that may hold it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hpsearch.errors import Problem, SpecError
from hpsearch.spec.parsing.yaml_file import KeyPath
from hpsearch.spec.redaction import remember_secrets

_OURS = "HPSEARCH_"
_EXPANDED = ("HOME", "USER", "TMPDIR", "PGHOST", "PGPORT", "PGUSER", "PGDATABASE")
"""Other variables that a study file may name: it may come from elsewhere, and secrets are not for it to send away."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def environment_store() -> str | None:
    """The store that the environment names: HPSEARCH_STORE, or the content of the file HPSEARCH_STORE_FILE (a secret).

    The file of a submitted job is `masked` with HPSEARCH_STORE_KEY. Raises SpecError when there is no such file.
    """
    if store := os.environ.get("HPSEARCH_STORE"):
        remember_secrets(store)
        return store
    file = os.environ.get("HPSEARCH_STORE_FILE")
    if not file:
        return None
    try:
        content = Path(file).read_bytes()
        if key := os.environ.get("HPSEARCH_STORE_KEY"):
            content = masked(content, bytes.fromhex(key))
        store = content.decode().strip()
        remember_secrets(store)
        return store or None
    except OSError as error:
        raise SpecError([f"HPSEARCH_STORE_FILE: cannot read {file}: {error.strerror}"]) from None
    except ValueError:
        raise SpecError(
            [f"HPSEARCH_STORE_FILE: {file} holds no text, or HPSEARCH_STORE_KEY is another file's"]
        ) from None


def masked(content: bytes, key: bytes) -> bytes:
    """Content under a key of its length (a one-time pad), or what was under it. Raises ValueError."""
    return bytes(byte ^ mask for byte, mask in zip(content, key, strict=True))


def interpolate(content: dict[str, Any], problems: list[Problem]) -> None:
    """Environment variables, in the two places that are documented to have them: `store` and `data.files`."""

    def filled(text: str, path: KeyPath) -> str:
        def value(match: re.Match[str]) -> str:
            if not match[1].startswith(_OURS) and match[1] not in _EXPANDED:
                expected = f"names that begin with {_OURS}, or {', '.join(_EXPANDED)}"
                problems.append(
                    Problem(path=path, message=f"${{{match[1]}}} is not read in a study file; expected {expected}")
                )
                return ""
            found = os.environ.get(match[1], match[2])
            if found is None:
                problems.append(
                    Problem(
                        path=path,
                        message=f"the environment has no {match[1]}; set it, or write ${{{match[1]}:-default}}",
                    )
                )
                return ""
            return found

        return _VARIABLE.sub(value, text)

    def walk(value: Any, path: KeyPath) -> Any:
        if isinstance(value, str):
            return filled(value, path)
        if isinstance(value, list):
            return [walk(child, (*path, index)) for index, child in enumerate(value)]
        if isinstance(value, dict):
            return {key: walk(child, (*path, key)) for key, child in value.items()}
        return value

    if isinstance(content.get("store"), str):
        content["store"] = filled(content["store"], ("store",))
        remember_secrets(content["store"])
    data = content.get("data")
    if isinstance(data, list):  # the short form of a mix
        data = {"mix": data}
    if isinstance(data, dict):
        named = {key: walk(data[key], ("data", key)) for key in ("files", "mix") if key in data}
        content["data"] = {**data, **named}
