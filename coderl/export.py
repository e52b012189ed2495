"""What a run leaves behind for others: the adapter in peft's format, the merged model in transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.data.contamination import Trained, before, united
from coderl.errors import UserError

if TYPE_CHECKING:
    from coderl.policy import Policy


POLICY_FILE = "policy.json"
"""What lies beside an adapter and says how the base was held when it was trained."""


def save_adapter(policy: Policy, folder: Path, trained: Trained | None = None) -> Path:
    """Write the adapter and the tokenizer. Whole or not at all: a full disk leaves the old one.

    Args:
        policy: Whose.
        folder: Where to.
        trained: What the policy was trained on here. It is written down, with what it had been trained on.

    Returns:
        ``folder``.

    Raises:
        UserError: If the policy has no adapter, the disk is full, or the policy started from a folder whose
            list of training problems is damaged.
    """
    if policy.base is policy.net:
        raise UserError("all weights were trained, so there is no adapter to save: save the merged model")
    with _replacing(folder) as partial:
        _save_trained(policy, trained, partial)
        policy.net.save_pretrained(partial, selected_adapters=["default"])
        noted = {"quantization": policy.quantization}
        (partial / POLICY_FILE).write_text(json.dumps(noted) + "\n", encoding="utf-8")
        policy.tokenizer.save_pretrained(partial)
    return folder


def save_merged(policy: Policy, folder: Path, trained: Trained | None = None) -> Path:
    """Write base + adapter as an ordinary checkpoint with its tokenizer, in safetensors.

    The pristine base is dequantized and the adapter added once; the policy itself is only read.

    Args:
        policy: Whose.
        folder: Where to.
        trained: What the policy was trained on here. It is written down, with what it had been trained on.

    Returns:
        ``folder``.

    Raises:
        UserError: If the disk is full, or the policy started from a folder whose list of training problems is
            damaged.
    """
    with _replacing(folder) as partial:
        _save_trained(policy, trained, partial)
        policy.merged().save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
    return folder


def _save_trained(policy: Policy, trained: Trained | None, folder: Path) -> None:
    if known := united(before(policy), trained):
        known.save(folder)


class _replacing:
    """A folder to write into that takes the place of ``target`` when all went well."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(f".{target.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            old = self.target.with_name(f".{self.target.name}.old")
            if self.target.exists():
                self.target.rename(old)
            self.partial.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{self.target} could not be written: {error.strerror or error}") from error
