"""The command line of BuildKit, and what becomes of what a builder says."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks import builder
from tasks.builder import buildx_command, image_labels
from tasks.errors import BuildFailed
from tasks.parameters import BuildOptions

PROJECT = Path(__file__).resolve().parents[2]


def options(context: Path, **changes: Any) -> BuildOptions:
    """Build options of the context."""
    return BuildOptions.model_validate({"build_context": str(context), **changes})


def values_of(command: list[str], flag: str) -> list[str]:
    """What follows each `flag`."""
    return [value for name, value in itertools.pairwise(command) if name == flag]


def test_the_plain_command_builds_loads_and_tags(tmp_path: Path) -> None:
    """Docker, the context last, the Dockerfile by its path, output line by line."""
    command = buildx_command(options(tmp_path), "web:v1", {})
    assert command == [
        *("docker", "buildx", "build", "--load", "--progress", "plain"),
        *("--tag", "web:v1", "--file", f"{tmp_path}/Dockerfile", str(tmp_path)),
    ]


def test_every_option_has_its_flag(tmp_path: Path) -> None:
    """Nothing that was asked for is dropped."""
    asked = options(
        tmp_path,
        dockerfile_path="docker/Release",
        build_args={"VERSION": "1", "TEXT": "a b=c;$(x)"},
        cache_from=["web:v0", "web:main"],
        no_cache=True,
        pull=True,
        platform="linux/arm64",
    )
    command = buildx_command(asked, "web:v1", {"team": "a", "note": ""})
    assert values_of(command, "--build-arg") == ["VERSION=1", "TEXT=a b=c;$(x)"]
    assert values_of(command, "--label") == ["team=a", "note="]
    assert values_of(command, "--cache-from") == ["web:v0", "web:main"]
    assert values_of(command, "--platform") == ["linux/arm64"]
    assert values_of(command, "--file") == [f"{tmp_path}/docker/Release"]
    assert {"--no-cache", "--pull"} < set(command)
    assert command[-1] == str(tmp_path)


def test_flags_that_were_not_asked_for_are_absent(tmp_path: Path) -> None:
    """The builder's own defaults stay."""
    command = buildx_command(options(tmp_path), "web:v1", {})
    assert not {"--no-cache", "--pull", "--platform", "--build-arg", "--cache-from"} & set(command)


def test_our_label_cannot_be_replaced(tmp_path: Path) -> None:
    """Images are found again by it."""
    asked = options(tmp_path, labels={"team": "a", "gantry.container_name": "other"})
    assert image_labels(asked, "web") == {"team": "a", "gantry.container_name": "web"}


# -- a `docker` of the test's own stands on PATH: what it says and how it ends is what is tested -----


@pytest.fixture
def docker_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a program `docker` on PATH that runs a line of shell."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def write(line: str) -> None:
        (programs / "docker").write_text(f"#!/bin/sh\n{line}\n")
        (programs / "docker").chmod(0o755)

    return write


def run_buildx(tmp_path: Path, limit_seconds: float = 20) -> list[str]:
    """Run the command of BuildKit; the lines that it said."""
    said: list[str] = []
    command = buildx_command(options(tmp_path), "web:v1", {})
    builder._build_with_buildkit(command, said.append, limit_seconds)
    return said


def test_each_line_is_said_as_it_comes(tmp_path: Path, docker_says: Any) -> None:
    """Both streams, in order, also bytes that are no text; attestations are off."""
    docker_says("echo one; echo two >&2; printf 'caf\\351\\n'; echo $BUILDX_NO_DEFAULT_ATTESTATIONS")
    assert run_buildx(tmp_path) == ["one", "two", "caf\ufffd", "1"]


def test_a_build_that_fails_is_told_by_the_builders_last_words(tmp_path: Path, docker_says: Any) -> None:
    """On one line, the last twelve of them."""
    docker_says("seq 1 40; echo 'exit code: 7'; exit 3")
    with pytest.raises(BuildFailed, match=r"ended with 3: 30 \| .* \| exit code: 7$") as failed:
        run_buildx(tmp_path)
    assert failed.value.retryable


def is_dead(pid: int) -> bool:
    """Gone, or dead and not yet collected by init."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_dead(pid: int) -> None:
    """The kernel takes its time on a busy machine."""
    deadline = time.monotonic() + 20
    while not is_dead(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def test_a_build_without_end_is_ended_with_all_its_processes(tmp_path: Path, docker_says: Any) -> None:
    """The plugin too: a thread that waits for it would keep the flow's process alive."""
    docker_says("sleep 60 & echo started $!; wait")
    began, said = time.monotonic(), list[str]()
    command = buildx_command(options(tmp_path), "web:v1", {})
    with pytest.raises(BuildFailed, match="ended with -9: started"):
        builder._build_with_buildkit(command, said.append, 0.5)
    assert time.monotonic() - began < 20
    wait_until_dead(int(said[0].removeprefix("started ")))


def test_a_build_ends_with_the_process_that_asked_for_it(tmp_path: Path, docker_says: Any) -> None:
    """A deployment that is cancelled or killed builds no further."""
    docker_says("echo started $$; sleep 60")
    command = buildx_command(options(tmp_path), "web:v1", {})
    program = "import sys; from tasks import builder; builder._build_with_buildkit(sys.argv[1:], print, 60)"
    with subprocess.Popen(
        [sys.executable, "-uc", program, *command], stdout=subprocess.PIPE, text=True, cwd=PROJECT
    ) as asking:
        assert asking.stdout is not None
        pid = int(asking.stdout.readline().removeprefix("started "))
        asking.kill()
    wait_until_dead(pid)
