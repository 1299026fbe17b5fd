"""What the endpoints share: reading a request, its key, and writing an answer.

`receiver.access` has authenticated the bytes. Knows the wire and the ledger's entries, nothing of Docker.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError

from receiver import contract, problems
from receiver.contract import DeployAccepted
from receiver.ledger import Entry
from receiver.settings import ReceiverSettings

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read(request: Request, model: type[ModelT]) -> ModelT:
    """The body as `model`; raises `MalformedRequest`."""
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as exc:
        raise problems.malformed(exc) from None  # its cause would carry the values into the log


def idempotency_key(request: Request, settings: ReceiverSettings) -> str | None:
    """The caller's key; a v1 request without one is known by its signature."""
    key = request.headers.get(contract.IDEMPOTENCY_HEADER)
    if key is None:
        is_v1 = request.headers.get(contract.VERSION_HEADER, "v1") == "v1"
        return f"v1:{request.headers[settings.signature_header]}" if is_v1 else None
    if not re.fullmatch(r"(?!v1:)[\x21-\x7e]{1,128}", key):
        raise problems.MalformedRequest(
            f"{contract.IDEMPOTENCY_HEADER}: give 1 to 128 printable characters that do not begin with 'v1:'"
        )
    return key


def accepted(
    entry: Entry, known_layers: list[str], *, present: bool, incoming: Path | None = None
) -> DeployAccepted:
    """What the sender of a deployment is told."""
    return DeployAccepted(
        deployment_id=entry.deployment_id,
        state=entry.state,
        image_present=present,
        known_layers=known_layers,
        upload_url=contract.deploy_path(entry.deployment_id, "package"),
        upload_offset=entry.upload_offset,
        chunk_bytes=contract.MAX_CHUNK_BYTES,
        incoming_path=str(incoming) if incoming else None,
    )


def as_json(model: BaseModel, status_code: int = 200, *, without: set[str] | None = None) -> Response:
    """The answer that holds `model`, but for the fields that the caller does not know."""
    return Response(model.model_dump_json(exclude=without), status_code, media_type="application/json")
