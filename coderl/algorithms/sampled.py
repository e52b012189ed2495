"""A policy that writes programs: what samples them, where they run, and how well it does on held-out ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from coderl.algorithms import ranks
from coderl.algorithms.base import PolicyModule
from coderl.algorithms.step import EvaluationSettings
from coderl.errors import UsageError
from coderl.evaluation import Evaluation, evaluate
from coderl.policy import Policy
from coderl.rollout import GenerateEngine, RolloutEngine, Sampling
from coderl.sandbox import Sandbox
from coderl.types import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence


class SampledPolicy(PolicyModule):
    """Owns the rollout engine and the sandbox, and measures pass@k with them.

    Args:
        policy: The model to train.
        sandbox: Where programs run. Null is one with default limits.
        engine: What samples. Null is transformers' ``generate``.
        temperature: Of sampling, and of every log-probability that is compared with it.
        max_new_tokens: Longest completion, in tokens.
        evaluation: How held-out pass@k is measured by validate, test and the post-fit evaluation.
        **shared: What every :class:`~coderl.algorithms.PolicyModule` takes.
    """

    def __init__(
        self,
        policy: Policy,
        sandbox: Sandbox | None = None,
        engine: RolloutEngine | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008 -- plain values, never changed
        **shared: Any,
    ) -> None:
        super().__init__(policy, **shared)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: model.max_new_tokens must be 1 or more")
        self.sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens).for_training()
        self.sandbox = sandbox if sandbox is not None else Sandbox()
        self.engine = engine if engine is not None else GenerateEngine()
        self.evaluation = evaluation

    def setup(self, stage: str) -> None:
        """Start the sandbox first: where its isolation is refused, that is said before weights load."""
        self.sandbox.start()
        super().setup(stage)

    def bind(self) -> None:
        """Hand the loaded policy to the engine; does nothing the second time."""
        self.engine.bind(self.policy)

    def evaluate(self, problems: Sequence[Problem], progress: str | None = None) -> Evaluation:
        """Held-out pass@k of the present weights. Draws from a random stream of its own."""
        self.bind()
        settings = self.evaluation
        sampling = Sampling(
            settings.temperature, settings.top_p, settings.max_new_tokens or self.sampling.max_new_tokens
        )

        def sample(batch: Sequence[Problem], n: int) -> list[list[str]]:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(settings.seed)
                completions = self.engine.generate(batch, n, sampling, progress=progress)
            return [[c.text for c in completions[i * n : (i + 1) * n]] for i in range(len(batch))]

        return evaluate(
            problems,
            sample,
            self.sandbox,
            n=settings.n,
            ks=sorted({1, *settings.ks}),  # pass@1 is what summaries speak of
            form=self.policy.prompt_form,
            settings=asdict(sampling) | {"seed": settings.seed},
        )

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """pass@k on the validation split, as ``evaluation`` says."""
        self._log_scores("val", batch)

    def test_step(self, batch: list[Problem], batch_idx: int) -> None:
        """pass@k on the test split, as ``evaluation`` says."""
        self._log_scores("test", batch)

    def _log_scores(self, split: str, batch: list[Problem]) -> None:
        scores = self.evaluate(batch).scores()
        known = {f"{split}/{name}": value for name, value in scores.items() if value is not None}
        known = ranks.mean_of_each(self.gathered(known))
        self.log_dict(known, batch_size=len(batch), prog_bar=True)

    def teardown(self, stage: str) -> None:
        """Leave no process behind."""
        self.sandbox.close()
