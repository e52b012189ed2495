from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coderl.errors import UserError
from coderl.runs import folder as runs
from coderl.runs.folder import RunFolder, RunName, is_epoch, parse_run_name, run_name, short_name


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("codellama/CodeLlama-7b-Python-hf", "codellama-7b-python"),
        ("deepseek-ai/deepseek-coder-6.7b-base", "deepseek-coder-6.7b-base"),
        ("Qwen/Qwen2.5-Coder-7B", "qwen2.5-coder-7b"),
        ("/models/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4-1"),
        ("models/mine/", "mine"),
    ],
)
def test_short_names_are_those_of_the_original_recipe(model: str, short: str) -> None:
    assert short_name(model) == short


def test_run_name_is_that_of_the_original_recipe() -> None:
    name = run_name("codellama/CodeLlama-7b-Python-hf", "MBPP", "GRPO")
    assert name == "codellama-7b-python-mbpp-grpo-qlora"


@pytest.mark.parametrize("model", ["embedded", "codellama/CodeLlama-7b-Python-hf", "a-b/c.d-e"])
@pytest.mark.parametrize("dataset", ["mbpp", "HumanEvalPlus", "my-problems", "my-own.problems_2"])
def test_a_run_name_gives_its_parts_back(model: str, dataset: str) -> None:
    found = parse_run_name(run_name(model, dataset, "GRPO"))
    assert found == RunName(short_name(model), dataset.lower().replace("-", "_"), "grpo")


@pytest.mark.parametrize("dataset", ["mbpp", "humaneval", "mbppplus", "humanevalplus", "embedded"])
def test_names_of_data_sets_stand_in_run_names_as_they_are(dataset: str) -> None:
    assert run_name("tiny", dataset, "ppo") == f"tiny-{dataset}-ppo-qlora"


@pytest.mark.parametrize(
    "name", ["mine", "tiny-qlora", "tiny-mbpp-qlora", "tiny-mbpp-ppo", "tiny-mbpp-ppo-qlora-merged", ""]
)
def test_other_names_are_no_run_names(name: str) -> None:
    assert parse_run_name(name) is None


@given(st.text(max_size=30))
def test_run_name_is_one_plain_path_component(model: str) -> None:
    name = run_name(model, "mbpp", "grpo")
    assert Path(name).name == name
    assert name.isascii()
    assert not name.startswith((".", "-"))


def test_merged_folder_lies_beside_the_run() -> None:
    assert RunFolder("checkpoints/a-qlora").merged == Path("checkpoints/a-qlora-merged")
    assert RunFolder("checkpoints/smollm2-q4.1/").merged == Path("checkpoints/smollm2-q4.1-merged")


@pytest.mark.parametrize(
    ("model", "run"),
    [
        ("a/run/adapter", "a/run"),
        ("a/run-merged", "a/run"),
        ("a/run-merged/epoch-3", None),
        ("a/run", None),
        ("a/-merged", None),
        (".", None),
        ("/", None),
    ],
)
def test_the_run_that_a_model_was_made_by(model: str, run: str | None) -> None:
    found = RunFolder.of_model(Path(model))
    assert (found and found.path) == (run and Path(run))


def test_folders_of_epochs_are_known_by_their_names() -> None:
    assert is_epoch(RunFolder("run").merged_epoch(12).name)
    assert not is_epoch("epoch-") and not is_epoch("epoch-1-merged") and not is_epoch("run")


@pytest.mark.parametrize(
    ("file", "known"),
    [
        ("summary.json", True),
        ("config.yaml", True),
        ("logs/version_0/metrics.csv", True),
        ("mine/version_0/config.yaml", True),
        ("console.log", False),
        ("metrics.csv", False),
        ("adapter/config.yaml", False),
    ],
)
def test_a_run_is_known_by_its_files(tmp_path: Path, file: str, known: bool) -> None:
    assert not RunFolder(tmp_path).is_run()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert RunFolder(tmp_path).is_run() is known


def test_only_an_absent_or_empty_folder_is_fresh(tmp_path: Path) -> None:
    RunFolder(tmp_path / "absent").require_fresh()
    RunFolder(tmp_path).require_fresh()
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(UserError, match="default_root_dir"):
        RunFolder(tmp_path).require_fresh()
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "metrics.csv").require_fresh()


def test_a_folder_with_files_of_a_failed_start_alone_is_fresh(tmp_path: Path) -> None:
    config = tmp_path / "logs" / "version_0" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.touch()
    RunFolder(tmp_path).require_fresh()
    (config.parent / "metrics.csv").touch()
    with pytest.raises(UserError, match="not empty"):
        RunFolder(tmp_path).require_fresh()


def test_refusal_names_the_checkpoint_to_resume_from(tmp_path: Path) -> None:
    for age, name in enumerate(["b.ckpt", "deep/a.ckpt"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    assert RunFolder(tmp_path).latest_checkpoint() == tmp_path / "deep/a.ckpt"
    with pytest.raises(UserError, match=r"--ckpt_path .*deep/a\.ckpt"):
        RunFolder(tmp_path).require_fresh()


def test_resume_command_names_the_runs_own_config(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.ckpt"
    assert (
        RunFolder(tmp_path).resume_command(checkpoint)
        == f"coderl fit --config CONFIG --ckpt_path {checkpoint}"
    )
    (tmp_path / "config.yaml").touch()
    assert f"--config {tmp_path / 'config.yaml'} " in RunFolder(tmp_path).resume_command(checkpoint)


def test_resume_command_names_the_config_of_the_latest_start(tmp_path: Path) -> None:
    for version in ("version_10", "version_0", "version_2"):  # a copied run has lost its times
        config = tmp_path / "logs" / version / "config.yaml"
        config.parent.mkdir(parents=True)
        config.touch()
    chosen = tmp_path / "logs/version_10/config.yaml"
    assert f"--config {chosen} " in RunFolder(tmp_path).resume_command(tmp_path / "last.ckpt")


def test_a_config_yaml_of_wandb_is_not_the_runs_own(tmp_path: Path) -> None:
    own, other = tmp_path / "logs/version_0/config.yaml", tmp_path / "wandb/run-1/files/config.yaml"
    for path in (own, other):
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(own, (1, 1))
    assert RunFolder(tmp_path).latest_config() == own


def test_without_a_logger_the_configs_are_numbered(tmp_path: Path) -> None:
    for name in ("config-10.yaml", "config.yaml", "config-2.yaml"):
        (tmp_path / name).touch()
    names = [path.name for path in RunFolder(tmp_path).configs()]
    assert names == ["config.yaml", "config-2.yaml", "config-10.yaml"]


def test_a_debug_run_replaces_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (runs.DEBUG, RunFolder(runs.DEBUG).merged, tmp_path / "elsewhere" / "debug"):
        folder.mkdir(parents=True)
        (folder / "weights").touch()
    with pytest.raises(UserError, match="not empty"):  # whose is it?
        RunFolder(runs.DEBUG).require_fresh()
    for folder in (runs.DEBUG, tmp_path / "elsewhere" / "debug"):
        (folder / "console.log").touch()
    RunFolder(runs.DEBUG).require_fresh()
    assert not runs.DEBUG.exists() and not RunFolder(runs.DEBUG).merged.exists()
    with pytest.raises(UserError, match="not empty"):
        RunFolder(tmp_path / "elsewhere" / "debug").require_fresh()


def test_a_debug_folder_that_is_a_link_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("console.log", "weights"):
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mine" / name).touch()
    runs.DEBUG.parent.mkdir()
    runs.DEBUG.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="not empty"):
        RunFolder(runs.DEBUG).require_fresh()
    assert (tmp_path / "mine" / "weights").exists() and runs.DEBUG.is_symlink()
