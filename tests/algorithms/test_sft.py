"""Supervised fine-tuning: its loss matches a plain loop, and it learns its training data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from coderl.algorithms import SFT
from coderl.data import CodeDataModule
from coderl.errors import UserError
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.problems import ProblemSource, prompts
from coderl.rollout import GenerateEngine, Sampling
from coderl.types import Problem
from tests.support import tiny

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Given(ProblemSource):
    name = "given"

    def __init__(self, train: list[Problem], test: list[Problem] | None = None) -> None:
        self.splits = {"train": train, "test": test or [], "validation": []}

    def load(self, split: str) -> list[Problem]:
        return self.splits[split]


class Recorded(SFT):
    """SFT that keeps the gradients and losses of its steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def step(self) -> torch.Tensor:
        self.gradients.append(
            {n: p.grad.clone() for n, p in self.policy.trainable().items() if p.grad is not None}
        )
        return super().step()

    def log_dict(self, dictionary: Any, *args: Any, **options: Any) -> None:
        self.losses.append(float(dictionary["loss/sft"]))
        super().log_dict(dictionary, *args, **options)


def train(source: ProblemSource, policy: Policy, steps: int = 1, **options: Any) -> Recorded:
    module = Recorded(policy=policy, **options)
    trainer = tiny.trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0)
    trainer.fit(module, datamodule=CodeDataModule(source, batch_size=3))
    return module


def stirred(folder: Path) -> Policy:
    policy = tiny.policy(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.1)
    return policy


def full(folder: Path) -> Policy:
    return Policy(str(folder), quantization="none", lora=None)


def plain_loss(policy: Policy, problems: list[Problem]) -> torch.Tensor:
    """The mean over all solution tokens, the end included, row by row and without padding."""
    losses = []
    for problem in problems:
        prompt = policy.tokenizer(problem.prompt)["input_ids"]
        solution = policy.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        answer = [*solution, policy.tokenizer.eos_token_id]
        table = policy.net(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        losses += [-table[len(prompt) + t - 1, token] for t, token in enumerate(answer)]
    return torch.stack(losses).mean()


def test_the_loss_is_the_mean_over_solution_tokens_with_the_end_token(llama: Path) -> None:
    problems = tiny.problems(3)
    policy = stirred(llama)
    expected = plain_loss(policy, problems)
    expected.backward()
    module = train(Given(problems), stirred(llama))
    assert module.losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert module.gradients[0].keys() == policy.trainable().keys()
    for name, parameter in policy.trainable().items():
        torch.testing.assert_close(module.gradients[0][name], parameter.grad, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_the_gradient_does_not_depend_on_the_micro_batch(llama: Path, size: int) -> None:
    whole = train(Given(tiny.problems(3)), stirred(llama))
    pieces = train(Given(tiny.problems(3)), stirred(llama), micro_batch_size=size)
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, gradient in whole.gradients[0].items():
        torch.testing.assert_close(pieces.gradients[0][name], gradient, atol=2e-6, rtol=2e-4)


def test_a_memorized_solution_is_generated(llama: Path) -> None:
    problems = tiny.problems(3)
    policy = full(llama)
    module = train(Given(problems), policy, steps=40, learning_rate=5e-3)
    assert module.losses[0] > 2.0 and module.losses[-1] < 0.05
    engine = GenerateEngine()
    engine.bind(policy)
    answers = engine.generate(problems, 1, Sampling(temperature=0.0, max_new_tokens=40))
    assert [a.text for a in answers] == [p.solution for p in problems]
    assert all(a.finished for a in answers)


def test_a_training_problem_without_solution_is_an_error(llama: Path) -> None:
    first, second = tiny.problems(2)
    policy = full(llama)
    with pytest.raises(UserError, match=r"tiny/1 has no solution"):
        train(Given([first, replace(second, solution=" \n")]), policy)
    assert policy.net is None  # before any weights are read


def test_held_out_problems_without_solution_and_long_ones_are_left_out(llama: Path) -> None:
    short, wordy, other = tiny.problems(3)
    wordy = replace(wordy, solution=wordy.solution + "\n# and so on" * 50)
    source = Given([short, wordy], [replace(other, id="a", split="test", solution=""), other])
    module = train(source, full(llama), max_new_tokens=60)
    assert [p.id for p in module.trainer.datamodule.problems("train")] == [short.id]  # type: ignore[attr-defined]
    assert [p.id for p in module.trainer.datamodule.problems("test")] == [other.id]  # type: ignore[attr-defined]


def test_a_chat_answer_ends_with_the_closing_fence(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path, chat_template=TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = Policy(str(folder), quantization="none", lora=LoRA(r=4), prompt_form="chat")
    module, problem = SFT(policy), tiny.problems(1)[0]
    ids = module.encode_solution(problem)
    assert ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(policy.encode(problem) + ids[:-1])
    assert text == f"<|user|>\n{problem.prompt}\n<|assistant|>\n```python\n{problem.solution}\n```"
    answer = str(tokenizer.decode(ids[:-1]))
    assert prompts.program(problem, answer, "chat") == problem.solution


def test_validation_alone_is_that_of_a_fit(llama: Path) -> None:
    """Lightning validates in inference mode, in which autograd saves nothing that could be counted."""

    class Held(Given):
        def load(self, split: str) -> list[Problem]:
            return [replace(p, split=split) for p in super().load("train")]

    module = SFT(stirred(llama), schedule="constant_with_warmup")
    data = CodeDataModule(Held(tiny.problems(3)), batch_size=3)
    trainer = tiny.trainer(max_steps=1, max_epochs=-1)
    (found,) = trainer.validate(module, datamodule=data)
    assert found["val/loss"] == pytest.approx(plain_loss(stirred(llama), tiny.problems(3)).item(), rel=1e-4)
