"""The decoding loop: prompts are read once for all their samples, and rows leave once they have ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coderl.rollout.cache import read_prompts

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coderl.rollout.engine import Sampling

ENDED = 1 / 8
"""Share of a batch that has ended when it is worth a copy of the cache to be rid of it."""
_FEW = 2048
"""Tokens of a vocabulary that takes as long to draw from in one go as in two."""
_LIKELY = 64
"""Most likely tokens among which a nucleus is looked for first."""


@dataclass(slots=True)
class Row:
    """One completion under way.

    Attributes:
        room: Most tokens it may have; at least 1.
        ids: Sampled token ids, an end-of-sequence token included.
        logprobs: Log-probability of each under the sampling distribution, nats.
        finished: Whether it met an end-of-sequence token or a stop string.
        tail: Its last characters, as far back as a stop string may begin.
    """

    room: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    tail: str = ""

    @property
    def ended(self) -> bool:
        """Whether no token may follow."""
        return self.finished or len(self.ids) >= self.room


class TokenTexts:
    """What tokens add to a text, each looked up once.

    Args:
        tokenizer: Any of transformers'.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # What becomes of the first token of a text only, such as losing its space, becomes of these.
        self._before: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._token_texts: dict[int, str] = {}

    def of(self, token: int) -> str:
        """The characters; U+FFFD is among them where a token holds part of one."""
        if token not in self._token_texts:
            before = len(self.decode(self._before))
            self._token_texts[token] = self.decode([*self._before, token])[before:]
        return self._token_texts[token]

    def decode(self, ids: list[int]) -> str:
        """The text of all of ``ids``, special tokens included, its spaces as they are."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class StopCriteria:
    """What finishes a row: an end-of-sequence token, or a stop string anywhere in its completion.

    Args:
        token_texts: The text of tokens.
        eos: Ids of the end-of-sequence tokens.
        words: The stop strings.
    """

    def __init__(self, token_texts: TokenTexts, eos: Collection[int], words: Iterable[str]) -> None:
        self._token_texts, self._eos, self._words = token_texts, eos, tuple(word for word in words if word)
        self._longest = max(map(len, self._words), default=0)

    def met(self, row: Row) -> bool:
        """Whether the row's last token finishes it. To be asked after each token: it keeps the tail."""
        if row.ids[-1] in self._eos:
            return True
        if not self._words:
            return False
        text = row.tail + self._token_texts.of(row.ids[-1])
        if "\ufffd" in text:  # only together do the parts of a character have a text
            text = self._token_texts.decode(row.ids)
        row.tail = text[-self._longest :]
        return any(word in text for word in self._words)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[Row]],
    sampling: Sampling,
    ends: StopCriteria,
    pad: int,
    share: float = ENDED,
) -> None:
    """Fill rows with completions, all at once.

    Args:
        model: In evaluation mode.
        prompts: ``P`` non-empty rows of token ids.
        rows: Each prompt's empty rows.
        sampling: Temperature and top-p; limits stand in the rows.
        ends: What finishes a row.
        pad: Id of the padding.
        share: Rows leave once this share of the batch has ended.

    Raises:
        UserError: If rows cannot leave the model's cache.
    """
    batch = [row for some in rows for row in some]
    context = read_prompts(model, prompts, pad, longest=max(row.room for row in batch))
    copies = torch.tensor([i for i, some in enumerate(rows) for _ in some], device=model.device)
    logits = context.logits[copies]
    context.select(copies)
    while True:
        tokens, logprobs = draw(logits, sampling)
        for row, token, logprob in zip(batch, tokens.tolist(), logprobs.tolist(), strict=True):
            if not row.ended:
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.finished = ends.met(row)
        going = torch.tensor([not row.ended for row in batch], device=model.device)
        left = [row for row in batch if not row.ended]
        if not left:
            return
        if len(batch) - len(left) >= share * len(batch):
            places = going.nonzero().squeeze(1)
            context.select(places)
            batch, tokens, going = left, tokens[places], going[places]
        logits = context.read(tokens, going)


def draw(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, from torch's global generator.

    Args:
        logits: ``[B, V]`` float32.
        sampling: Temperature and top-p.

    Returns:
        ``[B]`` ids, and ``[B]`` their log-probabilities before top-p, nats.
    """
    greedy = sampling.temperature <= 0
    logprobs = torch.log_softmax(logits if greedy else logits / sampling.temperature, dim=1)
    if greedy:
        tokens = logprobs.argmax(dim=1)
    elif sampling.top_p < 1:
        tokens = _from_nucleus(logprobs, sampling.top_p)
    else:
        tokens = _from_all(logprobs.exp())
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _from_all(probs: Tensor) -> Tensor:
    """A draw from each row of ``[B, V]``; from a large vocabulary of a block first, and then within it.

    ``multinomial`` makes a random number for each entry: so for about ``2 sqrt(V)`` of them rather than V.
    """
    if probs.shape[1] <= _FEW:
        return torch.multinomial(probs, 1).squeeze(1)
    size = math.isqrt(probs.shape[1])
    blocks = nn.functional.pad(probs, (0, -probs.shape[1] % size)).unflatten(1, (-1, size))
    chosen = torch.multinomial(blocks.sum(dim=2), 1)
    within = blocks.gather(1, chosen[:, :, None].expand(-1, 1, size)).squeeze(1)
    return (chosen * size + torch.multinomial(within, 1)).squeeze(1)


def _from_nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """A draw from the fewest tokens that have ``top_p`` of the mass between them, of each row of ``[B, V]``.

    The whole vocabulary is sorted only where it has to be: that takes longer than a small model's forward.
    """
    count, size = _LIKELY, logprobs.shape[1]
    while True:
        best, places = logprobs.topk(min(count, size), dim=1)
        probs = best.exp()
        mass = probs.cumsum(dim=1)
        if count >= size or bool((mass[:, -1] >= top_p).all()):
            break
        count *= 8
    # A token stays where those before it do not suffice; so the first always does.
    inside = torch.where(mass - probs < top_p, probs, 0.0)
    inside[:, 0] = probs[:, 0]  # also where top_p is 0
    return places.gather(1, torch.multinomial(inside, 1)).squeeze(1)
