"""The API's tokens: at rest, recognised, revoked; and the command line: tokens, and refusals to start."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments import api
from deployments.api_tokens import TokenNameRefused, TokenStore, TokensUnreadable, TokenUnknown

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    """No token yet; the folder is not there either."""
    return TokenStore(tmp_path / "home" / "api_tokens.json")


@pytest.fixture
def environment(tokens: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line keeps its tokens in this test's file, and knows no Prefect server."""
    monkeypatch.setenv("GANTRY_API_TOKENS_FILE", str(tokens.path))
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))


def test_a_token_is_32_random_bytes_and_identifies_its_name(tokens: TokenStore) -> None:
    """Two tokens differ, and each is known by its own name."""
    ci, phone = tokens.create("ci", NOW), tokens.create("phone", NOW)
    assert ci.startswith("gantry_")
    assert len(ci) == len("gantry_") + 43  # 32 bytes in base64 without padding
    assert (tokens.identify(ci), tokens.identify(phone)) == ("ci", "phone")
    assert tokens.identify(ci[:-1]) is None
    assert tokens.identify("") is None


def test_only_the_hash_is_at_rest_and_only_its_owner_reads_it(tokens: TokenStore) -> None:
    """Whoever copies the file cannot call the API with it."""
    token = tokens.create("ci", NOW)
    text = tokens.path.read_text()
    assert token.removeprefix("gantry_") not in text
    held = json.loads(text)["tokens"][0]["sha256"]
    assert held == hashlib.sha256(token.encode()).hexdigest()
    assert tokens.identify(held) is None
    assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600
    assert [path.name for path in tokens.path.parent.iterdir() if path.suffix != ".lock"] == [
        tokens.path.name
    ]


def test_every_hash_is_compared_in_constant_time(tokens: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the comparison nor the number of them tells how near a guess came."""
    first = tokens.create("first", NOW)
    tokens.create("second", NOW)
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def spy(held: str, offered: str) -> bool:
        compared.append((held, offered))
        return real(held, offered)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    assert tokens.identify(first) == "first"
    assert tokens.identify("gantry_guess") is None
    assert len(compared) == 4


def test_a_revoked_token_ends_at_once_and_the_others_stay(tokens: TokenStore) -> None:
    """A running API reads the same file."""
    running = TokenStore(tokens.path)
    ci, phone = tokens.create("ci", NOW), tokens.create("phone", NOW)
    assert running.identify(ci) == "ci"
    tokens.revoke("ci")
    assert running.identify(ci) is None
    assert running.identify(phone) == "phone"
    with pytest.raises(TokenUnknown):
        tokens.revoke("ci")


@pytest.mark.parametrize("name", ["", "two words", "a" * 65, "line\nbreak", "../up"])
def test_a_name_that_would_confuse_a_log_is_refused(tokens: TokenStore, name: str) -> None:
    """Names stand in logs and in tags of flow runs."""
    with pytest.raises(TokenNameRefused):
        tokens.create(name, NOW)
    assert not tokens.path.exists()


def test_a_name_is_given_once(tokens: TokenStore) -> None:
    """Else a revocation would not say which one it ends."""
    token = tokens.create("ci", NOW)
    with pytest.raises(TokenNameRefused):
        tokens.create("ci", NOW)
    assert tokens.identify(token) == "ci"


def test_tokens_made_at_the_same_time_are_all_kept(tokens: TokenStore) -> None:
    """Each writer sees what the one before wrote."""
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: tokens.create(f"t{number}", NOW), range(24)))
    assert [tokens.identify(token) for token in made] == [f"t{number}" for number in range(24)]


@pytest.mark.parametrize("text", ["", "{}[]", '{"version": 2, "tokens": []}', '{"tokens": [{"name": "x"}]}'])
def test_a_file_that_cannot_be_read_lets_nobody_in(tokens: TokenStore, text: str) -> None:
    """A broken file is an error, never an empty one."""
    tokens.create("ci", NOW)
    tokens.path.write_text(text)
    with pytest.raises(TokensUnreadable):
        tokens.identify("gantry_x")


def test_a_file_that_others_can_write_lets_nobody_in(tokens: TokenStore) -> None:
    """Whoever can write it could add a token of his own."""
    token = tokens.create("ci", NOW)
    tokens.path.chmod(0o620)
    with pytest.raises(TokensUnreadable):
        tokens.identify(token)


@pytest.mark.usefixtures("environment")
def test_the_command_line_makes_lists_and_revokes(
    tokens: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """The token is all of stdout, once; the list shows names only."""
    assert api.main(["token", "create", "ci"]) == 0
    token = capsys.readouterr().out.strip()
    assert tokens.identify(token) == "ci"
    assert api.main(["token", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("ci\t20")
    assert hashlib.sha256(token.encode()).hexdigest() not in listed
    assert api.main(["token", "revoke", "ci"]) == 0
    assert tokens.identify(token) is None
    capsys.readouterr()
    assert api.main(["token", "revoke", "ci"]) == 2
    assert "No token is named 'ci'" in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "There is no token"),
        (["--insecure-no-token", "--host", "0.0.0.0"], "--insecure-no-token would let everybody"),
        (["--insecure-no-token", "--host", "10.0.0.5"], "--insecure-no-token would let everybody"),
        (["--insecure-no-token", "--host", "api.example"], "--insecure-no-token would let everybody"),
    ],
)
def test_it_does_not_start_open_to_everybody(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Without a token only with the flag, and with the flag only on a loopback address."""
    assert api.main(["serve", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 and one line that says what to do."""
    with (
        socket.create_server(("127.0.0.1", 0)) as holder,
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
    ):
        port = str(holder.getsockname()[1])
        assert api.main(["serve", "--port", port, "--insecure-no-token"]) == 3
    told = capsys.readouterr().err
    assert told.startswith(
        f"gantry api: The API cannot listen on 127.0.0.1 port {port}: Address already in use"
    )
    assert told.endswith("choose another: --port.\n")


@pytest.mark.usefixtures("environment")
def test_without_a_prefect_server_it_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    """Prefect would otherwise start one of its own, where no worker looks."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert api.main(["serve", "--insecure-no-token"]) == 2
    assert "PREFECT_API_URL is not set" in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
def test_help_names_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """The documentation of the settings is the program's own."""
    with pytest.raises(SystemExit, match="0"):
        api.main(["--help"])
    told = capsys.readouterr().out
    assert [name for name in api.VARIABLES if name not in told] == []
