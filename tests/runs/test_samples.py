"""The file of samples: members of steps, cut where a resumed fit repeats them, whole after any failure."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from coderl.files import read_json_lines
from coderl.runs.folder import RunFolder
from coderl.runs.samples import append_samples, append_whole, drop_samples


def rows(step: int, count: int = 3) -> list[dict[str, Any]]:
    noise = random.Random(step)
    return [{"rollout_step": step, "n": i, "text": f"ü\n{noise.random()}" * 9} for i in range(count)]


def steps_in(path: Path) -> list[int]:
    return [row["rollout_step"] for _, row in read_json_lines(path)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run/samples.jsonl.gz"
    for step in (1, 2, 3, 10):
        append_samples(path, rows(step))
    return path


def test_zcat_pandas_and_coderl_read_the_samples(file: Path) -> None:
    expected = [row for step in (1, 2, 3, 10) for row in rows(step)]
    assert [row for _, row in read_json_lines(file)] == expected
    assert pd.read_json(file, lines=True).to_dict("records") == expected
    shown = subprocess.run(["zcat", file], capture_output=True, check=True)
    assert shown.stdout.count(b"\n") == len(expected)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 10, 11])
def test_steps_that_are_repeated_go_and_those_before_stay(file: Path, step: int) -> None:
    before = file.read_bytes()
    dropped = drop_samples(file, step)
    assert steps_in(file) == [s for s in (1, 2, 3, 10) if s < step for _ in range(3)]
    assert dropped == len(before) - file.stat().st_size and before.startswith(file.read_bytes())


def test_members_are_found_however_they_lie_in_the_chunks_that_are_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = file.read_bytes()
    for chunk in (1, 2, 7, len(content) // 4, len(content) // 4 + 1, len(content)):
        monkeypatch.setattr("coderl.runs.samples._CHUNK", chunk)
        file.write_bytes(content)
        drop_samples(file, 3)
        assert steps_in(file) == [1] * 3 + [2] * 3


def test_whatever_a_killed_process_has_left_of_a_member_goes(file: Path) -> None:
    whole = file.stat().st_size
    append_samples(file, rows(11))
    content = file.read_bytes()
    for end in range(whole, len(content)):
        file.write_bytes(content[:end])
        drop_samples(file, 12)
        assert file.stat().st_size == whole
    file.write_bytes(content)
    drop_samples(file, 12)
    assert file.read_bytes() == content


def test_the_steps_before_a_broken_one_can_be_read(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])
    shown = subprocess.run(["zcat", file], capture_output=True, check=False).stdout.splitlines()
    assert [json.loads(line) for line in shown[:9]] == [row for step in (1, 2, 3) for row in rows(step)]


def test_there_is_nothing_to_drop_where_there_is_no_file(tmp_path: Path) -> None:
    assert drop_samples(tmp_path / "none.jsonl.gz", 1) == 0
    assert not list(tmp_path.iterdir())


def test_a_write_that_finds_no_room_leaves_the_file_as_it_was(file: Path) -> None:
    """The system takes a part of it first, as it does on a disk that gets full."""
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
    try:
        with pytest.raises(OSError):  # noqa: PT011 -- whatever the system calls it
            append_whole(file, os.urandom(1000))
        with_limit = file.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert with_limit == before
    append_samples(file, rows(11))
    assert steps_in(file)[-4:] == [10, 11, 11, 11]


def test_each_rank_has_a_file_and_those_of_further_ranks_are_found(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for rank in (0, 1, 2, 10):
        append_samples(folder.samples(rank), rows(1))
    (tmp_path / "samples-rankx.jsonl.gz").touch()
    assert len({folder.samples(rank) for rank in range(12)}) == 12
    assert set(folder.further_samples(2)) == {folder.samples(2), folder.samples(10)}
    assert folder.further_samples(11) == []
