"""Parts of the README that a script writes, between two marks."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"


class MarksMissing(Exception):
    """README.md does not hold the two marks of a part"""

    def __init__(self, part: str) -> None:
        super().__init__(f"{self.__doc__}: {begin(part).strip()} ... {end(part).strip()}")


def begin(part: str) -> str:
    """The line before a part."""
    return f"<!-- {part}:begin -->\n"


def end(part: str) -> str:
    """The line after a part."""
    return f"<!-- {part}:end -->\n"


def marked(part: str, text: str) -> str:
    """The part as the README holds it."""
    return begin(part) + text + end(part)


def replace(part: str, text: str) -> None:
    """Write a part; raises `MarksMissing`."""
    before, found_begin, rest = README.read_text().partition(begin(part))
    _, found_end, after = rest.partition(end(part))
    if not found_begin or not found_end:
        raise MarksMissing(part)
    README.write_text(before + marked(part, text) + after)
