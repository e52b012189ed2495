"""What a run leaves behind for others: the adapter in peft's format, the merged model in transformers'."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors import SafetensorError

from coderl import card, models
from coderl.data.contamination import Trained, before, united
from coderl.errors import UserError
from coderl.verify import Probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from coderl.policy import Policy


POLICY_FILE = "policy.json"
"""What lies beside an adapter and says how the base was held when it was trained."""

log = logging.getLogger(__name__)


def save_adapter(
    policy: Policy, folder: Path, trained: Trained | None = None, run: Path | None = None
) -> Path:
    """Write the adapter, the tokenizer and a model card. Whole or not at all: a full disk leaves the old one.

    Args:
        policy: Whose.
        folder: Where to.
        trained: What the policy was trained on here. It is written down, with what it had been trained on.
        run: The run folder, whose settings the card tells.

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
        noted = {"quantization": policy.quantization, "compute_dtype": _name(policy.base.dtype)}
        (partial / POLICY_FILE).write_text(json.dumps(noted) + "\n", encoding="utf-8")
        policy.tokenizer.save_pretrained(partial)
        card.write(partial, card.name_of(folder), run, measured=False)
    return folder


def save_merged(
    policy: Policy,
    folder: Path,
    trained: Trained | None = None,
    dtype: torch.dtype | None = None,
    run: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write base + adapter as an ordinary checkpoint in safetensors, with tokenizer and model card.

    The pristine base is dequantized and the adapter added once, in the CPU's memory; the policy itself is
    only read. What was written is read again and compared with the policy before it takes its place.

    Args:
        policy: Whose.
        folder: Where to. An earlier merged model there is replaced, models of epochs in it stay.
        trained: What the policy was trained on here. It is written down, with what it had been trained on.
        dtype: Of the weights; see :func:`merged_dtype`.
        run: The run folder, whose settings the card tells.
        progress: Takes a line on each of the things that take long.

    Returns:
        ``folder``.

    Raises:
        UserError: If disk or memory do not suffice, something else lies in the folder, the result is another
            model than the policy, or the policy started from a folder whose list of training problems is
            damaged.
    """
    dtype = dtype or merged_dtype(policy)
    tell = progress or log.debug
    require_replaceable(folder)
    _require_room(policy, folder, dtype)
    with _replacing(folder) as partial:
        _save_trained(policy, trained, partial)
        probe = Probe(policy)
        size = _parameters(policy) * dtype.itemsize
        tell(f"merging, and writing {_gigabytes(size)} in {_name(dtype)} to {folder}")
        policy.merged(dtype, "merging" if progress else None).save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        gc.collect()  # the twin holds itself, and is as large as what is read now
        tell("reading it again, and comparing it with base and adapter")
        found = probe.check(partial)
        tell(f"verified: {found.words}")
        held = {"quantization": policy.quantization, "all_weights_trained": policy.trains_all}
        card.note(partial, policy.gguf_file or policy.model, _name(dtype), held, found.to_json())
        card.write(partial, card.name_of(folder), run, measured=False)
    return folder


def merged_dtype(policy: Policy) -> torch.dtype:
    """The precision a policy is merged in: its base's checkpoint's, or its own where all weights trained.

    Rounding those would take back most of what they learned.
    """
    return policy.base.dtype if policy.trains_all else models.stored_dtype(policy.source)


def require_replaceable(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier merged model.

    Raises:
        UserError: If it does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the merged model")
    others = [p for p in folder.iterdir() if not (p.name.startswith("epoch-") and (p / card.MERGED).exists())]
    if others and not (folder / card.MERGED).is_file():
        raise UserError(
            f"{folder} is not empty and holds no merged model of coderl's: nothing in it is overwritten; "
            "name another folder"
        )


def _require_room(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Say what is lacking before the work, not in the middle of it."""
    size = _parameters(policy) * dtype.itemsize
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    wanted = f"the merged model takes {_gigabytes(size)} in {_name(dtype)}, and"
    if (free := shutil.disk_usage(parent).free) < size:
        raise UserError(f"{wanted} {parent} has {_gigabytes(free)} left: make room, or name another folder")
    if (free := psutil.virtual_memory().available) < size:
        raise UserError(
            f"{wanted} {_gigabytes(free)} of memory are free: end other programs, or run coderl merge with a "
            "smaller --dtype or where there is more"
        )


def _parameters(policy: Policy) -> int:
    """How many the base has, tied ones once. Two of them share a byte in NF4."""
    shapes = (
        state.shape if (state := getattr(parameter, "quant_state", None)) is not None else parameter.shape
        for name, parameter in policy.base.named_parameters()
        if ".lora_" not in name
    )
    return sum(shape.numel() for shape in shapes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"


def _save_trained(policy: Policy, trained: Trained | None, folder: Path) -> None:
    if known := united(before(policy), trained):
        known.save(folder)


class _replacing:
    """A folder to write into that takes the place of ``target`` when all went well.

    Folders in ``target``, such as those of epochs, stay.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(f".{target.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise self._failed(error.strerror or error) from error
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if kind is None:
                self._replace()
        except OSError as late:
            raise self._failed(late.strerror or late) from late
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._failed(error.strerror or error) from error
        if isinstance(error, SafetensorError):  # what a full disk is to its writer
            raise self._failed(error) from error

    def _replace(self) -> None:
        old = self.target.with_name(f".{self.target.name}.old")
        if self.target.exists():
            self.target.rename(old)
        self.partial.rename(self.target)
        for folder in [path for path in old.glob("*") if path.is_dir()]:
            if not (self.target / folder.name).exists():
                folder.rename(self.target / folder.name)
        shutil.rmtree(old, ignore_errors=True)

    def _failed(self, reason: object) -> UserError:
        return UserError(f"{self.target} could not be written: {reason}")
