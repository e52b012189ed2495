"""Installed versions of Python, coderl and the libraries that its results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

from coderl import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")


def installed_versions() -> dict[str, str | None]:
    """Versions of Python, coderl and :data:`PACKAGES`, by name; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "coderl": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
