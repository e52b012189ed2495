"""A pool of lanes: programs in, verdicts out, in order."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import tempfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from coderl.errors import UsageError, UserError
from coderl.sandbox.grading import Job, Mode, judge, prepare, safe
from coderl.sandbox.jail import Jail, probe, require
from coderl.sandbox.lane import Lane, LaneLost
from coderl.types import Execution

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from coderl.sandbox.plan import Program
    from coderl.types import Tier

MOST_WORKERS = 16


class Sandbox:
    """Runs untrusted programs against their tests, outside this process.

    Lanes start with the first run (or :meth:`start`) and stay until :meth:`close`. Every method may be called
    from any thread. A sandbox belongs to the process that made it: a fork of that process must make its own.

    Args:
        workers: Lanes, each runs one program at a time; by default one for each usable core, 16 at most.
        timeout: Seconds of wall time for a program with all its tests.
        grading: ``auto`` seals what can be sealed and runs the rest inline; ``sealed`` and ``inline`` insist.
        memory_mb: MiB of address space that a program may use above the interpreter's own.
        allow_weak_isolation: Accept tier C (see :mod:`coderl.sandbox.jail`).

    Raises:
        UsageError: An argument is out of range, or names a grading that this version does not have.
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout: float = 3.0,
        grading: Mode = "auto",
        memory_mb: int = 1024,
        allow_weak_isolation: bool = False,
    ) -> None:
        _check(workers, timeout, grading, memory_mb)
        self.workers = workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        self.timeout = timeout
        self.grading: Mode = grading
        self.memory_mb = memory_mb
        self.allow_weak_isolation = allow_weak_isolation
        self._lock = threading.Lock()
        self._jail: Jail | None = None
        self._running: _Running | None = None

    @property
    def jail(self) -> Jail:
        """The isolation that runs get here."""
        if self._jail is None:
            self._jail = probe()
        return self._jail

    @property
    def tier(self) -> Tier:
        """The isolation tier: ``"A"``, ``"B"`` or ``"C"``."""
        return self.jail.tier

    def start(self) -> None:
        """Start the lanes, if they are not running.

        Raises:
            UserError: The isolation is weak and nobody has allowed it.
        """
        self._started()

    def _started(self) -> _Running:
        with self._lock:
            if self._running is None:
                require(self.jail, self.allow_weak_isolation)
                self._running = _Running(self.jail, self.workers)
                self._finalizer = weakref.finalize(self, self._running.close)
            return self._running

    def run(
        self, programs: Sequence[Program], progress: bool | Callable[[int, int], None] = False
    ) -> list[Execution]:
        """Run programs and give their verdicts, in the same order.

        Args:
            programs: What to run.
            progress: True for a progress bar, or a function that is called with the number done and the
                total.

        Raises:
            UserError: Weak isolation that nobody has allowed, or tests that are not valid.
        """
        if not programs:
            return []
        jobs = [prepare(program, self.grading) for program in programs]
        running = self._started()
        futures = [running.threads.submit(self._one, running, job) for job in jobs]
        try:
            _watch(futures, progress)
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _one(self, running: _Running, job: Job) -> Execution:
        """One verdict. What says nothing about the program is tried once more, in another lane if need be."""
        result = self._attempt(running, job)
        return self._attempt(running, job) if result.outcome == "infra_error" else result

    def _attempt(self, running: _Running, job: Job) -> Execution:
        lane = None
        try:
            lane = running.take()
            raw = lane.run(job.payload, self.timeout, self.memory_mb << 20)
        except (LaneLost, OSError) as error:
            running.lose(lane)
            message = safe(f"the lane was lost: {error}")
            return Execution("infra_error", 0, job.plan.total, message, tier=self.tier)
        running.give(lane)
        return judge(job, raw, self.tier)

    def close(self) -> None:
        """End every lane and remove what they wrote. The sandbox may be started again."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a sandbox holds processes and cannot be pickled: make one in each process")


class _Running:
    """The lanes and threads of a started sandbox."""

    def __init__(self, jail: Jail, workers: int) -> None:
        self.jail = jail
        self.folder = tempfile.mkdtemp(prefix="coderl-")
        os.chmod(self.folder, 0o711)
        self.owner = os.getpid()
        self.numbers = count()
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="coderl-lane")
        self.lanes: queue.SimpleQueue[Lane | None] = queue.SimpleQueue()
        try:
            for _ in range(workers):
                self.lanes.put(self.open())
        except OSError as error:
            self.close()
            raise UserError(f"the sandbox cannot start its processes: {error}: lower its workers") from None

    def open(self) -> Lane:
        return Lane(self.jail, os.path.join(self.folder, str(next(self.numbers))))

    def take(self) -> Lane:
        """A lane for one run; the place of a lost one is filled with a new one."""
        lane = self.lanes.get()
        if lane is not None:
            return lane
        try:
            return self.open()
        except BaseException:
            self.lanes.put(None)
            raise

    def give(self, lane: Lane) -> None:
        self.lanes.put(lane)

    def lose(self, lane: Lane | None) -> None:
        if lane is not None:
            with contextlib.suppress(OSError):
                lane.close(patience=0.0)
            self.lanes.put(None)

    def close(self) -> None:
        if os.getpid() != self.owner:  # in a fork of the owner, whose lanes these still are
            return
        self.threads.shutdown(cancel_futures=True)
        while True:
            try:
                lane = self.lanes.get_nowait()
            except queue.Empty:
                break
            if lane is not None:
                lane.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _watch(futures: list[Future[Execution]], progress: bool | Callable[[int, int], None]) -> None:
    """Report each program as it ends."""
    if progress is False:
        return
    done = as_completed(futures)
    if callable(progress):
        for number, _ in enumerate(done, 1):
            progress(number, len(futures))
        return
    from tqdm.auto import tqdm

    for _ in tqdm(done, total=len(futures), desc="running programs", unit="program", leave=False):
        pass


def _check(workers: int | None, timeout: float, grading: str, memory_mb: int) -> None:
    if grading == "rpc":
        raise UsageError(
            "grading: rpc is not available in this version: use auto, which runs such tests inline"
        )
    if grading not in ("auto", "sealed", "inline"):
        raise UsageError(f"unknown grading {grading!r}: use auto, sealed or inline")
    if workers is not None and workers < 1:
        raise UsageError(f"sandbox workers is {workers}: use 1 or more, or leave it out for one a core")
    if not 0 < timeout < 1e6:
        raise UsageError(f"sandbox timeout is {timeout}: use a number of seconds above 0")
    if memory_mb < 16:
        raise UsageError(f"sandbox memory_mb is {memory_mb}: use 16 or more")
