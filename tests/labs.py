"""Labs whose Prefect server keeps its database in PostgreSQL, as a server of many deployments does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from deployments.lab import Lab
from tests.postgresql import Cluster

_PORT = 5433


@contextmanager
def lab_on_postgresql(
    hosts: Sequence[str],
    *,
    environment: Mapping[str, str],
    of_hosts: Mapping[str, str] = MappingProxyType({}),
    durable: bool = True,
    **options: Any,
) -> Iterator[Lab]:
    """A lab with its control side and workers up; `of_hosts` is set on hosts alone, `options` are `Lab`'s."""
    cluster = Cluster.make(_PORT, durable=durable)
    url = f"{cluster.url.replace('postgresql', 'postgresql+asyncpg', 1)}/postgres"
    whole = {**environment, "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
    try:
        with Lab(hosts, prefect=False, environment=whole, **options) as lab:
            database = lab.control.spawn("prefect-database", *cluster.command, cwd=cluster.folder)
            cluster.wait(lambda: database.alive, database.log)
            lab.start_server()
            lab.start_control_worker()
            for host in lab.hosts.values():
                host.environment |= of_hosts
                host.start_worker()
            yield lab
            lab.control.services["server"].stop()
            database.stop()
    finally:
        cluster.remove()
