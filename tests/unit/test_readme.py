"""The README says what the code does."""

from __future__ import annotations

import re

import yaml

from deployments.service_files import ServiceFile
from deployments.setup_automations import definitions
from flows.fleet import deploy_fleet
from flows.provision import provision_host
from receiver.contract import ErrorCode
from receiver.settings import VARIABLES
from tasks.fleet_plan import FleetParameters
from tasks.parameters import BuildOptions, DeploymentParameters
from tasks.prefect_events import NAMES, ROLLBACK_FAILED
from tasks.provisioning import ProvisionParameters
from tasks.states import TRIGGERS, WorkflowState
from tests import readme
from tests.bench import __main__ as bench
from tests.faults import __main__ as faults

PROJECT = readme.PROJECT
README = readme.README.read_text()


def table_after(heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its two header rows."""
    _, _, rest = README.partition(heading)
    rows = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert rows, f"no table after {heading!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[0].splitlines()[2:]]


def test_the_state_diagram_is_the_table() -> None:
    """Every transition with its trigger, and no other."""
    drawn = re.findall(r"^    (\w+) --> (\w+): (\w+)$", README, re.MULTILINE)
    assert {(WorkflowState(a), WorkflowState(b)): trigger for a, b, trigger in drawn} == dict(TRIGGERS)


def test_the_receiver_s_variables_are_the_documented_ones() -> None:
    """Name, default and meaning."""
    documented = {
        name.strip("`"): (default.strip("`"), meaning)
        for name, default, meaning in table_after("### Environment of the receiver")
    }
    assert documented == dict(VARIABLES)


def test_the_control_host_s_variables_are_read_somewhere() -> None:
    """A documented variable is one that the code, or Prefect, reads."""
    source = "".join(
        path.read_text()
        for folder in ("blocks", "tasks", "deployments")
        for path in (PROJECT / folder).rglob("*.py")
    )
    for name, *_ in table_after("### Environment of the control host"):
        bare = name.strip("`")
        assert bare.startswith("PREFECT_") or f'"{bare}"' in source, bare


def test_the_parameters_are_the_documented_ones() -> None:
    """Every parameter of `deploy-container`, and every build option."""
    rows = table_after("## Deploying a service")
    assert [row[0].strip("`") for row in rows] == list(DeploymentParameters.model_fields)
    options = next(row[2] for row in rows if row[0] == "`build_options`")
    assert re.findall(r"`(\w+)`", options) == list(BuildOptions.model_fields)


def test_the_keys_of_service_files_are_the_documented_ones() -> None:
    """Each key, in the order of the model."""
    assert [row[0].strip("`") for row in table_after("### Service files")] == list(ServiceFile.model_fields)


def test_the_parameters_of_a_new_host_are_the_documented_ones() -> None:
    """Every parameter of `provision-host`."""
    rows = table_after("## A second host")
    assert [row[0].strip("`") for row in rows] == list(ProvisionParameters.model_fields)
    assert list(provision_host.parameters.properties) == list(ProvisionParameters.model_fields)


def test_the_parameters_of_a_fleet_are_the_documented_ones() -> None:
    """Every parameter of `deploy-fleet`; `resume` stands by itself."""
    rows = table_after("### Many hosts at once")
    assert [row[0].strip("`") for row in rows] == list(FleetParameters.model_fields)
    assert list(deploy_fleet.parameters.properties) == [*FleetParameters.model_fields, "resume"]


def test_the_error_codes_are_the_documented_ones() -> None:
    """All seven, each with what follows."""
    assert {row[0].strip("`") for row in table_after("shows its report")} == {*ErrorCode}


def test_the_automations_are_the_documented_ones() -> None:
    """Each file of the folder, by its name."""
    assert {row[0].strip("`") for row in table_after("**Automations**")} == {
        one.name for one in definitions()
    }


def test_the_prefect_events_are_the_documented_ones() -> None:
    """Each name that a change of state is told under."""
    assert {row[0].strip("`") for row in table_after("**Prefect events.**")} == {
        *NAMES.values(),
        ROLLBACK_FAILED,
    }


def test_every_link_into_the_repository_leads_somewhere() -> None:
    """Files are there; a test that is named is in its file."""
    for text, target in re.findall(r"\[`?([^\]`]+)`?\]\(([^)#]+)\)", README):
        path = PROJECT / target
        assert path.exists(), target
        if text.startswith("test_"):
            assert f"def {text}(" in path.read_text(), text


def test_the_summary_of_the_faults_is_that_of_their_results() -> None:
    """As `python -m tests.faults readme` writes it."""
    assert readme.marked(faults.README_PART, faults.summary(faults.RESULTS)) in README


def test_the_measurements_are_those_that_are_kept() -> None:
    """As `python -m tests.bench readme` writes them."""
    assert bench.measured()
    for name in bench.measured():
        assert readme.marked(f"bench {name}", bench.kept(name)) in README


def test_the_service_file_of_the_readme_is_right() -> None:
    """Word for word."""
    example = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert example
    assert ServiceFile.model_validate(yaml.safe_load(example[1])).schedule
