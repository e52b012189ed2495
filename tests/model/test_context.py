"""Prompt and answer together are no longer than what a model reads, or nothing starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from coderl.algorithms import GRPO, SFT
from coderl.data import CodeDataModule
from coderl.errors import UsageError
from coderl.evaluation import EvaluationSettings
from coderl.model.adapters import LoRA
from coderl.model.architectures import context_length
from coderl.model.policy import Policy
from coderl.problems import ProblemSource
from coderl.types import Problem
from tests.support import tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e6}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "options", "longest"),
    [
        ("llama", {"max_position_embeddings": 100}, 100),
        ("gpt2", {"n_positions": 100}, 100),
        ("qwen2", {"max_position_embeddings": 100, "rope_scaling": YARN}, 400),
        ("qwen2", {"max_position_embeddings": 400, "rope_scaling": YARN}, 400),
        ("llama", {"max_position_embeddings": 400, "rope_scaling": LLAMA3}, 400),
        # DeepSeek-Coder's number is multiplied already, Vicuna's is not.
        ("llama", {"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 4.0}}, 400),
        ("falcon", {"max_position_embeddings": 100, "alibi": True}, None),
        ("falcon", {"max_position_embeddings": 100, "alibi": False}, 100),
        ("gemma3", {"text_config": {"max_position_embeddings": 100}}, 100),
        ("gemma3_text", {"max_position_embeddings": 100}, 100),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("t5", {}, None),
    ],
)
def test_what_a_model_reads_is_read_from_its_configuration(
    family: str, options: dict[str, Any], longest: int | None
) -> None:
    assert context_length(AutoConfig.for_model(family, **options)) == longest


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads 200 tokens."""
    return tiny.checkpoint(tmp_path_factory.mktemp("small"), max_position_embeddings=200)


def test_a_prompt_with_its_answer_may_fill_the_context_and_no_more(small: Path, tmp_path: Path) -> None:
    policy = Policy(str(small))
    policy.require_context(160, 40, "")
    with pytest.raises(UsageError) as caught:
        policy.require_context(161, 40, "{known} together")
    reason = "reads 200 tokens at most, not prompts of 161 and answers of 40 tokens: 200 together"
    assert str(caught.value) == f"{small} {reason}"
    assert policy.net is None, "before the weights load"
    Policy(str(tiny.checkpoint(tmp_path / "t5", "t5"))).require_context(10**6, 10**6, "")


class Given(ProblemSource):
    def __init__(self, longest: int = 0) -> None:
        self.longest = longest

    def load(self, split: str) -> list[Problem]:
        if split != "train":
            return []
        solution = "def f(x):\n    return x"
        long = Problem("long", "a " * self.longest, tests=("assert f(1)",), solution=solution)
        return [*tiny.problems(2), long]


def refusal(module: GRPO | SFT, longest: int = 0) -> str:
    """The error of a fit that starts with a prompt of so many words."""
    trainer = tiny.trainer(max_steps=1)
    with pytest.raises(UsageError, match="reads 200 tokens at most") as caught:
        trainer.fit(module, datamodule=CodeDataModule(Given(longest)))
    assert module.policy.net is None, "before the weights load"
    (line,) = str(caught.value).splitlines()
    return line


def test_a_fit_whose_rows_may_be_longer_than_the_context_does_not_start(small: Path) -> None:
    policy = Policy(str(small), quantization="none", lora=LoRA(r=2))
    lengths = "lower model.max_prompt_tokens or model.max_new_tokens, to 200 together at most"
    short = max(len(policy.encode(problem)) for problem in Given().load("train"))
    assert refusal(GRPO(policy, max_new_tokens=201 - short)).endswith(lengths)
    assert refusal(SFT(policy), longest=200).endswith(lengths)
    # A prompt that is left out does not count.
    evaluation = EvaluationSettings(max_length_generation=201)
    line = refusal(GRPO(policy, max_new_tokens=8, max_prompt_tokens=100, evaluation=evaluation), longest=200)
    assert line.endswith("not 201 tokens: set model.evaluation.max_length_generation to 200 or less")


def test_a_supervised_fit_counts_solutions_as_they_are(small: Path) -> None:
    """Its options allow longer ones than there are."""
    module = SFT(Policy(str(small), quantization="none", lora=LoRA(r=2)), max_new_tokens=4096)
    tiny.trainer(max_steps=1).fit(module, datamodule=CodeDataModule(Given(), batch_size=3))
    assert module.trainer.global_step == 1
