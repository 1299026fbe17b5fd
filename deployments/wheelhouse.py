"""Bring together what a host installs, for hosts and control hosts without a package index.

    python -m deployments.wheelhouse FOLDER --python 3.12.3 --machine x86_64 --libc glibc-2.36

Run where there is a package index; then `provision-host` with the parameter `wheelhouse`.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.store import home
from tasks.wheelhouse import Platform, WheelhouseFailed, make


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.wheelhouse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder that is made; must not exist yet")
    here = "this machine's"
    parser.add_argument(
        "--python", default=platform.python_version(), help=f"the host's Python (default: {here})"
    )
    parser.add_argument("--machine", default=platform.machine(), help=f"its architecture (default: {here})")
    parser.add_argument(
        "--libc", default="-".join(platform.libc_ver()), help=f"its C library and version (default: {here})"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Make the folder; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.folder.exists():
        _parser().error(f"{options.folder} is there already; name a new folder")
    try:
        shutil.copytree(make(home(), Platform(options.python, options.machine, options.libc)), options.folder)
    except WheelhouseFailed as exc:
        sys.stderr.write(f"{exc}. Next: {exc.next_step}\n")
        return 1
    sys.stdout.write(f"{options.folder}: {len(list(options.folder.iterdir()))} files\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
