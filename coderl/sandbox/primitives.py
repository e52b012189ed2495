"""Tries each means of isolation, in a child process each. Run as a program, prints JSON.

No version or configuration is consulted: each check uses the thing and looks whether it holds.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import socket
import sys
from typing import TYPE_CHECKING

from coderl.sandbox.inside import confine, landlock

if TYPE_CHECKING:
    from collections.abc import Callable

_NEWUSER = 0x10000000


def in_child(work: Callable[[], str]) -> tuple[bool, str]:
    """Whether the work succeeds in a child process, with its result or its error as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = "+" + work()
        except BaseException as error:
            answer = f"-{error or type(error).__name__}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        answer = file.read().decode()
    os.waitpid(child, 0)
    return answer.startswith("+"), answer[1:] or "the process that tried was killed"


def seccomp(instructions: bytes) -> str:
    """Install the filter and open a socket."""
    if not instructions:
        raise OSError("no filter can be made: install libseccomp2")
    confine.no_new_privileges()
    confine.Filter(instructions).install()
    try:
        socket.socket(socket.AF_INET)
    except PermissionError:
        return f"{len(instructions) // 8} instructions; a socket was refused"
    raise OSError("the filter is installed and refuses nothing")


def files() -> str:
    """Confine this process to nothing with Landlock and open a file."""
    confine.no_new_privileges()
    landlock.restrict(landlock.ruleset([], []))
    try:
        with open(__file__, "rb"):
            pass
    except PermissionError:
        return f"version {landlock.version()}; a file was refused"
    raise OSError("the rules are in place and refuse nothing")


def limits() -> str:
    """Lower the address space and ask for more."""
    space = confine.address_space(os.getpid()) + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    try:
        bytearray(256 << 20)
    except MemoryError:
        return "memory over the limit was refused"
    raise OSError("RLIMIT_AS does not hold")


def own_user() -> str:
    """Change to a user id that nobody has."""
    if os.getuid() != 0:
        raise OSError("only root can give runs a user id of their own")
    uid = confine.user_for_runs()
    return f"such as {uid}" if confine.is_own(uid) else "nobody, the user namespace holds no others"


def user_namespaces() -> str:
    """Make a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWUSER):
        raise OSError(
            f"{os.strerror(ctypes.get_errno())}: forbidden by a container's policy or by the settings "
            "kernel.apparmor_restrict_unprivileged_userns or user.max_user_namespaces"
        )
    return "made one"


def main() -> None:
    """Read the filter from stdin, and print ``[[name, works, detail], ...]``."""
    instructions = sys.stdin.buffer.read()
    checks: dict[str, Callable[[], str]] = {
        "user namespaces": user_namespaces,
        "seccomp": lambda: seccomp(instructions),
        "landlock": files,
        "resource limits": limits,
        "own user id": own_user,
    }
    found = [[name, *in_child(check)] for name, check in checks.items()]
    print(json.dumps([["linux", sys.platform == "linux", platform.release()], *found]))


if __name__ == "__main__":
    main()
