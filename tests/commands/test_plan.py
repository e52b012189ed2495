"""``coderl doctor --plan``: what a fit will take, without reading weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coderl.cli import main
from coderl.commands.doctor.plan import Fit, Shape, plan, shape_of
from coderl.model import memory
from coderl.model.adapters import LoRA
from tests.support import tiny

GB = 10**9
FIT = Fit(samples=96, problems=12, prompt=512, completion=512)
SEVEN_B = Shape(
    weights=4_200_000_000,
    copy=13_500_000_000,
    trained=160_000_000,
    cost=memory.TokenCost(4.5e6, 5e6, 5e5),
    cache=524_288,
    layers=32,
    width=8192,
    vocabulary=32_000,
)


def written(folder: Path, **settings: object) -> Path:
    """A folder with a model's config.json and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | settings))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_models_measures_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    policy = tiny.policy(tiny.checkpoint(tmp_path / "model", family), family).eval()
    base = policy.base
    lora = policy.lora
    assert lora is not None
    found = shape_of(policy.source, "none", torch.float32, lora, family)
    trained = sum(p.numel() for p in policy.trainable().values())
    assert found.trained == trained
    assert found.weights == found.copy == 4 * (sum(p.numel() for p in base.parameters()) - trained)
    real = memory.token_cost(base)
    assert found.cost.read == pytest.approx(real.read, rel=0.02)
    assert found.cost.attended == pytest.approx(real.attended, rel=0.1, abs=0.02 * real.read)
    assert found.cache == memory.cache_bytes(base.config, 4)


def test_nf4_takes_a_little_over_half_a_byte_a_weight(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 100}
    folder = written(tmp_path / "model", num_hidden_layers=4, **shape)
    found = shape_of(str(folder), "nf4", torch.bfloat16, LoRA(r=8), "it")
    linear = 4 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert found.weights == pytest.approx(0.5625 * linear + 2 * 2 * 100 * 512, rel=0.01)


def test_more_memory_is_used_for_more_at_a_time() -> None:
    sizes = [plan(SEVEN_B, FIT, "cuda", gb * GB, GB // 2) for gb in (16, 24, 40, 80, 141)]
    assert all(found.peak <= found.total for found in sizes)
    assert [found.update for found in sizes] == sorted(found.update for found in sizes)
    copies = ["plain copy to decode from" in found.parts for found in sizes]
    assert copies == [False, False, True, True, True]
    assert "with gradient checkpointing" in sizes[1].lines[1]
    assert "96 of 96 sequences" in sizes[-1].lines[0]


def test_what_the_user_sets_is_an_upper_limit() -> None:
    few = plan(SEVEN_B, replace(FIT, sequences=4, rows=1, copy=False), "cuda", 80 * GB, 0)
    assert "rollouts: 4 of 96" in few.lines[0] and "updates: 1 of 96" in few.lines[1]
    assert "plain copy to decode from" not in few.parts
    assert few.peak < plan(SEVEN_B, FIT, "cuda", 80 * GB, 0).peak


def test_supervised_tuning_samples_nothing() -> None:
    found = plan(SEVEN_B, replace(FIT, samples=0), "cuda", 80 * GB, 0)
    assert found.rollout == 0 and len(found.lines) == 1 and "of 12 longest" in found.lines[0]


@pytest.mark.slow
def test_a_plan_is_a_table_or_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--plan", "quickstart.yaml --model.max_new_tokens 32"]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("embedded: GB of memory") and "at the peak" in said and "rollouts: 96 of 96" in said
    )
    assert main(["doctor", "--json", "--plan", "quickstart.yaml", "--gpu_memory", "24"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["total"] == 24 * GB
    assert found["peak"] == sum(found["parts"].values()) + max(found["rollout"], found["update"])


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    folder = written(tmp_path / "CodeLlama-7b", **shape)
    line = ["doctor", "--plan", f"grpo.yaml --model.policy.model {folder}", "--gpu_memory"]
    assert main([*line, "6"]) == 1
    said = capsys.readouterr()
    assert (
        "base model" in said.out and "does not fit: " in said.err and "--model.policy.lora.r 16" in said.err
    )


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--gpu_memory", "24"], "give it with --plan", 2),
        (["--plan", "quickstart.yaml", "--gpu_memory", "0"], "give it with --plan", 2),
        (["--plan", "no-such.yaml"], "no-such.yaml", 1),
        (["--plan", "quickstart.yaml --model.policy.model ./nowhere"], "nowhere", 1),
        (["--plan", "quickstart.yaml --model.grup_size 3"], "grup_size", 1),
    ],
)
def test_a_plan_of_nothing_is_one_clear_line(
    arguments: list[str], said: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
