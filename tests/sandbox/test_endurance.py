"""Lanes that are disturbed, and lanes that have run a great many hostile programs."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coderl.sandbox import Program, Sandbox
from coderl.sandbox.inside import wire
from coderl.sandbox.lane import Lane
from tests.sandbox.test_lanes import BAD, children, descriptors
from tests.support.corpus import GOOD, HOSTILE, program, runs_here, stopped

pytestmark = pytest.mark.slow


class Garbled:
    """A lane's control socket whose next message is not as the zygote sent it."""

    def __init__(self, control: socket.socket, garble: Callable[[bytes], bytes]) -> None:
        self._control = control
        self._garble = garble

    def recv(self, size: int) -> bytes:
        return self._garble(self._control.recv(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)


def an_extra_job(lane: Lane) -> None:
    """The zygote runs what nobody has asked for, and answers that first, with a number of its own."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        job = wire.JOB.pack(1 << 31, 1.0, 1 << 32, 128)
        socket.send_fds(lane._control, [job], [theirs.fileno()])


def garbled(how: Callable[[bytes], bytes]) -> Callable[[Lane], None]:
    def disturb(lane: Lane) -> None:
        lane._control = Garbled(lane._control, how)  # type: ignore[assignment]

    return disturb


@pytest.mark.parametrize(
    "disturb",
    [
        an_extra_job,
        lambda lane: lane._control.send(b"neither a job nor word to stop one"),
        lambda lane: lane._control.shutdown(socket.SHUT_WR),
        garbled(lambda data: bytes([data[0] ^ 1]) + data[1:]),
        garbled(lambda data: data[:-1]),
        garbled(lambda data: data * 2),
        garbled(lambda _: b""),
    ],
    ids=["extra-job", "nonsense", "end", "wrong-number", "short", "twice", "nothing"],
)
def test_a_desynchronised_lane_costs_a_retry_and_no_verdict(
    disturb: Callable[[Lane], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, runs = Lane.begin, itertools.count(-99)

    def begin_disturbed(lane: Lane, descriptors: list[int], *rest: Any) -> None:
        if next(runs) == 5:
            disturb(lane)
        begin(lane, descriptors, *rest)

    monkeypatch.setattr(Lane, "begin", begin_disturbed)
    with Sandbox(workers=2, timeout=10, allow_weak_isolation=True) as pool:
        pool.start()
        for _ in range(3):
            runs = itertools.count(1)
            results = pool.run([GOOD, BAD, GOOD] * 5)
            assert [result.outcome for result in results] == ["passed", "failed", "passed"] * 5
            assert next(runs) - 1 <= 15 + 1, "at most one run more"


def lanes_of(pool: Sandbox) -> list[Lane]:
    """Every lane of a sandbox in which nothing runs."""
    assert pool._lane_pools
    found = []
    for rack in (pool._lane_pools.candidates, pool._lane_pools.tests):
        lanes = [rack.take() for _ in range(pool.workers)]
        found += lanes
        for lane in lanes:
            rack.give(lane)
    return found


def state_of(lane: Lane) -> tuple[int, dict[str, Any]]:
    """What a zygote holds, seen from outside; in tier A its file system too."""
    lane.greet()
    proc = Path(f"/proc/{lane.pid}")
    try:
        state: dict[str, Any] = {"threads": len(os.listdir(proc / "task"))}
        state["descriptors"] = sorted(os.listdir(proc / "fd"))
        if not lane.folder:
            used = os.statvfs(proc / "root/tmp")
            state["blocks"], state["inodes"] = used.f_blocks - used.f_bfree, used.f_files - used.f_ffree
            state["files"] = os.listdir(proc / "root/tmp")
    except PermissionError:
        pytest.skip("only root can look into a zygote, which is shielded")
    return lane.pid, state


@pytest.mark.timeout(1800)
def test_hostile_runs_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = int(os.environ.get("CODERL_ENDURANCE", "300"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o711)
    before = children(), descriptors(), threading.active_count()
    slow_but_telling = ("fills_the_disk", "fill_folder", "many_small_files", "fork_bomb", "daemon")
    with Sandbox(workers=2, timeout=2.0, memory_mb=256, allow_weak_isolation=True) as pool:
        rows = [row for row in HOSTILE if stopped(row, pool.tier) and runs_here(row) and "before" not in row]
        telling = [row for row in rows if row["name"] in slow_but_telling]
        quick = [row for row in rows if "timeout" not in row["outcomes"] and "@" not in row["code"]]
        hostile = [program(row) for row in telling + quick if "inline_hole" not in row]
        assert len(telling) >= 3
        assert len(quick) >= 200
        by_rpc = Program(GOOD.code, test="def check(f):\n for i in (0, 1): assert f(i) == i", entry_point="f")
        pool.run([GOOD, by_rpc] * 8)
        states = dict(map(state_of, lanes_of(pool)))
        assert len(states) == 4
        started = children(), descriptors(), threading.active_count(), sorted(tmp_path.rglob("*"))
        for at in range(0, count, 500):
            batch = itertools.islice(itertools.cycle(hostile), at, min(at + 500, count))
            assert "passed" not in {result.outcome for result in pool.run(list(batch))}
        assert (children(), descriptors(), threading.active_count(), sorted(tmp_path.rglob("*"))) == started
        assert dict(map(state_of, lanes_of(pool))) == states
        assert {result.outcome for result in pool.run([GOOD] * 8)} == {"passed"}
    assert (children(), descriptors(), threading.active_count()) == before
    assert list(tmp_path.iterdir()) == []
