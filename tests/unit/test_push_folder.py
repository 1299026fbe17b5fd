"""Folders of pushes, and of those whose process was killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks import store
from tasks.push_folder import note_name, push_folder

DIE = """
import os, signal
from tasks.push_folder import note_name, push_folder

with push_folder(print) as folder:
    note_name(folder, "127.0.0.1:1/secret/image:push")
    (folder / "blob").write_bytes(b"half a layer")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were taken away; `GANTRY_HOME` is the test's own."""
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path))
    return []


def folders() -> list[str]:
    """What is there of pushes."""
    return [path.name for path in (store.home() / "pushes").iterdir() if path.is_dir()]


def test_a_push_leaves_nothing_when_it_fails(removed: list[str]) -> None:
    """Its folder goes with all that is in it."""
    with pytest.raises(OSError, match="disk"), push_folder(removed.append) as folder:  # noqa: PT012 - the block fails
        (folder / "blob").write_bytes(b"half a layer")
        raise OSError("disk full")
    assert folders() == []
    assert removed == []


def test_what_a_killed_push_left_goes_with_the_next(removed: list[str]) -> None:
    """Its folder, and the name that it gave to the image; that of a living one stays."""
    with push_folder(removed.append) as living:
        note_name(living, "living")
        subprocess.run([sys.executable, "-c", DIE], check=False)
        assert len(folders()) == 2
        with push_folder(removed.append):
            assert removed == ["127.0.0.1:1/secret/image:push"]
        assert folders() == [living.name]
    assert folders() == []


def test_an_engine_that_does_not_answer_keeps_the_note(removed: list[str]) -> None:
    """So the name can be taken away later."""

    def fail(_: str) -> None:
        raise OSError("no engine")

    subprocess.run([sys.executable, "-c", DIE], check=False)
    failing: Callable[[str], None] = fail
    with pytest.raises(OSError, match="no engine"), push_folder(failing):
        pass
    assert len(folders()) == 1
    with push_folder(removed.append):
        assert removed == ["127.0.0.1:1/secret/image:push"]
