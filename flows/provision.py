"""`provision-host`: a host gets receiver and worker over SSH, is updated by the same, or loses them again.

Holds the order of the steps alone; each is a task of `tasks.provision`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed

from blocks import load_if_saved
from blocks.hmac_secret import HmacSecret
from blocks.receiver_client import ReceiverError
from blocks.remote_host import RemoteHost
from receiver.contract import Port
from tasks import provision, provisioning
from tasks.errors import GantryError
from tasks.provision import Plan
from tasks.provisioning import ProvisionParameters


def _run_name() -> str:
    asked = flow_run.parameters
    return f"{'remove' if asked.get('remove') else 'provision'} {asked['name']}"


@flow(name="provision-host", flow_run_name=_run_name)
async def provision_host(
    name: provisioning.HostName,
    address: provisioning.Address | None = None,
    user: provisioning.LoginName | None = None,
    ssh_port: Port | None = None,
    key_file: Path | None = None,
    host_key: provisioning.Fingerprint | None = None,
    known_hosts_file: Path | None = None,
    port: Port | None = None,
    allow: list[provisioning.Network] | None = None,
    prefix: provisioning.Prefix = provisioning.DEFAULT_PREFIX,
    service_user: provisioning.ServiceUser = provisioning.DEFAULT_USER,
    docker_host: provisioning.EngineAddress = provisioning.DEFAULT_ENGINE,
    python: provisioning.HostPath | None = None,
    prefect_api_url: provisioning.ApiUrl | None = None,
    wheelhouse: Path | None = None,
    package_index: bool = False,
    remove: bool = False,
    remove_containers: bool = False,
    host_is_gone: bool = False,
) -> dict[str, Any] | State[Any]:
    """Set a host up, bring it up to date, or (`remove`) take everything away again; safe to run twice.

    What a host was registered with need not be given again. Returns what was done; a run that did not get
    there ends Failed with the cause and the next step in its message.
    """
    saved = await load_if_saved(RemoteHost, name)
    asked = provisioning.parameters(
        provisioning.known_of(saved),
        name=name,
        address=address,
        user=user,
        ssh_port=ssh_port,
        key_file=key_file,
        host_key=host_key,
        known_hosts_file=known_hosts_file,
        port=port,
        allow=allow,
        prefix=prefix,
        service_user=service_user,
        docker_host=docker_host,
        python=python,
        prefect_api_url=prefect_api_url,
        wheelhouse=wheelhouse,
        package_index=package_index,
        remove=remove,
        remove_containers=remove_containers,
        host_is_gone=host_is_gone,
    )
    try:
        return await (_remove(asked, saved) if remove else _provision(asked, saved))
    except GantryError as exc:
        known = exc.next_step in str(exc)
        return Failed(message=str(exc) if known else f"{exc}. Next: {exc.next_step}")
    except ReceiverError as exc:
        return Failed(message=str(exc))


async def _provision(asked: ProvisionParameters, saved: RemoteHost | None) -> dict[str, Any]:
    provisioning.check_paths(asked)
    host = provisioning.host_block(asked, saved)
    pool = host.pool_under(asked.name)
    plan = await _make_plan(asked)
    await provision.prepare_host(plan)
    if not plan.is_installed:
        await provision.send_packages(plan)
    await provision.install_packages(plan)
    written = await provision.write_settings(plan, pool)
    pids = await provision.start_services(plan, written.stamp)
    try:
        version = await provision.check_receiver(host.model_copy(update={"hmac_secret": written.secret}))
        await _register(asked.name, host, written.secret)
        await provision.await_worker(pool)
    except Exception:
        await provision.show_logs(plan)
        raise
    await provision.prune_releases(plan)
    done = provision.outcome(plan, host, version, pids)
    await provision.show_outcome(asked.name, done)
    return done


async def _make_plan(asked: ProvisionParameters) -> Plan:
    """Look, before anything is changed."""
    login = await provision.connect_to_host(asked)
    api_url = provision.api_url_for(asked, login)
    facts = await provision.inspect_host(asked, login, api_url)
    wheels = await provision.gather_packages(asked, facts)
    return Plan(asked, login, facts, api_url, wheels, provision.manifest_of(asked, wheels))


async def _register(name: str, host: RemoteHost, secret: HmacSecret) -> None:
    """The host as Prefect knows it: blocks, work pool, and what its worker runs."""
    from flows.receive import receive_container
    from flows.restore import restore_container

    await provision.register_host(name, host, secret, [receive_container, restore_container])


async def _remove(asked: ProvisionParameters, saved: RemoteHost | None) -> dict[str, Any]:
    """The host first: what Prefect knows of it is needed to begin again."""
    gone: list[str] = []
    if not asked.host_is_gone:
        login = await provision.connect_to_host(asked)
        gone += await provision.remove_from_host(asked, login, is_saved=saved is not None)
    gone += await provision.forget_host(asked.name, provisioning.host_block(asked, saved))
    get_run_logger().info("removed: %s", ", ".join(gone) or "nothing was there")
    return {"name": asked.name, "removed": gone}
