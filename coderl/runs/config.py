"""Reads settings as a run's ``config.yaml`` nests them: ``class_path`` with ``init_args``."""

from __future__ import annotations

from typing import Any

import yaml


def parse_config(text: str) -> dict[str, Any]:
    """The settings in the text of a ``config.yaml``; empty where it is not YAML of a fit."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def class_name(part: Any) -> str:
    """The name of the class that a part of the settings names, without its module; empty where there is none.

    >>> class_name({"class_path": "coderl.algorithms.GRPO", "init_args": {"clip": 0.2}})
    'GRPO'
    """
    path = part.get("class_path") if isinstance(part, dict) else None
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def arguments(part: Any) -> dict[str, Any]:
    """The arguments of a class in the settings; of a part without a class path, the part itself.

    >>> arguments({"class_path": "coderl.algorithms.GRPO", "init_args": {"clip": 0.2}})
    {'clip': 0.2}
    """
    found = part.get("init_args", {} if "class_path" in part else part) if isinstance(part, dict) else {}
    return found if isinstance(found, dict) else {}


def policy_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the policy; empty where the settings have none."""
    return arguments(arguments(config.get("model")).get("policy"))
