"""What a test does when a real service is missing: skip with the reason, or fail where all must run."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from deployments.lab_engine import EngineChoice, newer_engine


def require_service(found: bool, reason: str, install: str) -> None:
    """Go on when `found`; else skip with reason and install command, or fail with REQUIRE_SERVICES=1."""
    if found:
        return
    message = f"{reason}; install: {install}"
    if os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def containerd_store() -> EngineChoice:
    """The newer Docker Engine with the containerd image store.

    Skips also where services are required: not every mirror has the release of Debian that it is from.
    """
    root = newer_engine()
    if not (root / "usr/sbin/dockerd").exists():
        pytest.skip(f"no newer Docker Engine in {root}: deployments/lab_newer_engine.sh")
    return EngineChoice(root, containerd_store=True)


def postgresql_programs() -> Path | None:
    """The folder with `initdb` and `postgres`, the newest version first; None when not installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    on_path = [Path(found).parent] if (found := shutil.which("initdb")) else []
    return next((folder for folder in [*reversed(debian), *on_path] if (folder / "initdb").exists()), None)


def free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
