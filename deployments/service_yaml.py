"""YAML with the line of everything in it. Knows nothing of services."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Place = tuple[str | int, ...]


class YamlRefused(Exception):
    """The text is no YAML that can be used"""

    def __init__(self, problem: str, line: int) -> None:
        """`line` counts from 1."""
        super().__init__(problem)
        self.line = line


@dataclass(frozen=True)
class Document:
    """What the text says (`data`), where (`line_of`), and the keys that it says twice, with their lines."""

    data: Any
    root: Node | None
    repeated: list[tuple[Place, int]]

    def line_of(self, place: Place) -> int:
        """Line of what stands at `place`, from 1, or of the innermost part of it that is there."""
        line = self.root.start_mark.line + 1 if self.root else 1
        node = self.root
        for part in place:
            inner = _inner(node, part)
            if inner is None:
                break
            line, node = inner
        return line


def read(text: bytes) -> Document:
    """Read one YAML document; raises `YamlRefused`."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        repeated = [] if root is None else list(_repeated(root, (), set()))
        return Document(None if root is None else loader.construct_document(root), root, repeated)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        said = ", ".join(part for part in (exc.context, exc.problem) if part)
        raise YamlRefused(said, mark.line + 1 if mark else 1) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise YamlRefused(f"{exc}; save it as UTF-8", 1) from exc
    except (ValueError, RecursionError) as exc:  # a date that no calendar has; an anchor inside itself
        raise YamlRefused(f"{exc or type(exc).__name__}", 1) from exc


def _inner(node: Node | None, part: str | int) -> tuple[int, Node] | None:
    """Line and value of one part; of a key that merges brought in more than once, the one that counts."""
    if isinstance(node, MappingNode):
        found = [(key, value) for key, value in node.value if key.value == str(part)]
        return (found[-1][0].start_mark.line + 1, found[-1][1]) if found else None
    if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        item: Node = node.value[part]
        return item.start_mark.line + 1, item
    return None


def _repeated(node: Node, place: Place, seen: set[int]) -> Iterator[tuple[Place, int]]:
    """Keys that a mapping has twice: YAML parsers keep the last one silently."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated(item, (*place, index), seen)
    elif isinstance(node, MappingNode):
        keys = set[str]()
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else ""
            if name in keys:
                yield (*place, name), key.start_mark.line + 1
            keys.add(name)
            yield from _repeated(value, (*place, name), seen)
