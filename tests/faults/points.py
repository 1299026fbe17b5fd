"""The points of a deployment where a fault strikes, in the order in which a deployment comes to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["control", "host"]
THROUGHOUT = "throughout"
BEFORE_LOCK = "before lock"


@dataclass(frozen=True)
class Point:
    """A name that the injected hooks know, and whose process comes there."""

    name: str
    side: Side
    is_rollback: bool = False
    is_rolling: bool = False

    @property
    def is_fine(self) -> bool:
        """One of the calls within a step: to the engine, or of the records."""
        return bool({"record", "engine"} & set(self.name.split()))

    def __str__(self) -> str:
        return self.name


def _around(side: Side, *names: str, is_rollback: bool = False, is_rolling: bool = False) -> list[Point]:
    whens = ("before", "after")
    return [Point(f"{when} {name}", side, is_rollback, is_rolling) for name in names for when in whens]


# The twelve operations of the specification, the middle of the upload, and each change of the records.
CONTROL = (
    *_around("control", "record PACKAGING"),
    *_around("control", "build_docker_image", "gather_metadata", "validate_image"),
    *_around("control", "record TRANSFERRING"),
    *_around("control", "establish_connection", "send_deployment_request"),
    Point("mid upload_package", "control"),
    *_around("control", "verify_transfer", "record DEPLOYING"),
)
# Each journalled step of the host, and each call that changes what its engine runs.
HOST = (
    *_around("host", "deploy_container", "engine create_container", "journal prepared"),
    *_around("host", "stop_existing_container", "journal switching", "engine stop", "engine rename"),
    *_around("host", "start_container", "engine rename again", "engine start", "journal validating"),
    *_around("host", "check_container_status", "validate_health_endpoint"),
    *_around("host", "verify_service_registration", "journal kept"),
)
END = (*_around("control", "record VALIDATING", "record COMPLETED"),)
ROLLBACK = (
    *_around("host", "journal failed", "journal restoring", "engine stop again", is_rollback=True),
    *_around("host", "engine start again", "journal restored", is_rollback=True),
    *_around("control", "record ROLLING_BACK", "record ROLLBACK_COMPLETED", is_rollback=True),
)
ALL = (*CONTROL, *HOST, *END, *ROLLBACK)
# What a rolling deployment does that no other does, in a lane whose old version HAProxy serves.
ROLLING = (
    *_around("host", "switch_traffic", "journal moving", "proxy set_route", is_rolling=True),
    *_around("host", "journal draining", "drain_existing_container", is_rolling=True),
)
BY_NAME = {
    **{point.name: point for point in (*ALL, *ROLLING)},
    THROUGHOUT: Point(THROUGHOUT, "control"),
    BEFORE_LOCK: Point(BEFORE_LOCK, "control"),
}
