"""A policy that writes programs: what samples them, where they run, and how well it does on held-out ones."""

from __future__ import annotations

import logging
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn

from coderl.algorithms.base import PolicyModule
from coderl.algorithms.training_data import trained_on
from coderl.errors import UsageError
from coderl.evaluation import EvaluationSettings, Store, Task, evaluate
from coderl.model.policy import Policy
from coderl.model.provenance import prior_training
from coderl.problems.contamination import merge_records
from coderl.rollout import GenerateEngine, RolloutEngine, Sampling
from coderl.sandbox import Sandbox
from coderl.scores import Evaluation
from coderl.types import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)


class SampledPolicy(PolicyModule):
    """Owns the rollout engine and the sandbox, and measures pass@k with them.

    Args:
        policy: The model to train.
        sandbox: Where programs run. Null is one with default limits.
        engine: What samples. Null is ``GenerateEngine`` with its defaults.
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
        self._held_out: list[Problem] = []
        self._bound = False

    def setup(self, stage: str) -> None:
        """Start the sandbox first: where its isolation is refused, that is said before weights load."""
        self.sandbox.start()
        super().setup(stage)

    def bind(self) -> None:
        """Hand the loaded policy to the engine; does nothing the second time."""
        self.engine.bind(self.policy)
        self._bound = True

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As torch does it; an engine that samples from a copy of the weights gets the new ones."""
        result = super().load_state_dict(*args, **options)
        if self._bound:
            self.engine.sync()
        return result

    def evaluate(
        self,
        problems: Sequence[Problem],
        progress: str | None = None,
        contaminated: Sequence[str] | None = None,
    ) -> Evaluation:
        """Held-out pass@k of the present weights on problems that need not be a benchmark's.

        Args:
            problems: What is asked; at least one. The scores are named after the first one's source.
            progress: Label of a progress bar; None shows none.
            contaminated: Ids of problems that the policy was trained on. None: nobody knows.
        """
        name = problems[0].id.partition("/")[0].lower() if problems else "problems"
        task = Task(name, tuple(problems), self.sandbox.timeout)
        return self.evaluate_task(task, progress, contaminated)[name]

    def evaluate_task(
        self,
        task: Task,
        progress: str | None = None,
        contaminated: Sequence[str] | None = None,
        store: Store | None = None,
    ) -> dict[str, Evaluation]:
        """Held-out pass@k of the present weights, as ``evaluation`` says.

        Collective: every process calls it and gets the scores. The training's random stream stays as it was.

        Args:
            task: What is asked.
            progress: Label of a progress bar; None shows none.
            contaminated: Ids of problems that the policy was trained on. None: nobody knows.
            store: Keeps the answers under way, where one process is alone.

        Returns:
            By the task's name (see :func:`coderl.evaluation.evaluate`).
        """
        self.bind()
        alone = self._trainer is None or self.trainer.world_size == 1
        return evaluate(
            task,
            self.engine,
            self.sandbox,
            self.evaluation,
            self.evaluation.sampling(self.sampling.max_new_tokens),
            form=self.policy.prompt_form,
            contaminated=contaminated,
            store=store if alone else None,
            progress=progress,
            rank=0 if alone else self.trainer.global_rank,
            gathered=None if alone else self.gathered,
        )

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Take the batch's problems; they are sampled together when the epoch ends."""
        self._held_out += batch

    def test_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Take the batch's problems; they are sampled together when the epoch ends."""
        self._held_out += batch

    def on_validation_epoch_end(self) -> None:
        """pass@k on the validation split, as ``evaluation`` says."""
        if self.trainer.sanity_checking:  # there is nothing to check in two batches that a fit would not show
            self._held_out = []
            return
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """pass@k on the test split, as ``evaluation`` says."""
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        # A distributed sampler deals the problems out in turn, and some twice so that all ranks get as many.
        dealt = self.gathered(self._held_out)
        held_out = {p.id: p for turn in zip_longest(*dealt) for p in turn if p is not None}
        self._held_out = []
        contaminated = self._trained_on(held_out.values())
        if contaminated:
            log.warning(
                "%s: NOT HELD OUT: %d of %d problems were in the training data",
                split,
                len(contaminated),
                len(held_out),
            )
        evaluation = self.evaluate(list(held_out.values()), f"pass@k {split}", contaminated)
        rates = {name: getattr(evaluation, name) for name in ("accuracy", "success_rate", "test_pass_rate")}
        known = {name: value for name, value in (evaluation.scores() | rates).items() if value is not None}
        self.log_dict({f"{split}/{name}": value for name, value in known.items()}, prog_bar=True)

    def _trained_on(self, problems: Iterable[Problem]) -> list[str] | None:
        """Those that the policy was trained on, in this run or before; None if nobody knows."""
        fitted = self.trainer.state.fn == TrainerFn.FITTING or self.trainer.ckpt_path is not None
        here = trained_on(self.trainer) if fitted else None
        known = merge_records(prior_training(self.policy), here)
        return None if known is None else known.among(problems)

    def teardown(self, stage: str) -> None:
        """Leave no process behind."""
        self.sandbox.close()
