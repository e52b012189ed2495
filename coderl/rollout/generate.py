"""The engine that samples with the model in this process, with coderl's own decoding loop."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING

from coderl.errors import UsageError, UserError
from coderl.model import memory
from coderl.problems import prompts
from coderl.rollout.decode import Row, StopCriteria, TokenTexts, decode
from coderl.rollout.engine import RolloutEngine, Sampling, seeded
from coderl.rollout.text import completion_text
from coderl.types import Completion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedModel

    from coderl.model.policy import Policy
    from coderl.types import Problem

log = logging.getLogger(__name__)

Part = tuple[int, range]
"""The index of a problem, and which samples of it."""
Batch = list[Part]


class GenerateEngine(RolloutEngine):
    """Samples with the model that trains, through transformers' forward: any family with a key-value cache.

    A prompt is read once for all its samples in a batch, and finished rows leave the batch.

    Args:
        batch_size: Sequences decoded together, at most. Null is as many as memory holds: more are faster, and
            take more key-value cache.
        merged_copy: Decode from a copy of the model with the adapter merged in, several times faster than
            through 4-bit weights and an unmerged adapter. Null makes one where twice its size is free.
    """

    def __init__(self, batch_size: int | None = None, merged_copy: bool | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"engine: batch_size is {batch_size}: give 1 or more, or null for what fits")
        self.batch_size, self.merged_copy = batch_size, merged_copy
        self._room = 0  # bytes for key-value caches
        self._tried: int | None = None  # as many as memory was seen to hold, where it did not suffice
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
            to_come = memory.still_to_come(policy)
            self._room = int(memory.CACHE_SHARE * (memory.free_bytes(policy.device) - to_come))
            self._tried = None
        self.sync()

    def sequences(self, problems: Sequence[Problem], sampling: Sampling) -> int:
        """How many sequences are decoded together, at most."""
        assert self._policy is not None, "bind() comes first"
        lengths = [len(self._policy.encode(problem)) for problem in problems]
        return self._fitting(max(length + max(0, sampling.max_tokens(length)) for length in lengths))

    def _fitting(self, longest: int) -> int:
        assert self._policy is not None
        base = self._policy.base
        limit = self.batch_size or memory.MOST_SEQUENCES[self._policy.device.type]
        sequence = longest * memory.cache_bytes(base.config, base.dtype.itemsize)
        found = memory.largest_batch(self._room, sequence, limit)
        return found if self._tried is None else min(found, self._tried)

    def batches_line(self, longest: int) -> str:
        """See the base class."""
        assert self._policy is not None, "bind() comes first"
        each = longest * memory.cache_bytes(self._policy.base.config, self._policy.base.dtype.itemsize)
        source = "a merged copy" if self.samples_from_copy else "the policy itself"
        return (
            f"up to {self._fitting(longest)} sequences at a time, from {source}; one of {longest:,} tokens "
            f"takes {each / 1e6:.2g} MB, and {max(0, self._room) / 1e9:.1f} GB are for them"
        )

    def _fewer(self, batch: Batch) -> int:
        """How many sequences to go on with, where memory did not suffice for a batch.

        Raises:
            UserError: It is a single sequence.
        """
        assert self._policy is not None
        size = sum(len(places) for _, places in batch)
        if size == 1:
            raise UserError(
                "memory does not suffice to sample a single sequence beside the model: lower "
                "model.max_new_tokens (for an evaluation max_length_generation), or set "
                "model.engine.merged_copy: false"
            )
        memory.release(self._policy.device)
        self._tried = size // 2 if self._tried is None else min(self._tried, size // 2)
        log.warning("rollouts: %d sequences do not fit in memory; going on with %d", size, self._tried)
        return self._tried

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
        ready: Callable[[int, Completion], None] | None = None,
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
        found: dict[int, Completion] = {}

        def ended(row: Row) -> None:
            i = row.place // n
            text = completion_text(policy, problems[i], prompt_ids[i], row.ids)
            ids, logprobs = tuple(row.ids), tuple(row.logprobs)
            found[row.place] = Completion(i, tuple(prompt_ids[i]), ids, logprobs, text, row.finished)
            if ready is not None:
                ready(row.place, found[row.place])

        was_training = policy.training
        policy.eval()
        try:
            with nullcontext() if seed is None else seeded(seed):
                answered = [(i, range(n)) for i in order if max_tokens[i] > 0]
                longest = max((len(prompt_ids[i]) + max_tokens[i] for i, _ in answered), default=1)
                pending = deque(_batches(answered, self._fitting(longest), stops))
                while pending:
                    batch = pending.popleft()
                    try:
                        decode(
                            policy.base if self._dense_copy is None else self._dense_copy,
                            [prompt_ids[i] for i, _ in batch],
                            [[Row(max_tokens[i], i * n + place) for place in places] for i, places in batch],
                            sampling,
                            StopCriteria(self._token_texts, policy.eos_ids(), stops[batch[0][0]]),
                            pad,
                            ended=ended,
                        )
                        continue
                    except (RuntimeError, MemoryError) as error:
                        if not memory.is_exhausted(error):
                            raise
                    # Out here: the error holds what the attempt has left behind.
                    waiting = [part for one in (batch, *pending) for part in one]
                    pending = deque(_batches(waiting, self._fewer(batch), stops))
        finally:
            policy.train(was_training)
        # A prompt that is too long was not sampled from: its completions are empty.
        for place in sorted(set(range(len(problems) * n)) - found.keys()):
            ended(Row(0, place))
        return [found[place] for place in range(len(problems) * n)]


def _batches(parts: Iterable[Part], size: int, stops: Sequence[tuple[str, ...]]) -> list[Batch]:
    """``parts`` in batches with one list of stop strings each; a problem's samples together if they fit."""
    batches: list[Batch] = []
    taken = 0
    for i, places in parts:
        for samples in (places[start : start + size] for start in range(0, len(places), size)):
            if not batches or taken + len(samples) > size or stops[batches[-1][0][0]] != stops[i]:
                batches.append([])
                taken = 0
            batches[-1].append((i, samples))
            taken += len(samples)
    return batches


def _copy_fits(policy: Policy) -> bool:
    """Whether twice the memory of a merged copy is free."""
    # bitsandbytes stores 4-bit weights two to a byte.
    weights = sum(
        p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in policy.base.parameters()
    )
    free = memory.free_bytes(policy.device) - memory.still_to_come(policy)
    return memory.copy_fits(policy.base.dtype.itemsize * weights, free)
