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
from coderl.model.shared_prompts import Prompts, Reading, can_share

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


def first_answer_column(mask: Tensor) -> int:
    """The first column of the completions ``[B, T]``, which all start in one; 0 where there is none."""
    return int(mask.any(dim=0).long().argmax())


def hidden_states(
    model: PreTrainedModel, ids: Tensor, attention: Tensor, mask: Tensor, reading: Reading | None = None
) -> Tensor:
    """Hidden states before the head: ``[B, T, H]``, column t after token t was read.

    They are valid where the token or its successor is under ``mask``, and undefined elsewhere.

    Args:
        model: The language model, adapters included where there are any.
        ids: ``[B, T]``.
        attention: ``[B, T]`` bool.
        mask: ``[B, T]`` bool, in each row true at its whole completion or nowhere. Only an encoder-decoder
            model needs it: all completions must start in one column then.
        reading: Of the prompts, for several batches. None: those of this batch are read here.
    """
    border = first_answer_column(mask)
    if model.config.is_encoder_decoder:
        return _decoded(model, ids, attention, border or ids.shape[1], reading)
    if border and can_share(model):
        if reading is None and len((prompts := Prompts.of(ids, attention, border)).ids) < len(ids):
            reading = Reading(prompts)
        states = reading.states(model, ids, attention, border) if reading is not None else None
        if states is not None:
            return states
    # Positions count attended tokens: so padding on either side changes nothing.
    positions = (attention.long().cumsum(dim=1) - 1).clamp(min=0)
    output = model.base_model(
        input_ids=ids, attention_mask=attention.long(), position_ids=positions, use_cache=False
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def _decoded(
    model: PreTrainedModel, ids: Tensor, attention: Tensor, border: int, reading: Reading | None
) -> Tensor:
    # T5's position biases depend on distances only, so left padding of prompts changes nothing. Completions
    # are padded on the right, which a causal decoder never sees: it needs no mask.
    first = decoder_start(model)
    assert first is not None
    start = torch.full_like(ids[:, :1], first)
    reading = reading or Reading(Prompts.of(ids, attention, border))
    row = reading.prompts.find(ids[:, :border], attention[:, :border])
    answer = model.get_decoder()(
        input_ids=torch.cat([start, ids[:, border:]], dim=1),
        encoder_hidden_states=reading.encoded(model)[row],
        encoder_attention_mask=reading.prompts.attention[row].long(),
        use_cache=False,
    ).last_hidden_state
    # The start token takes the place of the prompt's last one: the state there chooses the first token.
    return nn.functional.pad(answer, (0, 0, border - 1, 0))


def head_input(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The input of the model's head: the hidden states, which T5 scales down before a tied head."""
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    return hidden * model.config.d_model**-0.5 if scaled else hidden
