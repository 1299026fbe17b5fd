"""What a deployment does about learning when there is nothing to learn from."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from tasks import learning
from tasks.package import ImageMetadata


def image(size_bytes: int) -> ImageMetadata:
    """An image of this size."""
    return ImageMetadata(
        image_id="sha256:1",
        reference="web:v1",
        image_size_bytes=size_bytes,
        creation_time="2026-11-25T00:00:00Z",
        layers_count=1,
        layers=["sha256:2"],
        architecture="amd64",
        os="linux",
        labels={},
        config={},
    )


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:2376", "unix:///nowhere/docker.sock"])
@pytest.mark.parametrize("size_bytes", [1_000, 10_000_000_000])
async def test_a_deployment_does_not_fail_by_an_engine_that_is_elsewhere_or_gone(
    address: str, size_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is asked for then, and nothing is sent to an engine on another machine."""
    monkeypatch.setenv("DOCKER_HOST", address)
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path))
    with disable_run_logger():
        assert not await learning.wanted(image(size_bytes))


async def test_a_deployment_does_not_fail_by_a_prefect_server_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request is given up, and logged."""

    async def gone(*_: object, **__: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(learning, "run_deployment", gone)
    with disable_run_logger():
        await learning.request(image(1_000))
