"""The policy: its scores, what trains, its reference, and the models saved from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from coderl.errors import UsageError, UserError
from coderl.model.adapters import LoRA
from coderl.model.padding import pad_rows
from coderl.model.policy import Policy
from coderl.model.tokenization import load_tokenizer
from coderl.publish.export import save_adapter, save_merged
from coderl.rollout import GenerateEngine
from tests.support import tiny
from tests.support.fixed import Fixed, FixedGRPO, FixedPPO, rollout_of, run

ROWS = [([5, 6, 7, 8], [9, 10, 11]), ([12, 13], [14, 15, 16, 17, 18]), ([20, 21, 22], [23])]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prompts, completions = zip(*ROWS, strict=True)
    padded = pad_rows(prompts, completions, pad=0)
    return padded.ids, padded.attention, padded.mask


@torch.no_grad()
def scores(policy: Policy, temperature: float = 1.0) -> torch.Tensor:
    return policy.score(*batch(), temperature).logprobs


def test_logprobs_match_a_plain_softmax_row_by_row(llama: Path) -> None:
    policy = tiny.policy(llama)
    tiny.stir(policy)
    got, entropy, _ = policy.score(*batch(), 0.7, entropy="value")
    assert entropy is not None
    for i, (prompt, completion) in enumerate(ROWS):
        with torch.no_grad():
            logits = policy.net(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].float() / 0.7
        table = logits.log_softmax(-1)
        for t, token in enumerate(completion):
            row = table[len(prompt) + t - 1]
            column = 4 + t
            assert got[i, column].item() == pytest.approx(row[token].item(), abs=1e-5)
            assert entropy[i, column].item() == pytest.approx(-(row.exp() * row).sum().item(), abs=1e-4)


@pytest.mark.parametrize("extra", [1, 7])
def test_padding_on_either_side_changes_nothing(llama: Path, extra: int) -> None:
    policy = tiny.policy(llama)
    ids, attention, mask = batch()
    pad = torch.nn.functional.pad
    wide = pad(ids, (extra, extra), value=3), pad(attention, (extra, extra)), pad(mask, (extra, extra))
    with torch.no_grad():
        got = policy.score(*wide, 1.0).logprobs[:, extra:-extra]
    torch.testing.assert_close(got, scores(policy), atol=1e-5, rtol=1e-5)


def test_scores_and_gradients_do_not_depend_on_the_vocabulary_chunk(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy(llama)
    tiny.stir(policy)
    results = []
    for most in (2**25, 2500):  # all at once; two tokens at a time
        monkeypatch.setattr("coderl.model.logprobs.MOST_LOGITS", most)
        scored, entropy, _ = policy.score(*batch(), 0.8, entropy="value")
        assert entropy is not None
        scored.sum().backward()
        gradients = [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]
        results.append([scored.detach(), entropy, *gradients])
        policy.zero_grad()
    assert len(results[0]) > 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_new_adapter_scores_exactly_as_its_reference(llama: Path) -> None:
    for quantization in ("none", "nf4"):
        policy = tiny.policy(llama, quantization=quantization).train()
        mine = scores(policy)
        with policy.reference():
            assert torch.equal(scores(policy), mine)


def test_the_reference_ends_with_its_block_even_after_an_error(llama: Path) -> None:
    policy = tiny.policy(llama)
    tiny.stir(policy)
    mine = scores(policy)

    def fail_inside() -> None:
        with policy.reference():
            assert not torch.equal(scores(policy), mine)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(scores(policy), mine)


def test_dropout_is_off_unless_asked_for(llama: Path) -> None:
    quiet = tiny.policy(llama, lora=LoRA(r=4, dropout=0.5)).train()
    loud = tiny.policy(llama, lora=LoRA(r=4, dropout=0.5), train_dropout=True).train()
    for policy, same in ((quiet, True), (loud, False)):
        tiny.stir(policy)
        assert torch.equal(scores(policy), scores(policy)) is same


def test_a_checkpoints_own_dropout_is_switched_off(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path, attention_dropout=0.5)
    policy = tiny.policy(folder).train()
    assert torch.equal(scores(policy), scores(policy))


def test_only_the_adapter_trains(llama: Path) -> None:
    policy = tiny.policy(llama, quantization="nf4")
    assert policy.trainable() and all("lora_" in name for name in policy.trainable())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_changes_no_gradient(llama: Path, quantization: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(5)  # the adapter's start
        policy = tiny.policy(llama, quantization=quantization, gradient_checkpointing=checkpointing).train()
        tiny.stir(policy)
        assert policy.base.is_gradient_checkpointing is checkpointing
        policy.score(*batch(), 1.0).logprobs.square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.trainable().items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def nf4_bytes(policy: Policy) -> str:
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        if type(parameter).__name__ == "Params4bit":
            digest.update(name.encode() + parameter.data.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [(FixedGRPO, {}), (FixedPPO, {"critic_adapter": True, "inner_epochs": 2})],
    ids=["GRPO", "PPO"],
)
def test_the_4_bit_base_keeps_its_bytes_through_100_steps_of_training_and_merging(
    tmp_path: Path, kind: type[Fixed], options: dict[str, Any]
) -> None:
    folder = tiny.checkpoint(tmp_path, num_hidden_layers=1)
    policy = tiny.policy(folder, quantization="nf4")
    before = nf4_bytes(policy)
    assert before != hashlib.sha256().hexdigest()
    start = {name: p.detach().clone() for name, p in policy.trainable().items()}
    rollout = rollout_of(folder, [[1.0, 0.0, 0.5, 0.0]])
    engine = GenerateEngine(merged_copy=True)
    engine.bind(policy)
    run(folder, rollout, 100, kind, policy, engine=engine, reference_refresh=10, **options)
    assert nf4_bytes(policy) == before
    assert not any(torch.equal(value, policy.trainable()[name]) for name, value in start.items())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2"])
def test_merged_model_computes_what_the_policy_computes(
    tmp_path: Path, family: str, quantization: str
) -> None:
    targets = ("q_proj", "v_proj", "c_fc") if family == "starcoder2" else ("q_proj", "v_proj", "down_proj")
    extra: dict[str, Any] = {"tie_word_embeddings": True} if family == "llama" else {}
    folder = tiny.checkpoint(tmp_path / "base", family, **extra)
    policy = tiny.policy(folder, quantization=quantization, lora=LoRA(r=4, target_modules=targets)).eval()
    tiny.stir(policy)
    save_merged(policy, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, policy.net(ids).logits, atol=1e-3, rtol=1e-3)
    assert len(load_tokenizer(str(tmp_path / "merged"))) == len(policy.tokenizer)


def test_peft_loads_a_saved_adapter(llama: Path, tmp_path: Path) -> None:
    policy = tiny.policy(llama).eval()
    tiny.stir(policy)
    save_adapter(policy, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, policy.net(ids).logits)


def test_the_reference_of_a_continued_adapter_is_the_adapter_it_started_from(
    llama: Path, tmp_path: Path
) -> None:
    first = tiny.policy(llama)
    tiny.stir(first)
    save_adapter(first, tmp_path / "adapter")
    second = tiny.policy(llama, adapter=str(tmp_path / "adapter"))
    start = scores(second)
    torch.testing.assert_close(start, scores(first))
    with second.reference():
        assert torch.equal(scores(second), start)
    names = set(second.trainable())
    tiny.stir(second)
    with second.reference():
        assert torch.equal(scores(second), start)
    assert not torch.equal(scores(second), start)
    assert set(second.trainable()) == names and not any(".reference." in name for name in names)


def test_a_failed_save_leaves_the_old_adapter(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy(llama)
    save_adapter(policy, tmp_path / "adapter")
    old = sorted(p.name for p in (tmp_path / "adapter").iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy.net, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        save_adapter(policy, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == old
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_tokenizer_without_a_pad_token_pads_with_its_eos_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.checkpoint(tmp_path))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    policy = Policy(str(tmp_path))
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id


def test_all_eos_tokens_of_the_generation_config_end_a_sequence(llama: Path) -> None:
    policy = tiny.policy(llama)
    policy.base.generation_config.eos_token_id = [7, 8]
    assert policy.eos_ids() == {7, 8, policy.tokenizer.eos_token_id}


def bad_folder(tmp_path: Path, kind: str) -> Path:
    folder = tiny.checkpoint(tmp_path / kind)
    if kind == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "corrupt":
        (folder / "model.safetensors").write_bytes(b"not safetensors")
    elif kind == "incomplete":
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors.pop("model.norm.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["no tokenizer", "no config", "corrupt", "incomplete"])
def test_a_bad_model_folder_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.policy(bad_folder(tmp_path, kind))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora": None, "quantization": "nf4"}, "quantization: none"),
        ({"from_scratch": True}, "lora: null"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    llama: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Policy(str(llama), **options)  # type: ignore[arg-type]


def test_unknown_target_modules_and_missing_files_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target_modules"):
        tiny.policy(llama, lora=LoRA(target_modules=("nowhere",)))
    with pytest.raises(UserError, match="adapter_config"):
        tiny.policy(llama, adapter=str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        Policy("./nowhere").source  # noqa: B018
    with pytest.raises(UserError, match=r"gguf_file nope\.gguf"):
        Policy(str(llama), gguf_file="nope.gguf").source  # noqa: B018
