"""What a Dockerfile takes from elsewhere: images and remote files. Pure; builds and fetches nothing.

Reads no more of the language than that takes. What it cannot tell it returns as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_ASSIGNMENT = re.compile(r"""([A-Za-z_]\w*)(?:=("[^"]*"|'[^']*'|\S*))?""")
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?::?([-+])([^${}]*))?\}|([A-Za-z_]\w*))")
_HEREDOC = re.compile(r"(?:^|\s)\d*<<-?[\"']?([A-Za-z_]\w*)[\"']?(?=\s|$|>)")
_SOURCE = re.compile(r"--from=(\S+)|--mount=\S*?\bfrom=([^,\s]+)")
_REMOTE = re.compile(r"(?:^|[\s\"\[])(?:https?://|git://|git@|ssh://)")


def base_images(dockerfile: str, build_args: Mapping[str, str]) -> list[str]:
    """Images that the Dockerfile starts or copies from, each once; its own stages and `scratch` left out.

    A reference that still holds a variable is returned as it stands.
    """
    values: dict[str, str] = {}
    stages, is_before_first, found = {"scratch"}, True, list[str]()
    for keyword, rest in _instructions(dockerfile):
        used: list[str] = []
        if keyword == "ARG" and is_before_first:
            _declare(rest, values, build_args)
        elif keyword == "FROM":
            reference, stage = _from(rest)
            used = [_expand(reference, values)]
        elif keyword in {"COPY", "ADD", "RUN"}:
            sources = [one or other for one, other in _SOURCE.findall(rest)]
            used = [name for name in sources if not name.isdigit()]
        found += [name for name in used if name.lower() not in stages]
        if keyword == "FROM":
            is_before_first = False
            stages.add(stage)
    return list(dict.fromkeys(found))


def fetches_files(dockerfile: str) -> bool:
    """True when an ADD takes something from the network that no checksum pins."""
    return any(
        keyword == "ADD" and _REMOTE.search(rest) is not None and "--checksum=" not in rest
        for keyword, rest in _instructions(dockerfile)
    )


def _instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """Each instruction's keyword and arguments: lines joined, comments and here-documents left out."""
    lines, begun, position = dockerfile.splitlines(), "", 0
    while position < len(lines):
        text = lines[position].strip()
        position += 1
        if not text or text.startswith("#"):
            continue
        if text.endswith("\\"):
            begun += text[:-1] + " "
            continue
        keyword, _, rest = (begun + text).replace("\t", " ").strip().partition(" ")
        begun = ""
        yield keyword.upper(), rest.strip()
        if keyword.upper() in {"RUN", "COPY", "ADD"}:
            position = _after_heredocs(lines, position, _HEREDOC.findall(rest))


def _after_heredocs(lines: list[str], position: int, words: list[str]) -> int:
    """Where to read on; a word without an end was no here-document."""
    for word in words:
        ends = (number for number in range(position, len(lines)) if lines[number].strip() == word)
        position = next(ends, position - 1) + 1
    return position


def _from(rest: str) -> tuple[str, str]:
    words = [word for word in rest.split() if not word.startswith("--")] or [""]
    is_named = len(words) > 2 and words[1].upper() == "AS"
    return words[0].strip("\"'"), words[2].lower() if is_named else ""


def _declare(rest: str, values: dict[str, str], build_args: Mapping[str, str]) -> None:
    """Take the variables of one ARG: the caller's value, else the default, which may use those before."""
    for name, default in _ASSIGNMENT.findall(rest):
        if name in build_args:
            values[name] = build_args[name]
        elif default:
            values[name] = _expand(default.strip("\"'"), values)


def _expand(text: str, values: Mapping[str, str]) -> str:
    def value_of(match: re.Match[str]) -> str:
        name, operator, word = match[1] or match[4], match[2], match[3]
        if operator == "+":
            return str(word) if values.get(name) else ""
        return values.get(name) or (str(word) if operator else match[0])

    return _VARIABLE.sub(value_of, text)
