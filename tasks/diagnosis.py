"""Judges what an examination found: each check passed, warned or failed, with the command that mends it.

Pure: the rules of the specification's pre-deployment checklist over frozen values. Asks nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby

from receiver.contract import DEFAULT_PORT, HostDisk, HostPort, HostState, OpenDeployment
from tasks.diagnosis_prefect import judge_place
from tasks.findings import HostFindings, HostLost, OpenWorkflow, Reach
from tasks.verdicts import Check, Diagnosis, failed, passed, warned

CLOCK_WARN_SECONDS = 30
CLOCK_FAIL_SECONDS = 300
CERTIFICATE_WARN_DAYS = 21
DISK_WARN_BYTES = 10 * 1000**3
DISK_FAIL_BYTES = 128 * 1024**2
OLDEST_ENGINE = (20, 10)
UNDER_WAY = timedelta(minutes=15)
_NOT_ALLOWED, _STALE, _REFUSED_KEY = 403, "stale-request", 401
_UNSEEN = "not seen: the host did not answer the signed call"


def judge_host(found: HostFindings | HostLost) -> Diagnosis:
    """All checks of one host, in the order in which trouble is best mended."""
    if isinstance(found, HostLost):
        register = f"python -m deployments.register --host {shlex.quote(found.name)} --address ADDRESS"
        mend = "mend the Prefect server first, then ask again" if found.needs_prefect else register
        return Diagnosis(found.name, (failed("saved host", found.problem, mend),))
    checks = tuple(check for judge in _JUDGES for check in judge(found))
    return Diagnosis(found.name, checks)


# -- the way there -------------------------------------------------------------------------------


def _reachability(found: HostFindings) -> Iterator[Check]:
    where = f"{found.address}:{found.port}"
    if found.link.reach is Reach.REACHED:
        yield passed("reachable", where)
        return
    detail = f" ({found.link.detail})" if found.link.detail else ""
    mend = {
        Reach.REFUSED: "on the host: python -m receiver --check && python -m receiver",
        Reach.TIMEOUT: f"is the host up, does a firewall let {found.port}/tcp through? "
        f"on the host: sudo ufw allow {found.port}/tcp",
        Reach.NAME_UNKNOWN: register_command(found, address="ADDRESS"),
        Reach.NO_ROUTE: f"ip route get {shlex.quote(found.address)}",
    }
    yield failed("reachable", f"{where}: {found.link.reach}{detail}", mend[found.link.reach])


def _tls(found: HostFindings) -> Iterator[Check]:
    if not found.tls:
        yield passed("TLS", "not used: calls are signed, and readable on their way")
    elif found.certificate is not None:
        yield _certificate(found)


def _certificate(found: HostFindings) -> Check:
    shown = found.certificate
    renew = (
        "on the host: renew HOOK_RECEIVER_TLS_CERT_FILE and its key, then start the receiver again; "
        "a certificate of your own goes into tls_ca_file of the block remote-host/" + found.name
    )
    if shown is None or shown.problem:
        return failed("TLS", shown.problem if shown and shown.problem else "no certificate", renew)
    if not shown.is_checked or shown.expires_at is None:
        mend = f"turn tls_verify on in the block remote-host/{found.name}: prefect block ls"
        return warned("TLS", "the certificate is not checked", mend)
    days = (shown.expires_at - found.looked_at).days
    told = f"the certificate is valid and expires in {days} days"
    return passed("TLS", told) if days >= CERTIFICATE_WARN_DAYS else warned("TLS", told, renew)


def _clock(found: HostFindings) -> Iterator[Check]:
    offset = found.clock_offset_seconds
    if offset is None:
        return
    told, mend = f"off by {offset:+.1f} s", "on both sides: sudo timedatectl set-ntp true"
    if abs(offset) > CLOCK_FAIL_SECONDS:
        yield failed("clock", f"{told}; requests are refused past {CLOCK_FAIL_SECONDS} s", mend)
    elif abs(offset) > CLOCK_WARN_SECONDS:
        yield warned("clock", told, mend)
    else:
        yield passed("clock", told)


def _allow_list(found: HostFindings) -> Iterator[Check]:
    refused = found.refused
    if found.link.reach is not Reach.REACHED or (refused is None and found.report is None):
        return
    if refused is None or refused.status != _NOT_ALLOWED:
        yield passed("allow-list", f"{found.link.own_address or 'this address'} may call")
        return
    seen = str(refused.extra.get("peer") or found.link.own_address or "the control host's address")
    mend = f"on the host: add {seen} to IP_WHITELIST, then start the receiver again"
    yield failed("allow-list", refused.detail, mend)


def _key(found: HostFindings) -> Iterator[Check]:
    refused = found.refused
    if found.report is not None:
        yield passed("key", "a signed call was accepted")
    elif refused is None:
        if found.link.reach is Reach.REACHED:
            yield failed(
                "key", found.problem or "no answer to a signed call", "on the host: python -m receiver"
            )
    elif refused.status == _REFUSED_KEY and refused.kind != _STALE:
        yield failed("key", f"{refused.title}: {refused.detail}", register_command(found))
    elif refused.status != _NOT_ALLOWED and refused.kind != _STALE:
        yield failed("signed call", f"{refused.title}: {refused.detail}", refused.next_step)


# -- what is there -------------------------------------------------------------------------------


def _engine(found: HostFindings) -> Iterator[Check]:
    health = found.health
    if health is None:
        return
    if not health.docker_connected or health.engine_version is None:
        yield failed(
            "engine", "the Docker Engine does not answer", "on the host: sudo systemctl start docker"
        )
        return
    told = f"Docker Engine {health.engine_version}, {health.architecture}"
    if found.report and found.report.engine and found.report.engine.storage_driver:
        told += f", {found.report.engine.storage_driver}"
    if version_numbers(health.engine_version) < OLDEST_ENGINE:
        mend = "on the host: sudo apt-get install --only-upgrade docker-ce (20.10 or newer)"
        yield failed("engine", told, mend)
    else:
        yield passed("engine", told)
    yield from _architecture(found, health.architecture)


def _architecture(found: HostFindings, architecture: str | None) -> Iterator[Check]:
    builder = found.build_engine
    if builder is None or builder.architecture is None or architecture is None:
        return
    if builder.architecture == architecture:
        yield passed("architecture", f"{architecture}, as the engine that builds")
    else:
        told = f"the host is {architecture}, the engine that builds is {builder.architecture}"
        yield warned("architecture", told, f"deploy with build_options.platform=linux/{architecture}")


def version_numbers(version: str) -> tuple[int, ...]:
    """`20.10.24+dfsg1` as (20, 10, 24)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _disks(found: HostFindings) -> Iterator[Check]:
    if found.report is None:
        return
    yield from judge_disks(found.report.disks, "on the host: docker system prune --all --filter until=168h")


def judge_disks(disks: Sequence[HostDisk], mend: str) -> Iterator[Check]:
    """One check for each device, with the folders on it."""
    for device, grouped in groupby(sorted(disks, key=lambda disk: disk.device), lambda disk: disk.device):
        on_it = list(grouped)
        free_bytes = on_it[0].free_bytes
        folders = " and ".join(disk.path for disk in on_it)
        told = f"{folders}: {free_bytes / 1e9:.1f} of {on_it[0].total_bytes / 1e9:.1f} GB free"
        name = f"disk {device}"
        if free_bytes < DISK_FAIL_BYTES:
            yield failed(name, told, mend)
        elif free_bytes < DISK_WARN_BYTES:
            yield warned(name, f"{told}; 10 GB are recommended", mend)
        else:
            yield passed(name, told)


def _ports(found: HostFindings) -> Iterator[Check]:
    if found.report is None:
        for wanted in found.wanted_ports:
            yield warned(f"port {wanted}", _UNSEEN, "mend what is above, then ask again")
        return
    for port in found.report.ports:
        yield _port(found, port)


def _port(found: HostFindings, port: HostPort) -> Check:
    name = f"port {port.port}/{port.protocol}"
    if port.free:
        return passed(name, "free")
    told = f"held by {port.holder or 'a process of another user'}"
    if port.container_name:
        mend = f"deploy {port.container_name} itself, or choose another host_port"
        return warned(name, f"{told}; a new version of {port.container_name} takes it over", mend)
    if (port.holder or "").startswith("container "):
        stop = f"docker stop {shlex.quote((port.holder or '').removeprefix('container '))}"
    else:
        stop = f"sudo ss -ln{port.protocol[0]}p 'sport = :{port.port}' shows the process; stop it"
    return failed(name, told, f"on the host: {stop}; or choose another host_port")


def _proxy(found: HostFindings) -> Iterator[Check]:
    """An older receiver does not tell; a host without rolling services needs none."""
    proxy = found.report.proxy if found.report else None
    if found.report is None or proxy is None:
        return
    needed = f"needed by {', '.join(proxy.services)}"
    install = "on the host: sudo apt-get install haproxy"
    config = f"{found.report.settings.get('HOOK_RECEIVER_STATE_DIR', '')}/proxy/haproxy.cfg"
    if proxy.version is None and not proxy.services:
        yield passed("HAProxy", f"not installed; strategy rolling needs it: {install}")
    elif proxy.version is None:
        yield failed("HAProxy", f"not installed, {needed}", install)
    elif proxy.services and not proxy.runs:
        mend = f"on the host: haproxy -c -f {shlex.quote(config)}; the receiver logs why it cannot start it"
        yield failed("HAProxy", f"does not run or does not answer, {needed}", mend)
    elif proxy.left_out:
        told = f"runs without {', '.join(proxy.left_out)}, whose certificate it refuses"
        yield failed(
            "HAProxy", told, "on the host: mend https_certificate_file; the receiver logs what is wrong"
        )
    else:
        told = f"runs, {needed}" if proxy.services else "not needed yet"
        yield passed("HAProxy", f"{proxy.version}, {told}")


# -- what is unfinished --------------------------------------------------------------------------


def _ledger(found: HostFindings) -> Iterator[Check]:
    if found.report is None:
        return
    checks = [_open_deployment(found, left) for left in found.report.open_deployments]
    yield from checks or [passed("deployments on the host", "all at rest")]


def _open_deployment(found: HostFindings, left: OpenDeployment) -> Check:
    name = f"deployment {left.container_name}:{left.image_tag}"
    told = f"{left.deployment_id} is {left.state}"
    if left.state is HostState.RESTORE_FAILED:
        mend = (
            f"prefect deployment run rollback-container/default --watch --param remote_host={found.name} "
            f"--param deployment_id={left.deployment_id}"
        )
        return failed(name, f"{told}: the previous container could not be brought back", mend)
    if left.is_held or found.looked_at - left.updated_at < UNDER_WAY:
        return passed(name, f"{told}, under way")
    return warned(name, f"{told} since {_told(left.updated_at)}", RECONCILE)


RECONCILE = "prefect deployment run reconcile/default --watch"


def _workflows(found: HostFindings) -> Iterator[Check]:
    if found.open_workflows is None:
        return
    checks = [_open_workflow(left, found.looked_at) for left in found.open_workflows]
    yield from checks or [passed("workflows in the records", "all ended")]


def _open_workflow(left: OpenWorkflow, now: datetime) -> Check:
    name = f"workflow {left.container_name}:{left.image_tag}"
    told = f"{left.workflow_id} is {left.state}"
    if now - left.updated_at < UNDER_WAY:
        return passed(name, f"{told}, under way")
    return warned(name, f"{told} since {_told(left.updated_at)}", RECONCILE)


def _told(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


# -- Prefect -------------------------------------------------------------------------------------


def _place(found: HostFindings) -> Iterator[Check]:
    if found.place is not None:
        yield from judge_place(found.place, register_command(found))


def register_command(found: HostFindings, address: str = "") -> str:
    """What registers the host anew, with the key that the receiver has."""
    port = f" --port {found.port}" if found.port != DEFAULT_PORT else ""
    return (
        "HMAC_SECRET_KEY=<the key of the host's receiver> python -m deployments.register "
        f"--host {shlex.quote(found.name)} --address {shlex.quote(address or found.address)}{port}"
        f"{' --tls' if found.tls else ''}"
    )


_JUDGES: tuple[Callable[[HostFindings], Iterator[Check]], ...] = (
    *(_reachability, _tls, _clock, _allow_list, _key),
    *(_engine, _disks, _ports, _proxy, _ledger, _workflows, _place),
)
