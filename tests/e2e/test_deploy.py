"""Deployments to a second host, from image to answer, and what is left when they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.lab import Lab
from tests.e2e.deploying import (
    Service,
    events_of,
    in_control,
    large_build,
    prefect_api,
    query,
    start_run,
    states_of,
    task_runs_of,
    wait_for,
)
from tests.e2e.deploying import outcome as outcome_of

SUCCESS = ["PENDING", "PACKAGING", "TRANSFERRING", "DEPLOYING", "VALIDATING", "COMPLETED"]
ROLLED_BACK = [*SUCCESS[:-1], "ROLLING_BACK", "ROLLBACK_COMPLETED"]


def peak_resident_mb(pid: int) -> float:
    """Most memory that a process ever had resident."""
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line)
    return int(peak.split()[1]) / 1024


def operations_of(lab: Lab, workflow_id: str) -> list[str]:
    """Operations of a workflow's first stage, in order."""
    sql = "SELECT operations FROM workflow_stage_results WHERE workflow_id = ? ORDER BY stage_number"
    return [told["name"] for told in json.loads(query(lab, sql, workflow_id)[0]["operations"])]


def test_a_first_deployment_a_second_version_and_the_same_again(service: Service) -> None:
    """Each ends COMPLETED and serves; what did not change is neither built nor sent again."""
    first = service.deploy("v1")
    assert first.state == "COMPLETED", first.message
    assert service.answer() == "Hello from Gantry, version v1"
    assert states_of(service.lab, first.run_id) == SUCCESS
    assert events_of(service.lab, first.run_id) == [
        *("DEPLOYMENT_STARTED", "DEPLOYMENT_STAGE_COMPLETED", "DEPLOYMENT_STAGE_COMPLETED"),
        *("DEPLOYMENT_STAGE_COMPLETED", "DEPLOYMENT_HEALTH_CHECK", "DEPLOYMENT_STAGE_COMPLETED"),
        "DEPLOYMENT_COMPLETED",
    ]
    assert first.metrics["transferred_bytes"] > 0
    assert first.record["deployed_url"] == f"http://{service.host.address}:{service.port}"

    second = service.deploy("v2")
    assert second.state == "COMPLETED", second.message
    assert service.answer() == "Hello from Gantry, version v2"
    assert second.metrics["service_interruption_ms"] < 20_000

    again = service.deploy("v2")
    assert again.state == "COMPLETED", again.message
    assert service.answer() == "Hello from Gantry, version v2"
    assert again.metrics["transferred_bytes"] == 0
    operations = query(
        service.lab,
        "SELECT operations FROM workflow_stage_results WHERE workflow_id = ? AND stage_number = 1",
        again.run_id,
    )
    told = {done["name"]: done["message"] for done in json.loads(operations[0]["operations"])}
    assert told["build_docker_image"] == "cached"
    assert len(service.running()) == 1


def test_a_cached_image_that_is_gone_from_the_engine_is_built_again(service: Service) -> None:
    """The cache is believed only while the engine has the image."""
    assert service.deploy("v1").state == "COMPLETED"
    engine = service.lab.control.docker()
    engine.images.remove(f"{service.name}:v1", force=True)
    again = service.deploy("v1")
    assert again.state == "COMPLETED", again.message
    assert engine.images.get(f"{service.name}:v1")


def test_a_failed_health_check_leaves_the_old_version_serving(service: Service) -> None:
    """The broken version is taken away, the old one answers, and the run says why in one line."""
    assert service.deploy("v1").state == "COMPLETED"
    before = {container.id for container in service.running()}
    broken = service.deploy("v2", HEALTH="broken")
    assert broken.state == "FAILED"
    assert "HEALTH_CHECK_FAILED" in broken.message
    assert "the previous container serves" in broken.message
    assert "\n" not in broken.message
    assert service.answer() == "Hello from Gantry, version v1"
    assert {container.id for container in service.running()} == before
    assert [container.name for container in service.running()] == [service.name]
    assert states_of(service.lab, broken.run_id) == ROLLED_BACK
    assert json.loads(broken.record["rollback_result"])["previous_container_restored"] is True
    events = events_of(service.lab, broken.run_id)
    assert events.count("DEPLOYMENT_HEALTH_CHECK") == 2
    assert events[-4:] == [
        *("DEPLOYMENT_ROLLBACK_INITIATED", "DEPLOYMENT_ROLLBACK_COMPLETED"),
        *("DEPLOYMENT_FAILED", "DEPLOYMENT_DLQ"),
    ]


def test_flow_runs_carry_the_workflow_s_id_and_task_runs_no_tag(service: Service) -> None:
    """For each tag of a task run Prefect asks its server for a slot: a busy server would fail deployments."""
    broken = service.deploy("v1", HEALTH="broken")
    tagged = {"flow_runs": {"tags": {"all_": [f"workflow:{broken.run_id}"]}}}
    runs = prefect_api(service.lab, "POST", "/flow_runs/filter", tagged)
    assert len(runs) == 2  # on the host, and the rollback
    tasks = task_runs_of(service.lab, broken.run_id, *(run["id"] for run in runs))
    own = [task for task in tasks if not task["state"]["state_details"]["child_flow_run_id"]]
    assert own  # the others stand for flow runs in the graph, and ask for nothing
    assert [task["name"] for task in own if task["tags"]] == []


def test_a_failed_first_deployment_leaves_nothing(service: Service) -> None:
    """Without a previous version there is nothing to restore, and nothing of ours stays."""
    broken = service.deploy("v1", HEALTH="broken")
    assert broken.state == "FAILED"
    assert "none ran before" in broken.message
    assert service.containers() == []
    assert broken.record["current_state"] == "ROLLBACK_COMPLETED"


@pytest.mark.parametrize(
    ("command", "restart_policy"),
    [(["/bin/sh", "-c", "echo boom; exit 3"], "no"), (["/bin/sh", "-c", "exit 1"], "always")],
    ids=["exits at once", "restarts for ever"],
)
def test_a_container_that_does_not_stay_up_is_rolled_back(
    service: Service, command: list[str], restart_policy: str
) -> None:
    """Exited, or restarting for ever: either way the old version serves again."""
    assert service.deploy("v1").state == "COMPLETED"
    parameters = service.parameters("v2")
    config = {**parameters["deployment_config"], "command": command, "restart_policy": restart_policy}
    failed = service.deploy("v2", {"deployment_config": config})
    assert failed.state == "FAILED"
    assert "HEALTH_CHECK_FAILED" in failed.message
    assert service.answer() == "Hello from Gantry, version v1"
    assert len(service.running()) == 1


def test_a_host_port_that_is_taken_is_told_before_the_old_version_is_stopped(service: Service) -> None:
    """The port is asked for while the old container serves, so nothing is interrupted."""
    assert service.deploy("v1").state == "COMPLETED"
    started_at = service.running()[0].attrs["State"]["StartedAt"]
    parameters = service.parameters("v2")
    taken = {"host_port": 8001, "container_port": 8080}  # the receiver's own
    config = {**parameters["deployment_config"], "port_mappings": [taken]}
    failed = service.deploy("v2", {"deployment_config": config})
    assert failed.state == "FAILED"
    assert "host port 8001/tcp is taken" in failed.message
    assert service.answer() == "Hello from Gantry, version v1"
    assert service.running()[0].attrs["State"]["StartedAt"] == started_at


def test_of_two_deployments_at_once_one_completes_and_the_other_touches_nothing(service: Service) -> None:
    """The loser says that somebody is at it, and begins no workflow."""
    slow = {"health_check_config": {"max_retries": 2, "retry_interval_ms": 500, "quiet_period_ms": 8000}}
    runs = {tag: service.start({**service.parameters(tag), **slow}) for tag in ("v1", "v2")}
    ends = {tag: outcome_of(service.lab, run_id) for tag, run_id in runs.items()}
    won = next(tag for tag, end in ends.items() if end.state == "COMPLETED")
    lost = ends[{"v1": "v2", "v2": "v1"}[won]]
    assert lost.state == "FAILED"
    assert f"{service.name} on host-a is being deployed" in lost.message
    assert lost.record == {}
    assert service.answer() == f"Hello from Gantry, version {won}"
    assert len(service.containers()) == 1


def test_a_build_that_fails_touches_nothing_on_the_host(service: Service) -> None:
    """BUILD_FAILED with the builder's own words; the old version never stopped."""
    context = service.lab.state_dir / f"broken-{service.name}"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM gantry-test-base:latest\nRUN echo about-to-fail && exit 7\n")
    failed = service.deploy("v1", {"build_options": {"build_context": str(context)}})
    assert failed.state == "FAILED"
    assert failed.message.startswith("BUILD_FAILED")
    assert "non-zero code: 7" in failed.message
    assert states_of(service.lab, failed.run_id) == ["PENDING", "PACKAGING", "FAILED"]
    assert service.containers() == []


def test_an_unreachable_host_ends_the_workflow_before_anything_is_built(service: Service) -> None:
    """REMOTE_ENDPOINT_UNREACHABLE after five attempts, with what to look at."""
    failed = service.deploy("v1", {"remote_port": 8999})
    assert failed.state == "FAILED"
    assert "REMOTE_ENDPOINT_UNREACHABLE" in failed.message
    assert states_of(service.lab, failed.run_id) == ["PENDING", "PACKAGING", "FAILED"]
    assert operations_of(service.lab, failed.run_id) == ["check_host"]
    assert failed.record["error_code"] == "REMOTE_ENDPOINT_UNREACHABLE"
    assert events_of(service.lab, failed.run_id)[-1] == "DEPLOYMENT_DLQ"


def test_a_wrong_key_is_refused_and_says_so(furnished: Lab, service: Service) -> None:
    """A host that was registered with another key answers 401: nothing is built, retried or changed."""
    host = furnished.hosts["host-a"]
    register = ("-m", "deployments.register", "--host", "host-wrong", "--address", host.address)
    in_control(furnished, *register, env={"HMAC_SECRET_KEY": "0" * 64})
    failed = service.deploy("v1", {"remote_host": "host-wrong"})
    assert failed.state == "FAILED"
    assert "Authentication failed" in failed.message
    assert failed.record["error_code"] == "TRANSFER_FAILED"
    assert states_of(service.lab, failed.run_id) == ["PENDING", "PACKAGING", "FAILED"]
    assert operations_of(service.lab, failed.run_id) == ["check_host"]
    assert service.containers() == []


def test_an_image_of_another_architecture_is_refused_in_stage_1(service: Service) -> None:
    """Told before a byte is sent, with the option that mends it."""
    options = {**service.parameters("v1")["build_options"], "platform": "linux/arm64"}
    context = service.lab.state_dir / f"arm-{service.name}"
    context.mkdir()
    (context / "Dockerfile").write_text('FROM scratch\nCOPY Dockerfile /Dockerfile\nCMD ["/none"]\n')
    options |= {"build_context": str(context), "build_args": {}}
    failed = service.deploy("v1", {"build_options": options})
    assert failed.state == "FAILED"
    assert "the image is for arm64, the host is amd64" in failed.message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"image_tag": "registry/app:v1"}, "give the tag alone"),
        ({"container_name": "Web"}, "lower-case letters"),
        ({"remote_host": "10.0.0.0/24"}, "remote_host"),
        ({"deployment_config": {"restart_policy": "sometimes"}}, "restart_policy 'sometimes'"),
        ({"deployment_config": {"volumes": [{"host_path": "../x", "container_path": "/x"}]}}, "host_path"),
        ({"build_options": {"build_context": "/nowhere"}}, "build_options.build_context"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_parameters_are_refused_before_anything_is_built(
    service: Service, overrides: dict[str, object], named: str
) -> None:
    """The message names the field and the fix; no workflow is begun."""
    failed = service.deploy("v1", overrides)
    assert failed.state == "FAILED"
    assert named in failed.message
    assert failed.record == {}
    assert service.containers() == []


def test_a_receiver_that_is_killed_in_mid_upload_is_resumed(service: Service) -> None:
    """The upload goes on from the bytes that the host verified, and the deployment completes."""
    host = service.host
    packages = host.folder / "receiver" / "packages"
    run_id = service.start({**service.parameters("v1"), "build_options": large_build(service)})
    wait_for(
        lambda: any(part.stat().st_size > 20_000_000 for part in packages.glob("*.part")), "the upload begins"
    )
    host.services["receiver"].kill()
    host.services["receiver"].start()
    ended = outcome_of(service.lab, run_id)
    assert ended.state == "COMPLETED", ended.message
    assert service.answer() == "large"
    assert peak_resident_mb(host.services["receiver"].pid) < 150
    learning = {"flows": {"name": {"any_": ["learn-layers"]}}}
    runs = prefect_api(service.lab, "POST", "/flow_runs/filter", learning)  # for the next version of it
    assert f"{service.name}:v1" in [run["parameters"]["reference"] for run in runs]


FLIPPED = """
import asyncio, pathlib, sys
from blake3 import blake3
from blocks.receiver_client import ReceiverRefused
from blocks.remote_host import find_remote_host
from receiver.contract import DeployRequest, PackageAnnouncement

async def main(path, name):
    good = path.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    path.write_bytes(bad)
    package = PackageAnnouncement(size_bytes=len(good), blake3=blake3(good).hexdigest())
    host = await find_remote_host("host-a")
    async with host.receiver() as receiver:
        request = DeployRequest(container_name=name, package=package)
        accepted = await receiver.announce(request, "flip-" + name)
        try:
            for offset in range(0, len(bad), 2**20):
                chunk = bytes(bad[offset : offset + 2**20])
                await receiver.send_chunk(accepted.deployment_id, offset, chunk)
        except ReceiverRefused as refused:
            print(refused.type, (await receiver.status(accepted.deployment_id)).state.value)

asyncio.run(main(pathlib.Path(sys.argv[1]), sys.argv[2]))
"""


def test_one_flipped_bit_never_reaches_the_engine(service: Service) -> None:
    """The host refuses the package; a package that changed on the control host's disk is exported anew."""
    assert service.deploy("v1").state == "COMPLETED"
    packages = (service.lab.control.folder / "packages").glob("*.package")
    path = max(packages, key=lambda package: package.stat().st_mtime)
    images = {image.id for image in service.host.docker().images.list()}
    said = in_control(service.lab, "-c", FLIPPED, str(path), f"{service.name}-flipped")
    assert said.split() == ["urn:gantry:problem:package-digest-mismatch", "rejected"]
    assert {image.id for image in service.host.docker().images.list()} == images
    service.host.docker().images.remove(f"{service.name}:v1", force=True)
    healed = service.deploy("v1")
    assert healed.state == "COMPLETED", healed.message


def test_the_command_line_shows_the_run_and_its_end(furnished: Lab, service: Service) -> None:
    """`prefect deployment run ... --watch` ends with 0 for a deployment that serves."""
    arguments = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in service.parameters("v1").items()
    ]
    command = ["-m", "prefect", "deployment", "run", "deploy-container/default", "--watch"]
    for argument in arguments:
        command += ["--param", argument]
    assert "Completed" in in_control(furnished, *command)
    assert service.answer() == "Hello from Gantry, version v1"


def test_a_restore_of_a_settled_deployment_changes_nothing(service: Service) -> None:
    """`rollback-container` on a kept deployment is no outage: it undid nothing, and says what would."""
    done = service.deploy("v1")
    run_id = start_run(
        service.lab,
        "rollback-container/default",
        {"remote_host": "host-a", "deployment_id": done.record["deployment_id"]},
    )
    told = outcome_of(service.lab, run_id)
    assert told.state == "FAILED"
    assert "keeps it; to go back to an earlier version, give container_name" in told.message
    assert service.answer() == "Hello from Gantry, version v1"
