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


def flat_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, as flags name them; a class's is its own name.

    >>> flat_settings({"model": {"class_path": "coderl.algorithms.GRPO", "init_args": {"clip": 0.2}}})
    {'model': 'GRPO', 'model.clip': 0.2}
    """
    found: dict[str, Any] = {}
    if name := class_name(value):
        found[prefix] = name
        value = arguments(value)
    if isinstance(value, list) and any(
        map(class_name, value)
    ):  # by class, not by place: a list may have grown
        value = {class_name(part) or str(place): part for place, part in enumerate(value)}
    if isinstance(value, dict):
        for key, part in value.items():
            found |= flat_settings(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        found[prefix] = value
    return found
