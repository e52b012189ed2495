"""Memory: what is free, what a token takes, and how much is computed at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coderl.model import architectures, memory
from coderl.model.policy import Policy
from tests.support import tiny


@pytest.mark.slow
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_what_a_token_takes_is_what_autograd_keeps(family: str, tmp_path: Path) -> None:
    """Foreseen from four small forwards, for one of another shape."""
    policy = tiny.policy(tiny.checkpoint(tmp_path / "model", family), family).eval()
    cost = memory.token_cost(policy.base)
    rows, prompt, answer = 5, 24, 40
    ids = torch.ones(rows, prompt + answer, dtype=torch.long)
    whole = torch.ones_like(ids, dtype=torch.bool)
    mask = torch.arange(prompt + answer).expand_as(ids) >= prompt
    kept = memory._saved_bytes(
        policy.base, lambda: architectures.hidden_states(policy.base, ids, whole, mask)
    )
    foreseen = cost.read * (prompt + rows * answer) + cost.attended * rows * prompt
    assert foreseen == pytest.approx(kept, rel=0.3)
    assert cost.read > 0 and 0 <= cost.attended < cost.read


@given(room=st.integers(0, 10**12), sequence=st.integers(1, 10**9), limit=st.integers(1, 600))
def test_a_batch_fits_and_is_a_round_number_or_the_limit(room: int, sequence: int, limit: int) -> None:
    found = memory.largest_batch(room, sequence, limit)
    assert 1 <= found <= limit
    assert found == 1 or found * sequence <= room
    if found < limit:
        assert found & (found - 1) == 0 or (found % 3 == 0 and found // 3 & (found // 3 - 1) == 0)
        assert 2 * found * sequence > room or 2 * found > limit


@given(
    kind=st.sampled_from(["cpu", "cuda"]),
    read=st.floats(1e3, 1e8),
    layers=st.integers(1, 100),
    free=st.integers(-(10**9), 10**12),
)
def test_micro_batches_grow_with_memory_up_to_a_limit(kind: str, read: float, layers: int, free: int) -> None:
    cost = memory.TokenCost(read, 1.1 * read, read / 10)
    found = memory.micro_batch_tokens(kind, cost, layers, free)
    assert memory.FEWEST_TOKENS <= found <= memory.MOST_TOKENS[kind]
    assert found <= memory.fitting_tokens(cost, layers, free)
    assert found <= memory.micro_batch_tokens(kind, cost, layers, 2 * abs(free))
    if found > memory.FEWEST_TOKENS:  # beside as many tokens of prompts, and logits
        assert memory.update_bytes(cost, layers, 32_000, found, found) <= memory.UPDATE_SHARE * free + 1


def test_a_few_free_megabytes_change_no_batch() -> None:
    cost = memory.TokenCost(1.4e6, 1.5e6, 1e5)
    sizes = {memory.micro_batch_tokens("cuda", cost, 32, 20 * 10**9 + n * 10**7) for n in range(-20, 20)}
    assert len(sizes) == 1


def test_only_a_lack_of_memory_is_one() -> None:
    assert memory.is_exhausted(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_exhausted(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert memory.is_exhausted(MemoryError())
    assert not memory.is_exhausted(RuntimeError("size mismatch"))
    assert not memory.is_exhausted(ValueError("not enough memory"))


@pytest.mark.slow
def test_counting_works_where_nothing_is_recorded(llama: Path) -> None:
    """Lightning validates in inference mode."""
    policy = tiny.policy(llama).eval()
    want = memory.token_cost(policy.base)
    with torch.inference_mode():
        assert memory.token_cost(policy.base) == want
    assert want.read > 1 and want.prompt == want.read + memory.cache_bytes(policy.base.config, 4)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_nothing_is_to_come_where_nothing_trains(llama: Path, quantization: str) -> None:
    trained, asked = (Policy(str(llama), quantization=quantization) for _ in range(2))  # type: ignore[arg-type]
    trained.load(torch.device("cpu"))
    asked.load(torch.device("cpu"), for_training=False)
    weights = sum(p.numel() for p in trained.trainable().values())
    assert memory.still_to_come(trained) == (memory.OPTIMIZER_BYTES + memory.LAST_STEP_BYTES) * weights > 0
    assert memory.still_to_come(asked) == 0


def test_checkpointing_keeps_keys_and_values_of_prompts() -> None:
    cost = memory.TokenCost(8e6, 8.5e6, 5e5).checkpointed(layers=32, width=8192)
    assert cost.read == 8e6 / 32 + 32 * 8192
    assert cost.prompt == cost.read + 2 * 5e5
    assert cost.for_readings(2).prompt == 2 * cost.prompt
