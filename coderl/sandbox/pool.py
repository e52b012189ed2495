"""The sandbox: programs in, verdicts out, in order.

The way of one verdict:

1. :class:`Sandbox` takes a :class:`~coderl.sandbox.program.Program`, and :mod:`coderl.sandbox.checks.choose`
   the way to grade it: a :class:`~coderl.sandbox.checks.base.Check` with the payloads to send.
2. A thread of the pool takes a free lane (:mod:`coderl.sandbox.lane_pool`), two for rpc grading, and
   :func:`~coderl.sandbox.lane.run_together` sends the payloads.
3. The lane is a jailed process (:mod:`coderl.sandbox.jail`) in which :mod:`coderl.sandbox.inside.zygote`
   forks a confined child for each run, kills it when its time is up, and cleans up after it.
4. In the child :mod:`coderl.sandbox.inside.runner` runs the candidate, and writes records of what came of it.
5. The check reads the records, compares, and makes the :class:`~coderl.types.Execution`.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections import Counter, deque
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from importlib.metadata import version
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self, get_args

from coderl import __version__
from coderl.errors import UsageError
from coderl.sandbox import usable
from coderl.sandbox.checks.base import BadTests, LostRun, safe
from coderl.sandbox.checks.choose import Chooser
from coderl.sandbox.lane import Lane, LaneHung, LaneLost, RawRun, run_together
from coderl.sandbox.lane_pool import LanePool, LanePools
from coderl.sandbox.probe import probe, require
from coderl.sandbox.program import GradingMode, ProgramRunner
from coderl.types import Execution

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from coderl.sandbox.checks.base import Check, RunInLanes
    from coderl.sandbox.jail import Jail
    from coderl.sandbox.program import Program
    from coderl.types import Grading, Outcome, Tier

MOST_WORKERS = 16
"""Lanes by default, at most."""
MOST_ASKED = 1024
"""Lanes that may be asked for: more are a typing error, and take minutes to start."""
TRUSTED_SECONDS = 20.0
"""Time for what tests compare with, once for each problem's tests, if programs get no more."""
PATIENCE = 4
"""Times its time limit that a program may take, alone, to have the processor for as long as that."""
AHEAD = 512
"""Programs in flight for each lane: what the others can get through while one waits out its time."""


class Sandbox(ProgramRunner):
    """Runs untrusted programs against their tests, outside this process.

    Lanes start with the first run (or :meth:`start`) and stay until :meth:`close`. Every method may be called
    from any thread. A sandbox belongs to the process that made it: a fork of that process must make its own.

    Args:
        workers: Lanes, each runs one program at a time; by default one for each usable core, 16 at most.
        timeout: Seconds of wall time for a program with all its tests.
        grading: ``auto`` takes the strongest that a problem's tests allow: sealed, rpc, partly or inline.
            Any other is an error where a test does not allow it.
        memory_mb: MiB of address space that a program may use above the interpreter's own.
        file_mb: MiB that a program's files may take, all together.
        allow_weak_isolation: Accept tier C (see :mod:`coderl.sandbox.jail`).

    Raises:
        UsageError: An argument is out of range, or names an unknown grading.
    """

    def __init__(
        self,
        workers: int | None = None,
        timeout: float = 3.0,
        grading: GradingMode = "auto",
        memory_mb: int = 2048,
        file_mb: int = 64,
        allow_weak_isolation: bool = False,
    ) -> None:
        _check(workers, timeout, grading, memory_mb, file_mb)
        self.workers = workers or min(usable.cores(), MOST_WORKERS)
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.file_mb = file_mb
        self.allow_weak_isolation = allow_weak_isolation
        self._lock = threading.Lock()
        self._jail: Jail | None = None
        self._chooser = Chooser(grading)
        self._lane_pools: LanePools | None = None

    @property
    def grading(self) -> GradingMode:
        """How programs are graded that do not ask for a way of their own."""
        return self._chooser.mode

    @property
    def inline_reasons(self) -> Counter[str]:
        """Why ``auto`` graded programs inline, and how many."""
        return self._chooser.inline_reasons

    @property
    def jail(self) -> Jail:
        """The isolation that runs get here."""
        if self._jail is None:
            self._jail = probe()
        return self._jail

    @property
    def identity(self) -> str:
        """Versions and limits, see :attr:`ProgramRunner.identity`."""
        limits = self.timeout, self.memory_mb, self.file_mb, self.grading, self.tier
        return repr((__version__, sys.version, version("numpy"), *limits))

    @property
    def tier(self) -> Tier:
        """The isolation tier: ``"A"``, ``"B"`` or ``"C"``."""
        return self.jail.tier

    def start(self) -> None:
        """Start the lanes, if they are not running.

        Raises:
            UserError: The isolation is weak, which is not allowed.
        """
        self._started()

    def _started(self) -> LanePools:
        with self._lock:
            if self._lane_pools is None:
                require(self.jail, self.allow_weak_isolation)
                self._lane_pools = LanePools(self.jail, self.workers, self.file_mb << 20)
                self._finalizer = weakref.finalize(self, self._lane_pools.close)
            return self._lane_pools

    def run(
        self, programs: Sequence[Program], progress: bool | Callable[[int, int], None] = False
    ) -> list[Execution]:
        """Run programs and give their verdicts, in the same order.

        Args:
            programs: What to run.
            progress: True for a progress bar, or a function that is called with the number done and the
                total.

        Raises:
            UserError: Weak isolation that is not allowed, or tests that cannot be graded as was asked for.
            CancelledError: The sandbox was closed meanwhile, by another thread.
            KeyboardInterrupt: Ctrl-C, which also closes the sandbox: nothing is waited for.
        """
        futures = [self.submit(program) for program in programs]
        try:
            _watch(futures, progress)
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            for future in futures:
                future.cancel()

    def submit(self, program: Program) -> Future[Execution]:
        """Have a program run by the next free lane, and give its execution to come.

        Raises:
            UserError: Weak isolation that is not allowed. Other errors are the future's, see :meth:`run`.
        """
        pools = self._started()
        return pools.threads.submit(self._verdict, pools, program)

    def stream(self, programs: Iterable[Program], ahead: int | None = None) -> Iterator[Execution]:
        """Run programs as they are read, and give their verdicts in the same order as they come.

        Args:
            programs: What to run. It is read in the calling thread, and never further than ``ahead`` programs
                past the verdict that was asked for last.
            ahead: Programs in flight, at most; by default 512 for each lane.

        Raises:
            UserError: See :meth:`run`. It is raised in the program's place, after the verdicts of those
                before it. An error of ``programs`` itself is raised in the same way.
        """
        limit = ahead or AHEAD * self.workers
        in_flight: deque[Future[Execution]] = deque()
        try:
            for future in self._submitted(programs):
                in_flight.append(future)
                while in_flight and (len(in_flight) >= limit or in_flight[0].done()):
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            for future in in_flight:
                future.cancel()

    def way(self, program: Program) -> tuple[Grading, str]:
        """How programs with these tests are graded, and why in no stronger way.

        Args:
            program: One of them; its code does not matter.

        Returns:
            The way, and the reason; empty where there is none stronger.

        Raises:
            UserError: A way was asked for by name and the tests do not allow it.
            BadTests: The tests are not Python.
        """
        return self._chooser.way(program, *self._trusted_runs(self._started(), self.timeout))

    def _submitted(self, programs: Iterable[Program]) -> Iterator[Future[Execution]]:
        """The verdicts to come, as futures. An error ends them, and is the last of them."""
        try:
            for program in programs:
                yield self.submit(program)
        except Exception as error:
            failed: Future[Execution] = Future()
            failed.set_exception(error)
            yield failed

    def _verdict(self, pools: LanePools, program: Program) -> Execution:
        """One verdict.

        A failure of ours is tried once more, in other lanes if need be; and so, alone, is a program whose
        time was over because others had the processor.
        """
        result, starved = self._attempt(pools, program)
        if result.outcome == "infra_error" or starved:
            result, starved = self._attempt(pools, program, again=True, alone=starved)
        if starved:
            return replace(result, outcome="infra_error", message="others had the processor for too long")
        return result

    def _attempt(
        self, pools: LanePools, program: Program, again: bool = False, alone: bool = False
    ) -> tuple[Execution, bool]:
        """One verdict, and whether the program was kept from the processor."""
        seconds = self.timeout if program.timeout is None else program.timeout
        check: Check | None = None
        starved = False

        def run(payloads: Sequence[bytes], trusted: bool = False) -> list[RawRun]:
            nonlocal starved
            with pools.running(alone):
                # Alone, it is given more time for as much of the processor.
                clock, cpu = (PATIENCE * seconds, seconds) if alone else (seconds, math.inf)
                runs = self._run_in_lanes(pools, clock, payloads, trusted, cpu)
            # A program that sleeps is no slower for others; alone, only a lane that wakes up late tells.
            kept = [one.starved and (not alone or one.late > one.seconds / 10) for one in runs]
            starved = starved or any(kept)
            return runs

        try:
            check = self._chooser.check(program, *self._trusted_runs(pools, seconds))
            return check.grade(run, self.tier), starved
        except BadTests as error:
            return Execution("failed", 0, len(program.tests) or 1, safe(str(error)), tier=self.tier), False
        except (LaneLost, LostRun, OSError) as error:
            if pools.closing:
                raise CancelledError("the sandbox was closed") from None
            message = safe(f"the lane was lost: {error}")
            # One hung lane is bad luck, two are the program's doing and must not pass for a failure of ours.
            hung = again and check and isinstance(error, LaneHung)
            outcome: Outcome = "error" if hung else "infra_error"
            total, grading = (check.total, check.grading) if check else (len(program.tests), "inline")
            return Execution(outcome, 0, total, message, 0.0, grading, self.tier), False

    def _trusted_runs(self, pools: LanePools, seconds: float) -> tuple[RunInLanes, RunInLanes]:
        """What runs tests alone, and what runs a right program, in the lanes for tests if it is alone."""

        def run_tests(payloads: Sequence[bytes], trusted: bool = True) -> list[RawRun]:
            return self._run_in_lanes(pools, max(seconds, TRUSTED_SECONDS), payloads, trusted)

        def run_right(payloads: Sequence[bytes], trusted: bool = True) -> list[RawRun]:
            # What comes of it holds for all programs with the same tests, so it must not depend on how busy
            # the machine is: the processor time is limited, and the clock only for programs that sleep.
            cpu = max(seconds, self.timeout)
            clock = max(cpu, TRUSTED_SECONDS)
            return self._run_in_lanes(pools, clock, payloads, trusted=len(payloads) == 1, cpu=cpu)

        return run_tests, run_right

    def _run_in_lanes(
        self,
        pools: LanePools,
        seconds: float,
        payloads: Sequence[bytes],
        trusted: bool = False,
        cpu: float = math.inf,
    ) -> list[RawRun]:
        """Run payloads in a lane each (see :class:`~coderl.sandbox.checks.base.RunInLanes`)."""
        taken: list[tuple[LanePool, Lane]] = []
        try:
            for pool in (pools.candidates, pools.tests)[trusted : trusted + len(payloads)]:
                taken.append((pool, pool.take()))
            runs = run_together([lane for _, lane in taken], payloads, seconds, self.memory_mb << 20, cpu)
        except BaseException:  # whatever it is, such as no memory: the places must not be lost with the lanes
            for pool, lane in taken:
                pool.lose(lane)
            raise
        for pool, lane in taken:
            pool.give(lane)
        if pools.closing:  # it may have been cut short, through no fault of the program
            raise CancelledError("the sandbox was closed")
        return runs

    def close(self) -> None:
        """End every lane and remove what they wrote. The sandbox may be started again."""
        with self._lock:
            pools, self._lane_pools = self._lane_pools, None
        if pools is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a sandbox holds processes and cannot be pickled: make one in each process")


def _watch(futures: list[Future[Execution]], progress: bool | Callable[[int, int], None]) -> None:
    """Report each program as it ends."""
    if progress is False:
        return
    # Not as_completed: it waits for ever for what a close() in another thread has cancelled.
    ended: SimpleQueue[Future[Execution]] = SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    done = (ended.get() for _ in futures)
    if callable(progress):
        for number, _ in enumerate(done, 1):
            progress(number, len(futures))
        return
    from tqdm.auto import tqdm

    for _ in tqdm(done, total=len(futures), desc="running programs", unit="program", leave=False):
        pass


def _check(workers: int | None, timeout: float, grading: str, memory_mb: int, file_mb: int) -> None:
    *modes, last = get_args(GradingMode)
    if grading not in (*modes, last):
        raise UsageError(f"unknown grading {grading!r}: use {', '.join(modes)} or {last}")
    if workers is not None and not 1 <= workers <= MOST_ASKED:
        raise UsageError(
            f"sandbox workers is {workers}: use 1 to {MOST_ASKED}, or leave it out for one a core"
        )
    if not 0 < timeout < 1e6:
        raise UsageError(f"sandbox timeout is {timeout}: use a number of seconds above 0")
    if memory_mb < 16:
        raise UsageError(f"sandbox memory_mb is {memory_mb}: use 16 or more")
    if file_mb < 1:
        raise UsageError(f"sandbox file_mb is {file_mb}: use 1 or more")
