"""The trusted side of one lane: starts its zygote, and hands it one run at a time.

It waits for nothing without a deadline: whatever runs in the lane, the trainer goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coderl.sandbox.inside import wire
from coderl.sandbox.inside.confine import address_space, is_own, processes_of, tasks_of
from coderl.sandbox.inside.wipe import wipe
from coderl.sandbox.usable import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.sandbox.jail import Jail

START_SECONDS = 60.0
_MOST_GIVEN = 20
"""Times that a run may have left the processor to others and still be said to have waited by its own will."""
FILE_BYTES = 64 << 20
MARGIN = 1024
"""Processes and threads that the trainer's user may start anew without taking from the runs' share."""
_CHUNK = 1 << 18
_TIME = struct.Struct("@ll")  # seconds, microseconds
_CREDENTIALS = struct.Struct("=3i")  # process id, user id, group id
GRACE_SECONDS = 10.0
"""Over a run's budget, for killing, reaping and wiping; a lane that takes longer is replaced."""


class LaneLost(Exception):
    """The zygote died, hung, or answered out of turn. The lane is of no more use."""


class LaneHung(LaneLost):
    """The run's time is over and the lane has not cleaned up after it. A program can bring that about."""


@dataclass(frozen=True, slots=True)
class RawRun:
    """What came back of one run.

    Attributes:
        data: The child's records, as undecoded bytes.
        how: ``wire.EXITED``, ``wire.TIMED_OUT``, ``wire.NOT_STARTED``, ``wire.STOPPED`` or ``wire.FILLED``.
        status: Exit status, or minus the signal that killed the child.
        seconds: Wall time from fork to end.
        cpu: Processor time, of all its threads.
        gave_way: How often it had to leave the processor to others.
        late: Seconds by which its lane woke up late meanwhile: nobody on this machine gets the processor.
        overflow: The child answered more than ``wire.OUTPUT_LIMIT``.
    """

    data: bytes
    how: int
    status: int
    seconds: float
    cpu: float
    gave_way: int
    late: float
    overflow: bool

    @property
    def starved(self) -> bool:
        """Whether its time was over before it had the processor for half of it, though it asked for more."""
        waited = self.gave_way > _MOST_GIVEN or self.late > self.seconds / 10
        return self.how == wire.TIMED_OUT and self.cpu < self.seconds / 2 and waited


class Lane:
    """One zygote process.

    The interpreter is started with ``subprocess``, which uses ``vfork`` or ``posix_spawn``: forking a trainer
    of several gigabytes for every lane would be slow, and would hand its memory to untrusted code.

    Args:
        jail: How it is isolated.
        folder: Its own folder, made here; none is needed in a jail with a file system of its own.
        file_bytes: Bytes that a run's files may take, all together.
        tasks: Processes and threads that a run may have.
    """

    def __init__(self, jail: Jail, folder: str, file_bytes: int = FILE_BYTES, tasks: int = TASKS) -> None:
        self.folder = "" if jail.bubblewrap else folder
        self.pid = 0
        self._uid = os.getuid()
        self._number = 0
        self._baseline = 0
        self._tasks = tasks
        self._processes = 0
        self._ending = False
        if self.folder:
            os.mkdir(folder, 0o711)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with theirs:
            self._process = subprocess.Popen(
                jail.command(theirs.fileno(), file_bytes),
                env=jail.environment(folder),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # it ended at once: the greeting will not come
            self._control.send(jail.settings(folder, file_bytes))

    def greet(self) -> None:
        """Wait until the zygote is up, the first time.

        Raises:
            OSError: It does not come up.
            LaneLost: What answers is not a zygote.
        """
        if self.pid:
            return
        self._control.settimeout(START_SECONDS)
        space = socket.CMSG_SPACE(_CREDENTIALS.size)
        try:
            data, ancillary, _, _ = self._control.recvmsg(wire.HELLO.size, space)
        except TimeoutError:
            raise LaneLost("it does not start") from None
        word, self._uid = wire.HELLO.unpack(data)
        if word != wire.GREETING or not ancillary:
            raise LaneLost("the zygote did not greet")
        self.pid = _CREDENTIALS.unpack(ancillary[0][2])[0]  # seen from here, not from inside its namespace
        self._baseline = address_space(self.pid)
        others = 0 if is_own(self._uid) else tasks_of(self._uid) + MARGIN
        self._processes = others + self._tasks

    def begin(self, descriptors: list[int], seconds: float, cpu: float, memory: int) -> None:
        """Start a run in a fresh child.

        Args:
            descriptors: The run's socket, and the link's where there is one.
            seconds: Time budget, wall clock.
            cpu: Seconds of processor time.
            memory: Bytes of address space above the zygote's.
        """
        self._number = (self._number + 1) % (1 << 32)
        job = wire.JOB.pack(self._number, seconds, cpu, self._baseline + memory, self._processes)
        socket.send_fds(self._control, [job], descriptors)
        if self._ending:  # while this run was on its way
            self.stop()

    def end(self) -> None:
        """Stop the run under way, or about to start; there will be no other."""
        self._ending = True
        self.stop()

    def stop(self) -> None:
        """Stop the run under way, if there is one."""
        with contextlib.suppress(OSError):  # the lane has ended, which the run's own thread notices
            self._control.send(wire.STOP.pack(self._number))

    def finish(self, deadline: float) -> tuple[int, int, float, float, int, float]:
        """How the run ended and what it took (see ``wire.DONE``), once all of it is dead."""
        self._control.settimeout(max(0.1, deadline - time.monotonic()))
        number, *rest = wire.DONE.unpack(self._control.recv(wire.DONE.size))
        if number != self._number:
            raise LaneLost("the zygote answered out of turn")
        how, status, taken, cpu, gave_way, late = rest
        return how, status, taken, cpu, gave_way, late

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
        if is_own(self._uid):  # a zygote that was killed cannot have reaped its runs
            _kill_all_of(self._uid)
        if self.folder:
            with contextlib.suppress(OSError):
                wipe(self.folder)
                os.rmdir(self.folder)

    def _kill(self) -> None:
        for kill, pid in ((os.kill, self.pid), (os.killpg, self._process.pid)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if pid:
                    kill(pid, signal.SIGKILL)
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


def run_together(
    lanes: Sequence[Lane], payloads: Sequence[bytes], seconds: float, memory: int, cpu: float = math.inf
) -> list[RawRun]:
    """Run one payload in each of one or two lanes, in fresh children; two are linked by a socket.

    Args:
        lanes: The candidate's, then that of the tests.
        payloads: One for each lane, as ``inside.runner.serve`` reads them.
        seconds: Time budget, wall clock, of both together.
        memory: Bytes of address space above the zygote's, for each.
        cpu: Seconds of processor time, for each; by default more than the time budget allows.

    Raises:
        LaneLost: The run says nothing about the program; the lanes must be closed.
        LaneHung: The same, and the program may have caused it.
    """
    with contextlib.ExitStack() as stack:
        try:
            for lane in lanes:
                lane.greet()
            links = [stack.enter_context(end) for end in socket.socketpair()] if len(lanes) > 1 else []
            channels = [
                Channel(lane, wire.frame(payload)) for lane, payload in zip(lanes, payloads, strict=True)
            ]
            for channel in channels:
                stack.enter_context(channel.ours)
            for at, channel in enumerate(channels):
                link = [end.fileno() for end in links[at : at + 1]]
                channel.begin(link, seconds, min(cpu, int(seconds) + 3), memory)
            for end in links:
                end.close()
            deadline = time.monotonic() + seconds + GRACE_SECONDS
            exchange(channels, deadline)
            return [channel.result(deadline) for channel in channels]
        except TimeoutError:
            raise LaneHung("it does not come to an end") from None
        except (OSError, EOFError, struct.error, ValueError) as error:
            raise LaneLost(f"{type(error).__name__}: {error}") from None


class Channel:
    """The run socket of one lane: sends the payload and collects the records.

    Args:
        lane: Where the run takes place.
        data: The payload, as a frame.
    """

    def __init__(self, lane: Lane, data: bytes) -> None:
        self.lane = lane
        self.ours, self._theirs = socket.socketpair()
        self.ours.setblocking(False)
        self._unsent = memoryview(data)
        self._received: list[bytes] = []
        self._received_bytes = 0

    def begin(self, links: list[int], seconds: float, cpu: float, memory: int) -> None:
        """Start the run with its end of the socket."""
        with self._theirs:
            self.lane.begin([self._theirs.fileno(), *links], seconds, cpu, memory)

    def send_some(self) -> bool:
        """Send as much as the socket takes; true if there is more."""
        try:
            self._unsent = self._unsent[self.ours.send(self._unsent) :]
        except (BrokenPipeError, ConnectionResetError):  # it died before it read everything
            self._unsent = self._unsent[:0]
        return bool(self._unsent)

    def receive_some(self, flags: int = 0) -> bool:
        """Receive what is there; true if there may be more."""
        try:
            part = self.ours.recv(_CHUNK, flags)
        except ConnectionResetError:
            part = b""
        self._received.append(part)
        self._received_bytes += len(part)
        return bool(part) and self._received_bytes <= wire.OUTPUT_LIMIT

    def receive_all(self, deadline: float) -> None:
        """Receive the rest, waking up once for a run's whole answer instead of for each record.

        Raises:
            TimeoutError: The deadline has passed.
        """
        self.ours.setblocking(True)  # a time-out set in Python would wake up for each record
        more = True
        while more:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIME.pack(int(left), 1))
            with contextlib.suppress(BlockingIOError):
                more = self.receive_some(socket.MSG_WAITALL)

    def result(self, deadline: float) -> RawRun:
        """What came back, once the run has ended."""
        self.ours.close()  # a run that never stops answering is ended by that
        ended = self.lane.finish(deadline)
        overflow = self._received_bytes > wire.OUTPUT_LIMIT
        return RawRun(b"".join(self._received), *ended, overflow)


def exchange(channels: Sequence[Channel], deadline: float) -> None:
    """Send the payloads and read the answers until every holder of the other ends is dead.

    Reading goes on while sending does, so that neither side can wait for the other. Once the tests are
    through, the candidate's run is stopped.
    """
    if len(channels) == 1 and not channels[0].send_some():
        channels[0].receive_all(deadline)
        return
    poller = select.poll()
    going = {channel.ours.fileno(): channel for channel in channels}
    for descriptor in going:
        poller.register(descriptor, select.POLLIN | select.POLLOUT)
    while going:
        events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not events:
            raise TimeoutError
        for descriptor, event in events:
            channel = going[descriptor]
            if event & select.POLLOUT and not channel.send_some():
                poller.modify(descriptor, select.POLLIN)
            if event & ~select.POLLOUT and not channel.receive_some():
                poller.unregister(descriptor)
                del going[descriptor]
                if channel is not channels[0]:
                    channels[0].lane.stop()
