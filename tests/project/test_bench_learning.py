"""The learning benchmark: what it reads, prints and plots, and how it resumes."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from coderl.cli import main as coderl
from tests.benchmarks import bench_learning
from tests.benchmarks.bench_learning import QUICKSTART, REFERENCE, VARIANTS, arguments, planned
from tests.benchmarks.learning_curves import (
    COLUMNS,
    Curve,
    finished,
    markdown,
    read_curve,
    read_metrics,
    table,
)
from tests.benchmarks.learning_figure import BLUE, GREY, draw, over_seeds, running_mean
from tests.benchmarks.learning_runs import Run, perform

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAKE = """
import json, os, sys, time
from pathlib import Path
folder = Path(next(a for a in sys.argv if "default_root_dir" in a).partition("=")[2])
with Path("calls").open("a") as calls:
    calls.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {folder.name}\\n")
if "--fail" in sys.argv:
    sys.exit("Traceback\\n\\rstep 1\\rcoderl: error: as asked \\n\\n")
logs = folder / "logs" / "version_0"
logs.mkdir(parents=True)
(logs / "metrics.csv").write_text("rollout_step,reward/passed,seconds/update\\n1,0.5,2\\n")
time.sleep(60 if "--hang" in sys.argv else 0)
scores = {"before": {"pass@1": 0.25}, "after": {"pass@1": 0.5}}
(folder / "summary.json").write_text(json.dumps(scores | {"seconds": 3}))
"""
"""A ``coderl`` that trains nothing, and writes down that it was called."""


def steps(count: int, seed: int, **more: float) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [
        {"rollout_step": i + 1, "reward/passed": chance.random(), "seconds/rollout": i, "seconds/update": 1}
        | more
        for i in range(count)
    ]


def run_folder(folder: Path, rows: list[dict[str, Any]], before: float = 0.4, after: float = 0.6) -> Path:
    """As a finished fit leaves it."""
    logs = folder / "logs" / "version_0"
    logs.mkdir(parents=True)
    with (logs / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    summary = {"seconds": 100 * after, "before": {"pass@1": before}, "after": {"pass@1": after}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def curve(variant: str, seed: int, after: float, rows: list[dict[str, Any]] | None = None) -> Curve:
    return Curve(variant, seed, 0.4, after, 100 * after, steps(9, seed) if rows is None else rows)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where ``python -m coderl`` is the fake, with the file of its calls."""
    (tmp_path / "coderl").mkdir()
    (tmp_path / "coderl" / "__init__.py").write_text(
        f"__version__ = '0'\n__path__.append({str(ROOT / 'coderl')!r})"
    )
    (tmp_path / "coderl" / "__main__.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    calls = tmp_path / "calls"
    calls.touch()
    return calls


# -- reading -------------------------------------------------------------------------------------------------


def test_metrics_hold_only_what_is_known_of_rollout_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("final_eval,policy/kl,reward/passed,rollout_step\n,,nan,2.0\n,0.1,0.5,1.0\n0.7,,,\n")
    assert read_metrics(path) == [
        {"policy/kl": 0.1, "reward/passed": 0.5, "rollout_step": 1.0},
        {"rollout_step": 2.0},
    ]


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    rows = steps(3, 0)
    expected = Curve("ppo-critic", 7, 0.4, 0.6, 60.0, rows)
    assert finished(run_folder(tmp_path / "ppo-critic-7", rows)) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", None),
        ("summary.json", '{"seconds": 1, "before": {"pa'),
        ("summary.json", '{"seconds": 1, "before": {"pass@1": 0.1}, "after": null}'),
        ("summary.json", '{"seconds": 1, "before": {"pass@1": 0.1}, "after": {"pass@1": null}}'),
        ("summary.json", '{"seconds": 1}'),
        ("logs/version_0/metrics.csv", None),
        ("logs/version_0/metrics.csv", ""),
        ("logs/version_0/metrics.csv", "rollout_step,reward/passed\n,0.5\n"),
    ],
)
def test_a_half_finished_folder_is_not_taken_for_complete(
    tmp_path: Path, name: str, text: str | None
) -> None:
    folder = run_folder(tmp_path / "grpo-1", steps(3, 0))
    assert finished(folder) is not None
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    assert finished(folder) is None


# -- the table -----------------------------------------------------------------------------------------------


def test_a_row_of_the_table_is_computed_from_its_seeds() -> None:
    early = [{"rollout_step": float(i), "seconds/a": 10.0, "groups/no_signal": 1.0} for i in range(4)]
    late = [
        {
            "rollout_step": float(i),
            "seconds/a": 1.0,
            "seconds/b": 0.5,
            "groups/no_signal": 0.2,
            "policy/kl": 0.1,
        }
        for i in range(4, 9)
    ]
    (row,) = table([curve("k3", 1, 0.5, early + late), curve("k3", 2, 0.9, early + late)])
    assert (row.seeds, row.steps, row.after_lowest, row.after_highest) == ([1, 2], 9, 0.5, 0.9)
    assert [row.before, row.after, row.gain] == pytest.approx([0.4, 0.7, 30])
    assert (row.seconds_a_step, row.seconds) == (1.5, 70)
    assert [row.no_signal, row.kl] == pytest.approx([0.2, 0.1]) and row.entropy is None


def test_the_greatest_gain_comes_first_and_every_cell_is_there() -> None:
    rows = table([curve("low", 1, 0.5), curve("high", 1, 0.7), curve("low", 2, 0.6)])
    assert [row.variant for row in rows] == ["high", "low"]
    lines = markdown(rows).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    assert lines[3].startswith("| low | 2 | 40.0 | 55.0 (50.0 to 60.0) | +15.0 | 9 |")


# -- the figure ----------------------------------------------------------------------------------------------


def test_the_running_mean_is_that_of_the_last_five_steps() -> None:
    one = curve("grpo", 3, 0.5)
    passed = [step["reward/passed"] for step in one.steps]
    expected = {i + 1: sum(passed[max(0, i - 4) : i + 1]) / min(i + 1, 5) for i in range(9)}
    assert running_mean(one) == pytest.approx(expected)


def test_the_band_spans_the_seeds_at_the_steps_that_all_have() -> None:
    curves = [curve("grpo", seed, 0.5, steps(9 - seed, seed)) for seed in range(3)]
    means = [running_mean(one) for one in curves]
    points = over_seeds(curves)
    assert [step for step, *_ in points] == [1, 2, 3, 4, 5, 6, 7]
    for step, mean, lowest, highest in points:
        values = [100 * each[step] for each in means]
        assert [mean, lowest, highest] == pytest.approx([fmean(values), min(values), max(values)])


def colours(path: Path) -> Counter[str]:
    """How many pixels have each, to a sixteenth: a palette moves them a little."""
    from PIL import Image

    counted: Counter[str] = Counter()
    with Image.open(path) as image:
        assert (image.format, image.width) == ("PNG", 1800)
        found: Any = image.convert("RGB").getcolors(1 << 24)
    for pixels, rgb in found:
        counted[near("#" + bytes(rgb).hex())] += pixels
    return counted


def near(colour: str) -> str:
    return "".join(f"{int(colour[i : i + 2], 16) // 16:x}" for i in (1, 3, 5))


def test_two_run_folders_make_a_small_figure(tmp_path: Path) -> None:
    curves = [
        read_curve(run_folder(tmp_path / f"{name}-1", steps(30, seed), after=0.5 + seed / 10))
        for seed, name in enumerate(["grpo", "dapo"])
    ]
    draw(curves, tmp_path / "new" / "both.png", REFERENCE)
    draw(curves[:1], tmp_path / "one.png", REFERENCE)
    assert (tmp_path / "new" / "both.png").stat().st_size < 150_000
    both, one = colours(tmp_path / "new" / "both.png"), colours(tmp_path / "one.png")
    assert min(both[near(BLUE)], one[near(BLUE)]) > 2000
    assert both[near(GREY)] > 1000 + one[near(GREY)]


# -- the runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_coderl_takes_the_flags_of_a_variant(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = shlex.split(VARIANTS[variant])
    assert coderl(["fit", "-c", QUICKSTART, *flags, "--print_config"]) == 0, capsys.readouterr().err


def test_all_make_equally_many_steps_and_seeds_come_in_the_outer_loop() -> None:
    words = ["--variants", "grpo,gspo-2", "--seeds", "5,6", "--steps", "10", "--", "--data.limit_test", "4"]
    runs = planned(arguments(words))
    assert [run.folder.name for run in runs] == ["grpo-5", "gspo-2-5", "grpo-6", "gspo-2-6"]
    assert all("--trainer.max_steps=10" in run.flags for run in runs)
    assert runs[2].flags[-2:] == ("--data.limit_test", "4") and "--seed_everything=6" in runs[2].flags


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(["--variants", "grpo,gpro"])
    assert "no variant gpro" in capsys.readouterr().err


def test_a_complete_run_is_not_repeated(fake: Path) -> None:
    run = Run("grpo", 1, ("-x",), fake.parent / "out")
    assert [perform(run, threads=3), perform(run, threads=3)] == [None, None]
    (call,) = fake.read_text().splitlines()
    assert call.split()[1:] == ["3", "grpo-1"]
    assert finished(run.folder) is not None


def test_the_leftovers_of_a_killed_benchmark_are_run_again(fake: Path) -> None:
    run = Run("grpo", 1, (), fake.parent / "out")
    run_folder(run.folder, steps(3, 0))
    (run.folder / "summary.json").unlink()
    run.beside(".flags.json").write_text('["-c", "qui')
    assert perform(run, threads=None) is None
    assert [step["reward/passed"] for step in read_curve(run.folder).steps] == [0.5]


def test_a_failure_is_reported_by_its_last_line(fake: Path) -> None:
    run = Run("grpo", 1, ("--fail",), fake.parent / "out")
    assert perform(run, threads=None) == "exit code 1: coderl: error: as asked"


def test_complete_runs_and_folders_of_others_are_not_touched(fake: Path) -> None:
    run = Run("grpo", 1, ("-x",), fake.parent / "out")
    run_folder(run.folder, steps(3, 0))
    assert "not made by this benchmark" in (perform(run, threads=None) or "")
    run.beside(".flags.json").write_text('["-y"]')
    assert "made with other flags" in (perform(run, threads=None) or "")
    with run.beside(".flags.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert perform(run, threads=None) == "another benchmark is at it"
    assert not fake.read_text() and finished(run.folder) is not None


def test_the_benchmark_goes_on_after_a_failure(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_learning, "VARIANTS", {"bad": "--fail", "good": ""})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = ["--seeds", "1,2", "--out", "out", "--variants", "bad,good"]
    assert bench_learning.main(words) == 1
    output = capsys.readouterr()
    assert "| good | 2 | 25.0 | 50.0 (50.0 to 50.0) | +25.0 | 1 |" in output.out
    assert "bad-2: FAILED, exit code 1: coderl: error: as asked" in output.err
    written = json.loads(Path("out/learning.json").read_text())
    assert set(written["failed"]) == {"bad-1", "bad-2"} and written["rows"][0]["gain"] == 25
    assert Path("out/learning.png").is_file()
    assert bench_learning.main([*words, "--variants", "good"]) == 0


def wait_for(happened: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_is_stopped_with_its_benchmark(fake: Path, how: signal.Signals) -> None:
    words = [sys.executable, "-m", "tests.benchmarks.bench_learning", "--variants", "grpo", "--seeds", "1"]
    paths = {"PYTHONPATH": str(ROOT)}
    bench = subprocess.Popen([*words, "--out", "out", "--", "--hang"], env=os.environ | paths)
    wait_for(lambda: Path("out/grpo-1/logs/version_0/metrics.csv").is_file())
    bench.send_signal(how)
    assert bench.wait(10) != 0
    pid = int(fake.read_text().split()[0])
    wait_for(lambda: not alive(pid))
    assert finished(Path("out/grpo-1")) is None
