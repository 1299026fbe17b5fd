"""The benchmark's own parts: links, images, what is kept, and the tables made of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import fan_out, images, transfer, transfer_table
from tests.bench.__main__ import parser
from tests.bench.links import LINKS, tbf
from tests.bench.ours import peak_bytes
from tests.bench.trials import Trial, Trials, median, read
from tests.bench.ways import CASES, REGISTRY, missing_programs, timed

TRIAL = Trial(50_000_000, "1g", "ours", "first", 1, 2.0, 20_000_000)


@pytest.mark.parametrize(("rate", "burst"), [(1_000_000_000, 250_000), (100_000_000, 65_536)])
def test_a_link_is_slowed_down_by_a_token_bucket(rate: int, burst: int) -> None:
    """Two milliseconds of it at once, and never less than the largest packet of a veth."""
    assert tbf(rate) == ["tbf", "rate", f"{rate}bit", "burst", f"{burst}b", "latency", "50ms"]


def test_the_layers_together_have_the_size_that_was_asked_for() -> None:
    """Five, the third of the bytes in one; the top one never outweighs a small image."""
    sizes = images.Sizes.of(1_500_000_000)
    assert len(sizes.base) == 3
    assert sizes.large == 500_000_000
    assert sizes.app == 1_500_000
    assert sum((*sizes.base, sizes.large, sizes.app)) == pytest.approx(1_500_000_000, rel=1e-6)
    assert images.Sizes.of(1_000_000).app == 100_000


def test_files_are_taken_until_they_have_the_bytes(tmp_path: Path) -> None:
    """In a fixed order, none twice; links, empty files and one that is far too large are left out."""
    for number in range(60):
        (tmp_path / f"{number:02}").write_bytes(os.urandom(1000))
    (tmp_path / "00-large").write_bytes(bytes(50_000))
    (tmp_path / "01-empty").touch()
    (tmp_path / "02-link").symlink_to("05")
    files = images.regular_files(tmp_path)
    first, second = images.take(files, 20_000), images.take(files, 20_000)
    assert [path.name for path in first] == [f"{number:02}" for number in range(20)]
    assert [path.name for path in second] == [f"{number:02}" for number in range(20, 40)]
    with pytest.raises(images.TooFewFiles, match="--image-bytes"):
        images.take(files, 30_000)


def test_each_folder_of_the_context_becomes_a_layer() -> None:
    """One COPY for each, on the base."""
    lines = images.dockerfile("scratch", ["base0", "base1"]).splitlines()
    assert lines == ["FROM scratch", "COPY base0 /base0", "COPY base1 /base1", 'CMD ["/none"]']


def test_what_was_measured_is_kept_and_found_again(tmp_path: Path) -> None:
    """Read as it was written; another size of image, or `afresh`, begins anew."""
    kept = tmp_path / "transfer.jsonl"
    full = replace(TRIAL, parts={"export": 1.5}, sender_peak_bytes=1, receiver_peak_bytes=2, package_bytes=3)
    Trials(kept, TRIAL.image_bytes).add(full)
    assert read(kept) == [full]
    again = Trials(kept, TRIAL.image_bytes)
    assert again.has("1g", "ours", ["first"], 1)
    assert not again.has("1g", "ours", ["first", "changed"], 1)
    assert not again.has("1g", "ours", ["first"], 2)
    again.add(replace(TRIAL, seconds=3.0))
    assert [each.seconds for each in read(kept)] == [3.0]
    assert not Trials(kept, TRIAL.image_bytes, afresh=True).has("1g", "ours", ["first"], 1)
    Trials(kept, TRIAL.image_bytes).add(TRIAL)
    Trials(kept, TRIAL.image_bytes + 1)
    assert read(kept) == []


def test_the_median_is_that_of_one_case_of_one_way_on_one_link() -> None:
    """Others do not count; nothing measured is no number."""
    rounds = [
        replace(TRIAL, number=number, seconds=seconds) for number, seconds in enumerate((9.0, 1.0, 2.0))
    ]
    others = [replace(TRIAL, link="bare", seconds=50), replace(TRIAL, way="gzip", seconds=60)]
    assert median([*rounds, *others], "1g", "ours", "first", lambda each: each.seconds) == 2.0
    assert median(rounds, "1g", "ours", "first", lambda each: each.package_bytes) is None


def test_the_table_compares_each_way_with_ours() -> None:
    """Seconds and ratio where both were measured, a dash where not; bytes and memory below."""
    gzip = replace(TRIAL, way="gzip", seconds=6.5, wire_bytes=21_000_000)
    ours = replace(TRIAL, sender_peak_bytes=150_000_000, receiver_peak_bytes=90_000_000)
    table = transfer_table.table([gzip, ours])
    assert "| 1 Gbit/s, median of 1 | 2 MB image | first deployment |" in table
    assert "| `docker save \\| gzip \\| ssh docker load` | - | 6.50 (3.25) | - | - | - |" in table
    assert "| **Gantry** | - | 2.00 | - | - | - |" in table
    assert "| **Gantry** | - | 20.0 | - | - | - |" in table
    assert (
        "150 MB in the sending program, with all that a flow run imports, and 90 MB in the receiver" in table
    )
    assert "bare link" not in table
    assert "hosts behind" not in table


def test_a_round_that_was_ended_within_is_no_round_of_the_table() -> None:
    """One way has three trials, the other has two; those of many hosts are counted by nobody."""
    others = [replace(TRIAL, way="gzip", number=number) for number in (1, 2, 3)]
    fan = replace(TRIAL, way=fan_out.WAY, case=fan_out.Fan(8).case)
    table = transfer_table.table([TRIAL, replace(TRIAL, number=2), *others, fan])
    assert "| 1 Gbit/s, median of 2 |" in table


def test_the_table_says_how_far_many_hosts_are_from_what_the_link_needs() -> None:
    """8 packages of 125 MB need 8 seconds at 1 Gbit/s; memory where it was told."""
    fan = replace(
        TRIAL,
        way=fan_out.WAY,
        case=fan_out.Fan(8).case,
        seconds=9.0,
        package_bytes=125_000_000,
        sender_peak_bytes=150_000_000,
    )
    exported = replace(fan, case=fan_out.Fan(8, is_exported=True).case, seconds=8.2)
    table = transfer_table.table([fan, exported])
    assert "| 8 | 125 | 9.00 | 1.12 | 150 | - |" in table
    assert "| 8, exported before | 125 | 8.20 | 1.02 | 150 | - |" in table
    assert fan_out.WAY not in CASES


def test_bytes_are_told_of_every_way_wherever_it_was_measured() -> None:
    """On the first link that it was measured on."""
    bare = replace(TRIAL, link="bare", way="gzip", wire_bytes=21_000_000)
    slow = replace(TRIAL, link="100m", way="gzip", wire_bytes=25_000_000)
    wire = transfer_table.table([slow, bare, TRIAL]).partition("MB on the wire")[2]
    assert "ssh docker load` | - | 21.0 |" in wire
    assert "| **Gantry** | - | 20.0 |" in wire


@pytest.mark.parametrize(
    ("value", "told"), [(0.0612, "0.06"), (3.456, "3.46"), (12.34, "12.3"), (123.4, "123")]
)
def test_a_number_has_about_three_digits(value: float, told: str) -> None:
    """However large."""
    assert transfer_table.number(value) == told


def test_a_program_that_is_measured_and_not_here_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its package, before anything is started, and only when it is wanted."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_programs(["gzip", "registry", "zstd"]) == ["zstd", REGISTRY]
    assert missing_programs(["ours"]) == []
    plan = transfer.Plan(tmp_path / "transfer.jsonl", ways=["registry"])
    with pytest.raises(transfer.BenchImpossible, match=r"apt-get install .* docker-registry"):
        transfer.measure(plan)


def test_nothing_is_started_when_all_is_measured(tmp_path: Path) -> None:
    """The table is made of what is kept."""
    plan = transfer.Plan(tmp_path / "t.jsonl", TRIAL.image_bytes, rounds=1, ways=["gzip"], links=["1g"])
    trials = Trials(plan.results, plan.image_bytes)
    for case in transfer.WAYS["gzip"].cases:
        trials.add(replace(TRIAL, way="gzip", case=case))
    assert "| 2.00 | 2.00 | - | 2.00 | - |" in transfer.measure(plan)


@pytest.mark.parametrize(
    ("option", "text", "told"),
    [
        ("--link", "1g,10g", "'10g': choose of bare"),
        ("--only", "scp", "choose of gzip"),
        ("--rounds", "0", "from 1"),
    ],
)
def test_a_wrong_option_is_refused_with_what_may_be_given(
    capsys: pytest.CaptureFixture[str], option: str, text: str, told: str
) -> None:
    """Before anything is started."""
    with pytest.raises(SystemExit):
        parser().parse_args(["run", "transfer", option, text])
    assert told in capsys.readouterr().err


def test_all_ways_and_links_are_measured_unless_some_are_chosen() -> None:
    """In the order in which they were given."""
    assert parser().parse_args(["run"]).link == tuple(LINKS)
    chosen = parser().parse_args(["run", "--only", "ours,zstd", "--link", "100m"])
    assert chosen.only == ("ours", "zstd")
    assert chosen.link == ("100m",)


def test_a_process_tells_its_peak_of_memory() -> None:
    """In bytes; this one has more than a megabyte."""
    assert peak_bytes("self") > 1_000_000


def test_time_is_taken_around_an_action() -> None:
    """In seconds; the action is done once."""
    done: list[int] = []
    sent = timed(lambda: done.append(1))
    assert done == [1]
    assert 0 <= sent.seconds < 1
