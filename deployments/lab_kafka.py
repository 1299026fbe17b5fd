"""A real Apache Kafka on loopback, for tests and the lab: one broker in KRaft mode, jars by Maven.

    with KafkaBroker(folder) as broker:
        broker.bootstrap_servers

The jars are fetched once and kept in `~/.cache/gantry`. Needs Java 17 or newer, and Maven to fetch them.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from deployments.lab_cache import cache_folder
from deployments.lab_processes import LabNotReady

KAFKA_VERSION = "4.3.1"
INSTALL_HINT = "apt-get install default-jre-headless maven"
_LOG4J_VERSION = "2.25.3"
_START_SECONDS = 60
_STOP_SECONDS = 20
_POLL_SECONDS = 0.03
_CLUSTER_ID = "Z2FudHJ5LWxhYi1rYWZrYQ"  # 16 bytes in base64, as Kafka wants them
_API_VERSIONS = struct.pack(">ihhih", 10, 18, 0, 1, -1)  # the request that every broker answers first
# The published pom names no logging backend, so it stands here.
_POM = f"""<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>gantry.lab</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
      <version>{KAFKA_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
      <version>{_LOG4J_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""
# Small and quick to start: nothing here runs for long or holds much.
_JVM = ("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true")
_ONE_REPLICA = ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")


def missing_requirement() -> str | None:
    """Why no broker can run here, or None."""
    if not shutil.which("java"):
        return "java is not installed"
    if not _jars_folder().is_dir() and not shutil.which("mvn"):
        return "mvn is not installed, and Kafka's jars were not fetched yet"
    return None


def fetch_jars() -> Path:
    """Folder with the jars of `KAFKA_VERSION`, by Maven when it is not there; raises `LabNotReady`.

    Safe in several processes at once: a folder appears under its name only when it is complete.
    """
    folder = _jars_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        (Path(scratch) / "pom.xml").write_text(_POM)
        command = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DincludeScope=runtime"]
        command.append(f"-DoutputDirectory={scratch}/jars")
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabNotReady("Maven could not fetch Kafka's jars", f"{done.stdout}{done.stderr}"[-2000:])
        _put(Path(scratch) / "jars", folder)
    return folder


def _put(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise


def _jars_folder() -> Path:
    return cache_folder() / f"kafka-{KAFKA_VERSION}"


def _free_port() -> int:
    """A port below those that the kernel gives to clients, so that it is still free after a restart."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass
class KafkaBroker:
    """One broker whose data stay in `folder` over stops and kills; `settings` go into its properties.

    It dies with the thread that started it, so that nothing is left of a test run that was killed.
    """

    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=_free_port)
    controller_port: int = field(default_factory=_free_port)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        """True while the broker's process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, on its old data when there are any; returns when it answers. Raises `LabNotReady`."""
        if self.alive:
            return
        java = self._java(fetch_jars())
        properties = self._write_properties()
        if not (self.folder / "data").exists():
            self._format(java, properties)
        with self._log.open("ab") as output:
            command = [*_die_with_parent(), *java, "kafka.Kafka", str(properties)]
            self._process = subprocess.Popen(command, stdout=output, stderr=output, cwd=self.folder)
        self._wait_until_it_answers()

    def stop(self) -> None:
        """SIGTERM, as an operator restarts a broker; returns when it has ended."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """After `pause`."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        """Started."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Killed: what it held is not needed any more."""
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._signal(how)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self.folder / "kafka.log"

    def _java(self, jars: Path) -> list[str]:
        return ["java", *_JVM, "-cp", f"{jars}/*"]

    def _write_properties(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        client, controller = f"127.0.0.1:{self.port}", f"127.0.0.1:{self.controller_port}"
        lines = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{client}",
            "inter.broker.listener.name": "PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(self.folder / "data"),
            "num.partitions": "4",
            "num.network.threads": "2",
            "num.io.threads": "2",
            "group.initial.rebalance.delay.ms": "0",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.min.isr": "1",
            # A broker that was killed may register again only after its old session ended.
            "broker.session.timeout.ms": "1000",
            "broker.heartbeat.interval.ms": "200",
            "log.cleaner.dedupe.buffer.size": "4194304",
            **{f"{name}.replication.factor": "1" for name in _ONE_REPLICA},
            **{f"{name}.num.partitions": "1" for name in _ONE_REPLICA},
            **self.settings,
        }
        properties = self.folder / "server.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        return properties

    def _format(self, java: list[str], properties: Path) -> None:
        tool = [*java, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(properties)]
        done = subprocess.run(tool, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabNotReady("Kafka's storage could not be formatted", f"{done.stdout}{done.stderr}")

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if not self.alive or time.monotonic() > deadline:
                raise LabNotReady("Kafka did not start", self._log.read_text(errors="replace")[-2000:])
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                client.sendall(_API_VERSIONS)
                return len(client.recv(4)) == 4
        except OSError:
            return False


def _die_with_parent() -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
