"""Several processes train one policy, each on its own problems: what they exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.nn import Parameter

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The value of each rank, in order. Collective: every rank calls it, as often as the others."""
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Leave the mean of the ranks' gradients on each of them. Collective.

    DDP's own exchange starts from inside a backward, and wants each rank to make as many of them, each with
    a gradient for every parameter. Here ranks have as many micro-batches as they have rows worth one, and a
    critic with its own adapter learns in a backward of its own.

    A parameter without gradient on all ranks stays without: Adam's momentum would move it.
    """
    count, device = distributed.get_world_size(), parameters[0].device
    learns = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    distributed.all_reduce(learns, ReduceOp.MAX)
    pending = []
    for parameter, anywhere in zip(parameters, learns.tolist(), strict=True):
        if anywhere:
            grad = parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pending.append(distributed.all_reduce(grad.div_(count), async_op=True))
    for work in pending:
        work.wait()


def mean_of_each(records: Iterable[dict[str, float]]) -> dict[str, float]:
    """Means by name, over the ranks that know a value: NaN and absent names are none."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            values.setdefault(name, []).extend([value] if value == value else [])
    return {name: sum(known) / len(known) if known else float("nan") for name, known in values.items()}
