"""A lane's long-lived process: forks a confined child per run, keeps its deadline, kills what it leaves.

Started by :mod:`coderl.sandbox.lane` as a fresh interpreter with an empty environment. It never reads a
payload: the child gets its end of the run's socket, and an earlier run leaves nothing in memory that a later
one could find.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import site
import socket
import stat
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

from . import confine, landlock, wire
from .codec import TRUSTED, decode
from .preload import COMMON, everything, preload
from .runner import describe, serve
from .wipe import wipe

if TYPE_CHECKING:
    from collections.abc import Callable

CONTROL = 3
"""The descriptor of the control socket in the zygote, and of the run socket in a child."""
LINK = 4
"""The descriptor of the link to another run, in a child that has one."""
RULES = 63
"""The descriptor of the Landlock ruleset, out of the way of both."""
_OWN_FOLDER = stat.S_IFDIR | 0o700
_POLL_SECONDS = 2.0
_ON_TIME = 0.005
_LOOK_SECONDS = 0.05
"""Between two looks at the files that a run has written."""
_MOST_FILES = 8_192
_PRISTINE = (0, 0)
"""Times of a working folder that no run has written in."""


class Zygote:
    """The loop of one lane.

    Args:
        control: Sequenced-packet socket to the trusted side; its end ends the lane.
        settings: See :meth:`coderl.sandbox.jail.Jail.settings`.
    """

    def __init__(self, control: socket.socket, settings: dict[str, Any]) -> None:
        self.control = control
        self.folder: str = settings["folder"]
        self.work: str = settings["work"]
        self.pid = os.getpid()
        self.parent = os.getppid()
        self.late = 0.0
        self.uid = confine.user_for_runs()
        self.owned = confine.is_own(self.uid)
        self.usage = Usage(self.work, settings["file_bytes"], own_disk=not self.folder)
        self.clean()
        rules = self.rules(settings)
        guard = confine.Filter(settings["filter"]) if settings["filter"] else None
        self.confinement = confine.Confinement(
            self.uid, self.work, self.pid, guard, rules, settings["file_bytes"]
        )

    def rules(self, settings: dict[str, Any]) -> int:
        """The descriptor of the Landlock ruleset, or -1 without one."""
        if not settings["landlock"]:
            return -1
        made = landlock.ruleset(settings["read"], [self.work], settings["use"])
        os.dup2(made, RULES, inheritable=False)
        os.close(made)
        return RULES

    def run_forever(self) -> None:
        """Serve jobs until the trusted side is gone."""
        self.control.send(wire.HELLO.pack(wire.GREETING, self.uid))
        while True:
            ready, _, _ = select.select([self.control], [], [], _POLL_SECONDS)
            if os.getppid() != self.parent:
                return
            if not ready:
                continue
            data, descriptors, _, _ = socket.recv_fds(self.control, wire.JOB.size, 2)
            if not data:
                return
            if len(data) == wire.JOB.size and not self.serve_job(wire.JOB.unpack(data), descriptors):
                return

    def serve_job(self, job: tuple[int, float, float, int, int], descriptors: list[int]) -> bool:
        """Run one job to its end and report it. False if the trusted side has gone."""
        number, seconds, cpu, memory, processes = job
        began = time.monotonic()
        try:
            child = confine.fork()
        except OSError:
            child = -1
        if child == 0:
            self.become_child(descriptors, memory, cpu, processes)
        for descriptor in descriptors:
            os.close(descriptor)
        if child < 0:
            self.control.send(wire.DONE.pack(number, wire.NOT_STARTED, 0, 0.0, 0.0, 0, 0.0))
            return True
        how, alive = self.watch(child, began + seconds)
        taken = time.monotonic() - began
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        status = self.reap(child, how == wire.EXITED)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        gave_way = min(used.ru_nivcsw - before.ru_nivcsw, (1 << 32) - 1)
        self.clean()
        if alive:
            self.control.send(wire.DONE.pack(number, how, status, taken, cpu, gave_way, self.late))
        return alive

    def become_child(self, descriptors: list[int], memory: int, cpu: float, processes: int) -> NoReturn:
        """The forked side: confinement first, then the payload. Never returns."""
        try:
            _place(descriptors)
            try:
                self.confinement.enter(memory, cpu, processes)
            except OSError as error:
                os.write(CONTROL, wire.pack_record(wire.Record("broken", value=describe(error))))
                os._exit(1)
            serve(CONTROL, LINK)
        except BaseException:
            os._exit(1)
        os._exit(0)

    def watch(self, child: int, deadline: float) -> tuple[int, bool]:
        """Wait until the child ends, its time is up, a stop message comes, or the trusted side is gone.

        Returns:
            How the run ended (``wire.EXITED`` ...), and whether the trusted side is still there.
        """
        self.late = 0.0
        handle = os.pidfd_open(child)
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        poller.register(self.control, select.POLLIN | select.POLLHUP)
        try:
            while (left := deadline - time.monotonic()) > 0:
                pause = min(left, _LOOK_SECONDS)
                asleep = time.monotonic()
                events = dict(poller.poll(max(1, pause * 1000)))
                self.late += max(0.0, time.monotonic() - asleep - pause - _ON_TIME)
                if handle in events:
                    return wire.EXITED, True
                if events:
                    return wire.STOPPED, bool(self.control.recv(wire.STOP.size))
                if self.usage.is_over():
                    return wire.FILLED, True
                if os.getppid() != self.parent:
                    return wire.STOPPED, False
            return wire.TIMED_OUT, True
        finally:
            os.close(handle)

    def reap(self, child: int, ended: bool) -> int:
        """Kill the child, unless it has ended, and every process it has left; returns its exit status."""
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not self.confinement.filter:  # with a filter it can have started nothing
            self.reap_rest(child)
        return status

    def reap_rest(self, child: int) -> None:
        """Kill and reap until no process is left below this one."""
        _kill(os.killpg, child)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    self.kill_rest()
            except ChildProcessError:
                return

    def kill_rest(self) -> None:
        """Kill processes that left the child's group; being a subreaper, this one has adopted the orphans."""
        if self.pid == 1:
            _kill(os.kill, -1)  # everything in this namespace but its first process
        else:
            for pid in self.children():
                _kill(os.killpg, pid)
                _kill(os.kill, pid)
            if self.owned:
                for pid in confine.processes_of(self.uid):
                    _kill(os.kill, pid)
        time.sleep(0.0002)

    def children(self) -> list[int]:
        """Direct children, by ``/proc``."""
        try:
            with open(f"/proc/self/task/{self.pid}/children", encoding="ascii") as file:
                return [int(pid) for pid in file.read().split()]
        except OSError:
            return [pid for pid in confine.processes_of(self.uid) if _parent_of(pid) == self.pid]

    def clean(self) -> None:
        """An empty working folder that belongs to the run's user."""
        with contextlib.suppress(OSError):
            state = os.lstat(self.work)
            touched = (state.st_mtime_ns, state.st_atime_ns) != _PRISTINE
            if (state.st_uid, state.st_mode) == (self.uid, _OWN_FOLDER) and not touched:
                return
        if not wipe(self.work):
            os.makedirs(self.work, exist_ok=True)
        os.chown(self.work, self.uid, -1)
        os.chmod(self.work, stat.S_IMODE(_OWN_FOLDER))
        os.utime(self.work, ns=_PRISTINE)

    def leave(self) -> None:
        """Remove the lane's folder, and the sandbox's once it is empty."""
        if not self.folder:  # its file system goes with it
            return
        wipe(self.work)
        for folder in (self.work, self.folder, os.path.dirname(self.folder)):
            try:
                os.rmdir(folder)
            except OSError:
                return


class Usage:
    """What runs of a lane have written.

    Args:
        folder: Where they may write.
        most: Bytes that they may.
        own_disk: Whether it is a file system of its own, which limits the bytes itself.
    """

    def __init__(self, folder: str, most: int, own_disk: bool) -> None:
        self._folder = folder
        self._most = most
        self._own_disk = own_disk

    def is_over(self) -> bool:
        """Whether it is too much, or too many files: to remove them takes longer than to make them."""
        if self._own_disk:
            disk = os.statvfs(self._folder)
            return disk.f_files - disk.f_ffree > _MOST_FILES
        count = size = 0
        for folder, folders, files in os.walk(self._folder):
            count += len(folders) + len(files)
            for name in files:
                with contextlib.suppress(OSError):
                    size += os.lstat(os.path.join(folder, name)).st_blocks * 512
            if count > _MOST_FILES or size > self._most:
                return True
        return False


def _place(descriptors: list[int]) -> None:
    """Put a job's descriptors where the runner expects them, and close all others but the ruleset."""
    aside = [os.dup2(descriptor, RULES + 1 + at) for at, descriptor in enumerate(descriptors)]
    for at, descriptor in enumerate(aside):
        os.dup2(descriptor, CONTROL + at)
    os.closerange(CONTROL + len(descriptors), RULES)
    os.closerange(RULES + 1, confine.OPEN_FILES)


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _kill(kill: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        kill(pid, signal.SIGKILL)


def main(descriptor: int) -> None:
    """Serve the control socket until it closes.

    Args:
        descriptor: The inherited control socket; it is moved out of the way of a run's.
    """
    if descriptor != CONTROL:
        os.dup2(descriptor, CONTROL)
        os.close(descriptor)
    control = socket.socket(fileno=CONTROL)
    confine.shield()
    settings = decode(control.recv(wire.SETTINGS_LIMIT), TRUSTED)
    zygote = Zygote(control, settings)
    known = confine.can_read(zygote.uid, os.__file__)
    sys.path += settings["packages"]
    preload([*COMMON, "numpy"] if known else everything())
    # numpy is in memory. What lies beside it, and beside this package, must not be importable.
    sys.path = [path for path in sys.path if path not in settings["packages"]]
    for path in sys.path_importer_cache.keys() - set(sys.path):
        del sys.path_importer_cache[path]
    site.setquit()  # exit() and quit(), which programs take for builtins
    gc.collect()
    gc.freeze()
    # The trusted side may be gone, or send malformed messages: either ends the lane.
    with contextlib.suppress(OSError, struct.error, IndexError):
        zygote.confinement.prepare()
        zygote.run_forever()
    zygote.leave()
