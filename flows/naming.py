"""Names of runs: of a deployment what and where; on a host as the control side, which starts them, says."""

from __future__ import annotations

from prefect.runtime import flow_run

from tasks.wording import on_host


def deployment_name() -> str:
    """`hello:v2 → host-b`, from the parameters of this run."""
    asked = flow_run.parameters
    return on_host(f"{asked['container_name']}:{asked.get('image_tag', 'latest')}", asked["remote_host"])


def name_as_started(verb: str) -> str:
    """The name that the control side gave this run; started by hand, it is named by its deployment."""
    given = str(flow_run.name)
    return given if given.startswith(f"{verb} ") else f"{verb} {flow_run.parameters['deployment_id'][:8]}"
