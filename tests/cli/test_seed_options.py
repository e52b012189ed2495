"""Every option of the original scripts has a replacement: the README's tables are right, and run."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from coderl.cli import main
from coderl.cli.overlays import flat
from coderl.cli.presets import choose, models_folder
from tests.support import tiny

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Coming from `train.py`\n")[2].partition("\n## ")[0]
SHORT = (
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.max_steps 1 --model.policy.lora.r 4 "
    "--data.limit_train 2 --data.limit_test 1 --model.max_new_tokens 8 --model.evaluation.n 2 "
    "--model.evaluation.max_length_generation 200"
)
WEIGHTS = "--model.policy.model"


def table(number: int) -> list[list[str]]:
    """The cells of one of the section's tables; a bar behind a backslash is part of its cell."""
    tables = re.findall(r"(?:^\|.*\n)+", SECTION, flags=re.MULTILINE)
    rows = [re.split(r"(?<!\\)\|", line.strip("|\n")) for line in tables[number].splitlines()]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in rows[2:]]


def code(cell: str) -> list[str]:
    return re.findall("`(.+?)`", cell)


WAYS = [(old, code(new)[0]) for old, new in table(0)]
FITS = [(old, new) for old, new in WAYS if new.startswith("coderl fit")]
EFFECTS: dict[str, dict[str, Any]] = {
    "python train.py ppo 1`": {"trainer.devices": [1], "model.class_path": "coderl.PPO"},
    "python train.py grpo 0": {
        "trainer.devices": [0],
        "model.class_path": "coderl.GRPO",
        "model.policy.model": "deepseek-ai/deepseek-coder-6.7b-base",
        "model.learning_rate": 2e-6,
    },
    "--debug`": {"trainer.max_steps": 2, "data.batch_size": 2},
    "--no-wandb": {"trainer.logger": True},
    "--auto-eval": {"trainer.callbacks.PostFit.tasks": ["mbpp", "humaneval"]},
    "--save-merged-epochs": {"trainer.callbacks.MergedCheckpoints.every_n_epochs": 1},
    "--no-early-stopping": {"trainer.callbacks.RewardStopping.patience": None},
    "--batch-size 8": {"data.batch_size": 8},
    "--dataset mbpp": {"data.source.class_path": "coderl.problems.MBPP"},
    "--dataset humaneval`": {"data.source.class_path": "coderl.problems.HumanEval"},
    "--epochs 5": {"trainer.max_epochs": 5},
    "--dataset humaneval --batch-size 4": {
        "data.source.class_path": "coderl.problems.HumanEval",
        "data.batch_size": 4,
        "trainer.max_epochs": 3,
        "trainer.callbacks.PostFit.tasks": ["mbpp", "humaneval"],
    },
}
"""What must stand in the configuration, by the beginning of the option's cell."""
OPTIONS = re.findall(
    r"\S+",
    """
ppo grpo --debug --no-wandb --auto-eval --batch-size --dataset --epochs --save-merged-epochs
--no-early-stopping --adapter_model_id --output_dir --device --push_to_hub --hub_model_id .yaml
""",
)
SETTINGS = re.findall(
    r"\S+",
    """
use_4bit bnb_4bit_compute_dtype bnb_4bit_quant_type lora_r lora_alpha lora_dropout
lora_target_modules per_device_train_batch_size gradient_accumulation_steps learning_rate
num_train_epochs max_seq_length ppo_epochs cliprange target_kl num_samples kl_coeff clip_range
max_reward min_reward syntax_penalty quality_bonus timeout
""",
)


def settings(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration of a call, flat; of callbacks the last of each class counts."""
    assert main([*arguments, "--print_config"]) == 0, capsys.readouterr().err
    config = yaml.safe_load(capsys.readouterr().out)
    listed = config["trainer"].pop("callbacks") or []
    callbacks = {c["class_path"].rpartition(".")[2]: c.get("init_args", {}) for c in listed}
    config["trainer"]["callbacks"] = callbacks
    return {key.replace("init_args.", ""): value for key, value in flat(config).items()}


def test_every_option_of_the_original_scripts_has_a_row() -> None:
    before = " ".join(old for old, _ in WAYS)
    assert [option for option in OPTIONS if option not in before] == []
    before = " ".join(old for old, _ in table(1))
    assert [setting for setting in SETTINGS if setting not in before] == []


@pytest.mark.parametrize("old", EFFECTS)
def test_a_replacement_does_what_the_original_option_did(
    old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [new] = [new for cell, new in FITS if cell.startswith(f"`{old}")]
    found = settings(shlex.split(new)[1:], capsys)
    assert {key: found[key] for key in EFFECTS[old]} == EFFECTS[old]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by the method's table, under names that have presets."""
    folder = tmp_path_factory.mktemp("weights")
    t5 = tiny.checkpoint(folder / "codet5p-770m", "t5")
    return {"codet5p": t5, "": tiny.checkpoint(folder / "CodeLlama-7b-Python-hf")}


@pytest.mark.parametrize("new", dict.fromkeys(new for _, new in FITS))
def test_a_replacement_runs(
    new: str,
    weights: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Weights are tiny and random, steps are few, W&B is off; everything else is as it stands."""
    if "HumanEval" not in new and "CODERL_DATA_DIR" not in os.environ:
        pytest.skip("trains on MBPP: CODERL_DATA_DIR names no folder that holds mbpp.jsonl")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    if "my.yaml" in new:
        Path("my.yaml").write_text((models_folder().parent / "grpo.yaml").read_text())
    model = weights["codet5p" if "codet5p" in new else ""]
    arguments = [*shlex.split(new)[1:], WEIGHTS, str(model), *SHORT.split()]
    assert main(arguments) == 0, capfd.readouterr().err
    [run] = [path for path in Path("checkpoints").iterdir() if not path.name.endswith("-merged")]
    name = r"(codellama-7b-python|codet5p-770m)-(mbpp|humaneval)-(ppo|grpo)-qlora"
    assert re.fullmatch("debug" if "debug.yaml" in new else name, run.name)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 1 or "inner_epochs" not in new
    assert ("humaneval" in summary["tasks"] and "mbpp" in summary["tasks"]) == ("auto-eval" in new)
    merged = Path("checkpoints", f"{run.name}-merged")
    assert (merged / "epoch-1" / "config.json").is_file() == ("MergedCheckpoints" in new)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_settings_in_the_table_are_those_of_the_shipped_configs(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [new for old, new in table(1) if old.partition(":")[0].lower() == method or ":" not in old]
    flags = [word for new in rows for part in code(new) if part[:2] == "--" for word in shlex.split(part)]
    assert len(flags) > 2 * len(rows)
    call = ["fit", "-c", f"{method}.yaml", "--preset", "none"]
    assert settings([*call, *flags], capsys) == settings(call, capsys)


def test_the_models_have_the_presets_that_the_table_names() -> None:
    for model, preset in table(3):
        found = choose("auto", code(model)[0])
        assert found is not None and found.name == code(preset)[0]
    assert {code(preset)[0] for _, preset in table(3)} == {path.stem for path in models_folder().iterdir()}


def test_merge_and_evaluate_are_called_as_they_were(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    from coderl.publish.export import save_adapter

    monkeypatch.chdir(tmp_path)
    save_adapter(tiny.policy(weights[""]), tmp_path / "DIR")
    [merging] = [new for old, new in WAYS if old.startswith("`python merge_adapter")]
    [pushing] = [new for old, new in WAYS if "push_to_hub" in old]
    [scoring] = [new for old, new in WAYS if "accelerate" in old]
    assert main(shlex.split(merging)[1:]) == 0, capfd.readouterr().err
    assert (tmp_path / "OUT" / "model.safetensors").is_file()
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(shlex.split(pushing)[1:]) == 1
    assert "token" in capfd.readouterr().err
    if "CODERL_DATA_DIR" in os.environ:
        assert main([*shlex.split(scoring)[1:], "--limit", "1"]) == 0, capfd.readouterr().err
