"""Loaded by every Python process of a fault lab, whose environment names this folder in PYTHONPATH.

Does nothing without GANTRY_FAULT_DIR: product code has no hooks of its own.
"""

import os
import time

if "GANTRY_FAULT_DIR" in os.environ:
    if "faketime" in os.environ.get("LD_PRELOAD", ""):
        import select

        # Python's own sleep takes an absolute time, which libfaketime refuses.
        def sleep(seconds: float) -> None:
            select.select((), (), (), seconds)

        setattr(time, "sleep", sleep)  # noqa: B010 - mypy knows no assignment to a function

    from tests.faults.inject import wrapping

    wrapping.install()
