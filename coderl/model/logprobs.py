"""From hidden states to log-probabilities, entropies and the critic's values."""

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
    """Values of a batch by the critic, float32.

    Attributes:
        values: ``[B, T]``, of the state before each token, in which it is chosen; zero outside the mask.
        final: ``[B]``, of the state after the last token under the mask.
    """

    values: Tensor
    final: Tensor


class Scores(NamedTuple):
    """Results of one forward over a batch.

    Attributes:
        logprobs: ``[B, T]`` float32 nats, zero outside the mask.
        entropy: ``[B, T]`` float32 nats, of the distribution of each token; None if not asked for.
        critic: Values from the same forward; None if not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    critic: Values | None = None


class ValueHead(nn.Module):
    """The critic's head: from a hidden state to a value, in float32. It starts at 0 for every state.

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
        # Autocast would compute the linear layer in 16 bits.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)  # type: ignore[no-any-return]

    def __call__(self, hidden: Tensor) -> Tensor:
        """As :meth:`forward`."""
        return super().__call__(hidden)  # type: ignore[no-any-return]


def values_of(head: ValueHead, hidden: Tensor, mask: Tensor) -> Values:
    """The critic's values for hidden states ``[B, T, H]``, column t after token t was read."""
    after = head(hidden)
    before = nn.functional.pad(after[:, :-1], (1, 0))
    final = torch.where(last_token(mask), after, 0.0).sum(dim=1)
    return Values(torch.where(mask, before, 0.0), final)


def token_scores(
    head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float, entropy: EntropyMode
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of ``N`` tokens, with the logits of one chunk of tokens at a time.

    The logits of 16 sequences of 512 tokens over a vocabulary of 152,000 would take 5 GB.

    Args:
        head: From hidden states to logits.
        hidden: ``[N, H]``, the state in which each token was chosen.
        ids: ``[N]``.
        temperature: Logits are divided by it, as in sampling.
        entropy: Whether to compute the entropy, with or without gradient; zeros if not.

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
    # Checkpointed: a chunk's logits are freed at once, and computed again in the backward.
    parts = zip(hidden.split(size), ids.split(size), strict=True)
    chunks = [checkpoint(scores, states, tokens, use_reentrant=False) for states, tokens in parts]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
