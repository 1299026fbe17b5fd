"""Which layers of an image are exported early."""

from __future__ import annotations

import pytest

from tasks.early_export import lowest_layers

MB = 1_000_000


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        pytest.param([300, 300, 300, 600], 1, id="the lowest one is a fifth"),
        pytest.param([30, 80, 100, 400], 2, id="with those on which it lies, a sixth"),
        pytest.param([0, 0, 300, 700], 3, id="empty ones do not count"),
        pytest.param([700, 300], 0, id="most of it: the whole is there as soon"),
        pytest.param([10, 990], 0, id="one layer is all"),
        pytest.param([1000], 0, id="one layer"),
        pytest.param([50, 50, 99], 0, id="an image that is saved in a second"),
        pytest.param([], 0, id="no layer"),
    ],
)
def test_lowest_layers(sizes: list[int], count: int) -> None:
    """Enough to travel until the whole is there, far less than the whole; never the last layer."""
    layers = [f"sha256:{place}" for place in range(len(sizes))]
    assert (
        lowest_layers(layers, {layer: size * MB for layer, size in zip(layers, sizes, strict=True)}) == count
    )
