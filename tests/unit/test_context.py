"""The fingerprint of a build: it changes with whatever a builder reads, and with nothing else."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from docker.utils.build import tar

from tasks.context import base_images, context_files, fingerprint_context
from tasks.parameters import BuildOptions

BASES: dict[str, str | None] = {"base:1": "sha256:" + "1" * 64}
IMAGE = "engine/web:v1"


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A context with a Dockerfile, a file, a file in a folder, a link, and things that are ignored."""
    (tmp_path / "Dockerfile").write_text("FROM base:1\nCOPY . /app\n")
    (tmp_path / ".dockerignore").write_text("# left at home\n\n*.log\nsecret\n")
    (tmp_path / "app.py").write_text("print(1)\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "code.py").write_text("x = 1\n")
    (tmp_path / "link").symlink_to("app.py")
    (tmp_path / "debug.log").write_text("noise\n")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("k\n")
    return tmp_path


def options(context: Path, **changes: Any) -> BuildOptions:
    """Build options of the context."""
    return BuildOptions.model_validate({"build_context": str(context), **changes})


def fingerprint(context: Path, **changes: Any) -> str | None:
    """The fingerprint of the context with its one base image."""
    return fingerprint_context(options(context, **changes), IMAGE, BASES)


def link_to(target: str) -> Callable[[Path], None]:
    """Point the link somewhere else."""

    def change(context: Path) -> None:
        (context / "link").unlink()
        (context / "link").symlink_to(target)

    return change


COUNTING: dict[str, Callable[[Path], object]] = {
    "content of the same size": lambda context: (context / "app.py").write_text("print(2)\n"),
    "content in a folder": lambda context: (context / "lib" / "code.py").write_text("x = 2\n"),
    "a file's mode": lambda context: (context / "app.py").chmod(0o755),
    "a folder's mode": lambda context: (context / "lib").chmod(0o700),
    "a link's target": link_to("lib/code.py"),
    "a broken link": link_to("nowhere"),
    "a new empty file": lambda context: (context / "new").touch(),
    "a new empty folder": lambda context: (context / "new").mkdir(),
    "a file that is gone": lambda context: (context / "app.py").unlink(),
    "a file's name": lambda context: (context / "app.py").rename(context / "main.py"),
    "the Dockerfile": lambda context: (context / "Dockerfile").write_text("FROM base:1\nCOPY . /srv\n"),
    ".dockerignore": lambda context: (context / ".dockerignore").write_text("*.log\nsecret\n# more\n"),
}
NOT_COUNTING: dict[str, Callable[[Path], object]] = {
    "a time": lambda context: os.utime(context / "app.py", (1, 1)),
    "an ignored file": lambda context: (context / "debug.log").write_text("more noise\n"),
    "a new ignored file": lambda context: (context / "lib.log").touch(),
    "a file in an ignored folder": lambda context: (context / "secret" / "key").write_text("another\n"),
}


def test_the_same_inputs_give_the_same_fingerprint(context: Path) -> None:
    """64 hex digits of BLAKE3, twice the same."""
    first = fingerprint(context)
    assert first is not None
    assert len(first) == 64
    assert fingerprint(context) == first


@pytest.mark.parametrize("change", COUNTING.values(), ids=COUNTING)
def test_what_a_builder_reads_changes_the_fingerprint(
    context: Path, change: Callable[[Path], object]
) -> None:
    """A stale image is never taken for the new one."""
    before = fingerprint(context)
    change(context)
    assert fingerprint(context) not in (before, None)


@pytest.mark.parametrize("change", NOT_COUNTING.values(), ids=NOT_COUNTING)
def test_what_no_builder_reads_leaves_the_fingerprint(
    context: Path, change: Callable[[Path], object]
) -> None:
    """An unchanged image is not built again for a log file."""
    before = fingerprint(context)
    change(context)
    assert fingerprint(context) == before


def test_the_number_of_ignored_files_in_a_folder_does_not_count(context: Path) -> None:
    """Some file systems show it in the folder's size."""
    (context / ".dockerignore").write_text("**/*.log\n")
    before = fingerprint(context)
    for number in range(400):
        (context / "lib" / f"{number:0100d}.log").touch()
    assert fingerprint(context) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"build_args": {"VERSION": "2"}},
        {"labels": {"team": "a"}},
        {"platform": "linux/arm64"},
        {"cache_from": ["base:1"]},
        {"required_labels": ["team"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_the_build_change_the_fingerprint(context: Path, changes: dict[str, Any]) -> None:
    """Another value, another image."""
    assert fingerprint(context, **changes) not in (fingerprint(context), None)


def test_image_name_and_base_image_change_the_fingerprint(context: Path) -> None:
    """The name holds the engine; a base that was pulled anew under its old tag has another id."""
    known = {
        fingerprint_context(options(context), IMAGE, BASES),
        fingerprint_context(options(context), "other/web:v1", BASES),
        fingerprint_context(options(context), IMAGE, {"base:1": "sha256:" + "2" * 64}),
    }
    assert len(known) == 3
    assert None not in known


@pytest.mark.parametrize("flag", ["no_cache", "pull"])
def test_builds_that_ask_for_something_new_have_no_fingerprint(context: Path, flag: str) -> None:
    """None: nothing may be taken from the cache."""
    assert fingerprint(context, **{flag: True}) is None


def test_an_unknown_base_image_forbids_the_cache(context: Path) -> None:
    """The builder will fetch it, and nobody knows yet what it is."""
    assert fingerprint_context(options(context), IMAGE, {}) is None
    assert fingerprint_context(options(context), IMAGE, {"base:1": None}) is None


@pytest.mark.parametrize(
    ("line", "cached"),
    [
        ("ADD https://example.org/app.tgz /", False),
        ('ADD ["http://example.org/app.tgz", "/"]', False),
        ("ADD git@example.org:app.git /src", False),
        ("ADD --checksum=sha256:00 https://example.org/app.tgz /", True),
        ("ADD app.py /", True),
        ("RUN echo https://example.org", True),
    ],
)
def test_a_file_from_the_network_forbids_the_cache(context: Path, line: str, cached: bool) -> None:
    """Its content may change while the Dockerfile does not."""
    (context / "Dockerfile").write_text(f"FROM base:1\n{line}\n")
    assert (fingerprint(context) is not None) is cached


def test_a_name_that_is_no_unicode_is_taken_as_it_is(context: Path) -> None:
    """Old archives hold such names, and the builder takes them too."""
    Path(os.fsdecode(os.fsencode(context) + b"/caf\xe9")).write_text("x")
    before = fingerprint(context)
    assert before is not None


# -- which files count ---------------------------------------------------------------------------


def sent_by_the_client(context: Path) -> set[str]:
    """Names in the archive that docker-py sends to the engine."""
    ignore = context / ".dockerignore"
    lines = [line.strip() for line in ignore.read_text().splitlines()] if ignore.exists() else []
    patterns = [line for line in lines if line and not line.startswith("#")]
    sent: Any = tar(context, exclude=patterns or None, dockerfile=("Dockerfile", None))
    with sent, tarfile.open(fileobj=sent) as archive:
        return set(archive.getnames())


IGNORES = {
    "nothing": "",
    "a comment after spaces": "   # app.py\n",
    "all but one": "*\n!app.py\n",
    "a file in an ignored folder": "lib\n!lib/code.py\n",
    "the last rule wins": "!app.py\napp.py\n",
    "a rule that is taken back": "app.py\n!app.py\n",
    "any depth": "**/*.py\n",
    "the Dockerfile itself": "Dockerfile\n",
    "everything": "*\n",
    "a folder with a slash": "lib/\n",
    "from the root": "/app.py\n",
    "with dots": "./lib/../app.py\n",
}


@pytest.mark.parametrize("rules", IGNORES.values(), ids=IGNORES)
def test_the_files_that_count_are_those_that_the_client_sends(context: Path, rules: str) -> None:
    """Exceptions, comments and an ignored Dockerfile among the rules."""
    (context / ".dockerignore").write_text(rules)
    assert set(context_files(options(context))) == sent_by_the_client(context)


def test_without_dockerignore_everything_counts(context: Path) -> None:
    """The client sends it all."""
    (context / ".dockerignore").unlink()
    assert "secret/key" in context_files(options(context))
    assert set(context_files(options(context))) == sent_by_the_client(context)


def test_a_dockerfile_in_an_ignored_folder_counts(context: Path) -> None:
    """It is read wherever it lies."""
    (context / "secret" / "Dockerfile").write_text("FROM base:1\n")
    named = options(context, dockerfile_path="secret/Dockerfile")
    before = fingerprint_context(named, IMAGE, BASES)
    (context / "secret" / "Dockerfile").write_text("FROM base:1\nCMD x\n")
    assert fingerprint_context(named, IMAGE, BASES) != before


@pytest.mark.parametrize(
    ("rules", "name"),
    [("readme.md\n", "README.md"), ("*\n!**/keep.txt\n", "lib/keep.txt"), ("*\n!KEEP\n", "KEEP")],
    ids=["case", "an exception at any depth", "an exception in capitals"],
)
def test_what_only_buildkit_sends_counts_too(context: Path, rules: str, name: str) -> None:
    """BuildKit's rules know case, and its exceptions reach into ignored folders; docker-py's do not."""
    (context / ".dockerignore").write_text(rules)
    (context / name).write_text("1")
    assert name in context_files(options(context))


def test_the_ignore_file_of_the_dockerfile_counts_as_well(context: Path) -> None:
    """BuildKit prefers `Dockerfile.dockerignore`; what either builder would send is counted."""
    (context / "Dockerfile.dockerignore").write_text("app.py\n")
    names = context_files(options(context))
    assert "secret/key" in names  # sent by BuildKit
    assert "app.py" in names  # sent by the engine's client


# -- what a Dockerfile starts from ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("dockerfile", "found"),
    [
        ("FROM alpine:3", ["alpine:3"]),
        ("from alpine:3 as build\nFrom build\n", ["alpine:3"]),
        ("FROM alpine AS alpine\nFROM alpine\n", ["alpine"]),
        ("FROM a AS Build\nFROM b\nCOPY --from=build /x /x\n", ["a", "b"]),
        ("FROM scratch\n", []),
        ("FROM --platform=linux/arm64 alpine:3\n", ["alpine:3"]),
        ("FROM --platform=$BUILDPLATFORM alpine:3 AS x\n", ["alpine:3"]),
        ("# FROM other\n  FROM alpine\n", ["alpine"]),
        ("FROM \\\n  alpine:3 \\\n  AS build\nFROM build\n", ["alpine:3"]),
        ("FROM \\\n# why not\n  alpine:3\n", ["alpine:3"]),
        ("FROM\talpine\tAS\tx\nFROM x\n", ["alpine"]),
        ("RUN echo \\\n  FROM other\nFROM alpine\n", ["alpine"]),
        ("FROM a\nRUN <<EOF\nFROM other\nEOF\nFROM b\n", ["a", "b"]),
        ("FROM a\nRUN echo $((1 <<N))\nFROM b\n", ["a", "b"]),
        ("FROM a\nFROM a\n", ["a"]),
        ("FROM localhost:5000/team/app@sha256:00\n", ["localhost:5000/team/app@sha256:00"]),
        ("FROM a\nCOPY --from=nginx:1 /etc /etc\nCOPY --from=0 /x /x\n", ["a", "nginx:1"]),
        ("FROM a\nRUN --mount=type=bind,from=tools:1,target=/t /t/run\n", ["a", "tools:1"]),
        ("", []),
    ],
)
def test_base_images_are_those_that_are_not_stages(dockerfile: str, found: list[str]) -> None:
    """In their order, each once, also those that files are only copied from."""
    assert base_images(dockerfile, {}) == found


@pytest.mark.parametrize(
    ("dockerfile", "build_args", "found"),
    [
        ("ARG BASE=alpine:3\nFROM $BASE\n", {}, ["alpine:3"]),
        ("ARG BASE=alpine:3\nFROM ${BASE}\n", {"BASE": "debian:12"}, ["debian:12"]),
        ("ARG BASE='alpine:3'\nFROM $BASE\n", {}, ["alpine:3"]),
        ("ARG V=3\nARG BASE=alpine:${V}\nFROM ${BASE}\n", {}, ["alpine:3"]),
        ("ARG V=3\nARG BASE=alpine:${V}\nFROM ${BASE}\n", {"V": "4"}, ["alpine:4"]),
        ("ARG A=alpine V=3\nFROM $A:$V\n", {}, ["alpine:3"]),
        ("ARG BASE\nFROM $BASE\n", {"BASE": "debian:12"}, ["debian:12"]),
        ("ARG BASE\nFROM ${BASE:-alpine}\n", {}, ["alpine"]),
        ("ARG BASE\nFROM a${BASE:+-slim}\n", {"BASE": "x"}, ["a-slim"]),
        ("ARG BASE\nFROM $BASE\n", {}, ["$BASE"]),
        ("FROM $BASE\n", {"BASE": "never-declared"}, ["$BASE"]),
        ("ARG BASE=a\nFROM $BASE\nARG BASE=b\nFROM $BASE AS x\n", {}, ["a"]),
    ],
)
def test_arguments_before_the_first_from_are_filled_in(
    dockerfile: str, build_args: dict[str, str], found: list[str]
) -> None:
    """The caller's value, else the default; what cannot be told stays, and forbids the cache."""
    assert base_images(dockerfile, build_args) == found
