"""Presets are chosen by a model's name or type, and override the shipped config, not the user."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from lightning import LightningModule

from coderl.algorithms import GRPO, SFT
from coderl.cli import main, presets, run
from coderl.cli.config_files import configs_folder
from coderl.cli.overlays import flat, merge
from coderl.data import CodeDataModule
from coderl.errors import UsageError
from coderl.model.policy import Policy
from coderl.problems import Embedded

pytestmark = pytest.mark.slow

RECIPE_MODELS = {
    "codellama/CodeLlama-7b-Python-hf": "codellama-7b",
    "codellama/CodeLlama-7b-hf": "codellama-7b",
    "codellama/CodeLlama-13b-Python-hf": "codellama-13b",
    "deepseek-ai/deepseek-coder-6.7b-base": "deepseek-coder",
    "Qwen/Qwen2.5-Coder-7B": "qwen2.5-coder",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "qwen2.5-coder",
    "bigcode/starcoder2-15b": "starcoder2",
    "Salesforce/codet5p-770m": "codet5p",
    "checkpoints/codellama-13b-python-mbpp-grpo-qlora-merged": "codellama-13b",
    "checkpoints/codellama-13b-python-mbpp-grpo-qlora-merged/epoch-2": "codellama-13b",
    "/cache/hub/models--codellama--CodeLlama-7b-Python-hf/snapshots/0a1b2c3d": "codellama-7b",
    "~/weights/./deepseek-coder-6.7b-base/": "deepseek-coder",
}
OTHERS = [
    "embedded",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "codellama/CodeLlama-34b-Python-hf",
    "codellama/CodeLlama-70b-hf",
    "Salesforce/codet5p-2b",
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Base",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen2-57B-A14B",
    "somebody/my-codellama-v113b",
    "~nobody-of-that-name/x",
    "x" * 5000,
    "codellama/another-model",
    "",
    "a/b/c/d",
]
STARCODER = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]
M = ["--model.policy.model", "bigcode/starcoder2-15b"]
FIT = "fit -c {} --model.policy.model bigcode/starcoder2-15b"


def folder_of(tmp_path: Path, name: str, kind: str) -> str:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    return str(tmp_path / name)


def shown(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The flat configuration that a call would run with, and what was printed on stderr."""
    assert main([*shlex.split(line), "--print_config"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    return {k.replace("init_args.", ""): v for k, v in flat(yaml.safe_load(out)).items()}, err


@pytest.mark.parametrize(("model", "name"), RECIPE_MODELS.items())
def test_the_original_recipes_models_have_presets_by_name(model: str, name: str) -> None:
    found = presets.choose("auto", model)
    assert found is not None and (found.name, found.why) == (name, "by the model's name")


@pytest.mark.parametrize("model", OTHERS)
def test_other_models_have_no_preset(model: str) -> None:
    assert presets.choose("auto", model) is None


@pytest.mark.parametrize(
    ("kind", "name"), [("starcoder2", "starcoder2"), ("t5", "codet5p"), ("qwen2", "qwen2.5-coder")]
)
def test_a_model_type_with_a_single_preset_is_enough(kind: str, name: str, tmp_path: Path) -> None:
    found = presets.choose("auto", folder_of(tmp_path, "mine", kind))
    assert found is not None and found.name == name and kind in found.why


def test_a_model_type_with_several_presets_is_not_enough_and_the_name_must_have_the_type(
    tmp_path: Path,
) -> None:
    assert presets.choose("auto", folder_of(tmp_path, "mine", "llama")) is None
    assert presets.choose("auto", folder_of(tmp_path, "codellama-7b-pruned", "mistral")) is None
    named = presets.choose("auto", folder_of(tmp_path, "CodeLlama-7b", "llama"))
    assert named is not None and named.name == "codellama-7b"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}', '{"other": 1}'])
def test_without_a_model_type_the_name_decides(text: str, tmp_path: Path) -> None:
    model = tmp_path / "starcoder2-3b"
    model.mkdir()
    (model / "config.json").write_text(text)
    found = presets.choose("auto", str(model))
    assert found is not None and found.name == "starcoder2"


def test_the_name_of_a_gguf_file_is_used_instead_of_its_folders() -> None:
    found = presets.choose("auto", "somewhere/weights", "deepseek-coder-6.7b-base.Q4_K_M.gguf")
    assert found is not None and found.name == "deepseek-coder"


@pytest.mark.parametrize("config", ["grpo.yaml", "ppo.yaml", "grpo"])
def test_a_preset_overrides_the_shipped_config_and_is_printed(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, said = shown(FIT.format(config), capsys)
    assert settings["model.policy.lora.target_modules"] == STARCODER
    assert settings["data.batch_size"] == 8
    assert settings["preset"] == "starcoder2"
    assert settings["model.policy.lora.r"] == 64  # what the preset does not name stays
    assert said.count("\n") == 1
    assert "preset starcoder2" in said and "batch_size 8" in said and "--preset none" in said
    assert "otherwise" not in said


def test_flags_and_own_configs_override_a_preset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model: {init_args: {learning_rate: 3.0}}\ndata.init_args.batch_size: 5"
    )
    mine = tmp_path / "mine.yaml"
    settings, said = shown(f"{FIT.format('grpo.yaml')} -c {mine} --model.max_new_tokens=99", capsys)
    assert settings["model.learning_rate"] == 3
    assert settings["data.batch_size"] == 5
    assert settings["model.max_new_tokens"] == 99
    assert settings["model.policy.lora.target_modules"] == STARCODER
    does, _, yours = said.partition("set otherwise by you: ")
    assert "target_modules" in does and "batch_size" not in does and "max_new_tokens" not in does
    assert set(yours.partition(";")[0].split(", ")) == {
        "data.batch_size",
        "model.max_new_tokens",
        "model.learning_rate",
    }
    mine.write_text("model: {class_path: GRPO, init_args: {learning_rate: 3.0}}")
    settings, _ = shown(f"fit --config={mine} -c grpo.yaml {FIT.partition('{}')[2]}", capsys)
    assert settings["model.learning_rate"] == 3e-6  # grpo.yaml came last


def test_a_complete_config_of_your_own_is_not_changed_by_a_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main([*FIT.format("grpo.yaml").split(), "--preset", "none", "--print_config"])
    whole = tmp_path / "whole.yaml"
    whole.write_text(capsys.readouterr().out.replace("preset: none", "preset: auto"))
    settings, said = shown(f"fit -c {whole}", capsys)
    plain, silent = shown(f"{FIT.format('grpo.yaml')} --preset none", capsys)
    assert {k: (plain[k], settings[k]) for k in plain if plain[k] != settings[k]} == {
        "preset": ("none", "auto")
    }
    assert "changes nothing; set otherwise by you: " in said and "target_modules" in said and not silent


ORDERS = [
    "fit -c{grpo}",
    "fit -c {path}",
    "fit -c ./{relative}",
    "fit -c {grpo} -c grpo-tuned.yaml",
    "fit --config={grpo} -c auto-eval.yaml -c no-wandb.yaml",
    "validate -c {grpo}",
]


@pytest.mark.parametrize("order", ORDERS)
def test_a_preset_overrides_the_shipped_config_however_that_is_named(
    order: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configs_folder() / "grpo.yaml"
    monkeypatch.chdir(path.parents[1])
    line = order.format(grpo="grpo.yaml", path=path, relative=path.relative_to(Path.cwd()))
    settings, said = shown(f"{line} {' '.join(M)}", capsys)
    assert settings["model.policy.lora.target_modules"] == STARCODER
    assert "lora.target_modules [q_proj, k_proj, v_proj, o_proj, c_fc, c_proj]" in said


def test_a_preset_overrides_an_overlay_before_the_shipped_config(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, _ = shown(f"fit -c no-wandb.yaml -c grpo.yaml {' '.join(M)}", capsys)
    assert settings["model.policy.lora.target_modules"] == STARCODER


def test_a_preset_overrides_a_config_before_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = {"fit": yaml.safe_load((configs_folder() / "grpo.yaml").read_text())}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(whole))
    assert main(["--config", str(tmp_path / "all.yaml"), "fit", *M, "--print_config"]) == 0
    out, err = capsys.readouterr()
    settings = yaml.safe_load(out)["model"]["init_args"]
    assert settings["policy"]["init_args"]["lora"]["init_args"]["target_modules"] == STARCODER
    assert "preset starcoder2" in err


def test_overlays_override_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    settings, _ = shown(FIT.format("ppo.yaml -c ppo-tuned.yaml"), capsys)
    assert settings["model.learning_rate"] == 1e-4
    assert settings["data.batch_size"] == 8


def test_a_preset_is_applied_to_flags_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    line = "fit --model GRPO --model.policy.model Qwen/Qwen2.5-Coder-7B --data CodeDataModule"
    settings, said = shown(f"{line} --data.source MBPP --data.batch_size 3", capsys)
    assert (settings["model.max_new_tokens"], settings["data.batch_size"]) == (768, 3)
    assert settings["model.learning_rate"] == 5e-6 and "learning_rate" in said


def test_sft_takes_only_policy_settings_from_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = shown(FIT.format("sft.yaml") + " --preset none", capsys)
    settings, _ = shown(FIT.format("sft.yaml"), capsys)
    moved = {k for k in plain if plain[k] != settings[k]}
    assert moved == {"model.policy.lora.target_modules", "preset"}


def test_a_preset_can_be_given_by_name_or_as_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("codet5p", "models/codet5p.yaml"):
        settings, said = shown(f"{FIT.format('grpo.yaml')} --preset {name}", capsys)
        assert settings["model.policy.lora.target_modules"] == ["q", "k", "v", "o", "wi", "wo"]
        assert "(asked for)" in said
    own = tmp_path / "own.yaml"
    own.write_text("model: {init_args: {learning_rate: 7.0e-6}}")
    settings, _ = shown(f"{FIT.format('grpo.yaml')} --preset {own}", capsys)
    assert settings["model.learning_rate"] == 7e-6 and settings["preset"] == str(own)


def test_a_preset_can_be_given_as_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    settings, _ = shown("fit -c quickstart.yaml -c models/starcoder2.yaml", capsys)
    assert settings["model.policy.lora.target_modules"] == STARCODER
    assert not any(key.startswith("match") for key in settings)


@pytest.mark.parametrize(
    ("asked", "text", "message"),
    [
        ("codelama-7b", None, "did you mean codellama-7b?"),
        ("nothing-like-it", None, "there are auto, none, codellama-13b"),
        ("own.yaml", "model: [", "own.yaml cannot be used"),
        ("own.yaml", "- 1", "own.yaml cannot be used"),
        ("own.yaml", "data: null", "data must hold init_args"),
        ("own.yaml", "model: {learning_rate: 7.0e-6}", "model must hold init_args"),
        ("own.yaml", "model: {class_path: PPO, init_args: {}}", "model must hold init_args"),
        ("x" * 5000, None, "there are auto, none"),
        (
            "own.yaml",
            "model: {init_args: {learning_rat: 1}}",
            "does not fit: model: GRPO has no argument 'learning_rat'",
        ),
    ],
)
def test_a_wrong_preset_is_refused_in_one_line(
    asked: str, text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(asked).write_text(text)
    with pytest.raises(UsageError, match="preset") as caught:
        run(["fit", "-c", "grpo.yaml", "--preset", asked])
    assert message in str(caught.value) and "\n" not in str(caught.value)


POLICY = {"class_path": "Policy", "init_args": {"model": "bigcode/starcoder2-15b"}}
DATA = {"class_path": "CodeDataModule", "init_args": {"source": {"class_path": "MBPP"}}}
WHOLE = {"class_path": "GRPO", "init_args": {"policy": POLICY, "learning_rate": 1e-4}}
SHORT = {"class_path": "GRPO", "init_args": {"policy": POLICY["init_args"], "learning_rate": 1e-4}}
CALLS: list[Any] = [
    {"subcommand": "fit", "fit": {"model": WHOLE, "data": DATA}},
    {"subcommand": "fit", "fit": {"model": SHORT, "data": DATA}},
    {"fit": {"model": WHOLE, "data": DATA}},
    {"subcommand": "fit", "fit.model": WHOLE, "fit.data": DATA},
    Namespace(subcommand="fit", fit=Namespace(model=WHOLE, data=DATA)),
]


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_a_configuration_from_python_overrides_a_preset(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is captured before any class is instantiated."""
    seen = []

    class Enough(Exception):
        pass

    def look(self: Any) -> None:
        seen.append(self.config.fit.model.init_args)
        raise Enough

    monkeypatch.setattr("coderl.cli.trainer.CoderlCLI.before_instantiate_classes", look)
    before = repr(call)
    with pytest.raises(Enough):
        run(call)
    assert list(seen[0].policy.init_args.lora.init_args.target_modules) == STARCODER
    assert seen[0].learning_rate == 1e-4
    assert repr(call) == before


class Narrow(GRPO):
    """An algorithm of one's own with fewer arguments."""

    def __init__(self, policy: Policy, learning_rate: float = 1.0) -> None:
        super().__init__(policy, learning_rate=learning_rate)


class Own(CodeDataModule):
    """Data of one's own."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__(Embedded())


class Warm(SFT):
    """A warm start of one's own."""


class Other(LightningModule):
    """No policy, but an argument of that name."""

    def __init__(self, model: str = "starcoder2") -> None:
        super().__init__()


LAYERS = "policy.lora.target_modules"


@pytest.mark.parametrize(
    ("flags", "moved"),
    [
        ("--model tests.cli.test_presets.Narrow", {LAYERS}),
        ("--model tests.cli.test_presets.Warm", {LAYERS}),
        ("--model tests.cli.test_presets.Other", set()),
        ("-c tiny-sft.yaml", set()),
    ],
)
def test_classes_get_the_settings_of_a_preset_that_they_take(
    flags: str, moved: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = "" if "-c" in flags else "--data tests.cli.test_presets.Own"
    model = "" if "Other" in flags else " ".join(M)
    plain, _ = shown(f"fit {flags} {base} {model} --preset none", capsys)
    settings, _ = shown(f"fit {flags} {base} {model}", capsys)
    differs = {key.removeprefix("model.") for key in settings if plain.get(key) != settings[key]}
    assert differs - {"preset", "learning_rate"} == moved


@pytest.mark.parametrize("value", ["7", "[a]", "{a: 1}"])
def test_a_preset_that_is_no_string_is_refused_in_one_line(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"preset: {value}")
    assert main(["fit", "-c", "grpo.yaml", "-c", str(tmp_path / "mine.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_configurations_are_merged() -> None:
    under, over = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2, 3], "e": None}, "d": {"f": 3}}
    both = merge(under, over)
    assert both == {"a": {"b": 1, "c": [2, 3], "e": None}, "d": {"f": 3}}
    assert flat(both) == {"a.b": 1, "a.c": [2, 3], "a.e": None, "d.f": 3}
    assert merge(under, {}) == under and merge({}, over) == over and merge(over, over) == over


@pytest.mark.parametrize("path", sorted(presets.models_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_the_readmes_table_of_presets_lists_what_differs_from_grpo(path: Path) -> None:
    shipped = flat(yaml.safe_load((configs_folder() / "grpo.yaml").read_text()))
    differs = {k: v for k, v in flat(yaml.safe_load(path.read_text())).items() if shipped.get(k, v) != v}
    text = (configs_folder() / "README.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith(f"| `models/{path.name}`")]
    listed = {float(number) for number in re.findall(r"\d[\de.-]*", row.split("|")[3])}
    assert listed == {float(value) for value in differs.values() if isinstance(value, int | float)}
    assert ("layers" in row) == any(key.endswith("target_modules") for key in differs)
