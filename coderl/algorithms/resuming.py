"""Makes a checkpoint ready for a run with settings of its own, which win over those in it."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch.callbacks import Callback
    from torch.optim.lr_scheduler import LambdaLR

PARAMETERS = "optimizer_parameters"
"""Key in a checkpoint: the names of the parameters, in the order of the optimizer's numbers."""

Groups = dict[tuple[float, float], list[str]]
"""The names of the parameters that train, by learning rate and weight decay."""


def in_order(groups: Groups) -> list[str]:
    """The names in the order in which an optimizer with these groups numbers them."""
    return [name for names in groups.values() for name in names]


def regroup_optimizer(checkpoint: dict[str, Any], groups: Groups) -> None:
    """Rewrite the states of optimizer and schedule in a checkpoint for other parameter groups.

    Args:
        checkpoint: Holds :data:`PARAMETERS`; each parameter keeps its moments.
        groups: Those of the run that resumes.
    """
    (saved,) = checkpoint["optimizer_states"]
    others = {k: v for k, v in saved["param_groups"][0].items() if k != "params"}
    of_name = {checkpoint[PARAMETERS][number]: state for number, state in saved["state"].items()}
    state = {number: of_name[name] for number, name in enumerate(in_order(groups)) if name in of_name}
    param_groups, first = [], 0
    for (rate, decay), names in groups.items():
        numbers = list(range(first, first + len(names)))
        own = {"lr": rate, "initial_lr": rate, "weight_decay": decay, "params": numbers}
        param_groups.append(others | own)
        first += len(names)
    checkpoint["optimizer_states"] = [{"state": state, "param_groups": param_groups}]
    rates = [rate for rate, _ in groups]
    checkpoint["lr_schedulers"][0] |= {"base_lrs": rates, "lr_lambdas": [None] * len(rates)}


def follow(scheduler: LambdaLR) -> None:
    """Set the learning rates to what the schedule says for the step that it is at."""
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def keep_settings(callbacks: Sequence[Callback], states: Mapping[str, dict[str, Any]]) -> None:
    """Replace settings in the callbacks' states, such as a patience, by those that this run gives them."""
    for callback in callbacks:
        state = states.get(callback.state_key, {})
        settings = signature(type(callback).__init__).parameters.keys() & state.keys() - {"dirpath"}
        state |= {name: getattr(callback, name) for name in settings if hasattr(callback, name)}
