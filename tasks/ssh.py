"""Commands on a host over SSH: the socket, the host's key, the login, and one command at a time.

Owns everything said to paramiko, which is imported on first use. A host whose key is not known is refused,
never added. Secrets travel on a command's standard input alone.
"""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import GantryError

if TYPE_CHECKING:
    import paramiko

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 600.0
_BLOCK_BYTES = 256 * 1024
_MAX_KEYS = 5  # servers close the connection after six
_QUOTED_CHARACTERS = 1500
_CIPHERS = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com")
_DEFAULT_KNOWN_HOSTS = (Path("~/.ssh/known_hosts"), Path("/etc/ssh/ssh_known_hosts"))
_DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
Sent = Callable[[int], None]


class SshUnreachable(GantryError):
    """No SSH server answers"""

    next_step = "See that the host is up, that address and ssh_port are right, and that port is open."


class HostKeyRefused(GantryError):
    """The host's key is not the expected one"""


class LoginRefused(GantryError):
    """The host refused the login"""


class CommandFailed(GantryError):
    """A command on the host failed"""

    next_step = "Read what the command said, put it right on the host, and run this again."


@dataclass(frozen=True)
class SshTarget:
    """Who is to be reached, and how both sides are proven; `host_key` wins over known hosts."""

    address: str
    user: str
    port: int = 22
    key_file: Path | None = None
    host_key: str | None = None
    known_hosts_file: Path | None = None

    def __str__(self) -> str:
        return f"{self.user}@{self.address}:{self.port}"

    @property
    def known_name(self) -> str:
        """The host's name in a file of known hosts."""
        return self.address if self.port == 22 else f"[{self.address}]:{self.port}"


@dataclass(frozen=True)
class Command:
    """A script for `sh`, with arguments that no shell reads as anything else."""

    script: str
    arguments: tuple[str, ...] = ()

    def line(self, *, with_sudo: bool = False) -> str:
        """What the login shell is given."""
        words = ["sh", "-euc", self.script, "gantry", *self.arguments]
        return shlex.join(["sudo", "-n", "--", *words] if with_sudo else words)


class SshSession:
    """An open connection; commands run as root when `with_sudo` is set or the user is root."""

    def __init__(self, transport: paramiko.Transport, target: SshTarget) -> None:
        self._transport = transport
        self.target = target
        self.with_sudo = False

    async def run(
        self, command: Command, stdin: Iterable[bytes] = (), *, sent: Sent = lambda size_bytes: None
    ) -> str:
        """Run to the end; returns what it wrote. Raises `CommandFailed` with its words.

        `sent` hears of each block of `stdin`, from another thread.
        """
        try:
            code, out, err = await asyncio.to_thread(self._exchange, command, stdin, sent)
        except asyncio.CancelledError:
            self._transport.close()  # else its thread would wait for a command that nobody wants any more
            raise
        if code != 0:
            said = (err.strip() or out.strip())[-_QUOTED_CHARACTERS:] or "nothing"
            raise CommandFailed(f"{self.target}: a command ended with {code} and said: {said}")
        return out

    def _exchange(self, command: Command, stdin: Iterable[bytes], sent: Sent) -> tuple[int, str, str]:
        import paramiko

        try:
            with self._transport.open_session(timeout=CONNECT_SECONDS) as channel:
                channel.settimeout(IDLE_SECONDS)
                channel.exec_command(command.line(with_sudo=self.with_sudo))
                _send(channel, stdin, sent)
                out = channel.makefile("rb").read()
                err = channel.makefile_stderr("rb").read()
                code = channel.recv_exit_status()
        except (paramiko.SSHException, OSError, EOFError) as exc:
            raise SshUnreachable(f"{self.target}: the connection broke: {exc}", retryable=True) from exc
        if code < 0:  # no status came: the connection or the server went away
            raise SshUnreachable(f"{self.target}: the connection ended with the command", retryable=True)
        return code, out.decode(errors="replace"), err.decode(errors="replace")


def _send(channel: Any, stdin: Iterable[bytes], sent: Sent) -> None:
    with suppress(OSError):  # a command that has ended reads no more; its exit status says why
        for block in stdin:
            channel.sendall(block)
            sent(len(block))
    channel.shutdown_write()


def blocks_of(path: Path) -> Iterator[bytes]:
    """A file in blocks for `SshSession.run`."""
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


@asynccontextmanager
async def connect(target: SshTarget) -> AsyncIterator[SshSession]:
    """A session whose host and user are proven; raises one of this module's errors with what to do."""
    transport = await asyncio.to_thread(_open, target)
    try:
        yield SshSession(transport, target)
    finally:
        await asyncio.to_thread(transport.close)


def check_host_key(target: SshTarget, kind: str, shown: str, expected: Collection[str]) -> None:
    """Raise `HostKeyRefused` unless the fingerprint that the host shows is an expected one."""
    if shown in expected:
        return
    look = f"on the host's own console: ssh-keygen -lf /etc/ssh/ssh_host_{_kind_in_file(kind)}_key.pub"
    if not expected:
        raise HostKeyRefused(
            f"{target}: the host's key is not known; it shows {kind} {shown}",
            next_step=f"Compare it ({look}); if it is the same, give host_key={shown}, or add the host to "
            "the known hosts of the user that the worker runs as.",
        )
    raise HostKeyRefused(
        f"{target}: the host shows {kind} {shown}, and expected was {' or '.join(sorted(expected))}: "
        "another machine answers there, or its key was changed",
        next_step=f"Find out why ({look}); only then give the new host_key, or correct the known hosts.",
    )


def _kind_in_file(kind: str) -> str:
    return "ecdsa" if kind.startswith("ecdsa") else kind.removeprefix("ssh-").removeprefix("rsa-sha2-")


def _open(target: SshTarget) -> paramiko.Transport:
    import paramiko

    known = _known_keys(target)
    transport = paramiko.Transport(_dial(target))
    try:
        _prefer(transport, known)
        transport.start_client(timeout=CONNECT_SECONDS)
        key = transport.get_remote_server_key()
        expected = {target.host_key} if target.host_key else {found.fingerprint for found in known.values()}
        check_host_key(target, key.get_name(), key.fingerprint, expected)
        _log_in(transport, target)
    except (paramiko.SSHException, OSError, EOFError) as exc:
        transport.close()
        raise SshUnreachable(f"{target}: {exc or type(exc).__name__}", retryable=True) from exc
    except BaseException:
        transport.close()
        raise
    transport.set_keepalive(15)
    return transport


def _dial(target: SshTarget) -> socket.socket:
    try:
        dialled = socket.create_connection((target.address, target.port), timeout=CONNECT_SECONDS)
    except OSError as exc:
        raise SshUnreachable(f"{target}: {exc}", retryable=True) from exc
    dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits for 40 ms
    return dialled


def _prefer(transport: paramiko.Transport, known: dict[str, paramiko.PKey]) -> None:
    """Fast ciphers first; of the host's keys, those that are known."""
    options = transport.get_security_options()
    options.ciphers = (*_CIPHERS, *(name for name in options.ciphers if name not in _CIPHERS))
    kinds = [kind for kind in options.key_types if _plain_kind(kind) in known]
    options.key_types = (*kinds, *(kind for kind in options.key_types if kind not in kinds))


def _plain_kind(kind: str) -> str:
    """An RSA key goes by one name in files, and by that of its signature on the wire."""
    return "ssh-rsa" if kind.startswith("rsa-sha2-") else kind


def _known_keys(target: SshTarget) -> dict[str, paramiko.PKey]:
    """The host's keys by kind, from the file that was named, or those that OpenSSH reads."""
    import paramiko

    keys = paramiko.HostKeys()
    for path in [target.known_hosts_file] if target.known_hosts_file else _DEFAULT_KNOWN_HOSTS:
        with suppress(FileNotFoundError):
            keys.load(str(path.expanduser()))
    return dict(keys.lookup(target.known_name) or {})


def _log_in(transport: paramiko.Transport, target: SshTarget) -> None:
    import paramiko

    tried = []
    for key in list(_own_keys(target))[:_MAX_KEYS]:
        tried.append(key.fingerprint)
        try:
            transport.auth_publickey(target.user, key)
        except paramiko.AuthenticationException:
            continue
        if transport.is_authenticated():
            return
    raise LoginRefused(
        f"{target}: the host took none of {len(tried)} key(s) {' '.join(tried)}".rstrip(),
        next_step=f"Put a public key into {target.user}'s ~/.ssh/authorized_keys on the host (ssh-copy-id -p "
        f"{target.port} {target.user}@{target.address}) and give its private half as key_file, or start an "
        "agent that holds it where the worker runs.",
    )


def _own_keys(target: SshTarget) -> Iterator[paramiko.PKey]:
    """The key file that was named; else the agent's keys and OpenSSH's default files."""
    import paramiko

    if target.key_file is not None:
        yield _read_key(target.key_file)
        return
    yield from paramiko.Agent().get_keys()
    for path in (Path(name).expanduser() for name in _DEFAULT_KEYS):
        if path.is_file():
            with suppress(LoginRefused):  # encrypted, and not named: the others may do
                yield _read_key(path)


def _read_key(path: Path) -> paramiko.PKey:
    import paramiko

    try:
        return paramiko.PKey.from_path(str(path.expanduser()))
    except (paramiko.PasswordRequiredException, TypeError) as exc:
        raise LoginRefused(
            f"key_file {path} is encrypted",
            next_step="Add it to an agent where the worker runs (ssh-add) and leave key_file out.",
        ) from exc
    except (OSError, ValueError, paramiko.SSHException, paramiko.pkey.UnknownKeyType) as exc:
        raise LoginRefused(
            f"key_file {path} cannot be read: {exc}",
            next_step="Give the path of a private key that the worker's user may read.",
        ) from exc
