"""Rewards of the user's own: what they may return, what their errors do, and when they are first called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coderl.algorithms import GRPO, rng
from coderl.algorithms.rewards import (
    ExecutionReward,
    OnError,
    Reward,
    Sample,
    measure,
    names_of,
    total,
    values_of,
)
from coderl.algorithms.step import Rollout
from coderl.algorithms.trial import MADE_UP, made_up_samples
from coderl.data import CodeDataModule
from coderl.errors import UsageError, UserError
from coderl.model.policy import Policy
from coderl.problems import ProblemSource
from coderl.sandbox import Sandbox
from coderl.types import Completion, Execution, Outcome, Problem
from tests.support import tiny
from tests.support.fixed import FixedGRPO, rollout_of, run

NAN = math.nan


def sample(text: str = "x", outcome: Outcome = "passed", message: str = "") -> Sample:
    problem = Problem(f"p/{text}", "", tests=("assert f(1) == 1",))
    return Sample(
        problem, Completion(0, (), (1,), (-1.0,), text, True), text, Execution(outcome, 1, 1, message)
    )


SAMPLES = [sample("a"), sample("b"), sample("c")]


class Mine(Reward):
    """Returns what a function makes of the samples."""

    def __init__(self, gives: Callable[[Sequence[Sample]], Any], on_error: OnError = "stop") -> None:
        self.gives, self.on_error = gives, on_error
        self.calls: list[int] = []

    def __call__(self, samples: Sequence[Sample]) -> Any:
        self.calls.append(len(samples))
        return self.gives(samples)


@pytest.mark.parametrize(
    "given",
    [
        [1, 0.5, -2.0],
        (1, 0.5, -2.0),
        (value for value in (1.0, 0.5, -2.0)),
        np.array([1, 0.5, -2]),
        torch.tensor([1, 0.5, -2], requires_grad=True),
        torch.tensor([1, 0.5, -2], dtype=torch.bfloat16),
        [np.float32(1), torch.tensor(0.5), np.int64(-2)],
    ],
    ids=lambda given: type(given).__name__,
)
def test_whatever_lists_a_number_for_each_sample_is_a_reward(given: Any) -> None:
    values = values_of(Mine(lambda _: given), SAMPLES)
    assert values == [1.0, 0.5, -2.0] and {type(value) for value in values} == {float}


def test_truth_values_count_as_1_and_0_and_none_as_unknown() -> None:
    values = values_of(Mine(lambda _: [True, np.bool_(False), None]), SAMPLES)
    assert values == pytest.approx([1.0, 0.0, NAN], nan_ok=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "Mine returned None: it should return a list with a number for each of the 3 samples"),
        (0.5, "returned a float (0.5): it should return a list"),
        (torch.tensor(0.5), "returned a float (0.5)"),
        ("abc", "returned a str ('abc')"),
        ({"a": 1, "b": 2, "c": 3}, "returned a dict"),
        ({1, 2, 3}, "returned a set"),
        ([1.0], "Mine returned 1 values for 3 samples: it should return a list"),
        ([1.0] * 5, "returned 5 values for 3 samples"),
        (iter(lambda: 1.0, None), "returned more values for 3 samples"),
        (np.ones((3, 1)), "returned a list ([1.0]) for sample 0 (problem p/a)"),
        ([1.0, "high", 1.0], "returned a str ('high') for sample 1 (problem p/b)"),
        ([1.0, 1.0, 1j], "returned a complex (1j) for sample 2"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_the_reward(given: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        values_of(Mine(lambda _: given), SAMPLES)
    assert says in str(caught.value) and "Mine" in str(caught.value) and "\n" not in str(caught.value)


def test_infinite_rewards_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    values = values_of(Mine(lambda _: [10**400, 1.0, -math.inf]), SAMPLES)
    assert values == pytest.approx([NAN, 1.0, NAN], nan_ok=True)
    assert "Mine returned an infinite reward for sample 0 (problem p/a) and for 1 more" in caplog.text


def fails_on_b(samples: Sequence[Sample]) -> list[float]:
    return [{"a": 1.0, "c": 3.0}[one.completion.text] for one in samples]


def fails_late(samples: Sequence[Sample]) -> Any:
    for one in samples:
        yield {"a": 1.0, "c": 3.0}[one.completion.text]


@pytest.mark.parametrize("gives", [fails_on_b, fails_late])
def test_an_exception_in_a_reward_is_one_line_with_its_place_and_problem(gives: Any) -> None:
    reward = Mine(gives)
    with pytest.raises(
        UserError, match=r"^Mine \(test_user_rewards\.py:\d+\) raised KeyError: 'b'"
    ) as caught:
        values_of(reward, SAMPLES)
    assert " on problem p/b: " in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)  # with its traceback
    assert reward.calls == [3]


def test_samples_that_a_reward_raises_for_are_unknown_where_it_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reward = Mine(fails_on_b, on_error="unknown")
    assert values_of(reward, SAMPLES) == pytest.approx([1.0, NAN, 3.0], nan_ok=True)
    assert "1 of 3 samples have no reward: Mine (test_user_rewards.py:" in caplog.text
    assert total([reward, Mine(lambda s: [1.0] * len(s))], SAMPLES) == pytest.approx(
        [2.0, NAN, 4.0], nan_ok=True
    )


def test_a_wrong_return_type_ends_the_fit_also_where_exceptions_do_not() -> None:
    with pytest.raises(UserError, match="Mine returned 2 values"):
        values_of(Mine(lambda _: [1.0, 1.0], on_error="unknown"), SAMPLES)


def test_two_rewards_of_a_class_have_two_names() -> None:
    rewards = [Mine(lambda s: [1.0] * len(s)), ExecutionReward(), Mine(lambda s: [2.0] * len(s))]
    assert names_of(rewards) == ["Mine", "ExecutionReward", "Mine-2"]
    found = measure(rewards, SAMPLES)
    assert (found["Mine"], found["Mine-2"]) == ([1.0] * 3, [2.0] * 3)


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        ([], "rewards is empty"),
        ([len], "len is no reward but a builtin_function_or_method: subclass coderl.rewards.Reward"),
        ([ExecutionReward], r"give ExecutionReward\(\)"),
        ([ExecutionReward(), "a"], "str is no reward"),
    ],
)
def test_what_is_no_reward_is_refused_when_the_algorithm_is_made(rewards: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        GRPO(Policy("m"), rewards=rewards)


@pytest.mark.parametrize(("name", "value"), [("weight", "0.5"), ("weight", NAN), ("on_error", "skip")])
def test_settings_of_a_reward_out_of_range_are_refused(name: str, value: Any) -> None:
    reward = ExecutionReward()
    setattr(reward, name, value)
    with pytest.raises(UsageError, match=f"ExecutionReward: {name} is {value!r}"):
        GRPO(Policy("m"), rewards=[reward])


# -- the mean of each ----------------------------------------------------------------------------------------


def judged(rewards: list[list[float]], **terms: list[float]) -> Rollout:
    samples = [sample(str(i)) for i in range(sum(map(len, rewards)))]
    return Rollout(samples, torch.tensor(rewards), terms)


def test_each_of_several_rewards_has_its_own_mean_without_unknown_values() -> None:
    both = judged([[1.0, 0.0, NAN, 3.0]], A=[1.0, 0.0, NAN, 1.0], B=[NAN] * 4)
    found = both.metrics()
    assert found["reward/A/mean"] == pytest.approx(2 / 3) and math.isnan(found["reward/B/mean"])
    alone = judged([[1.0, 0.0, NAN, 3.0]], A=[1.0, 0.0, NAN, 1.0]).metrics()
    assert not [name for name in alone if name.startswith("reward/A")]


def test_the_mean_of_each_reward_over_ranks_is_that_of_one_process() -> None:
    """Ranks have unequally many samples, and of them known values."""
    a, b = [0.3, NAN, 0.1, 0.9, 1.0, NAN], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    whole = judged([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]], A=a, B=b).metrics()
    parts = [judged([[1.0]] * len(a[part]), A=a[part], B=b[part]) for part in (slice(0, 4), slice(4, 6))]
    sent: list[Any] = []
    parts[0].metrics(lambda mine: sent.append(mine) or [mine])  # type: ignore[func-returns-value]
    found = parts[1].metrics(lambda mine: [*sent, mine])
    for name in ("reward/A/mean", "reward/B/mean"):
        assert found[name] == pytest.approx(whole[name])


def test_a_group_that_is_taken_from_another_rollout_brings_what_each_reward_gave() -> None:
    one = judged([[1.0, 2.0], [3.0, 4.0]], A=[1.0, 2.0, 3.0, 4.0])
    other = judged([[5.0, 6.0], [7.0, 8.0]], A=[5.0, 6.0, 7.0, 8.0])
    assert one.replaced(0, other, 1).terms == {"A": [7.0, 8.0, 3.0, 4.0]}
    assert one.terms == {"A": [1.0, 2.0, 3.0, 4.0]}


# -- before the weights load ---------------------------------------------------------------------------------


class Four(ProblemSource):
    name = "four"

    def load(self, split: str) -> list[Problem]:
        return tiny.problems(4) if split == "train" else []


class Unloaded(Policy):
    """Its weights cannot load: what fails before they would fails with another error."""

    def load(self, *args: Any, **options: Any) -> None:
        raise AssertionError("the weights load")


def begin(llama: Path, *rewards: Reward, data: bool = True) -> None:
    """Start a fit with these rewards, of a policy whose weights do not load."""
    module = GRPO(
        Unloaded(str(llama), quantization="none"),
        rewards=list(rewards),
        sandbox=Sandbox(workers=1, allow_weak_isolation=True),
        group_size=4,
        max_new_tokens=8,
    )
    trainer = tiny.trainer(max_steps=1)
    if data:
        trainer.fit(module, datamodule=CodeDataModule(Four(), batch_size=2))
    else:
        trainer.fit(module, torch.utils.data.DataLoader(tiny.problems(2), 2, collate_fn=list))  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [True, False])
def test_a_reward_that_fails_ends_the_fit_before_the_weights_load(llama: Path, data: bool) -> None:
    where = "tiny/0" if data else "example/double"
    for gives, says in ((fails_on_b, "raised KeyError"), (lambda _: None, "returned None")):
        with pytest.raises(UserError, match=rf"Mine.*{says}.*problem {where}; try_out = False") as caught:
            begin(llama, ExecutionReward(), Mine(gives), data=data)
        assert "\n" not in str(caught.value)


def test_a_reward_that_cannot_be_tried_out_is_left_until_the_rollout(llama: Path) -> None:
    class Careful(Mine):
        try_out = False

    reward = Careful(fails_on_b)
    with pytest.raises(AssertionError, match="the weights load"):
        begin(llama, reward)
    assert not reward.calls


def test_the_trial_leaves_random_generators_where_they_were(llama: Path) -> None:
    def noisy(samples: Sequence[Sample]) -> list[float]:
        return [float(torch.rand(())) + float(np.random.rand()) for _ in samples]

    torch.manual_seed(3)
    before = rng.state()["torch"]
    with pytest.raises(AssertionError, match="the weights load"):
        begin(llama, Mine(noisy))
    assert torch.equal(rng.state()["torch"], before)


def test_made_up_samples_are_a_group_with_a_right_and_a_wrong_program(llama: Path) -> None:
    policy = Policy(str(llama), quantization="none")
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        for problem in (MADE_UP, *tiny.problems(2)):
            made = made_up_samples(problem, policy, sandbox, 4)
            outcomes = [one.execution.outcome for one in made]
            assert outcomes[::2] == ["passed"] * 2 and "passed" not in outcomes[1::2]
            assert made[0].completion.prompt_ids == tuple(policy.encode(problem))
            assert all(len(one.completion.ids) == len(one.completion.logprobs) > 0 for one in made)


# -- no reward at all ----------------------------------------------------------------------------------------

LOST, SOME = [[NAN] * 4] * 2, [[1.0, NAN, 0.0, NAN]] * 2


def test_a_fit_ends_when_no_sample_has_had_a_reward_for_three_steps_in_a_row(llama: Path) -> None:
    lost, some = rollout_of(llama, LOST), rollout_of(llama, SOME)
    with pytest.raises(
        UserError, match="no sample has had a reward in 3 steps in a row: all rewards are NaN"
    ):
        run(llama, [some, lost, lost, lost, some], steps=5)
    assert len(run(llama, [lost, lost, some, lost, lost, some], steps=6).logged) == 6


def test_it_says_why_no_sample_has_a_reward(llama: Path) -> None:
    found = rollout_of(llama, LOST)
    broken = Execution("infra_error", message="no processes left")
    object.__setattr__(found.samples[0], "execution", Execution("infra_error", message="another"))
    for one in found.samples[1:6]:
        object.__setattr__(one, "execution", broken)
    found.terms = {"Good": [NAN] * 6 + [1.0] * 2, "Mine": [NAN] * 8}
    with pytest.raises(UserError) as caught:
        run(llama, found, steps=3, kind=FixedGRPO)
    said = str(caught.value)
    assert "6 of 8 programs have no verdict, most often for the reason: no processes left" in said
    assert "Mine gave None or NaN for 2 of the 2 that have a verdict" in said
    assert "Good" not in said and "\n" not in said
