"""Collectives of data-parallel training, where each rank has its own problems and number of micro-batches."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import distributed
from torch.distributed import ReduceOp

from coderl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.nn import Parameter

T = TypeVar("T")


PATIENCE = 300.0
"""Seconds that ranks wait for each other beyond what their work may differ by."""


def all_gather(value: T, patience: float = 0.0) -> list[T]:
    """The values of all ranks, in order of rank; any object that can be pickled. Collective.

    Ranks meet here after work of unequal length, such as sampling and running programs. So this has a limit
    of its own, where NCCL would wait for half an hour and say nothing of who is missing.

    Args:
        value: This rank's value.
        patience: Seconds by which the work before this may differ from rank to rank; :data:`PATIENCE` is
            added.

    Raises:
        UserError: A rank has not come, with its number.
    """
    group, limit = _meeting_group(), PATIENCE + patience
    # Rank 0 finds out who is missing; the others hear it from rank 0, so they wait a little longer.
    wait = limit if distributed.get_rank() == 0 else limit + 10
    try:
        distributed.monitored_barrier(group, timedelta(seconds=wait), wait_all_ranks=True)
        values: list[T | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group)
    except RuntimeError as error:
        missing = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", str(error))
        who = f"rank {missing[1].strip(' ,')}" if missing else "another rank"
        raise UserError(
            f"{who} has not come to where ranks exchange results within {limit:.0f} s: it has died, or hangs "
            "in its sandbox or reward; its own log says more"
        ) from error
    return values  # type: ignore[return-value]


def _meeting_group() -> distributed.ProcessGroup:
    """A group of all ranks that can say who is missing, as only gloo's can. The first call is collective."""
    default = distributed.group.WORLD
    if default not in _MEETING:
        _MEETING[default] = distributed.new_group(backend="gloo")
    found: distributed.ProcessGroup = _MEETING[default]
    return found


_MEETING: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


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
