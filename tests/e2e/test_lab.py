"""The lab itself: real hosts that come up in seconds, are apart from each other, and leave nothing."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TypeVar

import docker
import pytest

from deployments import lab_clocks
from deployments.lab import Host, Lab, LabImpossible, LabNotReady
from deployments.lab_http import NAMESPACES
from deployments.lab_teardown import end_process, start_time, tear_down
from receiver.engine_store import has_containerd_store
from tests.services import containerd_store, require_service

pytestmark = pytest.mark.usefixtures("lab_possible")

PROJECT = Path(__file__).resolve().parents[2]
PORT = 8080
T = TypeVar("T")
OWNER = """
import signal
from deployments.lab import Lab
from tests.e2e.test_lab import serve
lab = Lab(prefect=False, receiver=False)
lab.up()
serve(lab.hosts["host-a"], "owned")
lab.hosts["host-a"].spawn("sleeper", "setsid", "--fork", "sleep", "600")
print(lab.lab_id, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def bare() -> Iterator[Lab]:
    """A lab without Prefect and receiver, which is up in half a second."""
    with Lab(prefect=False, receiver=False, live_restore=True) as lab:
        yield lab


@pytest.fixture
def host(bare: Lab) -> Iterator[Host]:
    """Its host, without containers and with a whole network."""
    host = bare.hosts["host-a"]
    yield host
    host.heal_network()
    with_client(host, remove_containers)


def traces(lab_id: str) -> list[str]:
    """Everything on this machine that bears the name of the lab."""
    found = [str(path) for path in (*NAMESPACES.glob(f"*{lab_id}*"), *Path(gettempdir()).glob(f"*{lab_id}*"))]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if lab_id in line]
    # Other groups come and go meanwhile: a walk passes over what is gone, a glob would raise.
    found += [folder for folder, _, _ in os.walk("/sys/fs/cgroup") if lab_id in folder]
    found += [path.name for path in Path("/sys/class/net").glob(f"g{lab_id}*")]
    return found + [line for line in map(command_line, Path("/proc").glob("[0-9]*")) if lab_id in line]


def program_of(process: Path) -> Path:
    """The file that a process runs; an empty path for one that has ended."""
    try:
        return process.joinpath("exe").readlink()
    except (FileNotFoundError, ProcessLookupError):
        return Path()


def command_line(process: Path) -> str:
    """How a process was called and its control groups; empty for one that has ended (a zombie too)."""
    if start_time(int(process.name)) is None:
        return ""
    try:
        return process.joinpath("cmdline").read_text() + process.joinpath("cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(fact: Callable[[], bool], deadline_seconds: float = 60) -> None:
    """Wait until `fact()` holds; fail at the deadline."""
    deadline = time.monotonic() + deadline_seconds
    while not fact():
        assert time.monotonic() < deadline, "deadline passed"
        time.sleep(0.05)


def with_client(host: Host, act: Callable[[docker.DockerClient], T]) -> T:
    """Let `act` use a client of the host's engine."""
    client = host.docker()
    try:
        return act(client)
    finally:
        client.close()


def remove_containers(client: docker.DockerClient) -> None:
    """Remove every container."""
    for container in client.containers.list(all=True):
        container.remove(force=True)


def build_context(page: str) -> io.BytesIO:
    """A build context: a static busybox that serves one page."""
    dockerfile = (
        "FROM scratch\nCOPY busybox /bin/busybox\nCOPY index.html /www/index.html\n"
        f'CMD ["/bin/busybox", "httpd", "-f", "-p", "{PORT}", "-h", "/www"]\n'
    )
    files = {
        "Dockerfile": dockerfile.encode(),
        "index.html": page.encode(),
        "busybox": Path("/bin/busybox").read_bytes(),
    }
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    context.seek(0)
    return context


def serve(host: Host, page: str) -> None:
    """Build an image in the host's engine and run it with a published port."""

    def act(client: docker.DockerClient) -> None:
        client.images.build(fileobj=build_context(page), custom_context=True, tag="page:test", rm=True)
        client.containers.run(
            "page:test", detach=True, name="page", ports={str(PORT): PORT}, restart_policy={"Name": "always"}
        )

    with_client(host, act)


def page_from(lab: Lab, timeout: float = 5) -> str:
    """What the control side of `lab` reads from its host's published port."""
    return lab.control.get(f"http://{lab.hosts['host-a'].address}:{PORT}/", timeout=timeout).text


def serves(lab: Lab, page: str) -> bool:
    """True when the host answers with `page`."""
    try:
        return page_from(lab, timeout=1) == page
    except OSError:
        return False


def test_a_lab_comes_up_and_goes_without_a_trace() -> None:
    """After `down` there is no namespace, link, process, mount, control group or folder of the lab."""
    with Lab(prefect=False, receiver=False) as lab:
        serve(lab.hosts["host-a"], "hello")
        wait_for(lambda: serves(lab, "hello"))
        assert traces(lab.lab_id)
    wait_for(lambda: traces(lab.lab_id) == [], deadline_seconds=3)


def test_a_node_runs_the_engine_that_it_was_given_and_that_goes_without_a_trace() -> None:
    """Its own dockerd, containerd and shim, with its own image store."""
    choice = containerd_store()
    assert choice.root is not None
    with Lab(prefect=False, receiver=False, engines={"host-a": choice}) as lab:
        host = lab.hosts["host-a"]
        serve(host, "hello")
        wait_for(lambda: serves(lab, "hello"))
        own = [path for path in Path("/proc").glob("[0-9]*") if lab.lab_id in command_line(path)]
        mine = {program.name for program in map(program_of, own) if program.is_relative_to(choice.root)}
        assert mine == {"containerd", "containerd-shim-runc-v2", "docker-proxy", "dockerd"}
        assert has_containerd_store(with_client(host, docker.DockerClient.info))
        sockets = [
            Path(path.read_text().removeprefix("unix://")) for path in host.folder.glob("run/*/*/*/address")
        ]
        assert [path for path in sockets if path.exists()]
    wait_for(lambda: traces(lab.lab_id) == [], deadline_seconds=3)
    assert not [path for path in sockets if path.exists()]


def test_a_lab_has_a_prefect_server_workers_and_a_receiver(lab: Lab) -> None:
    """The session's lab answers on all of its services, from the right sides."""
    host = lab.hosts["host-a"]
    assert host.get(f"{host.environment['PREFECT_API_URL']}/health").status == 200
    assert lab.control.get(f"{host.receiver_url}/health").json()["docker_connected"] is True
    sides = [
        *((lab.control, name) for name in ("containerd", "dockerd", "server", "worker")),
        *((host, name) for name in ("containerd", "dockerd", "receiver", "worker")),
    ]
    for side, name in sides:  # other tests of the session may have left services of their own, ended
        assert side.services[name].alive, side.services[name].log_tail()


def test_two_labs_at_once_do_not_see_each_other(bare: Lab, host: Host) -> None:
    """The same address and port lead to another host in another lab."""
    serve(host, "mine")
    with Lab(prefect=False, receiver=False) as other:
        wait_for(lambda: serves(bare, "mine"))
        assert other.hosts["host-a"].address == host.address
        with pytest.raises(ConnectionRefusedError):
            page_from(other)
        serve(other.hosts["host-a"], "theirs")
        wait_for(lambda: serves(other, "theirs"))
        assert page_from(bare) == "mine"
    assert page_from(bare) == "mine"


@contextlib.contextmanager
def owner_of_a_lab(code: str) -> Iterator[str]:
    """A process that makes a lab and prints its id; killed by SIGKILL at the end."""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert owner.stdout is not None
    try:
        with owner.stdout:
            yield owner.stdout.readline().strip()
    finally:
        owner.kill()
        owner.wait()


def test_the_death_of_the_owner_leaves_nothing() -> None:
    """SIGKILL of the process that made the lab: the reaper takes everything away."""
    with owner_of_a_lab(OWNER) as lab_id:
        assert lab_id
        wait_for(lambda: any("sleep" in trace for trace in traces(lab_id)))
    wait_for(lambda: traces(lab_id) == [])


@pytest.mark.parametrize("delay_seconds", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4])
def test_an_owner_that_dies_while_it_builds_leaves_nothing(delay_seconds: float) -> None:
    """Whatever had been made at the moment of the SIGKILL is found and taken away."""
    code = "from deployments.lab import Lab\nlab = Lab(prefect=False, receiver=False)\n"
    with owner_of_a_lab(code + "print(lab.lab_id, flush=True)\nlab.up()") as lab_id:
        time.sleep(delay_seconds)  # the moment of death is what varies, not a wait for something
    wait_for(lambda: traces(lab_id) == [])


@pytest.mark.parametrize(("incoming", "outgoing"), [(True, False), (False, True), (True, True)])
def test_a_cut_network_is_silent_until_it_is_healed(
    bare: Lab, host: Host, incoming: bool, outgoing: bool
) -> None:
    """A request to a published port gets no answer at all during the cut, and the page after it."""
    serve(host, "hello")
    wait_for(lambda: serves(bare, "hello"))
    host.cut_network(incoming=incoming, outgoing=outgoing)
    with pytest.raises(TimeoutError):
        page_from(bare, timeout=0.3)
    host.heal_network()
    wait_for(lambda: serves(bare, "hello"))


def test_a_killed_engine_comes_back_beside_its_containers(bare: Lab, host: Host) -> None:
    """With live restore a container serves on while dockerd is dead and after it is back."""
    serve(host, "hello")
    wait_for(lambda: serves(bare, "hello"))
    host.kill_engine()
    with pytest.raises(docker.errors.DockerException):
        host.docker()
    assert page_from(bare) == "hello"
    host.start_engine()
    assert page_from(bare) == "hello"
    assert with_client(host, lambda client: client.containers.get("page").status) == "running"


def test_a_host_without_power_boots_again(bare: Lab, host: Host) -> None:
    """Everything on the host dies at once; after the boot the engine starts its `always` containers."""
    serve(host, "hello")
    wait_for(lambda: serves(bare, "hello"))
    host.power_off()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on what iptables still forwards
        page_from(bare)
    host.start_engine()
    wait_for(lambda: serves(bare, "hello"))


def test_a_disk_of_a_bounded_size_is_filled_and_freed_and_outlives_the_power() -> None:
    """The last byte is taken on that node alone; what was written is there after the boot."""
    with Lab(hosts=("one", "two"), prefect=False, receiver=False, disk_bytes=200_000_000) as lab:
        one, two = lab.hosts["one"], lab.hosts["two"]
        assert Path(one.environment["HOOK_RECEIVER_STATE_DIR"]).is_relative_to(one.disk)
        one.disk.joinpath("kept").write_text("kept")
        one.fill_disk()
        with pytest.raises(OSError, match="No space left"):
            one.disk.joinpath("more").write_bytes(bytes(10_000))
        two.disk.joinpath("more").write_bytes(bytes(10_000))
        one.free_disk()
        one.disk.joinpath("more").write_bytes(bytes(10_000))
        one.power_off()
        assert one.disk.joinpath("kept").read_text() == "kept"
        one.start_engine()
    wait_for(lambda: traces(lab.lab_id) == [], deadline_seconds=3)


def test_a_disk_that_is_the_machine_s_own_is_not_filled(host: Host) -> None:
    """Without `disk_bytes` the refusal comes before a byte is written."""
    with pytest.raises(LabNotReady, match="no disk of its own"):
        host.fill_disk()


def test_the_clock_of_a_host_is_off_and_jumps(host: Host) -> None:
    """What starts there sees the offset, what runs there sees the step, and the machine sees neither."""
    require_service(lab_clocks.LIBRARY is not None, "no libfaketime", "apt-get install libfaketime")
    host.set_clock(-960)
    try:
        assert -1000 < clock_of(host) - time.time() < -900
        host.step_clock(300)
        assert 250 < clock_of(host) - time.time() < 350
    finally:
        host.set_clock(None)
    assert abs(clock_of(host) - time.time()) < 50


def clock_of(host: Host) -> float:
    """Seconds since 1970, as a program on the host is told."""
    return float(host.run("date", "+%s").stdout)


def test_every_program_of_a_lab_gets_the_added_environment() -> None:
    """On the control side and on the hosts."""
    with Lab(prefect=False, receiver=False, environment={"EXTRA": "here"}) as lab:
        for node in (lab.control, lab.hosts["host-a"]):
            assert node.run("printenv", "EXTRA").stdout == "here\n"


def test_the_machine_itself_can_be_the_control_side(bare: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a control namespace this process reaches the hosts, each on a subnet of its own."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{bare.control.docker_socket}")
    with Lab(hosts=("one", "two"), control_namespace=False, prefect=False, receiver=False) as lab:
        assert lab.control.docker_socket == bare.control.docker_socket
        assert len({host.link.subnet for host in lab.hosts.values()}) == 2
        server = lab.control.spawn(
            "web", sys.executable, "-m", "http.server", "-b", lab.control.address, "8099"
        )
        for host in lab.hosts.values():
            wait_for(partial(answers, host, f"http://{lab.control.address}:8099/"))
        assert server.alive
    wait_for(lambda: traces(lab.lab_id) == [], deadline_seconds=3)


def answers(host: Host, url: str) -> bool:
    """True when the host gets the page of our own web server."""
    try:
        return "Directory listing" in host.get(url, timeout=1).text
    except OSError:
        return False


def test_a_lab_without_a_reaper_outlives_its_owner() -> None:
    """`reaped=False` leaves the lab to `python -m deployments.lab down`."""
    code = "from deployments.lab import Lab\n"
    code += "lab = Lab(prefect=False, receiver=False, reaped=False); lab.up(); print(lab.state_dir)"
    command = [sys.executable, "-c", code]
    owner = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=True)
    state_dir = Path(owner.stdout.strip())
    assert start_time_of_engine(state_dir) is not None
    down = [sys.executable, "-m", "deployments.lab", "down", str(state_dir)]
    subprocess.run(down, check=True, cwd=PROJECT, timeout=30)
    wait_for(lambda: traces(state_dir.name.removeprefix("gantry-")) == [])


def start_time_of_engine(state_dir: Path) -> str | None:
    """Start time of the host's dockerd, None when it does not run."""
    return start_time(int((state_dir / "host-a" / "dockerd.pid").read_text()))


def test_a_tear_down_leaves_a_stranger_with_a_recorded_id_alone() -> None:
    """A process that only has the process id of a recorded one is not ended."""
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        end_process(stranger.pid, "1", deadline_seconds=0)
        assert stranger.poll() is None
        end_process(stranger.pid, start_time(stranger.pid), deadline_seconds=5)
        assert stranger.wait(5) == -signal.SIGTERM
    finally:
        stranger.kill()
        stranger.wait()


def test_a_tear_down_of_nothing_does_nothing(tmp_path: Path) -> None:
    """A folder without a journal is not a lab and stays as it is."""
    (tmp_path / "file").write_text("mine")
    tear_down(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_service_that_does_not_start_is_named_with_its_log() -> None:
    """`LabNotReady` holds the last log lines, and nothing of the lab is left."""
    lab = Lab(prefect=False, receiver=True, python="/bin/false")
    with pytest.raises(LabNotReady, match=r"hook receiver of host-a: receiver ended\n--- receiver: "):
        lab.up()
    assert traces(lab.lab_id) == []


def test_a_state_folder_that_is_too_long_is_refused(tmp_path: Path) -> None:
    """Unix sockets have short paths; the error says so before anything is made."""
    with pytest.raises(LabImpossible, match="shorten state_dir"):
        Lab(state_dir=tmp_path / ("x" * 80)).up()
    assert list(tmp_path.iterdir()) == []


def test_run_and_spawn_work_inside_the_namespace(host: Host) -> None:
    """Programs of a host see its network, its engine and its key, and not the settings of the caller."""
    assert host.address in host.run("ip", "-4", "address").stdout
    assert "192.0.2" not in host.run("ip", "-4", "address").stdout
    environment = host.run("env", env={"EXTRA": "1"}).stdout.splitlines()
    assert f"DOCKER_HOST=unix://{host.docker_socket}" in environment
    assert "EXTRA=1" in environment
    service = host.spawn("sleeper", "sleep", "600")
    assert service.alive
    service.restart()
    service.stop()
    assert not service.alive


def test_a_program_that_fails_in_the_namespace_is_shown_with_what_it_said(host: Host) -> None:
    """Not its exit code alone."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        host.run("sh", "-c", "echo no such thing >&2; exit 3")
    assert failed.value.returncode == 3
    assert failed.value.__notes__ == ["it said:\nno such thing"]
