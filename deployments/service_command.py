"""`python -m deployments.service_files`: check, schema, register."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path

import httpx

from deployments.service_files import ServiceFile
from deployments.service_folder import FOLDER, ServicesRefused, read_folder

SCHEMA = "schema.json"


def schema_text() -> str:
    """The JSON schema of a service file, as it is committed."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ServiceFile.model_json_schema(),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def check(folder: Path) -> None:
    """Print the Prefect deployments that the folder gives; raises `ServicesRefused`."""
    for service in read_folder(folder):
        for name, host in service.targets.items():
            print(f"{service.path}: deploy-container/{name} to {host}")


def write_schema(folder: Path) -> None:
    """Write `schema.json` beside the service files."""
    (folder / SCHEMA).write_text(schema_text())
    print(folder / SCHEMA)


def register(folder: Path) -> None:
    """Register the folder with the server of `PREFECT_API_URL`."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    from deployments.service_registry import register_folder

    try:
        asyncio.run(register_folder(folder, Path.cwd()))
    except httpx.TransportError as exc:
        url = os.environ.get("PREFECT_API_URL", "its default address")
        raise SystemExit(f"no Prefect server answers at {url} ({exc}); set PREFECT_API_URL") from exc


def main(arguments: Sequence[str]) -> int:
    """Do what is asked for; 1 when a service file has a mistake."""
    parser = argparse.ArgumentParser(prog="python -m deployments.service_files", description=__doc__)
    actions = {"check": check, "schema": write_schema, "register": register}
    parser.add_argument("action", choices=actions)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the service files")
    options = parser.parse_args(arguments)
    try:
        actions[options.action](options.folder)
    except ServicesRefused as exc:
        print(exc)
        return 1
    return 0
