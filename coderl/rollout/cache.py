"""Decoding state of a batch: key-value cache, mask and positions.

Prompts are padded on the left, so that all completions start in one column. Rows of the batch can be repeated
(a prompt's samples) and dropped (finished ones).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from coderl.errors import UserError
from coderl.model import architectures
from coderl.model.padding import left_padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

_GROWTH = 64
"""Columns that are added to a cache layer whenever it is full."""


class DecodingState(Protocol):
    """Decoding state of a batch: what the model has read so far.

    Attributes:
        logits: ``[B, V]`` float32, for the first token after the prompts.
    """

    logits: Tensor

    def read(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Append one token to each row.

        Args:
            tokens: ``[B]`` ids.
            active: ``[B]`` bool. False for finished rows; their logits are ignored.

        Returns:
            Logits ``[B, V]`` float32 for the next token.
        """

    def select(self, indices: Tensor) -> None:
        """Replace the batch by these rows of it, in this order; an index may occur several times."""


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int, max_new_tokens: int
) -> DecodingState:
    """Prefill: run the model over the prompts, one row each.

    Args:
        model: In evaluation mode.
        prompts: Non-empty rows of token ids.
        pad: Padding id.
        max_new_tokens: Most tokens that will be appended to a row.

    Raises:
        UserError: If rows of the model's cache cannot be selected.
    """
    ids, attention = left_padded(prompts, pad, model.device)
    start = architectures.decoder_start(model)
    if start is None:
        return DecoderOnlyState(model, ids, attention, max_new_tokens)
    return EncoderDecoderState(model, ids, attention, start)


class DecoderOnlyState:
    """State of a decoder-only model, which reads prompt and completion as one sequence."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, max_new_tokens: int) -> None:
        self.model, self.width = model, ids.shape[1]
        # Long enough for all completions from the start: each step takes a view instead of a copy.
        self.attention = nn.functional.pad(attention.long(), (0, max_new_tokens), value=1)
        # Positions count attended tokens, as in architectures.hidden_states: padding changes nothing.
        positions = (attention.long().cumsum(dim=1) - 1).clamp(min=0)
        self.last_position = positions[:, -1]
        # Only the last column's logits are needed; those of whole prompts would fill gigabytes.
        can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
        output = model(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=positions,
            use_cache=True,
            **({"logits_to_keep": 1} if can_skip else {}),
        )
        self.cache = _preallocated(model, getattr(output, "past_key_values", None))
        self.logits = output.logits[:, -1].float()

    def read(self, tokens: Tensor, active: Tensor) -> Tensor:
        """See :class:`DecodingState`."""
        self.width += 1
        # Finished rows that are still in the batch stay where they are: further on, their positions could
        # leave the table of a model with learned positions (GPT-2).
        self.last_position = self.last_position + active.long()
        logits: Tensor = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.attention[:, : self.width],
            position_ids=self.last_position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits[:, -1].float()

    def select(self, indices: Tensor) -> None:
        """See :class:`DecodingState`."""
        self.cache.batch_select_indices(indices)
        self.attention, self.last_position = self.attention[indices], self.last_position[indices]


class EncoderDecoderState:
    """State of an encoder-decoder model. Its decoder reads a start token and the completion, no prompt."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, start: int) -> None:
        self.model, self.attention = model, attention.long()
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.attention).last_hidden_state
        self.cache: Any = None
        self.logits = self._decode(torch.full_like(ids[:, 0], start))
        self.cache = _preallocated(model, self.cache)

    def read(self, tokens: Tensor, active: Tensor) -> Tensor:
        """See :class:`DecodingState`."""
        return self._decode(tokens)  # the decoder counts positions by itself, so `active` is not needed

    def select(self, indices: Tensor) -> None:
        """See :class:`DecodingState`."""
        self.cache.batch_select_indices(indices)
        self.attention, self.encoded = self.attention[indices], self.encoded[indices]

    def _decode(self, tokens: Tensor) -> Tensor:
        output = self.model(
            encoder_outputs=(self.encoded,),
            attention_mask=self.attention,
            decoder_input_ids=tokens[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits
        return logits[:, -1].float()


class PreallocatedLayer(DynamicLayer):
    """A cache layer with spare columns, so that a new token is written in place.

    transformers' own layer concatenates, which copies the whole cache for each token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        vars(self).update(vars(layer))  # takes over a filled layer: its class's __init__ makes an empty one
        self._buffers = [self.keys, self.values]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append one column or more; returns keys and values of all columns."""
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if stop > self._buffers[0].shape[-2]:
            spare = (0, 0, 0, stop + _GROWTH - start)  # columns behind the filled ones
            self._buffers = [nn.functional.pad(states, spare) for states in (self.keys, self.values)]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
        return self._views(stop)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._buffers = [buffer.index_select(0, indices) for buffer in self._buffers]
        self._views(self.keys.shape[-2])

    def _views(self, width: int) -> tuple[Tensor, Tensor]:
        """Make ``keys`` and ``values`` the filled columns of the buffers."""
        self.keys, self.values = (buffer[..., :width, :] for buffer in self._buffers)
        return self.keys, self.values


def _preallocated(model: PreTrainedModel, cache: Any) -> Any:
    """The cache after the prompts, its plain layers replaced by :class:`PreallocatedLayer`.

    Raises:
        UserError: If rows of it cannot be selected, as in a recurrent model's.
    """
    # An encoder-decoder's cross-attention cache does not grow: only its self-attention is replaced.
    decoder = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layers = getattr(decoder, "layers", [])
    # MiniMax's own class of DynamicCache has the method too, and it fails.
    if type(decoder) is not DynamicCache or not all(hasattr(i, "batch_select_indices") for i in layers):
        raise UserError(
            f"{model.config.model_type} models have no cache that rows can be removed from, which sampling "
            "needs: choose a model of another family"
        )
    # Layers of other types, such as sliding windows, drop columns and stay as they are.
    decoder.layers = [PreallocatedLayer(layer) if type(layer) is DynamicLayer else layer for layer in layers]
    return cache
