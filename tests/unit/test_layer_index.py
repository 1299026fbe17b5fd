"""What is remembered of compressed layers, also with several writers and with a torn file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.layer_index import LayerIndex

LEARN = """
import sys
from pathlib import Path
from tasks.layer_index import LayerIndex

index = LayerIndex(Path(sys.argv[1]))
for n in range(25):
    index.learn("engine", [(f"digest-{sys.argv[2]}-{n}", f"layer-{sys.argv[2]}-{n}"), ("same", "layer")])
"""


@pytest.fixture
def index(tmp_path: Path) -> LayerIndex:
    """An empty index that keeps ten rows."""
    return LayerIndex(tmp_path / "layers.sqlite3", kept_rows=10)


def test_what_an_engine_pushed_is_remembered_of_it_alone(index: LayerIndex) -> None:
    """A digest is good for all, that an engine need not compress is not; and it survives the process."""
    index.learn("one", [("d1", "a"), ("d2", "b")])
    index.learn("two", [("d3", "a")])
    assert index.digests(["a", "c"]) == {"d1", "d3"}
    assert index.remembered("two", ["a", "b"]) == {"a"}
    assert LayerIndex(index._path).remembered("one", ["a", "b"]) == {"a", "b"}


def test_what_was_wrong_is_forgotten(index: LayerIndex) -> None:
    """Of that engine, and of these layers."""
    index.learn("one", [("d1", "a"), ("d2", "b")])
    index.learn("two", [("d1", "a")])
    index.forget("one", ["a"])
    assert index.remembered("one", ["a", "b"]) == {"b"}
    assert index.remembered("two", ["a"]) == {"a"}


def test_the_oldest_make_room(index: LayerIndex) -> None:
    """What was seen again counts as new."""
    for n in range(10):
        index.learn("one", [(f"d{n}", f"layer {n}")])
    index.learn("one", [("d0", "layer 0")])
    index.learn("one", [("d10", "layer 10")])
    assert index.remembered("one", [f"layer {n}" for n in range(11)]) == {
        f"layer {n}" for n in (0, *range(3, 11))
    } | {"layer 2"} - {"layer 1"}


def test_a_torn_file_is_begun_anew(index: LayerIndex) -> None:
    """It is a cache: nothing in it is worth a failed deployment."""
    index.learn("one", [("d1", "a")])
    index._path.write_bytes(b"no database" * 1000)
    assert index.digests(["a"]) == frozenset()
    index.learn("one", [("d1", "a")])
    assert index.digests(["a"]) == {"d1"}


def test_rival_writers_lose_nothing(tmp_path: Path) -> None:
    """Three processes at once, beginning with no file."""
    path = tmp_path / "layers.sqlite3"
    writers = [subprocess.Popen([sys.executable, "-c", LEARN, str(path), str(n)]) for n in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    wanted = {f"layer-{writer}-{n}" for writer in range(3) for n in range(25)}
    assert LayerIndex(path).remembered("engine", wanted) == wanted
