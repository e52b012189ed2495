"""The confinement that a run's child puts on itself before it reads anything.

This is all that tier C has: no namespaces, no system-call filter. It does not stop what the later tiers do:
reading world-readable files, opening sockets, starting processes, and, where the trainer is a plain user,
signalling that user's other processes and reading their environment.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

NOBODY = 65534
_FIRST_UID = 1_879_048_192  # systemd's table of uids calls this range unused

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 36, 38
_LIBC = ctypes.CDLL(None, use_errno=True)

FILE_BYTES = 16 << 20
STACK_BYTES = 64 << 20
OPEN_FILES = 256
PROCESSES = 128


def _prctl(option: int, argument: int) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(argument), 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def shield() -> None:
    """Make this process unreadable for its children, and the parent of whatever they leave behind."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    _prctl(_SET_DUMPABLE, 0)
    _prctl(_SET_SUBREAPER, 1)


def user_for_runs() -> int:
    """The user id that this process's children run under.

    Where this is root: an id of its own, so that lanes cannot signal each other and everything a run has
    started can be killed by its id; ``nobody`` where the user namespace is too small for that. Else the
    present one.
    """
    if os.getuid() != 0:
        return os.getuid()
    uid = _FIRST_UID + os.getpid()
    return uid if can_read(uid, os.devnull) else NOBODY


def is_own(uid: int) -> bool:
    """Whether a user id belongs to one lane alone, so that everything under it may be killed."""
    return uid >= _FIRST_UID


def can_read(uid: int, path: str) -> bool:
    """Whether a user may read a file, found out by becoming that user in a child."""
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            with open(path, "rb"):
                os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def address_space() -> int:
    """Bytes of address space this process has mapped."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def processes_of(uid: int) -> list[int]:
    """The processes that run under a user id, as far as ``/proc`` shows them."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                found.append(int(name))
        except OSError:  # it has ended
            continue
    return found


def tasks_of(uid: int) -> int:
    """Processes and threads of a user id; the kernel counts them together."""
    total = 0
    for pid in processes_of(uid):
        try:
            total += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return total


def limit(memory: int, seconds: float, processes: int) -> None:
    """Hard limits on this process and its children.

    Args:
        memory: Bytes of address space above what is mapped now.
        seconds: The run's time budget. CPU time gets a little more: the deadline outside comes first.
        processes: Processes and threads of this user id.
    """
    limits = {
        resource.RLIMIT_AS: address_space() + memory,
        resource.RLIMIT_CPU: int(seconds) + 3,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (value, value))


def confine(uid: int, folder: str, parent: int, memory: int, seconds: float, processes: int) -> None:
    """Give up every right that a run does not need. Called in the child, before the payload is read.

    Args:
        uid: User id to run under.
        folder: The private working folder.
        parent: Process id of the zygote; the run dies with it.
        memory: Bytes above the baseline.
        seconds: Time budget.
        processes: See :func:`limit`.
    """
    os.setsid()
    os.chdir(folder)
    os.umask(0o077)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
    limit(memory, seconds, processes)
    if os.getuid() == 0:
        os.setresuid(uid, uid, uid)
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _prctl(_SET_DUMPABLE, 0)
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    if os.getppid() != parent:
        os._exit(1)
