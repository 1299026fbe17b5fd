"""How set-up is told of hosts."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from deployments.setup_hosts import HostAddress, host_address, told_hosts


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("host-b=10.0.0.7", HostAddress("host-b", "10.0.0.7", 8001)),
        ("host-b=edge.example:9001", HostAddress("host-b", "edge.example", 9001)),
        ("host-b=https://edge.example", HostAddress("host-b", "edge.example", 8001, tls=True)),
        ("host-b=[fd00::7]:8002", HostAddress("host-b", "fd00::7", 8002)),
        ("host-b=http://[fd00::7]", HostAddress("host-b", "fd00::7", 8001)),
    ],
)
def test_a_host_is_a_name_and_an_address(text: str, host: HostAddress) -> None:
    """With port 8001 and no TLS, unless it says otherwise."""
    assert host_address(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("host-b", "host-b=", "=10.0.0.7", "Host=10.0.0.7", "host_b=10.0.0.7", "host-b=ftp://10.0.0.7"),
        *("host-b=10.0.0.7:http", "host-b=10.0.0.7:70000", "host-b=10.0.0.7/x", "host-b=me@10.0.0.7"),
    ],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    """With what it should be."""
    with pytest.raises(ArgumentTypeError, match=r"NAME=|lower-case"):
        host_address(text)


def test_an_argument_wins_over_the_variable() -> None:
    """The variable divides by commas or blanks, and an error names it."""
    told = {"GANTRY_HOSTS": "host-b=10.0.0.7, host-c=10.0.0.8"}
    hosts = told_hosts([HostAddress("host-b", "10.0.0.9")], told)
    assert {host.name: host.address for host in hosts} == {"host-b": "10.0.0.9", "host-c": "10.0.0.8"}
    assert told_hosts([], {}) == []
    with pytest.raises(ArgumentTypeError, match="GANTRY_HOSTS: 'host-b'"):
        told_hosts([], {"GANTRY_HOSTS": "host-b"})
