"""The block `RemoteHost`: where a target host is, and the signed client of its receiver.

Owns the way from a name or an address to a host. Must not import the daemon: of the receiver,
only `contract`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Self

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.utilities.slugify import slugify
from pydantic import ConfigDict, Field, HttpUrl, field_validator, model_validator

from blocks import load_if_saved
from blocks.hmac_secret import HmacSecret
from blocks.receiver_client import ReceiverClient, ReceiverConfig
from receiver import contract

POOL_PREFIX = "host-"
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")

PortNumber = Annotated[int, Field(ge=1, le=65535)]


class RemoteHost(Block):
    """
    A host that runs containers: its address, its work pool, and the key of its receiver.

    Example:
        Load a stored host:
        ```python
        from blocks.remote_host import RemoteHost

        remote_host = RemoteHost.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Remote Host"
    _logo_url = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/14a315b79990200db7341e42553e23650b34bb96-250x250.png"
    )
    _documentation_url = HttpUrl("https://docs.prefect.io/v3/concepts/blocks")

    # The nested key must not be quoted by pydantic's message.
    model_config = ConfigDict(hide_input_in_errors=True)

    address: str = Field(description="Host name or IP address, without scheme and port.")
    port: PortNumber = Field(default=contract.DEFAULT_PORT, description="Port of the hook receiver.")
    work_pool: str | None = Field(
        default=None, description="Work pool of the host; without one, 'host-' and the name of the block."
    )
    worker_python: str | None = Field(
        default=None,
        description="Python that the host's worker runs with: told so, its runs start a second sooner.",
    )
    hmac_secret: HmacSecret | None = Field(
        default=None, description="Keys that sign requests; without them, HMAC_SECRET_KEY."
    )
    tls: bool = Field(default=False, description="Whether the receiver is reached by HTTPS.")
    tls_ca_file: Path | None = Field(
        default=None, description="Certificates (PEM) to trust; without a file, the public ones."
    )
    tls_verify: bool = Field(
        default=True, description="Whether the certificate is checked; turn off for a first try only."
    )
    ssh_user: str | None = Field(
        default=None, description="User for setting the host up, and for rsync, over SSH."
    )
    ssh_port: PortNumber = Field(default=22, description="Port of the host's SSH server.")
    ssh_key_file: Path | None = Field(
        default=None, description="Private key for SSH; without a file, the agent's keys."
    )
    ssh_host_key: str | None = Field(
        default=None, description="Fingerprint of the host's SSH key; without one, the known hosts count."
    )
    ssh_known_hosts_file: Path | None = Field(
        default=None,
        description="Host keys to accept for rsync; without a file, those that ssh knows itself.",
    )

    @field_validator("address")
    @classmethod
    def _address_is_bare(cls, address: str) -> str:
        bare = address.strip()
        if not _is_ip_address(bare) and not _HOST_NAME.fullmatch(bare):
            raise ValueError(
                "address: give a host name or an IP address alone, such as 'edge-1.example' or "
                "'10.0.0.7'; the port has a field of its own"
            )
        return bare

    @model_validator(mode="after")
    def _ca_file_needs_tls(self) -> Self:
        if self.tls_ca_file and not self.tls:
            raise ValueError("tls_ca_file is set but tls is off; turn tls on or take the file out")
        return self

    @property
    def name(self) -> str:
        """Name of the saved block, or the slug of the address when it was not saved."""
        return self._block_document_name or slugify(self.address)

    @property
    def work_pool_name(self) -> str:
        """The work pool whose worker runs on the host: `host-<name>`, or a name that begins so itself."""
        return self.pool_under(self.name)

    def pool_under(self, name: str) -> str:
        """The same for a host that is saved, or going to be, under `name`."""
        return self.work_pool or (name if name.startswith(POOL_PREFIX) else f"{POOL_PREFIX}{name}")

    @property
    def deployment_name(self) -> str:
        """What follows the slash in the Prefect deployment `receive-container/<name>` of this host."""
        return self.name

    @property
    def url_host(self) -> str:
        """The address as URLs hold it: IPv6 in brackets."""
        return f"[{self.address}]" if ":" in self.address else self.address

    @property
    def base_url(self) -> str:
        """URL of the receiver, without a path."""
        return f"{'https' if self.tls else 'http'}://{self.url_host}:{self.port}"

    def receiver(self, *, correlation_id: str | None = None) -> ReceiverClient:
        """A client of this host's receiver, to be entered by `async with`.

        Raises `HmacKeyMissing` when neither the block nor HMAC_SECRET_KEY has a key.
        """
        return ReceiverClient(
            ReceiverConfig(
                base_url=self.base_url,
                signing_key=self._secret().signing_key(),
                correlation_id=correlation_id,
                tls_ca_file=self.tls_ca_file,
                tls_verify=self.tls_verify,
            )
        )

    def _secret(self) -> HmacSecret:
        return self.hmac_secret or HmacSecret.from_environment(block=f"remote-host/{self.name}")


async def find_remote_host(name_or_address: str, port: int = contract.DEFAULT_PORT) -> RemoteHost:
    """The host saved as block `remote-host/<slug>`, else one made of the address and the environment.

    A port other than the default is the caller's word and wins over the block's; REMOTE_PORT counts
    only for a host that has no block. Raises `HmacKeyMissing` when there is no key, and whatever
    loading the block raises, except that it does not exist.
    """
    slug = slugify(name_or_address)
    host = await load_if_saved(RemoteHost, slug) if slug else None
    if host is None:
        host = _from_environment(name_or_address, port)
    elif port != contract.DEFAULT_PORT:
        host = host.model_copy(update={"port": port})
    return host.model_copy(update={"hmac_secret": host._secret()})


async def saved_remote_hosts() -> list[RemoteHost]:
    """All hosts that are saved as blocks, by name."""
    return [await find_remote_host(name) for name in await saved_host_names()]


async def saved_host_names() -> list[str]:
    """Names of the hosts that are saved as blocks, sorted; none where no host was ever saved."""
    slug = RemoteHost.get_block_type_slug()
    async with get_client() as client:
        try:
            await client.read_block_type_by_slug(slug)
        except ObjectNotFound:
            return []
        found = await client.read_block_documents_by_type(slug)
    return sorted(block.name for block in found if block.name)


def _from_environment(address: str, port: int) -> RemoteHost:
    told = os.environ.get("REMOTE_PORT") if port == contract.DEFAULT_PORT else None
    return RemoteHost.model_validate({"address": address, "port": told or port})


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
