"""The system calls that a run may make, as a filter the kernel understands.

An allow-list: whatever is not named fails with "operation not permitted", as an old kernel's missing call
would. Names that a processor or a libseccomp does not know are passed over, which only narrows the list.
Made once on the trusted side; a run's child installs it, its own process id filled in.
"""

from __future__ import annotations

import errno
import os
from functools import cache

from coderl.sandbox.inside.confine import OWN_PID

ALLOWED = """
    read pread64 readv preadv preadv2 write pwrite64 writev pwritev pwritev2 lseek _llseek close
    close_range open openat creat stat lstat fstat newfstatat fstatat64 statx statfs fstatfs access
    faccessat faccessat2 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat
    symlink symlinkat readlink readlinkat umask
    ftruncate fallocate fsync fdatasync flock getdents getdents64
    getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr sendfile copy_file_range splice tee
    fadvise64 readahead dup dup2 dup3 pipe pipe2 eventfd eventfd2 select pselect6 poll ppoll
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 timerfd_create
    timerfd_settime timerfd_gettime signalfd signalfd4 recvfrom shutdown getsockname getpeername
    getsockopt mmap mprotect munmap mremap brk madvise msync mincore membarrier rt_sigaction
    rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack sigreturn alarm
    setitimer getitimer pause timer_create timer_settime timer_gettime timer_getoverrun timer_delete
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage sysinfo uname
    getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid getpgid getpgrp
    getsid getrlimit setrlimit getpriority sched_yield sched_getaffinity sched_getparam
    sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu wait4 waitid futex
    futex_waitv set_robust_list get_robust_list set_tid_address rseq restart_syscall getrandom exit
    exit_group
"""
"""Names of the calls that are allowed whatever their arguments."""

_BY_OWNER = "chmod fchmod fchmodat fchmodat2 utime utimes utimensat futimesat"
"""Calls that change files by right of ownership, which Landlock does not look at. A run under the trainer's
own user id may make them only where it sees no files but its own and read-only ones. Elsewhere they do
nothing and report success, which is what programs that copy files need."""

_THREAD = 0x00010000  # CLONE_THREAD
_NAMESPACES = 0x7E020080  # CLONE_NEWNS, NEWTIME, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_UNIX = 1  # AF_UNIX
_OUT_OF_BAND = 1  # MSG_OOB
_WHITEOUT = 4  # RENAME_WHITEOUT, which makes a device node
_FCNTL = (*range(8), 36, 37, 38, 1030, 1031, 1032)
"""Duplicating, flags, locks, pipe sizes. Not F_SETOWN with F_SETSIG, which signals other processes."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: questions about files and their flags. Not
TIOCSTI, which types into a terminal."""
_PRCTL = (15, 16, 0x53564D41)
"""Names of threads and of memory."""


@cache
def compiled(by_owner: bool) -> bytes:
    """The filter as an array of BPF instructions, 8 bytes each.

    Args:
        by_owner: Let the calls that change files by right of ownership do so.

    Raises:
        OSError: There is no libseccomp on this machine.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise OSError(f"libseccomp cannot be loaded ({error}): install libseccomp2") from None
    refuse = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    refuse.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    refuse.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)  # a tree instead of a chain

    def allow(name: str, *conditions: tuple[int, int, int]) -> None:
        """Allow one call where each ``(argument, mask, value)`` holds."""
        if _known(name):
            masked = [seccomp.Arg(at, seccomp.MASKED_EQ, mask, value) for at, mask, value in conditions]
            refuse.add_rule(seccomp.ALLOW, name, *masked)

    def _known(name: str) -> bool:
        try:
            return int(seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)) >= 0
        except OSError:
            return False

    word, everything = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
    for name in f"{ALLOWED} {f'truncate {_BY_OWNER}' if by_owner else ''}".split():
        allow(name)
    for name in filter(_known, () if by_owner else _BY_OWNER.split()):
        refuse.add_rule(seccomp.ERRNO(0), name)
    allow("clone", (0, _THREAD | _NAMESPACES, _THREAD))
    allow("socketpair", (0, word, _UNIX))
    allow("sendto", (4, everything, 0), (3, _OUT_OF_BAND, 0))  # to the other end, and to no address
    allow("renameat2", (4, _WHITEOUT, 0))
    for name in ("kill", "tgkill"):
        allow(name, (0, word, OWN_PID))
    allow("prlimit64", (0, word, 0))
    allow("prlimit64", (0, word, OWN_PID))
    for name, at, values in (("fcntl", 1, _FCNTL), ("ioctl", 1, _IOCTL), ("prctl", 0, _PRCTL)):
        for value in values:
            allow(name, (at, word, value))
    # glibc tries clone3 first, whose flags no filter can read, and falls back where there is no such call.
    if _known("clone3"):
        refuse.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    with os.fdopen(os.memfd_create("filter"), "rb") as file:
        refuse.export_bpf(file)
        file.seek(0)
        return file.read()
