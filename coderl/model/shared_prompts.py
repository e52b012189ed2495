"""Prompts that several rows share are read once, and so is their gradient.

The samples of a problem all begin with its prompt. Its keys and values are computed once, and each row's
completion attends to them. In the backward they collect the gradients of all rows, of several batches too,
before these go back through the prompt. What is computed is what reading every row whole computes, up to
rounding.
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
    """Different prompts.

    Attributes:
        ids: ``[P, L]`` token ids, padded on the left.
        attention: ``[P, L]`` bool.
    """

    ids: Tensor
    attention: Tensor

    @staticmethod
    def of(ids: Tensor, attention: Tensor, border: int) -> Prompts:
        """The different prompts of rows whose completions start in column ``border``.

        Args:
            ids: ``[B, T]``.
            attention: ``[B, T]`` bool.
            border: Number of columns of the prompts.
        """
        known = _known(ids[:, :border], attention[:, :border])
        _, row = torch.unique(known, dim=0, return_inverse=True)
        # The first row of each prompt; `unique` has sorted them, which does not matter.
        first = torch.full((int(row.max()) + 1,), len(row), dtype=row.dtype, device=row.device)
        first = first.scatter_reduce(0, row, torch.arange(len(row), device=row.device), "amin")
        return Prompts(ids[first, :border], attention[first, :border])

    def find(self, ids: Tensor, attention: Tensor) -> Tensor:
        """``[B]``: which of them the rows ``[B, L']`` are; ``L'`` is at most ``L``."""
        own, given = _known(*self), _known(ids, attention)
        given = nn.functional.pad(given, (own.shape[1] - given.shape[1], 0), value=-1)
        equal = (given[:, None] == own[None]).all(dim=2)
        assert bool(equal.any(dim=1).all()), "a row begins with none of these prompts"
        return equal.long().argmax(dim=1)


def _known(ids: Tensor, attention: Tensor) -> Tensor:
    # Padding may hold any id: only attended tokens make a prompt what it is.
    return torch.where(attention, ids, -1)


class _Recorded(DynamicLayer):
    """A cache layer that keeps what is read first. With checkpointing that is read twice, and kept once."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Shared(DynamicLayer):
    """A cache layer with the prompts' keys and values, which is only read.

    Args:
        keys: Of the prompts, ``[P, heads, L, D]``.
        values: Likewise.
        row: ``[B]``, the prompt of each row.
    """

    def __init__(self, keys: Tensor, values: Tensor, row: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True
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


class Reading:
    """What a model with one adapter has read of some prompts; they are read when it is first asked for.

    Args:
        prompts: The prompts.
        collects: Gradients stop here, until :meth:`backward` sends their sum through the prompts. Otherwise
            each backward goes through them.
    """

    def __init__(self, prompts: Prompts, collects: bool = False) -> None:
        self.prompts, self._collects = prompts, collects
        self._cut: list[tuple[Tensor, Tensor]] = []
        self._encoded: Tensor | None = None
        self._last: Tensor | None = None
        self._cache: list[tuple[Tensor, Tensor]] | None = None

    def encoded(self, model: PreTrainedModel) -> Tensor:
        """The output ``[P, L, H]`` of an encoder-decoder model's encoder."""
        if self._encoded is None:
            ids, attention = self.prompts
            read = model.get_encoder()(input_ids=ids, attention_mask=attention.long())
            self._encoded = self._kept(read.last_hidden_state)
        return self._encoded

    def states(self, model: PreTrainedModel, ids: Tensor, attention: Tensor, border: int) -> Tensor | None:
        """Hidden states before the head, of a decoder-only model: ``[B, T, H]``, zero within prompts.

        Args:
            model: The language model, adapters included where there are any.
            ids: ``[B, T]``.
            attention: ``[B, T]`` bool.
            border: Number of columns of the prompts.

        Returns:
            The states; None for a model that does not keep its prompts in a cache of keys and values.
        """
        self._read(model)
        if not self._cache:
            return None
        assert self._last is not None
        row = self.prompts.find(ids[:, :border], attention[:, :border])
        shared = Cache(layers=[_Shared(keys, values, row) for keys, values in self._cache])
        own = torch.cat([self.prompts.attention[row], attention[:, border:]], dim=1)
        states = _forward(model, ids[:, border:], own, self.prompts.ids.shape[1], shared)
        return nn.functional.pad(torch.cat([self._last[row, None], states], dim=1), (0, 0, border - 1, 0))

    def backward(self) -> None:
        """Send the gradients that were collected through the prompts. Call it once."""
        pairs = [(output, leaf.grad) for output, leaf in self._cut if leaf.grad is not None]
        self._cut = []
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, gradients)

    def _read(self, model: PreTrainedModel) -> None:
        if self._cache is not None:
            return
        recorded = Cache(layer_class_to_replicate=_Recorded)
        self._cache = []
        try:
            read = _forward(model, *self.prompts, 0, recorded)
        except (AttributeError, IndexError, TypeError, ValueError):
            return  # it takes a cache of its own kind alone, as MiniMax does
        layers = [one for one in recorded.layers if isinstance(one, _Recorded) and one.is_initialized]
        complete = len(layers) == model.config.get_text_config().num_hidden_layers
        self._last = self._kept(read[:, -1])
        for layer in layers if complete else []:
            assert layer.keys is not None and layer.values is not None
            self._cache.append((self._kept(layer.keys), self._kept(layer.values)))

    def _kept(self, output: Tensor) -> Tensor:
        """What is computed on with, in place of something that was read."""
        if not self._collects or not output.requires_grad:
            return output
        self._cut.append((output, output.detach().requires_grad_()))
        return self._cut[-1][1]


def _forward(model: PreTrainedModel, ids: Tensor, attention: Tensor, start: int, cache: Cache) -> Tensor:
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
