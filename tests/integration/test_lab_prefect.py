"""The ready-migrated database of a lab's Prefect server."""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from deployments import lab_prefect


def test_a_machine_s_first_lab_gets_its_database_also_when_its_records_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cached yet; the server's own database is not touched, nor asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    elsewhere = "postgresql+asyncpg://nobody@127.0.0.1:9/nowhere"
    environment = {**os.environ, "PREFECT_SERVER_DATABASE_CONNECTION_URL": elsewhere}
    lab_prefect.place_database(sys.executable, tmp_path / "home", environment)
    with closing(sqlite3.connect(tmp_path / "home" / "prefect.db")) as database:
        assert database.execute("SELECT count(*) FROM flow_run").fetchone() == (0,)
