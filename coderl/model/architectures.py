"""Decoder-only and encoder-decoder models: what differs between the two, up to the head.

A row is laid out the same for both: the prompt, padded on the left, then the completion. A decoder-only model
reads it as one sequence. An encoder-decoder model (T5, CodeT5+) reads the prompt in its encoder; its decoder
reads a start token and the completion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coderl.errors import UserError, named_line
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


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens a model reads at most, by its config.json; None where nothing limits it.

    Where RoPE is scaled, it is not always said whether ``max_position_embeddings`` has been multiplied by the
    factor already: the larger number is taken.
    """
    text = config.get_text_config(decoder=True)
    known = getattr(text, "max_position_embeddings", None)
    if not isinstance(known, int) or known < 1 or getattr(text, "alibi", False):
        return None  # T5 and ALiBi know distances alone, recurrent models neither
    rope = getattr(text, "rope_parameters", None) or {}
    longest = known
    for scaling in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # Gemma has two
        if scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
            original = scaling.get("original_max_position_embeddings") or known
            longest = max(longest, int(original * (scaling.get("factor") or 1.0)))
    return longest


def check_padding(model: PreTrainedModel) -> None:
    """Refuse an encoder that numbers its columns: the padding before a prompt would change what it reads.

    Raises:
        UserError: If the model has one, as BART has.
    """
    if model.config.is_encoder_decoder and any(
        path.rpartition(".")[2] == "embed_positions" for path, _ in model.get_encoder().named_modules()
    ):
        raise UserError(
            f"{model.config.model_type} models number their encoder's columns, padding included, so a prompt "
            "would be read otherwise in each batch: choose a model of another family"
        )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not its head's output on the hidden states that scoring takes.

    The model is run once on a few tokens. What its head is given must be :func:`hidden_states`, up to the
    square root of the precision, relative to their size. What the model returns must be exactly what its head
    returned, for which the head's output is replaced by whole numbers from -100 to 100: a cap of 30 changes
    the small logits of most tokens by less than 16 bits hold.

    Args:
        model: The language model, adapters included where there are any. It is only read.

    Raises:
        UserError: It is such a model, or one that cannot be scored at all.
    """
    family = f"{model.config.model_type} models"
    fix = "which scoring does not know: choose a model of another family"
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{family} have no head that gives logits, {fix}")
    given: list[Tensor] = []
    numbers = torch.arange(-100.0, 101.0, device=model.device)

    def probe(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        given.append(inputs[0])
        row = numbers.repeat(-(-output.shape[-1] // len(numbers)))[: output.shape[-1]]
        return row.to(output.dtype).expand_as(output)

    ids, border = torch.arange(1, 6, device=model.device)[None], 2
    attention = torch.ones_like(ids, dtype=torch.bool)
    mask = torch.arange(ids.shape[1], device=model.device)[None] >= border
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    hook = head.register_forward_hook(probe)
    try:
        with torch.random.fork_rng(devices):
            logits = model(**_inputs(model, ids, attention, border), use_cache=False).logits
            hook.remove()  # before an error of `hidden_states` as well as after it
            states = head_input(model, hidden_states(model, ids, attention, mask))[:, border - 1 :]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{family} cannot be scored ({named_line(error)}): choose another family") from error
    finally:
        hook.remove()
        model.train(was_training)
    if not given:
        raise UserError(f"{family} make their logits without their head, {fix}")
    wanted = given[0][:, -states.shape[1] :].float()
    tolerance = torch.finfo(model.dtype).eps ** 0.5 * float(wanted.square().mean().sqrt())
    if wanted.shape != states.shape or not float((states.float() - wanted).abs().max()) <= tolerance:
        raise UserError(f"{family} change their hidden states before the head, {fix}")
    expected = numbers.repeat(-(-logits.shape[-1] // len(numbers)))[: logits.shape[-1]]
    if logits.shape[-1] != head.weight.shape[0] or not torch.equal(logits[0, -1].float(), expected):
        raise UserError(f"{family} scale or cap their logits after the head, {fix}")


def _inputs(model: PreTrainedModel, ids: Tensor, attention: Tensor, border: int) -> dict[str, Tensor]:
    """Arguments of a model's forward for rows without padding."""
    if (start := decoder_start(model)) is None:
        return {"input_ids": ids, "attention_mask": attention.long()}
    return {
        "input_ids": ids[:, :border],
        "attention_mask": attention[:, :border].long(),
        "decoder_input_ids": nn.functional.pad(ids[:, border:], (1, 0), value=start),
    }


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
