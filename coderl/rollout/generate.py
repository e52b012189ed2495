"""Rollouts through transformers' ``generate``, from a plain copy of the merged weights where it fits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import (
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from coderl import families, prompts
from coderl.batching import left_padded
from coderl.rollout.engine import RolloutEngine, Sampling
from coderl.types import Completion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coderl.policy import Policy
    from coderl.types import Problem

log = logging.getLogger(__name__)


class GenerateEngine(RolloutEngine):
    """transformers' ``generate``: works wherever the model does.

    Args:
        batch_size: Sequences decoded together. Larger is faster and takes more key-value cache.
        merged_copy: Decode from a plain copy of base + adapter, several times faster than through 4-bit
            weights and an unmerged adapter. Null makes one where twice its size is free.
    """

    def __init__(self, batch_size: int = 128, merged_copy: bool | None = None) -> None:
        self.batch_size, self.merged_copy = batch_size, merged_copy
        self._policy: Policy | None = None
        self._twin: PreTrainedModel | None = None
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}

    def bind(self, policy: Policy) -> None:
        """Take the policy, and make the plain copy if there is room for it."""
        if self._policy is policy:
            return
        self._policy, self._stops = policy, {}
        plain = policy.base is policy.net and policy.quantization == "none"
        wanted = _room_for_copy(policy) if self.merged_copy is None else self.merged_copy
        self._twin = policy.plain_twin() if wanted and not plain else None
        log.info(
            "rollouts decode from %s", "a merged copy" if self._twin is not None else "the policy itself"
        )
        self.sync()

    def sync(self) -> None:
        """Refresh the plain copy from the pristine base and the adapter."""
        if self._twin is not None and self._policy is not None:
            self._policy.merge_into(self._twin)

    @torch.no_grad()
    def generate(
        self, problems: Sequence[Problem], n: int, sampling: Sampling, *, progress: str | None = None
    ) -> list[Completion]:
        """Sample ``n`` completions for each problem (see the base class)."""
        assert self._policy is not None, "bind() comes first"
        encoded = [self._policy.encode(problem) for problem in problems]
        jobs = [i for i in range(len(problems)) for _ in range(n)]
        # Alike stop strings and lengths go together: less padding, and a batch ends when its last row does.
        stops = [prompts.stop_strings(problem, self._policy.prompt_form) for problem in problems]
        order = sorted(range(len(jobs)), key=lambda j: (stops[jobs[j]], len(encoded[jobs[j]]), j))
        results: dict[int, Completion] = {}
        bar = tqdm(total=len(jobs), desc=progress, unit="completion", leave=False, disable=progress is None)
        was_training = self._policy.training
        self._policy.eval()
        try:
            for chunk in _chunks(order, self.batch_size, key=lambda j: stops[jobs[j]]):
                rows = self._decode([encoded[jobs[j]] for j in chunk], stops[jobs[chunk[0]]], sampling)
                for j, (ids, logprobs, finished) in zip(chunk, rows, strict=True):
                    i = jobs[j]
                    text = self._text(ids, stops[i])
                    results[j] = Completion(i, tuple(encoded[i]), tuple(ids), tuple(logprobs), text, finished)
                bar.update(len(chunk))
        finally:
            bar.close()
            self._policy.train(was_training)
        return [results[j] for j in range(len(jobs))]

    def _decode(
        self, rows: list[list[int]], stop: tuple[str, ...], sampling: Sampling
    ) -> list[tuple[list[int], list[float], bool]]:
        assert self._policy is not None
        policy = self._policy
        model: Any = policy.base if self._twin is None else self._twin
        tokenizer, eos = policy.tokenizer, policy.eos_ids()
        ids, attention = left_padded(rows, int(tokenizer.pad_token_id), model.device)
        start = families.decoder_start(policy.base)
        given = ids.shape[1] if start is None else 1  # tokens that stand before the first sampled one
        recorder = _Recorder(given, sampling.temperature, eos, self._stop_criteria(stop, tokenizer))
        config = _generation_config(sampling, eos, int(tokenizer.pad_token_id), start)
        own = model.generation_config
        # generate() fills what a config leaves unset from the model's own, which must not leak in.
        model.generation_config = config
        try:
            output = model.generate(
                input_ids=ids,
                attention_mask=attention,
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder.processor]),
                stopping_criteria=StoppingCriteriaList([recorder]),
            )
        finally:
            model.generation_config = own
        return recorder.rows(output[:, given:])

    def _stop_criteria(
        self, stop: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
    ) -> StoppingCriteria | None:
        if not stop:
            return None
        if stop not in self._stops:  # it reads the whole vocabulary once
            self._stops[stop] = StopStringCriteria(tokenizer=tokenizer, stop_strings=list(stop))
        return self._stops[stop]

    def _text(self, ids: Sequence[int], stop: tuple[str, ...]) -> str:
        assert self._policy is not None
        text = self._policy.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return prompts.cut(str(text), stop)


class _Recorder(StoppingCriteria):
    """Watches ``generate``: the log-probability of each sampled token, and where each row ended.

    transformers can return all scores, but keeps ``[steps, B, V]`` of them: gigabytes where V is 150,000.
    """

    def __init__(self, given: int, temperature: float, eos: set[int], stop: StoppingCriteria | None) -> None:
        self.given, self.temperature, self.stop = given, temperature or 1.0, stop
        self.eos = torch.tensor(sorted(eos))
        self.scores: Tensor | None = None
        self.logprobs: list[Tensor] = []
        self.length: Tensor | None = None
        recorder = self

        class Processor(LogitsProcessor):
            """Puts the temperature in and normalizes: what is sampled from is what is recorded."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                if recorder.temperature != 1.0:
                    scores = scores / recorder.temperature
                recorder.scores = torch.log_softmax(scores, dim=1, dtype=torch.float32)
                return recorder.scores

        self.processor = Processor()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows have met an end-of-sequence token or a stop string by now."""
        assert self.scores is not None
        last = input_ids[:, -1]
        self.logprobs.append(self.scores.gather(1, last[:, None]).squeeze(1))
        self.eos = self.eos.to(last.device)
        done = torch.isin(last, self.eos)
        if self.stop is not None:
            done |= self.stop(input_ids[:, self.given :], None)
        if self.length is None:
            self.length = torch.zeros_like(last)
        here = input_ids.shape[1] - self.given
        self.length = torch.where((self.length == 0) & done, here, self.length)
        return self.length > 0

    def rows(self, sampled: Tensor) -> list[tuple[list[int], list[float], bool]]:
        """Ids, log-probabilities and whether it finished, for each row of ``sampled`` ``[B, steps]``."""
        assert self.length is not None
        lengths = self.length.tolist()
        ids, logprobs = sampled.tolist(), torch.stack(self.logprobs, dim=1).tolist()
        steps = sampled.shape[1]
        return [
            (row[: length or steps], values[: length or steps], length > 0)
            for row, values, length in zip(ids, logprobs, lengths, strict=True)
        ]


def _generation_config(sampling: Sampling, eos: set[int], pad: int, start: int | None) -> GenerationConfig:
    """Every field that shapes sampling, said aloud."""
    greedy = sampling.temperature <= 0
    return GenerationConfig(
        do_sample=not greedy,
        temperature=None if greedy else 1.0,  # _Recorder puts it in: one pass over the vocabulary for both
        top_p=None if greedy else sampling.top_p,
        top_k=None if greedy else 0,
        min_p=None,
        typical_p=None if greedy else 1.0,
        epsilon_cutoff=None if greedy else 0.0,
        eta_cutoff=None if greedy else 0.0,
        num_beams=1,
        num_beam_groups=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        min_new_tokens=None,
        max_length=None,
        max_new_tokens=sampling.max_new_tokens,
        bad_words_ids=None,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        guidance_scale=None,
        sequence_bias=None,
        use_cache=True,
        eos_token_id=sorted(eos),
        pad_token_id=pad,
        decoder_start_token_id=start,
    )


def _chunks(order: list[int], size: int, key: Any) -> list[list[int]]:
    chunks: list[list[int]] = []
    for j in order:
        if not chunks or len(chunks[-1]) == size or key(chunks[-1][0]) != key(j):
            chunks.append([])
        chunks[-1].append(j)
    return chunks


def _room_for_copy(policy: Policy) -> bool:
    config = policy.base.config
    size = policy.base.dtype.itemsize * _dense_count(policy)
    if policy.device.type == "cuda":
        free = torch.cuda.mem_get_info(policy.device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    log.debug("%s: a merged copy takes %d bytes, %d are free", config.model_type, size, free)
    return bool(free > 2 * size)


def _dense_count(policy: Policy) -> int:
    """Number of weights of the plain model: 4-bit ones are stored two to a byte."""
    return sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in policy.base.parameters())
