"""Routes in a real HAProxy: moved, drained, kept over restarts, and no request lost on the way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from receiver import proxy as module
from receiver import settings
from receiver.contract import DeploymentConfig, PortMapping, Strategy
from receiver.proxy import Proxy, ProxyFailed, ProxyMissing
from receiver.proxy_keeper import ProxyKeeper
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
def proxy(tmp_path: Path) -> Iterator[ProxyKeeper]:
    """A proxy that is kept, as the daemon does it."""
    found = settings.from_environment({"HOOK_RECEIVER_STATE_DIR": str(tmp_path)}, require_key=False)
    found.make_folders()
    proxy = ProxyKeeper(found)
    require_service(proxy.is_there, "no HAProxy here", "apt-get install haproxy")
    try:
        with kept(proxy):
            yield proxy
    finally:
        end(proxy)


@contextmanager
def kept(proxy: ProxyKeeper) -> Iterator[None]:
    """HAProxy is started when it is needed."""
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(0.05):
            with suppress(ProxyFailed):
                proxy.keep_running()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        is_over.set()
        keeper.join()


def end(proxy: Proxy, how: signal.Signals = signal.SIGTERM) -> None:
    """End HAProxy, if it runs; it may miss a signal while it reads its configuration again."""
    left = processes(proxy)
    (proxy.folder / "haproxy.pid").unlink(missing_ok=True)
    while left:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        time.sleep(0.1)
        left &= processes(proxy)


def processes(proxy: Proxy) -> set[int]:
    """Masters and workers of HAProxy."""
    return {int(found.name) for found in Path("/proc").glob("[0-9]*") if proxy._is_ours(int(found.name))}


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
        wait_for(lambda: (proxy.folder / "haproxy.pid").read_text() not in {"", before} and ask(port) == "v2")


def test_haproxy_says_its_version_and_whether_it_answers(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is held does not answer."""
    assert re.fullmatch(r"[23]\.\d+\..*", proxy.version() or "")
    with version("v1") as one:
        proxy.set_route(routed(free_port(), one))
        assert proxy.answers()
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.1)
    (proxy.folder / "run.sock").unlink()
    assert not proxy.answers()


def test_haproxy_that_reads_its_configuration_is_not_started_beside_itself(proxy: Proxy) -> None:
    """It writes its pid file anew then, and is without one for a moment."""
    with version("v1") as one:
        proxy.set_route(routed(free_port(), one))
        before = processes(proxy)
        (proxy.folder / "haproxy.pid").unlink()
        time.sleep(0.3)
        assert processes(proxy) <= before


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


def certificate(path: Path, name: str) -> ssl.SSLContext:
    """Write a certificate of a name with its key, as certbot would; returns a client that trusts it alone."""
    words = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1")
    subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
    key, fresh = path.with_suffix(".key.new"), path.with_suffix(".new")
    out = ("-keyout", str(key), "-out", str(fresh))
    subprocess.run([*words, *subject, *out], check=True, capture_output=True)
    trusting = ssl.create_default_context(cafile=str(fresh))
    fresh.write_text(fresh.read_text() + key.read_text())
    fresh.replace(path)
    key.unlink()
    return trusting


def broken(path: Path) -> None:
    """Put something at a certificate's place that is none, at once."""
    fresh = path.with_suffix(".new")
    fresh.write_text("half a certificate")
    fresh.replace(path)


def ask_securely(port: int, client: ssl.SSLContext, name: str = "shop.example.com") -> str:
    """One request by HTTPS; raises `OSError` where the certificate is not trusted."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        client.wrap_socket(plain, server_hostname=name) as line,
    ):
        line.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: line.recv(4096), b"")).decode().rpartition("\n")[2]


def wait_for(fact: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until something is so; whoever cannot be asked says no."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError, HTTPException):
            if fact():
                return
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def test_https_is_spoken_where_a_certificate_is_given(proxy: Proxy, tmp_path: Path) -> None:
    """With that certificate, which the client checks."""
    port, pem = free_port(), tmp_path / "shop.pem"
    client = certificate(pem, "shop.example.com")
    with version("v1") as one:
        proxy.set_route(routed(port, one, https_certificate_file=str(pem)))
        assert ask_securely(port, client) == "v1"


def test_a_renewed_certificate_is_taken_up_by_itself(proxy: Proxy, tmp_path: Path) -> None:
    """Within a second or so of its file's change; requests go on meanwhile."""
    port, plain, pem = free_port(), free_port(), tmp_path / "shop.pem"
    old = certificate(pem, "shop.example.com")
    with version("v1") as one:
        proxy.set_route(routed(port, one, https_certificate_file=str(pem)))
        proxy.set_route(routed(plain, one, "blog"))
        with load.load("127.0.0.1", plain) as outcome:
            new = certificate(pem, "shop.example.com")
            wait_for(lambda: ask_securely(port, new) == "v1", seconds=3)
            with pytest.raises(ssl.SSLCertVerificationError):
                ask_securely(port, old)
        assert set(outcome.answers) == {"v1"}


def test_a_broken_certificate_leaves_haproxy_as_it_is(
    proxy: ProxyKeeper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried and told once, with service and file; other services are moved meanwhile."""
    port, plain, pem = free_port(), free_port(), tmp_path / "shop.pem"
    old = certificate(pem, "shop.example.com")
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one, "shop", https_certificate_file=str(pem)))
        proxy.set_route(routed(plain, one, "blog"))
        broken(pem)
        wait_for(lambda: "service shop" in caplog.text)
        time.sleep(0.5)
        proxy.set_route(routed(plain, one, "blog").leading_to(two))
        assert (ask_securely(port, old), ask(plain)) == ("v1", "v2")
        time.sleep(0.5)
        told = [message for message in caplog.messages if f"service shop, certificate {pem}" in message]
        assert len(told) == 1
        new = certificate(pem, "shop.example.com")
        wait_for(lambda: ask_securely(port, new) == "v1", seconds=3)


def test_a_broken_certificate_takes_down_its_own_service_alone(
    proxy: ProxyKeeper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """HAProxy is started without it, takes other services, and takes it up when the file is mended."""
    port, plain, pem = free_port(), free_port(), tmp_path / "shop.pem"
    certificate(pem, "shop.example.com")
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one, "shop", https_certificate_file=str(pem)))
        proxy.set_route(routed(plain, two, "blog"))
        with proxy.alone():  # as a move would, so that it is not read before HAProxy ends
            pem.unlink()
            end(proxy)
        wait_for(lambda: f"service shop, certificate {pem}" in caplog.text)
        wait_for(lambda: (proxy.folder / "haproxy.pid").exists() and ask(plain) == "v2")
        assert (proxy.answers(), proxy.left_out()) == (True, ["shop"])
        broken(pem)
        other = routed(free_port(), two, "news")
        proxy.check(other)
        proxy.set_route(other)
        wait_for(lambda: caplog.text.count("service shop") == 2)
        shop = routed(port, two, "shop", https_certificate_file=str(pem))
        for refused in (proxy.check, proxy.set_route):
            with pytest.raises(ProxyFailed, match=str(pem)):
                refused(shop)
        wait_for(lambda: proxy.left_out() == ["shop"])
        proxy.set_route(routed(plain, one, "blog"))
        new = certificate(pem, "shop.example.com")
        wait_for(lambda: ask_securely(port, new) == "v1", seconds=3)
        assert proxy.left_out() == []


def test_moving_a_service_that_is_left_out_is_refused_and_harms_no_other(
    proxy: ProxyKeeper, tmp_path: Path
) -> None:
    """Also when it ran with its certificate before, and HAProxy was started anew since."""
    port, plain, pem = free_port(), free_port(), tmp_path / "shop.pem"
    certificate(pem, "shop.example.com")
    with version("v1") as one, version("v2") as two:
        shop = routed(port, one, "shop", https_certificate_file=str(pem))
        proxy.set_route(shop)
        proxy.set_route(routed(plain, one, "blog"))
        broken(pem)
        wait_for((proxy.folder / "refused.json").exists)
        end(proxy)
        wait_for(lambda: proxy.left_out() == ["shop"] and proxy.answers())
        with pytest.raises(ProxyFailed, match=str(pem)):
            proxy.set_route(shop)
        wait_for(lambda: proxy.left_out() == ["shop"])
        proxy.set_route(routed(plain, one, "blog").leading_to(two))
        assert ask(plain) == "v2"


def test_a_certificate_that_broke_again_does_not_take_down_what_runs(
    proxy: ProxyKeeper, tmp_path: Path
) -> None:
    """Not even when it is the very file that HAProxy was started without before."""
    port, pem, half = free_port(), tmp_path / "shop.pem", tmp_path / "half.pem"
    certificate(pem, "shop.example.com")
    broken(half)
    with version("v1") as one:
        proxy.set_route(routed(port, one, https_certificate_file=str(pem)))
        with proxy.alone():
            shutil.copy2(half, pem)
            end(proxy)
        wait_for(lambda: proxy.left_out() == ["web"] and proxy.answers())
        new = certificate(pem, "shop.example.com")
        wait_for(lambda: ask_securely(port, new) == "v1")
        shutil.copy2(half, pem)
        time.sleep(0.7)
        assert ask_securely(port, new) == "v1"


def test_a_configuration_that_was_not_written_is_made_up_for(proxy: ProxyKeeper) -> None:
    """A process that died between routes and configuration leaves the routes, which HAProxy follows."""
    port, other = free_port(), free_port()
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one))
        with proxy.alone():
            both = proxy.routes().having(routed(other, two, "blog"))
            (proxy.folder / "routes.json").write_text(both.model_dump_json())
        wait_for(lambda: ask(other) == "v2")
        assert ask(port) == "v1"


def test_a_configuration_that_was_not_written_is_made_up_for_at_a_start(proxy: ProxyKeeper) -> None:
    """HAProxy leads where the routes say."""
    port = free_port()
    with version("v1") as one, version("v2") as two:
        proxy.set_route(routed(port, one))
        with proxy.alone():
            moved = proxy.routes().having(routed(port, one).leading_to(two))
            (proxy.folder / "routes.json").write_text(moved.model_dump_json())
            (proxy.folder / "haproxy.cfg").unlink()
            end(proxy, signal.SIGKILL)
        wait_for(lambda: ask(port) == "v2")


def test_damaged_routes_do_not_keep_haproxy_from_starting(proxy: ProxyKeeper) -> None:
    """It has its configuration, and leads where it did."""
    port = free_port()
    with version("v1") as one:
        proxy.set_route(routed(port, one))
        with proxy.alone():
            (proxy.folder / "routes.json").write_text("{")
            end(proxy)
        wait_for(lambda: (proxy.folder / "haproxy.pid").exists() and ask(port) == "v1")


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
