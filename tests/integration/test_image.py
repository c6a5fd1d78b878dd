"""The Dockerfile, built and run by buildah on a base image made here: registries of images are not always within reach.

What this does not show is the real base image, and a CUDA build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
EXTRAS = "cluster,dashboard,demo-data,gcs,lora,s3"

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
needed = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]


class Buildah:
    """buildah with images of its own, removed at the end."""

    def __init__(self, folder: Path) -> None:
        self._storage = [
            "--root",
            str(folder / "root"),
            "--runroot",
            str(folder / "run"),
            "--storage-driver",
            "overlay",
        ]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            ["buildah", *self._storage, *arguments], capture_output=True, text=True, timeout=1200, check=False
        )
        assert done.returncode == 0, f"buildah {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if needed or os.geteuid() != 0:
        pytest.skip(f"needs root, buildah and debootstrap; missing: {', '.join(needed) or 'root'}")
    folder = tmp_path_factory.mktemp("image")
    build = Buildah(folder)
    try:
        _make_base(build, folder / "base")
        wheels = folder / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), "-c", "constraints.txt"]
        subprocess.run([*pip, "setuptools>=77", f".[{EXTRAS}]"], cwd=ROOT, check=True)
        context = folder / "context"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, tracked.stdout.split("\0")):
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name)
        build(
            "bud", "--pull-never", "--isolation", "chroot", "--volume", f"{wheels}:/wheels:ro",
            "-f", str(context / "docker" / "Dockerfile"), "-t", "hpsearch:test", str(context),
        )  # fmt: skip
        build("from", "--pull-never", "--name", "hpsearch", "localhost/hpsearch:test")
        yield build
        build("rm", "--all")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_base(build: Buildah, folder: Path) -> None:
    """Debian's own Python under the name of the image that the Dockerfile begins with."""
    sites = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(folder), sites[0]], **quiet)
    for command in ("update", "install -y --no-install-recommends ca-certificates python3.11 python3.11-venv"):
        subprocess.run(["chroot", str(folder), "apt-get", "-q", *command.split()], **quiet)
    (folder / "usr" / "local" / "bin" / "python").symlink_to("/usr/bin/python3.11")
    build("from", "--name", "base", "scratch")
    build("copy", "-q", "base", str(folder), "/")
    # Where the steps of the Dockerfile find packages.
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    build("config", "--env", path, "--env", "PIP_NO_INDEX=1", "--env", "PIP_FIND_LINKS=/wheels", "base")
    build("commit", "-q", "--rm", "base", BASE)
    shutil.rmtree(folder)


def inside(build: Buildah, command: str) -> str:
    return build("run", "--isolation", "chroot", "hpsearch", "--", "sh", "-c", command)


def test_the_image_runs_as_an_ordinary_user_who_owns_the_run_folder(buildah: Buildah) -> None:
    assert inside(buildah, "id -u; pwd").split() == ["1000", "/home/hpsearch"]
    assert inside(buildah, "touch $HPSEARCH_FOLDER/x && echo written") == "written"
    assert inside(buildah, "touch /opt/hpsearch/x 2>/dev/null || echo refused") == "refused"


def test_the_image_says_its_version_and_knows_its_extras(buildah: Buildah) -> None:
    assert inside(buildah, "hpsearch --version").startswith("hpsearch")
    assert (
        inside(buildah, "python -c 'import s3fs, gcsfs, peft, optuna_dashboard, ray.dashboard.modules.job; print(1)'")
        == "1"
    )


def test_a_study_of_the_image_is_launched_in_it(buildah: Buildah) -> None:
    small = "--trials 1 --set data.fraction=0.05 --set search.num_epochs=1 --set resources.gpus_per_trial=0"
    said = inside(
        buildah,
        f"cd && hpsearch launch studies/lm.yaml {small} --quiet --store sqlite:////tmp/s.db && hpsearch rank python-docs-lm --json --store sqlite:////tmp/s.db",
    )
    assert '"trials"' in said
