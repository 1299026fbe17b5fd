"""What all runs that are forked from one process need, done once before they are (`tasks.warm_parent`)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import ssl
import types
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

_ALWAYS = ("prefect.engine", "prefect.flow_engine", "prefect.task_engine")
# What each run would import by itself, where this Prefect has it.
_IF_HERE = (
    *("prefect._internal.metrics", "prefect._internal.observers", "prefect.utilities.visualization"),
    *("anyio._backends._asyncio", "rich._emoji_codes", "netrc", "aiosqlite"),
)


def prepare(modules: Iterable[str]) -> None:
    """Import the modules and whatever else each run would do by itself."""
    for module in (*_ALWAYS, *modules):
        importlib.import_module(module)
    for module in _IF_HERE:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    _build_models()
    with contextlib.suppress(ImportError, AttributeError):  # another Prefect: its runs do it themselves
        _share_tls_contexts()


def _build_models() -> None:
    """Prefect's models put off their building to their first use."""
    waiting = [BaseModel]
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if not model.__pydantic_complete__:
            with contextlib.suppress(Exception):  # whoever uses it is told
                model.model_rebuild(raise_errors=False)


def _share_tls_contexts() -> None:
    """One TLS context for each file of authorities.

    Each of Prefect's clients makes its own, which takes 17 ms, also for a server without TLS; a deployment's
    runs make twenty. Only for Prefect's clients, and only for contexts that they leave as they were made.
    """
    import certifi
    from prefect._internal import version_checking
    from prefect.client import orchestration
    from prefect.settings import PREFECT_API_SSL_CERT_FILE

    @functools.cache
    def of_file(cafile: str, _as_it_is: tuple[int, int] | None) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=cafile)

    def create(*, cafile: str | None = None) -> ssl.SSLContext:
        if cafile is None:
            return ssl.create_default_context()
        return of_file(cafile, stamp(Path(cafile)))

    shared = types.ModuleType(ssl.__name__)
    vars(shared).update(vars(ssl) | {"create_default_context": create})
    for module in (orchestration, version_checking):
        module.ssl = shared  # type: ignore[attr-defined]
    with contextlib.suppress(OSError):  # a file that cannot be read is the run's to tell
        create(cafile=PREFECT_API_SSL_CERT_FILE.value() or certifi.where())


def stamp(path: Path) -> tuple[int, int] | None:
    """Time of the last change and size; None for what is not there."""
    try:
        told = path.stat()
    except OSError:
        return None
    return told.st_mtime_ns, told.st_size
