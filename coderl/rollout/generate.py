"""The engine that samples with the model in this process, with coderl's own decoding loop."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

from coderl.problems import prompts
from coderl.rollout.decode import Row, StopCriteria, TokenTexts, decode
from coderl.rollout.engine import RolloutEngine, Sampling, seeded
from coderl.rollout.memory import free_bytes
from coderl.rollout.text import completion_text
from coderl.types import Completion

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedModel

    from coderl.model.policy import Policy
    from coderl.types import Problem

log = logging.getLogger(__name__)

Batch = list[tuple[int, int]]
"""Indices of problems, and how many samples of each."""


class GenerateEngine(RolloutEngine):
    """Samples with the model that trains, through transformers' forward: any family with a key-value cache.

    A prompt is read once for all its samples in a batch, and finished rows leave the batch.

    Args:
        batch_size: Sequences decoded together. Larger is faster and takes more key-value cache.
        merged_copy: Decode from a copy of the model with the adapter merged in, several times faster than
            through 4-bit weights and an unmerged adapter. Null makes one where twice its size is free.
    """

    def __init__(self, batch_size: int = 128, merged_copy: bool | None = None) -> None:
        self.batch_size, self.merged_copy = batch_size, merged_copy
        self._policy: Policy | None = None
        self._dense_copy: PreTrainedModel | None = None
        self._token_texts: TokenTexts | None = None

    def bind(self, policy: Policy) -> None:
        """Take the policy to sample from, and make the merged copy if memory allows."""
        if self._policy is not policy:
            self._policy, self._token_texts = policy, TokenTexts(policy.tokenizer)
            # A policy without adapter and quantization is as fast as its copy.
            is_dense = not policy.has_adapter and policy.quantization == "none"
            wanted = _copy_fits(policy) if self.merged_copy is None else self.merged_copy
            self._dense_copy = policy.dense_copy() if wanted and not is_dense else None
            log.info(
                "rollouts decode from %s", "a merged copy" if self.samples_from_copy else "the policy itself"
            )
        self.sync()

    @property
    def samples_from_copy(self) -> bool:
        """Whether it decodes from a merged copy of the weights, which rounds differently."""
        return self._dense_copy is not None

    def sync(self) -> None:
        """Merge the base's weights and the adapter into the copy again; without a copy, do nothing."""
        if self._dense_copy is not None and self._policy is not None:
            self._policy.merge_into(self._dense_copy)

    def generate(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
    ) -> list[Completion]:
        """Sample ``n`` completions for each problem (see the base class)."""
        assert self._policy is not None and self._token_texts is not None, "bind() comes first"
        policy, pad = self._policy, self._policy.tokenizer.pad_token_id
        assert isinstance(pad, int)
        prompt_ids = [policy.encode(problem) for problem in problems]
        max_tokens = [sampling.max_tokens(len(ids)) for ids in prompt_ids]
        stops = [prompts.stop_strings(problem, policy.prompt_form) for problem in problems]
        # A batch has one list of stop strings; similar lengths in it mean little padding.
        order = sorted(range(len(problems)), key=lambda i: (stops[i], len(prompt_ids[i]), i))
        rows: list[list[Row]] = [[] for _ in problems]
        was_training = policy.training
        policy.eval()
        try:
            with nullcontext() if seed is None else seeded(seed):
                for batch in _batches([i for i in order if max_tokens[i] > 0], n, self.batch_size, stops):
                    sampled = [[Row(max_tokens[i]) for _ in range(count)] for i, count in batch]
                    decode(
                        policy.base if self._dense_copy is None else self._dense_copy,
                        [prompt_ids[i] for i, _ in batch],
                        sampled,
                        sampling,
                        StopCriteria(self._token_texts, policy.eos_ids(), stops[batch[0][0]]),
                        pad,
                    )
                    for (i, _), samples in zip(batch, sampled, strict=True):
                        rows[i] += samples
        finally:
            policy.train(was_training)
        return [
            Completion(
                i,
                tuple(prompt_ids[i]),
                tuple(row.ids),
                tuple(row.logprobs),
                completion_text(policy, problem, prompt_ids[i], row.ids),
                row.finished,
            )
            for i, problem in enumerate(problems)
            # A prompt that is too long was not sampled from: its completions are empty.
            for row in rows[i] or [Row(0)] * n
        ]


def _batches(order: Iterable[int], n: int, size: int, stops: Sequence[tuple[str, ...]]) -> list[Batch]:
    """``order`` in batches with one list of stop strings each; a problem's samples together if they fit."""
    batches: list[Batch] = []
    taken = 0
    for i in order:
        for count in (min(size, n - start) for start in range(0, n, size)):
            if not batches or taken + count > size or stops[batches[-1][0][0]] != stops[i]:
                batches.append([])
                taken = 0
            batches[-1].append((i, count))
            taken += count
    return batches


def _copy_fits(policy: Policy) -> bool:
    """Whether twice the memory of a merged copy is free."""
    # bitsandbytes stores 4-bit weights two to a byte.
    weights = sum(
        p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in policy.base.parameters()
    )
    size, free = policy.base.dtype.itemsize * weights, free_bytes(policy.device)
    log.debug("a merged copy takes %d bytes, %d are free", size, free)
    return free > 2 * size
