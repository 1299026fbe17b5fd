"""Which version of its API an engine speaks, asked by a ping.

`GET /version`, which Docker's library asks, has the engine start `runc` and others to learn their versions:
ten times as long.
"""

from __future__ import annotations

from contextlib import closing

import docker
from docker.errors import DockerException
from requests.exceptions import RequestException

_ANY_VERSION = "1.24"  # a ping has none: no engine is asked for this one
_HEADER = "Api-Version"


def newest_api_version(base_url: str, timeout_seconds: int = 10) -> str:
    """The newest that the engine speaks; raises docker's `DockerException` when it does not answer."""
    with closing(docker.APIClient(base_url=base_url, version=_ANY_VERSION, timeout=timeout_seconds)) as probe:
        try:
            answer = probe.get(f"{probe.base_url}/_ping", timeout=timeout_seconds)
            answer.raise_for_status()
        except (RequestException, OSError) as exc:
            raise DockerException(f"the ping was not answered: {exc}") from exc
    if _HEADER not in answer.headers:
        raise DockerException(f"the answer to the ping tells no {_HEADER}")
    return str(answer.headers[_HEADER])
