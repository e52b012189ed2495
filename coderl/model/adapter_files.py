"""Adapters on disk, in peft's format: finding them, and what their settings say. Nothing here loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coderl.errors import UserError
from coderl.files import read_json, read_json_or_none

ADAPTER_CONFIG = "adapter_config.json"
"""The file of peft that makes a folder an adapter."""


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in peft's format."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def require_adapter(folder: str | Path, fix: str = "give the folder of a saved adapter") -> None:
    """Refuse a folder that holds no adapter.

    Args:
        folder: The folder.
        fix: What to give instead, for the error's end.

    Raises:
        UserError: It holds none.
    """
    if not is_adapter(folder):
        raise UserError(f"no {ADAPTER_CONFIG} in {folder}: {fix}")


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The content of an adapter's :data:`ADAPTER_CONFIG`.

    Raises:
        UserError: The folder holds no adapter, or the file cannot be read.
    """
    require_adapter(folder)
    fix = "save the adapter again, or give another one"
    config: dict[str, Any] = read_json(Path(folder) / ADAPTER_CONFIG, fix, dict)
    return config


def adapter_base(folder: str | Path) -> str | None:
    """The base model that an adapter names, a hub id or a folder; None where none is named or can be read."""
    config = read_json_or_none(Path(folder) / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) and name else None
