"""The doctor on a healthy lab, and on one in which several things are broken at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments.lab import Host, Lab
from deployments.lab_processes import wait_until
from tests.e2e.deploying import in_control, outcome, prefect_api, start_run

PROJECT = Path(__file__).resolve().parents[2]
PORT = 18990
# What other tests of the session left, and the machine's own disk, are not this test's.
NOT_OURS = ("disk", "deployment", "workflow")
Rows = dict[tuple[str, str], dict[str, str]]


def doctor(lab: Lab, *arguments: str) -> tuple[int, Rows]:
    """Exit code and rows, by subject and check, of the command on the control side."""
    command = (lab.python, "-m", "deployments.doctor", "--json", *arguments)
    done = lab.control.run(*command, check=False, cwd=PROJECT, timeout=60)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.returncode, {(row["subject"], row["check"]): row for row in json.loads(done.stdout)}


@contextmanager
def held_port(host: Host, python: str) -> Iterator[None]:
    """A process of the host listens at `PORT`."""
    squatter = host.spawn("squatter", python, "-m", "http.server", str(PORT))
    try:
        wait_until(
            lambda: host.get(f"http://127.0.0.1:{PORT}/").status == 200,
            "the squatter",
            deadline_seconds=20,
            services=[squatter],
        )
        yield
    finally:
        squatter.stop()


@contextmanager
def paused_pool(lab: Lab, pool: str) -> Iterator[None]:
    """The work pool takes no runs."""
    in_control(lab, "-m", "prefect", "work-pool", "pause", pool)
    try:
        yield
    finally:
        in_control(lab, "-m", "prefect", "work-pool", "resume", pool)


def test_a_healthy_site_passes_by_command_and_by_flow(furnished: Lab) -> None:
    """Every check that a deployment depends on is there, and the flow leaves its table in the UI."""
    run_id = start_run(furnished, "doctor/default", {"remote_host": "host-a", "ports": [f"{PORT}/tcp"]})
    _, rows = doctor(furnished, "host-a", "--port", f"{PORT}/tcp")
    told = {key: row for key, row in rows.items() if not key[1].startswith(NOT_OURS)}
    assert {row["verdict"] for row in told.values()} == {"pass"}, told
    assert {check for subject, check in told if subject == "host-a"} >= {
        *("reachable", "TLS", "clock", "allow-list", "key", "engine", "architecture"),
        *(f"port {PORT}/tcp", "work pool", "worker", "Prefect deployments"),
    }
    assert {check for subject, check in told if subject == "control"} == {
        *("Prefect server", "work pool", "worker", "Prefect deployments", "build engine", "records"),
    }
    assert len([key for key in rows if key[1].startswith("disk")]) >= 2
    assert outcome(furnished, run_id).state == "COMPLETED"
    shown = prefect_api(furnished, "GET", "/artifacts/doctor-host-a/latest")
    assert shown["type"] == "table"
    assert "deployment_id" not in shown["data"]
    assert '"check": "key"' in shown["data"]


def test_what_is_broken_at_once_is_told_at_once_with_its_command(furnished: Lab) -> None:
    """A wrong key, a pool without a worker, one that is paused, and a held port; exit code 1."""
    host = furnished.hosts["host-a"]
    register = ("-m", "deployments.register", "--host", "host-wrong", "--address", host.address)
    in_control(furnished, *register, env={"HMAC_SECRET_KEY": "0" * 64})
    with held_port(host, furnished.python), paused_pool(furnished, host.pool):
        code, rows = doctor(furnished, "host-a", "host-wrong", "--port", f"{PORT}/tcp")
    assert code == 1
    failed = {key: row["mend"] for key, row in rows.items() if row["verdict"] == "fail"}
    failed = {key: mend for key, mend in failed.items() if not key[1].startswith(NOT_OURS)}
    assert set(failed) == {
        ("host-a", f"port {PORT}/tcp"),
        ("host-a", "work pool"),
        ("host-wrong", "key"),
        ("host-wrong", "worker"),
    }
    assert f"sport = :{PORT}" in failed["host-a", f"port {PORT}/tcp"]
    assert "(pid " in rows["host-a", f"port {PORT}/tcp"]["found"]
    assert failed["host-a", "work pool"] == f"prefect work-pool resume {host.pool}"
    assert f"register --host host-wrong --address {host.address}" in failed["host-wrong", "key"]
    assert failed["host-wrong", "worker"] == "prefect worker start --pool host-wrong --type process"


def test_the_causes_of_silence_are_told_apart_and_without_a_server_the_rest_is_told(furnished: Lab) -> None:
    """Refused; name unknown; and a Prefect server that is not there is a check like any other."""
    code, rows = doctor(furnished, furnished.hosts["host-a"].address, "--receiver-port", "8999")
    assert code == 1
    silent = next(row for key, row in rows.items() if key[1] == "reachable")
    assert "connection refused" in silent["found"]
    environment = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    command = (furnished.python, "-m", "deployments.doctor", "host-a")
    done = furnished.control.run(*command, check=False, cwd=PROJECT, timeout=60, env=environment)
    assert done.returncode == 1
    assert "fail  Prefect server" in done.stdout
    assert "pass  build engine" in done.stdout
    assert done.stderr == ""
