"""Who may remove the files of a study: the driver that holds its lease, in the store that the study lives in.

A run folder names its owner. A copy of a store, or a driver that another one has replaced, finds another owner there
and removes nothing; whatever a row of the store says, nothing is removed but the folders of trials in the study's own
run folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from hpsearch.errors import LeaseLostError, RunFolderError
from hpsearch.files import storage
from hpsearch.files.layout import LaunchedStudy, run_name, trial_of
from hpsearch.files.storage import Folder

OWNER_FILE = "owner.json"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A driver that holds the lease of a study, as run folders know it."""

    study: str
    """The study's uid."""
    run: str
    """Name of the study's run folder."""
    store: list[str]
    """See `Store.identities`."""
    place: str
    """The store's URL without a password, for a person."""
    token: int
    """The fencing token of the lease."""

    def claim(self, run: Folder) -> None:
        """Become the owner of a run folder, made if it is not there.

        Raises RunFolderError when it belongs to a study in another store, LeaseLostError when a later driver owns it.
        """
        there = _read(run)
        if there is not None and not self._is_ours(there):
            raise RunFolderError(
                f"{run} belongs to the study in the store {there.get('place')}, and this one is in {self.place}: a "
                "copy may not change the original's files. Give the copy a folder of its own with --folder; or, if "
                f"the original is no more, remove {run / OWNER_FILE}"
            )
        if there is not None and there["token"] > self.token:
            raise LeaseLostError(f"another driver has taken the study over: {run} is its own now")
        if there is None or there["token"] != self.token:
            storage.make(run)
            storage.write(run / OWNER_FILE, json.dumps(asdict(self)).encode())

    def remove(self, folder: Folder) -> None:
        """Remove the folder of an attempt at a trial; one that is not this study's, or another driver's now, stays."""
        if folder.parent.name != self.run or trial_of(folder) is None:
            return
        there = _read(folder.parent)
        if there is None or (self._is_ours(there) and there["token"] <= self.token):
            storage.remove(folder)

    def _is_ours(self, there: dict[str, Any]) -> bool:
        return bool(there["study"] == self.study and set(there["store"]) & set(self.store))


def is_own(folder: Folder, study: LaunchedStudy) -> bool:
    """Whether the folder of an attempt at a trial belongs to this study, as far as its run folder says."""
    there = _read(folder.parent)
    return folder.parent.name == run_name(study) and (there is None or there.get("study") == study.uid)


def _read(run: Folder) -> dict[str, Any] | None:
    content = storage.read(run / OWNER_FILE)
    if content is None:
        return None
    found: dict[str, Any] = json.loads(content)
    return found
