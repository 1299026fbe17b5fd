"""Service files: the committed ones are right, and each mistake is named with file, line and field."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from yaml import safe_load

from deployments import service_command, service_yaml
from deployments.service_files import PARAMETERS, ServiceFile
from deployments.service_folder import FOLDER, ServicesRefused, read_folder
from tasks.parameters import DeploymentParameters

PROJECT = Path(__file__).resolve().parents[2]
CONTEXT = "deployments/examples/hello"
GOOD = f"""\
# yaml-language-server: $schema=schema.json
host: host-b
image:
  build_context: {CONTEXT}
configuration:
  port_mappings:
    - host_port: 8080
      container_port: 80
"""


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a person types, and where build contexts start."""
    monkeypatch.chdir(PROJECT)


def mistakes(folder: Path, text: str, name: str = "web.yaml") -> list[str]:
    """What is said of one file, without its path."""
    (folder / name).write_text(text)
    try:
        read_folder(folder)
    except ServicesRefused as exc:
        return [str(mistake).removeprefix(f"{folder / name}:") for mistake in exc.mistakes]
    return []


def test_the_committed_schema_is_that_of_the_model() -> None:
    """`python -m deployments.service_files schema` writes it."""
    assert (PROJECT / FOLDER / "schema.json").read_text() == service_command.schema_text()


@pytest.mark.parametrize("path", sorted((PROJECT / FOLDER).glob("*.yaml")), ids=lambda path: path.stem)
def test_editors_find_the_schema_and_it_fits(path: Path) -> None:
    """Each file names the schema in its first line, and is valid by it."""
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    schema = json.loads((PROJECT / FOLDER / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert not list(jsonschema.Draft202012Validator(schema).iter_errors(safe_load(text)))


@pytest.mark.parametrize("text", ["image: {}", "{host: a, hosts: [b]}", "{host: a, hots: b}"])
def test_the_schema_refuses_what_the_model_refuses(text: str) -> None:
    """No host, two kinds of host, a misspelt key."""
    schema = json.loads((PROJECT / FOLDER / "schema.json").read_text())
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(safe_load(text)))


def test_the_examples_of_the_specification_are_there() -> None:
    """Four services, each under its name and port."""
    found = {service.name: service for service in read_folder()}
    ports = {"orchestrator": 8060, "reducer": 8061, "metadata-stamping": 8057, "onextree": 8058}
    for name, port in ports.items():
        parameters = DeploymentParameters(**found[name].file.parameters(name, "host-b"))
        assert parameters.container_name == f"omninode-{name}"
        assert parameters.image_tag == "v1.2.0"
        assert [mapping.host_port for mapping in parameters.deployment_config.port_mappings] == [port]
        assert parameters.build_options.build_args["PORT"] == str(port)


def test_a_file_gives_what_it_says_and_no_more(tmp_path: Path) -> None:
    """The rest stays with the defaults of `deploy-container`; the container has the file's name."""
    assert mistakes(tmp_path, GOOD) == []
    (service,) = read_folder(tmp_path)
    assert service.targets == {"web": "host-b"}
    assert service.file.parameters("web", "host-b") == {
        "container_name": "web",
        "remote_host": "host-b",
        "build_options": {"build_context": CONTEXT},
        "deployment_config": {"port_mappings": [{"host_port": 8080, "container_port": 80}]},
    }


def test_every_parameter_can_be_given_in_a_file() -> None:
    """A parameter that is added to the flow needs a key here."""
    assert {*PARAMETERS.values(), "image_tag"} == set(DeploymentParameters.model_fields)
    assert set(PARAMETERS) < set(ServiceFile.model_fields)


def test_several_hosts_get_a_prefect_deployment_each(tmp_path: Path) -> None:
    """One host keeps the plain name, however it is given."""
    assert mistakes(tmp_path, GOOD.replace("host: host-b", "hosts: [host-a, host-b]")) == []
    assert read_folder(tmp_path)[0].targets == {"web-host-a": "host-a", "web-host-b": "host-b"}
    assert mistakes(tmp_path, GOOD.replace("host: host-b", "hosts: [host-a]")) == []
    assert read_folder(tmp_path)[0].targets == {"web": "host-a"}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("host_port: 8080", "host_port: 80800", r"7: configuration.port_mappings\[0\].host_port: .* 65535"),
        ("container_port: 80", "contianer_port: 80", r"8: .*contianer_port: .* it is called container_port"),
        ("host: host-b", "remote_host: host-b", r"2: remote_host: .* it is called host here"),
        ("host: host-b", "image_tag: v1", r"2: image_tag: .* it is called image.tag here"),
        ("host: host-b", "colour: red", r"2: colour: .* take it away, or use one of description, container,"),
        ("host: host-b", "host: http://b", r"2: host: .* without 'http://'"),
        ("host: host-b", "hosts: [a, b, a]", r"2: hosts: 'a' is named twice"),
        ("host: host-b", "hosts: a", r"2: hosts: .*write a list"),
        ("host: host-b", "host: a\nhosts: [b]", r"3: hosts: host is given too"),
        ("host: host-b\n", "", r"2: host: nothing says where to deploy"),
        ("host: host-b", "host: a\ntags:", r"3: tags: there is no value"),
        ("host: host-b", "host: a\nschedule:\n  cron: 5 past", r"4: schedule.cron: .*'0 4 \* \* 1-5'"),
        ("host: host-b", "host: a\nschedule: {timezone: Mars}", r"3: schedule: give cron or interval_sec"),
        (
            "host: host-b",
            "host: a\nschedule:\n  cron: '* * * * *'\n  timezone: Mars/Base",
            r"5: schedule.timezone: .*'Europe/Berlin'",
        ),
        ("host: host-b", "host: a\nconcurrency: {limit: 0}", r"3: concurrency.limit: .*greater than"),
        ("image:", "image:\n  tag: 1.3", r"4: image.tag: .*put the value in quotes"),
        ("image:", "image:\n  build_args:\n    PORT: 80", r"5: image.build_args.PORT: .*in quotes"),
        ("image:", "image:\n  build_args:\n    80: PORT", r"5: image.build_args\[80\]: this key is no text"),
        (CONTEXT, "nowhere", r"4: image.build_context: 'nowhere' is no folder .* give the folder"),
        (CONTEXT, "tests", r"3: image.dockerfile_path: there is no 'Dockerfile' in .*/tests"),
        (
            "      container_port: 80",
            "      container_port: 80\n      host_port: 9",
            r"9: .*host_port: .*second",
        ),
        (
            "      container_port: 80",
            "      container_port: 80\n    - {host_port: 8080, container_port: 81}",
            r"6: configuration.port_mappings: host_port 8080/tcp is named twice",
        ),
        ("configuration:", "configuration:\n  labels: {gantry.x: y}", r"6: configuration.labels: 'gantry.x'"),
        (
            "configuration:",
            "configuration:\n  - a\nother:",
            r"5: configuration: give it by keys: environment",
        ),
        ("host: host-b", "host: 'b", r"\d+: YAML: .*quoted scalar"),
        ("host: host-b", "host: *b", r"2: YAML: .*undefined alias"),
        ("host: host-b", "host: b\n\tx: 1", r"3: YAML: .*"),
        ("host: host-b", "host: b\n? [a]\n: 1", r"3: YAML: .*unhashable"),
        ("host: host-b", "host: 2025-13-45", r"1: YAML: month must be"),
    ],
)
def test_a_mistake_is_named_with_line_and_field(tmp_path: Path, before: str, after: str, said: str) -> None:
    """And with what to do about it."""
    found = mistakes(tmp_path, GOOD.replace(before, after, 1))
    assert any(re.match(said, line) for line in found), found


def test_all_mistakes_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    """Nobody has to run it once for each mistake."""
    (tmp_path / "api.yaml").write_text("host: a/b\nimage: {build_context: tests, tag: 'a:b'}\n")
    found = mistakes(tmp_path, "- a list\n")
    assert [line.partition(": ")[0] for line in found if str(tmp_path) in line] == [
        f"{tmp_path / 'api.yaml'}:1",
        f"{tmp_path / 'api.yaml'}:2",
    ]
    assert any(line.startswith("1: the file: give it by keys:") for line in found)


def test_a_value_that_is_refused_is_not_shown(tmp_path: Path) -> None:
    """It may be a secret that somebody forgot to quote."""
    config = "configuration:\n  environment_variables: {PIN: 918273}"
    (said,) = mistakes(tmp_path, GOOD.replace("configuration:", config))
    assert "environment_variables.PIN" in said
    assert "918273" not in said


def test_what_a_merge_brings_in_is_found_where_it_is_written(tmp_path: Path) -> None:
    """Anchors and merge keys work, and are no keys that stand twice."""
    merged = "    - &one {host_port: 80, container_port: 80}\n    - {<<: *one, host_port: 81}\n"
    start = GOOD.partition("    - host_port")[0]
    assert mistakes(tmp_path, start + merged) == []
    (said,) = mistakes(tmp_path, start + merged.replace("container_port: 80", "container_port: 0"))[-1:]
    assert said.startswith("7: configuration.port_mappings[1].container_port")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("default.yaml", "deploy-container/default is that of prefect.yaml already; rename this file"),
        ("api.yml", "deploy-container/api is that of"),
        ("web-host-a.yaml", "deploy-container/web-host-a is that of"),
        ("Web.yaml", "use at most 63 lower-case letters"),
    ],
)
def test_two_services_of_one_prefect_name_are_refused(tmp_path: Path, name: str, said: str) -> None:
    """Else the one that is read last would silently replace the other."""
    (tmp_path / "api.yaml").write_text(GOOD)
    (tmp_path / "web.yaml").write_text(GOOD.replace("host: host-b", "hosts: [host-a, host-b]"))
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(ServicesRefused) as refused:
        read_folder(tmp_path)
    (mistake,) = refused.value.mistakes
    assert mistake.field == "file name"
    assert said in mistake.problem


def test_the_command_says_what_is_wrong_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make check-services` fails on it; a right folder is listed; other files are left alone."""
    folder = shutil.copytree(PROJECT / FOLDER, tmp_path / "services")
    (folder / ".#draft.yaml").write_text("no: service")
    assert service_command.main(["check", "--folder", str(folder)]) == 0
    assert f"{folder}/reducer.yaml: deploy-container/reducer to host-b" in capsys.readouterr().out
    (folder / "wrong.yaml").write_text("host: b\ncontianer: web\n")
    assert service_command.main(["check", "--folder", str(folder)]) == 1
    assert f"{folder}/wrong.yaml:2: contianer:" in capsys.readouterr().out
    assert service_command.main(["check", "--folder", str(tmp_path / "none")]) == 1
    assert "there is no such folder" in capsys.readouterr().out


def test_an_anchor_inside_itself_is_refused() -> None:
    """The one kind of YAML that would never end."""
    document = service_yaml.read(b"a: &x\n  b: *x\n")
    assert document.line_of(("a", "b", "b")) == 2
    assert document.repeated == []


def test_intervals_count_from_a_fixed_time() -> None:
    """Registering again must not put off the next run."""
    file = ServiceFile.model_validate({"host": "a", "schedule": {"interval_seconds": 3600}})
    assert file.schedule is not None
    assert file.schedule.for_prefect() == file.schedule.for_prefect()
