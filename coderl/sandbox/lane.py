"""The trusted side of one lane: starts its zygote, hands it one run at a time, and never waits for ever."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coderl.sandbox import wire
from coderl.sandbox.confine import is_own, processes_of
from coderl.sandbox.wipe import wipe

if TYPE_CHECKING:
    from coderl.sandbox.jail import Jail

START_SECONDS = 60.0
GRACE_SECONDS = 10.0
"""Over a run's budget, for killing, reaping and wiping; a lane that takes longer is replaced."""


class LaneLost(Exception):
    """The zygote died, hung, or answered out of turn. The lane is of no more use."""


@dataclass(frozen=True, slots=True)
class RawRun:
    """What came back of one run.

    Attributes:
        data: The child's records, as bytes not yet looked at.
        how: ``wire.EXITED``, ``wire.TIMED_OUT`` or ``wire.NOT_STARTED``.
        status: Exit status, or minus the signal that killed the child.
        seconds: Wall time from fork to end.
        overflow: The child answered more than ``wire.OUTPUT_LIMIT``.
    """

    data: bytes
    how: int
    status: int
    seconds: float
    overflow: bool


class Lane:
    """One zygote process.

    The interpreter is started with ``subprocess``, which uses ``vfork`` or ``posix_spawn``: forking a trainer
    of several gigabytes for every lane would be slow, and would hand its memory to untrusted code.

    Args:
        jail: How it is isolated.
        folder: Its own folder, made here.
    """

    def __init__(self, jail: Jail, folder: str) -> None:
        self.folder = folder
        self.uid = os.getuid()
        self._number = 0
        self._greeted = False
        os.mkdir(folder, 0o711)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                jail.command(folder, theirs.fileno()),
                env=jail.environment(folder),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the zygote (of its launcher, where there is one)."""
        return self._process.pid

    def run(self, payload: bytes, seconds: float, memory: int) -> RawRun:
        """Run one payload in a fresh child.

        Args:
            payload: See ``runner.serve``.
            seconds: Time budget, wall clock.
            memory: Bytes of address space above the zygote's.

        Raises:
            LaneLost: Nothing can be said about the program; the lane must be closed.
        """
        try:
            self._greet()
            ours, theirs = socket.socketpair()
            with ours:
                self._send_job(theirs, seconds, memory)
                deadline = time.monotonic() + seconds + GRACE_SECONDS
                data, overflow = _converse(ours, wire.frame(payload), deadline)
            how, status, taken = self._finish(deadline)
        except (OSError, EOFError, struct.error) as error:
            raise LaneLost(f"{type(error).__name__}: {error}") from None
        return RawRun(data, how, status, taken, overflow)

    def _greet(self) -> None:
        if self._greeted:
            return
        self._control.settimeout(START_SECONDS)
        word, _, self.uid = wire.HELLO.unpack(self._control.recv(wire.HELLO.size))
        if word != wire.GREETING:
            raise LaneLost("the zygote did not greet")
        self._greeted = True

    def _send_job(self, theirs: socket.socket, seconds: float, memory: int) -> None:
        self._number = (self._number + 1) % (1 << 32)
        with theirs:
            job = wire.JOB.pack(self._number, seconds, memory)
            socket.send_fds(self._control, [job], [theirs.fileno()])

    def _finish(self, deadline: float) -> tuple[int, int, float]:
        self._control.settimeout(max(0.1, deadline - time.monotonic()))
        number, how, status, taken = wire.DONE.unpack(self._control.recv(wire.DONE.size))
        if number != self._number:
            raise LaneLost("the zygote answered out of turn")
        return how, status, taken

    def close(self, patience: float = 2.0) -> None:
        """End the lane and everything in it.

        Args:
            patience: Seconds that the zygote gets to clean up before it is killed.
        """
        self._control.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._kill()
        if is_own(self.uid):  # a zygote that was killed cannot have reaped its runs
            _kill_all_of(self.uid)
        with contextlib.suppress(OSError):
            wipe(self.folder)
            os.rmdir(self.folder)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


def _kill_all_of(uid: int) -> None:
    """Kill what runs under a user id that belongs to one lane alone."""
    for _ in range(100):
        left = processes_of(uid)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _converse(ours: socket.socket, data: bytes, deadline: float) -> tuple[bytes, bool]:
    """Send the payload and read the answers until every holder of the other end is dead.

    Reading goes on while sending does, so that neither side can wait for the other.
    """
    ours.setblocking(False)
    poller = select.poll()
    poller.register(ours, select.POLLIN | select.POLLOUT)
    rest, size = memoryview(data), 0
    parts: list[bytes] = []
    while size <= wire.OUTPUT_LIMIT:
        events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not events:
            raise EOFError("the run did not end")
        if rest and events[0][1] & select.POLLOUT:
            rest = _push(ours, rest)
            if not rest:
                poller.modify(ours, select.POLLIN)
        if events[0][1] & ~select.POLLOUT:
            part = _pull(ours)
            if not part:
                return b"".join(parts), False
            parts.append(part)
            size += len(part)
    return b"".join(parts), True


def _push(ours: socket.socket, rest: memoryview) -> memoryview:
    try:
        return rest[ours.send(rest) :]
    except (BrokenPipeError, ConnectionResetError):  # it died before it read everything
        return rest[:0]


def _pull(ours: socket.socket) -> bytes:
    try:
        return ours.recv(1 << 18)
    except ConnectionResetError:
        return b""
