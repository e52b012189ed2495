"""A long fit of quickstart-size steps, and what it holds on to: memory, descriptors, processes, disk.

    python -m tests.benchmarks.bench_soak [--steps 2000] [--json FILE]

Prints a row for each twentieth of the fit. A leak shows as a column that keeps rising; the disk grows by the
completions and the metrics of each step, which are meant to be kept, and is listed without them too.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from coderl.runs.folder import RunFolder

ROWS = 20
KEPT = ("completions", "samples", "metrics.csv", "console.log")
"""Beginnings of the names of files that grow by each step, on purpose."""


def held(process: psutil.Process, folder: Path) -> dict[str, float]:
    """What a process holds, alone and with all that it has started."""
    tree = [process, *process.children(recursive=True)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    growing = [path for path in files if path.name.startswith(KEPT)]
    return {
        "memory_mb": process.memory_info().rss / 1e6,
        "tree_mb": sum(one.memory_info().rss for one in tree) / 1e6,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "processes": len(tree),
        "disk_mb": sum(path.stat().st_size for path in files) / 1e6,
        "disk_fixed_mb": sum(path.stat().st_size for path in files if path not in growing) / 1e6,
    }


def steps_done(folder: Path) -> int:
    """Steps that the run has logged."""
    found = [path for path in RunFolder(folder).metrics() if path.exists()]
    if not found:
        return 0
    with found[-1].open() as file:
        rows = list(csv.DictReader(file))
    return max((int(float(row["rollout_step"])) for row in rows if row.get("rollout_step")), default=0)


def soak(steps: int, folder: Path) -> list[dict[str, float]]:
    """Fit for so many steps, and look at it from outside."""
    # It is the steps that are looked at. A small constant rate keeps samples varied to the end.
    options = ["--trainer.max_steps", str(steps), "--trainer.default_root_dir", str(folder)]
    options += ["--trainer.callbacks.evaluate", "false", "--trainer.callbacks.merge", "false"]
    options += ["--model.schedule", "constant_with_warmup", "--model.learning_rate", "1e-5"]
    command = [sys.executable, "-m", "coderl", "fit", "-c", "quickstart.yaml", *options]
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    with subprocess.Popen(
        [*command, "--trainer.enable_progress_bar", "false"], stdout=subprocess.DEVNULL
    ) as fit:
        process = psutil.Process(fit.pid)
        while fit.poll() is None:
            time.sleep(5)
            done = steps_done(folder)
            if done >= (len(rows) + 1) * steps / ROWS:
                try:
                    found = held(process, folder)
                except psutil.NoSuchProcess:  # it ended meanwhile
                    continue
                if not found["memory_mb"]:
                    continue
                rows.append({"step": done, "seconds": time.monotonic() - began} | found)
                print(" ".join(f"{key} {value:,.0f}" for key, value in rows[-1].items()), flush=True)
    if fit.returncode:
        raise SystemExit(f"the fit failed after step {steps_done(folder)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows: list[dict[str, Any]] = soak(given.steps, Path(folder, "soak"))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
