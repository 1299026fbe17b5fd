"""Which services can roll, and what HAProxy is told of their routes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from receiver import proxy_socket
from receiver.contract import DeploymentConfig, Strategy
from receiver.routes import Route, Routes, Target, configuration, digest, route_for
from tasks.errors import ParametersRefused
from tasks.parameters import drain_seconds, rolling

PORTS = [{"host_port": 8080, "container_port": 80}]
OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"network_mode": "host"}, "network_mode 'host' leaves no port"),
    ({"network_mode": "container:db", "port_mappings": PORTS}, "network_mode 'container:db' leaves no port"),
    ({}, "port_mappings is empty"),
    (
        {"port_mappings": [*PORTS, {"host_port": 53, "container_port": 53, "protocol": "udp"}]},
        "53/udp is no port that the proxy can move",
    ),
    (
        {"port_mappings": PORTS, "volumes": [{"host_path": "/data", "container_path": "/data"}]},
        "both versions would write to '/data'",
    ),
]
STAT = """# pxname,svname,scur,status,
web:8080,a,3,DRAIN,
web:8080,b,0,no check,
web:8080,BACKEND,3,UP,
"""
PROCESSES = """#<PID>          <type>          <reloads>       <uptime>        <version>
10              master          2 [failed: 1]   0d00h00m29s     2.6.12
# workers
31              worker          0               0d00h00m10s     2.6.12
# old workers
30              worker          1               0d00h00m20s     2.6.12
29              worker          2               0d00h00m28s     2.6.12
# programs
"""


@pytest.mark.parametrize(("config", "problem"), OBSTACLES)
def test_a_service_that_cannot_run_twice_side_by_side_is_refused(
    config: dict[str, Any], problem: str
) -> None:
    """The error says why and how; with a fallback it is recreated instead."""
    with pytest.raises(ValidationError, match=problem) as refused:
        DeploymentConfig.model_validate({**config, "strategy": "rolling"})
    assert "strategy_fallback: recreate" in str(refused.value)
    patient = DeploymentConfig.model_validate(
        {**config, "strategy": "rolling", "strategy_fallback": "recreate"}
    )
    assert patient.way is Strategy.RECREATE
    with pytest.raises(ParametersRefused, match=problem):
        rolling(DeploymentConfig.model_validate(config))


@pytest.mark.parametrize("volume", [{"read_only": True}, {"shared": True}])
def test_a_volume_that_two_versions_may_use_is_no_obstacle(volume: dict[str, bool]) -> None:
    """Read alone, or said to be shared."""
    mount = {"host_path": "/data", "container_path": "/data", **volume}
    config = rolling(DeploymentConfig.model_validate({"port_mappings": PORTS, "volumes": [mount]}))
    assert config.way is Strategy.ROLLING


@pytest.mark.parametrize(
    ("key", "value"), [("hostname", "shop.example.com"), ("https_certificate_file", "/etc/shop.pem")]
)
def test_settings_of_the_proxy_need_the_proxy(key: str, value: str) -> None:
    """With `recreate` nobody would heed them."""
    with pytest.raises(ValidationError, match=f"{key}: only the proxy of strategy 'rolling'"):
        DeploymentConfig.model_validate({"port_mappings": PORTS, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("https_certificate_file", path) for path in ("shop.pem", "/a b", "/a\n    bind *:1", "/a/../b")),
        *(("hostname", name) for name in ("Shop.example.com", "*.example.com", "a }", "")),
    ],
)
def test_nothing_slips_into_the_configuration(key: str, value: str) -> None:
    """What HAProxy reads as more than a word is refused by name."""
    with pytest.raises(ValidationError, match=key):
        DeploymentConfig.model_validate({"port_mappings": PORTS, "strategy": "rolling", key: value})


def test_the_stage_s_time_includes_the_drain() -> None:
    """Only where there is one."""
    plain = DeploymentConfig.model_validate({"port_mappings": PORTS, "stop_timeout_seconds": 5})
    assert drain_seconds(plain) == 0
    assert drain_seconds(rolling(plain)) == 35


# -- routes ----------------------------------------------------------------------------------------


def route(service: str = "web", container: str = "one", **config: Any) -> Route:
    """The first route of a service."""
    asked = DeploymentConfig.model_validate({"strategy": "rolling", "port_mappings": PORTS, **config})
    return route_for(service, asked, Target(container_id=container, ports={80: 20001}))


def text(*routes: Route, ipv6: bool = False) -> str:
    """HAProxy's configuration of some routes."""
    return configuration(Routes(routes=routes), {}, "/run/s.sock", ipv6=ipv6)


def test_versions_take_turns_in_two_slots() -> None:
    """The next one goes where nothing serves; the one before goes back to its own."""
    first, two, three = route(), *(Target(container_id=name, ports={80: 1}) for name in ("two", "three"))
    second = first.leading_to(two)
    assert (second.active, second.slot_of("one"), second.slot_of("two")) == ("b", "a", "b")
    assert second.leading_to(Target(container_id="one", ports={80: 20001})).active == "a"
    third = second.leading_to(three)
    assert (third.active, third.slot_of("one"), third.slot_of("two")) == ("a", None, "b")


def test_moving_a_route_needs_no_reload() -> None:
    """The digest changes with ports, names and certificates alone."""
    first = Routes(routes=(route(),))
    moved = first.having(route().leading_to(Target(container_id="two", ports={80: 20002})))
    assert digest(moved, {}) == digest(first, {})
    assert configuration(moved, {}, "/s", ipv6=False) != configuration(first, {}, "/s", ipv6=False)
    assert digest(first.having(route(hostname="shop.example.com")), {}) != digest(first, {})
    assert digest(first.without("web"), {}) != digest(first, {})


def test_a_renewed_certificate_changes_the_digest_behind_its_dot() -> None:
    """So that HAProxy reads it; who moves a route does not wait for that."""
    secure = Routes(routes=(route(https_certificate_file="/etc/shop.pem"),))
    old, new = digest(secure, {"/etc/shop.pem": "1 9"}), digest(secure, {"/etc/shop.pem": "2 9"})
    assert old != new
    assert old.partition(".")[0] == new.partition(".")[0]
    assert f"description {new}\n" in configuration(secure, {"/etc/shop.pem": "2 9"}, "/s", ipv6=False)


def test_the_active_slot_alone_takes_requests_after_a_start() -> None:
    """So that HAProxy started anew does what it did."""
    moved = text(route().leading_to(Target(container_id="two", ports={80: 20002})))
    assert "    server a 127.0.0.1:20001 disabled\n    server b 127.0.0.1:20002\n" in moved


def test_https_is_spoken_where_a_certificate_is_given() -> None:
    """Its file is in the bind line, of both families."""
    secure = text(route(https_certificate_file="/etc/shop.pem"), ipv6=True)
    assert "bind 0.0.0.0:8080 ssl alpn h2,http/1.1 crt /etc/shop.pem\n" in secure
    assert "bind [::]:8080 v6only ssl alpn h2,http/1.1 crt /etc/shop.pem\n" in secure
    assert " ssl alpn" not in text(route())


@pytest.mark.parametrize(
    ("mine", "theirs", "is_rival"),
    [
        ({}, {}, True),
        ({"hostname": "a.example.com"}, {"hostname": "b.example.com"}, False),
        ({"hostname": "a.example.com"}, {"hostname": "a.example.com"}, True),
        ({"hostname": "a.example.com"}, {}, False),
        ({"hostname": "a.example.com", "https_certificate_file": "/a.pem"}, {}, True),
        ({}, {"port_mappings": [{"host_port": 8081, "container_port": 80}]}, False),
        ({}, {"port_mappings": [{**PORTS[0], "host_ip": "127.0.0.1"}]}, True),
    ],
)
def test_two_services_on_one_port_have_to_be_told_apart(
    mine: dict[str, Any], theirs: dict[str, Any], is_rival: bool
) -> None:
    """By their host names, and both with or both without HTTPS."""
    others = Routes(routes=(route("shop", **theirs),))
    assert (others.rival(route("web", **mine)) is not None) is is_rival


# -- HAProxy's words -------------------------------------------------------------------------------


def test_sessions_are_read_by_backend_and_server() -> None:
    """As `show stat` has them."""
    found = proxy_socket.sessions(STAT)
    assert (found["web:8080", "a"], found["web:8080", "b"]) == (3, 0)


def test_workers_that_leave_are_known() -> None:
    """As `show proc` has them."""
    assert proxy_socket.master(PROCESSES) == proxy_socket.Master(reloads=2, failed=1, leaving=(30, 29))
    with pytest.raises(proxy_socket.ProxySilent, match="no master"):
        proxy_socket.master("Unknown command")
