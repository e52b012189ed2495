"""From hidden states to what a loss compares: log-probabilities, entropies, values."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coderl.model.padding import last_token

EntropyMode = Literal["none", "value", "gradient"]

MOST_LOGITS = 2**25
"""Logits in memory at a time: 128 MB in float32."""


class Values(NamedTuple):
    """What the critic expects of a batch, float32.

    Attributes:
        values: ``[B, T]``, of the state in which each token is chosen; zero outside the mask.
        final: ``[B]``, of the state after the last token under the mask.
    """

    values: Tensor
    final: Tensor


class Scores(NamedTuple):
    """What one forward says of a batch.

    Attributes:
        logprobs: ``[B, T]`` float32 nats, zero outside the mask.
        entropy: The same of the distribution each token was drawn from; None where not asked for.
        critic: The critic's word from the same forward; None where not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    critic: Values | None = None


class ValueHead(nn.Module):
    """The critic: a number from a hidden state, in float32; 0 for every state until it has learned.

    Args:
        size: Width of the hidden states.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, T, H]`` to ``[B, T]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)  # type: ignore[no-any-return]

    def __call__(self, hidden: Tensor) -> Tensor:
        """As :meth:`forward`."""
        return super().__call__(hidden)  # type: ignore[no-any-return]


def values_of(head: ValueHead, hidden: Tensor, mask: Tensor) -> Values:
    """The critic's word on hidden states ``[B, T, H]``, column t being the state after token t was read."""
    after = head(hidden)
    before = nn.functional.pad(after[:, :-1], (1, 0))
    final = torch.where(last_token(mask), after, 0.0).sum(dim=1)
    return Values(torch.where(mask, before, 0.0), final)


def token_scores(
    head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float, entropy: EntropyMode
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of ``N`` tokens, a chunk of the vocabulary's logits at a time.

    All logits of 16 sequences of 512 tokens over 152,000 entries would be 5 GB.

    Args:
        head: From hidden states to logits.
        hidden: ``[N, H]``, the state in which each token was chosen.
        ids: ``[N]``.
        temperature: Logits are divided by it, as in sampling.
        entropy: Whether it is wanted, and with a gradient; zeros if not.

    Returns:
        ``[N]`` and ``[N]``, float32 nats.
    """

    def scores(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scaled = head(states).float() / temperature
        norm = scaled.logsumexp(dim=-1)
        chosen = scaled.gather(-1, tokens[:, None]).squeeze(-1) - norm
        if entropy == "none":
            return chosen, torch.zeros_like(chosen)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
            return chosen, norm - (scaled.softmax(-1) * scaled).sum(-1)

    assert isinstance(head.weight, Tensor)
    size = max(MOST_LOGITS // head.weight.shape[0], 1)
    if len(ids) <= size:
        return scores(hidden, ids)
    # A chunk's logits live only while it is looked at: the backward makes them again.
    parts = zip(hidden.split(size), ids.split(size), strict=True)
    chunks = [checkpoint(scores, states, tokens, use_reentrant=False) for states, tokens in parts]
    chosen, spread = zip(*chunks, strict=True)
    return torch.cat(chosen), torch.cat(spread)
