"""The README's tables of the transfers: medians, ratios to ours, bytes, memory, many hosts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tests.bench import fan_out
from tests.bench.fan_out import Fan
from tests.bench.links import LINKS, NAMES
from tests.bench.ours import Ours
from tests.bench.trials import Trial, median
from tests.bench.ways import CASES, RIVALS

MEGABYTE = 1e6
OURS = "ours"
_TITLES = {**{name: way.title for name, way in RIVALS.items()}, OURS: Ours().title}
_HEADS = {
    "small": "2 MB image",
    "first": "first deployment",
    "same": "same version again",
    "changed": "1.5 MB layer changed",
    "large": "one file of a large layer changed",
}


def say(line: str) -> None:
    """Progress, for who waits."""
    sys.stderr.write(f"{line}\n")


def table(trials: Sequence[Trial]) -> str:
    """Markdown; only what was measured appears."""
    return "\n".join(_lines(trials)) + "\n"


def _lines(trials: Sequence[Trial]) -> Iterator[str]:
    if not trials:
        yield "Nothing was measured."
        return
    size = trials[0].image_bytes / MEGABYTE
    yield (
        f"An image of {size:,.0f} MB in five layers of real programs, the third of it in one layer. Seconds "
        "until the host's engine has it, in brackets how many times ours."
    )
    for link in LINKS:
        yield from _seconds(trials, link)
    yield from _bytes(trials)
    yield from _memory(trials)
    yield from _hosts(trials)


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return ["", f"| {first} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]


def _seconds(trials: Sequence[Trial], link: str) -> Iterator[str]:
    ways = _measured(trials, link)
    if not ways:
        return
    yield from _head(f"{NAMES[link]}, median of {_rounds(trials, link)}", list(_HEADS.values()))
    for way in ways:
        cells = [_with_ratio(trials, link, way, case) for case in CASES]
        yield f"| {_TITLES[way]} | {' | '.join(cells)} |"


def _rounds(trials: Sequence[Trial], link: str) -> int:
    """Those that were measured of every way and case: a run may have been ended within a round."""
    counted = Counter((each.way, each.case) for each in trials if each.link == link and each.way in _TITLES)
    return min(counted.values())


def _measured(trials: Sequence[Trial], link: str) -> list[str]:
    return [way for way in _TITLES if any((each.link, each.way) == (link, way) for each in trials)]


def _with_ratio(trials: Sequence[Trial], link: str, way: str, case: str) -> str:
    seconds = median(trials, link, way, case, _seconds_of)
    ours = median(trials, link, OURS, case, _seconds_of)
    if seconds is None:
        return "-"
    told = number(seconds)
    return told if way == OURS or not ours else f"{told} ({number(seconds / ours)})"


def number(value: float) -> str:
    """With about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _bytes(trials: Sequence[Trial]) -> Iterator[str]:
    """Of the first link that a way was measured on: they are about the same on all."""
    links = {way: link for link in reversed([*LINKS]) for way in _measured(trials, link)}
    if not links:
        return
    yield from _head("MB on the wire, with headers", list(_HEADS.values()))
    for way in (way for way in _TITLES if way in links):
        found = [median(trials, links[way], way, case, lambda each: each.wire_bytes) for case in CASES]
        cells = ["-" if value is None else number(value / MEGABYTE) for value in found]
        yield f"| {_TITLES[way]} | {' | '.join(cells)} |"


def _memory(trials: Sequence[Trial]) -> Iterator[str]:
    ours = [each for each in trials if each.way == OURS]
    sender = _most(ours, lambda each: each.sender_peak_bytes)
    receiver = _most(ours, lambda each: each.receiver_peak_bytes)
    if sender is not None and receiver is not None:
        yield ""
        yield (
            f"Most memory of Gantry at any time: {sender} MB in the sending program, with all that a flow "
            f"run imports, and {receiver} MB in the receiver."
        )


def _most(trials: Sequence[Trial], of: Callable[[Trial], int | None]) -> str | None:
    values = [value for each in trials if (value := of(each)) is not None]
    return f"{max(values) / MEGABYTE:.0f}" if values else None


def _hosts(trials: Sequence[Trial]) -> Iterator[str]:
    found = [each for each in trials if each.way == fan_out.WAY]
    if not found:
        return
    link = found[0].link
    yield from _head(
        f"hosts behind one link of {NAMES[link]}",
        ["package, MB", "until the last holds it, s", "of the least", "sender, MB", "receiver, MB"],
    )
    for fan in fan_out.FANS:
        yield from _hosts_row(found, fan, link)
    yield ""
    yield (
        "The least is what the link needs for so many packages. The export is part of the seconds unless it "
        "was done before, as for all hosts after a canary; the engine gives all but the lowest layers when "
        "it has written the whole image to its own disk. Memory: the most at any time, of the sending "
        "program and of one receiver."
    )


def _hosts_row(trials: Sequence[Trial], fan: Fan, link: str) -> Iterator[str]:
    seconds = median(trials, link, fan_out.WAY, fan.case, _seconds_of)
    package = median(trials, link, fan_out.WAY, fan.case, lambda each: each.package_bytes)
    if seconds is not None and package:
        ratio = number(seconds / least(fan.hosts, package, link))
        one = [each for each in trials if each.case == fan.case]
        sender = _most(one, lambda each: each.sender_peak_bytes) or "-"
        receiver = _most(one, lambda each: each.receiver_peak_bytes) or "-"
        cells = [str(fan), number(package / MEGABYTE), number(seconds), ratio, sender, receiver]
        yield f"| {' | '.join(cells)} |"


def least(hosts: int, package_bytes: float, link: str) -> float:
    """Seconds that the packages need on the link alone."""
    rate = LINKS[link]
    assert rate is not None
    return hosts * package_bytes * 8 / rate


def _seconds_of(trial: Trial) -> float:
    return trial.seconds
