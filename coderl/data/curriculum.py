"""A curriculum: problems with mixed outcomes are sampled more often than those always or never solved.

Where all samples of a problem have the same reward, their advantages are 0 and nothing is learned from them.
So a problem is drawn with a probability in proportion to the expected variance of a sample's outcome.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coderl.data.sampler import EpochSampler
from coderl.errors import UsageError, UserError
from coderl.files import read_json, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.types import Problem


@dataclass
class Curriculum:
    """Prefers training problems some of whose samples pass and some do not.

    Args:
        decay: Factor on the counts of a problem at each new observation of it, 0 to 1: older samples count
            less, because the policy has changed since. 1 never forgets.
        history: File to start from: the ``curriculum.json`` in an earlier run's folder. None: start without
            counts. A resumed run takes those of its checkpoint instead.
    """

    decay: float = 0.9
    history: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UsageError(f"data.curriculum.decay is {self.decay}; it is a factor: give 0 to 1")


class PassHistory:
    """How many samples of each problem passed and failed, older ones counting less.

    Args:
        decay: Factor on the counts of a problem at each new observation of it, 0 to 1.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.counts: dict[str, tuple[float, float]] = {}

    def observe(self, name: str, passed: float, failed: float) -> None:
        """Count new samples of a problem. Without new ones the older ones do not decay.

        Args:
            name: The problem's id.
            passed: Samples that passed.
            failed: Samples that got a verdict and did not pass.
        """
        if passed or failed:
            before = self.counts.get(name, (0.0, 0.0))
            self.counts[name] = (self.decay * before[0] + passed, self.decay * before[1] + failed)

    def weight(self, name: str) -> float:
        """Expected variance of a sample's outcome, E[p(1 - p)], given the counts; p is the pass rate.

        With a uniform prior the posterior of p is Beta(a, b), a = 1 + passed and b = 1 + failed, and the
        expectation is ab / ((a + b)(a + b + 1)): 1/6 for a problem without samples, towards 1/4 for one
        solved half of the time, towards 0 (and never 0) for one always or never solved.
        """
        passed, failed = self.counts.get(name, (0.0, 0.0))
        a, b = 1 + passed, 1 + failed
        return a * b / ((a + b) * (a + b + 1))

    def state_dict(self) -> dict[str, Any]:
        """The counts: ``{"counts": {id: [passed, failed]}}``."""
        return {"counts": {name: list(pair) for name, pair in self.counts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the counts by those of the state."""
        self.counts = {name: (passed, failed) for name, (passed, failed) in state["counts"].items()}

    def save(self, path: Path) -> None:
        """Write the counts as JSON, a line for each problem."""
        lines = [f"{json.dumps(name)}: {json.dumps(pair)}" for name, pair in self.counts.items()]
        write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")

    def load(self, path: Path) -> None:
        """Replace the counts by those in a file that :meth:`save` wrote.

        Raises:
            UserError: The file is missing, or holds something else.
        """
        fix = "give data.curriculum.history the curriculum.json of an earlier run, or null"
        counts = read_json(path.expanduser(), fix)
        if not isinstance(counts, dict) or not all(map(_is_pair, counts.values())):
            raise UserError(f'{path}: is to hold an object of "id": [passed, failed] pairs; {fix}')
        self.load_state_dict({"counts": counts})


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) in (int, float) and 0 <= n < float("inf") for n in value)
    )


def weighted_sample(
    problems: Sequence[Problem],
    count: int,
    history: PassHistory | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Indices of problems, sampled without replacement with probabilities in proportion to their weights.

    Args:
        problems: The problems to sample from.
        count: How many indices; fewer are returned where there are fewer problems.
        history: Gives the weights. None: equal weights.
        generator: The random generator. None: torch's global one.
    """
    count = min(count, len(problems))
    if count < 1:
        return []
    weights = [history.weight(problem.id) if history else 1.0 for problem in problems]
    probabilities = torch.tensor(weights, dtype=torch.float64)
    indices: list[int] = torch.multinomial(probabilities, count, generator=generator).tolist()
    return indices


class CurriculumSampler(EpochSampler):
    """Indices of this rank, sampled by the pass history at the time when a batch is requested.

    A chunk is the global batch, one batch of every rank. It is drawn as a whole when its first index is
    requested, and holds no problem twice unless it is larger than the data. It depends only on the seed, the
    number of chunks before it and the history: a resumed run draws the same chunks, and every rank draws the
    whole chunk and takes its share. An epoch has as many indices as one of :class:`EpochSampler`, though it
    leaves problems out and repeats others.

    Args:
        problems: The training problems.
        history: Their counts; the same on every rank.
        batch_size: Problems per step and rank.
        seed: Seed of the draws.
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        history: PassHistory,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(problems, seed, rank, world_size)
        self.problems, self.history, self.batch_size = problems, history, batch_size
        self.drawn = 0
        self.chunk: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. The rest of the last epoch's chunk is dropped."""
        if epoch != self.epoch:
            self.chunk = []
        super().set_epoch(epoch)

    def epoch_length(self) -> int:
        """As many indices as one of :class:`EpochSampler`, whatever the epoch has had."""
        return self.num_samples

    def indices(self, start: int) -> Iterator[int]:
        """This rank's indices of the epoch from position ``start`` on, drawn lazily."""
        # Lazily, because the history changes after each step, and a chunk must be drawn by the newest one.
        for _ in range(start, self.epoch_length()):
            if not self.chunk:
                self.chunk = self._draw(self.batch_size * self.num_replicas)
            shares, self.chunk = self.chunk[: self.num_replicas], self.chunk[self.num_replicas :]
            yield shares[self.rank]

    def _draw(self, count: int) -> list[int]:
        # Seeded with text: were seed and number added, seed 1 would draw the chunks of seed 0 one later.
        seed = random.Random(f"curriculum {self.seed} {self.drawn}").getrandbits(63)
        self.drawn += 1
        chunk = weighted_sample(self.problems, count, self.history, torch.Generator().manual_seed(seed))
        # Repeated where there are fewer problems than places: every rank must get equally many.
        return (chunk * -(-count // len(chunk)))[:count]

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch and in the chunk. The data module saves the history."""
        own = {"drawn": self.drawn, "chunk": list(self.chunk)}
        # No ids: a chunk may repeat what the epoch has had.
        position = {"epoch": self.epoch, "yielded": self.yielded} | self._valid_for()
        return position | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position. The state may also be of an :class:`EpochSampler`."""
        self.epoch = state["epoch"]
        share = state.get("ranks", self.num_replicas) / self.num_replicas
        self.yielded = int(state["yielded"] * share)
        if self.yielded >= self.num_samples:
            self.set_epoch(self.epoch + 1)
        self.resumed = True
        self.drawn = state.get("drawn", 0)
        # The rest of a chunk fits only the problems and ranks that it was drawn for, and only mid-epoch.
        usable = self.yielded > 0 and self.fits(state)
        self.chunk = list(state.get("chunk", ())) if usable else []
