"""A checkpoint file is whole or not there, and a damaged one is noticed."""

from __future__ import annotations

import errno
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.errors import UserError
from coderl.runs.checkpoint_files import CheckpointFiles, damage_of, latest_whole

STATE: dict[str, Any] = {"global_step": 7, "weights": torch.arange(4000.0), "names": ["a", "b"]}
STATE["optimizer_states"] = []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint(STATE, path)
    return path


def test_what_is_written_is_read_back(saved: Path) -> None:
    found = CheckpointFiles().load_checkpoint(saved, weights_only=True)
    assert torch.equal(found["weights"], STATE["weights"]) and found["names"] == ["a", "b"]
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_bit_in_the_weights_and_a_missing_end_are_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("bits") / "last.ckpt"
    CheckpointFiles().save_checkpoint(STATE, path)
    whole = path.read_bytes()
    start = whole.index(STATE["weights"].numpy().tobytes())
    place = data.draw(st.integers(start, start + 15_999))
    broken = bytearray(whole)
    broken[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(broken)
    assert "checksum" in str(damage_of(path))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert damage_of(path)
    with pytest.raises(UserError, match="damaged"):
        CheckpointFiles().load_checkpoint(path, weights_only=True)
    path.write_bytes(whole)
    assert damage_of(path) is None


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may have 8 kB: writing more fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_be_written_leaves_the_one_before(saved: Path, small_files: None) -> None:
    with pytest.raises(OSError, match=str(saved)) as caught:
        CheckpointFiles().save_checkpoint(STATE | {"global_step": 8}, saved)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(saved)
    assert damage_of(saved) is None and torch.load(saved, weights_only=True)["global_step"] == 7
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_the_latest_whole_checkpoint_stands_in_for_a_damaged_one(saved: Path, tmp_path: Path) -> None:
    """By steps: the times of files do not survive copying a run folder."""
    files, elsewhere = CheckpointFiles(), tmp_path / "elsewhere"
    for step, name in ((8, "later"), (6, "earlier"), (9, "damaged")):
        path = saved.with_name(f"{name}.ckpt")
        files.save_checkpoint(STATE | {"global_step": step}, path)
    saved.with_name("damaged.ckpt").write_bytes(b"PK")
    weights = {name: value for name, value in STATE.items() if name != "optimizer_states"}
    files.save_checkpoint(weights | {"global_step": 10}, saved.with_name("weights.ckpt"))
    files.save_checkpoint(STATE | {"global_step": 11, "own": Path("x")}, saved.with_name("own.ckpt"))
    assert latest_whole(saved.parent, weights_only=False) == (saved.with_name("own.ckpt"), 11)
    assert latest_whole(saved.parent, besides=saved) == (saved.with_name("later.ckpt"), 8)
    assert latest_whole(elsewhere) is None
    files.save_checkpoint(STATE | {"global_step": 9}, elsewhere / "hpc_ckpt_1.ckpt")
    assert latest_whole(saved.parent, elsewhere) == (elsewhere / "hpc_ckpt_1.ckpt", 9)


def test_a_file_with_objects_of_its_own_is_not_damaged(tmp_path: Path) -> None:
    """torch refuses it unless weights_only is false, which is the user's to say."""
    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint(STATE | {"own": Path("x")}, path)
    assert damage_of(path) is None
    assert CheckpointFiles().load_checkpoint(path, weights_only=False)["own"] == Path("x")
    path.write_bytes(path.read_bytes()[:-10])
    assert damage_of(path)


def test_what_a_killed_process_has_left_is_cleared_up_by_the_next(saved: Path) -> None:
    saved.with_name(".last.ckpt.123.partial").write_bytes(b"PK")
    other = saved.with_name(".best.ckpt.123.partial")
    other.write_bytes(b"PK")
    CheckpointFiles().save_checkpoint(STATE, saved)
    assert sorted(saved.parent.iterdir()) == sorted([saved, other])
