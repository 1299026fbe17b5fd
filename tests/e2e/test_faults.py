"""Faults that strike deployments under way: a representative part of the matrix that `make faults` runs."""

from __future__ import annotations

import pytest

from tests.faults import cells
from tests.faults.cells import Cell
from tests.faults.faults import BY_NAME
from tests.faults.results import Result
from tests.faults.running import run_cells
from tests.faults.site import open_site

CELLS = cells.representative()


@pytest.fixture(scope="module")
def results(lab_possible: None, request: pytest.FixtureRequest) -> dict[str, Result]:
    """What the cells of the tests that were asked for came to; many of them are run at once."""
    wanted = [_cell_of(item) for item in request.session.items]
    found: dict[str, Result] = {}

    def tell(result: Result) -> None:
        found[result.cell] = result

    with open_site(lanes_per_host=2) as site:
        run_cells(site, [cell for cell in CELLS if cell in wanted], tell, follow_up=False)
    return found


def _cell_of(item: pytest.Item) -> object:
    spec = getattr(item, "callspec", None)
    return spec.params.get("cell") if spec else None


def test_the_part_is_representative() -> None:
    """At least thirty cells, and every fault."""
    assert len({str(cell) for cell in CELLS}) >= 30
    assert {cell.fault.name for cell in CELLS} >= set(BY_NAME) - {"clock_10_s", "clock_16_min"}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_one_version_serves_and_all_agree(results: dict[str, Result], cell: Cell) -> None:
    """The old or the new one; records and host agree in time, no event is missing, nothing is left over."""
    result = results[str(cell)]
    assert result.violations == [], result
    assert result.serving in {"old", "new"}
