"""Planning a fleet: batches, canary, budget, what a resumed one leaves out, and where a rollback goes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from receiver.contract import ContainerVersion, ErrorCode
from tasks import fleet_back, fleet_board, fleet_plan, fleet_report, fleet_services, fleet_start
from tasks.errors import ParametersRefused
from tasks.fleet_board import Board, Cell, Place
from tasks.fleet_plan import FleetParameters, OnUnreachable, Unit
from tasks.fleet_services import Registered
from tasks.parameters import DeploymentParameters
from tasks.states import WorkflowRecord, WorkflowState

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
HOSTS = st.integers(1, 60).map(lambda number: [f"host-{n}" for n in range(number)])
SIZES = st.integers(1, 80) | st.integers(1, 100).map(lambda share: f"{share}%")


def unit(host: str = "host-a", service: str = "web", tag: str = "v2") -> Unit:
    """One service on one host."""
    parameters = DeploymentParameters(container_name=service, remote_host=host, image_tag=tag)
    return Unit(service, host, parameters)


def record(**fields: Any) -> WorkflowRecord:
    """A completed workflow of `web:v2` on host-a; fields replace."""
    known: dict[str, Any] = {
        "workflow_id": "w1",
        "correlation_id": "fleet",
        "container_name": "web",
        "image_tag": "v2",
        "remote_host": "host-a",
        "remote_port": 8001,
        "current_state": WorkflowState.COMPLETED,
        "created_at": NOW,
        "updated_at": NOW,
        "success": True,
        "deployment_id": "d-1",
    }
    return WorkflowRecord(**known | fields)


def version(deployment_id: str, role: Literal["running", "kept"] = "kept", **fields: Any) -> ContainerVersion:
    """A version that a host tells of."""
    known: dict[str, Any] = {
        "deployment_id": deployment_id,
        "image_tag": "v1",
        "image_id": "sha256:" + "a" * 64,
        "created_at": NOW,
        "running": role == "running",
        "role": role,
        "can_be_restored": True,
    }
    return ContainerVersion(**known | fields)


def board(*cells: tuple[str, Cell], canary: str | None = None) -> Board:
    """A board of one service."""
    return Board("f-1", [Place(unit(host), cell) for host, cell in cells], canary)


@given(HOSTS, SIZES, st.booleans())
def test_each_host_is_in_one_batch_and_none_is_larger_than_asked(
    hosts: list[str], size: int | str, with_canary: bool
) -> None:
    """The canary stands alone and first, the others keep their order, whatever the numbers."""
    canary = fleet_plan.choose_canary(with_canary, hosts)
    found = fleet_plan.batches(hosts, canary, size)
    assert [host for batch in found for host in batch] == hosts
    assert max(map(len, found)) <= max(1, fleet_plan.hosts_at_once(size, len(hosts)))
    if with_canary and len(hosts) > 1:
        assert found[0] == hosts[:1]


@given(HOSTS, st.data())
def test_a_named_canary_goes_first_wherever_it_stands(hosts: list[str], data: st.DataObject) -> None:
    """No host is lost or doubled by it."""
    canary = data.draw(st.sampled_from(hosts))
    found = fleet_plan.batches(hosts, fleet_plan.choose_canary(canary, hosts), "100%")
    assert found[0] == [canary]
    assert sorted(host for batch in found for host in batch) == sorted(hosts)


@given(st.lists(st.sampled_from(list(Cell)), min_size=1, max_size=30), st.integers(0, 30))
def test_it_stops_when_more_hosts_failed_than_the_budget_allows(cells: list[Cell], allowed: int) -> None:
    """And neither sooner nor later, without a canary."""
    found = board(*((f"host-{n}", cell) for n, cell in enumerate(cells)))
    failed = cells.count(Cell.FAILED)
    assert bool(fleet_board.why_stop(found, allowed, count_unreachable=False)) is (failed > allowed)
    failed += cells.count(Cell.UNREACHABLE)
    assert bool(fleet_board.why_stop(found, allowed, count_unreachable=True)) is (failed > allowed)


@pytest.mark.parametrize("cell", [Cell.FAILED, Cell.UNREACHABLE])
def test_a_failed_canary_stops_whatever_the_budget(cell: Cell) -> None:
    """It is what the canary is for."""
    found = board(("host-a", cell), ("host-b", Cell.WAITING), canary="host-a")
    assert fleet_board.why_stop(found, 100, count_unreachable=False) == "the canary host-a failed"


def test_a_host_counts_once_however_many_of_its_services_failed() -> None:
    """The budget is one of hosts."""
    found = board(("host-a", Cell.FAILED), ("host-a", Cell.FAILED), ("host-b", Cell.DEPLOYED))
    assert not fleet_board.why_stop(found, 1, count_unreachable=True)
    assert "1 host failed (host-a), allowed are 0" in fleet_board.why_stop(found, 0, count_unreachable=True)


HISTORY = st.lists(st.sampled_from(["deployed", "failed", "back", "back-failed"]), max_size=6)


def told(number: int, what: str) -> WorkflowRecord:
    """A workflow of the fleet as the records would have it."""
    success = what in {"deployed", "back"}
    state = WorkflowState.COMPLETED if success else WorkflowState.ROLLBACK_COMPLETED
    request = {fleet_board.ROLLBACK_MARK: "d-0"} if what.startswith("back") else {}
    at = NOW + timedelta(seconds=number)
    return record(
        workflow_id=f"w{number}", created_at=at, success=success, current_state=state, request=request
    )


@given(HISTORY)
def test_a_resumed_fleet_leaves_out_just_what_it_brought_and_did_not_take_back(history: list[str]) -> None:
    """By the last workflow that changed something; a failed rollback changed nothing."""
    records = [told(number, what) for number, what in enumerate(history)]
    last = next((what for what in reversed(history) if what != "back-failed"), None)
    is_done = fleet_board.is_deployed(unit(), fleet_board.newest(records))
    assert is_done is (last == "deployed")


def test_another_tag_is_not_what_was_deployed() -> None:
    """A service file may have changed before the fleet is resumed."""
    assert not fleet_board.is_deployed(unit(tag="v3"), fleet_board.newest([record()]))


def test_a_rollback_goes_to_the_newest_version_from_before_the_fleet() -> None:
    """Versions that the fleet itself made are passed over, and those that cannot be restored."""
    versions = [
        version("d-3", "running"),
        version("d-1"),
        version("lost", can_be_restored=False),
        version("before"),
        version("older"),
    ]
    assert fleet_back.target(versions, "d-3", {"d-1", "d-3"}).deployment_id == "before"


@pytest.mark.parametrize(
    ("versions", "why"),
    [
        ([version("other", "running"), version("d-1")], "not the fleet's"),
        ([version("d-1")], "nothing runs"),
        ([version("d-1", "running")], "no version from before"),
    ],
)
def test_what_is_not_the_fleet_s_to_take_back_is_left(versions: list[ContainerVersion], why: str) -> None:
    """Somebody deployed since; nothing runs; nothing ran before."""
    with pytest.raises(fleet_back.NothingToGoBackTo, match=why):
        fleet_back.target(versions, "d-1", {"d-1"})


def test_a_run_that_ended_is_judged_by_the_records_and_not_by_prefect() -> None:
    """A crashed run whose host kept the new container is deployed; an unfinished record is a failure."""
    assert fleet_board.deployed_cell(record(deployed_url="http://a"), "Crashed")[0] is Cell.DEPLOYED
    unfinished = record(current_state=WorkflowState.DEPLOYING, success=None)
    assert fleet_board.deployed_cell(unfinished, "the host is silent") == (Cell.FAILED, "the host is silent")
    assert fleet_board.deployed_cell(None, "refused") == (Cell.FAILED, "refused")
    failed = record(
        current_state=WorkflowState.FAILED,
        success=False,
        deployment_id=None,
        error_code=ErrorCode.REMOTE_ENDPOINT_UNREACHABLE,
    )
    assert fleet_board.deployed_cell(failed, "")[0] is Cell.UNREACHABLE
    touched = replace(failed, deployment_id="d-1")
    assert fleet_board.deployed_cell(touched, "")[0] is Cell.FAILED
    assert fleet_board.rolled_back_cell(record(), "")[0] is Cell.ROLLED_BACK
    assert fleet_board.rolled_back_cell(failed, "")[0] is Cell.NOT_ROLLED_BACK


def test_the_summary_is_a_matrix_with_reasons_and_next_steps() -> None:
    """Hosts down, services across; an empty cell where a service is not for a host."""
    places = [
        Place(unit("host-a"), Cell.DEPLOYED, run_id="r1", seconds=3.2),
        Place(unit("host-b"), Cell.FAILED, "HEALTH_CHECK_FAILED: a | b"),
        Place(unit("host-b", "api"), Cell.WAITING),
    ]
    text = fleet_report.render(Board("f-1", places, "host-a", "too many"), lambda run: f"/runs/{run}")
    assert "| host | web | api |" in text
    assert "| host-a (canary) | [deployed](/runs/r1), 3.2 s |  |" in text
    assert "| host-b | failed | waiting |" in text
    assert "- web:v2 on host-b failed: HEALTH_CHECK_FAILED: a \\| b" in text
    assert "deploy-fleet/default --watch --param resume=f-1" in text
    assert text.startswith("**1 waiting, 1 deployed, 1 failed; stopped: too many**")


# -- what is refused before anything begins ------------------------------------------------------

KNOWN = [
    Registered("hello", {"container_name": "hello", "remote_host": "host-a"}),
    Registered("hello-broken", {"container_name": "hello", "remote_host": "host-a"}),
    Registered("web-host-a", {"container_name": "web", "remote_host": "host-a", "image_tag": "v1"}),
    Registered("web-host-b", {"container_name": "web", "remote_host": "host-b", "image_tag": "v1"}),
]
SAVED = ["host-a", "host-b", "host-c"]


@pytest.fixture(autouse=True)
def _context(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("context")
    (folder / "Dockerfile").write_text("FROM scratch\n")
    monkeypatch.chdir(folder)


def units(**asked: Any) -> list[Unit]:
    """What a fleet that is asked for so consists of."""
    return fleet_services.units_of(FleetParameters.model_validate(asked), KNOWN, SAVED)


def test_a_service_goes_to_the_hosts_of_its_file_or_to_those_that_are_given() -> None:
    """Tags: of the file, of the fleet, or of the service's own word, which wins."""
    assert [(one.host, one.image) for one in units(services=["web"])] == [
        ("host-a", "web:v1"),
        ("host-b", "web:v1"),
    ]
    assert [(one.host, one.image) for one in units(services=["hello", "web:v3"], image_tag="v2")] == [
        ("host-a", "hello:v2"),
        ("host-a", "web:v3"),
        ("host-b", "web:v3"),
    ]
    assert [one.host for one in units(services=["hello"], hosts=["host-c", "host-b"])] == ["host-c", "host-b"]


@pytest.mark.parametrize(
    ("asked", "field", "fix"),
    [
        ({}, "services", "name one or more"),
        ({"services": ["helo"]}, "services", "use one of hello"),
        ({"services": ["hello"], "hosts": ["host-x"]}, "hosts", "deployments.register --host host-x"),
        ({"services": ["hello", "hello-broken"]}, "services", "take one of them away"),
        ({"services": ["default"]}, "services", "prefect deploy --all"),
    ],
)
def test_what_does_not_fit_is_refused_with_field_and_fix(asked: dict[str, Any], field: str, fix: str) -> None:
    """Unknown services and hosts, and two services that are one container."""
    with pytest.raises(ParametersRefused, match=field) as refused:
        units(**asked)
    assert refused.value.field == field
    assert fix in refused.value.fix


def test_a_build_context_that_is_gone_is_told_before_anything_begins() -> None:
    """With the service that it belongs to."""
    known = [Registered("hello", dict(KNOWN[0].parameters), "/nowhere")]
    with pytest.raises(ParametersRefused, match=r"services: hello: build_options.build_context"):
        fleet_services.units_of(FleetParameters(services=["hello"]), known, SAVED)


@pytest.mark.parametrize(
    "asked",
    [
        {"batch_size": "0%"},
        {"batch_size": "101%"},
        {"batch_size": "a third"},
        {"batch_size": 0},
        {"batch_size": "2.5"},
        {"max_failures": -1},
        {"pause_seconds": -1},
        {"on_stop": "undo"},
        {"on_unreachable": "wait"},
        {"hosts": ["host-a", "host-a"]},
        {"services": ["web:v1", "web:v2"]},
        {"services": ["web:"]},
        {"services": ["Web Server"]},
        {"canary": "http://host-a"},
    ],
)
def test_wrong_values_are_refused(asked: dict[str, Any]) -> None:
    """Each by its own field."""
    with pytest.raises(ValidationError, match=next(iter(asked))):
        FleetParameters.model_validate(asked)


def test_hosts_that_cannot_be_deployed_to_refuse_the_fleet_or_are_left_out() -> None:
    """All of them are named, each with its cause."""
    missing = {"host-b": "no answer", "host-c": "another key"}
    with pytest.raises(ParametersRefused, match="host-b: no answer; host-c: another key") as refused:
        fleet_start.check_reachable(missing, OnUnreachable.FAIL)
    assert "on_unreachable=skip" in refused.value.fix
    fleet_start.check_reachable(missing, OnUnreachable.SKIP)


def test_a_canary_has_to_be_a_host_that_answers() -> None:
    """Unless the choice is left to the fleet: then the first host that answers is taken."""
    hosts = ["host-a", "host-b", "host-c"]
    assert fleet_plan.choose_canary(True, hosts, {"host-a"}) == "host-b"  # noqa: FBT003 - as a person gives it
    assert fleet_plan.choose_canary(False, hosts) is None  # noqa: FBT003 - as a person gives it
    for canary, missing in (("host-x", ()), ("host-b", ("host-b",))):
        with pytest.raises(ParametersRefused, match="canary"):
            fleet_plan.choose_canary(canary, hosts, missing)
