"""Warns, once each, of what makes a fit with GRPO or PPO learn nothing or the wrong thing."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import fmean, median, variance
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from coderl.errors import UsageError
from coderl.scores.numbers import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

WATCHED = (
    "reward/mean",
    "reward/passed",
    "policy/entropy",
    "policy/kl",
    "policy/kl_old",
    "mismatch_kl",
    "groups/no_signal",
    "groups/refilled",
    "completion/length",
    "completion/clipped",
    "grading/inline",
    "outcome/infra_error",
)
VALIDATED = "val/pass@1"
VALIDATIONS = 3
"""Validations in a row that bring nothing better, as in ``validated.yaml``."""
SURE = 3.0
"""Standard errors by which a mean must be higher than another to count as risen.

Where it is asked at each step, two are met by chance too often.
"""


class Health(Callback):
    """Says in one line what goes wrong in a fit: what is seen, the likely cause, and the setting to change.

    Nothing is said of a healthy fit, and each kind of trouble is named once in a fit, resumed or not. A
    figure is over its limit where its mean over ``window`` steps is, and more than half of these steps are:
    one wild step is no trouble. Beside the limits below, it is named when ``reward/mean`` has risen by more
    than three standard errors since the best ``val/pass@1`` and three validations brought nothing better.

    A limit of null is not looked at. Each says where it comes from; "ours" is a choice that no paper makes.

    Args:
        window: Steps in a mean. The beginning is the median of the first so many.
        entropy_lost: Share of the entropy at the beginning that is gone. arXiv:2505.22617 (2.3), of 11
            models: 94 % of it was lost, and 93 % of the gain made, in the first third of the training; the
            rest brought little.
        no_signal: Share of GRPO's groups without signal that nothing was refilled for. Ours: from 3 in 4 on,
            four programs are sampled for one that teaches; the README's SmolLM2 run ends at 60 %. Why there
            are such groups: arXiv:2503.14476, 3.2.
        kl: Divergence from the reference, or from the policy that sampled, in nats per token. Ours: over what
            ``ppo.yaml`` allows within a step, 1.5 times 0.3.
        mismatch_kl: How far engine and trainer are apart, nats per token either way. The documentation of
            Tinker (RL hyperparameters): training is stable below 0.01, and above it numerics are at fault.
        length_factor: By how much completions are longer or shorter than at the beginning, while no larger
            share of the programs passes. Ours: lengths alone may well change, as when a model learns to end.
        clipped: Share of completions cut off at ``max_new_tokens``. Ours: their reward says little of what
            they would have been (arXiv:2503.14476, 3.4).
        inline: Share of programs whose tests ran beside them unprotected. Ours: a policy finds a hole in few.
        infra_error: Share of samples that the sandbox could not judge. Ours: on a sound machine it is 0.
    """

    def __init__(
        self,
        window: int = 10,
        entropy_lost: float | None = 0.94,
        no_signal: float | None = 0.75,
        kl: float | None = 0.5,
        mismatch_kl: float | None = 0.01,
        length_factor: float | None = 3.0,
        clipped: float | None = 0.3,
        inline: float | None = 0.1,
        infra_error: float | None = 0.05,
    ) -> None:
        if window < 2:
            raise UsageError(f"Health: window is {window}: means need 2 steps or more")
        self.window = window
        self.entropy_lost, self.no_signal = entropy_lost, no_signal
        self.kl, self.mismatch_kl = kl, mismatch_kl
        self.length_factor, self.clipped = length_factor, clipped
        self.inline, self.infra_error = inline, infra_error
        self.said: list[str] = []
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=window) for name in WATCHED}
        self.first: dict[str, list[float]] = {}
        self.validations: list[float] = []
        self.rewards_at_best: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the step's metrics, and say what is over its limit."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        for name, values in self.recent.items():
            # NaN: nothing to take a mean of in this step.
            if name in metrics and math.isfinite(value := float(metrics[name])):
                values.append(value)
                if len(values) == self.window:
                    self.first.setdefault(name, list(values))
        for kind, found in {
            "entropy": self._entropy(),
            "signal": self._signal(),
            "divergence": self._divergence(),
            "mismatch": self._mismatch(),
            "length": self._length(),
            "truncation": self._truncation(),
            "grading": self._grading(),
            "unjudged": self._unjudged(),
        }.items():
            self._say(kind, found)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say when validation does not follow the reward."""
        metrics, rewards = trainer.callback_metrics, self.recent["reward/mean"]
        known = VALIDATED in metrics and not trainer.sanity_checking
        if not trainer.is_global_zero or not known or len(rewards) < self.window:
            return
        value = float(metrics[VALIDATED])
        if not self.validations or value > self.validations[0]:
            self.validations, self.rewards_at_best = [value], list(rewards)
            return
        self.validations.append(value)
        if len(self.validations) > VALIDATIONS and _risen(self.rewards_at_best, rewards):
            since = ", ".join(percent(value) for value in self.validations[-VALIDATIONS:])
            self._say(
                "validation",
                f"the reward rises and validation does not: reward/mean went from "
                f"{fmean(self.rewards_at_best):.3f} to {fmean(rewards):.3f} since {VALIDATED} was best, at "
                f"{percent(self.validations[0])}; the last were {since}. The policy learns its training "
                "problems by heart, or what their tests let through: read completions.jsonl, look for weak "
                "tests with coderl check --mutants 10, and end with the best weights by -c validated.yaml",
            )

    def _say(self, kind: str, text: str) -> None:
        if text and kind not in self.said:
            self.said.append(kind)
            log.warning("health: %s", text)

    def _over(self, values: Sequence[float], limit: float | None) -> bool:
        """Whether the mean of a whole window, and more than half of its values, are over the limit."""
        if limit is None or len(values) < self.window:
            return False
        return fmean(values) > limit and sum(value > limit for value in values) > len(values) / 2

    @property
    def _over_steps(self) -> str:
        return f"over the last {self.window} steps"

    def _entropy(self) -> str:
        now, first = self.recent["policy/entropy"], median(self.first.get("policy/entropy", [0.0]))
        if first <= 0 or not self._over([1 - value / first for value in now], self.entropy_lost):
            return ""
        return (
            f"entropy has collapsed: {fmean(now):.2g} nats per token {self._over_steps}, {first:.2g} at the "
            "beginning. A policy so sure of itself writes the same program again and again, and has nothing "
            "left to choose from: lower model.learning_rate, or set model.entropy_coefficient (0.001) or "
            "model.kl_coefficient (0.02)"
        )

    def _signal(self) -> str:
        # Without `refill_budget` nothing is refilled, and no such metric is logged.
        refilled = self.recent["groups/refilled"] or [0.0] * self.window
        left = [a - b for a, b in zip(self.recent["groups/no_signal"], refilled, strict=False)]
        if not self._over(left, self.no_signal):
            return ""
        passed = fmean(self.recent["reward/passed"] or [math.nan])
        hard = not passed > 0.5  # also where nothing is known
        mend = "warm up with sft.yaml, raise model.group_size" if hard else "take harder problems"
        return (
            f"{percent(fmean(left))} of the groups have no signal {self._over_steps}: all samples of a "
            f"problem earn the same, and nothing is learned from them. {percent(passed)} of the programs "
            f"pass, so the problems are too {'hard' if hard else 'easy'} for this policy: {mend}, or have "
            "others drawn by --data.curriculum '{}' or model.refill_budget 12"
        )

    def _divergence(self) -> str:
        settings = {
            "policy/kl": "from its reference: lower model.learning_rate, raise model.kl_coefficient, or end "
            "such a fit by RewardStopping's max_kl",
            "policy/kl_old": "within one step: lower model.learning_rate or model.inner_epochs, or with PPO "
            "model.target_kl",
        }
        for name, text in settings.items():
            if self._over(self.recent[name], self.kl):
                mean = fmean(self.recent[name])
                return (
                    f"{name} has run away: {mean:.2g} nats per token {self._over_steps}, the limit is "
                    f"{self.kl:g}. The updates are too large and the policy moves too far {text}"
                )
        return ""

    def _mismatch(self) -> str:
        values = self.recent["mismatch_kl"]
        if not any(self._over([sign * value for value in values], self.mismatch_kl) for sign in (1, -1)):
            return ""
        return (
            f"engine and trainer are out of step: mismatch_kl is {fmean(values):.2g} nats per token "
            f"{self._over_steps}, and training is stable under {self.mismatch_kl:g}. They compute in other "
            "precisions or kernels (model.policy.compute_dtype), or the engine samples from old weights, "
            "which its sync() must take over: mend that, or weigh tokens by model.sampler_correction token"
        )

    def _length(self) -> str:
        now, first = self.recent["completion/length"], median(self.first.get("completion/length", [0.0]))
        passed, before = (
            fmean(some["reward/passed"]) if some.get("reward/passed") else 0.0
            for some in (self.recent, self.first)
        )
        if first <= 0 or passed > before:
            return ""
        longer = self._over([value / first for value in now], self.length_factor)
        if not longer and not self._over([first / max(value, 1e-9) for value in now], self.length_factor):
            return ""
        seen = (
            f"{fmean(now):.0f} tokens {self._over_steps}, {first:.0f} at the beginning, and no more programs "
            f"pass ({percent(passed)}, {percent(before)})"
        )
        if longer:
            return (
                f"completions have exploded: {seen}. The policy rambles: set model.overlong_buffer (a fifth "
                "of max_new_tokens) and model.loss_type dapo or dr_grpo, or lower model.learning_rate"
            )
        return (
            f"completions have collapsed: {seen}. Writing little may be the surest way round a penalty: "
            "set model.scale none and model.loss_type dapo, a syntax_penalty nearer 0 in model.rewards, or a "
            "lower model.learning_rate"
        )

    def _truncation(self) -> str:
        values = self.recent["completion/clipped"]
        if not self._over(values, self.clipped):
            return ""
        return (
            f"{percent(fmean(values))} of the completions are cut off {self._over_steps}: they fail however "
            "good they would have been. Raise model.max_new_tokens, leave them out by model.truncated mask, "
            "or warm up with sft.yaml a model that does not know how to end"
        )

    def _grading(self) -> str:
        values = self.recent["grading/inline"]
        if not self._over(values, self.inline):
            return ""
        return (
            f"{percent(fmean(values))} of the programs are graded inline {self._over_steps}: their tests run "
            "beside them and are believed, and a policy may learn to forge them. coderl check FILE names the "
            "problems: give their asserts a side of their own (assert f(2) == 4), and leave "
            "model.sandbox.grading at auto"
        )

    def _unjudged(self) -> str:
        values = self.recent["outcome/infra_error"]
        if not self._over(values, self.infra_error):
            return ""
        return (
            f"{percent(fmean(values))} of the samples have no verdict {self._over_steps}: the sandbox itself "
            "failed, and they teach nothing. The machine is short of memory, processes or disk: see what "
            "coderl doctor says, and lower model.sandbox.workers"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was said, and the figures that are compared."""
        return {
            "said": list(self.said),
            "recent": {name: list(values) for name, values in self.recent.items()},
            "first": {name: list(values) for name, values in self.first.items()},
            "validations": list(self.validations),
            "rewards_at_best": list(self.rewards_at_best),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was said, and the figures; of these a shorter window keeps the latest."""
        self.said = list(state_dict["said"])
        for name, values in self.recent.items():
            values.clear()
            values.extend(state_dict["recent"].get(name, ()))
        self.first = {name: list(values) for name, values in state_dict["first"].items()}
        self.validations = list(state_dict["validations"])
        self.rewards_at_best = list(state_dict["rewards_at_best"])


def _risen(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the mean is higher by more than :data:`SURE` standard errors of the difference."""
    if len(before) < 2 or len(now) < 2:
        return False
    error = math.sqrt(variance(before) / len(before) + variance(now) / len(now))
    return fmean(now) - fmean(before) > SURE * error
