"""Rollouts from a loop of our own over the transformers model, from a plain copy of the merged weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from coderl.problems import prompts
from coderl.rollout.decode import Row, StopCriteria, TokenTexts, decode
from coderl.rollout.engine import RolloutEngine, Sampling, seeded
from coderl.rollout.memory import free_bytes
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

    A prompt is read once for all its samples in a batch, and a row costs no more once it has ended.

    Args:
        batch_size: Sequences decoded together. Larger is faster and takes more key-value cache.
        merged_copy: Decode from a plain copy of base + adapter, several times faster than through 4-bit
            weights and an unmerged adapter. Null makes one where twice its size is free.
    """

    def __init__(self, batch_size: int = 128, merged_copy: bool | None = None) -> None:
        self.batch_size, self.merged_copy = batch_size, merged_copy
        self._policy: Policy | None = None
        self._dense_copy: PreTrainedModel | None = None
        self._token_texts: TokenTexts | None = None

    def bind(self, policy: Policy) -> None:
        """Take the policy, and make the plain copy if there is room for it."""
        if self._policy is policy:
            return
        self._policy, self._token_texts = policy, TokenTexts(policy.tokenizer)
        plain = not policy.has_adapter and policy.quantization == "none"
        wanted = _room_for_copy(policy) if self.merged_copy is None else self.merged_copy
        self._dense_copy = policy.dense_copy() if wanted and not plain else None
        log.info(
            "rollouts decode from %s",
            "a merged copy" if self._dense_copy is not None else "the policy itself",
        )
        self.sync()

    @property
    def samples_from_copy(self) -> bool:
        """Whether it decodes from a plain copy of the merged weights, whose rounding is its own."""
        return self._dense_copy is not None

    def sync(self) -> None:
        """Refresh the plain copy from the pristine base and the adapter."""
        if self._dense_copy is not None and self._policy is not None:
            self._policy.merge_into(self._dense_copy)

    def generate(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        progress: str | None = None,
    ) -> list[Completion]:
        """Sample ``n`` completions for each problem (see the base class)."""
        if seed is not None:
            with seeded(seed):
                return self.generate(problems, n, sampling, progress=progress)
        assert self._policy is not None, "bind() comes first"
        asked = [self._policy.encode(problem) for problem in problems]
        rooms = [sampling.room(len(ids)) for ids in asked]
        stops = [prompts.stop_strings(problem, self._policy.prompt_form) for problem in problems]
        # Alike stop strings and lengths go together: less padding.
        order = sorted(range(len(problems)), key=lambda i: (stops[i], len(asked[i]), i))
        rows: list[list[Row]] = [[] for _ in problems]
        bar = tqdm(
            total=len(problems) * n, desc=progress, unit="completion", leave=False, disable=progress is None
        )
        was_training = self._policy.training
        self._policy.eval()
        try:
            for batch in _batches([i for i in order if rooms[i] > 0], n, self.batch_size, stops):
                fresh = [[Row(rooms[i]) for _ in range(count)] for i, count in batch]
                self._decode([asked[i] for i, _ in batch], fresh, stops[batch[0][0]], sampling)
                for (i, _), some in zip(batch, fresh, strict=True):
                    rows[i] += some
                bar.update(sum(map(len, fresh)))
        finally:
            bar.close()
            self._policy.train(was_training)
        return [
            Completion(
                i,
                tuple(asked[i]),
                tuple(row.ids),
                tuple(row.logprobs),
                self._text(problem, asked[i], row.ids),
                row.finished,
            )
            for i, problem in enumerate(problems)
            for row in rows[i] or [Row(0)] * n
        ]

    def _decode(
        self, asked: list[list[int]], rows: list[list[Row]], stop: tuple[str, ...], sampling: Sampling
    ) -> None:
        assert self._policy is not None and self._token_texts is not None
        model = self._policy.base if self._dense_copy is None else self._dense_copy
        pad = self._policy.tokenizer.pad_token_id
        assert isinstance(pad, int)
        decode(
            model, asked, rows, sampling, StopCriteria(self._token_texts, self._policy.eos_ids(), stop), pad
        )

    def _text(self, problem: Problem, asked: list[int], ids: list[int]) -> str:
        """What a row says, cut off where an answer ends: the steps are bigcode-evaluation-harness's.

        The prompt is decoded with it, since many tokenizers drop the space that a text begins with. A special
        token within the answer stays, and will not run.
        """
        assert self._policy is not None and self._token_texts is not None
        policy, tokenizer, decoded = self._policy, self._policy.tokenizer, self._token_texts.decode

        def without_bos(row: list[int]) -> list[int]:
            return row[1:] if row[:1] == [tokenizer.bos_token_id] else row

        said = ids[:-1] if ids and ids[-1] in policy.eos_ids() else ids
        ends = (*prompts.stop_strings(problem, policy.prompt_form), str(tokenizer.eos_token or ""))
        if policy.base.config.is_encoder_decoder:
            # CodeT5+ learned answers as its tokenizer writes all texts: with the bos token before them.
            return prompts.cut(decoded(without_bos(said)), ends)
        head = without_bos(asked)
        text = decoded([*head, *said])
        as_given = policy.prompt_form == "completion" and text.startswith(problem.prompt)
        return prompts.cut(text[len(problem.prompt if as_given else decoded(head)) :], ends)


def _batches(order: Iterable[int], n: int, size: int, stops: Sequence[tuple[str, ...]]) -> list[Batch]:
    """``order`` in batches of alike stop strings; the samples of one stay together if they fit."""
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


def _room_for_copy(policy: Policy) -> bool:
    size, free = policy.base.dtype.itemsize * _dense_count(policy), free_bytes(policy.device)
    log.debug("a merged copy takes %d bytes, %d are free", size, free)
    return free > 2 * size


def _dense_count(policy: Policy) -> int:
    """Number of weights of the plain model: 4-bit ones are stored two to a byte."""
    return sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in policy.base.parameters())
