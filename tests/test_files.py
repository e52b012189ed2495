"""Files and folders are written whole or not at all, whatever interrupts it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from coderl.errors import UserError
from coderl.files import free_path, read_json_lines, replacing_folder

OWNED = ["config.json", "*.safetensors"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with an earlier model."""
    folder = tmp_path / "at/m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("old")
    return folder


def beside(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir()]


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_a_failure_between_the_two_renames_leaves_the_earlier_folder(
    target: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    count, rename = itertools.count(1), Path.rename

    def fail_once(self: Path, new_name: Path) -> Path:
        if next(count) == at:
            raise error
        return rename(self, new_name)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises((KeyboardInterrupt, UserError)), replacing_folder(target, OWNED) as partial:
        (partial / "config.json").write_text("new")
    assert beside(target) == ["m"] and (target / "config.json").read_text() == "old"


@pytest.mark.parametrize("gone", [False, True])
def test_the_next_replacement_restores_what_a_killed_one_left(target: Path, gone: bool) -> None:
    left = target.with_name(".m.x.partial") / "old"
    left.mkdir(parents=True)
    (left / "config.json").write_text("older")
    (left / "notes.txt").write_text("mine")
    if gone:
        shutil.rmtree(target)
    with pytest.raises(ZeroDivisionError), replacing_folder(target, OWNED):
        raise ZeroDivisionError
    assert beside(target) == ["m"]
    assert (target / "config.json").read_text() == ("older" if gone else "old")
    assert (target / "notes.txt").read_text() == "mine"


def test_two_replacements_at_once_do_not_meet(target: Path) -> None:
    with replacing_folder(target, OWNED) as first:
        (first / "config.json").write_text("first")
        with replacing_folder(target, OWNED) as second:
            (second / "config.json").write_text("second")
        assert (target / "config.json").read_text() == "second"
    assert (target / "config.json").read_text() == "first"
    assert beside(target) == ["m"]


def test_errors_that_mean_a_full_disk_name_the_folder(target: Path) -> None:
    for error, errors in {
        OSError(28, "No space left on device"): (),
        Exception("No space left on device (os error 28)"): (),  # of a writer in Rust
        ValueError("No space left on device"): (ValueError,),
    }.items():
        with (
            pytest.raises(UserError, match=r"at/m could not be written: No space left on device"),
            replacing_folder(target, OWNED, errors),
        ):
            raise error
        assert beside(target) == ["m"] and (target / "config.json").read_text() == "old"


def test_free_path_never_exists(tmp_path: Path) -> None:
    seen = set()
    for _ in range(4):
        path = free_path(tmp_path / "config.yaml")
        assert not path.exists()
        path.touch()
        seen.add(path.name)
    assert seen == {"config.yaml", "config-2.yaml", "config-3.yaml", "config-4.yaml"}


@pytest.mark.parametrize("end", ['{"c', '{"c": 3}'])
def test_a_last_line_that_is_being_written_can_be_left_out(tmp_path: Path, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n\n{{"b": 2}}\n{end}')
    rows = [(where.rpartition(":")[2], row) for where, row in read_json_lines(path, unfinished=False)]
    assert rows == [("1", {"a": 1}), ("3", {"b": 2})]
