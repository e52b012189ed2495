"""A lane's long-lived process: forks a confined child per run, keeps its deadline, kills what it leaves.

Started by :mod:`coderl.sandbox.lane` as a fresh interpreter with an empty environment. It never reads a
payload: the child gets its end of the run's socket, and an earlier run leaves nothing in memory that a later
one could find.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING, NoReturn

from coderl.sandbox import confine, wire
from coderl.sandbox.preload import COMMON, everything, preload
from coderl.sandbox.runner import describe, serve
from coderl.sandbox.wipe import wipe

if TYPE_CHECKING:
    from collections.abc import Callable

CONTROL = 3
"""The descriptor of the control socket in the zygote, and of the run socket in a child."""
_POLL_SECONDS = 2.0


class Zygote:
    """The loop of one lane.

    Args:
        control: Sequenced-packet socket to the trusted side; its end ends the lane.
        folder: The lane's own folder. Runs work in ``folder/work``.
    """

    def __init__(self, control: socket.socket, folder: str) -> None:
        self.control = control
        self.folder = folder
        self.work = os.path.join(folder, "work")
        self.pid = os.getpid()
        self.parent = os.getppid()
        self.uid = confine.user_for_runs()
        self.owned = confine.is_own(self.uid)
        others = 0 if self.owned else confine.tasks_of(self.uid)
        self.processes = others + confine.PROCESSES

    def run_forever(self) -> None:
        """Serve jobs until the trusted side is gone."""
        self.clean()
        self.control.send(wire.HELLO.pack(wire.GREETING, self.pid, self.uid))
        while True:
            ready, _, _ = select.select([self.control], [], [], _POLL_SECONDS)
            if os.getppid() != self.parent:
                return
            if not ready:
                continue
            data, descriptors, _, _ = socket.recv_fds(self.control, wire.JOB.size, 1)
            if not data:
                return
            number, seconds, memory = wire.JOB.unpack(data)
            if not self.serve_job(number, seconds, memory, descriptors[0]):
                return

    def serve_job(self, number: int, seconds: float, memory: int, descriptor: int) -> bool:
        """Run one job to its end and report it. False if the trusted side has gone."""
        began = time.monotonic()
        try:
            child = os.fork()
        except OSError:
            os.close(descriptor)
            self.control.send(wire.DONE.pack(number, wire.NOT_STARTED, 0, 0.0))
            return True
        if child == 0:
            self.become_child(descriptor, memory, seconds)
        os.close(descriptor)
        how, alive = self.watch(child, began + seconds)
        taken = time.monotonic() - began
        status = self.reap(child)
        self.clean()
        if alive:
            self.control.send(wire.DONE.pack(number, how, status, taken))
        return alive

    def become_child(self, descriptor: int, memory: int, seconds: float) -> NoReturn:
        """The forked side: confinement first, then the payload. Never returns."""
        try:
            os.dup2(descriptor, CONTROL)
            os.closerange(CONTROL + 1, confine.OPEN_FILES)
            try:
                confine.confine(self.uid, self.work, self.pid, memory, seconds, self.processes)
            except OSError as error:
                os.write(CONTROL, wire.pack_record(wire.Record("broken", value=describe(error))))
                os._exit(1)
            serve(CONTROL)
        except BaseException:
            os._exit(1)
        os._exit(0)

    def watch(self, child: int, deadline: float) -> tuple[int, bool]:
        """Wait for the child to end, its deadline, or the end of the trusted side."""
        handle = os.pidfd_open(child)
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        poller.register(self.control, select.POLLHUP)
        try:
            while (left := deadline - time.monotonic()) > 0:
                events = dict(poller.poll(max(1, min(left, _POLL_SECONDS) * 1000)))
                if handle in events:
                    return wire.EXITED, True
                if events or os.getppid() != self.parent:
                    return wire.TIMED_OUT, False
            return wire.TIMED_OUT, True
        finally:
            os.close(handle)

    def reap(self, child: int) -> int:
        """Kill the child and everything it has left; gives the child's exit status."""
        status = 0
        _kill(os.killpg, child)
        _kill(os.kill, child)
        while True:
            try:
                pid, code = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return status
            if pid == child:
                status = os.waitstatus_to_exitcode(code)
            elif pid == 0:
                self.kill_rest()

    def kill_rest(self) -> None:
        """Kill processes that left the child's group; being a subreaper, this one has adopted the orphans."""
        for pid in self.children():
            _kill(os.killpg, pid)
            _kill(os.kill, pid)
        if self.owned:
            for pid in confine.processes_of(self.uid):
                _kill(os.kill, pid)
        time.sleep(0.001)

    def children(self) -> list[int]:
        """Direct children, by ``/proc``."""
        try:
            with open(f"/proc/self/task/{self.pid}/children", encoding="ascii") as file:
                return [int(pid) for pid in file.read().split()]
        except OSError:
            return [pid for pid in confine.processes_of(self.uid) if _parent_of(pid) == self.pid]

    def clean(self) -> None:
        """An empty working folder that belongs to the run's user."""
        if not wipe(self.work):
            os.makedirs(self.work, exist_ok=True)
            if self.uid != os.getuid():
                os.chown(self.work, self.uid, self.uid)
        os.chmod(self.work, 0o700)

    def leave(self) -> None:
        """Remove the lane's folder, and the sandbox's once it is empty."""
        wipe(self.work)
        for folder in (self.work, self.folder, os.path.dirname(self.folder)):
            try:
                os.rmdir(folder)
            except OSError:
                return


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _kill(kill: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        kill(pid, signal.SIGKILL)


def main(folder: str, descriptor: int) -> None:
    """Serve the control socket until it closes.

    Args:
        folder: See :class:`Zygote`.
        descriptor: The inherited control socket; it is moved out of the way of a run's.
    """
    if descriptor != CONTROL:
        os.dup2(descriptor, CONTROL)
        os.close(descriptor)
    control = socket.socket(fileno=CONTROL)
    confine.shield()
    zygote = Zygote(control, folder)
    preload(COMMON if confine.can_read(zygote.uid, os.__file__) else everything())
    gc.collect()
    gc.freeze()
    with contextlib.suppress(
        OSError, struct.error, IndexError
    ):  # the trusted side is gone, or talks nonsense
        zygote.run_forever()
    zygote.leave()
