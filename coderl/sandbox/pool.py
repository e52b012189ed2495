"""A pool of lanes: programs in, verdicts out, in order."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

from coderl.errors import UsageError, UserError
from coderl.sandbox import cores
from coderl.sandbox.checks.grading import Job, Mode, UnfitForRpc, grading_of, judge, prepare, safe
from coderl.sandbox.lane import Lane, LaneHung, LaneLost, run_together
from coderl.sandbox.lane_pool import LanePool, LanePools
from coderl.sandbox.probe import probe, require
from coderl.sandbox.program import ProgramRunner
from coderl.types import Execution

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from coderl.sandbox.jail import Jail
    from coderl.sandbox.program import Program
    from coderl.types import Outcome, Tier

MOST_WORKERS = 16
"""Lanes, where nobody says how many."""
MOST_ASKED = 1024
"""Lanes that may be asked for: more are a slip of the finger, and take minutes to start."""
AHEAD = 512
"""Programs in flight for each lane: what the others can get through while one waits out its time."""


class Sandbox(ProgramRunner):
    """Runs untrusted programs against their tests, outside this process.

    Lanes start with the first run (or :meth:`start`) and stay until :meth:`close`. Every method may be called
    from any thread. A sandbox belongs to the process that made it: a fork of that process must make its own.

    Args:
        workers: Lanes, each runs one program at a time; by default one for each usable core, 16 at most.
        timeout: Seconds of wall time for a program with all its tests.
        grading: ``auto`` takes the strongest that a problem's tests allow: sealed, else rpc, else inline.
            The others insist.
        memory_mb: MiB of address space that a program may use above the interpreter's own.
        allow_weak_isolation: Accept tier C (see :mod:`coderl.sandbox.jail`).

    Attributes:
        inline_reasons: Why ``auto`` graded programs inline, and how many.

    Raises:
        UsageError: An argument is out of range, or names an unknown grading.
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
        self.workers = workers or min(cores.usable(), MOST_WORKERS)
        self.timeout = timeout
        self.grading: Mode = grading
        self.memory_mb = memory_mb
        self.allow_weak_isolation = allow_weak_isolation
        self._lock = threading.Lock()
        self._jail: Jail | None = None
        self._inline: dict[int, str] = {}  # why tests, by their hash, turned out to be unfit for rpc
        self.inline_reasons: Counter[str] = Counter()
        self._lane_pools: LanePools | None = None

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

    def _started(self) -> LanePools:
        with self._lock:
            if self._lane_pools is None:
                require(self.jail, self.allow_weak_isolation)
                self._lane_pools = LanePools(self.jail, self.workers)
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
            UserError: Weak isolation that nobody has allowed, or tests that are not valid.
            CancelledError: The sandbox was closed meanwhile, by another thread.
            KeyboardInterrupt: Ctrl-C, which also closes the sandbox: nothing is waited for.
        """
        if not programs:
            return []
        jobs = [self._prepared(program) for program in programs]
        pools = self._started()
        both = zip(programs, jobs, strict=True)
        futures = [pools.threads.submit(self._one, pools, program, job) for program, job in both]
        try:
            _watch(futures, progress)
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            for future in futures:
                future.cancel()

    def stream(self, programs: Iterable[Program], ahead: int | None = None) -> Iterator[Execution]:
        """Run programs as they are read, and give their verdicts in the same order as they come.

        Args:
            programs: What to run. It is read in the calling thread, and never further than ``ahead`` programs
                past the verdict that was asked for last.
            ahead: Programs in flight, at most; by default 512 for each lane.

        Raises:
            UserError: See :meth:`run`. It comes in the program's place: after the verdicts of those before.
                An error of ``programs`` itself does the same.
        """
        limit = ahead or AHEAD * self.workers
        flying: deque[Future[Execution]] = deque()
        try:
            for future in self._submitted(programs):
                flying.append(future)
                while flying and (len(flying) >= limit or flying[0].done()):
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            for future in flying:
                future.cancel()

    def _submitted(self, programs: Iterable[Program]) -> Iterator[Future[Execution]]:
        """The verdicts to come. An error ends them and is the last of them."""
        pools = self._started()
        try:
            for program in programs:
                yield pools.threads.submit(self._one, pools, program, self._prepared(program))
        except Exception as error:
            failed: Future[Execution] = Future()
            failed.set_exception(error)
            yield failed

    def _prepared(self, program: Program) -> Job:
        unfit = self._inline.get(_tests_of(program), "")
        job = prepare(program, "inline" if unfit else program.grading or self.grading)
        if reason := unfit or getattr(job.plan, "reason", ""):
            with self._lock:
                self.inline_reasons[reason] += 1
        return job

    def _one(self, pools: LanePools, program: Program, job: Job) -> Execution:
        """One verdict. What says nothing about the program is tried once more, in other lanes if need be."""
        try:
            result = self._attempt(pools, program, job)
            if result.outcome == "infra_error":
                result = self._attempt(pools, program, job, again=True)
            return result
        except UnfitForRpc as unfit:
            if (program.grading or self.grading) != "auto":
                raise UserError(f"these tests cannot be graded rpc: {unfit}: use grading: auto") from None
            self._inline[_tests_of(program)] = f"rpc: {unfit}"
            return self._one(pools, program, self._prepared(program))

    def _attempt(self, pools: LanePools, program: Program, job: Job, again: bool = False) -> Execution:
        payloads = [job.payload, *filter(None, [job.tests])]
        taken: list[tuple[LanePool, Lane]] = []
        try:
            for pool in (pools.candidates, pools.tests)[: len(payloads)]:
                taken.append((pool, pool.take()))
            timeout = self.timeout if program.timeout is None else program.timeout
            runs = run_together([lane for _, lane in taken], payloads, timeout, self.memory_mb << 20)
        except (LaneLost, OSError) as error:
            for pool, lane in taken:
                pool.lose(lane)
            if pools.closing:
                raise CancelledError("the sandbox was closed") from None
            message = safe(f"the lane was lost: {error}")
            # One hung lane is bad luck, two are the program's doing and must not pass for a failure of ours.
            outcome: Outcome = "error" if again and isinstance(error, LaneHung) else "infra_error"
            return Execution(outcome, 0, job.plan.total, message, 0.0, grading_of(job), self.tier)
        except BaseException:  # such as no memory: the places must not be lost with the lanes
            for pool, lane in taken:
                pool.lose(lane)
            raise
        for pool, lane in taken:
            pool.give(lane)
        if pools.closing:  # it may have been cut short, which says nothing about the program
            raise CancelledError("the sandbox was closed")
        return judge(job, runs[0], self.tier, *runs[1:])

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


def _tests_of(program: Program) -> int:
    return hash((program.tests, program.setup, program.test, program.entry_point, program.helpers))


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


def _check(workers: int | None, timeout: float, grading: str, memory_mb: int) -> None:
    if grading not in ("auto", "sealed", "rpc", "inline"):
        raise UsageError(f"unknown grading {grading!r}: use auto, sealed, rpc or inline")
    if workers is not None and not 1 <= workers <= MOST_ASKED:
        raise UsageError(
            f"sandbox workers is {workers}: use 1 to {MOST_ASKED}, or leave it out for one a core"
        )
    if not 0 < timeout < 1e6:
        raise UsageError(f"sandbox timeout is {timeout}: use a number of seconds above 0")
    if memory_mb < 16:
        raise UsageError(f"sandbox memory_mb is {memory_mb}: use 16 or more")
