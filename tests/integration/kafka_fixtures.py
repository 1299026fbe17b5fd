"""A real Kafka for the session: a plugin of the test modules that name it in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blocks.event_broker import EventBroker
from deployments.lab_kafka import INSTALL_HINT, KafkaBroker, fetch_jars, missing_requirement
from deployments.lab_processes import LabNotReady
from tests.services import require_service

MESSAGE_MAX_BYTES = 300_000
# Time of arrival, so that order can be told over topics; and a limit below the client's own one.
_SETTINGS = {
    "log.message.timestamp.type": "LogAppendTime",
    "message.max.bytes": str(MESSAGE_MAX_BYTES),
}


@pytest.fixture(scope="session")
def kafka_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """The session's broker; tests that stop it start it again."""
    missing = missing_requirement()
    if missing is None:
        try:
            fetch_jars()
        except LabNotReady as exc:
            missing = str(exc)
    require_service(missing is None, f"Kafka cannot run: {missing}", INSTALL_HINT)
    with KafkaBroker(tmp_path_factory.mktemp("kafka"), _SETTINGS) as broker:
        yield broker


@pytest.fixture
def kafka(kafka_of_session: KafkaBroker) -> KafkaBroker:
    """The session's broker, running, whatever the test before did to it."""
    kafka_of_session.start()
    return kafka_of_session


@pytest.fixture
def broker(kafka: KafkaBroker) -> EventBroker:
    """The block for it."""
    return EventBroker(bootstrap_servers=kafka.bootstrap_servers)
