"""Ragged rows laid out in padded tensors, and several ranks played by threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

Side = Literal["left", "right", "holes"]
Places = list[list[int]]
T = TypeVar("T")


def places(lengths: list[int], side: Side, extra: int = 2, seed: int = 0) -> Places:
    """A column for each token of each row: padded on a side, or with holes before, among and after them."""
    width = max(lengths, default=0) + extra
    rng = random.Random(seed)
    if side == "holes":
        return [sorted(rng.sample(range(width), n)) for n in lengths]
    starts = [width - n if side == "left" else 0 for n in lengths]
    return [list(range(start, start + n)) for start, n in zip(starts, lengths, strict=True)]


def width_of(columns: Places, extra: int = 2) -> int:
    """Columns that `places` laid rows out in."""
    return max((len(row) for row in columns), default=0) + extra


def laid(rows: list[list[float]], columns: Places, fill: float = 0.0) -> Tensor:
    """Rows in a tensor of [rows, width], `fill` where there is no token."""
    result = torch.full((len(rows), width_of(columns)), fill)
    for i, (row, where) in enumerate(zip(rows, columns, strict=True)):
        for value, column in zip(row, where, strict=True):
            result[i, column] = value
    return result


def mask_at(columns: Places, extra: int = 2) -> Tensor:
    """True where there is a token."""
    mask = torch.zeros(len(columns), width_of(columns, extra), dtype=torch.bool)
    for i, where in enumerate(columns):
        mask[i, where] = True
    return mask


def taken(values: Tensor, columns: Places) -> list[list[float]]:
    """A tensor's values at the tokens, the inverse of `laid`."""
    return [[float(values[i, column]) for column in where] for i, where in enumerate(columns)]


def flat(rows: list[list[float]]) -> Tensor:
    """All of ragged rows in one float64 vector, to compare."""
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def by_ranks(count: int, work: Callable[[int, Callable[[Tensor], Tensor]], T]) -> list[T]:
    """What `work(rank, mean_over_ranks)` gives on each of `count` ranks that run side by side.

    Like a process group's mean: every rank has to ask for it as often as the others and with tensors of one
    shape, else a rank waits in vain and the barrier breaks.
    """
    barrier = threading.Barrier(count, timeout=20)
    board: list[Tensor] = [torch.empty(0)] * count
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        def mean_over_ranks(value: Tensor) -> Tensor:
            board[number] = value.detach().clone()
            barrier.wait()
            mean = torch.stack(board).mean(dim=0)
            barrier.wait()
            return mean

        try:
            results[number] = work(number, mean_over_ranks)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]
