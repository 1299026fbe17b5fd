"""What a host installs: which packages, and which wheels fit it."""

from __future__ import annotations

from pathlib import Path

from tasks.wheelhouse import Checkout, Platform, manifest, needed

PROJECT = Checkout(Path(__file__).resolve().parents[2])
DEBIAN = Platform("3.11.2", "x86_64", "glibc-2.36")


def test_a_host_takes_wheels_up_to_its_own_c_library() -> None:
    """The newest first; nothing that needs a newer one."""
    tags = DEBIAN.tags()
    assert tags[0] == "manylinux_2_36_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} < set(tags)
    assert Platform("3.12.1", "aarch64", "musl-1.2").tags() == [
        *("musllinux_1_2_aarch64", "musllinux_1_1_aarch64", "linux_aarch64")
    ]


def test_markers_are_asked_with_the_host_s_answers() -> None:
    """Prefect takes another library for times from Python 3.13 on, which this control host need not have."""
    older = needed(PROJECT, DEBIAN.markers())
    newer = needed(PROJECT, Platform("3.13.1", "x86_64", "glibc-2.36").markers())
    assert ("whenever" in older, "whenever" in newer) == (False, True)
    assert ("pendulum" in older, "pendulum" in newer) == (True, False)


def test_the_packages_are_those_of_both_extras_in_pinned_versions() -> None:
    """With what they need in turn, and none of the tools of development."""
    found = needed(PROJECT, DEBIAN.markers())
    assert {"prefect", "uvicorn", "docker", "websockets"} < found.keys()
    assert not {"pytest", "mypy", "gantry-deploy"} & found.keys()
    pins = {name: f"=={version}" for name, version in PROJECT.pins().items()}
    assert {name for name, version in found.items() if pins.get(name) != version} == set()


def test_a_manifest_names_each_file_with_its_digest(tmp_path: Path) -> None:
    """What differs is sent, what is the same is not."""
    (tmp_path / "a.whl").write_bytes(b"a")
    (tmp_path / "b.whl").write_bytes(b"b")
    before = manifest(tmp_path)
    (tmp_path / "b.whl").write_bytes(b"c")
    assert {name for name, digest in manifest(tmp_path).items() if before[name] != digest} == {"b.whl"}
