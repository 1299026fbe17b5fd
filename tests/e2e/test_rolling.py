"""The specification's rolling update as a person runs it: a client that never stops asking sees nothing."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from deployments import lab_http
from tests.e2e.deploying import Service, outcome, start_run
from tests.load import load
from tests.services import require_service


def roll(service: Service, tag: str, **build_args: str) -> Any:
    """`rolling-update/default` to its end."""
    parameters = service.parameters(tag, **build_args)
    return outcome(service.lab, start_run(service.lab, "rolling-update/default", parameters))


def test_rolling_updates_and_rollbacks_are_noticed_by_no_client(service: Service) -> None:
    """After the first one, which has a short gap: a new version, a broken one, and back by hand."""
    found = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    require_service(found is not None, "no HAProxy here", "apt-get install haproxy")
    assert service.deploy("v1").state == "COMPLETED"
    first = roll(service, "v2")
    assert first.state == "COMPLETED", first.message
    assert service.lab.control.namespace is not None
    enter = partial(lab_http.enter, service.lab.control.namespace)
    with load(service.host.address, service.port, "/", enter) as seen:
        updated = roll(service, "v3")
        assert updated.state == "COMPLETED", updated.message
        broken = roll(service, "v4", HEALTH="broken")
        assert broken.state == "FAILED"
        assert "HEALTH_CHECK_FAILED" in broken.message
        back = {"container_name": service.name, "remote_host": service.host.name}
        undone = outcome(service.lab, start_run(service.lab, "rollback-container/default", back))
        assert undone.state == "COMPLETED", undone.message
    assert seen.failures == []
    assert {text.rpartition(" ")[2] for text in seen.answers} == {"v2", "v3"}
    assert service.answer() == "Hello from Gantry, version v2"
    assert [container.name for container in service.running()] == [service.name]
