"""Setting a host up, decided: parameters, what stands in the way, and the files and scripts that follow."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.remote_host import RemoteHost
from deployments.supervisor import read_environment
from receiver import settings
from tasks import host_commands, host_files, provisioning
from tasks.errors import ParametersRefused
from tasks.host_facts import (
    HostFacts,
    HostUnsuited,
    Marker,
    api_url_for_host,
    check_host,
    control_address,
)
from tasks.provisioning import ProvisionParameters, parameters
from tasks.ssh import Command

LEAST: dict[str, Any] = {"name": "host-b", "address": "10.0.0.7", "user": "root"}
API = "http://10.0.0.5:4200/api"
KEYS = [SecretStr("a" * 32), SecretStr("b" * 32)]
FACTS = HostFacts(
    control_address="10.0.0.5",
    system="Linux",
    machine="x86_64",
    libc="glibc-2.36",
    python="/usr/bin/python3.11",
    python_version="3.11.2",
    has_systemd=False,
    engine_version="20.10.24+dfsg1",
    engine_error="",
    engine_group=106,
    api_error="",
    free_bytes=10**11,
    missing_programs=[],
    has_ensurepip=True,
    user_exists=False,
    port_is_taken=False,
    marker=None,
    is_occupied=False,
    releases=[],
    local_settings="",
)
OWN = Marker(name="host-b", port=8001, service_user="gantry", made_user=True)


def asked(**given: Any) -> ProvisionParameters:
    """Parameters of a new host."""
    return parameters({}, **{**LEAST, **given})


def facts(**found: Any) -> HostFacts:
    """A host that is fit, but for what is given."""
    return FACTS.model_copy(update=found)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"name": "Host_B"}, "name"),
        ({"address": "http://10.0.0.7"}, "address"),
        ({"address": None}, "address"),
        ({"user": "root; reboot"}, "user"),
        ({"user": None}, "user"),
        ({"host_key": "MD5:00"}, "host_key"),
        ({"prefix": "/usr"}, "prefix"),
        ({"prefix": "/opt/../etc"}, "prefix"),
        ({"prefix": "/opt/a b"}, "prefix"),
        ({"service_user": "Gantry$(id)"}, "service_user"),
        ({"docker_host": "/var/run/docker.sock"}, "docker_host"),
        ({"python": "python3"}, "python"),
        ({"prefect_api_url": "10.0.0.5:4200"}, "prefect_api_url"),
        ({"allow": ["10.0.0.1/8"]}, "allow"),
        (
            {"wheelhouse": "/w", "package_index": True},
            "parameters: Value error, wheelhouse and package_index",
        ),
        ({"host_is_gone": True}, "parameters: Value error, host_is_gone goes with remove"),
        ({"remove_containers": True}, "parameters: Value error, remove_containers goes with remove"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(given: dict[str, Any], field: str) -> None:
    """Before anything is done; nothing that a shell could read as more than a word gets through."""
    with pytest.raises(ParametersRefused) as refused:
        asked(**given)
    assert str(refused.value).startswith(field)


def test_what_a_host_was_registered_with_need_not_be_given_again() -> None:
    """And what is given wins; what else the block says stays."""
    saved = RemoteHost(address="10.0.0.7", port=9001, ssh_user="admin", ssh_port=2222, tls=True)
    again = parameters(provisioning.known_of(saved), name="host-b", address=None, user=None, port=9002)
    assert (again.address, again.user, again.ssh_port, again.port) == ("10.0.0.7", "admin", 2222, 9002)
    block = provisioning.host_block(again, saved)
    assert (block.base_url, block.ssh_user) == ("https://10.0.0.7:9002", "admin")


def test_a_missing_key_file_or_wheel_is_refused_before_the_first_connection(tmp_path: Path) -> None:
    """The message says where it was looked for."""
    with pytest.raises(ParametersRefused, match="key_file: /none is no file on the control host"):
        provisioning.check_paths(asked(key_file="/none"))
    with pytest.raises(ParametersRefused, match=r"wheelhouse: .* holds no gantry_deploy-\*\.whl"):
        provisioning.check_paths(asked(wheelhouse=str(tmp_path)))


@pytest.mark.parametrize(
    ("connection", "address"),
    [
        ("10.0.0.5 50000 10.0.0.7 22", "10.0.0.5"),
        ("::ffff:10.0.0.5 50000 ::ffff:10.0.0.7 22", "10.0.0.5"),
        ("fe80::1%eth0 50000 fe80::2%eth0 22", "fe80::1"),
    ],
)
def test_the_allow_list_takes_the_control_host_as_the_host_sees_it(connection: str, address: str) -> None:
    """IPv4 within IPv6, and addresses with a zone, too."""
    assert control_address(connection) == address


@pytest.mark.parametrize(
    ("own", "seen"),
    [
        ("http://127.0.0.1:4200/api", "http://10.0.0.5:4200/api"),
        ("http://localhost:4200/api/", "http://10.0.0.5:4200/api"),
        ("https://prefect.example/api", "https://prefect.example/api"),
    ],
)
def test_a_server_on_loopback_is_reached_at_the_control_host(own: str, seen: str) -> None:
    """Any other address is the same from everywhere."""
    assert api_url_for_host(own, "10.0.0.5") == seen


def test_a_fit_host_is_taken() -> None:
    """Also one that is set up already: its port is its own receiver's."""
    check_host(asked(), FACTS, API)
    check_host(asked(), facts(marker=OWN, is_occupied=True, port_is_taken=True, user_exists=True), API)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"system": "Darwin"}, "only Linux"),
        ({"missing_programs": ["tar"]}, "not installed: tar"),
        ({"free_bytes": 10}, "0 MB are free"),
        ({"is_occupied": True}, "give another prefix"),
        ({"marker": OWN.model_copy(update={"name": "host-c"})}, "belongs to host-c"),
        ({"marker": OWN.model_copy(update={"service_user": "other"})}, "give service_user so"),
        ({"port_is_taken": True}, "port 8001 is taken"),
        ({"engine_error": "[Errno 2] No such file"}, "no Docker Engine answers"),
        ({"engine_version": "19.03.1"}, "20.10 or newer"),
        ({"engine_group": 0}, "dockerd with --group docker"),
        ({"api_error": "Connection refused"}, "give prefect_api_url as the host reaches it"),
    ],
)
def test_a_host_that_is_not_fit_is_refused_with_what_mends_it(found: dict[str, Any], told: str) -> None:
    """Before anything is changed there."""
    with pytest.raises(HostUnsuited, match=told):
        check_host(asked(), facts(**found), API)


def test_everything_that_stands_in_the_way_is_said_at_once() -> None:
    """Nobody mends a host one message at a time."""
    with pytest.raises(HostUnsuited) as refused:
        check_host(asked(), facts(engine_error="x", api_error="y", port_is_taken=True, free_bytes=0), API)
    assert len(str(refused.value).split("; ")) == 4


def test_the_receiver_takes_the_settings_that_are_written() -> None:
    """Read as systemd and the supervisor read them, by the receiver's own reader."""
    variables = host_files.environment(asked(allow=["10.0.0.9/32"]), FACTS, API, KEYS, {})
    read = read_environment(host_files.environment_file(variables))
    assert read == variables
    taken = settings.from_environment(read)
    assert [key.get_secret_value() for key in taken.hmac_keys] == [b"a" * 32, b"b" * 32]
    assert [str(network) for network in taken.allowed_networks] == [
        *("10.0.0.5/32", "10.0.0.9/32", "127.0.0.0/8", "::1/128")
    ]
    assert taken.state_dir == Path("/opt/gantry/state")
    assert host_files.read_key(host_files.environment_file(variables)) == KEYS


def test_a_credential_that_a_file_cannot_hold_is_refused_by_name() -> None:
    """Without showing it."""
    credentials = {"PREFECT_API_AUTH_STRING": SecretStr("admin:it's")}
    variables = host_files.environment(asked(), FACTS, API, KEYS, credentials)
    with pytest.raises(ParametersRefused, match="PREFECT_API_AUTH_STRING") as refused:
        host_files.environment_file(variables)
    assert "it's" not in str(refused.value)


def test_no_secret_is_part_of_a_command_or_of_a_unit() -> None:
    """The key stands in the environment file alone."""
    layout = asked().layout
    services = host_files.commands(layout, "host-b", "host-b")
    written = [*host_files.service_files(layout, services, has_systemd=True).values()]
    written += host_files.service_files(layout, services, has_systemd=False).values()
    written += [host_commands.write(layout.environment_file, "gantry", "600").line()]
    assert not [text for text in written if "a" * 32 in text]


def test_the_units_are_what_systemd_understands(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing in them; where it is missing, this test is skipped."""
    if which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; the units are only rendered elsewhere")
    given = asked(prefix=f"{tmp_path}/gantry", service_user="daemon")
    services = host_files.commands(given.layout, "host-b", "host-b")
    Path(given.layout.python).parent.mkdir(parents=True)
    Path(given.layout.python).symlink_to("/bin/true")
    units = []
    for path, text in host_files.service_files(given.layout, services, has_systemd=True).items():
        units.append(tmp_path / Path(path).name)
        units[-1].write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "daemon-" in line]
    assert (done.returncode, complaints) == (0, [])


def test_a_start_is_needed_again_when_anything_that_it_reads_has_changed() -> None:
    """Packages, settings, a person's own settings; and not otherwise."""
    files = {"/a": "x"}
    stamp = host_files.start_stamp("r1", files, "")
    assert host_files.start_stamp("r1", dict(files), "") == stamp
    others = [("r2", files, ""), ("r1", {"/a": "y"}, ""), ("r1", files, "local")]
    assert len({stamp, *(host_files.start_stamp(*other) for other in others)}) == 4


def test_a_user_who_was_there_before_stays_when_the_host_is_removed() -> None:
    """Who made the user is written down at the first run, and not forgotten at the next."""
    layout = asked().layout
    assert host_commands.marker_of("host-b", 8001, layout, FACTS).made_user
    assert not host_commands.marker_of("host-b", 8001, layout, facts(user_exists=True)).made_user
    assert host_commands.marker_of("host-b", 8001, layout, facts(user_exists=True, marker=OWN)).made_user


def test_arguments_of_a_command_are_never_read_by_a_shell() -> None:
    """Whatever stands in them."""
    evil = "$(touch /tmp/x); 'a' \"b\" `c`\n"
    line = Command('printf %s "$1"', (evil,)).line()
    said = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said == evil
    assert shlex.split(Command("true").line(with_sudo=True))[:3] == ["sudo", "-n", "--"]


def test_the_process_ids_are_read_from_either_kind_of_supervision() -> None:
    """systemctl's lines, or the supervisor's JSON."""
    said = json.dumps({"receiver": {"pid": 7, "starts": 1}, "worker": {"pid": 8, "starts": 1}})
    assert host_commands.read_pids(f"{said}\n", has_systemd=False) == {"receiver": 7, "worker": 8}
    assert host_commands.read_pids("7\n8\n", has_systemd=True) == {"receiver": 7, "worker": 8}
