"""HAProxy kept by the daemon: started, and brought to what is written down where nobody else does.

One broken certificate takes down no other service: HAProxy that runs goes on as it is, and one that is to
be started is started without the routes that it refuses. They are taken up when their file has changed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

from receiver import proxy_socket
from receiver.proxy import Proxy, ProxyFailed, ProxyRefused, marks_of
from receiver.routes import Refused, Route, Routes, digest, digest_of

log = logging.getLogger(__name__)


class ProxyKeeper(Proxy):
    """The host's HAProxy as its daemon has it; there is one: two would give two HAProxys the same ports."""

    def keep_running(self) -> bool:
        """Start HAProxy when there are routes and it does not run; True when it was started.

        One that runs reads its configuration again where a process died between writing a route down and
        telling HAProxy of it, and when a certificate was renewed.
        """
        if not self._routes_file.exists():
            return False
        if self._is_alive():
            self._catch_up()
            return False
        return self._start()

    def _catch_up(self) -> None:
        with self.alone():
            routes = self.routes()
            self._try_left_out(routes)
            wanted, running = self._configure(routes), proxy_socket.description(self._runtime)
            if running not in {wanted, None} and wanted != self._refused().whole:
                self._reload(routes, wanted)

    def _try_left_out(self, routes: Routes) -> None:
        """A route with another certificate than it was refused with is let in, unless it is refused again."""
        refused, marks = self._refused(), marks_of(routes)
        ours = {route.service: route for route in routes.routes if route.service in refused.left_out}
        told = {service: digest_of(route, marks) for service, route in ours.items()}
        same = dict(told.items() & refused.left_out.items())
        if same != refused.left_out:
            changed = [route for service, route in ours.items() if service not in same]
            self._note_refused(refused.leaving_out({**same, **self._refused_alone(changed)}))

    def _reload(self, routes: Routes, wanted: str) -> None:
        """What HAProxy refuses is remembered, so that it is tried once; it runs on with what it has."""
        try:
            self._check_configuration()
        except ProxyRefused as exc:
            log.error("HAProxy goes on with what it has read before: %s", exc)
            left_out = self._refused().left_out
            refused = self._refused_alone(routes.without(*left_out).routes)
            runs = {name.rpartition(":")[0] for name in proxy_socket.backends(self._runtime)}
            fresh = {service: told for service, told in refused.items() if service not in runs}
            self._note_refused(Refused(whole=wanted, left_out={**left_out, **fresh}))
        else:
            self._have_read(wanted)

    def _start(self) -> bool:
        """Whoever changes a route meanwhile waits for the start and has the lock: then with what is there."""
        with self.alone(wait=False) as is_alone:
            if is_alone:
                with contextlib.suppress(ProxyFailed):  # of damaged routes: HAProxy has its configuration
                    self._leave_out_refused()
            if not self._config_file.exists():
                return False
            master, pid = f"{self._master},mode,600", str(self._pid_file)
            self._run("-W", "-D", "-S", master, "-f", str(self._config_file), "-p", pid)
            return True

    def _leave_out_refused(self) -> None:
        """Configure HAProxy without the routes that it does not take."""
        routes = self.routes()
        self._try_left_out(routes)
        self._configure(routes)
        try:
            self._check_configuration()
        except ProxyRefused:
            refused = self._refused()
            alone = self._refused_alone(routes.without(*refused.left_out).routes)
            self._note_refused(refused.leaving_out({**refused.left_out, **alone}))
            self._configure(routes)

    def _refused_alone(self, routes: Iterable[Route]) -> dict[str, str]:
        """The digests, by service, of the routes that HAProxy refuses without any other."""
        refused = {}
        for route in routes:
            only = Routes(routes=(route,))
            told = digest(only, marks_of(only))
            try:
                self._try(only)
            except ProxyRefused as exc:
                refused[route.service] = told
                known = (route.service, route.certificate_file, exc)
                log.error("HAProxy does not take service %s, certificate %s: %s", *known)
        return refused
