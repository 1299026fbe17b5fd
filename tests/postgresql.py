"""A throwaway PostgreSQL cluster: made, started by whoever knows where, asked, and taken away."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.services import postgresql_programs, require_service

_START_SECONDS = 30
_INITDB = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
_SETTINGS = ("shared_buffers=32MB",)
# Where no durability is tested, nothing waits for the disk.
_HASTE = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


@dataclass(frozen=True)
class Cluster:
    """Data and socket in `folder`; listens on 127.0.0.1 of whichever network it is started in."""

    programs: Path
    folder: Path
    port: int
    durable: bool = False

    @classmethod
    def make(cls, port: int, *, durable: bool = False) -> Cluster:
        """Initialise a cluster; fails or skips the test where PostgreSQL is not installed.

        `durable` waits for the disk as a real one does.
        """
        programs = postgresql_programs()
        install = "apt-get install -y postgresql-15"
        require_service(programs is not None, "PostgreSQL is not installed", install)
        assert programs is not None
        # Not under tmp_path: its parents are closed to the user that PostgreSQL runs as.
        cluster = cls(programs, Path(tempfile.mkdtemp(prefix="pg-")), port, durable)
        if account := _account():
            os.chown(cluster.folder, account.pw_uid, account.pw_gid)
        initdb = [*_as_account(), str(programs / "initdb"), "-D", str(cluster.folder / "data"), *_INITDB]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=cluster.folder)
        return cluster

    @property
    def command(self) -> list[str]:
        """The server in the foreground; SIGINT ends it with its connections, SIGQUIT at once."""
        chosen = _SETTINGS if self.durable else (*_SETTINGS, *_HASTE)
        settings = [word for setting in chosen for word in ("-c", setting)]
        where = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-h", "127.0.0.1"]
        return [*_as_account(), str(self.programs / "postgres"), *where, "-p", str(self.port), *settings]

    @property
    def url(self) -> str:
        """URL without a database name, for those in the same network."""
        return f"postgresql://postgres@127.0.0.1:{self.port}"

    def wait(self, is_alive: Callable[[], bool], log: Path) -> None:
        """Return when the server answers; raises `AssertionError` with its log when it does not."""
        deadline = time.monotonic() + _START_SECONDS
        where = ["-h", str(self.folder), "-p", str(self.port), "-t", "1"]
        while subprocess.run([self.programs / "pg_isready", "-q", *where], check=False).returncode != 0:
            if not is_alive() or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start:\n{log.read_text()}")
            time.sleep(0.02)

    def remove(self) -> None:
        """Take its files away."""
        shutil.rmtree(self.folder)


def _account() -> pwd.struct_passwd | None:
    """Another user when we are root, whom PostgreSQL refuses."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")


def _as_account() -> list[str]:
    account = _account()
    if account is None:
        return []
    return ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
