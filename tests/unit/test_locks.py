"""The container lock: one operating process, let go by the kernel when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from receiver.locks import LockHeld, container_lock, end_overdue, holder_of

_PROJECT = Path(__file__).resolve().parents[2]
_HOLDER = (
    "import sys\nfrom pathlib import Path\nfrom receiver.locks import container_lock\n"
    "with container_lock(Path(sys.argv[1]), 'web'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


@contextmanager
def holding_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `web` until it ends."""
    command = [sys.executable, "-c", _HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_PROJECT
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_another_process_that_operates_is_not_disturbed(tmp_path: Path) -> None:
    """The second one is refused at once, told which container it is; another container is free."""
    with holding_process(tmp_path):
        with pytest.raises(LockHeld, match="web"), container_lock(tmp_path, "web"):
            pytest.fail("two processes hold the lock")
        with container_lock(tmp_path, "db"):
            pass


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    """SIGKILL frees it, with nothing to clear up."""
    with holding_process(tmp_path) as process:
        process.kill()
        process.wait(10)
        with container_lock(tmp_path, "web"):
            pass


def test_the_lock_of_a_dead_process_is_not_kept_by_its_child(tmp_path: Path) -> None:
    """What an operation starts, and outlives it, must not hold the container for ever."""
    with container_lock(tmp_path, "web"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with container_lock(tmp_path, "web"):
            pass
    finally:
        child.kill()
        child.communicate()


def test_a_failed_operation_lets_go(tmp_path: Path) -> None:
    """Whatever it raised."""
    with pytest.raises(KeyError), container_lock(tmp_path, "web"):
        raise KeyError("web")
    with holding_process(tmp_path):
        pass


async def test_one_flow_of_control_may_enter_again(tmp_path: Path) -> None:
    """A subflow enters with the lock held; leaving the inner block does not let go of it."""
    with container_lock(tmp_path, "web"):
        async with asyncio.timeout(5):
            with container_lock(tmp_path, "web"):
                await asyncio.sleep(0)
        entered = await asyncio.to_thread(_enters, tmp_path)
        assert entered, "a thread of this flow of control is part of it"
        assert not await asyncio.create_task(_entered_afresh(tmp_path))


def _enters(folder: Path) -> bool:
    try:
        with container_lock(folder, "web"):
            return True
    except LockHeld:
        return False


async def _entered_afresh(folder: Path) -> bool:
    """As a process would that has nothing to do with the holder."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom receiver.locks import container_lock\n"
        "with container_lock(Path(sys.argv[1]), 'web'): pass\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(folder), cwd=_PROJECT, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait() == 0


async def test_two_tasks_of_one_process_are_two_operators(tmp_path: Path) -> None:
    """A request to the daemon does not enter while its guardian restores."""
    held, done = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        with container_lock(tmp_path, "web"):
            held.set()
            await done.wait()

    holder = asyncio.create_task(hold())
    await held.wait()
    assert not _enters(tmp_path)
    done.set()
    await holder
    assert _enters(tmp_path)


async def test_a_task_that_outlives_the_holder_does_not_hold(tmp_path: Path) -> None:
    """It was begun with the lock held and inherited that; afterwards it has to ask like everybody."""
    over = asyncio.Event()

    async def enter_later() -> bool:
        await over.wait()
        return _enters(tmp_path)

    with container_lock(tmp_path, "web"):
        late = asyncio.create_task(enter_later())
        await asyncio.sleep(0)
    with holding_process(tmp_path):
        over.set()
        assert not await late


def test_who_is_refused_is_told_who_holds_and_since_when(tmp_path: Path) -> None:
    """Deployment, process and time; afterwards nobody is named."""
    with container_lock(tmp_path, "web", "d-1"):
        told = refusal_of_another_process(tmp_path)
        assert f"web is being worked on by deployment d-1 (process {os.getpid()}) since 20" in told
        held = holder_of(tmp_path, "web")
        assert held is not None
        assert held.deployment_id == "d-1"
    assert holder_of(tmp_path, "web") is None


def refusal_of_another_process(folder: Path) -> str:
    """What a process is told that wants the lock of `web`."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom receiver.locks import LockHeld, container_lock\n"
        "try:\n    with container_lock(Path(sys.argv[1]), 'web'): pass\nexcept LockHeld as exc: print(exc)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True, cwd=_PROJECT
    )
    return told.stdout


_HANGING = (
    "import sys, time\nfrom pathlib import Path\n"
    "from receiver.locks import GRACE_SECONDS, container_lock\n"
    "with container_lock(Path(sys.argv[1]), 'web', 'd-1') as hold:\n"
    "    hold.within(float(sys.argv[2]) - GRACE_SECONDS)\n    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.mark.parametrize(("seconds", "is_ended"), [(0, True), (600, False)])
def test_a_holder_that_hangs_is_ended_at_its_deadline(tmp_path: Path, seconds: int, is_ended: bool) -> None:
    """Also one that is stopped and hears no other signal; one that has time left goes on."""
    command = [sys.executable, "-c", _HANGING, str(tmp_path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_PROJECT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGSTOP)
            ended = end_overdue(tmp_path, "web")
            assert (ended is not None) is is_ended
            if is_ended:
                assert process.wait(20) == -signal.SIGKILL
                with container_lock(tmp_path, "web"):
                    pass
            else:
                assert process.poll() is None
        finally:
            process.kill()


def test_another_process_with_the_id_of_a_dead_holder_is_left_alone(tmp_path: Path) -> None:
    """Process ids are used again: the time of its start tells them apart."""
    with container_lock(tmp_path, "web", "d-1") as hold:
        hold.within(-1000)
        dead = hold.holder.model_copy(update={"process_started": "1"})
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            note = dead.model_copy(update={"pid": bystander.pid})
            (tmp_path / "web.lock").write_text(note.model_dump_json())
            assert end_overdue(tmp_path, "web") is None
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_process_does_not_end_itself(tmp_path: Path) -> None:
    """The daemon restores by itself, under the same lock."""
    with container_lock(tmp_path, "web", "d-1") as hold:
        hold.within(-1000)
        assert end_overdue(tmp_path, "web") is None


@pytest.mark.parametrize("note", ["", "{", '{"pid": 1}', "garbage"])
def test_a_note_that_cannot_be_read_names_nobody(tmp_path: Path, note: str) -> None:
    """The lock is the kernel's; the note only says whose it is."""
    (tmp_path / "web.lock").write_text(note)
    assert holder_of(tmp_path, "web") is None
    with container_lock(tmp_path, "web"):
        pass
