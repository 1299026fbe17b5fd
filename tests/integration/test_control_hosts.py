"""Two control hosts, each a process of its own, write to the same records at once."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tasks import migrations
from tasks.records import Records, WorkflowState
from tests.recorded import WAY, scrape

S = WorkflowState
OWN, SHARED = 6, 12
CHAIN = [*WAY[1:], S.COMPLETED]
CONTROL_HOST = """
import asyncio, json, sys
from tasks.records import Facts, NewWorkflow, Records, StateConflict
from tests.recorded import WAY, S

NEXT = dict(zip(WAY, (*WAY[1:], S.COMPLETED)))

async def main(url, me, own, shared):
    won, lost = {}, 0
    ids = [f"shared-{n}" for n in range(shared)] + [f"{me}-{n}" for n in range(own)]
    async with await Records.open(url) as records:
        for each in ids:
            new = NewWorkflow(workflow_id=each, container_name="shop", remote_host="target")
            await records.create(new)
        print("ready", flush=True)
        sys.stdin.readline()
        for each in ids:
            state = S.PENDING  # as it was when both began
            while not state.terminal:
                try:
                    await records.advance(each, state, NEXT[state], Facts(reason=me))
                    won.setdefault(each, []).append(NEXT[state])
                    state = NEXT[state]
                except StateConflict as conflict:
                    lost, state = lost + 1, conflict.actual
    print(json.dumps([won, lost]), flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


async def test_two_control_hosts_move_each_workflow_once_through_each_state(records_url: str) -> None:
    """Their own ones and the same ones: no transition twice, none missing, events in order, counted once."""
    async with await Records.open(records_url) as records:
        outputs = await _run_both(records_url)
        won = {name: json.loads(output)[0] for name, output in outputs.items()}
        for number in range(SHARED):
            await _check_story(records, f"shared-{number}", won)
        for name in outputs:
            for number in range(OWN):
                await _check_story(records, f"{name}-{number}", won)
        found = await scrape(records)
    counted = sum(value for key, value in found.items() if key.startswith("deployments_completed_total"))
    assert counted == SHARED + 2 * OWN
    # Both believed that each shared one was PENDING, and one of them was told otherwise.
    assert sum(json.loads(output)[1] for output in outputs.values()) >= SHARED


async def _run_both(url: str) -> dict[str, bytes]:
    pipe = asyncio.subprocess.PIPE
    processes = {
        name: await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CONTROL_HOST, url, name, str(OWN), str(SHARED)),
            cwd=Path(migrations.__file__).parents[2],
            stdin=pipe,
            stdout=pipe,
        )
        for name in ("one", "other")
    }
    for process in processes.values():
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
    both = asyncio.gather(*(process.communicate(b"go\n") for process in processes.values()))
    outputs = [output for output, _ in await asyncio.wait_for(both, 60)]
    assert [process.returncode for process in processes.values()] == [0, 0]
    return dict(zip(processes, outputs, strict=True))


async def _check_story(records: Records, workflow_id: str, won: dict[str, dict[str, list[str]]]) -> None:
    history = await records.transitions(workflow_id)
    assert [(row.sequence, row.to_state) for row in history] == list(enumerate(CHAIN, 1))
    for name, states in won.items():
        assert [row.to_state for row in history if row.reason == name] == states.get(workflow_id, [])
    record = await records.get(workflow_id)
    events = await records.outbox(workflow_id)
    assert [row.sequence for row in events] == list(range(1, record.event_sequence + 1))
    assert [row.event_type for row in events] == ["DEPLOYMENT_STARTED", "DEPLOYMENT_COMPLETED"]
