"""How an evaluation samples and judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coderl.errors import UsageError
from coderl.types import Judging

if TYPE_CHECKING:
    from coderl.rollout.engine import Sampling


@dataclass
class EvaluationSettings:
    """How held-out pass@k is measured (the original recipe's values).

    Args:
        n: Samples per problem.
        ks: The k of pass@k. A k over n is reported as missing.
        temperature: Of sampling; 0 is greedy.
        top_p: Nucleus sampling, allowed here since nothing is trained on it.
        max_length_generation: Longest prompt with its completion, in tokens, as the harness counts; null
            takes the training's longest completion.
        seed: Of the samples, so that before and after are drawn alike.
        grading: inline is the harness's way; auto reaches verdicts that cannot be forged, and names the
            samples that inline grading judges otherwise.
    """

    n: int = 15
    ks: tuple[int, ...] = (1, 5, 10)
    temperature: float = 0.2
    top_p: float = 0.95
    max_length_generation: int | None = None
    seed: int = 0
    grading: Judging = "inline"

    def __post_init__(self) -> None:
        counts = {
            "n": self.n,
            "max_length_generation": self.max_length_generation,
            "k": min(self.ks, default=1),
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise UsageError(f"evaluation: {name} is {count}; give 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"evaluation: temperature is {self.temperature} and top_p {self.top_p}; give 0 or more, and "
                "above 0 up to 1"
            )

    def sampling(self, max_new_tokens: int) -> Sampling:
        """How completions are drawn.

        Args:
            max_new_tokens: Longest completion, in tokens, where no ``max_length_generation`` is set.
        """
        from coderl.rollout.engine import Sampling

        longest = self.max_length_generation
        return Sampling(self.temperature, self.top_p, longest or max_new_tokens, longest)
