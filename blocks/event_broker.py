"""The block `EventBroker`: where events go, as settings for aiokafka's producer and consumer.

Owns the connection settings alone; `tasks.outbox` owns sending, `tasks.dead_letters` reading. Must not
import aiokafka, so that a control host without Kafka can load every block.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import Any, Literal, Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

from blocks import load_if_saved

_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")


class EventBroker(Block):
    """
    The Kafka brokers that receive the events of deployments.

    Example:
        Load the stored brokers:
        ```python
        from blocks.event_broker import EventBroker

        event_broker = EventBroker.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Event Broker"
    _logo_url = HttpUrl(
        "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/webhook.png"
    )
    _documentation_url = HttpUrl("https://docs.prefect.io/v3/concepts/blocks")

    model_config = ConfigDict(hide_input_in_errors=True)

    bootstrap_servers: str = Field(description="Brokers as host:port, divided by commas.")
    client_id: str = Field(default="gantry", description="Name under which brokers log this client.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="How the brokers are reached."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="PLAIN", description="How the user is proven, for the SASL protocols."
    )
    sasl_username: str | None = Field(default=None, description="User, for the SASL protocols.")
    sasl_password: SecretStr | None = Field(default=None, description="Password of the SASL user.")
    tls_ca_file: Path | None = Field(
        default=None, description="Certificates (PEM) to trust; without a file, the public ones."
    )

    @field_validator("bootstrap_servers")
    @classmethod
    def _servers_have_ports(cls, text: str) -> str:
        servers = [server.strip() for server in text.split(",") if server.strip()]
        if not servers or not all(_SERVER.fullmatch(server) for server in servers):
            raise ValueError(
                "bootstrap_servers: give brokers as host:port, divided by commas, such as 'localhost:29092'"
            )
        return ",".join(servers)

    @model_validator(mode="after")
    def _sasl_has_a_user(self) -> Self:
        wants_user = self.security_protocol.startswith("SASL")
        has_user = bool(self.sasl_username and self.sasl_password)
        if wants_user != has_user:
            raise ValueError(
                "sasl_username and sasl_password belong to the protocols SASL_PLAINTEXT and SASL_SSL; "
                "set both there and none elsewhere"
            )
        return self

    @classmethod
    def from_environment(cls) -> Self | None:
        """The brokers of KAFKA_BOOTSTRAP_SERVERS, or None when it is not set."""
        servers = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "").strip()
        return cls(bootstrap_servers=servers) if servers else None

    def producer_settings(self) -> dict[str, Any]:
        """Arguments for `AIOKafkaProducer`: idempotent, acknowledged by all replicas.

        Holds the password in the clear: pass it on, never log it.
        """
        return self._connection_settings() | {"acks": "all", "enable_idempotence": True}

    def consumer_settings(self, group_id: str | None) -> dict[str, Any]:
        """Arguments for `AIOKafkaConsumer`: from the oldest message on, committed by hand only.

        Holds the password in the clear: pass it on, never log it.
        """
        reading = {"group_id": group_id, "enable_auto_commit": False, "auto_offset_reset": "earliest"}
        return self._connection_settings() | reading

    def _connection_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.endswith("SSL"):
            settings["ssl_context"] = ssl.create_default_context(cafile=self.tls_ca_file)
        if self.sasl_password:
            settings["sasl_mechanism"] = self.sasl_mechanism
            settings["sasl_plain_username"] = self.sasl_username
            settings["sasl_plain_password"] = self.sasl_password.get_secret_value()
        return settings


async def find_event_broker() -> EventBroker | None:
    """The block `event-broker/default` when it is saved, else KAFKA_BOOTSTRAP_SERVERS, else None.

    Whatever loading the block raises rises, except that it does not exist.
    """
    return await load_if_saved(EventBroker, "default") or EventBroker.from_environment()
