"""Whether a merged model is base and adapter: by its logits on real prompts, and by its weights.

Divergence grows with the square of what an adapter does, so of one that does little the logits cannot tell
half from the whole; the weights of the layers that it is on can.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from coderl.errors import UserError
from coderl.model import adapters, architectures, loading
from coderl.problems import Embedded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from coderl.model.policy import Policy

    Row = tuple[list[int], list[int]]

PROBLEMS = 6
"""Problems of the package's own, prompts with solutions: some 500 tokens."""

LONGEST = 256
"""Tokens of a prompt with its solution; what is longer is cut."""


@dataclass(frozen=True)
class Tolerance:
    """How far a merged model may be from base and adapter.

    Attributes:
        kl: Mean divergence, nats per token.
        logit: Largest difference of two logits, in standard deviations of the token's logits.
    """

    kl: float
    logit: float


TOLERANCES = {
    torch.float32: Tolerance(1e-8, 2e-3),
    torch.float16: Tolerance(4e-4, 0.4),
    torch.bfloat16: Tolerance(2e-2, 2.5),
}
"""By the coarser of the precisions that the policy computes in and the merged model is kept in.

Measured with the embedded model and SmolLM2-135M, each with an adapter that moves its base by 0.2 nats: at
most 1.2e-11 nats and 2e-5 deviations in float32, 4e-5 and 0.06 in float16, 2.3e-3 and 0.25 in bfloat16.
"""


SHARE = (0.8, 1.2)
"""How much of what the adapter adds to a layer may be in the merged layer. Right ones: 0.96 to 1.001."""

PLAIN = 0.1
"""How far that share may be from 1 by rounding alone. Of layers where it is further nothing is claimed."""


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        tokens: Compared, prompts and solutions together.
        kl: Mean divergence of the merged model from base and adapter, nats per token.
        logit: Largest difference of two logits, in standard deviations of the token's logits.
        effect: Mean divergence of the base alone from base and adapter; None where there is no adapter.
        allowed: What ``kl`` may be.
        allowed_logit: What ``logit`` may be.
        precision: The coarser of the two precisions, such as ``bfloat16``.
        kept: The precision that the merged model is kept in.
        adapted: Layers to which the adapter adds something.
        told: Those of them where that is more than what rounding to ``kept`` does.
        share: The least and the most that there is of it in one of the ``told``; None where there are none.
    """

    tokens: int
    kl: float
    logit: float
    effect: float | None
    allowed: float
    allowed_logit: float
    precision: str
    kept: str
    adapted: int
    told: int
    share: tuple[float, float] | None

    @property
    def holds(self) -> bool:
        """Whether it is the same model, up to rounding. What is not finite is not."""
        least, most = self.share or (1.0, 1.0)
        added = SHARE[0] <= least and most <= SHARE[1]
        return self.kl <= self.allowed and self.logit <= self.allowed_logit and added

    @property
    def words(self) -> str:
        """The figures in one sentence."""
        effect = "" if self.effect is None else f"; the base alone is {self.effect:.1e} nats away"
        return (
            f"on {self.tokens} tokens the logits are {self.kl:.1e} nats a token away in the mean (tolerance "
            f"in {self.precision} {self.allowed:.1e}), and {self.logit:.1e} of their standard deviation at "
            f"most (tolerance {self.allowed_logit:g}){effect}{self._weights}"
        )

    @property
    def _weights(self) -> str:
        words = ""
        if self.share:
            least, most = self.share
            words = f"; {least:.3f} to {most:.3f} of what the adapter adds is in {self.told} layers' weights"
        if lost := self.adapted - self.told:
            words += (
                f"; in {lost} of {self.adapted} layers what the adapter adds is below the rounding of "
                f"{self.kept}, so nothing is claimed of it there"
            )
        return words

    def to_json(self) -> dict[str, Any]:
        """For ``merge.json``."""
        return asdict(self) | {"words": self.words}


class Probe:
    """What a policy answers, noted before it is merged.

    Args:
        policy: Its weights are loaded. It is only read.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.precision: torch.dtype = policy.base.dtype
        self.device = policy.device
        self.rows = _rows(policy)
        adapted = policy.has_adapter
        with policy.without_dropout():
            self.expected = list(logits(policy.base, self.rows))
            with adapters.using(policy.net, None) if adapted else nullcontext():
                self.effect = _divergence(self.expected, logits(policy.base, self.rows)) if adapted else None

    def check(self, folder: Path) -> Verification:
        """Read a merged model from disk, as transformers does, and compare.

        Args:
            folder: Where it is.

        Raises:
            UserError: It cannot be read, or is another model.
        """
        kept = loading.stored_dtype(str(folder))
        merged = loading.load_base(str(folder), "none", *_place(folder, kept, self.device)).eval()
        found = self._compare(merged, kept)
        if not found.holds:
            raise UserError(f"the merged model is not base and adapter: {found.words}; nothing is kept of it")
        return found

    def _compare(self, merged: Any, kept: torch.dtype) -> Verification:
        """Go through the rows once. A divergence of the tolerance is too much where the adapter does less."""
        coarser = max(kept, self.precision, key=lambda dtype: torch.finfo(dtype).eps)
        tolerance = TOLERANCES[coarser]
        divergences, furthest = [], 0.0
        for expected, got in zip(self.expected, logits(merged, self.rows), strict=True):
            divergences.append(_divergences(expected, got))
            apart = got - expected
            apart = (apart - apart.mean(-1, keepdim=True)).abs().amax(-1) / expected.std(-1)
            furthest = max(furthest, float(apart.max())) if bool(apart.isfinite().all()) else float("nan")
        found = list(shares(self.policy, merged, kept))
        told = torch.tensor([got for got, rounded in found if not abs(rounded - 1) > PLAIN])  # NaN is told
        half = tolerance.kl if self.effect is None else self.effect / 2
        return Verification(
            sum(len(row) for row in divergences),
            float(torch.cat(divergences).mean()),
            furthest,
            self.effect,
            min(tolerance.kl, max(tolerance.kl / 4, half)),
            tolerance.logit,
            str(coarser).removeprefix("torch."),
            str(kept).removeprefix("torch."),
            len(found),
            len(told),
            (float(told.min()), float(told.max())) if len(told) else None,
        )


@torch.no_grad()
def shares(policy: Policy, merged: Any, kept: torch.dtype) -> Iterator[tuple[float, float]]:
    """How much of what the adapter adds is in each layer of a merged model: 1 is all, 0 none, 2 twice.

    Args:
        policy: Base and adapter.
        merged: The model, with its weights as they are on disk or in a wider precision.
        kept: The precision on disk.

    Yields:
        For each layer to which the adapter adds something the share, ⟨merged - base, added⟩ / ⟨added, added⟩,
        and what it would be by rounding alone.
    """
    for name, module in policy.base.named_modules():
        if not hasattr(module, "get_delta_weight") or not hasattr(module, "get_base_layer"):
            continue
        added = module.get_delta_weight(adapters.POLICY).float()
        if not (size := float(added.square().sum())):
            continue
        base = loading.dense(module.get_base_layer(), "weight").float()
        weight = merged.get_submodule(name).weight.to(base.device, torch.float32)
        rounded = (base + added).to(kept).float()
        yield tuple(float(((found - base) * added).sum()) / size for found in (weight, rounded))  # type: ignore[misc]


@torch.no_grad()
def logits(model: Any, rows: Sequence[Row]) -> Iterator[Tensor]:
    """``[T, V]`` in float32 on the CPU, a row at a time.

    Args:
        model: A language model, as it stands.
        rows: Token ids of a prompt, and of an answer to it.
    """
    device = next(model.parameters()).device
    start = architectures.decoder_start(model)
    for prompt, answer in rows:
        given = {"input_ids": torch.tensor([prompt if start is not None else prompt + answer], device=device)}
        if start is not None:
            given["decoder_input_ids"] = torch.tensor([[start, *answer]], device=device)
        yield model(**given, use_cache=False).logits[0].float().cpu()


def _rows(policy: Policy) -> list[Row]:
    problems = Embedded().load("test")
    config = policy.base.config.get_text_config()
    longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    rows = []
    for problem in problems[:: len(problems) // PROBLEMS][:PROBLEMS]:
        prompt = policy.encode(problem)[:longest]
        answer = policy.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        rows.append((prompt, list(answer)[: longest - len(prompt)]))
    return rows


def _divergence(expected: Sequence[Tensor], got: Iterator[Tensor]) -> float:
    rows = [_divergences(*pair) for pair in zip(expected, got, strict=True)]
    return float(torch.cat(rows).mean())


def _divergences(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected ‖ got) of each token, nats. Float32 would round what float32 models differ by."""
    wanted, given = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1)


def _place(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
    """Where a merged model is computed: beside the policy where it fits; in float32 on CPUs with room.

    Half precision is slow on most CPUs, and rounds once more.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.3 * size:
        return dtype, device
    wide = size * torch.float32.itemsize // dtype.itemsize
    roomy = psutil.virtual_memory().available > 1.2 * wide
    return torch.float32 if roomy else dtype, torch.device("cpu")
