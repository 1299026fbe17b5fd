"""The layout of DESIGN section 2: imports point one way, and Prefect can load every entrypoint."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("deployments", "flows", "tasks", "blocks", "receiver")
WIRE = {
    *("receiver.contract", "receiver.signing", "receiver.archive"),
    *("receiver.engine_store", "receiver.engine_version"),
}
HOST_SIDE = {
    *("tasks/hosting.py", "tasks/execute.py", "tasks/validate.py", "tasks/restore.py"),
    "tasks/rolling.py",
}
FOREIGN_TO_THE_RECEIVER = {"prefect", "prefect_docker", "aiokafka", "sqlalchemy", "asyncpg", "aiosqlite"}
FOREIGN_TO_FLOWS = {"sqlalchemy", "httpx", "docker", "sqlite3", "asyncpg", "aiokafka", "requests"}
HOST_ENTRYPOINTS = ("flows.receive.receive_container", "flows.restore.restore_container")


def modules(package: str) -> Iterator[Path]:
    """Python files of a package."""
    return (PROJECT / package).rglob("*.py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` as both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def ours(names: set[str]) -> set[str]:
    """Those of the names that are packages of ours, by their first part."""
    return {name for name in names if name.partition(".")[0] in PACKAGES}


def outside_the_wire(names: set[str]) -> set[str]:
    """Imports of the receiver beyond what both sides share."""
    return {
        name
        for name in names
        if name.startswith("receiver.") and not any(name == w or name.startswith(f"{w}.") for w in WIRE)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_to_the_right_only(package: str) -> None:
    """deployments -> flows -> tasks -> blocks -> receiver, never back."""
    allowed = set(PACKAGES[PACKAGES.index(package) :])
    for path in modules(package):
        backwards = {name for name in ours(imports(path)) if name.partition(".")[0] not in allowed}
        assert not backwards, f"{path.relative_to(PROJECT)} imports {backwards}"


@pytest.mark.parametrize("package", ["flows", "tasks", "blocks"])
def test_only_host_side_tasks_know_the_daemon(package: str) -> None:
    """The sender shares the wire with the receiver, and nothing else."""
    for path in modules(package):
        name = str(path.relative_to(PROJECT))
        if name not in HOST_SIDE:
            assert not outside_the_wire(imports(path)), name


def test_the_receiver_knows_nothing_of_prefect_kafka_or_async_sql() -> None:
    """A host without Prefect runs the daemon."""
    for path in modules("receiver"):
        found = {name.partition(".")[0] for name in imports(path)} & FOREIGN_TO_THE_RECEIVER
        assert not found, f"{path.relative_to(PROJECT)} imports {found}"


def test_importing_the_daemon_loads_no_prefect() -> None:
    """Not by a detour either."""
    code = "import receiver.app, sys; sys.exit('prefect' in sys.modules or 'sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


def test_flows_hold_no_sql_http_or_docker() -> None:
    """A newcomer can read a flow aloud."""
    for path in modules("flows"):
        found = {name.partition(".")[0] for name in imports(path)} & FOREIGN_TO_FLOWS
        assert not found, f"{path.relative_to(PROJECT)} imports {found}"


def test_top_level_holds_only_what_was_agreed() -> None:
    """No other package, no other file beside those that the project names."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    top = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    assert top <= {
        *PACKAGES,
        *("tests", "pyproject.toml", "prefect.yaml", "README.md", "Makefile", "LICENSE"),
        *("CHANGELOG.md", "constraints.txt"),
    }


def entrypoints() -> list[str]:
    """What `prefect.yaml` names, and what hosts are registered with."""
    written = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    return sorted({*(found["entrypoint"] for found in written), *HOST_ENTRYPOINTS})


@pytest.mark.parametrize("entrypoint", entrypoints())
def test_prefect_loads_every_entrypoint_by_module_path(entrypoint: str) -> None:
    """`prefect deploy` reports success for a broken entrypoint too, so it is loaded for real here."""
    assert ":" not in entrypoint
    flow: Flow[..., object] = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    assert flow.name
