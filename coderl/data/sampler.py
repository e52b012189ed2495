"""A distributed sampler whose order depends only on seed and epoch, and that resumes in mid-epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.types import Problem


class EpochSampler(DistributedSampler[int]):
    """Indices of this rank in shuffled order, another order each epoch.

    The state holds the epoch and the position in it, and is the same on every rank. After the last index it
    is the start of the next epoch, so that a run resumed at the boundary gets no empty epoch.

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
        self.size = len(problems)
        self.yielded = 0
        self.resumed = False

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. For the current epoch this does nothing: a resumed position stays."""
        if epoch != self.epoch:
            super().set_epoch(epoch)
            self.yielded = 0
            self.resumed = False

    def __iter__(self) -> Iterator[int]:
        # This is a generator, so the state is read when the first index is requested: after Lightning has set
        # the epoch.
        if self.yielded and not self.resumed:
            self.set_epoch(self.epoch + 1)  # the last pass was left early: this one is the next epoch
        self.resumed = False
        for index in self.indices(self.yielded):
            # Before the yield: after the last index, a generator may never be resumed.
            self.yielded += 1
            if self.yielded == self.num_samples:
                self.set_epoch(self.epoch + 1)
            yield index

    def indices(self, start: int) -> Iterator[int]:
        """This rank's indices of the current epoch, from position ``start`` on."""
        yield from list(super().__iter__())[start:]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, with the seed and size that they are valid for."""
        return {"epoch": self.epoch, "yielded": self.yielded, "seed": self.seed, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore epoch and position; with other data or another seed the epoch starts from its beginning."""
        self.epoch = state["epoch"]
        same = (state["seed"], state["size"]) == (self.seed, self.size)
        self.yielded = state["yielded"] if same else 0
        self.resumed = True
