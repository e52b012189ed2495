"""Checkpoint files that are whole or not there: written beside their place, checked when read."""

from __future__ import annotations

import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from coderl.errors import UserError, named_line

if TYPE_CHECKING:
    from collections.abc import Callable


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint plugin, whose files survive a kill, a full disk and a power cut.

    Lightning writes to the system's folder for temporary files and then moves, which copies where that is
    another disk: what is killed or runs full meanwhile leaves a part, in place of the file that was there.
    Here a file is written under another name in its own folder, synced, and renamed.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint. Remote paths (``s3://...``) are left to Lightning.

        Raises:
            OSError: It cannot be written, with the path. The file that was there is as it was.
        """
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}.*.partial"):
            left.unlink(missing_ok=True)  # of a process that was killed: a run has one writer
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            if (cause := _system_error(error)) is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(target)) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            UserError: It is damaged.
        """
        if not is_remote(path) and (damage := damage_of(Path(path))):
            raise UserError(f"{path} is damaged or no checkpoint ({damage}); name another with --ckpt_path")
        return super().load_checkpoint(path, map_location, weights_only)


def is_remote(path: str | Path) -> bool:
    """Whether it is a URL, such as ``s3://bucket/run``; a ``Path`` never is, as it folds the slashes."""
    return "://" in str(path)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None where it is whole.

    Every part of the file is compared with its checksum. torch writes these (CRC-32, it is a zip archive) and
    does not look at them when it reads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                return f"the checksum of {bad} is wrong"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return None  # as it was written, with objects that are loaded only where weights_only is false
    except Exception as error:  # damaged files fail in many ways: zip, JSON, truncated storages
        return named_line(error, limit=80)
    return None


def latest_whole(
    *folders: Path, besides: Path | None = None, weights_only: bool = True
) -> tuple[Path, int] | None:
    """The undamaged checkpoint of the most steps that a fit can go on from, and these; None without any.

    Args:
        folders: Need not be there.
        besides: A file that is left out.
        weights_only: Whether files are left out whose objects could run code when they are read.
    """
    found: list[tuple[Path, int]] = []
    for path in (path for folder in folders for path in folder.glob("*.ckpt") if path != besides):
        try:
            state = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        except Exception:  # see damage_of
            continue
        if isinstance(state, dict) and "optimizer_states" in state:  # not of weights alone
            found.append((path, int(state["global_step"])))
    # Among those of one step, last.ckpt: another may have been written before all callbacks had counted.
    found.sort(key=lambda one: (one[1], one[0].name == "last.ckpt"), reverse=True)
    return next((one for one in found if not damage_of(one[0])), None)


def _system_error(error: BaseException) -> OSError | None:
    """The error of the operating system behind one of torch's writer, which reports its own on top."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder last through a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks cannot
            os.fsync(opened)
    finally:
        os.close(opened)
