"""Reward functions: from executed samples to numbers.

Several rewards are summed with their weights. NaN, or None, says that nothing is known of a sample, because
the infrastructure failed: it is left out of the update, never counted as wrong.
"""

from __future__ import annotations

import logging
import math
import re
import traceback
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from coderl.errors import UsageError, UserError, named_line

if TYPE_CHECKING:
    from coderl.types import Completion, Execution, Problem

log = logging.getLogger(__name__)

OnError = Literal["stop", "unknown"]
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
        on_error: What an exception in it does: ``"stop"`` ends the fit with its place and text;
            ``"unknown"`` calls it again with each sample alone, and those that it raises for have no reward.
        try_out: Whether it is called with made-up samples before the weights load, so that errors in it show
            at once, see :mod:`coderl.algorithms.trial`. False for a reward that cannot take such samples.
    """

    weight: float = 1.0
    contrast: float | None = None
    on_error: OnError = "stop"
    try_out: bool = True

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Iterable[float | None]:
        """A number for each sample, in order; NaN or None where nothing is known of it.

        A list, or what can be listed: a generator, an array, a tensor of as many values.
        """


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


def require_rewards(rewards: Sequence[object]) -> None:
    """Check what can be told of rewards before they are called.

    Raises:
        UsageError: There is none, or one is no :class:`Reward` or has settings out of range.
    """
    if not rewards:
        raise UsageError("rewards is empty: nothing would be learned; list one in model.rewards")
    for reward in rewards:
        name = getattr(reward, "__name__", type(reward).__name__)
        if not isinstance(reward, Reward):
            fix = f"give {name}()" if isinstance(reward, type) else "subclass coderl.rewards.Reward"
            raise UsageError(f"model.rewards: {name} is no reward but a {type(reward).__name__}: {fix}")
        weight: Any = reward.weight
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise UsageError(f"{name}: weight is {weight!r}: set a finite number")
        if reward.on_error not in get_args(OnError):
            raise UsageError(f"{name}: on_error is {reward.on_error!r}: set 'stop' or 'unknown'")


def names_of(rewards: Sequence[Reward]) -> list[str]:
    """The names of rewards in metrics: their class's, with ``-2``, ``-3`` ... for further ones of a class."""
    met: Counter[str] = Counter()
    names = []
    for reward in rewards:
        name = type(reward).__name__
        met[name] += 1
        names.append(name if met[name] == 1 else f"{name}-{met[name]}")
    return names


def values_of(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    """What a reward gives for each sample, before its weight; NaN where that is unknown or infinite.

    Raises:
        UserError: It returned something else than a number, NaN or None for each, or it raised an
            exception and its ``on_error`` is ``"stop"``.
    """
    try:
        return _numbers(reward, samples)
    except UserError:
        raise
    except Exception as error:
        if reward.on_error == "unknown":
            return _one_by_one(reward, samples)
        log.debug("%s raised an exception", type(reward).__name__, exc_info=True)
        raise UserError(
            f"{_raised(reward, error)}: mend it, or have such samples left out by on_error = 'unknown' in "
            "the class"
        ) from error


def _numbers(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    """The checked values of one call."""
    count, name = len(samples), type(reward).__name__
    should = f"it should return a list with a number for each of the {count} samples, in order"
    given: Any = reward(samples)
    if hasattr(given, "tolist"):  # arrays and tensors: at once, as each item may wait for a GPU
        given = given.tolist()
    if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise UserError(f"{name} returned {_kind(given)}: {should}")
    values = list(islice(given, count + 1))  # a generator may have no end
    if len(values) != count:
        found = len(given) if isinstance(given, Sized) else len(values) if len(values) < count else "more"
        raise UserError(f"{name} returned {found} values for {count} samples: {should}")
    numbers, infinite = [], list[str]()
    for i, (value, sample) in enumerate(zip(values, samples, strict=True)):
        number = _number(value)
        where = f"for sample {i} (problem {sample.problem.id})"
        if number is None:
            raise UserError(
                f"{name} returned {_kind(value)} {where}: it is to be a number, or None where unknown"
            )
        if math.isinf(number):
            infinite.append(where)
        numbers.append(math.nan if math.isinf(number) else number)
    if infinite:
        log.warning(
            "%s returned an infinite reward %s%s: left out; let it return finite numbers, or None where "
            "nothing is known",
            name,
            infinite[0],
            f" and for {len(infinite) - 1} more" if infinite[1:] else "",
        )
    return numbers


def _number(value: Any) -> float | None:
    """A value as a float, NaN for None; None for what is no number."""
    if value is None:
        return math.nan
    if getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = value.item()
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:
        return math.inf


def _kind(value: Any) -> str:
    """A value in a message: its kind, and its text where that is short."""
    if value is None:
        return "None"
    return f"a {type(value).__name__}" + (f" ({text})" if len(text := repr(value)) <= 40 else "")


def _one_by_one(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    """The values of calls with one sample each; NaN where such a call raises. Logs how many those were."""
    values, raised = [], []
    for sample in samples:
        try:
            values += _numbers(reward, [sample])
        except UserError:
            raise
        except Exception as error:
            values.append(math.nan)
            raised.append(_raised(reward, error))
    if raised:
        log.warning("%d of %d samples have no reward: %s", len(raised), len(samples), raised[0])
    return values


def _raised(reward: Reward, error: Exception) -> str:
    """What a reward raised, where in its module, and on which problem, as far as the traceback tells."""
    place = problem = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == type(reward).__module__:
            place = f" ({Path(frame.f_code.co_filename).name}:{line})"
        # The sample at hand is a local variable of whoever looks at samples one after the other. To call the
        # reward again for each would repeat what it costs and does.
        at_hand = [value for value in frame.f_locals.values() if isinstance(value, Sample)]
        if at_hand:
            problem = f" on problem {at_hand[0].problem.id}"
    return f"{type(reward).__name__}{place} raised {named_line(error)}{problem}"


def measure(rewards: Sequence[Reward], samples: Sequence[Sample]) -> dict[str, list[float]]:
    """What each reward gives for each sample, by its name; see :func:`names_of` and :func:`values_of`."""
    named = zip(names_of(rewards), rewards, strict=True)
    return {name: values_of(reward, samples) for name, reward in named}


def weighted_sum(rewards: Sequence[Reward], values: Iterable[Sequence[float]], count: int) -> list[float]:
    """For each of ``count`` samples the sum of the rewards' values, each times its weight."""
    sums = [0.0] * count
    for reward, column in zip(rewards, values, strict=True):
        sums = [known + reward.weight * value for known, value in zip(sums, column, strict=True)]
    return sums


def total(rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[float]:
    """The weighted sum of several rewards for each sample; NaN where any of them is NaN.

    Raises:
        UserError: As :func:`values_of`.
    """
    return weighted_sum(rewards, measure(rewards, samples).values(), len(samples))
