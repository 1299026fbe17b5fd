"""A caller of the receiver that signs by hand, so that a test can sign wrongly; and a fake engine.

The fake knows only what `receiver.app` asks; the real engine is tried in `tests/integration`.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
from blake3 import blake3
from fastapi import FastAPI

from receiver import contract, signing
from receiver.contract import DeployRequest, ImageAnnouncement, PackageAnnouncement
from receiver.engine import (
    Engine,
    EngineInfo,
    EngineUnreachable,
    ImageStore,
    LoadedImage,
    MadeContainer,
    PublishedPort,
)

KEY = b"0123456789abcdef0123456789abcdef-contract"
REQUEST = DeployRequest(container_name="my-service", image_tag="v1")


@dataclass
class FakeEngine:
    """Answers the application's questions from fields; `down` makes it unreachable."""

    images: tuple[ImageAnnouncement, ...] = ()
    layers: tuple[str, ...] = ()
    containers: tuple[MadeContainer, ...] = ()
    published: tuple[PublishedPort, ...] = ()
    down: bool = False
    times_asked: int = 0

    def info(self) -> EngineInfo:
        self.times_asked += 1
        self._answer()
        return EngineInfo("20.10.24", "amd64", "linux", ImageStore("/var/lib/docker", "overlay2"))

    def find_image(self, announced: ImageAnnouncement, had_as: Sequence[str] = ()) -> LoadedImage | None:
        if announced not in self.images:
            return None
        digest = announced.config_digest
        return LoadedImage(digest, digest, tuple(announced.layers), announced.architecture)

    def known_layers(self, announced: ImageAnnouncement) -> list[str]:
        return [layer for layer in announced.layers if layer in self.layers]

    def announce_image(self, image_id: str, config_digest: str | None = None) -> ImageAnnouncement | None:
        wanted = config_digest or image_id
        return next((image for image in self.images if image.config_digest == wanted), None)

    def made_containers(self, container_name: str | None = None) -> list[MadeContainer]:
        self._answer()
        wanted = [made for made in self.containers if container_name in (None, made.container_name)]
        return sorted(wanted, key=lambda made: made.created_at, reverse=True)

    def published_ports(self) -> list[PublishedPort]:
        self._answer()
        return list(self.published)

    def _answer(self) -> None:
        if self.down:
            raise EngineUnreachable("the fake engine is down")

    def as_engine(self) -> Engine:
        return cast("Engine", self)


@dataclass(frozen=True)
class Caller:
    """Calls one application as one peer, with one key and one clock."""

    app: FastAPI
    peer: str = "127.0.0.1"
    key: bytes = KEY
    clock_offset_seconds: float = 0
    base_url: str = field(default="http://receiver")

    async def send(
        self,
        method: str,
        target: str,
        content: Any = b"",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send as it is, unsigned."""
        transport = httpx.ASGITransport(app=self.app, client=(self.peer, 50_000))
        async with httpx.AsyncClient(transport=transport, base_url=self.base_url) as client:
            return await client.request(method, target, content=content, headers=dict(headers or {}))

    def v2(self, method: str, target: str, body: bytes = b"", nonce: str | None = None) -> dict[str, str]:
        """Headers of a v2 request."""
        now = time.time() + self.clock_offset_seconds
        return dict(signing.signed_headers(self.key, method, target, body, now=now, nonce=nonce))

    def v1(self, body: bytes) -> dict[str, str]:
        """Headers in the specification's form, written without our signing module."""
        timestamp = str(int(time.time() + self.clock_offset_seconds))
        signature = hmac.new(self.key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
        return {"X-Deployment-Timestamp": timestamp, "X-Deployment-Signature": signature}

    async def call(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Send a request with a good v2 signature."""
        return await self.send(method, target, body, {**self.v2(method, target, body), **(headers or {})})

    async def announce(self, request: DeployRequest = REQUEST, key: str | None = None) -> httpx.Response:
        """Announce a deployment."""
        headers = {contract.IDEMPOTENCY_HEADER: key} if key else {}
        return await self.call("POST", contract.DEPLOY_PATH, request.model_dump_json().encode(), headers)

    async def announce_upload(self, package: bytes) -> str:
        """Announce a deployment with a package; returns its id."""
        request = REQUEST.model_copy(update={"package": announcement(package)})
        response = await self.announce(request)
        assert response.status_code == 201, response.text
        return str(response.json()["deployment_id"])

    async def patch(self, deployment_id: str, offset: int, chunk: bytes) -> httpx.Response:
        """Send one chunk."""
        headers = {contract.UPLOAD_OFFSET_HEADER: str(offset)}
        return await self.call("PATCH", contract.deploy_path(deployment_id, "package"), chunk, headers)

    async def status(self, deployment_id: str) -> contract.DeploymentStatus:
        """The deployment's status."""
        response = await self.call("GET", contract.deploy_path(deployment_id, "status"))
        assert response.status_code == 200, response.text
        return contract.DeploymentStatus.model_validate_json(response.content)


def announcement(package: bytes) -> PackageAnnouncement:
    """What is announced for these bytes."""
    return PackageAnnouncement(size_bytes=len(package), blake3=blake3(package).hexdigest())


def slug(response: httpx.Response) -> str:
    """The last part of a problem's type."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    problem = contract.Problem.model_validate_json(response.content)
    assert problem.status == response.status_code
    return problem.type.removeprefix("urn:gantry:problem:")
