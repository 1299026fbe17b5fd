"""A check and its verdict, and a list of them as rows, as a table of text, and as one line. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

COLUMNS = ("subject", "check", "verdict", "found", "mend")


class Verdict(StrEnum):
    """Whether a deployment would meet trouble."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and the command that mends it, if it is to be mended."""

    name: str
    verdict: Verdict
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks of one host, or of the control side."""

    subject: str
    checks: tuple[Check, ...]

    def with_verdict(self, verdict: Verdict) -> list[Check]:
        """Those checks that came out so."""
        return [check for check in self.checks if check.verdict is verdict]


def passed(name: str, found: str) -> Check:
    """A check without trouble."""
    return Check(name, Verdict.PASS, found)


def warned(name: str, found: str, mend: str) -> Check:
    """A check that a deployment may get past."""
    return Check(name, Verdict.WARN, found, mend)


def failed(name: str, found: str, mend: str) -> Check:
    """A check that a deployment does not get past."""
    return Check(name, Verdict.FAIL, found, mend)


def rows_of(diagnoses: Iterable[Diagnosis]) -> list[dict[str, str]]:
    """One row for each check, under `COLUMNS`."""
    return [
        {
            "subject": diagnosis.subject,
            "check": check.name,
            "verdict": check.verdict.value,
            "found": check.found,
            "mend": check.mend,
        }
        for diagnosis in diagnoses
        for check in diagnosis.checks
    ]


def render(diagnosis: Diagnosis) -> str:
    """A table of text: verdict, name, what was found; below a check that is not passed, what mends it."""
    width = max((len(check.name) for check in diagnosis.checks), default=0)
    lines = [diagnosis.subject]
    for check in diagnosis.checks:
        lines.append(f"  {check.verdict.value}  {check.name.ljust(width)}  {check.found}")
        if check.mend:
            lines.append(f"        {' ' * width}  -> {check.mend}")
    return "\n".join(lines)


def counts(diagnoses: Sequence[Diagnosis]) -> str:
    """How many checks came out how, as `12 pass, 1 warn, 0 fail`."""
    numbers = (sum(len(found.with_verdict(verdict)) for found in diagnoses) for verdict in Verdict)
    return ", ".join(f"{number} {verdict}" for number, verdict in zip(numbers, Verdict, strict=True))


def summary(diagnoses: Sequence[Diagnosis]) -> str:
    """The counts, and each failed check with what mends it, in one line."""
    broken = [
        f"{diagnosis.subject}: {check.name}: {check.found} -> {check.mend}"
        for diagnosis in diagnoses
        for check in diagnosis.with_verdict(Verdict.FAIL)
    ]
    return "; ".join([counts(diagnoses), *broken])


def has_failed(diagnoses: Iterable[Diagnosis]) -> bool:
    """True when any check failed."""
    return any(diagnosis.with_verdict(Verdict.FAIL) for diagnosis in diagnoses)
