"""Service files on a real Prefect server and a real host: registered by `prefect deploy --all`, deployed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.lab import Lab
from deployments.service_folder import FOLDER, read_folder
from receiver.contract import LABEL_CONTAINER
from tests.e2e.deploying import BASE_IMAGE, in_control, outcome, prefect_api, query, start_run

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLES = {"orchestrator": 8060, "reducer": 8061, "metadata-stamping": 8057, "onextree": 8058}
TAG = "gantry-service"
ADDED = f"""\
host: host-a
image: {{build_context: {PROJECT}/deployments/examples/hello, tag: v7}}
schedule: {{interval_seconds: 86400, timezone: Europe/Berlin, active: false}}
concurrency: {{limit: 2, collision_strategy: CANCEL_NEW}}
tags: [night]
description: Added by a test.
"""


def registered(lab: Lab) -> dict[str, dict[str, Any]]:
    """Our services' Prefect deployments by name, without what each registration changes."""
    body = {"deployments": {"tags": {"all_": [TAG]}}}
    kept = ("id", "parameters", "tags", "description", "entrypoint", "work_pool_name", "job_variables")
    found = {}
    for deployment in prefect_api(lab, "POST", "/deployments/filter", body):
        limit, options = deployment["global_concurrency_limit"], deployment["concurrency_options"]
        found[deployment["name"]] = {key: deployment[key] for key in kept} | {
            "schedules": [(made["schedule"], made["active"]) for made in deployment["schedules"]],
            "concurrency": limit and (limit["limit"], options and options["collision_strategy"]),
        }
    return found


def register(lab: Lab, folder: Path) -> str:
    """Register a folder from the command line; its output."""
    return in_control(lab, "-m", "deployments.service_files", "register", "--folder", str(folder))


def test_deploying_all_again_changes_nothing(furnished: Lab) -> None:
    """The same Prefect deployments, with the same ids: one for each service file."""
    before = registered(furnished)
    assert set(before) == {path.stem for path in (PROJECT / FOLDER).glob("*.yaml")}
    in_control(furnished, "-m", "prefect", "--no-prompt", "deploy", "--all")
    assert registered(furnished) == before


def test_a_file_that_is_added_is_registered_changed_and_named_when_it_is_gone(
    furnished: Lab, tmp_path: Path
) -> None:
    """What a file says is in Prefect, what it says no more is gone; deleting is left to a person."""
    folder = shutil.copytree(PROJECT / FOLDER, tmp_path / "services")
    before, added = registered(furnished), folder / "added.yaml"
    added.write_text(ADDED)
    try:
        assert "no file" not in register(furnished, folder)
        found = registered(furnished)["added"]
        assert found["parameters"]["image_tag"] == "v7"
        assert found["parameters"]["container_name"] == "added"
        assert found["tags"] == [TAG, "night"]
        assert found["description"] == "Added by a test."
        assert found["concurrency"] == (2, "CANCEL_NEW")
        ((schedule, is_active),) = found["schedules"]
        assert (schedule["interval"], schedule["timezone"], is_active) == (86400, "Europe/Berlin", False)

        added.write_text("\n".join(ADDED.splitlines()[:2]))
        register(furnished, folder)
        changed = registered(furnished)["added"]
        assert changed["id"] == found["id"]
        assert (changed["schedules"], changed["concurrency"], changed["tags"]) == ([], None, [TAG])

        added.unlink()
        said = register(furnished, folder)
        assert "prefect deployment delete deploy-container/added" in said
        assert registered(furnished)["added"] == changed
    finally:
        in_control(
            furnished, "-m", "prefect", "--no-prompt", "deployment", "delete", "deploy-container/added"
        )
    assert registered(furnished) == before


def test_a_wrong_file_fails_prefect_deploy_and_registers_nothing(furnished: Lab, tmp_path: Path) -> None:
    """File, line and field stand in the output; neither a right file nor prefect.yaml's entry is taken."""
    folder = shutil.copytree(PROJECT / FOLDER, tmp_path / "services")
    (folder / "added.yaml").write_text(ADDED)
    (folder / "wrong.yaml").write_text("host: host-a\nimage:\n  tag: 1.3\n")
    entry = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    entry["deployments"] = [
        {
            **entry["deployments"][0],
            "name": "unwanted",
            "build": [{"deployments.service_registry.register_services": {"folder": str(folder)}}],
        }
    ]
    written = tmp_path / "prefect.yaml"
    written.write_text(yaml.safe_dump(entry))
    before = registered(furnished)
    command = (furnished.python, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file")
    done = furnished.control.run(
        *command, str(written), check=False, cwd=PROJECT, env={"PWD": str(PROJECT)}, timeout=120
    )
    assert done.returncode == 1
    assert f"{folder}/wrong.yaml:3: image.tag: " in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert registered(furnished) == before
    with pytest.raises(AssertionError, match="404"):
        prefect_api(furnished, "GET", "/deployments/name/deploy-container/unwanted")


def test_the_examples_are_deployed_at_once_and_answer(furnished: Lab) -> None:
    """The specification's example 4, to another host than its files name: one fleet, four services."""
    furnished.control.docker().images.get(BASE_IMAGE).tag("gantry-demo-base", "latest")
    host = furnished.hosts["host-a"]
    try:
        ended = outcome(furnished, start_run(furnished, "deploy-fleet/bridge", {"hosts": [host.name]}))
        assert ended.state == "COMPLETED", ended.message
        sql = "SELECT deployed_url FROM workflow_executions WHERE correlation_id = ?"
        urls = {f"http://{host.address}:{port}" for port in EXAMPLES.values()}
        assert {row["deployed_url"] for row in query(furnished, sql, ended.run_id)} == urls
        for name, port in EXAMPLES.items():
            base = f"http://{host.address}:{port}"
            answer = furnished.control.get(f"{base}/", timeout=5)
            assert (answer.status, answer.text.strip()) == (200, f"omninode-{name} 1.2.0")
            assert furnished.control.get(f"{base}/health", timeout=5).json()["status"] == "healthy"
    finally:
        for container in host.docker().containers.list(all=True, filters={"label": LABEL_CONTAINER}):
            if str(container.name).startswith("omninode-"):
                container.remove(force=True)


def test_each_committed_file_is_a_prefect_deployment_with_its_parameters(furnished: Lab) -> None:
    """`prefect deployment run deploy-container/<service>` needs no more than a tag."""
    found = registered(furnished)
    for service in read_folder(PROJECT / FOLDER):
        for name, host in service.targets.items():
            assert found[name]["parameters"] == service.file.parameters(service.name, host)
