"""Rollouts: sampled log-probs are the scored ones, and rows end where generation ended them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from coderl.errors import UsageError, UserError
from coderl.model import memory
from coderl.model.padding import pad_rows, spread
from coderl.model.policy import Policy
from coderl.rollout import GenerateEngine, Sampling
from coderl.rollout.decode import decode
from coderl.types import Completion, Problem
from tests.support import tiny


def sample(policy: Policy, n: int = 4, count: int = 3, seed: int = 0, **options: Any) -> list[Completion]:
    engine = GenerateEngine(
        batch_size=options.pop("batch_size", 128), merged_copy=options.pop("merged_copy", True)
    )
    engine.bind(policy)
    torch.manual_seed(seed)
    return engine.generate(tiny.problems(count), n, Sampling(**({"max_new_tokens": 12} | options)))


def rescored(
    policy: Policy, completions: list[Completion], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    problems = tiny.problems(3)
    prompts = [policy.encode(problems[c.problem]) for c in completions]
    assert [list(c.prompt_ids) for c in completions] == prompts
    ids, attention, mask = pad_rows(prompts, [c.ids for c in completions], 0)
    with torch.no_grad():
        scored = policy.score(ids, attention, mask, temperature).logprobs
    return scored[mask], spread([c.logprobs for c in completions], mask)[mask]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("merged_copy", [True, False])
def test_sampled_logprobs_are_scored_logprobs(
    llama: Path, temperature: float, quantization: str, merged_copy: bool
) -> None:
    policy = tiny.policy(llama, quantization=quantization)
    tiny.stir(policy)
    completions = sample(policy, temperature=temperature, merged_copy=merged_copy)
    scored, sampled = rescored(policy, completions, temperature)
    torch.testing.assert_close(scored, sampled, atol=2e-4, rtol=1e-4)


def test_sync_updates_the_merged_copy_to_the_policys_weights(llama: Path) -> None:
    policy = tiny.policy(llama)
    engine = GenerateEngine(merged_copy=True)
    engine.bind(policy)
    tiny.stir(policy, 0.3)
    engine.sync()
    torch.manual_seed(0)
    completions = engine.generate(tiny.problems(3), 2, Sampling(max_new_tokens=8))
    scored, sampled = rescored(policy, completions, 1.0)
    torch.testing.assert_close(scored, sampled, atol=2e-4, rtol=1e-4)


def families(tmp_path: Path) -> dict[str, Path]:
    names: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "starcoder2": {}}
    return {name: tiny.checkpoint(tmp_path / name, name, **config) for name, config in names.items()}


def test_rows_end_at_their_first_eos_whatever_the_pad_token(tmp_path: Path) -> None:
    """With pad = eos or not, and one eos or several."""
    for folder, pad_is_eos, several in itertools.product(
        families(tmp_path).values(), [True, False], [True, False]
    ):
        policy = tiny.policy(folder, lora=None)
        tokenizer = policy.tokenizer
        if pad_is_eos:
            tokenizer.pad_token = tokenizer.eos_token
        eos = {int(tokenizer.eos_token_id), *(range(100, 300) if several else [])}
        policy.base.generation_config.eos_token_id = sorted(eos)
        completions = sample(policy, n=8, temperature=2.0, max_new_tokens=24)
        ended = [c for c in completions if c.ids[-1] in eos]
        assert all(c.finished for c in ended)
        assert all(i not in eos for c in completions for i in c.ids[:-1])
        assert all(len(c.ids) == 24 and not c.finished for c in completions if c not in ended)
        assert all(len(c.logprobs) == len(c.ids) for c in completions)
        if several:
            assert len(ended) > len(completions) / 2


def test_stop_strings_end_a_row_and_are_cut_from_its_text(llama: Path) -> None:
    policy = tiny.policy(llama)
    free = sample(policy, temperature=1.5)
    marks = tuple({c.text[3:5] for c in free if len(c.text) > 6})
    problems = [Problem(id=p.id, prompt=p.prompt, stop=marks) for p in tiny.problems(3)]
    engine = GenerateEngine()
    engine.bind(policy)
    torch.manual_seed(0)
    stopped = engine.generate(problems, 4, Sampling(temperature=1.5, max_new_tokens=12))
    assert any(len(s.ids) < len(f.ids) for s, f in zip(stopped, free, strict=True))
    for completion in stopped:
        assert not any(mark in completion.text for mark in marks)
        whole = policy.tokenizer.decode(list(completion.ids), skip_special_tokens=True)
        if any(mark in whole for mark in marks):
            assert completion.finished


def test_a_checkpoints_generation_config_does_not_change_sampling(llama: Path) -> None:
    policy = tiny.policy(llama)
    plain = sample(policy, n=8)
    for name, value in {
        "top_k": 1,
        "top_p": 0.01,
        "temperature": 0.1,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 1,
        "min_p": 0.9,
        "suppress_tokens": list(range(50)),
        "forced_eos_token_id": 5,
        "max_length": 3,
    }.items():
        setattr(policy.base.generation_config, name, value)
    leaked = sample(policy, n=8)
    assert [c.ids for c in plain] == [c.ids for c in leaked]
    assert len({c.ids for c in plain}) > len(plain) / 2


def test_completions_stand_in_problem_order_whatever_the_batch(llama: Path) -> None:
    policy = tiny.policy(llama)
    for batch_size in (1, 5, 128):
        completions = sample(policy, n=3, batch_size=batch_size)
        assert [c.problem for c in completions] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_greedy_decoding_is_the_argmax(llama: Path) -> None:
    policy = tiny.policy(llama)
    first, second = sample(policy, n=2, count=1, temperature=0.0)
    assert first.ids == second.ids
    prompt = policy.encode(tiny.problems(1)[0])
    with torch.no_grad():
        logits = policy.net(torch.tensor([prompt])).logits[0, -1]
    assert first.ids[0] == int(logits.argmax())


def test_sampling_follows_the_distribution(llama: Path) -> None:
    policy = tiny.policy(llama)
    completions = sample(policy, n=600, count=1, max_new_tokens=1, temperature=0.6)
    prompt = policy.encode(tiny.problems(1)[0])
    with torch.no_grad():
        expected = (policy.net(torch.tensor([prompt])).logits[0, -1].float() / 0.6).softmax(-1)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=len(expected)) / 600
    assert float((counts - expected).abs().max()) < 0.08


def test_sampling_restores_the_policys_train_mode(llama: Path) -> None:
    policy = tiny.policy(llama).train()
    sample(policy, n=1, merged_copy=False)
    assert policy.training


@pytest.mark.parametrize(
    ("options", "words"), [({"temperature": 0.0}, "temperature"), ({"top_p": 0.9}, "top_p")]
)
def test_training_refuses_temperature_0_and_top_p(options: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampling(**options).for_training()  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_where_memory_does_not_suffice_rollouts_go_on_in_halves(
    llama: Path, most: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = tiny.policy(llama)
    want = [c.ids for c in sample(policy, n=4, temperature=0.0)]
    tried: list[int] = []

    def limited(model: Any, prompts: Any, rows: Any, *args: Any, **options: Any) -> None:
        tried.append(sum(map(len, rows)))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        decode(model, prompts, rows, *args, **options)

    monkeypatch.setattr("coderl.rollout.generate.decode", limited)
    assert [c.ids for c in sample(policy, n=4, temperature=0.0)] == want
    failed = [size for size in tried if size > most]
    assert failed == sorted(set(failed), reverse=True), "what waits is cut too, once for each size"
    assert tried[0] == 12 and "rollouts: 12 sequences do not fit in memory; going on with 6" in caplog.text
    engine = GenerateEngine()
    engine.bind(policy)
    for _ in range(2):
        tried.clear()
        engine.generate(tiny.problems(3), 4, Sampling(max_new_tokens=3))
    assert max(tried) <= most, "it has learned how many fit"


def test_a_sequence_that_does_not_fit_alone_ends_with_one_clear_line(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("coderl.rollout.generate.decode", exhausted)
    with pytest.raises(UserError, match="does not suffice to sample a single sequence"):
        sample(tiny.policy(llama))


def test_how_many_sequences_fit_follows_from_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.policy(llama)
    each = memory.cache_bytes(policy.base.config, policy.base.dtype.itemsize)
    longest = max(len(policy.encode(problem)) for problem in tiny.problems(3)) + 12
    to_come = memory.still_to_come(policy)
    for free, expected in ((9, 8), (8, 8), (7.9, 6), (1, 1), (0, 1), (10_000, 128)):
        room = free * longest * each / memory.CACHE_SHARE + to_come + 1
        monkeypatch.setattr(memory, "free_bytes", lambda _, room=room: room)
        engine = GenerateEngine(merged_copy=False)
        engine.bind(policy)
        assert engine.sequences(tiny.problems(3), Sampling(max_new_tokens=12)) == expected
        limited = GenerateEngine(batch_size=3, merged_copy=False)
        limited.bind(policy)
        assert limited.sequences(tiny.problems(3), Sampling(max_new_tokens=12)) == min(3, expected)


def test_completions_are_told_as_soon_as_they_are_whole(llama: Path) -> None:
    policy = tiny.policy(llama)
    engine = GenerateEngine()
    engine.bind(policy)
    told: dict[int, Completion] = {}
    got = engine.generate(
        tiny.problems(3), 4, Sampling(max_new_tokens=12), seed=0, ready=lambda i, c: told.update({i: c})
    )
    assert [told[i] for i in range(12)] == got
    order = [len(c.ids) for c in told.values()]
    assert order == sorted(order), "those that end first come first"
