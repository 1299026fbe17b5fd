"""Checks of the names and references a deployment is made of. Pure; each error says the fix."""

from __future__ import annotations

import ipaddress
import re

_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_RESTART = re.compile(r"no|always|unless-stopped|on-failure(:[1-9][0-9]{0,3})?")
_NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.:-]{0,127}")
_CONSUL_URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?")
_HOSTNAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9][a-z0-9-]{0,62})*")
_CERTIFICATE = re.compile(r"(/[A-Za-z0-9_@+-][A-Za-z0-9_.@+-]*)+")
_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,254}")


def check_container_name(name: str) -> str:
    """A container name that is a valid image repository too, since the image is `name:tag`."""
    if len(name) > 63 or not _REPOSITORY.fullmatch(name):
        raise ValueError(
            f"container_name {name!r}: use at most 63 lower-case letters, digits and single '.', '_' "
            "or '-' between them, such as 'my-service'"
        )
    return name


def check_image_tag(tag: str) -> str:
    """A tag alone: no registry, no repository, no digest."""
    if not _TAG.fullmatch(tag):
        raise ValueError(
            f"image_tag {tag!r}: give the tag alone, such as 'v1.2.0' (letters, digits, '_', '.', '-', "
            "at most 128); the repository is container_name"
        )
    return tag


def check_env_name(name: str) -> str:
    """Name of an environment variable."""
    if not _ENV_NAME.fullmatch(name):
        raise ValueError(f"environment_variables: {name!r} is no variable name; use letters, digits and '_'")
    return name


def check_restart_policy(policy: str) -> str:
    """One of Docker's restart policies; `on-failure` may carry a limit."""
    if not _RESTART.fullmatch(policy):
        raise ValueError(
            f"restart_policy {policy!r}: use 'no', 'always', 'unless-stopped', 'on-failure' or 'on-failure:5'"
        )
    return policy


def check_network_mode(mode: str) -> str:
    """`bridge`, `host`, `none`, `container:<name>`, or the name of a network on the host."""
    if not _NETWORK.fullmatch(mode):
        raise ValueError(f"network_mode {mode!r}: use 'bridge', 'host', 'none' or the name of a network")
    return mode


def check_mount_source(path: str) -> str:
    """An absolute path on the host, or the name of a volume."""
    if path.startswith("/"):
        return check_absolute_path(path)
    if not _VOLUME.fullmatch(path):
        raise ValueError(f"host_path {path!r}: use an absolute path or the name of a volume")
    return path


def check_absolute_path(path: str) -> str:
    """An absolute path that does not climb, without the colon that would split a mount."""
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path or ":" in path:
        raise ValueError(f"path {path!r}: use an absolute path without '..' or ':', such as '/data/app'")
    return path


def check_url_path(path: str) -> str:
    """The path part of a URL, as in `/health`."""
    if not path.startswith("/") or any(ord(character) <= 32 for character in path):
        raise ValueError(f"health_endpoint {path!r}: start with '/' and leave out spaces, such as '/health'")
    return path


def check_consul_url(url: str) -> str:
    """Where a Consul agent answers: scheme, host, port, and the path of a proxy."""
    if not _CONSUL_URL.fullmatch(url):
        raise ValueError(f"consul_url {url!r}: give scheme, host and port, such as 'http://127.0.0.1:8500'")
    return url


def check_ip_address(address: str) -> str:
    """One IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(address)
    except ValueError as exc:
        raise ValueError(f"host_ip {address!r}: give one address, such as '127.0.0.1'") from exc
    return address


def check_hostname(name: str) -> str:
    """A DNS name in lower case, without scheme, port or wildcard."""
    if not _HOSTNAME.fullmatch(name):
        raise ValueError(f"hostname {name!r}: give a DNS name in lower case, such as 'shop.example.com'")
    return name


def check_certificate_file(path: str) -> str:
    """An absolute path that the proxy's configuration can hold as it is."""
    if not _CERTIFICATE.fullmatch(path):
        raise ValueError(
            f"https_certificate_file {path!r}: give an absolute path of letters, digits and '_.@+-/', "
            "such as '/etc/gantry/shop.pem'"
        )
    return path
