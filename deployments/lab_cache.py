"""Where a lab keeps what takes long to make or to fetch, for the next lab."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Gantry's own below the user's caches; it may not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gantry"
