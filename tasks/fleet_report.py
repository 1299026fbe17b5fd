"""A fleet as a person reads it: hosts down, services across, each with its state and time. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tasks.fleet_board import Board, Cell, Place
from tasks.wording import duration

LinkOf = Callable[[str], str | None]
_TROUBLE = (Cell.FAILED, Cell.UNREACHABLE, Cell.NOT_ROLLED_BACK, Cell.LEFT)
_MAX_REASON = 300


def summary(board: Board) -> str:
    """One line: what stands how, and why it stopped."""
    counted = ", ".join(f"{number} {name}" for name, number in board.counts().items()) or "nothing to do"
    return f"{counted}; stopped: {board.stopped}" if board.stopped else counted


def render(board: Board, link_of: LinkOf = lambda _: None) -> str:
    """The summary artifact, Markdown; `link_of` gives a flow run's page."""
    columns = board.services
    cells = {(place.unit.host, place.unit.service): place for place in board.places}
    lines = [
        f"**{summary(board)}**",
        "",
        f"| host | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(_row(host, columns, cells, board.canary, link_of) for host in board.hosts),
    ]
    if reasons := [_reason(place) for place in board.of(*_TROUBLE)]:
        lines += ["", *reasons]
    return "\n".join([*lines, *_notes(board), *_next_steps(board)]) + "\n"


def _row(
    host: str,
    columns: list[str],
    cells: Mapping[tuple[str, str], Place],
    canary: str | None,
    link_of: LinkOf,
) -> str:
    shown = [_cell(cells.get((host, service)), link_of) for service in columns]
    return f"| {host}{' (canary)' if host == canary else ''} | {' | '.join(shown)} |"


def _cell(place: Place | None, link_of: LinkOf) -> str:
    if place is None:
        return ""
    told = place.detail if place.cell is Cell.UNDER_WAY and place.detail else place.cell.value
    link = link_of(place.run_id) if place.run_id else None
    shown = f"[{told}]({link})" if link else told
    return f"{shown}, {duration(place.seconds * 1000)}" if place.seconds is not None else shown


def _reason(place: Place) -> str:
    told = " ".join(place.detail.split()).replace("|", "\\|")[:_MAX_REASON]
    return f"- {place.unit.image} on {place.unit.host} {place.cell.value}: {told or 'no reason was told'}"


def _notes(board: Board) -> list[str]:
    return ["", *(f"- {note}" for note in board.notes)] if board.notes else []


def _next_steps(board: Board) -> list[str]:
    fence = ["", "What is left, and the way back:", "", "```", *commands(board), "```"]
    return fence if not board.of(Cell.UNDER_WAY) else []


def commands(board: Board) -> list[str]:
    """What a person can type next."""
    return [
        f"prefect deployment run deploy-fleet/default --watch --param resume={board.fleet_id}",
        f"prefect deployment run rollback-fleet/default --watch --param fleet_id={board.fleet_id}",
    ]


def result(board: Board) -> dict[str, object]:
    """What the flow returns: for the next program."""
    return {
        "fleet_id": board.fleet_id,
        "stopped": board.stopped or None,
        "counts": board.counts(),
        "deployments": [
            {
                "service": place.unit.service,
                "container_name": place.unit.parameters.container_name,
                "image_tag": place.unit.parameters.image_tag,
                "remote_host": place.unit.host,
                "state": place.cell.value,
                "detail": place.detail,
                "flow_run_id": place.run_id or None,
                "seconds": place.seconds,
            }
            for place in board.places
        ],
    }
