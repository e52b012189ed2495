"""Files beside saved weights that say how they were made: base precision, and the problems trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from coderl.files import read_json_or_none, write_atomic
from coderl.model.loading import EMBEDDED, WeightCount
from coderl.problems.contamination import TrainingRecord, merge_records
from coderl.types import ComputeDtype, Quantization

if TYPE_CHECKING:
    from coderl.model.policy import Policy

POLICY_FILE = "policy.json"
"""Lies beside an adapter: how its base was held in training.

``quantization`` and ``compute_dtype`` are those of the weights in memory; then their number, and how many of
them were in 4 bits; where there are such, the GGUF file that they were converted from, the commit on the hub.
"""


def write_policy_file(policy: Policy, folder: Path) -> None:
    """Write :data:`POLICY_FILE` for a loaded policy.

    Raises:
        OSError: It cannot be written.
    """
    count = WeightCount.of(policy.base)
    body = {
        "quantization": "nf4" if count.quantized else "none",
        "compute_dtype": str(policy.base.dtype).removeprefix("torch."),
        "weights": count.quantized + count.plain,
        "weights_in_4_bits": count.quantized,
        "gguf_file": policy.gguf_file,
        "commit": getattr(policy.base.config, "_commit_hash", None),
    }
    body = {key: value for key, value in body.items() if value is not None}
    write_atomic(folder / POLICY_FILE, json.dumps(body) + "\n")


def read_policy_file(folder: str | Path) -> dict[str, Any]:
    """The content of :data:`POLICY_FILE`; empty where it is missing or damaged, as in others' adapters."""
    body = read_json_or_none(Path(folder, POLICY_FILE))
    return body if isinstance(body, dict) else {}


def quantization_of(adapter: str | Path | None) -> Quantization:
    """The quantization of the base that an adapter was trained on.

    Args:
        adapter: Folder of the adapter.

    Returns:
        ``nf4`` where the adapter's folder does not say; ``none`` without an adapter.
    """
    if adapter is None:
        return "none"
    return "none" if read_policy_file(adapter).get("quantization") == "none" else "nf4"


def compute_dtype_of(adapter: str | Path | None) -> ComputeDtype:
    """The precision in which an adapter was trained; ``auto`` where its folder does not say."""
    found = read_policy_file(adapter).get("compute_dtype") if adapter else None
    return next((name for name in get_args(ComputeDtype) if name == found), "auto")


def prior_training(policy: Policy) -> TrainingRecord | None:
    """What a policy was trained on before this run, from the local folders that it starts from.

    Returns:
        None where no such folder has a training record. A hub id never has.

    Raises:
        UserError: A folder's record is damaged.
    """
    base = policy.model if policy.model != EMBEDDED and not policy.from_scratch else None
    folders = [Path(folder).expanduser() for folder in (policy.adapter, base) if folder]
    return merge_records(*map(TrainingRecord.load, folders))
