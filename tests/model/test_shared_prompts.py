"""A prompt that rows share is read once, and nothing that is computed changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from coderl.algorithms.micro_batches import portions
from coderl.model import architectures
from coderl.model.padding import Padded, pad_rows, prompt_numbers
from coderl.model.policy import Policy
from coderl.model.shared_prompts import Prompts
from coderl.types import Experience
from tests.support import tiny

pytestmark = pytest.mark.slow

FAMILIES = list(tiny.FAMILIES)


def rows(group: int, lengths: tuple[int, ...], seed: int = 0, longest: int = 9) -> Padded:
    """Groups of random completions to random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> list[int]:
        return torch.randint(5, 200, (count,), generator=generator).tolist()

    prompts = [prompt for prompt in map(drawn, lengths) for _ in range(group)]
    sizes = torch.randint(1, longest, (len(prompts),), generator=generator).tolist()
    return pad_rows(prompts, [drawn(size) for size in sizes], 0)


def whole(patch: pytest.MonkeyPatch) -> None:
    """Let every row be read whole."""
    patch.setattr(architectures, "can_share", lambda _: False)


def gradient(policy: Policy, batch: Padded, size: int, values: bool = False) -> dict[str, Tensor]:
    """The gradient of all that scoring gives, summed over micro-batches."""
    policy.zero_grad()
    backward(policy, batch, size, values)
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def backward(policy: Policy, batch: Padded, size: int, values: bool = False) -> None:
    for part in torch.arange(len(batch.ids)).split(size):
        ids, attention, mask = (column[part] for column in batch)
        scores = policy.score(ids, attention, mask, 0.7, "gradient", values)
        assert scores.entropy is not None
        weights = torch.linspace(-1.0, 2.0, scores.logprobs.shape[1])
        loss = ((scores.logprobs + 0.3 * scores.entropy) * weights).sum()
        if scores.critic is not None:
            loss = loss + (scores.critic.values * weights).sum() + scores.critic.final.sum()
        loss.backward()


def gradient_read_once(policy: Policy, batch: Padded, border: int, values: bool = False) -> dict[str, Tensor]:
    """The same gradient, the prompts read once for all micro-batches."""
    policy.zero_grad()
    with policy.reading(Prompts.of(batch.ids, batch.attention, border)):
        backward(policy, batch, 2, values)
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, atol=2e-5 * float(value.abs().max()) + 1e-8, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_rows_that_are_read_whole(
    family: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.checkpoint(tmp_path / "model", family)
    policy = tiny.policy(folder, family, gradient_checkpointing=checkpointing).train()
    policy.add_critic(own_adapter=False)
    assert policy.critic is not None
    torch.nn.init.normal_(policy.critic.linear.weight)
    tiny.stir(policy)
    for seed, (group, lengths) in enumerate([(4, (3, 9, 14)), (2, (1, 6)), (7, (5,)), (1, (4, 4, 8))]):
        batch = rows(group, lengths, seed)
        with monkeypatch.context() as patch:
            whole(patch)
            want = gradient(policy, batch, len(batch.ids), values=True)
        for size in (len(batch.ids), 3):  # a micro-batch of 3 cuts through groups
            assert_equal(gradient(policy, batch, size, values=True), want)
        border = architectures.first_answer_column(batch.mask)
        assert_equal(gradient_read_once(policy, batch, border, values=True), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_goes_through_the_model_once(family: str, tmp_path: Path) -> None:
    policy = tiny.policy(tiny.checkpoint(tmp_path / "model", family), family)
    read: list[int] = []
    for module in policy.base.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == policy.base.config.vocab_size:
            module.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    batch = rows(5, (11, 11))
    border = 11
    policy.score(*batch, 1.0)
    starts = 10 if family == "t5" else 0  # its decoder reads a start token
    assert sum(read) == 2 * border + 10 * (batch.ids.shape[1] - border) + starts


def test_what_stands_under_padding_does_not_make_another_prompt() -> None:
    batch = rows(3, (4, 7))
    odd = torch.where(batch.attention, batch.ids, torch.arange(6)[:, None])
    prompts = Prompts.of(odd, batch.attention, 7)
    assert len(prompts.ids) == 2
    row = prompts.find(batch.ids[:, :7], batch.attention[:, :7]).tolist()
    assert row in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_what_was_read_without_gradient_is_read_again_for_one(llama: Path) -> None:
    policy = tiny.policy(llama).train()
    tiny.stir(policy)
    batch = rows(3, (5, 8))
    want = gradient_read_once(policy, batch, 8)
    policy.zero_grad()
    with policy.reading(Prompts.of(batch.ids, batch.attention, 8)):
        with torch.no_grad():
            policy.score(*batch, 0.7)
        backward(policy, batch, 2)
    assert_equal({n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}, want)


SHAPE = tiny.SHAPE | {"vocab_size": 256, "num_hidden_layers": 3, "head_dim": 16, "pad_token_id": 0}
GPT = {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": SHAPE,
    "codegen": GPT | {"rotary_dim": 8},
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "mistral": SHAPE | {"sliding_window": 8},
    "gemma2": SHAPE | {"sliding_window": 8},
    "gemma3_text": SHAPE | {"sliding_window": 8},
    "phi3": SHAPE | {"sliding_window": 8, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": SHAPE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": SHAPE,
    "mixtral": SHAPE | {"num_local_experts": 4},
    # What these remember of a prompt is more than keys and values: their rows are read whole.
    "mamba": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2},
    "minimax": SHAPE | {"num_local_experts": 4, "head_dim": 16},
    "recurrent_gemma": SHAPE,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
def test_states_of_other_families_are_those_of_rows_that_are_read_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OTHERS[kind])).eval()
    ids, attention, mask = rows(4, (3, 14, 21), longest=14)
    needed = mask | torch.nn.functional.pad(mask[:, 1:], (0, 1))
    with torch.no_grad():
        got = architectures.hidden_states(model, ids, attention, mask)[needed]
        whole(monkeypatch)
        want = architectures.hidden_states(model, ids, attention, mask)[needed]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def step_of(batch: Padded, prompts: list[list[int]]) -> Experience:
    ids, attention, mask = batch
    numbers = prompt_numbers(prompts)
    return Experience(ids, attention, mask, mask.float(), mask.float(), mask.any(dim=1), numbers)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=24),
    tokens=st.integers(1, 60),
    most=st.one_of(st.none(), st.integers(1, 5)),
    attended=st.floats(0.0, 1.0),
)
def test_portions_hold_each_row_once_and_no_more_tokens_than_they_may(
    lengths: list[int], sizes: list[int], tokens: int, most: int | None, attended: float
) -> None:
    prompts = [[1 + n % len(lengths)] * lengths[n % len(lengths)] for n in range(len(sizes))]
    batch = pad_rows(prompts, [[9] * size for size in sizes], 0)
    step, cpu = step_of(batch, prompts), torch.device("cpu")
    found = list(portions(step, torch.arange(len(sizes)), tokens, most, cpu, attended))
    rows = [row for portion in found for chunk in portion.rows for row in chunk.tolist()]
    assert sorted(rows) == list(range(len(sizes)))
    read = [tuple(row) for portion in found for row in portion.prompts.ids.tolist()]
    assert len(read) == len({tuple(prompt) for prompt in prompts}), "each prompt is read in one portion"
    for portion in found:
        assert len(portion.prompts.ids) == 1 or portion.prompts.ids.numel() <= tokens
        for chunk, micro in zip(portion.rows, portion.batches, strict=True):
            assert torch.equal(micro.ids, step.take(chunk).ids)
            border = architectures.first_answer_column(micro.mask)
            portion.prompts.find(micro.ids[:, :border], micro.attention[:, :border])  # or it fails
            longest = max(sizes[row] for row in chunk)
            assert len(chunk) == 1 or longest * len(chunk) <= tokens
            assert most is None or len(chunk) <= most


def test_rows_of_similar_length_are_read_together() -> None:
    prompts = [[1] * 3] * 3 + [[2] * 3] * 3
    sizes = [9, 1, 4, 3, 2, 8]
    batch = pad_rows(prompts, [[9] * size for size in sizes], 0)
    (found,) = portions(step_of(batch, prompts), torch.arange(6), 8, None, torch.device("cpu"), 0.0)
    assert [chunk.tolist() for chunk in found.rows] == [[1, 4], [3, 2], [5], [0]]
