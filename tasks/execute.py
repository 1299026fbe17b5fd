"""Stage 3 on the host: prepare, stop the old, start the new. The flow holds the container's lock.

Not retried by Prefect: each operation is journalled and idempotent, and a failure is undone.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefect.blocks.system import Secret

from receiver.contract import DeployRequest, Stage
from tasks.errors import OPERATION_POLICIES, DeploymentFailed
from tasks.hosting import this_host
from tasks.parameters import load_seconds
from tasks.policies import operation

SECRET_PREFIX = "secret://"  # noqa: S105 - a scheme, not a secret


def deploy_seconds(request: DeployRequest) -> float:
    """Time for load and create: the policy's, and more for a package that takes longer to load."""
    size_bytes = request.image.size_bytes if request.image else 0
    return OPERATION_POLICIES["deploy_container"].timeout_ms / 1000 + load_seconds(size_bytes)


def stop_seconds(request: DeployRequest) -> float:
    """Time to stop the old container: its grace, and the policy's on top."""
    policy = OPERATION_POLICIES["stop_existing_container"]
    return request.deployment_config.stop_timeout_seconds + policy.timeout_ms / 1000


async def resolve_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Values with `secret://<block>` replaced by that Prefect Secret block; never logged."""
    resolved = dict(variables)
    for name, value in variables.items():
        if value.startswith(SECRET_PREFIX):
            resolved[name] = await _secret(name, value.removeprefix(SECRET_PREFIX))
    return resolved


async def _secret(variable: str, block: str) -> str:
    try:
        secret: Secret[str] = await Secret.aload(block)
    except ValueError as exc:
        raise DeploymentFailed(
            f"environment_variables.{variable}: there is no Secret block {block!r}",
            next_step=f"Create it: prefect block create secret (name it {block!r}).",
        ) from exc
    return str(secret.get())


@operation("deploy_container", Stage.DEPLOY, attempts=1, timeout=False)
async def deploy_container(deployment_id: str) -> None:
    """Load the verified package and create the new container while the old one serves."""
    operations = this_host().operations(deployment_id)
    config = operations.entry.request.deployment_config
    await operations.deploy_container(await resolve_secrets(config.environment_variables))


@operation("stop_existing_container", Stage.DEPLOY, attempts=1, timeout=False)
async def stop_existing_container(deployment_id: str) -> None:
    """Stop the old container and keep it for the way back."""
    await this_host().operations(deployment_id).stop_existing_container()


@operation("start_container", Stage.DEPLOY, attempts=1)
async def start_container(deployment_id: str) -> None:
    """Start the new container under its name."""
    await this_host().operations(deployment_id).start_container()
