"""What a zygote imports before it forks, so that no run pays for it."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

COMMON = (
    *("abc", "array", "bisect", "cmath", "collections", "contextlib", "copy", "dataclasses", "datetime"),
    *("decimal", "enum", "fractions", "functools", "heapq", "io", "itertools", "json", "math", "numbers"),
    *("operator", "queue", "random", "re", "statistics", "string", "sys", "textwrap", "threading", "time"),
    *("typing", "unicodedata"),
)
"""What programs use all the time. Other modules would cost every fork more than their import costs a few."""

_LEFT_OUT = {
    *(
        "antigravity",
        "this",
        "turtle",
        "turtledemo",
        "tkinter",
        "idlelib",
        "test",
        "site-packages",
        "dist-packages",
    ),
    *("ensurepip", "lib2to3", "venv", "pydoc_data", "__main__"),
}


def preload(names: Iterable[str]) -> None:
    """Import modules; one that is not for this platform is passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def everything() -> Iterator[str]:
    """All of the standard library, and numpy.

    For an interpreter that lies where the runs' user may not look, such as under ``/root``: there a module
    that is not in memory before the fork cannot be imported after it.
    """
    folder = os.path.dirname(os.__file__)
    for name in _modules([folder, os.path.join(folder, "lib-dynload")]):
        yield name
        yield from _modules([os.path.join(folder, name)], f"{name}.")
    yield "numpy"


def _modules(folders: list[str], prefix: str = "") -> Iterator[str]:
    import pkgutil

    for module in pkgutil.iter_modules(folders, prefix):
        if not _LEFT_OUT & set(module.name.split(".")):
            yield module.name
            if module.ispkg and prefix:
                yield from _modules(
                    [os.path.join(folders[0], module.name.rpartition(".")[2])], f"{module.name}."
                )
