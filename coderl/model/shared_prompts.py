"""Prompts that several rows of a batch share are read once, and so is their gradient.

The samples of a problem all begin with its prompt. Its keys and values are computed once, and each row's
completion attends to them; in the backward they collect the gradients of all rows before they go back through
the prompt. What is computed is what reading every row whole computes, up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_KEEPS_CACHE = hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache")
"""Whether this version of transformers lets a layer have a cache under activation checkpointing."""


class Prompts(NamedTuple):
    """The different prompts of a batch.

    Attributes:
        ids: ``[P, L]`` token ids, padded on the left.
        attention: ``[P, L]`` bool.
        row: ``[B]``, the prompt of each row.
    """

    ids: Tensor
    attention: Tensor
    row: Tensor


def distinct_prompts(ids: Tensor, attention: Tensor, border: int) -> Prompts:
    """The different prompts of rows whose completions start in column ``border``.

    Args:
        ids: ``[B, T]``.
        attention: ``[B, T]`` bool.
        border: Number of columns of the prompts.
    """
    # Padding may hold any id: only attended tokens make a prompt what it is.
    known = torch.where(attention[:, :border], ids[:, :border], -1)
    _, row = torch.unique(known, dim=0, return_inverse=True)
    # The first row of each prompt; `unique` has sorted them, which does not matter.
    first = torch.full((int(row.max()) + 1,), len(row), dtype=row.dtype, device=row.device)
    first = first.scatter_reduce(0, row, torch.arange(len(row), device=row.device), "amin")
    return Prompts(ids[first, :border], attention[first, :border], row)


class _Recorded(DynamicLayer):
    """A cache layer that keeps what is read first. With checkpointing that is read twice, and kept once."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Shared(DynamicLayer):
    """A cache layer with the prompts' keys and values, which is only read.

    Args:
        prompts: Their keys and values, ``[P, heads, L, D]``.
        row: ``[B]``, the prompt of each row.
    """

    def __init__(self, prompts: _Recorded, row: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = prompts.keys, prompts.values, True
        self._row = row

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([own.index_select(0, self._row), new], dim=-2) for own, new in pairs)
        return keys, values


def can_share(model: PreTrainedModel) -> bool:
    """Whether all that a model remembers of a prompt is keys and values, so that rows can share it."""
    if getattr(model, "_is_stateful", False):
        return False
    return _KEEPS_CACHE or not model.is_gradient_checkpointing


def keep_cache(model: PreTrainedModel) -> None:
    """Let layers have a cache under activation checkpointing: those made here may be read twice."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._can_checkpoint_with_cache = True


def hidden_states(
    model: PreTrainedModel, ids: Tensor, attention: Tensor, border: int, prompts: Prompts
) -> Tensor | None:
    """Hidden states before the head, of a decoder-only model: ``[B, T, H]``, zero within prompts.

    Args:
        model: The language model, adapters included where there are any.
        ids: ``[B, T]``.
        attention: ``[B, T]`` bool.
        border: Number of columns of the prompts.
        prompts: Those of the rows.

    Returns:
        The states; None for a model that does not keep its prompts in a cache of keys and values.
    """
    recorded = Cache(layer_class_to_replicate=_Recorded)
    read = _read(model, prompts.ids, prompts.attention, 0, recorded)
    layers = [layer for layer in recorded.layers if isinstance(layer, _Recorded) and layer.is_initialized]
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        return None
    shared = Cache(layers=[_Shared(layer, prompts.row) for layer in layers])
    own = torch.cat([prompts.attention[prompts.row], attention[:, border:]], dim=1)
    states = _read(model, ids[:, border:], own, border, shared)
    last = read[prompts.row, -1:]
    return nn.functional.pad(torch.cat([last, states], dim=1), (0, 0, border - 1, 0))


def _read(model: PreTrainedModel, ids: Tensor, attention: Tensor, start: int, cache: Cache) -> Tensor:
    # Positions count attended tokens: so padding on either side changes nothing.
    positions = (attention.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]
    output = model.base_model(
        input_ids=ids,
        attention_mask=attention.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state  # type: ignore[no-any-return]
