"""Nested settings: laid over each other, and compared."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace, dict_to_namespace


def merge(under: Any, over: Any) -> Any:
    """Two configurations as one: where both say something, ``over`` does.

    ``class_path`` and ``init_args`` may be written out on one side only.
    """
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    if _written_out(under) != _written_out(over):
        under, over = (part if _written_out(part) else {"init_args": part} for part in (under, over))
    return under | {key: merge(under[key], value) if key in under else value for key, value in over.items()}


def _written_out(settings: dict[str, Any]) -> bool:
    return not {"class_path", "init_args"}.isdisjoint(settings)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """From dotted keys, such as ``model.init_args.clip``, to values that are no mappings (or empty ones)."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {k: v for key, item in values.items() for k, v in flat(item, f"{prefix}.{key}".strip(".")).items()}


def changes(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """``(key, was, now)`` of the settings that differ, among those that both have."""
    before, after = flat(was), flat(now)
    return [(key, before[key], after[key]) for key in before if key in after and before[key] != after[key]]


ONCE = ("CompletionTable", "MergedCheckpoints", "PostFit", "SaveOnInterrupt")
"""Callbacks of coderl's of which a run has one at most."""


def overlaid(before: list[Namespace], now: list[Namespace]) -> list[Namespace]:
    """The callbacks of a configuration, after a file has added some.

    What it adds of coderl's own is laid over what is there of the same class.

    Args:
        before: Without the file.
        now: With it: the same and more, or others.
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
    """Of each class in :data:`ONCE` the callback that was named last."""
    names = [callback.class_path.rpartition(".")[2] for callback in callbacks]
    return [c for i, c in enumerate(callbacks) if not (names[i] in ONCE and names[i] in names[i + 1 :])]


def _arguments(entry: Namespace) -> dict[str, Any]:
    given = entry.get("init_args")
    return given.as_dict() if given else {}
