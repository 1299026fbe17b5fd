"""Stage 1 on the control host: build the image, gather its metadata, validate it.

The result of a build is cached by what it is made of, and believed while the image is in the engine. The
export belongs to stage 2: only then is it known which layers the host lacks.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from docker.errors import APIError, ImageNotFound
from prefect.logging import get_run_logger
from prefect.utilities.slugify import slugify

from receiver.contract import ImageAnnouncement, QualityGate, Stage, WireModel
from receiver.engine_store import has_containerd_store
from tasks import builder, exports, progress
from tasks.build_steps import BuildSteps, is_bookkeeping
from tasks.context import base_images, fingerprint_context
from tasks.errors import OPERATION_POLICIES, BuildFailed, RetryPolicy
from tasks.logs import RunLogger
from tasks.parameters import BuildOptions, DeploymentParameters
from tasks.policies import operation
from tasks.stage import StageRun

_GRACE_SECONDS = 5  # the task's own timeout is to speak first
_NEVER = "0001-01-01T00:00:00Z"  # what engines up to 24 say of an image that tells no time
IDENTITY_POLICY = RetryPolicy(max_attempts=2, timeout_ms=600_000)


class ImageMetadata(WireModel):
    """What the engine says of the built image; sizes in bytes."""

    image_id: str
    config_digest: str | None = None
    reference: str
    image_size_bytes: int
    creation_time: str
    layers_count: int
    layers: list[str]
    architecture: str
    os: str
    labels: dict[str, str]
    config: dict[str, Any]


def announce_image(metadata: ImageMetadata) -> ImageAnnouncement:
    """What the host is told of the image: identity that holds on every engine."""
    if metadata.config_digest is None:
        raise ValueError("config_digest: read it first, by identified")
    return ImageAnnouncement(
        config_digest=metadata.config_digest,
        layers=metadata.layers,
        architecture=metadata.architecture,
        os=metadata.os,
        size_bytes=metadata.image_size_bytes,
    )


# -- build ---------------------------------------------------------------------------------------


def build_fingerprint(parameters: DeploymentParameters) -> str | None:
    """Digest of everything the image is made of, this engine included; None forbids caching."""
    client, build = builder.connect(), parameters.build_options
    dockerfile = build.dockerfile.read_text(errors="replace")
    ids: dict[str, str | None] = {}
    for reference in base_images(dockerfile, build.build_args):
        try:
            ids[reference] = str(client.images.get(reference).id)
        except APIError as exc:
            if not exc.is_client_error():
                raise
            ids[reference] = None  # not here, or no reference at all: the builder has the say
    name = f"{client.info()['ID']}/{parameters.container_name}:{parameters.image_tag}"
    return fingerprint_context(build, name, ids)


def _build_key(_context: Any, arguments: dict[str, Any]) -> str | None:
    fingerprint = arguments["fingerprint"]
    return f"build-{fingerprint}" if fingerprint else None


@operation("build_docker_image", Stage.PACKAGE, cache_key=_build_key)
async def build_docker_image(
    build: BuildOptions,
    container_name: str,
    image_tag: str,
    fingerprint: str | None,
) -> str:
    """Build `container_name:image_tag` and return the image's id; the builder's lines go to the log."""
    reference, limit_seconds = f"{container_name}:{image_tag}", build_seconds(build) + _GRACE_SECONDS
    async with progress.shown(f"build-{slugify(container_name)}", f"Building {reference}") as tell:
        say = _log_and_tell(get_run_logger(), tell)
        return await asyncio.to_thread(
            builder.build_image, build, container_name, reference, say, limit_seconds
        )


def _log_and_tell(logger: RunLogger, tell: progress.Tell) -> builder.Say:
    """What to do with each line of the builder, in the thread that builds."""
    steps = BuildSteps()

    def say(line: str) -> None:
        logger.log(logging.DEBUG if is_bookkeeping(line) else logging.INFO, "%s", line)
        if steps.hear(line):
            tell(steps.percent, steps.told)

    return say


def build_seconds(build: BuildOptions) -> float:
    """Time for one attempt: what the caller asked for, else the operation's own."""
    return (build.timeout_ms or OPERATION_POLICIES["build_docker_image"].timeout_ms) / 1000


async def build_or_reuse(stage: StageRun, asked: DeploymentParameters) -> str:
    """The image's id; a result from the cache counts only while the engine has the image."""
    fingerprint = await asyncio.to_thread(build_fingerprint, asked)
    arguments = (asked.build_options, asked.container_name, asked.image_tag, fingerprint)
    build = build_docker_image.with_options(timeout_seconds=build_seconds(asked.build_options))
    image_id = await stage.run(build, *arguments)
    reference = f"{asked.container_name}:{asked.image_tag}"
    if not await asyncio.to_thread(image_is_in_engine, image_id, reference):
        get_run_logger().info("image %s is gone from the engine: building again", image_id)
        image_id = await stage.run(build.with_options(refresh_cache=True), *arguments)
    return image_id


def image_is_in_engine(image_id: str, reference: str) -> bool:
    """True when the engine has the image; its name is put back on it."""
    try:
        image = builder.connect().images.get(image_id)
    except ImageNotFound:
        return False
    return bool(image.tag(*reference.split(":", 1)))


@operation("gather_metadata", Stage.PACKAGE)
async def gather_metadata(image_id: str, reference: str) -> ImageMetadata:
    """Inspect the image."""
    return await asyncio.to_thread(_inspect, image_id, reference)


def _inspect(image_id: str, reference: str) -> ImageMetadata:
    client = builder.connect()
    try:
        attributes = client.images.get(image_id).attrs
    except ImageNotFound as exc:
        raise BuildFailed(f"image {image_id} is not in the engine any more; deploy again") from exc
    layers = list(attributes["RootFS"].get("Layers") or ())
    return ImageMetadata(
        image_id=attributes["Id"],
        config_digest=None if has_containerd_store(client.info()) else attributes["Id"],
        reference=reference,
        image_size_bytes=attributes["Size"],
        creation_time=attributes.get("Created") or _NEVER,
        layers_count=len(layers),
        layers=layers,
        architecture=attributes["Architecture"],
        os=attributes["Os"],
        labels=attributes["Config"].get("Labels") or {},
        config={key: value for key, value in attributes["Config"].items() if key != "Env"},
    )


# -- identity ------------------------------------------------------------------------------------


def _identity_key(_context: Any, arguments: dict[str, Any]) -> str:
    return f"identity-{arguments['image_id']}"


@operation("read_config_digest", Stage.PACKAGE, policy=IDENTITY_POLICY, cache_key=_identity_key)
async def read_config_digest(image_id: str, reference: str) -> str:
    """The image's config digest out of an export: a containerd image store knows it by another digest."""
    return await asyncio.to_thread(exports.read_config_digest, image_id, reference)


async def identified(stage: StageRun, metadata: ImageMetadata) -> ImageMetadata:
    """The metadata with the digest by which every engine knows the image."""
    if metadata.config_digest is not None:
        return metadata
    digest = await stage.run(read_config_digest, metadata.image_id, metadata.reference)
    return metadata.model_copy(update={"config_digest": digest})


# -- validate ------------------------------------------------------------------------------------


class ImageRefused(BuildFailed):
    """The image did not pass the quality gates of stage 1"""

    next_step = "Correct what the message names in the Dockerfile or in build_options; then deploy again."

    def __init__(self, gates: list[QualityGate], cause: str) -> None:
        super().__init__(cause, retryable=False)
        self.gates = gates


@operation("validate_image", Stage.PACKAGE)
async def validate_image(
    metadata: ImageMetadata, build: BuildOptions, host_architecture: str | None
) -> list[QualityGate]:
    """Check size, labels and platform.

    Returns the gates; raises `ImageRefused` naming every one that did not pass.
    """
    gates = image_gates(metadata, build, host_architecture)
    failed = [gate.message for gate in gates if not gate.passed]
    if failed:
        raise ImageRefused(gates, "; ".join(failed))
    return gates


async def check_image(
    stage: StageRun,
    metadata: ImageMetadata,
    build: BuildOptions,
    host_architecture: str | None,
) -> None:
    """Run `validate_image` and add its gates to the stage, passed or not."""
    try:
        gates = await stage.run(validate_image, metadata, build, host_architecture)
    except ImageRefused as exc:
        stage.gates += exc.gates
        raise
    stage.gates += gates


def image_gates(
    metadata: ImageMetadata, build: BuildOptions, host_architecture: str | None
) -> list[QualityGate]:
    """The gates of stage 1."""
    limit, size = build.max_image_size_bytes, metadata.image_size_bytes
    missing = [label for label in build.required_labels if label not in metadata.labels]
    suits = host_architecture in (None, metadata.architecture)
    return [
        _gate("image_built_successfully", metadata.image_id, passed=bool(metadata.image_id)),
        _gate(
            "image_size_within_limits",
            f"the image has {size} bytes; allowed are less than {limit} (build_options.max_image_size_bytes)",
            passed=size < limit,
        ),
        _gate(
            "required_metadata_collected",
            f"missing labels: {', '.join(missing)}; add them by LABEL or build_options.labels"
            if missing
            else "",
            passed=not missing,
        ),
        _gate(
            "architecture_equals_host",
            f"the image is for {metadata.architecture}, the host is {host_architecture}; "
            f"set build_options.platform to linux/{host_architecture}"
            if not suits
            else metadata.architecture,
            passed=suits,
        ),
    ]


def _gate(name: str, message: str, *, passed: bool) -> QualityGate:
    return QualityGate(name=name, stage=Stage.PACKAGE, passed=passed, message=message)
