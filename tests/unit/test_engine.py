"""What is asked of an engine to know who it is: as little as will do."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from docker.errors import DockerException

from receiver import engine as engine_module
from receiver.engine import Engine, EngineUnreachable, ImageStore
from receiver.engine_version import newest_api_version
from tasks import builder
from tasks.errors import BuildFailed


@dataclass
class Answers:
    """An engine on a Unix socket: what it answers, and what it was asked."""

    url: str
    ping_headers: dict[str, str] = field(default_factory=lambda: {"Api-Version": "1.44"})
    info: dict[str, Any] = field(
        default_factory=lambda: {"DockerRootDir": "/var/lib/docker", "Driver": "overlay2"}
    )
    asked: list[str] = field(default_factory=list)

    def to(self, path: str) -> tuple[dict[str, str], Any]:
        """Headers and body; a version in the path is kept among what was asked."""
        self.asked.append(path)
        match path.rsplit("/", 1)[-1]:
            case "_ping":
                return self.ping_headers, "OK"
            case "info":
                return {}, self.info
            case _:
                return {}, {"Version": "26.0.0", "ApiVersion": "1.44", "Arch": "arm64", "Os": "linux"}


class _Server(socketserver.ThreadingUnixStreamServer):
    answers: Answers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        headers, told = self.server.answers.to(self.path)
        body = json.dumps(told).encode()
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    """An engine that answers."""
    path = tmp_path / "engine.sock"
    with _Server(str(path), _Handler) as server:
        server.answers = Answers(f"unix://{path}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        server.daemon_threads = True
        thread.start()
        yield server.answers
        server.shutdown()
        thread.join()


def test_the_version_is_what_the_ping_tells(answers: Answers) -> None:
    """Without a version in the path, which a newer engine may refuse."""
    assert newest_api_version(answers.url) == "1.44"
    assert answers.asked == ["/_ping"]


def test_a_ping_without_a_version_is_an_error(answers: Answers) -> None:
    """Whatever answers there is no engine."""
    answers.ping_headers = {}
    with pytest.raises(DockerException, match="Api-Version"):
        newest_api_version(answers.url)
    with pytest.raises(EngineUnreachable, match="Api-Version"):
        Engine(answers.url)


def test_nobody_there_is_an_error(tmp_path: Path) -> None:
    """As the engine's own errors are."""
    with pytest.raises(DockerException, match="ping was not answered"):
        newest_api_version(f"unix://{tmp_path}/nobody.sock")


def test_the_building_engine_is_asked_by_a_ping_alone(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client speaks what the engine speaks; one that is not there is told with the next step."""
    monkeypatch.setenv("DOCKER_HOST", answers.url)
    client = builder.connect()
    assert (client.api.api_version, answers.asked) == ("1.44", ["/_ping"])
    client.close()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(BuildFailed, match=r"nobody\.sock"):
        builder.connect()


@pytest.mark.parametrize(
    ("wanted", "spoken"), [(None, "1.44"), ("auto", "1.44"), ("1.41", "1.41"), ("1.99", "1.44")]
)
def test_an_older_version_is_spoken_where_it_is_asked_for(
    answers: Answers, wanted: str | None, spoken: str
) -> None:
    """Never one that the engine does not know."""
    engine = Engine(answers.url, wanted)
    engine.store()
    engine.close()
    assert answers.asked == ["/_ping", f"/v{spoken}/info"]


def test_the_store_is_asked_for_once_and_again_when_that_is_long_ago(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for all of the engine has asked for its store, too."""
    engine = Engine(answers.url)
    assert engine.info().store == engine.store() == ImageStore("/var/lib/docker", "overlay2")
    assert answers.asked == ["/_ping", "/v1.44/version", "/v1.44/info"]
    answers.info = {
        "DockerRootDir": "/data",
        "Driver": "overlayfs",
        "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
    }
    assert engine.store().data_root == "/var/lib/docker"
    monkeypatch.setattr(engine_module, "_STORE_SECONDS", -1)
    assert engine.store() == ImageStore("/data", "overlayfs", is_containerd=True)
    engine.close()
