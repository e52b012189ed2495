"""Verification of a merged model: it is compared with base and adapter, by logits and by weights.

The logits, on real prompts, find a wrong model. The weights of the adapted layers find an adapter that was
added in half or twice: divergence grows with the square of what an adapter does, so the logits show little of
that where it does little.
"""

from __future__ import annotations

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

    Row = tuple[list[int], list[int]]  # token ids of a prompt, and of its solution

PROBLEMS = 6
"""Problems compared on: embedded ones, prompts with solutions, about 500 tokens together."""

LONGEST = 256
"""Tokens of a prompt with its solution, at most; longer ones are cut."""


@dataclass(frozen=True)
class Tolerance:
    """How far a merged model may be from base and adapter.

    Attributes:
        kl: Mean divergence, nats per token. Finds what is wrong everywhere, such as a missing adapter.
        logit: Largest difference of two logits, in standard deviations of the token's logits. Finds what is
            wrong in one place, such as one row of the head, which a mean hides.
    """

    kl: float
    logit: float


TOLERANCES = {
    torch.float32: Tolerance(1e-8, 2e-3),
    torch.float16: Tolerance(4e-4, 0.4),
    torch.bfloat16: Tolerance(2e-2, 2.5),
}
"""By the coarser of the precisions that the policy computes in and the merged model is stored in.

Measured with the embedded model and SmolLM2-135M, each with an adapter that moves its base by 0.2 nats: at
most 1.2e-11 nats and 2e-5 deviations in float32, 4e-5 and 0.06 in float16, 2.3e-3 and 0.25 in bfloat16. Each
tolerance is at least six times that, so that it fails on mistakes and not on rounding.
"""

SHARE = (0.8, 1.2)
"""How much of what the adapter adds to a layer must be in the merged layer. Correct merges: 0.96 to 1.001."""

MAX_ROUNDING = 0.1
"""How far that share may be from 1 by rounding alone; layers beyond are not measurable, and not judged."""


@dataclass(frozen=True)
class Verification:
    """The result of the comparison.

    Attributes:
        tokens: Number of tokens compared, prompts and solutions together.
        kl: Mean divergence of the merged model from base and adapter, nats per token.
        logit: Largest difference of two logits, in standard deviations of the token's logits.
        effect: Mean divergence of the base alone from base and adapter; None where there is no adapter.
        allowed: The tolerance of ``kl``.
        allowed_logit: The tolerance of ``logit``.
        precision: The coarser of the two precisions, such as ``bfloat16``.
        stored: The precision that the merged model is stored in.
        adapted: Number of layers to which the adapter adds something.
        measurable: Number of those where that is more than what rounding to ``stored`` changes.
        share: The smallest and the largest share of it in a measurable layer; None where there are none.
    """

    tokens: int
    kl: float
    logit: float
    effect: float | None
    allowed: float
    allowed_logit: float
    precision: str
    stored: str
    adapted: int
    measurable: int
    share: tuple[float, float] | None

    @property
    def passed(self) -> bool:
        """Whether it is the same model, up to rounding."""
        smallest, largest = self.share or (1.0, 1.0)
        complete = SHARE[0] <= smallest and largest <= SHARE[1]
        return self.kl <= self.allowed and self.logit <= self.allowed_logit and complete  # false for NaN

    def describe(self) -> str:
        """The figures in one sentence."""
        text = (
            f"on {self.tokens} tokens the logits are {self.kl:.1e} nats a token away in the mean (tolerance "
            f"in {self.precision} {self.allowed:.1e}), and {self.logit:.1e} of their standard deviation at "
            f"most (tolerance {self.allowed_logit:g})"
        )
        if self.effect is not None:
            text += f"; the base alone is {self.effect:.1e} nats away"
        if self.share:
            smallest, largest = self.share
            text += (
                f"; {smallest:.3f} to {largest:.3f} of what the adapter adds is in {self.measurable} layers' "
                "weights"
            )
        if below := self.adapted - self.measurable:
            text += (
                f"; in {below} of {self.adapted} layers what the adapter adds is below the rounding of "
                f"{self.stored}, so nothing is claimed of it there"
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """The object in ``merge.json``; some of its keys are older than the names here."""
        keys = {"stored": "kept", "measurable": "told"}
        return {keys.get(name, name): value for name, value in asdict(self).items()} | {
            "words": self.describe()
        }


class Probe:
    """A policy's logits on a few problems, computed before it is merged, to compare the merged model with.

    Args:
        policy: A policy with its weights loaded. It is only read.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.precision: torch.dtype = policy.base.dtype
        self.device = policy.device
        self.rows = _rows(policy)
        self.effect: float | None = None
        with policy.without_dropout():
            self.expected = list(logits(policy.base, self.rows))
            if policy.has_adapter:
                with adapters.using(policy.net, None):
                    alone = zip(self.expected, logits(policy.base, self.rows), strict=True)
                    self.effect = float(torch.cat([_divergences(*pair) for pair in alone]).mean())

    def check(self, folder: Path) -> Verification:
        """Read a merged model from disk, as transformers does, and compare.

        Args:
            folder: The merged model's.

        Raises:
            UserError: It cannot be read, or is another model.
        """
        stored = loading.stored_dtype(str(folder))
        merged = loading.load_base(str(folder), "none", *_placement(folder, stored, self.device)).eval()
        result = self._compare(merged, stored)
        if not result.passed:
            raise UserError(
                f"the merged model is not base and adapter: {result.describe()}; nothing is kept of it"
            )
        return result

    def _compare(self, merged: Any, stored: torch.dtype) -> Verification:
        coarser = max(stored, self.precision, key=lambda dtype: torch.finfo(dtype).eps)
        tolerance = TOLERANCES[coarser]
        divergences, furthest = [], 0.0
        for expected, got in zip(self.expected, logits(merged, self.rows), strict=True):
            divergences.append(_divergences(expected, got))
            apart = got - expected
            # A constant added to all of a token's logits changes no probability.
            apart = (apart - apart.mean(-1, keepdim=True)).abs().amax(-1) / expected.std(-1)
            # max() would pass over NaN.
            furthest = max(furthest, float(apart.max())) if bool(apart.isfinite().all()) else float("nan")
        found = list(shares(self.policy, merged, stored))
        # Written with "not", so that a layer whose rounding is NaN is judged, and fails.
        judged = torch.tensor([share for share, rounded in found if not abs(rounded - 1) > MAX_ROUNDING])
        # Where the adapter does less than the tolerance, a merge without it would pass: then half its effect
        # is the tolerance, but not less than a quarter of the usual one, which rounding may come near.
        half = tolerance.kl if self.effect is None else self.effect / 2
        return Verification(
            tokens=sum(len(row) for row in divergences),
            kl=float(torch.cat(divergences).mean()),
            logit=furthest,
            effect=self.effect,
            allowed=min(tolerance.kl, max(tolerance.kl / 4, half)),
            allowed_logit=tolerance.logit,
            precision=str(coarser).removeprefix("torch."),
            stored=str(stored).removeprefix("torch."),
            adapted=len(found),
            measurable=len(judged),
            share=(float(judged.min()), float(judged.max())) if len(judged) else None,
        )


@torch.no_grad()
def shares(policy: Policy, merged: Any, stored: torch.dtype) -> Iterator[tuple[float, float]]:
    """How much of what the adapter adds is in each layer of a merged model: 1 is all, 0 none, 2 twice.

    Args:
        policy: Base and adapter.
        merged: The merged model, with its weights as they are on disk or in a wider precision.
        stored: The precision on disk.

    Yields:
        For each layer to which the adapter adds something the share, ⟨merged - base, added⟩ / ⟨added, added⟩,
        and what it would be by rounding alone.
    """
    for name, module in adapters.adapted(policy.base).items():
        added = module.get_delta_weight(adapters.POLICY).float()
        if not (size := float(added.square().sum())):
            continue
        layer, key = module.get_base_layer(), name.rpartition(".")[2]
        base = loading.dense(layer, key).float()
        weight = merged.get_parameter(name).to(base.device, torch.float32)
        weight = weight.T if loading.is_transposed(layer) else weight
        rounded = (base + added).to(stored).float()
        yield tuple(float(((found - base) * added).sum()) / size for found in (weight, rounded))  # type: ignore[misc]


@torch.no_grad()
def logits(model: Any, rows: Sequence[Row]) -> Iterator[Tensor]:
    """``[T, V]`` in float32 on the CPU, a row at a time.

    Args:
        model: A language model, in its present mode and with its active adapter.
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


def _divergences(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected ‖ got) of each token, nats."""
    # In double: float32 would round away what two float32 models differ by.
    wanted, given = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1)


def _placement(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
    """The precision and the device to compute a merged model in: the policy's GPU if it fits there."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.3 * size:
        return dtype, device
    # Half precision is slow on most CPUs, and rounds once more.
    size_in_float32 = size * torch.float32.itemsize // dtype.itemsize
    fits = psutil.virtual_memory().available > 1.2 * size_in_float32
    return torch.float32 if fits else dtype, torch.device("cpu")
