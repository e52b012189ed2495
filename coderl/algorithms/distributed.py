"""Collectives of data-parallel training, where each rank has its own problems and number of micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.nn import Parameter

T = TypeVar("T")


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in order of rank; any object that can be pickled. Collective."""
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Replace each gradient by its mean over ranks. Collective.

    In place of DDP's own all-reduce, which is started inside a backward: it needs the same number of
    backwards on every rank, each with a gradient for every parameter. Here ranks have unequally many
    micro-batches, and a critic with its own adapter has a backward of its own.

    A parameter without gradient on all ranks keeps None: with zeros, Adam's momentum would move it.
    """
    # Ranks must reduce the same tensors in the same order, so they first agree on which parameters have a
    # gradient anywhere; a rank without one takes part with zeros.
    count, device = distributed.get_world_size(), parameters[0].device
    learns = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    distributed.all_reduce(learns, ReduceOp.MAX)
    pending = []
    for parameter, anywhere in zip(parameters, learns.tolist(), strict=True):
        if anywhere:
            grad = parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # Divided first, then summed: gloo has no average. Waited for only when all are under way.
            pending.append(distributed.all_reduce(grad.div_(count), async_op=True))
    for work in pending:
        work.wait()


def mean_of_each(records: Iterable[dict[str, float]]) -> dict[str, float]:
    """Means by name over the ranks that have a value; NaN and missing names are left out."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            values.setdefault(name, []).extend(
                [value] if value == value else []
            )  # NaN is not equal to itself
    return {name: sum(known) / len(known) if known else float("nan") for name, known in values.items()}
