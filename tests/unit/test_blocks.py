"""The blocks: their rules, what they read from the environment, and a round trip through Prefect's server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]  # it ships no types
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    get_current_settings,
    temporary_settings,
)
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from prefect.testing.utilities import prefect_test_harness
from pydantic import SecretStr, ValidationError

import blocks
from blocks import EventBroker, HmacSecret, RecordsDatabase, RemoteHost, load_if_saved
from blocks.hmac_secret import HmacKeyMissing
from blocks.records_database import find_records_url
from blocks.remote_host import find_remote_host

KEY = "current-key-0123456789abcdefghijklmnop"
OLD_KEY = "previous-key-0123456789abcdefghijklmno"
PASSWORD = "pa55-w0rd-of-the-database"
ALL_BLOCKS = [EventBroker, HmacSecret, RecordsDatabase, RemoteHost]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what the machine happens to have set."""
    names = ("HMAC_SECRET_KEY", "REMOTE_PORT", "KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "GANTRY_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server of its own, on a database of its own."""
    home = tmp_path_factory.mktemp("prefect")
    updates = {PREFECT_HOME: home, PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(updates), prefect_test_harness(server_startup_timeout=60):
        yield


def secret(key: str = KEY) -> HmacSecret:
    """Keys that pass the rule."""
    return HmacSecret(current=SecretStr(key), previous=[SecretStr(OLD_KEY)])


@pytest.mark.parametrize("block", ALL_BLOCKS)
class TestPrefectsOwnDemands(BlockStandardTestSuite):
    """What Prefect demands of every block."""

    @pytest.fixture
    def block(self) -> type[Block]:
        """Overridden by the parameter."""
        raise NotImplementedError


# --- HmacSecret


def test_a_short_key_is_refused_without_quoting_it() -> None:
    """The message says how long it is, how long it must be, and how to make one."""
    with pytest.raises(ValidationError) as caught:
        HmacSecret.model_validate({"current": "too-short-key"})
    assert "13 bytes and 32 are needed" in str(caught.value)
    assert "openssl rand -hex 32" in str(caught.value)
    assert "too-short-key" not in str(caught.value)


def test_a_short_previous_key_is_refused_too() -> None:
    """A weak old key would still open the door."""
    with pytest.raises(ValidationError, match="9 bytes") as caught:
        HmacSecret.model_validate({"current": KEY, "previous": ["short-key"]})
    assert "short-key" not in str(caught.value)


def test_a_short_key_inside_a_host_is_not_quoted_either() -> None:
    """The message of the outer block is as silent."""
    with pytest.raises(ValidationError, match="13 bytes") as caught:
        RemoteHost.model_validate({"address": "edge", "hmac_secret": {"current": "too-short-key"}})
    assert "too-short-key" not in str(caught.value)


def test_the_length_of_a_key_is_counted_in_bytes() -> None:
    """Sixteen letters of two bytes each are 32 bytes."""
    assert HmacSecret(current=SecretStr("é" * 16)).signing_key() == ("é" * 16).encode()


def test_the_first_key_of_the_environment_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest are the previous ones, in order."""
    monkeypatch.setenv("HMAC_SECRET_KEY", f" {KEY} , {OLD_KEY}\n{'z' * 32},")
    found = HmacSecret.from_environment()
    assert found.signing_key() == KEY.encode()
    assert [key.get_secret_value() for key in found.previous] == [OLD_KEY, "z" * 32]


@pytest.mark.parametrize("value", [None, "", " , "])
def test_a_missing_key_names_the_variable_and_the_block(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator reads both places where a key may stand."""
    if value is not None:
        monkeypatch.setenv("HMAC_SECRET_KEY", value)
    with pytest.raises(HmacKeyMissing, match=r"HMAC_SECRET_KEY.*hmac-secret/edge"):
        HmacSecret.from_environment(block="hmac-secret/edge")


# --- RemoteHost


def test_a_host_knows_its_urls_and_names() -> None:
    """An address alone gives the plain defaults."""
    host = RemoteHost(address="10.0.0.7")
    assert host.base_url == "http://10.0.0.7:8001"
    assert (host.work_pool_name, host.deployment_name) == ("host-10-0-0-7", "10-0-0-7")


def test_tls_and_ipv6_shape_the_url() -> None:
    """https and brackets where they belong."""
    assert RemoteHost(address="fd00::7", port=9443, tls=True).base_url == "https://[fd00::7]:9443"


@pytest.mark.parametrize(
    ("address", "work_pool", "used"),
    [("edge", None, "host-edge"), ("host-a", None, "host-a"), ("edge", "pool-7", "pool-7")],
)
def test_the_pool_is_the_hosts_own_unless_one_is_named(
    address: str, work_pool: str | None, used: str
) -> None:
    """The Prefect deployment keeps the host's name whatever the pool is called."""
    host = RemoteHost(address=address, work_pool=work_pool)
    assert (host.work_pool_name, host.deployment_name) == (used, address)


@pytest.mark.parametrize(
    "address", ["", "http://edge", "edge:8001", "edge/path", "user@edge", "edge one", "-edge", "[fd00::7]"]
)
def test_an_address_is_bare(address: str) -> None:
    """Scheme, port, path and user have no place in it."""
    with pytest.raises(ValidationError, match="host name or an IP address alone"):
        RemoteHost(address=address)


def test_a_ca_file_without_tls_is_refused(tmp_path: Path) -> None:
    """Who names certificates does not want to speak in the clear."""
    with pytest.raises(ValidationError, match="turn tls on"):
        RemoteHost(address="edge", tls_ca_file=tmp_path / "ca.pem")


def test_a_host_gives_a_client_with_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block's key wins over the environment's."""
    monkeypatch.setenv("HMAC_SECRET_KEY", OLD_KEY)
    config = RemoteHost(address="edge", hmac_secret=secret()).receiver(correlation_id="c-1").config
    assert (config.base_url, config.signing_key) == ("http://edge:8001", KEY.encode())
    assert config.correlation_id == "c-1"


def test_a_host_without_a_key_takes_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without either, the error names the host's block."""
    host = RemoteHost(address="edge")
    with pytest.raises(HmacKeyMissing, match=r"HMAC_SECRET_KEY.*remote-host/edge"):
        host.receiver()
    monkeypatch.setenv("HMAC_SECRET_KEY", KEY)
    assert host.receiver().config.signing_key == KEY.encode()


@pytest.fixture(scope="module")
def saved_hosts(prefect_server: None) -> None:
    """A host with a nested block of keys, one without keys, and one that does not load."""
    keys = secret()
    keys.save("attic-keys")
    RemoteHost(address="10.0.0.7", port=9001, hmac_secret=keys).save("attic")
    RemoteHost(address="cellar.example", work_pool="pool-7").save("10-0-0-8")
    broken = RemoteHost(address="10.0.0.7")
    broken.port = 0
    broken.save("broken")


@pytest.mark.usefixtures("saved_hosts")
class TestFindRemoteHost:
    """From a name or an address to a host."""

    async def test_a_saved_host_is_found_by_name(self) -> None:
        """Its port, its keys and its pool are the block's."""
        host = await find_remote_host("attic")
        assert (host.address, host.port) == ("10.0.0.7", 9001)
        assert (host.work_pool_name, host.deployment_name) == ("host-attic", "attic")
        assert host.receiver().config.signing_key == KEY.encode()

    async def test_a_saved_host_is_found_by_the_slug_of_an_address(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The block decides the address, the environment adds only the key, REMOTE_PORT does not count."""
        monkeypatch.setenv("HMAC_SECRET_KEY", KEY)
        monkeypatch.setenv("REMOTE_PORT", "7000")
        host = await find_remote_host("10.0.0.8")
        assert host.base_url == "http://cellar.example:8001"
        assert (host.work_pool_name, host.deployment_name) == ("pool-7", "10-0-0-8")
        assert host.receiver().config.signing_key == KEY.encode()

    async def test_a_port_of_the_caller_wins_over_the_block(self) -> None:
        """All else stays the block's."""
        host = await find_remote_host("attic", 9999)
        assert (host.base_url, host.work_pool_name) == ("http://10.0.0.7:9999", "host-attic")

    async def test_an_unknown_address_is_a_host_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Address and environment make it."""
        monkeypatch.setenv("HMAC_SECRET_KEY", KEY)
        host = await find_remote_host("10.0.0.9")
        assert (host.base_url, host.work_pool_name) == ("http://10.0.0.9:8001", "host-10-0-0-9")
        assert host.receiver().config.signing_key == KEY.encode()

    @pytest.mark.parametrize(("port", "used"), [(8001, 7000), (8002, 8002)])
    async def test_the_environments_port_counts_for_the_default_only(
        self, port: int, used: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A port that the caller names is used."""
        monkeypatch.setenv("HMAC_SECRET_KEY", KEY)
        monkeypatch.setenv("REMOTE_PORT", "7000")
        assert (await find_remote_host("10.0.0.9", port)).port == used

    @pytest.mark.parametrize(("name", "block"), [("10.0.0.8", "10-0-0-8"), ("10.0.0.9", "10-0-0-9")])
    async def test_a_missing_key_names_the_hosts_block(self, name: str, block: str) -> None:
        """Whether the host has a block or not."""
        with pytest.raises(HmacKeyMissing, match=rf"HMAC_SECRET_KEY.*remote-host/{block}"):
            await find_remote_host(name)

    async def test_a_saved_host_that_is_wrong_is_not_passed_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A block that does not load is an error, not a reason to guess."""
        monkeypatch.setenv("HMAC_SECRET_KEY", KEY)
        with pytest.raises(RuntimeError, match="failed validation"):
            await find_remote_host("broken")

    async def test_only_a_missing_block_counts_as_missing(self) -> None:
        """Prefect's other ValueErrors rise: here, a name that lacks the block's type."""
        assert await load_if_saved(Block, "remote-host/no-such-host") is None
        with pytest.raises(ValueError, match="unpack"):
            await load_if_saved(Block, "no-such-host")

    async def test_a_server_that_is_gone_is_not_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without Prefect's answer nobody knows whether the block exists."""
        monkeypatch.setenv("HMAC_SECRET_KEY", KEY)
        gone = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
        with temporary_settings(gone), pytest.raises(httpx.ConnectError):
            await find_remote_host("attic")

    async def test_the_server_stores_keys_encrypted_and_shows_them_to_nobody(self) -> None:
        """Neither the API's plain answer nor the database file holds a key."""
        async with get_client() as client:
            shown = await client.read_block_document_by_name("attic", "remote-host", include_secrets=False)
        assert KEY not in shown.model_dump_json()
        assert OLD_KEY not in shown.model_dump_json()
        assert KEY.encode() not in database_bytes()
        assert OLD_KEY.encode() not in database_bytes()
        assert b"attic-keys" in database_bytes()


def database_bytes() -> bytes:
    """Everything that the test server has written."""
    url = PREFECT_SERVER_DATABASE_CONNECTION_URL.value()
    assert url is not None
    path = Path(str(url).removeprefix("sqlite+aiosqlite:///"))
    return b"".join(part.read_bytes() for part in path.parent.glob(f"{path.name}*"))


@pytest.mark.usefixtures("prefect_server")
async def test_the_package_registers_its_four_blocks() -> None:
    """`prefect block register -m blocks` finds them, although they load late."""
    environment = get_current_settings().to_environment_variables(exclude_unset=True)
    done = subprocess.run(  # noqa: ASYNC221  # nothing else runs here
        [sys.executable, "-m", "prefect", "block", "register", "-m", "blocks"],
        env={**os.environ, **environment, "DO_NOT_TRACK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered 4 blocks" in done.stdout
    async with get_client() as client:
        slugs = {found.slug for found in await client.read_block_types()}
    assert {"event-broker", "hmac-secret", "records-database", "remote-host"} <= slugs


# --- EventBroker


def test_no_brokers_in_the_environment_means_no_broker() -> None:
    """Events then stay in the outbox."""
    assert EventBroker.from_environment() is None


async def test_the_settings_make_an_idempotent_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiokafka takes every word of them."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "localhost:29092, kafka-2:9092")
    broker = EventBroker.from_environment()
    assert broker is not None
    settings = broker.producer_settings()
    assert settings["bootstrap_servers"] == ["localhost:29092", "kafka-2:9092"]
    assert (settings["acks"], settings["enable_idempotence"]) == ("all", True)
    await AIOKafkaProducer(**settings).stop()


async def test_a_broker_with_a_user_speaks_sasl_over_tls() -> None:
    """aiokafka takes those settings too."""
    broker = EventBroker(
        bootstrap_servers="kafka:9093",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="gantry",
        sasl_password=SecretStr(PASSWORD),
    )
    settings = broker.producer_settings()
    assert (settings["sasl_plain_username"], settings["sasl_plain_password"]) == ("gantry", PASSWORD)
    await AIOKafkaProducer(**settings).stop()


@pytest.mark.parametrize("servers", ["", "localhost", "http://kafka:9092", "kafka:9092,other"])
def test_brokers_have_ports(servers: str) -> None:
    """The message shows the form."""
    with pytest.raises(ValidationError, match="localhost:29092"):
        EventBroker(bootstrap_servers=servers)


@pytest.mark.parametrize(
    "settings",
    [
        {"security_protocol": "SASL_SSL"},
        {"security_protocol": "SASL_SSL", "sasl_username": "gantry"},
        {"sasl_username": "gantry", "sasl_password": PASSWORD},
    ],
)
def test_a_user_goes_with_the_sasl_protocols(settings: dict[str, Any]) -> None:
    """A password that would silently not be used is refused, and not quoted."""
    with pytest.raises(ValidationError, match="SASL_PLAINTEXT and SASL_SSL") as caught:
        EventBroker.model_validate({"bootstrap_servers": "kafka:9092", **settings})
    # Pydantic quotes the end of a long input: the end of the password must not be in it.
    assert PASSWORD[-8:] not in str(caught.value)


def test_kafka_is_not_needed_to_load_the_blocks() -> None:
    """A control host without aiokafka works."""
    code = "import sys; from blocks import EventBroker; sys.exit('aiokafka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- RecordsDatabase


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("sqlite:///records.db", "sqlite+aiosqlite:///records.db"),
        ("sqlite+aiosqlite:////var/records.db", "sqlite+aiosqlite:////var/records.db"),
        ("postgres://u@h/db", "postgresql+asyncpg://u@h/db"),
        (f"postgresql://u:{PASSWORD}@h:5432/db", f"postgresql+asyncpg://u:{PASSWORD}@h:5432/db"),
        ("postgresql+asyncpg:///db?host=/run", "postgresql+asyncpg:///db?host=/run"),
        ("postgresql://h/db?x=1&sslmode=require", "postgresql+asyncpg://h/db?x=1&ssl=require"),
    ],
)
def test_a_url_gets_the_async_driver(url: str, normal: str) -> None:
    """The usual forms are accepted as people write them."""
    assert RecordsDatabase(url=SecretStr(url)).sqlalchemy_url() == normal


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{PASSWORD}@h/db",
        f"postgresql+psycopg2://u:{PASSWORD}@h/db",
        f"u:{PASSWORD}@h/db",
        f"{PASSWORD}://h/db",
        "sqlite://",
        "sqlite:///",
        "",
    ],
)
def test_another_database_is_refused_without_quoting_the_url(url: str) -> None:
    """The message names both forms and where to set them; no password."""
    with pytest.raises(ValidationError, match="'sqlite:///' and a path, or with 'postgresql://'") as caught:
        RecordsDatabase.model_validate({"url": url})
    assert "DATABASE_URL" in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_records_lie_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is made, for its owner only."""
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path / "state" / "gantry"))
    url = RecordsDatabase.from_environment().sqlalchemy_url()
    assert url == f"sqlite+aiosqlite:///{tmp_path}/state/gantry/records.db"
    assert (tmp_path / "state" / "gantry").stat().st_mode & 0o777 == 0o700


def test_without_a_home_of_ours_the_users_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~/.gantry`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    url = RecordsDatabase.from_environment().sqlalchemy_url()
    assert url == f"sqlite+aiosqlite:///{tmp_path}/.gantry/records.db"


def test_the_database_url_of_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no folder is made."""
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path / "unused"))
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/db")
    assert RecordsDatabase.from_environment().sqlalchemy_url() == "postgresql+asyncpg://h/db"
    assert not (tmp_path / "unused").exists()


@pytest.mark.usefixtures("prefect_server")
async def test_the_saved_database_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the environment, as no block is there; then the block."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:////var/records.db")
    assert await find_records_url() == "sqlite+aiosqlite:////var/records.db"
    await RecordsDatabase(url=SecretStr(f"postgresql://u:{PASSWORD}@h/db")).asave("default")
    assert await find_records_url() == f"postgresql+asyncpg://u:{PASSWORD}@h/db"


# --- all of them


def test_no_block_shows_a_secret() -> None:
    """Not in repr, str, a dump or JSON, nested or not."""
    host = RemoteHost(address="edge", hmac_secret=secret())
    database = RecordsDatabase(url=SecretStr(f"postgresql://u:{PASSWORD}@h/db"))
    broker = EventBroker(
        bootstrap_servers="kafka:9093",
        security_protocol="SASL_PLAINTEXT",
        sasl_username="gantry",
        sasl_password=SecretStr(PASSWORD),
    )
    for block in (secret(), host, database, broker, host.receiver()):
        shown = f"{block!r} {block}"
        if isinstance(block, Block):
            shown += f"{block.model_dump()} {block.model_dump_json()}"
        assert not [word for word in (KEY, OLD_KEY, PASSWORD) if word in shown]


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    """Late loading hides no typing mistake."""
    with pytest.raises(AttributeError, match="RemoteHots"):
        getattr(blocks, "RemoteHots")  # noqa: B009  # mypy knows that it is not there
