"""Fixtures of the end-to-end tests: one lab for the session, with everything that a real set-up has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments.lab import Lab, missing_requirement
from tests.e2e.deploying import Service, furnish
from tests.services import require_service


@pytest.fixture(scope="session")
def lab_possible() -> None:
    """Skip, with the reason and the command that installs what is missing, where no lab can run."""
    missing = missing_requirement()
    require_service(
        missing is None, f"a lab needs root and Docker: {missing}", "deployments/install_services.sh"
    )


@pytest.fixture(scope="session")
def lab(lab_possible: None) -> Iterator[Lab]:
    """A control side and the host `host-a`: engines, receiver, Prefect server and workers."""
    with Lab(hosts=("host-a",)) as lab:
        yield lab


@pytest.fixture(scope="session")
def furnished(lab: Lab) -> Lab:
    """The lab with everything registered."""
    furnish(lab)
    return lab


@pytest.fixture
def service(furnished: Lab, request: pytest.FixtureRequest) -> Iterator[Service]:
    """A container name of the test's own on host-a; its containers are removed afterwards."""
    number = abs(hash(request.node.name)) % 100_000
    service = Service(furnished, furnished.hosts["host-a"], f"web-{number}")
    yield service
    for container in service.containers():
        container.remove(force=True)
