"""Writes a docker-archive that leaves out layers which the host's engine has. Reads layers, else pure."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_RECORD_BYTES = 512
_COPY_BYTES = 1024 * 1024


def docker_archive(
    reference: str | None, config: bytes, layers: Sequence[str], files: Mapping[str, Path]
) -> Iterator[bytes]:
    """The archive's bytes: its manifest names all `layers` (diff ids), it holds those that `files` has.

    The image's id on a classic engine is the digest of `config`; without a `reference` it gets no name.
    Raises OSError.
    """
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    names = [layer_name(diff_id) for diff_id in layers]
    tags = [reference] if reference else None
    manifest = json.dumps([{"Config": config_name, "RepoTags": tags, "Layers": names}]).encode()
    yield from _member("manifest.json", manifest)
    yield from _member(config_name, config)
    for diff_id in dict.fromkeys(layers):  # a layer may be there twice
        if diff_id in files:
            yield from _file(layer_name(diff_id), files[diff_id])
    yield bytes(2 * _RECORD_BYTES)


def layer_name(diff_id: str) -> str:
    """The member of a layer, whether it is in the archive or not."""
    return f"{diff_id.removeprefix('sha256:')}/layer.tar"


def _member(name: str, content: bytes) -> Iterator[bytes]:
    yield _header(name, len(content)) + content + _padding(len(content))


def _file(name: str, path: Path) -> Iterator[bytes]:
    size_bytes = path.stat().st_size
    yield _header(name, size_bytes)
    with path.open("rb") as stream:
        while block := stream.read(_COPY_BYTES):
            yield block
    yield _padding(size_bytes)


def _header(name: str, size_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _RECORD_BYTES)
