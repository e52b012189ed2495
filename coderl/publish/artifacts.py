"""The artifacts of a fit: adapter, merged model, their cards, and copies on the hub."""

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

    A merge that fails is logged if the adapter is saved: ``coderl merge`` can do it later.

    Args:
        policy: The trained policy.
        run: The run folder.
        trained: What the policy was trained on here.
        merge: Whether to merge.

    Returns:
        The folders, under ``adapter`` and ``merged``.

    Raises:
        UserError: What there is to save could not be saved.
    """
    folder = RunFolder(run)
    folder.summary.unlink(missing_ok=True)  # from before the run was resumed: of other weights than these
    paths: dict[str, str] = {}
    if policy.has_adapter:
        paths["adapter"] = str(save_adapter(policy, folder.adapter, trained, run))
    if not merge:
        return paths
    try:
        paths["merged"] = str(save_merged(policy, folder.merged, trained, run=run))
    except UserError as error:
        if not paths:
            raise
        again = f"coderl merge --adapter_model_id {run} --output_dir {folder.merged}"
        log.warning("no merged model: %s; the adapter is saved, to merge it: %s", error, again)
    return paths


def write_cards(paths: dict[str, str], run: Path) -> None:
    """Write the models' cards again, once the run's summary has the scores.

    Args:
        paths: The models' folders, under ``adapter`` and ``merged``; other keys are ignored.
        run: The run folder.
    """
    for folder in [Path(paths[kind]) for kind in ("adapter", "merged") if kind in paths]:
        card.write(folder, card.model_name(folder), run)


def check_push(push: bool, hub_model_id: str | None) -> None:
    """Find before the fit what would prevent the push after it; a missing token is only logged.

    Args:
        push: Whether the models are to be pushed.
        hub_model_id: The adapter's id on the hub.

    Raises:
        UsageError: There is an id and nothing is pushed, or the id is not valid.
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
    """Push what was saved. What fails is logged: the fit is done, and its models are on the disk.

    Args:
        paths: The folders, under ``adapter`` and ``merged``.
        hub_model_id: The adapter's id; the merged model's has ``-merged`` appended. None: the user's name on
            the hub, and the run's.

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
