"""Writes a docker-archive that leaves out layers which the host's engine has. Reads layers, else pure."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from receiver.archive import MANIFEST, blocks_of, file_member


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
    yield from file_member(MANIFEST, len(manifest), [manifest])
    yield from file_member(config_name, len(config), [config])
    for diff_id in dict.fromkeys(layers):  # a layer may be there twice
        if diff_id in files:
            yield from _file(layer_name(diff_id), files[diff_id])
    yield bytes(2 * tarfile.BLOCKSIZE)


def layer_name(diff_id: str) -> str:
    """The member of a layer, whether it is in the archive or not."""
    return f"{diff_id.removeprefix('sha256:')}/layer.tar"


def _file(name: str, path: Path) -> Iterator[bytes]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        yield from file_member(name, size_bytes, blocks_of(file))
