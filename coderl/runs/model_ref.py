"""The model that a command names: a hub id, a folder of weights, an adapter, or a run's folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from coderl.errors import UsageError, UserError
from coderl.model.loading import ComputeDtype, Quantization
from coderl.model.provenance import POLICY_FILE
from coderl.runs.folder import RunFolder, short_name

_RUN = re.compile(r"(?P<model>.+)-[^-]+-(?P<method>[^-]+)-qlora(-merged)?")


@dataclass(frozen=True)
class ModelRef:
    """What ``--model`` names.

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
    own = next(
        (f for f in (folder, RunFolder(folder).adapter) if (f / "adapter_config.json").is_file()), None
    )
    if own is not None and adapter is not None:
        raise UsageError(f"{model} is an adapter already: give {flags[0]} the base of {flags[1]} {adapter}")
    if adapter is not None:
        own = Path(adapter).expanduser()
        if not (own / "adapter_config.json").is_file():
            raise UserError(f"no adapter_config.json in {adapter}: give {flags[1]} the folder of an adapter")
        base = model
    else:
        base = model if own is None else _base_of(own, flags)
    merged = RunFolder(folder).merged
    if own is None and (merged / "config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{model} holds no adapter: its model is in {merged}, give that")
    # A run's folder is named for what is in it, its adapter is not.
    place = folder if own is None else own.parent if own.name == "adapter" else own
    # So is the folder that models of single epochs are in.
    whole = place.resolve()
    epoch = f"-{whole.name}" if re.fullmatch(r"epoch-\d+", whole.name) else ""
    run = _RUN.fullmatch((whole.parent if epoch else whole).name)
    if run and place.is_dir():
        label, method = run["model"] + epoch, run["method"]
    else:
        label = short_name((gguf_file or base) if own is None else str(place))
        method = "base" if own is None else "adapter"
    return ModelRef(base, None if own is None else str(own), label, method)


def quantization_of(adapter: str | None) -> Quantization:
    """How the base is held: as the adapter was trained (NF4 where nobody noted it), plain without one."""
    if adapter is None:
        return "none"
    return "none" if _noted(adapter, "quantization") == "none" else "nf4"


def compute_dtype_of(adapter: str | None) -> ComputeDtype:
    """What the policy computed in when the adapter was trained; ``auto`` where nobody noted it."""
    noted = _noted(adapter, "compute_dtype") if adapter else None
    return next((name for name in get_args(ComputeDtype) if name == noted), "auto")


def _noted(adapter: str, key: str) -> Any:
    try:
        return json.loads(Path(adapter, POLICY_FILE).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _base_of(adapter: Path, flags: tuple[str, str]) -> str:
    fix = f"give it as {flags[0]} BASE {flags[1]} {adapter}"
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        name = base["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{adapter}/adapter_config.json names no base model: {error!r}") from error
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter} names no base model: {fix}")
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"the base {name} of {adapter} is not there any more: {fix}")
    return name
