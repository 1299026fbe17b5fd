"""Room on the host's disks: what is asked, and the reserve for when it is gone anyway."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from receiver.disk import BALLAST_BYTES, RESERVE_BYTES, Ballast, Need, RoomMissing, check_room


def free_bytes(folder: Path) -> int:
    """Bytes that may be written below the folder."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def test_what_goes_to_one_disk_is_asked_for_together(tmp_path: Path) -> None:
    """Each of two needs alone would find room; both do not, and the message names both."""
    half = free_bytes(tmp_path) // 2
    package, image = Need(tmp_path, half, "the package"), Need(tmp_path, half, "the loaded image")
    check_room([package])
    check_room([image])
    with pytest.raises(RoomMissing, match=r"for the package and [0-9]+ bytes for the loaded image, and"):
        check_room([package, image])


def test_a_reserve_is_left(tmp_path: Path) -> None:
    """The last bytes are not given away: a rollback has to be written down."""
    with pytest.raises(RoomMissing, match=f"{RESERVE_BYTES} are kept in reserve"):
        check_room([Need(tmp_path, free_bytes(tmp_path) - RESERVE_BYTES // 2, "the package")])


def test_a_folder_that_cannot_be_seen_is_not_asked(tmp_path: Path) -> None:
    """The engine may be on another machine; it will say itself what it lacks."""
    check_room([Need(tmp_path / "elsewhere", 2**60, "the loaded image")])


def test_the_ballast_gives_its_room_and_takes_it_again(tmp_path: Path) -> None:
    """Really allocated, dropped once, laid down again."""
    ballast = Ballast(tmp_path / "ballast")
    for _ in range(2):
        ballast.lay()
        ballast.lay()
        assert (tmp_path / "ballast").stat().st_blocks * 512 >= BALLAST_BYTES
        ballast.drop()
        ballast.drop()
        assert not (tmp_path / "ballast").exists()


def test_a_folder_without_room_has_no_ballast_and_no_error() -> None:
    """A ballast must not be what fills the disk."""
    ballast = Ballast(Path("/proc/none/ballast"))
    ballast.lay()
    ballast.drop()
