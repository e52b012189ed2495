"""What lies beside weights and says where they come from: the problems they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coderl.model.loading import EMBEDDED
from coderl.problems.contamination import TrainingRecord, merge_records

if TYPE_CHECKING:
    from coderl.model.policy import Policy

POLICY_FILE = "policy.json"
"""Lies beside an adapter: how its base was held, and the precision it computed in, during training."""


def prior_training(policy: Policy) -> TrainingRecord | None:
    """What a policy was trained on before it is trained here, by the local folders that it starts from.

    Returns:
        None where no such folder says so, which a hub id never does.

    Raises:
        UserError: A folder's file is damaged.
    """
    base = policy.model if policy.model != EMBEDDED and not policy.from_scratch else None
    folders = [Path(place).expanduser() for place in (policy.adapter, base) if place]
    return merge_records(*map(TrainingRecord.load, folders))
