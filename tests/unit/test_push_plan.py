"""When an engine's push is the quick way, and what it may send."""

from __future__ import annotations

import pytest

from tasks.engine_address import is_local
from tasks.push_plan import PushPlan, PushUnsuitable, layer_sizes

MIB = 1024 * 1024
SIZES = {"base": 1000 * MIB, "libraries": 500 * MIB, "app": 2 * MIB}
ALL_FREE = 2**60


def test_a_small_change_of_a_large_image_is_pushed() -> None:
    """The layers that the host has are known to the engine: only the changed one is read."""
    plan = PushPlan.of(SIZES, omitted={"base", "libraries"}, remembered={*SIZES})
    assert plan.sent_bytes == 2 * MIB
    plan.check(ALL_FREE)


@pytest.mark.parametrize(
    ("omitted", "remembered"),
    [
        ((), SIZES),  # a first deployment
        (("base", "libraries"), ()),  # nothing was pushed by this engine yet
        (("base", "libraries"), ("libraries",)),
        (("libraries",), SIZES),
    ],
)
def test_much_to_compress_is_saved_instead(omitted: tuple[str, ...], remembered: tuple[str, ...]) -> None:
    """Layers that are missing on the host, and those that the engine would have to compress to name them."""
    with pytest.raises(PushUnsuitable, match="compress"):
        PushPlan.of(SIZES, omitted, remembered).check(ALL_FREE)


def test_a_push_that_does_not_fit_the_disk_is_refused() -> None:
    """With what it may need, and what there is."""
    plan = PushPlan.of(SIZES, {"base", "libraries"}, {*SIZES})
    with pytest.raises(PushUnsuitable, match=r"67 MiB of disk, and 5 MiB"):
        plan.check(5 * MIB)


def test_the_limit_leaves_room_for_what_tar_adds_and_no_more() -> None:
    """So an engine that sends a large layer which it was thought to know is stopped."""
    plan = PushPlan.of(SIZES, {"base", "libraries"}, {*SIZES})
    assert 2 * MIB < plan.limit_bytes < 100 * MIB


@pytest.mark.parametrize(
    ("layers", "history", "sizes"),
    [
        ("abc", (5, 0, 7, 0, 9), (5, 7, 9)),  # steps that made no layer have no size
        ("abc", (5, 0, 9), (5, 9, 9)),  # one layer is empty, and nobody says which
        ("ab", (0, 0), (0, 0)),
        ("", (), ()),
        ("a", (3, 4), (3,)),
    ],
)
def test_a_layer_is_at_most_as_large_as_the_step_that_may_have_made_it(
    layers: str, history: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    """Exact where no layer is empty; else never too small."""
    assert layer_sizes([*layers], history) == dict(zip(layers, sizes, strict=True))


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("unix:///var/run/docker.sock", True),
        ("unix://", True),
        ("tcp://127.0.0.1:2375", True),
        ("tcp://localhost:2375", True),
        ("tcp://[::1]:2375", True),
        ("tcp://10.0.0.7:2376", False),
        ("tcp://engine.example:2376", False),
        ("ssh://user@10.0.0.7", False),
    ],
)
def test_only_an_engine_on_this_machine_reaches_the_gateway(address: str, *, local: bool) -> None:
    """By its address."""
    assert is_local(address) is local
