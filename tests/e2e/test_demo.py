"""`make demo`, `make demo-broken` and `make demo-stop`, as a newcomer types them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.lab import Lab

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, so that the demo's state is the test's own."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, check=True, capture_output=True, text=True
    ).stdout
    for name in tracked.splitlines():
        if (PROJECT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def environment(lab_possible: None, checkout: Path) -> Iterator[dict[str, str]]:
    """The demo's environment: an engine of the test's own as this machine's engine."""
    with Lab(hosts=(), prefect=False, receiver=False) as lab:
        docker_host = f"unix://{lab.control.docker_socket}"
        yield {**os.environ, "DOCKER_HOST": docker_host, "PYTHONPATH": str(checkout)}


def demo(action: str, checkout: Path, environment: dict[str, str]) -> str:
    """Run one action; its output. Fails the test when the action fails."""
    done = subprocess.run(
        [sys.executable, "-m", "deployments.demo", action],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_deploys_rolls_back_and_goes_away(checkout: Path, environment: dict[str, str]) -> None:
    """The sample serves; a broken version is rolled back; afterwards nothing is left."""
    try:
        shown = demo("up", checkout, environment)
        assert "hello:v1 is COMPLETED" in shown
        assert "Hello from Gantry, version v1" in shown
        assert "Prefect UI: http://" in shown
        again = demo("up", checkout, environment)
        assert "the demo is up already" in again
        assert "hello:v1 is COMPLETED" in again
        broken = demo("broken", checkout, environment)
        assert "hello:v2-broken is ROLLBACK_COMPLETED" in broken
        assert "the previous one still answers" in broken
    finally:
        gone = demo("stop", checkout, environment)
    assert "the demo is gone" in gone
    assert not (checkout / ".demo").exists()
    assert demo("stop", checkout, environment).strip() == "no demo is up"
