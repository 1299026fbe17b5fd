"""What a docker-archive says it holds, against what it does hold. Reads headers, not layers.

The package's format is part of the wire, so both sides read it here.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path


class ArchiveDamaged(Exception):
    """The file is no complete docker-archive of one image"""


# What a torn or foreign file makes of tarfile, gzip, json and of the look into the manifest.
_DAMAGE = (
    tarfile.TarError,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


@dataclass(frozen=True)
class ArchiveContents:
    """The single image of an archive; `missing` are files that its manifest names and it lacks."""

    config_digest: str
    layers_count: int
    missing: tuple[str, ...]


def archive_contents(path: Path) -> ArchiveContents:
    """Read `manifest.json` and the table of contents; raises `ArchiveDamaged`."""
    try:
        with tarfile.open(path, "r:*") as archive:
            names = set(archive.getnames())
            images = json.loads(_read(archive, "manifest.json"))
            if len(images) != 1:
                raise ArchiveDamaged(f"{path.name} holds {len(images)} images; one is expected")
            config, layers = images[0]["Config"], images[0]["Layers"] or []
            digest = hashlib.sha256(_read(archive, config)).hexdigest()
    except _DAMAGE as exc:
        raise ArchiveDamaged(f"{path.name}: {exc}") from exc
    missing = tuple(name for name in (config, *layers) if name not in names)
    return ArchiveContents(f"sha256:{digest}", len(layers), missing)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise KeyError(name)
    return stream.read()
