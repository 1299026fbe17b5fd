"""rsync from the sender's side: what is checked, the command, what its output means, and its end."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from blocks.remote_host import RemoteHost
from tasks import rsync
from tasks.errors import ParametersRefused, TransferFailed

FINGERPRINT = f"SHA256:{'k' * 43}"
PLACE = "/var/lib/gantry/incoming/7a/package.tar"


def host(**changes: Any) -> RemoteHost:
    """A host that can be reached by SSH."""
    return RemoteHost(**{"address": "10.0.0.7", "ssh_user": "gantry", **changes})


def goal(**changes: Any) -> rsync.Goal:
    """The place that this host named."""
    return rsync.Goal(host(**changes), "7a", PLACE)


def options(command: list[str]) -> dict[str, str]:
    """ssh's `-o` options."""
    return dict(value.split("=", 1) for flag, value in pairwise(command) if flag == "-o")


# -- the command -----------------------------------------------------------------------------------


def test_ssh_asks_nothing_and_believes_only_known_keys() -> None:
    """No prompt can hang a deployment, and no stranger can take the host's place."""
    command = rsync.ssh_command(host(ssh_port=2222))
    told = options(command)
    assert (told["StrictHostKeyChecking"], told["BatchMode"], told["ForwardAgent"]) == ("yes", "yes", "no")
    assert command[command.index("-p") + 1] == "2222"
    assert not {"IdentitiesOnly", "UserKnownHostsFile"} & told.keys()
    assert "-i" not in command


def test_the_block_s_key_and_host_keys_are_the_only_ones() -> None:
    """What is named is used alone, not beside what the worker's user happens to have."""
    command = rsync.ssh_command(host(ssh_key_file=Path("/k/id"), ssh_known_hosts_file=Path("/k/hosts")))
    told = options(command)
    assert command[command.index("-i") + 1] == "/k/id"
    assert told["IdentitiesOnly"] == "yes"
    assert (told["UserKnownHostsFile"], told["GlobalKnownHostsFile"]) == ("/k/hosts", "/dev/null")


def test_a_fingerprint_on_the_block_is_the_only_key_that_is_believed() -> None:
    """ssh asks a command whether it knows the key that the host showed; no file counts beside it."""
    told = options(rsync.ssh_command(host(ssh_host_key=FINGERPRINT, ssh_known_hosts_file=Path("/k/hosts"))))
    assert (told["UserKnownHostsFile"], told["GlobalKnownHostsFile"]) == ("/dev/null", "/dev/null")
    *command, f, name, kind, key = shlex.split(told["KnownHostsCommand"])
    assert [f, name, kind, key] == ["%f", "%H", "%t", "%K"]
    for shown, answer in ((FINGERPRINT, "10.0.0.7 ssh-ed25519 AAAA\n"), ("SHA256:other", "")):
        asked = [*command, shown, "10.0.0.7", "ssh-ed25519", "AAAA"]
        assert subprocess.run(asked, check=True, capture_output=True, text=True).stdout == answer


def test_rsync_resumes_in_place_and_compares_every_block() -> None:
    """The quick check by size and time would leave other bytes of the same size as they are."""
    command = rsync.rsync_command(goal(), Path("/p/a.tar"))
    assert {"--inplace", "--partial", "--ignore-times", "--no-whole-file"} <= set(command)
    assert command[-3:] == ["--", "/p/a.tar", f"gantry@10.0.0.7:{PLACE}"]
    assert shlex.split(command[command.index("--rsh") + 1]) == rsync.ssh_command(host())


def test_an_ipv6_address_stands_in_brackets() -> None:
    """Its colons would end the host's name."""
    assert rsync.rsync_command(goal(address="fd00::7"), Path("/p"))[-1] == f"gantry@[fd00::7]:{PLACE}"


# -- before the first side effect ------------------------------------------------------------------


def programs(folder: Path, *names: str) -> str:
    """A PATH on which only these programs are."""
    for name in names:
        (folder / name).touch(mode=0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("there", "missing", "package"), [(["ssh"], "rsync", "rsync"), (["rsync"], "ssh", "openssh-client")]
)
def test_a_program_that_is_missing_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], missing: str, package: str
) -> None:
    """The message says what to install, and that HTTP needs none of it."""
    monkeypatch.setenv("PATH", programs(tmp_path, *there))
    with pytest.raises(ParametersRefused, match=f"program {missing}.*apt-get install {package}.*'http'"):
        rsync.check(host())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ssh_user": None}, "ssh_user of remote-host/10-0-0-7 is None; set ssh_user"),
        ({"ssh_user": "-oProxyCommand=x"}, "ssh_user of remote-host/10-0-0-7 is '-oProxyCommand=x'"),
        ({"ssh_host_key": "$(reboot)"}, "ssh_host_key of remote-host/10-0-0-7 is '$(reboot)', which is no"),
        ({"ssh_key_file": Path("/nowhere/id")}, "ssh_key_file of remote-host/10-0-0-7 is '/nowhere/id'"),
        ({"ssh_known_hosts_file": Path("/nowhere/kh")}, "ssh_known_hosts_file of remote-host/10-0-0-7 is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_block_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    """Field, block and fix, before anything is built."""
    monkeypatch.setenv("PATH", programs(tmp_path, "rsync", "ssh"))
    rsync.check(host())
    with pytest.raises(ParametersRefused) as refused:
        rsync.check(host(**changes))
    assert str(refused.value).startswith("transport: ")
    assert said in str(refused.value)


# -- what it says ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "held"),
    [
        (b"         32768   0%    0.00kB/s    0:00:00  ", 32768),
        (b"     209715200 100%  187.11MB/s    0:00:01 (xfr#1, to-chk=0/1)", 209715200),
        (b"Number of files: 1 (reg: 1)", None),
        (b"total size is 30000000  speedup is 1.00", None),
        (b"", None),
    ],
)
def test_progress_is_read_from_its_own_lines_alone(line: bytes, held: int | None) -> None:
    """As rsync 3.2 and 3.5 write them without thousands separators."""
    assert rsync.read_progress(line) == held


def test_the_bytes_that_travelled_are_read_from_the_statistics() -> None:
    """Literal data: what the host did not have."""
    assert rsync.read_sent(b"Literal data: 10001216 bytes") == 10001216
    assert rsync.read_sent(b"Matched data: 19998784 bytes") is None


@pytest.mark.parametrize(
    ("code", "said", "retryable", "step"),
    [
        (-9, b"", True, "the upload resumes"),
        (12, b"connection unexpectedly closed", True, "the upload resumes"),
        (30, b"timeout in data send/receive", True, "the upload resumes"),
        (11, b"No space left on device (28)", True, "free disk"),
        (23, b"Permission denied (13)", True, "ssh_user may write"),
        (127, b"bash: rsync: command not found", False, "Install rsync on the host"),
        (2, b"protocol version mismatch -- is your shell clean?", False, "3.1 or newer"),
        (255, b"ssh: connect to host h port 22: Connection refused", True, "the upload resumes"),
        (255, b"@@@ changed!\nHost key verification failed.", False, "ssh_known_hosts_file"),
        (255, b"gantry@h: Permission denied (publickey).", False, "authorized_keys"),
    ],
)
def test_an_exit_code_says_whether_it_is_tried_again_and_what_to_do(
    code: int, said: bytes, retryable: bool, step: str
) -> None:
    """A key that is wrong stays wrong; a link that broke is tried again."""
    failed = rsync.failure(code, said)
    assert failed.retryable is retryable
    assert step in failed.next_step
    assert " ".join(said.decode().split()) in str(failed)


# -- the process -----------------------------------------------------------------------------------


async def test_progress_is_told_while_it_runs_and_the_bytes_at_the_end() -> None:
    """A carriage return ends a line as well as a newline does."""
    script = r"printf '\r 10   1%% x\r 20 100%% x (xfr#1)\n\nLiteral data: 7 bytes\n'"
    told: list[int] = []
    assert await rsync.run(["sh", "-c", script], told.append) == 7
    assert told == [10, 20]


async def test_a_failed_process_is_told_with_its_last_words() -> None:
    """On one line, with the code."""
    with pytest.raises(TransferFailed, match="rsync ended with 12: first second"):
        await rsync.run(["sh", "-c", "printf 'first\nsecond' >&2; exit 12"], print)


async def test_no_secret_of_ours_goes_into_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh may pass variables on to the host."""
    monkeypatch.setenv("HMAC_SECRET_KEY", "k" * 32)
    monkeypatch.setenv("RSYNC_RSH", "something else")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    script = 'test -z "$HMAC_SECRET_KEY$RSYNC_RSH" && test "$SSH_AUTH_SOCK" = /run/agent'
    assert await rsync.run(["sh", "-c", script], print) == 0


async def test_a_cancelled_transfer_leaves_no_process(tmp_path: Path) -> None:
    """The process is gone when the cancellation has been answered, and its children are killed with it."""
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; printf '\\r 1   1%% x\\r'; wait"
    began = asyncio.Event()
    running = asyncio.create_task(rsync.run(["sh", "-c", script], lambda _: began.set()))
    await asyncio.wait_for(began.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    shell, sleep = (int(pid) for pid in pids.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(shell, 0)
    await asyncio.wait_for(asyncio.to_thread(_wait_for_end, sleep), 10)


def _wait_for_end(pid: int) -> None:
    """It was sent SIGKILL, and dies when the kernel gets to it."""
    while _runs(pid):
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """A killed child of a dead shell may stay a zombie for a moment."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in {"Z", "X"}


async def test_a_process_that_is_killed_from_outside_may_be_tried_again() -> None:
    """What arrived stays on the host."""
    with pytest.raises(TransferFailed, match="rsync ended by signal 9") as failed:
        await rsync.run(["sh", "-c", f"kill -{signal.SIGKILL.value} $$"], print)
    assert failed.value.retryable
