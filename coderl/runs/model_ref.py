"""The model that a command names: a hub id, a folder of weights, an adapter, or a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coderl.errors import UsageError, UserError
from coderl.model.adapter_files import (
    ADAPTER_CONFIG,
    adapter_base,
    is_adapter,
    read_adapter_config,
    require_adapter,
)
from coderl.runs.folder import RunFolder, is_epoch, parse_run_name, short_name


@dataclass(frozen=True)
class ModelRef:
    """A model that a command can load: its base, an adapter, and what results call it.

    Attributes:
        base: Folder or hub id of the base's weights.
        adapter: Folder of an adapter on it, or None.
        label: What results call the model.
        method: What it was trained with, by the name of its run folder; ``adapter`` or ``base`` otherwise.
    """

    base: str
    adapter: str | None
    label: str
    method: str

    def files(self) -> list[Any]:
        """Names, sizes and times of the local files, which tell these weights from later ones."""
        folders = [Path(name).expanduser() for name in (self.base, self.adapter) if name]
        files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
        return [[f.name, s.st_size, s.st_mtime_ns] for f in files if f.is_file() and (s := f.stat())]


def find_adapter(folder: Path) -> Path | None:
    """The folder of an adapter: this one, or the adapter's in it if it is a run's; None where there is none.

    Args:
        folder: Of an adapter, or of a run.
    """
    return next((path for path in (folder, RunFolder(folder).adapter) if is_adapter(path)), None)


def find_model(
    model: str,
    adapter: str | None = None,
    gguf_file: str | None = None,
    flags: tuple[str, str] = ("--model", "--adapter"),
) -> ModelRef:
    """Tell a base from an adapter, and find the adapter's base.

    Args:
        model: A hub id, a folder of weights, the folder of an adapter, a run's folder (which has one), or
            ``embedded``.
        adapter: Folder of an adapter on ``model``, where its own configuration does not name its base.
        gguf_file: Name of a GGUF file in the folder ``model``.
        flags: What the command calls ``model`` and ``adapter`` where both are given.

    Raises:
        UsageError: Two adapters are given.
        UserError: An adapter's folder is none, or names no base.
    """
    if not model:
        raise UsageError(f"{flags[0]} is empty: give a hub id, a folder, or embedded")
    folder = Path(model).expanduser()
    if folder.is_file():
        hint = f" and --gguf_file {folder.name}" if folder.suffix == ".gguf" else ""
        raise UserError(f"{model} is a file: give {flags[0]} its folder{hint}")
    own = find_adapter(folder)
    if own is not None and adapter is not None:
        raise UsageError(f"{model} is an adapter already: give {flags[0]} the base of {flags[1]} {adapter}")
    if adapter is not None:
        own = Path(adapter).expanduser()
        require_adapter(own, f"give {flags[1]} the folder of an adapter")
        base = model
    else:
        base = model if own is None else _base_of(own, flags)
    merged = RunFolder(folder).merged
    if own is None and (merged / "config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{model} holds no adapter: its model is in {merged}, give that")
    # A run's folder is named for what is in it, its adapter is not.
    place = folder if own is None else own.parent if own == RunFolder(own.parent).adapter else own
    # So is the folder that models of single epochs are in.
    whole = place.resolve()
    epoch = f"-{whole.name}" if is_epoch(whole.name) else ""
    whole = whole.parent if epoch else whole
    run = parse_run_name((RunFolder.of_model(whole) or RunFolder(whole)).path.name)
    if run and place.is_dir():
        label, method = run.model + epoch, run.method
    else:
        label = short_name((gguf_file or base) if own is None else str(place))
        method = "base" if own is None else "adapter"
    return ModelRef(base, None if own is None else str(own), label, method)


def _base_of(adapter: Path, flags: tuple[str, str]) -> str:
    fix = f"give it as {flags[0]} BASE {flags[1]} {adapter}"
    if (name := adapter_base(adapter)) is None:
        read_adapter_config(adapter)  # raises if the file is damaged
        raise UserError(f"{adapter}/{ADAPTER_CONFIG} names no base model: {fix}")
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"the base {name} of {adapter} is not there any more: {fix}")
    return name
