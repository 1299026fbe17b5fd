"""The steps of setting a host up and of taking it away again, one task each; every one may run twice.

What is decided stands in `host_facts`, `host_files` and `host_commands`; here it is done.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefect import Flow
from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    aupdate_progress_artifact,
)
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings
from pydantic import SecretStr

from blocks import load_if_saved
from blocks.hmac_secret import HmacSecret
from blocks.receiver_client import ReceiverError
from blocks.remote_host import RemoteHost
from tasks import host_commands, host_facts, host_files, registration, ssh, wheelhouse
from tasks.errors import GantryError, ParametersRefused, RetryPolicy
from tasks.host_facts import HostFacts, Marker
from tasks.policies import operation
from tasks.provisioning import ProvisionParameters
from tasks.ssh import SshSession
from tasks.store import home

AnswerT = TypeVar("AnswerT")

KEY_BYTES = 32
_QUICK = RetryPolicy(timeout_ms=60_000)
_DOWNLOAD = RetryPolicy(max_attempts=2, timeout_ms=900_000)
_SEND = RetryPolicy(timeout_ms=3_600_000)
_INSTALL = RetryPolicy(max_attempts=2, timeout_ms=1_200_000)
_START = RetryPolicy(max_attempts=2, timeout_ms=900_000)
_AWAITED = RetryPolicy(max_attempts=1, timeout_ms=120_000)
_RECEIVER_SECONDS = 30.0
_WORKER_SECONDS = 90.0
_PAUSE_SECONDS = 0.5


class HostNotReady(GantryError):
    """The host is installed and does not work as it should"""

    next_step = "Read the services' last lines in this run's log, put it right, and run this again."


@dataclass(frozen=True)
class Login:
    """A way in that was tried: who, and whether root is reached by sudo."""

    target: ssh.SshTarget
    with_sudo: bool
    control_address: str


@dataclass(frozen=True)
class Plan:
    """What is to be installed on a host, and how."""

    asked: ProvisionParameters
    login: Login
    facts: HostFacts
    api_url: str
    wheels: Path
    manifest: Mapping[str, str]

    @property
    def release(self) -> str:
        """Name of the installation."""
        index = self.asked.package_index
        return host_files.release_name(self.manifest, self.facts, package_index=index)

    @property
    def is_installed(self) -> bool:
        """True when the host has exactly this."""
        return self.release in self.facts.releases


@dataclass(frozen=True)
class Written:
    """The keys that the host was given, and the stamp of everything that its services start from."""

    secret: HmacSecret
    stamp: str


@asynccontextmanager
async def _as_root(login: Login) -> AsyncIterator[SshSession]:
    async with ssh.connect(login.target) as session:
        session.with_sudo = login.with_sudo
        yield session


@operation("connect_to_host", policy=_QUICK)
async def connect_to_host(asked: ProvisionParameters) -> Login:
    """Prove the host and the login, and find the way to root; raises what `tasks.ssh` raises."""
    async with ssh.connect(asked.target) as session:
        user_id, connection = (await session.run(host_commands.WHO_AM_I)).splitlines()[:2]
        if user_id != "0":
            try:
                await session.run(host_commands.SUDO_WORKS)
            except ssh.CommandFailed as exc:
                raise host_facts.HostUnsuited(
                    f"{asked.user} is not root there, and sudo asks for a password",
                    next_step=f"Give user=root, or let sudo trust {asked.user} (NOPASSWD in /etc/sudoers.d).",
                ) from exc
    return Login(asked.target, user_id != "0", host_facts.control_address(connection))


def api_url_for(asked: ProvisionParameters, login: Login) -> str:
    """The Prefect API as the host reaches it; raises `ParametersRefused` when this run has no server."""
    own = asked.prefect_api_url or os.environ.get("PREFECT_API_URL", "")
    if not own:
        raise ParametersRefused(
            "prefect_api_url", "this run has no Prefect server", "give its URL, or set PREFECT_API_URL"
        )
    return asked.prefect_api_url or host_facts.api_url_for_host(own, login.control_address)


@operation("inspect_host", policy=_QUICK)
async def inspect_host(asked: ProvisionParameters, login: Login, api_url: str) -> HostFacts:
    """What is on the host; raises `HostUnsuited` naming everything that stands in the way."""
    async with _as_root(login) as session:
        python = await _find_python(session, asked.python)
        question = json.dumps(host_facts.question(asked, api_url))
        said = await session.run(host_commands.probe(python, "look", question), _probe_source())
    facts = HostFacts.model_validate({**json.loads(said), "control_address": login.control_address})
    host_facts.check_host(asked, facts, api_url)
    return facts


async def _find_python(session: SshSession, wanted: str | None) -> str:
    try:
        return (await session.run(host_commands.find_python(wanted))).strip()
    except ssh.CommandFailed as exc:
        raise host_facts.HostUnsuited(
            f"no Python 3.11 to 3.13 that every user may run: {exc}",
            next_step="Install one (Debian, Ubuntu: apt-get install python3), or give its path as python.",
        ) from exc


def _probe_source() -> Iterator[bytes]:
    return ssh.blocks_of(host_commands.PROBE)


@operation("gather_packages", policy=_DOWNLOAD)
async def gather_packages(asked: ProvisionParameters, facts: HostFacts) -> Path:
    """The folder of wheels that the host installs from, made here when it was not given."""
    if asked.wheelhouse is not None:
        return asked.wheelhouse
    if asked.package_index:
        return await asyncio.to_thread(wheelhouse.make_own, home())
    platform = wheelhouse.Platform(facts.python_version, facts.machine, facts.libc)
    return await asyncio.to_thread(wheelhouse.make, home(), platform)


def manifest_of(asked: ProvisionParameters, wheels: Path) -> dict[str, str]:
    """Digest of each file that the host is to have, by name."""
    whole = wheelhouse.manifest(wheels)
    if not asked.package_index:
        return whole
    own = ("gantry_deploy-", "constraints.txt")
    return {name: digest for name, digest in whole.items() if name.startswith(own)}


@operation("prepare_host", policy=_QUICK)
async def prepare_host(plan: Plan) -> None:
    """The services' user, in the engine's group, and the folders."""
    asked, facts = plan.asked, plan.facts
    marker = host_commands.marker_of(asked.name, asked.port, asked.layout, facts)
    async with _as_root(plan.login) as session:
        await session.run(host_commands.prepare(asked.layout, marker, facts.engine_group))


@operation("send_packages", policy=_SEND)
async def send_packages(plan: Plan) -> int:
    """Send the files that the host lacks; returns their size in bytes."""
    async with _as_root(plan.login) as session:
        there = host_commands.read_digests(await session.run(host_commands.sent_before(plan.asked.layout)))
        lacking = [plan.wheels / name for name, digest in plan.manifest.items() if there.get(name) != digest]
        size_bytes = sum(path.stat().st_size for path in lacking)
        get_run_logger().info(
            "sending %d of %d files, %.1f MB", len(lacking), len(plan.manifest), size_bytes / 1e6
        )
        if lacking:
            await _send(session, host_commands.unpack(plan.asked.layout), lacking, size_bytes)
    return size_bytes


async def _send(session: SshSession, command: ssh.Command, files: Iterable[Path], size_bytes: int) -> None:
    """Send files as a tar, with a progress artifact that moves each second."""
    counted = [0]

    def count(block_bytes: int) -> None:
        counted[0] += block_bytes

    artifact_id = await acreate_progress_artifact(0.0, description="Packages sent to the host")
    sending = asyncio.create_task(session.run(command, tar_of(files), sent=count))
    try:
        while not (await asyncio.wait([sending], timeout=1))[0]:
            percent = min(100.0, 100.0 * counted[0] / size_bytes)
            await aupdate_progress_artifact(artifact_id, percent)
        await sending
    finally:
        sending.cancel()
    await aupdate_progress_artifact(artifact_id, 100.0)


def tar_of(files: Iterable[Path]) -> Iterator[bytes]:
    """The files as a tar stream, owned by root and readable by all."""
    for path in files:
        header = tarfile.TarInfo(path.name)
        header.size = path.stat().st_size
        yield header.tobuf()
        yield from ssh.blocks_of(path)
        yield bytes(-header.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


@operation("install_packages", policy=_INSTALL)
async def install_packages(plan: Plan) -> None:
    """The release's virtual environment, and `current` leading to it."""
    command = host_commands.install(
        plan.asked.layout, plan.release, plan.facts.python, plan.manifest, index=plan.asked.package_index
    )
    async with _as_root(plan.login) as session:
        await session.run(command)


@operation("write_settings", policy=_QUICK)
async def write_settings(plan: Plan, pool: str) -> Written:
    """Key, allow-list and the rest for the services; a key that is there is kept."""
    asked, facts, layout = plan.asked, plan.facts, plan.asked.layout
    async with _as_root(plan.login) as session:
        secret = await _choose_keys(session, asked)
        keys = [secret.current, *secret.previous]
        variables = host_files.environment(asked, facts, plan.api_url, keys, _prefect_credentials())
        services = host_files.commands(layout, asked.name, pool)
        files = host_files.service_files(layout, services, has_systemd=facts.has_systemd)
        settings = host_files.environment_file(variables)
        await _write(session, layout.environment_file, settings, asked.service_user, "600")
        for path, text in files.items():
            await _write(session, path, text, "root", "644")
    everything = {**files, layout.environment_file: settings}
    return Written(secret, host_files.start_stamp(plan.release, everything, facts.local_settings))


async def _write(session: SshSession, path: str, text: str, owner: str, mode: str) -> None:
    await session.run(host_commands.write(path, owner, mode), [text.encode()])


async def _choose_keys(session: SshSession, asked: ProvisionParameters) -> HmacSecret:
    """Those of the block; else those that the host has; else a new one."""
    if (saved := await load_if_saved(HmacSecret, asked.name)) is not None:
        return saved
    text = await session.run(host_commands.read(asked.layout.environment_file))
    keys = host_files.read_key(text) or [SecretStr(secrets.token_hex(KEY_BYTES))]
    return HmacSecret(current=keys[0], previous=keys[1:])


def _prefect_credentials() -> dict[str, SecretStr]:
    api = get_current_settings().api
    told = {"PREFECT_API_KEY": api.key, "PREFECT_API_AUTH_STRING": api.auth_string}
    return {name: secret for name, secret in told.items() if secret is not None}


@operation("start_services", policy=_START)
async def start_services(plan: Plan, stamp: str) -> dict[str, int]:
    """Receiver and worker run, as they were written last; returns their process ids on the host."""
    has_systemd = plan.facts.has_systemd
    async with _as_root(plan.login) as session:
        said = await session.run(host_commands.start(plan.asked.layout, stamp, has_systemd=has_systemd))
    return host_commands.read_pids(said, has_systemd=has_systemd)


@operation("check_receiver", policy=_AWAITED)
async def check_receiver(host: RemoteHost) -> str:
    """The receiver's version, once `/health` and a signed call succeed; raises why they do not in time."""
    return await _patiently(lambda: _ask_receiver(host), _RECEIVER_SECONDS)


async def _ask_receiver(host: RemoteHost) -> str:
    async with host.receiver() as receiver:
        health = await receiver.health()
        if not health.docker_connected:
            raise HostNotReady("the receiver answers and does not reach the Docker Engine")
        await receiver.versions()
    return health.version


@operation("register_host", policy=_QUICK)
async def register_host(
    name: str, host: RemoteHost, secret: HmacSecret, flows: Sequence[Flow[Any, Any]]
) -> None:
    """Blocks, work pool, and one Prefect deployment of each flow that the host's worker runs."""
    saved = await registration.save_host(name, host, secret)
    pool = saved.pool_under(name)
    await registration.ensure_work_pool(pool)
    for flow in flows:
        await registration.register_flow(flow, name, pool, registration.host_variables(saved))


@operation("forget_host", policy=_QUICK)
async def forget_host(name: str, host: RemoteHost) -> list[str]:
    """Prefect knows nothing of the host any more; returns what it knew."""
    return await registration.forget_host(name, host.pool_under(name))


@operation("await_worker", policy=_AWAITED)
async def await_worker(pool: str) -> None:
    """The host's worker is online; raises `HostNotReady` when it is not in time."""
    await _patiently(lambda: _ask_for_worker(pool), _WORKER_SECONDS)


async def _ask_for_worker(pool: str) -> None:
    if not await registration.has_worker(pool):
        raise HostNotReady(f"no worker of pool {pool} came online in {_WORKER_SECONDS:.0f} s", retryable=True)


async def _patiently(ask: Callable[[], Awaitable[AnswerT]], seconds: float) -> AnswerT:
    """What `ask` gives, asked again for so long while it fails in a way that may pass."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await ask()
        except (HostNotReady, ReceiverError) as exc:
            if not exc.retryable or asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


@operation("prune_releases", policy=_QUICK)
async def prune_releases(plan: Plan) -> None:
    """Earlier installations go, now that this one has proven itself."""
    async with _as_root(plan.login) as session:
        await session.run(host_commands.prune(plan.asked.layout, plan.release, plan.manifest))


def outcome(plan: Plan, host: RemoteHost, version: str, pids: Mapping[str, int]) -> dict[str, Any]:
    """What the run came to, for its result and its report."""
    return {
        "name": plan.asked.name,
        "receiver": host.base_url,
        "version": version,
        "release": plan.release,
        "installed": "before" if plan.is_installed else "now",
        "supervision": plan.facts.supervision,
        "pids": dict(pids),
        "python": f"{plan.facts.python} ({plan.facts.python_version})",
        "engine": plan.facts.engine_version,
        "allowed": plan.facts.control_address,
    }


async def show_outcome(name: str, done: Mapping[str, Any]) -> None:
    """Log it, and write the report `host-<name>`."""
    get_run_logger().info("%s is ready: %s", name, done)
    rows = "".join(f"| {key} | {value} |\n" for key, value in done.items())
    await acreate_markdown_artifact(
        f"# {name} is ready\n\n| | |\n|---|---|\n{rows}",
        key=f"provisioned-{name}",
        description=f"How {name} is set up",
    )


async def show_logs(plan: Plan) -> None:
    """The services' last lines, into this run's log."""
    command = host_commands.tail_logs(plan.asked.layout, has_systemd=plan.facts.has_systemd)
    async with _as_root(plan.login) as session:
        get_run_logger().warning("the services said last:\n%s", await session.run(command))


@operation("remove_from_host", policy=_START)
async def remove_from_host(asked: ProvisionParameters, login: Login, *, is_saved: bool) -> list[str]:
    """Services, user and folder go; returns what was there, for the log."""
    async with _as_root(login) as session:
        text = await session.run(host_commands.read(asked.layout.at(".gantry-host")))
        marker = _own_marker(asked, text, is_saved=is_saved)
        gone = await _remove_containers(session, asked)
        if marker is not None:
            await session.run(host_commands.remove(asked.layout, marker))
            gone.append(f"services, user {marker.service_user} and {asked.prefix}")
    return gone


def _own_marker(asked: ProvisionParameters, text: str, *, is_saved: bool) -> Marker | None:
    """What the prefix says of itself; None when nothing is there, and nothing is known to be."""
    if not text:
        _expect_nothing(asked, is_saved=is_saved)
        return None
    marker = Marker.model_validate_json(text)
    if marker.name != asked.name:
        raise ParametersRefused("prefix", f"{asked.prefix} belongs to {marker.name}", "give that name")
    return marker


def _expect_nothing(asked: ProvisionParameters, *, is_saved: bool) -> None:
    if is_saved:
        raise ParametersRefused(
            "prefix",
            f"{asked.name} is registered, and {asked.prefix} on the host holds no installation",
            "give the prefix that it was installed with, or host_is_gone=true to forget it in Prefect alone",
        )


async def _remove_containers(session: SshSession, asked: ProvisionParameters) -> list[str]:
    if not asked.remove_containers:
        return []
    python = await _find_python(session, asked.python)
    command = host_commands.remove_containers(python, asked.docker_host)
    names: list[str] = json.loads(await session.run(command, _probe_source()))
    return [f"container {name}" for name in names]
