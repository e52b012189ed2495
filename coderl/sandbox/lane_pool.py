"""The lanes and threads of a started sandbox."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.sandbox.lane import Lane

if TYPE_CHECKING:
    from coderl.sandbox.jail import Jail


class LanePool:
    """A fixed number of places for lanes; an empty place is filled when it is its turn."""

    def __init__(self, jail: Jail, folder: str, places: int) -> None:
        self._jail = jail
        self._folder = folder
        self._numbers = count()
        self._out: set[Lane] = set()
        self._closing = False
        self._lanes: queue.SimpleQueue[Lane | None] = queue.SimpleQueue()
        for _ in range(places):
            self._lanes.put(None)

    def take(self) -> Lane:
        """A lane for one run, to be given back or lost."""
        lane = self._lanes.get()
        try:
            lane = lane or Lane(self._jail, f"{self._folder}-{next(self._numbers)}")
        except BaseException:
            self._lanes.put(None)
            raise
        self._out.add(lane)
        if self._closing:
            lane.end()
        return lane

    def give(self, lane: Lane) -> None:
        """Back in its place."""
        self._out.discard(lane)
        self._lanes.put(lane)

    def lose(self, lane: Lane) -> None:
        """End it; its place is empty."""
        self._out.discard(lane)
        with contextlib.suppress(OSError):
            lane.close(patience=0.0)
        self._lanes.put(None)

    def stop(self) -> None:
        """Cut short what runs, and what is about to."""
        self._closing = True
        for lane in list(self._out):
            lane.end()

    def close(self) -> None:
        """End them all. Nobody may hold one."""
        while True:
            try:
                lane = self._lanes.get_nowait()
            except queue.Empty:
                return
            if lane is not None:
                lane.close()


class LanePools:
    """What a started sandbox holds.

    Args:
        jail: The isolation of the lanes.
        workers: Programs that run at a time.

    Attributes:
        threads: Each takes one program through its run.
        candidates: Lanes for candidates.
        closing: Whether it is coming to its end: runs are cut short.
        tests: Lanes for trusted tests, in rpc grading. They never see a candidate, so that nothing of one can
            wait for the tests of the next.

    Raises:
        UserError: The lanes cannot be started.
    """

    def __init__(self, jail: Jail, workers: int) -> None:
        self._owner = os.getpid()
        self.closing = False
        self._folder = "" if jail.bubblewrap else tempfile.mkdtemp(prefix="coderl-")
        if self._folder:
            os.chmod(self._folder, 0o711)
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="coderl-lane")
        self.candidates = LanePool(jail, os.path.join(self._folder, "candidates"), workers)
        self.tests = LanePool(jail, os.path.join(self._folder, "tests"), workers)
        try:
            for lane in [self.candidates.take() for _ in range(workers)]:  # they start side by side
                self.candidates.give(lane)
        except OSError as error:
            self.close()
            raise UserError(f"the sandbox cannot start its processes: {error}: lower its workers") from None

    def close(self) -> None:
        """End everything, once."""
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
