"""The training problems of the tiny model in the package, as a problem source for SFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coderl.errors import UsageError
from coderl.problems.sources import Embedded, ProblemSource

if TYPE_CHECKING:
    from coderl.types import Problem


class EmbeddedSFT(ProblemSource):
    """Generated problems with solutions, some of them wrong: the SFT data of the tiny model in the package.

    Their compositions are neither in the shipped training problems nor in the held-out ones. The mistakes are
    there on purpose: the code that real models are trained on has some too, and they leave something for
    reinforcement learning to improve.

    Args:
        size: Number of generated problems.
        bug_rate: Share of solutions with a plausible mistake, 0 to 1.
        seed: Determines every choice.
    """

    name = "embedded-sft"

    def __init__(self, size: int = 20_000, bug_rate: float = 0.45, seed: int = 0) -> None:
        if size < 1 or not 0 <= bug_rate <= 1:
            raise UsageError(
                f"EmbeddedSFT: size is {size} and bug_rate {bug_rate}: give 1 or more, and 0 to 1"
            )
        self.size, self.bug_rate, self.seed = size, bug_rate, seed

    def load(self, split: str) -> list[Problem]:
        """Generated problems for ``train``; the shipped ones for the other splits."""
        if split != "train":
            return Embedded().load(split)
        from coderl.embedded.generate import sft_examples

        return sft_examples(self.seed, self.size, self.bug_rate)
