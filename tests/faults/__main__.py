"""The fault matrix by hand: cells whose result is in the file are not run again.

python -m tests.faults run [--afresh | --again] [--only FAULT[:POINT]] [--lanes N] [--result FILE]
python -m tests.faults table | readme [--result FILE]
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import readme
from tests.faults import cells as matrix
from tests.faults import results
from tests.faults.cells import Cell
from tests.faults.results import Result
from tests.faults.running import run_cells
from tests.faults.site import HOSTS, open_site

RESULTS = Path(__file__).with_name("results.jsonl")
README_PART = "faults"


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m tests.faults`."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["run", "table", "readme"])
    parser.add_argument(
        "--only", metavar="FAULT[:POINT]", action="append", help="these cells; more than once"
    )
    parser.add_argument("--lanes", type=int, default=4, help="deployments at once on each host (4)")
    parser.add_argument("--hosts", type=int, default=len(HOSTS), choices=[1, 2], help="hosts at once (2)")
    parser.add_argument("--result", type=Path, default=RESULTS, help="results, a line for each cell")
    parser.add_argument("--again", action="store_true", help="also run cells that violated the invariant")
    parser.add_argument("--afresh", action="store_true", help="forget all results first")
    parser.add_argument(
        "--follow-up", action="store_true", help="deploy once more after each cell, not only with the next"
    )
    parser.add_argument("--representative", action="store_true", help="the cells of the test suite alone")
    return parser


def wanted(options: argparse.Namespace) -> list[Cell]:
    """The cells that the arguments name and whose results are not there."""
    cells = matrix.representative() if options.representative else matrix.full()
    if options.only:
        cells = [cell for cell in cells if any(_matches(cell, only) for only in options.only)]
    done = results.load(options.result)
    kept = {name for name, result in done.items() if not (result.violations and options.again)}
    return [cell for cell in cells if str(cell) not in kept]


def _matches(cell: Cell, only: str) -> bool:
    fault, _, point = only.partition(":")
    return cell.fault.name == fault and point in {"", cell.point.name}


def run(options: argparse.Namespace) -> int:
    """Run what is wanted, print the table; 1 when a cell violates the invariant."""
    if options.afresh:
        options.result.unlink(missing_ok=True)
    cells, told = wanted(options), 0
    print(f"{len(cells)} cells to run; results in {options.result}", flush=True)

    def tell(result: Result) -> None:
        nonlocal told
        told += 1
        results.append(options.result, result)
        figures = f"{result.took_seconds:.0f} s, silent {result.silent_seconds:.1f} s"
        print(
            f"[{told}/{len(cells)}] {result.cell}: {result.serving}, {figures}: {result.verdict}", flush=True
        )

    if cells:
        with open_site(options.lanes, HOSTS[: options.hosts]) as site:
            for is_fine in (False, True):  # operations and journalled steps, then the calls within them
                part = [cell for cell in cells if cell.point.is_fine is is_fine]
                run_cells(site, part, tell, follow_up=options.follow_up)
        results.tidy(options.result)
    return show(options)


def show(options: argparse.Namespace) -> int:
    """Print the table; 1 when a cell violates the invariant."""
    found = list(results.load(options.result).values())
    print(results.table(found))
    violating = sum(bool(result.violations) for result in found)
    print(f"{len(found)} of {len(matrix.full())} cells, {violating} violate the invariant")
    return 1 if violating else 0


def write_readme(options: argparse.Namespace) -> int:
    """Put the summary between the README's two marks."""
    readme.replace(README_PART, summary(options.result))
    return 0


def summary(result: Path) -> str:
    """What the README says of a file of results."""
    found = results.load(result)
    return f"{results.summary(found.values(), len(matrix.full()))}\n"


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was set up is taken away
    return {"run": run, "table": show, "readme": write_readme}[options.action](options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
