"""What a check-up makes of what it found: each verdict at its border, each with the command that mends it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from receiver.contract import (
    HostDisk,
    HostEngine,
    HostHealth,
    HostPort,
    HostProxy,
    HostReport,
    HostState,
    OpenDeployment,
)
from tasks.diagnosis import judge_host
from tasks.diagnosis_control import judge_control
from tasks.findings import (
    BrokerFound,
    BuildEngine,
    Certificate,
    ControlFindings,
    HostFindings,
    HostLost,
    Link,
    OpenWorkflow,
    PlaceInPrefect,
    Pool,
    Prefect,
    Reach,
    RecordsFound,
    Refused,
)
from tasks.verdicts import Check, Diagnosis, Verdict, has_failed, render, rows_of, summary

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
GB = 10**9
DISK = HostDisk(path="/var/lib/gantry", device="/dev/vda1", free_bytes=50 * GB, total_bytes=100 * GB)
HEALTH = HostHealth(
    status="healthy",
    docker_connected=True,
    version="1",
    architecture="amd64",
    engine_version="24.0.7",
    time=NOW,
)
REPORT = HostReport(
    version="1",
    time=NOW,
    engine=HostEngine(version="24.0.7", architecture="amd64", os="linux", storage_driver="overlay2"),
    disks=[DISK],
    ports=[],
    open_deployments=[],
    settings={"HOOK_RECEIVER_STATE_DIR": "/var/lib/gantry"},
    proxy=HostProxy(version="2.6.12", runs=True, services=["web"], left_out=[]),
)
PLACE = PlaceInPrefect("host-b", Pool("host-b", is_paused=False, workers_online=1), ())
HOST = HostFindings(
    name="host-b",
    address="10.0.0.7",
    port=8001,
    tls=False,
    link=Link(Reach.REACHED, own_address="10.0.0.5"),
    looked_at=NOW,
    health=HEALTH,
    clock_offset_seconds=0.2,
    report=REPORT,
    place=PLACE,
    open_workflows=(),
    build_engine=BuildEngine("unix:///var/run/docker.sock", "24.0.7", "amd64"),
)
CONTROL = ControlFindings(
    looked_at=NOW,
    prefect=Prefect("3.8.8", "3.8.8"),
    build_engine=BuildEngine("unix:///var/run/docker.sock", "24.0.7", "amd64"),
    home=DISK,
    records=RecordsFound("sqlite:////home/records.db", "0002", "0002"),
    broker=BrokerFound("kafka:9092", 3),
    place=replace(PLACE, pool_name="control"),
)
NOT_HEARD: dict[str, Any] = {"health": None, "clock_offset_seconds": None, "report": None}


def of(name: str, diagnosis: Diagnosis) -> Check:
    """The one check of that name."""
    found = [check for check in diagnosis.checks if check.name == name]
    assert len(found) == 1, diagnosis.checks
    return found[0]


def host(name: str, **found: Any) -> Check:
    """A check of a healthy host in which something is otherwise."""
    return of(name, judge_host(replace(HOST, **found)))


def control(name: str, **found: Any) -> Check:
    """A check of a healthy control side in which something is otherwise."""
    return of(name, judge_control(replace(CONTROL, **found)))


def reported(**news: Any) -> HostReport:
    """The healthy host's report with something otherwise."""
    return REPORT.model_copy(update=news)


def refusal(status: int, kind: str, **extra: object) -> Refused:
    """A refused signed call."""
    return Refused(status, kind, "Title", "detail", "Do this.", extra)


def test_a_healthy_site_passes_every_check() -> None:
    """Nothing to mend anywhere."""
    diagnoses = [judge_control(CONTROL), judge_host(HOST)]
    checks = [check for diagnosis in diagnoses for check in diagnosis.checks]
    assert {check.verdict for check in checks} == {Verdict.PASS}
    assert not any(check.mend for check in checks)
    assert len({check.name for check in checks}) >= 15


@pytest.mark.parametrize(
    ("reach", "named"),
    [
        (Reach.REFUSED, "python -m receiver --check"),
        (Reach.TIMEOUT, "8001/tcp"),
        (Reach.NAME_UNKNOWN, "deployments.register --host host-b --address ADDRESS"),
        (Reach.NO_ROUTE, "ip route get 10.0.0.7"),
    ],
)
def test_a_host_out_of_reach_is_told_with_its_cause(reach: Reach, named: str) -> None:
    """Each cause has a mend of its own; nothing that was not seen is judged."""
    diagnosis = judge_host(replace(HOST, link=Link(reach), **NOT_HEARD))
    check = of("reachable", diagnosis)
    assert check.verdict is Verdict.FAIL
    assert reach.value in check.found
    assert named in check.mend
    assert not {"key", "clock", "engine", "allow-list"} & {check.name for check in diagnosis.checks}
    assert of("worker", diagnosis).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("offset", "verdict"),
    [(30, "pass"), (-30, "pass"), (31, "warn"), (-31, "warn"), (300, "warn"), (301, "fail"), (-301, "fail")],
)
def test_a_clock_is_judged_by_its_offset_either_way(offset: float, verdict: str) -> None:
    """Warned past 30 s, failed past the signature's 300 s."""
    check = host("clock", clock_offset_seconds=offset)
    assert check.verdict == verdict
    assert ("timedatectl" in check.mend) is (verdict != "pass")


@pytest.mark.parametrize(
    ("certificate", "verdict", "found"),
    [
        (Certificate(is_checked=True, expires_at=NOW + timedelta(days=90, hours=1)), "pass", "90 days"),
        (Certificate(is_checked=True, expires_at=NOW + timedelta(days=20, hours=1)), "warn", "20 days"),
        (Certificate(is_checked=False), "warn", "not checked"),
        (Certificate(is_checked=True, problem="not accepted: certificate has expired"), "fail", "expired"),
    ],
)
def test_a_certificate_is_told_with_its_days(certificate: Certificate, verdict: str, found: str) -> None:
    """Three weeks ahead it is warned of; one that is not accepted fails."""
    check = host("TLS", tls=True, certificate=certificate)
    assert check.verdict == verdict
    assert found in check.found


def test_a_foreign_network_is_told_the_address_to_add() -> None:
    """The one that the host saw, which may be another than our own; the key was not looked at."""
    diagnosis = judge_host(
        replace(HOST, report=None, refused=refusal(403, "network-not-allowed", peer="192.0.2.9"))
    )
    check = of("allow-list", diagnosis)
    assert (check.verdict, check.found) == (Verdict.FAIL, "detail")
    assert "add 192.0.2.9 to IP_WHITELIST" in check.mend
    assert "key" not in {check.name for check in diagnosis.checks}
    silent = refusal(403, "network-not-allowed")
    assert "add 10.0.0.5 to" in host("allow-list", report=None, refused=silent).mend


def test_a_wrong_key_is_told_with_the_registration_that_mends_it() -> None:
    """With port and TLS where they are not the usual ones, and without any key."""
    wrong = refusal(401, "unauthenticated")
    check = host("key", report=None, refused=wrong, port=9001, tls=True, certificate=None)
    assert check.verdict is Verdict.FAIL
    assert "--host host-b --address 10.0.0.7 --port 9001 --tls" in check.mend
    assert host("allow-list", report=None, refused=wrong).verdict is Verdict.PASS


def test_a_refused_clock_is_not_told_as_a_wrong_key() -> None:
    """The key was not compared."""
    stale = replace(HOST, report=None, refused=refusal(401, "stale-request"), clock_offset_seconds=400.0)
    diagnosis = judge_host(stale)
    assert [check.name for check in diagnosis.with_verdict(Verdict.FAIL)] == ["clock"]


def test_another_refusal_of_the_signed_call_is_told_as_it_is() -> None:
    """With the host's own next step."""
    check = host("signed call", report=None, refused=refusal(503, "ledger-unavailable"))
    assert (check.verdict, check.mend) == (Verdict.FAIL, "Do this.")


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("20.10.0", "pass"),
        ("20.10.24+dfsg1", "pass"),
        ("28.0", "pass"),
        ("19.03.15", "fail"),
        ("20.9", "fail"),
    ],
)
def test_an_engine_older_than_20_10_fails(version: str, verdict: str) -> None:
    """By numbers, not by letters."""
    assert host("engine", health=HEALTH.model_copy(update={"engine_version": version})).verdict == verdict


def test_an_engine_that_does_not_answer_fails() -> None:
    """With the command that starts it."""
    down = HEALTH.model_copy(update={"docker_connected": False, "engine_version": None, "architecture": None})
    check = host("engine", health=down)
    assert (check.verdict, check.mend) == (Verdict.FAIL, "on the host: sudo systemctl start docker")


def test_another_architecture_than_the_builder_s_is_warned_of() -> None:
    """With the option that builds for the host."""
    check = host("architecture", build_engine=BuildEngine("unix:///x", "24.0", "arm64"))
    assert check.verdict is Verdict.WARN
    assert "build_options.platform=linux/amd64" in check.mend


@pytest.mark.parametrize(
    ("free_bytes", "verdict"),
    [(10 * GB, "pass"), (10 * GB - 1, "warn"), (2**27, "warn"), (2**27 - 1, "fail")],
)
def test_a_disk_is_judged_by_its_free_bytes(free_bytes: int, verdict: str) -> None:
    """The specification's 10 GB are a warning; no room at all fails."""
    disk = DISK.model_copy(update={"free_bytes": free_bytes})
    assert host("disk /dev/vda1", report=reported(disks=[disk])).verdict == verdict
    assert control("disk /dev/vda1", home=disk).verdict == verdict


def test_folders_of_one_device_are_one_check() -> None:
    """Each device is judged once."""
    other = DISK.model_copy(update={"path": "/srv", "device": "/dev/vdb", "free_bytes": GB})
    same = DISK.model_copy(update={"path": "/var/lib/docker"})
    report = reported(disks=[DISK, other, same])
    assert "/var/lib/gantry and /var/lib/docker" in host("disk /dev/vda1", report=report).found
    assert host("disk /dev/vdb", report=report).verdict is Verdict.WARN


@pytest.mark.parametrize(
    ("holder", "container_name", "verdict", "mend"),
    [
        ("nginx (pid 7)", None, "fail", "sudo ss -lntp 'sport = :8080'"),
        (None, None, "fail", "sudo ss -lntp 'sport = :8080'"),
        ("container other", None, "fail", "docker stop other"),
        ("container web", "web", "warn", "deploy web itself"),
    ],
)
def test_a_port_that_is_held_is_told_by_whom(
    holder: str | None, container_name: str | None, verdict: str, mend: str
) -> None:
    """One of ours is taken over by its own new version; anything else is stopped first."""
    port = HostPort(port=8080, protocol="tcp", free=False, holder=holder, container_name=container_name)
    check = host("port 8080/tcp", report=reported(ports=[port]))
    assert check.verdict == verdict
    assert (holder or "another user") in check.found
    assert mend in check.mend


def test_a_port_is_free_or_could_not_be_seen() -> None:
    """Without the host's report nothing is said of its ports but that."""
    port = HostPort(port=8080, protocol="tcp", free=True)
    assert host("port 8080/tcp", report=reported(ports=[port])).verdict is Verdict.PASS
    unseen = host("port 8080/tcp", wanted_ports=("8080/tcp",), report=None)
    assert (unseen.verdict, "not seen" in unseen.found) == (Verdict.WARN, True)


@pytest.mark.parametrize(
    ("news", "verdict", "found", "mend"),
    [
        ({}, "pass", "2.6.12, runs, needed by web", ""),
        ({"services": [], "runs": False}, "pass", "not needed yet", ""),
        ({"version": None, "services": [], "runs": False}, "pass", "apt-get install haproxy", ""),
        ({"version": None, "runs": False}, "fail", "needed by web", "apt-get install haproxy"),
        ({"runs": False}, "fail", "does not run", "haproxy -c -f /var/lib/gantry/proxy/haproxy.cfg"),
        ({"left_out": ["shop"]}, "fail", "runs without shop", "https_certificate_file"),
    ],
)
def test_haproxy_is_needed_where_services_roll(
    news: dict[str, Any], verdict: str, found: str, mend: str
) -> None:
    """Elsewhere it is a hint alone."""
    assert REPORT.proxy
    check = host("HAProxy", report=reported(proxy=REPORT.proxy.model_copy(update=news)))
    assert check.verdict == verdict
    assert found in check.found
    assert mend in check.mend


def test_of_an_older_receiver_no_proxy_is_judged() -> None:
    """It does not tell."""
    diagnosis = judge_host(replace(HOST, report=reported(proxy=None)))
    assert "HAProxy" not in {check.name for check in diagnosis.checks}


@pytest.mark.parametrize(
    ("state", "age_minutes", "is_held", "verdict", "mend"),
    [
        (HostState.RESTORE_FAILED, 0, False, "fail", "--param deployment_id=d1"),
        (HostState.VALIDATING, 99, True, "pass", ""),
        (HostState.RECEIVING, 14, False, "pass", ""),
        (HostState.RECEIVING, 16, False, "warn", "reconcile/default"),
    ],
)
def test_a_deployment_that_is_not_at_rest_is_told(
    state: HostState, age_minutes: int, is_held: bool, verdict: str, mend: str
) -> None:
    """A failed restore waits for a person; what is under way is none of the doctor's business."""
    left = OpenDeployment(
        deployment_id="d1",
        workflow_id="w1",
        container_name="web",
        image_tag="v2",
        state=state,
        is_held=is_held,
        updated_at=NOW - timedelta(minutes=age_minutes),
    )
    check = host("deployment web:v2", report=reported(open_deployments=[left]))
    assert check.verdict == verdict
    assert mend in check.mend


@pytest.mark.parametrize(("age_minutes", "verdict"), [(14, "pass"), (16, "warn")])
def test_a_workflow_that_stays_open_is_warned_of(age_minutes: int, verdict: str) -> None:
    """With what ends it by the host's word."""
    left = OpenWorkflow("w1", "web", "v2", "host-b", "DEPLOYING", NOW - timedelta(minutes=age_minutes))
    check = host("workflow web:v2", open_workflows=(left,))
    assert (check.verdict, "reconcile/default" in check.mend) == (verdict, verdict == "warn")


def test_pool_workers_and_prefect_deployments_are_told_with_their_commands() -> None:
    """For a host and for the control side by the same rules."""
    paused = replace(
        PLACE, pool=Pool("host-b", is_paused=True, workers_online=0), missing=("receive-container/b",)
    )
    assert host("work pool", place=paused).mend == "prefect work-pool resume host-b"
    assert host("worker", place=paused).mend == "prefect worker start --pool host-b --type process"
    assert "receive-container/b" in host("Prefect deployments", place=paused).found
    gone = PlaceInPrefect("control", None, ("deploy-container/default",))
    assert control("work pool", place=gone).mend == "python -m deployments.register --control"
    assert control("Prefect deployments", place=gone).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("name", "found", "verdict", "named"),
    [
        ("Prefect server", {"prefect": Prefect(problem="refused")}, "fail", "prefect server start"),
        ("Prefect server", {"prefect": Prefect("3.9.0", "3.8.8")}, "warn", "prefect==3.9.0"),
        (
            "build engine",
            {"build_engine": BuildEngine("unix:///x", problem="gone")},
            "fail",
            "systemctl start docker",
        ),
        ("records", {"records": RecordsFound("pg", problem="refused")}, "fail", "DATABASE_URL"),
        ("records", {"records": RecordsFound("pg", "0001", "0002")}, "warn", "reconcile/default"),
        ("records", {"records": RecordsFound("pg", None, "0002")}, "pass", ""),
        ("event broker", {"broker": BrokerFound("k:1", problem="away")}, "warn", "--broker k:1"),
    ],
)
def test_each_part_of_the_control_side_is_told(
    name: str, found: dict[str, Any], verdict: str, named: str
) -> None:
    """A broker that is away costs nothing but time; the others are needed."""
    check = control(name, **found)
    assert check.verdict == verdict
    assert named in check.mend


def test_without_a_broker_none_is_judged() -> None:
    """It is an option."""
    assert "event broker" not in {check.name for check in judge_control(replace(CONTROL, broker=None)).checks}


def test_a_host_that_cannot_be_examined_fails_as_a_whole() -> None:
    """With the cause."""
    diagnosis = judge_host(HostLost("host-x", "no key"))
    assert has_failed([diagnosis])
    assert diagnosis.checks[0].found == "no key"
    assert "register --host host-x" in diagnosis.checks[0].mend
    without = judge_host(HostLost("host-x", "no server", needs_prefect=True))
    assert "mend the Prefect server" in without.checks[0].mend


def test_diagnoses_are_shown_as_rows_as_text_and_in_a_line() -> None:
    """Whatever is not passed stands with its command in each of them."""
    diagnosis = judge_host(replace(HOST, clock_offset_seconds=-301.0))
    row = next(row for row in rows_of([diagnosis]) if row["check"] == "clock")
    assert (row["subject"], row["verdict"]) == ("host-b", "fail")
    assert f"-> {row['mend']}" in render(diagnosis)
    assert summary([diagnosis]).endswith(f"host-b: clock: {row['found']} -> {row['mend']}")
    assert "1 fail" in summary([diagnosis])
