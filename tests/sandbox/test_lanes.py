"""What becomes of lanes, processes, descriptors and files, whatever the programs do."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from coderl.sandbox import Program, Sandbox
from coderl.sandbox.inside.wipe import wipe
from tests.support import jails
from tests.support.corpus import GOOD, HOSTILE, SQUARES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TIERS = ("A", "B", "C")
BAD = Program("def f(x): return 0", SQUARES)
ENDLESS = "while True: pass"
CHECK = "def check(f):\n    for i in (0, 1): assert f(i) == i"


def children(of: int | None = None) -> set[int]:
    """Every live descendant of a process, this one by default."""
    gc.collect()  # a sandbox that an earlier test forgot ends now, not halfway through this one
    of = of or os.getpid()
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(path.name)] = int(parent)
    found = {of}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {of}


def alive(processes: set[int]) -> set[int]:
    """Those of the processes that have not ended."""
    found = set()
    for pid in processes:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found |= {pid} if state not in "ZX" else set()
    return found


def descriptors() -> int:
    gc.collect()  # so do files that it left open
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("tier", TIERS)
def test_processes_descriptors_threads_and_folders_return_to_the_baseline(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o711)
    before = children(), descriptors(), threading.active_count()
    daemon = next(row["code"] for row in HOSTILE if row["name"] == "daemon")
    with jails.sandbox(tier, workers=2, timeout=1.0) as pool:
        pool.run([GOOD, Program(daemon, SQUARES)] * 5)
        each = 2 if pool.tier == "A" else 1  # bubblewrap watches over its zygote
        assert len(children() - before[0]) == 2 * each, "one zygote a lane and nothing else between runs"
        assert bool(list(tmp_path.iterdir())) is (tier != "A"), "in tier A nothing is written out here"
        pool.close()
        assert pool.run([GOOD])[0].outcome == "passed", "it may be started again"
    assert (children(), descriptors(), threading.active_count()) == before
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_sandbox_cleans_up() -> None:
    before = children(), threading.active_count()
    pool = Sandbox(workers=1, allow_weak_isolation=True)
    pool.run([GOOD])
    assert children() - before[0]
    del pool
    gc.collect()
    assert (children(), threading.active_count()) == before


@pytest.mark.parametrize("tier", TIERS)
def test_a_killed_lane_is_replaced_and_its_program_run_again(tier: str) -> None:
    with jails.sandbox(tier, workers=2, timeout=5.0) as pool:
        pool.run([GOOD])
        lanes = children()
        slow = Program("import time\ndef f(x):\n time.sleep(0.2)\n return x * x", SQUARES)

        def kill() -> None:
            for pid in lanes:
                os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(0.3, kill)
        timer.start()
        results = pool.run([slow] * 4)
        timer.join()
        assert {result.outcome for result in results} == {"passed"}
        assert {result.outcome for result in pool.run([GOOD] * 8)} == {"passed"}
        assert not lanes & children()


@pytest.mark.parametrize("tier", TIERS)
def test_a_stopped_lane_is_replaced(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coderl.sandbox.lane.GRACE_SECONDS", 0.5)
    with jails.sandbox(tier, workers=1, timeout=0.5) as pool:
        pool.run([GOOD])
        for pid in children():
            os.kill(pid, signal.SIGSTOP)
        assert pool.run([GOOD])[0].outcome == "passed"


def test_lanes_that_never_start_are_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coderl.sandbox.jail.Jail.command", lambda *_: ["/bin/false"])
    with Sandbox(workers=1, allow_weak_isolation=True) as pool:
        (result,) = pool.run([GOOD])
    assert result.outcome == "infra_error"
    assert "lane was lost" in result.message


def test_wiping_a_folder_follows_no_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("here")
    folder = tmp_path / "work"
    deep = folder
    folder.mkdir()
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    (folder / "link").symlink_to(kept)
    (folder / "inner").mkdir()
    (folder / "inner" / "link").symlink_to(kept)
    (folder / "shut").mkdir(0)
    (folder / ".0").write_text("a name that wipe would use")
    assert wipe(str(folder)) is True
    assert list(folder.iterdir()) == []
    assert (kept / "file").read_text() == "here"
    assert wipe(str(tmp_path / "missing")) is False
    (tmp_path / "swapped").symlink_to(kept)
    assert wipe(str(tmp_path / "swapped")) is False
    assert (kept / "file").exists()


def test_a_sandbox_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Sandbox())


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_leaves_nothing_for_the_next(tier: str) -> None:
    with jails.sandbox(tier, workers=1) as pool:
        leave = "import os, builtins\nopen('note', 'w').write('x')\nbuiltins.left = 1\ndef f(x): return x * x"
        look = "import os, builtins\ndef f(x): return [os.listdir('.'), hasattr(builtins, 'left')]"
        results = pool.run([Program(leave, SQUARES), Program(look, ("assert f(0) == [[], False]",))])
    assert [result.outcome for result in results] == ["passed", "passed"]


TRAINER = """
import json, sys, threading
from coderl.sandbox import Program, Sandbox
sandbox = Sandbox(workers=2, timeout=60, allow_weak_isolation=True)
sandbox.run([Program("x = 1", ("assert x == 1 and True",))])
loop = "import os\\ntry:\\n if os.fork() == 0: os.setsid()\\nexcept OSError: pass\\nwhile True: pass"
threading.Thread(target=sandbox.run, args=([Program(loop, ("assert f() == 1",))] * 2,), daemon=True).start()
print("running", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_outlives_a_trainer_that_is_killed(tier: str, tmp_path: Path) -> None:
    jails.jail(tier)
    tmp_path.chmod(0o711)
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = TRAINER
    if tier != "A":
        script = "from tests.support import jails; from coderl.sandbox import pool; "
        script += f"pool.probe = lambda jail=jails.jail({tier!r}): jail\n{TRAINER}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"running\n"
        deadline = time.monotonic() + 20
        while len(started := children(trainer.pid)) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(started) >= 4
        trainer.kill()
    deadline = time.monotonic() + 20
    while (alive(started) or any(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(started) == set()
    assert list(tmp_path.iterdir()) == []


RANK = """
import json, os
os.sched_getaffinity = lambda _: set(range(4))  # whatever this machine has
from coderl.sandbox import Sandbox
from tests.support.corpus import GOOD
from tests.sandbox.test_lanes import BAD
with Sandbox(timeout=20, allow_weak_isolation=True) as sandbox:
    sandbox.start()
    print("started", flush=True)
    input()
    print(json.dumps([sandbox.workers, [result.outcome for result in sandbox.run([GOOD, BAD] * 40)]]))
"""


def test_two_ranks_side_by_side_share_the_cores() -> None:
    environment = os.environ | {"LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.stdout
        assert rank.stdout.readline() == "started\n"
    for rank in ranks:  # both have their lanes: let them go at once
        assert rank.stdin
        rank.stdin.write("go\n")
        rank.stdin.flush()
    for rank in ranks:
        answer, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        workers, outcomes = json.loads(answer)
        assert outcomes == ["passed", "failed"] * 40
        assert workers in (1, 2), "four cores by the scheduler, fewer by a container's quota"


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.4], ids=["starting", "greeting", "running"])
@pytest.mark.parametrize(
    "endless",
    [Program(ENDLESS, SQUARES), Program(f"def f(x):\n {ENDLESS}", test=CHECK, entry_point="f")],
    ids=["sealed", "rpc"],
)
@pytest.mark.parametrize("progress", [False, lambda *_: None], ids=["silent", "watched"])
def test_closing_cuts_runs_short(endless: Program, seconds: float, progress: Any) -> None:
    before = children(), descriptors(), threading.active_count()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            pool.run([endless] * 6, progress=progress)
        except (CancelledError, RuntimeError) as error:
            raised.append(error)

    with Sandbox(workers=2, timeout=30, allow_weak_isolation=True) as pool:
        thread = threading.Thread(target=run)
        thread.start()
        while pool._lane_pools is None:
            time.sleep(0.001)
        time.sleep(seconds)
        began = time.monotonic()
        pool.close()
        assert time.monotonic() - began < 2
        thread.join()
    assert raised, "what was cut short has no verdict"
    assert (children(), descriptors(), threading.active_count()) == before


INTERRUPTED = """
import threading
from coderl.sandbox import Sandbox
from tests.support.corpus import SQUARES, Program
sandbox = Sandbox(workers=2, timeout=30, allow_weak_isolation=True)
sandbox.start()
threading.Timer(0.5, print, ("running",), {"flush": True}).start()
programs = [Program("while True: pass", SQUARES)] * 6
"""


@pytest.mark.parametrize("how", ["sandbox.run(programs)", "list(sandbox.stream(programs))"])
def test_an_interrupt_cuts_runs_short(how: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED + how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, text=True) as trainer:
        assert trainer.stdout
        assert trainer.stdout.readline() == "running\n"
        started = children(trainer.pid)
        assert len(started) >= 4, "two lanes, each with a run"
        began = time.monotonic()
        trainer.send_signal(signal.SIGINT)
        _, complaint = trainer.communicate(timeout=60)
    assert time.monotonic() - began < 2
    assert trainer.returncode == -signal.SIGINT, complaint
    assert complaint.splitlines()[-1] == "KeyboardInterrupt"
    assert alive(started) == set()


def test_a_sandbox_that_is_dropped_while_it_runs_ends_quietly() -> None:
    before = descriptors(), threading.active_count()
    pool = Sandbox(workers=1, timeout=1, allow_weak_isolation=True)
    verdicts = pool.stream([GOOD, Program(ENDLESS, SQUARES)])
    assert next(verdicts).outcome == "passed"
    time.sleep(0.2)  # the second has begun, and its thread is the last to hold the sandbox
    del pool, verdicts
    deadline = time.monotonic() + 10
    while (descriptors(), threading.active_count()) != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert (descriptors(), threading.active_count()) == before


@pytest.mark.parametrize("tier", TIERS)
def test_files_are_limited_in_number_and_size(tier: str) -> None:
    many = "import os\ndef f(x):\n for n in range(10**6): os.mkdir(os.path.join(os.getcwd(), str(n)))"
    large = "def f(x):\n for n in range(20):\n  with open(str(n), 'wb') as file: file.write(bytes(1 << 20))"
    slow = large + "\n import time; time.sleep(3)"
    with jails.sandbox(tier, workers=1, timeout=20.0, file_mb=4) as pool:
        results = pool.run([Program(code, SQUARES) for code in (many, slow)])
        assert {result.outcome for result in results} <= {"error", "failed"}
        assert "too many files" in results[0].message
        assert pool.run([Program("def f(x): return x * x", SQUARES)])[0].outcome == "passed"


@pytest.mark.parametrize("tier", TIERS)
def test_a_run_sees_neither_the_times_nor_the_random_numbers_of_the_one_before(tier: str) -> None:
    leave = "import os\nos.utime('.', ns=(123456789, 987654321))\ndef f(x): return x * x"
    look = "import os\ndef f(x): return os.stat('.').st_mtime_ns == 987654321"
    draw = "import random\nx = random.random()\ndef f(_): return x"
    with jails.sandbox(tier, workers=1) as pool:
        assert pool.run([Program(leave, SQUARES)])[0].outcome == "passed"
        assert pool.run([Program(look, ("assert f(0) == False",))])[0].outcome == "passed"
        drawn = [result.message for result in pool.run([Program(draw, ("assert f(0) == 2",))] * 3)]
    assert len(set(drawn)) == 3, drawn


def test_where_memory_runs_out_a_lane_goes_first() -> None:
    with jails.sandbox("A", workers=1) as pool:
        pool.run([Program("def f(x): return x * x", SQUARES)])
        assert pool._lane_pools is not None
        lane = pool._lane_pools.candidates.take()
        score = Path(f"/proc/{lane.pid}/oom_score_adj").read_text()
        pool._lane_pools.candidates.give(lane)
    assert score == "1000\n"
    assert Path("/proc/self/oom_score_adj").read_text() != "1000\n"
