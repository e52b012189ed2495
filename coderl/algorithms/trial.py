"""Rewards are called once with made-up samples, before weights load: their errors show in a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coderl.algorithms import rng
from coderl.algorithms.rewards import Sample, values_of
from coderl.errors import UserError
from coderl.problems import prompts
from coderl.types import Completion, Execution, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.algorithms.rewards import Reward
    from coderl.model.policy import Policy
    from coderl.sandbox import ProgramRunner

MADE_UP = Problem(
    "example/double",
    '"""\nWrite a function to double a number.\nassert double(2) == 4\n"""\n',
    "Write a function to double a number.\nYour code should pass this test:\nassert double(2) == 4",
    tests=("assert double(2) == 4",),
    solution="def double(x):\n    return 2 * x\n",
    stop=prompts.MBPP_STOP,
)
"""Stands for the first training problem where the fit has no data module."""


def made_up_samples(problem: Problem, policy: Policy, runner: ProgramRunner, count: int) -> list[Sample]:
    """A group of samples as a rollout would give them, from a policy whose weights need not be loaded.

    Args:
        problem: Its own solution, where it has one, is every second sample; the others are a program that
            does nothing.
        policy: Encodes prompt and answers.
        runner: Executes the two programs. Where it refuses the problem's tests, they have no verdict.
        count: Samples in the group.
    """
    form, right = policy.prompt_form, prompts.right_program(problem.prompt, problem.solution)
    texts = ["    pass\n", "    pass\n"]
    codes = [prompts.program(problem, texts[0], form)] * 2
    if right:
        texts[0], codes[0] = right if form == "chat" else problem.solution, right
    try:
        runs = list(runner.run([prompts.to_program(problem, code) for code in codes]))
    except UserError as error:  # the look at the problems, which follows, says where they are
        runs = [Execution("infra_error", message=str(error))] * 2
    prompt_ids = tuple(policy.encode(problem))
    samples = []
    for text, code, run in zip(texts, codes, runs, strict=True):
        ids = tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
        answer = Completion(0, prompt_ids, ids, (-1.0,) * len(ids), text, finished=True)
        samples.append(Sample(problem, answer, code, run))
    return [samples[i % 2] for i in range(count)]


def try_out(rewards: Sequence[Reward], samples: Sequence[Sample]) -> None:
    """Call the rewards that let themselves be tried out. What they draw does not move random generators on.

    Raises:
        UserError: One raised an exception that ends a fit, or returned what is no reward.
    """
    before = rng.state()
    for reward in rewards:
        if reward.try_out:
            try:
                values_of(reward, samples)
            except UserError as error:
                raise UserError(
                    f"{error} (tried out before the weights load, on made-up samples of problem "
                    f"{samples[0].problem.id}; try_out = False in the class leaves this out)"
                ) from error
    rng.restore(before)
