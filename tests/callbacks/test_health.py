"""Health names each kind of trouble once, and says nothing of a healthy fit."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coderl.callbacks import Health
from coderl.callbacks.health import WATCHED
from coderl.errors import UsageError
from tests.callbacks.test_callbacks import fit, rl

Trace = Callable[[float], float]
"""A metric over a fit: from the share of the fit that is done to its mean."""

HEALTHY: dict[str, Trace] = {
    # Begin and end of quickstart.yaml (configs/README.md, "Measured"), with the noise of 96 samples a step.
    "reward/mean": lambda done: 0.5 + 0.3 * done,
    "reward/passed": lambda done: 0.48 + 0.28 * done,
    "policy/entropy": lambda done: 0.098 - 0.046 * done,
    "policy/kl": lambda done: 0.04 * done,
    "policy/kl_old": lambda done: 0.001,
    "mismatch_kl": lambda done: 0.0,
    "groups/no_signal": lambda done: 0.02 + 0.39 * done,
    "completion/length": lambda done: 34 + 10 * done,
    "completion/clipped": lambda done: 0.05,
    "grading/inline": lambda done: 0.0,
    "outcome/infra_error": lambda done: 0.0,
}
NOISE = {
    "reward/mean": 0.095,
    "reward/passed": 0.095,
    "policy/entropy": 0.01,
    "groups/no_signal": 0.14,
    "mismatch_kl": 0.002,
    "completion/length": 2.0,
    "completion/clipped": 0.02,
}
SMOLLM2: dict[str, Trace] = HEALTHY | {
    # Of the README's table of 30 steps of SmolLM2-135M, whose last steps are the worst of any shipped run.
    "reward/mean": lambda done: -0.06 + 0.12 * done,
    "reward/passed": lambda done: 0.006 + 0.05 * done,
    "policy/entropy": lambda done: 0.94 - 0.57 * done,
    "groups/no_signal": lambda done: 0.07 + 0.53 * done,
    "completion/length": lambda done: 100 - 40 * done,
    "completion/clipped": lambda done: 0.2 * (1 - done),
}
SUPERVISED: dict[str, Trace] = {"loss/sft": lambda done: 1 - done, "grad_norm": lambda done: 1.0}
TROUBLES: dict[str, dict[str, Trace]] = {
    "entropy has collapsed": {"policy/entropy": lambda done: 0.9 * 0.001**done},
    "of the groups have no signal": {"groups/no_signal": lambda done: 0.5 + 0.45 * done},
    "policy/kl has run away": {"policy/kl": lambda done: 0.01 * 400**done},
    "policy/kl_old has run away": {"policy/kl_old": lambda done: 2 * done},
    "engine and trainer are out of step": {"mismatch_kl": lambda done: 0.03},
    "completions have exploded": {
        "completion/length": lambda done: 34 * 5**done,
        "reward/passed": lambda done: 0.4,
    },
    "completions have collapsed": {
        "completion/length": lambda done: 34 * 0.1**done,
        "reward/passed": lambda done: 0.4,
    },
    "are cut off": {"completion/clipped": lambda done: 0.5},
    "are graded inline": {"grading/inline": lambda done: 0.2},
    "have no verdict": {"outcome/infra_error": lambda done: 0.1 + 0.1 * done},
}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What Health has said so far."""
    caplog.set_level(logging.DEBUG, "coderl.callbacks.health")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "coderl.callbacks.health"]


def trace(metrics: dict[str, Trace], steps: int, seed: int = 0) -> list[dict[str, float]]:
    rng = random.Random(seed)
    return [
        {name: mean(step / steps) + rng.gauss(0, NOISE.get(name, 0.0)) for name, mean in metrics.items()}
        for step in range(steps)
    ]


def feed(
    health: Health,
    steps: list[dict[str, float]],
    validations: list[float] | None = None,
    every: int = 10,
    rank: int = 0,
) -> Health:
    """Let Health see these steps, with a validation after each ``every``."""
    values: dict[str, float] = {}
    seen: Any = SimpleNamespace(is_global_zero=rank == 0, sanity_checking=False, callback_metrics=values)
    module: Any = None
    due = iter(validations or ())
    for step, metrics in enumerate(steps, 1):
        values.update(metrics)
        health.on_train_batch_end(seen, module, None, None, step - 1)
        if step % every == 0 and (value := next(due, None)) is not None:
            values["val/pass@1"] = value
            health.on_validation_end(seen, module)
    return health


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("metrics", "steps"), [(HEALTHY, 56), (HEALTHY, 400), (SMOLLM2, 30), (SUPERVISED, 60)]
)
def test_nothing_is_said_of_a_healthy_fit(
    metrics: dict[str, Trace], steps: int, seed: int, lines: Callable[[], list[str]]
) -> None:
    rng = random.Random(seed)
    validations = [0.5 + 0.25 * step / steps + rng.gauss(0, 0.02) for step in range(10, steps, steps // 5)]
    feed(Health(), trace(metrics, steps, seed), validations, every=steps // 5)
    assert lines() == []


@pytest.mark.parametrize("seen", TROUBLES)
def test_each_kind_of_trouble_is_named_once_with_figures_and_a_setting(
    seen: str, lines: Callable[[], list[str]]
) -> None:
    feed(Health(), trace(HEALTHY | TROUBLES[seen], 200))
    (line,) = lines()
    assert seen in line and "over the last 10 steps" in line and "\n" not in line
    assert any(setting in line for setting in ("model.", "coderl doctor"))


def test_rewards_that_rise_without_validation_are_named(lines: Callable[[], list[str]]) -> None:
    steps = trace(HEALTHY, 100)
    feed(Health(), steps, [0.3, 0.31, 0.3, 0.31])
    assert lines() == []  # two since the best are too few
    feed(Health(), steps, [0.3, 0.31, 0.3, 0.29, 0.31, 0.3, 0.3])
    (line,) = lines()
    assert "since val/pass@1 was best, at 31.0 %" in line and "validated.yaml" in line


def test_a_validation_that_stays_does_not_matter_while_the_reward_stays_too(
    lines: Callable[[], list[str]],
) -> None:
    feed(Health(), trace(HEALTHY | {"reward/mean": lambda done: 0.5}, 100), [0.3] * 10)
    assert lines() == []


@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_one_wild_step_is_no_trouble(name: str, lines: Callable[[], list[str]]) -> None:
    steps = trace(HEALTHY, 60)
    for step in (4, 20, 45):
        steps[step][name] = 1e4
    feed(Health(), steps)
    assert lines() == []


def test_groups_that_were_refilled_do_not_count(lines: Callable[[], list[str]]) -> None:
    refilled: dict[str, Trace] = {"groups/no_signal": lambda done: 0.9, "groups/refilled": lambda done: 0.7}
    feed(Health(), trace(HEALTHY | refilled, 60))
    assert lines() == []


@pytest.mark.parametrize(("passed", "word"), [(0.05, "too hard"), (0.95, "too easy")])
def test_groups_without_signal_are_told_from_too_hard_or_too_easy_problems(
    passed: float, word: str, lines: Callable[[], list[str]]
) -> None:
    feed(Health(), [{"groups/no_signal": 0.9, "reward/passed": passed, "completion/length": 9.0}] * 12)
    (line,) = lines()
    assert word in line and f"{100 * passed:.1f} %" in line


def test_lengths_may_change_while_more_programs_pass(lines: Callable[[], list[str]]) -> None:
    """A base model learns to end: from the limit to what an answer takes."""
    feed(Health(), trace(HEALTHY | {"completion/length": lambda done: 300 * 0.1**done}, 200))
    assert lines() == []


@pytest.mark.parametrize("cut", [5, 30, 60])
def test_a_resumed_fit_goes_on_with_the_figures_and_repeats_nothing(
    cut: int, lines: Callable[[], list[str]]
) -> None:
    steps = trace(HEALTHY | TROUBLES["entropy has collapsed"] | TROUBLES["are cut off"], 90)
    validations = [0.5] * 18
    feed(Health(), steps, validations, every=5)
    whole = lines()
    first = feed(Health(), steps[:cut], validations[: cut // 5], every=5)
    second = Health()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    feed(second, steps[cut:], validations[cut // 5 :], every=5)
    assert len(whole) == 3 and lines() == 2 * whole


def test_only_the_first_rank_speaks(lines: Callable[[], list[str]]) -> None:
    steps = trace(HEALTHY | TROUBLES["are cut off"], 30)
    feed(Health(), steps, rank=1)
    assert lines() == []
    feed(Health(), steps, rank=0)
    assert len(lines()) == 1


@pytest.mark.parametrize("seen", TROUBLES)
def test_a_limit_of_null_is_not_looked_at(seen: str, lines: Callable[[], list[str]]) -> None:
    off = Health(10, None, None, None, None, None, None, None, None)
    feed(off, trace(HEALTHY | TROUBLES[seen], 200))
    assert lines() == []


def test_a_mean_of_one_step_is_refused() -> None:
    with pytest.raises(UsageError, match="window is 1"):
        Health(window=1)


def test_a_fit_logs_every_metric_that_is_watched(llama: Path, tmp_path: Path) -> None:
    health = Health()
    fit(rl(llama), tmp_path, health, steps=2)
    # The last needs `refill_budget`.
    assert {name for name in WATCHED if len(health.recent[name]) != 2} == {"groups/refilled"}
