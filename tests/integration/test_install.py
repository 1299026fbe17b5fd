"""What `pip install` gives: a host that has no Prefect runs the daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
FOREIGN = ("prefect", "sqlalchemy", "aiokafka")


def test_the_receiver_extra_alone_gives_a_working_daemon(tmp_path: Path) -> None:
    """`pip install .[receiver]` brings no Prefect, and `python -m receiver` starts from anywhere."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "-c", "constraints.txt", ".[receiver]"]
    subprocess.run([python, *install], cwd=PROJECT, check=True, capture_output=True)
    look = f"import importlib.util as u; print([n for n in {FOREIGN} if u.find_spec(n)])"
    found = subprocess.run(
        [python, "-c", look], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert found.strip() == "[]"
    environment = {
        "PATH": os.environ["PATH"],
        "HMAC_SECRET_KEY": "k" * 32,
        "HOOK_RECEIVER_STATE_DIR": str(tmp_path / "state"),
    }
    check = subprocess.run(
        [python, "-m", "receiver", "--check"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr
