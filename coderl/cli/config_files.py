"""The configs that ship with coderl, found by their bare names from any folder."""

from __future__ import annotations

from pathlib import Path

from coderl.errors import UsageError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder() -> Path:
    """The shipped configs: inside the package when installed from a wheel, beside it in a source checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> list[str]:
    """Names that :func:`find_config` takes, such as ``grpo.yaml`` and ``models/qwen2.5-coder.yaml``."""
    folder = configs_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))


def find_config(value: str) -> str:
    """Turn the value of ``--config`` into a path.

    Args:
        value: A path, a shipped config's name (with or without ``.yaml``), a URL, or YAML text.

    Returns:
        The path of the file, or ``value`` itself where it is a URL or YAML text.

    Raises:
        UsageError: If there is no such file and no shipped config of that name.
    """
    if any(mark in value for mark in ("\n", "{", ": ", "://")) or Path(value).is_file():
        return value
    names = config_names()
    for name in (value, f"{value}.yaml"):
        if name in names:
            return str(configs_folder() / name)
    hint = did_you_mean(value, names)
    raise UsageError(f"no config {value!r}: neither a file nor one of {', '.join(names) or '(none)'}{hint}")
