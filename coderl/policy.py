"""The policy: one 4-bit base in memory, a LoRA adapter on it, and the base without it as the reference."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coderl import models, prompts
from coderl.errors import UsageError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coderl.types import Problem

MOST_LOGITS = 2**25
"""Logits in memory at a time: 128 MB in float32."""

REFERENCE = "reference"
"""Name of the frozen adapter that stands in for the reference when the policy was warm-started."""


@dataclass
class LoRA:
    """Low-rank adapters (arXiv:2106.09685), with the mission's values.

    Args:
        r: Rank.
        alpha: Updates are scaled by alpha / r.
        dropout: Probability, used only where ``Policy.train_dropout`` is set.
        target_modules: Names of the linear layers that get an adapter.
    """

    r: int = 64
    alpha: int = 16
    dropout: float = 0.1
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class Policy(nn.Module):
    """A code model under training. Making one is free; :meth:`load` reads the weights.

    Args:
        model: A folder, a hub id, or ``embedded`` for the tiny model in the package.
        gguf_file: Name of a GGUF file in ``model``, for checkpoints kept that way.
        quantization: ``nf4`` holds the base in 4 bits (QLoRA, arXiv:2305.14314); ``none`` does not.
        compute_dtype: ``auto`` is bfloat16 on a GPU that has it, else float16; float32 on a CPU.
        lora: The adapter; null trains all weights (needs ``quantization: none``).
        adapter: Folder of an adapter to start from, in peft's format. A frozen copy of it is the reference.
        from_scratch: Start from random weights for the model's config.json.
        prompt_form: ``completion`` lets the model continue the problem's text; ``chat`` asks through the
            model's chat template, with the answer opened at a fenced code block.
        gradient_checkpointing: Trade about 30 % of the update's speed for most of its activation memory.
        train_dropout: Let dropout act in the update. Off, the policy's ratio to itself is exactly 1.
    """

    def __init__(
        self,
        model: str,
        gguf_file: str | None = None,
        quantization: models.Quantization = "nf4",
        compute_dtype: models.ComputeDtype = "auto",
        lora: LoRA | None = LoRA(),  # noqa: B008 -- a dataclass of plain values, never changed
        adapter: str | None = None,
        from_scratch: bool = False,
        prompt_form: prompts.PromptForm = "completion",
        gradient_checkpointing: bool = False,
        train_dropout: bool = False,
    ) -> None:
        super().__init__()
        if quantization == "nf4" and lora is None:
            raise UsageError("lora: null trains all weights, which 4-bit ones cannot: set quantization: none")
        if from_scratch and (quantization == "nf4" or lora is not None or adapter):
            raise UsageError(
                "from_scratch trains all weights: set quantization: none, lora: null and no adapter"
            )
        self.model, self.gguf_file, self.quantization = model, gguf_file, quantization
        self.compute_dtype, self.lora, self.adapter, self.from_scratch = (
            compute_dtype,
            lora,
            adapter,
            from_scratch,
        )
        self.prompt_form, self.train_dropout = prompt_form, train_dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.net: Any = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    # -- loading ---------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The folder or hub id of the base's plain weights."""
        return models.resolve(self.model, self.gguf_file)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, read on first use; it always has a pad token."""
        if self._tokenizer is None:
            self._tokenizer = models.load_tokenizer(self.source)
            if self.prompt_form == "chat" and not self._tokenizer.chat_template:
                raise UserError(f"{self.model} has no chat template: set prompt_form: completion")
        return self._tokenizer

    def load(self, device: torch.device) -> None:
        """Read the weights and put the adapter on. Does nothing when that has been done."""
        if self.net is not None:
            return
        dtype = models.compute_dtype(self.compute_dtype, device)
        base = models.load_base(self.source, self.quantization, dtype, device, random=self.from_scratch)
        self._check_vocabulary(base)
        self.net = base if self.lora is None and self.adapter is None else self._adapted(base)
        if self.gradient_checkpointing:
            # transformers renamed it within version 5.
            enable = (
                getattr(self.base, "activation_checkpointing_enable", None)
                or self.base.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
            self.base.enable_input_require_grads()
        self.train(self.training)

    def _check_vocabulary(self, base: PreTrainedModel) -> None:
        weight = base.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        size = weight.shape[0]
        if len(self.tokenizer) > size:
            raise UserError(
                f"{self.model}: its tokenizer has {len(self.tokenizer)} tokens, its embedding {size} rows"
            )

    def _adapted(self, base: PreTrainedModel) -> nn.Module:
        from peft import LoraConfig, PeftModel, get_peft_model

        if self.adapter is not None:
            if not (Path(self.adapter) / "adapter_config.json").is_file():
                raise UserError(
                    f"no adapter_config.json in {self.adapter}: give the folder of a saved adapter"
                )
            net = PeftModel.from_pretrained(base, self.adapter, is_trainable=True)
            net.load_adapter(self.adapter, adapter_name=REFERENCE, is_trainable=False)
            return net
        assert self.lora is not None
        config = LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=list(self.lora.target_modules),
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(base, config)
        except ValueError as error:
            raise UserError(
                f"lora.target_modules do not fit {self.model}: {str(error).splitlines()[0]}"
            ) from error

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, adapters included where there are any."""
        net = self.net.get_base_model() if hasattr(self.net, "get_base_model") else self.net
        return net  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device  # type: ignore[no-any-return]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> Policy:
        """Set the mode, but keep dropout off unless ``train_dropout`` asks for it."""
        super().train(mode)
        if not self.train_dropout:
            for module in self.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        return self

    # -- text ------------------------------------------------------------------------------------------------

    def encode(self, problem: Problem) -> list[int]:
        """Token ids of the problem's prompt in this policy's prompt form."""
        if self.prompt_form == "completion":
            return list(self.tokenizer(problem.prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            prompts.chat_messages(problem), tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return list(self.tokenizer(text + prompts.CHAT_OPENING, add_special_tokens=False)["input_ids"])

    def eos_ids(self) -> set[int]:
        """Every token that ends a sequence: the tokenizer's, and all of the model's generation config."""
        listed = self.base.generation_config.eos_token_id
        more = listed if isinstance(listed, list) else [listed]
        return {int(i) for i in [self.tokenizer.eos_token_id, *more] if i is not None}

    # -- scoring ---------------------------------------------------------------------------------------------

    def logprobs(
        self, ids: Tensor, attention: Tensor, mask: Tensor, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the tokens under ``mask``, and the entropy there.

        Position ids count attended tokens, so that padding on either side changes nothing. Only tokens under
        the mask meet the vocabulary, a chunk at a time: all logits of 16 sequences of 512 tokens over 152,000
        entries would be 5 GB.

        Args:
            ids: ``[B, T]``.
            attention: ``[B, T]`` bool.
            mask: ``[B, T]`` bool, tokens to score; never one without a token before it.
            temperature: Logits are divided by it, as in sampling.
            entropy: Also return the entropy (without gradient).

        Returns:
            ``[B, T]`` float32 nats, zero outside the mask; the same for the entropy, or None.
        """
        positions = (attention.long().cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.base.base_model(
            input_ids=ids, attention_mask=attention.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        before = hidden[:, :-1][mask[:, 1:]]
        head = self.base.get_output_embeddings()
        chosen, spread = _token_scores(head, before, ids[mask], temperature, entropy)
        zeros = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        return zeros.masked_scatter(mask, chosen), zeros.masked_scatter(mask, spread) if entropy else None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is its reference: the adapter off, or the frozen copy of a warm start."""
        if REFERENCE in getattr(self.net, "peft_config", {}):
            self.net.set_adapter(REFERENCE)
            try:
                yield
            finally:
                self.net.set_adapter("default")
                self._freeze_reference()
            return
        if not hasattr(self.net, "disable_adapter"):
            raise UsageError(
                "all weights train, so there is no reference left: set kl_coefficient: 0, or use lora"
            )
        with self.net.disable_adapter():
            yield

    def _freeze_reference(self) -> None:
        for name, parameter in self.net.named_parameters():
            if f".{REFERENCE}." in name:
                parameter.requires_grad_(False)

    # -- plain weights ---------------------------------------------------------------------------------------

    def plain_twin(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A model of the base's architecture without adapters or quantization; its weights are not set."""
        from transformers import AutoModelForCausalLM

        config = type(self.base.config).from_dict(
            {k: v for k, v in self.base.config.to_dict().items() if k != "quantization_config"}
        )
        dtype = dtype or self.base.dtype
        with torch.device("meta"):  # random weights would be made only to be overwritten
            twin = AutoModelForCausalLM.from_config(config, dtype=dtype)
        twin = twin.to_empty(device=self.device)
        twin.tie_weights()
        twin.generation_config = self.base.generation_config
        return twin.eval().requires_grad_(False)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merge_into(self, twin: PreTrainedModel) -> None:
        """Write base + adapter into a plain twin. The base's own bytes are only read.

        Merging and unmerging in place would requantize NF4 each time and let bfloat16 drift.
        """
        base = self.base
        for name, module in twin.named_modules():
            own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            if not own:
                continue
            source: Any = base.get_submodule(name)
            layer = source.get_base_layer() if hasattr(source, "get_base_layer") else source
            for key, value in own.items():
                value.copy_(_dense(layer, key))
            if layer is not source:
                own["weight"].add_(source.get_delta_weight("default").to(own["weight"].dtype))

    def merged(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Base + adapter as a new plain model."""
        twin = self.plain_twin(dtype)
        self.merge_into(twin)
        return twin


def _token_scores(
    head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (zeros if not asked for) of tokens ``[N]`` after states ``[N, H]``."""

    def scores(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scaled = head(states).float() / temperature
        norm = scaled.logsumexp(dim=-1)
        chosen = scaled.gather(-1, tokens[:, None]).squeeze(-1) - norm
        with torch.no_grad():
            spread = norm - (scaled.softmax(-1) * scaled).sum(-1) if entropy else torch.zeros_like(norm)
        return chosen, spread

    assert isinstance(head.weight, Tensor)
    size = max(MOST_LOGITS // head.weight.shape[0], 1)
    if len(ids) <= size:
        return scores(hidden, ids)
    # A chunk's logits live only while it is looked at: the backward makes them again.
    parts = zip(hidden.split(size), ids.split(size), strict=True)
    chunks = [checkpoint(scores, states, tokens, use_reentrant=False) for states, tokens in parts]
    chosen, spread = zip(*chunks, strict=True)
    return torch.cat(chosen), torch.cat(spread)


def _dense(layer: nn.Module, key: str) -> Tensor:
    if key == "weight":
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(layer)
    value = getattr(layer, key)
    assert isinstance(value, Tensor)
    return value
