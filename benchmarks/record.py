"""What a benchmark measured, kept under benchmarks/results/ with what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hpsearch.training.devices import describe_cpu

RESULTS = Path(__file__).parent / "results"


def versions(*packages: str) -> dict[str, str]:
    """Of packages; of one that is not there that it is not."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit that is measured, marked when files differ from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    return said.stdout.strip() or "unknown"


def keep(name: str, *packages: str, **content: Any) -> None:
    """Write a benchmark's numbers as JSON."""
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "benchmark": name,
        "commit": commit(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), **describe_cpu()},
        "versions": {"python": platform.python_version(), **versions("hpsearch", *packages)},
        **content,
    }
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"kept in {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")
