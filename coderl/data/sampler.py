"""A shuffled order that is a pure function of seed and epoch, and can be resumed anywhere in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.types import Problem


class EpochSampler(DistributedSampler[int]):
    """Indices of this rank in shuffled order, another order each epoch.

    The state holds the epoch as well as the place in it, and says the same on every rank. After the last
    index it is the next epoch's start, so that a run resumed at the boundary meets no empty epoch.

    Being a ``DistributedSampler`` it is left alone by Lightning, which sets the epoch; in a plain loop the
    epoch advances with each pass. Ranks get equally many indices (some repeat where they do not divide
    evenly), since every rank must take part in every update.

    Args:
        problems: What is sampled from.
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
        """Go to an epoch's start. Where it is the current one nothing happens: a resumed place holds."""
        if epoch != self.epoch:
            super().set_epoch(epoch)
            self.yielded = 0
            self.resumed = False

    def __iter__(self) -> Iterator[int]:
        # A generator: it looks at the state when the first index is asked for, after Lightning set the epoch.
        if self.yielded and not self.resumed:
            self.set_epoch(self.epoch + 1)  # the last pass was broken off
        self.resumed = False
        for index in self.indices(self.yielded):
            self.yielded += 1
            if self.yielded == self.num_samples:
                self.set_epoch(self.epoch + 1)
            yield index

    def indices(self, start: int) -> Iterator[int]:
        """This rank's indices of the present epoch, from place ``start`` in it on."""
        yield from list(super().__iter__())[start:]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, and what it is an order of."""
        return {"epoch": self.epoch, "yielded": self.yielded, "seed": self.seed, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the order where the state left it; with other data or another seed begin its epoch anew."""
        self.epoch = state["epoch"]
        same = (state["seed"], state["size"]) == (self.seed, self.size)
        self.yielded = state["yielded"] if same else 0
        self.resumed = True
