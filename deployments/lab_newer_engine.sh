#!/bin/sh
# Unpacks the Docker Engine and containerd of Debian trixie into a cache folder, for labs whose nodes run a newer engine
# than the machine's (Lab(engines=...)). Installs nothing and leaves the machine's apt as it is: the packages come by
# a configuration of their own from the mirror that the machine uses, signed by Debian. Does nothing when they are there.
#
#   deployments/lab_newer_engine.sh
#
# runc is the machine's: trixie's needs a newer C library than bookworm has.
set -eu

SUITE=trixie
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
ROOT=${XDG_CACHE_HOME:-$HOME/.cache}/gantry/docker-$SUITE

is_there() { [ -x "$ROOT/usr/sbin/dockerd" ] && [ -x "$ROOT/usr/bin/containerd" ]; }

give_up() {
    echo "No newer Docker Engine for the tests: $1." >&2
    echo "The tests of the containerd image store need it; try again: deployments/lab_newer_engine.sh" >&2
    exit 1
}

# Where the machine gets its own release from, without its security updates and such.
mirrors() {
    release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    apt-get update --print-uris | sed -n "s#^'\(.*\)/dists/$release/InRelease'.*#\1#p"
}

configure_apt() {
    mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/none"
    chown _apt "$work/archives" 2>/dev/null || true  # as root apt downloads as this user
    : >"$work/status"
    {
        echo "Types: deb"
        echo "URIs: $1"
        echo "Suites: $SUITE"
        echo "Components: main"
        echo "Architectures: $(dpkg --print-architecture)"
        echo "Targets: Packages"
        echo "Signed-By: $KEYRING"
    } >"$work/mirror.sources"
    cat >"$work/apt.conf" <<EOF
Dir::Etc::sourcelist "$work/mirror.sources";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "$work/none";
Dir::State::lists "$work/lists";
Dir::State::status "$work/status";
Dir::Cache "$work";
Acquire::AllowInsecureRepositories "false";
APT::Get::AllowUnauthenticated "false";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
EOF
}

download() {
    for mirror in $(mirrors); do
        configure_apt "$mirror"
        if apt-get -c "$work/apt.conf" update -q=2 --error-on=any &&
            (cd "$work/archives" && apt-get -c "$work/apt.conf" download -q=2 docker.io containerd); then
            return
        fi
    done
    return 1
}

fetch() {
    echo "Fetching the Docker Engine of Debian $SUITE into $ROOT"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    download || give_up "Debian $SUITE could not be fetched"
    mkdir -p "$(dirname "$ROOT")"
    fresh=$(mktemp -d "$ROOT.XXXXXX")
    for package in "$work"/archives/*.deb; do
        dpkg -x "$package" "$fresh"
    done
    rm -rf "$ROOT"
    mv "$fresh" "$ROOT"
}

is_there && exit 0
{ command -v apt-get && command -v dpkg; } >/dev/null || give_up "this machine has no apt-get"
[ -e "$KEYRING" ] || give_up "Debian's keys are missing (apt-get install debian-archive-keyring)"
fetch
