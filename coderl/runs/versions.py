"""Installed versions of coderl, Python and the libraries that results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

from coderl import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")


def installed_versions() -> dict[str, str]:
    """Versions of coderl, Python and each of :data:`PACKAGES` that is installed, by name."""
    found = {"coderl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
