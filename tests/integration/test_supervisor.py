"""The supervisor with real processes: start, death, stop, each twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.supervisor import Site, status, stop, supervisor_pid

PROJECT = Path(__file__).resolve().parents[2]
SLEEPS = [sys.executable, "-c", "import os, time; print(os.environ['WHO'], flush=True); time.sleep(600)"]


def wait_for(fact: Callable[[], Any], seconds: float = 20) -> Any:
    """What `fact` gives, as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := fact()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def command(site: Site, name: str) -> subprocess.CompletedProcess[str]:
    """One command in a session of its own, which is over when it returns."""
    return subprocess.run(
        [sys.executable, "-m", "deployments.supervisor", name, str(site.folder)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        timeout=60,
    )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Two services, one of which is not there."""
    told = {
        "services": {"sleeper": SLEEPS, "absent": ["/none/program"]},
        "directory": str(tmp_path),
        "environment": [str(tmp_path / "own.env"), str(tmp_path / "local.env")],
    }
    (tmp_path / "services.json").write_text(json.dumps(told))
    (tmp_path / "own.env").write_text("# comment\nWHO='it is me'\n")
    site = Site(tmp_path)
    yield site
    stop(site)


def test_services_are_started_once_and_again_when_they_die(site: Site) -> None:
    """A second start changes nothing, a kill brings a new process; what cannot start harms no other."""
    first = command(site, "start")
    assert first.returncode == 3, "one of them does not run"
    pid = json.loads(first.stdout)["sleeper"]["pid"]
    assert json.loads(command(site, "start").stdout)["sleeper"]["pid"] == pid
    wait_for(lambda: site.log("sleeper").read_text() == "it is me\n")
    assert "/none/program does not start" in site.log("absent").read_text()

    os.kill(pid, signal.SIGKILL)

    again = wait_for(lambda: (found := status(site)["sleeper"])["pid"] not in {pid, None} and found)
    assert again["starts"] == 2


def test_stopping_ends_every_process_and_may_be_repeated(site: Site) -> None:
    """A restart is another supervisor; a status after the end says that nothing runs."""
    command(site, "start")
    before, pid = supervisor_pid(site), status(site)["sleeper"]["pid"]
    command(site, "restart")
    assert supervisor_pid(site) not in {before, None}
    assert not Path(f"/proc/{pid}").exists()

    assert [command(site, "stop").returncode for _ in range(2)] == [0, 0]

    assert (supervisor_pid(site), status(site)) == (None, {})
    assert command(site, "status").returncode == 3


def test_services_end_with_a_supervisor_that_is_killed(site: Site) -> None:
    """So that its successor finds the ports free."""
    command(site, "start")
    pid, killed = status(site)["sleeper"]["pid"], supervisor_pid(site)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}/exe").exists())
    assert json.loads(command(site, "start").stdout)["sleeper"]["pid"] != pid
