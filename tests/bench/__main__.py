"""Measure, on hosts of a lab's own; each measurement is kept, and the README's tables are made of them.

python -m tests.bench run [latency fleet ...] [--runs N]
python -m tests.bench readme
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import readme
from tests.bench import fleet, latency

RESULTS = Path(__file__).with_name("results")


def _latency(runs: int) -> str:
    return latency.table(latency.measure(runs))


def _fleet(runs: int) -> str:
    return fleet.table(fleet.measure(runs))


MEASUREMENTS: dict[str, Callable[[int], str]] = {"latency": _latency, "fleet": _fleet}


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m tests.bench`."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["run", "readme"])
    parser.add_argument("names", nargs="*", help=f"which, by default all: {', '.join(MEASUREMENTS)}")
    parser.add_argument("--runs", type=int, default=5, help="repetitions, of which medians are told (5)")
    return parser


def run(names: Sequence[str], runs: int) -> int:
    """Measure, print each table and keep it."""
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        print(f"measuring {name}", flush=True)
        table = MEASUREMENTS[name](runs)
        (RESULTS / f"{name}.md").write_text(table)
        print(table, flush=True)
    return 0


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
        return run(options.names or list(MEASUREMENTS), options.runs)
    for name in measured():
        readme.replace(f"bench {name}", kept(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
