"""What set-up knows of one thing on the Prefect server: whether it fits, and how it is made to fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

Apply = Callable[[], Awaitable[object]]


class Change(StrEnum):
    """What has to happen to an item."""

    CREATE = "create"
    UPDATE = "update"
    UNCHANGED = "unchanged"
    LEFT_OUT = "left out"


_DONE = {Change.CREATE: "created", Change.UPDATE: "updated"}


class SetupRefused(Exception):
    """Set-up cannot do what it was asked; nothing was changed"""


@dataclass(frozen=True)
class Item:
    """One block, work pool, limit, Prefect deployment or automation; `apply` is there when it must change."""

    kind: str
    name: str
    change: Change
    detail: str = ""
    apply: Apply | None = None

    def line(self, *, done: bool) -> str:
        """For the terminal; `done` when the change was made."""
        word = _DONE.get(self.change, self.change.value) if done else self.change.value
        text = f"{word:<10} {self.kind:<18} {self.name}"
        return f"{text}: {self.detail}" if self.detail else text


def item(kind: str, name: str, *, exists: bool, differs: Sequence[str], apply: Apply) -> Item:
    """An item that is created when it does not exist, and updated when something `differs`."""
    if not exists:
        return Item(kind, name, Change.CREATE, apply=apply)
    if differs:
        return Item(kind, name, Change.UPDATE, ", ".join(differs), apply)
    return Item(kind, name, Change.UNCHANGED)


async def settle(items: Sequence[Item], say: Callable[[str], None], *, plan: bool) -> None:
    """Say of each item what becomes of it and, unless it is a `plan`, do it; the last line is the sum."""
    for each in items:
        if each.apply is not None and not plan:
            await each.apply()
        say(each.line(done=not plan))
    say(summary(items, plan=plan))


def summary(items: Sequence[Item], *, plan: bool) -> str:
    """How many items are created, updated and left as they are, in one line."""
    count = Counter(each.change for each in items)
    if not count[Change.CREATE] and not count[Change.UPDATE]:
        told = "nothing to change"
    elif plan:
        told = f"to create: {count[Change.CREATE]}, to update: {count[Change.UPDATE]}; nothing was changed"
    else:
        told = f"created: {count[Change.CREATE]}, updated: {count[Change.UPDATE]}"
    left_out = f", left out: {count[Change.LEFT_OUT]}" if count[Change.LEFT_OUT] else ""
    return f"{told}; unchanged: {count[Change.UNCHANGED]}{left_out}"
