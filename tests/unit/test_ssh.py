"""Whether a host's key is the right one, decided; `tests/e2e/test_provision.py` asks a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.ssh import HostKeyRefused, LoginRefused, SshTarget, _read_key, check_host_key

TARGET = SshTarget("10.0.0.7", "root")
SHOWN = f"SHA256:{'a' * 43}"
OTHER = f"SHA256:{'b' * 43}"


def test_the_expected_key_is_taken() -> None:
    """It may be one of several."""
    check_host_key(TARGET, "ssh-ed25519", SHOWN, {OTHER, SHOWN})


def test_an_unknown_key_is_refused_and_never_added() -> None:
    """The message shows it, how to compare it, and the parameter that accepts it."""
    with pytest.raises(HostKeyRefused, match="is not known") as refused:
        check_host_key(TARGET, "ecdsa-sha2-nistp256", SHOWN, set())
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ecdsa_key.pub" in refused.value.next_step
    assert f"host_key={SHOWN}" in refused.value.next_step
    assert not refused.value.retryable


def test_a_changed_key_is_refused_with_both() -> None:
    """Whoever reads it sees that somebody may stand between."""
    with pytest.raises(HostKeyRefused, match=f"shows ssh-ed25519 {SHOWN}, and expected was {OTHER}"):
        check_host_key(TARGET, "ssh-ed25519", SHOWN, {OTHER})


@pytest.mark.parametrize(("port", "name"), [(22, "10.0.0.7"), (2222, "[10.0.0.7]:2222")])
def test_known_hosts_are_looked_up_as_openssh_does(port: int, name: str) -> None:
    """Another port is another name."""
    assert SshTarget("10.0.0.7", "root", port).known_name == name


def test_a_file_that_holds_no_key_is_refused_by_name(tmp_path: Path) -> None:
    """Not as a failed login."""
    path = tmp_path / "id"
    path.write_text("no key")
    with pytest.raises(LoginRefused, match=f"key_file {path} cannot be read"):
        _read_key(path)
