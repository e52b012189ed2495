"""From lists of token ids to padded tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class Padded(NamedTuple):
    """Rows of prompt + completion, all completions starting in one column.

    Attributes:
        ids: ``[B, T]`` token ids.
        attention: ``[B, T]`` bool, true at tokens of prompt and completion.
        mask: ``[B, T]`` bool, true at tokens of the completion.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor


def pad_rows(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int) -> Padded:
    """Pad prompts on the left and completions on the right.

    Args:
        prompts: ``B`` non-empty rows of token ids.
        completions: ``B`` rows of token ids.
        pad: Id that fills the rest. It may equal a real token: masks are made from lengths.
    """
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((len(prompts), left + right), pad, dtype=torch.long)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    mask = torch.zeros_like(attention)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        row = torch.tensor([*prompt, *completion])
        span = slice(left - len(prompt), left + len(completion))
        ids[i, span] = row
        attention[i, span] = True
        mask[i, left : left + len(completion)] = True
    return Padded(ids, attention, mask)


def prompt_numbers(prompts: Sequence[Sequence[int]]) -> Tensor:
    """``[B]`` int64, the same number for equal prompts, counted from 0 as they come."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])


def spread(values: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    """Per-token values of each row, placed where ``mask`` is true: ``[B, T]`` float32, zero elsewhere."""
    out = torch.zeros(mask.shape, dtype=torch.float32)
    out[mask] = torch.tensor([v for row in values for v in row], dtype=torch.float32)
    return out


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows on the left: ``[B, T]`` ids and bool attention."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        attention[i, width - len(row) :] = True
    return ids.to(device), attention.to(device)


def last_token(mask: Tensor) -> Tensor:
    """``[B, T]`` bool, true at each row's last token under the mask, an end-of-sequence token included."""
    after = mask.flip(1).cumsum(dim=1).flip(1)
    return mask & (after == 1)
