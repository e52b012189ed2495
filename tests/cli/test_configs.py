"""Every shipped config parses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from coderl.cli import main
from coderl.cli.config_files import config_names, configs_folder, find_config
from coderl.errors import UsageError
from coderl.publish.export import save_adapter
from tests.support import tiny

pytestmark = pytest.mark.slow

FEW = "--trainer.max_steps 1 --trainer.accelerator cpu --trainer.logger true --data.batch_size 2"
SHORT = "--model.max_new_tokens 8 --model.group_size 2 --model.evaluation.n 2 --data.limit_test 1"
OVERLAYS = ("auto-eval.yaml", "debug.yaml", "no-early-stopping.yaml", "no-wandb.yaml", "validated.yaml")
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}\n{% endif %}"


def below(name: str) -> list[str]:
    """The configs that one is laid over."""
    if name.startswith("models/") or name in OVERLAYS:
        return ["grpo.yaml"]
    return [name.replace("-tuned", "")] if name.endswith("-tuned.yaml") else []


@pytest.mark.parametrize("name", config_names())
def test_parses(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [argument for one in [*below(name), name] for argument in ("--config", one)]
    assert main(["fit", *configs, "--print_config"]) == 0, capsys.readouterr().err
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["class_path"] in ("coderl.GRPO", "coderl.PPO", "coderl.SFT")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n in config_names() if not n.startswith("models/")])
def test_trains_a_step_of_a_tiny_model_of_its_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of them are Llamas; shapes and weights are tiny and random, everything else is as shipped."""
    config = yaml.safe_load((configs_folder() / [*below(name), name][0]).read_text())
    source = config["data"]["init_args"]["source"]["class_path"]
    if source == "MBPP" and "CODERL_DATA_DIR" not in os.environ:
        pytest.skip("trains on MBPP: CODERL_DATA_DIR names no folder that holds mbpp.jsonl")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.chdir(tmp_path)
    folder = tiny.checkpoint(tmp_path / "model", chat_template=CHAT)
    args = [
        "fit",
        *[argument for one in [*below(name), name] for argument in ("-c", one)],
        *FEW.split(),
        "--trainer.default_root_dir",
        "run",
        "--model.policy.model",
        str(folder),
    ]
    if "adapter" in config["model"]["init_args"]["policy"]["init_args"]:
        args += ["--model.policy.adapter", str(save_adapter(tiny.policy(folder), tmp_path / "adapter"))]
    samples = config["model"]["class_path"] != "SFT"
    args += SHORT.split() if samples else []
    args += ["--data.source.size", "16"] if source == "EmbeddedSFT" else []
    assert main(args) == 0, capfd.readouterr().err
    summary = json.loads(Path("run", "summary.json").read_text())
    assert all(Path(path).exists() for path in summary["paths"].values())
    assert (summary["after"] is not None) == samples
    assert Path("run", "checkpoints", "last.ckpt").is_file()


def test_names_resolve_with_and_without_suffix_but_files_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in config_names():
        expected = str(configs_folder() / name)
        assert find_config(name) == expected
        assert find_config(name.removesuffix(".yaml")) == expected
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
        assert find_config(name) == name


def test_yaml_text_and_urls_are_not_looked_up_as_names() -> None:
    for text in ("trainer: {max_epochs: 1}", "{}", "a\nb", "hf://someone/config.yaml"):
        assert find_config(text) == text


def test_the_error_for_an_unknown_config_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no config 'absent\.yaml'") as caught:
        find_config("absent.yaml")
    assert all(name in str(caught.value) for name in config_names())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option", ["--model.top_p=0.9", "--model.engine.class_path=GenerateEngine --model.engine.top_k=5"]
)
def test_truncated_sampling_is_refused_with_the_reason(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", "quickstart.yaml", *option.split()]) == 2
    assert "biases the importance ratio" in capfd.readouterr().err
