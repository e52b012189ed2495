"""Files beside saved weights: base precision, and the problems trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from coderl.model.policy import Policy
from coderl.model.provenance import (
    POLICY_FILE,
    compute_dtype_of,
    prior_training,
    quantization_of,
    read_policy_file,
    write_policy_file,
)
from coderl.problems import TrainingRecord
from tests.support import tiny


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_file_holds_quantization_and_precision(
    llama: Path, tmp_path: Path, quantization: str, dtype: str
) -> None:
    write_policy_file(tiny.policy(llama, quantization=quantization, compute_dtype=dtype), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [POLICY_FILE]
    found = read_policy_file(tmp_path)
    # Embedding and head (its own) stay as they are; so do the norms.
    plain = AutoModelForCausalLM.from_pretrained(llama)
    linear = sum(p.numel() for name, p in plain.named_parameters() if "_proj." in name)
    assert found == {
        "quantization": quantization,
        "compute_dtype": dtype,
        "weights": plain.num_parameters(),
        "weights_in_4_bits": linear if quantization == "nf4" else 0,
    }
    assert (quantization_of(tmp_path), compute_dtype_of(str(tmp_path))) == (quantization, dtype)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"quantization": 4, "compute_dtype": "int3"}'])
def test_an_adapter_without_a_policy_file_counts_as_trained_on_nf4(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / POLICY_FILE).write_text(content)
    assert (quantization_of(tmp_path), compute_dtype_of(tmp_path)) == ("nf4", "auto")


def test_a_policy_file_names_the_gguf_file_and_the_commit_where_there_are_such(
    llama: Path, tmp_path: Path
) -> None:
    policy = tiny.policy(llama)
    policy.gguf_file, policy.base.config._commit_hash = "some.gguf", "abc"
    write_policy_file(policy, tmp_path)
    found = read_policy_file(tmp_path)
    assert (found["gguf_file"], found["commit"]) == ("some.gguf", "abc")


def test_a_policy_file_says_what_is_in_memory_not_what_was_asked_for(llama: Path, tmp_path: Path) -> None:
    policy = tiny.policy(llama, quantization="none")
    policy.quantization = "nf4"
    write_policy_file(policy, tmp_path)
    assert quantization_of(tmp_path) == "none"


def test_without_an_adapter_the_base_is_not_quantized() -> None:
    assert (quantization_of(None), compute_dtype_of(None)) == ("none", "auto")


def test_prior_training_is_that_of_adapter_and_base(tmp_path: Path) -> None:
    records = [TrainingRecord(frozenset({name}), frozenset()) for name in ("base/1", "adapter/1")]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, record in zip((base, adapter), records, strict=True):
        record.save(folder)
    assert prior_training(Policy(str(base), adapter=str(adapter))) == records[0] | records[1]
    assert prior_training(Policy(str(base))) == records[0]
    assert prior_training(Policy("owner/name")) is None
    # Random weights know nothing of the folder whose config.json they are made for.
    assert prior_training(Policy(str(base), quantization="none", lora=None, from_scratch=True)) is None
