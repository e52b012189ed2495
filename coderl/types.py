"""The values that travel through one training step.

``Problem -> Completion -> Execution -> Credit -> Experience``: each is made once, by one module, never
reaching back. This module imports nothing heavy, so that the sandbox and the command line start fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

Outcome = Literal[
    "passed", "failed", "timeout", "syntax_error", "error", "out_of_memory", "no_code", "infra_error"
]
Grading = Literal["sealed", "partly", "rpc", "inline"]
Judging = Literal["inline", "auto"]
"""How an evaluation grades: ``inline`` runs the tests beside the program, as bigcode's harness does; ``auto``
keeps them out of its reach."""
Tier = Literal["A", "B", "C"]
Quantization = Literal["nf4", "none"]
ComputeDtype = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A programming task, as text. No later step changes it.

    Example: ``Problem("mine/1", "def twice(x):", tests=("assert twice(2) == 4",))``.

    Attributes:
        id: Unique within its source, such as ``"mbpp/601"``.
        prompt: What the model continues (completion form, see :mod:`coderl.problems.prompts`).
        instruction: The task as a request in plain words; chat prompts are made from it.
        tests: Assert lines (MBPP form). Empty for problems in HumanEval form.
        setup: Source run after the candidate and before ``tests``.
        test: Source that defines ``check(candidate)`` (HumanEval form). Empty for MBPP form.
        entry_point: Name of the function that ``check`` receives (HumanEval form).
        solution: A known good continuation of ``prompt``, for supervised warm starts. May be empty.
        stop: Strings that end a completion.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        where: ``file:line`` that it was read from, for messages. Empty where it was made otherwise.
    """

    id: str
    prompt: str
    instruction: str = ""
    tests: tuple[str, ...] = ()
    setup: str = ""
    test: str = ""
    entry_point: str = ""
    solution: str = ""
    stop: tuple[str, ...] = ()
    split: str = "train"
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer to a problem.

    Example: ``Completion(0, (1, 17, 9), (42, 2), (-0.7, -0.1), "f = abs", finished=True)``.

    Attributes:
        problem: Index of the problem in its batch. Groups are keyed by it, never by prompt text.
        prompt_ids: Token ids that it continues.
        ids: Sampled token ids, the end-of-sequence token included where one was sampled.
        logprobs: Log-probability of each id under the sampling distribution, nats; same length as ``ids``.
        text: The decoded answer, up to the first stop string or end-of-sequence token.
        finished: True where sampling met an end-of-sequence token or a stop string, False where cut off.
    """

    problem: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Execution:
    """The result of running one program in the sandbox.

    Example: ``Execution("failed", passed=2, total=3, message="AssertionError", grading="sealed", tier="A")``.

    Attributes:
        outcome: The verdict; ``infra_error`` says nothing about the program.
        passed: Number of tests that held.
        total: Number of tests.
        message: Short and safe to print: at most a few hundred printable characters.
        seconds: Wall time of the run.
        grading: How the verdict was reached.
        tier: Isolation it ran under.
    """

    outcome: Outcome
    passed: int = 0
    total: int = 0
    message: str = ""
    seconds: float = 0.0
    grading: Grading = "sealed"
    tier: Tier = "C"


@dataclass(frozen=True, slots=True)
class Credit:
    """Advantages and returns, computed from rewards.

    Attributes:
        advantages: ``[B, T]`` float, finite: how much each token is to be reinforced.
        returns: ``[B, T]`` float, the critic's targets; None without a critic.
        metrics: Values to be logged with the step, by name.
    """

    advantages: Tensor
    returns: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Experience:
    """Scored completions, ready for the optimizer. Rows are sequences: prompt, completion, padding.

    Attributes:
        ids: ``[B, T]`` token ids, prompts padded on the left and completions on the right.
        attention: ``[B, T]`` bool, true on prompt and completion tokens.
        mask: ``[B, T]`` bool, true on the *completion* tokens that count in a loss: of a row all, or none.
            Made from generation lengths and owned here: nothing re-derives it from ids.
        weights: ``[B, T]`` float, what each token counts in the loss of the *whole* optimizer step; zero
            where ``mask`` is false. Losses sum over them and never normalize again.
        advantages: ``[B, T]`` float, zero where ``mask`` is false.
        finished: ``[B]`` bool, false where the completion was cut off at the length limit.
        prompt: ``[B]`` int64, the same number for rows with the same prompt.
        old_logprobs: ``[B, T]`` float, or None where the update is strictly on-policy.
        ref_logprobs: ``[B, T]`` float, or None where no KL term needs them.
        sampler_logprobs: ``[B, T]`` float, as the rollout engine reported them.
        entropy: ``[B, T]`` float, of the policy before the update, or None where no mask needs it.
        old_values: ``[B, T]`` float, the critic's values before the update, or None without a critic.
        final_values: ``[B]`` float, the critic's value of the state after the last token.
        returns: ``[B, T]`` float, the critic's targets.

    Column ``t`` of every per-token tensor belongs to the token ``ids[:, t]`` (not to its predecessor).
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    weights: Tensor
    advantages: Tensor
    finished: Tensor
    prompt: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    old_values: Tensor | None = None
    final_values: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def to(self, device: torch.device) -> Experience:
        """A copy on ``device``."""
        return self._map(lambda column: column.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Experience:
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        changed: dict[str, Any] = {k: None if v is None else change(v) for k, v in columns.items()}
        return Experience(**changed)

    def take(self, rows: Tensor) -> Experience:
        """The given rows, without the columns that are padding in all of them."""
        keep = self.attention[rows].any(dim=0)
        return self._map(lambda column: column[rows][:, keep] if column.ndim == 2 else column[rows])

    def put(self, rows: Tensor, **columns: Tensor) -> None:
        """Set columns of the given rows, laid out as in :meth:`take`; None is replaced by zeros first."""
        keep = self.attention[rows].any(dim=0).nonzero().flatten()
        for name, values in columns.items():
            shape = self.ids.shape[: values.ndim]
            if getattr(self, name) is None:
                setattr(self, name, values.new_zeros(shape, device=self.ids.device))
            place = (rows[:, None], keep) if values.ndim == 2 else rows
            getattr(self, name)[place] = values.to(self.ids.device)
