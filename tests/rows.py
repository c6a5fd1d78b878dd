"""Records of a store with only what a test looks at."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def row(kind: type[Kind], **known: Any) -> Kind:
    """A record of this kind; what is not given is None."""
    return kind(**{**dict.fromkeys(field.name for field in fields(kind)), **known})
