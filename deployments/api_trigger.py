"""Starts a deployment: the Prefect deployment `deploy-container/default`, by the Prefect client.

Owns the idempotency key and what is written on the flow run. Prefect keeps one run for one key, also when
two requests come at once; the request's digest, a label of that run, tells a repetition from another one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from prefect.exceptions import ObjectNotFound

from deployments.api_problems import FieldError, KeyReused, Malformed, Unavailable
from deployments.api_services import Services
from receiver.contract import IDEMPOTENCY_HEADER
from tasks.parameters import DeploymentParameters

PREFECT_DEPLOYMENT = "deploy-container/default"
DIGEST_LABEL = "gantry.request_sha256"
CALL_LABEL = "gantry.api_call"
PREFECTS_OWN_KEYS = frozenset({"__prefect_kind", "$ref"})
_KEY = re.compile(r"[\x21-\x7e]{1,128}")


class PrefectDeploymentMissing(Unavailable):
    """Prefect does not know the deployment that the API triggers"""

    slug = "prefect-deployment-missing"
    next_step = "Register the control side: python -m deployments.register --control."


@dataclass(frozen=True)
class Triggered:
    """The flow run of a request, and whether an earlier request had started it."""

    workflow_id: str
    is_repetition: bool


async def trigger(
    services: Services,
    wanted: DeploymentParameters,
    *,
    key: str | None,
    correlation_id: str,
    caller: str | None,
) -> Triggered:
    """Start the deployment once; parameters that were not given are left to the flow's defaults.

    Raises `Malformed`, `KeyReused`, `PrefectDeploymentMissing`, or what the Prefect server raises.
    """
    parameters = wanted.model_dump(mode="json", exclude_unset=True)
    _check_keys(parameters)
    call, digest = str(uuid4()), _digest(parameters)
    async with services.prefect() as client:
        try:
            prefect_deployment = await client.read_deployment_by_name(PREFECT_DEPLOYMENT)
        except ObjectNotFound as exc:
            raise PrefectDeploymentMissing(f"Prefect knows no deployment {PREFECT_DEPLOYMENT!r}") from exc
        run = await client.create_flow_run_from_deployment(
            prefect_deployment.id,
            parameters=parameters,
            tags=[f"correlation:{correlation_id}", *([f"api:{caller}"] if caller else [])],
            # Without a key of the caller's one of ours, so that the client's own repetitions are harmless.
            idempotency_key=_checked(key) or f"api-call:{call}",
            labels={DIGEST_LABEL: digest, CALL_LABEL: call},
        )
    if run.labels.get(DIGEST_LABEL) != digest:
        raise KeyReused(f"{IDEMPOTENCY_HEADER} {key!r} was sent with another body before")
    return Triggered(str(run.id), run.labels.get(CALL_LABEL) != call)


def _checked(key: str | None) -> str | None:
    if key is not None and not _KEY.fullmatch(key):
        message = "give 1 to 128 printable characters without spaces"
        raise Malformed(
            f"{IDEMPOTENCY_HEADER}: {message}", errors=[FieldError(field=IDEMPOTENCY_HEADER, message=message)]
        )
    return f"api-key:{key}" if key is not None else None


def _check_keys(value: Any, path: str = "") -> None:
    """Prefect reads these keys as orders: to render a template, a variable or a block into the parameters."""
    if isinstance(value, Mapping):
        reserved = PREFECTS_OWN_KEYS & set(value)
        if reserved:
            error = FieldError(field=path or "body", message=f"the key {min(reserved)!r} is Prefect's own")
            raise Malformed(f"{error.field}: {error.message}", errors=[error])
        for name, inner in value.items():
            _check_keys(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_keys(inner, f"{path}.{number}")


def _digest(parameters: Mapping[str, Any]) -> str:
    """The same for the same request, however its JSON was written."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
