"""The decoding loop: each prompt is read once for all its samples, and finished rows leave the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coderl.rollout.cache import read_prompts
from coderl.rollout.text import decoded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coderl.rollout.engine import Sampling

COMPACT_SHARE = 1 / 8
"""Share of finished rows at which dropping them is worth a copy of the cache."""
_SMALL_VOCABULARY = 2048
"""Up to this size, one draw from the whole vocabulary is as fast as two draws from blocks of it."""
_NUCLEUS_GUESS = 64
"""Most likely tokens in which the nucleus is looked for first."""


@dataclass(slots=True)
class Row:
    """A completion that is being sampled.

    Attributes:
        max_tokens: Its longest length, in tokens; at least 1.
        place: Its number among all that are sampled.
        ids: Sampled token ids, an end-of-sequence token included.
        logprobs: Log-probability of each under the sampling distribution, nats.
        finished: Whether it ended with an end-of-sequence token or a stop string.
        tail: Its last characters, as far back as a stop string may begin.
    """

    max_tokens: int
    place: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    tail: str = ""

    def add(self, token: int, logprob: float, criteria: StopCriteria) -> bool:
        """Append a token; returns whether the row has ended with it."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.finished = criteria.met(self)
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether it is finished, or at its longest length."""
        return self.finished or len(self.ids) >= self.max_tokens


class TokenTexts:
    """The text that each token adds to a completion, decoded once per token.

    Args:
        tokenizer: Any of transformers'.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Tokenizers such as CodeLlama's drop the space at the start of a text. Decoded after this prefix, a
        # token keeps its space.
        self._prefix: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._texts: dict[int, str] = {}

    def of(self, token: int) -> str:
        """The token's characters, with U+FFFD in place of a character that the token holds a part of."""
        if token not in self._texts:
            start = len(self.whole(self._prefix))
            self._texts[token] = self.whole([*self._prefix, token])[start:]
        return self._texts[token]

    def whole(self, ids: list[int]) -> str:
        """The text of a whole sequence, as :func:`coderl.rollout.text.decoded` gives it."""
        return decoded(self._tokenizer, ids)


class StopCriteria:
    """What finishes a row: an end-of-sequence token, or a stop string anywhere in its completion.

    Args:
        token_texts: The text of tokens.
        eos: Ids of the end-of-sequence tokens.
        stop: The stop strings; empty ones are ignored.
    """

    def __init__(self, token_texts: TokenTexts, eos: Collection[int], stop: Iterable[str]) -> None:
        self._token_texts, self._eos = token_texts, eos
        self._stop = tuple(string for string in stop if string)
        self._longest = max(map(len, self._stop), default=0)

    def met(self, row: Row) -> bool:
        """Whether the row's last token finishes it. Updates ``row.tail``: call it once after each token."""
        if row.ids[-1] in self._eos:
            return True
        if not self._stop:
            return False
        text = row.tail + self._token_texts.of(row.ids[-1])
        # A character split over several tokens has a text only when they are decoded together.
        if "\ufffd" in text:
            text = self._token_texts.whole(row.ids)
        row.tail = text[-self._longest :]
        return any(string in text for string in self._stop)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[Row]],
    sampling: Sampling,
    criteria: StopCriteria,
    pad: int,
    compact_share: float = COMPACT_SHARE,
    ended: Callable[[Row], None] | None = None,
) -> None:
    """Sample completions in one batch, into ``rows``.

    Args:
        model: In evaluation mode.
        prompts: ``P`` non-empty rows of token ids.
        rows: Each prompt's empty rows.
        sampling: Temperature and top-p; lengths are limited by ``Row.max_tokens``.
        criteria: What finishes a row.
        pad: Padding id.
        compact_share: Share of finished rows at which they are dropped from the batch.
        ended: Called with each row when it has its last token.

    Raises:
        UserError: If rows of the model's cache cannot be selected.
    """
    batch = [row for samples in rows for row in samples]
    state = read_prompts(model, prompts, pad, max_new_tokens=max(row.max_tokens for row in batch))
    # A prompt is read once; its state and its first logits are then repeated for each of its samples.
    repeats = torch.tensor([i for i, samples in enumerate(rows) for _ in samples], device=model.device)
    logits = state.logits[repeats]
    state.select(repeats)
    while True:
        # Finished rows that are still in the batch get a token too, which is not used.
        tokens, logprobs = draw(logits, sampling)
        for row, token, logprob in zip(batch, tokens.tolist(), logprobs.tolist(), strict=True):
            if not row.ended and row.add(token, logprob, criteria) and ended is not None:
                ended(row)
        active = torch.tensor([not row.ended for row in batch], device=model.device)
        remaining = [row for row in batch if not row.ended]
        if not remaining:
            return
        if len(batch) - len(remaining) >= compact_share * len(batch):
            indices = active.nonzero().squeeze(1)
            state.select(indices)
            batch, tokens, active = remaining, tokens[indices], active[indices]
        logits = state.read(tokens, active)


def draw(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, from torch's global generator.

    Args:
        logits: ``[B, V]`` float32.
        sampling: Temperature and top-p.

    Returns:
        ``[B]`` ids, and ``[B]`` their log-probabilities at that temperature, before top-p, nats.
    """
    greedy = sampling.temperature <= 0
    logprobs = torch.log_softmax(logits if greedy else logits / sampling.temperature, dim=1)
    if greedy:
        tokens = logprobs.argmax(dim=1)
    elif sampling.top_p < 1:
        tokens = _sample_top_p(logprobs, sampling.top_p)
    else:
        tokens = _sample_all(logprobs.exp())
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _sample_all(probs: Tensor) -> Tensor:
    """One id for each row of probabilities ``[B, V]``."""
    if probs.shape[1] <= _SMALL_VOCABULARY:
        return torch.multinomial(probs, 1).squeeze(1)
    # multinomial makes a random number for each entry. A block of tokens is drawn first, then a token in it:
    # about 2 sqrt(V) numbers instead of V.
    size = math.isqrt(probs.shape[1])
    blocks = nn.functional.pad(probs, (0, -probs.shape[1] % size)).unflatten(1, (-1, size))
    chosen = torch.multinomial(blocks.sum(dim=2), 1)
    within = blocks.gather(1, chosen[:, :, None].expand(-1, 1, size)).squeeze(1)
    return (chosen * size + torch.multinomial(within, 1)).squeeze(1)


def _sample_top_p(logprobs: Tensor, top_p: float) -> Tensor:
    """One id for each row of ``[B, V]``, among the fewest tokens whose probabilities sum to ``top_p``."""
    # Sorting a whole vocabulary takes longer than a small model's forward: look at few tokens first.
    count, size = _NUCLEUS_GUESS, logprobs.shape[1]
    while True:
        best, ids = logprobs.topk(min(count, size), dim=1)
        probs = best.exp()
        mass = probs.cumsum(dim=1)
        if count >= size or bool((mass[:, -1] >= top_p).all()):
            break
        count *= 8
    # A token belongs to the nucleus where those before it do not suffice.
    nucleus = torch.where(mass - probs < top_p, probs, 0.0)
    nucleus[:, 0] = probs[:, 0]  # the first always does, also where top_p is 0
    return ids.gather(1, torch.multinomial(nucleus, 1)).squeeze(1)
