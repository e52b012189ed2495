"""Tiny random models of real architectures, with the tokenizer that ships in the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from transformers import AutoConfig, AutoTokenizer

from coderl.model.adapters import LoRA
from coderl.model.architectures import auto_class
from coderl.model.policy import Policy
from coderl.types import Problem

TOKENIZER = Path(str(resources.files("coderl.embedded") / "model"))
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,  # for MBPP's prompts, which have many of this tokenizer's tokens
}


# T5 has other names for the same shape, and starts an answer with its pad token.
T5_SHAPE = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
# DeepSeek-Coder is a Llama without biases whose positions are stretched.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "starcoder2": SHAPE,
    "deepseek": SHAPE
    | {"model_type": "llama", "rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "t5": T5_SHAPE,
}
LINEARS: dict[str, tuple[str, ...]] = {
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}
"""Linear layers of the families that do not name them as Llama does."""


def checkpoint(
    folder: Path,
    family: str = "llama",
    chat_template: str | None = None,
    pad_is_eos: bool = False,
    more_eos: Sequence[int] = (),
    likely: Sequence[int] = (),
    **config: Any,
) -> Path:
    """Save a random model of ``family`` with a tokenizer in ``folder``.

    The eos tokens in ``more_eos`` are in the generation config only. Tokens in ``likely`` are sampled often;
    a random model would hardly ever sample an eos token otherwise.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    eos = int(tokenizer.eos_token_id)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer) + 16, "eos_token_id": eos, "bos_token_id": None}
    shape |= {"pad_token_id": tokenizer.pad_token_id} | FAMILIES[family]
    if family == "t5":
        shape |= {"decoder_start_token_id": tokenizer.pad_token_id}
    shape |= config
    made = AutoConfig.for_model(shape.pop("model_type", family), **shape)
    model = auto_class(made).from_config(made)
    _make_lively(model)
    model.generation_config.eos_token_id = [eos, *more_eos] if more_eos else eos
    if likely:
        _make_likely(model, list(likely), pull=3.0 if family == "t5" else 0.25)
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def _make_lively(model: torch.nn.Module) -> None:
    """Larger weights than the usual initialization, with which all tokens and positions look the same."""
    # T5's embedding is also its head, whose input is scaled down. Its layers must outweigh that embedding, or
    # each token would follow itself.
    wide = {"shared.weight": 1.6, "attention_bias.weight": 1.0, ".wo.weight": 0.8, "Attention.q.weight": 0.05}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or name.endswith("bias"):
            std = next((value for end, value in wide.items() if name.endswith(end)), 0.2)
            torch.nn.init.normal_(parameter, std=std)


@torch.no_grad()
def _make_likely(model: torch.nn.Module, tokens: list[int], pull: float) -> None:
    """Raise the logits of these tokens in every state, through one coordinate that is constant in all states.

    Longer embedding rows would not do where embedding and head are tied: such tokens would repeat for ever.
    """
    writers = ("o_proj", "down_proj", "c_proj", ".o", ".wo")
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(writers):
            parameter[0] = 0.0
        if name.endswith(("model.norm.weight", "decoder.final_layer_norm.weight")):
            parameter[0] = 35.0
    model.get_output_embeddings().weight[:, 0] = 0.0  # type: ignore[operator]
    model.get_input_embeddings().weight[:, 0] = 4.0  # type: ignore[operator]
    model.get_output_embeddings().weight[tokens, 0] += pull  # type: ignore[operator]


def trainer(**options: Any) -> Trainer:
    """A Trainer on the CPU that prints and writes nothing by default."""
    silent: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(silent | options))


def policy(folder: Path, family: str = "llama", **options: Any) -> Policy:
    """A loaded policy on a tiny checkpoint, with a new adapter, which changes nothing yet."""
    lora = LoRA(r=4, alpha=8, target_modules=LINEARS.get(family, LoRA().target_modules))
    settings: dict[str, Any] = {"quantization": "none", "lora": lora} | options
    made = Policy(str(folder), **settings)
    made.load(torch.device("cpu"))
    return made


def stir(made: Policy, scale: float = 0.05) -> None:
    """Change the trainable weights by seeded noise, so that the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def problems(count: int = 3) -> list[Problem]:
    """Short problems with prompts of different lengths."""
    return [
        Problem(
            id=f"tiny/{i}",
            prompt=f'"""\nAdd {"one " * i}to x\nassert f(1) == {1 + i}\n"""\n',
            tests=(f"assert f(1) == {1 + i}", f"assert f(5) == {5 + i}"),
            solution=f"def f(x):\n    return x + {i}",
            stop=("\nclass", "\nassert", '\n"""'),
        )
        for i in range(count)
    ]
