"""Routes in a real HAProxy: moved, drained, kept over restarts, and no request lost on the way."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from receiver import proxy as module
from receiver import settings
from receiver.contract import DeploymentConfig, PortMapping, Strategy
from receiver.proxy import Proxy, ProxyFailed, ProxyMissing
from receiver.routes import Route, Target, route_for
from tests import load
from tests.services import free_port, require_service

SLOW_SECONDS = 0.6


class _Version(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = ""

    def do_GET(self) -> None:
        """The version's name; `/slow` takes its time."""
        if self.path == "/slow":
            time.sleep(SLOW_SECONDS)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.name)))
        self.end_headers()
        self.wfile.write(self.name.encode())

    do_POST = do_GET  # noqa: N815 - the server's own word

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def version(name: str) -> Iterator[Target]:
    """A version of a service: an HTTP server on loopback, for container port 80."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Named", (_Version,), {"name": name}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield Target(container_id=name, ports={80: server.server_port})
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """A proxy with a keeper, as the daemon has one."""
    found = settings.from_environment({"HOOK_RECEIVER_STATE_DIR": str(tmp_path)}, require_key=False)
    found.make_folders()
    proxy, is_over = Proxy(found), threading.Event()
    require_service(proxy.is_there, "no HAProxy here", "apt-get install haproxy")

    def keep() -> None:
        while not is_over.wait(0.05):
            proxy.keep_running()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield proxy
    finally:
        is_over.set()
        keeper.join()
        end(proxy)


def end(proxy: Proxy) -> None:
    """End HAProxy, if it runs."""
    pid_file = proxy.folder / "haproxy.pid"
    if pid_file.exists():
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        pid_file.unlink()


def routed(port: int, target: Target, service: str = "web", **config: object) -> Route:
    """A route of a service on a public port."""
    mapping = PortMapping(host_port=port, container_port=80, host_ip="127.0.0.1")
    asked = DeploymentConfig.model_validate(
        {"strategy": Strategy.ROLLING, "port_mappings": [mapping], **config}
    )
    return route_for(service, asked, target)


def ask(port: int, path: str = "/", host: str | None = None) -> str:
    """One request on a connection of its own."""
    return load.ask("127.0.0.1", port, path, {"Host": host} if host else {})


def answers(port: int) -> bool:
    """Whether v2 does, here."""
    try:
        return ask(port) == "v2"
    except (OSError, HTTPException):
        return False


def test_moving_a_route_back_and_forth_loses_no_request(proxy: Proxy) -> None:
    """Under load of every kind; each version is idle when its drain says so."""
    port = free_port()
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one))
        with load.load("127.0.0.1", port) as outcome:
            for target, slot in [(two, "a"), (one, "b"), (two, "a"), (one, "b")]:
                known = proxy.route("web")
                assert known
                moved = known.leading_to(target)
                proxy.set_route(moved)
                assert proxy.drain(moved, "a" if slot == "a" else "b", 10) == 0
                assert ask(port) == target.container_id
        assert outcome.failures == []
        assert set(outcome.answers) == {"v1", "v2"}


def test_an_idle_version_can_be_ended_at_once(proxy: Proxy) -> None:
    """After its drain nothing is asked of it any more."""
    port = free_port()
    with ExitStack() as old, version("v2") as two:
        one = old.enter_context(version("v1"))
        proxy.set_route(routed(port, one))
        with load.load("127.0.0.1", port) as outcome:
            moved = routed(port, one).leading_to(two)
            proxy.set_route(moved)
            proxy.drain(moved, "a", 10)
            old.close()
            time.sleep(0.3)
        assert outcome.failures == []
        assert set(outcome.answers) <= {"v1", "v2"}


@pytest.mark.parametrize(("method", "ending"), [("POST", b"502 Bad Gateway"), ("GET", b"v2")])
def test_what_does_not_end_within_the_limit_is_closed(proxy: Proxy, method: str, ending: bytes) -> None:
    """It is counted; what may be asked twice and had no answer yet is answered by the new version."""
    port = free_port()
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one))
        line = begin(port, method)
        moved = routed(port, one).leading_to(two)
        while not proxy.busy(moved, "a"):
            time.sleep(0.01)
        proxy.set_route(moved)
        assert proxy.drain(moved, "a", 0.1) == 1
        assert proxy.busy(moved, "a") == 0
        assert ending in whole(line)


def begin(port: int, method: str = "GET") -> socket.socket:
    """A connection with a slow request under way."""
    line = socket.create_connection(("127.0.0.1", port), timeout=5)
    line.sendall(
        f"{method} /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    )
    return line


def whole(line: socket.socket) -> bytes:
    """All that comes, until the connection ends."""
    with line:
        return b"".join(iter(lambda: line.recv(4096), b""))


def test_a_request_that_began_before_a_reload_is_waited_for(proxy: Proxy) -> None:
    """A new service has HAProxy read its configuration; the worker that leaves is asked, too."""
    port, other = free_port(), free_port()
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one))
        line = begin(port)
        while not proxy.busy(routed(port, one), "a"):
            time.sleep(0.01)
        proxy.set_route(routed(other, two, "shop"))
        moved = routed(port, one).leading_to(two)
        proxy.set_route(moved)
        assert proxy.busy(moved, "a") == 1
        assert proxy.drain(moved, "a", 10) == 0
        assert whole(line).endswith(b"v1")


def test_routes_outlive_haproxy(proxy: Proxy) -> None:
    """Started again by its keeper, it leads where it did."""
    port = free_port()
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one))
        proxy.set_route(routed(port, one).leading_to(two))
        before = (proxy.folder / "haproxy.pid").read_text()
        os.kill(int(before), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (proxy.folder / "haproxy.pid").read_text() in {"", before} or not answers(port):
            assert time.monotonic() < deadline, "HAProxy was not started again"
            time.sleep(0.02)


def test_a_service_gives_its_ports_back(proxy: Proxy) -> None:
    """Without a route, anyone may listen there."""
    port = free_port()
    with version("v1") as one:
        proxy.set_route(routed(port, one))
        assert ask(port) == "v1"
        proxy.remove_route("web")
        with socket.create_server(("127.0.0.1", port)):
            pass
        proxy.remove_route("web")


def test_a_port_that_something_else_holds_is_told_and_changes_nothing(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other services go on; the routes are those of before."""
    port = free_port()
    with version("v1") as one, socket.create_server(("127.0.0.1", 0)) as held:
        proxy.set_route(routed(port, one))
        with pytest.raises(ProxyFailed, match="cannot take the public ports"):
            proxy.set_route(routed(held.getsockname()[1], one, "shop"))
        assert ask(port) == "v1"
        assert proxy.route("shop") is None


def test_services_share_a_port_by_their_hostnames(proxy: Proxy) -> None:
    """Each name leads to its service, and none other; without names the second one is refused."""
    port = free_port()
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one, "shop", hostname="shop.example.com"))
        proxy.set_route(routed(port, two, "blog", hostname="blog.example.com"))
        assert ask(port, host="shop.example.com") == "v1"
        assert ask(port, host=f"blog.example.com:{port}") == "v2"
        assert ask(port, host="other.example.com") == "HTTP 503"
        with pytest.raises(ProxyFailed, match="service blog has host port"):
            proxy.check(routed(port, one, "web", hostname="blog.example.com"))


def test_https_is_spoken_where_a_certificate_is_given(proxy: Proxy, tmp_path: Path) -> None:
    """With that certificate, which the client checks; the service is told."""
    port, pem, key = free_port(), tmp_path / "shop.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=shop.example.com", "-addext", "subjectAltName=DNS:shop.example.com")
    words = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject)
    subprocess.run([*words, "-keyout", str(key), "-out", str(pem)], check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=str(pem))
    pem.write_text(pem.read_text() + key.read_text())
    with version("v1") as one:
        proxy.set_route(routed(port, one, https_certificate_file=str(pem)))
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
            trusted.wrap_socket(plain, server_hostname="shop.example.com") as line,
        ):
            line.sendall(b"GET / HTTP/1.1\r\nHost: shop.example.com\r\nConnection: close\r\n\r\n")
            assert b"".join(iter(lambda: line.recv(4096), b"")).endswith(b"v1")


def test_a_certificate_that_cannot_be_read_is_told_before_anything_changes(proxy: Proxy) -> None:
    """HAProxy's own words name the file."""
    with pytest.raises(ProxyFailed, match=r"/nowhere/shop\.pem"):
        proxy.check(
            routed(
                free_port(), Target(container_id="v1", ports={}), https_certificate_file="/nowhere/shop.pem"
            )
        )
    assert list(proxy.folder.glob("*.cfg")) == []


def test_a_host_without_haproxy_says_what_to_install(tmp_path: Path) -> None:
    """The error names package, setting and fallback."""
    found = settings.from_environment(
        {"HOOK_RECEIVER_STATE_DIR": str(tmp_path), "HOOK_RECEIVER_HAPROXY": "no-such-proxy"},
        require_key=False,
    )
    with pytest.raises(ProxyMissing, match="apt-get install haproxy"):
        Proxy(found).program()


def test_a_proxy_that_nobody_starts_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a daemon the move fails, and no route is left written down."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    found = settings.from_environment({"HOOK_RECEIVER_STATE_DIR": str(tmp_path)}, require_key=False)
    found.make_folders()
    with pytest.raises(ProxyFailed, match="the receiver starts it"):
        Proxy(found).set_route(routed(free_port(), Target(container_id="v1", ports={80: 1})))
    assert Proxy(found).route("web") is None
