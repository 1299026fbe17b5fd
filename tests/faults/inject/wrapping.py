"""Where a process of a fault lab can be stopped: functions of the product, wrapped when they are imported.

Names no module of the product by import, so that a process loads only what it needs itself.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from tests.faults.inject.holding import armed_at, arrive

_times: dict[str, int] = {}
_FIRST_CHUNK_BYTES = 500  # the smallest package, of no layer at all, has more


# -- whose process is it -----------------------------------------------------------------------


def _of_flow() -> str | None:
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return str(context.parameters["container_name"]) if context and context.parameters else None


def _of_ledger(ledger: Any, deployment_id: str) -> str | None:
    return str(ledger.get(deployment_id).request.container_name)


def _of_engine(engine: Any, arguments: Sequence[Any]) -> str | None:
    if isinstance(arguments[0], str) and len(arguments) > 3:  # create_container(image, name, config, labels)
        return str(arguments[3]["gantry.container_name"])
    return str(engine.find_container(arguments[0]).labels["gantry.container_name"])


# -- wrapping ----------------------------------------------------------------------------------


def _stage_runs(module: ModuleType) -> None:
    run = module.StageRun.run

    async def told(self: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
        arrive(f"before {operation.name}", _of_flow)
        result = await run(self, operation, *args, **kwargs)
        arrive(f"after {operation.name}", _of_flow)
        return result

    module.StageRun.run = told


def _records(module: ModuleType) -> None:
    advance = module.Records.advance

    async def told(self: Any, workflow_id: str, source: Any, target: Any, *a: Any, **k: Any) -> Any:
        arrive(f"before record {target}", _of_flow)
        result = await advance(self, workflow_id, source, target, *a, **k)
        arrive(f"after record {target}", _of_flow)
        return result

    module.Records.advance = told


def _locks(module: ModuleType) -> None:
    alone = module.alone

    def told(records: Any, container_name: str, *args: Any, **kwargs: Any) -> Any:
        arrive("before lock", lambda: container_name)
        return alone(records, container_name, *args, **kwargs)

    setattr(module, "alone", told)  # noqa: B010 - mypy knows no such attribute


def _uploads(module: ModuleType) -> None:
    client = module.ReceiverClient
    send_chunk = client.send_chunk

    async def told(self: Any, deployment_id: str, offset: int, *rest: Any) -> Any:
        if offset > 0:
            arrive("mid upload_package", _of_flow)
        return await send_chunk(self, deployment_id, offset, *rest)

    client.send_chunk = told


def _streams(module: Any) -> None:
    send = module.send

    async def in_parts(receiver: Any, deployment_id: str, source: Any, **options: Any) -> Any:
        read = source.read

        async def read_little_first(offset: int, size_bytes: int) -> Any:
            return await read(offset, size_bytes if offset else min(size_bytes, _FIRST_CHUNK_BYTES))

        if armed_at("mid upload_package"):
            source.read = read_little_first
        return await send(receiver, deployment_id, source, **options)

    setattr(module, "send", in_parts)  # noqa: B010 - mypy knows no such attribute


def _operations(module: ModuleType) -> None:
    for name in (
        *("deploy_container", "stop_existing_container", "start_container"),
        *("check_container_status", "validate_health_endpoint", "verify_service_registration"),
    ):
        setattr(module.Operations, name, _told_operation(name, getattr(module.Operations, name)))


def _rolling(module: ModuleType) -> None:
    for name in ("switch_traffic", "drain_existing_container", "stop_existing_container"):
        steps = module.RollingOperations
        setattr(steps, name, _told_operation(name, getattr(steps, name)))


def _proxies(module: ModuleType) -> None:
    set_route = module.Proxy.set_route

    def told(self: Any, route: Any) -> None:
        arrive("before proxy set_route", lambda: str(route.service))
        set_route(self, route)
        arrive("after proxy set_route", lambda: str(route.service))

    module.Proxy.set_route = told


def _told_operation(name: str, operation: Any) -> Any:
    async def told(self: Any, *args: Any) -> Any:
        def container() -> str:
            return str(self.entry.request.container_name)

        arrive(f"before {name}", container)
        result = await operation(self, *args)
        arrive(f"after {name}", container)
        return result

    return told


def _ledgers(module: ModuleType) -> None:
    move = module.Ledger.move

    def told(self: Any, deployment_id: str, to_state: Any, **news: Any) -> Any:
        arrive(f"before journal {to_state}", lambda: _of_ledger(self, deployment_id))
        entry = move(self, deployment_id, to_state, **news)
        arrive(f"after journal {to_state}", lambda: _of_ledger(self, deployment_id))
        return entry

    module.Ledger.move = told


def _engines(module: ModuleType) -> None:
    for name in ("create_container", "set_restart_policy", "stop", "rename", "start"):
        setattr(module.Engine, name, _told_call(name, getattr(module.Engine, name)))


def _told_call(name: str, call: Any) -> Any:
    def told(self: Any, *args: Any) -> Any:
        _times[name] = _times.get(name, 0) + 1
        # Counted in flow runs alone: each of them is the process of one deployment.
        again = _times[name] > 1 and "PREFECT__FLOW_RUN_ID" in os.environ
        what = f"engine {name}{' again' if again else ''}"
        arrive(f"before {what}", lambda: _of_engine(self, args))
        result = call(self, *args)
        arrive(f"after {what}", lambda: _of_engine(self, args))
        return result

    return told


_WRAPPERS: dict[str, Callable[[ModuleType], None]] = {
    "tasks.stage": _stage_runs,
    "tasks.records": _records,
    "tasks.active": _locks,
    "blocks.receiver_client": _uploads,
    "blocks.package_stream": _streams,
    "receiver.operations": _operations,
    "receiver.rolling": _rolling,
    "receiver.proxy": _proxies,
    "receiver.ledger": _ledgers,
    "receiver.engine": _engines,
}


class _Finder:
    """Finds the modules that are wrapped, and wraps them once they are executed."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _: object = None) -> Any:
        """The ordinary spec with a loader that wraps; None for any other module."""
        wrap = _WRAPPERS.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if wrap else None
        if spec is None or spec.loader is None or wrap is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            wrap(module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Wrap from now on what this process imports."""
    sys.meta_path.insert(0, _Finder)
