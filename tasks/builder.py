"""Builds by the engine's own builder, or by BuildKit where `docker buildx` is there. Blocking.

Each line that the builder says goes to `say`. Imports no Prefect.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from typing import Any, cast

import docker
from docker.errors import APIError, DockerException
from urllib3.exceptions import HTTPError

from receiver import contract
from receiver.engine_version import newest_api_version
from tasks.engine_address import engine_address
from tasks.errors import BuildFailed
from tasks.parameters import BuildOptions

_KEPT_LINES = 12
_PING_SECONDS = 60
# Ends the command, with the plugin that it starts, when this process is gone: its stdin is then at its end.
_WHILE_WE_LIVE = """
"$@" < /dev/null & command=$!
exec 3<&0 0</dev/null; (read -r _ <&3; kill -s KILL -- -$$) > /dev/null 2>&1 & guard=$!
wait $command; code=$?
kill -s KILL $guard; exit $code
"""
Say = Callable[[str], None]


def connect() -> docker.DockerClient:
    """The engine that builds (`DOCKER_HOST`); raises `BuildFailed` when it does not answer."""
    where = engine_address()
    try:
        if where.startswith("unix://"):
            return docker.from_env(timeout=600, version=newest_api_version(where, _PING_SECONDS))
        client = docker.from_env(timeout=600)
        client.ping()
    except (DockerException, OSError) as exc:
        raise BuildFailed(
            f"no Docker Engine answers at {where}: {exc}",
            next_step="Start Docker on the control host (systemctl start docker) or set DOCKER_HOST.",
        ) from exc
    return client


@cache
def has_buildkit() -> bool:
    """True when `docker buildx` works here."""
    program = shutil.which("docker")
    if program is None:
        return False
    answer = subprocess.run([program, "buildx", "version"], capture_output=True, check=False, timeout=20)
    return answer.returncode == 0


def image_labels(build: BuildOptions, container_name: str) -> dict[str, str]:
    """Labels of the image: those asked for, and ours, by which it is found again."""
    return {**build.labels, contract.LABEL_CONTAINER: container_name}


def build_image(
    build: BuildOptions, container_name: str, image: str, say: Say, limit_seconds: float = 600
) -> str:
    """Build `image` (`name:tag`) and return its id; raises `BuildFailed` with the builder's last words.

    The build is ended after `limit_seconds`: a thread cannot be cancelled, and would outlive its task.
    """
    labels = image_labels(build, container_name)
    if has_buildkit():
        _build_with_buildkit(buildx_command(build, image, labels), say, limit_seconds)
    else:
        _build_with_engine(build, image, labels, say, limit_seconds)
    return str(connect().images.get(image).id)


def buildx_command(build: BuildOptions, image: str, labels: dict[str, str]) -> list[str]:
    """The `docker buildx build` that does what `build_options` say."""
    pairs = [("--build-arg", f"{name}={value}") for name, value in build.build_args.items()]
    pairs += [("--label", f"{name}={value}") for name, value in labels.items()]
    pairs += [("--cache-from", source) for source in build.cache_from]
    if build.platform:
        pairs.append(("--platform", build.platform))
    flags = [flag for flag, wanted in (("--no-cache", build.no_cache), ("--pull", build.pull)) if wanted]
    command = ["docker", "buildx", "build", "--load", "--progress", "plain"]
    command += ["--tag", image, "--file", str(build.dockerfile), *flags]
    return [*command, *(word for pair in pairs for word in pair), str(build.context)]


def _build_with_buildkit(command: list[str], say: Say, limit_seconds: float) -> None:
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    # An attestation makes an index of the image; older buildx know no option for it.
    environment = {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    with (
        subprocess.Popen(
            ["sh", "-c", _WHILE_WE_LIVE, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,
        ) as process,
        _ended_after(limit_seconds, process),
    ):
        for line in cast("Iterable[str]", process.stdout):
            last.append(line.rstrip())
            say(line.rstrip())
    if process.returncode != 0:
        raise BuildFailed(f"docker buildx build ended with {process.returncode}: {_cause(last)}")


@contextmanager
def _ended_after(limit_seconds: float, process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the command with its plugin when it is not done by then, or when the block fails."""

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_seconds, kill)
    timer.start()
    try:
        yield
    except BaseException:
        kill()
        raise
    finally:
        timer.cancel()


def _build_with_engine(
    build: BuildOptions, image: str, labels: dict[str, str], say: Say, limit_seconds: float
) -> None:
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    ends_at = time.monotonic() + limit_seconds
    try:
        answers = connect().api.build(
            path=str(build.context),
            timeout=math.ceil(limit_seconds),  # of one read; without it the client waits for ever
            dockerfile=str(build.dockerfile.relative_to(build.context)),
            tag=image,
            buildargs=build.build_args,
            cache_from=build.cache_from or None,
            nocache=build.no_cache,
            pull=build.pull,
            labels=labels,
            platform=build.platform,
            rm=True,
            forcerm=True,
            decode=True,
        )
        with closing(cast("Generator[dict[str, Any]]", answers)) as told:  # the engine ends what nobody reads
            for answer in told:
                _tell(answer, last, say)
                if time.monotonic() > ends_at:
                    raise BuildFailed(f"docker build took longer than {limit_seconds:.0f} s: {_cause(last)}")
    except APIError as exc:
        raise BuildFailed(f"docker build refused: {exc.explanation or exc}") from exc
    except (DockerException, OSError, HTTPError) as exc:
        raise BuildFailed(f"docker build broke off: {exc} (before it: {_cause(last)})") from exc


def _tell(answer: dict[str, Any], last: deque[str], say: Say) -> None:
    if "error" in answer:
        raise BuildFailed(f"docker build failed: {answer['error']} (before it: {_cause(last)})")
    line = str(answer.get("stream") or answer.get("status") or "").rstrip()
    if line:
        last.append(line)
        say(line)


def _cause(last: Iterable[str]) -> str:
    return " | ".join(line for line in last if line) or "the builder said nothing"
