"""``metrics.csv`` as one series for each metric, also where a run was resumed and has left several files."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coderl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

X = ("step", "rollout_step", "global_step", "epoch")
"""Columns that say when a row was written, not what was measured."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps of a run.

    Attributes:
        steps: ``[N]`` rollout steps from 1, ascending; of a supervised run the optimizer's steps.
        values: ``[N]``, NaN where a step could not tell it.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def told(self) -> Series:
        """The steps whose value is a finite number."""
        known = np.isfinite(self.values)
        return Series(self.steps[known], self.values[known])

    def mean(self, first: int | None = None, last: int | None = None) -> float:
        """Mean over the ``first`` or the ``last`` so many values that are numbers; NaN where none is."""
        known = self.told.values[:first] if first else self.told.values[-(last or 0) :]
        return float(known.mean()) if len(known) else math.nan


def read_metrics(files: list[Path]) -> dict[str, Series]:
    """All metrics of a run, by name.

    A run that was killed and resumed went back to its last checkpoint: what an older file has of steps from
    the first one of a newer file on was not built upon, and is left out.

    Args:
        files: Each start's ``metrics.csv``, oldest first.

    Raises:
        UserError: A file cannot be read, or is damaged.
    """
    kept: dict[str, dict[float, float]] = defaultdict(dict)
    for file in files:
        rows = list(_rows(file))
        start = min((step for step, _ in rows), default=math.inf)
        for column in kept.values():
            for step in [step for step in column if step >= start]:
                del column[step]
        for step, row in rows:
            for name, value in row.items():
                kept[name][step] = value
    return {
        name: Series(np.array(sorted(column)), np.array([column[step] for step in sorted(column)]))
        for name, column in sorted(kept.items())
        if column
    }


def _rows(file: Path) -> Iterator[tuple[float, dict[str, float]]]:
    """Each row's step, and what it measured; final scores, which count optimizer steps, are left out."""
    header: list[str] = []
    for number, cells in enumerate(_cells(file), 1):
        if not header:
            header = cells
            if "step" not in header:
                raise _damaged(file, "its first line names no column `step`")
            continue
        if len(cells) != len(header):
            raise _damaged(file, f"line {number} has {len(cells)} columns, not {len(header)}")
        row = {name: _value(cell, file, number) for name, cell in zip(header, cells, strict=True) if cell}
        if any(name.startswith("final_eval/") for name in row):
            continue
        if "step" not in row:
            raise _damaged(file, f"line {number} has no step")
        measured = {name: value for name, value in row.items() if name not in X}
        yield row.get("rollout_step", row["step"] + 1), measured


def _cells(file: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(_whole_lines(file))
    except csv.Error as error:
        raise _damaged(file, str(error)) from error


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file but for a last one that is still being written."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def _value(cell: str, file: Path, number: int) -> float:
    try:
        return float(cell)
    except ValueError:
        raise _damaged(file, f"line {number} has {cell[:40]!r} where a number should be") from None


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file}: is damaged ({why}); move it away to report without it")
