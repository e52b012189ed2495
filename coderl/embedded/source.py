"""The problems that the tiny model in the package learned from, as a source that SFT takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coderl.errors import UsageError
from coderl.problems.sources import Embedded, ProblemSource

if TYPE_CHECKING:
    from coderl.types import Problem


class EmbeddedSFT(ProblemSource):
    """What the tiny model in the package learned from: generated problems, part of them solved wrongly.

    Their compositions are neither in the shipped training problems nor in the held-out ones. Mistakes are
    there on purpose: real code models learned from code that has some, and what they leave unsettled is what
    reinforcement learning settles.

    Args:
        size: Number of generated problems.
        bug_rate: Share of solutions that carry a plausible mistake, 0 to 1.
        seed: Fixes every choice.
    """

    name = "embedded-sft"

    def __init__(self, size: int = 20_000, bug_rate: float = 0.45, seed: int = 0) -> None:
        if size < 1 or not 0 <= bug_rate <= 1:
            raise UsageError(
                f"EmbeddedSFT: size is {size} and bug_rate {bug_rate}: give 1 or more, and 0 to 1"
            )
        self.size, self.bug_rate, self.seed = size, bug_rate, seed

    def load(self, split: str) -> list[Problem]:
        """Generated problems for training; the shipped ones of the other splits."""
        if split != "train":
            return Embedded().load(split)
        from coderl.embedded.generate import sft_examples

        return sft_examples(self.seed, self.size, self.bug_rate)
