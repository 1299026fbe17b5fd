"""The receiver's settings: the environment and the security file, read once and checked.

Imports nothing of ours but contract and signing. Reads no clock, opens no socket, makes no folder
unless `make_folders` is called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretBytes, SecretStr, ValidationError

from receiver import contract, signing

Network = IPv4Network | IPv6Network

DEFAULT_SECURITY_FILES = (
    Path("config/deployment_security.yaml"),
    Path("/etc/gantry/deployment_security.yaml"),
)

VARIABLES: Mapping[str, tuple[str, str]] = {
    "HOOK_RECEIVER_HOST": ("0.0.0.0", "address to listen on"),  # noqa: S104 - the specification's default
    "HOOK_RECEIVER_PORT": (str(contract.DEFAULT_PORT), "port to listen on"),
    "HMAC_SECRET_KEY": ("", "shared key of at least 32 bytes; comma-separated: current, then previous"),
    "HMAC_SECRET_KEY_FILE": ("", "file that holds the key, instead of the variable"),
    "IP_WHITELIST": ("127.0.0.0/8,::1/128", "comma-separated networks that may call"),
    "DEPLOYMENT_SECURITY_FILE": ("", "deployment_security.yaml, when not at its default place"),
    "DOCKER_HOST": ("unix:///var/run/docker.sock", "address of the Docker Engine"),
    "DOCKER_API_VERSION": ("auto", "Docker API version to speak, such as 1.43"),
    "HEALTH_CHECK_MAX_RETRIES": ("5", "health attempts, unless the request says otherwise"),
    "HEALTH_CHECK_RETRY_INTERVAL_MS": ("2000", "time between health attempts"),
    "HEALTH_CHECK_TIMEOUT_MS": ("5000", "time for one health attempt"),
    "HOOK_RECEIVER_STATE_DIR": ("/var/lib/gantry", "folder of the ledger, packages and locks"),
    "HOOK_RECEIVER_INCOMING_DIR": (
        "",
        "folder for what rsync brings; default: `incoming` in the state folder",
    ),
    "HOOK_RECEIVER_MAX_PACKAGE_BYTES": (str(20 * 1024**3), "largest package that is taken"),
    "HOOK_RECEIVER_MAX_UPLOADS": ("4", "chunk requests served at the same time"),
    "HOOK_RECEIVER_LOAD_AHEAD_BYTES": (
        "16777216",
        "from this size on the engine is fed with a package while it arrives; 0: never",
    ),
    "HOOK_RECEIVER_RATE_LIMIT_PER_SECOND": ("100", "requests per second and peer"),
    "HOOK_RECEIVER_HAPROXY": ("haproxy", "program of the proxy that strategy `rolling` needs (2.6 or later)"),
    "HOOK_RECEIVER_TLS_CERT_FILE": ("", "certificate chain (PEM); needs the key file too"),
    "HOOK_RECEIVER_TLS_KEY_FILE": ("", "private key (PEM) of the certificate"),
    "LOG_FORMAT": ("text", "text or json"),
    "LOG_LEVEL": ("INFO", "DEBUG, INFO, WARNING or ERROR"),
    "CONSUL_HTTP_TOKEN": ("", "token for the question whether Consul lists a service"),
    "KAFKA_BOOTSTRAP_SERVERS": ("", "accepted and not used: the control host publishes this host's events"),
}
"""Every variable that is read: its default and its meaning."""


class SettingsRefused(Exception):
    """A setting is missing or wrong"""


class _FileModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HmacAuthentication(_FileModel):
    """`security.hmac_authentication` of the security file."""

    enabled: Literal[True] = True
    secret_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "HMAC_SECRET_KEY"  # noqa: S105 - a name, not a secret
    signature_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] = contract.SIGNATURE_HEADER
    timestamp_tolerance_seconds: Annotated[int, Field(ge=1, le=3600)] = signing.DEFAULT_TOLERANCE_SECONDS


class Security(_FileModel):
    """`security` of the security file."""

    ip_whitelist: list[str] | None = None
    hmac_authentication: HmacAuthentication = HmacAuthentication()


class SecurityFile(_FileModel):
    """The specification's `deployment_security.yaml`."""

    security: Security = Security()


@dataclass(frozen=True)
class ReceiverSettings:
    """Everything the daemon and the host's flows are told from outside."""

    host: str
    port: int
    hmac_keys: tuple[SecretBytes, ...]
    allowed_networks: tuple[Network, ...]
    signature_header: str
    timestamp_tolerance_seconds: int
    docker_host: str
    docker_api_version: str | None
    health_check_max_retries: int
    health_check_retry_interval_ms: int
    health_check_timeout_ms: int
    state_dir: Path
    incoming_dir: Path
    max_package_bytes: int
    max_uploads: int
    load_ahead_bytes: int
    rate_limit_per_second: int
    tls_cert_file: Path | None
    tls_key_file: Path | None
    log_format: str
    log_level: str
    kafka_bootstrap_servers: str | None
    consul_token: SecretStr | None
    haproxy: str

    @property
    def ledger_path(self) -> Path:
        """The SQLite file of `receiver.ledger`."""
        return self.state_dir / "ledger.sqlite3"

    @property
    def packages_dir(self) -> Path:
        """Packages, whole and in part."""
        return self.state_dir / "packages"

    @property
    def locks_dir(self) -> Path:
        """One lock file per container."""
        return self.state_dir / "locks"

    @property
    def proxy_dir(self) -> Path:
        """Routes, configuration and sockets of the proxy."""
        return self.state_dir / "proxy"

    def make_folders(self) -> None:
        """Make the state folders, closed to others: the ledger holds environment values.

        Raises `SettingsRefused` when the state folder cannot be made or written.
        """
        try:
            for folder in (
                self.state_dir,
                self.packages_dir,
                self.locks_dir,
                self.proxy_dir,
                self.incoming_dir,
            ):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            shared = self.incoming_dir.stat().st_mode & 0o022
        except OSError as exc:
            raise SettingsRefused(
                f"HOOK_RECEIVER_STATE_DIR: {exc.filename or self.state_dir} cannot be made ({exc.strerror}); "
                "give a folder that this user may write"
            ) from exc
        if not os.access(self.packages_dir, os.W_OK):
            raise SettingsRefused(
                f"HOOK_RECEIVER_STATE_DIR: {self.packages_dir} cannot be written; give it to this user"
            )
        if shared:
            raise SettingsRefused(
                f"HOOK_RECEIVER_INCOMING_DIR: others may write to {self.incoming_dir} itself; close it: "
                f"chmod 2750 {self.incoming_dir} (each deployment gets a folder of its own in it)"
            )


def from_environment(
    environ: Mapping[str, str] = os.environ, *, require_key: bool = True
) -> ReceiverSettings:
    """Read and check all settings; `require_key=False` for the host's flows, which sign nothing.

    Raises `SettingsRefused` with the variable's name and what to do.
    """
    values = _Values(environ)
    security = _security_file(environ).security
    hmac = security.hmac_authentication
    cert, key = values.file("HOOK_RECEIVER_TLS_CERT_FILE"), values.file("HOOK_RECEIVER_TLS_KEY_FILE")
    if (cert is None) != (key is None):
        missing = "HOOK_RECEIVER_TLS_KEY_FILE" if key is None else "HOOK_RECEIVER_TLS_CERT_FILE"
        raise SettingsRefused(f"{missing} is not set; TLS needs both the certificate and its key")
    state_dir = Path(values.matching("HOOK_RECEIVER_STATE_DIR", r"/.*", "an absolute path"))
    token = values.text("CONSUL_HTTP_TOKEN")
    return ReceiverSettings(
        host=values.text("HOOK_RECEIVER_HOST"),
        port=values.number("HOOK_RECEIVER_PORT", 1, 65535),
        hmac_keys=_keys(environ, hmac.secret_key_env, required=require_key),
        allowed_networks=_networks(values, security.ip_whitelist),
        signature_header=hmac.signature_header,
        timestamp_tolerance_seconds=hmac.timestamp_tolerance_seconds,
        docker_host=values.matching(
            "DOCKER_HOST", r"(unix|tcp|http|https)://.+", "unix:///path or tcp://host:port"
        ),
        docker_api_version=_api_version(values),
        health_check_max_retries=values.number("HEALTH_CHECK_MAX_RETRIES", 1, 1000),
        health_check_retry_interval_ms=values.number("HEALTH_CHECK_RETRY_INTERVAL_MS", 0, 300_000),
        health_check_timeout_ms=values.number("HEALTH_CHECK_TIMEOUT_MS", 1, 300_000),
        state_dir=state_dir,
        incoming_dir=Path(
            values.matching("HOOK_RECEIVER_INCOMING_DIR", r"(/.*)?", "an absolute path")
            or state_dir / "incoming"
        ),
        max_package_bytes=values.number("HOOK_RECEIVER_MAX_PACKAGE_BYTES", 1, 2**50),
        max_uploads=values.number("HOOK_RECEIVER_MAX_UPLOADS", 1, 64),
        load_ahead_bytes=values.number("HOOK_RECEIVER_LOAD_AHEAD_BYTES", 0, 2**50),
        rate_limit_per_second=values.number("HOOK_RECEIVER_RATE_LIMIT_PER_SECOND", 1, 1_000_000),
        tls_cert_file=cert,
        tls_key_file=key,
        log_format=values.matching("LOG_FORMAT", "text|json", "text or json"),
        log_level=values.matching("LOG_LEVEL", "DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR"),
        kafka_bootstrap_servers=values.text("KAFKA_BOOTSTRAP_SERVERS") or None,
        consul_token=SecretStr(token) if token else None,
        haproxy=values.text("HOOK_RECEIVER_HAPROXY"),
    )


class _Values:
    """Single variables, with their defaults; an empty one counts as not set."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def given(self, name: str) -> str:
        return self._environ.get(name, "").strip()

    def text(self, name: str) -> str:
        return self.given(name) or VARIABLES[name][0]

    def number(self, name: str, low: int, high: int) -> int:
        text = self.text(name)
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise SettingsRefused(f"{name}={text!r}: give a whole number from {low} to {high}")
        return int(text)

    def matching(self, name: str, pattern: str, expected: str) -> str:
        text = self.text(name)
        if not re.fullmatch(pattern, text):
            raise SettingsRefused(f"{name}={text!r}: give {expected}")
        return text

    def file(self, name: str) -> Path | None:
        text = self.text(name)
        if text and not Path(text).is_file():
            raise SettingsRefused(f"{name}={text!r}: there is no such file")
        return Path(text) if text else None


def _api_version(values: _Values) -> str | None:
    text = values.matching("DOCKER_API_VERSION", r"auto|1\.[0-9]{1,3}", "a version such as 1.43, or auto")
    return None if text == "auto" else text


def _networks(values: _Values, from_file: list[str] | None) -> tuple[Network, ...]:
    """The environment wins over the file; neither means loopback only."""
    name, source = "IP_WHITELIST", values.text("IP_WHITELIST").split(",")
    if from_file is not None and not values.given("IP_WHITELIST"):
        name, source = "security.ip_whitelist", from_file
    return tuple(_network(name, text.strip()) for text in source if text.strip())


def _network(name: str, text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as exc:
        raise SettingsRefused(f"{name}: {exc}; write networks such as 10.0.0.0/8 or 192.0.2.7/32") from exc


def _keys(environ: Mapping[str, str], variable: str, *, required: bool) -> tuple[SecretBytes, ...]:
    """Keys, current first, from the variable or from the file that `<variable>_FILE` names."""
    text, file = environ.get(variable, ""), environ.get(f"{variable}_FILE", "")
    if text.strip() and file.strip():
        raise SettingsRefused(f"{variable} and {variable}_FILE are both set; keep one")
    if file.strip():
        text = _read(f"{variable}_FILE", Path(file.strip()))
    keys = [part.strip().encode() for part in re.split(r"[,\n]", text) if part.strip()]
    if required and not keys:
        raise SettingsRefused(
            f"{variable} is not set; make a key with 'openssl rand -hex 32' and set it on both sides"
        )
    for position, key in enumerate(keys, start=1):
        if len(key) < signing.MIN_KEY_BYTES:
            raise SettingsRefused(
                f"{variable}: key {position} has {len(key)} bytes, at least {signing.MIN_KEY_BYTES} are "
                "needed; make one with 'openssl rand -hex 32'"
            )
    return tuple(SecretBytes(key) for key in keys)


def _security_file(environ: Mapping[str, str]) -> SecurityFile:
    named = environ.get("DEPLOYMENT_SECURITY_FILE", "").strip()
    found = [Path(named)] if named else [path for path in DEFAULT_SECURITY_FILES if path.is_file()]
    if not found:
        return SecurityFile()
    text = _read("DEPLOYMENT_SECURITY_FILE", found[0])
    try:
        return SecurityFile.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as exc:
        raise SettingsRefused(f"DEPLOYMENT_SECURITY_FILE: {found[0]} is no YAML: {exc}") from exc
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in error["loc"])
        raise SettingsRefused(
            f"DEPLOYMENT_SECURITY_FILE: {found[0]}: {key}: {_fix(key, error['msg'])}"
        ) from exc


def _fix(key: str, message: str) -> str:
    if key.endswith("hmac_authentication.enabled"):
        return "authentication cannot be switched off; remove the line or write 'enabled: true'"
    return f"{message}; correct or remove the key"


def _read(variable: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsRefused(f"{variable}: {path} cannot be read ({exc}); check path and rights") from exc
