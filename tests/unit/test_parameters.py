"""The parameters of a deployment: the specification's defaults, and refusals that name field and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.errors import ParametersRefused
from tasks.parameters import BuildOptions, DeploymentParameters, check_paths, default_timeout_ms

LEAST = {"container_name": "web", "remote_host": "host-a"}
QUICK_START: dict[str, Any] = {
    "container_name": "omninode-orchestrator",
    "image_tag": "latest",
    "remote_host": "192.168.86.200",
    "remote_port": 8001,
    "deployment_config": {
        "environment_variables": {
            "POSTGRES_HOST": "192.168.86.200",
            "KAFKA_BOOTSTRAP_SERVERS": "192.168.86.200:29092",
        },
        "port_mappings": [{"host_port": 8060, "container_port": 8060}],
        "restart_policy": "unless-stopped",
        "network_mode": "bridge",
    },
    "build_options": {"dockerfile_path": "Dockerfile", "build_context": ".", "no_cache": False},
    "health_check_config": {
        "health_endpoint": "/health",
        "expected_status_code": 200,
        "max_retries": 5,
        "retry_interval_ms": 2000,
    },
    "rollback_on_failure": True,
}
EXAMPLE_1: dict[str, Any] = {
    "container_name": "omninode-orchestrator",
    "image_tag": "v1.2.0",
    "remote_host": "192.168.86.200",
    "remote_port": 8001,
    "deployment_config": {
        "environment_variables": {
            "POSTGRES_HOST": "192.168.86.200",
            "POSTGRES_PORT": "5436",
            "POSTGRES_DATABASE": "omninode_bridge",
            "KAFKA_BOOTSTRAP_SERVERS": "192.168.86.200:29092",
            "CONSUL_HOST": "192.168.86.200",
            "LOG_LEVEL": "INFO",
        },
        "port_mappings": [{"host_port": 8060, "container_port": 8060}],
        "volumes": [{"host_path": "/data/orchestrator", "container_path": "/app/data"}],
        "restart_policy": "unless-stopped",
        "network_mode": "bridge",
    },
    "build_options": {
        "dockerfile_path": "Dockerfile",
        "build_context": ".",
        "build_args": {"VERSION": "1.2.0", "BUILD_DATE": "2025-10-25"},
        "no_cache": False,
    },
    "health_check_config": QUICK_START["health_check_config"],
    "rollback_on_failure": True,
}
EXAMPLE_2: dict[str, Any] = {
    "container_name": "omninode-reducer",
    "image_tag": "v1.2.0",
    "remote_host": "192.168.86.200",
    "deployment_config": {
        "environment_variables": {"AGGREGATION_WINDOW_MS": "5000", "BATCH_SIZE": "100"},
        "port_mappings": [{"host_port": 8061, "container_port": 8061}],
        "restart_policy": "unless-stopped",
    },
}
ROLLING_UPDATE: dict[str, Any] = {
    "container_name": "omninode-orchestrator-new",
    "image_tag": "v1.3.0",
    "remote_host": "192.168.86.200",
    "deployment_config": {
        "port_mappings": [{"host_port": 8070, "container_port": 8060}],
        "restart_policy": "unless-stopped",
    },
}


@pytest.mark.parametrize("example", [QUICK_START, EXAMPLE_1, EXAMPLE_2, ROLLING_UPDATE])
def test_the_examples_of_the_specification_are_taken_as_they_stand(example: dict[str, Any]) -> None:
    """Every value that they give is the value that counts."""
    dumped = DeploymentParameters.model_validate(example).model_dump()
    for name, value in example.items():
        if isinstance(value, dict):
            assert {key: dumped[name][key] for key in value if key not in {"port_mappings", "volumes"}} == {
                key: inner for key, inner in value.items() if key not in {"port_mappings", "volumes"}
            }
        else:
            assert dumped[name] == value
    mapping = example["deployment_config"]["port_mappings"][0]
    assert dumped["deployment_config"]["port_mappings"][0] == mapping | {"protocol": "tcp", "host_ip": None}


def test_defaults_are_those_of_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the name and the host must be given."""
    monkeypatch.delenv("DEPLOYMENT_TIMEOUT_MS", raising=False)
    asked = DeploymentParameters.model_validate(LEAST)
    assert (asked.image_tag, asked.remote_port, asked.rollback_on_failure) == ("latest", 8001, True)
    assert asked.deployment_timeout_ms == 180_000
    config, build, health = asked.deployment_config, asked.build_options, asked.health_check_config
    assert (config.restart_policy, config.network_mode) == ("unless-stopped", "bridge")
    assert (config.environment_variables, config.port_mappings, config.volumes) == ({}, [], [])
    assert (build.dockerfile_path, build.build_context, build.no_cache) == ("Dockerfile", ".", False)
    assert build.max_image_size_bytes == 2 * 1024**3
    assert (health.health_endpoint, health.expected_status_code) == ("/health", 200)
    # None leaves these to HEALTH_CHECK_MAX_RETRIES and its sisters on the host: 5, 2000 ms, 5000 ms.
    assert (health.max_retries, health.retry_interval_ms, health.timeout_ms) == (None, None, None)


def test_a_consul_check_is_asked_for_expressly() -> None:
    """The registration is optional."""
    assert not DeploymentParameters.model_validate(LEAST).health_check_config.consul_enabled


def config(**fields: Any) -> dict[str, Any]:
    """A change of deployment_config."""
    return {"deployment_config": fields}


def port(**fields: Any) -> dict[str, Any]:
    """A port mapping with a change."""
    return config(port_mappings=[{"host_port": 80, "container_port": 80} | fields])


def volume(**fields: Any) -> dict[str, Any]:
    """A volume with a change."""
    return config(volumes=[{"host_path": "/data", "container_path": "/data"} | fields])


# The parameters, the place that the error points to, and a part of the message.
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "name in capitals": ({"container_name": "Web"}, "container_name", "lower-case letters"),
    "name with a path": ({"container_name": "team/web"}, "container_name", "lower-case letters"),
    "empty name": ({"container_name": ""}, "container_name", "lower-case letters"),
    "tag with a slash": ({"image_tag": "registry/app:v1"}, "image_tag", "give the tag alone"),
    "tag with a repository": ({"image_tag": "app:v1"}, "image_tag", "give the tag alone"),
    "tag with a digest": ({"image_tag": "v1@sha256:00"}, "image_tag", "give the tag alone"),
    "host as URL": ({"remote_host": "http://10.0.0.7"}, "remote_host", "without 'http://'"),
    "host as CIDR": ({"remote_host": "10.0.0.0/24"}, "remote_host", "'/24'"),
    "host with a port": ({"remote_host": "10.0.0.7:8001"}, "remote_host", "goes into remote_port"),
    "name with a port": ({"remote_host": "host-b:8001"}, "remote_host", "goes into remote_port"),
    "empty host": ({"remote_host": ""}, "remote_host", "give the name"),
    "host with a newline": ({"remote_host": "host-b\n"}, "remote_host", "give the name"),
    "port 0": ({"remote_port": 0}, "remote_port", "greater than or equal to 1"),
    "port past the last": ({"remote_port": 65536}, "remote_port", "less than or equal to 65535"),
    "port in words": ({"remote_port": "http"}, "remote_port", "valid integer"),
    "host port 0": (port(host_port=0), "deployment_config.port_mappings.0.host_port", "greater than"),
    "container port": (port(container_port=70000), "port_mappings.0.container_port", "65535"),
    "protocol": (port(protocol="sctp"), "port_mappings.0.protocol", "'tcp' or 'udp'"),
    "host_ip as CIDR": (port(host_ip="10.0.0.0/8"), "port_mappings.0.host_ip", "give one address"),
    "a host port twice": (
        config(port_mappings=[{"host_port": 80, "container_port": 80}] * 2),
        "deployment_config",
        "port_mappings: host_port 80/tcp is named twice",
    ),
    "ports without a bridge": (
        config(network_mode="host", port_mappings=[{"host_port": 80, "container_port": 80}]),
        "deployment_config",
        "publishes no ports",
    ),
    "climbing path": (volume(host_path="../data"), "volumes.0.host_path", "absolute path"),
    "path with a colon": (volume(host_path="/data:ro"), "volumes.0.host_path", "':'"),
    "relative mount point": (volume(container_path="data"), "volumes.0.container_path", "absolute path"),
    "restart policy": (config(restart_policy="sometimes"), "deployment_config.restart_policy", "'always'"),
    "network": (config(network_mode="my net"), "deployment_config.network_mode", "'bridge'"),
    "variable name": (
        config(environment_variables={"A B": "1"}),
        "deployment_config.environment_variables",
        "no variable name",
    ),
    "variable that is a number": (
        config(environment_variables={"A": 1}),
        "environment_variables.A",
        "valid string",
    ),
    "label of ours": (config(labels={"gantry.x": "1"}), "deployment_config", "is reserved"),
    "endless grace": (config(stop_timeout_seconds=601), "stop_timeout_seconds", "600"),
    "endpoint as URL": (
        {"health_check_config": {"health_endpoint": "http://web/health"}},
        "health_check_config.health_endpoint",
        "start with '/'",
    ),
    "status code": ({"health_check_config": {"expected_status_code": 20}}, "expected_status_code", "100"),
    "no attempts": ({"health_check_config": {"max_retries": 0}}, "health_check_config.max_retries", "1"),
    "no size": ({"build_options": {"max_image_size_bytes": 0}}, "max_image_size_bytes", "greater than"),
    "platform": ({"build_options": {"platform": "arm64"}}, "build_options.platform", "'linux/amd64'"),
    "two platforms": (
        {"build_options": {"platform": "linux/amd64,linux/arm64"}},
        "build_options.platform",
        "'linux/amd64'",
    ),
    "short build": ({"build_options": {"timeout_ms": 10}}, "build_options.timeout_ms", "1000"),
    "short stage": ({"deployment_timeout_ms": 10}, "deployment_timeout_ms", "1000"),
    "long stage": ({"deployment_timeout_ms": 86_400_001}, "deployment_timeout_ms", "86400000"),
    "unknown parameter": ({"image": "web"}, "image", "not permitted"),
    "unknown key": (config(ports=[80]), "deployment_config.ports", "not permitted"),
    "unknown build option": ({"build_options": {"nocache": True}}, "build_options.nocache", "not permitted"),
    "unknown check": (
        {"health_check_config": {"retries": 3}},
        "health_check_config.retries",
        "not permitted",
    ),
}


@pytest.mark.parametrize(("changes", "place", "fix"), BAD.values(), ids=BAD)
def test_a_bad_parameter_is_refused_with_its_place_and_the_fix(
    changes: dict[str, Any], place: str, fix: str
) -> None:
    """One error, at the field that is wrong, that says what to give instead."""
    with pytest.raises(ValidationError) as refused:
        DeploymentParameters.model_validate(LEAST | changes)
    errors = refused.value.errors()
    assert len(errors) == 1
    assert place in ".".join(str(part) for part in errors[0]["loc"])
    assert fix in errors[0]["msg"]


@pytest.mark.parametrize("name", ["host-a", "edge-1.example", "10.0.0.7", "fe80::1", "::1", "2001:db8::"])
def test_names_and_addresses_of_hosts_are_taken(name: str) -> None:
    """A block, a host name, or an address of either family."""
    assert DeploymentParameters.model_validate(LEAST | {"remote_host": name}).remote_host == name


def test_the_stage_timeout_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """DEPLOYMENT_TIMEOUT_MS, unless the caller says otherwise."""
    monkeypatch.setenv("DEPLOYMENT_TIMEOUT_MS", "60000")
    assert DeploymentParameters.model_validate(LEAST).deployment_timeout_ms == 60_000
    assert (
        DeploymentParameters.model_validate(LEAST | {"deployment_timeout_ms": 5000}).deployment_timeout_ms
        == 5000
    )


@pytest.mark.parametrize("told", ["3 minutes", "-1", "0", "1.5", "999999999"])
def test_a_stage_timeout_in_the_environment_that_is_no_time_is_named(
    monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """The operator reads which variable is wrong."""
    monkeypatch.setenv("DEPLOYMENT_TIMEOUT_MS", told)
    with pytest.raises(ParametersRefused, match=r"DEPLOYMENT_TIMEOUT_MS.*such as 180000"):
        default_timeout_ms()


# -- paths -----------------------------------------------------------------------------------------


def test_a_dockerfile_in_its_context_is_taken(tmp_path: Path) -> None:
    """Also one in a folder below."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "Release").touch()
    check_paths(BuildOptions(build_context=str(tmp_path), dockerfile_path="docker/Release"))


def test_a_relative_context_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the worker runs."""
    (tmp_path / "Dockerfile").touch()
    monkeypatch.chdir(tmp_path)
    check_paths(BuildOptions())
    assert BuildOptions().context == tmp_path


@pytest.mark.parametrize(
    ("options", "field", "fix"),
    [
        ({"build_context": "nowhere"}, "build_options.build_context", "folder that holds the Dockerfile"),
        ({"build_context": "Dockerfile"}, "build_options.build_context", "folder that holds"),
        ({"dockerfile_path": "Missing"}, "build_options.dockerfile_path", "relative to build_context"),
        ({"dockerfile_path": "folder"}, "build_options.dockerfile_path", "relative to build_context"),
        ({"dockerfile_path": "/etc/hostname"}, "build_options.dockerfile_path", "into the context"),
        ({"dockerfile_path": "link-outside"}, "build_options.dockerfile_path", "into the context"),
        (
            {"build_context": "folder", "dockerfile_path": "../Dockerfile"},
            "build_options.dockerfile_path",
            "into the context",
        ),
    ],
)
def test_paths_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], field: str, fix: str
) -> None:
    """Field, value and fix in one line."""
    (tmp_path / "Dockerfile").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link-outside").symlink_to("/etc/hostname")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParametersRefused) as refused:
        check_paths(BuildOptions.model_validate(options))
    assert refused.value.field == field
    assert fix in refused.value.next_step
    assert next(reversed(options.values())) in str(refused.value)
