"""Reward functions: from executed samples to numbers.

Several rewards are summed with their weights. NaN says that nothing is known of a sample, because the
infrastructure failed: it is left out of the update, never counted as wrong.
"""

from __future__ import annotations

import math
import re
import unicodedata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coderl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.types import Completion, Execution, Problem

_TOKEN = re.compile(r"\w+|[^\w\s]")
_LONGEST = 20_000
"""Characters; a longer completion has quality 0, without being searched."""
_FEWEST = 40
"""Lexical tokens that a completion may always have, however short the reference is."""
_UNKNOWN = 150
"""Lexical tokens allowed where a problem has no reference solution."""
# Ways to pass tests without solving the task, to disturb whoever runs the program, or to hide what it is.
# Searched as text: compiling a hostile completion could crash this process. Names are searched for wherever
# they stand, as `run = exec` has no call, but not as attributes: `re.compile` is none of them.
_UNCLEAN = re.compile(
    r"\bexcept[\s\\(]*(:|BaseException\b)"
    r"|(?<![\w.])(eval|exec|compile|__import__|globals|locals|breakpoint)\b"
    r"|(?<![\w.])(vars|exit|quit)\s*\("
    r"|\b(sys\s*\.\s*(exit|settrace|setprofile|_getframe|modules)|os\s*\.\s*(_exit|kill|fork|system|exec\w*))\b"
    r"|\b(inspect|gc|ctypes|builtins|__builtins__|__class__|__eq__|__hash__|assert)\b"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with its problem, program and verdict.

    Attributes:
        problem: The task.
        completion: The model's answer.
        program: The source that was run, made from both.
        execution: The sandbox's verdict.
    """

    problem: Problem
    completion: Completion
    program: str
    execution: Execution


class Reward(ABC):
    """One term of the reward.

    Attributes:
        weight: Factor in the sum over rewards.
        contrast: What every right program gets beyond every wrong one, at least, before the weight. If all
            rewards of a run say it, GRPO keeps smaller differences small beside it, see
            :func:`~coderl.algorithms.advantages.group_advantages`. None: it cannot be said.
    """

    weight: float = 1.0
    contrast: float | None = None

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """A number for each sample, in order; NaN where the infrastructure failed and nothing is known."""


class ExecutionReward(Reward):
    """Reward for passing all tests.

    | outcome | reward |
    |---|---|
    | passes every test | ``max_reward + quality_bonus * quality`` |
    | a wrong answer, an exception, a time-out, out of memory | ``min_reward`` |
    | a syntax error, or no statement at all | ``syntax_penalty`` |
    | an infrastructure error | NaN |

    An empty answer gets the syntax penalty: otherwise no answer would be rewarded more than a failed attempt.

    *Quality* is 0 to 1, and only for programs that pass. It is measured on the text of the completion, which
    is never compiled here: 1 up to the length of the reference solution, 0 from twice that length on, linear
    between. Length is counted in lexical tokens (words and single punctuation marks; comments and strings
    count like code). Quality is 0 if the completion was cut off, or uses what honest solutions of such
    problems do not need: a bare ``except``, ``eval``, ``exec``, interpreter internals, asserts, overridden
    equality. So no text that is added (comments, blank or dead code) ever raises it, and an answer shorter
    than the reference gains nothing. References under 40 tokens count as 40; without a reference 150 tokens
    are allowed.

    Args:
        max_reward: For passing every test.
        min_reward: For failing.
        syntax_penalty: For text that is not a program.
        quality_bonus: Largest addition for quality; 0 turns it off.
        weight: Factor in the sum over rewards.

    Raises:
        UsageError: Passing would not be rewarded more than failing, or a value is not finite.
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
        self.contrast = max_reward - min_reward

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """The reward of each sample."""
        return [self._reward_of(sample) for sample in samples]

    def _reward_of(self, sample: Sample) -> float:
        outcome = sample.execution.outcome
        if outcome == "infra_error":
            return math.nan
        if outcome == "passed":
            return self.max_reward + self.quality_bonus * quality(sample)
        return self.syntax_penalty if outcome in ("syntax_error", "no_code") else self.min_reward


def total_contrast(rewards: Sequence[Reward]) -> float:
    """What right programs get beyond wrong ones in all; 0 where not every reward says it."""
    contrasts = [reward.weight * reward.contrast for reward in rewards if reward.contrast is not None]
    return max(0.0, sum(contrasts)) if len(contrasts) == len(rewards) else 0.0


def quality(sample: Sample) -> float:
    """The quality of a sample, 0 to 1, as :class:`ExecutionReward` defines it."""
    text = sample.completion.text
    if sample.execution.outcome != "passed" or not sample.completion.finished or len(text) > _LONGEST:
        return 0.0
    if _UNCLEAN.search(unicodedata.normalize("NFKC", text)):  # as Python reads names
        return 0.0
    reference = sample.problem.solution
    allowed = max(_FEWEST, _tokens(reference)) if reference.strip() else _UNKNOWN
    return min(1.0, max(0.0, 2.0 - _tokens(text) / allowed))


def _tokens(text: str) -> int:
    return sum(1 for _ in _TOKEN.finditer(text))


def total(rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[float]:
    """The weighted sum of several rewards for each sample; NaN where any of them is NaN.

    Raises:
        ValueError: A reward returned another number of values than there are samples.
    """
    sums = [0.0] * len(samples)
    for reward in rewards:
        values = reward(samples)
        if len(values) != len(samples):
            raise ValueError(f"{type(reward).__name__} gave {len(values)} values for {len(samples)} samples")
        sums = [known + reward.weight * value for known, value in zip(sums, values, strict=True)]
    return sums
