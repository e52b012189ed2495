"""The program in a card that loads its model and lets it solve a problem."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from coderl.problems import prompts
from coderl.types import Problem

if TYPE_CHECKING:
    from coderl.publish.card.facts import Facts

_TASK = ("Write a function to double a number.", "assert double(2) == 4")
EXAMPLE = Problem("example", prompts.mbpp_prompt(*_TASK), prompts.mbpp_instruction(*_TASK))


def code(facts: Facts) -> str:
    """The program's lines."""
    kind = "Seq2SeqLM" if facts.seq2seq else "CausalLM"
    held = facts.adapter and facts.quantization == "nf4"
    owner = f"Auto{'Peft' if facts.adapter else ''}ModelFor{kind}"
    names = [*([] if facts.adapter else [owner]), "AutoTokenizer", *(["BitsAndBytesConfig"] if held else [])]
    how = "quantization_config=nf4" if held else 'dtype="auto"'
    start = "" if facts.seq2seq else '[inputs["input_ids"].shape[1] :]'
    lines = [
        *(["import torch"] if held else []),
        *([f"from peft import {owner}"] if facts.adapter else []),
        f"from transformers import {', '.join(names)}",
        "",
        f"name = {quoted(facts.name)}  # this model's folder, or its id on the hub",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        *(_NF4 if held else []),
        f"model = {owner}.from_pretrained(name, {how})",
        "",
        *_asking(chat=facts.policy.get("prompt_form") == "chat"),
        "output = model.generate(**inputs, max_new_tokens=128)",
        f"print(tokenizer.decode(output[0]{start}, skip_special_tokens=True))",
    ]
    return "\n".join(lines) + "\n"


def quoted(name: str) -> str:
    """A name as Python writes a string, in double quotes and on one line."""
    return json.dumps(name, ensure_ascii=not name.isprintable())


_NF4 = (
    "nf4 = BitsAndBytesConfig(  # as in training",
    '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16',
    ")",
)


def _asking(chat: bool) -> tuple[str, ...]:
    """Lines that make the model's input, in the form it was trained to read."""
    if not chat:
        return (
            f"prompt = {EXAMPLE.prompt!r}",
            'inputs = tokenizer(prompt, return_tensors="pt").to(model.device)',
        )
    return (
        f"messages = {prompts.chat_messages(EXAMPLE)!r}",
        "prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        f"prompt += {prompts.CHAT_OPENING!r}",
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)',
    )
