"""A curriculum: problems solved now and then are drawn more often than those always or never solved.

Where all samples of a problem earn the same, a group says nothing about which of them was better. Most is to
be learned from problems with mixed outcomes, so draws follow the expected variance of a problem's outcome.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coderl.data.sampler import EpochSampler
from coderl.errors import UsageError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.types import Problem


@dataclass
class Curriculum:
    """Prefers the training problems with mixed outcomes, going by how often samples of each passed.

    Args:
        decay: What the counts of a problem are multiplied by at each new observation of it, 0 to 1: older
            evidence fades because the policy changes. 1 never forgets.
        history: File to start from: the ``curriculum.json`` that an earlier run left in its folder. None:
            begin knowing nothing. A resumed run takes the history of its checkpoint instead.
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
        """Count new samples of a problem. Where there are none its older ones do not fade.

        Args:
            name: The problem's id.
            passed: Samples that passed.
            failed: Samples that were judged and did not.
        """
        if passed or failed:
            before = self.counts.get(name, (0.0, 0.0))
            self.counts[name] = (self.decay * before[0] + passed, self.decay * before[1] + failed)

    def weight(self, name: str) -> float:
        """Expected variance of a sample's outcome, E[p(1 - p)], for a pass rate p known by the counts.

        With a uniform prior p is Beta(a, b), a = 1 + passed and b = 1 + failed, and the expectation is
        ab / ((a + b)(a + b + 1)): 1/6 for a problem never met, towards 1/4 for one solved half of the time,
        towards 0 (and never 0) for one always or never solved.
        """
        passed, failed = self.counts.get(name, (0.0, 0.0))
        a, b = 1 + passed, 1 + failed
        return a * b / ((a + b) * (a + b + 1))

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain data."""
        return {"counts": {name: list(pair) for name, pair in self.counts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counts of the state and forget one's own."""
        self.counts = {name: (passed, failed) for name, (passed, failed) in state["counts"].items()}

    def save(self, path: Path) -> None:
        """Write the counts as JSON. A reader, or a run killed meanwhile, never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        lines = [f"{json.dumps(name)}: {json.dumps(pair)}" for name, pair in self.counts.items()]
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Take the counts that :meth:`save` wrote.

        Raises:
            UserError: The file is missing, or was not written by it.
        """
        fix = "give data.curriculum.history the curriculum.json of an earlier run, or null"
        try:
            counts = json.loads(path.expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
        except ValueError as error:
            raise UserError(f"{path}: malformed JSON ({error}); {fix}") from error
        if not isinstance(counts, dict) or not all(map(_is_pair, counts.values())):
            raise UserError(f'{path}: is to hold an object of "id": [passed, failed] pairs; {fix}')
        self.load_state_dict({"counts": counts})


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) in (int, float) and 0 <= n < float("inf") for n in value)
    )


def choose(
    problems: Sequence[Problem],
    count: int,
    history: PassHistory | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Indices of different problems, drawn one after the other with chances in proportion to their weights.

    Args:
        problems: What is drawn from.
        count: How many; fewer come where there are fewer.
        history: What their weights come from. None: all are alike.
        generator: What randomness comes from. None: torch's global generator.
    """
    count = min(count, len(problems))
    if count < 1:
        return []
    weights = [history.weight(problem.id) if history else 1.0 for problem in problems]
    chances = torch.tensor(weights, dtype=torch.float64)
    chosen: list[int] = torch.multinomial(chances, count, generator=generator).tolist()
    return chosen


class CurriculumSampler(EpochSampler):
    """Indices of this rank, drawn by the history that there is when a batch is asked for.

    A chunk, one batch of every rank, is drawn whole when its first index is asked for, and holds no problem
    twice unless it is larger than the data. It follows from the seed, the number of chunks before it and the
    history alone, so a resumed run draws what it would have drawn, and all ranks draw the same chunk and take
    their shares of it. An epoch has as many indices as one of :class:`EpochSampler`, though it leaves
    problems out and repeats others.

    Args:
        problems: What is sampled from.
        history: What is known of them; the same on every rank.
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
        """Go to an epoch's start. What the last one did not need of its last chunk is dropped."""
        if epoch != self.epoch:
            self.chunk = []
        super().set_epoch(epoch)

    def indices(self, start: int) -> Iterator[int]:
        """This rank's indices of the epoch from place ``start`` on, each drawn when it is asked for."""
        for _ in range(start, self.num_samples):
            if not self.chunk:
                self.chunk = self._draw(self.batch_size * self.num_replicas)
            shares, self.chunk = self.chunk[: self.num_replicas], self.chunk[self.num_replicas :]
            yield shares[self.rank]

    def _draw(self, count: int) -> list[int]:
        # Text as seed: neighbouring seeds share no chunk, as they would if the numbers were added up.
        seed = random.Random(f"curriculum {self.seed} {self.drawn}").getrandbits(63)
        self.drawn += 1
        chunk = choose(self.problems, count, self.history, torch.Generator().manual_seed(seed))
        return (chunk * -(-count // len(chunk)))[:count]  # ranks get equally many, even of very few problems

    def state_dict(self) -> dict[str, Any]:
        """Where the draws stand. The history is saved by its owner."""
        return super().state_dict() | {
            "drawn": self.drawn,
            "chunk": list(self.chunk),
            "ranks": self.num_replicas,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state left off, be it of this sampler or of a run without a curriculum."""
        super().load_state_dict(state)
        self.drawn = state.get("drawn", 0)
        usable = self.yielded > 0 and state.get("ranks") == self.num_replicas
        self.chunk = list(state["chunk"]) if usable else []
