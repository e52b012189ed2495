"""Reads ``metrics.csv``: one series for each metric, joined over the files of a resumed run."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coderl.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

X = ("step", "rollout_step", "global_step", "epoch")
"""Columns with the time of a row. All others are metrics."""
SAMPLES = "rollout/samples"
OF_SAMPLES = ("reward/", "outcome/", "grading/", "completion/", "groups/", "policy/entropy")
"""How the names of means over a step's samples begin; an epoch's last step may have few."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps of a run.

    Attributes:
        steps: ``[N]`` rollout steps from 1, ascending; of a supervised run the optimizer's steps.
        values: ``[N]``, NaN where the metric was logged but not defined.
        samples: ``[N]``, what each value counts in means over steps, for means over a step's samples: their
            number. None: as much as any other.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    samples: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        """The steps with a finite value."""
        finite = np.isfinite(self.values)
        return Series(self.steps[finite], self.values[finite], self.weights[finite])

    @property
    def weights(self) -> NDArray[np.float64]:
        """``[N]``, what each value counts in means over steps."""
        return np.ones(len(self)) if self.samples is None else self.samples

    def mean(self, first: int | None = None, last: int | None = None) -> float:
        """Mean of the ``first`` or ``last`` so many finite values, of all by default; NaN without any."""
        finite, part = self.finite, slice(None, first) if first else slice(-(last or 0), None)
        if not len(finite):
            return math.nan
        return float(np.average(finite.values[part], weights=finite.weights[part]))


def read_metrics(files: list[Path]) -> dict[str, Series]:
    """All metrics of a run, by name.

    Args:
        files: The ``metrics.csv`` of each start, oldest first.

    Raises:
        UserError: A file cannot be read, or is damaged.
    """
    import pandas as pd  # takes half a second: not for `coderl report --help`

    cells = pd.DataFrame()
    for file in files:
        table = _read(file)
        if len(table):
            # A resumed run went back to its last checkpoint. Nothing was built on later steps of older files.
            cells = pd.concat([cells[cells.index < table.index.min()], table])
    metrics = {}
    for name in sorted(cells.columns.difference(X)):
        # An empty cell was not logged in that row. `nan` was, and stays.
        logged = cells[name].dropna().loc[lambda column: column != ""]
        logged = logged[~logged.index.duplicated(keep="last")].sort_index()
        if len(logged):
            metrics[name] = Series(logged.index.to_numpy(float), logged.astype(float).to_numpy())
    counts = metrics.get(SAMPLES)  # not logged by earlier versions
    if counts is not None and (np.isfinite(counts.values) & (counts.values > 0)).all():
        for name, series in metrics.items():
            if name.startswith(OF_SAMPLES) and np.array_equal(series.steps, counts.steps):
                metrics[name] = replace(series, samples=counts.values)
    return metrics


def _read(file: Path) -> pd.DataFrame:
    """The cells of a file as text that can be read as numbers, by step, without the final scores."""
    import pandas as pd

    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # it is still being written
    if not lines:
        return pd.DataFrame()
    _require_table(file, lines)
    # As text: pandas would read an empty cell and `nan` as the same.
    table = pd.read_csv(io.StringIO("".join(lines)), dtype=str, keep_default_na=False)
    final = [name for name in table if name.startswith("final_eval/")]
    table = table[(table[final] == "").all(axis=1)]  # final scores count optimizer steps
    if len(missing := table.index[table["step"] == ""]):
        raise _damaged(file, f"line {missing[0] + 2} has no step")
    steps = table["step"].astype(float) + 1  # Lightning's steps count from 0
    if "rollout_step" in table:
        rollouts = table["rollout_step"]
        steps = steps.where(rollouts == "", rollouts.replace("", "nan").astype(float))
    return table.set_index(pd.Index(steps))


def _require_table(file: Path, lines: list[str]) -> None:
    """Check that all rows are as long as the header and hold numbers, with the line in the error.

    pandas fills short rows up without a word, and names no lines.
    """
    header: list[str] = []
    try:
        for number, cells in enumerate(csv.reader(lines), 1):
            header = header or cells
            if "step" not in header:
                raise _damaged(file, "its first line names no column `step`")
            if len(cells) != len(header):
                raise _damaged(file, f"line {number} has {len(cells)} columns, not {len(header)}")
            for cell in cells if number > 1 else ():
                _require_number(cell, file, number)
    except csv.Error as error:
        raise _damaged(file, str(error)) from error


def _require_number(cell: str, file: Path, number: int) -> None:
    try:
        float(cell or "nan")
    except ValueError:
        raise _damaged(file, f"line {number} has {cell[:40]!r} where a number should be") from None


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file}: is damaged ({why}); move it away to report without it")
