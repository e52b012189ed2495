"""RewardStopping logs the figures that it decides by."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from coderl.callbacks import RewardStopping
from tests.callbacks.test_callbacks import Scripted, play, rewards

BEST, WAITED = "early_stopping/best", "early_stopping/waited"


def logged(folder: Path, values: list[float], stopping: RewardStopping) -> list[dict[str, str]]:
    """The rows of metrics.csv after a fit with these rewards."""
    logger = CSVLogger(folder, "logs")
    play(folder, Scripted(rewards(*values)), stopping, logger=logger, log_every_n_steps=1)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_step_logs_the_best_mean_and_the_steps_since_then(tmp_path: Path) -> None:
    rows = logged(tmp_path, [0, 4, 2, 4, 1, 1, 9], RewardStopping(window=2, patience=3))
    assert [row[BEST] for row in rows] == ["", "2.0", "3.0", "3.0", "3.0", "3.0"]  # means 2, 3, 3, 2.5, 1
    assert [row[WAITED] for row in rows] == ["0.0", "0.0", "0.0", "1.0", "2.0", "3.0"]


@pytest.mark.parametrize("values", [[0, 1, 0.5, 0.25, 0.125, 9]])
def test_the_last_logged_count_equals_the_patience(tmp_path: Path, values: list[float]) -> None:
    rows = logged(tmp_path, values, RewardStopping(window=1, patience=3))
    assert len(rows) == 5 and float(rows[-1][WAITED]) == 3


def test_nothing_is_logged_without_a_patience(tmp_path: Path) -> None:
    rows = logged(tmp_path, [0, 1], RewardStopping(patience=None, max_kl=1.0))
    assert not {BEST, WAITED} & rows[0].keys()


class Logged:
    """Takes the place of a module and collects what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_dict(self, values: dict[str, Any]) -> None:
        self.rows.append(values)


@given(
    st.lists(st.floats(-5, 5) | st.just(math.nan), max_size=12),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(1, 4),
)
def test_the_logged_figures_match_their_definition(
    values: list[float], window: int, min_delta: float, patience: int
) -> None:
    stopping, module = RewardStopping(window=window, patience=patience, min_delta=min_delta), Logged()
    known: list[float] = []
    for value in values:
        stopping._update(value)
        stopping._log(module)  # type: ignore[arg-type]
        known += [] if math.isnan(value) else [value]
        means = [sum(known[i - window : i]) / window for i in range(window, len(known) + 1)]
        best, at = -math.inf, -1
        for i, mean in enumerate(means):
            if mean > best + min_delta:
                best, at = mean, i
        row = module.rows[-1]
        assert (BEST in row) == bool(means)
        assert row.get(BEST, -math.inf) == pytest.approx(best)
        assert row[WAITED] == (len(means) - 1 - at if means else 0)
