"""What GRPO and PPO share: metrics, gradient clipping, precision."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coderl.algorithms import GRPO, SFT
from coderl.algorithms.rewards import Sample
from coderl.algorithms.step import Rollout
from coderl.errors import UsageError
from coderl.model.policy import Policy
from coderl.rollout import GenerateEngine
from coderl.sandbox import Program, ProgramRunner
from coderl.types import Completion, Execution
from tests.support import loops, tiny
from tests.support.fixed import REWARDS, FixedGRPO, FixedPPO, Gradients, close, rollout_of, run, stirred


@pytest.fixture(scope="module")
def rollout(llama: Path) -> Rollout:
    return rollout_of(llama, REWARDS)


CUT = [1, 2, 5, 8]


def half_cut(rollout: Rollout) -> Rollout:
    """Some completions as if they had ended by themselves, and some not."""
    ended = [
        replace(s, completion=replace(s.completion, finished=i not in CUT))
        for i, s in enumerate(rollout.samples)
    ]
    return Rollout(ended, rollout.rewards)


def test_metrics_of_an_update_match_plain_loops(llama: Path, rollout: Rollout) -> None:
    """They are means over tokens, not over sequences, and without padding."""
    logged = run(llama, rollout, micro_batch_size=5, loss_type="dapo", baseline="none", scale="none").logged[
        0
    ]
    rows = loops.rows_of(stirred(llama), rollout)
    logp = [float(value.detach()) for row in rows for value in row.logp]
    sampled = [value for sample in rollout.samples for value in sample.completion.logprobs]
    divergence = [float(value.detach()) for row in rows for value in loops.divergence(row, "k3")]
    rewards = rollout.rewards.flatten().tolist()
    worth = [r for r, sample in zip(rewards, rollout.samples, strict=True) for _ in sample.completion.ids]
    assert logged["mismatch_kl"] == pytest.approx(mean(sampled) - mean(logp), rel=1e-3)
    assert logged["policy/kl"] == pytest.approx(mean(divergence), rel=1e-3)
    assert logged["loss/policy"] == pytest.approx(-mean(worth), rel=1e-4)
    assert abs(logged["mismatch_kl"]) > 1e-3  # the samples came from another policy


def test_metrics_of_a_rollout_match_plain_loops(rollout: Rollout) -> None:
    verdicts = [Execution("passed", 3, 3), Execution("failed", 1, 3), Execution("infra_error", 0, 3)] * 4
    samples = [
        replace(sample, execution=verdict) for sample, verdict in zip(rollout.samples, verdicts, strict=True)
    ]
    rewards = rollout.rewards.clone()
    rewards.view(-1)[2::3] = torch.nan
    metrics = Rollout(samples, rewards).metrics()
    known = [float(r) for i, r in enumerate(rollout.rewards.flatten()) if i % 3 != 2]
    lengths = [len(s.completion.ids) for s in samples]
    assert metrics["reward/mean"] == pytest.approx(mean(known))
    assert metrics["reward/std"] == pytest.approx(pstdev(known))
    assert metrics["reward/passed"] == pytest.approx(4 / 8) and metrics["outcome/passed"] == 4 / 12
    assert metrics["reward/test_pass_rate"] == pytest.approx((3 + 1) * 4 / (6 * 4))
    assert metrics["outcome/infra_error"] == pytest.approx(4 / 12) and metrics["outcome/timeout"] == 0
    assert metrics["completion/length"] == mean(lengths)
    assert metrics["completion/clipped"] == mean(not s.completion.finished for s in samples)
    assert Rollout(samples, rewards).verdicts == [(2, 3), (1, 3), (1, 2)]


def test_problems_with_equal_prompts_are_separate_groups(llama: Path) -> None:
    """Two problems with the same text, one always solved and one never: nothing to learn from either."""
    rollout = rollout_of(llama, [[1.0] * 4, [0.0] * 4])
    first = rollout.samples[0]
    same: list[Sample] = [
        replace(
            s, problem=first.problem, completion=replace(s.completion, prompt_ids=first.completion.prompt_ids)
        )
        for s in rollout.samples
    ]
    assert run(llama, Rollout(same, rollout.rewards), kl_coefficient=0.0).gradients == [{}]


@pytest.mark.parametrize("kind", [FixedGRPO, FixedPPO])
def test_gradients_are_clipped_to_max_grad_norm(llama: Path, rollout: Rollout, kind: type[FixedGRPO]) -> None:
    taken: list[Gradients] = []

    class Looking(kind):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()

            def look(*_: Any) -> None:
                trainable = self.policy.trainable().items()
                taken.append({n: p.grad.clone() for n, p in trainable if p.grad is not None})

            made["optimizer"].register_step_pre_hook(look)
            return made

    module = run(llama, rollout, kind=Looking, max_grad_norm=1e-2, inner_epochs=1)
    policys = [n for n in module.gradients[0] if not module.policy.is_critics(n)]
    norm = torch.stack([module.gradients[0][n].norm() for n in policys]).norm()
    assert norm > 0.02
    close({n: taken[0][n] for n in policys}, {n: module.gradients[0][n] * 1e-2 / norm for n in policys}, 1e-7)
    if kind is FixedGRPO:
        assert module.logged[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_loss_scaling_keeps_small_gradients_in_float16(llama: Path, rollout: Rollout) -> None:
    """A loss of which each token counts a millionth: without scaling half of its gradient is 0 in float16."""

    def direction(**options: Any) -> torch.Tensor:
        made = run(
            llama,
            rollout,
            policy=stirred(llama, **options),
            loss_type="dr_grpo",
            max_new_tokens=100_000,
            kl_coefficient=0.0,
        )
        flat = torch.cat([gradient.flatten() for gradient in made.gradients[0].values()])
        return torch.nn.functional.normalize(flat, dim=0)

    half, whole = direction(compute_dtype="float16"), direction()
    assert float(half @ whole) > 0.99


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true"])
def test_the_error_for_another_precision_says_how_to_fix_it(llama: Path, precision: str) -> None:
    module = SFT(Policy(str(llama)))
    module._trainer = SimpleNamespace(precision=precision)  # type: ignore[assignment]
    with pytest.raises(UsageError, match="32-true or bf16-mixed"):
        module.setup("fit")


def test_full_training_keeps_all_weights_in_float32(llama: Path) -> None:
    with pytest.raises(UsageError, match="compute_dtype: float32"):
        Policy(str(llama), quantization="none", lora=None, compute_dtype="bfloat16")
    assert tiny.policy(llama, lora=None).base.dtype == torch.float32


def test_masked_samples_are_not_in_the_baseline_where_the_kl_is_part_of_the_reward(
    llama: Path, rollout: Rollout
) -> None:
    """They were not scored: without their divergence their reward would look better than the others'."""
    lost = rollout.rewards.clone()
    lost.view(-1)[CUT] = torch.nan
    settings: dict[str, Any] = {"kl": "k1", "scale": "none"}
    masked = run(llama, half_cut(rollout), truncated="mask", **settings)
    close(masked.gradients[0], run(llama, Rollout(rollout.samples, lost), **settings).gradients[0])


def test_masked_samples_are_left_out_of_every_forward(
    llama: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    score = Policy.score

    def counting(self: Policy, ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(len(ids))
        return score(self, ids, *rest, **more)

    monkeypatch.setattr(Policy, "score", counting)
    run(llama, half_cut(rollout), truncated="mask")
    assert seen == [len(rollout.samples) - len(CUT)] * 2  # the reference, and the update


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kl": "k1"}, "model.scale to batch or none"),
        ({"group_size": 1, "baseline": "none", "scale": "none", "refill_budget": 3}, "model.group_size"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    llama: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        GRPO(Policy(str(llama)), **options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_programs_run_while_others_are_sampled(
    device: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Runner(ProgramRunner):
        timeout = 1.0

        def run(self, programs: Sequence[Program]) -> list[Execution]:
            events.append(f"run {len(programs)}")
            return [Execution("passed", 1, 1, message=program.code) for program in programs]

        def submit(self, program: Program) -> Future[Execution]:
            events.append("submit")
            return super().submit(program)

    class Engine(GenerateEngine):
        def generate(self, *args: Any, **options: Any) -> list[Completion]:
            found = super().generate(*args, **options)
            events.append("sampled")
            return found

    module = GRPO(stirred(llama), group_size=4, engine=Engine(), sandbox=Runner(), max_new_tokens=9)
    monkeypatch.setattr(GRPO, "device", torch.device(device))
    torch.manual_seed(0)
    found = module.collect(tiny.problems(3))
    together = ["submit", "run 1"] * 12
    assert events == (["sampled", "run 12"] if device == "cpu" else [*together, "sampled"])
    assert [sample.execution.message for sample in found.samples] == [s.program for s in found.samples]


def test_what_was_begun_is_cancelled_where_sampling_fails(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Future[Execution]] = []

    class Runner(ProgramRunner):
        timeout = 1.0

        def run(self, programs: Sequence[Program]) -> list[Execution]:
            raise AssertionError("nothing is left to run")

        def submit(self, program: Program) -> Future[Execution]:
            begun.append(Future())
            return begun[-1]

    class Engine(GenerateEngine):
        def generate(self, *args: Any, **options: Any) -> list[Completion]:
            super().generate(*args, **options)
            raise KeyboardInterrupt

    module = GRPO(stirred(llama), group_size=2, engine=Engine(), sandbox=Runner(), max_new_tokens=9)
    monkeypatch.setattr(GRPO, "device", torch.device("cuda"))
    with pytest.raises(KeyboardInterrupt):
        module.collect(tiny.problems(2))
    assert len(begun) == 4 and all(future.cancelled() for future in begun)
