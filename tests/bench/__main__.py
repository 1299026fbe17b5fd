"""Measure, on hosts of a lab's own; each measurement is kept, and the README's tables are made of them.

python -m tests.bench run [latency | fleet | rolling | transfer ...] [--rounds N]
python -m tests.bench run transfer [--image-bytes N] [--link bare,1g,100m] [--only ours,zstd] [--afresh]
python -m tests.bench readme
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import readme
from tests.bench import fleet, latency, rolling, transfer
from tests.bench.links import LINKS

RESULTS = Path(__file__).with_name("results")


def _latency(options: argparse.Namespace) -> str:
    return latency.table(latency.measure(options.rounds))


def _rolling(options: argparse.Namespace) -> str:
    return rolling.table(rolling.measure(options.rounds))


def _transfer(options: argparse.Namespace) -> str:
    plan = transfer.Plan(
        results=options.results / "transfer.jsonl",
        image_bytes=options.image_bytes,
        rounds=options.rounds,
        ways=options.only,
        links=options.link,
        afresh=options.afresh,
    )
    return transfer.measure(plan)


def _fleet(options: argparse.Namespace) -> str:
    return fleet.table(fleet.measure(options.rounds))


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "latency": _latency,
    "fleet": _fleet,
    "rolling": _rolling,
    "transfer": _transfer,
}


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m tests.bench`."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["run", "readme"])
    parser.add_argument("names", nargs="*", help=f"which, by default all: {', '.join(MEASUREMENTS)}")
    parser.add_argument(
        "--rounds", "--runs", type=_positive, default=5, help="repetitions, of which medians are told (5)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that keeps what was measured")
    group = parser.add_argument_group("transfer")
    group.add_argument(
        "--image-bytes", type=_positive, default=transfer.IMAGE_BYTES, help="of the large image"
    )
    for name, choices in (("link", tuple(LINKS)), ("only", transfer.NAMES)):
        told = f"comma-separated, by default all: {', '.join(choices)}"
        group.add_argument(f"--{name}", type=_some_of(choices), default=choices, help=told)
    group.add_argument("--afresh", action="store_true", help="measure again what is kept already")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1")
    return int(text)


def _some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def chosen(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(choices):
            told = ", ".join(sorted(unknown))
            raise argparse.ArgumentTypeError(f"{told!r}: choose of {', '.join(choices)}")
        return names

    return chosen


def run(names: Sequence[str], options: argparse.Namespace) -> int:
    """Measure, print each table and keep it."""
    options.results.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"measuring {name}", flush=True)
        table = MEASUREMENTS[name](options)
        (options.results / f"{name}.md").write_text(table)
        print(table, flush=True)
    return 0


def _run_until_interrupted(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # disks and networks are given back
    try:
        return run(options.names or list(MEASUREMENTS), options)
    except KeyboardInterrupt:
        print("ended; transfers that were measured are kept", file=sys.stderr)
        return 130


def measured() -> list[str]:
    """Those that have a result to show."""
    return [name for name in MEASUREMENTS if (RESULTS / f"{name}.md").exists()]


def kept(name: str) -> str:
    """The table that was measured last."""
    return (RESULTS / f"{name}.md").read_text()


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    options = parser().parse_args(arguments)
    if unknown := set(options.names) - set(MEASUREMENTS):
        parser().error(
            f"{', '.join(sorted(unknown))}: not measured here; choose of {', '.join(MEASUREMENTS)}"
        )
    if options.action == "run":
        return _run_until_interrupted(options)
    for name in measured():
        readme.replace(f"bench {name}", kept(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
