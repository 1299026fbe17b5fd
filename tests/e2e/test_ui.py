"""What a person sees in the Prefect UI of a deployment: looked at by a real browser, without the internet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments import lab_browser
from deployments.lab import Lab
from deployments.lab_browser import Browser
from tests.e2e.deploying import Outcome, Service, prefect_api
from tests.services import require_service

PARTS_OF_A_RUN = (
    *("1 package · build_docker_image", "1 package · export_image", "1 package · validate_image"),
    *("2 transfer · send_deployment_request", "2 transfer · upload_package", "2 transfer · verify_transfer"),
    "3 deploy · start_run_on_host",
)


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


def test_a_deployment_can_be_followed_in_the_ui(browser: Browser, service: Service) -> None:
    """Its name, its operations by stage, its progress, its report, its URL, and what runs on the host."""
    done = service.deploy("v1")
    assert done.state == "COMPLETED", done.message
    assert_the_graph_has_the_parts(browser, service, done)
    ui = service.lab.control.ui_url
    url = f"http://{service.host.address}:{service.port}"

    browser.open(f"{ui}/runs/flow-run/{done.run_id}?tab=TaskRuns")
    browser.wait_for(f"{service.name}:v1 → {service.host.name}", *PARTS_OF_A_RUN[-3:])
