"""The contract of a rollout engine: problems, sampling settings and a seed in; ids, log-probs, text out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coderl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coderl.model.policy import Policy
    from coderl.types import Completion, Problem


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperature: Logits are divided by it; 0 is greedy decoding, for evaluation only.
        top_p: Nucleus sampling. 1 is off, and the only value that training allows.
        max_new_tokens: Longest completion, in tokens.
        max_length: Longest prompt with completion, in tokens, as evaluation harnesses count; None: no such
            limit. A prompt as long as that has an empty completion.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    max_length: int | None = None

    def max_tokens(self, prompt_length: int) -> int:
        """Longest completion of a prompt of that many tokens; below 1 where the prompt is too long."""
        if self.max_length is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.max_length - prompt_length)

    def for_training(self) -> Sampling:
        """These settings, if training may sample with them: importance ratios need their log-probabilities.

        Raises:
            UsageError: If log-probabilities would be those of another distribution than samples are from.
        """
        if self.temperature <= 0:
            raise UsageError(
                f"temperature {self.temperature} cannot train: every sample of a group would be the same; "
                "set model.temperature above 0, such as 1.0"
            )
        if self.top_p != 1.0:
            raise UsageError(
                f"top_p {self.top_p} biases the importance ratio: training samples with top_p 1 only"
            )
        return self


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block, and restore their state after it."""
    # Only devices in use: forking the generator of an idle GPU would initialize CUDA there.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class RolloutEngine(ABC):
    """Samples from a policy: ``bind`` once, ``sync`` after each change of weights, ``close`` in the end."""

    batch_size: int | None = None
    """Sequences sampled together, at most; None: as many as memory holds."""

    def sequences(self, problems: Sequence[Problem], sampling: Sampling) -> int:
        """How many completions a caller that samples in parts had best ask for at a time."""
        return self.batch_size or 128

    def batches_line(self, longest: int) -> str:
        """How it samples sequences of up to so many tokens, for the user."""
        return f"{self.batch_size or 128} sequences at a time"

    @property
    def samples_from_copy(self) -> bool:
        """Whether it samples from a copy of the weights, which may round differently; saved beside scores."""
        return False

    @abstractmethod
    def bind(self, policy: Policy) -> None:
        """Take the policy to sample from, with its weights as they are; they are loaded."""

    @abstractmethod
    def sync(self) -> None:
        """Bring the engine's weights up to the policy's."""

    def close(self) -> None:  # noqa: B027 -- nothing to do for one that holds nothing of its own
        """Release processes and memory. A policy may be bound again."""

    @abstractmethod
    def generate(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        ready: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Sample ``n`` completions for each problem.

        Args:
            problems: What to answer; ``Completion.problem`` is the index here.
            n: Completions per problem.
            sampling: How to draw them.
            seed: The same seed and weights give the same completions, and the state of torch's global
                generators is restored afterwards. None: the completions follow from these generators, and
                move them on; an engine with random numbers of its own derives its seed from them.
            ready: Called in this thread with a completion's place in the result and the completion, as soon
                as it is whole, so that its program can run while others are sampled. An engine may leave
                completions out.

        Returns:
            ``len(problems) * n`` completions, those of a problem side by side. Each has the prompt's ids, the
            sampled ids (an end-of-sequence token included), the log-probability of each at
            ``sampling.temperature`` (before top-p, nats), the text up to the first stop string, and whether
            it finished by itself.
        """
