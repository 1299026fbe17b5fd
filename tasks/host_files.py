"""The files that a host gets: settings, units, the supervisor's list. Pure.

The environment file holds the key; whoever renders it passes it on by standard input alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from pydantic import SecretStr

from tasks.errors import ParametersRefused
from tasks.host_facts import HostFacts
from tasks.provisioning import SERVICES, Layout, ProvisionParameters

_HEADER = (
    "# Written by provision-host, and again at each run. Own settings belong into local.env: they win.\n"
)
_DESCRIPTIONS = {"receiver": "Gantry's hook receiver", "worker": "Prefect worker of Gantry"}


def environment(
    asked: ProvisionParameters,
    facts: HostFacts,
    api_url: str,
    keys: Sequence[SecretStr],
    credentials: Mapping[str, SecretStr],
) -> dict[str, str]:
    """What receiver and worker are told; `keys` current first, `credentials` for the Prefect API."""
    address = facts.control_address
    control = f"{address}/{128 if ':' in address else 32}"
    networks = dict.fromkeys([control, *asked.allow, "127.0.0.0/8", "::1/128"])
    return {
        "HMAC_SECRET_KEY": ",".join(key.get_secret_value() for key in keys),
        "IP_WHITELIST": ",".join(networks),
        "HOOK_RECEIVER_PORT": str(asked.port),
        "HOOK_RECEIVER_STATE_DIR": asked.layout.at("state"),
        "DOCKER_HOST": asked.docker_host,
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": asked.layout.at("home", "prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "HOME": asked.layout.at("home"),
        # Prefect's runner keeps files in a folder of the temporary one that another user may have made.
        "TMPDIR": asked.layout.at("tmp"),
        "PYTHONUNBUFFERED": "1",
        **{name: secret.get_secret_value() for name, secret in credentials.items()},
    }


def environment_file(variables: Mapping[str, str]) -> str:
    """The variables as systemd and the supervisor both read them; raises `ParametersRefused`."""
    for name, value in variables.items():
        if "'" in value or not value.isprintable():
            raise ParametersRefused(
                name, "its value holds a quote or a control character", "set it without, or in local.env"
            )
    return _HEADER + "".join(f"{name}='{value}'\n" for name, value in variables.items())


def read_key(environment_text: str) -> list[SecretStr]:
    """The keys of an environment file that was written before, current first."""
    for line in environment_text.splitlines():
        name, _, value = line.partition("=")
        if name == "HMAC_SECRET_KEY":
            return [SecretStr(key) for key in value.strip("'").split(",") if key]
    return []


def commands(layout: Layout, name: str, pool: str) -> dict[str, list[str]]:
    """Program and arguments of each service."""
    worker = ["-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--type", "process"]
    arguments = {"receiver": ["-m", "receiver"], "worker": [*worker, "--install-policy", "never"]}
    return {service: [layout.python, *arguments[service]] for service in SERVICES}


# The receiver starts HAProxy, which goes on while the receiver is restarted, and takes ports such as 443.
_OF_HAPROXY = """\
KillMode=process
AmbientCapabilities=CAP_NET_BIND_SERVICE
"""


def unit(layout: Layout, service: str, command: Sequence[str]) -> str:
    """A systemd unit. Nothing that is told here needs quoting: paths and names are checked before."""
    after = f"network-online.target docker.service {'' if service == 'receiver' else layout.unit('receiver')}"
    return f"""\
# Written by provision-host, and again at each run.
[Unit]
Description={_DESCRIPTIONS[service]}
Wants=network-online.target
After={after.strip()}
StartLimitIntervalSec=0

[Service]
User={layout.service_user}
WorkingDirectory={layout.at("home")}
EnvironmentFile={layout.environment_file}
EnvironmentFile=-{layout.local_file}
ExecStart={" ".join(command)}
Restart=always
RestartSec=2
TimeoutStopSec=45
NoNewPrivileges=yes
{_OF_HAPROXY if service == "receiver" else ""}
[Install]
WantedBy=multi-user.target
"""


def supervisor_file(layout: Layout, services: Mapping[str, Sequence[str]]) -> str:
    """`services.json`, which `deployments.supervisor` reads."""
    return json.dumps(
        {
            "services": services,
            "directory": layout.at("home"),
            "environment": [layout.environment_file, layout.local_file],
        },
        indent=2,
    )


def service_files(
    layout: Layout, services: Mapping[str, Sequence[str]], *, has_systemd: bool
) -> dict[str, str]:
    """Path and text of what says how the services run."""
    if not has_systemd:
        return {layout.at("services.json"): supervisor_file(layout, services)}
    return {layout.unit_file(name): unit(layout, name, argv) for name, argv in services.items()}


def release_name(manifest: Mapping[str, str], facts: HostFacts, *, package_index: bool) -> str:
    """Name of what these files give with the host's Python; the same name is not installed twice."""
    return _digest(manifest, facts.python, facts.python_version, package_index)


def start_stamp(release: str, files: Mapping[str, str], local_settings: str) -> str:
    """What running services were started as; another stamp means that they have to start again."""
    return _digest(release, files, local_settings)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()[:16]
