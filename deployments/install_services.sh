#!/bin/sh
# Installs what the lab, the demo and the tests need on Debian or Ubuntu: Docker Engine, network tools,
# PostgreSQL, Java and Maven (for Kafka), Prometheus, Chromium, an SSH server, rsync and HAProxy. Says what it will do
# before it does it, and does nothing that is not needed; run it again at will. The tests also get a newer Docker
# Engine, unpacked into a cache folder beside the installed one: see lab_newer_engine.sh.
#
#   deployments/install_services.sh [--for demo|test|bench] [--start-docker | --stop-docker]
#
# --for demo      leave out what only the tests need (PostgreSQL, Java, Maven, Prometheus, Chromium, SSH, rsync, HAProxy).
# --for bench     with what the benchmark compares with and measures by (docker-registry, zstd, wrk), which no test needs.
# --start-docker  also start the Docker Engine when none answers.
# --stop-docker   only stop the Docker Engine that --start-docker started itself.
set -eu

PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
LOG=${GANTRY_DOCKERD_LOG:-/var/log/gantry-dockerd.log}
PIDFILE=${GANTRY_DOCKERD_PIDFILE:-/run/gantry-dockerd.pid}
WAIT_SECONDS=60
purpose=test
action=install

has() { command -v "$1" >/dev/null 2>&1; }

has_static_busybox() { [ -x /bin/busybox ] && ! ldd /bin/busybox >/dev/null 2>&1; }

has_postgresql() { ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; }

has_venv() { python3 -c 'import ensurepip, venv' >/dev/null 2>&1; }

engine_answers() { docker info >/dev/null 2>&1; }

# Ubuntu has Chromium as a snap only, which no namespace can start: there the test of the UI is skipped.
has_browser() { { has chromium && has chromedriver; } || grep -q '^ID=ubuntu' /etc/os-release; }

# PostgreSQL; Java and Maven for a real Kafka; Prometheus with promtool; clocks that are off; Chromium; rsync over SSH.
missing_for_tests() {
    has_postgresql || echo postgresql
    has java || echo default-jre-headless
    has mvn || echo maven
    { has prometheus && has promtool; } || echo prometheus
    ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || echo libfaketime
    has_browser || echo chromium chromium-driver
    has sshd || echo openssh-server
    { has rsync && has ssh; } || echo rsync openssh-client
    has haproxy || echo haproxy
}

missing_for_bench() {
    has docker-registry || echo docker-registry
    has zstd || echo zstd
    has wrk || echo wrk
}

missing_packages() {
    { has dockerd && has containerd && has docker; } || engine_answers || echo docker.io
    has iptables || echo iptables
    has ip || echo iproute2
    { has nsenter && has setsid; } || echo util-linux
    has_static_busybox || echo busybox-static
    [ "$purpose" = demo ] || missing_for_tests
    [ "$purpose" != bench ] || missing_for_bench
    has_venv || echo python3-venv
    has curl || echo curl
}

# Fails when a person has to do it: not root, or not a machine with apt-get.
can_install() { [ "$(id -u)" -eq 0 ] && has apt-get; }

install_packages() {
    packages=$(missing_packages | tr '\n' ' ')
    if [ -z "$packages" ]; then
        return
    elif can_install; then
        echo "Installing: $packages"
        apt-get update -q
        # shellcheck disable=SC2086  # one word per package
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages
    else
        echo "Missing (Debian's package names): $packages"
        echo "Install them, for example as root with:"
        echo "  apt-get update && apt-get install -y --no-install-recommends $packages"
    fi
}

# Not in the way of the rest: the tests that need it say that it is missing.
fetch_newer_engine() {
    [ "$purpose" != test ] || sh "$(dirname "$0")/lab_newer_engine.sh" || true
}

wait_for_engine() {
    waited=0
    until engine_answers; do
        [ "$waited" -lt "$1" ] || return 1
        sleep 1
        waited=$((waited + 1))
    done
}

# policy-rc.d or a missing systemd may keep the service from starting; dockerd by itself always can.
start_docker() {
    if engine_answers; then
        return
    fi
    if [ "$(id -u)" -ne 0 ] || ! has dockerd; then
        echo "No Docker Engine answers. Start it as root, for example with:"
        echo "  deployments/install_services.sh --start-docker"
        return
    fi
    if [ -d /run/systemd/system ] && systemctl start docker && wait_for_engine 10; then
        echo "Started the service docker."
        return
    fi
    echo "Starting dockerd; its log is $LOG"
    setsid dockerd >>"$LOG" 2>&1 </dev/null &
    echo "$!" >"$PIDFILE"
    if ! wait_for_engine "$WAIT_SECONDS"; then
        echo "dockerd does not answer after $WAIT_SECONDS s; the end of its log:" >&2
        tail -n 20 "$LOG" >&2
        exit 1
    fi
    echo "The Docker Engine answers (process $!)."
}

# Only the dockerd that start_docker wrote down, and only while that process is a dockerd.
stop_docker() {
    [ -w "$PIDFILE" ] || return 0  # none was started, or by another user
    pid=$(cat "$PIDFILE")
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
        echo "Stopping the Docker Engine that was started for the demo (process $pid)."
        kill "$pid"
        waited=0
        while [ -d "/proc/$pid" ] && [ "$waited" -lt 20 ]; do
            sleep 1
            waited=$((waited + 1))
        done
    fi
    rm -f "$PIDFILE"
}

usage() {
    echo "usage: deployments/install_services.sh [--for demo|test|bench] [--start-docker | --stop-docker]" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
    --for)
        purpose=${2:-}
        case "$purpose" in demo | test | bench) ;; *) usage ;; esac
        shift
        ;;
    --start-docker) action=start ;;
    --stop-docker) action=stop ;;
    *) usage ;;
    esac
    shift
done

case "$action" in
install)
    install_packages
    fetch_newer_engine
    ;;
start)
    install_packages
    start_docker
    ;;
stop) stop_docker ;;
esac
