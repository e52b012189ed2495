"""What a fit leaves for others: adapter, merged model, their cards, and copies on the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.errors import UsageError, UserError
from coderl.publish import card, hub
from coderl.publish.export import save_adapter, save_merged
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from coderl.model.policy import Policy
    from coderl.problems.contamination import TrainingRecord

log = logging.getLogger(__name__)


def save_models(policy: Policy, run: Path, trained: TrainingRecord | None, merge: bool) -> dict[str, str]:
    """Write the adapter, where there is one, and the merged model.

    Where the adapter is saved, a merge that fails is told, and the fit goes on: it can be done again.

    Args:
        policy: Whose.
        run: The run folder.
        trained: What the policy was trained on here.
        merge: Whether to merge.

    Returns:
        The folders, under ``adapter`` and ``merged``.

    Raises:
        UserError: What there is to save could not be saved.
    """
    folder = RunFolder(run)
    folder.summary.unlink(missing_ok=True)  # of an earlier part of the run: it speaks of other weights
    paths: dict[str, str] = {}
    if policy.has_adapter:
        paths["adapter"] = str(save_adapter(policy, folder.adapter, trained, run))
    if not merge:
        return paths
    target = folder.merged
    try:
        paths["merged"] = str(save_merged(policy, target, trained, run=run))
    except UserError as error:
        if not paths:
            raise
        again = f"coderl merge --adapter_model_id {run} --output_dir {target}"
        log.warning("no merged model: %s; the adapter is saved, to merge it: %s", error, again)
    return paths


def write_cards(paths: dict[str, str], run: Path) -> None:
    """Write the models' cards again, now that the run's summary says what was measured."""
    for kind in ("adapter", "merged"):
        if kind in paths:
            folder = Path(paths[kind])
            card.write(folder, card.model_name(folder), run)


def check_push(push: bool, hub_model_id: str | None) -> None:
    """Say before the fit what would keep its models from the hub.

    Raises:
        UsageError: There is an id and nothing to be pushed, or it is none.
    """
    if not push:
        if hub_model_id is not None:
            raise UsageError(
                "PostFit: hub_model_id says where to push: set push_to_hub: true, or leave it out"
            )
        return
    from huggingface_hub import get_token

    if hub_model_id is not None:
        hub.require_id(hub_model_id)
    if get_token() is None:
        log.warning("PostFit: push_to_hub needs a token, and there is none: `hf auth login`, or set HF_TOKEN")


def push_models(paths: dict[str, str], hub_model_id: str | None) -> dict[str, str]:
    """Push what was saved. What cannot be pushed is told: the fit is done, and its models are here.

    Args:
        paths: The folders, under ``adapter`` and ``merged``.
        hub_model_id: The adapter's id; the merged model's has ``-merged`` behind it. None: one's own name and
            the run's.

    Returns:
        Addresses, under ``adapter on the hub`` and ``merged on the hub``.
    """
    ids = {"adapter": hub_model_id, "merged": hub_model_id and f"{hub_model_id}-merged"}
    urls = {}
    for kind, hub_id in ids.items():
        if kind in paths:
            try:
                urls[f"{kind} on the hub"] = hub.push(Path(paths[kind]), hub_id)
            except UserError as error:
                log.warning("%s", error)
    return urls
