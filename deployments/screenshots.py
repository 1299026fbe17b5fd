"""The README's screenshots: `make demo demo-broken`, then `python -m deployments.screenshots`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deployments import lab_browser, lab_http
from deployments.demo_stage import Stage, load
from deployments.lab_browser import Browser

FOLDER = Path(__file__).resolve().parent / "screenshots"
MAX_BYTES = 200_000


def main() -> int:
    """Take both; 1 when there is nothing to take them of."""
    stage, package = load(), lab_browser.missing_program()
    if stage is None or not stage.is_up() or package is not None:
        print(f"Install {package}." if package else "No demo is up: make demo demo-broken", file=sys.stderr)
        return 1
    with _browser(height=900) as browser:
        save("run", run_page(browser, stage))
    with _browser(height=1500) as browser:
        save("report", report_page(browser, stage))
    return 0


@contextmanager
def _browser(height: int) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(lab_browser.driver_command()) as driver:
        try:
            with Browser(None, Path(folder) / "profile", width=1200, height=height) as browser:
                yield browser
        finally:
            driver.terminate()


def run_page(browser: Browser, stage: Stage) -> bytes:
    """The run of the good version, with its graph."""
    run = _newest(stage, "flow_runs", {"flow_runs": {"name": {"any_": ["hello:v1 → host-b"]}}})
    browser.open(f"{stage.ui_url}/v2/runs/flow-run/{run['id']}?tab=Artifacts")
    browser.wait_for(run["name"], "deployment-report")
    browser.wait_for_drawing("canvas")
    return browser.screenshot()


def report_page(browser: Browser, stage: Stage) -> bytes:
    """The report of the broken version."""
    wanted = {"artifacts": {"key": {"any_": ["deployment-report"]}}}
    report = _newest(stage, "artifacts", wanted)
    browser.open(f"{stage.ui_url}/v2/artifacts/artifact/{report['id']}")
    browser.wait_for("rolled back", "Health attempt")
    return browser.screenshot()


def save(name: str, picture: bytes) -> None:
    """Write `deployments/screenshots/<name>.png`; refuses one that is too large for a README."""
    if len(picture) > MAX_BYTES:
        raise SystemExit(f"{name}.png would have {len(picture)} bytes; allowed are {MAX_BYTES}")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.png").write_bytes(picture)
    print(f"{FOLDER / name}.png: {len(picture)} bytes")


def _newest(stage: Stage, kind: str, wanted: dict[str, Any]) -> dict[str, Any]:
    order = "START_TIME_DESC" if kind == "flow_runs" else "CREATED_DESC"
    body = json.dumps({**wanted, "sort": order, "limit": 1}).encode()
    headers = {"Content-Type": "application/json"}
    answer = lab_http.request(None, "POST", f"{stage.api_url}/{kind}/filter", body=body, headers=headers)
    found: list[dict[str, Any]] = answer.json()
    if not found:
        raise SystemExit(f"no such {kind} in this demo; run: make demo demo-broken")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
