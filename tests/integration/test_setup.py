"""`python -m deployments.setup` against a real Prefect server."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_docker.worker import (  # type: ignore[import-untyped]  # it ships no types
    DockerWorkerJobConfiguration,
)

from blocks import load_if_saved
from blocks.hmac_secret import HmacSecret
from blocks.remote_host import RemoteHost
from deployments import setup, setup_automations
from deployments.register import register_control
from deployments.setup_automations import automations
from deployments.setup_items import Change, settle
from tests.integration.prefect_server import running_server
from tests.services import free_port
from tests.webhook import HOOK, listening

BlockT = TypeVar("BlockT", bound=Block)

PROJECT = Path(__file__).resolve().parents[2]
KEY = "k" * 64
HOST = "host-b=10.0.0.7"
FILTERS = (
    *("block_documents", "block_schemas", "block_types", "work_pools", "deployments"),
    *("automations", "v2/concurrency_limits", "flows"),
)
# What the server's own services write, whoever looks.
RESTLESS = {"updated", "last_polled", "status", "next_scheduled_start_time", "created_by", "updated_by"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server that knows nothing of us at first."""
    with running_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(autouse=True)
def control_host(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a control host, in the project's folder."""
    for name in ("GANTRY_HOSTS", "GANTRY_NOTIFICATION_BLOCK", "DATABASE_URL", "MAX_CONCURRENT_DEPLOYMENTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HMAC_SECRET_KEY", KEY)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "broker.example:9092")
    monkeypatch.chdir(PROJECT)


@pytest.fixture(scope="module")
def furnished(server: str) -> None:
    """Set-up has been at the server once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HMAC_SECRET_KEY", KEY)
        patch.setenv("KAFKA_BOOTSTRAP_SERVERS", "broker.example:9092")
        assert asyncio.run(setup.main(["--host", HOST, "--docker-pool", "builds"])) == 0


async def everything() -> dict[str, Any]:
    """All that the server holds, secrets included, without what changes by itself."""
    found = {}
    async with get_client() as client:
        for kind in FILTERS:
            body = {"include_secrets": True} if kind == "block_documents" else {}
            rows = (await client._client.post(f"/{kind}/filter", json=body)).json()
            found[kind] = [{k: v for k, v in row.items() if k not in RESTLESS} for row in rows]
    return found


async def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Set-up's lines; fails the test when it fails."""
    code = await setup.main(arguments)
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out.splitlines()


async def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What set-up says when it refuses, with the server as it was."""
    before = await everything()
    code: object
    try:
        code = await setup.main(arguments)
    except SystemExit as exc:  # of argparse
        code = exc.code
    assert code == 2
    assert await everything() == before
    return capsys.readouterr().err


async def saved_block(kind: type[BlockT], name: str) -> BlockT:
    """A block that has to be there."""
    found = await load_if_saved(kind, name)
    assert found is not None
    return found


def changed(lines: list[str]) -> list[str]:
    """Those lines that are neither unchanged nor left out, nor the sum."""
    return [line for line in lines[:-1] if not line.startswith((Change.UNCHANGED, Change.LEFT_OUT))]


async def test_a_plan_says_what_set_up_then_does_and_a_second_run_changes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan touches nothing; each planned line is done; then nothing is left to do."""
    before = await everything()
    planned = await run(capsys, "--plan", "--host", HOST, "--docker-pool", "builds")
    assert await everything() == before
    assert planned[-1].endswith(
        "nothing was changed; unchanged: 1, left out: 4"
    )  # a server knows docker-host
    done = await run(capsys, "--host", HOST, "--docker-pool", "builds")
    assert [line.replace("create ", "created") for line in planned[:-1]] == done[:-1]
    after = await everything()
    again = await run(capsys, "--host", HOST, "--docker-pool", "builds")
    assert again[-1].startswith("nothing to change")
    assert changed(again) == []
    assert await everything() == after
    assert {pool["name"]: pool["type"] for pool in after["work_pools"]} == {
        "control": "process",
        "host-b": "process",
        "builds": "docker",
    }
    host = await saved_block(RemoteHost, "host-b")
    assert (host.address, host.port, host.work_pool_name) == ("10.0.0.7", 8001, "host-b")
    assert host.hmac_secret is not None
    assert host.hmac_secret.current.get_secret_value() == KEY
    assert KEY not in "".join(planned + done + again)


async def test_only_what_changed_is_updated(
    furnished: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another address, key and limit; what a person added to the block stays."""
    host = await saved_block(RemoteHost, "host-b")
    host.ssh_user = "deploy"
    await host.asave("host-b", overwrite=True)
    monkeypatch.setenv("HMAC_SECRET_KEY", f"{'n' * 64},{KEY}")
    monkeypatch.setenv("MAX_CONCURRENT_DEPLOYMENTS", "7")
    monkeypatch.setenv("GANTRY_HOSTS", "host-b=https://10.0.0.8:8443")
    lines = changed(await run(capsys))
    assert [re.split(r"  +", line, maxsplit=2)[2] for line in lines] == [
        "gantry-deployments: 5 -> 7",
        "hmac-secret/host-b: current, previous",
        "remote-host/host-b: address, port, tls",
    ]
    saved = await saved_block(RemoteHost, "host-b")
    assert (saved.base_url, saved.ssh_user) == ("https://10.0.0.8:8443", "deploy")
    assert saved.hmac_secret is not None
    assert saved.hmac_secret.current.get_secret_value() == "n" * 64


async def test_a_host_that_was_saved_before_needs_neither_its_key_nor_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Prefect deployments are looked after, and its saved key stays."""
    await run(capsys, "--host", HOST)
    monkeypatch.delenv("HMAC_SECRET_KEY")
    lines = await run(capsys)
    assert any(line.endswith("receive-container/host-b") for line in lines)
    told = await run(capsys, "--host", HOST)
    assert any("HMAC_SECRET_KEY is not set, the saved key stays" in line for line in told)
    assert (await saved_block(HmacSecret, "host-b")).current.get_secret_value() == KEY


async def test_set_up_and_prefect_deploy_make_the_same_of_prefect_yaml(
    server: str, furnished: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `prefect deploy --all` set-up finds nothing to change, and the automation is still there."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**os.environ, "PREFECT_API_URL": server, "PWD": str(PROJECT)}
    deploying = await asyncio.to_thread(
        subprocess.run, command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert deploying.returncode == 0, deploying.stdout + deploying.stderr
    assert changed(await run(capsys, "--plan")) == []


async def test_an_automation_that_was_edited_is_updated_and_one_that_is_off_stays_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name; the notification block that was named once is kept."""
    with listening():
        await run(capsys, "--notify", HOOK)
    await run(capsys)
    text = (setup_automations.FOLDER / "deployment-failed.yaml").read_text()
    (tmp_path / "one.yaml").write_text(text.replace("Deployment failed", "It failed"))
    async with get_client() as client:
        installed = (await client.read_automations_by_name("gantry-deployment-failed"))[0]
        await client.pause_automation(installed.id)
        items = await automations(None, tmp_path)
        assert [(each.change, each.detail) for each in items] == [(Change.UPDATE, "actions")]
        await settle(items, print, plan=False)
        edited = (await client.read_automations_by_name("gantry-deployment-failed"))[0]
    assert (edited.id, edited.enabled) == (installed.id, False)
    assert edited.actions[0].subject.startswith("It failed")  # type: ignore[union-attr]
    assert edited.actions[0].block_document_id == installed.actions[0].block_document_id  # type: ignore[union-attr]
    await run(capsys)


async def test_the_docker_pool_s_template_is_one_that_its_worker_takes(furnished: None) -> None:
    """Each variable finds its place in a run's configuration."""
    async with get_client() as client:
        pool = await client.read_work_pool("builds")
        made = await DockerWorkerJobConfiguration.from_template_and_values(pool.base_job_template, {})
    assert (made.image, made.network_mode, made.auto_remove) == ("gantry:latest", "host", True)
    assert made.volumes[0] == "/var/run/docker.sock:/var/run/docker.sock"
    assert made.env["GANTRY_HOME"] == "/var/lib/gantry"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--notify", "slack-webhook/nobody"], "there is no block 'slack-webhook/nobody'"),
        (["--notify", "event-broker/default"], "the block 'event-broker/default' cannot notify"),
        (["--host", "host-c"], "it is no NAME=ADDRESS"),
        (["--host", "Host_C=10.0.0.9"], "use lower-case letters"),
        (["--host", "host-c=10.0.0.9:eight"], "Port could not be cast"),
        (["--docker-pool", "control"], "is of type process, not docker"),
    ],
)
async def test_what_cannot_be_done_is_refused_before_anything_is_changed(
    arguments: list[str], told: str, furnished: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what is wrong in it."""
    assert told in await refusal(capsys, *arguments)


async def test_a_host_without_a_key_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the variable, how a key is made, and the block."""
    monkeypatch.delenv("HMAC_SECRET_KEY")
    told = await refusal(capsys, "--host", "host-new=10.0.0.9")
    assert "HMAC_SECRET_KEY" in told
    assert "openssl rand -hex 32" in told
    assert "hmac-secret/host-new" in told


@pytest.mark.parametrize("url", [None, f"http://127.0.0.1:{free_port()}/api"], ids=["none", "silent"])
async def test_a_server_that_does_not_answer_is_named_with_how_to_start_one(
    url: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when none was named: set-up never starts one for itself."""
    with temporary_settings(
        {PREFECT_API_URL: url}, restore_defaults={PREFECT_API_URL} if url is None else None
    ):
        assert await setup.main([]) == 2
    told = capsys.readouterr().err
    assert "prefect server start" in told
    assert (url or "PREFECT_API_URL is not set") in told


async def test_registering_the_control_side_alone_is_a_part_of_set_up(
    furnished: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """`deployments.register` finds nothing to do after it."""
    await register_control(PROJECT)
    assert "nothing to change" in capsys.readouterr().out
