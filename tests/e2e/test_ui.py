"""What a person sees of a deployment in the Prefect UI: a real browser looks at it, without the internet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deployments import lab_browser
from deployments.lab import Lab
from deployments.lab_browser import Browser
from tests.e2e.deploying import Service, prefect_api, wait_for
from tests.services import require_service

CONTROL_OPERATIONS = {
    *("1 package: check_host", "1 package: build_docker_image", "1 package: gather_metadata"),
    "1 package: validate_image",
    *("2 transfer: establish_connection", "2 transfer: send_deployment_request"),
    *("2 transfer: upload_package", "2 transfer: verify_transfer", "3 deploy: start_run_on_host"),
}
HOST_OPERATIONS = {
    *("3 deploy: deploy_container", "3 deploy: stop_existing_container", "3 deploy: start_container"),
    *("4 validate: check_container_status", "4 validate: validate_health_endpoint"),
    *("4 validate: verify_service_registration", "4 validate: keep_container", "after: retire_old_versions"),
}


@pytest.fixture(scope="module")
def browser(furnished: Lab) -> Iterator[Browser]:
    """A headless Chromium in the network of the control side."""
    package = lab_browser.missing_program()
    require_service(package is None, "no Chromium here", f"apt-get install {package}")
    driver = furnished.control.spawn("chromedriver", *lab_browser.driver_command())
    try:
        with Browser(furnished.control.namespace, furnished.control.folder / "browser") as browser:
            yield browser
    finally:
        driver.stop()
        del furnished.control.services[
            "chromedriver"
        ]  # the other tests of this lab see that all services live


def nodes_of(lab: Lab, run_id: str) -> dict[str, str]:
    """What the graph of a run shows: ids by label."""
    nodes = prefect_api(lab, "GET", f"/flow_runs/{run_id}/graph-v2")["nodes"]
    return {node["label"]: node["id"] for _, node in nodes}


def graph(lab: Lab, run_id: str, labels: set[str]) -> dict[str, str]:
    """The nodes, once they are just these: the server writes task runs once a second (prefect_server.env)."""

    def found() -> dict[str, str] | None:
        nodes = nodes_of(lab, run_id)
        return nodes if set(nodes) == labels else None

    return wait_for(found, f"a graph of just {sorted(labels)}", seconds=10)


def artifacts_of(lab: Lab, run_id: str) -> dict[str, dict[str, Any]]:
    """Artifacts of a run by key; progress is sent beside the work, so its end is waited for."""
    wanted = {"flow_runs": {"id": {"any_": [run_id]}}}

    def found() -> dict[str, dict[str, Any]] | None:
        all_of_them = {each["key"]: each for each in prefect_api(lab, "POST", "/artifacts/filter", wanted)}
        bars = [each for each in all_of_them.values() if each["type"] == "progress"]
        return all_of_them if [bar["data"] for bar in bars] == [100.0, 100.0] else None

    return wait_for(found, "build and upload at 100 %", seconds=20)


def test_a_deployment_can_be_followed_in_the_ui(browser: Browser, service: Service) -> None:
    """Its name and graph, its progress, its report, its URL, and what runs on the host."""
    done = service.deploy("v1")
    assert done.state == "COMPLETED", done.message
    lab, name, host = service.lab, service.name, service.host.name
    host_run, url = f"receive-container / receive {name}:v1 on {host}", str(done.record["deployed_url"])
    nodes = graph(lab, done.run_id, {*CONTROL_OPERATIONS, host_run})
    graph(lab, nodes[host_run], HOST_OPERATIONS)

    ui = f"{lab.control.ui_url}/v2"
    browser.open(f"{ui}/runs/flow-run/{done.run_id}?tab=Artifacts")
    progress = (
        *(f"build-{name}", f"Building {name}:v1: done"),
        *(f"upload-to-{host}", f"Uploading {name}:v1 to {host}: done"),
    )
    browser.wait_for(f"{name}:v1 → {host}", "deployment-report", f"url-{name}-on-{host}", *progress)
    browser.wait_for_drawing("canvas")

    shown = artifacts_of(lab, done.run_id)
    for key, texts in {
        "deployment-report": (
            f"{name}:v1 serves",
            "Transferred",
            "1\u00a0package",
            "validate_health_endpoint",
        ),
        f"url-{name}-on-{host}": (url,),
        f"{host}-containers": (f"What runs on {host}", name, "v1", "running", url),
    }.items():
        browser.open(f"{ui}/artifacts/artifact/{shown[key]['id']}")
        browser.wait_for(*texts)
