"""Two evaluations of the same problems side by side, as values: what differs, and whether it is chance.

:mod:`coderl.scores.compare` computes a :class:`Comparison`, :mod:`coderl.scores.table` prints it and
:mod:`coderl.scores.plot` draws it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from coderl.scores.numbers import is_interval, rounded
from coderl.scores.statistics import pass_at_k, sign_test

SIGNIFICANCE = 0.05
Count = tuple[int, int]
"""Of one problem's samples, how many pass and how many have a verdict."""


@dataclass(frozen=True)
class Score:
    """pass@k of both sides over the same problems.

    Attributes:
        a: Mean over problems on side A, 0 to 1.
        b: Mean over problems on side B, 0 to 1.
        interval_a: Bootstrap interval of ``a`` over problems, 95 %.
        interval_b: Bootstrap interval of ``b`` over problems, 95 %.
        interval: Bootstrap interval of the paired difference ``b - a``, 95 %.
        problems: Number of problems in the means: those with ``k`` judged samples on both sides.
        won: Number of them with a higher pass@k on side B.
        lost: Number of them with a higher pass@k on side A.
    """

    a: float
    b: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    interval: tuple[float, float]
    problems: int
    won: int
    lost: int

    @property
    def difference(self) -> float:
        """``b - a``."""
        return self.b - self.a

    @property
    def p_value(self) -> float:
        """p-value of the exact two-sided sign test, problems won against problems lost."""
        return sign_test(self.won, self.lost)

    @property
    def better(self) -> str:
        """``"A"`` or ``"B"`` where the interval excludes 0, else an empty string.

        Its ends count as they are printed. Where it has no width (every problem changed by as much), it
        cannot tell chance from gain, and the sign test decides.
        """
        low, high = map(rounded, self.interval)
        if not is_interval(self.interval) and self.p_value >= SIGNIFICANCE:
            return ""
        return "B" if low > 0 else "A" if high < 0 else ""


@dataclass(frozen=True)
class Comparison:
    """One task, evaluated twice.

    Attributes:
        task: Name, such as ``"mbpp"``.
        name_a: Name of the first results file, without folder and suffix.
        name_b: Name of the second one.
        ids: The problems compared, sorted.
        a: For each of them the count of the first file.
        b: For each of them the count of the second file.
        scores: From k to pass@k of both; pass@1 always, and each other k that both files have.
        won: Problems with a larger share of passing samples on side B.
        lost: Problems with a larger share of passing samples on side A.
        only_a: Problems that only the first file has.
        only_b: Problems that only the second file has.
        unjudged: Problems in both files that have no judged sample on one side. They are left out.
        warnings: Lines on what makes the two hard to compare.
    """

    task: str
    name_a: str
    name_b: str
    ids: tuple[str, ...]
    a: tuple[Count, ...]
    b: tuple[Count, ...]
    scores: dict[int, Score]
    won: tuple[str, ...]
    lost: tuple[str, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """Number of problems compared."""
        return len(self.ids)

    @property
    def tied(self) -> int:
        """Number of problems with the same share of passing samples on both sides."""
        return self.problems - len(self.won) - len(self.lost)

    @property
    def shares(self) -> list[tuple[float, float]]:
        """For each problem the shares of samples that pass, on side A and on side B."""
        return [(_pass_at_1(a), _pass_at_1(b)) for a, b in zip(self.a, self.b, strict=True)]

    @property
    def rate_a(self) -> float:
        """Mean pass@1 of side A, 0 to 1."""
        return self.scores[1].a

    @property
    def rate_b(self) -> float:
        """Mean pass@1 of side B, 0 to 1."""
        return self.scores[1].b

    @property
    def difference(self) -> float:
        """``rate_b - rate_a``."""
        return self.scores[1].difference

    @property
    def interval(self) -> tuple[float, float]:
        """Paired bootstrap interval of the difference, 95 %."""
        return self.scores[1].interval

    @property
    def p_value(self) -> float:
        """p-value of the sign test for pass@1."""
        return self.scores[1].p_value

    @property
    def test(self) -> str:
        """Name of the test; with one sample per problem the sign test is McNemar's."""
        return "McNemar exact" if {judged for _, judged in self.a + self.b} == {1} else "sign test"

    @property
    def better(self) -> str:
        """``"A"`` or ``"B"`` where the interval of pass@1 excludes 0, else an empty string."""
        return self.scores[1].better

    @property
    def verdict(self) -> str:
        """Interval and test as one sentence."""
        # The interval is about the mean and the test about the number of problems: they can disagree.
        sure = self.p_value < SIGNIFICANCE
        if self.better and sure:
            return f"{self.better} is better" + (
                ": the interval excludes 0" if is_interval(self.interval) else " by as much on every problem"
            )
        if self.better:
            return (
                f"{self.better} may be better: the interval excludes 0, but wins and losses could be chance"
            )
        if not self.won and not self.lost:
            return "no difference: the same share passes on every problem"
        unproven = f"no difference that {counted(self.problems, 'problem')} could show"
        if not sure:
            return unproven
        side = "B" if len(self.won) > len(self.lost) else "A"
        return f"{unproven} in the mean, though {side} does better on more of them"

    @property
    def evidence(self) -> str:
        """The test and its p-value, such as ``"sign test, p = 0.031"``."""
        return f"{self.test}, p = {self.p_value:.2g}"

    @property
    def left_out(self) -> str:
        """Problems that are not compared and why, such as ``"left out: 3 only in A"``; empty for none."""
        reasons = {"only in A": self.only_a, "only in B": self.only_b, "without a verdict": self.unjudged}
        named = [f"{len(ids)} {reason}" for reason, ids in reasons.items() if ids]
        return f"left out: {', '.join(named)}" if named else ""

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``json.dump``."""
        computed = (
            *("problems", "tied", "rate_a", "rate_b", "difference", "interval"),
            *("p_value", "test", "verdict"),
        )
        return {name: getattr(self, name) for name in computed} | asdict(self)


def counted(number: int, noun: str) -> str:
    """``1 problem``, ``2 problems``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _pass_at_1(count: Count) -> float:
    correct, judged = count
    return pass_at_k(judged, correct, 1)
