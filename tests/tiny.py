"""Tiny random models of real architectures, with the tokenizer that ships in the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coderl.policy import LoRA, Policy
from coderl.types import Problem

TOKENIZER = Path(str(resources.files("coderl.embedded") / "model"))
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def checkpoint(folder: Path, family: str = "llama", chat_template: str | None = None, **config: Any) -> Path:
    """Save a random model of ``family`` with a tokenizer in ``folder``."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    shape = SHAPE | {
        "vocab_size": len(tokenizer) + 16,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    shape |= {"pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(shape | config)))
    for parameter in model.parameters():  # the usual initialization is so flat that all tokens look alike
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def trainer(**options: Any) -> Trainer:
    """A Trainer on the CPU that shows and leaves nothing it was not asked for."""
    silent: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(silent | options))


def policy(folder: Path, **options: Any) -> Policy:
    """A loaded policy on a tiny checkpoint, its fresh adapter equal to its reference."""
    settings: dict[str, Any] = {"quantization": "none", "lora": LoRA(r=4, alpha=8)} | options
    made = Policy(str(folder), **settings)
    made.load(torch.device("cpu"))
    return made


def stir(made: Policy, scale: float = 0.05) -> None:
    """Move the adapter off its start."""
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
