"""Whether an engine's push is the quick way to export an image. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tasks.errors import BuildFailed

# An engine compresses what it pushes, a layer on one core, and reads the whole image when it saves one.
# Measured with Docker 20.10: what counts is their ratio.
PUSHED_BYTES_PER_SECOND = 20_000_000
SAVED_BYTES_PER_SECOND = 110_000_000
_MIB = 1024 * 1024
_LEEWAY_BYTES = 64 * _MIB
_TAR_OVERHEAD = 1.3  # of many small files


class PushUnsuitable(BuildFailed):
    """The engine's push is not the way to export this image; nothing was yielded yet"""

    next_step = "Export the image as an archive instead."

    def __init__(self, cause: str) -> None:
        super().__init__(cause, retryable=False)


@dataclass(frozen=True)
class PushPlan:
    """What a push would send: `sent_bytes` of an image of `image_bytes`, uncompressed, at most."""

    sent_bytes: int
    image_bytes: int

    @classmethod
    def of(cls, sizes: Mapping[str, int], omitted: Collection[str], remembered: Collection[str]) -> PushPlan:
        """`sizes` by diff id; a layer is not sent when it is omitted and the engine remembers its digest."""
        sent = sum(size for diff_id, size in sizes.items() if diff_id not in {*omitted} & {*remembered})
        return cls(sent, sum(sizes.values()))

    @property
    def is_quick(self) -> bool:
        """True when it takes less time than to save the whole image."""
        return self.sent_bytes / PUSHED_BYTES_PER_SECOND < self.image_bytes / SAVED_BYTES_PER_SECOND

    @property
    def limit_bytes(self) -> int:
        """More than this means that the engine sends what it was thought to know."""
        return int(self.sent_bytes * _TAR_OVERHEAD) + _LEEWAY_BYTES

    def check(self, free_bytes: int) -> None:
        """Raises `PushUnsuitable`."""
        if not self.is_quick:
            raise PushUnsuitable(
                f"the engine would compress {self.sent_bytes / _MIB:.0f} of "
                f"{self.image_bytes / _MIB:.0f} MiB to push the image: saving it takes less time"
            )
        if self.limit_bytes > free_bytes:
            raise PushUnsuitable(
                f"a push may need {self.limit_bytes / _MIB:.0f} MiB of disk, "
                f"and {free_bytes / _MIB:.0f} MiB are free"
            )


def layer_sizes(layers: Sequence[str], history: Sequence[int]) -> dict[str, int]:
    """Bytes of each layer, at most, by diff id; `history` has the sizes of an image's steps, oldest first.

    The engine does not say which of the steps without a size made an (empty) layer. So a layer's size is
    the largest that it may have.
    """
    steps = [size for size in history if size]
    empty = max(len(layers) - len(steps), 0)
    sizes: dict[str, int] = {}
    for place, diff_id in enumerate(layers):
        may_be = steps[max(place - empty, 0) : place + 1]
        sizes[diff_id] = max(may_be, default=0)
    return sizes
