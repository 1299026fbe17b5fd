"""Which container each public port of a rolling service leads to, and HAProxy's configuration of it. Pure.

A service has two slots, `a` and `b`: the active one takes requests, the other one is where the next
version goes, or where the last one finishes. Both are told to HAProxy as servers of one backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from receiver.contract import DeploymentConfig, Port

Slot = Literal["a", "b"]
SLOTS: tuple[Slot, Slot] = ("a", "b")
NOWHERE = 1
_MAX_REQUEST_SECONDS = 3600

_HEAD = """\
# Written by the receiver at each change of a route; changes by hand are lost.
global
    description {digest}
    stats socket {socket} mode 600 level admin expose-fd listeners
    hard-stop-after {longest}s
    ssl-default-bind-options ssl-min-ver TLSv1.2

defaults
    mode http
    option forwardfor
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response
    timeout connect 5s
    timeout http-request 30s
    timeout http-keep-alive 60s
    timeout client {longest}s
    timeout server {longest}s
    timeout tunnel 24h
"""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bind(_Model):
    """A public port of a service."""

    host_port: Port
    container_port: Port
    host_ip: str | None = None

    def collides(self, other: Bind) -> bool:
        """True when both cannot be bound apart."""
        return self.host_port == other.host_port and (
            None in (self.host_ip, other.host_ip) or self.host_ip == other.host_ip
        )


class Target(_Model):
    """A container, and the loopback port that each of its ports is published on."""

    container_id: str
    ports: dict[int, int]


class Route(_Model):
    """Where a service's requests go."""

    service: str
    binds: tuple[Bind, ...]
    hostname: str | None = None
    certificate_file: str | None = None
    active: Slot = "a"
    a: Target | None = None
    b: Target | None = None

    def target(self, slot: Slot) -> Target | None:
        """What is in a slot."""
        return self.a if slot == "a" else self.b

    @property
    def serving(self) -> Target | None:
        """What takes the requests."""
        return self.target(self.active)

    def slot_of(self, container_id: str) -> Slot | None:
        """The slot of a container."""
        held = (slot for slot in SLOTS if (found := self.target(slot)) and found.container_id == container_id)
        return next(held, None)

    def backend(self, bind: Bind) -> str:
        """Name of the backend of one public port."""
        return f"{self.service}:{bind.host_port}"

    def with_slots_of(self, other: Route) -> Route:
        """The same route with what another state of it has in the slots."""
        return self.model_copy(update={"active": other.active, "a": other.a, "b": other.b})

    def leading_to(self, target: Target) -> Route:
        """The same service with another container active: in its own slot if it has one."""
        slot = self.slot_of(target.container_id) or _other(self.active)
        return self.model_copy(update={"active": slot, slot: target})


class Routes(_Model):
    """All routes of a host."""

    routes: tuple[Route, ...] = ()

    def of(self, service: str) -> Route | None:
        """The route of a service."""
        return next((route for route in self.routes if route.service == service), None)

    def having(self, route: Route) -> Routes:
        """With this route in the place of the service's."""
        others = [other for other in self.routes if other.service != route.service]
        return Routes(routes=tuple(sorted((*others, route), key=lambda each: each.service)))

    def without(self, *services: str) -> Routes:
        """With no route of these services."""
        return Routes(routes=tuple(route for route in self.routes if route.service not in services))

    @property
    def certificate_files(self) -> list[str]:
        """All that HAProxy reads for them."""
        return sorted({route.certificate_file for route in self.routes if route.certificate_file})

    def rival(self, route: Route) -> Route | None:
        """Another service that wants the same requests."""
        others = (other for other in self.routes if other.service != route.service)
        return next((other for other in others if _rivals(route, other)), None)


class Refused(_Model):
    """What HAProxy did not take, by digest: a whole configuration, and routes without which it runs."""

    whole: str = ""
    left_out: dict[str, str] = {}

    def leaving_out(self, left_out: Mapping[str, str]) -> Refused:
        """With other routes left out, by service."""
        return self.model_copy(update={"left_out": dict(left_out)})

    def but(self, service: str) -> dict[str, str]:
        """The routes left out, without that of a service."""
        return {name: told for name, told in self.left_out.items() if name != service}


def _rivals(one: Route, two: Route) -> bool:
    pairs = [(mine, theirs) for mine in one.binds for theirs in two.binds if mine.collides(theirs)]
    apart = one.hostname != two.hostname and all(mine.host_ip == theirs.host_ip for mine, theirs in pairs)
    same_scheme = (one.certificate_file is None) == (two.certificate_file is None)
    return bool(pairs) and not (apart and same_scheme)


def _other(slot: Slot) -> Slot:
    return "b" if slot == "a" else "a"


def route_for(service: str, config: DeploymentConfig, target: Target) -> Route:
    """The first route of a service."""
    return Route(
        service=service,
        binds=tuple(
            Bind(host_port=m.host_port, container_port=m.container_port, host_ip=m.host_ip)
            for m in config.port_mappings
        ),
        hostname=config.hostname,
        certificate_file=config.https_certificate_file,
        a=target,
    )


# -- configuration -------------------------------------------------------------------------------


def digest(routes: Routes, marks: Mapping[str, str]) -> str:
    """What changes only when HAProxy has to read its configuration again: not with a target.

    `marks` change with the content of a certificate file. What comes before the dot leaves them out.
    """
    fixed = [route.model_dump_json(exclude={"active", "a", "b"}) for route in routes.routes]
    seen = [f"{file} {marks.get(file)}" for file in routes.certificate_files]
    return f"{_hash(fixed)}.{_hash(seen)}"


def digest_of(route: Route, marks: Mapping[str, str]) -> str:
    """The digest of one route alone."""
    return digest(Routes(routes=(route,)), marks)


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def configuration(routes: Routes, marks: Mapping[str, str], socket: str, *, ipv6: bool) -> str:
    """HAProxy's configuration; the same routes and certificates give the same text."""
    head = _HEAD.format(digest=digest(routes, marks), socket=socket, longest=_MAX_REQUEST_SECONDS)
    return "\n".join([head, *_frontends(routes.routes, ipv6=ipv6), *_backends(routes.routes)]) + "\n"


def _frontends(routes: Iterable[Route], *, ipv6: bool) -> Iterator[str]:
    shared: dict[tuple[str | None, int], list[tuple[Route, Bind]]] = {}
    for route in routes:
        for bind in route.binds:
            shared.setdefault((bind.host_ip, bind.host_port), []).append((route, bind))
    for (address, port), users in sorted(shared.items(), key=str):
        certificates = sorted({route.certificate_file for route, _ in users if route.certificate_file})
        tls = (
            " ssl alpn h2,http/1.1" + "".join(f" crt {file}" for file in certificates) if certificates else ""
        )
        yield f"frontend {(address or 'any').replace(':', '_')}:{port}"
        yield from (f"    bind {where}{tls}" for where in _addresses(address, port, ipv6=ipv6))
        yield "    http-request disable-l7-retry if !METH_GET"
        if tls:
            yield "    http-request set-header X-Forwarded-Proto https"
        yield from _choices(users)
        yield ""


def _addresses(address: str | None, port: int, *, ipv6: bool) -> list[str]:
    if address is None:
        return [f"0.0.0.0:{port}", *([f"[::]:{port} v6only"] if ipv6 else [])]
    return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}"]


def _choices(users: Iterable[tuple[Route, Bind]]) -> Iterator[str]:
    for route, bind in users:
        if route.hostname:
            is_asked = f"{{ req.hdr(host),field(1,:) -i {route.hostname} }}"
            yield f"    use_backend {route.backend(bind)} if {is_asked}"
        else:
            yield f"    default_backend {route.backend(bind)}"


def _backends(routes: Iterable[Route]) -> Iterator[str]:
    for route in routes:
        for bind in route.binds:
            yield f"backend {route.backend(bind)}"
            for slot in SLOTS:
                ready = "" if slot == route.active and route.target(slot) else " disabled"
                yield f"    server {slot} 127.0.0.1:{port_of(route, slot, bind)}{ready}"
            yield ""


def port_of(route: Route, slot: Slot, bind: Bind) -> int:
    """The loopback port behind a slot; `NOWHERE` while the slot is empty."""
    target = route.target(slot)
    return target.ports.get(bind.container_port, NOWHERE) if target else NOWHERE
