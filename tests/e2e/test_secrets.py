"""Nothing secret is seen anywhere: logs, records, events, artifacts, what Prefect stores in the clear."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

from deployments.lab import Lab
from tests.e2e.deploying import Service, in_control

_READ_BYTES = 8 * 1024 * 1024
CREATE_SECRET = """
import sys
from prefect.blocks.system import Secret
Secret(value=sys.argv[2]).save(sys.argv[1], overwrite=True)
"""


def places_with(folder: Path, needle: bytes, left_out: tuple[str, ...]) -> Iterator[Path]:
    """Files below `folder` that hold `needle`, but for paths that contain one of `left_out`."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and not any(part in str(path) for part in left_out):
            with path.open("rb") as stream:
                tail = b""
                while block := stream.read(_READ_BYTES):
                    if needle in tail + block:
                        yield path
                        break
                    tail = block[-len(needle) :]


def test_no_key_and_no_secret_value_is_found_anywhere(furnished: Lab, service: Service) -> None:
    """The container has its secret; nobody else does, and the signing key is in no file at all."""
    value = f"s3cr3t-{secrets.token_hex(12)}"
    in_control(furnished, "-c", CREATE_SECRET, "db-password", value)
    parameters = service.parameters("v1")
    environment = {"DB_PASSWORD": "secret://db-password"}
    config = {**parameters["deployment_config"], "environment_variables": environment}
    done = service.deploy("v1", {"deployment_config": config})
    assert done.state == "COMPLETED", done.message
    assert f"DB_PASSWORD={value}" in service.running()[0].attrs["Config"]["Env"]
    # The engine's own files hold the environment of its containers; that is where it belongs.
    engine = ("/host-a/data/", "/host-a/exec/", "/host-a/containerd/", "/host-a/run/")
    assert not list(places_with(furnished.state_dir, value.encode(), engine))
    key = furnished.control.environment["HMAC_SECRET_KEY"]
    assert not list(places_with(furnished.state_dir, key.encode(), engine))
