"""Lanes that are taken for one run at a time, and the threads that take programs through them."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.sandbox import usable
from coderl.sandbox.lane import Lane

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.sandbox.jail import Jail


class LanePool:
    """A fixed number of lanes. One that was lost is replaced when its place is next taken."""

    def __init__(self, jail: Jail, folder: str, places: int, file_bytes: int, tasks: int) -> None:
        self._jail = jail
        self._limits = file_bytes, tasks
        self._folder = folder
        self._numbers = count()
        self._taken: set[Lane] = set()
        self._closing = False
        self._lanes: queue.SimpleQueue[Lane | None] = queue.SimpleQueue()
        for _ in range(places):
            self._lanes.put(None)

    def take(self) -> Lane:
        """A lane for one run. Waits until one is free; hand it back with :meth:`give` or :meth:`lose`."""
        lane = self._lanes.get()
        try:
            lane = lane or Lane(self._jail, f"{self._folder}-{next(self._numbers)}", *self._limits)
        except BaseException:
            self._lanes.put(None)
            raise
        self._taken.add(lane)
        if self._closing:
            lane.end()
        return lane

    def give(self, lane: Lane) -> None:
        """Put a lane back after its run."""
        self._taken.discard(lane)
        self._lanes.put(lane)

    def lose(self, lane: Lane) -> None:
        """End a lane that is of no more use; its place is empty."""
        self._taken.discard(lane)
        with contextlib.suppress(OSError):
            lane.close(patience=0.0)
        self._lanes.put(None)

    def stop(self) -> None:
        """Cut short the runs under way, and those about to start."""
        self._closing = True
        for lane in list(self._taken):
            lane.end()

    def close(self) -> None:
        """End all lanes. None may be taken."""
        while True:
            try:
                lane = self._lanes.get_nowait()
            except queue.Empty:
                return
            if lane is not None:
                lane.close()


class LanePools:
    """The lanes and threads of a started sandbox.

    Args:
        jail: The isolation of the lanes.
        workers: Programs that run at a time.
        file_bytes: Bytes that a program's files may take, all together.

    Attributes:
        threads: Each takes one program through its run.
        candidates: Lanes for candidates.
        closing: Whether it is being closed: runs are cut short.
        tests: Lanes for trusted tests, in rpc grading. They never see a candidate, so that nothing of one can
            wait for the tests of the next.

    Raises:
        UserError: The lanes cannot be started.
    """

    def __init__(self, jail: Jail, workers: int, file_bytes: int) -> None:
        self._owner = os.getpid()
        self.closing = False
        self._running = 0
        self._turn = threading.Condition()
        self._folder = "" if jail.bubblewrap else tempfile.mkdtemp(prefix="coderl-")
        if self._folder:
            os.chmod(self._folder, 0o711)
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="coderl-lane")
        limits = file_bytes, usable.tasks_each(workers)
        self.candidates = LanePool(jail, os.path.join(self._folder, "candidates"), workers, *limits)
        self.tests = LanePool(jail, os.path.join(self._folder, "tests"), workers, *limits)
        try:
            for lane in [self.candidates.take() for _ in range(workers)]:  # they start side by side
                self.candidates.give(lane)
        except OSError as error:
            self.close()
            raise UserError(f"the sandbox cannot start its processes: {error}: lower its workers") from None

    @contextlib.contextmanager
    def running(self, alone: bool = False) -> Iterator[None]:
        """While a program runs; alone, none runs beside it."""
        if alone:
            with self._turn:  # which keeps others from starting
                self._turn.wait_for(lambda: not self._running or self.closing)
                yield
            return
        with self._turn:
            self._running += 1
        try:
            yield
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def close(self) -> None:
        """End all lanes and threads, once."""
        if os.getpid() != self._owner:  # in a fork of the owner, whose lanes these still are
            return
        self.closing = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for pool in (self.candidates, self.tests):
            pool.stop()
        with contextlib.suppress(RuntimeError):  # the last to let go of the sandbox was one of these threads
            self.threads.shutdown()
        self.candidates.close()
        self.tests.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
