"""A distributed sampler whose order depends only on seed and epoch, and that resumes in mid-epoch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.types import Problem


class EpochSampler(DistributedSampler[int]):
    """Indices of this rank in shuffled order, another order each epoch.

    The state holds the epoch, the position in it and the ids that the epoch has had, and is the same on every
    rank. After the last index it is the start of the next epoch, so that a run resumed at the boundary gets
    no empty epoch. A run that is resumed with other problems, another seed or number of ranks goes on with
    the problems that the epoch has not had, in its own order.

    Lightning does not replace a ``DistributedSampler``, and sets its epoch; in a plain loop the epoch
    advances with each pass. Ranks get equally many indices (some repeat where they do not divide evenly),
    since every rank must take part in every update.

    Args:
        problems: The training problems.
        seed: Seed of the order.
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    def __init__(self, problems: Sequence[Problem], seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(problems, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.ids = [problem.id for problem in problems]
        self.digest = hashlib.sha256("\n".join(self.ids).encode()).hexdigest()
        self.yielded = 0
        self.resumed = False
        self.before: list[str] = []  # what the epoch has had in a run with other problems, seed or ranks
        self._order: tuple[int, list[int]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. For the current epoch this does nothing: a resumed position stays."""
        if epoch != self.epoch:
            super().set_epoch(epoch)
            self.yielded, self.before = 0, []
            self.resumed = False

    def __iter__(self) -> Iterator[int]:
        # This is a generator, so the state is read when the first index is requested: after Lightning has set
        # the epoch.
        if self.yielded and not self.resumed:
            self.set_epoch(self.epoch + 1)  # the last pass was left early: this one is the next epoch
        self.resumed = False
        length = self.epoch_length()
        for index in self.indices(self.yielded):
            # Before the yield: after the last index, a generator may never be resumed.
            self.yielded += 1
            if self.yielded == length:
                self.set_epoch(self.epoch + 1)
            yield index

    def order(self) -> list[int]:
        """The indices of the epoch over all ranks, which take turns; without those it has had before."""
        if self._order is None or self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.ids), generator=generator).tolist()
            if had := set(self.before):
                order = [index for index in order if self.ids[index] not in had]
            missing = -len(order) % self.num_replicas
            while order and missing > 0:
                order += order[:missing]
                missing = -len(order) % self.num_replicas
            self._order = self.epoch, order
        return self._order[1]

    def epoch_length(self) -> int:
        """How many indices this rank has in the epoch, from its start or from where it was resumed."""
        return len(self.order()) // self.num_replicas

    def indices(self, start: int) -> Iterator[int]:
        """This rank's indices of the current epoch, from position ``start`` on."""
        yield from self.order()[self.rank :: self.num_replicas][start:]

    def left(self) -> int:
        """How many indices of this rank the epoch still has."""
        return self.epoch_length() - self.yielded

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, what they are valid for, and the ids that the epoch has had."""
        seen = [self.ids[index] for index in self.order()[: self.yielded * self.num_replicas]]
        return {
            "epoch": self.epoch,
            "yielded": self.yielded,
            "before": list(self.before),
            "seen": seen,
        } | self._valid_for()

    def _valid_for(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "size": len(self.ids),
            "ids": self.digest,
            "ranks": self.num_replicas,
        }

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether a state's position is valid here: same problems, seed and ranks."""
        mine = self._valid_for()
        return all(state.get(key, value) == value for key, value in mine.items())  # old states lack some

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position; where it is not valid here, go on with what the epoch has not had."""
        self.epoch, self._order = state["epoch"], None
        if self.fits(state):
            self.yielded, self.before = state["yielded"], list(state.get("before", ()))
        else:
            self.yielded, self.before = 0, [*state.get("before", ()), *state.get("seen", ())]
            if not self.order():
                self.set_epoch(self.epoch + 1)
        self.resumed = True
