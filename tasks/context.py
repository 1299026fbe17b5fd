"""What an image is built from, as one digest: unchanged inputs give an unchanged digest.

Where the two builders differ in what they read, what either of them reads counts: a file too many
costs a build, a file too few would deploy the old image. Reads files; builds nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from blake3 import blake3
from docker.utils.build import Pattern, exclude_paths
from docker.utils.fnmatch import fnmatchcase

from tasks.dockerfile import base_images, fetches_files
from tasks.parameters import BuildOptions

__all__ = ["base_images", "context_files", "fingerprint_context"]
_READ_BYTES = 1024 * 1024


def fingerprint_context(build: BuildOptions, image: str, base_ids: Mapping[str, str | None]) -> str | None:
    """BLAKE3 over context, Dockerfile, options, image name and the ids of the base images.

    None when the build may give another image from the same files: no_cache, pull, a file from the
    network, or a base image that cannot be told.
    """
    dockerfile = build.dockerfile.read_text(errors="replace")
    references = base_images(dockerfile, build.build_args)
    unsure = build.no_cache or build.pull or fetches_files(dockerfile)
    if unsure or any(base_ids.get(name) is None for name in references):
        return None
    made_of = build.model_dump_json(exclude={"compression"})
    digest = blake3(f"{image}\n{made_of}\n{sorted(base_ids.items())}\n".encode())
    for name in context_files(build):
        path = build.context / name
        digest.update(_describe(name, path))
        if path.is_file() and not path.is_symlink():
            _update(digest, path)
    return str(digest.hexdigest())


def context_files(build: BuildOptions) -> list[str]:
    """Names in the context that a builder reads, sorted; folders and links among them."""
    dockerfile = str(build.dockerfile.relative_to(build.context))
    own = f"{dockerfile}.dockerignore"  # BuildKit prefers it, the engine's builder ignores it
    files = [".dockerignore", *([own] if (build.context / own).is_file() else [])]
    names = {dockerfile}
    for patterns in (_patterns(build.context / file) for file in files):
        names |= exclude_paths(str(build.context), list(patterns), dockerfile=dockerfile)
        names |= set(_let_through(build.context, patterns)) if patterns else set()
    return sorted(names)


def _patterns(ignore: Path) -> list[str]:
    lines = ignore.read_text(errors="replace").splitlines() if ignore.is_file() else []
    return [text for line in lines if (text := line.strip()) and not text.startswith("#")]


def _let_through(context: Path, patterns: list[str]) -> Iterator[str]:
    """What BuildKit sends: case counts, and an exception reaches into every ignored folder."""
    rules = [(rule.exclusion, rule.cleaned_pattern) for rule in map(Pattern, patterns) if rule.dirs]
    has_exceptions = any(is_exception for is_exception, _ in rules)
    for folder, folders, files in os.walk(context):
        names = {name: Path(folder, name).relative_to(context) for name in (*folders, *files)}
        sent = {name for name, path in names.items() if not _is_ignored(path, rules)}
        yield from (str(names[name]) for name in sent)
        if not has_exceptions:
            folders[:] = [name for name in folders if name in sent]


def _is_ignored(path: Path, rules: list[tuple[bool, str]]) -> bool:
    """The last rule that fits the path, or a folder above it, decides."""
    names = [str(path), *(str(parent) for parent in path.parents[:-1])]
    fitting = [is_exception for is_exception, rule in rules if any(fnmatchcase(name, rule) for name in names)]
    return bool(fitting) and not fitting[-1]


def _describe(name: str, path: Path) -> bytes:
    """Name, mode, size and target; a folder's size is the file system's own affair."""
    status = path.lstat()
    target = str(path.readlink()) if path.is_symlink() else ""
    size_bytes = status.st_size if path.is_file() else 0
    return os.fsencode(f"{name}\0{status.st_mode:o}\0{size_bytes}\0{target}\n")


def _update(digest: blake3, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
