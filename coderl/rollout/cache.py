"""What a model has read of the rows of a batch, as transformers' caches hold it.

Prompts are padded on the left, and a batch keeps its columns; its rows may be repeated and taken out.
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

_SPARE = 64
"""Columns that a cache layer grows by."""


class DecodingState(Protocol):
    """A batch that has been read up to the token that comes next.

    Attributes:
        logits: ``[B, V]`` float32, of that token after the prompts.
    """

    logits: Tensor

    def read(self, tokens: Tensor, going: Tensor) -> Tensor:
        """Logits ``[B, V]`` after one more token a row.

        Args:
            tokens: ``[B]`` ids.
            going: ``[B]`` bool; the other rows mean nothing any more.
        """

    def select(self, places: Tensor) -> None:
        """Go on with these rows of the batch, in this order; one may come several times."""


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int, longest: int
) -> DecodingState:
    """Read one row a prompt.

    Args:
        model: In evaluation mode.
        prompts: Non-empty rows of token ids.
        pad: Id of the padding.
        longest: Most tokens that will be read after them.

    Raises:
        UserError: If rows cannot leave the model's cache.
    """
    ids, attention = left_padded(prompts, pad, model.device)
    start = architectures.decoder_start(model)
    if start is None:
        return DecoderOnlyState(model, ids, attention, longest)
    return EncoderDecoderState(model, ids, attention, start)


class DecoderOnlyState:
    """Of a decoder-only model: it reads prompt and completion as one text."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, longest: int) -> None:
        self.model, self.width = model, ids.shape[1]
        self.attention = nn.functional.pad(attention.long(), (0, longest), value=1)
        # Counting attended tokens, padding changes nothing (see families.hidden_states).
        positions = (attention.long().cumsum(dim=1) - 1).clamp(min=0)
        self.last = positions[:, -1]
        # Of the prompts only the last column's logits count: all of them would fill gigabytes.
        can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
        output = model(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=positions,
            use_cache=True,
            **({"logits_to_keep": 1} if can_skip else {}),
        )
        self.cache = _growing(model, getattr(output, "past_key_values", None))
        self.logits = output.logits[:, -1].float()

    def read(self, tokens: Tensor, going: Tensor) -> Tensor:
        """See :class:`DecodingState`."""
        self.width += 1
        self.last = self.last + going.long()  # rows that wait to leave must not run off a table of positions
        logits: Tensor = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.attention[:, : self.width],
            position_ids=self.last[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits[:, -1].float()

    def select(self, places: Tensor) -> None:
        """See :class:`DecodingState`."""
        self.cache.batch_select_indices(places)
        self.attention, self.last = self.attention[places], self.last[places]


class EncoderDecoderState:
    """Of an encoder-decoder model: its decoder reads the completion alone, from the start token on."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, start: int) -> None:
        self.model, self.attention = model, attention.long()
        self.prompt = model.get_encoder()(input_ids=ids, attention_mask=self.attention).last_hidden_state
        self.cache: Any = None
        self.logits = self._read(torch.full_like(ids[:, 0], start))
        self.cache = _growing(model, self.cache)

    def read(self, tokens: Tensor, going: Tensor) -> Tensor:
        """See :class:`DecodingState`."""
        return self._read(tokens)  # it counts positions by itself

    def select(self, places: Tensor) -> None:
        """See :class:`DecodingState`."""
        self.cache.batch_select_indices(places)
        self.attention, self.prompt = self.attention[places], self.prompt[places]

    def _read(self, tokens: Tensor) -> Tensor:
        output = self.model(
            encoder_outputs=(self.prompt,),
            attention_mask=self.attention,
            decoder_input_ids=tokens[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits
        return logits[:, -1].float()


class PreallocatedLayer(DynamicLayer):
    """A layer of the cache with columns to spare: transformers' own copies all of it for each token."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        vars(self).update(vars(layer))
        self._wide = [self.keys, self.values]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in one column or more; keys and values of all of them."""
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if stop > self._wide[0].shape[-2]:
            self._wide = [_widened(states, stop + _SPARE) for states in (self.keys, self.values)]
        for wide, new in zip(self._wide, (key_states, value_states), strict=True):
            wide[..., start:stop, :] = new
        return self._show(stop)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._wide = [wide.index_select(0, indices) for wide in self._wide]
        self._show(self.keys.shape[-2])

    def _show(self, width: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (wide[..., :width, :] for wide in self._wide)
        return self.keys, self.values


def _widened(states: Tensor, width: int) -> Tensor:
    wide = states.new_empty(*states.shape[:-2], width, states.shape[-1])
    wide[..., : states.shape[-2], :] = states
    return wide


def _growing(model: PreTrainedModel, cache: Any) -> Any:
    """The cache after the prompts, ready to have rows repeated and taken out.

    Raises:
        UserError: If it is of a kind that does not allow it, such as a recurrent model's.
    """
    parts = [cache.self_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    layers = [layer for part in parts for layer in getattr(part, "layers", [])]
    able = isinstance(parts[0], DynamicCache) and all(
        hasattr(each, "batch_select_indices") for each in layers
    )
    if not able:
        raise UserError(
            f"{model.config.model_type} models keep no cache that rows can be taken out of, which sampling "
            "does: choose a model of another family"
        )
    parts[0].layers = [PreallocatedLayer(each) if type(each) is DynamicLayer else each for each in layers]
    return cache
