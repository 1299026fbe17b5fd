"""The receiver's settings: defaults, the security file, and one clear sentence for each mistake."""

from __future__ import annotations

from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest
import yaml

from receiver import settings
from receiver.settings import SettingsRefused, from_environment

KEY = "k" * 32
ENVIRONMENT = {"HMAC_SECRET_KEY": KEY}
EXAMPLE = Path(__file__).parents[2] / "deployments" / "deployment_security.yaml"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No security file of this machine is found by chance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "DEFAULT_SECURITY_FILES", (Path("config/deployment_security.yaml"),))


def security_file(folder: Path, text: str) -> dict[str, str]:
    """An environment that names a security file with this text."""
    path = folder / "security.yaml"
    path.write_text(text)
    return {**ENVIRONMENT, "DEPLOYMENT_SECURITY_FILE": str(path)}


def test_the_specifications_defaults_hold() -> None:
    """With a key and nothing else the receiver has the documented figures, and only loopback may call."""
    found = from_environment(ENVIRONMENT)
    assert (found.host, found.port) == ("0.0.0.0", 8001)
    assert found.allowed_networks == (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    assert (found.docker_host, found.docker_api_version) == ("unix:///var/run/docker.sock", None)
    assert found.health_check_max_retries == 5
    assert (found.health_check_retry_interval_ms, found.health_check_timeout_ms) == (2000, 5000)
    assert (found.signature_header, found.timestamp_tolerance_seconds) == ("X-Deployment-Signature", 300)
    assert (found.max_package_bytes, found.max_uploads) == (20 * 1024**3, 4)
    assert found.rate_limit_per_second == 100
    assert found.ledger_path.parent == Path("/var/lib/gantry")
    assert found.packages_dir.parent == found.locks_dir.parent == found.state_dir


def test_an_empty_variable_counts_as_not_set() -> None:
    """Compose files write `IP_WHITELIST=` for 'nothing given'; that must not open the host."""
    empty = dict.fromkeys(settings.VARIABLES, "") | ENVIRONMENT
    assert from_environment(empty) == from_environment(ENVIRONMENT)


def test_several_keys_keep_their_order_and_stay_hidden() -> None:
    """Current first, then previous; no `repr` shows them."""
    found = from_environment({"HMAC_SECRET_KEY": f"{'a' * 32}, {'b' * 32}"})
    assert [key.get_secret_value() for key in found.hmac_keys] == [b"a" * 32, b"b" * 32]
    assert "aaaa" not in repr(found)


def test_the_key_may_come_from_a_file(tmp_path: Path) -> None:
    """As a secret is mounted; the newline at its end does not count."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    found = from_environment({"HMAC_SECRET_KEY_FILE": str(tmp_path / "key")})
    assert [key.get_secret_value() for key in found.hmac_keys] == [KEY.encode()]


def test_the_hosts_flows_need_no_key() -> None:
    """They sign nothing."""
    assert from_environment({}, require_key=False).hmac_keys == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"HMAC_SECRET_KEY": ""}, "HMAC_SECRET_KEY is not set; make a key with 'openssl rand -hex 32'"),
        ({"HMAC_SECRET_KEY": f"{KEY},short"}, "HMAC_SECRET_KEY: key 2 has 5 bytes, at least 32"),
        ({"HMAC_SECRET_KEY_FILE": "/x"}, "HMAC_SECRET_KEY and HMAC_SECRET_KEY_FILE are both set"),
        ({"HMAC_SECRET_KEY": "", "HMAC_SECRET_KEY_FILE": "/nowhere"}, "HMAC_SECRET_KEY_FILE: /nowhere"),
        ({"IP_WHITELIST": "10.0.0.5/8"}, "IP_WHITELIST: 10.0.0.5/8 has host bits set; write networks"),
        ({"IP_WHITELIST": "office"}, "IP_WHITELIST: 'office'"),
        ({"HOOK_RECEIVER_PORT": "0"}, "HOOK_RECEIVER_PORT='0': give a whole number from 1 to 65535"),
        ({"HOOK_RECEIVER_PORT": "8001x"}, "HOOK_RECEIVER_PORT='8001x'"),
        ({"HEALTH_CHECK_MAX_RETRIES": "-1"}, "HEALTH_CHECK_MAX_RETRIES='-1'"),
        ({"DOCKER_HOST": "ssh://host"}, "DOCKER_HOST='ssh://host': give unix:///path or tcp://host:port"),
        ({"DOCKER_API_VERSION": "v1.43"}, "DOCKER_API_VERSION='v1.43'"),
        ({"HOOK_RECEIVER_STATE_DIR": "state"}, "HOOK_RECEIVER_STATE_DIR='state': give an absolute path"),
        ({"LOG_FORMAT": "xml"}, "LOG_FORMAT='xml': give text or json"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL='loud'"),
        ({"HOOK_RECEIVER_TLS_CERT_FILE": "/nowhere"}, "HOOK_RECEIVER_TLS_CERT_FILE='/nowhere'"),
        ({"HOOK_RECEIVER_TLS_CERT_FILE": __file__}, "HOOK_RECEIVER_TLS_KEY_FILE is not set"),
        ({"HOOK_RECEIVER_TLS_KEY_FILE": __file__}, "HOOK_RECEIVER_TLS_CERT_FILE is not set"),
        ({"DEPLOYMENT_SECURITY_FILE": "/nowhere"}, "DEPLOYMENT_SECURITY_FILE: /nowhere cannot be read"),
    ],
)
def test_each_mistake_names_its_variable_and_the_fix(changes: dict[str, str], expected: str) -> None:
    """One sentence, and no key in it."""
    with pytest.raises(SettingsRefused) as refused:
        from_environment({**ENVIRONMENT, **changes})
    assert str(refused.value).startswith(expected)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("security: {hmac_authentication: {enabled: false}}", "authentication cannot be switched off"),
        ("security: {hmac_authentification: {}}", "security.hmac_authentification: Extra inputs"),
        ("security: {ip_whitelist: [office]}", "security.ip_whitelist: 'office'"),
        ("security: {hmac_authentication: {timestamp_tolerance_seconds: 0}}", "greater than or equal to 1"),
        ("security: {hmac_authentication: {signature_header: 'a b'}}", "signature_header"),
        ("security: [", "is no YAML"),
        ("- a list", "valid dictionary"),
    ],
)
def test_each_mistake_in_the_security_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    """A misspelt key must not be ignored, least of all in this file."""
    with pytest.raises(SettingsRefused) as refused:
        from_environment(security_file(tmp_path, text))
    assert expected in str(refused.value)


def test_the_specifications_security_file_is_understood(tmp_path: Path) -> None:
    """Networks, header, tolerance and the key's variable come from it."""
    environment = security_file(
        tmp_path,
        """
        security:
          ip_whitelist: [192.0.2.0/24]
          hmac_authentication:
            enabled: true
            secret_key_env: OUR_KEY
            signature_header: X-Our-Signature
            timestamp_tolerance_seconds: 60
        """,
    )
    found = from_environment({**environment, "OUR_KEY": "o" * 32})
    assert found.allowed_networks == (ip_network("192.0.2.0/24"),)
    assert (found.signature_header, found.timestamp_tolerance_seconds) == ("X-Our-Signature", 60)
    assert [key.get_secret_value() for key in found.hmac_keys] == [b"o" * 32]
    with pytest.raises(SettingsRefused, match="OUR_KEY is not set"):
        from_environment(environment)


def test_the_environment_wins_over_the_security_file(tmp_path: Path) -> None:
    """Also when it says what is the default anyway."""
    environment = security_file(tmp_path, "security: {ip_whitelist: [192.0.2.0/24]}")
    loopback = {**environment, "IP_WHITELIST": "127.0.0.0/8,::1/128"}
    assert from_environment(loopback).allowed_networks == from_environment(ENVIRONMENT).allowed_networks


def test_the_security_file_is_found_at_its_default_place() -> None:
    """`config/deployment_security.yaml` beside the daemon, as in the specification."""
    Path("config").mkdir()
    Path("config/deployment_security.yaml").write_text("security: {ip_whitelist: [192.0.2.0/24]}")
    assert from_environment(ENVIRONMENT).allowed_networks == (ip_network("192.0.2.0/24"),)


def test_the_example_file_is_valid_and_says_the_defaults() -> None:
    """Who copies it changes nothing but the networks."""
    found = from_environment({**ENVIRONMENT, "DEPLOYMENT_SECURITY_FILE": str(EXAMPLE)})
    default = from_environment(ENVIRONMENT)
    assert found.allowed_networks != default.allowed_networks
    assert found.timestamp_tolerance_seconds == default.timestamp_tolerance_seconds
    assert set(yaml.safe_load(EXAMPLE.read_text())["security"]) == set(settings.Security.model_fields)


def test_the_state_folders_are_closed_to_others(tmp_path: Path) -> None:
    """The ledger holds the containers' environment values."""
    found = from_environment({**ENVIRONMENT, "HOOK_RECEIVER_STATE_DIR": str(tmp_path / "state")})
    found.make_folders()
    found.make_folders()
    for folder in (found.state_dir, found.packages_dir, found.locks_dir):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """The variable is named, not only the path."""
    (tmp_path / "file").write_text("")
    found = from_environment({**ENVIRONMENT, "HOOK_RECEIVER_STATE_DIR": str(tmp_path / "file" / "state")})
    with pytest.raises(SettingsRefused, match=r"HOOK_RECEIVER_STATE_DIR: .* cannot be made"):
        found.make_folders()


def test_every_variable_has_a_meaning_and_settings_are_frozen() -> None:
    """`--help` can explain all of them."""
    assert all(meaning for _, meaning in settings.VARIABLES.values())
    found = from_environment(ENVIRONMENT)
    with pytest.raises(AttributeError):
        setattr(found, fields(found)[0].name, "changed")
