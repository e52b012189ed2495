"""How a lane is isolated: the command that starts it and the settings it starts with.

Tier A is namespaces (through bubblewrap) with a system-call filter, tier B the filter with Landlock and no
namespaces, tier C resource limits, a user id of its own where the trainer is root, and whatever of the rest
the kernel has. :mod:`coderl.sandbox.probe` finds out which of them holds here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.sandbox.inside.codec import TRUSTED, encode
from coderl.sandbox.view import DEVICES, INSIDE, view

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coderl.types import Tier

_BOOT = (
    "import sys; root, control = sys.argv[1:]; sys.path.insert(0, root); "
    "from inside.zygote import main; sys.path.remove(root); main(int(control))"
)
_FIRST_TO_GO = 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"'
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PRIVATE = "/tmp"
"""Working folder of the runs of a lane with a file system of its own."""
_ROOT = "/lane"
"""Where this package and numpy lie there: their own places may be under ``/tmp``, as a test's clone is."""
_NEEDED = ("SETUID", "SETGID", "KILL", "CHOWN", "DAC_OVERRIDE", "FOWNER")
"""Capabilities that a lane started as root keeps: to change its user, and to clean up after runs."""


@dataclass(frozen=True, slots=True)
class Primitive:
    """One means of isolation, as found by using it.

    Attributes:
        name: Such as ``seccomp``.
        works: Whether it does what it should.
        detail: A version or a reason, and what would fix it.
    """

    name: str
    works: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Jail:
    """The isolation that runs get.

    Attributes:
        tier: ``"A"``, ``"B"`` or ``"C"``.
        reason: Why it is this one, as one line.
        primitives: Each means of isolation that was tried, and the result.
        bubblewrap: Path of ``bwrap``, or empty for lanes without namespaces.
        filter: System-call filter (:mod:`coderl.sandbox.syscalls`), or nothing.
        landlock: Whether the kernel confines runs to the files shown.
    """

    tier: Tier
    reason: str
    primitives: tuple[Primitive, ...] = ()
    bubblewrap: str = ""
    filter: bytes = b""
    landlock: bool = False

    def command(self, control: int, file_bytes: int) -> list[str]:
        """The command line of a lane.

        Args:
            control: Inherited descriptor that it listens on.
            file_bytes: Bytes that a run's files may take, all together.
        """
        # Not -I: it would ignore PYTHONHASHSEED. The environment is ours, so nothing else can steer the
        # interpreter.
        flags = ["-s", "-S", "-P", "-B", "-X", "utf8"]
        root = _ROOT if self.bubblewrap else str(INSIDE.parent)
        # Where memory runs out, the kernel ends a lane, and not the process that trains.
        first = ["/bin/sh", "-c", _FIRST_TO_GO, "lane"] if os.path.exists("/bin/sh") else []
        return [*first, *self._enter(file_bytes), view().interpreter, *flags, "-c", _BOOT, root, str(control)]

    def _enter(self, file_bytes: int) -> list[str]:
        """Bubblewrap's part of the command: new namespaces, and a root made of what is shown."""
        if not self.bubblewrap:
            return []
        moved = {str(INSIDE): f"{_ROOT}/{INSIDE.name}"}
        moved |= {path: _moved(path) for path in view().packages}
        arguments = [self.bubblewrap, *enter_namespaces()]
        for folder in _above([*view().shown, view().interpreter, *moved.values(), *DEVICES]):
            arguments += ["--perms", "0755", "--dir", folder]  # bubblewrap's default shuts out other users
        for path in view().shown:
            if os.path.islink(path) and os.path.isdir(path):
                arguments += ["--symlink", os.readlink(path), path]
            else:
                arguments += ["--ro-bind", path, path]
        for path in view().hidden:
            arguments += ["--perms", "0755", "--tmpfs", path]
        for path, seen in {view().interpreter: view().interpreter, **moved}.items():
            arguments += ["--ro-bind", path, seen]
        for path in view().hidden:
            arguments += ["--remount-ro", path]
        for path in DEVICES:
            arguments += ["--dev-bind-try", path, path]
        arguments += ["--size", str(file_bytes), "--tmpfs", _PRIVATE]
        return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]

    def environment(self, folder: str) -> dict[str, str]:
        """Everything a lane finds in its environment. Made from nothing, so that no token can leak."""
        work = self.work(folder)
        fixed = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": work,
            "TMPDIR": work,
            "PYTHONHASHSEED": "0",
            "MALLOC_ARENA_MAX": "2",
        }
        inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        return fixed | inherited | dict.fromkeys(_THREADS, "1")

    def work(self, folder: str) -> str:
        """The folder that runs work in, as they see it."""
        return _PRIVATE if self.bubblewrap else os.path.join(folder, "work")

    def settings(self, folder: str, file_bytes: int) -> bytes:
        """The first message to a lane's zygote: its folders, limit of files, filter and rules."""
        packages = [_moved(path) for path in view().packages] if self.bubblewrap else list(view().packages)
        settings = {
            "folder": "" if self.bubblewrap else folder,
            "work": self.work(folder),
            "file_bytes": file_bytes,
            "filter": self.filter,
            "landlock": self.landlock,
            "read": [*view().leaves(), *packages] if self.landlock else [],
            "use": list(DEVICES),
            "packages": [os.path.dirname(path) for path in packages[:1]],
        }
        return encode(settings, TRUSTED)


def _moved(package: str) -> str:
    """Where a package lies in a lane with a file system of its own."""
    return f"{_ROOT}/packages/{os.path.basename(package)}"


def _above(paths: Iterable[str]) -> list[str]:
    """All folders above some paths, outermost first, the root left out."""
    found = {str(folder) for path in paths for folder in Path(path).parents}
    return sorted(found - {"/"})


def enter_namespaces() -> list[str]:
    """Bubblewrap's options for namespaces: as the user who calls, with no more rights than a lane needs."""
    options = [f"--unshare-{name}" for name in ("pid", "net", "ipc", "uts", "cgroup-try")]
    if os.getuid() == 0:
        options += ["--cap-drop", "ALL"]
        for name in _NEEDED:
            options += ["--cap-add", f"CAP_{name}"]
    # Not --die-with-parent: it is the end of the *thread* that started the lane which would end it. A lane
    # ends with its control socket.
    return [*options, "--hostname", "lane", "--as-pid-1", "--new-session"]
