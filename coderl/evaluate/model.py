"""The model that is to be evaluated: a hub id, a folder of weights, an adapter, or a run's folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coderl.errors import UsageError, UserError
from coderl.export import POLICY_FILE
from coderl.models import Quantization
from coderl.runs import merged_folder, short_name

_RUN = re.compile(r"(?P<model>.+)-[^-]+-(?P<method>[^-]+)-qlora(-merged)?")


@dataclass(frozen=True)
class Named:
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


def find_model(model: str, adapter: str | None = None, gguf_file: str | None = None) -> Named:
    """Tell a base from an adapter, and find the adapter's base.

    Args:
        model: A hub id, a folder of weights, the folder of an adapter, a run's folder (which has one), or
            ``embedded``.
        adapter: Folder of an adapter on ``model``, where its own configuration does not name its base.
        gguf_file: Name of a GGUF file in the folder ``model``.

    Raises:
        UsageError: Two adapters are given.
        UserError: An adapter's folder is none, or names no base.
    """
    if not model:
        raise UsageError("--model is empty: give a hub id, a folder, or embedded")
    folder = Path(model).expanduser()
    if folder.is_file():
        hint = f" and --gguf_file {folder.name}" if folder.suffix == ".gguf" else ""
        raise UserError(f"{model} is a file: give --model its folder{hint}")
    own = next((f for f in (folder, folder / "adapter") if (f / "adapter_config.json").is_file()), None)
    if own is not None and adapter is not None:
        raise UsageError(f"{model} is an adapter already: give --model the base of --adapter {adapter}")
    if adapter is not None:
        own = Path(adapter).expanduser()
        if not (own / "adapter_config.json").is_file():
            raise UserError(f"no adapter_config.json in {adapter}: give --adapter the folder of an adapter")
        base = model
    else:
        base = model if own is None else _base_of(own)
    merged = merged_folder(folder)
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
    return Named(base, None if own is None else str(own), label, method)


def quantization_of(adapter: str | None) -> Quantization:
    """How the base is held: as the adapter was trained (NF4 where nobody noted it), plain without one."""
    if adapter is None:
        return "none"
    try:
        noted = json.loads(Path(adapter, POLICY_FILE).read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, LookupError, TypeError):
        return "nf4"
    return "none" if noted == "none" else "nf4"


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        name = base["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{adapter}/adapter_config.json names no base model: {error!r}") from error
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter} names no base model: give it as --model BASE --adapter {adapter}")
    if name.startswith("/") and not Path(name).is_dir():
        raise UserError(
            f"the base {name} of {adapter} is not there any more: give it as --model BASE --adapter {adapter}"
        )
    return name
