"""Layers that are no ``nn.Linear``: experts, which are one parameter of an MoE layer, and GPT-2's Conv1D."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coderl.commands.merge import merge
from coderl.errors import UsageError, UserError
from coderl.model import adapters, loading
from coderl.model.adapters import LoRA
from coderl.model.padding import pad_rows
from coderl.model.policy import Policy
from coderl.publish.export import save_adapter, save_merged
from coderl.rollout import GenerateEngine, Sampling
from tests.support import tiny
from tests.support.fixed import rollout_of, run

MOE = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": tiny.SHAPE | MOE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": tiny.SHAPE | MOE | {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "minimax": tiny.SHAPE | MOE | {"num_local_experts": 4, "head_dim": 16},
}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "FAMILIES", tiny.FAMILIES | FAMILIES)
        return {family: tiny.checkpoint(parent / family, family) for family in FAMILIES}


def policy_of(folder: Path, quantization: str = "none", **options: Any) -> Policy:
    targets = ("c_attn", "c_proj", "c_fc") if folder.name == "gpt2" else ATTENTION
    experts = () if folder.name in ("gpt2", "minimax") else EXPERTS
    lora = LoRA(r=2, alpha=4, dropout=0.0, target_modules=targets, target_parameters=experts)
    settings: dict[str, Any] = {"quantization": quantization, "lora": lora} | options
    return tiny.policy(folder, **settings)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt2"])
def test_the_merged_model_computes_what_base_and_adapter_compute(
    folders: dict[str, Path], tmp_path: Path, family: str, quantization: str
) -> None:
    policy = policy_of(folders[family], quantization).eval()
    before = logits(policy.net)
    tiny.stir(policy)
    with policy.reference():
        assert torch.equal(logits(policy.net), before)
    save_merged(policy, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(policy.net), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(merged), before, atol=0.1)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt2"])
def test_sampled_logprobs_are_the_scored_ones_with_and_without_a_merged_copy(
    folders: dict[str, Path], family: str, quantization: str
) -> None:
    policy = policy_of(folders[family], quantization)
    tiny.stir(policy)
    for merged_copy in (False, True):
        engine = GenerateEngine(merged_copy=merged_copy)
        engine.bind(policy)
        found = engine.generate(tiny.problems(2), 3, Sampling(max_new_tokens=6), seed=0)
        batch = pad_rows([c.prompt_ids for c in found], [c.ids for c in found], 0)
        with torch.no_grad():
            scored = policy.score(*batch, 1.0).logprobs[batch.mask]
        sampled = torch.tensor([value for c in found for value in c.logprobs])
        torch.testing.assert_close(scored, sampled, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_train_and_continue_from_a_saved_adapter(
    folders: dict[str, Path], llama: Path, tmp_path: Path, checkpointing: bool, compute_dtype: str
) -> None:
    folder = folders["qwen3_moe"]
    policy = policy_of(folder, gradient_checkpointing=checkpointing, compute_dtype=compute_dtype)
    assert all(value.dtype == torch.float32 for value in policy.trainable().values())
    start = {name: value.detach().clone() for name, value in policy.trainable().items()}
    frozen = {name: p.detach().clone() for name, p in policy.base.named_parameters() if not p.requires_grad}
    run(folder, rollout_of(llama, [[1.0, 0.0], [0.0, 1.0]]), 2, policy=policy)
    assert all(not torch.equal(value, start[name]) for name, value in policy.trainable().items())
    still = dict(policy.base.named_parameters())
    assert all(torch.equal(value, still[name]) for name, value in frozen.items())
    save_adapter(policy, tmp_path / "adapter")
    again = policy_of(folder, adapter=str(tmp_path / "adapter"), compute_dtype=compute_dtype)
    assert torch.equal(logits(again.eval().net), logits(policy.eval().net))
    assert again.trainable().keys() == policy.trainable().keys()
    with again.reference():
        assert torch.equal(logits(again.net), logits(policy.net))


def test_gradients_of_experts_do_not_depend_on_checkpointing(folders: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = policy_of(folders["mixtral"], gradient_checkpointing=checkpointing).train()
        tiny.stir(policy)
        batch = pad_rows([[5, 6, 7], [5, 6, 7]], [[9, 10], [11, 12, 13]], 0)
        policy.score(*batch, 1.0).logprobs.sum().backward()
        gradients.append([value.grad for value in policy.trainable().values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_command_merges_an_adapter_with_experts(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = policy_of(folders["mixtral"], "nf4").eval()
    tiny.stir(policy)
    save_adapter(policy, tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"), device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(policy.net), atol=1e-3, rtol=1e-3)
    verified = json.loads((tmp_path / "merged" / "merge.json").read_text())["verified"]
    assert verified["adapted"] == 2 * (len(ATTENTION) + len(EXPERTS))


def test_an_adapter_of_gpt2_in_4_bits_fits_the_plain_one_and_the_reverse(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for trained, other in (("nf4", "none"), ("none", "nf4")):
        policy = policy_of(folders["gpt2"], trained)
        tiny.stir(policy)
        save_adapter(policy, tmp_path / trained)
        again = policy_of(folders["gpt2"], other, adapter=str(tmp_path / trained))
        for name, layer in adapters.adapted(policy.base).items():
            found = adapters.adapted(again.base)[name].get_delta_weight("default")
            torch.testing.assert_close(found, layer.get_delta_weight("default").T)  # Conv1D is [in, out]


def test_what_is_in_4_bits_and_what_has_no_adapter_is_said(folders: dict[str, Path]) -> None:
    policy = policy_of(folders["mixtral"], "nf4", lora=LoRA(r=2, target_modules=ATTENTION))
    held, without = policy.notes()
    plain = AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    attention = sum(p.numel() for name, p in plain.named_parameters() if "_proj.weight" in name)
    experts = sum(p.numel() for name, p in plain.named_parameters() if "experts" in name)
    assert f"{attention:,} weights in 4 bits" in held and f"{experts:,} of these are experts" in held
    assert f"{plain.num_parameters() - attention:,} others" in held
    assert without.endswith(f"policy.lora.target_parameters to [{EXPERTS[1]}, {EXPERTS[0]}]")
    count = loading.WeightCount.of(policy.base)
    assert count.plain_bytes == 4 * count.plain
    # Half a byte each, and a float32 for each block of 64.
    assert count.quantized_bytes == pytest.approx(count.quantized * (0.5 + 4 / 64))
    assert len(policy_of(folders["mixtral"], "nf4").notes()) == 1
    assert policy_of(folders["mixtral"]).notes() == []


def test_a_model_that_is_not_in_4_bits_and_has_no_experts_has_nothing_to_say(llama: Path) -> None:
    assert tiny.policy(llama).notes() == []
    (held,) = tiny.policy(llama, quantization="nf4").notes()
    assert "experts" not in held and "in 4 bits" in held


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt2"])
def test_weights_in_4_bits_are_near_the_plain_ones_the_same_way_round(
    folders: dict[str, Path], family: str
) -> None:
    base = loading.load_base(str(folders[family]), "nf4", torch.float32, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    quantized = [path for path, module in base.named_modules() if type(module).__name__ == "Linear4bit"]
    assert quantized
    for path in quantized:
        layer = base.get_submodule(path)
        found = loading.dense(layer, "weight")
        found = found.T if loading.is_transposed(layer) else found
        wanted = plain.get_parameter(f"{path}.weight").detach()
        assert float((found - wanted).norm() / wanted.norm()) < 0.15
        assert loading.is_transposed(layer) == (family == "gpt2")


def test_parameters_that_are_no_experts_are_refused(folders: dict[str, Path], llama: Path) -> None:
    def refusal(folder: Path, *names: str) -> str:
        lora = LoRA(r=2, dropout=0.0, target_modules=ATTENTION, target_parameters=names)
        with pytest.raises(UserError) as caught:
            tiny.policy(folder, lora=lora)
        (line,) = str(caught.value).splitlines()
        return line

    mixtral = folders["mixtral"]
    line = refusal(mixtral, EXPERTS[0], "mlp.gate.weight")
    assert f"target_parameters mlp.gate.weight match no experts of {mixtral}, which has " in line
    assert f"{EXPERTS[0]}, {EXPERTS[1]}: set policy.lora.target_parameters" in line
    assert "which has none" in refusal(llama, "mlp.experts.down_proj")


def test_adapters_on_experts_have_no_dropout() -> None:
    with pytest.raises(UsageError, match=r"set policy\.lora\.dropout to 0"):
        LoRA(target_parameters=EXPERTS)


def test_convolutions_are_no_experts() -> None:
    layers = torch.nn.ModuleDict({"convolution": torch.nn.Conv1d(2, 2, 3)})
    layers["experts"] = experts = torch.nn.Module()
    experts.w = torch.nn.Parameter(torch.zeros(2, 3, 4))
    assert adapters.expert_parameters(layers).keys() == {"experts.w"}


def test_a_model_whose_cache_rows_cannot_be_removed_from_is_refused_where_it_samples(
    folders: dict[str, Path],
) -> None:
    policy = policy_of(folders["minimax"])
    engine = GenerateEngine(merged_copy=False)
    engine.bind(policy)
    with pytest.raises(UserError, match="minimax models have no cache that rows can be removed from"):
        engine.generate(tiny.problems(1), 2, Sampling(max_new_tokens=3))
