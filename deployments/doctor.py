"""See whether a deployment would meet trouble, and what mends it.

    python -m deployments.doctor [HOST ...] [--port 8080/tcp] [--json]

Without a host: all that are saved. Exit code 1 when a check fails, 0 when none does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from receiver.contract import DEFAULT_PORT
from tasks import checkup, verdicts
from tasks.parameters import RemoteHostName

_PORT: TypeAdapter[str] = TypeAdapter(checkup.WantedPort)
_HOST: TypeAdapter[str] = TypeAdapter(RemoteHostName)


def _port(text: str) -> str:
    try:
        return _PORT.validate_python(text)
    except ValidationError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as 8080/tcp or 53/udp") from exc


def _host(text: str) -> str:
    try:
        return _HOST.validate_python(text)
    except ValidationError as exc:
        message = str(exc.errors(include_input=False)[0]["msg"])
        raise argparse.ArgumentTypeError(message.removeprefix("Value error, ")) from exc


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m deployments.doctor`."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Environment: PREFECT_API_URL (the server), and what deployments use: HMAC_SECRET_KEY, "
        "GANTRY_HOME, DATABASE_URL, DOCKER_HOST, KAFKA_BOOTSTRAP_SERVERS.",
    )
    parser.add_argument("hosts", metavar="HOST", nargs="*", type=_host, help="a saved host, or an address")
    parser.add_argument(
        "--port", dest="ports", metavar="PORT", action="append", default=[], type=_port,
        help="a host port that a deployment wants, as 8080/tcp; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--receiver-port", type=int, default=DEFAULT_PORT, help="port of the receiver, when not the saved one"
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    return parser


async def main(arguments: Sequence[str]) -> int:
    """Examine, print, and return the exit code."""
    options = parser().parse_args(arguments)
    diagnoses = await checkup.check_up(options.hosts, options.ports, options.receiver_port)
    if options.json:
        print(json.dumps(verdicts.rows_of(diagnoses), indent=2))
    else:
        print("\n\n".join([*map(verdicts.render, diagnoses), verdicts.counts(diagnoses)]))
    return int(verdicts.has_failed(diagnoses))


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    sys.exit(asyncio.run(main(sys.argv[1:])))
