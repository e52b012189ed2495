"""What a run leaves behind for others: the adapter in peft's format, the merged model in transformers'."""

from __future__ import annotations

import fcntl
import gc
import glob
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors import SafetensorError

from coderl.errors import UserError
from coderl.model import adapters, loading
from coderl.model.provenance import POLICY_FILE, prior_training, write_policy_file
from coderl.problems.contamination import FILE as TRAINED
from coderl.problems.contamination import TrainingRecord, merge_records
from coderl.publish import card
from coderl.publish.verify import Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coderl.model.policy import Policy


WRITTEN = (
    *("README.md", card.MERGED, POLICY_FILE, TRAINED, "adapter_config.json", "adapter_model.safetensors"),
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "preprocessor_config.json", "processor_config.json"),
)
"""What models consist of: the files that transformers, peft and this module write, as patterns."""

SPARE = 20_000_000
"""Bytes that tokenizer, configuration and card take at most."""

log = logging.getLogger(__name__)


def save_adapter(
    policy: Policy, folder: Path, trained: TrainingRecord | None = None, run: Path | None = None
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
    if not policy.has_adapter:
        raise UserError("all weights were trained, so there is no adapter to save: save the merged model")
    with _replacing(folder) as partial:
        _save_trained(policy, trained, partial)
        policy.net.save_pretrained(partial, selected_adapters=["default"])
        write_policy_file(policy, partial)
        policy.tokenizer.save_pretrained(partial)
        card.write(partial, card.name_of(folder), run, measured=False)
    return folder


def save_merged(
    policy: Policy,
    folder: Path,
    trained: TrainingRecord | None = None,
    dtype: torch.dtype | None = None,
    run: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write base + adapter as an ordinary checkpoint in safetensors, with tokenizer and model card.

    The pristine base is dequantized and the adapter added once, in the CPU's memory; the policy itself is
    only read. What was written is read again and compared with the policy before it takes its place.

    Args:
        policy: Whose.
        folder: Where to. An earlier merged model there is replaced; what else lies in it stays.
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
    adapters.require_own_weights(policy.base, policy.model)
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
    return policy.base.dtype if policy.trains_all else loading.stored_dtype(policy.source)


def require_replaceable(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier merged model.

    Raises:
        UserError: If it does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the merged model")
    others = [
        path
        for path in folder.iterdir()
        if not (path.name.startswith("epoch-") and (path / card.MERGED).exists()) and not _is_partial(path)
    ]
    if others and not (folder / card.MERGED).is_file():
        raise UserError(
            f"{folder} is not empty and holds no merged model of coderl's: nothing in it is overwritten; "
            "name another folder"
        )


def _require_room(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Say what is lacking before the work, not in the middle of it."""
    size = _parameters(policy) * dtype.itemsize
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    wanted = f"the merged model takes {_gigabytes(size)} in {_name(dtype)}"
    if (free := shutil.disk_usage(parent).free) < size + SPARE:
        raise UserError(
            f"{wanted}, tokenizer and card up to {_gigabytes(SPARE)}, and {parent} has {_gigabytes(free)} "
            "left: make room, or name another folder"
        )
    if (free := psutil.virtual_memory().available) < size:
        raise UserError(
            f"{wanted}, and {_gigabytes(free)} of memory are free: end other programs, or run coderl merge "
            "with a smaller --dtype or where there is more"
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


def _save_trained(policy: Policy, trained: TrainingRecord | None, folder: Path) -> None:
    if known := merge_records(prior_training(policy), trained):
        known.save(folder)


def _is_partial(path: Path) -> bool:
    """Whether it is what :class:`_replacing` works in, or left there when it was killed."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, nobody else who asks for it renames what is in the folder."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks lock nothing
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class _replacing:
    """A folder to write into that takes the place of ``target`` when all went well.

    What is in ``target`` and not part of a model, such as the models of epochs and a user's own files, stays.
    It works in a folder of its own beside the target, ``.NAME.*.partial``, locked as long as it is alive:
    ``new`` is what is written, ``old`` what was there. What a kill left of one is put right by the next.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        parent, name = self.target.parent, self.target.name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(parent):
                for left in parent.glob(f".{glob.escape(name)}.*.partial"):
                    self._put_right(left)
            self.place = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent))
            self.lock = os.open(self.place, os.O_RDONLY)
            with suppress(OSError):  # some network disks lock nothing, for the next either
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            new = self.place / "new"
            new.mkdir()  # for whom the user's umask lets: mkdtemp's is for nobody else
        except OSError as error:
            raise self._failed(error.strerror or error) from error
        return new

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            with _locked(self.target.parent):
                try:
                    if kind is None:
                        self._replace()
                finally:
                    self._settle(self.place)
        except OSError as late:
            raise self._failed(late.strerror or late) from late
        finally:
            os.close(self.lock)
        if isinstance(error, OSError):
            raise self._failed(error.strerror or error) from error
        # A full disk, to the writers of safetensors and of tokenizers, which are written in Rust.
        if isinstance(error, SafetensorError) or (isinstance(error, Exception) and "os error " in str(error)):
            raise self._failed(error) from error

    def _replace(self) -> None:
        new = self.place / "new"
        for weights in new.glob("*.safetensors"):
            weights.chmod(new.stat().st_mode & 0o666)  # their writer lets nobody else read them
        if self.target.exists():
            self.target.rename(self.place / "old")
        new.rename(self.target)

    def _settle(self, place: Path) -> None:
        """Give back what was there if nothing took its place, else what of it was no part of a model."""
        old = place / "old"
        if old.exists() and not self.target.exists():
            old.rename(self.target)
        for path in old.glob("*"):
            part = any(fnmatch(path.name, pattern.partition("/")[0]) for pattern in WRITTEN)
            if not part and not _is_partial(path) and not (self.target / path.name).exists():
                path.rename(self.target / path.name)
        shutil.rmtree(place, ignore_errors=True)

    def _put_right(self, left: Path) -> None:
        with suppress(OSError):  # it is another user's, or alive
            if not any(left.iterdir()):
                return  # its owner is about to lock it
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._settle(left)
            finally:
                os.close(lock)

    def _failed(self, reason: object) -> UserError:
        return UserError(f"{self.target} could not be written: {reason}")
