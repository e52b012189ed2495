"""Adapters on disk and on a model; one that does not fit is refused in one line, never used in part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coderl.errors import UserError
from coderl.model.adapter_files import adapter_base, is_adapter, read_adapter_config
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.publish.export import save_adapter
from tests.support import tiny


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    policy = tiny.policy(llama)
    tiny.stir(policy)
    return save_adapter(policy, tmp_path / "adapter")


def load(model: Path, adapter: Path) -> Policy:
    policy = Policy(str(model), quantization="none", adapter=str(adapter))
    policy.load(torch.device("cpu"))
    return policy


def refused(model: Path, adapter: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(model, adapter)
    message = str(caught.value)
    assert "\n" not in message
    assert str(adapter) in message
    return message


def test_a_saved_adapter_names_its_base(llama: Path, saved: Path) -> None:
    assert is_adapter(saved) and not is_adapter(llama) and not is_adapter(saved / "nowhere")
    assert adapter_base(saved) == str(llama)
    assert read_adapter_config(saved)["peft_type"] == "LORA"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}', None])
def test_an_adapter_that_is_damaged_or_missing_names_no_base(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    assert adapter_base(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "words"), [("{", "malformed JSON"), ("[]", "is damaged"), (None, "no adapter_config.json in")]
)
def test_an_adapter_config_that_cannot_be_read_is_one_line(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_adapter_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_that_fits_is_loaded_whole(llama: Path, saved: Path) -> None:
    stored = load_file(saved / "adapter_model.safetensors")
    weights = load(llama, saved).trainable()
    assert len(weights) == len(stored) > 0
    for name, value in weights.items():
        assert torch.equal(value, stored[name.removeprefix("net.").replace(".default.", ".")])


def test_an_adapter_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tiny.checkpoint(tmp_path / "other", "starcoder2")
    assert "does not fit its base" in refused(other, saved)
    wide = tiny.checkpoint(tmp_path / "wide", hidden_size=128)
    assert "could not be loaded" in refused(wide, saved)


def test_an_adapter_without_some_of_its_weights_is_refused(llama: Path, saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[min(weights)]
    save_file(weights, path)
    assert "does not fit its base" in refused(llama, saved)


@pytest.mark.parametrize("damage", ["cut", "gone", "config"])
def test_a_damaged_adapter_is_refused(damage: str, llama: Path, saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        (saved / "adapter_config.json").write_text("{")
    assert "could not be loaded" in refused(llama, saved)


def test_a_folder_without_an_adapter_is_refused(llama: Path, saved: Path) -> None:
    shutil.move(saved / "adapter_config.json", saved / "config.json")
    assert json.loads((saved / "config.json").read_text())
    assert "no adapter_config.json" in refused(llama, saved)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("family", "config", "targets", "odd", "layers"),
    [
        (
            "starcoder2",
            {},
            LoRA().target_modules,
            "gate_proj, up_proj, down_proj",
            tiny.LINEARS["starcoder2"],
        ),
        (
            "t5",
            {"feed_forward_proj": "gated-gelu"},
            tiny.LINEARS["t5"],
            "wi",
            ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        ),
    ],
)
def test_target_modules_of_another_family_are_refused_though_some_fit(
    tmp_path: Path,
    family: str,
    config: dict[str, Any],
    targets: tuple[str, ...],
    odd: str,
    layers: tuple[str, ...],
    quantization: str,
) -> None:
    """Otherwise peft leaves the layers out without a word."""
    folder = tiny.checkpoint(tmp_path, family, **config)
    with pytest.raises(UserError) as caught:
        tiny.policy(folder, family, quantization=quantization, lora=LoRA(r=4, target_modules=targets))
    (line,) = str(caught.value).splitlines()
    assert f"target_modules {odd} match no layer of {folder}, whose blocks have {', '.join(layers)}: " in line
    assert "policy.lora.target_modules" in line and "--preset" in line
    tiny.policy(folder, family, quantization=quantization, lora=LoRA(r=4, target_modules=layers))
