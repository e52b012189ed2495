"""Supervised fine-tuning on the reference solutions of problems."""

from __future__ import annotations

import torch
from torch import Tensor

from coderl.algorithms.base import PolicyModule
from coderl.algorithms.losses import token_weights
from coderl.algorithms.schedule import Schedule
from coderl.errors import UserError
from coderl.model.padding import pad_rows, prompt_numbers
from coderl.model.policy import Policy
from coderl.types import Experience, Problem


class SFT(PolicyModule):
    """Maximizes the likelihood of the solution given the prompt, the end-of-sequence token included.

    Args:
        policy: The model to train.
        learning_rate: Of AdamW, after warm-up.
        weight_decay: Of AdamW, on matrices.
        warmup_steps: Optimizer steps over which the learning rate rises evenly; the last has the peak.
        schedule: After warm-up: constant, or down to 0 after the last step (linear, cosine).
        max_grad_norm: Gradients are clipped to this norm.
        micro_batch_size: Sequences in one forward and backward, at most. Null is as many as memory holds.
            Changes memory and speed, never the gradient.
        max_prompt_tokens: Problems with a longer prompt are left out, and their number is logged.
        max_new_tokens: Likewise problems with a longer solution.
    """

    def __init__(
        self,
        policy: Policy,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Schedule = "cosine",
        max_grad_norm: float = 1.0,
        micro_batch_size: int | None = None,
        max_prompt_tokens: int = 512,
        max_new_tokens: int = 512,
    ) -> None:
        super().__init__(
            policy,
            learning_rate,
            weight_decay,
            warmup_steps,
            schedule,
            max_grad_norm,
            micro_batch_size,
            max_prompt_tokens,
        )
        self.max_new_tokens = max_new_tokens

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with its solution."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def filter_reason(self) -> str:
        """Why :meth:`fits` leaves a problem out, for the log."""
        limit = f"solution over {self.max_new_tokens} tokens (model.max_new_tokens) or missing"
        return f"{super().filter_reason}, or {limit}"

    def fits(self, problem: Problem) -> bool:
        """Whether prompt and solution are short enough.

        Raises:
            UserError: A training problem has no solution.
        """
        if not problem.solution.strip():
            if problem.split == "train":
                raise UserError(
                    f"problem {problem.id} has no solution: SFT needs a code field in every training row"
                )
            return False
        return super().fits(problem) and len(self.encode_solution(problem)) <= self.max_new_tokens

    def answer_tokens(self, problem: Problem) -> int:
        """Tokens of the problem's solution."""
        return len(self.encode_solution(problem))

    def encode_solution(self, problem: Problem) -> list[int]:
        """Token ids of the solution as the model should write it, an end token included."""
        # A chat prompt opens a code block; the answer closes it.
        ending = "\n```" if self.policy.prompt_form == "chat" else ""
        return self.policy.encode_answer(problem, problem.solution + ending)

    def experience(self, problems: list[Problem]) -> Experience:
        """Problems and solutions as rows; the weights average the loss over all ranks' solution tokens."""
        prompts = [self.policy.encode(p) for p in problems]
        ids, attention, mask = pad_rows(
            prompts,
            [self.encode_solution(p) for p in problems],
            int(self.policy.tokenizer.pad_token_id),
        )
        weights = token_weights(mask, "dapo", self.max_new_tokens, self.mean_over_ranks)
        # SFT has no advantages: the column is filled, and not read.
        finished, numbers = mask.any(dim=1), prompt_numbers(prompts)
        return Experience(ids, attention, mask, weights, mask.float(), finished, numbers)

    def _negative_log_likelihood(self, batch: Experience) -> Tensor:
        logprobs = self.policy.score(batch.ids, batch.attention, batch.mask, temperature=1.0).logprobs
        return -(batch.weights * logprobs).sum()

    def _loss_of(self, experience: Experience) -> Tensor:
        """The loss over all micro-batches; where gradients are on, these are summed on the way."""
        total = torch.zeros((), device=self.device)
        for portion in self.portions(experience):
            with self.policy.reading(portion.prompts):
                for micro in portion.batches:
                    loss = self._negative_log_likelihood(micro)
                    if loss.requires_grad:
                        self.manual_backward(loss)
                    total += loss.detach()  # a sum: the weights are those of the whole batch
        return total

    def training_step(self, batch: list[Problem], batch_idx: int) -> None:
        """One optimizer step on a batch of solutions."""
        experience = self.experience(batch)
        total = self.in_fitting_parts(lambda: self._loss_of(experience))
        norm = self.step()
        values: dict[str, Tensor | float] = {
            "loss/sft": self.mean_over_ranks(total),
            "grad_norm": norm,
            "learning_rate": self.step_learning_rate,
        }
        self.log_dict(values, batch_size=len(batch), prog_bar=True)
        self.log("global_step", float(self.trainer.global_step), batch_size=len(batch))

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Mean negative log-likelihood of a held-out solution token, in nats."""
        experience = self.experience(batch)
        total = self.in_fitting_parts(lambda: self._loss_of(experience))
        self.log("val/loss", self.mean_over_ranks(total), batch_size=len(batch), prog_bar=True)
