"""Stage 1 on the control host: build the image, gather its metadata, export it, validate it.

Results of build and export are cached by what they are made of; `packaged` checks that a cached
image is still in the engine, and a cached package on disk, before it is believed.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from blake3 import blake3
from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.images import Image
from prefect.logging import get_run_logger
from prefect.utilities.slugify import slugify

from receiver.archive import ArchiveDamaged, archive_contents
from receiver.contract import ImageAnnouncement, PackageAnnouncement, QualityGate, Stage, WireModel
from tasks import builder, progress, store
from tasks.build_steps import BuildSteps, is_bookkeeping
from tasks.context import base_images, fingerprint_context
from tasks.errors import OPERATION_POLICIES, BuildFailed, RetryPolicy
from tasks.logs import RunLogger
from tasks.parameters import BuildOptions, DeploymentParameters
from tasks.policies import operation
from tasks.stage import StageRun

_COPY_BYTES = 2 * 1024 * 1024
_GRACE_SECONDS = 5  # the task's own timeout is to speak first
EXPORT_POLICY = RetryPolicy(max_attempts=2, timeout_ms=600_000)


class ImageMetadata(WireModel):
    """What the engine says of the built image; sizes in bytes."""

    image_id: str
    reference: str
    image_size_bytes: int
    creation_time: str
    layers_count: int
    layers: list[str]
    architecture: str
    os: str
    labels: dict[str, str]
    config: dict[str, Any]


class ImagePackage(WireModel):
    """An exported image on the control host's disk."""

    path: Path
    size_bytes: int
    blake3: str
    config_digest: str

    def is_intact(self) -> bool:
        """True while the file has every byte it had; reads the whole file."""
        if not self.path.is_file() or self.path.stat().st_size != self.size_bytes:
            return False
        digest = blake3()
        with self.path.open("rb") as stream:
            while block := stream.read(_COPY_BYTES):
                digest.update(block)
        return bool(digest.hexdigest() == self.blake3)

    def announcement(self) -> PackageAnnouncement:
        """What the host is told of the package."""
        return PackageAnnouncement(size_bytes=self.size_bytes, blake3=self.blake3)


def announce_image(metadata: ImageMetadata, package: ImagePackage) -> ImageAnnouncement:
    """What the host is told of the image: identity that holds on every engine."""
    return ImageAnnouncement(
        config_digest=package.config_digest,
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
    try:
        attributes = builder.connect().images.get(image_id).attrs
    except ImageNotFound as exc:
        raise BuildFailed(f"image {image_id} is not in the engine any more; deploy again") from exc
    layers = list(attributes["RootFS"].get("Layers") or ())
    return ImageMetadata(
        image_id=attributes["Id"],
        reference=reference,
        image_size_bytes=attributes["Size"],
        creation_time=attributes["Created"],
        layers_count=len(layers),
        layers=layers,
        architecture=attributes["Architecture"],
        os=attributes["Os"],
        labels=attributes["Config"].get("Labels") or {},
        config={key: value for key, value in attributes["Config"].items() if key != "Env"},
    )


# -- export --------------------------------------------------------------------------------------


def _export_key(_context: Any, arguments: dict[str, Any]) -> str:
    return f"export-{arguments['image_id']}-{arguments['reference']}"


@operation("export_image", Stage.PACKAGE, policy=EXPORT_POLICY, cache_key=_export_key)
async def export_image(image_id: str, reference: str) -> ImagePackage:
    """Write the image as a docker-archive, hashed with BLAKE3 on the way."""
    return await asyncio.to_thread(_export, image_id, reference)


def _export(image_id: str, reference: str) -> ImagePackage:
    digest, size_bytes = blake3(), 0
    try:
        with store.new_package() as part:
            with part.open("wb") as stream:
                for block in _image_named(reference, image_id).save(chunk_size=_COPY_BYTES, named=True):
                    digest.update(block)
                    size_bytes += stream.write(block)
            contents = archive_contents(part)
            path = store.keep_package(part, digest.hexdigest())
    except (OSError, ArchiveDamaged, DockerException) as exc:
        raise BuildFailed(f"the image could not be exported to {store.home()}: {exc}") from exc
    return ImagePackage(
        path=path, size_bytes=size_bytes, blake3=digest.hexdigest(), config_digest=contents.config_digest
    )


def _image_named(reference: str, image_id: str) -> Image:
    """The image under its name; raises `BuildFailed` when the name was given to another one."""
    image = builder.connect().images.get(reference)
    if image.id != image_id:
        raise BuildFailed(
            f"{reference} names the image {image.id} by now, not {image_id}",
            next_step="Let nothing else build or tag this name on the control host; then deploy again.",
        )
    return image


async def export_or_reuse(stage: StageRun, metadata: ImageMetadata) -> ImagePackage:
    """The package; a result from the cache counts only while its file is as it was written."""
    exported = await stage.run(export_image, metadata.image_id, metadata.reference)
    store.touch_package(exported.path)
    if not await asyncio.to_thread(exported.is_intact):
        get_run_logger().info("package %s is gone or changed: exporting again", exported.path)
        again = export_image.with_options(refresh_cache=True)
        exported = await stage.run(again, metadata.image_id, metadata.reference)
    return exported


# -- validate ------------------------------------------------------------------------------------


class ImageRefused(BuildFailed):
    """The image did not pass the quality gates of stage 1"""

    next_step = "Correct what the message names in the Dockerfile or in build_options; then deploy again."

    def __init__(self, gates: list[QualityGate], cause: str) -> None:
        super().__init__(cause, retryable=False)
        self.gates = gates


@operation("validate_image", Stage.PACKAGE)
async def validate_image(
    metadata: ImageMetadata, package: ImagePackage, build: BuildOptions, host_architecture: str | None
) -> list[QualityGate]:
    """Check size, labels, platform and that the package is complete.

    Returns the gates; raises `ImageRefused` naming every one that did not pass.
    """
    gates = await asyncio.to_thread(image_gates, metadata, package, build, host_architecture)
    failed = [gate.message for gate in gates if not gate.passed]
    if failed:
        raise ImageRefused(gates, "; ".join(failed))
    return gates


async def check_image(
    stage: StageRun,
    metadata: ImageMetadata,
    package: ImagePackage,
    build: BuildOptions,
    host_architecture: str | None,
) -> None:
    """Run `validate_image` and add its gates to the stage, passed or not."""
    try:
        gates = await stage.run(validate_image, metadata, package, build, host_architecture)
    except ImageRefused as exc:
        stage.gates += exc.gates
        raise
    stage.gates += gates


def image_gates(
    metadata: ImageMetadata, package: ImagePackage, build: BuildOptions, host_architecture: str | None
) -> list[QualityGate]:
    """The gates of stage 1; reads the package's table of contents, not its bytes."""
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
        _completeness(metadata, package),
    ]


def _completeness(metadata: ImageMetadata, package: ImagePackage) -> QualityGate:
    name = "package_complete"
    try:
        contents = archive_contents(package.path)
    except (OSError, ArchiveDamaged) as exc:
        return _gate(name, f"the package is damaged: {exc}", passed=False)
    if contents.missing or contents.layers_count != metadata.layers_count:
        lacking = ", ".join(contents.missing) or f"{metadata.layers_count - contents.layers_count} layer(s)"
        return _gate(name, f"the engine's export lacks {lacking}; remove {package.path}", passed=False)
    return _gate(name, f"{contents.layers_count} layer(s)", passed=True)


def _gate(name: str, message: str, *, passed: bool) -> QualityGate:
    return QualityGate(name=name, stage=Stage.PACKAGE, passed=passed, message=message)
