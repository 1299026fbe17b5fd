"""Prefect in a lab: settings, a server with a ready-migrated SQLite database, the state of workers."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from deployments.lab_cache import cache_folder
from deployments.lab_http import Response
from deployments.lab_processes import LabNotReady

SERVER_PORT = 4200
WORKER_QUERY_SECONDS = 1
_DATABASE = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")


def settings(api_url: str, home: Path) -> dict[str, str]:
    """Environment of everything that talks to the lab's server; `home` is the node's PREFECT_HOME."""
    return {
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": str(WORKER_QUERY_SECONDS),
    }


def server_settings() -> dict[str, str]:
    """What only the server reads: what we recommend; nothing lives long enough to be vacuumed or expire."""
    lines = Path(__file__).with_name("prefect_server.env").read_text().splitlines()
    recommended = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return recommended | {
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    }


def server_command(python: str, host: str, port: int) -> list[str]:
    """The server in the foreground."""
    return [python, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]


def worker_command(python: str, pool: str, name: str) -> list[str]:
    """A process worker that makes its pool when there is none and installs nothing."""
    command = [python, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name]
    return [*command, "--type", "process", "--install-policy", "never"]


def online_since(answer: Response, worker: str, since: datetime) -> bool:
    """True when the pool's answer shows `worker` online with a heartbeat after `since`."""
    if answer.status != 200:
        return False
    return any(
        found["name"] == worker
        and found["status"] == "ONLINE"
        and datetime.fromisoformat(found["last_heartbeat_time"]) > since
        for found in answer.json()
    )


def place_database(python: str, home: Path, environment: Mapping[str, str]) -> None:
    """Put a migrated, empty database into `home`: migrations take about 6 s, a copy takes none."""
    home.mkdir(parents=True, exist_ok=True)
    cached = cache_folder() / f"prefect-{_prefect_version(python)}.db"
    if not cached.exists():
        _fill_cache(python, cached, environment)
    shutil.copyfile(cached, home / "prefect.db")


def _fill_cache(python: str, cached: Path, environment: Mapping[str, str]) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
        command = [python, "-m", "prefect", "server", "database", "upgrade", "-y"]
        # Not that of a lab whose server keeps its records elsewhere: that one migrates its own.
        ours = {name: value for name, value in environment.items() if not name.startswith(_DATABASE)}
        settled = {**ours, **settings("", Path(scratch))}
        done = subprocess.run(command, env=settled, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise LabNotReady("Prefect's database migrations failed", done.stderr)
        (Path(scratch) / "prefect.db").replace(cached)


def _prefect_version(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('prefect'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
