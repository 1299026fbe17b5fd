"""A package on its way into an engine: its end comes only when it is the announced image."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from zstandard import ZstdCompressor

from receiver import archive
from receiver.archive import ArchiveDamaged, ArchivedImage, checked_package
from receiver.contract import ImageAnnouncement, PackageAnnouncement, PackageFormat

CONFIG = b'{"rootfs": {}}'
DIGEST = hashlib.sha256(CONFIG).hexdigest()
LAYERS = [f"sha256:{digit * 64}" for digit in "ab"]
IMAGE = ImageAnnouncement(
    config_digest=f"sha256:{DIGEST}", layers=LAYERS, architecture="amd64", size_bytes=3_000_000
)
MANIFEST = [{"Config": f"{DIGEST}.json", "Layers": ["1/layer.tar", "2/layer.tar"]}]
FILES = {
    "1/layer.tar": random.Random(7).randbytes(2_000_000),  # noqa: S311 - no secret
    "2/layer.tar": b"small",
    f"{DIGEST}.json": CONFIG,
    "manifest.json": json.dumps(MANIFEST).encode(),
}


def tar_of(files: Mapping[str, bytes | str]) -> bytes:
    """An archive of these files; a text is a link to what it names."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                made.addfile(member)
            else:
                member.size = len(content)
                made.addfile(member, io.BytesIO(content))
    return whole.getvalue()


def without(*names: str) -> bytes:
    """The good archive without these files."""
    return tar_of({name: content for name, content in FILES.items() if name not in names})


def zstd(content: bytes) -> bytes:
    """As a package."""
    return ZstdCompressor(level=1, write_checksum=True).compress(content)


def given(
    folder: Path,
    package: bytes,
    image: ImageAnnouncement | None = IMAGE,
    omitted: list[str] | None = None,
    package_format: PackageFormat = PackageFormat.ZSTD,
) -> bytes:
    """What an engine is given of a package."""
    path = folder / "package"
    path.write_bytes(package)
    announced = PackageAnnouncement(
        size_bytes=len(package), blake3="0" * 64, format=package_format, omitted_layers=omitted or []
    )
    return b"".join(checked_package(path, image, announced, lambda _: None))


def contents(whole: bytes) -> dict[str, bytes]:
    """Files of an archive."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as made:
        return {member.name: (made.extractfile(member) or io.BytesIO()).read() for member in made}


@pytest.mark.parametrize(
    ("package_format", "package"),
    [
        (PackageFormat.ZSTD, zstd(without())),
        (PackageFormat.GZIP, gzip.compress(without(), mtime=0)),
        (PackageFormat.TAR, without()),
    ],
)
def test_each_format_is_unpacked_as_it_is_read(
    tmp_path: Path, package_format: PackageFormat, package: bytes
) -> None:
    """The engine gets every file as it was."""
    assert contents(given(tmp_path, package, package_format=package_format)) == FILES


def test_a_nameless_archive_names_its_image_nowhere(tmp_path: Path) -> None:
    """Neither where a classic engine looks nor where a containerd image store does."""
    manifest = json.dumps([{**MANIFEST[0], "RepoTags": ["web:v1"]}]).encode()
    annotations = {"io.containerd.image.name": "docker.io/library/web:v1"}
    index = {"schemaVersion": 2, "manifests": [{"digest": "sha256:1", "annotations": annotations}]}
    named = {
        "index.json": json.dumps(index).encode(),
        "manifest.json": manifest,
        "repositories": b'{"web": {}}',
    }
    path = tmp_path / "package"
    path.write_bytes(tar_of({**FILES, **named}))
    found: list[ArchivedImage] = []
    given = contents(b"".join(checked_package(path, IMAGE, None, found.append, nameless=True)))
    assert [image.config_digest for image in found] == [f"sha256:{DIGEST}"]
    assert set(given) == {*FILES, "index.json"}
    assert not [name for name, content in given.items() if b"web" in content]
    assert json.loads(given["index.json"])["manifests"] == [{"digest": "sha256:1", "annotations": None}]


def test_what_is_left_out_is_what_was_announced(tmp_path: Path) -> None:
    """An announced layer may be missing, a link to a missing one too; any other one is refused."""
    lacking = zstd(without("1/layer.tar"))
    assert set(contents(given(tmp_path, lacking, omitted=LAYERS[:1]))) == set(FILES) - {"1/layer.tar"}
    linked = zstd(tar_of({**FILES, "1/layer.tar": "../3/layer.tar"}))
    given(tmp_path, linked, omitted=LAYERS[:1])
    for package in (lacking, linked):
        with pytest.raises(ArchiveDamaged, match=f"lacks {LAYERS[0]}"):
            given(tmp_path, package, omitted=LAYERS[1:])
    with pytest.raises(ArchiveDamaged, match="lacks 1 of its layers"):
        given(tmp_path, lacking, image=None)


def flipped(package: bytes) -> bytes:
    """One bit in the middle is another one."""
    middle = len(package) // 2
    return package[:middle] + bytes([package[middle] ^ 1]) + package[middle + 1 :]


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (zstd(without())[:-3000], "unexpected end of data"),
        (flipped(zstd(without())), "zstd"),
        (zstd(without("manifest.json")), "has no manifest.json"),
        (zstd(without(f"{DIGEST}.json")), f"lacks {DIGEST}.json"),
        (zstd(tar_of({**FILES, f"{DIGEST}.json": b"another"})), "not sha256"),
        (zstd(tar_of({**FILES, "manifest.json": json.dumps(MANIFEST * 2).encode()})), "2 images"),
        (zstd(tar_of({**FILES, "manifest.json": b"[1]"})), "subscriptable"),
        (zstd(b"no archive"), "truncated header"),
        (without(), "announced as tar.zst, and it is tar"),
    ],
)
def test_a_damaged_package_never_comes_to_its_end(tmp_path: Path, package: bytes, said: str) -> None:
    """Whatever is wrong is named; the engine has not seen the end of the archive, and loads nothing."""
    path, seen = tmp_path / "package", bytearray()
    path.write_bytes(package)
    announced = PackageAnnouncement(size_bytes=len(package), blake3="0" * 64)
    with pytest.raises(ArchiveDamaged, match=said):
        seen.extend(itertools.chain.from_iterable(checked_package(path, IMAGE, announced, lambda _: None)))
    assert not seen.endswith(bytes(1024))


def test_a_package_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its image can have at most; it is never in memory as a whole."""
    monkeypatch.setattr(archive, "_SLACK_BYTES", 0)
    bomb = zstd(tar_of({**FILES, "1/layer.tar": bytes(20_000_000)}))
    assert len(bomb) < 10_000
    with pytest.raises(ArchiveDamaged, match="more than 12000000 bytes"):
        given(tmp_path, bomb)


def test_a_window_that_would_take_the_host_s_memory_is_refused(tmp_path: Path) -> None:
    """zstd lets a sender ask for as much as 2 GB."""
    from zstandard import ZstdCompressionParameters

    asked = ZstdCompressionParameters(window_log=27, enable_ldm=True)
    greedy = ZstdCompressor(compression_params=asked).compressobj()
    package = greedy.compress(without()) + greedy.flush()
    with pytest.raises(ArchiveDamaged, match=r"(?i)memory|window"):
        given(tmp_path, package)


def test_what_a_package_holds_is_told(tmp_path: Path) -> None:
    """The image's config digest, with no image announced."""
    path, found = tmp_path / "package", list[ArchivedImage]()
    path.write_bytes(zstd(without()))
    for _ in checked_package(path, None, None, found.append):
        pass
    assert found == [ArchivedImage(f"sha256:{DIGEST}", ("1/layer.tar", "2/layer.tar"), frozenset())]
