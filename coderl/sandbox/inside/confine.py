"""The confinement that a run's child puts on itself before it reads anything.

What this machine lacks (Landlock, a system-call filter) is left out here; whether what
remains is enough is decided by :mod:`coderl.sandbox.probe`. User id and limits alone, tier C, do not stop a
run from reading world-readable files, opening sockets, starting processes, and, where the trainer is a plain
user, signalling that user's other processes and reading their environment.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import struct
from dataclasses import dataclass

from . import landlock

NOBODY = 65534
_FIRST_UID = 1_879_048_192  # systemd's table of uids calls this range unused

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 36, 38
_SET_FILTER = 1
_SECCOMP = {"x86_64": 317, "aarch64": 277, "riscv64": 277, "ppc64le": 358, "s390x": 348}
_LIBC = ctypes.CDLL(None, use_errno=True)
_PYTHON = ctypes.PyDLL(None, use_errno=True)  # calls that keep the interpreter's lock

WORD = struct.Struct("=I")
OWN_PID = 0x5A6B7C3D
"""Stands in a filter for the run's own process id; more than any real one."""

STACK_BYTES = 64 << 20
OPEN_FILES = 256


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
    uid = _FIRST_UID + int.from_bytes(os.urandom(4)) % (1 << 28)
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


def address_space(pid: int) -> int:
    """Bytes of address space that a process has mapped."""
    with open(f"/proc/{pid}/statm", "rb") as file:
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


def _limit(limits: dict[int, int], margin: int = 0) -> None:
    """Hard limits, no higher than those there are; the soft ones lower by a margin."""
    for kind, value in limits.items():
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (value - margin, value))


@dataclass(frozen=True, slots=True)
class Confinement:
    """The rights that every run of a lane gives up.

    Attributes:
        uid: User id to run under.
        folder: The working folder.
        parent: Process id of the zygote; the run dies with it.
        filter: System-call filter, if there is one.
        rules: Descriptor of a Landlock ruleset, or -1.
        file_bytes: Largest file.
    """

    uid: int
    folder: str
    parent: int
    filter: Filter | None = None
    rules: int = -1
    file_bytes: int = 64 << 20

    def prepare(self) -> None:
        """Give up, in the zygote, what it does not need either: that saves each run the calls."""
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
        os.umask(0o077)
        no_new_privileges()
        fixed = {resource.RLIMIT_FSIZE: self.file_bytes, resource.RLIMIT_NOFILE: OPEN_FILES}
        _limit(fixed | {resource.RLIMIT_STACK: STACK_BYTES, resource.RLIMIT_CORE: 0})

    def enter(self, memory: int, cpu: float, processes: int) -> None:
        """Give up every right that a run does not need. Called in the child, before the payload is read.

        Args:
            memory: Bytes of address space.
            cpu: Seconds of processor time.
            processes: Processes and threads of this user id.
        """
        os.setpgid(0, 0)  # not setsid: the kernel may make a scheduling group for a session, which is slow
        os.chdir(self.folder)
        _limit({resource.RLIMIT_AS: memory, resource.RLIMIT_NPROC: processes})
        # At the first limit comes SIGXCPU, which tells; at the second SIGKILL.
        _limit({resource.RLIMIT_CPU: math.ceil(cpu) + 1}, margin=1)
        if os.getuid() == 0:
            os.setresuid(self.uid, self.uid, self.uid)
        if self.parent != 1:  # the first process of a namespace takes all others with it
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
            if os.getppid() != self.parent:
                os._exit(1)
        if self.rules >= 0:
            landlock.restrict(self.rules)
            os.close(self.rules)
        if self.filter:
            self.filter.install()


def fork() -> int:
    """Fork as ``os.fork`` does, without its hooks.

    They re-seed, re-lock and re-register for the sake of threads, which a zygote has none of, and the memory
    they touch is what forking costs most: 290 pages copied for a child that does nothing, against 60.
    """
    child = int(_PYTHON.fork())
    if child < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return child


def no_new_privileges() -> None:
    """Set what the kernel requires before a process that is not root may use Landlock or a filter."""
    _prctl(_SET_NO_NEW_PRIVS, 1)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class Filter:
    """A system-call filter, prepared so that installing it takes a run little time.

    Args:
        template: See :mod:`coderl.sandbox.syscalls`.
    """

    def __init__(self, template: bytes) -> None:
        self._number = _SECCOMP[os.uname().machine]
        self._buffer = ctypes.create_string_buffer(template, len(template))
        size = WORD.size  # offsets of the words that a run fills in with its own process id
        marker = WORD.pack(OWN_PID)
        self._places = [at for at in range(0, len(template), size) if template[at : at + size] == marker]
        self._program = _Program(len(template) // 8, ctypes.addressof(self._buffer))

    def install(self) -> None:
        """Put it on this process, for good.

        Raises:
            OSError: The kernel refuses it.
        """
        for place in self._places:
            WORD.pack_into(self._buffer, place, os.getpid())
        if _LIBC.syscall(self._number, _SET_FILTER, 0, ctypes.byref(self._program)):
            error = ctypes.get_errno()
            raise OSError(error, f"seccomp: {os.strerror(error)}")
