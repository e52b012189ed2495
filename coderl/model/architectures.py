"""Decoder-only and encoder-decoder models: what differs between the two, up to the head.

A row is laid out the same for both: the prompt, padded on the left, then the completion. A decoder-only model
reads it as one sequence. An encoder-decoder model (T5, CodeT5+) reads the prompt in its encoder; its decoder
reads a start token and the completion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coderl.errors import UserError
from coderl.model import shared_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class of transformers for this architecture."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def is_encoder_decoder(source: str) -> bool:
    """Whether the model in a folder or on the hub is an encoder-decoder model, by its config.json."""
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(source).is_encoder_decoder)


def decoder_start(model: PreTrainedModel) -> int | None:
    """The token that an encoder-decoder model's answer starts with; None for a decoder-only model.

    Raises:
        UserError: If the checkpoint names none.
    """
    if not model.config.is_encoder_decoder:
        return None
    assert model.generation_config is not None
    start = model.generation_config.decoder_start_token_id
    if start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise UserError(
            f"{model.config.name_or_path} names no decoder_start_token_id: set one in its "
            "generation_config.json (T5 starts from its pad token)"
        )
    return int(start)


def check_head(config: PreTrainedConfig) -> None:
    """Refuse models that change their logits after the head, which scoring does not do.

    Raises:
        UserError: If this is one.
    """
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if (value := getattr(config, name, None)) not in (None, 1.0):
            raise UserError(
                f"{config.model_type} models have {name} {value}, which scoring does not know: choose a "
                "model of another family"
            )


def hidden_states(model: PreTrainedModel, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
    """Hidden states before the head: ``[B, T, H]``, column t after token t was read.

    They are valid where the token or its successor is under ``mask``, and undefined elsewhere.

    Args:
        model: The language model, adapters included where there are any.
        ids: ``[B, T]``.
        attention: ``[B, T]`` bool.
        mask: ``[B, T]`` bool, in each row true at its whole completion or nowhere. Only an encoder-decoder
            model needs it: all completions must start in one column then.
    """
    # The first column of the completions; all of a batch start in one.
    border = int(mask.any(dim=0).long().argmax())
    if model.config.is_encoder_decoder:
        return _decoded(model, ids, attention, border or ids.shape[1])
    if border and shared_prompts.can_share(model):
        prompts = shared_prompts.distinct_prompts(ids, attention, border)
        if len(prompts.ids) < len(ids):
            states = shared_prompts.hidden_states(model, ids, attention, border, prompts)
            if states is not None:
                return states
    # Positions count attended tokens: so padding on either side changes nothing.
    positions = (attention.long().cumsum(dim=1) - 1).clamp(min=0)
    output = model.base_model(
        input_ids=ids, attention_mask=attention.long(), position_ids=positions, use_cache=False
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def _decoded(model: PreTrainedModel, ids: Tensor, attention: Tensor, border: int) -> Tensor:
    # T5's position biases depend on distances only, so left padding of prompts changes nothing. Completions
    # are padded on the right, which a causal decoder never sees: it needs no mask.
    first = decoder_start(model)
    assert first is not None
    start = torch.full_like(ids[:, :1], first)
    prompts = shared_prompts.distinct_prompts(ids, attention, border)
    read = model.get_encoder()(input_ids=prompts.ids, attention_mask=prompts.attention.long())
    answer = model.get_decoder()(
        input_ids=torch.cat([start, ids[:, border:]], dim=1),
        encoder_hidden_states=read.last_hidden_state[prompts.row],
        encoder_attention_mask=prompts.attention[prompts.row].long(),
        use_cache=False,
    ).last_hidden_state
    # The start token takes the place of the prompt's last one: the state there chooses the first token.
    return nn.functional.pad(answer, (0, 0, border - 1, 0))


def head_input(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The input of the model's head: the hidden states, which T5 scales down before a tied head."""
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    return hidden * model.config.d_model**-0.5 if scaled else hidden
