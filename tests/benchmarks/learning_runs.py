"""The runs of a learning benchmark: each a ``coderl fit`` in a process of its own."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tests.benchmarks.learning_curves import finished, percent

_LIBC = ctypes.CDLL(None)
_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Run:
    """One fit, to be made or to be read.

    Attributes:
        variant: Its name in :data:`VARIANTS`.
        seed: What everything is seeded with.
        flags: What ``coderl fit`` gets, but for the run folder.
        out: The folder that the run folder lies in.
    """

    variant: str
    seed: int
    flags: tuple[str, ...]
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.variant}-{self.seed}"

    def beside(self, ending: str) -> Path:
        return self.out / f"{self.folder.name}{ending}"


def perform(run: Run, threads: int | None) -> str | None:
    """Make a run unless it is there already.

    Args:
        run: Which one. What a killed benchmark has left of it is removed.
        threads: Of OpenMP, None for as many as torch takes.

    Returns:
        Why there is no finished run, None where there is one.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    if run.folder.exists() and not run.beside(".flags.json").exists():
        return f"{run.folder} was not made by this benchmark: remove it, or name another folder with --out"
    with run.beside(".flags.json").open("a+", encoding="utf-8") as noted:
        try:
            fcntl.flock(noted, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another benchmark is at it"
        if (curve := finished(run.folder)) is None:
            return fit(run, noted, threads)
        if flags_in(noted) != list(run.flags):
            return f"{run.folder} was made with other flags: remove it, or name another folder with --out"
    say(run, f"is there already, {percent(curve.before)} to {percent(curve.after)} %")
    return None


def flags_in(noted: TextIO) -> Any:
    noted.seek(0)
    try:
        return json.load(noted)
    except ValueError:  # killed as it was written
        return None


def fit(run: Run, noted: TextIO, threads: int | None) -> str | None:
    """``coderl fit`` in a process that ends with this one."""
    for folder in (run.folder, run.beside("-merged")):
        shutil.rmtree(folder, ignore_errors=True)
    noted.truncate(0)
    json.dump(run.flags, noted)
    noted.flush()
    say(run, "begins")
    command = [sys.executable, "-m", "coderl", "fit", *run.flags, f"--trainer.default_root_dir={run.folder}"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with run.beside(".log").open("w") as log, run.beside(".err").open("w") as errors:
        done = subprocess.run(
            command, check=False, stdout=log, stderr=errors, env=environment, preexec_fn=end_with_parent
        )
    if done.returncode or (curve := finished(run.folder)) is None:
        last = last_line(run.beside(".err").read_text(encoding="utf-8", errors="replace"))
        return f"exit code {done.returncode}: {last or 'nothing on stderr'}"
    say(run, f"{percent(curve.before)} to {percent(curve.after)} % in {curve.seconds:.0f} s")
    return None


def end_with_parent() -> None:
    """Let the kernel end a run whose benchmark is killed: it would write into what the next one makes."""
    _LIBC.prctl(_SET_PDEATHSIG, signal.SIGKILL)


def last_line(text: str) -> str:
    """The last line that says something; progress bars end theirs with a carriage return."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def say(run: Run, text: str) -> None:
    print(f"{run.folder.name}: {text}", file=sys.stderr, flush=True)
