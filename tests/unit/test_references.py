"""Names and references: what is taken, what is refused, and that the refusal says the fix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import references

Check = Callable[[str], str]

GOOD: list[tuple[Check, list[str]]] = [
    (references.check_container_name, ["a", "my-service", "my.service_1", "a--b", "a" * 63]),
    (references.check_image_tag, ["latest", "v1.2.0", "_", "A-b.C", "x" * 128]),
    (references.check_env_name, ["PATH", "_x", "my.setting-1"]),
    (references.check_restart_policy, ["no", "always", "unless-stopped", "on-failure", "on-failure:5"]),
    (references.check_network_mode, ["bridge", "host", "none", "my_net", "container:web"]),
    (references.check_mount_source, ["/data/app", "/", "my-volume"]),
    (references.check_absolute_path, ["/data", "/a..b/c"]),
    (references.check_url_path, ["/health", "/health?deep=1"]),
    (references.check_ip_address, ["127.0.0.1", "::1"]),
]
BAD: list[tuple[Check, list[str]]] = [
    (references.check_container_name, ["", "A", "-a", "a-", "a..b", "a/b", "a b", "a\n", "a" * 64, "../a"]),
    (references.check_image_tag, ["", ".a", "-a", "a:b", "repo/a", "a@sha256:0", "x" * 129, "v1\n"]),
    (references.check_env_name, ["", "1A", "A=B", "A B", "A\0"]),
    (references.check_restart_policy, ["", "never", "on-failure:0", "on-failure:", "always:3"]),
    (references.check_network_mode, ["", "-x", "a b", "a/b"]),
    (references.check_mount_source, ["", "v", "../data", "./data", "/data/../etc", "/a:/b"]),
    (references.check_absolute_path, ["", "data", "/..", "/a/../b", "/a\0", "/a:ro"]),
    (references.check_url_path, ["", "health", "http://x/", "/a b", "/a\r\nHost: x"]),
    (references.check_ip_address, ["", "localhost", "10.0.0.0/8", "1.2.3"]),
]


@pytest.mark.parametrize(("check", "text"), [(check, text) for check, texts in GOOD for text in texts])
def test_a_good_name_is_returned_as_it_is(check: Check, text: str) -> None:
    """A check never changes what it checks."""
    assert check(text) == text


@pytest.mark.parametrize(("check", "text"), [(check, text) for check, texts in BAD for text in texts])
def test_a_bad_name_is_refused_with_its_value_and_the_fix(check: Check, text: str) -> None:
    """The reader sees what was given and what to give."""
    with pytest.raises(ValueError, match=r"use|give|start with|such as") as refused:
        check(text)
    assert repr(text) in str(refused.value)


@given(st.text(max_size=80))
def test_no_text_crashes_a_check(text: str) -> None:
    """Whatever is sent is either taken or refused by name."""
    for check, _ in GOOD:
        try:
            assert check(text) == text
        except ValueError as exc:
            assert str(exc)  # noqa: PT017 - taking the text is right too
