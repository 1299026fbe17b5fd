"""The images that travel: layers of this machine's own programs, so that they compress as software does.

Five layers: three below, one of a third of all bytes, and a small one on top. `v1` has another top layer
than `v0`; `v2` differs from `v1` by one file of the large layer.
"""

from __future__ import annotations

import io
import os
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.lab import Control

SOURCE = Path("/usr")
SMALL_BYTES = 2_000_000
APP_BYTES = 1_500_000
BASE_LAYERS = 3
SMALL, FIRST, CHANGED, LARGE = "bench-small:v0", "bench:v0", "bench:v1", "bench:v2"
DOCKER = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
_BUILD_SECONDS = 1800
_Files = list[Path]


class TooFewFiles(Exception):
    """This machine's /usr has not enough files for an image of this size; give a smaller --image-bytes"""

    def __init__(self, missing_bytes: int) -> None:
        super().__init__(f"{self.__doc__}: {missing_bytes} bytes are missing")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the layers, lowest first."""

    base: tuple[int, ...]
    large: int
    app: int

    @classmethod
    def of(cls, image_bytes: int) -> Sizes:
        """How an image of this size is cut into layers."""
        app, large = min(APP_BYTES, image_bytes // 10), image_bytes // 3
        return cls((((image_bytes - large - app) // BASE_LAYERS),) * BASE_LAYERS, large, app)


def build(control: Control, folder: Path, image_bytes: int) -> None:
    """Build all images on the control side; their contexts go through `folder`."""
    sizes, files = Sizes.of(image_bytes), regular_files(SOURCE)
    base = [take(files, size) for size in sizes.base]
    large, app, other_app, small = (
        take(files, size) for size in (sizes.large, sizes.app, sizes.app, SMALL_BYTES)
    )
    builder = _Builder(control, folder / "context.tar")
    builder.build("bench-base:v0", "scratch", {f"base{number}": layer for number, layer in enumerate(base)})
    builder.build("bench-large:v0", "bench-base:v0", {"large": large})
    builder.build("bench-large:v2", "bench-base:v0", {"large": large}, changed=large[len(large) // 2])
    builder.build(FIRST, "bench-large:v0", {"app": app})
    builder.build(CHANGED, "bench-large:v0", {"app": other_app})
    builder.build(LARGE, "bench-large:v2", {"app": other_app})
    builder.build(SMALL, "scratch", {"small": small})


def regular_files(root: Path) -> Iterator[Path]:
    """Every regular file below `root` that is not empty, in a fixed order."""
    for folder, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                yield path


def take(files: Iterator[Path], wanted_bytes: int) -> _Files:
    """The next files, until they have about this many bytes; files that are far too large are left out."""
    taken, left = [], wanted_bytes
    for path in files:
        size = path.stat().st_size
        if size > max(left, wanted_bytes // 10):
            continue
        taken.append(path)
        left -= size
        if left <= wanted_bytes // 50:
            return taken
    raise TooFewFiles(left)


@dataclass(frozen=True)
class _Builder:
    control: Control
    context: Path

    def build(
        self, reference: str, base: str, layers: dict[str, _Files], changed: Path | None = None
    ) -> None:
        """Each folder of the context becomes a layer; `changed` gets one line more than it has."""
        with tarfile.open(self.context, "w", dereference=True) as context:  # hard links as files
            _add(context, "Dockerfile", dockerfile(base, list(layers)).encode())
            for name, files in layers.items():
                for path in files:
                    _copy(context, path, f"{name}{path}", b"changed\n" if path == changed else b"")
        words = [DOCKER, "build", "--quiet", "--tag", reference, "-"]
        line = f"{shlex.join(words)} < {shlex.quote(str(self.context))}"
        classic = {"DOCKER_BUILDKIT": "0"}
        self.control.run("sh", "-c", line, env=classic, timeout=_BUILD_SECONDS)
        self.context.unlink()


def dockerfile(base: str, folders: Sequence[str]) -> str:
    """Its lines."""
    copies = [f"COPY {name} /{name}" for name in folders]
    return "\n".join([f"FROM {base}", *copies, 'CMD ["/none"]', ""])


def _copy(context: tarfile.TarFile, path: Path, name: str, more: bytes) -> None:
    if more:
        _add(context, name, path.read_bytes() + more)
        return
    context.add(path, name, recursive=False)


def _add(context: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    context.addfile(member, io.BytesIO(content))
