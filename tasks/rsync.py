"""The package's way to the host by rsync over SSH: checks before, the command, its progress, its end.

Authority stays with the receiver: it names the place, takes the file over and verifies it. rsync writes in
place, so that whatever ends it, the next attempt goes on with the bytes that arrived.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from blocks.receiver_client import Progress, ReceiverClient
from blocks.remote_host import RemoteHost
from receiver.contract import HostState
from tasks.errors import ParametersRefused, TransferFailed

SILENCE_SECONDS = 60
CONNECT_SECONDS = 10
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_KEPT_VARIABLES = ("PATH", "HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK", "TMPDIR")
_READ_BYTES = 4096
_QUOTED_BYTES = 600
_PROGRESS = re.compile(rb"\s*([0-9]+)\s+[0-9]{1,3}%\s")
_SENT = re.compile(rb"Literal data: ([0-9]+) ")
_SSH = 255
_TOO_OLD = "The two rsyncs do not understand each other: install rsync 3.1 or newer on both hosts."
_WITHOUT_A_CHANCE = {
    **dict.fromkeys((1, 2, 4), _TOO_OLD),
    127: "Install rsync on the host (apt-get install rsync), or deploy with transport 'http'.",
}
_ABOUT_THE_FILE = dict.fromkeys(
    (3, 11, 23),
    "See on the host that ssh_user may write to that path (HOOK_RECEIVER_INCOMING_DIR), and its free disk.",
)
# ssh ends with 255 whatever happened; only its words tell what a person has to do.
_SAID_BY_SSH = {
    b"Host key verification failed": "Compare the host's key (ssh-keyscan, and ssh-keygen -l on the host "
    "itself), then correct ssh_host_key or ssh_known_hosts_file of the block, or the worker's known_hosts.",
    b"Permission denied": "Add the public key of ssh_key_file to authorized_keys of ssh_user on the host; "
    "the private one must be readable by its owner alone.",
}


@dataclass(frozen=True)
class Goal:
    """Where a package goes: the path that the host named for this deployment."""

    host: RemoteHost
    deployment_id: str
    incoming_path: str


def check(host: RemoteHost) -> None:
    """Raise `ParametersRefused` unless rsync can be tried: programs, user and files are there."""
    for program, package in (("rsync", "rsync"), ("ssh", "openssh-client")):
        if which(program) is None:
            raise ParametersRefused(
                "transport",
                f"'rsync' needs the program {program}, which is not on the control host",
                f"install it (apt-get install {package}), or use transport 'http'",
            )
    block = f"remote-host/{host.name}"
    if not host.ssh_user or not _USER.fullmatch(host.ssh_user):
        raise ParametersRefused(
            "transport",
            f"'rsync' needs the user to log in as, and ssh_user of {block} is {host.ssh_user!r}",
            f"set ssh_user on the block {block} (in the UI: Blocks), or use transport 'http'",
        )
    if host.ssh_host_key and not _FINGERPRINT.fullmatch(host.ssh_host_key):
        raise ParametersRefused(
            "transport",
            f"ssh_host_key of {block} is {host.ssh_host_key!r}, which is no fingerprint",
            "give what 'ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub' says on the host: SHA256:...",
        )
    for name in ("ssh_key_file", "ssh_known_hosts_file"):
        file: Path | None = getattr(host, name)
        if file is not None and not os.access(file, os.R_OK):
            raise ParametersRefused(
                "transport",
                f"{name} of {block} is {str(file)!r}, which the control host cannot read",
                f"put the file there, or correct {name} on the block {block}",
            )


def ssh_command(host: RemoteHost) -> list[str]:
    """The remote shell: never asks, believes only host keys that it knows, and notices a dead link."""
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": str(CONNECT_SECONDS),
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "3",
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "Ciphers": "^aes128-gcm@openssh.com",  # first choice: twice as fast as the default
    }
    if host.ssh_key_file:
        options["IdentitiesOnly"] = "yes"
    options |= _known_hosts(host)
    key = ["-i", str(host.ssh_key_file)] if host.ssh_key_file else []
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", "-T", "-x", "-p", str(host.ssh_port), *key, *flags]


def _known_hosts(host: RemoteHost) -> dict[str, str]:
    """The block's fingerprint, else its file, else what ssh knows; never two of them."""
    if host.ssh_host_key:
        told = f'test "$1" = {host.ssh_host_key} && echo "$2 $3 $4" || :'
        command = shlex.join(["/bin/sh", "-c", told, "sh"])
        nowhere = {"UserKnownHostsFile": "/dev/null", "GlobalKnownHostsFile": "/dev/null"}
        return {"KnownHostsCommand": f"{command} %f %H %t %K", **nowhere}
    if host.ssh_known_hosts_file:
        return {"UserKnownHostsFile": str(host.ssh_known_hosts_file), "GlobalKnownHostsFile": "/dev/null"}
    return {}


def rsync_command(goal: Goal, package: Path) -> list[str]:
    """One file to one path; every block is compared, since size and time may be those of other bytes."""
    host = goal.host
    return [
        *("rsync", "--inplace", "--partial", "--ignore-times", "--no-whole-file"),
        *("--perms", "--chmod=F660", "--protect-args", f"--timeout={SILENCE_SECONDS}"),
        *("--info=progress2,stats2", "--no-human-readable", "--outbuf=N"),
        *("--rsh", shlex.join(ssh_command(host))),
        *("--", str(package), f"{host.ssh_user}@{host.url_host}:{goal.incoming_path}"),
    ]


async def upload(receiver: ReceiverClient, goal: Goal, package: Path, progress: Progress) -> int:
    """Send the package and have the host take it over; returns the bytes that had to travel.

    Raises `FileNotFoundError` without a package, `TransferFailed`, and what the receiver raises. Safe to
    repeat: a package that the host has already is not sent again.
    """
    size_bytes = (await asyncio.to_thread(package.stat)).st_size
    if (await receiver.status(goal.deployment_id)).state is not HostState.RECEIVING:
        return 0
    sent_bytes = await run(rsync_command(goal, package), lambda held: progress(held, size_bytes))
    await receiver.collect(goal.deployment_id)
    return sent_bytes


async def run(command: Sequence[str], told: Callable[[int], None]) -> int:
    """Run rsync to its end and return the bytes sent; `told` hears how many bytes the host holds.

    Cancelled, it ends the process with all its children first. Raises `TransferFailed`.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=_environment(), start_new_session=True
    )
    try:
        sent_bytes, said = await asyncio.gather(_follow(process.stdout, told), _last_words(process.stderr))
        code = await process.wait()
    finally:
        await _end(process)
    if code:
        raise failure(code, said)
    return sent_bytes


def failure(code: int, said: bytes) -> TransferFailed:
    """What an exit code (negative: a signal) and rsync's last words mean for the operator."""
    words = said.decode(errors="replace").strip() or "it said nothing"
    cause = f"rsync ended by signal {-code}" if code < 0 else f"rsync ended with {code}"
    heard = next((step for text, step in _SAID_BY_SSH.items() if code == _SSH and text in said), "")
    next_step = _WITHOUT_A_CHANCE.get(code, heard)
    return TransferFailed(
        f"{cause}: {words}",
        next_step=next_step or _ABOUT_THE_FILE.get(code, ""),
        retryable=False if next_step else None,
    )


def read_progress(line: bytes) -> int | None:
    """Bytes that the host holds, as a line of `--info=progress2` tells them."""
    found = _PROGRESS.match(line)
    return int(found[1]) if found else None


def read_sent(line: bytes) -> int | None:
    """Bytes of the package that travelled, as a line of `--info=stats2` tells them."""
    found = _SENT.match(line)
    return int(found[1]) if found else None


async def _follow(stream: asyncio.StreamReader | None, told: Callable[[int], None]) -> int:
    """Tell the progress; return the bytes sent. A line of progress ends when the next one begins."""
    rest, sent_bytes = b"", 0
    while stream is not None and (block := await stream.read(_READ_BYTES)):
        *lines, rest = re.split(rb"[\r\n]", rest + block)
        for line in lines:
            if (held := read_progress(line)) is not None:
                told(held)
            sent_bytes = read_sent(line) or sent_bytes
    return sent_bytes


async def _last_words(stream: asyncio.StreamReader | None) -> bytes:
    said = b""
    while stream is not None and (block := await stream.read(_READ_BYTES)):
        said = (said + block)[-_QUOTED_BYTES:]
    return said


async def _end(process: Process) -> None:
    """Nothing of it stays; what was written in place is kept on the host."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _environment() -> dict[str, str]:
    """No key of ours, and no setting of rsync's, goes with it."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "LC_ALL": "C"}
