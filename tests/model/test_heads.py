"""Scoring multiplies hidden states with the head: models whose logits are something else are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from coderl.errors import UserError
from coderl.model import architectures
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from tests.support import tiny

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
PER_LAYER = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8}
GEMMA_3N = PER_LAYER | {
    "layer_types": ["full_attention"] * 2,
    "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.0, 0.0],
    "altup_num_inputs": 2,
    "laurel_rank": 4,
}
GEMMA_4 = PER_LAYER | {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8}
T5 = {"vocab_size": 300, "decoder_start_token_id": 0} | tiny.T5_SHAPE

AFTER_THE_HEAD: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gemma3_text": {"final_logit_softcapping": 30.0},
    "gemma3n_text": GEMMA_3N,
    "gemma4_text": GEMMA_4 | {"final_logit_softcapping": 30.0},
    "vaultgemma": {},
    "nanochat": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "cohere": {},
    "cohere2": {},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0} | EXPERTS,
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
}
BEFORE_THE_HEAD: dict[str, dict[str, Any]] = {"modernbert-decoder": {}, "bert": {"is_decoder": True}}
SCORED: dict[str, dict[str, Any]] = {
    **{family: {} for family in ("llama", "qwen2", "qwen3", "starcoder2", "mistral", "phi", "phi3", "gemma")},
    **{
        family: {}
        for family in ("gpt_neox", "gpt_bigcode", "stablelm", "olmo2", "glm4", "seed_oss", "granite")
    },
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "minimax"), EXPERTS),
    "gpt2": GPT2,
    "gemma3_text": {},
    "gemma4_text": GEMMA_4,
    "t5": T5,
    "t5 with a head of its own": T5 | {"tie_word_embeddings": False},
}


def model_of(family: str, **options: Any) -> PreTrainedModel:
    """A tiny random model, in training mode."""
    kind = family.partition(" ")[0]
    known = AutoConfig.for_model(kind)
    # Gemma 4's configuration refuses to be asked for what varies over its layers.
    shape = {key: value for key, value in SHAPE.items() if key in known.to_dict() or hasattr(known, key)}
    config = AutoConfig.for_model(kind, **((shape if kind != "t5" else {}) | options))
    torch.manual_seed(0)
    model = architectures.auto_class(config).from_config(config)
    tiny._make_lively(model)
    if kind == "t5":
        model.generation_config.decoder_start_token_id = 0
    return model.train()  # type: ignore[no-any-return]


def refusal(model: PreTrainedModel) -> str:
    with pytest.raises(UserError) as caught:
        architectures.check_head(model)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_models_that_change_logits_after_the_head_are_refused(family: str) -> None:
    model = model_of(family, **AFTER_THE_HEAD[family])
    assert refusal(model).startswith(f"{model.config.model_type} models scale or cap their logits after")


@pytest.mark.parametrize("family", BEFORE_THE_HEAD)
def test_models_with_more_than_a_head_on_their_hidden_states_are_refused(family: str) -> None:
    assert "change their hidden states before the head" in refusal(
        model_of(family, **BEFORE_THE_HEAD[family])
    )


@pytest.mark.parametrize("family", SCORED)
def test_models_that_are_hidden_states_and_head_pass(family: str) -> None:
    architectures.check_head(model_of(family, **SCORED[family]))


def test_a_cap_is_found_in_bfloat16_though_the_logits_are_too_small_to_show_it() -> None:
    model = model_of("gemma2").bfloat16().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.01)
    ids = torch.tensor([[5, 6, 7]])
    plain = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
    torch.testing.assert_close(model(ids).logits, plain)  # they differ by less than the rounding
    assert "scale or cap" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_the_check_takes_any_precision_adapter_and_checkpointing_and_leaves_nothing_behind(
    family: str, dtype: torch.dtype
) -> None:
    model = model_of(family, **SCORED.get(family, {}))
    model.to(dtype=dtype)  # type: ignore[call-arg]
    targets = ["q", "v"] if family == "t5" else ["q_proj", "o_proj"]
    net = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.5))
    Policy.checkpoint_activations(SimpleNamespace(base=model))  # type: ignore[arg-type]
    modes = {name: module.training for name, module in net.named_modules()}
    state = torch.random.get_rng_state()
    architectures.check_head(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert not model.get_output_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_policy_that_cannot_be_scored_is_refused_where_it_is_loaded(
    tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "gemma2", tiny.SHAPE | {"head_dim": 16})
    folder = tiny.checkpoint(tmp_path / "model", "gemma2")
    with pytest.raises(UserError, match="gemma2 models scale or cap"):
        tiny.policy(folder, quantization=quantization, lora=LoRA(r=2))


def test_an_encoder_that_numbers_padding_is_refused() -> None:
    bart = model_of("bart", d_model=32, encoder_layers=1, decoder_layers=1)
    with pytest.raises(UserError, match="number their encoder's columns"):
        architectures.check_padding(bart)
    architectures.check_padding(model_of("t5", **T5))
    architectures.check_padding(model_of("gpt2", **GPT2))
