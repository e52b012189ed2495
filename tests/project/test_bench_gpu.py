"""The GPU's benchmark, at its smallest and on the CPU: every part runs, and a slow one ends in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def bench(out: Path, *more: str) -> tuple[int, dict[str, dict[str, object]], str]:
    words = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--size", "tiny", "--out", str(out), *more]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, json.loads((out / "gpu.json").read_text()), done.stdout


def test_every_part_runs_and_gives_its_figures(tmp_path: Path) -> None:
    code, found, said = bench(tmp_path, "--parts", "grpo,ppo,evaluate,plan,step")
    assert code == 0, found
    assert set(found["grpo"]) >= {"before", "after", "seconds", "rollout", "update"}
    assert set(found["ppo"]) >= {"before", "after", "scoring"}
    assert 0 <= float(str(found["evaluate"]["sums"])) <= 1
    assert float(str(found["plan"]["peak_gb"])) > 0.2
    assert set(found["step"]) >= {"seconds", "tokens_per_second", "peak_gb", "phases"}
    assert (tmp_path / "gpu.md").read_text() in said and said.count("| grpo |") == 2


def test_a_part_that_takes_too_long_or_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    code, found, _ = bench(tmp_path, "--parts", "grpo,doctor,trl", "--budget", "10")
    assert code == 1
    assert found["grpo"] == {"failed": "not done within 10 s"}
    assert found["doctor"] == found["trl"] == {"failed": "no time was left"}
