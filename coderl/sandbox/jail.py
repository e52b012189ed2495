"""How strongly runs are isolated on this machine, and how a lane is started.

Tier A is namespaces with a system-call filter, tier B the filter without namespaces, tier C resource limits,
a user id of its own where the trainer is root, and nothing else. A stronger tier adds its probe to
:func:`probe` and its launcher to :attr:`Jail.prefix`.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.errors import UserError

if TYPE_CHECKING:
    from coderl.types import Tier

logger = logging.getLogger("coderl.sandbox")

ALLOWED = "HF_ALLOW_CODE_EVAL"
_BOOT = (
    "import sys; root, folder, control = sys.argv[1:]; sys.path.insert(0, root); "
    "from coderl.sandbox.zygote import main; sys.path.remove(root); main(folder, int(control))"
)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Jail:
    """The isolation found by :func:`probe`.

    Attributes:
        tier: ``"A"``, ``"B"`` or ``"C"``.
        reason: Why it is this one, for the log and ``coderl doctor``.
        prefix: Command that enters the jail, put before a lane's interpreter.
    """

    tier: Tier
    reason: str
    prefix: tuple[str, ...] = ()

    def command(self, folder: str, control: int) -> list[str]:
        """The command line of a lane that works in the folder and listens on an inherited descriptor."""
        root = str(Path(__file__).resolve().parents[2])
        # Not -I: it would ignore PYTHONHASHSEED. The environment is ours, so nothing else can steer the
        # interpreter.
        return [
            *self.prefix,
            sys.executable,
            "-s",
            "-P",
            "-B",
            "-X",
            "utf8",
            "-c",
            _BOOT,
            root,
            folder,
            str(control),
        ]

    @staticmethod
    def environment(folder: str) -> dict[str, str]:
        """Everything a lane finds in its environment. Made from nothing, so that no token can leak."""
        work = os.path.join(folder, "work")
        fixed = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": work,
            "TMPDIR": work,
            "PYTHONHASHSEED": "0",
            "MALLOC_ARENA_MAX": "2",
        }
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        return fixed | kept | dict.fromkeys(_THREADS, "1")


def probe() -> Jail:
    """The strongest isolation this version can give here."""
    if os.getuid() == 0:
        return Jail("C", "resource limits and a user id per lane; no namespaces and no system-call filter")
    return Jail(
        "C", "resource limits only, under the trainer's own user id; no namespaces and no system-call filter"
    )


def require(jail: Jail, allow_weak_isolation: bool) -> None:
    """Refuse tier C, or warn about it where it is allowed.

    Raises:
        UserError: The tier is C and nobody has allowed it.
    """
    if jail.tier != "C":
        return
    if not (allow_weak_isolation or os.environ.get(ALLOWED) == "1"):
        raise UserError(
            f"model-written programs would run with weak isolation (tier C: {jail.reason}): "
            f"set allow_weak_isolation: true in the config or {ALLOWED}=1 in the environment to accept that"
        )
    logger.warning("model-written programs run with weak isolation (tier C: %s)", jail.reason)
