"""HAProxy on the host: told which container serves, asked whether an old one is idle.

Routes are written to disk before HAProxy is told, so that they outlive it. Whoever changes one holds the
proxy's lock; only the daemon starts HAProxy (`receiver.proxy_keeper`), which outlives it. Imports no Docker.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from receiver import proxy_socket
from receiver.binding import bind_error
from receiver.proxy_socket import Master, ProxySilent
from receiver.proxy_socket import ProxyFailed as ProxyFailed
from receiver.routes import SLOTS, Bind, Refused, Route, Routes, Slot, configuration, digest, port_of
from receiver.settings import ReceiverSettings

PATIENCE_SECONDS = 10.0
CLOSING_SECONDS = 5.0
_MASTER_SECONDS = 5.0
_PAUSE_SECONDS = 0.02
_IDLE_PAUSE_SECONDS = 0.1
_ANSWER_SECONDS = 2.0
_PROGRAM_SECONDS = 20


class ProxyMissing(ProxyFailed):
    """There is no HAProxy on this host"""


class ProxyRefused(ProxyFailed):
    """HAProxy refuses its configuration"""


@dataclass(frozen=True)
class Proxy:
    """The host's HAProxy, reached by its sockets in the state folder. Blocking."""

    settings: ReceiverSettings

    @property
    def folder(self) -> Path:
        """Routes, configuration and sockets."""
        return self.settings.proxy_dir

    @property
    def _routes_file(self) -> Path:
        return self.folder / "routes.json"

    @property
    def _config_file(self) -> Path:
        return self.folder / "haproxy.cfg"

    @property
    def _refused_file(self) -> Path:
        return self.folder / "refused.json"

    @property
    def _runtime(self) -> Path:
        return self.folder / "run.sock"

    @property
    def _master(self) -> Path:
        return self.folder / "master.sock"

    def program(self) -> str:
        """The program's path; raises `ProxyMissing`."""
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
        found = shutil.which(self.settings.haproxy, path=path)
        if found is None:
            raise ProxyMissing(
                f"strategy rolling needs HAProxy, and {self.settings.haproxy!r} is not on this host: "
                "apt-get install haproxy (or set HOOK_RECEIVER_HAPROXY), or set strategy_fallback: recreate"
            )
        return found

    @property
    def is_there(self) -> bool:
        """True when the program is installed."""
        try:
            return bool(self.program())
        except ProxyMissing:
            return False

    def version(self) -> str | None:
        """The program's version as it says it; None where it is not installed."""
        if not self.is_there:
            return None
        said = subprocess.run(
            [self.program(), "-v"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_MASTER_SECONDS,
            check=False,
        )
        found = re.search(r"version (\S+)", said.stdout)
        return found[1] if found else "unknown"

    def answers(self) -> bool:
        """True when it runs and answers; it is silent for a moment while it starts."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not (self._is_alive() and proxy_socket.description(self._runtime)):
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_SECONDS)
        return True

    # -- routes ----------------------------------------------------------------------------------

    def routes(self) -> Routes:
        """What is written down."""
        try:
            return Routes.model_validate_json(self._routes_file.read_bytes())
        except FileNotFoundError:
            return Routes()
        except ValidationError as exc:
            raise ProxyFailed(f"{self._routes_file} is damaged; restore or remove it") from exc

    def route(self, service: str) -> Route | None:
        """The route of a service, or None."""
        return self.routes().of(service)

    def left_out(self) -> list[str]:
        """Services without which HAProxy runs, since it refuses their routes."""
        refused = self._refused().left_out
        return [route.service for route in self.routes().routes if route.service in refused]

    @contextmanager
    def alone(self, *, wait: bool = True) -> Iterator[bool]:
        """One process changes routes at a time; False where another one does and this one does not wait."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield _lock(descriptor, wait=wait)
        finally:
            os.close(descriptor)

    def check(self, route: Route) -> None:
        """Raise `ProxyFailed` unless HAProxy would take this route; changes nothing."""
        self.program()
        routes = self.routes()
        _refuse_rival(routes, route)
        self._try(routes.having(route).without(*self._refused().but(route.service)))

    def _try(self, routes: Routes) -> None:
        """Raise `ProxyRefused` unless HAProxy would take these routes."""
        trial = self.folder / f"trial-{os.getpid()}-{time.monotonic_ns()}.cfg"
        try:
            _write(trial, self._text(routes, marks_of(routes)))
            self._run("-c", "-f", str(trial))
        finally:
            trial.unlink(missing_ok=True)

    def set_route(self, route: Route) -> None:
        """Write a route down and have HAProxy follow it; the same again changes nothing."""
        with self.alone():
            routes = self.routes()
            _refuse_rival(routes, route)  # another deployment may have come first since the check
            self._let_in(route)
            self._follow(routes.having(route))
            self._tell(route)  # also when it was written down before: that process may have died then

    def _let_in(self, route: Route) -> None:
        """It may have another certificate; the daemon leaves it out again where HAProxy refuses it."""
        refused = self._refused()
        if route.service in refused.left_out:
            self._note_refused(Refused(left_out=refused.but(route.service)))

    def remove_route(self, service: str) -> None:
        """Give a service's public ports back; a service without a route is fine."""
        with self.alone():
            routes = self.routes()
            route = routes.of(service)
            if route is None:
                return
            if self._is_alive():
                self._follow(routes.without(service))
                _wait_until_free(route.binds)
            else:
                self._write_down(routes.without(service))

    def _follow(self, wanted: Routes) -> None:
        before = self.routes()
        told = self._write_down(wanted)
        try:
            self._have_read(told.partition(".")[0])  # a renewed certificate is the daemon's to see to
        except ProxyFailed:
            try:
                self._check_configuration()  # if that is why, it says so
            finally:
                self._write_down(before)  # what HAProxy still does
            raise

    def _check_configuration(self) -> None:
        self._run("-c", "-f", str(self._config_file))

    def _write_down(self, routes: Routes) -> str:
        """The configuration last: what HAProxy reads is never ahead of the routes. Returns its digest."""
        _write(self._routes_file, routes.model_dump_json(indent=1))
        return self._configure(routes)

    def _configure(self, routes: Routes) -> str:
        """Write what HAProxy is to read, where that is not yet there; returns its digest."""
        marks = marks_of(routes)
        taken = routes.without(*self._refused().left_out)
        text = self._text(taken, marks)
        if not self._config_file.exists() or self._config_file.read_text() != text:
            _write(self._config_file, text)
        return digest(taken, marks)

    def _refused(self) -> Refused:
        try:
            return Refused.model_validate_json(self._refused_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return Refused()

    def _note_refused(self, refused: Refused) -> None:
        _write(self._refused_file, refused.model_dump_json(indent=1))

    def _text(self, routes: Routes, marks: Mapping[str, str]) -> str:
        return configuration(routes, marks, str(self._runtime), ipv6=_has_ipv6())

    def _have_read(self, wanted: str) -> None:
        """Return when HAProxy runs what has this digest, or its beginning; that takes a reload at most."""
        deadline, reload = time.monotonic() + PATIENCE_SECONDS, _Reload(self._master)
        while not ((read := proxy_socket.description(self._runtime)) or "").startswith(wanted):
            if read is not None:  # else it is being started, by the daemon
                reload.see_to(proxy_socket.master(self._ask_master("show proc")))
            if time.monotonic() > deadline:
                raise ProxyFailed(
                    "HAProxy does not answer; the receiver starts it: see that receiver and HAProxy run"
                )
            time.sleep(_PAUSE_SECONDS)

    def _ask_master(self, command: str) -> str:
        """It is silent for a moment while it reads its configuration again."""
        deadline = time.monotonic() + _MASTER_SECONDS
        while True:
            try:
                return proxy_socket.ask(self._master, command)
            except ProxySilent:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _tell(self, route: Route) -> None:
        """First what takes requests, then what no longer does: no moment without a server."""
        rest: list[Slot] = [slot for slot in SLOTS if slot != route.active]
        for bind in route.binds:
            for slot in (route.active, *rest):
                self._tell_server(route, slot, bind)

    def _tell_server(self, route: Route, slot: Slot, bind: Bind) -> None:
        server, port = f"{route.backend(bind)}/{slot}", port_of(route, slot, bind)
        is_active = slot == route.active and route.target(slot) is not None
        state = "ready" if is_active else "drain" if route.target(slot) else "maint"
        found = proxy_socket.server_states(self._runtime, route.backend(bind)).get(slot)
        if found is None or found.port != port:
            proxy_socket.ask(self._runtime, f"set server {server} addr 127.0.0.1 port {port}")
        proxy_socket.ask(self._runtime, f"set server {server} state {state}")
        found = proxy_socket.server_states(self._runtime, route.backend(bind)).get(slot)
        if found is None or (found.port, found.takes_requests) != (port, is_active):
            raise ProxyFailed(f"HAProxy did not take {server} to port {port}, {state}: it has {found}")

    # -- draining --------------------------------------------------------------------------------

    def busy(self, route: Route, slot: Slot) -> int:
        """Requests and streams in flight to a slot, those of workers that are leaving as well."""
        return sum(sum(counts.values()) for _, counts in self._in_flight(route, slot))

    def _in_flight(self, route: Route, slot: Slot) -> Iterator[tuple[Callable[[str], str], dict[str, int]]]:
        """How to ask each process of HAProxy, and its requests to a slot by backend.

        By the service, since a process that is leaving may know it by ports that it has no more.
        """
        leaving = proxy_socket.master(self._ask_master("show proc")).leaving
        ways = [
            partial(proxy_socket.ask, self._runtime),
            *(partial(self._ask_leaving, pid) for pid in leaving),
        ]
        for ask in ways:
            found = proxy_socket.sessions(ask("show stat -1 4 -1"))
            yield (
                ask,
                {
                    backend: count
                    for (backend, server), count in found.items()
                    if server == slot and backend.rpartition(":")[0] == route.service
                },
            )

    def _ask_leaving(self, pid: int, command: str) -> str:
        return self._ask_master(f"@!{pid} {command}")

    def drain(self, route: Route, slot: Slot, limit_seconds: float) -> int:
        """Wait until a slot is idle, at the limit close what is left; returns how many were closed.

        Raises `ProxyFailed` when the slot is busy even then.
        """
        if self._idle_within(route, slot, limit_seconds):
            return 0
        left = self.busy(route, slot)
        self._close(route, slot)
        if not self._idle_within(route, slot, CLOSING_SECONDS):
            raise ProxyFailed(f"{self.busy(route, slot)} requests to the old version do not end")
        return left

    def _idle_within(self, route: Route, slot: Slot, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.busy(route, slot):
            if time.monotonic() > deadline:
                return False
            time.sleep(_IDLE_PAUSE_SECONDS)
        return True

    def _close(self, route: Route, slot: Slot) -> None:
        for ask, backends in self._in_flight(route, slot):
            for backend in backends:
                ask(f"shutdown sessions server {backend}/{slot}")

    # -- the process -----------------------------------------------------------------------------

    @property
    def _pid_file(self) -> Path:
        return self.folder / "haproxy.pid"

    def _is_alive(self) -> bool:
        """By its processes: sockets, pid file and command line of the master are gone while it reads anew."""
        with contextlib.suppress(OSError, ValueError):
            if self._is_ours(int(self._pid_file.read_text())):
                return True
        return any(self._is_ours(int(found.name)) for found in Path("/proc").glob("[0-9]*"))

    def _is_ours(self, pid: int) -> bool:
        """True for a master or a worker; one that checks a configuration is neither."""
        try:
            words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return b"-W" in words and str(self._config_file).encode() in words

    def _run(self, *arguments: str) -> None:
        """Run the program to its end, or until it has put itself into the background."""
        said = self.folder / f"said-{os.getpid()}-{time.monotonic_ns()}"
        try:
            with said.open("w+") as file:
                done = subprocess.run(
                    [self.program(), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    cwd="/",
                    env={"PATH": os.defpath},  # it outlives this process, and needs none of its secrets
                    timeout=_PROGRAM_SECONDS,
                    start_new_session=True,
                    check=False,
                )
                if done.returncode == 1:
                    raise ProxyRefused(f"HAProxy refuses its configuration: {_alerts(said.read_text())}")
                if done.returncode:
                    raise ProxyFailed(f"HAProxy ended with {done.returncode}: {said.read_text()[-300:]}")
        finally:
            said.unlink(missing_ok=True)


def marks_of(routes: Routes) -> dict[str, str]:
    """For each certificate file what changes with its content, or with the right to read it."""
    return {file: _mark(Path(file)) for file in routes.certificate_files}


def _mark(file: Path) -> str:
    try:
        found = file.stat()
    except OSError:
        return "missing"
    return f"{found.st_mtime_ns} {found.st_size}" if os.access(file, os.R_OK) else "missing"


@dataclass
class _Reload:
    """One reload, asked for until the master counts it: its answer may be lost, since it starts anew."""

    path: Path
    before: Master | None = None
    asked_at: float = 0.0

    def see_to(self, now: Master) -> None:
        """Ask, or see what became of it; raises `ProxyFailed` when HAProxy could not do it."""
        self.before = self.before or now
        if now.failed > self.before.failed:
            raise ProxyFailed(
                "HAProxy cannot take the public ports: something else holds one (ss -lntp), "
                "or a port below 1024 needs CAP_NET_BIND_SERVICE"
            )
        if now.reloads == self.before.reloads and time.monotonic() - self.asked_at > _MASTER_SECONDS:
            self.asked_at = time.monotonic()
            with contextlib.suppress(ProxySilent):
                proxy_socket.ask(self.path, "reload")


def _alerts(said: str) -> str:
    found = re.findall(r"\[ALERT\]\s+\(\d+\) : (.*)", said)
    return "; ".join(line.removeprefix("config : ") for line in found[:2]) or said[-300:]


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_until_free(binds: Iterable[Bind]) -> None:
    """The worker that leaves lets go of its ports a moment after the new one is there."""
    deadline = time.monotonic() + CLOSING_SECONDS
    while any(map(_is_held, binds)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)


def _is_held(bind: Bind) -> bool:
    return bind_error(bind.host_port, host_ip=bind.host_ip) is not None


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also when the machine goes down."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    with fresh.open("w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _has_ipv6() -> bool:
    try:
        return bool(Path("/proc/net/if_inet6").read_text().strip())
    except OSError:
        return False


def _refuse_rival(routes: Routes, route: Route) -> None:
    if rival := routes.rival(route):
        raise ProxyFailed(
            f"service {rival.service} has host port {rival.binds[0].host_port} in the proxy; choose "
            "another host_port, or give both services a hostname and either both or neither HTTPS"
        )
