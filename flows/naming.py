"""Names of runs on a host: who starts them from the control side says what and where."""

from __future__ import annotations

from prefect.runtime import flow_run


def name_as_started(verb: str) -> str:
    """The name that the control side gave this run; started by hand, it is named by its deployment."""
    given = str(flow_run.name)
    return given if given.startswith(f"{verb} ") else f"{verb} {flow_run.parameters['deployment_id'][:8]}"
