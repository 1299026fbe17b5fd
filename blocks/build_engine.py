"""Which Docker Engine builds: prefect-docker's `DockerHost` block `docker-host/build`, or `DOCKER_HOST`.

Reads the block's document alone: importing prefect-docker for one address costs every run its time.
"""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

BLOCK_TYPE = "docker-host"
BLOCK_NAME = "build"


async def find_build_engine() -> str | None:
    """Address of the engine that the block `docker-host/build` names; None when it is not saved."""
    async with get_client() as client:
        try:
            document = await client.read_block_document_by_name(BLOCK_NAME, BLOCK_TYPE)
        except ObjectNotFound:
            return None
    return str(document.data["base_url"])
