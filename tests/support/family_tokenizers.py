"""Tokenizers of the kinds that the model families have, trained on the problems in the package."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from coderl.problems.prompts import mbpp_prompt

ENTRIES = 640
"""Size of a trained vocabulary before tokens are added to it."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DEEPSEEK_BOS, DEEPSEEK_EOS = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|file_sep|>")
STARCODER_SPECIAL = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<repo_name>", "<file_sep>")


@cache
def texts() -> tuple[str, ...]:
    """MBPP-like prompts and programs."""
    lines = (resources.files("coderl.embedded") / "problems.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return tuple(mbpp_prompt(row["text"], row["test_list"][0]) + row["code"] for row in rows)


def sentencepiece() -> Tokenizer:
    """CodeLlama's kind: words bring their space; what is no token is bytes, and so is a line's end."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    # As in the real vocabulary, the last space of a run goes with its word and the others stay together.
    learner.pre_tokenizer = pre_tokenizers.Split(
        Regex("\u2581+(?=\u2581[^\u2581])|\u2581?[^\u2581]+|\u2581+"), "isolated"
    )
    trainer = trainers.BpeTrainer(vocab_size=ENTRIES - 3 - len(BYTES), show_progress=False)
    learner.train_from_iterator((line for text in texts() for line in text.splitlines()), trainer)
    learned = json.loads(learner.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = ["<unk>", "<s>", "</s>", *BYTES, *words]
    made = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)},
            [tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def byte_level(
    splits: Iterable[Any] = (),
    first: Iterable[str] = (),
    last: Iterable[str] = (),
    own_regex: bool = True,
    normalizer: Any = None,
) -> Tokenizer:
    """GPT-2's kind.

    Args:
        splits: Pre-tokenizers before the last one, which is ByteLevel.
        first: Special tokens with the first ids.
        last: Special tokens after all others.
        own_regex: Whether ByteLevel splits by GPT-2's expression.
        normalizer: Any of tokenizers'.
    """
    made = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte]) if splits else byte
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        special_tokens=list(first),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts(), trainer)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in last])
    return made


def deepseek_tokenizer() -> Tokenizer:
    """DeepSeek-Coder's: llama.cpp's ``deepseek-coder`` pre-tokenizer has the same expressions."""
    splits = ["[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"]
    made = byte_level(
        [
            *(pre_tokenizers.Split(Regex(each), "isolated") for each in splits),
            pre_tokenizers.Digits(individual_digits=True),
        ],
        last=[DEEPSEEK_BOS, DEEPSEEK_EOS, "<\uff5cfim\u2581hole\uff5c>", "<pad>", "<|User|>", "<|EOT|>"],
        own_regex=False,
        normalizer=normalizers.Sequence([]),
    )
    bos = made.token_to_id(DEEPSEEK_BOS)
    made.post_processor = processors.TemplateProcessing(
        single=f"{DEEPSEEK_BOS} $A", special_tokens=[(DEEPSEEK_BOS, bos)]
    )
    return made


def qwen_tokenizer() -> Tokenizer:
    """Qwen2.5's, special tokens last; the expression is the one in transformers' Qwen2Tokenizer."""
    expression = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    return byte_level(
        [pre_tokenizers.Split(Regex(expression), "isolated")],
        last=QWEN_SPECIAL,
        own_regex=False,
        normalizer=normalizers.NFC(),
    )


def starcoder_tokenizer() -> Tokenizer:
    """StarCoder2's: GPT-2's with single digits (llama.cpp's ``starcoder``), special tokens first."""
    return byte_level([pre_tokenizers.Digits(individual_digits=True)], first=STARCODER_SPECIAL)


def codet5_tokenizer() -> Tokenizer:
    """CodeT5+'s: RoBERTa's, which sets <s> and </s> around each text; sentinels come last."""
    made = byte_level(
        first=["<pad>", "<s>", "</s>", "<unk>", "<mask>"],
        last=[f"<extra_id_{i}>" for i in reversed(range(4))],  # the real one has a hundred
    )
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), add_prefix_space=False)
    return made
