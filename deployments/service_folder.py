"""Reads a folder of service files: all are right, or every mistake is named with file, line and field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deployments import service_yaml
from deployments.service_files import PARAMETERS, ServiceFile
from deployments.service_yaml import Document, Place, YamlRefused
from receiver.references import check_container_name
from tasks.errors import ParametersRefused
from tasks.parameters import check_paths

FOLDER = Path("deployments/services")
# Names that people bring along from the parameters of `deploy-container`.
_HERE = {parameter: key for key, parameter in PARAMETERS.items()} | {"image_tag": "image.tag"}
# Prefect deployments of `deploy-container` that prefect.yaml itself has.
_TAKEN = {"default"}
_FIXES = {
    "string_type": "put the value in quotes",
    "list_type": "write a list: '- ' before each item, or [one, two]",
    "tuple_type": "write a list: '- ' before each item, or [one, two]",
    "dict_type": "write 'name: value' lines, indented",
    "bool_type": "use true or false",
    "bool_parsing": "use true or false",
    "missing": "add it",
}


@dataclass(frozen=True)
class Mistake:
    """One thing to correct in a service file."""

    path: Path
    line: int
    field: str
    problem: str

    def __str__(self) -> str:
        """As compilers write it, so that editors jump there."""
        return f"{self.path}:{self.line}: {self.field}: {self.problem}"


class ServicesRefused(Exception):
    """Service files have mistakes"""

    def __init__(self, mistakes: list[Mistake]) -> None:
        """Carries all of them."""
        super().__init__("\n".join(str(mistake) for mistake in mistakes))
        self.mistakes = mistakes


@dataclass(frozen=True)
class Service:
    """A service file that was read and is right; `name` is the file's."""

    name: str
    path: Path
    file: ServiceFile

    @property
    def targets(self) -> dict[str, str]:
        """Name of each of its Prefect deployments, and the host."""
        return self.file.targets(self.name)


def read_folder(folder: Path = FOLDER) -> list[Service]:
    """All services of a folder, by name; raises `ServicesRefused` with every mistake.

    Relative build contexts are looked for from the current folder.
    """
    if not folder.is_dir():
        problem = f"there is no such folder here ({Path.cwd()}); name one with --folder"
        raise ServicesRefused([Mistake(folder, 1, "folder", problem)])
    services, mistakes = list[Service](), list[Mistake]()
    for path in sorted(path for path in folder.iterdir() if _is_service_file(path)):
        try:
            services.append(read_service(path))
        except ServicesRefused as exc:
            mistakes += exc.mistakes
    mistakes += _names_given_twice(services)
    if mistakes:
        raise ServicesRefused(mistakes)
    return services


def read_service(path: Path) -> Service:
    """One service; raises `ServicesRefused`."""
    try:
        document = service_yaml.read(path.read_bytes())
    except YamlRefused as exc:
        raise ServicesRefused([Mistake(path, exc.line, "YAML", f"{exc}; correct the YAML")]) from exc
    mistakes = [
        Mistake(path, line, _written(place), "the key stands here for the second time; take one away")
        for place, line in document.repeated
    ]
    try:
        file = ServiceFile.model_validate({} if document.data is None else document.data)
        mistakes += _wrong_paths(path, document, file)
    except ValidationError as exc:
        mistakes += [_mistake(path, document, error) for error in exc.errors(include_url=False)]
    mistakes += _wrong_name(path)
    if mistakes:
        raise ServicesRefused(sorted(mistakes, key=lambda mistake: mistake.line))
    return Service(path.stem, path, file)


def _is_service_file(path: Path) -> bool:
    return path.suffix in {".yaml", ".yml"} and not path.name.startswith(".") and path.is_file()


def _wrong_name(path: Path) -> Iterator[Mistake]:
    try:
        check_container_name(path.stem)
    except ValueError as exc:
        yield Mistake(path, 1, "file name", f"as a {exc}")


def _wrong_paths(path: Path, document: Document, file: ServiceFile) -> Iterator[Mistake]:
    try:
        check_paths(file.image)
    except ParametersRefused as exc:
        place = ("image", exc.field.rpartition(".")[2])
        problem = str(exc).removeprefix(f"{exc.field}: ")
        yield Mistake(path, document.line_of(place), _written(place), problem)


def _names_given_twice(services: list[Service]) -> Iterator[Mistake]:
    """Two files, or a file and prefect.yaml, must not write the same Prefect deployment."""
    owners: dict[str, Path | str] = dict.fromkeys(_TAKEN, "prefect.yaml")
    for service in services:
        for name in service.targets:
            if name in owners:
                problem = f"deploy-container/{name} is that of {owners[name]} already; rename this file"
                yield Mistake(service.path, 1, "file name", problem)
            owners.setdefault(name, service.path)


def _mistake(path: Path, document: Document, error: ErrorDetails) -> Mistake:
    place = tuple(part for part in error["loc"] if part != "[key]")
    problem = _problem(place, error)
    # A model that is wrong as a whole begins its message with the field, as in "port_mappings: ...".
    named, colon, rest = problem.partition(": ")
    if colon and named.isidentifier() and named in _known_keys(place):
        place, problem = (*place, named), rest
    return Mistake(path, document.line_of(place), _written(place) or "the file", problem)


def _problem(place: Place, error: ErrorDetails) -> str:
    """What is wrong and how to mend it; never the value, which may be secret."""
    kind, known = error["type"], _known_keys(place)
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if error.get("input") is None and kind != "missing":
        return "there is no value; give one, or take the key away"
    if kind in {"model_type", "model_attributes_type"}:
        return f"give it by keys: {', '.join(known)}"
    said = str(error.get("ctx", {}).get("error", error["msg"]))
    if error["loc"][-1:] == ("[key]",) and kind == "string_type":
        return "this key is no text; put it in quotes"
    return f"{said}; {_FIXES[kind]}" if kind in _FIXES else said


def _unknown_key(place: Place) -> str:
    key, known = str(place[-1]), _known_keys(place[:-1])
    is_parameter = len(place) == 1 and key in _HERE
    alike = [_HERE[key]] if is_parameter else difflib.get_close_matches(key, known, n=1)
    if alike:
        return f"there is no such key; it is called {alike[0]} here"
    return f"there is no such key; take it away, or use one of {', '.join(known)}"


def _known_keys(place: Place) -> Mapping[str, object]:
    """Fields of the model that stands at `place`; none where there is no model."""
    model: type[BaseModel] | None = ServiceFile
    for part in place:
        if model is not None and isinstance(part, str):
            field = model.model_fields.get(part)
            model = _model_in(field.annotation) if field else None
    return model.model_fields if model else {}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def _written(place: Place) -> str:
    """`("a", 0, "b")` as `a[0].b`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")
