"""The six model families as their hub repositories have them, but tiny: random weights, own tokenizers.

A folder is written file by file in the form of the hub's (config.json with ``torch_dtype`` and a flat
``rope_theta``, the original tokenizer classes), so that it loads through the same paths of transformers.
Sizes are shrunk and the vocabulary is as trained; every flag that changes behaviour is the repository's that
the comment names. Tokenizers are of the real kind and are trained on the problems in the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig

from coderl.model.architectures import auto_class
from tests.support import tiny
from tests.support.family_tokenizers import (
    DEEPSEEK_BOS,
    DEEPSEEK_EOS,
    QWEN_SPECIAL,
    STARCODER_SPECIAL,
    codet5_tokenizer,
    deepseek_tokenizer,
    qwen_tokenizer,
    sentencepiece,
    starcoder_tokenizer,
)

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        preset: Name of its file in ``configs/models``.
        repository: On the hub; a folder gets the last part for a name.
        linears: Names of all the linear layers of its blocks.
        config: Its config.json, ids of tokens by their text.
        tokenizer: Trains one of its kind.
        tokenizer_config: Its tokenizer_config.json.
        plain: Those of ``linears`` that transformers leaves out of the 4 bits.
        spare: Rows of the embedding that no token has.
        generation: Its generation_config.json, ids of tokens by their text.
    """

    preset: str
    repository: str
    linears: tuple[str, ...]
    config: dict[str, Any]
    tokenizer: Callable[[], Tokenizer]
    tokenizer_config: dict[str, Any]
    plain: tuple[str, ...] = ()
    spare: int = 0
    generation: dict[str, Any] = field(default_factory=dict)


QWEN_TEMPLATE = (  # what Qwen2.5's comes to without tools
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content "
    "+ '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
DEEPSEEK_TEMPLATE = (  # the instruct models', shortened: the template writes the bos token itself
    "{{ bos_token }}{%- for message in messages %}{{ '### Instruction:\\n' + message['content'] + '\\n' }}"
    "{%- endfor %}{{ '### Response:' }}"
)


def _token(content: str) -> dict[str, Any]:
    """A special token as older repositories write it."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


# --- the families

# codellama/CodeLlama-7b-Python-hf and -13b-Python-hf. The Python models have 32,000 tokens and as many rows,
# none for infilling, which the tokenizer's class adds all the same (transformers' issue 26714).
_CODELLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": "<s>",
    "eos_token_id": "</s>",
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,  # no grouped queries at 7B and 13B
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_CODELLAMA_TOKENIZER: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": _token("<s>"),
    "clean_up_tokenization_spaces": False,
    "eos_token": _token("</s>"),
    "legacy": None,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "CodeLlamaTokenizer",
    "unk_token": _token("<unk>"),
}
# deepseek-ai/deepseek-coder-6.7b-base; 32,256 rows for 32,022 tokens. Its tokenizer is byte-level, whatever
# the class says (transformers' issue 46489).
_DEEPSEEK: dict[str, Any] = _CODELLAMA | {
    "attention_bias": False,
    "bos_token_id": DEEPSEEK_BOS,
    "eos_token_id": DEEPSEEK_EOS,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rope_theta": 100000,
}
_DEEPSEEK_TOKENIZER: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": _token(DEEPSEEK_BOS),
    "clean_up_tokenization_spaces": False,
    "eos_token": _token(DEEPSEEK_EOS),
    "legacy": True,
    "model_max_length": 16384,
    "pad_token": _token(DEEPSEEK_EOS),
    "sp_model_kwargs": {},
    "unk_token": None,
    "tokenizer_class": "LlamaTokenizerFast",
}
# Qwen/Qwen2.5-Coder-7B; 152,064 rows for 151,665 tokens. Biases on q, k and v are the architecture's. No
# token is set before a text, though its configs name a bos_token_id.
_QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|endoftext|>",
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
_QWEN_TOKENIZER: dict[str, Any] = {
    "add_prefix_space": False,
    "additional_special_tokens": list(QWEN_SPECIAL[1:3]),
    "bos_token": None,
    "chat_template": QWEN_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
# bigcode/starcoder2-15b, and as 3b and 7b the dropout that their configs on the hub have. The 15B has its own
# head; the window is shrunk below the prompts' length, where it acts.
_STARCODER: dict[str, Any] = {
    "architectures": ["Starcoder2ForCausalLM"],
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|endoftext|>",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "initializer_range": 0.01275,
    "intermediate_size": 256,
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "model_type": "starcoder2",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,  # 4 for 48 heads
    "rope_theta": 100000,
    "sliding_window": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_bias": True,
    "use_cache": True,
}
_STARCODER_TOKENIZER: dict[str, Any] = {
    "add_prefix_space": False,
    "additional_special_tokens": list(STARCODER_SPECIAL),
    "bos_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": True,
    "eos_token": "<|endoftext|>",
    "model_max_length": 1000000000000000019884624838656,
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "<|endoftext|>",
    "vocab_size": 49152,
}
# Salesforce/codet5p-770m. The head is the embedding (T5's default), so its input is scaled; weights are
# stored in float16.
_CODET5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "bos_token_id": "<s>",
    "d_ff": 128,
    "d_kv": 16,
    "d_model": 64,
    "decoder_start_token_id": "<pad>",
    "dense_act_fn": "relu",
    "dropout_rate": 0.1,
    "eos_token_id": "</s>",
    "feed_forward_proj": "relu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": False,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": "<pad>",
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "torch_dtype": "float16",
    "use_cache": True,
}
_CODET5_TOKENIZER: dict[str, Any] = {
    "add_prefix_space": False,
    "bos_token": _token("<s>"),
    "cls_token": _token("<s>"),
    "eos_token": _token("</s>"),
    "errors": "replace",
    "mask_token": _token("<mask>") | {"lstrip": True},
    "model_max_length": 512,
    "pad_token": _token("<pad>"),
    "sep_token": _token("</s>"),
    "tokenizer_class": "RobertaTokenizer",
    "trim_offsets": True,
    "unk_token": _token("<unk>"),
}


def _own(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A generation config that was made from the model's."""
    return {"_from_model_config": True} | {key: config[key] for key in keys}


FAMILIES = {
    family.preset: family
    for family in (
        Family(
            "codellama-7b",
            "codellama/CodeLlama-7b-Python-hf",
            LLAMA_LAYERS,
            _CODELLAMA,
            sentencepiece,
            _CODELLAMA_TOKENIZER,
            generation=_own(_CODELLAMA, "bos_token_id", "eos_token_id"),
        ),
        Family(
            "codellama-13b",
            "codellama/CodeLlama-13b-Python-hf",
            LLAMA_LAYERS,
            _CODELLAMA | {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5},
            sentencepiece,
            _CODELLAMA_TOKENIZER,
            generation=_own(_CODELLAMA, "bos_token_id", "eos_token_id"),
        ),
        Family(
            "deepseek-coder",
            "deepseek-ai/deepseek-coder-6.7b-base",
            LLAMA_LAYERS,
            _DEEPSEEK,
            deepseek_tokenizer,
            _DEEPSEEK_TOKENIZER,
            spare=26,
            generation=_own(_DEEPSEEK, "bos_token_id", "eos_token_id"),
        ),
        Family(
            "qwen2.5-coder",
            "Qwen/Qwen2.5-Coder-7B",
            LLAMA_LAYERS,
            _QWEN,
            qwen_tokenizer,
            _QWEN_TOKENIZER,
            spare=43,
            generation={
                "bos_token_id": "<|endoftext|>",
                # The base model's has the second alone; the instruct model's has both.
                "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
                "max_new_tokens": 2048,
            },
        ),
        Family(
            "starcoder2",
            "bigcode/starcoder2-15b",
            ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
            _STARCODER,
            starcoder_tokenizer,
            _STARCODER_TOKENIZER,
            generation=_own(_STARCODER, "bos_token_id", "eos_token_id"),
        ),
        Family(
            "codet5p",
            "Salesforce/codet5p-770m",
            ("q", "k", "v", "o", "wi", "wo"),
            _CODET5,
            codet5_tokenizer,
            _CODET5_TOKENIZER,
            plain=("wo",),  # T5's _keep_in_fp32_modules
            generation=_own(
                _CODET5, "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"
            ),
        ),
    )
}


# --- folders


@cache
def trained(family: str) -> Tokenizer:
    """The family's tokenizer; it is shared, so do not change it."""
    return FAMILIES[family].tokenizer()


def checkpoint(parent: Path, name: str, **tokenizer_config: Any) -> Path:
    """Write the family's repository into a folder of ``parent`` that is named as on the hub.

    Args:
        parent: An existing folder.
        name: Of the family's preset.
        tokenizer_config: Values to change in its tokenizer_config.json.
    """
    family, tokenizer = FAMILIES[name], trained(name)
    folder = parent / family.repository.rpartition("/")[2]
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", family.tokenizer_config | tokenizer_config)
    config = _with_ids(family.config, tokenizer) | {"vocab_size": tokenizer.get_vocab_size() + family.spare}
    _write(folder / "config.json", config)
    torch.manual_seed(0)
    made = AutoConfig.from_pretrained(folder)
    model = auto_class(made).from_config(made)
    tiny._make_lively(model)
    # Words of these letters are valid programs, other answers hardly ever are: so rewards differ.
    likely = [config["eos_token_id"], *(i for letter in "abcnsxy" if (i := tokenizer.token_to_id(letter)))]
    tiny._make_likely(model, likely, pull=4.5 if name == "codet5p" else 0.3)
    model.to(getattr(torch, config["torch_dtype"])).save_pretrained(folder)
    # save_pretrained wrote today's form of the config: restore the hub's.
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", _with_ids(family.generation, tokenizer))
    return folder


def _with_ids(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        key: [tokenizer.token_to_id(token) for token in value]
        if key.endswith("_token_id") and isinstance(value, list)
        else tokenizer.token_to_id(value)
        if key.endswith("_token_id")
        else value
        for key, value in config.items()
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
