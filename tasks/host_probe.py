"""What is on a host, as JSON. Sent over SSH and run there by the host's own Python, as root.

The standard library alone: nothing of ours, and nothing else, is on the host yet.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import platform
import pwd
import re
import shutil
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

PROGRAMS = ("useradd", "usermod", "userdel", "runuser", "tar", "flock")
MARKER = ".gantry-host"
ASK_SECONDS = 5


class Engine(http.client.HTTPConnection):
    """A connection to the Docker Engine at unix:///path or tcp://host:port."""

    def __init__(self, docker_host: str) -> None:
        scheme, _, self._where = docker_host.partition("://")
        super().__init__("engine" if scheme == "unix" else self._where, timeout=60)
        self._is_unix = scheme == "unix"

    def connect(self) -> None:
        """Open the socket."""
        if not self._is_unix:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._where)

    def ask(self, method: str, path: str) -> tuple[int, bytes]:
        """Status and body of one call."""
        self.request(method, path)
        answer = self.getresponse()
        return answer.status, answer.read()


def engine_version(docker_host: str) -> tuple[str, str]:
    """The engine's version, or why it has none."""
    try:
        status, body = Engine(docker_host).ask("GET", "/version")
        return (str(json.loads(body)["Version"]), "") if status == 200 else ("", f"it answers {status}")
    except (OSError, http.client.HTTPException, ValueError, KeyError) as exc:
        return "", str(exc)


def socket_group(docker_host: str) -> int | None:
    """Group of the engine's socket; None when the engine is reached otherwise."""
    scheme, _, path = docker_host.partition("://")
    return Path(path).stat().st_gid if scheme == "unix" and Path(path).exists() else None


def api_error(url: str) -> str:
    """Why the Prefect API cannot be used from here; empty when it can."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=ASK_SECONDS) as answer:
            return "" if answer.status == 200 else f"it answers {answer.status}"
    except urllib.error.HTTPError as exc:
        return "" if exc.code in {401, 403} else f"it answers {exc.code}"
    except OSError as exc:
        return str(getattr(exc, "reason", exc))


def port_is_taken(port: int) -> bool:
    """True when something listens there."""
    try:
        socket.create_server(("0.0.0.0", port)).close()  # noqa: S104 - tried, not served
    except OSError:
        return True
    return False


def free_bytes(folder: Path) -> int:
    """Room on the disk where the folder is, or would be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def user_exists(name: str) -> bool:
    """Is there a user of that name."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def digest(path: Path) -> str:
    """SHA-256 of a file; empty when there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def read_json(path: Path) -> Any:
    """A file's content; None when there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def releases(prefix: Path) -> list[str]:
    """Names of the releases that are installed to the end."""
    return sorted(path.parent.name for path in prefix.glob("releases/*/.complete"))


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """Everything that is to be known; `asked` as `provisioning.question` gives it."""
    prefix = Path(asked["prefix"])
    version, trouble = engine_version(asked["docker_host"])
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "libc": "-".join(platform.libc_ver()).strip("-"),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "has_systemd": Path("/run/systemd/system").is_dir(),
        "engine_version": version,
        "engine_error": trouble,
        "engine_group": socket_group(asked["docker_host"]),
        "api_error": api_error(asked["prefect_api_url"]),
        "free_bytes": free_bytes(prefix),
        "missing_programs": [name for name in PROGRAMS if shutil.which(name) is None],
        "has_ensurepip": importlib.util.find_spec("ensurepip") is not None,
        "user_exists": user_exists(asked["service_user"]),
        "port_is_taken": port_is_taken(asked["port"]),
        "marker": read_json(prefix / MARKER),
        "is_occupied": prefix.is_dir() and any(prefix.iterdir()),
        "releases": releases(prefix),
        "local_settings": digest(prefix / "local.env"),
    }


def remove_containers(docker_host: str, label: str) -> list[str]:
    """Remove every container that carries the label; returns their names."""
    wanted = urllib.parse.quote(json.dumps({"label": [label]}))
    status, body = Engine(docker_host).ask("GET", f"/containers/json?all=1&filters={wanted}")
    if status != 200:
        raise SystemExit(f"the Docker Engine answers {status}: {body.decode(errors='replace')}")
    removed = []
    for container in json.loads(body):
        status, body = Engine(docker_host).ask("DELETE", f"/containers/{container['Id']}?force=1&v=1")
        if status not in {204, 404}:
            raise SystemExit(f"{container['Names']}: {status} {body.decode(errors='replace')}")
        removed.append(re.sub("^/", "", container["Names"][0]))
    return removed


def main(action: str, *arguments: str) -> int:
    """`look <json>`, or `remove-containers <docker host> <label>`; writes JSON."""
    found: Any = look(json.loads(arguments[0])) if action == "look" else remove_containers(*arguments)
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
