"""The archive that leaves layers out."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

from receiver.archive import ArchivedImage, rebuilt
from tasks.docker_archive import docker_archive, layer_name

CONFIG = json.dumps({"rootfs": {"diff_ids": []}}).encode()


def diff_id(content: bytes) -> str:
    """As an engine names it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_the_archive_names_every_layer_and_holds_those_that_were_sent(tmp_path: Path) -> None:
    """In the image's order, each once; the receiver reads it, and sees which are left out."""
    contents = [b"base" * 1000, b"", b"x" * 512, b"app"]
    ids = [diff_id(content) for content in contents]
    files = {}
    for name, content in zip(ids[1:], contents[1:], strict=True):
        files[name] = tmp_path / name
        files[name].write_bytes(content)
    whole = b"".join(docker_archive("web:v2", CONFIG, [*ids, ids[2]], files))
    assert len(whole) % 512 == 0
    found: list[ArchivedImage] = []
    assert list(rebuilt(io.BytesIO(whole), found.append))
    assert found == [ArchivedImage(diff_id(CONFIG), tuple(map(layer_name, [*ids, ids[2]])), frozenset({0}))]
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        names = archive.getnames()
        assert names[2:] == [layer_name(name) for name in ids[1:]]
        for name, content in zip(ids[1:], contents[1:], strict=True):
            stream = archive.extractfile(layer_name(name))
            assert stream is not None
            assert stream.read() == content
        manifest = archive.extractfile("manifest.json")
        assert manifest is not None
        assert json.load(manifest)[0]["RepoTags"] == ["web:v2"]
