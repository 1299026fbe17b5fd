"""The block `HmacSecret`: the keys that sign requests to hosts.

Owns the length rule and the reading of HMAC_SECRET_KEY on the control host. Must not import the
daemon: of the receiver, only `signing`.
"""

from __future__ import annotations

import os
import re
from typing import Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator

from receiver.signing import MIN_KEY_BYTES

KEY_VARIABLE = "HMAC_SECRET_KEY"


class HmacKeyMissing(Exception):
    """No key to sign requests with"""

    def __init__(self, block: str) -> None:
        super().__init__(
            f"No key to sign requests with: set {KEY_VARIABLE} where this runs (make a key by "
            f"'openssl rand -hex 32', the same on the host), or save the block {block} with a key"
        )
        self.block = block


class HmacSecret(Block):
    """
    The shared keys that sign requests to hosts: the current one, and earlier ones during a rotation.

    Example:
        Load the stored keys:
        ```python
        from blocks.hmac_secret import HmacSecret

        hmac_secret = HmacSecret.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "HMAC Secret"
    _logo_url = HttpUrl(
        "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9/assets/block-logos/secret.png"
    )
    _documentation_url = HttpUrl("https://docs.prefect.io/v3/concepts/blocks")

    # A refused key must not be quoted by pydantic's message.
    model_config = ConfigDict(hide_input_in_errors=True)

    current: SecretStr = Field(description="The key that signs: at least 32 bytes, equal on both sides.")
    previous: list[SecretStr] = Field(
        default=[], description="Earlier keys that stay valid during a rotation, newest first."
    )

    @field_validator("current")
    @classmethod
    def _current_is_long_enough(cls, key: SecretStr) -> SecretStr:
        return _check_length(key)

    @field_validator("previous")
    @classmethod
    def _previous_are_long_enough(cls, keys: list[SecretStr]) -> list[SecretStr]:
        return [_check_length(key) for key in keys]

    @classmethod
    def from_environment(cls, *, block: str = "hmac-secret/default") -> Self:
        """Read HMAC_SECRET_KEY: keys divided by commas or newlines, the first is current.

        Raises `HmacKeyMissing`, which names `block` as the other place for a key, and pydantic's
        `ValidationError` for a key that is too short.
        """
        # Divided as `receiver.settings` divides it, or the two sides would read different keys.
        keys = [key.strip() for key in re.split(r"[,\n]", os.environ.get(KEY_VARIABLE, "")) if key.strip()]
        if not keys:
            raise HmacKeyMissing(block)
        return cls(current=SecretStr(keys[0]), previous=[SecretStr(key) for key in keys[1:]])

    def signing_key(self) -> bytes:
        """The bytes of the current key."""
        return self.current.get_secret_value().encode()


def _check_length(key: SecretStr) -> SecretStr:
    size_bytes = len(key.get_secret_value().encode())
    if size_bytes < MIN_KEY_BYTES:
        raise ValueError(
            f"this key has {size_bytes} bytes and {MIN_KEY_BYTES} are needed; make one by "
            f"'openssl rand -hex 32' and set it on both sides ({KEY_VARIABLE} or the block hmac-secret)"
        )
    return key
