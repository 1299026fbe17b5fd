"""What of an image had to travel to a host: layers, and bytes before and after compression. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from receiver.contract import PackageFormat, WireModel
from tasks.shared_package import Package


class Delivery(WireModel):
    """How an image came to its host; `way` is `none` when the host had it."""

    way: Literal["none", "archive", "layers"] = "none"
    layers_known: int = 0
    layers_sent: int = 0
    format: PackageFormat | None = None
    unpacked_bytes: int = 0
    package_bytes: int = 0
    package_blake3: str | None = None
    sent_bytes: int = 0

    def __str__(self) -> str:
        if self.way == "none":
            return "the host has the image"
        return f"by {self.way}: {self.layers_sent} of {self.layers_known + self.layers_sent} layers"

    def metrics(self) -> dict[str, Any]:
        """What the records keep of it."""
        return {
            "transferred_bytes": self.sent_bytes,
            "transfer_way": self.way,
            "package_bytes": self.package_bytes,
            "unpacked_bytes": self.unpacked_bytes,
            "layers_known": self.layers_known,
            "layers_sent": self.layers_sent,
        }


def delivered(package: Package, layers: Sequence[str], sent_bytes: int) -> Delivery:
    """The delivery of an image with these layers by this package."""
    known = sum(1 for layer in layers if layer in package.key.omitted)
    return Delivery(
        way=package.way,
        layers_known=known,
        layers_sent=len(layers) - known,
        format=package.key.format,
        unpacked_bytes=package.unpacked_bytes,
        package_bytes=package.size_bytes,
        package_blake3=package.blake3,
        sent_bytes=sent_bytes,
    )


def already_there(layers: Sequence[str]) -> Delivery:
    """The host had the image."""
    return Delivery(layers_known=len(layers))
