"""RewardStopping: the figures it decides by and logs, how often it is wrong, and what a resumed run keeps."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from hypothesis import assume, given
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


def test_each_step_logs_the_best_mean_and_the_steps_without_a_rise(tmp_path: Path) -> None:
    values = [0, 4, 2, 4, *range(3, 23), 0, 0, 0, 0, 0, 0]
    rows = logged(tmp_path, values, RewardStopping(window=2, patience=3))
    best = [row[BEST] for row in rows]
    assert best[:6] == ["", "2.0", "3.0", "3.0", "3.5", "3.5"]  # means 2, 3, 3, 3.5, 3.5
    assert best[-1] == "21.5"
    waited = [float(row[WAITED]) for row in rows]
    assert waited[:26] == [0] * 26 and waited[-3:] == [1, 2, 3]


def test_nothing_is_logged_without_a_patience(tmp_path: Path) -> None:
    rows = logged(tmp_path, [0, 1], RewardStopping(patience=None, max_kl=1.0))
    assert not {BEST, WAITED} & rows[0].keys()


class Logged:
    """Takes the place of a module and collects what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_dict(self, values: dict[str, Any]) -> None:
        self.rows.append(values)


def rises(values: list[float], window: int, min_delta: float) -> bool:
    """Whether a line through twelve means of these values rises by more than its error, in exact numbers."""
    points = [sum(map(Fraction, values[i : i + window])) / window for i in range(0, len(values), window)]
    x = [Fraction(2 * i - 11, 2) for i in range(12)]
    spread, mean = sum(v * v for v in x), sum(points) / 12
    slope = sum(a * b for a, b in zip(x, points, strict=True)) / spread
    squares = sum((p - mean - slope * v) ** 2 for v, p in zip(x, points, strict=True))
    more, error = 11 * slope - Fraction(min_delta), 11 * math.sqrt(squares / 10 / spread)
    assume(len(set(points)) == 1 or abs(more - error) > 1e-9)  # no tie that rounding may settle
    return more > error


@given(
    st.lists(st.integers(-40, 40).map(lambda v: v / 8) | st.just(math.nan), min_size=8, max_size=40),
    st.integers(1, 2),
    st.floats(0, 1),
)
def test_the_logged_figures_match_their_definition(
    values: list[float], window: int, min_delta: float
) -> None:
    stopping, module = RewardStopping(window=window, patience=9, min_delta=min_delta), Logged()
    known: list[float] = []
    waited = 0
    for value in values:
        reason = stopping._update(value)
        stopping._log(module)  # type: ignore[arg-type]
        if not math.isnan(value):
            known.append(value)
            if len(known) >= 12 * window:
                waited = 0 if rises(known[-12 * window :], window, min_delta) else waited + 1
            assert bool(reason) == (waited >= 9)
        means = [fmean(known[i - window : i]) for i in range(window, len(known) + 1)]
        assert module.rows[-1].get(BEST) == (pytest.approx(max(means)) if means else None)
        assert module.rows[-1][WAITED] == waited


def ends(reward: Callable[[int], float], fits: int, steps: int, seed: int = 0) -> list[int]:
    """The steps at which fits end that have this reward and quickstart's noise; ``steps + 1``: none."""
    rng = random.Random(seed)

    def end() -> int:
        stopping = RewardStopping()
        noisy = (reward(step) + rng.gauss(0, 0.095) for step in range(steps))
        return next((step for step, value in enumerate(noisy, 1) if stopping._update(value)), steps + 1)

    return [end() for _ in range(fits)]


def test_of_fits_that_still_learn_fewer_than_one_in_twenty_end() -> None:
    """A rise of 0.2 over 320 steps, two standard deviations of one step."""
    found = ends(lambda step: 0.4 + 0.2 * step / 320, fits=150, steps=320)
    assert sum(step <= 320 for step in found) < 0.05 * 150


def test_a_plateau_and_a_fall_end_the_fit_in_reasonable_time() -> None:
    def plateau(step: int) -> float:
        return 0.4 + 0.2 * min(step / 100, 1)

    found = ends(plateau, fits=60, steps=500)
    assert min(found) > 100 and median(found) < 280 and sum(step > 380 for step in found) <= 6
    found = ends(lambda step: plateau(step) - 0.2 * max(step - 100, 0) / 100, fits=40, steps=300)
    assert min(found) > 100 and max(found) < 230


def test_a_reward_that_does_not_vary_is_not_taken_for_a_rising_one() -> None:
    stopping = RewardStopping(patience=5)
    assert [bool(stopping._update(0.1)) for _ in range(124)] == [False] * 123 + [True]


def test_the_state_of_an_earlier_version_is_taken_without_what_it_waited_for() -> None:
    """It waited for a better mean of few steps, which is no evidence."""
    stopping = RewardStopping()
    stopping.load_state_dict({"recent": [0.5] * 10, "best": 0.6, "waited": 49})
    assert (stopping.best, stopping.waited, len(stopping.recent)) == (0.6, 0, 10)
    assert not any(stopping._update(0.5) for _ in range(110))


@pytest.mark.parametrize(
    ("window", "patience", "end"),
    [
        (2, 20, 10),  # ten steps were waited for before
        (2, 5, 1),
        (1, 20, 10),
        (4, 20, 24 + 19),  # half of the longer line's values are missing, so nothing was waited for
    ],
)
def test_settings_given_on_resuming_win_over_the_state(window: int, patience: int, end: int) -> None:
    before, after = RewardStopping(window=2), RewardStopping(window=window, patience=patience)
    for _ in range(33):
        before._update(1.0)
    after.load_state_dict(before.state_dict())
    reasons = [bool(after._update(1.0)) for _ in range(60)]
    assert before.waited == 10 and reasons.index(True) + 1 == end


def test_with_another_window_the_best_mean_is_one_of_that_window() -> None:
    before, after = RewardStopping(window=2), RewardStopping(window=4)
    for value in (0.0, 3.0, 5.0, 0.0, 4.0):
        before._update(value)
    after.load_state_dict(before.state_dict())
    assert (before.best, after.best) == (4.0, 3.0)
