"""Everything that a host installs, as wheels in one folder: for hosts without a package index.

The control host runs what hosts run, so the set is read from what is installed here; only markers such as
`python_full_version < "3.11.3"` are asked with the host's answers. Kept under `$GANTRY_HOME/wheelhouse`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tasks.errors import GantryError

EXTRAS = ("control", "receiver")
PACKAGES = ("flows", "tasks", "blocks", "receiver", "deployments")
_OLDEST_GLIBC, _OLDEST_MUSL = 17, 1
_SAID_CHARACTERS = 1500


class WheelhouseFailed(GantryError):
    """The packages for the host could not be brought together"""

    next_step = "See that this host reaches its package index, or give wheelhouse: a folder made elsewhere."


@dataclass(frozen=True)
class Platform:
    """What wheels have to fit: `python` as 3.11.2, `machine` as x86_64, `libc` as glibc-2.36 or musl-1.2."""

    python: str
    machine: str
    libc: str

    def tags(self) -> list[str]:
        """Platform tags that such a host installs, the newest first."""
        name, _, version = self.libc.partition("-")
        major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
        prefix, oldest = ("manylinux", _OLDEST_GLIBC) if name == "glibc" else ("musllinux", _OLDEST_MUSL)
        tags = [f"{prefix}_{major}_{number}_{self.machine}" for number in range(minor, oldest - 1, -1)]
        legacy = [f"manylinux2014_{self.machine}"] if name == "glibc" else []
        old = [f"manylinux{year}_x86_64" for year in ("2010", "1")] if self.machine == "x86_64" else []
        return [*tags, *legacy, *(old if name == "glibc" else []), f"linux_{self.machine}"]

    def markers(self) -> dict[str, str]:
        """The host's answers to environment markers."""
        return {
            "python_full_version": self.python,
            "python_version": ".".join(self.python.split(".")[:2]),
            "platform_machine": self.machine,
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }


@dataclass(frozen=True)
class Checkout:
    """The project's own sources, which the control host runs from."""

    folder: Path

    @property
    def constraints(self) -> Path:
        """The versions that are known to work together."""
        return self.folder / "constraints.txt"

    def requirements(self) -> list[Requirement]:
        """What the project needs with the extras of a host."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        named = [*project["dependencies"], *(r for e in EXTRAS for r in project["optional-dependencies"][e])]
        return [Requirement(text) for text in named]

    def pins(self) -> dict[str, str]:
        """Version of each package in constraints.txt, by normal name."""
        lines = (line.partition("#")[0].strip() for line in self.constraints.read_text().splitlines())
        pairs = (line.split("==") for line in lines if "==" in line)
        return {canonicalize_name(name): version for name, version in pairs}

    def digest(self) -> str:
        """SHA-256 over all that goes into the project's wheel."""
        whole = hashlib.sha256()
        for path in self._files():
            whole.update(f"{path.relative_to(self.folder)}\0".encode())
            whole.update(hashlib.sha256(path.read_bytes()).digest())
        return whole.hexdigest()

    def _files(self) -> Iterator[Path]:
        yield from (self.folder / name for name in ("README.md", "LICENSE", "pyproject.toml"))
        for package in PACKAGES:
            found = sorted((self.folder / package).rglob("*"))
            yield from (path for path in found if path.is_file() and "__pycache__" not in path.parts)


def find_checkout() -> Checkout:
    """The checkout that this code, or the working directory, belongs to; raises `WheelhouseFailed`."""
    for folder in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (folder / "pyproject.toml").is_file() and (folder / "constraints.txt").is_file():
            return Checkout(folder)
    raise WheelhouseFailed(
        f"there is no checkout of Gantry in {Path.cwd()}",
        next_step="Start the control worker in the checkout, or give wheelhouse: a folder with all wheels.",
    )


def needed(checkout: Checkout, markers: Mapping[str, str]) -> dict[str, str]:
    """Every package that a host needs with its version, as `==1.2`; the project itself left out.

    One that only the host needs is taken as its user asks for it, and as needing nothing itself.
    """
    pins, found = checkout.pins(), dict[str, str]()
    waiting, seen = list(checkout.requirements()), set[tuple[str, frozenset[str]]]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        installed = _distribution(name)
        version = pins.get(name) or (installed.version if installed else None)
        found[name] = f"=={version}" if version else str(requirement.specifier)
        waiting += _wanted(installed, requirement.extras, markers)
    return found


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None  # a marker that is false here and true on the host


def _wanted(
    installed: metadata.Distribution | None, extras: set[str], markers: Mapping[str, str]
) -> Iterator[Requirement]:
    """The requirements of a package that count on the host."""
    for text in (installed.requires if installed else None) or []:
        requirement = Requirement(text)
        asked = [{**markers, "extra": extra} for extra in (*extras, "")]
        if requirement.marker is None or any(requirement.marker.evaluate(each) for each in asked):
            yield requirement


def make(home: Path, host: Platform) -> Path:
    """A folder with all wheels for such a host and constraints.txt; made when it is not kept yet."""
    checkout = find_checkout()
    packages = {**needed(checkout, host.markers()), "pip": f"=={metadata.version('pip')}"}
    pins = "".join(f"{name}{version}\n" for name, version in sorted(packages.items()))
    shared = home / "wheelhouse" / f"packages-{_key(pins, str(asdict(host)))}"
    _fill(shared, lambda folder: _download(folder, pins, host))
    whole = home / "wheelhouse" / f"gantry-{_key(shared.name, checkout.digest())}"
    _fill(whole, lambda folder: _assemble(folder, checkout, shared))
    return whole


def make_own(home: Path) -> Path:
    """A folder with the project's wheel and constraints.txt alone, for hosts that have a package index."""
    checkout = find_checkout()
    folder = home / "wheelhouse" / f"own-{_key(checkout.digest())}"
    _fill(folder, lambda part: _assemble(part, checkout))
    return folder


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is whole or not there, also when two runs make it at once; once is enough."""
    if folder.is_dir():
        return
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / "part"
        part.mkdir()
        fill(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _download(folder: Path, pins: str, host: Platform) -> None:
    (folder / "requirements.txt").write_text(pins)
    platforms = [word for tag in host.tags() for word in ("--platform", tag)]
    version = host.markers()["python_version"]
    _pip(
        *("download", "--no-deps", "--only-binary", ":all:", "--implementation", "cp"),
        *("--python-version", version, *platforms, "--dest", str(folder)),
        *("-r", str(folder / "requirements.txt")),
    )
    (folder / "requirements.txt").unlink()


def _assemble(folder: Path, checkout: Checkout, shared: Path | None = None) -> None:
    for wheel in shared.iterdir() if shared else ():
        os.link(wheel, folder / wheel.name)
    shutil.copy(checkout.constraints, folder)
    constrained = {"PIP_CONSTRAINT": str(checkout.constraints)}  # reaches the build's own environment, too
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(checkout.folder), env=constrained)


def _pip(*arguments: str, env: Mapping[str, str] | None = None) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        *arguments,
    ]
    done = subprocess.run(
        command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise WheelhouseFailed(f"pip {arguments[0]}: {done.stderr.strip()[-_SAID_CHARACTERS:]}")


def manifest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a wheelhouse, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
