"""HAProxy kept by the daemon: started, and brought to what is written down where nobody else does.

One broken certificate takes down no other service: HAProxy that runs goes on as it is, and one that is to
be started is started without the routes that it refuses. They are taken up when their file has changed.
"""

from __future__ import annotations

import contextlib
import logging

from receiver import proxy_socket
from receiver.proxy import Proxy, ProxyFailed, ProxyRefused, marks_of
from receiver.routes import Refused, Routes, digest_of

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
            wanted, running = self._configure(routes), proxy_socket.description(self._runtime)
            if running == wanted:
                self._forget_mended(routes)
            elif running is not None and wanted != self._refused().whole:
                self._reload(routes, wanted)

    def _forget_mended(self, routes: Routes) -> None:
        """What HAProxy runs again is left out no more, whatever becomes of its file."""
        marks, known = marks_of(routes), self._refused().left_out
        told = {route.service: digest_of(route, marks) for route in routes.routes}
        still = {service: digest for service, digest in known.items() if told.get(service) == digest}
        if still != known:
            self._note_refused(Refused(left_out=still))

    def _reload(self, routes: Routes, wanted: str) -> None:
        """What HAProxy refuses is remembered, so that it is tried and told once."""
        try:
            self._check_configuration()
        except ProxyRefused as exc:
            log.error("HAProxy goes on with what it has read before: %s", exc)
            known = self._refused().left_out
            again = {name: told for name, told in self._refused_alone(routes).items() if name in known}
            self._note_refused(Refused(left_out={**known, **again}))
            self._note_refused(Refused(left_out={**known, **again}, whole=self._configure(routes)))
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
        self._configure(routes)
        try:
            self._check_configuration()
        except ProxyRefused:
            left_out = {**self._refused().left_out, **self._refused_alone(routes)}
            self._note_refused(Refused(left_out=left_out))
            self._configure(routes)

    def _check_configuration(self) -> None:
        self._run("-c", "-f", str(self._config_file))

    def _refused_alone(self, routes: Routes) -> dict[str, str]:
        """The digests of the routes that HAProxy refuses even alone, by service, beside those left out."""
        marks, refused = marks_of(routes), {}
        for route in routes.without_refused(self._refused().left_out, marks).routes:
            try:
                self._try(Routes(routes=(route,)))
            except ProxyRefused as exc:
                refused[route.service] = digest_of(route, marks)
                told = (route.service, route.certificate_file, exc)
                log.error("HAProxy does not take service %s, certificate %s: %s", *told)
        return refused
