"""Judges what was found on the control side. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.diagnosis import judge_disks
from tasks.diagnosis_prefect import judge_place
from tasks.findings import BrokerFound, BuildEngine, ControlFindings, Prefect, RecordsFound
from tasks.verdicts import Check, Diagnosis, failed, passed, warned

SUBJECT = "control"
REGISTER = "python -m deployments.register --control"


def judge_control(found: ControlFindings) -> Diagnosis:
    """All checks of the control side."""
    return Diagnosis(SUBJECT, tuple(_checks(found)))


def _checks(found: ControlFindings) -> Iterator[Check]:
    yield _prefect(found.prefect)
    if found.place is not None:
        yield from judge_place(found.place, REGISTER)
    yield _engine(found.build_engine)
    yield from judge_disks([found.home], "docker system prune --all --filter until=168h")
    yield _records(found.records)
    if found.broker is not None:
        yield _broker(found.broker)


def _prefect(found: Prefect) -> Check:
    if found.problem or found.version is None:
        mend = "prefect server start, and PREFECT_API_URL=http://SERVER:4200/api where this runs"
        return failed("Prefect server", found.problem or "no answer", mend)
    told = f"version {found.version}"
    if found.version == found.client_version:
        return passed("Prefect server", told)
    mend = f"install one version on both sides: pip install prefect=={found.version}"
    return warned("Prefect server", f"{told}; here it is {found.client_version}", mend)


def _engine(found: BuildEngine) -> Check:
    if found.problem or found.version is None:
        mend = "sudo systemctl start docker, or set DOCKER_HOST or the block docker-host/build"
        return failed("build engine", f"{found.address}: {found.problem or 'no answer'}", mend)
    return passed("build engine", f"Docker Engine {found.version}, {found.architecture}, at {found.address}")


def _records(found: RecordsFound) -> Check:
    if found.problem:
        mend = "start the database, and check DATABASE_URL or the block records-database/default"
        return failed("records", f"{found.url}: {found.problem}", mend)
    if found.revision is None:
        return passed("records", f"{found.url}: empty; the first deployment makes its tables")
    if found.revision == found.expected_revision:
        return passed("records", f"{found.url}: at revision {found.revision}")
    told = f"{found.url}: at revision {found.revision}, this program's is {found.expected_revision}"
    return warned("records", told, f"the next deployment migrates it, or: {_MIGRATE}")


_MIGRATE = "prefect deployment run reconcile/default --watch"


def _broker(found: BrokerFound) -> Check:
    if found.problem:
        mend = f"start the broker, or correct it: python -m deployments.register --broker {found.servers}"
        return warned("event broker", f"{found.servers}: {found.problem}; events wait in the outbox", mend)
    return passed("event broker", f"{found.servers}: {found.brokers} broker(s)")
