"""Rolling deployments on a real engine behind a real HAProxy: the public port always answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.integration.host_rig import Rig, host_rig
from tests.readme import PROJECT
from tests.services import require_service


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One host for all tests here; each scenario has container names and ports of its own."""
    found = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    require_service(found is not None, "no HAProxy here", "apt-get install haproxy")
    with host_rig() as rig:
        yield rig


def play(rig: Rig, scenario: str) -> None:
    """A scenario of `tests.integration.rolling_host`, in the host's network."""
    words = (scenario, str(rig.host.settings.state_dir), str(rig.node.docker_socket))
    done = rig.node.run(
        *(rig.node.site.python, "-m", "tests.integration.rolling_host", *words),
        check=False,
        cwd=PROJECT,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_updates_and_their_rollback_lose_no_request(rig: Rig) -> None:
    """From `recreate` with one short switch, then on and back under load without any."""
    play(rig, "updates")


def test_a_version_that_is_not_well_never_gets_a_request(rig: Rig) -> None:
    """The old one serves all the while, and is not touched."""
    play(rig, "broken")


def test_a_failed_recreate_gives_the_proxy_its_ports_back(rig: Rig) -> None:
    """The old container is behind HAProxy again."""
    play(rig, "undone_recreate")


def test_a_rolling_process_killed_anywhere_costs_nothing(rig: Rig) -> None:
    """One look of the guardian later the old version serves, alone."""
    play(rig, "killed")
