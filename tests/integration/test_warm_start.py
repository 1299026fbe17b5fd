"""Runs that are forked from a process that has imported everything: real processes, a small engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.e2e.deploying import wait_for

PROJECT = Path(__file__).parents[2]
# What a run does is told by files in its folder: it reports itself, then waits until it may end.
_ENGINE = """
import json, os, signal, sys, time
from pathlib import Path
if __name__ == "__main__":
    here, name = Path(os.environ["REPORTS"]), os.environ["PREFECT__FLOW_RUN_ID"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(43))
    import code_of_the_flow
    told = {"pid": os.getpid(), "parent": os.getppid(), "folder": os.getcwd(), "path": sys.path[0],
            "code": code_of_the_flow.VERSION, "extra": os.environ.get("EXTRA")}
    print("hello from", name, flush=True)
    (here / f"{name}.part").write_text(json.dumps(told))
    (here / f"{name}.part").rename(here / f"{name}.json")
    while not (here / f"{name}.end").exists():
        time.sleep(0.01)
    sys.exit(int((here / f"{name}.end").read_text()))
"""
_WORKER = """
import json, subprocess, sys
runs = {}
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(runs[asked["wait"]].wait(30), flush=True)
    else:
        out = open(asked["output"], "w")
        command = [sys.executable, "-m", "tasks.warm_start", "code_of_the_flow"]
        run = subprocess.Popen(command, env=asked["environment"], cwd=asked["folder"], stdout=out)
        runs[run.pid] = run
        print(run.pid, flush=True)
"""


class Worker:
    """A process that starts runs as Prefect's process worker does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        packages = folder / "packages"
        (packages / "prefect" / "_internal").mkdir(parents=True)
        for name in ("__init__", "flow_engine", "task_engine", "_internal/__init__", "_internal/metrics"):
            (packages / "prefect" / f"{name}.py").touch()
        (packages / "prefect" / "engine.py").write_text(_ENGINE)
        self.code = packages / "code_of_the_flow.py"
        self.code.write_text("VERSION = 1")
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{packages}:{PROJECT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "REPORTS": str(folder),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def start(self, **extra: str) -> Run:
        self._number += 1
        run_id, empty = f"run-{self._number}", self.folder / f"empty-{self._number}"
        empty.mkdir()
        environment = {**self.environment, **extra, "PREFECT__FLOW_RUN_ID": run_id}
        output = str(self.folder / f"{run_id}.out")
        pid = self._ask({"environment": environment, "folder": str(empty), "output": output})
        return Run(self, run_id, pid)

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def warm(self) -> int:
        """Start runs until one is forked; the pid of the process it was forked from."""

        def forked() -> int | None:
            run = self.start()
            told = run.told()
            run.end(0)
            return int(told["parent"]) if run.is_forked() else None

        return wait_for(forked, "a run that is forked", seconds=20)

    def _ask(self, message: object) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class Run:
    """One run: the process that the worker knows, and what its engine tells."""

    def __init__(self, worker: Worker, run_id: str, pid: int) -> None:
        self._worker, self.run_id, self.pid = worker, run_id, pid

    def told(self) -> dict[str, Any]:
        path = self._worker.folder / f"{self.run_id}.json"
        text = wait_for(lambda: path.read_text() if path.exists() else None, f"{self.run_id} at work")
        return dict(json.loads(text))

    def is_forked(self) -> bool:
        return bool(self.told()["pid"] != self.pid)

    def end(self, code: int) -> int:
        end = self._worker.folder / f"{self.run_id}.part"
        end.write_text(str(code))
        end.rename(self._worker.folder / f"{self.run_id}.end")
        return self._worker.wait(self.pid)

    def output(self) -> str:
        return (self._worker.folder / f"{self.run_id}.out").read_text()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(tmp_path) as worker:
        yield worker


def is_gone(pid: int) -> Callable[[], bool]:
    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    return gone


def test_a_forked_run_is_what_a_cold_one_is(worker: Worker) -> None:
    """Its folder, variables, output and exit code are its own."""
    cold = worker.start()
    assert not cold.is_forked()
    assert cold.end(3) == 3
    parent = worker.warm()
    one, two = worker.start(), worker.start()
    for run in (one, two):
        assert run.is_forked()
        assert run.told()["parent"] == parent
        assert run.told()["folder"] == run.told()["path"]
    assert one.told()["folder"] != two.told()["folder"]
    assert (two.end(0), one.end(7)) == (0, 7)
    assert one.output() == f"hello from {one.run_id}\n"


def test_a_signal_to_the_run_reaches_it(worker: Worker) -> None:
    """Prefect cancels by SIGTERM, and after a grace by SIGKILL."""
    worker.warm()
    stopped, killed, killed_itself = worker.start(), worker.start(), worker.start()
    pids = [run.told()["pid"] for run in (stopped, killed, killed_itself)]
    assert all(run.is_forked() for run in (stopped, killed, killed_itself))
    os.kill(stopped.pid, signal.SIGTERM)
    assert worker.wait(stopped.pid) == 43
    os.kill(killed.pid, signal.SIGKILL)
    assert worker.wait(killed.pid) == -signal.SIGKILL
    os.kill(pids[2], signal.SIGKILL)
    assert worker.wait(killed_itself.pid) == -signal.SIGKILL
    for pid in pids:
        wait_for(is_gone(pid), f"process {pid} to be gone")


def test_changed_code_is_run_and_not_what_was_imported(worker: Worker) -> None:
    """A person who edits a flow sees the edit in the next run."""
    worker.warm()
    worker.code.write_text("VERSION = 22")
    run = worker.start()
    assert not run.is_forked()
    assert run.told()["code"] == 22
    run.end(0)
    worker.warm()
    again = worker.start()
    assert again.is_forked()
    assert again.told()["code"] == 22
    again.end(0)


def test_a_run_with_variables_of_its_own_starts_cold(worker: Worker) -> None:
    """What was imported may have read them."""
    worker.warm()
    run = worker.start(EXTRA="mine")
    assert not run.is_forked()
    assert run.told()["extra"] == "mine"
    run.end(0)
    other = worker.start()
    assert other.is_forked()
    other.end(0)


def test_the_parent_goes_with_its_worker_but_not_before_the_last_run(worker: Worker) -> None:
    """A run outlives its worker, as every run does."""
    parent = worker.warm()
    run = worker.start()
    assert run.is_forked()
    worker.stop()
    assert not is_gone(parent)()
    os.kill(run.told()["pid"], signal.SIGTERM)
    wait_for(is_gone(parent), "the parent to end")


def test_a_run_ends_with_its_parent(worker: Worker) -> None:
    """No run goes on that nobody hears of."""
    parent = worker.warm()
    run = worker.start()
    assert run.is_forked()
    os.kill(parent, signal.SIGKILL)
    assert worker.wait(run.pid) == -signal.SIGKILL
    wait_for(is_gone(run.told()["pid"]), "the run to be gone")
    cold = worker.start()
    assert not cold.is_forked()
    assert cold.end(0) == 0


def test_the_switch_leaves_nothing_behind(tmp_path: Path) -> None:
    """`GANTRY_WARM_START=0` starts each run as Prefect does."""
    with Worker(tmp_path) as worker:
        runs = [worker.start(GANTRY_WARM_START="0") for _ in range(2)]
        assert [run.is_forked() for run in runs] == [False, False]
        assert [run.end(0) for run in runs] == [0, 0]
        command = b"tasks.warm_parent"
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not [line for line in lines if command in line and str(worker._process.pid).encode() in line]
