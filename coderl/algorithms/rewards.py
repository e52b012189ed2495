"""What a scored completion is worth.

A reward maps samples to numbers; several are summed with their weights. NaN says that the machinery failed
and the sample tells nothing: it is left out of the update, never counted as wrong.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coderl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.types import Completion, Execution, Problem

_TOKEN = re.compile(r"\w+|[^\w\s]")
_LONGEST = 20_000
"""Characters that are looked at; a completion longer than that has no quality."""
_FEWEST = 40
"""Lexical tokens that every completion may have, however short the reference is."""
_UNKNOWN = 150
"""The allowance where a problem has no reference solution."""
_UNCLEAN = re.compile(
    r"\bexcept[\s\\(]*(:|BaseException\b)"
    r"|\b(eval|exec|compile|__import__|globals|locals|vars|breakpoint|exit|quit)\s*\("
    r"|\b(sys\s*\.\s*(exit|settrace|setprofile|_getframe|modules)|os\s*\.\s*(_exit|kill|fork|system|exec\w*))\b"
    r"|\b(inspect|gc|ctypes|builtins|__builtins__|__class__|__eq__|__hash__|assert)\b"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion with all that is known of it.

    Attributes:
        problem: What was asked.
        completion: What the model wrote.
        program: The source that was run, made from both.
        execution: What the sandbox saw.
    """

    problem: Problem
    completion: Completion
    program: str
    execution: Execution


class Reward(ABC):
    """One term of the reward.

    Attributes:
        weight: Factor in the sum over rewards.
    """

    weight: float = 1.0

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """A number for each sample, in order; NaN where the machinery failed and nothing can be said."""


class ExecutionReward(Reward):
    """Reward by execution: does the program pass its tests?

    | outcome | reward |
    |---|---|
    | passes every test | ``max_reward + quality_bonus * quality`` |
    | a wrong answer, an exception, a time-out, out of memory | ``min_reward`` |
    | a syntax error, or no statement at all | ``syntax_penalty`` |
    | an infrastructure error | NaN |

    An empty answer takes the syntax penalty: were it cheaper, saying nothing would pay better than trying.

    *Quality* is 0 to 1, only for programs that pass, and read off the text of the model's own completion,
    which is never compiled here. It is the allowance left over by the completion's length, counted in lexical
    tokens (words and single punctuation marks; comments and strings count like code): 1 up to the length of
    the reference solution, 0 from twice that length on, linear between. It is 0 if the completion did not end
    by itself, or if it uses what honest solutions of such problems do without: a bare ``except``, ``eval``,
    ``exec``, interpreter internals, asserts, overridden equality. Text can therefore only lower it: inserting
    comments, blank or dead code or anything else never raises it, and being shorter than the reference earns
    nothing more. References under 40 tokens count as 40; where there is none, 150 are allowed.

    Args:
        max_reward: For passing every test.
        min_reward: For failing.
        syntax_penalty: For text that is not a program.
        quality_bonus: Largest addition for quality; 0 turns it off.
        weight: Factor in the sum over rewards.

    Raises:
        UsageError: The values do not reward passing over failing, or are not finite.
    """

    def __init__(
        self,
        max_reward: float = 1.0,
        min_reward: float = 0.0,
        syntax_penalty: float = -0.2,
        quality_bonus: float = 0.1,
        weight: float = 1.0,
    ) -> None:
        if not all(map(math.isfinite, (max_reward, min_reward, syntax_penalty, quality_bonus, weight))):
            raise UsageError("reward values must be finite numbers: fix the reward's settings")
        if not syntax_penalty <= min_reward < max_reward or quality_bonus < 0:
            raise UsageError(
                "rewards do not favour passing: "
                f"syntax_penalty {syntax_penalty} <= min_reward {min_reward} < "
                f"max_reward {max_reward} and quality_bonus {quality_bonus} >= 0 must hold: fix the settings"
            )
        self.max_reward = max_reward
        self.min_reward = min_reward
        self.syntax_penalty = syntax_penalty
        self.quality_bonus = quality_bonus
        self.weight = weight

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The reward of each sample."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> float:
        outcome = sample.execution.outcome
        if outcome == "infra_error":
            return math.nan
        if outcome == "passed":
            return self.max_reward + self.quality_bonus * quality(sample)
        return self.syntax_penalty if outcome in ("syntax_error", "no_code") else self.min_reward


def quality(sample: Sample) -> float:
    """The quality of a sample, 0 to 1, as :class:`ExecutionReward` defines it."""
    text = sample.completion.text
    if sample.execution.outcome != "passed" or not sample.completion.finished or len(text) > _LONGEST:
        return 0.0
    if _UNCLEAN.search(text):
        return 0.0
    reference = sample.problem.solution
    allowed = max(_FEWEST, _tokens(reference)) if reference.strip() else _UNKNOWN
    return min(1.0, max(0.0, 2.0 - _tokens(text) / allowed))


def _tokens(text: str) -> int:
    return sum(1 for _ in _TOKEN.finditer(text))


def total(rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[float]:
    """The weighted sum of several rewards for each sample; NaN where any of them is NaN.

    Raises:
        ValueError: A reward gave another number of values than there are samples.
    """
    sums = [0.0] * len(samples)
    for reward in rewards:
        values = reward(samples)
        if len(values) != len(samples):
            raise ValueError(f"{type(reward).__name__} gave {len(values)} values for {len(samples)} samples")
        sums = [known + reward.weight * value for known, value in zip(sums, values, strict=True)]
    return sums
