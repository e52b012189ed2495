"""Micro-batches follow from memory: their size changes no gradient, and too large ones are done in halves."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coderl.algorithms import SFT
from coderl.algorithms.micro_batches import portions
from coderl.algorithms.step import Rollout
from coderl.errors import UserError
from coderl.model import memory
from coderl.model.policy import Policy
from coderl.types import Experience
from tests.support.fixed import REWARDS, FixedGRPO, FixedPPO, close, rollout_of, run, stirred, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rollout(llama: Path) -> Rollout:
    return rollout_of(llama, REWARDS)


def at_most(patch: pytest.MonkeyPatch, tokens: int) -> None:
    """A machine whose memory holds micro-batches of so many tokens."""
    patch.setattr(memory, "MOST_TOKENS", {"cpu": tokens})


def exhausted_above(patch: pytest.MonkeyPatch, tokens: int, error: BaseException) -> list[int]:
    """Let memory not suffice for a forward of more columns than that; returns the sizes that were tried."""
    tried: list[int] = []
    score = Policy.score

    def limited(policy: Policy, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        tried.append(ids.numel())
        if ids.numel() > tokens:
            raise error
        return score(policy, ids, *args, **options)

    patch.setattr(Policy, "score", limited)
    return tried


@pytest.mark.parametrize(
    "options", [{"inner_epochs": 2, "kl_coefficient": 0.1}, {"top_entropy": 0.5}], ids=str
)
@pytest.mark.parametrize("kind", [FixedGRPO, FixedPPO])
def test_the_gradient_does_not_depend_on_how_many_tokens_fit(
    kind: Any, options: dict[str, Any], llama: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = options.get("inner_epochs", 1)
    whole = run(llama, rollout, steps, kind, **options).gradients
    for tokens in (1, 20, 48):
        at_most(monkeypatch, tokens)
        for got, want in zip(run(llama, rollout, steps, kind, **options).gradients, whole, strict=True):
            close(got, want, 1e-5)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_where_memory_does_not_suffice_a_step_is_repeated_in_halves(
    error: BaseException,
    llama: Path,
    rollout: Rollout,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"inner_epochs": 2, "kl_coefficient": 0.1}
    whole = run(llama, rollout, 2, **options).gradients
    tried = exhausted_above(monkeypatch, 120, error)
    with caplog.at_level(logging.WARNING):
        got = run(llama, rollout, 2, **options).gradients
    assert max(tried) > 120 and tried[-1] <= 120
    assert "memory does not suffice: micro-batches of" in caplog.text
    for one, other in zip(got, whole, strict=True):
        close(one, other, 1e-5)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    llama: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhausted_above(monkeypatch, 0, RuntimeError("a size does not match"))
    with pytest.raises(RuntimeError, match="a size does not match"):
        run(llama, rollout)


def test_a_step_that_fits_in_no_part_ends_with_one_clear_line(
    llama: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhausted_above(monkeypatch, 0, ERRORS[0])
    with pytest.raises(UserError, match=r"does not suffice for a single .*gradient_checkpointing: true"):
        run(llama, rollout)


def test_sft_goes_on_in_halves_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        class Seen(SFT):
            def step(self) -> torch.Tensor:
                found.update(
                    {n: p.grad.clone() for n, p in self.policy.trainable().items() if p.grad is not None}
                )
                return super().step()

        train(Seen(stirred(llama), schedule="constant_with_warmup"))  # type: ignore[arg-type]
        return found

    whole = gradient()
    tried = exhausted_above(monkeypatch, 80, ERRORS[0])
    close(gradient(), whole)
    assert tried[0] > 80 >= tried[-1]


def test_checkpointing_is_turned_on_where_two_sequences_would_not_fit(
    llama: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(llama, rollout)
    assert not plain.policy.is_checkpointing
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1_000_000)
    with caplog.at_level(logging.INFO):
        saving = run(llama, rollout)
    assert saving.policy.is_checkpointing and "with gradient checkpointing" in caplog.text
    close(saving.gradients[0], plain.gradients[0])
    assert not run(
        llama, rollout, policy=stirred(llama, gradient_checkpointing=False)
    ).policy.is_checkpointing


def test_a_line_at_the_start_says_what_was_chosen(
    llama: Path, rollout: Rollout, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(llama, rollout, micro_batch_size=7)
    (line,) = [one for one in caplog.messages if one.startswith("rollouts: ")]
    assert "up to 128 sequences at a time, from a merged copy" in line
    assert "updates: 1,536 tokens at a time, 7 sequences at most" in line and "GB are free" in line


def test_ppo_scores_log_probabilities_only_where_something_needs_them(
    llama: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    score = Policy.score

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return score(*args, **options)

    monkeypatch.setattr(Policy, "score", counted)
    for own in (False, True):
        run(llama, rollout, 2, FixedPPO, kl_coefficient=0.0, inner_epochs=2, critic_adapter=own)
        assert calls and all(calls), "values need no head"
        calls.clear()
    run(llama, rollout, 1, FixedPPO, kl_coefficient=0.1)
    assert not all(calls)


def test_scoring_without_gradient_reads_more_at_a_time(
    llama: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[bool, int] = {}

    def noted(step: Experience, rows: torch.Tensor, tokens: int, *args: Any) -> Any:
        asked[torch.is_grad_enabled()] = tokens
        return portions(step, rows, tokens, *args)

    monkeypatch.setattr("coderl.algorithms.base.portions", noted)
    monkeypatch.setattr(memory, "micro_batch_tokens", lambda *_: 20)
    layers = run(llama, rollout).policy.base.config.num_hidden_layers
    assert asked == {True: 20, False: 20 * max(1, layers // 2)}


def of_two_ranks(told: list[str] | Exception) -> SFT:
    """A module whose ranks exchange this: what each has failed with, or that one has not come."""

    class OfTwo(SFT):
        def gathered(self, value: Any, patience: float = 0.0) -> Any:
            if isinstance(told, Exception):
                raise told
            return told

    made = OfTwo(Policy("embedded"))
    made._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
    return made


def test_ranks_end_together_where_one_of_them_fails() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    assert of_two_ranks(["", ""]).in_fitting_parts(lambda: 7) == 7
    with pytest.raises(UserError, match="rank 1: the memory"):
        of_two_ranks(["", "the memory"]).in_fitting_parts(lambda: 7)
    missing = UserError("rank 1 has not come")
    for told in (["ZeroDivisionError", ""], ["ZeroDivisionError", "other"], missing):
        with pytest.raises(ZeroDivisionError):
            of_two_ranks(told).in_fitting_parts(fails)
    with pytest.raises(UserError, match="has not come"):
        of_two_ranks(missing).in_fitting_parts(lambda: 7)
