"""Merges configurations, as when one config file overrides another."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace, dict_to_namespace


def merge(under: Any, over: Any) -> Any:
    """Two configurations merged; where both set a key, ``over`` wins.

    A class is written as ``class_path`` with ``init_args``, or as its arguments alone, on either side.
    """
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    if _names_class(under) != _names_class(over):
        under, over = (part if _names_class(part) else {"init_args": part} for part in (under, over))
    return under | {key: merge(under[key], value) if key in under else value for key, value in over.items()}


def _names_class(settings: dict[str, Any]) -> bool:
    return not {"class_path", "init_args"}.isdisjoint(settings)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, such as ``model.init_args.clip``; an empty mapping is a value."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {k: v for key, item in values.items() for k, v in flat(item, f"{prefix}.{key}".strip(".")).items()}


SINGLETONS = ("CompletionTable", "Health", "MergedCheckpoints", "PostFit", "SaveOnInterrupt")
"""Callbacks that a run has at most one of."""


def merge_callbacks(before: list[Namespace], now: list[Namespace]) -> list[Namespace]:
    """The callbacks of a configuration, after a config file was read.

    jsonargparse appends what the file adds (``callbacks+``). A callback of coderl's whose class is in the
    list already is merged with that one instead: so an overlay can change some of its arguments.

    Args:
        before: The callbacks before the file.
        now: Those after it. Where they do not begin with ``before``, the file replaced the list.
    """
    if now[: len(before)] != before:
        return now
    under, more = list(before), []
    for entry in now[len(before) :]:
        paths = [known.class_path for known in under]
        if entry.class_path.startswith("coderl.") and entry.class_path in paths:
            i = paths.index(entry.class_path)
            arguments = merge(_arguments(under[i]), _arguments(entry))
            under[i] = Namespace(class_path=entry.class_path, init_args=dict_to_namespace(arguments))
        else:
            more.append(entry)
    return under + more


def last_of_each(callbacks: list[Namespace]) -> list[Namespace]:
    """The callbacks; of each class in :data:`SINGLETONS` only the one that was named last."""
    names = [callback.class_path.rpartition(".")[2] for callback in callbacks]
    return [c for i, c in enumerate(callbacks) if not (names[i] in SINGLETONS and names[i] in names[i + 1 :])]


def _arguments(entry: Namespace) -> dict[str, Any]:
    given = entry.get("init_args")
    return given.as_dict() if given else {}
