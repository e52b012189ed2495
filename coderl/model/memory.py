"""Memory of a device: what is free, what a token takes, and how much may be computed at a time."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from coderl.model import architectures
from coderl.model.allocator import give_back_freed_memory
from coderl.model.logprobs import MOST_LOGITS
from coderl.sandbox import usable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from coderl.model.policy import Policy

CACHE_SHARE = 0.6
"""Share of the free memory for key-value caches; activations and logits of rollouts need the rest."""
UPDATE_SHARE = 0.8
"""Share of the free memory for an update's activations; the rest is for what is not counted."""
MOST_SEQUENCES = {"cpu": 128, "cuda": 512}
"""Sequences decoded together, at most: more are hardly faster."""
MOST_TOKENS = {"cpu": 1536, "cuda": 16384}
"""Tokens in a micro-batch, at most: from there on a step takes more memory and no less time."""
CPU_TOKENS, CPU_BYTES = 256, 400_000_000
"""On a CPU wide models need fewer: these many tokens or bytes of activations, whichever is more tokens."""
FEWEST_TOKENS = 64
"""Where not even that many fit, a step is not tried in smaller parts."""
LOGIT_BYTES = 16
"""Bytes for a logit in the update: itself, its probability and their gradients, float32."""
OPTIMIZER_BYTES = 12
"""Bytes for a trained parameter beside its own: gradient and AdamW's two moments, float32."""
LAST_STEP_BYTES = 12
"""Bytes in the machine's memory for a trained parameter: the last step's copy of it and of its moments."""


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes: the GPU's, or what this process may take of the machine's."""
    if device.type == "cuda":
        # What torch holds in its own cache is free to it.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return usable.memory()


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on a GPU or in the machine."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)
    )


def release(device: torch.device) -> None:
    """Give back what a failed attempt has left behind."""
    gc.collect()
    give_back_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rounded(count: int) -> int:
    """The largest power of two, or one and a half of one, up to a number from 1.

    For a few free megabytes more or less must not change what is sampled and computed.
    """
    step = 1 << (count.bit_length() - 1)
    return step + step // 2 if count >= step + step // 2 else step


# -- rollouts ------------------------------------------------------------------------------------------------


def cache_bytes(config: object, itemsize: int) -> int:
    """Bytes of the key-value cache for one token.

    Args:
        config: A transformers model's.
        itemsize: Bytes of a number in it.
    """
    text = config.get_text_config()  # type: ignore[attr-defined]
    queries = getattr(text, "num_attention_heads", None) or 1  # none in a recurrent model
    heads = getattr(text, "num_key_value_heads", None) or queries
    width = getattr(text, "head_dim", None) or text.hidden_size // queries
    return int(2 * text.num_hidden_layers * heads * width * itemsize)


def copy_fits(size: int, free: int) -> bool:
    """Whether a plain copy to decode from is worth its bytes: twice as many are free."""
    return free > 2 * size


def largest_batch(room: int, sequence: int, limit: int) -> int:
    """How many sequences fit, :func:`rounded`, or the limit.

    Args:
        room: Bytes for their caches.
        sequence: Bytes of one.
        limit: The most.
    """
    return min(limit, rounded(max(1, room // sequence)))


# -- updates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCost:
    """What activations take until the backward, in bytes.

    Attributes:
        read: A token that is read.
        prompt: A token of a prompt that is read for several micro-batches: its keys and values wait for their
            gradients.
        attended: A token of a row's prompt that was read for another row too, whose keys and values are
            copied.
    """

    read: float
    prompt: float
    attended: float

    def checkpointed(self, layers: int, width: int) -> TokenCost:
        """The same with gradient checkpointing: the input of each layer, and the rest of one at a time.

        Args:
            layers: Number of layers.
            width: Bytes of a hidden state.
        """
        read = self.read / layers + layers * width
        # Keys and values of prompts are kept for all layers, and were among the activations before.
        return TokenCost(read, read + 2 * (self.prompt - self.read), self.attended / layers)

    def for_readings(self, count: int) -> TokenCost:
        """The same where so many adapters read the prompts with gradient."""
        return TokenCost(self.read, count * self.prompt, self.attended)


def token_cost(model: PreTrainedModel) -> TokenCost:
    """Count what autograd keeps in small forwards of the model, adapter included, without checkpointing.

    Args:
        model: In evaluation mode.
    """

    # Lightning validates in inference mode, in which nothing is saved.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def kept(rows: int, prompt: int, answer: int) -> int:
        ids = torch.ones(rows, prompt + answer, dtype=torch.long, device=model.device)
        mask = torch.arange(prompt + answer, device=model.device).expand_as(ids) >= prompt
        whole = torch.ones_like(mask)
        return _saved_bytes(model, lambda: architectures.hidden_states(model, ids, whole, mask))

    # Differences, so that what does not depend on the number of tokens drops out.
    prompts = kept(1, 32, 0)
    few, many = kept(2, 32, 8), kept(2, 32, 16)
    read = max((many - few) / 16, (prompts - kept(1, 16, 0)) / 16, 1.0)
    cache = cache_bytes(model.config, model.dtype.itemsize)
    return TokenCost(read, read + cache, max(0.0, (few - prompts - 16 * read) / 64))


def _saved_bytes(model: PreTrainedModel, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        # The storage alone, so that no other gets its address: the tensor of an output would be held by the
        # graph that it holds, for ever.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: torch.empty(0)):
        forward()
    return sum(storage.nbytes() for storage in found.values())


def update_bytes(cost: TokenCost, layers: int, vocabulary: int, prompts: int, tokens: int) -> int:
    """What a micro-batch takes at the peak of its backward.

    Args:
        cost: What a token's activations take.
        layers: Number of layers.
        vocabulary: Number of tokens that there are.
        prompts: Tokens of the prompts that are read beside it.
        tokens: Its own.
    """
    # Gradients of two layers stand beside the activations.
    activations = (prompts * cost.prompt + tokens * cost.read) * (1 + 2 / layers)
    return int(activations + LOGIT_BYTES * min(MOST_LOGITS, tokens * vocabulary))


def fitting_tokens(cost: TokenCost, layers: int, free: int) -> int:
    """How many tokens a micro-batch may have, with prompts of as many tokens beside it.

    Args:
        cost: What a token takes.
        layers: Number of layers.
        free: Bytes.
    """
    logits = LOGIT_BYTES * MOST_LOGITS
    both = (cost.read + cost.prompt) * (1 + 2 / layers)
    return max(FEWEST_TOKENS, int((UPDATE_SHARE * free - logits) / both))


def micro_batch_tokens(kind: str, cost: TokenCost, layers: int, free: int) -> int:
    """As :func:`fitting_tokens`, up to :data:`MOST_TOKENS`, and :func:`rounded`.

    Args:
        kind: ``cpu`` or ``cuda``.
        cost: What a token takes.
        layers: Number of layers.
        free: Bytes.
    """
    count = min(MOST_TOKENS[kind], fitting_tokens(cost, layers, free))
    if kind == "cpu":
        count = min(count, max(CPU_TOKENS, int(CPU_BYTES / cost.read)))
    return rounded(count)


@dataclass(frozen=True)
class Budget:
    """How much of a step is computed at a time.

    Attributes:
        free: Bytes that it was made for.
        cost: What a token takes.
        checkpointed: Whether activations are computed again in the backward.
        tokens: Tokens in a micro-batch.
        scored: Tokens at a time where there is no gradient, and activations are kept of one layer alone.
    """

    free: int
    cost: TokenCost
    checkpointed: bool
    tokens: int
    scored: int

    @staticmethod
    def of(
        kind: str,
        plain: TokenCost,
        layers: int,
        width: int,
        free: int,
        longest: int,
        checkpointed: bool | None,
    ) -> Budget:
        """What fits.

        Args:
            kind: ``cpu`` or ``cuda``.
            plain: What a token takes without gradient checkpointing.
            layers: Number of layers.
            width: Bytes of a hidden state.
            free: Bytes.
            longest: Tokens of the longest row.
            checkpointed: Gradient checkpointing; None: where two of those rows would not fit.
        """
        if checkpointed is None:
            # With fewer rows, what checkpointing takes longer is won by larger micro-batches.
            checkpointed = fitting_tokens(plain, layers, free) < 2 * longest
        cost = plain.checkpointed(layers, width) if checkpointed else plain
        tokens = micro_batch_tokens(kind, cost, layers, free)
        return Budget(free, cost, checkpointed, tokens, min(MOST_TOKENS[kind], tokens * max(1, layers // 2)))

    def smaller(self, scoring: bool) -> Budget | None:
        """The next smaller one, where memory did not suffice; None where there is none.

        Args:
            scoring: It did not without gradient, which says nothing of updates.
        """
        if scoring and self.scored > self.tokens:
            return replace(self, scored=max(self.tokens, self.scored // 2))
        if self.tokens <= FEWEST_TOKENS:
            return None
        tokens = self.tokens // 2
        return replace(self, tokens=tokens, scored=max(tokens, self.scored // 2))


def still_to_come(policy: Policy) -> int:
    """Bytes on the policy's device that training will hold: gradients, the optimizer's state, a copy."""
    trained = sum(p.numel() for p in policy.trainable().values() if p.grad is None)
    return (OPTIMIZER_BYTES + (LAST_STEP_BYTES if policy.device.type == "cpu" else 0)) * trained
