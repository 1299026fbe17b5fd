"""What runs of one worker share, with the installed Prefect; in processes of their own, as modules change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import certifi

PROJECT = Path(__file__).parents[2]
_BEFORE = """
import sys, threading
from pathlib import Path
from tasks.warm_prepare import prepare
authorities = Path(sys.argv[1])
prepare(["flows.receive"])
assert threading.active_count() == 1, threading.enumerate()
from prefect.client import orchestration
from prefect.client.orchestration import get_client

def context(sync=False):
    return get_client(sync_client=sync)._client._transport._pool._ssl_context
"""
_SHARED = """
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.filters import FlowRunFilter
first = context()
assert first is context() is context(sync=True)
assert len(first.get_ca_certs()) > 1
assert FlowRun.__pydantic_complete__ and FlowRunFilter.__pydantic_complete__
modules = set(sys.modules)
import prefect.utilities.visualization, prefect._internal.observers, rich._emoji_codes
assert set(sys.modules) == modules, "no longer what Prefect imports"
one = authorities.read_text().partition("-----END CERTIFICATE-----")
authorities.write_text(one[0] + one[1])
assert len(context().get_ca_certs()) == 1
"""
_UNVERIFIED = """
import ssl
assert context() is not context() and context().verify_mode is ssl.CERT_NONE
assert orchestration.ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED
"""


def run(script: str, tmp_path: Path, **settings: str) -> None:
    """Run it with authorities of its own; fails with what it wrote."""
    authorities = tmp_path / "authorities.pem"
    authorities.write_text(Path(certifi.where()).read_text())
    environment = {
        "PATH": os.environ["PATH"],
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_API_SSL_CERT_FILE": str(authorities),
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-c", _BEFORE + script, str(authorities)],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_clients_share_a_context_until_its_authorities_change(tmp_path: Path) -> None:
    """Models, modules and the context are there before the first run; a renewed file is read again."""
    run(_SHARED, tmp_path)


def test_a_context_that_a_client_changes_is_its_own(tmp_path: Path) -> None:
    """Who asked not to verify the server weakens nobody else."""
    run(_UNVERIFIED, tmp_path, PREFECT_API_TLS_INSECURE_SKIP_VERIFY="true")
