"""`make demo`, `make demo-broken`, `make demo-stop`: a real deployment to another host, from one command.

As root on Linux the target is a second host, made of a network namespace with an engine of its own;
elsewhere this machine's engine plays both parts. Run again, it goes on with what is up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deployments.demo_image import BASE_IMAGE, drop_images, ensure_base_image
from deployments.demo_stage import HOST, REGISTERED, Stage, end, load, start
from tasks.records import Records
from tasks.states import WorkflowRecord

PROJECT = Path(__file__).resolve().parents[1]


def say(text: str = "") -> None:
    """A line for the person at the terminal, at once."""
    print(text, flush=True)


def prefect(stage: Stage, *arguments: str) -> int:
    """Run the Prefect CLI as the user would type it; returns its exit code."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    return subprocess.run(command, env=stage.full_environment(PROJECT), cwd=PROJECT, check=False).returncode


def prepare() -> Stage:
    """The running demo, or a new one: base image, services, block, pools, Prefect deployments."""
    ensure_base_image(say)
    stage = load()
    if stage is not None and stage.is_up():
        say(f"the demo is up already: Prefect UI at {stage.ui_url}")
    else:
        if stage is not None:
            say("an earlier demo is down; clearing it away")
            end(stage)
        stage = start(say)
    if not REGISTERED.exists():
        set_up(stage)
        REGISTERED.touch()
    return stage


def set_up(stage: Stage) -> None:
    """Blocks, work pools, Prefect deployments and automations; ends when one of them cannot be made."""
    say("setting the Prefect server up: blocks, work pools, Prefect deployments, automations")
    host = f"{HOST}={stage.host_address}:{stage.receiver_port}"
    command = [sys.executable, "-m", "deployments.setup", "--host", host, "--worker-python", sys.executable]
    # What the user's own set-up is told of has no place in the demo.
    others = dict.fromkeys(("GANTRY_HOSTS", "GANTRY_NOTIFICATION_BLOCK", "DATABASE_URL"), "")
    environment = {**stage.full_environment(PROJECT), **others}
    subprocess.run(command, env=environment, cwd=PROJECT, check=True)


def run_deployment(stage: Stage, name: str) -> tuple[int, float]:
    """Run one Prefect deployment and watch it; returns exit code and seconds."""
    arguments = ["deployment", "run", f"deploy-container/{name}", "--watch"]
    say(f"\n$ prefect {' '.join(arguments)}")
    began = time.monotonic()
    return prefect(stage, *arguments, *stage.parameters()), time.monotonic() - began


def answer_of(url: str) -> str:
    """What the service says, or why it does not."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own http URL
            return str(response.read().decode().strip())
    except (urllib.error.URLError, OSError) as exc:
        return f"no answer: {exc}"


async def last_workflow(stage: Stage, since: datetime) -> tuple[WorkflowRecord, list[tuple[str, int]]]:
    """The sample's workflow that began after `since`, and its stages with their milliseconds."""
    async with await Records.open(stage.records_url) as records:
        newest = await records.recent(container_name="hello", limit=1)
        if not newest or newest[0].created_at < since:
            raise SystemExit("the run began no workflow; its last message above says why")
        workflow = newest[0]
        stages = await records.stages(workflow.workflow_id)
    return workflow, [(result.stage.value, result.duration_ms) for result in stages]


def tell(stage: Stage, seconds: float) -> WorkflowRecord:
    """The end of the demo's output: URL, answer, time of each stage, UI."""
    began = datetime.now(UTC) - timedelta(seconds=seconds + 1)
    workflow, stages = asyncio.run(last_workflow(stage, began))
    say()
    for name, duration_ms in stages:
        say(f"  {name:<22}{duration_ms / 1000:6.1f} s")
    say(f"  {'the whole deployment':<22}{(workflow.total_duration_ms or 0) / 1000:6.1f} s")
    say(f"  {'with the command':<22}{seconds:6.1f} s")
    say(f"\n  {workflow.container_name}:{workflow.image_tag} is {workflow.current_state}")
    if workflow.error_message:
        say(f"  cause: {workflow.error_code}: {workflow.error_message}")
    say(f"\n$ curl {stage.service_url}\n{answer_of(stage.service_url)}")
    say(f"\nPrefect UI: {stage.ui_url}    next: make demo-broken, make demo-stop")
    tell_how_to_watch(stage)
    return workflow


def tell_how_to_watch(stage: Stage) -> None:
    """Commands for the HTTP API, metrics and events of this demo."""
    names = ("PREFECT_API_URL", "GANTRY_HOME")
    settings = " ".join(f"{name}={stage.environment[name]}" for name in names)
    api = f"{settings} {sys.executable} -m deployments.api"
    say(f"HTTP API:   TOKEN=$({api} token create demo)")
    say(f'            {api} serve   # then: curl -H "Authorization: Bearer $TOKEN" \\')
    say("            http://127.0.0.1:8060/api/v1/deployments")
    say("metrics:    the same, with /metrics; the host's: " + stage.receiver_metrics)
    broker = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    if broker:
        say(f"events:     kcat -b {broker} -G demo '^dev.omninode-bridge.deployment.*'")
    else:
        say("events:     wait in the outbox; set KAFKA_BOOTSTRAP_SERVERS to have them published")


def demo() -> int:
    """Deploy the sample; 0 when it serves."""
    stage = prepare()
    code, seconds = run_deployment(stage, "hello")
    tell(stage, seconds)
    return code


def demo_broken() -> int:
    """Deploy a version whose health endpoint fails; 0 when the previous one still answers."""
    stage = prepare()
    before = answer_of(stage.service_url)
    if before.startswith("no answer"):
        say("nothing serves yet: deploying the good version first")
        run_deployment(stage, "hello")
        before = answer_of(stage.service_url)
    say(f"\nbefore: {before}")
    code, seconds = run_deployment(stage, "hello-broken")
    workflow = tell(stage, seconds)
    after = answer_of(stage.service_url)
    if code != 0 and after == before and not workflow.success:
        say("The broken version was rolled back; the previous one still answers.")
        return 0
    say(f"Expected a failed deployment and the same answer as before; got exit code {code} and: {after}")
    return 1


def stop() -> int:
    """Take the demo away: services, namespaces, containers, images, files."""
    stage = load()
    if stage is None:
        say("no demo is up")
        return 0
    end(stage)
    drop_images()
    say(f"the demo is gone, with its containers and images ({BASE_IMAGE} too)")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Choose by name."""
    parser = argparse.ArgumentParser(prog="python -m deployments.demo", description=__doc__)
    parser.add_argument("action", choices=("up", "broken", "stop"), nargs="?", default="up")
    action = parser.parse_args(arguments).action
    return {"up": demo, "broken": demo_broken, "stop": stop}[action]()


if __name__ == "__main__":
    os.environ |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    sys.exit(main(sys.argv[1:]))
