"""How long an image takes to a host: our way and the ones that people use, side by side in each round.

Resumable: each transfer is kept when it ends, and what is kept is not measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import fan_out, links, transfer_table
from tests.bench.links import LINKS, sent_bytes, shaped
from tests.bench.ours import Ours
from tests.bench.site import Site, site
from tests.bench.trials import Trial, Trials, read
from tests.bench.ways import CASES, RIVALS, Sent, Way, missing_programs

WAYS: Mapping[str, Way] = {**RIVALS, "ours": Ours()}
NAMES = (*WAYS, fan_out.WAY)
IMAGE_BYTES = 1_500_000_000
FAN_OUT_LINK = "1g"


class BenchImpossible(Exception):
    """A program that is measured is not installed"""

    def __init__(self, packages: Sequence[str]) -> None:
        names = " ".join(packages)
        super().__init__(
            f"{self.__doc__}: apt-get install --no-install-recommends {names}; or leave it out: --only"
        )


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and where it is kept."""

    results: Path
    image_bytes: int = IMAGE_BYTES
    rounds: int = 5
    ways: Sequence[str] = NAMES
    links: Sequence[str] = tuple(LINKS)
    afresh: bool = False


def measure(plan: Plan) -> str:
    """Measure what is missing; returns the table of all that is kept. Raises `BenchImpossible`."""
    trials = Trials(plan.results, plan.image_bytes, afresh=plan.afresh)
    if _missing(plan, trials):
        if lacking := missing_programs(plan.ways):
            raise BenchImpossible(lacking)
        with site(plan.image_bytes) as where:
            _Measuring(plan, trials, where).all()
    return transfer_table.table(read(plan.results))


def _missing(plan: Plan, trials: Trials) -> bool:
    wanted = [
        (link, way, WAYS[way].cases, number)
        for link in plan.links
        for way in plan.ways
        if way != fan_out.WAY
        for number in _numbers(plan)
    ]
    if _fans_out(plan):
        cases = [fan.case for fan in fan_out.FANS]
        wanted += [(FAN_OUT_LINK, fan_out.WAY, cases, number) for number in _numbers(plan)]
    return not all(trials.has(*each) for each in wanted)


def _numbers(plan: Plan) -> range:
    return range(1, plan.rounds + 1)


def _fans_out(plan: Plan) -> bool:
    return fan_out.WAY in plan.ways and FAN_OUT_LINK in plan.links


@dataclass(frozen=True)
class _Measuring:
    plan: Plan
    trials: Trials
    site: Site

    def all(self) -> None:
        """Link by link, round by round, way by way: there and back."""
        for link in self.plan.links:
            with shaped(self.site.host.link, LINKS[link]):
                for number in _numbers(self.plan):
                    self._round(link, number)

    def _round(self, link: str, number: int) -> None:
        # Each second round backwards: what one way leaves behind is not always for the same other one.
        for name in self.plan.ways if number % 2 else reversed(self.plan.ways):
            if name != fan_out.WAY and not self.trials.has(link, name, WAYS[name].cases, number):
                self._way(link, name, number)
        if _fans_out(self.plan) and link == FAN_OUT_LINK:
            self._fan_out(number)

    def _way(self, link: str, name: str, number: int) -> None:
        way = WAYS[name]
        self.site.clean_host()
        way.prepare(self.site)
        for case in way.cases:
            before = sent_bytes(self.site.host.link)
            sent = way.send(self.site, CASES[case])
            wire_bytes = sent_bytes(self.site.host.link) - before
            self.site.check_arrived(CASES[case])
            self._keep(link, name, case, number, sent, wire_bytes)
        self.site.clean_host()

    def _fan_out(self, number: int) -> None:
        for fan in fan_out.FANS:
            if not self.trials.has(FAN_OUT_LINK, fan_out.WAY, [fan.case], number):
                sent, wire_bytes = fan_out.measure(self.site, fan)
                self._keep(FAN_OUT_LINK, fan_out.WAY, fan.case, number, sent, wire_bytes)

    def _keep(self, link: str, way: str, case: str, number: int, sent: Sent, wire_bytes: int) -> None:
        parts = {name: round(seconds, 3) for name, seconds in sent.parts.items()}
        trial = Trial(
            *(self.plan.image_bytes, link, way, case, number, round(sent.seconds, 3), wire_bytes, parts),
            *(sent.sender_peak_bytes, sent.receiver_peak_bytes, sent.package_bytes),
        )
        self.trials.add(trial)
        transfer_table.say(f"{links.NAMES[link]}, {way}, {case}, round {number}: {trial.seconds:.2f} s")
