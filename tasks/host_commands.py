"""What is run on a host while it is set up: scripts with their arguments. Pure; `tasks.ssh` runs them.

Each script may be run twice. None is given a secret: those come by standard input.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from receiver.contract import LABEL_CONTAINER
from tasks import host_probe
from tasks.host_facts import HostFacts, Marker
from tasks.provisioning import SERVICES, Layout
from tasks.ssh import Command
from tasks.wheelhouse import EXTRAS

PROBE = Path(host_probe.__file__)

WHO_AM_I = Command('id -u; printf "%s\\n" "${SSH_CONNECTION-}"')
SUDO_WORKS = Command("sudo -n true")

_FIND_PYTHON = """
found=
fits='import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
for python in "$@"; do
    path=$(command -v "$python") || continue
    found="$found $path"
    "$path" -c "$fits" 2>/dev/null || continue
    (cd / && runuser -u nobody -- "$path" -c '' 2>/dev/null) || continue
    "$path" -c 'import os, sys; print(os.path.realpath(sys.executable))'
    exit
done
echo "none of:${found:- (nothing found)}" >&2
exit 4
"""
_PYTHONS = (
    *(f"python{version}" for version in ("3.13", "3.12", "3.11")),
    *(f"/usr/bin/python{version}" for version in ("3.13", "3.12", "3.11")),
    *(f"/usr/local/bin/python{version}" for version in ("3.13", "3.12", "3.11")),
    "python3",
    "/usr/bin/python3",
)


def find_python(wanted: str | None) -> Command:
    """Prints the path of a Python 3.11 to 3.13 that other users may run, too."""
    return Command(_FIND_PYTHON, (wanted,) if wanted else _PYTHONS)


def probe(python: str, *arguments: str) -> Command:
    """Runs `host_probe`, which comes by standard input."""
    return Command('python=$1; shift; exec "$python" -I - "$@"', (python, *arguments))


def remove_containers(python: str, docker_host: str) -> Command:
    """Removes what was deployed to this engine; prints the names as JSON."""
    return probe(python, "remove-containers", docker_host, LABEL_CONTAINER)


_PREPARE = """
prefix=$1 user=$2 group=$3 marker=$4 make_user=$5
umask 022
mkdir -p "$prefix"
printf '%s' "$marker" > "$prefix/.gantry-host"
[ "$make_user" = no ] || getent passwd "$user" >/dev/null ||
    useradd --system --user-group --no-create-home --home-dir "$prefix/home" --shell /usr/sbin/nologin "$user"
[ -z "$group" ] || usermod --append --groups "$(getent group "$group" | cut -d: -f1)" "$user"
mkdir -p "$prefix/releases" "$prefix/wheelhouse"
for own in home state log run tmp; do
    mkdir -p "$prefix/$own"
    chmod 700 "$prefix/$own"
    chown "$user:" "$prefix/$own"
done
"""


def prepare(layout: Layout, marker: Marker, engine_group: int | None) -> Command:
    """Makes the user, a member of the engine's group, and the folders."""
    group = "" if engine_group is None else str(engine_group)
    make_user = "yes" if marker.made_user else "no"
    return Command(_PREPARE, (layout.prefix, layout.service_user, group, marker.model_dump_json(), make_user))


def unpack(layout: Layout) -> Command:
    """Takes wheels as a tar on standard input."""
    return Command('umask 022; tar -x -f - -C "$1"', (layout.at("wheelhouse"),))


def sent_before(layout: Layout) -> Command:
    """Prints digest and name of each file that was sent; `read_digests` reads them."""
    return Command('cd "$1" && find . -type f -exec sha256sum {} +', (layout.at("wheelhouse"),))


def read_digests(said: str) -> dict[str, str]:
    """Digest of each file by name, of what `sent_before` printed."""
    pairs = (line.split(maxsplit=1) for line in said.splitlines())
    return {name.removeprefix("*").removeprefix("./"): digest for digest, name in pairs}


_INSTALL = """
umask 022
release=$1 python=$2 wheels=$3 project=$4 installer=$5; shift 5
[ -e "$release/.complete" ] || {
    rm -rf "$release"
    if [ -n "$installer" ]; then
        "$python" -m venv --without-pip "$release"
        set -- "$wheels/$installer/pip" --isolated install --no-index --find-links "$wheels" "$@"
    else
        "$python" -m venv "$release"
        set -- -m pip install "$@"
    fi
    cd "$wheels"
    "$release/bin/python" "$@" --quiet --no-input --disable-pip-version-check --no-cache-dir \
        -c "$wheels/constraints.txt" "$wheels/$project" >&2
    touch "$release/.complete"
}
ln -sfn "$release" "$release/../../current.new"
mv -T "$release/../../current.new" "$release/../../current"
"""


def install(layout: Layout, release: str, python: str, manifest: Iterable[str], *, index: bool) -> Command:
    """Makes the release's virtual environment, unless it is whole, and lets `current` lead to it."""
    names = list(manifest)
    project = next(name for name in names if name.startswith("gantry_deploy-"))
    installer = "" if index else next(name for name in names if name.startswith("pip-"))
    place = layout.at("releases", release)
    extras = f"{project}[{','.join(EXTRAS)}]"
    return Command(_INSTALL, (place, python, layout.at("wheelhouse"), extras, installer))


_WRITE = """
path=$1 owner=$2 mode=$3
umask 077
cat > "$path.part"
chown "$owner:" "$path.part"
chmod "$mode" "$path.part"
mv "$path.part" "$path"
"""


def write(path: str, owner: str, mode: str) -> Command:
    """Takes a file on standard input; it is whole or the earlier one, and never readable by others before."""
    return Command(_WRITE, (path, owner, mode))


def read(path: str) -> Command:
    """Prints a file; nothing when there is none."""
    return Command('[ ! -f "$1" ] || cat "$1"', (path,))


# Deployments under way hold a lock each; new code waits for them, for five minutes at most.
_AWAIT_DEPLOYMENTS = """
for lock in "$state"/locks/*.lock; do
    [ ! -e "$lock" ] || flock --shared --timeout 300 "$lock" true || true
done
"""
_SYSTEMD = """
stamp=$1 prefix=$2; shift 2
state=$prefix/state
systemctl daemon-reload
systemctl enable --quiet "$@"
if [ "$(cat "$prefix/started" 2>/dev/null)" = "$stamp" ]; then
    systemctl start "$@"
else
    AWAIT_DEPLOYMENTS
    systemctl restart "$@"
    printf '%s' "$stamp" > "$prefix/started"
fi
for unit in "$@"; do systemctl show --property MainPID --value "$unit"; done
"""
_SUPERVISED = """
stamp=$1 prefix=$2 user=$3 python=$4
state=$prefix/state
command=start
if [ "$(cat "$prefix/started" 2>/dev/null)" != "$stamp" ]; then
    AWAIT_DEPLOYMENTS
    command=restart
fi
cd "$prefix/home"
runuser -u "$user" -- env -i PATH="$PATH" HOME="$prefix/home" LANG=C.UTF-8 \
    "$python" -m deployments.supervisor "$command" "$prefix" || {
    tail -n 15 "$prefix"/log/*.log >&2
    exit 1
}
printf '%s' "$stamp" > "$prefix/started"
"""


def start(layout: Layout, stamp: str, *, has_systemd: bool) -> Command:
    """Starts the services, again when they were started as something else; `read_pids` reads its words."""
    if has_systemd:
        script, rest = _SYSTEMD, tuple(layout.unit(service) for service in SERVICES)
    else:
        script, rest = _SUPERVISED, (layout.service_user, layout.python)
    whole = script.replace("AWAIT_DEPLOYMENTS", _AWAIT_DEPLOYMENTS.strip())
    return Command(whole, (stamp, layout.prefix, *rest))


def read_pids(said: str, *, has_systemd: bool) -> dict[str, int]:
    """Process id of each service, of what `start` printed."""
    if has_systemd:
        return dict(zip(SERVICES, map(int, said.split()), strict=True))
    return {service: facts["pid"] for service, facts in json.loads(said.splitlines()[-1]).items()}


_PRUNE = """
prefix=$1 release=$2; shift 2
for path in "$prefix"/releases/*; do [ "$path" = "$prefix/releases/$release" ] || rm -rf "$path"; done
cd "$prefix/wheelhouse"
for name in *; do
    keep=no
    for wanted in "$@"; do [ "$name" != "$wanted" ] || keep=yes; done
    [ "$keep" = yes ] || rm -f "$name"
done
"""


def prune(layout: Layout, release: str, manifest: Iterable[str]) -> Command:
    """Removes earlier releases and the wheels that only they needed."""
    return Command(_PRUNE, (layout.prefix, release, *manifest))


_REMOVE = """
prefix=$1 user=$2 made_user=$3 python=$4; shift 4
if [ -d /run/systemd/system ]; then
    for unit in "$@"; do
        systemctl disable --quiet --now "$unit" 2>/dev/null || true
        rm -f "/etc/systemd/system/$unit"
    done
    systemctl daemon-reload
elif [ -x "$python" ]; then
    (cd "$prefix/home" && runuser -u "$user" -- env -i PATH="$PATH" HOME="$prefix/home" \
        "$python" -m deployments.supervisor stop "$prefix" >/dev/null)
fi
for file in "$prefix"/*/proxy/haproxy.pid; do  # it outlives the receiver, which started it
    if [ -f "$file" ] && [ "$(cat "/proc/$(cat "$file")/comm" 2>/dev/null)" = haproxy ]; then
        kill "$(cat "$file")"
    fi
done
[ "$made_user" = no ] || ! getent passwd "$user" >/dev/null || {
    for _ in 1 2 3 4 5 6 7 8 9; do userdel "$user" 2>/dev/null && break || sleep 1; done
    ! getent passwd "$user" >/dev/null || userdel "$user"
}
rm -rf "$prefix"
"""


def remove(layout: Layout, marker: Marker) -> Command:
    """Ends the services and takes away units, user and folder."""
    units = tuple(layout.unit(service) for service in SERVICES)
    made_user = "yes" if marker.made_user else "no"
    return Command(_REMOVE, (layout.prefix, marker.service_user, made_user, layout.python, *units))


def tail_logs(layout: Layout, *, has_systemd: bool) -> Command:
    """Prints the services' last lines."""
    if has_systemd:
        units = [word for service in SERVICES for word in ("--unit", layout.unit(service))]
        return Command('journalctl --no-pager --lines 30 "$@"', tuple(units))
    return Command('tail -n 15 "$1"/log/*.log', (layout.prefix,))


def marker_of(name: str, port: int, layout: Layout, facts: HostFacts) -> Marker:
    """What the prefix is to say of itself; a user who was there before stays when all goes."""
    made = facts.marker.made_user if facts.marker else not facts.user_exists
    return Marker(name=name, port=port, service_user=layout.service_user, made_user=made)
