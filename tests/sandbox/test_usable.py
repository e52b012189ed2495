"""How many cores a process may use: affinity, quotas, ranks."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from coderl.sandbox import Sandbox, usable


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores, no quota, one rank."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(usable, "_quota", lambda: math.inf)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)


def test_affinity_limits_the_cores() -> None:
    assert usable.cores() == 8


@pytest.mark.parametrize(
    ("quota", "expected"), [(2.0, 2), (1.5, 2), (0.25, 1), (7.5, 8), (64.0, 8), (math.inf, 8)]
)
def test_a_quota_limits_the_cores(quota: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usable, "_quota", lambda: quota)
    assert usable.cores() == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, 4),
        ({"LOCAL_WORLD_SIZE": "3"}, 2),
        ({"LOCAL_WORLD_SIZE": "100"}, 1),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS_PER_NODE": "8"}, 4),
        ({"LOCAL_WORLD_SIZE": "0"}, 8),
        ({"LOCAL_WORLD_SIZE": "-2"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "4(x2)"}, 8),
        ({"LOCAL_WORLD_SIZE": ""}, 8),
    ],
)
def test_ranks_share_the_cores(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert usable.cores() == expected


def test_a_sandbox_has_a_lane_for_each_and_no_more_than_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Sandbox().workers == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    assert Sandbox().workers == 16
    assert Sandbox(workers=40).workers == 40


class TestQuota:
    """Of control groups, version 2, in a folder that stands for ``/sys/fs/cgroup``."""

    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        group = tmp_path / "pod" / "trainer"
        group.mkdir(parents=True)
        monkeypatch.undo()  # the autouse fixture's: here the quota is what is tested
        monkeypatch.setattr(usable, "_groups", lambda _, root: [group, group.parent, root])
        return tmp_path

    def test_there_is_no_limit_without_a_file(self, root: Path) -> None:
        assert usable._quota(root) == math.inf

    def test_the_tightest_quota_of_all_groups_above_counts(self, root: Path) -> None:
        (root / "cpu.max").write_text("400000 100000\n")
        (root / "pod" / "cpu.max").write_text("150000 100000\n")
        (root / "pod" / "trainer" / "cpu.max").write_text("max 100000\n")
        assert usable._quota(root) == 1.5
        (root / "pod" / "trainer" / "cpu.max").write_text("50000 200000\n")
        assert usable._quota(root) == 0.25

    @pytest.mark.parametrize("text", ["max 100000", "", "1", "1 0", "a b", "1 2 3"])
    def test_a_file_without_a_number_is_no_limit(self, text: str, root: Path) -> None:
        (root / "cpu.max").write_text(text)
        assert usable._quota(root) == math.inf

    @pytest.mark.parametrize(("limit", "expected"), [("150000", 1.5), ("-1", math.inf), ("x", math.inf)])
    def test_version_1_has_two_files(self, limit: str, expected: float, root: Path) -> None:
        (root / "pod" / "cpu.cfs_quota_us").write_text(f"{limit}\n")
        (root / "pod" / "cpu.cfs_period_us").write_text("100000\n")
        assert usable._quota(root) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("0::/pod/one", ["pod/one", "pod", "."]),
        ("0::/", ["."]),
        ("8:pids:/pod\n3:cpu,cpuacct:/pod/one\n", ["cpu/pod/one", "cpu/pod", "cpu"]),
        ("1:cpu:/\n0::/pod", ["cpu", "pod", "."]),
    ],
)
def test_groups_are_this_process_own_and_those_above(lines: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(lines)
    assert usable._groups("cpu", tmp_path, tmp_path / "groups") == [tmp_path / name for name in expected]


def test_lanes_share_half_of_the_processes_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usable, "_groups", lambda _, root: [root])
    assert usable.tasks_each(4, tmp_path) == usable.TASKS
    (tmp_path / "pids.max").write_text("150\n")
    (tmp_path / "pids.current").write_text("30\n")
    assert usable.tasks_each(4, tmp_path) == 15
    assert usable.tasks_each(100, tmp_path) == 4


@pytest.mark.parametrize(
    ("entries", "folder", "name"),
    [
        ("0::/job/step\n", "", "memory.max"),
        ("4:cpu:/x\n3:memory,other:/job/step\n0::/\n", "memory", "memory.limit_in_bytes"),
    ],
)
def test_memory_is_what_the_tightest_control_group_leaves(
    tmp_path: Path, entries: str, folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "groups").write_text(entries)
    found = usable._groups
    monkeypatch.setattr(usable, "_groups", lambda what, root: found(what, root, tmp_path / "groups"))
    monkeypatch.setattr(usable, "ROOT", tmp_path)
    assert usable.memory_limit(tmp_path) is None
    step = tmp_path / folder / "job" / "step"
    step.mkdir(parents=True)
    (step / name).write_text("max\n" if name == "memory.max" else f"{2**63 - 4096}\n")
    assert usable.memory_limit(tmp_path) is None
    (step.parent / name).write_text("12345678\n")
    assert usable.memory_limit(tmp_path) == usable.memory() == 12345678
    (step / name).write_text("1000000\n")
    assert usable.memory_limit(tmp_path) == 1000000
    (step / ("memory.current" if name == "memory.max" else "memory.usage_in_bytes")).write_text("700000\n")
    (step / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    assert usable.memory() == 500000, "files in the cache can go"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable.memory() == 250000
