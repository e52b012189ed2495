"""How the rows of a step are divided up: portions that share their prompts, and micro-batches of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coderl.model.architectures import first_answer_column
from coderl.model.shared_prompts import Prompts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from coderl.types import Experience


@dataclass(frozen=True)
class Portion:
    """Rows whose prompts are read together.

    Attributes:
        prompts: The different prompts.
        rows: For each micro-batch, the numbers of its rows in the step.
        batches: The micro-batches.
    """

    prompts: Prompts
    rows: list[Tensor]
    batches: list[Experience]


def portions(
    step: Experience, rows: Tensor, tokens: int, most_rows: int | None, device: torch.device, attended: float
) -> Iterator[Portion]:
    """Divide rows of a step up.

    Rows of similar length are read together, so that little is padding, whichever prompts of the portion they
    have: these are read once for all of them.

    Args:
        step: The whole step, on the CPU.
        rows: ``[N]``, numbers of rows in it.
        tokens: Tokens of a micro-batch, padding included, about. A row longer than that is one alone.
        most_rows: Rows of a micro-batch, at most; None: as many as ``tokens`` allow.
        device: Where the micro-batches go.
        attended: What a prompt's token costs a row that only attends to it, against a token that is read.
    """
    prompt = step.prompt[rows]
    completion = step.mask[rows].sum(dim=1)
    length = step.attention[rows].sum(dim=1) - completion
    numbers = {int(p): int(n) for p, n in zip(prompt, length, strict=True)}
    for chosen in _by_size(sorted(numbers.items(), key=lambda item: (item[1], item[0])), tokens):
        inside = torch.isin(prompt, torch.tensor([number for number, _ in chosen])).nonzero().flatten()
        longest = max(size for _, size in chosen)
        sizes = (completion[inside] + attended * longest).tolist()
        order = sorted(zip(inside.tolist(), sizes, strict=True), key=lambda item: (item[1], item[0]))
        chunks = [
            rows[torch.tensor([row for row, _ in chunk])] for chunk in _by_size(order, tokens, most_rows)
        ]
        whole = step.take(rows[inside])
        border = first_answer_column(whole.mask)
        prompts = Prompts.of(whole.ids, whole.attention, border or whole.ids.shape[1])
        yield Portion(
            Prompts(*(column.to(device) for column in prompts)),
            chunks,
            [step.take(chunk).to(device) for chunk in chunks],
        )


def _by_size(
    items: list[tuple[int, float]], tokens: int, most: int | None = None
) -> Iterator[list[tuple[int, float]]]:
    """Numbers with their sizes, which rise, in runs that hold ``tokens`` when padded to their last."""
    run: list[tuple[int, float]] = []
    for item in items:
        if run and (item[1] * (len(run) + 1) > tokens or len(run) == most):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
