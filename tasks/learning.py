"""Learns the digests of an image's layers, so that the next deployment needs to read only what changed.

An engine remembers the digest of a layer once it has pushed it, which costs compressing it. So that is done
after a deployment, beside other work: a push into a gateway that throws everything away.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

from prefect.deployments import run_deployment
from prefect.logging import get_run_logger

from blocks.build_engine import find_build_engine
from tasks.errors import RetryPolicy
from tasks.package import ImageMetadata
from tasks.policies import operation

DEPLOYMENT = "learn-layers/default"
WORTH_BYTES = 64 * 1024 * 1024
_LOWEST_PRIORITY = 19
_UNLIMITED_BYTES = 2**62
_POLICY = RetryPolicy(max_attempts=1, timeout_ms=3_600_000)
_TRIGGER_SECONDS = 10


async def wanted(image: ImageMetadata) -> bool:
    """True when the engine would compress much of this image for the next push of a changed one.

    Never raises: a deployment that went well does not fail by what comes after it.
    """
    from tasks.push_plan import PushUnsuitable  # what most deployments need not import

    if image.image_size_bytes < WORTH_BYTES:
        return False
    try:
        return await asyncio.to_thread(_unknown_bytes, image.image_id) >= WORTH_BYTES
    except PushUnsuitable:
        return False  # the engine is elsewhere
    except Exception as exc:  # noqa: BLE001 - whatever it is, the deployment is complete
        get_run_logger().warning("not known whether layers are worth learning: %s", exc)
        return False


async def request(image: ImageMetadata) -> None:
    """Start a run of `learn-layers`, independent of this one; one for an image. Never raises."""
    try:
        async with asyncio.timeout(_TRIGGER_SECONDS):
            await run_deployment(  # type: ignore[misc]  # async within a flow, by prefect's dispatch
                DEPLOYMENT,
                parameters={"image_id": image.image_id, "reference": image.reference},
                timeout=0,
                as_subflow=False,
                # Several hosts are given the same image; what failed is tried again the next day.
                idempotency_key=f"{image.image_id}-{datetime.now(UTC):%Y-%m-%d}",
            )
    except Exception as exc:  # noqa: BLE001 - as above
        get_run_logger().warning("the image's layers will not be learnt now: %s", exc)


def _unknown_bytes(image_id: str) -> int:
    from tasks import push_engine, push_export

    with push_engine.connected() as client:
        image = push_engine.inspect_image(client, image_id)
    known = push_export.layer_index().remembered(image.engine_id, image.layers)
    return sum(size for diff_id, size in image.sizes.items() if diff_id not in known)


@operation("learn_layers", policy=_POLICY)
async def learn_layers_of_image(image_id: str) -> int:
    """As `learn_layers`, at the engine that builds."""
    if engine := await find_build_engine():
        os.environ["DOCKER_HOST"] = engine
    with ThreadPoolExecutor(1, "learn-layers") as one:
        return await asyncio.get_running_loop().run_in_executor(one, learn_layers, image_id)


def learn_layers(image_id: str) -> int:
    """Learn the digest of each layer; returns how many were new. Blocking, for a thread of its own.

    The thread gets the lowest priority; the engine compresses one layer at a time. Nothing is done for an
    image whose layers are known. Raises `PushUnsuitable` for an engine that is not on this machine.
    """
    from tasks import push_engine, push_export
    from tasks.push_folder import push_folder
    from tasks.push_gateway import Gateway

    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    with (
        push_engine.connected() as client,
        push_folder(partial(push_engine.remove_name, client)) as folder,
    ):
        image, index = push_engine.inspect_image(client, image_id), push_export.layer_index()
        new = {*image.layers} - index.remembered(image.engine_id, image.layers)
        if not new:
            return 0
        with Gateway(
            lambda _: True, folder=None, limit_bytes=_UNLIMITED_BYTES, one_at_a_time=True
        ) as gateway:
            push_engine.push(client, image_id, gateway, folder, sum(image.sizes.values()))
            manifest = push_export.manifest_of(gateway, len(image.layers))
        digests = [str(layer["digest"]) for layer in manifest["layers"]]
        index.learn(image.engine_id, zip(digests, image.layers, strict=True))
    return len(new)
