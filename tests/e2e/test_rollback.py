"""Going back by hand: to the previous version, to a named one, and what happens when that is not well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.e2e.deploying import Outcome, Service, events_of, prefect_api, query, start_run, states_of
from tests.e2e.deploying import outcome as outcome_of

SUCCESS = ["PENDING", "PACKAGING", "TRANSFERRING", "DEPLOYING", "VALIDATING", "COMPLETED"]
# Well the first time it starts on its volume, and never again.
ONCE = "[ -f /data/was-here ] && rm /www/health; touch /data/was-here; exec sh /serve.sh"


def well_once(service: Service) -> dict[str, Any]:
    """Configuration of a version that is well now, and will not be when it is gone back to."""
    volume = {"host_path": f"{service.name}-data", "container_path": "/data"}
    return {"command": ["/bin/sh", "-c", ONCE], "volumes": [volume]}


def deploy(service: Service, tag: str, config: Mapping[str, Any]) -> None:
    """Deploy a version that keeps all before it."""
    whole = {**service.parameters(tag)["deployment_config"], "keep_versions": 5, **config}
    done = service.deploy(tag, {"deployment_config": whole})
    assert done.state == "COMPLETED", done.message


def start_rollback(service: Service, to_version: str | None = None) -> str:
    """Start `rollback-container`; returns the flow run's id."""
    asked = {"remote_host": service.host.name, "container_name": service.name, "to_version": to_version}
    return start_run(service.lab, "rollback-container/default", asked)


def roll_back(service: Service, to_version: str | None = None) -> Outcome:
    """Run `rollback-container` to its end."""
    return outcome_of(service.lab, start_rollback(service, to_version))


def rows_of(service: Service, run_id: str) -> list[dict[str, Any]]:
    """What a run of `list-versions` shows, as its table artifact has it."""
    assert outcome_of(service.lab, run_id).state == "COMPLETED"
    artifact = prefect_api(service.lab, "GET", f"/artifacts/versions-{service.host.name}/latest")
    assert artifact["flow_run_id"] == run_id
    rows: list[dict[str, Any]] = json.loads(artifact["data"])
    return rows


def control_operations(service: Service, run_id: str) -> list[tuple[str, str]]:
    """Names and remarks of the operations of stages 1 and 2."""
    sql = (
        "SELECT operations FROM workflow_stage_results WHERE workflow_id = ? AND stage_number < 3"
        " ORDER BY stage_number"
    )
    stages = [json.loads(row["operations"]) for row in query(service.lab, sql, run_id)]
    return [(done["name"], done["message"]) for stage in stages for done in stage]


def assert_refused(service: Service, refused: Outcome, kept: Mapping[str, Any]) -> None:
    """In one line that names what is kept; no workflow was begun."""
    assert refused.state == "FAILED"
    assert "no version 'v9'" in refused.message
    assert f"{kept['image_tag']} ({kept['deployment_id']})" in refused.message
    assert "\n" not in refused.message
    assert refused.record == {}


def assert_gone_back(service: Service, back: Outcome, kept: Mapping[str, Any]) -> None:
    """The kept version serves alone; records and events are those of a deployment, with nothing built."""
    tag = kept["image_tag"]
    assert back.state == "COMPLETED", back.message
    assert service.answer() == f"Hello from Gantry, version {tag}"
    assert len(service.running()) == 1
    assert states_of(service.lab, back.run_id) == SUCCESS
    assert events_of(service.lab, back.run_id) == [
        *("DEPLOYMENT_STARTED", "DEPLOYMENT_STAGE_COMPLETED", "DEPLOYMENT_STAGE_COMPLETED"),
        *("DEPLOYMENT_STAGE_COMPLETED", "DEPLOYMENT_HEALTH_CHECK", "DEPLOYMENT_STAGE_COMPLETED"),
        "DEPLOYMENT_COMPLETED",
    ]
    assert control_operations(service, back.run_id) == [
        ("find_kept_version", f"{tag} is kept on the host: nothing was built"),
        ("send_rollback_request", f"{tag} is kept on the host: nothing was sent"),
    ]
    assert back.record["image_tag"] == tag
    assert back.metrics["transferred_bytes"] == 0
    assert json.loads(back.record["request"])["kept_deployment_id"] == kept["deployment_id"]


def test_back_to_the_previous_version_to_a_named_one_and_to_one_that_is_not_well(service: Service) -> None:
    """Three versions, shown; an unknown one is refused with the list; one that is not well is taken away."""
    for tag, config in {"v1": {}, "v2": {}, "v3": well_once(service)}.items():
        deploy(service, tag, config)
    unknown = start_rollback(service, "v9")
    asked = {"remote_host": service.host.name, "container_name": service.name}
    listing = start_run(service.lab, "list-versions/default", asked)
    rows = rows_of(service, listing)
    assert [(row["image_tag"], row["role"], row["note"]) for row in rows] == [
        ("v3", "running", ""),
        ("v2", "kept", "a rollback goes here"),
        ("v1", "kept", ""),
    ]
    assert_refused(service, outcome_of(service.lab, unknown), rows[1])
    assert service.answer() == "Hello from Gantry, version v3"

    assert_gone_back(service, roll_back(service), rows[1])
    assert_gone_back(service, roll_back(service, "v1"), rows[2])

    serving = service.running()[0].id
    failed = roll_back(service, "v3")
    assert failed.state == "FAILED"
    assert "HEALTH_CHECK_FAILED" in failed.message
    assert "the previous container serves" in failed.message
    assert service.answer() == "Hello from Gantry, version v1"
    assert [container.id for container in service.running()] == [serving]
    assert states_of(service.lab, failed.run_id) == [*SUCCESS[:-1], "ROLLING_BACK", "ROLLBACK_COMPLETED"]
    assert events_of(service.lab, failed.run_id)[-1] == "DEPLOYMENT_DLQ"
